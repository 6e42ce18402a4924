"""What answers cost, and that no one question holds up the others."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest
from made_export import make_contents
from made_service import is_problem
from waiting import LIMIT

from recbole_llm.export.pooling import Pooling, _largest_of_rows
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.serving import app as app_module
from recbole_llm.serving.batching import DeadlineExceeded
from recbole_llm.serving.bodies import FREE_BYTES, PARSED_AT_ONCE, waited
from recbole_llm.serving.metrics import COVERAGE_ITEMS, Metrics
from recbole_llm.serving.reading import MAX_COST, Reader
from recbole_llm.serving.responses import rendered
from recbole_llm.serving.schemas import MAX_BATCH_ENTRIES, MAX_REASONS
from recbole_llm.serving.settings import Limits


@pytest.mark.parametrize(
    ("rows", "history", "limit", "levels"),
    [(7, 5, 2, 0), (50, 30, 4, 4), (50, 30, 30, 4), (50, 30, 31, 4), (1, 1, 1, 0), (40, 200, 7, 2), (3, 0, 0, 0), (0, 5, 2, 0)],
)  # fmt: skip
def test_the_largest_are_those_of_a_stable_sort(rows, history, limit, levels):
    """``levels``: so few values that most are tied."""
    rng = np.random.default_rng(rows + history)
    values = rng.integers(-levels, levels, (rows, history)) if levels else rng.standard_normal((rows, history))
    at, found = _largest_of_rows(values.astype(np.float64), min(limit, history))
    expected = np.argsort(-values, axis=1, kind="stable")[:, :limit]
    np.testing.assert_array_equal(at, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(values, expected, axis=1))


def test_reasons_are_the_largest_contributions(export, monkeypatch):
    """In any number of pieces; against one contribution at a time, in float64."""
    from recbole_llm.export import pooling as module

    recommender = Recommender(export)
    for cells in (1, 3, 1 << 17):
        monkeypatch.setattr(module, "CELLS_AT_ONCE", cells)
        for request in (Request(user="u1", k=50, explain=3), Request(items=["i1", "i5", "i2"], k=50, explain=2)):
            prepared = recommender._prepare(request)
            query = prepared.query
            for item in recommender.recommend(request).items:
                row = recommender.catalog.row(item.id)
                w = export.vector[row].astype(np.float64)
                sums = []
                for j, source in enumerate(query.source.astype(np.float64)):
                    weight = np.repeat(query.weights[j], [block.dim for block in export.manifest.blocks])
                    sums.append(float((w * source * weight).sum()))
                order = sorted((n for n in range(len(sums)) if sums[n] > 0), key=lambda n: -sums[n])[: request.explain]
                assert [r.id for r in item.reasons] == [export.item_ids[prepared.rows[n]] for n in order]
                np.testing.assert_allclose([r.contribution for r in item.reasons], [sums[n] for n in order], rtol=1e-9)
                total = sum(r.contribution for r in item.reasons) + item.rest + item.bias
                assert total == pytest.approx(item.score, abs=1e-9)


def test_contributions_are_per_block(contents):
    pooling = Pooling(contents.blocks, np.zeros(10, np.float32))
    rng = np.random.default_rng(0)
    source, vector = rng.standard_normal((3, 10)).astype("f4"), rng.standard_normal((4, 10)).astype("f4")
    query = pooling.query(source, np.array([0.5, 1, 2], np.float32))
    expected = np.zeros((4, 3))
    for b, columns in enumerate(pooling.columns):
        expected += vector[:, columns].astype(float) @ source[:, columns].T.astype(float) * query.weights[:, b]
    np.testing.assert_allclose(pooling.contributions(query, vector), expected, rtol=1e-12)


def test_more_reasons_than_allowed_are_refused_before_any_work(client):
    before = client.get("/metrics").text.count("batch_size_count")
    assert client.ask(user="u1", k=MAX_REASONS // 10, explain=10)
    detail = client.ask(422, user="u1", k=MAX_REASONS // 10 + 1, explain=10)["detail"]
    assert "explain" in detail and str(MAX_REASONS) in detail
    assert before == 1 and "recbole_llm_batch_size_count 1" in client.get("/metrics").text
    one_of_two = client.post(
        "/v1/recommend/batch", json={"requests": [{"user": "u1"}, {"user": "u1", "k": 100, "explain": 50}]}
    ).json()["results"]
    assert one_of_two[0]["items"] and one_of_two[1]["error"]["status"] == 422


def test_a_batch_is_bounded_by_what_all_of_it_asks_for(client):
    allowed = MAX_BATCH_ENTRIES // (100 * 4)
    body = {"requests": [{"user": "u1", "k": 100, "explain": 3}] * allowed}
    assert len(client.post("/v1/recommend/batch", json=body).json()["results"]) == allowed
    body["requests"].append({"user": "u1", "k": 1})
    assert "items and reasons" in is_problem(client.post("/v1/recommend/batch", json=body), 422)


def test_a_costly_answer_is_made_on_the_thread_and_is_the_same(start, tmp_path, monkeypatch):
    """1,500 items, each with two of 700 reasons: by the service, and by the Python API."""
    contents = make_contents(n_items=1500)
    write_artifact(tmp_path / "large", contents)
    client = start(tmp_path / "large", state=None)
    threads = []

    def noted(answer):
        threads.append(threading.get_ident())
        return rendered(answer)

    monkeypatch.setattr(app_module, "rendered", noted)
    items = [f"i{n}" for n in range(700)]
    body = {"items": items, "k": 1000, "explain": 2, "exclude_seen": False}
    answer = client.ask(**body)
    loop = client.portal.call(threading.get_ident)
    assert threads and loop not in threads
    recommender = client.service.recommender
    expected = recommender.recommend(Request(**body))
    assert [item["id"] for item in answer["items"]] == [item.id for item in expected.items] and len(
        expected.items
    ) == 1000
    for got, item in zip(answer["items"], expected.items, strict=True):
        assert [(r["id"], r["contribution"]) for r in got["reasons"]] == [(r.id, r.contribution) for r in item.reasons]
    assert answer["model"] == client.service.export_id and answer["overlay_seq"] == 0 and answer["source"] == "items"
    threads.clear()
    small = client.ask(items=items[:3], k=10, explain=2)
    assert len(small["items"]) == 10 and not threads  # what is small is answered as it was
    assert "No item" in client.ask(404, items=["x"] * 700, k=1000, explain=2)["detail"]


def reader_of(recommender, **limits):
    return Reader(Limits(**{"request_seconds": LIMIT, **limits}), Metrics(), lambda: recommender)


def test_costs_are_known_before_the_work(export):
    reader = reader_of(Recommender(export))
    cost = lambda **request: reader.cost_of(Request(**request))  # noqa: E731
    assert cost(user="u1") < cost(user="u1", k=100) < cost(user="u1", k=100, explain=5) <= MAX_COST
    assert cost(user="u1", k=1000) <= MAX_COST < cost(items=[f"i{n}" for n in range(1000)], k=1000, explain=2)
    assert cost(user="u1", exclude=["x"] * 10_000) - cost(user="u1") == 2000
    assert cost(user="u1", filter={"kind": ["x"] * 1000}) - cost(user="u1") == 1000
    assert cost(user="nobody", explain=3) > 0


def test_pieces_of_a_batch_cost_no_more_than_one_may(export):
    reader = reader_of(Recommender(export), max_batch=5)
    requests = [Request(user="u1", k=1 + 37 * n % 900) for n in range(100)]
    costs = [reader.cost_of(request) for request in requests]
    pieces = list(reader._pieces(requests, costs))
    assert [one for piece in pieces for one in piece] == requests
    assert all(len(piece) <= 5 and sum(map(reader.cost_of, piece)) <= MAX_COST for piece in pieces)
    assert list(reader._pieces([], [])) == [[]]


def test_no_piece_is_begun_after_the_deadline(export):
    class Slow(Recommender):
        asked = 0

        def recommend_many(self, requests):
            self.asked += len(requests)
            time.sleep(0.25)
            return super().recommend_many(requests)

    recommender = Slow(export)
    reader = reader_of(recommender, max_batch=1)

    async def work():
        with pytest.raises(DeadlineExceeded):
            await reader.render([Request(user="u1")] * 50, rendered, 1)
        asked = recommender.asked
        await asyncio.sleep(0.5)
        return asked, recommender.asked

    asked, later = asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert 0 < asked <= later <= asked + 1 < 10


def test_others_are_answered_between_the_pieces(export):
    """A batch of a hundred pieces, and a question asked after it: it waits for one piece, not for a hundred."""
    order = []

    class Noted(Recommender):
        def recommend_many(self, requests):
            order.append("large" if requests[0].k == 1000 else "small")
            time.sleep(0.01)
            return super().recommend_many(requests)

    reader = reader_of(Noted(export), max_batch=1)

    async def work():
        large = asyncio.create_task(reader.render([Request(user="u1", k=1000)] * 100, rendered, LIMIT))
        while len(order) < 5:
            await asyncio.sleep(0.001)
        await reader.recommend(Request(user="u1", k=5))
        seen = len(order)
        answer = await large
        return seen, answer

    seen, answer = asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert seen <= 9 and order.count("large") == 100 and len(answer.value) == 100
    assert json.loads(answer.value[0])["items"] == json.loads(answer.value[99])["items"]


def test_only_a_few_large_answers_are_made_at_once(export):
    """Each is held in memory until it is whole."""
    reader = reader_of(Recommender(export), max_batch=1)
    begun = set()

    async def one(number):
        def note(answer):
            begun.add(number)
            return rendered(answer)

        await reader.render([Request(user="u1", k=1000)] * 5, note, LIMIT)
        return len(begun)

    async def work():
        tasks = [asyncio.create_task(one(number)) for number in range(12)]
        return await asyncio.gather(*tasks)

    seen = asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert begun == set(range(12)) and min(seen) <= 5


def test_a_wait_for_a_turn_ends_with_the_deadline(export):
    reader = reader_of(Recommender(export))

    async def work():
        for _ in range(4):
            await reader._rendering.acquire()
        with pytest.raises(DeadlineExceeded):
            await reader.render([Request(user="u1")], rendered, 0.05)
        for _ in range(4):
            reader._rendering.release()
        return await reader.render([Request(user="u1")], rendered, LIMIT)

    assert len(asyncio.run(asyncio.wait_for(work(), LIMIT)).value) == 1


def test_what_a_body_has_waited_is_a_part_of_its_time(export):
    recommender = Recommender(export)
    reader = Reader(Limits(), Metrics(), lambda: recommender)

    async def work():
        assert len((await reader.render([Request(user="u1")], rendered, LIMIT)).value) == 1
        waited.set(LIMIT)
        with pytest.raises(DeadlineExceeded):
            await reader.render([Request(user="u1")], rendered, LIMIT)

    asyncio.run(asyncio.wait_for(work(), LIMIT))


def test_large_questions_are_parsed_a_few_at_a_time_and_all_are_answered(client, monkeypatch):
    parsed, most, lock = [], [], threading.Lock()
    answer_batch = app_module._answer_batch

    async def counted(service, body):
        with lock:
            parsed.append(body)
            most.append(len(parsed))
        try:
            await asyncio.sleep(0.02)
            return await answer_batch(service, body)
        finally:
            with lock:
                parsed.remove(body)

    monkeypatch.setattr(app_module, "_answer_batch", counted)
    large = {"requests": [{"user": "u1", "k": 2, "exclude": [f"x{n}" for n in range(600)]}] * 8}
    assert len(json.dumps(large)) > FREE_BYTES
    codes = []
    threads = [
        threading.Thread(target=lambda: codes.append(client.post("/v1/recommend/batch", json=large).status_code))
        for _ in range(3 * PARSED_AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert codes == [200] * 3 * PARSED_AT_ONCE
    assert max(most) <= PARSED_AT_ONCE
    assert not parsed


def test_the_metrics_remember_a_bounded_number_of_items():
    metrics = Metrics()
    ids = tuple(f"i{n}" for n in range(1000))
    for number in range(3 * COVERAGE_ITEMS // 1000):
        metrics.answer((f"only{number}", *ids), 0)
    assert metrics.shown.answers == COVERAGE_ITEMS // 1001
    assert metrics.distinct_shown == 1000 + metrics.shown.answers


def test_masks_of_filters_are_bounded_in_number_and_bytes(export, monkeypatch):
    from recbole_llm.retrieval import item_catalog as module

    monkeypatch.setattr(module, "MAX_MASK_BYTES", 40 * 5)
    catalog = Recommender(export).catalog
    for year in range(50):
        condition = {"year": {"gte": 1980 + year}, "genre": ["x" * 10_000, "space"]}
        mask = catalog.mask(condition)
        assert mask is catalog.mask(condition)
        np.testing.assert_array_equal(mask, catalog._attributes.mask(condition, len(catalog)))
    assert len(catalog._masks) == 5 and all(len(key) == 64 for key in catalog._masks)
