"""The gate: keys, sizes, deadlines, rates, what is logged and counted."""

import json
import logging
import re
import threading

from made_service import READ, WRITE, is_problem, key
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
    assert is_problem(answer, 503) and answer.headers["retry-after"] == "1" and client.service.reader.batcher.waiting == 1
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
