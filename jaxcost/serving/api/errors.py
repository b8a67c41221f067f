"""Failures in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is refused, in one sentence that says what to change."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = clean(str(self))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def clean(text: str) -> str:
    """The text with half surrogate pairs, which JSON can spell and UTF-8 cannot, as '?'."""
    return text.encode("utf-8", errors="replace").decode()


def _names_a_field(part: str) -> bool:
    """Whether a part of an error's place is a field or an index, and not one of the types that a field may have."""
    return part.isdecimal() or (part.isidentifier() and part not in ("str", "int", "float") and len(part) < 40)


def add_handlers(app: FastAPI) -> None:
    """Puts every failure of an application into this form."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return ApiError(400, "The body is no JSON; send an object.").response()
        # What was sent is not repeated: it may be long, private, or no text.
        place = ".".join(itertools.takewhile(_names_a_field, map(str, first["loc"][1:])))
        return ApiError(400, f"{place or 'The body'}: {first['msg'][:300]}.", param=place or None).response()

    @app.exception_handler(404)
    async def missing(request: Request, error: HTTPException):
        return ApiError(404, "There is nothing at this address; see /docs for what there is.").response()

    @app.exception_handler(405)
    async def not_allowed(request: Request, error: HTTPException):
        message = "This address does not take this method; see /docs for those that it takes."
        return ApiError(405, message, headers=error.headers).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException):
        return ApiError(error.status_code, f"{error.detail.rstrip('.')}.", headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception):
        return ApiError(500, "The server has failed on this request; its log says why.").response()
