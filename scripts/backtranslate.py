"""Translates the texts of a training on labels there and back, and writes those that come out otherwise as data."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a training's examples with translated copies; the folder is for --data.sources of train.py."""

    workdir: Positional[Path]
    """Folder of a training on labels, whose examples are translated and whose model may check them."""
    there: Positional[Path]
    """Folder of an encoder-decoder, trained or converted, that reads the language of the texts."""
    back: Positional[Path]
    """Folder of one that reads what comes of it, and writes the language of the texts."""
    output: Positional[Path]
    """A new folder."""
    temperature: float = 0.8
    """Of both ways; 0 takes the likeliest word each time."""
    seed: int = 0
    """Of the draws."""
    check: bool = True
    """Keep a copy only if the training's model gives it the label of the text that it was made of."""
    cache: Path | None = None
    """Folder where translations are kept; none if it is not given."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Writes the folder, prints how many copies were kept and returns the counts."""
    from jaxcost.labelling import agreed, write_folder
    from jaxcost.serving.sampling import Sampling
    from jaxcost.session import load_run
    from jaxcost.translation import Translator, back_translate, translated_copies

    a = arguments
    session, params, step = load_run(a.workdir)
    there, back = Translator.load(a.there), Translator.load(a.back)
    examples = list(session.train_stream)
    sampling = Sampling(temperature=a.temperature, seed=a.seed)
    made = back_translate([example["text"] for example in examples], there, back, sampling, a.cache)
    copies, counts = translated_copies(examples, made)
    if a.check:
        copies, counts["disagreed"] = agreed(session, params, copies)
        counts["kept"] = len(copies)
    write_folder(session, copies, a.output)
    table = Table("texts", "number", title=f"Translated by {a.there} and {a.back}")
    for name, value in counts.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    print(f"next: train.py with --data.sources {a.output} --data.train-split train")
    return {"schema": "jaxcost-backtranslate-1", "step": step, **counts, "output": str(a.output)}


if __name__ == "__main__":
    run(main, Arguments)
