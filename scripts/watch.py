"""Shows a running study in a browser: what it has found and spent so far."""

import dataclasses
import importlib.util
from pathlib import Path

from tyro.conf import Positional

from jaxcost.command_line import run

_LOOPBACK = ("127.0.0.1", "localhost")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve a page that follows a study, started already or not, until it is told to stop (SIGTERM, Ctrl-C)."""

    workdir: Positional[Path]
    """Folder of the study: the --workdir of study.py."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines look."""
    port: int = 8001
    """Port to listen at; 0 takes a free one."""
    json: Path | None = None
    """File for what the folder said when the server ended."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Serves, and returns what the folder says in the end."""
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        raise ValueError("Watching needs further packages; `pip install 'jaxcost[serve]'`.")
    from jaxcost.serving.api.server import serve
    from jaxcost.study.watch import create_app, state

    a = arguments
    if a.workdir.exists() and not a.workdir.is_dir():
        raise ValueError(f"{a.workdir} is a file; name the folder that study.py writes to, its --workdir.")
    serve(create_app(a.workdir, _LOOPBACK if a.host in _LOOPBACK else ("*",)), a.host, a.port, drain_seconds=1)
    return {"schema": "jaxcost-watch-1", **state(a.workdir)}


if __name__ == "__main__":
    run(main, Arguments)
