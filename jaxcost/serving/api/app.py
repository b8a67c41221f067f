"""The application: OpenAI's API over a model, watched, priced and guarded."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import AsyncIterator, Callable, Mapping

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxcost.serving.api.completions import completion_routes
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.errors import add_handlers
from jaxcost.serving.api.generation import TextModel
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.pooling import PooledModel, pooling_routes
from jaxcost.serving.api.protection import Gate, Protection
from jaxcost.serving.api.served import Served
from jaxcost.serving.api.speech import SpeechModel, speech_routes
from jaxcost.serving.api.tokens import model_routes, token_routes

_LOGGER = logging.getLogger("jaxcost.serving")
_LIMITS = ApiConfig()
_ADDRESSES = {
    "/v1/completions": "continue texts",
    "/v1/chat/completions": "continue texts",
    "/v1/embeddings": "embed texts",
    "/v1/classify": "label texts or images",
    "/v1/rerank": "rank texts",
    "/v1/audio/transcriptions": "hear recordings",
    "/v1/audio/translations": "hear recordings",
}
"""What an address is for, which a model may not do."""
_PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


def create_app(
    model: TextModel | PooledModel | SpeechModel,
    metrics: Metrics,
    keys: tuple[bytes, ...] = (),
    config: ApiConfig = _LIMITS,
) -> FastAPI:
    """The API of a model.

    Args:
      model: what answers; addresses that are not for it say so. The application closes it when it ends, after what
        was accepted.
      metrics: where requests are counted.
      keys: hashes of the keys that are let in, as `protection.read_keys` gives them; without any, everybody is.
      config: limits.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        model.close()

    app = FastAPI(title="jaxcost", version="1", lifespan=lifespan)
    app.state.draining = False
    add_handlers(app)
    if isinstance(model, TextModel):
        answering = completion_routes(model, config, metrics)
    elif isinstance(model, SpeechModel):
        answering = speech_routes(model, config, metrics)
    else:
        answering = pooling_routes(model, config, metrics)
    there = {route.path for route in answering.routes}
    refused = {path: what for path, what in _ADDRESSES.items() if path not in there}
    routers = [_watching(app, model, metrics), model_routes(model), answering, _refusing(model, refused)]
    for router in [*routers, token_routes(model)] if model.of_tokens else routers:
        app.include_router(router)
    body_bytes = config.audio_bytes if isinstance(model, SpeechModel) else config.body_bytes
    app.add_middleware(Protection, gate=Gate(keys, config), body_bytes=body_bytes)
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(_Logged, metrics=metrics)
    return app


def _refusing(model: Served, paths: Mapping[str, str]) -> APIRouter:
    """Says of addresses that the model is not for them, and what it does."""
    router = APIRouter()

    def refuse(what: str) -> Callable:
        async def refused():
            raise model.refuse(what)

        return refused

    for path, what in paths.items():
        router.post(path, include_in_schema=False)(refuse(what))
    return router


def _watching(app: FastAPI, model: Served, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["watching"])
    page = (pathlib.Path(__file__).parent / "page.html").read_text()

    @router.get("/", include_in_schema=False)
    async def chat_page():
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @router.get("/health")
    async def health():
        """Whether the server works."""
        return JSONResponse({"status": "ok" if model.healthy else "broken"}, 200 if model.healthy else 503)

    @router.get("/ready")
    async def ready():
        """Whether the server takes requests."""
        takes = model.healthy and not app.state.draining
        return JSONResponse({"status": "ready" if takes else "draining"}, 200 if takes else 503)

    @router.get("/metrics")
    async def numbers():
        """What Prometheus reads."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


class _Logged:
    """ASGI middleware: a line of JSON for each request, which holds nothing of what was asked and answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    self._metrics.failed(status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            _LOGGER.exception("A request has failed.")
            raise
        finally:
            line = {"method": scope["method"], "path": scope["path"], "status": status}
            line["seconds"] = round(time.monotonic() - began, 4)
            level = logging.DEBUG if scope["path"] in ("/health", "/ready", "/metrics") else logging.INFO
            _LOGGER.log(level, "%s", json.dumps(line))
