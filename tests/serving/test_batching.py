"""The batcher: what is asked alone and what is asked together have the same answer, and nobody waits for ever."""

import asyncio
import threading
import time

import pytest
from waiting import LIMIT, happens

from recbole_llm.serving.batching import Batcher, DeadlineExceeded, QueueFull


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def square(items):
    return [ValueError(f"bad {item}") if item < 0 else item * item for item in items]


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200])
def test_together_as_alone(n):
    async def work():
        batcher = Batcher(square, max_queue=1000)
        answers = await asyncio.gather(*(batcher.submit(i, LIMIT) for i in range(n)))
        batcher.close()
        return answers

    assert run(work()) == [i * i for i in range(n)]


def test_a_lone_entry_does_not_wait_for_company():
    """It is given to the thread as it comes, and no timer is set but the one that keeps its deadline."""
    sizes, delays = [], []

    async def work():
        loop = asyncio.get_running_loop()
        call_later = loop.call_later
        loop.call_later = lambda delay, *rest, **more: delays.append(delay) or call_later(delay, *rest, **more)
        batcher = Batcher(square, observe=lambda size, waited: sizes.append(size))
        for n in range(50):
            task = asyncio.ensure_future(batcher.submit(n, LIMIT))
            await asyncio.sleep(0)
            assert len(sizes) == n + 1 and batcher.waiting == 0
            assert await task == n * n
        loop.call_later = call_later

    run(work())
    assert sizes == [1] * 50 and min(delays) > LIMIT / 2


def test_small_work_is_done_on_the_loop_in_one_batch_a_turn():
    threads, sizes = set(), []

    def note(items):
        threads.add(threading.get_ident())
        sizes.append(len(items))
        if 13 in items:
            raise RuntimeError("broken")
        return square(items)

    async def work():
        batcher = Batcher(note, max_batch=8, max_queue=100, inline=lambda items: 99 not in items)
        answers = await asyncio.gather(*(batcher.submit(i, LIMIT) for i in range(12)))
        alone = await asyncio.gather(batcher.submit(-1, LIMIT), return_exceptions=True)
        broken = await asyncio.gather(batcher.submit(13, LIMIT), batcher.submit(1, LIMIT), return_exceptions=True)
        here = set(threads)
        answers.append(await batcher.submit(99, LIMIT))  # large work: in the thread
        on_thread = await batcher.call(threading.get_ident)
        batcher.close()
        return answers, alone, broken, here, on_thread

    answers, alone, broken, here, on_thread = run(work())
    assert answers == [i * i for i in [*range(12), 99]] and sizes[:2] == [8, 4]
    assert isinstance(alone[0], ValueError) and [str(error) for error in broken] == ["broken"] * 2
    assert here == {threading.get_ident()} and threads == {threading.get_ident(), on_thread}


def test_small_work_waits_while_the_thread_is_busy():
    busy, gate, together = threading.Event(), threading.Event(), []

    def note(items):
        if items == ["large"]:
            busy.set()
            happens(gate, "the test lets the large work end")
            busy.clear()
        else:
            together.append(busy.is_set())
        return items

    async def work():
        batcher = Batcher(note, inline=lambda items: items != ["large"])
        large = asyncio.create_task(batcher.submit("large", LIMIT))
        await until(busy.is_set)
        small = [asyncio.create_task(batcher.submit(i, LIMIT)) for i in range(3)]
        for _ in range(10):  # turns of the loop, at whose end small work would be done
            await asyncio.sleep(0)
        assert together == []
        gate.set()
        await asyncio.gather(large, *small)
        batcher.close()

    run(work())
    assert together == [False]


def test_closing_leaves_nobody_waiting():
    busy, gate = threading.Event(), threading.Event()

    def slow(items):
        busy.set()
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(slow)
        tasks = [asyncio.create_task(batcher.submit(i, LIMIT)) for i in range(3)]
        await until(busy.is_set)
        batcher.close()
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *rest = run(work())
    assert first == 0 and all(isinstance(error, QueueFull) for error in rest)


def test_what_waits_is_one_batch_and_no_larger_than_allowed():
    sizes, gate = [], threading.Event()

    def slow(items):
        sizes.append(len(items))
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(slow, max_batch=8, max_queue=100)
        tasks = [asyncio.create_task(batcher.submit(0, LIMIT))]
        await until(lambda: sizes == [1])
        tasks += [asyncio.create_task(batcher.submit(i, LIMIT)) for i in range(1, 21)]
        await until(lambda: batcher.waiting == 20)
        gate.set()
        return await asyncio.gather(*tasks)

    assert run(work()) == list(range(21))
    assert sizes == [1, 8, 8, 4]


def test_an_error_is_its_own_entrys_alone():
    async def work():
        batcher = Batcher(square)
        return await asyncio.gather(*(batcher.submit(i, LIMIT) for i in (2, -1, 3)), return_exceptions=True)

    two, error, three = run(work())
    assert (two, three) == (4, 9) and str(error) == "bad -1"


@pytest.mark.parametrize("fault", [TypeError("dtype"), SystemExit("no"), "short"])
def test_a_fault_of_the_batch_reaches_every_caller_and_the_next_batch_works(fault):
    faults = [fault]

    def run_once(items):
        if faults:
            fault = faults.pop()
            if fault == "short":
                return items[:-1]
            raise fault
        return items

    async def work():
        batcher = Batcher(run_once)
        first = await asyncio.gather(*(batcher.submit(i, LIMIT) for i in range(5)), return_exceptions=True)
        return first, await batcher.submit(7, LIMIT)

    first, then = run(work())
    # the first entry starts alone; it meets the fault, the others the mended function
    assert isinstance(first[0], Exception) and first[1:] == [1, 2, 3, 4] and then == 7


def test_a_fault_reaches_all_of_a_large_batch():
    gate = threading.Event()

    def run_batch(items):
        happens(gate, "the test lets the batch go on")
        if len(items) > 1:
            raise RuntimeError("whole batch")
        return items

    async def work():
        batcher = Batcher(run_batch)
        tasks = [asyncio.create_task(batcher.submit(i, LIMIT)) for i in range(10)]
        await until(lambda: batcher.waiting == 9)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = run(work())
    assert first == 0 and len(others) == 9 and all(str(e) == "whole batch" for e in others)


def test_a_cancelled_caller_costs_nothing_and_harms_no_other():
    seen, gate = [], threading.Event()

    def slow(items):
        seen.extend(items)
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(slow)
        running, waiting, last = (asyncio.create_task(batcher.submit(i, LIMIT)) for i in range(3))
        await until(lambda: seen == [0] and batcher.waiting == 2)
        running.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
        gate.set()
        return await last

    assert run(work()) == 2
    assert seen == [0, 2]


def test_late_entries_are_told_so_and_not_computed():
    seen, gate = [], threading.Event()

    def slow(items):
        seen.extend(items)
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(slow)
        tasks = [asyncio.create_task(batcher.submit(i, 0.2)) for i in range(2)]
        await until(lambda: seen == [0])
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not gate.is_set()  # the callers hear of it though the thread is stuck
        gate.set()
        return results, await batcher.submit(9, LIMIT)

    results, then = run(work())
    assert all(isinstance(r, DeadlineExceeded) for r in results)
    assert then == 9 and seen == [0, 9]


def test_a_late_entry_is_not_computed_though_nobody_swept():
    seen = []

    def slow(items):
        seen.extend(items)
        time.sleep(0.05)
        return items

    async def work():
        batcher = Batcher(slow)
        batcher._sweep = lambda: None
        tasks = [asyncio.create_task(batcher.submit(i, seconds)) for i, seconds in ((0, LIMIT), (1, 0.01), (2, LIMIT))]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, late, last = run(work())
    assert (first, last) == (0, 2) and isinstance(late, DeadlineExceeded) and seen == [0, 2]


def test_a_full_queue_refuses_at_once():
    gate = threading.Event()

    def slow(items):
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(slow, max_queue=3)
        first = asyncio.create_task(batcher.submit(0, LIMIT))
        await asyncio.sleep(0)  # the thread has it
        tasks = [asyncio.create_task(batcher.submit(i, LIMIT)) for i in range(1, 6)]
        await asyncio.sleep(0)
        refused = [task for task in tasks if task.done()]
        gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        return len(refused), results

    refused, results = run(work())
    assert refused == 2 and results[:4] == [0, 1, 2, 3]
    assert all(isinstance(r, QueueFull) for r in results[4:])


def test_calls_run_alone_and_in_order():
    order = []

    def note(items):
        order.append(list(items))
        time.sleep(0.02)
        return items

    async def work():
        batcher = Batcher(note)
        jobs = [
            batcher.submit(1, LIMIT),
            batcher.submit(2, LIMIT),
            batcher.call(lambda: order.append("call")),
            batcher.submit(3, LIMIT),
        ]
        await asyncio.gather(*map(asyncio.ensure_future, jobs))
        with pytest.raises(ZeroDivisionError):
            await batcher.call(lambda: 1 / 0)

    run(work())
    assert order == [[1], [2], "call", [3]]


def test_costly_entries_run_alone_in_turn_with_batches_of_the_others():
    ran, gate = [], threading.Event()

    def note(items):
        ran.append(list(items))
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(note, max_batch=3, max_cost=10)
        tasks = [asyncio.ensure_future(batcher.submit("first", LIMIT))]
        await until(lambda: ran)
        costly = [batcher.submit(f"costly{n}", LIMIT, cost=11) for n in range(3)]
        light = [batcher.submit(f"light{n}", LIMIT, cost=3) for n in range(6)]
        tasks += [asyncio.ensure_future(one) for one in (*costly, *light)]
        await until(lambda: batcher.waiting == 9)
        gate.set()
        answers = await asyncio.gather(*tasks)
        batcher.close()
        return answers

    answers = run(work())
    assert answers == ["first", *(f"costly{n}" for n in range(3)), *(f"light{n}" for n in range(6))]
    assert ran == [
        ["first"], ["costly0"], ["light0", "light1", "light2"], ["costly1"], ["light3", "light4", "light5"], ["costly2"],
    ]  # fmt: skip


def test_a_batch_ends_where_its_cost_does():
    ran, gate = [], threading.Event()

    def note(items):
        ran.append(list(items))
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(note, max_cost=10)
        tasks = [asyncio.ensure_future(batcher.submit(0, LIMIT))]
        await until(lambda: batcher._busy)
        tasks += [
            asyncio.ensure_future(batcher.submit(n, LIMIT, cost)) for n, cost in enumerate((4, 6, 1, 10, 0, 0), start=1)
        ]
        await until(lambda: batcher.waiting == 6)
        gate.set()
        await asyncio.gather(*tasks)

    run(work())
    assert ran == [[0], [1, 2], [3], [4, 5, 6]]


def test_costly_entries_are_never_run_on_the_loop():
    threads = []

    async def work():
        batcher = Batcher(
            lambda items: threads.append(threading.get_ident()) or items, max_cost=10, inline=lambda _: True
        )
        await batcher.submit(1, LIMIT, cost=10)
        await batcher.submit(2, LIMIT, cost=11)

    run(work())
    assert threads[0] == threading.get_ident() != threads[1]


def test_costly_entries_that_are_late_or_given_up_are_not_run():
    ran, gate = [], threading.Event()

    def note(items):
        ran.extend(items)
        happens(gate, "the test lets the batch go on")
        return items

    async def work():
        batcher = Batcher(note, max_cost=10)
        first = asyncio.ensure_future(batcher.submit(0, LIMIT))
        await until(lambda: ran)
        late = asyncio.ensure_future(batcher.submit(1, 0.05, cost=11))
        gone = asyncio.ensure_future(batcher.submit(2, LIMIT, cost=11))
        last = asyncio.ensure_future(batcher.submit(3, LIMIT, cost=11))
        await asyncio.sleep(0)
        gone.cancel()
        results = await asyncio.gather(late, return_exceptions=True)
        gate.set()
        return results, await first, await last

    (late,), first, last = run(work())
    assert isinstance(late, DeadlineExceeded) and (first, last) == (0, 3) and ran == [0, 3]


def test_an_earlier_deadline_that_comes_later_is_kept():
    gate = threading.Event()

    async def work():
        batcher = Batcher(lambda items: happens(gate, "the test lets the batch go on") or items)
        tasks = [asyncio.ensure_future(batcher.submit(n, LIMIT)) for n in range(3)]
        await until(lambda: batcher._busy)
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(3, 0.1)  # though the worker is stuck, and the others have time
        gate.set()
        return await asyncio.gather(*tasks)

    assert run(work()) == [0, 1, 2]


def test_each_kind_has_a_queue_of_its_own():
    gate = threading.Event()

    async def work():
        batcher = Batcher(
            lambda items: happens(gate, "the test lets the batch go on") or items, max_queue=2, max_cost=10
        )
        tasks = [asyncio.ensure_future(batcher.submit(0, LIMIT))]
        await until(lambda: batcher._busy)
        tasks += [asyncio.ensure_future(batcher.submit(n, LIMIT, cost=11)) for n in range(4)]
        tasks += [asyncio.ensure_future(batcher.submit(n, LIMIT)) for n in range(4)]
        await until(lambda: batcher.waiting == 4)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(work())
    assert [isinstance(one, QueueFull) for one in results] == [False, *[False, False, True, True] * 2]


def test_closing_refuses_costly_entries_too():
    gate = threading.Event()

    async def work():
        batcher = Batcher(lambda items: happens(gate, "the test lets the batch go on") or items, max_cost=10)
        running = asyncio.ensure_future(batcher.submit(0, LIMIT))
        await until(lambda: batcher._busy)
        waiting = asyncio.ensure_future(batcher.submit(1, LIMIT, cost=11))
        await asyncio.sleep(0)
        batcher.close()
        gate.set()
        return await asyncio.gather(running, waiting, return_exceptions=True)

    first, second = run(work())
    assert first == 0 and isinstance(second, QueueFull)
