"""The gate: keys, sizes, deadlines, rates, what is logged and counted."""

import json
import logging
import re
import threading
from dataclasses import replace

import pytest
from made_export import PATIENT, WordEncoder
from made_service import READ, WRITE, is_problem, key
from pydantic import TypeAdapter
from waiting import LIMIT, happens, join, wait_until

from recbole_llm.serving.settings import Limits, Settings


def test_keys_and_scopes(start):
    client = start(keys=(key("read", READ), key("write", WRITE)), metrics_need_key=True)
    body = {"user": "u1"}
    answer = client.post("/v1/recommend", json=body)
    is_problem(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"
    for wrong in (
        {"x-api-key": "w" * 19},
        {"authorization": "Basic " + READ},
        {"authorization": "Bearer x"},
        {"x-api-key": "ü"},
    ):
        headers = {name: value.encode("latin-1") for name, value in wrong.items()}
        is_problem(client.post("/v1/recommend", json=body, headers=headers), 401)
    for right in ({"x-api-key": READ}, {"authorization": f"Bearer {READ}"}, {"x-api-key": WRITE}):
        assert client.post("/v1/recommend", json=body, headers=right).status_code == 200
    reader, writer = {"x-api-key": READ}, {"x-api-key": WRITE}
    is_problem(client.put("/v1/items/a", json={"text": "sea"}, headers=reader), 403)
    is_problem(client.delete("/v1/items/i1", headers=reader), 403)
    is_problem(client.post("/v1/items/batch", json={"items": []}, headers=reader), 403)
    is_problem(client.post("/v1/admin/reload", json={}, headers=reader), 403)
    assert client.put("/v1/items/a", json={"text": "sea"}, headers=writer).status_code == 200
    is_problem(client.get("/metrics"), 401)
    assert client.get("/metrics", headers=reader).status_code == 200
    assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
    assert client.get("/").status_code == 200  # the page asks for the key
    is_problem(client.get("/v1/model"), 401)


def test_keys_are_compared_in_constant_time():
    import inspect

    assert "hmac.compare_digest" in inspect.getsource(Settings.scope_of)


def test_read_only(start):
    client = start(read_only=True, state=None)
    client.ask(user="u1")
    for answer in (
        client.put("/v1/items/a", json={"text": "x"}),
        client.delete("/v1/items/i1"),
        client.post("/v1/admin/reload", json={}),
    ):
        assert "read-only" in is_problem(answer, 403)


def test_foreign_hosts_and_origins(start):
    client = start(cors_origins=("https://shop.example",))
    for host in ("evil.example", "testserver.evil.example", ""):
        is_problem(client.get("/health/live", headers={"host": host}), 403)
    assert client.get("/health/live", headers={"host": "testserver:8000"}).status_code == 200
    foreign = {"origin": "https://evil.example"}
    is_problem(client.post("/v1/recommend", json={"user": "u1"}, headers=foreign), 403)
    answer = client.get("/v1/items/i1", headers=foreign)
    assert "access-control-allow-origin" not in answer.headers
    own = client.post("/v1/recommend", json={"user": "u1"}, headers={"origin": "http://testserver"})
    assert own.status_code == 200
    shop = {"origin": "https://shop.example"}
    answer = client.post("/v1/recommend", json={"user": "u1"}, headers=shop)
    assert answer.headers.get_list("access-control-allow-origin") == ["https://shop.example"]
    refused = client.post("/v1/recommend", content=b"x", headers=shop)  # by the gate, and readable
    assert refused.status_code == 415 and refused.headers["access-control-allow-origin"] == "https://shop.example"
    preflight = client.options("/v1/recommend", headers={**shop, "access-control-request-method": "POST"})
    assert preflight.status_code == 200


def test_a_body_must_be_json_and_small(start):
    client = start(limits=Limits(body_bytes=1000, batch_body_bytes=2000, body_seconds=LIMIT))
    is_problem(client.post("/v1/recommend", content=b'{"user":"u1"}', headers={"content-type": "text/plain"}), 415)
    is_problem(client.post("/v1/recommend", content=b'{"user":"u1"}'), 415)
    json_type = {"content-type": "application/json"}
    is_problem(client.post("/v1/recommend", content=b" " * 1001, headers=json_type), 413)

    def chunks():  # no content-length
        for _ in range(20):
            yield b" " * 100

    is_problem(client.post("/v1/recommend", content=chunks(), headers=json_type), 413)
    is_problem(client.post("/v1/recommend/batch", content=b" " * 1500, headers=json_type), 422)
    is_problem(client.post("/v1/recommend/batch", content=b" " * 2001, headers=json_type), 413)
    is_problem(client.post("/v1/recommend", content=b"{}", headers={**json_type, "content-length": "99999"}), 413)


def block(client):
    """Keep the thread of the batches busy until the event that is returned is set; and the thread that asked for it."""
    gate, busy = threading.Event(), threading.Event()

    def work():
        busy.set()
        happens(gate, "the test lets the batches go on")

    thread = threading.Thread(target=lambda: client.portal.call(client.service.reader.batcher.call, work))
    thread.start()
    happens(busy, "the thread of the batches is busy")
    return gate, thread


def test_overload_is_refused_before_the_body_is_read(start):
    client = start(limits=Limits(queue=1, request_seconds=LIMIT))
    gate, blocked = block(client)
    waiting = threading.Thread(target=lambda: client.post("/v1/recommend", json={"user": "u1"}))
    waiting.start()
    wait_until(lambda: client.service.reader.batcher.waiting == 1, "a request waits")
    read = []

    def body():
        read.append(1)
        yield b"{}"

    answer = client.post("/v1/recommend", json={"user": "u1"})  # at once: the one before it still waits
    assert (
        is_problem(answer, 503) and answer.headers["retry-after"] == "1" and client.service.reader.batcher.waiting == 1
    )
    assert client.get("/health/live").status_code == 200
    gate.set()
    join(blocked, waiting)
    client.ask(user="u1")
    assert 'rejected_total{reason="queue"} 1' in client.get("/metrics").text


def test_a_deadline_is_kept(start):
    client = start(limits=Limits(request_seconds=0.1))
    gate, blocked = block(client)
    is_problem(client.post("/v1/recommend", json={"user": "u1"}), 504)
    gate.set()
    join(blocked)


def test_rate_limit(start):
    client = start(limits=Limits(requests_per_second=0.001, burst=3, request_seconds=LIMIT))
    codes = [client.get("/v1/items/i1").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    answer = client.get("/v1/items/i1")
    assert is_problem(answer, 429) and int(answer.headers["retry-after"]) >= 1


def test_a_fault_of_ours_is_500_without_a_trace(client, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("secret internals")

    monkeypatch.setattr(client.service.reader, "recommend", fail)
    answer = client.post("/v1/recommend", json={"user": "u1"})
    assert "secret" not in answer.text and is_problem(answer, 500)
    assert "secret internals" in caplog.text
    monkeypatch.undo()
    client.ask(user="u1")


def test_request_ids_and_headers(client):
    assert client.get("/health/live", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/health/live", headers={"x-request-id": "a b\tc"}).headers["x-request-id"] != "a b\tc"
    headers = client.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_unknown_routes_and_methods(client):
    is_problem(client.get("/nowhere"), 404)
    answer = client.get("/v1/recommend")
    is_problem(answer, 405)
    assert answer.headers["allow"]
    is_problem(client.get("/docs"), 404)
    is_problem(client.get("/static/../app.py"), 404)
    is_problem(client.get("/static/%2e%2e/app.py"), 404)


def test_the_access_log_holds_no_ids_of_users(start, caplog):
    client = start(access_log=True)
    with caplog.at_level(logging.INFO, logger="recbole_llm.serving.access"):
        client.ask(user="u3")
    line = json.loads(caplog.records[-1].getMessage())
    assert line["route"] == "/v1/recommend" and line["status"] == 200 and line["ms"] > 0
    assert "u3" not in caplog.records[-1].getMessage()


def test_metrics(client):
    client.ask(user="u1", k=4)
    client.ask(items=["i1", "zz"], k=40)
    client.delete("/v1/items/i1")
    text = client.get("/metrics").text
    for line in (
        'recbole_llm_requests_total{route="/v1/recommend",status="200"} 2',
        "recbole_llm_unknown_ids_total 1",
        'recbole_llm_items{kind="warm"} 36',
        'recbole_llm_items{kind="deleted"} 1',
        "recbole_llm_overlay_seq 1",
        'recbole_llm_recommended_items_total{kind="cold"}',
        "recbole_llm_batch_size_count",
    ):
        assert line in text, line
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{.*\})? -?[\d.e+-]+", line), line


def test_model_and_openapi(client, export):
    body = client.get("/v1/model").json()
    assert body["export_id"] == export.manifest.export_id and "files" not in body and body["encoder_state"] == "ready"
    paths = client.get("/openapi.json").json()["paths"]
    assert {
        "/v1/recommend",
        "/v1/recommend/batch",
        "/v1/items/{item_id}",
        "/v1/items/{item_id}/similar",
    } <= paths.keys()


# ------------------------------------------------------------------ rates, places, health


def patient(**changes):
    return replace(PATIENT, **changes)


def test_wrong_keys_are_counted_by_the_rate(start):
    client = start(keys=(key("read", READ),), limits=patient(requests_per_second=0.001, burst=3))
    codes = [client.get("/v1/items/i1", headers={"x-api-key": f"guess-{n}"}).status_code for n in range(6)]
    assert codes == [401, 401, 401, 429, 429, 429]
    assert client.get("/v1/items/i1").status_code == 429  # no key is a wrong one
    assert (
        client.get("/v1/items/i1", headers={"x-api-key": READ}).status_code == 200
    )  # the owner of a key is not kept out


def test_rates_are_per_key_where_there_is_one(start):
    client = start(keys=(key("read", READ), key("write", WRITE)), limits=patient(requests_per_second=0.001, burst=2))
    for right in (READ, WRITE):
        codes = [client.get("/v1/items/i1", headers={"x-api-key": right}).status_code for _ in range(3)]
        assert codes == [200, 200, 429]


def test_health_is_exempt_from_rates_and_answers_head(start):
    client = start(keys=(key("read", READ),), limits=patient(requests_per_second=0.001, burst=1))
    for _ in range(5):
        for path in ("/health/live", "/health/ready"):
            assert client.get(path).status_code == 200
            head = client.head(path)
            assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 0
    assert client.post("/health/live").status_code == 405


def test_writes_have_places_of_their_own(start):
    """Changes that wait for the encoder keep no reader out, and more of them than there are places are refused at once."""
    gate = threading.Event()

    class Slow(WordEncoder):
        def encode(self, texts):
            if texts != ["warm"]:
                happens(gate, "the test lets the encoder work")
            return super().encode(texts)

    client = start(make=lambda folder, manifest: Slow(), limits=patient(writes=2, queue=1))
    client.wait_for_encoder()
    answers = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(client.put(f"/v1/items/n{n}", json={"text": f"sea {n}"})))
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    gate_app = client.app.middleware_stack
    while not hasattr(gate_app, "in_flight"):
        gate_app = gate_app.app
    wait_until(lambda: gate_app.in_flight["write"] == 2, "two changes are under way")
    for refused in (
        client.put("/v1/items/x", json={"text": "sea"}),
        client.delete("/v1/items/i1"),
        client.post("/v1/items/batch", json={"items": [{"id": "x", "text": "sea"}]}),
    ):
        assert is_problem(refused, 503) and refused.headers["retry-after"] == "1"
    client.ask(user="u1")
    gate.set()
    join(*threads)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert gate_app.in_flight == {"read": 0, "write": 0} and gate_app.bodies.held == 0
    assert client.put("/v1/items/x", json={"text": "sea"}).status_code == 200


def test_a_change_that_is_made_is_never_refused_afterwards(start):
    """With the readers' queue full and their deadline over, who has written still hears that it is written."""
    client = start(limits=patient(queue=1, request_seconds=0.05))
    gate, blocked = block(client)
    waiting = threading.Thread(target=lambda: client.post("/v1/recommend", json={"user": "u1"}))
    waiting.start()
    wait_until(lambda: client.service.reader.batcher.waiting == 1, "the queue is full")
    answers = []
    writing = threading.Thread(target=lambda: answers.append(client.put("/v1/items/new", json={"text": "sea"})))
    writing.start()
    wait_until(lambda: client.service.changes._log.last_seq() == 1, "the change is committed")
    gate.set()
    join(blocked, waiting, writing)
    assert answers[0].status_code == 200 and answers[0].json()["seq"] == answers[0].json()["overlay_seq"] == 1


def test_places_and_memory_are_given_back_whatever_happens(start, monkeypatch):
    client = start(limits=patient(queue=1, writes=1))
    gate = client.app.middleware_stack
    while not hasattr(gate, "in_flight"):
        gate = gate.app
    long = " " * 100_000
    for _ in range(3):
        client.post("/v1/recommend", content=f'{{"user":"u1"{long}}}', headers={"content-type": "application/json"})
        client.post("/v1/recommend", content=b"{" + long.encode(), headers={"content-type": "application/json"})
        client.post("/v1/recommend", content=long.encode(), headers={"content-type": "text/plain"})
        client.post("/v1/recommend", content=b" " * (2 << 20), headers={"content-type": "application/json"})
        client.put("/v1/items/new", json={"text": "x" * 8193, "title": long})
        client.post("/v1/items/batch", json={"items": [{"id": "never", "op": "delete"}] * 1000})
        client.get("/v1/items/i1/similar?k=0")
    monkeypatch.setattr(client.service.reader, "recommend", lambda *args: 1 / 0)
    is_problem(client.post("/v1/recommend", json={"user": "u1"}), 500)
    assert gate.in_flight == {"read": 0, "write": 0} and gate.bodies.held == 0


def test_more_values_than_allowed_are_refused_before_they_are_parsed(client):
    body = b'{"requests":[{"user":"u1","exclude":[' + b'"a",' * 60_000 + b'"a"]}]}'
    answer = client.post("/v1/recommend/batch", content=body, headers={"content-type": "application/json"})
    assert "values" in is_problem(answer, 413)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/recommend/batch", {"requests": [{"user": "u1", "exclude": [0] * 100}] * 256}),
        ("POST", "/v1/recommend", {"user": "u1", "exclude": [0] * 10_000}),
        ("POST", "/v1/recommend", {"user": "u1", "filter": {f"f{n}": [None] * 1000 for n in range(16)}}),
        ("POST", "/v1/recommend", {"user": "u1", "filter": {f"f{n}": None for n in range(20_000)}}),
        ("POST", "/v1/recommend", {"user": "u1", **{f"f{n}": None for n in range(20_000)}}),
        ("POST", "/v1/recommend", {"items": [0] * 1000, "weights": ["x"] * 1000}),
        ("PUT", "/v1/items/x", {"attributes": {f"f{n}": None for n in range(20_000)}}),
        ("PUT", "/v1/items/x", {"fields": {f"f{n}": 0 for n in range(20_000)}}),
        ("POST", "/v1/items/batch", {"items": [{"id": 0}] * 1000}),
    ],
)
def test_wrong_bodies_have_few_errors(client, method, path, body):
    """A million wrong entries took a minute to list, during which nobody was answered."""
    from pydantic import ValidationError

    from recbole_llm.serving import schemas

    answer = client.request(method, path, json=body)
    is_problem(answer, 422)
    model = {
        "/v1/recommend": schemas.RecommendBody,
        "/v1/recommend/batch": schemas.BatchBody,
        "/v1/items/batch": schemas.ItemsBatchBody,
    }.get(path, schemas.ItemBody)
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(body)
    assert caught.value.error_count() <= 200 and len(answer.content) < 20_000
