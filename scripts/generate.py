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
    """Text to continue; nothing begins a new document, or answer."""
    source: str = ""
    """Text that an encoder reads, to which the model answers."""
    beams: int = 1
    """Above 1, follow so many of the likeliest texts side by side and take the best, instead of sampling."""
    tokens: int = 128
    """Tokens to add at most."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw from tokens with this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there become less likely."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    seed: int = 0
    """Seed of the sampling."""
    draft: Path | None = None
    """Folder of a smaller training with the same tokenizer, to propose tokens; the result has the same distribution."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints prompt and continuation as they come and returns both."""
    import numpy as np

    from jaxcost.serving.beam import BeamEngine
    from jaxcost.serving.engine import Engine
    from jaxcost.serving.sampling import Sampling
    from jaxcost.serving.speculative import SpeculativeEngine
    from jaxcost.serving.stopping import Stop
    from jaxcost.session import load_draft, load_run

    a = arguments
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty, a.seed)
    session, params, step = load_run(a.workdir)
    tokenizer, config = session.tokenizer, session.model.config
    encodes = config.encoder.num_layers > 0
    if encodes and not (config.source.of_tokens and a.source):
        raise ValueError("The model answers to a source; give a text as --source, or sounds and images by the library.")
    if a.source and not encodes:
        raise ValueError("The model has no encoder to read a --source; write it into the --prompt.")
    if a.draft is not None and (encodes or a.beams > 1):
        raise ValueError("A --draft proposes tokens of a text alone, one at a time; leave out --source and --beams.")
    start = config.encoder.start if encodes else tokenizer.separator_id
    prompt = np.concatenate([[start], tokenizer.encode(a.prompt)]).astype(np.int32)
    sources = [tokenizer.encode_source(a.source)] if encodes else None
    stop = Stop(tokenizer.stop_ids, a.stop, tokenizer.decode)
    options = {"max_new_tokens": a.tokens, "sampling": sampling, "stop": stop}
    result = {"schema": "jaxcost-generate-1", "step": step, "prompt": a.prompt}
    if a.beams != 1:
        if a.stop:
            raise ValueError("--beams end at the tokens that end a text; leave out --stop.")
        search = BeamEngine(session.model, a.beams)
        [new], scores = search.generate(
            params, [prompt], max_new_tokens=a.tokens, end_ids=tokenizer.stop_ids, sources=sources
        )
        result["score"] = float(scores[0])
    elif a.draft is None:
        [new] = Engine(session.model).generate(params, [prompt], sources=sources, **options)
    else:
        smaller, draft_params = load_draft(a.draft, tokenizer)
        both = SpeculativeEngine(session.model, smaller)
        [new], result["kept_share"] = both.generate(params, draft_params, [prompt], **options)
    text = stop.cut(tokenizer.decode(new))
    print(a.prompt + text)
    return result | {"text": text}


if __name__ == "__main__":
    run(main, Arguments)
