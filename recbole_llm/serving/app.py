"""The routes. Validation by pydantic, answers as bytes by orjson; what a route does is in ``service.py``."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Response
from fastapi import Path as PathParam
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import recbole_llm
from recbole_llm.export.manifest import Manifest
from recbole_llm.retrieval.recommender import Request
from recbole_llm.retrieval.remote import SearchError
from recbole_llm.serving import schemas
from recbole_llm.serving.batching import DeadlineExceeded, QueueFull
from recbole_llm.serving.bodies import (
    invalid_problem,
    item_content,
    json_answer,
    problem_of,
    recommendation_content,
    request_of,
    state_content,
)
from recbole_llm.serving.change_log import OverlayError
from recbole_llm.serving.gate import Gate
from recbole_llm.serving.item_writes import Writer
from recbole_llm.serving.problem import MEDIA_TYPE, Problem
from recbole_llm.serving.service import NotYetApplied, ReloadRunning, Service
from recbole_llm.serving.settings import Settings
from recbole_llm.serving.signals import reload_on_hangup
from recbole_llm.serving.text import EncodedText, EncoderUnavailable, SentenceEncoder

STATIC = Path(__file__).parent / "static"
MAX_SEQ = 2**53

ItemId = Annotated[str, PathParam(min_length=1, max_length=schemas.MAX_ID_CHARACTERS, description="May hold slashes.")]
_PROBLEM = {
    "model": schemas.ProblemOut,
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}},
}
_MEANINGS = {
    400: "The request cannot be read.",
    401: "No valid key.",
    403: "Not allowed: key, host, origin, or a read-only service.",
    404: "Unknown user or item.",
    408: "The body came too slowly.",
    409: "A reload is running.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "The request does not fit the schema or the model.",
    429: "Too many requests.",
    503: "At the limit, or not ready; try again.",
    504: "Not done in time.",
}


class _AnyId(Convertor[str]):
    """Everything up to the end of the path or of its last part: ids may hold slashes and line breaks."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _AnyId())


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    always = (400, 401, 403, 422, 429, 503)
    return {
        status: {"description": _MEANINGS[status], "content": _PROBLEM["content"]}
        for status in sorted({*always, *statuses})
    }


class _OrjsonRequest(HttpRequest):
    """Strict JSON: no NaN, no Infinity."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def with_orjson(request: HttpRequest) -> Response:
            return await handler(_OrjsonRequest(request.scope, request.receive))

        return with_orjson


class _BodyRoute(APIRoute):
    """A route whose body is all of its input, validated here: looking for other parameters costs as much as the answer."""

    adapter: TypeAdapter[Any]

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        validate, endpoint = self.adapter.validate_python, self.endpoint

        async def handle(request: HttpRequest) -> Response:
            try:
                body = validate(orjson.loads(await request.body() or b"null"))
            except orjson.JSONDecodeError as error:
                raise RequestValidationError(
                    [{"type": "json_invalid", "loc": ("body", error.pos), "msg": f"JSON decode error: {error.msg}"}]
                ) from error
            except ValidationError as error:
                raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error
            response: Response = await endpoint(body, request)
            return response

        return handle


class _RecommendRoute(_BodyRoute):
    adapter = TypeAdapter(schemas.RecommendBody)


def create_app(settings: Settings, make_encoder: Callable[[Path, Manifest], SentenceEncoder] | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        settings: how it is set up.
        make_encoder: of :class:`Service`.

    Returns:
        The application; ``app.state.service`` is its :class:`Service`, started with the application.
    """
    service = Service(settings, make_encoder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        reload_on_hangup(service, asyncio.get_running_loop())
        yield
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
    app.router.route_class = _Route
    app.state.service = service
    app.add_middleware(Gate, settings=settings, metrics=service.metrics)
    if settings.cors_origins:  # around the gate, so that its refusals can be read too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["content-type", "x-api-key", "authorization", "x-min-seq", "x-request-id"],
        )
    _add_error_handlers(app)
    _add_reading(app, service)
    _add_items(app, service)
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
        Problem, LookupError, ValueError, QueueFull, DeadlineExceeded, NotYetApplied, ReloadRunning, OverlayError,
        EncoderUnavailable, SearchError,
    ):  # fmt: skip
        app.add_exception_handler(kind, known)


async def _encoded(service: Service, bodies: Sequence[Any]) -> dict[str, EncodedText]:
    """The texts of bodies with their vectors."""
    texts = list(dict.fromkeys(body.text for body in bodies if isinstance(body, schemas.TextRequest)))
    if not texts:
        return {}
    return dict(zip(texts, await service.text.encode(texts, service.settings.limits.request_seconds), strict=True))


async def _insist(service: Service, request: HttpRequest) -> None:
    """Honour ``X-Min-Seq``: an answer that knows at least that change."""
    wanted = request.headers.get("x-min-seq")
    if wanted is None:
        return
    if not (wanted.isdigit() and wanted.isascii() and int(wanted) <= MAX_SEQ):
        raise Problem(422, "X-Min-Seq must be the seq of a change.")
    await service.wait_for(int(wanted))


def _add_reading(app: FastAPI, service: Service) -> None:
    async def recommend(body: schemas.RecommendBody, request: HttpRequest) -> Response:
        await _insist(service, request)
        texts = await _encoded(service, [body])
        answer = await service.recommend(request_of(body, texts))
        content = {**recommendation_content(answer.value), **state_content(answer)}
        if any(encoded.cut for encoded in texts.values()):
            content["truncated"] = 1
        return json_answer(content)

    app.router.add_api_route(
        "/v1/recommend",
        recommend,
        methods=["POST"],
        response_model=schemas.RecommendationOut,
        responses=_problems(404, 408, 413, 415, 504),
        summary="Recommend for a known user, for items, or for a text",
        route_class_override=_RecommendRoute,
    )

    @app.post(
        "/v1/recommend/batch",
        response_model=schemas.BatchOut,
        responses=_problems(408, 413, 415, 504),
        summary="Several requests; one that fails does not fail the rest",
    )
    async def recommend_batch(body: schemas.BatchBody, request: HttpRequest) -> Response:
        await _insist(service, request)
        results: list[dict[str, Any]] = []
        ready: list[tuple[int, Request]] = []
        texts: dict[str, EncodedText] = {}
        failure: Exception | None = None
        try:
            texts = await _encoded(service, body.requests)  # all of them at once: the encoder works in batches
        except Exception as error:
            failure = error
        for asked in body.requests:
            try:
                if failure is not None and isinstance(asked, schemas.TextRequest):
                    raise failure
                ready.append((len(results), request_of(asked, texts)))
                results.append({})
            except Exception as error:
                results.append({"error": _content_of(error)})
        answer = await service.ask_many([asked for _, asked in ready])
        for (at, _), value in zip(ready, answer.value, strict=True):
            results[at] = (
                {"error": _content_of(value)} if isinstance(value, Exception) else recommendation_content(value)
            )
        return json_answer({"results": results, **state_content(answer)})

    def _content_of(error: Exception) -> dict[str, Any]:
        problem = problem_of(error)
        if problem is None:
            raise error
        return problem.content()


def _add_items(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/items/{item_id:any}/similar",
        response_model=schemas.RecommendationOut,
        responses=_problems(404, 504),
        summary="Items like this one",
    )
    async def similar(
        item_id: ItemId, request: HttpRequest, k: Annotated[int, Query(ge=1, le=schemas.MAX_K)] = 10
    ) -> Response:
        await _insist(service, request)
        answer = await service.ask(lambda recommender: recommender.similar(item_id, k))
        return json_answer({**recommendation_content(answer.value), **state_content(answer)})

    @app.get(
        "/v1/items/{item_id:any}",
        response_model=schemas.ItemOut,
        responses=_problems(404, 504),
        summary="An item with its attributes",
    )
    async def item(item_id: ItemId, request: HttpRequest) -> Response:
        await _insist(service, request)
        answer = await service.ask(lambda recommender: recommender.catalog.state(recommender.catalog.row(item_id)))
        return json_answer({**item_content(answer.value), **state_content(answer)})

    @app.get("/v1/items", response_model=schemas.FoundOut, responses=_problems(504), summary="Items by their title")
    async def search(
        search: Annotated[str, Query(min_length=1, max_length=schemas.MAX_ID_CHARACTERS)],
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
    ) -> Response:
        answer = await service.ask(lambda recommender: recommender.catalog.find(search, limit))
        return json_answer({"items": [item_content(state) for state in answer.value], **state_content(answer)})


def _add_writing(app: FastAPI, service: Service) -> None:
    writer = Writer(service)

    @app.put(
        "/v1/items/{item_id:any}",
        response_model=schemas.PutOut,
        responses=_problems(408, 413, 415, 504),
        summary="Add an item by its text, or change it; live in the next request",
    )
    async def put(item_id: ItemId, body: schemas.ItemBody) -> Response:
        (written,) = await writer.write([(item_id, body)])
        answer = await service.ask(lambda recommender: _cold(recommender, item_id))
        return json_answer(
            {
                "id": item_id,
                "created": written.created,
                "seq": written.seq,
                "cold": answer.value,
                "truncated": int(written.cut > 0),
                **state_content(answer),
            }
        )

    @app.delete(
        "/v1/items/{item_id:any}",
        response_model=schemas.DeleteOut,
        responses=_problems(404, 408, 413, 415, 504),
        summary="Take an item out of every answer",
    )
    async def delete(item_id: ItemId) -> Response:
        (written,) = await writer.write([(item_id, None)])
        answer = await service.ask(lambda recommender: None)
        return json_answer({"id": item_id, "seq": written.seq, **state_content(answer)})

    @app.post(
        "/v1/items/batch",
        response_model=schemas.ItemsBatchOut,
        responses=_problems(404, 408, 413, 415, 504),
        summary="Several changes, all or none",
    )
    async def batch(body: schemas.ItemsBatchBody) -> Response:
        entries = [(entry.id, None if isinstance(entry, schemas.DeleteEntry) else entry) for entry in body.items]
        written = await writer.write(entries)
        answer = await service.ask(lambda recommender: None)
        truncated = sum(one.cut > 0 for one in written)
        return json_answer(
            {"seq": written[-1].seq, "count": len(written), "truncated": truncated, **state_content(answer)}
        )


def _cold(recommender: Any, item_id: str) -> bool:
    row = recommender.catalog.row_of.get(item_id)
    return row is None or recommender.catalog.is_cold(row)


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model", responses=_problems(504), summary="The export's manifest, less its files")
    async def model() -> Response:
        answer = await service.ask(lambda recommender: recommender.export.manifest.to_json())
        content = {name: value for name, value in answer.value.items() if name != "files"}
        return json_answer({**content, **state_content(answer), "encoder_state": service.text.state})

    @app.post(
        "/v1/admin/reload",
        response_model=schemas.ReloadOut,
        responses=_problems(408, 409, 413, 415),
        summary="Load the newest export, or one by name; no request is dropped",
    )
    async def reload(body: schemas.ReloadBody) -> Response:
        swap = await service.reload(body.export)
        return json_answer({"from": swap.before, "to": swap.after, "seconds": swap.seconds})

    @app.get("/health/live", response_model=schemas.HealthOut, summary="The process answers")
    async def live() -> Response:
        return json_answer({"status": "ok"})

    @app.get("/health/ready", response_model=schemas.HealthOut, summary="The catalogue is in, the log applied")
    async def ready() -> Response:
        return json_answer({"status": "ok", "model": service.export_id, "encoder": service.text.state})

    @app.get("/metrics", summary="Prometheus text", responses={200: {"content": {"text/plain": {}}}, **_problems()})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html; charset=utf-8")


def app_from_environment() -> FastAPI:
    """The application of a worker process, whose settings the parent put into its environment."""
    import os

    return create_app(Settings.from_json(os.environ[SETTINGS_VARIABLE]))


SETTINGS_VARIABLE = "RECBOLE_LLM_SERVE_SETTINGS"
__all__: Sequence[str] = ("app_from_environment", "create_app")
