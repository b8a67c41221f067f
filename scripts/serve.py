"""Serves a training's newest checkpoint behind OpenAI's API: what it answers follows from the model's head."""

import dataclasses
import importlib.util
from pathlib import Path

from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.cost.hardware import HardwareConfig
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.batches import BatchesConfig
from jaxcost.serving.slots import SlotsConfig
from jaxcost.serving.worker import SchedulerConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve the newest checkpoint of a training, until it is told to stop (SIGTERM, Ctrl-C)."""

    checkpoint: Positional[Path]
    """Folder of a training (the --workdir of train.py, a run of a study, or what convert.py made)."""
    adapters: tuple[str, ...] = ()
    """Fine-tunings of it by lora, served beside it in the same batches: NAME=FOLDER of each one's training."""
    draft: Path | None = None
    """Folder of a smaller training with the same tokenizer, to propose tokens; answers have the same distribution."""
    draft_tokens: int = 4
    """Tokens that it proposes in a round."""
    name: str = ""
    """What clients call the model; the folder's name by default."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 takes requests from other machines."""
    port: int = 8000
    """Port to listen at."""
    keys: Path | None = None
    """File with API keys, one a line, which only its owner may read; the variable JAXCOST_API_KEYS has further ones."""
    drain_seconds: float = 60.0
    """After SIGTERM, requests that were accepted have this long to end."""
    prefix_cache_bytes: int = 0
    """Memory for prompts that were read, for those that begin alike; 0 keeps none."""
    canary_seconds: float = 300.0
    """Where the folder holds a canary (scripts/canary.py), time between two of its rounds."""
    canary_tolerance: float = 0.02
    """Nats a token by which its score may differ without a word in the log."""
    engine: SlotsConfig = SlotsConfig()
    """How many requests run at once, and in what pieces, where texts are continued or answered to."""
    batches: BatchesConfig = BatchesConfig()
    """In what batches inputs are read, where each gets one answer, and what texts are padded to that an encoder reads
    for a decoder."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """What is taken on."""
    api: ApiConfig = ApiConfig()
    """Limits of the API."""
    hardware: HardwareConfig = HardwareConfig()
    """The chips that requests are priced on."""
    json: Path | None = None
    """File for the result as JSON, when the server has ended."""
    debug: bool = False
    """Show a traceback on failure."""


def _named(adapter: str) -> tuple[str, Path]:
    name, equals, folder = adapter.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--adapters {adapter}: write NAME=FOLDER.")
    return name, Path(folder)


def main(arguments: Arguments) -> dict:
    """Serves, and returns how much."""
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "prometheus_client"))):
        raise ValueError("Serving needs further packages; `pip install 'jaxcost[serve]'`.")
    from jaxcost.conversion import KEPT, labels_of
    from jaxcost.cost.hardware import resolve
    from jaxcost.models.huggingface.adapters import CONFIG
    from jaxcost.serving.adapters import with_adapters
    from jaxcost.serving.api.app import create_app
    from jaxcost.serving.api.kinds import model_of_kind
    from jaxcost.serving.api.load import text_model
    from jaxcost.serving.api.metrics import Metrics
    from jaxcost.serving.api.pooling import Labels
    from jaxcost.serving.api.protection import read_keys
    from jaxcost.serving.api.server import serve
    from jaxcost.serving.canary import Watch, read
    from jaxcost.serving.speculative import Draft
    from jaxcost.session import load_draft, load_run

    a = arguments
    keys = read_keys(a.keys)
    name = a.name or a.checkpoint.resolve().name
    folders = dict(_named(adapter) for adapter in a.adapters)
    if len({name, *folders}) != 1 + len(a.adapters):
        raise ValueError("Two of the names of --name and --adapters are the same; give each its own.")
    for own, folder in folders.items():
        if (folder / CONFIG).exists():
            raise ValueError(
                f"--adapters {own}={folder} is of peft; give it to scripts/convert.py with its base (--adapter), and "
                "name the folder that this makes."
            )
    session, params, step = load_run(a.checkpoint)
    if folders:
        params = with_adapters(params, {own: load_run(folder)[1] for own, folder in folders.items()})
    numbers = {own: number for number, own in enumerate(folders)}
    served = (name, session.model, params, session.tokenizer)
    if session.model.config.language_model:
        draft = None if a.draft is None else Draft(*load_draft(a.draft, session.tokenizer), a.draft_tokens)
        model = text_model(*served, a.engine, a.scheduler, a.prefix_cache_bytes, numbers, draft)
    elif a.draft is not None:
        raise ValueError("--draft is for models that continue texts, which this one does not; leave it out.")
    elif folders:
        raise ValueError("--adapters is for models that continue texts, which this one does not; leave it out.")
    else:
        labels = labels_of(a.checkpoint, session.model.config.head.labels)
        model = model_of_kind(
            *served,
            a.checkpoint / KEPT,
            labels=labels and Labels(*labels),
            slots=a.engine,
            batches=a.batches,
            scheduler=a.scheduler,
        )
    metrics = Metrics(name, resolve(a.hardware))
    metrics.watch(model.worker)
    watch = None
    if session.model.config.language_model and (canary := read(a.checkpoint)) is not None:
        watch = Watch(canary, model.worker, every_seconds=a.canary_seconds, tolerance=a.canary_tolerance)
        metrics.watch_canary(watch)
    try:
        serve(create_app(model, metrics, keys, a.api), a.host, a.port, a.drain_seconds)
    finally:
        if watch is not None:
            watch.close()
    return {"schema": "jaxcost-serve-1", "model": name, "step": step}


if __name__ == "__main__":
    run(main, Arguments)
