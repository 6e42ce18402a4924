"""Another export takes the place of the one being served, in process."""

import gc
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from made_export import WordEncoder, make_contents
from made_service import is_problem
from waiting import happens, join, wait_until

from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Recommender


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
        wait_until(lambda: old() is None, "nothing holds the old export")
    finally:
        gc.enable()


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
    wait_until(lambda: again.get("/v1/items/new").status_code == 200, "the item is placed")
    row = again.service.recommender.catalog.row("new")
    np.testing.assert_allclose(again.service.recommender.catalog.vector(np.array([row])), vector, rtol=1e-5)


def test_changes_of_a_new_log_are_none_that_the_training_data_held(start, tmp_path):
    """Where the log was begun anew after its changes had become training data."""
    write_artifact(tmp_path / "later", make_contents(overlay_seq=50))
    client = start(tmp_path / "later")
    assert client.put("/v1/items/i4", json={"title": "Renamed"}).json()["seq"] == 51
    again = start(tmp_path / "later")
    assert again.get("/v1/items/i4").json()["title"] == "Renamed"
    write_artifact(tmp_path / "latest", make_contents(overlay_seq=70))
    again.service.settings = replace(again.service.settings, export=str(tmp_path / "latest"))
    assert again.post("/v1/admin/reload", json={}).status_code == 200
    assert again.put("/v1/items/i5", json={"title": "Other"}).json()["seq"] == 71


class Mirrored(WordEncoder):
    """Another encoder."""

    fingerprint = "words-2"

    def encode(self, texts):
        vectors, cut = super().encode(texts)
        return -vectors, cut


def either(folder, manifest):
    return Mirrored() if manifest.encoder.fingerprint == Mirrored.fingerprint else WordEncoder()


def write_mirrored(folder):
    contents = make_contents(seed=5)
    write_artifact(folder, replace(contents, encoder=replace(contents.encoder, fingerprint=Mirrored.fingerprint)))
    return contents


def stands_where_its_text_says(client, item_id, vector):
    catalog = client.service.recommender.catalog
    if item_id not in catalog.row_of:
        return False
    np.testing.assert_allclose(catalog.vector(np.array([catalog.row(item_id)])), vector, rtol=1e-5)
    return True


def test_a_change_during_a_reload_to_another_encoder_is_encoded_anew(start, exports, monkeypatch):
    from recbole_llm.serving.change_log import Put

    client = start(exports, make=either).wait_for_encoder()
    service, changes_for, written = client.service, client.service.changes.after, []
    contents = write_mirrored(exports / "two")
    text, own = "space opera", WordEncoder().encode(["space opera"])[0]

    async def late(recommender):
        if recommender is not service.recommender and not written:
            put = Put("new", text=text, feature=own[0], fingerprint=WordEncoder.fingerprint)
            written.append(await service.changes.write([put]))
        return await changes_for(recommender)

    monkeypatch.setattr(service.changes, "after", late)
    assert client.post("/v1/admin/reload", json={}).status_code == 200
    assert written and stands_where_its_text_says(client, "new", contents.text_map.apply(-own)[0])


def test_processes_with_different_encoders_see_each_others_items(start, exports):
    """While the exports of several processes are replaced one after the other."""
    contents = write_mirrored(exports / "two")
    old = start(exports / "one", make=either).wait_for_encoder()
    new = start(exports / "two", make=either).wait_for_encoder()
    for here, there in ((old, new), (new, old)):
        item_id, text = f"of-{here.service.export_id}", "war at sea"
        assert here.put(f"/v1/items/{item_id}", json={"text": text}).status_code == 200
        maps, sign = (contents, -1) if there is new else (make_contents(), 1)
        vector = maps.text_map.apply(sign * WordEncoder().encode([text])[0])[0]
        wait_until(lambda t=there, i=item_id, v=vector: stands_where_its_text_says(t, i, v), "the item is there")


def test_a_text_is_logged_with_the_encoder_that_made_its_vector(start, exports, tmp_path, monkeypatch):
    """Another one may take its place while it works."""
    client = start(exports)
    service, first = client.service, client.service.text
    encode = first.encode

    async def replaced_meanwhile(texts, seconds):
        found = await encode(texts, seconds)
        service.text = SimpleNamespace(fingerprint="words-2", state="none")
        return found

    monkeypatch.setattr(first, "encode", replaced_meanwhile)
    assert client.put("/v1/items/new", json={"text": "sea"}).status_code == 200
    service.text = first
    (change,) = client.portal.call(service.changes.all)
    assert change.fingerprint == WordEncoder.fingerprint
    np.testing.assert_array_equal(change.feature, WordEncoder().encode(["sea"])[0][0])


def test_a_reload_that_is_asked_for_during_another_is_not_forgotten(start, exports, monkeypatch):
    from recbole_llm.serving import service

    one, two = start(exports), start(exports)
    write_artifact(exports / "two", make_contents(seed=5))
    entered, gate, build = threading.Event(), threading.Event(), service.build

    def slow(folder, *args, **kwargs):
        if folder.name == "two":
            entered.set()
            happens(gate, "the test lets the reload go on")
        return build(folder, *args, **kwargs)

    monkeypatch.setattr(service, "build", slow)
    thread = threading.Thread(target=lambda: two.post("/v1/admin/reload", json={}))
    thread.start()
    happens(entered, "the first reload has begun")
    manifest = write_artifact(exports / "three", make_contents(seed=6))
    assert one.post("/v1/admin/reload", json={}).status_code == 200
    number, _ = one.portal.call(one.service.changes.reload_asked)
    looks = []
    asked = two.service.changes.reload_asked

    async def counted():
        looks.append(await asked())
        return looks[-1]

    monkeypatch.setattr(two.service.changes, "reload_asked", counted)
    wait_until(lambda: sum(look[0] >= number for look in looks) > 1, "the second service has seen the request")
    gate.set()
    join(thread)
    wait_until(lambda: two.ask(user="u1")["model"] == manifest.export_id, "it serves what was asked for last")


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
    from recbole_llm.serving.change_log import Put

    client = start(exports)
    service = client.service
    write_artifact(exports / "two", make_contents(seed=5))
    changes_for, swap_in, swaps, written = service.changes.after, service._swap_in, [], []

    async def late(recommender):
        changes = await changes_for(recommender)
        if recommender is not service.recommender and not written:
            written.append(await service.changes.write([Put("i1", title="Late")]))
        return changes

    def noted(built):
        done = swap_in(built)
        swaps.append((done, built.recommender.overlay_seq))
        return done

    monkeypatch.setattr(service.changes, "after", late)
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
        happens(gate, "the test lets the reload go on")
        return build(*args, **kwargs)

    monkeypatch.setattr(service, "build", slow)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/admin/reload", json={})))
    thread.start()
    happens(entered, "the first reload has begun")
    is_problem(client.post("/v1/admin/reload", json={}), 409)
    client.ask(user="u1")  # is not held up
    gate.set()
    join(thread)
    assert answers[0].status_code == 200


def test_a_reload_reaches_the_other_processes(start, exports):
    one, two = start(exports), start(exports)
    manifest = write_artifact(exports / "two", make_contents(seed=5))
    one.post("/v1/admin/reload", json={})
    wait_until(lambda: two.ask(user="u1")["model"] == manifest.export_id, "the other service has the new export")


def test_watch_leaves_an_older_export_that_was_asked_for_by_name(start, exports, monkeypatch):
    monkeypatch.setattr("recbole_llm.serving.service.WATCH_SECONDS", 0.0)
    first = load_export(exports / "one").manifest.export_id
    write_artifact(exports / "two", make_contents(seed=5))
    client = start(exports, watch=True)
    assert client.post("/v1/admin/reload", json={"export": "one"}).json()["to"] == first
    looks, look = [], client.service.changes.reload_asked

    async def counted():
        looks.append(await look())
        return looks[-1]

    monkeypatch.setattr(client.service.changes, "reload_asked", counted)
    wait_until(lambda: len(looks) > 3, "the service has looked several times")
    assert client.ask(user="u1")["model"] == first
    manifest = write_artifact(exports / "three", make_contents(seed=6))
    wait_until(lambda: client.ask(user="u1")["model"] == manifest.export_id, "what appears after that is served")


def test_watch_loads_what_appears(start, exports):
    client = start(exports, watch=True)
    manifest = write_artifact(exports / "two", make_contents(seed=5))
    wait_until(lambda: client.ask(user="u1")["model"] == manifest.export_id, "the new export is served")
