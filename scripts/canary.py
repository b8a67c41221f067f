"""Chooses a canary for a training: sequences that the server scores again and again, to say when it drifts."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write canary.json into a training's folder: sequences of its validation split with the score of its weights."""

    workdir: Positional[Path]
    """Folder of a training that continues texts."""
    count: int = 8
    """Sequences."""
    length: int = 64
    """Tokens of each."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Writes the canary and returns its score."""
    from jaxcost.serving.canary import FILE, choose
    from jaxcost.session import load_run

    a = arguments
    session, params, step = load_run(a.workdir)
    session.check_language_model()
    canary = choose(session.model, params, session.validation_stream.tokens, a.count, a.length)
    canary.write(a.workdir)
    print(f"{a.workdir / FILE}: {a.count} sequences of {a.length} tokens, {canary.nats_per_token:.4f} nats a token")
    return {"schema": "jaxcost-canary-1", "step": step, "nats_per_token": canary.nats_per_token}


if __name__ == "__main__":
    run(main, Arguments)
