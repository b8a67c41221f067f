"""Who may ask, how much and how often."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import os
import time
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.errors import ApiError

KEYS_VARIABLE = "JAXCOST_API_KEYS"
_SHORTEST_KEY = 8
_T = TypeVar("_T")
OPEN_PATHS = ("/", "/health", "/ready", "/metrics")
"""What needs no key: the page, which holds nothing, and what machines watch."""


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[bytes, ...]:
    """Hashes of the API keys of a file, one a line, and of the environment, with commas between them.

    Raises:
      ValueError: the file cannot be read, others may read it, or a key is too short to be one.
    """
    keys = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            content, mode = file.read_text(), file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The keys of {file} cannot be read ({error}); name a text file.") from None
        if mode & 0o044:
            raise ValueError(f"Others may read the keys of {file}; `chmod 600` it.")
        found = [line.strip() for line in content.splitlines() if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"{file} holds no key; write one a line.")
        keys += found
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise ValueError(f"An API key has fewer than {_SHORTEST_KEY} characters; take longer ones.")
    return tuple(_hash(key.encode()) for key in keys)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclasses.dataclass
class _Spent:
    """What one key has used."""

    tokens: float
    """Requests that it may make at once, as of `at`."""
    at: float
    running: int = 0


class Gate:
    """Lets requests through, by key."""

    def __init__(self, keys: tuple[bytes, ...], config: ApiConfig):
        self._keys, self._config = keys, config
        self._spent: dict[str, _Spent] = {}

    def name(self, headers: Mapping[str, str]) -> str:
        """A name of the caller's key that does not tell it; ApiError without a key that is known."""
        if not self._keys:
            return "anyone"
        scheme, _, given = headers.get("authorization", "").partition(" ")
        hashed = _hash(given.strip().encode("utf-8", errors="replace"))
        # Every key is compared, and each in constant time.
        known = [hmac.compare_digest(hashed, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            message = "The API key is missing or unknown; send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return hashed.hex()[:8]

    @contextlib.contextmanager
    def through(self, name: str) -> Iterator[None]:
        """Counts a request of a caller while it lasts; ApiError if it is one too many."""
        limit, now = self._config.requests_per_minute, time.monotonic()
        spent = self._spent.setdefault(name, _Spent(limit, now))
        if limit:
            spent.tokens = min(limit, spent.tokens + (now - spent.at) * limit / 60)
            spent.at = now
            if spent.tokens < 1:
                wait = {"Retry-After": str(max(1, round((1 - spent.tokens) * 60 / limit)))}
                raise ApiError(429, f"This key may make {limit} requests a minute; wait.", headers=wait)
        most = self._config.concurrent_requests
        if most and spent.running >= most:
            raise ApiError(429, f"This key may make {most} requests at one time; wait.", headers={"Retry-After": "1"})
        spent.tokens -= 1
        spent.running += 1
        try:
            yield
        finally:
            spent.running -= 1


class Protection:
    """ASGI middleware: bodies no larger than allowed, callers that are known, no more of each than allowed."""

    def __init__(self, app: ASGIApp, gate: Gate, body_bytes: int):
        self._app, self._gate, self._body_bytes = app, gate, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
                return await self._app(scope, self._bounded(headers, receive), watched)
            with self._gate.through(self._gate.name(headers)):
                return await self._app(scope, self._bounded(headers, receive), watched)
        except ApiError as error:
            if started:
                raise
            await error.response()(scope, receive, send)

    def _bounded(self, headers: Mapping[str, str], receive: Receive) -> Receive:
        limit, seen = self._body_bytes, 0
        declared = headers.get("content-length", "")
        too_large = f"The body is larger than {limit} bytes; send less"
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            raise ApiError(413, f"{too_large}.", code="body_too_large")

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                # The one exception that what reads the body passes on.
                raise HTTPException(413, too_large)
            return message

        return bounded


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What some work comes to; ApiError, and the work is cancelled, if the client goes before that."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client has gone.")
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _gone(receive: Receive) -> None:
    """Returns when the client has."""
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)
