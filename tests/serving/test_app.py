"""The routes, in process: reading, writing, waiting for the encoder."""

import json
import re
import threading
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
from made_export import WordEncoder, make_contents
from made_service import is_problem
from waiting import LIMIT, happens, join, wait_until

from recbole_llm.export.reader import ItemRecord
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.serving.change_log import ChangeInDoubtError, ChangeLogError
from recbole_llm.serving.settings import Limits

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
    join(*threads)
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
        ({}, "exactly one of user, items, profile, text and item"),
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


@pytest.mark.parametrize(
    "item_id", ["a/similar", "similar", "/similar", "a/similar/similar", "batch/similar", "x/../y"]
)
def test_ids_that_end_like_a_route(client, item_id):
    """A slash that is part of an id is %2F in the path; one that is none is not."""
    path = "/v1/items/" + quote(item_id, safe="")
    assert client.put(path, json={"text": "sea", "title": item_id}).json()["id"] == item_id
    assert client.get(path).json()["title"] == item_id
    similar = client.get(path + "/similar").json()
    assert similar["source"] == "similar" and item_id not in {item["id"] for item in similar["items"]}
    if item_id == "a/similar":
        is_problem(client.get("/v1/items/a/similar"), 404)  # items like "a", which is not there
    assert client.delete(path).json()["id"] == item_id
    is_problem(client.get(path), 404)


@pytest.mark.parametrize("path", ["/v1/items/%FF", "/v1/items/%C3", "/v1/items/a%ED%A0%80/similar"])
def test_a_path_that_is_no_text(client, path):
    assert "UTF-8" in is_problem(client.get(path), 400)


def test_a_percent_sign_that_stands_for_itself(client):
    assert client.put("/v1/items/100%25%2Fa%2500", json={"text": "sea"}).json()["id"] == "100%/a%00"


def test_half_a_surrogate_pair_in_an_export_can_be_sent(start, tmp_path):
    """JSON escapes can say it, UTF-8 cannot."""
    contents = make_contents()
    records = [ItemRecord(f"T{n} \ud800", None, {}) for n in range(40)]
    with pytest.raises((UnicodeEncodeError, ValueError)):
        write_artifact(tmp_path / "odd", replace(contents, records=records))  # the writer refuses; others may not
    client = start()
    catalog = client.service.recommender.catalog
    catalog.records = records
    answer = client.post("/v1/recommend", json={"user": "u1", "k": 3})
    assert answer.status_code == 200 and "\\ud800" in answer.text
    batch = client.post("/v1/recommend/batch", json={"requests": [{"user": "u1"}]})
    assert batch.status_code == 200 and "\\ud800" in batch.text


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
    assert two.get("/v1/items/new", headers={"x-min-seq": str(seq)}).status_code == 200
    two.delete("/v1/items/new")
    is_problem(one.get("/v1/items/new", headers={"x-min-seq": "2"}), 404)


def test_an_answer_older_than_asked_for_is_not_given(start):
    one, client = start(), start(limits=Limits(request_seconds=0.2), poll_seconds=10 * LIMIT)
    one.put("/v1/items/new", json={"text": "sea"})
    is_problem(client.get("/v1/items/i1", headers={"x-min-seq": "1"}), 503)  # in the log, and not applied here
    is_problem(client.get("/v1/items/i1", headers={"x-min-seq": "five"}), 422)
    is_problem(client.get("/v1/items/i1", headers={"x-min-seq": "9" * 30}), 422)


def test_a_change_that_the_log_does_not_hold_is_not_waited_for(start):
    client = start(
        limits=Limits(request_seconds=10 * LIMIT, queue=1)
    )  # a test that waits for it fails by its time limit
    for seq in ("1", "9007199254740992"):
        assert "beyond the last change" in is_problem(client.get("/v1/items/i1", headers={"x-min-seq": seq}), 422)


def test_waiting_for_a_change_takes_no_place_from_others(start):
    one, client = start(), start(limits=Limits(request_seconds=LIMIT, queue=1), poll_seconds=10 * LIMIT)
    one.put("/v1/items/new", json={"text": "sea"})
    answers = []
    waits = [
        threading.Thread(
            target=lambda: answers.append(client.post("/v1/recommend", json={"user": "u1"}, headers={"x-min-seq": "1"}))
        )
        for _ in range(3)
    ]
    for thread in waits:
        thread.start()
    wait_until(lambda: len(client.service.changes._waiting) == 3, "three wait")
    client.ask(user="u1")  # the one place is free
    client.portal.call(client.service.changes.catch_up)
    join(*waits)
    assert {answer.status_code for answer in answers} <= {200, 503} and 200 in {a.status_code for a in answers}
    assert all(answer.json()["overlay_seq"] == 1 for answer in answers if answer.status_code == 200)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ChangeLogError("database or disk is full"), "nothing was changed"),
        (ChangeInDoubtError("PostgreSQL: terminating connection"), "is not known. Send the change again"),
    ],
)
def test_a_log_that_cannot_be_written_is_503_and_reading_goes_on(client, error, said):
    def fail(changes, after):
        raise error

    client.service.changes._log.write = fail
    answer = client.put("/v1/items/new", json={"text": "sea"})
    assert said in is_problem(answer, 503) and answer.headers["retry-after"]
    assert client.ask(user="u1")["overlay_seq"] == 0


def test_a_change_that_is_logged_and_cannot_be_read_back_is_not_said_to_be_none(client):
    log = client.service.changes._log
    since, failing = log.since, [True]

    def read(seq):
        if failing and seq == 0:
            raise ChangeLogError("the server is gone")
        return since(seq)

    log.since = read
    answer = client.put("/v1/items/new", json={"text": "sea"})
    assert "has not seen that change yet" in is_problem(answer, 503) and answer.headers["retry-after"]
    failing.clear()
    wait_until(lambda: client.get("/v1/items/new").status_code == 200, "the change is followed")


# ------------------------------------------------------------------ encoder


def test_text_waits_for_the_encoder_and_the_rest_does_not(start):
    gate = threading.Event()

    def slow(folder, manifest):
        happens(gate, "the test lets the encoder load")
        return WordEncoder()

    client = start(make=slow)
    ready = client.get("/health/ready")
    assert ready.status_code == 503 and ready.json()["encoder"] == "loading"
    assert "still loading" in ready.json()["problems"][0] and client.head("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200
    answer = client.post("/v1/recommend", json={"text": "sea"})
    assert "still loading" in is_problem(answer, 503) and answer.headers["retry-after"]
    client.ask(user="u1")
    gate.set()
    client.wait_for_encoder()
    ready = client.get("/health/ready")
    assert ready.status_code == 200 and ready.json() == {
        "status": "ok",
        "model": client.service.export_id,
        "encoder": "ready",
    }
    client.ask(text="sea")


def test_an_encoder_that_fails_is_said_so(start):
    def fail(folder, manifest):
        raise OSError("no such model at /secret/path")

    client = start(make=fail)
    client.service.text.wait(LIMIT)
    detail = is_problem(client.post("/v1/recommend", json={"text": "sea"}), 422)
    assert "could not be loaded" in detail and "secret" not in detail
    ready = client.get("/health/ready")
    assert (
        ready.status_code == 503
        and ready.json()["encoder"] == "failed"
        and "--no-encoder" in ready.json()["problems"][0]
    )
    assert start(encoder=False).get("/health/ready").status_code == 200


def test_cut_texts_are_reported(start):
    class Short(WordEncoder):
        def encode(self, texts):
            return super().encode(texts)[0], np.array([max(0, len(t.split()) - 2) for t in texts])

    client = start(make=lambda folder, manifest: Short())
    client.wait_for_encoder()
    assert client.ask(text="one two three")["truncated"] == 1
    assert client.put("/v1/items/new", json={"text": "a b c d"}).json()["truncated"] == 1
    assert "recbole_llm_truncated_texts_total 2" in client.get("/metrics").text
    batch = {"requests": [{"text": "one two three"}, {"user": "u1"}, {"text": "one"}, {"text": " "}]}
    results = client.post("/v1/recommend/batch", json=batch).json()["results"]
    assert [result.get("truncated") for result in results] == [1, None, None, None]
    assert results[3]["error"]["status"] == 422


def test_blank_texts_are_refused_as_in_python(client):
    assert "text is empty" in client.ask(422, text=" \n")["detail"]
    assert "text is empty" in is_problem(client.put("/v1/items/new", json={"text": " "}), 422)


def test_wrong_rules_of_one_entry_do_not_fail_the_batch(client):
    wrong = {"user": "u1", "diversity": {"weight": 0.5}, "boosts": [{"filter": {"kind": "sea"}}]}
    answer = client.post("/v1/recommend/batch", json={"requests": [wrong, {"user": "u1"}]})
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["results"]
    assert "exactly one of add" in first["error"]["detail"] and len(second["items"]) == 10


def test_a_refit_needs_something_to_make_vectors_of(client):
    assert "refit" in is_problem(client.put("/v1/items/i1", json={"refit": True, "title": "x"}), 422)
    assert client.put("/v1/items/i1", json={"text": "sea war"}).json()["cold"] is False
    assert client.put("/v1/items/i1", json={"refit": True}).json()["cold"] is True


def test_without_encoder(start, tmp_path):
    assert "without its encoder" in is_problem(start(encoder=False).post("/v1/recommend", json={"text": "x"}), 422)
    write_artifact(tmp_path / "bare", make_contents(text_map=None))
    client = start(tmp_path / "bare", state=None)
    assert "maps no texts" in is_problem(client.put("/v1/items/new", json={"text": "x"}), 422)
