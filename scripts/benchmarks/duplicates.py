"""Plants near copies among documents and times how many of them are found, and how many others with them."""

import dataclasses
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxcost.command_line import run
from jaxcost.data.selection.duplicates import find_duplicates, likeness


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Find planted duplicates among synthetic documents, of random words by Zipf's law."""

    documents: int = 100_000
    """Documents, the planted ones included."""
    planted: float = 0.1
    """Share of them that are copies of others, of which one word in `edited` is another."""
    edited: int = 25
    """Words of a copy for each that is changed."""
    words: int = 60
    """Words of a document, in the mean."""
    likeness: float = 0.7
    """Likeness from which on documents are duplicates."""
    seed: int = 0
    """Seed of the documents."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the table and returns its rows."""
    texts, copies = planted(arguments)
    start, cpu = time.perf_counter(), time.process_time()
    found = find_duplicates(texts, arguments.likeness)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    alike = {i for i, j in copies.items() if likeness(texts[i], texts[j]) >= arguments.likeness}
    others = len(texts) - len(copies)
    result = {
        "schema": "jaxcost-duplicates-1",
        "documents": len(texts),
        "planted": len(copies),
        "planted_alike": len(alike),
        "found_share": len(found.of.keys() & copies.keys()) / len(copies),
        "found_share_of_alike": len(found.of.keys() & alike) / max(1, len(alike)),
        "false_share": len(found.of.keys() - copies.keys()) / others,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }
    table = Table("figure", "value", title=f"Planted duplicates among {len(texts):,} documents")
    for name, value in list(result.items())[1:]:
        table.add_row(name, f"{value:.5g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    return result


def planted(arguments: Arguments) -> tuple[list[str], dict[int, int]]:
    """The documents, and which of them is a copy of which."""
    draw = np.random.default_rng(arguments.seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(draw.choice(letters, size)) for size in draw.integers(2, 10, 20_000)]
    shares = 1 / np.arange(1, len(vocabulary) + 1)
    shares /= shares.sum()
    copies = round(arguments.documents * arguments.planted)
    originals = arguments.documents - copies
    sizes = np.maximum(10, draw.poisson(arguments.words, originals))
    words = [vocabulary[i] for i in draw.choice(len(vocabulary), sizes.sum(), p=shares)]
    ends = np.cumsum(sizes)
    texts = [words[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    of = {}
    for number, original in enumerate(draw.choice(originals, copies, replace=False), start=originals):
        copy = list(texts[original])
        for place in draw.choice(len(copy), max(1, len(copy) // arguments.edited), replace=False):
            copy[place] = vocabulary[int(draw.integers(len(vocabulary)))]
        texts.append(copy)
        of[number] = int(original)
    return [" ".join(text) for text in texts], of


if __name__ == "__main__":
    run(main, Arguments)
