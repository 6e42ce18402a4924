"""The routes and the gate, in process."""

import gc
import json
import logging
import re
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
from made_export import WordEncoder, make_contents

pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("httpx", reason="extra 'test'")
from starlette.testclient import TestClient

from recbole_llm.serving.app import create_app
from recbole_llm.serving.artifact import load_export
from recbole_llm.serving.artifact_writer import write_artifact
from recbole_llm.serving.overlay import OverlayError
from recbole_llm.serving.recommend import Recommender, Request
from recbole_llm.serving.settings import Key, Limits, Settings

READ, WRITE = "r" * 20, "w" * 20


def make_encoder(folder, manifest):
    return WordEncoder()


def key(scope, text):
    import hashlib

    return Key(scope, hashlib.sha256(text.encode()).hexdigest())


class Client(TestClient):
    def ask(self, status=200, **body):
        answer = self.post("/v1/recommend", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    @property
    def service(self):
        return self.app.state.service

    def wait_for_encoder(self):
        assert self.service.text.wait(10)
        return self


@pytest.fixture
def start(shared_folder, tmp_path):
    """Starts a service on the made export; stops all at the end."""
    clients = []

    def begin(export=shared_folder, make=make_encoder, **changes):
        changes = {"state": str(tmp_path / "state"), "allowed_hosts": ("testserver",), **changes}
        client = Client(create_app(Settings(export=str(export), **changes), make), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client.wait_for_encoder() if client.service.text.state == "loading" and make is make_encoder else client

    yield begin
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def export(shared_folder):
    return load_export(shared_folder)


@pytest.fixture
def client(start):
    return start()


def is_problem(answer, status):
    body = answer.json()
    assert answer.status_code == status == body["status"], answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["title"] and body["detail"] and answer.headers["x-request-id"]
    return body["detail"]


# ------------------------------------------------------------------ reading


def test_the_service_answers_as_the_python_api(client, export):
    recommender = Recommender(export)
    for user in export.user_ids:
        body = client.ask(user=user, k=5, explain=2, filter={"year": {"gte": 1985}})
        expected = recommender.recommend(Request(user=user, k=5, explain=2, filter={"year": {"gte": 1985}}))
        assert body["model"] == export.manifest.export_id and body["overlay_seq"] == 0
        assert body["source"] == "history" and body["unknown"] == []
        for got, item in zip(body["items"], expected.items, strict=True):
            assert (got["id"], got["title"], got["score"], got["cold"]) == (item.id, item.title, item.score, item.cold)
            assert [r["id"] for r in got["reasons"]] == [r.id for r in item.reasons]
            assert got["score"] == pytest.approx(
                sum(r["contribution"] for r in got["reasons"]) + got["rest"] + got["bias"], abs=1e-9
            )


def test_the_service_answers_as_the_command(client, shared_folder, export, tmp_path):
    from recbole_llm import cli

    target = tmp_path / "all.jsonl"
    assert cli.main(["recommend", str(shared_folder), "--k", "6", "--output", str(target)]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert {row["user"] for row in rows} == set(export.user_ids)
    for user in export.user_ids:
        got = [(item["id"], item["title"], item["score"], item["cold"]) for item in client.ask(user=user, k=6)["items"]]
        assert got == [(r["item"], r["title"], r["score"], r["cold"]) for r in rows if r["user"] == user]


def test_items_text_and_fallback(client):
    assert client.ask(items=["i1", "zz"])["unknown"] == ["zz"]
    assert client.ask(text="space story")["source"] == "text"
    assert client.ask(user="nobody", fallback="popular")["source"] == "popular"
    assert "No user 'nobody'" in client.ask(404, user="nobody")["detail"]
    client.ask(404, items=["x"])
    assert len(client.ask(items=["i1"], k=1000)["items"]) == 39  # no filler


def test_many_at_once_are_as_one_by_one(client):
    bodies = [{"user": f"u{n % 12}", "k": 1 + n % 7} for n in range(60)]
    alone = [client.ask(**body)["items"] for body in bodies]
    together = [None] * len(bodies)

    def ask(n):
        together[n] = client.ask(**bodies[n])["items"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_batch(client):
    requests = [{"user": "u1"}, {"user": "nobody"}, {"text": "sea"}, {"items": ["i2"], "filter": {"colour": "red"}}]
    body = client.post("/v1/recommend/batch", json={"requests": requests}).json()
    first, second, third, fourth = body["results"]
    assert first["items"] == client.ask(user="u1")["items"] and third["source"] == "text"
    assert second["error"]["status"] == 404 and fourth["error"]["status"] == 422
    assert "genre (tokens)" in fourth["error"]["detail"]
    many = client.post("/v1/recommend/batch", json={"requests": [{"user": f"u{n % 12}"} for n in range(256)]}).json()
    assert (
        len(many["results"]) == 256
        and many["results"][13]
        == client.post("/v1/recommend/batch", json={"requests": [{"user": "u1"}]}).json()["results"][0]
    )


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "exactly one of user, items and text"),
        ({"user": "u1", "items": ["i1"]}, "items"),
        ({"user": "u1", "kk": 3}, "kk"),
        ({"user": 1}, "user"),
        ({"user": ""}, "user"),
        ({"user": "u" * 257}, "user"),
        ({"user": "u1", "k": "3"}, "k"),
        ({"user": "u1", "k": 0}, "k"),
        ({"user": "u1", "k": 1001}, "k"),
        ({"user": "u1", "k": 2.5}, "k"),
        ({"user": "u1", "k": True}, "k"),
        ({"items": []}, "items"),
        ({"items": ["i1"], "weights": [1, 2]}, "weights"),
        ({"items": ["i1"], "weights": [-1]}, "weights"),
        ({"text": "x" * 8193}, "text"),
        ({"user": "u1", "fallback": "latest"}, "fallback"),
        ({"user": "u1", "filter": {"colour": "red"}}, "colour"),
        ({"user": "u1", "filter": {"year": {"above": 3}}}, "year"),
        ({"user": "u1", "filter": {"year": "1990"}}, "year"),
        ([], "exactly one"),
        (None, "exactly one|required"),
    ],
)
def test_wrong_bodies_are_told_where(client, body, where):
    answer = client.post("/v1/recommend", json=body)
    assert re.search(where, is_problem(answer, 422) + json.dumps(answer.json().get("errors", [])))


def test_a_whole_float_is_a_number_of_items(client):
    assert len(client.ask(user="u1", k=3.0)["items"]) == 3


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b'{"user": NaN}', b"[" * 5000, b'{"user":"u1","k":1e999}', b""])
def test_broken_json(client, raw):
    answer = client.post("/v1/recommend", content=raw, headers={"content-type": "application/json"})
    is_problem(answer, 422 if answer.status_code != 400 else 400)


def test_nothing_long_is_echoed(client):
    secret = "<script>" + "s" * 200
    for answer in (
        client.post("/v1/recommend", json={"user": secret}),
        client.post("/v1/recommend", json={"items": [secret]}),
        client.post("/v1/recommend", json={"user": "u1", "filter": {secret: 1}}),
        client.post("/v1/recommend", json={"user": "u1", secret: 1}),
        client.get(f"/v1/items/{secret}"),
        client.put("/v1/items/i1", json={"attributes": {secret: "x"}}),
        client.put("/v1/items/i1", json={"fields": {secret: "x"}}),
        client.post("/v1/admin/reload", json={"export": secret}),
    ):
        assert answer.status_code in (404, 422)
        assert secret[:70] not in answer.text


def test_similar_item_and_search(client, export):
    body = client.get("/v1/items/i3/similar", params={"k": 4}).json()
    assert [i["id"] for i in body["items"]] == [i.id for i in Recommender(export).similar("i3", 4).items]
    item = client.get("/v1/items/i3").json()
    assert item["title"] == "Title 3" and item["attributes"]["year"] == 1983.0 and item["cold"] is False
    assert [i["id"] for i in client.get("/v1/items", params={"search": "title 1", "limit": 2}).json()["items"]] == [
        "i1",
        "i10",
    ]
    is_problem(client.get("/v1/items/none"), 404)
    is_problem(client.get("/v1/items/none/similar"), 404)
    is_problem(client.get("/v1/items/i3/similar?k=0"), 422)
    is_problem(client.get("/v1/items"), 422)


# ------------------------------------------------------------------ writing


def test_a_new_item_is_in_the_next_answer(client, export):
    put = client.put(
        "/v1/items/new", json={"title": "Opera", "text": "space opera", "attributes": {"kind": "opera", "year": 2020}}
    )
    assert put.status_code == 200, put.text
    assert {k: put.json()[k] for k in ("id", "created", "seq", "cold", "truncated", "overlay_seq")} == {
        "id": "new", "created": True, "seq": 1, "cold": True, "truncated": 0, "overlay_seq": 1,
    }  # fmt: skip
    answer = client.ask(items=["i1"], filter={"kind": "opera"})
    assert [i["id"] for i in answer["items"]] == ["new"] and answer["overlay_seq"] == 1
    vector, _, bias = export.text_map.apply(WordEncoder().encode(["space opera"])[0])
    query = Recommender(export)._pooling.query(export.source[[1]], np.ones(1, np.float32)).vector
    assert answer["items"][0]["score"] == pytest.approx(float(query @ vector[0] + bias[0]), rel=1e-4)
    again = client.put("/v1/items/new", json={"title": "Opera", "text": "space opera"}).json()
    assert again["created"] is False and again["seq"] == 2
    item = client.get("/v1/items/new").json()
    assert item["text"] == "space opera" and item["attributes"]["year"] == 2020 and item["added_at"]


def test_fields_make_the_text_of_the_template(client):
    assert client.put("/v1/items/f", json={"fields": {"title": "Moon", "genre": "sea"}}).status_code == 200
    assert client.get("/v1/items/f").json()["text"] == "Moon. Genre: sea"
    assert "made of title, genre" in is_problem(client.put("/v1/items/f", json={"fields": {"plot": "x"}}), 422)
    is_problem(client.put("/v1/items/f", json={"fields": {"title": "a"}, "text": "b"}), 422)
    is_problem(client.put("/v1/items/f", json={"fields": {"title": ""}}), 422)


def test_delete(client):
    assert client.delete("/v1/items/i5").json()["seq"] == 1
    assert "i5" not in {i["id"] for i in client.ask(items=["i1"], k=50)["items"]}
    is_problem(client.get("/v1/items/i5"), 404)
    assert client.delete("/v1/items/i5").json()["seq"] == 2  # idempotent
    is_problem(client.delete("/v1/items/never"), 404)
    assert client.put("/v1/items/i5", json={"title": "Back"}).json()["created"] is True
    assert "i5" in {i["id"] for i in client.ask(items=["i1"], k=50)["items"]}


def test_batch_of_changes(client):
    items = [{"id": "a", "text": "sea"}, {"id": "b", "text": "war"}, {"id": "i1", "op": "delete"}]
    body = client.post("/v1/items/batch", json={"items": items}).json()
    assert (body["seq"], body["count"], body["overlay_seq"]) == (3, 3, 3)
    ids = {i["id"] for i in client.ask(items=["i2"], k=50)["items"]}
    assert {"a", "b"} <= ids and "i1" not in ids
    wrong = [{"id": "c", "text": "sea"}, {"id": "never", "op": "delete"}]
    is_problem(client.post("/v1/items/batch", json={"items": wrong}), 404)
    is_problem(client.get("/v1/items/c"), 404)  # all or none


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "new item needs a text"),
        ({"title": "x"}, "new item needs a text"),
        ({"text": ""}, "text"),
        ({"text": "x", "attributes": {"colour": "red"}}, r"unknown 'colour'.*genre \(tokens\)"),
        ({"text": "x", "attributes": {"year": "1990"}}, "year is of kind number"),
        ({"text": "x", "attributes": {"genre": "sea"}}, "genre is of kind tokens"),
        ({"text": "x", "id": "y"}, "id"),
    ],
)
def test_wrong_items_change_nothing(client, body, where):
    assert re.search(where, is_problem(client.put("/v1/items/new", json=body), 422))
    assert client.ask(user="u1")["overlay_seq"] == 0


@pytest.mark.parametrize("item_id", ["a/b", "a b", "50%", "ü/🎬", "..", "a?b", "x" * 256, "a\nb", "batch/x"])
def test_odd_ids_make_the_round(client, item_id):
    from urllib.parse import quote

    path = "/v1/items/" + quote(item_id, safe="").replace(".", "%2E")
    assert client.put(path, json={"text": "sea"}).json()["id"] == item_id
    assert client.get(path).json()["id"] == item_id
    assert client.get(path + "/similar").status_code == 200
    assert client.ask(items=[item_id])["unknown"] == []
    assert client.delete(path).status_code == 200


def test_an_id_that_is_too_long(client):
    is_problem(client.put("/v1/items/" + "x" * 257, json={"text": "sea"}), 422)


def test_changes_survive_a_restart(start, client):
    client.put("/v1/items/new", json={"text": "space opera"})
    client.delete("/v1/items/i7")
    before = client.ask(items=["i1"], k=50)
    again = start().ask(items=["i1"], k=50)
    assert again == before and again["overlay_seq"] == 2


def test_a_service_without_state_forgets(start):
    client = start(state=None)
    assert client.put("/v1/items/new", json={"text": "sea"}).status_code == 200
    is_problem(start(state=None).get("/v1/items/new"), 404)


def test_two_services_on_one_log_see_each_others_changes(start):
    one, two = start(), start()
    seq = one.put("/v1/items/new", json={"text": "sea"}).json()["seq"]
    started = time.monotonic()
    answer = two.get("/v1/items/new", headers={"x-min-seq": str(seq)})
    assert answer.status_code == 200 and time.monotonic() - started < 1
    two.delete("/v1/items/new")
    is_problem(one.get("/v1/items/new", headers={"x-min-seq": "2"}), 404)


def test_an_answer_older_than_asked_for_is_not_given(start):
    client = start(limits=Limits(request_seconds=0.2))
    is_problem(client.get("/v1/items/i1", headers={"x-min-seq": "5"}), 503)
    is_problem(client.get("/v1/items/i1", headers={"x-min-seq": "five"}), 422)


def test_a_log_that_cannot_be_written_is_503_and_reading_goes_on(client):
    def fail(changes):
        raise OverlayError("database or disk is full")

    client.service._overlay.write = fail
    answer = client.put("/v1/items/new", json={"text": "sea"})
    assert "nothing was changed" in is_problem(answer, 503) and answer.headers["retry-after"]
    assert client.ask(user="u1")["overlay_seq"] == 0


# ------------------------------------------------------------------ encoder


def test_text_waits_for_the_encoder_and_the_rest_does_not(start):
    gate = threading.Event()

    def slow(folder, manifest):
        gate.wait(10)
        return WordEncoder()

    client = start(make=slow)
    assert client.get("/health/ready").json()["encoder"] == "loading"
    answer = client.post("/v1/recommend", json={"text": "sea"})
    assert "still loading" in is_problem(answer, 503) and answer.headers["retry-after"]
    client.ask(user="u1")
    gate.set()
    client.wait_for_encoder()
    assert client.get("/health/ready").json()["encoder"] == "ready"
    client.ask(text="sea")


def test_an_encoder_that_fails_is_said_so(start):
    def fail(folder, manifest):
        raise OSError("no such model at /secret/path")

    client = start(make=fail)
    client.service.text.wait(10)
    detail = is_problem(client.post("/v1/recommend", json={"text": "sea"}), 422)
    assert "could not be loaded" in detail and "secret" not in detail
    assert client.get("/health/ready").json()["encoder"] == "failed"


def test_cut_texts_are_reported(start):
    class Short(WordEncoder):
        def encode(self, texts):
            return super().encode(texts)[0], np.array([max(0, len(t.split()) - 2) for t in texts])

    client = start(make=lambda folder, manifest: Short())
    client.wait_for_encoder()
    assert client.ask(text="one two three")["truncated"] == 1
    assert client.put("/v1/items/new", json={"text": "a b c d"}).json()["truncated"] == 1
    assert "recbole_llm_truncated_texts_total 2" in client.get("/metrics").text


def test_without_encoder(start, tmp_path):
    assert "without its encoder" in is_problem(start(encoder=False).post("/v1/recommend", json={"text": "x"}), 422)
    write_artifact(tmp_path / "bare", make_contents(text_map=None))
    client = start(tmp_path / "bare", state=None)
    assert "maps no texts" in is_problem(client.put("/v1/items/new", json={"text": "x"}), 422)


# ------------------------------------------------------------------ another export


@pytest.fixture
def exports(tmp_path):
    folder = tmp_path / "exports"
    write_artifact(folder / "one", make_contents())
    return folder


def test_a_swap_lets_go_of_the_old_export_without_a_collection(start, exports):
    client = start(exports)
    client.ask(user="u1", explain=1, filter={"kind": "war"})
    client.put("/v1/items/new", json={"text": "space opera"})
    old = weakref.ref(client.service.recommender)
    write_artifact(exports / "two", make_contents(seed=5))
    gc.disable()
    try:
        assert client.post("/v1/admin/reload", json={}).status_code == 200
        client.ask(user="u1")
        deadline = time.monotonic() + 2
        while old() is not None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        gc.enable()
    assert old() is None


def test_reload_swaps_and_keeps_the_changes(start, exports):
    client = start(exports)
    client.put("/v1/items/new", json={"text": "space opera", "attributes": {"kind": "opera"}})
    client.delete("/v1/items/i3")
    client.put("/v1/items/i4", json={"title": "Renamed"})
    first = client.ask(user="u1")["model"]
    manifest = write_artifact(exports / "two", make_contents(seed=5))
    swap = client.post("/v1/admin/reload", json={}).json()
    assert (swap["from"], swap["to"]) == (first, manifest.export_id) and swap["seconds"] > 0
    answer = client.ask(items=["i1"], k=50)
    assert answer["model"] == manifest.export_id and answer["overlay_seq"] == 3
    ids = {i["id"] for i in answer["items"]}
    assert "new" in ids and "i3" not in ids
    export = load_export(exports / "two")  # and the new item stands where the new map puts it
    vector, _, bias = export.text_map.apply(WordEncoder().encode(["space opera"])[0])
    query = Recommender(export)._pooling.query(export.source[[1]], np.ones(1, np.float32)).vector
    score = next(i["score"] for i in answer["items"] if i["id"] == "new")
    assert score == pytest.approx(float(query @ vector[0] + bias[0]), rel=1e-4)
    assert client.get("/v1/items/i4").json()["title"] == "Renamed"
    assert client.post("/v1/admin/reload", json={"export": "one"}).json()["to"] == first


def test_what_the_training_data_held_is_not_applied_again(start, exports):
    client = start(exports)
    client.put("/v1/items/i4", json={"title": "From the service", "text": "sea", "refit": True})
    client.put("/v1/items/new", json={"text": "war"})
    client.delete("/v1/items/i5")
    write_artifact(exports / "two", make_contents(seed=5, overlay_seq=3))
    client.post("/v1/admin/reload", json={})
    assert client.get("/v1/items/i4").json()["title"] == "Title 4"
    assert client.get("/v1/items/i4").json()["cold"] is False
    assert client.get("/v1/items/new").status_code == 200  # not in the export, so it stays
    is_problem(client.get("/v1/items/i5"), 404)


def test_another_encoder_encodes_the_log_anew_before_the_swap(start, exports):
    class Other(WordEncoder):
        fingerprint = "words-2"

        def encode(self, texts):
            vectors, cut = super().encode(texts)
            return -vectors, cut

    def make(folder, manifest):
        return Other() if manifest.encoder.fingerprint == "words-2" else WordEncoder()

    client = start(exports, make=make)
    client.wait_for_encoder()
    client.put("/v1/items/new", json={"text": "space opera"})
    contents = make_contents(seed=5)
    write_artifact(exports / "two", replace(contents, encoder=replace(contents.encoder, fingerprint="words-2")))
    client.post("/v1/admin/reload", json={})
    row = client.service.recommender.catalog.row("new")
    vector, _, _ = contents.text_map.apply(-WordEncoder().encode(["space opera"])[0])
    np.testing.assert_allclose(client.service.recommender.catalog.vector(np.array([row])), vector, rtol=1e-5)
    assert client.ask(text="sea")["source"] == "text"
    # and so does a start, once the encoder is there
    again = start(exports, make=make)
    again.wait_for_encoder()
    deadline = time.monotonic() + 5
    while again.get("/v1/items/new").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    row = again.service.recommender.catalog.row("new")
    np.testing.assert_allclose(again.service.recommender.catalog.vector(np.array([row])), vector, rtol=1e-5)


def test_a_damaged_export_is_not_swapped_in(start, exports):
    client = start(exports)
    before = client.ask(user="u1")
    write_artifact(exports / "two", make_contents(seed=5))
    path = exports / "two" / "vectors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "vectors.safetensors" in is_problem(client.post("/v1/admin/reload", json={}), 422)
    assert client.ask(user="u1") == before
    assert 'swaps_total{result="failed"} 1' in client.get("/metrics").text


def test_a_change_during_a_reload_is_never_out_of_sight(start, exports, monkeypatch):
    """A write between the new export's last look at the log and the swap: the swap must wait for it."""
    from recbole_llm.serving.overlay import Put

    client = start(exports)
    service = client.service
    write_artifact(exports / "two", make_contents(seed=5))
    changes_for, swap_in, swaps, written = service._changes_for, service._swap_in, [], []

    async def late(recommender):
        changes = await changes_for(recommender)
        if recommender is not service.recommender and not written:
            written.append(await service.write([Put("i1", title="Late")]))
        return changes

    def noted(built):
        done = swap_in(built)
        swaps.append((done, built.recommender.overlay_seq))
        return done

    monkeypatch.setattr(service, "_changes_for", late)
    monkeypatch.setattr(service, "_swap_in", noted)
    assert client.post("/v1/admin/reload", json={}).status_code == 200
    assert swaps == [(False, 0), (True, 1)]
    assert client.get("/v1/items/i1").json()["title"] == "Late"
    time.sleep(0.5)  # the process that was asked does not follow its own request
    assert 'swaps_total{result="ok"} 1' in client.get("/metrics").text


def test_unlisted_items_need_a_text(start, tmp_path):
    """Items that the model leaves out of its ranking: known, not recommended, until a text places them."""
    contents = make_contents(listed=np.arange(40) < 38)
    write_artifact(tmp_path / "unlisted", contents)
    client = start(tmp_path / "unlisted")
    assert {i["id"] for i in client.ask(items=["i1"], k=50)["items"]}.isdisjoint({"i38", "i39"})
    assert "text" in is_problem(client.put("/v1/items/i38", json={"title": "x"}), 422)
    assert client.put("/v1/items/i38", json={"text": "sea"}).json()["created"] is True
    assert "i38" in {i["id"] for i in client.ask(items=["i1"], k=50)["items"]}
    assert 'items{kind="unlisted"} 1' in client.get("/metrics").text
    assert client.put("/v1/items/i38", json={"title": "x"}).json()["created"] is False


@pytest.mark.parametrize("name", ["../outside", "..", ".", "/etc", "one/../../outside", "outside", "one\x00", ""])
def test_a_name_does_not_lead_out_of_the_folder(start, exports, name):
    write_artifact(exports.parent / "outside", make_contents(seed=7))
    client = start(exports)
    is_problem(client.post("/v1/admin/reload", json={"export": name}), 422)


def test_a_second_reload_at_once_is_refused(start, exports, monkeypatch):
    client = start(exports)
    from recbole_llm.serving import service

    entered, gate, build = threading.Event(), threading.Event(), service.build

    def slow(*args, **kwargs):
        entered.set()
        gate.wait(5)
        return build(*args, **kwargs)

    monkeypatch.setattr(service, "build", slow)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/admin/reload", json={})))
    thread.start()
    entered.wait(5)
    is_problem(client.post("/v1/admin/reload", json={}), 409)
    client.ask(user="u1")  # is not held up
    gate.set()
    thread.join()
    assert answers[0].status_code == 200


def test_a_reload_reaches_the_other_processes(start, exports):
    one, two = start(exports), start(exports)
    manifest = write_artifact(exports / "two", make_contents(seed=5))
    one.post("/v1/admin/reload", json={})
    deadline = time.monotonic() + 3
    while two.ask(user="u1")["model"] != manifest.export_id:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_watch_loads_what_appears(start, exports):
    client = start(exports, watch=True)
    manifest = write_artifact(exports / "two", make_contents(seed=5))
    deadline = time.monotonic() + 5
    while client.ask(user="u1")["model"] != manifest.export_id:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ------------------------------------------------------------------ the gate


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
    client = start(limits=Limits(body_bytes=1000, batch_body_bytes=2000))
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


def test_overload_is_refused_before_the_body_is_read(start):
    client = start(limits=Limits(queue=1))
    gate = threading.Event()
    blocked = threading.Thread(target=lambda: client.portal.call(client.service.batcher.call, lambda: gate.wait(5)))
    blocked.start()
    time.sleep(0.1)
    waiting = threading.Thread(target=lambda: client.post("/v1/recommend", json={"user": "u1"}))
    waiting.start()
    time.sleep(0.1)
    read = []

    def body():
        read.append(1)
        yield b"{}"

    started = time.monotonic()
    answer = client.post("/v1/recommend", json={"user": "u1"})
    assert is_problem(answer, 503) and answer.headers["retry-after"] == "1" and time.monotonic() - started < 1
    assert client.get("/health/live").status_code == 200
    gate.set()
    blocked.join()
    waiting.join()
    client.ask(user="u1")
    assert 'rejected_total{reason="queue"} 1' in client.get("/metrics").text


def test_a_deadline_is_kept(start):
    client = start(limits=Limits(request_seconds=0.1))
    gate = threading.Event()
    blocked = threading.Thread(target=lambda: client.portal.call(client.service.batcher.call, lambda: gate.wait(5)))
    blocked.start()
    time.sleep(0.1)
    is_problem(client.post("/v1/recommend", json={"user": "u1"}), 504)
    gate.set()
    blocked.join()


def test_rate_limit(start):
    client = start(limits=Limits(requests_per_second=0.5, burst=3))
    codes = [client.get("/v1/items/i1").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    answer = client.get("/v1/items/i1")
    assert is_problem(answer, 429) and int(answer.headers["retry-after"]) >= 1


def test_a_fault_of_ours_is_500_without_a_trace(client, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("secret internals")

    monkeypatch.setattr(client.service, "recommend", fail)
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
