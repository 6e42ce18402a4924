"""Routes of pictures: what is like one, an item's own, and its small copy."""

import hashlib
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Response
from fastapi import Path as PathParam
from fastapi import Request as HttpRequest
from pydantic import TypeAdapter, ValidationError

from recbole_llm.retrieval.recommender import Request
from recbole_llm.serving import answer_schemas, schemas
from recbole_llm.serving.item_writes import Writer
from recbole_llm.serving.media_types import MEDIA_TYPES
from recbole_llm.serving.problem import Problem
from recbole_llm.serving.problem_answers import problems_of_route
from recbole_llm.serving.reading import MAX_COST
from recbole_llm.serving.responses import condition_of, json_answer, rendered, state_content, with_state
from recbole_llm.serving.service import Service

MAX_FILTER_CHARACTERS = 4096
KEPT_SECONDS = 300  # by a browser, before it asks whether the picture changed

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES},
    }
}
_FILTER: TypeAdapter[Any] = TypeAdapter(schemas.Filter)

ItemId = Annotated[str, PathParam(min_length=1, max_length=schemas.MAX_ID_CHARACTERS, description="May hold slashes.")]


def add_pictures(app: FastAPI, service: Service) -> None:
    """Add the routes; before those of items, whose ids may be anything.

    Args:
        app: what they are added to.
        service: what answers.
    """
    limits, writer = service.settings.limits, Writer(service)

    @app.post(
        "/v1/recommend/image",
        response_model=answer_schemas.RecommendationOut,
        responses=problems_of_route(408, 413, 415, 504),
        summary="What is like a picture, then what buyers of its like bought",
        openapi_extra=_BODY,
    )
    async def recommend_image(
        request: HttpRequest,
        k: Annotated[int, Query(ge=1, le=schemas.MAX_K)] = 10,
        by: schemas.By = "both",
        explain: Annotated[int, Query(ge=0, le=schemas.MAX_EXPLAIN)] = 0,
        filter: Annotated[
            str | None, Query(max_length=MAX_FILTER_CHARACTERS, description="A filter as of /v1/recommend, as JSON.")
        ] = None,
    ) -> Response:
        if k * explain > schemas.MAX_REASONS:
            raise Problem(422, f"explain: {k} items with {explain} reasons each are more than {schemas.MAX_REASONS}.")
        condition = _filter_of(filter)
        encoded = await service.pictures.encode(await request.body(), limits.request_seconds)
        asked = Request(picture_vector=encoded.vector, k=k, by=by, explain=explain, filter=condition)
        cost = service.reader.cost_of(asked)
        if cost > MAX_COST:
            answer = await service.reader.render([asked], rendered, limits.request_seconds)
            (raw,) = answer.value
            if isinstance(raw, Exception):
                raise raw
            return json_answer(with_state(raw, answer))
        answer = await service.reader.recommend(asked, cost)
        return json_answer(with_state(rendered(answer.value), answer))

    @app.put(
        "/v1/items/{item_id:any}/image",
        response_model=answer_schemas.PutOut,
        responses=problems_of_route(408, 413, 415, 504),
        summary="Give an item a picture, or add an item by its picture; live in the next request",
        openapi_extra=_BODY,
    )
    async def put_image(item_id: ItemId, request: HttpRequest) -> Response:
        return await writer.put(item_id, schemas.ItemBody(), await request.body())

    @app.delete(
        "/v1/items/{item_id:any}/image",
        response_model=answer_schemas.DeleteOut,
        responses=problems_of_route(404, 408, 413, 415, 504),
        summary="Take an item's picture away; the item stays, placed by what else it has",
    )
    async def take_image(item_id: ItemId) -> Response:
        seq = await writer.take_picture(item_id)
        answer = await service.reader.after_write(lambda recommender: None)
        return json_answer({"id": item_id, "seq": seq, **state_content(answer)})

    @app.get(
        "/v1/items/{item_id:any}/image",
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {}}, "description": "A small copy of the item's picture."},
            304: {"description": "The copy is still the one of If-None-Match."},
            **problems_of_route(404),
        },
        summary="A small copy of an item's picture",
    )
    async def image(item_id: ItemId, request: HttpRequest) -> Response:
        catalog = service.recommender.catalog  # entries are added and replaced whole, so that this thread may look
        small = catalog.thumbnail(catalog.shown(item_id))
        if small is None:
            raise Problem(404, "There is no picture of this item.")
        tag = f'"{hashlib.sha256(small).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": f"private, max-age={KEPT_SECONDS}"}
        known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
        if tag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(small, media_type="image/jpeg", headers=headers)


def _filter_of(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return condition_of(_FILTER.validate_python(orjson.loads(text)))
    except (orjson.JSONDecodeError, ValidationError):
        raise Problem(422, "filter: it is no filter as of /v1/recommend, as JSON.") from None
