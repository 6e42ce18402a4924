"""Pictures in the service: put, found, shown, kept; and what is no picture is refused and harms nobody."""

import json
import sqlite3
import threading

import numpy as np
import pytest
from made_export import PATIENT, WordEncoder
from made_painted import WITHOUT, base64_of, hostile, jpeg, make_painted, vector_of
from made_service import READ, WRITE, is_problem, key
from waiting import LIMIT

from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.export.reader import load_export
from recbole_llm.export.thumbnails import MAX_BYTES, jpeg_size
from recbole_llm.export.writer import write_artifact
from recbole_llm.pictures import recommend_picture
from recbole_llm.recommend import open_model
from recbole_llm.serving import picture_encoder
from recbole_llm.serving.change_log import SqliteChangeLog
from recbole_llm.serving.settings import Limits
from tests.made_pictures import write_picture

PNG, JPEG = {"content-type": "image/png"}, {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """An export with pictures, its encoder's name, and the folder of the pictures."""
    folder = tmp_path_factory.mktemp("painted")
    contents, name, pictures = make_painted(folder)
    write_artifact(folder / "export", contents)
    return folder / "export", name, pictures


@pytest.fixture
def paint(start, painted):
    """Starts a service that takes pictures."""

    def begin(**changes):
        client = start(painted[0], image_encoders=(painted[1],), **changes)
        assert client.service.pictures.wait(LIMIT)
        return client

    return begin


def oracle(export, *, text=None, picture=None):
    """Target vector, source and bias of what is known of an item, in float64."""
    total = None
    for content_map, given in ((export.text_map, text), (export.picture_map, picture)):
        if given is None:
            continue
        z = np.asarray(given, np.float64) - content_map.center
        z /= np.linalg.norm(z)
        phi = np.exp(-content_map.gamma * ((z - content_map.support.astype(np.float64)) ** 2).sum(1))
        parts = [phi @ getattr(content_map, name).astype(np.float64) for name in ("vector", "source", "bias")]
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    some = export.picture_map
    return total[0] + some.vector_offset, total[1] + some.source_offset, total[2] + some.bias_offset


def live_vectors(client, item_id):
    catalog = client.service.recommender.catalog
    rows = np.array([catalog.row(item_id)])
    return catalog.vector(rows)[0], catalog.source(rows)[0], catalog.bias(rows)[0]


def is_placed(client, item_id, expected):
    for ours, theirs in zip(live_vectors(client, item_id), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_item_is_placed_by_what_it_has(paint, painted):
    folder, name, pictures = painted
    export, encoder, client = load_export(folder), load_image_encoder(name), paint()
    data = (pictures / "i3.png").read_bytes()
    picture = vector_of(encoder, pictures / "i3.png")
    text = WordEncoder().encode(["sea love"])[0][0]
    answer = client.put("/v1/items/seen/image", content=data, headers=PNG)
    assert answer.status_code == 200 and answer.json() | {"model": ""} == {
        "id": "seen", "created": True, "seq": 1, "cold": True, "truncated": 0, "model": "", "overlay_seq": 1,
    }  # fmt: skip
    is_placed(client, "seen", oracle(export, picture=picture))
    # a text joins the picture; a picture as base64 joins a text; both at once
    assert client.put("/v1/items/seen", json={"text": "sea love"}).status_code == 200
    assert client.put("/v1/items/told", json={"text": "sea love"}).status_code == 200
    is_placed(client, "told", oracle(export, text=text))
    assert client.put("/v1/items/told", json={"image": base64_of(data)}).status_code == 200
    body = {"title": "Both", "text": "sea love", "image": base64_of(data)}
    assert client.put("/v1/items/both", json=body).status_code == 200
    batch = client.post("/v1/items/batch", json={"items": [{"id": "many", **body}, {"id": "told", "op": "delete"}]})
    assert batch.json()["count"] == 2 and client.put("/v1/items/told", json={}).status_code == 200  # comes back
    for item_id in ("seen", "told", "both", "many"):
        is_placed(client, item_id, oracle(export, text=text, picture=picture))
    # a cold item of the export keeps its text, or its picture, of the export
    row = 38
    own_text = WordEncoder().encode([export.records[row].text])[0][0]
    assert client.put(f"/v1/items/i{row}/image", content=data, headers=PNG).json()["cold"] is True
    is_placed(client, f"i{row}", oracle(export, text=own_text, picture=picture))
    assert client.put("/v1/items/i39", json={"text": "sea love"}).status_code == 200
    is_placed(client, "i39", oracle(export, text=text, picture=vector_of(encoder, pictures / "i39.png")))
    # a warm one keeps what it learned, until it is asked to give it up
    assert client.put("/v1/items/i1/image", content=data, headers=PNG).json()["cold"] is False
    np.testing.assert_array_equal(live_vectors(client, "i1")[0], export.vector[1])
    assert client.put("/v1/items/i1", json={"image": base64_of(data), "refit": True}).json()["cold"] is True
    own_text = WordEncoder().encode([export.records[1].text])[0][0]
    is_placed(client, "i1", oracle(export, text=own_text, picture=picture))


def test_a_picture_finds_what_is_like_it_old_and_new(paint, painted, tmp_path):
    folder, name, pictures = painted
    client = paint()
    ask = lambda data, **query: client.post("/v1/recommend/image", content=data, params=query, headers=PNG)  # noqa: E731
    data = (pictures / "i9.png").read_bytes()
    offline = recommend_picture(open_model(folder, item_modalities={"image": name}), pictures / "i9.png", k=7)
    answer = ask(data, k=7).json()
    assert answer["source"] == "picture" and [item["id"] for item in answer["items"]] == [i.id for i in offline.items]
    assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in offline.items])
    assert all(item.get("image") is True for item in answer["items"] if item["id"] not in {"i3", "i9"})
    # the item itself, once it has that picture; another's new picture takes it away from where it was
    assert client.put("/v1/items/i9/image", content=data, headers=PNG).status_code == 200
    assert client.put("/v1/items/new/image", content=data, headers=PNG).status_code == 200
    found = ask(data, k=2, by="likeness").json()["items"]
    assert {item["id"] for item in found} == {"i9", "new"} and found[0]["score"] == pytest.approx(1, abs=1e-5)
    write_picture(tmp_path / "red.png", 0)
    assert ask((tmp_path / "red.png").read_bytes(), k=1).json()["items"][0]["id"] == "i0"
    assert client.put("/v1/items/i0/image", content=data, headers=PNG).status_code == 200
    assert ask((tmp_path / "red.png").read_bytes(), k=1).json()["items"][0]["id"] != "i0"
    assert {item["id"] for item in ask(data, k=3).json()["items"]} == {"i0", "i9", "new"}
    # what is like an item of the export with the new text of a warm item keeps that item's own picture
    assert client.put("/v1/items/i4", json={"text": "sea", "refit": True}).status_code == 200
    assert ask((pictures / "i4.png").read_bytes(), k=1).json()["items"][0]["id"] == "i4"
    # conditions and reasons
    few = ask(data, k=5, filter=json.dumps({"year": {"gte": 2010}})).json()["items"]
    years = {f"i{at}": 1980 + at for at in range(40)}
    assert few and all(years[item["id"]] >= 2010 for item in few)
    assert all("parts" in item for item in ask(data, k=2, explain=1).json()["items"])
    for wrong in ({"filter": "{"}, {"filter": '{"x": []}'}, {"filter": '{"nowhere": 1}'}, {"k": 0}, {"by": "x"}):
        is_problem(ask(data, **wrong), 422)
    is_problem(ask(data, k=1000, explain=100), 422)
    assert ask(data, k=1000).json()["items"] and len(ask(data, k=1000).json()["items"]) == 41


def test_small_copies_come_with_a_tag_and_nothing_else(paint, painted):
    client = paint()
    table = load_export(painted[0]).thumbnails
    answer = client.get("/v1/items/i0/image")
    assert answer.status_code == 200 and answer.content == table.of(0)
    assert answer.headers["content-type"] == "image/jpeg" and answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, max-age=300"
    tag = answer.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/v1/items/i0/image", headers={"if-none-match": known})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == tag
    assert client.get("/v1/items/i0/image", headers={"if-none-match": '"other"'}).status_code == 200
    is_problem(client.get("/v1/items/i3/image"), 404)
    is_problem(client.get("/v1/items/nowhere/image"), 404)
    assert client.get("/v1/items/i0").json()["image"] is True and "image" not in client.get("/v1/items/i3").json()
    data = jpeg((400, 300), comment=b"secret")
    assert client.put("/v1/items/a%2Fb/image", content=data, headers=JPEG).status_code == 200
    small = client.get("/v1/items/a%2Fb/image")
    assert jpeg_size(small.content) == (192, 144) and b"secret" not in small.content
    assert client.put("/v1/items/i0/image", content=data, headers=JPEG).status_code == 200
    assert client.get("/v1/items/i0/image", headers={"if-none-match": tag}).content == small.content
    assert client.delete("/v1/items/i0").status_code == 200
    is_problem(client.get("/v1/items/i0/image"), 404)
    assert client.get("/v1/model").json()["images"] is True


@pytest.mark.parametrize("log", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def test_what_was_put_is_there_after_a_restart(paint, painted, tmp_path, request, log):
    state = str(tmp_path / "kept") if log == "sqlite" else request.getfixturevalue("postgres")
    first = paint(state=state)
    data, other = ((painted[2] / f"i{at}.png").read_bytes() for at in WITHOUT)
    assert first.put("/v1/items/new/image", content=data, headers=PNG).status_code == 200
    assert first.put("/v1/items/i38/image", content=other, headers=PNG).status_code == 200
    assert first.put("/v1/items/i38", json={"title": "Another title"}).status_code == 200  # the picture stays
    assert first.put("/v1/items/gone/image", content=data, headers=PNG).status_code == 200
    assert first.delete("/v1/items/gone").status_code == 200

    def answers(client):
        seen = [client.get(f"/v1/items/{one}/image").content for one in ("new", "i38")]
        seen += [client.post("/v1/recommend/image", content=one, headers=PNG).json() for one in (data, other)]
        return seen + [client.ask(user=f"u{user}", k=20) for user in range(12)]

    before = answers(first)
    second = paint(state=state)
    assert answers(second) == before
    assert second.service.changes.faults == {}
    for one, two in zip(live_vectors(first, "new"), live_vectors(second, "new"), strict=True):
        np.testing.assert_array_equal(one, two)


def test_pictures_of_another_encoder_wait_and_the_items_stay(paint, start, painted, tmp_path, caplog):
    state = str(tmp_path / "kept")
    first = paint(state=state)
    data = (painted[2] / "i3.png").read_bytes()
    assert first.put("/v1/items/i38/image", content=data, headers=PNG).status_code == 200
    assert first.put("/v1/items/both", json={"text": "sea", "image": base64_of(data)}).status_code == 200
    with sqlite3.connect(tmp_path / "kept" / "overlay.sqlite3") as connection:
        connection.execute("UPDATE picture SET encoder_fingerprint = 'another'")
    second = paint(state=state)
    assert "pictures of 2 items, such as 'i38', are of another encoder" in caplog.text
    export = load_export(painted[0])
    np.testing.assert_array_equal(live_vectors(second, "i38")[0], export.vector[38])
    is_placed(second, "both", oracle(export, text=WordEncoder().encode(["sea"])[0][0]))
    assert second.get("/v1/items/i38/image").content == first.get("/v1/items/i38/image").content


def test_a_log_from_before_there_were_pictures_is_read_and_a_damaged_picture_skips_its_item(paint, start, tmp_path):
    old = tmp_path / "old"
    old_client = start(state=str(old))
    assert old_client.put("/v1/items/told", json={"text": "sea"}).status_code == 200
    with sqlite3.connect(old / "overlay.sqlite3") as connection:
        connection.execute("DROP TABLE picture")
    client = paint(state=str(old))
    assert client.get("/v1/items/told").status_code == 200
    for item_id in ("one", "two", "three"):
        assert client.put(f"/v1/items/{item_id}/image", content=jpeg(), headers=JPEG).status_code == 200
    with sqlite3.connect(old / "overlay.sqlite3") as connection:
        connection.execute("UPDATE picture SET thumbnail = ? WHERE id = 'one'", (b"<script>",))
        connection.execute("UPDATE picture SET feature = ? WHERE id = 'two'", (b"abc",))
    faults = {change.id: change.fault for change in SqliteChangeLog(old).since(0)}
    assert faults["told"] is None is faults["three"] and "JPEG" in faults["one"] and faults["two"]
    again = paint(state=str(old))
    assert set(again.service.changes.faults) == {"one", "two"} and again.get("/v1/items/three/image").content


@pytest.mark.parametrize("log", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def test_a_picture_is_taken_away_and_the_item_stays(paint, painted, tmp_path, request, log):
    state = str(tmp_path / "kept") if log == "sqlite" else request.getfixturevalue("postgres")
    export, client = load_export(painted[0]), paint(state=state)
    other = paint(state=state)  # another worker on the same log
    data = (painted[2] / "i3.png").read_bytes()
    text = WordEncoder().encode(["sea love"])[0][0]
    find = lambda one, at: one.post(  # noqa: E731
        "/v1/recommend/image", content=(painted[2] / f"i{at}.png").read_bytes(), params={"k": 1, "by": "likeness"}, headers=PNG
    ).json()["items"][0]["id"]  # fmt: skip
    assert client.put("/v1/items/both", json={"text": "sea love", "image": base64_of(data)}).status_code == 200
    assert find(client, 3) == "both" and find(client, 5) == "i5"
    answer = client.delete("/v1/items/both/image")
    assert answer.status_code == 200 and answer.json() | {"model": ""} == {
        "id": "both", "seq": 2, "model": "", "overlay_seq": 2,
    }  # fmt: skip
    # of the export: one that nobody chose, and a warm one, whose vectors were learned
    assert client.delete("/v1/items/i39/image").status_code == client.delete("/v1/items/i5/image").status_code == 200
    own_text = WordEncoder().encode([export.records[39].text])[0][0]
    assert other.get("/v1/items/i5", headers={"x-min-seq": "4"}).status_code == 200  # has read the log
    for one in (client, other, paint(state=state)):
        is_placed(one, "both", oracle(export, text=text))
        is_placed(one, "i39", oracle(export, text=own_text))
        np.testing.assert_array_equal(live_vectors(one, "i5")[0], export.vector[5])
        assert find(one, 3) != "both" and find(one, 5) != "i5"
        for item_id in ("both", "i39", "i5"):
            is_problem(one.get(f"/v1/items/{item_id}/image"), 404)
            assert "image" not in one.get(f"/v1/items/{item_id}").json()
        catalog = one.service.recommender.catalog
        names = np.repeat(list(export.content), [table.shape[1] for table in export.content.values()])
        taken, kept = catalog.content(np.array([5, 6]))
        assert not taken[names == "image"].any() and taken[names == "text"].any() and kept[names == "image"].any()
    is_problem(client.delete("/v1/items/i5/image"), 404)
    is_problem(client.delete("/v1/items/nowhere/image"), 404)
    # a later change of the title keeps it away, a picture brings one back
    assert client.put("/v1/items/i39", json={"title": "Another"}).status_code == 200
    is_placed(client, "i39", oracle(export, text=own_text))
    assert client.put("/v1/items/i39/image", content=data, headers=PNG).status_code == 200
    is_placed(
        client,
        "i39",
        oracle(export, text=own_text, picture=vector_of(load_image_encoder(painted[1]), painted[2] / "i3.png")),
    )
    assert client.get("/v1/items/i39/image").status_code == 200 and find(client, 3) == "i39"


def test_an_item_that_is_known_by_its_picture_alone_keeps_it(paint, painted):
    client = paint(keys=(key("read", READ), key("write", WRITE)))
    write, data = {"x-api-key": WRITE}, (painted[2] / "i3.png").read_bytes()
    assert client.put("/v1/items/seen/image", content=data, headers=PNG | write).status_code == 200
    before = live_vectors(client, "seen")
    assert "picture alone" in is_problem(client.delete("/v1/items/seen/image", headers=write), 422)
    is_problem(client.delete("/v1/items/i5/image", headers={"x-api-key": READ}), 403)
    np.testing.assert_array_equal(live_vectors(client, "seen")[0], before[0])
    assert client.put("/v1/items/seen", json={"text": "sea"}, headers=write).status_code == 200
    assert client.delete("/v1/items/seen/image", headers=write).status_code == 200
    is_placed(client, "seen", oracle(load_export(painted[0]), text=WordEncoder().encode(["sea"])[0][0]))


# ------------------------------------------------------------------ what is refused


def routes(client):
    """The three ways in, each taking a picture's bytes."""
    return {
        "put": lambda data: client.put("/v1/items/x/image", content=data, headers=PNG),
        "body": lambda data: client.put("/v1/items/x", json={"image": base64_of(data)}),
        "batch": lambda data: client.post("/v1/items/batch", json={"items": [{"id": "x", "image": base64_of(data)}]}),
        "ask": lambda data: client.post("/v1/recommend/image", content=data, headers=PNG),
    }


def test_hostile_pictures_are_refused_and_change_nothing(paint):
    client = paint()
    for way, send in routes(client).items():
        for name, (data, message) in hostile().items():
            assert message in is_problem(send(data), 422), (way, name)
        assert client.get("/health/live").status_code == 200
    is_problem(client.get("/v1/items/x"), 404)
    assert client.ask(user="u1")["overlay_seq"] == 0
    assert client.put("/v1/items/x/image", content=jpeg(), headers=JPEG).json()["seq"] == 1, "it works as before"


def test_a_picture_is_bounded_and_says_what_it_is(paint):
    client = paint()
    big = b"\xff\xd8" + bytes(5 << 20)
    for way, send in routes(client).items():
        assert "larger than 5242880 bytes" in is_problem(send(big), 413), way
    at_the_limit = jpeg() + bytes((5 << 20) - len(jpeg()))  # what follows a picture is not read
    assert client.put("/v1/items/x/image", content=at_the_limit, headers=JPEG).status_code == 200
    assert client.put("/v1/items/x", json={"image": base64_of(at_the_limit)}).status_code == 200
    for kind in ("application/json", "image/svg+xml", "image/tiff", "text/html", ""):
        headers = {"content-type": kind} if kind else {}
        detail = is_problem(client.put("/v1/items/x/image", content=jpeg(), headers=headers), 415)
        assert "image/jpeg, image/png" in detail
        is_problem(client.post("/v1/recommend/image", content=jpeg(), headers=headers), 415)
    is_problem(client.put("/v1/items/x", content=jpeg(), headers=JPEG), 415)
    assert "no picture" in is_problem(client.put("/v1/items/x/image", content=b"", headers=PNG), 422)
    for wrong in ("not base64!", "abc", "ä"):
        assert "base64" in is_problem(client.put("/v1/items/x", json={"image": wrong}), 422)
    is_problem(client.put("/v1/items/x", json={"image": ""}), 422)
    is_problem(client.put("/v1/items/x", json={"image": 5}), 422)


def test_too_many_pictures_wait_for_nobody(paint, monkeypatch):
    """One is decoded, some wait, others are told to come again; health answers meanwhile."""
    client = paint(limits=Limits(**{**PATIENT.__dict__, "image_queue": 2}))
    begun, go_on = threading.Event(), threading.Event()
    real = picture_encoder.PictureEncoder.encode

    def slow(self, data):
        begun.set()
        assert go_on.wait(LIMIT)
        return real(self, data)

    monkeypatch.setattr(picture_encoder.PictureEncoder, "encode", slow)
    answers = []
    send = lambda: answers.append(client.post("/v1/recommend/image", content=jpeg(), headers=JPEG))  # noqa: E731
    threads = [threading.Thread(target=send) for _ in range(5)]
    threads[0].start()
    assert begun.wait(LIMIT)
    for thread in threads[1:]:
        thread.start()
    while sum(answer.status_code == 503 for answer in list(answers)) < 2:
        assert client.get("/health/ready").status_code == 200
        assert client.ask(user="u1")["items"]
    go_on.set()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 503, 503]
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 503)


def test_deadlines_hold(paint, monkeypatch):
    client = paint(limits=Limits(**{**PATIENT.__dict__, "request_seconds": 0.2}))
    go_on = threading.Event()
    monkeypatch.setattr(picture_encoder.PictureEncoder, "encode", lambda self, data: go_on.wait(LIMIT) and None)
    is_problem(client.post("/v1/recommend/image", content=jpeg(), headers=JPEG), 504)
    go_on.set()


def test_keys_rates_and_a_read_only_service(paint):
    client = paint(keys=(key("read", READ), key("write", WRITE)))
    ask = lambda headers: client.post("/v1/recommend/image", content=jpeg(), headers=JPEG | headers)  # noqa: E731
    put = lambda headers: client.put("/v1/items/x/image", content=jpeg(), headers=JPEG | headers)  # noqa: E731
    is_problem(ask({}), 401)
    is_problem(put({}), 401)
    is_problem(client.get("/v1/items/i0/image"), 401)
    is_problem(put({"x-api-key": READ}), 403)
    assert ask({"x-api-key": READ}).status_code == 200 and put({"x-api-key": WRITE}).status_code == 200
    client = paint(read_only=True, state=None)
    is_problem(client.put("/v1/items/x/image", content=jpeg(), headers=JPEG), 403)
    assert client.post("/v1/recommend/image", content=jpeg(), headers=JPEG).status_code == 200
    client = paint(limits=Limits(**{**PATIENT.__dict__, "requests_per_second": 0.001, "burst": 2}))
    seen = [client.post("/v1/recommend/image", content=jpeg(), headers=JPEG).status_code for _ in range(3)]
    assert seen == [200, 200, 429] and client.get("/health/live").status_code == 200


def test_the_budget_of_bodies_holds_for_pictures_and_comes_back(paint):
    client = paint(limits=Limits(**{**PATIENT.__dict__, "bodies_bytes": 1 << 20}))
    send = lambda size: client.put(  # noqa: E731
        "/v1/items/x/image", content=jpeg() + bytes(size), headers=JPEG
    )
    for _ in range(3):
        assert send(900 << 10).status_code == 200
    is_problem(send(2 << 20), 503)
    assert send(900 << 10).status_code == 200


def test_nothing_is_loaded_because_an_export_names_it(start, painted, caplog):
    client = start(painted[0])
    assert client.service.pictures.state == "none" and "--image-encoder" in caplog.text and painted[1] in caplog.text
    for answer in (
        client.post("/v1/recommend/image", content=jpeg(), headers=JPEG),
        client.put("/v1/items/x/image", content=jpeg(), headers=JPEG),
        client.put("/v1/items/x", json={"text": "sea", "image": base64_of(jpeg())}),
    ):
        detail = is_problem(answer, 422)
        assert "--image-encoder NAME" in detail and "onnx" not in detail
    assert client.get("/v1/items/i0/image").status_code == 200, "small copies need no encoder"
    assert client.get("/health/ready").json()["status"] == "ok"
    is_problem(client.put("/v1/items/x", content=b" " * (2 << 20), headers={"content-type": "application/json"}), 413)


def test_an_encoder_that_is_another_one_is_told_and_texts_are_served(start, painted, tmp_path, caplog):
    from tests.made_pictures import write_onnx

    other = write_onnx(tmp_path / "other.onnx")
    (tmp_path / "other.json").write_text(
        (tmp_path / "other.json").read_text().replace('"image_mean": [0.5, 0.5, 0.5]', '"image_mean": [0, 0, 0]')
    )
    client = start(painted[0], image_encoders=(other,))
    assert not client.service.pictures.wait(LIMIT)
    assert "another one than the model was trained with" in caplog.text
    assert any("encoder of pictures" in problem for problem in client.get("/health/ready").json()["problems"])
    is_problem(client.post("/v1/recommend/image", content=jpeg(), headers=JPEG), 422)
    assert client.ask(text="sea love")["items"]


def test_an_export_without_pictures_takes_none_and_says_nothing_of_them(client):
    assert "takes no pictures" in is_problem(client.post("/v1/recommend/image", content=jpeg(), headers=JPEG), 422)
    is_problem(client.put("/v1/items/i0/image", content=jpeg(), headers=JPEG), 422)
    is_problem(client.get("/v1/items/i0/image"), 404)
    assert all("image" not in item for item in client.ask(user="u1")["items"])
    assert client.get("/v1/model").json()["images"] is False
    assert "image_encoder" not in client.get("/health/ready").json()


def test_a_reload_keeps_the_encoder_and_the_pictures(start, painted, tmp_path):
    import shutil

    exports = tmp_path / "exports"
    exports.mkdir()
    shutil.copytree(painted[0], exports / "one")
    client = start(exports, image_encoders=(painted[1],))
    assert client.service.pictures.wait(LIMIT)
    data = (painted[2] / "i3.png").read_bytes()
    assert client.put("/v1/items/new/image", content=data, headers=PNG).status_code == 200
    before = client.post("/v1/recommend/image", content=data, headers=PNG).json()["items"]
    shutil.copytree(painted[0], exports / "two")
    kept = client.service.pictures
    assert client.post("/v1/admin/reload", json={}).status_code == 200
    assert client.service.pictures is kept
    assert client.post("/v1/recommend/image", content=data, headers=PNG).json()["items"] == before
    assert len(client.get("/v1/items/new/image").content) <= MAX_BYTES
