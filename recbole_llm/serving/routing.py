"""Turn requests into calls: ids in paths, strict JSON, routes whose body is all of the input."""

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Any
from urllib.parse import unquote

import orjson
from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.convertors import Convertor, register_url_convertor

from recbole_llm.serving.bodies import FREE_BYTES
from recbole_llm.serving.problem import Problem


class _AnyId(Convertor[str]):
    """Everything up to the end of the path, as it was sent, or of its last part: ids may hold slashes and line breaks."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        try:
            return unquote(value, errors="strict")
        except UnicodeDecodeError:
            raise Problem(400, "The path is not UTF-8.") from None

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _AnyId())


class _OrjsonRequest(HttpRequest):
    """Strict JSON: no NaN, no Infinity."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            raw = await self.body()
            async with self.scope["bodies"].turn(raw):
                self._json = orjson.loads(raw)
        return self._json


class JsonRoute(APIRoute):
    """A route whose JSON is strict."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:  # noqa: D102
        handler = super().get_route_handler()

        async def with_orjson(request: HttpRequest) -> Response:
            return await handler(_OrjsonRequest(request.scope, request.receive))

        return with_orjson


class _BodyRoute(APIRoute):
    """A route whose body is all of its input, validated here: looking for other parameters costs as much as the answer."""

    adapter: TypeAdapter[Any]
    few_at_once: bool

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint

        async def handle(request: HttpRequest) -> Response:
            raw = await request.body()
            if len(raw) <= FREE_BYTES:
                response: Response = await endpoint(self._parse(raw))
                return response
            bodies = request.scope["bodies"]
            async with bodies.place() if self.few_at_once else nullcontext():
                async with bodies.turn(raw):
                    body = self._parse(raw)
                response = await endpoint(body)
            return response

        return handle

    def _parse(self, raw: bytes) -> Any:
        try:
            return self.adapter.validate_python(orjson.loads(raw or b"null"))
        except orjson.JSONDecodeError as error:
            raise RequestValidationError(
                [{"type": "json_invalid", "loc": ("body", error.pos), "msg": f"JSON decode error: {error.msg}"}]
            ) from error
        except ValidationError as error:
            raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error


def route_of(body: Any, few_at_once: bool = False) -> type[_BodyRoute]:
    """Make a route of which a body of this type is all of the input.

    Args:
        body: the type.
        few_at_once: whether a large body waits, unparsed, until few others of such routes are worked on.
    """
    return type("_BodyRouteOf", (_BodyRoute,), {"adapter": TypeAdapter(body), "few_at_once": few_at_once})
