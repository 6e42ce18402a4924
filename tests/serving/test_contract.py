"""The OpenAPI contract, by schemathesis, and bodies that are no bodies, by hypothesis."""

import json
import threading

import pytest
from made_export import PATIENT, WordEncoder
from waiting import LIMIT, join, wait_until

pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("httpx", reason="extra 'test': httpx")
pytest.importorskip("uvicorn", reason="extra 'serve'")
pytest.importorskip("schemathesis", reason="extra 'test': schemathesis")
import httpx
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from recbole_llm.serving.app import create_app
from recbole_llm.serving.media_types import MEDIA_TYPES
from recbole_llm.serving.settings import Settings

# routes that check what a schema cannot say: attributes that the export declares, names of exports, texts of new items
DECLARED = {
    "/v1/recommend", "/v1/recommend/batch", "/v1/items/{item_id}", "/v1/items/batch", "/v1/admin/reload",
    "/v1/recommend/image", "/v1/items/{item_id}/image",
}  # fmt: skip
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MADE_UP = dict(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@schemathesis.serializer(*MEDIA_TYPES)
def picture(ctx, value):
    """A picture's file is bytes, whatever is made up for it."""
    raw = getattr(value, "data", value)  # of a string of format "binary"
    return raw if isinstance(raw, bytes) else str(raw).encode("utf-8", "surrogatepass")


OPERATIONS = [
    ("POST", "/v1/recommend"),
    ("POST", "/v1/recommend/batch"),
    ("POST", "/v1/recommend/image"),
    ("GET", "/v1/items/{item_id}/image"),
    ("PUT", "/v1/items/{item_id}/image"),
    ("DELETE", "/v1/items/{item_id}/image"),
    ("GET", "/v1/items/{item_id}/similar"),
    ("GET", "/v1/items/{item_id}"),
    ("GET", "/v1/items"),
    ("GET", "/v1/users"),
    ("GET", "/v1/attributes"),
    ("PUT", "/v1/items/{item_id}"),
    ("DELETE", "/v1/items/{item_id}"),
    ("POST", "/v1/items/batch"),
    ("GET", "/v1/model"),
    ("POST", "/v1/admin/reload"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def url(shared_folder):
    """A real server on this machine."""
    app = create_app(Settings(export=str(shared_folder), limits=PATIENT), lambda folder, manifest: WordEncoder())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started and app.state.service.text.state == "ready", "the server answers")
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    join(thread)


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=LIMIT) as client:
        yield client


@pytest.fixture(scope="module")
def api(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_route_is_tested(api):
    assert {(r.ok().method.upper(), r.ok().path) for r in api.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("examples", [12, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_route_keeps_its_contract(api, method, path, mode, examples):
    """Made-up requests, right and wrong by the schema: never a 500, never an answer that is not documented."""
    if (path, mode) == ("/v1/recommend/batch", "negative"):
        pytest.skip("schemathesis cannot make wrong arrays of a union; the union is tested alone, and fuzzed below")
    operation = api[path][method]
    checks = CHECKS if mode == "positive" else [*CHECKS, negative_data_rejection]
    seen = []

    @settings(max_examples=examples, **MADE_UP)
    @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    def run(case):
        response = case.call(timeout=LIMIT)
        seen.append(response.status_code)
        case.validate_response(response, checks=checks)

    try:
        run()
    except Unsatisfiable:
        assert mode == "negative"  # nothing of this route can be wrong
        return
    if mode == "positive":
        assert 422 not in seen or path in DECLARED, "the schema allows what the service refuses"


BODIES = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.integers(1, 3000).map(lambda depth: b"[" * depth + b"]" * depth),
    st.integers(1, 3000).map(lambda depth: b'{"filter":' * depth + b"1" + b"}" * depth),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
            st.sampled_from(["user", "items", "text", "k", "filter", "exclude", "weights", "year", "gte", "x"]), inner, max_size=4
        ),
    ).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/recommend/batch", "/v1/items/batch", "/v1/admin/reload"])
@settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(content=BODIES)
def test_no_body_makes_the_service_fail(client, path, content):
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500, content
    if answer.status_code != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        body = answer.json()
        assert body["status"] == answer.status_code and len(answer.content) < 20_000


@settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    request=st.fixed_dictionaries(
        {"user": st.sampled_from(["u0", "u1", "u11", "nobody"])},
        optional={
            "k": st.integers(1, 1000),
            "exclude": st.lists(st.sampled_from(["i0", "i1", "x"]), max_size=4),
            "exclude_seen": st.booleans(),
            "explain": st.integers(0, 100),
            "fallback": st.sampled_from(["none", "popular"]),
            "filter": st.dictionaries(
                st.sampled_from(["year", "genre", "kind"]),
                st.one_of(
                    st.text(max_size=5),
                    st.floats(allow_nan=False, allow_infinity=False),
                    st.lists(st.text(max_size=5), max_size=3),
                    st.fixed_dictionaries(
                        {}, optional={"gte": st.integers(-9999, 9999), "lt": st.floats(-1e300, 1e300)}
                    ),
                ),
                max_size=2,
            ),
        },
    )
)
def test_answers_hold_what_was_asked_for(client, request):
    answer = client.post("/v1/recommend", json=request)
    assert answer.status_code in (200, 404, 422)
    if answer.status_code != 200:
        return
    body = answer.json()
    scores = [item["score"] for item in body["items"]]
    ids = [item["id"] for item in body["items"]]
    assert scores == sorted(scores, reverse=True) and len(set(ids)) == len(ids) <= request.get("k", 10)
    assert not set(ids) & set(request.get("exclude", []))
    for item in body["items"] if request.get("explain") and body["source"] != "popular" else []:
        assert item["score"] == pytest.approx(
            sum(r["contribution"] for r in item["reasons"]) + item["rest"] + item["bias"], abs=1e-6
        )
