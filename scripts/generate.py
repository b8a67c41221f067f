"""Samples text from a training's newest checkpoint."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continue a prompt with the newest checkpoint of a training."""

    workdir: Positional[Path]
    """Folder of a training (the --workdir of train.py, or base/ of a study)."""
    prompt: str = ""
    """Text to continue; nothing begins a new document."""
    tokens: int = 128
    """Tokens to add at most."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    seed: int = 0
    """Seed of the sampling."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints prompt and continuation as they come and returns both."""
    import numpy as np

    from jaxcost.serving.engine import Engine
    from jaxcost.session import load_run

    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed is {arguments.seed}; it must lie between 0 and 2**32 - 1.")
    session, params, step = load_run(arguments.workdir)
    tokenizer = session.tokenizer
    prompt = np.concatenate([[tokenizer.separator_id], tokenizer.encode(arguments.prompt)]).astype(np.int32)
    [new] = Engine(session.model).generate(
        params,
        [prompt],
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        stop_id=tokenizer.separator_id,
    )
    text = tokenizer.decode(new)
    print(arguments.prompt + text)
    return {"schema": "jaxcost-generate-1", "step": step, "prompt": arguments.prompt, "text": text}


if __name__ == "__main__":
    run(main, Arguments)
