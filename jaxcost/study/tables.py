"""A study's tables for other programs and for papers: CSV, LaTeX with booktabs, and jaxcost's citation for BibTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxcost.study.sheets import Sheet

CITATION = Path(__file__).parent.parent / "CITATION.cff"

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "→": r"$\rightarrow$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "×": r"$\times$",
    "µ": r"$\mu$",
    "α": r"$\alpha$",
}


def to_csv(sheet: Sheet) -> str:
    """Full values, one line a row; a heading says what its figures are, such as `step_flops (compiled)`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(f"{h.key} ({h.kind})" if h.kind else h.key for h in sheet.headings)
    for row in sheet.rows:
        writer.writerow("" if cell.value is None else _inert(cell.value) for cell in row)
    return file.getvalue()


def _inert(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, such as that of a data example, is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


def to_latex(sheets: Sequence[Sheet], note: str) -> str:
    """Tables for a paper that uses the package booktabs; `note` says under each where the figures come from."""
    head = "% Needs \\usepackage{booktabs} and \\usepackage{graphicx}; cite as \\cite{jaxcost}, from citation.bib.\n"
    return head + "\n".join(_table(sheet, note) for sheet in sheets)


def _table(sheet: Sheet, note: str) -> str:
    words = [not heading.kind for heading in sheet.headings]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(sheet.caption)}. {escape(note)} \cite{{jaxcost}}}}",
        rf"\label{{tab:{sheet.name}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{''.join('l' if word else 'r' for word in words)}}}",
        r"\toprule",
        _line(heading.text for heading in sheet.headings),
        _line(heading.kind for heading in sheet.headings),
        r"\midrule",
    ]
    for index, row in enumerate(sheet.rows):
        if sheet.mark(index) == "total":
            lines.append(r"\midrule")
        lines.append(_line(cell.text for cell in row))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


def _line(texts) -> str:
    return " & ".join(map(escape, texts)) + r" \\"


def escape(text: str) -> str:
    """Text as LaTeX prints it; a line break in it becomes a space."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def citation() -> dict[str, Any]:
    """The fields of CITATION.cff."""
    return yaml.safe_load(CITATION.read_text(encoding="utf-8"))


def to_bibtex(cited: dict[str, Any]) -> str:
    """An entry for BibTeX of the fields of a CITATION.cff."""
    authors = " and ".join(_author(author) for author in cited["authors"])
    year, month, _ = str(cited["date-released"]).split("-")
    fields = {
        "author": authors,
        "title": f"{{{escape(cited['title'])}}}",
        "year": year,
        "month": str(int(month)),
        "version": cited["version"],
        "license": cited["license"],
    }
    fields |= {key: cited[key] for key in ("url", "doi") if key in cited}
    body = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    key = re.sub(r"\W.*", "", cited["title"])
    return f"@software{{{key},\n{body}}}\n"


def _author(author: dict[str, str]) -> str:
    """A person as `family, given`, anything else as one name that is not taken apart."""
    if "family-names" in author:
        return escape(f"{author['family-names']}, {author.get('given-names', '')}".rstrip(", "))
    return f"{{{escape(author['name'])}}}"
