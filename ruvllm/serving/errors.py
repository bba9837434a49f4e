"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ruvllm.errors import ContextFullError, InsufficientMemoryError, printable

NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would ask again after 5xx


class ApiError(Exception):
    """A request that is refused or failed.

    param: the field that is wrong. code: a name for programs. headers: of the answer.
    """

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {
            "error": {
                "message": printable(self, limit=2000), "type": _kind(self.status), "param": self.param,
                "code": self.code,
            }
        }  # fmt: skip


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def of_request(error: Exception, fields: Mapping[str, Any]) -> ApiError:
    """What the library says of a request that it cannot take; ``fields``: the names that the request may have."""
    if isinstance(error, ContextFullError):
        return ApiError(str(error), param="messages" if "messages" in fields else None, code="context_length_exceeded")
    if isinstance(error, InsufficientMemoryError):
        return ApiError(str(error), 503, code="insufficient_memory")
    name = str(error).partition(":")[0].partition("[")[0].strip()
    param = {"schema": "response_format", "template_args": "chat_template_kwargs"}.get(name, name)
    return ApiError(str(error), param=param if param in fields else None, code="invalid_value")


def failed(error: Exception) -> ApiError:
    """An answer that ended before its time, by no fault of its request."""
    return ApiError(f"the answer failed: {error}", 500, code="answer_failed", headers=NO_RETRY)


def out_of_time(seconds: float) -> ApiError:
    """A request that took longer than the server allows."""
    return ApiError(f"the request took longer than {seconds:g} seconds", 504, code="timeout", headers=NO_RETRY)


def overloaded() -> ApiError:
    """A request that finds the queue full."""
    return ApiError("too many requests wait: try again", 429, code="queue_full", headers={"Retry-After": "1"})
