"""Searches through the service: what was put is found by its title, in this process and the next."""

from types import SimpleNamespace

import numpy as np
import pytest
from made_export import WordEncoder
from made_search import make_shop

pytest.importorskip("fastapi", reason="extra 'serve'")

from made_service import is_problem

from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.serving import titles


def vector_of(text):
    return WordEncoder().encode([text])[0][0]


NEW = {"title": "Velvet quilt &amp; pillow", "text": "for cold nights"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "export"
    write_artifact(folder, make_shop())
    return folder


def test_http_answers_as_python(start, folder):
    client = start(folder)
    shop = Recommender(export_in_memory(make_shop()))
    for by in ("both", "likeness", "chance"):
        body = client.ask(text="iron pan", by=by, explain=2, k=20)
        expected = shop.recommend(Request(text_vector=vector_of("iron pan"), text="iron pan", by=by, explain=2, k=20))
        assert body["source"] == "text"
        assert [item["id"] for item in body["items"]] == [item.id for item in expected.items]
        for got, item in zip(body["items"], expected.items, strict=True):
            assert got["score"] == item.score and got["probability"] is None
            assert got["parts"] == vars(item.parts)
            told = ("id", "title", "contribution")
            assert got["reasons"] == [{name: getattr(reason, name) for name in told} for reason in item.reasons]
        near = client.get("/v1/items/i3/similar", params={"by": by}).json()
        assert [item["id"] for item in near["items"]] == [item.id for item in shop.similar("i3", by=by).items]
    assert "parts" not in client.ask(text="iron pan")["items"][0]


def test_titles_wait_for_the_encoder_of_the_export(start, folder):
    """That of another export, which a reload is about to replace, makes other vectors."""
    client = start(folder)
    service, own = client.service, client.service.text
    assert client.put("/v1/items/new", json=NEW).status_code == 200
    service.text = SimpleNamespace(fingerprint="words-2", state="ready")
    assert client.portal.call(service.titles.learn, 5.0) is False
    service.text = own
    assert client.portal.call(service.titles.learn, 5.0) is True
    assert client.ask(text="Velvet quilt & pillow")["items"][0]["id"] == "new"


def test_wrong_ways_to_rank_are_refused(start, folder):
    client = start(folder)
    assert "by" in is_problem(client.post("/v1/recommend", json={"text": "pan", "by": "taste"}), 422)
    assert "by" in is_problem(client.post("/v1/recommend", json={"user": "u1", "by": "chance"}), 422)
    assert "by" in is_problem(client.get("/v1/items/i3/similar", params={"by": "x"}), 422)


@pytest.mark.parametrize("text", ["Velvet quilt & pillow", "velvet quilt &amp; PILLOW", "for cold nights"])
def test_a_new_item_is_first_for_its_title_and_text_here_and_after_a_restart(start, folder, text):
    client = start(folder)
    assert client.put("/v1/items/new", json=NEW).json()["created"]
    assert client.ask(text=text, k=1)["items"][0]["id"] == "new"
    assert client.get("/v1/items/new/similar").json()["items"][0]["id"] != "new"
    again = start(folder)  # the log keeps no vectors of titles
    assert again.ask(text=text, k=1)["items"][0]["id"] == "new"


def test_titles_are_learnt_a_few_at_a_time(start, folder, monkeypatch):
    monkeypatch.setattr(titles, "AT_ONCE", 2)
    client = start(folder)
    for n in range(5):
        client.put(f"/v1/items/n{n}", json={"title": f"Quilt {n}", "text": f"thing {n}"})
    for _ in range(4):
        client.ask(text="quilt")
    assert client.service.recommender.searches.untitled == []
    assert not client.service.recommender.searches.is_behind


def test_a_renamed_item_is_found_by_its_new_name(start, folder):
    client = start(folder)
    client.put("/v1/items/i8", json={"title": "Chandelier"})
    assert client.ask(text="chandelier", k=1)["items"][0]["id"] == "i8"
    client.delete("/v1/items/i8")
    assert "i8" not in {item["id"] for item in client.ask(text="chandelier", k=60)["items"]}


def test_batches_and_long_answers_search_too(start, folder):
    client = start(folder)
    one = client.ask(text="iron pan", k=60, explain=30)
    many = client.post(
        "/v1/recommend/batch",
        json={
            "requests": [{"text": "iron pan", "k": 60, "explain": 30}, {"user": "u1"}, {"text": "oak", "by": "chance"}]
        },
    ).json()["results"]
    assert many[0]["items"] == one["items"] and many[2]["source"] == "text"


def test_items_that_the_model_does_not_rank_can_be_looked_at(start, tmp_path):
    write_artifact(tmp_path / "export", make_shop(listed=np.arange(60) < 55))
    client = start(tmp_path / "export")
    item = client.ask(text=make_shop().records[57].title, k=1)["items"][0]
    assert item["id"] == "i57"
    assert client.get("/v1/items/i57").json()["title"] == item["title"]
    client.delete("/v1/items/i57")
    is_problem(client.get("/v1/items/i57"), 404)
