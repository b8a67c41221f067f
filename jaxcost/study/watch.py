"""What a running study has found and spent so far, read from its folder, and a page that keeps itself up to date."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from jaxcost import journal
from jaxcost.study.pages import render

_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
_TAIL_BYTES = 4096


def state(workdir: Path) -> dict[str, Any]:
    """What the folder of a study says now, whether the study is not yet started, running, killed or finished.

    Returns:
      `lines`: those of the study's ledger; `runs`: its trainings, the last written first, each with its `name`, `step`
      of `steps`, `loss` and `tokens_per_second`, None where nothing is said yet; `quiet_seconds`: since anything was
      written, None before; `finished`: whether `study.json` is there and newer than the ledger.

    Raises:
      ValueError: a line of the ledger is damaged; a half-written last one is not.
    """
    ledger, result = workdir / "ledger.jsonl", workdir / "study.json"
    written = {folder: when for folder in _runs(workdir) if (when := _written(folder)) is not None}
    signs = [*written.values(), *(file.stat().st_mtime for file in (ledger, result) if file.exists())]
    return {
        "lines": journal.peek(ledger),
        "runs": [_run(workdir, folder) for folder in sorted(written, key=written.__getitem__, reverse=True)],
        "quiet_seconds": max(0.0, time.time() - max(signs)) if signs else None,
        "finished": result.exists() and (not ledger.exists() or result.stat().st_mtime >= ledger.stat().st_mtime),
    }


def create_app(workdir: Path, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The live view of a study's folder, which need not be there yet.

    Args:
      workdir: that of study.py.
      hosts: names that browsers may call this server by; pages of other sites then cannot read it by a name of theirs.
    """
    app = FastAPI(openapi_url=None)
    app.state.draining = False
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    page = render("watch.html", workdir=str(workdir))

    @app.get("/")
    def live_view() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.get("/state.json")
    def current_state() -> Response:
        try:
            return JSONResponse(state(workdir), headers={"Cache-Control": "no-store"})
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 500)

    @app.get("/report.html")
    def report() -> Response:
        path = workdir / "report.html"
        return FileResponse(path) if path.exists() else HTMLResponse("The report is not written yet.", 404)

    return app


def _runs(workdir: Path) -> list[Path]:
    """Folders of trainings; they lie at most three deep."""
    found = (path for depth in ("*", "*/*", "*/*/*") for path in workdir.glob(f"{depth}/experiment.json"))
    return [path.parent for path in found]


def _written(folder: Path) -> float | None:
    """When a training last wrote what it does; None if it has not begun."""
    files = (folder / name for name in ("ledger.jsonl", "steps.jsonl"))
    return max((file.stat().st_mtime for file in files if file.exists()), default=None)


def _run(workdir: Path, folder: Path) -> dict[str, Any]:
    last = _last(folder / "steps.jsonl") or {}
    steps = json.loads((folder / "experiment.json").read_text())["training"]["steps"]
    said = {key: last.get(key) for key in ("step", "loss", "tokens_per_second")}
    return {"name": str(folder.relative_to(workdir)), "steps": steps, **said}


def _last(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file that may be long and that another process writes."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        start = max(0, path.stat().st_size - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[1 if start else 0 : -1]
    return json.loads(lines[-1]) if lines else None
