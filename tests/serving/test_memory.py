"""What a burst leaves behind: no objects, and memory that is given back once it is over."""

import asyncio
import gc
import random
import tracemalloc
from collections import deque

import pytest

pytest.importorskip("fastapi", reason="extra 'serve'")
from made_service import Client  # noqa: F401  names what else is missing
from waiting import LIMIT

from recbole_llm.serving import memory
from recbole_llm.serving.metrics import COVERAGE_ITEMS, COVERAGE_WINDOW, Metrics, Shown

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(60))
def test_what_was_shown_is_what_the_last_answers_held(seed):
    draw = random.Random(seed)
    answers, items = draw.randint(1, 6), draw.randint(1, 20)
    shown, window = Shown(answers, items), deque()
    for step in range(600):
        ids = [f"i{step // 20 + draw.randrange(12)}" for _ in range(draw.choice([0, 1, 3, 7, items]))]
        shown.add(tuple(ids))
        window.append(ids[:items])
        while len(window) > answers or sum(map(len, window)) > items:
            window.popleft()
        assert shown.answers == len(window)
        assert len(shown) == len({item_id for ids in window for item_id in ids})


def test_answers_of_a_burst_are_remembered_without_an_object_for_each():
    ids = [f"item {n}" for n in range(3000)]
    metrics, draw = Metrics(), random.Random(0)
    for item_id in ids:
        metrics.answer((item_id,), 0)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(2000):
            metrics.answer(tuple(draw.sample(ids, 50)), 0)
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert metrics.shown.answers == 5000
    assert grown < 200_000  # tuples of them would take 800,000 bytes
    assert COVERAGE_ITEMS >= 100_000 and COVERAGE_WINDOW >= 5000


def test_a_burst_of_costly_batches_leaves_no_objects(client):
    ids = [f"i{n}" for n in range(1, 8)]
    requests = [{"items": ids, "k": 7, "explain": 3, "exclude_seen": False, "exclude": [f"x{n}" for n in range(40)]}]
    body = {"requests": requests * 64}

    def burst():
        for _ in range(4):
            answer = client.post("/v1/recommend/batch", json=body)
            assert answer.status_code == 200 and len(answer.json()["results"]) == 64
        gc.collect()

    burst()
    tracemalloc.start(1)
    try:
        burst()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(3):
            burst()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert abs(after - before) < 50_000  # a burst alone makes millions of bytes of objects


class Process:
    """Sizes of a process that are told in turn; a release takes away what is free."""

    def __init__(self, monkeypatch):
        self.used = self.free = self.held = self.released = 0
        monkeypatch.setattr(memory, "LOOK_SECONDS", 0.001)
        monkeypatch.setattr(memory, "REST_SECONDS", 0.003)
        monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MIB + self.used + self.free)
        monkeypatch.setattr(memory, "_trim", lambda: self.trim)

    def trim(self):
        self.released += 1
        self.free = 0

    async def until(self, reached):
        end = asyncio.get_running_loop().time() + LIMIT
        while not reached():
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.001)

    def run(self, story):
        async def both():
            task = asyncio.create_task(memory.give_back(lambda: self.held))
            try:
                await asyncio.sleep(0)
                await story()
            finally:
                task.cancel()

        asyncio.run(both())


def test_memory_is_released_after_a_burst_and_not_in_it(monkeypatch):
    process = Process(monkeypatch)

    async def story():
        process.free, process.held = 40 * MIB, 5 * MIB
        await asyncio.sleep(0.05)
        assert process.released == 0
        process.held = 0
        await process.until(lambda: process.free == 0)

    process.run(story)


def test_what_was_in_use_at_a_release_is_given_back_when_it_is_free(monkeypatch):
    process = Process(monkeypatch)

    async def story():
        process.used = 40 * MIB
        await process.until(lambda: process.released >= 2)
        process.used, process.free = 0, 40 * MIB  # the process has not grown since
        await process.until(lambda: process.free == 0)

    process.run(story)


def test_a_little_growth_is_no_burst(monkeypatch):
    process = Process(monkeypatch)

    async def story():
        process.free = 15 * MIB
        await asyncio.sleep(0.05)
        assert process.released == 0

    process.run(story)


def test_what_is_given_back_within_ten_seconds_is_looked_for_in_less():
    assert memory.LOOK_SECONDS + memory.REST_SECONDS + memory.LOOK_SECONDS < 10


def test_a_release_collects_except_while_an_export_is_loaded(monkeypatch):
    seen = []
    monkeypatch.setattr(memory.gc, "collect", lambda: seen.append("collected"))
    memory.release(lambda: seen.append("trimmed"))
    gc.disable()
    try:
        memory.release(lambda: seen.append("trimmed"))
    finally:
        gc.enable()
    assert seen == ["collected", "trimmed", "trimmed"]
