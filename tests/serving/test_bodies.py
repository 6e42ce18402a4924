"""Bodies within bounds of size, time and memory."""

import asyncio
import itertools
from contextlib import AsyncExitStack

import pytest
from waiting import LIMIT

pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("fastapi", reason="extra 'serve'")

from recbole_llm.serving.batching import DeadlineExceeded
from recbole_llm.serving.bodies import (
    FREE_BYTES,
    MAX_VALUES,
    PARSED_AT_ONCE,
    VALUE_BYTES,
    Bodies,
    Incoming,
    check_values,
    waited,
)
from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.problem import Problem
from recbole_llm.serving.settings import Limits

KILOBYTE = 1 << 10


def run(work):
    return asyncio.run(asyncio.wait_for(work, LIMIT))


def bodies(**limits):
    return Bodies(Limits(**limits), Metrics())


class Client:
    """Sends what it is told to, and waits in between."""

    def __init__(self, *parts, last=True):
        self.parts = asyncio.Queue()
        for at, part in enumerate(parts):
            self.send(part, more=not last or at < len(parts) - 1)

    def send(self, part, more=False):
        self.parts.put_nowait({"type": "http.request", "body": part, "more_body": more})

    async def receive(self):
        return await self.parts.get()

    @property
    def incoming(self):
        return Incoming(self.receive)


def test_a_body_is_what_was_sent():
    async def work():
        store = bodies()
        for parts in ([b""], [b"{}"], [b"a" * 40_000, b"", b"b" * 30_000], [b"x" * (1 << 20)]):
            body = await store.read("a", Client(*parts).incoming, 1 << 20)
            assert body.content == b"".join(parts)
            store.release(body)
            assert store.held == 0

    run(work())


@pytest.mark.parametrize("wait", [False, True], ids=["here", "on its way"])
@pytest.mark.parametrize(
    "parts", [[b"{}"], [b""], [b"a", b"b"], [b"x" * FREE_BYTES], [b"x" * (FREE_BYTES + 1)]], ids=range(5)
)
def test_a_body_that_is_here_and_one_that_is_waited_for_are_the_same(parts, wait):
    async def work():
        client, store = Client(), bodies()
        incoming = client.incoming

        def send():
            for at, part in enumerate(parts):
                client.send(part, more=at < len(parts) - 1)

        if wait:
            asyncio.get_running_loop().call_later(0.01, send)
        else:
            send()
        body = await store.read("a", incoming, 1 << 20)
        assert body.content == b"".join(parts) and incoming.over
        client.send(b"more")
        return (await incoming.next())["body"]

    assert run(work()) == b"more"


def test_a_client_that_goes_away():
    async def work(wait):
        client, store = Client(), bodies()
        gone = {"type": "http.disconnect"}
        if wait:
            asyncio.get_running_loop().call_later(0.01, client.parts.put_nowait, gone)
        else:
            client.parts.put_nowait(gone)
        with pytest.raises(Problem) as caught:
            await store.read("a", client.incoming, 1 << 20)
        return caught.value.status

    assert run(work(False)) == run(work(True)) == 400


def test_small_bodies_are_free_and_large_ones_are_counted_with_what_they_are_parsed_to():
    async def work():
        store = bodies()
        small = await store.read("a", Client(b"1," * (FREE_BYTES // 2)).incoming, 1 << 20)
        assert store.held == 0
        large = await store.read("a", Client(b"1," * FREE_BYTES).incoming, 1 << 20)
        assert store.held == 2 * FREE_BYTES + VALUE_BYTES * (FREE_BYTES + 1)
        store.release(small)
        store.release(large)
        store.release(large)  # once is enough
        assert store.held == 0

    run(work())


@pytest.mark.parametrize(("sent", "status"), [(1001, 413), (1000, None)])
def test_a_body_is_refused_when_it_grows_too_large(sent, status):
    async def work():
        store = bodies()
        client = Client(*[b"x"] * sent, last=status is None)
        try:
            return (await store.read("a", client.incoming, 1000)).content
        except Problem as problem:
            assert store.held == 0
            return problem.status

    assert run(work()) == (status or b"x" * 1000)


def test_a_body_that_does_not_come_is_408_and_leaves_nothing():
    async def work():
        store = bodies(body_seconds=0.05)
        with pytest.raises(Problem) as caught:
            await store.read("a", Client(b"x" * 100_000, last=False).incoming, 1 << 20)
        assert caught.value.status == 408 and store.held == 0 and not store._arriving
        # the task goes on: the interruption was not the task's own end
        await asyncio.sleep(0)
        return (await store.read("a", Client(b"next").incoming, 10)).content

    assert run(work()) == b"next"


def test_a_cancelled_reader_is_cancelled():
    async def work():
        store = bodies()
        task = asyncio.create_task(store.read("a", Client(b"x" * 100_000, last=False).incoming, 1 << 20))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.held == 0 and not store._arriving

    run(work())


def test_the_body_that_has_arrived_longest_from_who_holds_most_gives_way():
    """Ten bodies held back by one peer, one by another; a third that sends at once is served."""

    async def work():
        store = bodies(bodies_bytes=1000 * KILOBYTE)
        slow = [Client(b" " * (90 * KILOBYTE), last=False) for _ in range(10)]
        tasks = [asyncio.create_task(store.read("holder", client.incoming, 1 << 20)) for client in slow]
        other = Client(b" " * (20 * KILOBYTE), last=False)
        others = asyncio.create_task(store.read("other", other.incoming, 1 << 20))
        await asyncio.sleep(0.01)
        assert store.held == 920 * KILOBYTE
        body = await store.read("honest", Client(b" " * (150 * KILOBYTE)).incoming, 1 << 20)
        assert len(body.content) == 150 * KILOBYTE
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [True] + [False] * 9 and not others.done()
        assert tasks[0].exception().status == 503 and tasks[0].exception().retry_after == 1
        assert store.held == (9 * 90 + 20 + 150) * KILOBYTE + VALUE_BYTES
        store.release(body)
        other.send(b"")
        store.release(await others)
        for client, task in zip(slow[1:], tasks[1:], strict=True):
            client.send(b"")
            store.release(await task)
        assert store.held == 0

    run(work())


def test_what_was_given_up_is_freed_before_its_answer_is_sent():
    """An error holds the frames that it came through, and their variables, as long as somebody holds the error."""

    async def work():
        store = bodies(body_seconds=0.05)
        part = bytearray(100_000)  # of which it can be told whether somebody views it
        client = Client()
        client.send(memoryview(part), more=True)
        with pytest.raises(Problem) as caught:
            await store.read("a", client.incoming, 1 << 20)
        await asyncio.sleep(0)
        part.append(0)  # BufferError: a view exists
        return caught.value.status

    assert run(work()) == 408


def test_where_nothing_can_give_way_the_newcomer_is_refused():
    """Bodies that are being answered keep what they hold."""

    async def work():
        store = bodies(bodies_bytes=100 * KILOBYTE)
        held = await store.read("a", Client(b" " * (90 * KILOBYTE)).incoming, 1 << 20)
        with pytest.raises(Problem) as caught:
            await store.read("b", Client(b" " * (20 * KILOBYTE)).incoming, 1 << 20)
        assert caught.value.status == 503 and store.held == held.held
        assert (await store.read("b", Client(b" " * KILOBYTE).incoming, 1 << 20)).content  # small ones are free
        store.release(held)
        store.release(await store.read("b", Client(b" " * (20 * KILOBYTE)).incoming, 1 << 20))
        assert store.held == 0

    run(work())


def test_one_body_larger_than_the_budget_is_refused():
    async def work():
        store = bodies(bodies_bytes=100 * KILOBYTE)
        with pytest.raises(Problem) as caught:
            await store.read("a", Client(b" " * (200 * KILOBYTE)).incoming, 1 << 20)
        assert caught.value.status == 503 and store.held == 0

    run(work())


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"", 1),
        (b"[1,2,3]", 3),
        (b"1," * (MAX_VALUES - 1), MAX_VALUES),
        (b"1," * MAX_VALUES, None),
        (b"[" + b"0," * (1 << 20) + b"0]", None),
        (b'["' + b"," * (2 * MAX_VALUES) + b'"]', MAX_VALUES),  # one text
        (b'["' + b"," * (2 * MAX_VALUES) + b'",' + b"1," * MAX_VALUES + b"1]", None),
        (b'["\\"' + b"," * (2 * MAX_VALUES) + b'"]', MAX_VALUES),  # an escaped quote ends no text
        (b'["\\\\"' + b"," * (2 * MAX_VALUES) + b'"]', None),  # an escaped backslash before a quote that ends it
        (b'["\\\\\\"' + b"," * (2 * MAX_VALUES) + b'"]', MAX_VALUES),
        (b'"",' * MAX_VALUES, None),
        (b'"' * (8 * MAX_VALUES) + b"," * MAX_VALUES, None),
    ],
    ids=range(12),
)
def test_values_are_counted_before_they_are_parsed(content, values):
    if values is None:
        with pytest.raises(Problem) as caught:
            check_values(content)
        assert caught.value.status == 413
    else:
        assert check_values(content) == values


def test_long_bodies_take_turns_with_others():
    """While ten long bodies are worked on, whoever else is ready runs between any two of them."""

    async def work():
        store, order = bodies(), []

        async def long(number):
            async with store.turn(b" " * (FREE_BYTES + 1)):
                order.append(number)

        async def other():
            while len([one for one in order if one != "other"]) < 10:
                order.append("other")
                await asyncio.sleep(0)

        await asyncio.gather(other(), *(long(number) for number in range(10)))
        return order

    order = run(work())
    places = [at for at, one in enumerate(order) if one != "other"]
    assert len(places) == 10 and all(second - first > 1 for first, second in itertools.pairwise(places))


def test_an_error_in_a_turn_keeps_the_turns():
    async def work():
        store, order = bodies(), []

        async def long(number):
            async with store.turn(b" " * (FREE_BYTES + 1)):
                order.append(number)
                raise ValueError

        async def other():
            for _ in range(6):
                order.append("other")
                await asyncio.sleep(0)

        await asyncio.gather(other(), *(long(n) for n in range(3)), return_exceptions=True)
        return order

    order = run(work())
    assert all((first, second) == (first, "other") or first == "other" for first, second in itertools.pairwise(order))


def test_few_large_bodies_are_objects_at_a_time():
    async def work():
        store, held, most, go = bodies(), [], [], asyncio.Event()

        async def question(number):
            async with store.place():
                held.append(number)
                most.append(len(held))
                await go.wait()
                held.remove(number)
                return waited.get()

        tasks = [asyncio.create_task(question(number)) for number in range(3 * PARSED_AT_ONCE)]
        await asyncio.sleep(0.05)
        assert sorted(held) == list(range(PARSED_AT_ONCE))  # first come, first served
        go.set()
        times = await asyncio.gather(*tasks)
        assert max(most) == PARSED_AT_ONCE
        assert max(times[:PARSED_AT_ONCE]) < min(times[PARSED_AT_ONCE:])  # what a question has waited is known to it
        assert waited.get() == 0

    run(work())


def test_a_place_that_does_not_become_free_is_waited_for_until_the_deadline():
    async def work():
        store = bodies(batch_seconds=0.05)
        async with AsyncExitStack() as stack:
            for _ in range(PARSED_AT_ONCE):
                await stack.enter_async_context(store.place())
            for _ in range(2):
                with pytest.raises(DeadlineExceeded):
                    async with store.place():
                        pass
        for _ in range(2 * PARSED_AT_ONCE):  # none was lost
            async with store.place():
                pass

    run(work())
