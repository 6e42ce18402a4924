"""Errors as problem+json (RFC 9457)."""

from collections.abc import Sequence
from typing import Any

import orjson

MEDIA_TYPE = "application/problem+json"
ECHO_CHARACTERS = 64
TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class Problem(Exception):  # noqa: N818
    """An error answer.

    Args:
        status: HTTP status, a key of ``TITLES``.
        detail: a sentence for the caller; holds at most ``ECHO_CHARACTERS`` of what it sent.
        errors: where in the input, each ``{"loc": [...], "msg": "..."}``.
        retry_after: seconds for the header of that name.
    """

    def __init__(
        self, status: int, detail: str, errors: Sequence[dict[str, Any]] = (), retry_after: int | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors, self.retry_after = status, detail, list(errors), retry_after

    def content(self) -> dict[str, Any]:
        """Return the body as plain data."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": TITLES[self.status],
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = self.errors
        return body

    def body(self) -> bytes:
        """Return the body as JSON."""
        return orjson.dumps(self.content())

    def headers(self) -> dict[str, str]:
        """Return the headers beside the content type."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def echo(text: str) -> str:
    """Quote at most ``ECHO_CHARACTERS`` of what a caller sent.

    Example:
        >>> echo("Toy Story")
        "'Toy Story'"
    """
    return repr(text if len(text) <= ECHO_CHARACTERS else text[: ECHO_CHARACTERS - 1] + "…")
