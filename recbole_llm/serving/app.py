"""The routes. Validation by pydantic, answers as bytes by orjson; what a route does is in ``service.py``."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from fastapi import Path as PathParam
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import recbole_llm
from recbole_llm.export.manifest import Manifest
from recbole_llm.retrieval.recommender import Request
from recbole_llm.retrieval.remote import SearchError
from recbole_llm.serving import answer_schemas, operation_schemas, schemas
from recbole_llm.serving.batching import DeadlineExceeded, QueueFull
from recbole_llm.serving.bodies import Bodies
from recbole_llm.serving.browsing import add_browsing
from recbole_llm.serving.change_log import ChangeLogError
from recbole_llm.serving.changes import NotYetApplied
from recbole_llm.serving.connections import STATE_KEY, Connections
from recbole_llm.serving.encoding import EncoderUnavailable
from recbole_llm.serving.gate import Gate
from recbole_llm.serving.item_writes import Writer
from recbole_llm.serving.memory import give_back
from recbole_llm.serving.picture_routes import add_pictures
from recbole_llm.serving.problem import MEDIA_TYPE, Problem, echo
from recbole_llm.serving.problem_answers import problems_of_route
from recbole_llm.serving.reading import MAX_COST
from recbole_llm.serving.responses import (
    check_budget,
    error_content,
    invalid_problem,
    item_content,
    json_answer,
    problem_of,
    recommendation_content,
    rendered,
    request_of,
    state_content,
    text_of,
    with_state,
)
from recbole_llm.serving.routing import JsonRoute, route_of
from recbole_llm.serving.service import ReloadRunning, Service
from recbole_llm.serving.settings import Settings
from recbole_llm.serving.signals import reload_on_hangup
from recbole_llm.serving.text import EncodedText, SentenceEncoder

STATIC = Path(__file__).parent / "static"
NAMED_ROWS = 5
SWITCH_SECONDS = 0.001  # until the loop gets the interpreter from the thread that makes a large answer

ItemId = Annotated[str, PathParam(min_length=1, max_length=schemas.MAX_ID_CHARACTERS, description="May hold slashes.")]


def create_app(settings: Settings, make_encoder: Callable[[Path, Manifest], SentenceEncoder] | None = None) -> FastAPI:
    """Build the service as an ASGI application.

    Args:
        settings: how it is set up.
        make_encoder: of :class:`Service`.

    Returns:
        The application; ``app.state.service`` is its :class:`Service`, started with the application.
    """
    service = Service(settings, make_encoder)

    connections = Connections(settings.limits, service.metrics, settings.trusted_proxies)
    bodies = Bodies(settings.limits, service.metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        await service.start()
        service.keep(connections.watch())
        service.keep(give_back(lambda: bodies.held))
        reload_on_hangup(service, asyncio.get_running_loop())
        yield {STATE_KEY: connections}
        await service.stop()

    app = FastAPI(
        title="recbole-llm",
        version=recbole_llm.__version__,
        description="Recommendations from an exported LLMTwoTower. Every answer names the export that made it.",
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.router.route_class = JsonRoute
    app.state.service = service
    app.add_middleware(
        Gate, settings=settings, metrics=service.metrics, bodies=bodies, wait_for=service.changes.wait_for
    )
    if settings.cors_origins:  # around the gate, so that its refusals can be read too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["content-type", "x-api-key", "authorization", "x-min-seq", "x-request-id"],
        )
    _add_error_handlers(app)
    _add_reading(app, service)
    add_pictures(app, service)
    _add_items(app, service)
    add_browsing(app, service)
    _add_writing(app, service)
    _add_operations(app, service)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _add_error_handlers(app: FastAPI) -> None:
    def answer(problem: Problem) -> Response:
        return Response(problem.body(), problem.status, problem.headers(), MEDIA_TYPE)

    async def invalid(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(invalid_problem(error))

    async def http(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        details = {404: "No such route.", 405: "This route does not take that method.", 400: "The body cannot be read."}
        response = answer(Problem(error.status_code, details.get(error.status_code, "The request was refused.")))
        response.headers.update(error.headers or {})
        return response

    async def known(request: HttpRequest, error: Exception) -> Response:
        problem = problem_of(error)
        if problem is None:
            raise error
        return answer(problem)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (
        Problem, LookupError, ValueError, QueueFull, DeadlineExceeded, NotYetApplied, ReloadRunning, ChangeLogError,
        EncoderUnavailable, SearchError,
    ):  # fmt: skip
        app.add_exception_handler(kind, known)


async def _encoded(service: Service, bodies: Sequence[Any], manifest: Manifest) -> dict[str, EncodedText]:
    """The texts of bodies with their vectors; what cannot be read is left to :func:`request_of`."""
    found: dict[str, None] = {}
    for body in bodies:
        with suppress(Problem):
            text = text_of(body, manifest)
            if text is not None:
                found[text] = None
    texts = list(found)
    if not texts:
        return {}
    seconds = service.settings.limits.request_seconds
    await service.titles.learn(seconds)
    while True:
        encoding = service.text
        try:
            encoded = await encoding.encode(texts, seconds)
        except QueueFull:
            if encoding is service.text:
                raise
            continue  # a reload has put another encoder into its place
        if encoding is service.text:
            return dict(zip(texts, encoded, strict=True))


def _add_reading(app: FastAPI, service: Service) -> None:
    async def recommend(body: schemas.RecommendBody) -> Response:
        manifest = service.recommender.export.manifest
        texts = await _encoded(service, [body], manifest)
        asked = request_of(body, texts, manifest)
        cost = service.reader.cost_of(asked)
        if cost > MAX_COST:
            answer = await service.reader.render([asked], rendered, service.settings.limits.request_seconds)
            (raw,) = answer.value
            if isinstance(raw, Exception):
                raise raw
            if any(encoded.cut for encoded in texts.values()):
                raw = raw[:-1] + b',"truncated":1}'
            return json_answer(with_state(raw, answer))
        answer = await service.reader.recommend(asked, cost)
        content = {**recommendation_content(answer.value), **state_content(answer)}
        if any(encoded.cut for encoded in texts.values()):
            content["truncated"] = 1
        return json_answer(content)

    app.router.add_api_route(
        "/v1/recommend",
        recommend,
        methods=["POST"],
        response_model=answer_schemas.RecommendationOut,
        responses=problems_of_route(404, 408, 413, 415, 504),
        summary="Recommend for a known user, for items, for a text, or what is like an item",
        route_class_override=route_of(schemas.RecommendBody, few_at_once=True),
    )

    async def recommend_batch(body: schemas.BatchBody) -> Response:
        return await _answer_batch(service, body)

    app.router.add_api_route(
        "/v1/recommend/batch",
        recommend_batch,
        methods=["POST"],
        response_model=answer_schemas.BatchOut,
        responses=problems_of_route(408, 413, 415, 504),
        summary="Several requests; one that fails does not fail the rest",
        route_class_override=route_of(schemas.BatchBody, few_at_once=True),
    )


async def _answer_batch(service: Service, body: schemas.BatchBody) -> Response:
    check_budget(body.requests)
    results: list[bytes] = []
    ready: list[tuple[int, Request]] = []
    texts: dict[str, EncodedText] = {}
    manifest = service.recommender.export.manifest
    failure: Exception | None = None
    try:
        texts = await _encoded(service, body.requests, manifest)  # all of them at once: the encoder works in batches
    except Exception as error:
        failure = error
    for asked in body.requests:
        try:
            if text_of(asked, manifest) is not None and failure is not None:
                raise failure
            ready.append((len(results), request_of(asked, texts, manifest)))
            results.append(b"")
        except Exception as error:
            results.append(error_content(error))
    answer = await service.reader.render([asked for _, asked in ready], rendered, service.settings.limits.batch_seconds)
    for (at, _), value in zip(ready, answer.value, strict=True):
        results[at] = error_content(value) if isinstance(value, Exception) else value
        text = None if isinstance(value, Exception) else text_of(body.requests[at], manifest)
        if text is not None and texts[text].cut:
            results[at] = value[:-1] + b',"truncated":1}'
    return json_answer(with_state(b'{"results":[' + b",".join(results) + b"]}", answer))


def _add_items(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/items/{item_id:any}/similar",
        response_model=answer_schemas.RecommendationOut,
        responses=problems_of_route(404, 504),
        summary="Items like this one",
    )
    async def similar(
        item_id: ItemId, k: Annotated[int, Query(ge=1, le=schemas.MAX_K)] = 10, by: schemas.By = "both"
    ) -> Response:
        answer = await service.reader.ask(lambda recommender: recommender.similar(item_id, k, by=by))
        return json_answer({**recommendation_content(answer.value), **state_content(answer)})

    @app.get(
        "/v1/items/{item_id:any}",
        response_model=answer_schemas.ItemOut,
        responses=problems_of_route(404, 504),
        summary="An item with its attributes",
    )
    async def item(item_id: ItemId) -> Response:
        answer = await service.reader.ask(
            lambda recommender: recommender.catalog.state(recommender.catalog.shown(item_id))
        )
        return json_answer({**item_content(answer.value), **state_content(answer)})

    @app.get(
        "/v1/items",
        response_model=answer_schemas.FoundOut,
        responses=problems_of_route(504),
        summary="Items by their title",
    )
    async def search(
        search: Annotated[str, Query(min_length=1, max_length=schemas.MAX_ID_CHARACTERS)],
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
    ) -> Response:
        answer = await service.reader.find(search, limit)
        return json_answer({"items": [item_content(state) for state in answer.value], **state_content(answer)})


def _add_writing(app: FastAPI, service: Service) -> None:
    writer = Writer(service)

    @app.put(
        "/v1/items/{item_id:any}",
        response_model=answer_schemas.PutOut,
        responses=problems_of_route(408, 413, 415, 504),
        summary="Add an item by its text or picture, or change it; live in the next request",
    )
    async def put(item_id: ItemId, body: schemas.ItemBody) -> Response:
        return await writer.put(item_id, body)

    @app.delete(
        "/v1/items/{item_id:any}",
        response_model=answer_schemas.DeleteOut,
        responses=problems_of_route(404, 408, 413, 415, 504),
        summary="Take an item out of every answer",
    )
    async def delete(item_id: ItemId) -> Response:
        (written,) = await writer.write([(item_id, None)])
        answer = await service.reader.after_write(lambda recommender: None)
        return json_answer({"id": item_id, "seq": written.seq, **state_content(answer)})

    async def batch(body: schemas.ItemsBatchBody) -> Response:
        entries = [(entry.id, None if isinstance(entry, schemas.DeleteEntry) else entry) for entry in body.items]
        written = await writer.write(entries)
        answer = await service.reader.after_write(lambda recommender: None)
        truncated = sum(one.cut > 0 for one in written)
        return json_answer(
            {"seq": written[-1].seq, "count": len(written), "truncated": truncated, **state_content(answer)}
        )

    app.router.add_api_route(
        "/v1/items/batch",
        batch,
        methods=["POST"],
        response_model=answer_schemas.ItemsBatchOut,
        responses=problems_of_route(404, 408, 413, 415, 504),
        summary="Several changes, all or none",
        route_class_override=route_of(schemas.ItemsBatchBody),
    )


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model", responses=problems_of_route(504), summary="The export's manifest, less its files")
    async def model() -> Response:
        answer = await service.reader.ask(lambda recommender: recommender.export.manifest.to_json())
        content = {name: value for name, value in answer.value.items() if name != "files"}
        pictures = {"image_encoder_state": service.pictures.state, "images": service.recommender.catalog.has_thumbnails}
        return json_answer({**content, **state_content(answer), "encoder_state": service.text.state, **pictures})

    @app.post(
        "/v1/admin/reload",
        response_model=operation_schemas.ReloadOut,
        responses=problems_of_route(408, 409, 413, 415),
        summary="Load the newest export, or one by name; no request is dropped",
    )
    async def reload(body: schemas.ReloadBody) -> Response:
        swap = await service.reload(body.export)
        return json_answer({"from": swap.before, "to": swap.after, "seconds": swap.seconds})

    async def live() -> Response:
        return json_answer({"status": "ok"})

    async def ready() -> Response:
        problems, faults = await service.problems(), service.changes.faults
        content: dict[str, Any] = {
            "status": "unavailable" if problems else "ok",
            "model": service.export_id,
            "encoder": service.text.state,
        }
        if service.pictures.state != "none":
            content["image_encoder"] = service.pictures.state
        if problems:
            content["problems"] = problems
        if faults:
            content["skipped_rows"] = len(faults)
            content["skipped"] = {echo(item_id): faults[item_id] for item_id in list(faults)[:NAMED_ROWS]}
        return json_answer(content, 503 if problems else 200)

    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": operation_schemas.HealthOut, "description": "Not every route answers; ``problems`` says why."}
    }
    for path, health, summary, responses in (
        ("/health/live", live, "The process answers", {}),
        ("/health/ready", ready, "Every route answers", not_ready),
    ):
        app.add_api_route(
            path, health, response_model=operation_schemas.HealthOut, summary=summary, responses=responses
        )
        app.add_api_route(path, health, methods=["HEAD"], include_in_schema=False)

    @app.get(
        "/metrics", summary="Prometheus text", responses={200: {"content": {"text/plain": {}}}, **problems_of_route()}
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html; charset=utf-8")


def app_from_environment() -> FastAPI:
    """Build the application of a worker process from the settings that the parent put into its environment."""
    import os
    import sys

    sys.setswitchinterval(SWITCH_SECONDS)
    return create_app(Settings.from_json(os.environ[SETTINGS_VARIABLE]))


SETTINGS_VARIABLE = "RECBOLE_LLM_SERVE_SETTINGS"
__all__: Sequence[str] = ("app_from_environment", "create_app")
