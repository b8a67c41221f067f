"""What is written of a study: one page, tables for other programs and papers, and commands that repeat its rows."""

import csv
import dataclasses
import html.parser
import io
import json
import re
import shlex
import typing
from pathlib import Path

import pytest
import yaml
from studies import HOSTILE, grid, row, study
from tyro.conf import Positional

from jaxcost import serialization
from jaxcost.config import Overrides, load, parse
from jaxcost.study import picture, report, result, sheets, tables
from jaxcost.study.figures import COLUMNS, addends, amount, significant
from jaxcost.study.recipes import Recipe
from jaxcost.training.distill import DistillConfig
from jaxcost.transforms import lora, prune, quantize, rule

WORKDIR = Path("runs/a study")


class Texts(html.parser.HTMLParser):
    """The elements of a page by id, its scripts, and what its tables hold."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.tables, self._table, self._cell = [], {}, None, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._table = self.tables.setdefault(dict(attributes).get("id", ""), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = self._table[-1]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[-1] += data


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Those of scripts/study.py that the commands of a report give."""

    config: Positional[Path]
    experiment: Overrides
    workdir: Path = Path("runs/study")


def page_of(made):
    return report.texts(made, WORKDIR)["report.html"]


def fields_missing(hint, value, where):
    """The fields of a TypedDict, at any depth, that a value does not have, or has and should not."""
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        optional = {"why"} if hint is result.Winner else hint.__optional_keys__
        found = [f"{where}.{key}" for key in (hints.keys() ^ value.keys()) - optional]
        return found + [each for key in hints if key in value for each in fields_missing(hints[key], value[key], key)]
    kinds = [kind for kind in typing.get_args(hint) if typing.is_typeddict(kind)]
    values = value if isinstance(value, list) else [value]
    return [
        each for one in values if isinstance(one, dict) for kind in kinds for each in fields_missing(kind, one, where)
    ]


def test_the_studies_made_up_here_have_the_fields_of_real_ones():
    assert not fields_missing(result.Study, study(), "study")


@pytest.mark.parametrize("made", [study(), study(1), study(500), grid(), grid(1)], ids=lambda made: made["schema"])
def test_the_page_holds_every_row_and_asks_for_nothing(made):
    page = page_of(made)
    parsed = Texts(page)
    names = [line[0] for line in parsed.tables["recipes"][1:]]
    assert names == [one["name"] for one in made["rows"]]
    for tag, attributes in parsed.tags:
        assert tag not in ("img", "link", "iframe", "object"), tag
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith(("#", "data:"))
    assert report.answer(made) in html.unescape(page)
    assert "default-src 'none'" in page


def test_no_text_of_the_study_becomes_markup_or_script():
    made = study()
    made["rows"][1]["description"] = made["answer"]["text"] = made["flags"][0]["text"] = HOSTILE
    page = page_of(made)
    tags = [tag for tag, _ in Texts(page).tags]
    assert tags.count("script") == 2 and "img" not in tags
    assert HOSTILE not in page and html.escape(HOSTILE).replace("&#x27;", "&#39;") in page


def test_harm_stands_before_everything_but_the_answer():
    page = page_of(study())
    assert page.index("with half of its bytes") < page.index("dialect south: 3.900") < page.index("<nav")
    clean = study(flags=[], answer=study()["answer"] | {"flagged": False})
    assert "No harm found" in page_of(clean)


def test_a_study_that_was_not_a_search_says_what_it_lacks(tmp_path):
    page = page_of(grid())
    for words in (
        "No recipe of this study was verified group by group",
        "Nothing was searched",
        "did not write what each of its parts cost",
        "What it would cost was not said before",
        "this study only compared scores",
    ):
        assert words in page
    report.write(grid(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.py", "report.html", "recipes.csv", "tables.tex", "citation.bib"),
        *("pareto.png", "pareto.svg"),
    }


def test_the_parts_add_up_to_the_total_to_the_cent():
    made = study()
    files = report.texts(made, WORKDIR)
    lines = Texts(files["report.html"]).tables["costs"]
    parts, total = lines[1:-1], lines[-1]
    assert total[0] == "sum" and len(parts) == len(made["ledger"])
    assert abs(sum(float(part[1]) for part in parts) - made["totals"]["usd"]) < 0.005
    assert abs(float(total[1]) - made["totals"]["usd"]) < 0.005
    read = csv.DictReader(io.StringIO(files["costs.csv"]))
    values = [float(line["usd (estimated from measured seconds)"]) for line in read]
    assert sum(values[:-1]) == pytest.approx(values[-1]) == pytest.approx(made["totals"]["usd"])


def test_a_sum_of_which_a_part_is_unknown_is_unknown():
    made = study()
    made["ledger"][3]["usd"] = None
    sheet = sheets.costs(made)
    assert sheet.rows[-1][1].text == "unknown" and sheet.rows[-1][3].text != "unknown"


def test_a_list_of_recipes_has_no_columns_of_what_was_not_said():
    made = study()
    for part in made["ledger"]:
        part |= dict.fromkeys(("estimated_usd", "estimated_seconds", "estimated_kwh"))
    assert [heading.key for heading in sheets.costs(made).headings] == [
        *("stage", "usd", "seconds", "kwh", "tokens", "flops"),
    ]


def test_the_estimate_stands_beside_what_it_came_to():
    page = page_of(study())
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "said before (estimated) 3.46 USD" in text and "came to (measured seconds, priced) 3.84 USD" in text
    # A million requests of 50 tokens at 0.0035 USD a million tokens.
    assert "cut_1: 0.175 USD, energy unknown" in text


def test_every_column_says_what_its_figures_are():
    for sheet in sheets.sheets(study()):
        for index, heading in enumerate(sheet.headings):
            numbers = any(isinstance(line[index].value, float) for line in sheet.rows)
            assert heading.kind or not numbers, heading
    kinds = {heading.key: heading.kind for heading in sheets.recipes(study(), "base").headings}
    assert (kinds["step_flops"], kinds["step_seconds"], kinds["usd"]) == ("compiled", "measured", "estimated")
    assert kinds["weight_bytes"] == "counted"


def test_commands_repeat_the_study_and_its_rows(tmp_path):
    made = study(kind="grid")
    (tmp_path / "study.json").write_text(json.dumps(made))
    files = report.texts(made, tmp_path)
    (tmp_path / "config.py").write_text(files["config.py"])
    commands = [
        html.unescape(each) for each in re.findall(r"<dd><pre>(python scripts/study.py.*?)</pre>", files["report.html"])
    ]
    assert len(commands) == 1 + len(made["rows"])
    whole, *rows = (parse(Arguments, shlex.split(command)[2:]) for command in commands)
    assert whole.experiment == load(tmp_path / "config.py") == serialization.from_json(made["experiment"])
    assert whole.workdir != tmp_path
    for arguments, one in zip(rows, made["rows"], strict=True):
        assert one["name"] in [recipe.name for recipe in arguments.experiment.study.complete()]


def test_a_recipe_that_is_in_no_list_is_written_out():
    """Such as one of a space, or a control that a study added."""
    recipes = (
        Recipe("control"),
        Recipe(
            "all_at_once",
            transforms=(
                prune(rules=(rule("mlp/", sparsity=0.7), rule("attention/", skip=True)), sparsity=0.25),
                lora(rank=4, train="norm"),
            ),
            finish=(quantize(mode="weights", bits=4, group=32),),
            task="shifted",
            learning_rate=1e-3,
            distill=DistillConfig(logits=0.5),
        ),
    )
    assert serialization.to_python(recipes[0]) == 'Recipe(name="control")'
    flags = ["configs/quickstart.py", "--study.recipes", ", ".join(map(serialization.to_python, recipes))]
    assert parse(Arguments, shlex.split(shlex.join(flags))).experiment.study.recipes == recipes


def test_csv_gives_full_values_and_no_formula():
    made = study()
    made["rows"][2]["description"] = "=HYPERLINK(1)"
    lines = list(csv.DictReader(io.StringIO(report.texts(made, WORKDIR)["recipes.csv"])))
    assert [float(line["score (measured)"]) for line in lines] == [one["score"] for one in made["rows"]]
    assert lines[2]["description"] == "'=HYPERLINK(1)" and lines[2]["kwh_per_million_tokens (estimated)"] == ""


def test_latex_tables_are_whole_and_escaped():
    text = report.texts(study(), WORKDIR)["tables.tex"]
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\toprule") == 6
    for body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in body[1].splitlines() if line.endswith(r"\\")]
        assert len(lines) > 2 and all(len(re.findall(r"(?<!\\)&", line)) == len(body[0]) - 1 for line in lines)
    assert r"prune 1\% of A \& B\_1" in text and "<script" not in text
    assert tables.escape("a\\b~c^{}\n→") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}\{\} $\rightarrow$"


def test_the_citation_is_that_of_the_repository():
    cited = yaml.safe_load(tables.CITATION.read_text())
    text = tables.to_bibtex(tables.citation())
    assert text.startswith("@software{jaxcost,") and f"year = {{{cited['date-released'].year}}}" in text
    assert f"version = {{{cited['version']}}}" in text and "author = {{The jaxcost developers}}" in text
    person = cited | {"authors": [{"family-names": "Noether", "given-names": "Emmy"}], "doi": "10.1/x"}
    assert "author = {Noether, Emmy}" in tables.to_bibtex(person) and "doi = {10.1/x}" in tables.to_bibtex(person)


def test_pictures_are_drawn_of_any_number_of_rows(tmp_path):
    unpriced = study() | {"rows": [row(index, usd=None) for index in range(3)]}
    for made in (study(500), unpriced):
        picture.draw(made, tmp_path)
        assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "pareto.svg").read_bytes()
    assert b"<svg" in before
    picture.draw(unpriced, tmp_path)
    assert (tmp_path / "pareto.svg").read_bytes() == before


def test_numbers_for_people():
    assert [significant(value) for value in (None, 0, 1234567.0, 0.000123456, 2.5e-9)] == [
        *("unknown", "0", "1,234,567", "0.000123", "2.50e-09"),
    ]
    assert addends([3.0, None, 0.5]) == ["3.00", "unknown", "0.50"]
    assert addends([0.00123, 0.000004]) == ["0.00123", "0.00000"]
    disk = next(column for column in COLUMNS if column.key == "checkpoint_bytes")
    assert [disk.text({"checkpoint_bytes": value}) for value in (13.64e6, 165_432, None)] == [
        "13.6",
        "0.165",
        "unknown",
    ]
    assert amount("checkpoint_bytes", 6.8e6) == "bytes on disk, MB: 6.8" and amount("hours", 2.0) == "hours: 2.00"
    assert amount("usd", 4.0, of_study=True) == "usd: 4.00"
