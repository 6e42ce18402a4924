"""What only a card shows: nothing waits for the device, streams and graphs work, launches and memory are as promised."""

import kernel_cases
import pytest
import torch
from ops_cases import ids, rows
from test_contract import Case

import recbole_llm_kernels as kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPERATORS = list(Case().calls())
STEPS = list(kernel_cases.steps(Case(), *Case().leaves))


@pytest.fixture(autouse=True)
def real_buffers(monkeypatch):
    """Buffers as the code asks for them: poisoning them would add launches."""
    monkeypatch.undo()


def step(call, leaves):
    value = call(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def work(case, name, backend):
    """A training step of an operator on fresh leaves, or what is called otherwise."""
    if name in STEPS:
        return kernel_cases.steps(case, *case.leaves, backend=backend)[name]
    call, leaves = case.calls(backend)[name], case.fresh()
    return lambda: step(call, leaves)


@pytest.mark.parametrize("name", [*OPERATORS, *STEPS])
def test_nothing_waits_for_the_device(name, backend):
    if backend == "torch" and name.startswith(("catalog", "score", "rowwise")):
        pytest.skip("the torch backend reads row lists, or the number of rows that are touched, back once a call")
    run = work(Case(), name, backend)
    run()  # compilation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPERATORS)
def test_a_stream_of_its_own(name):
    """Work is queued on the current stream: on another one the results are the same, bit for bit."""
    case = Case()
    call, leaves = case.calls("triton")[name], case.fresh()
    first = step(call, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = step(call, leaves)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def captured(run):
    """A graph of ``run`` and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compilation is no part of a graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("name", [*OPERATORS, *STEPS])
def test_a_step_is_captured_in_a_graph(name):
    """A replay on other ids and other vectors, copied into the captured tensors, is a call on them, bit for bit."""
    case, other = Case(), Case()
    with torch.no_grad():
        other.leaves[0].neg_()
    other.user_id, other.pos, other.label = other.user_id.flip(0), other.pos.flip(0), other.label.flip(0)
    other.neg, other.shared = other.neg.flip(0), other.shared.flip(0)
    sizes = other.targets[0].diff().flip(0)
    other.targets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), other.targets[1]  # rows of other lengths
    lists = zip(other.targets[0][:-1].tolist(), other.targets[0][1:].tolist(), strict=True)
    other.targets = other.targets[0], torch.cat([other.targets[1][a:b].sort().values for a, b in lists])
    want = work(other, name, "triton")()

    leaves = case.leaves if name in STEPS else case.fresh()
    case.fresh = lambda: leaves
    graph, result = captured(work(case, name, "triton"))
    with torch.no_grad():
        leaves[0].copy_(other.leaves[0])
        for attribute in ("user_id", "pos", "label", "neg", "shared"):
            getattr(case, attribute).copy_(getattr(other, attribute))
        for mine, new in zip(case.targets, other.targets, strict=True):
            mine.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


def test_a_small_batch_of_pairs_takes_ten_launches():
    user, item = (rows(10_000, 64, torch.float32, seed).requires_grad_() for seed in (0, 1))
    user_id, item_id, label = ids(10_000, (2048,), 2), ids(10_000, (2048,), 3), torch.ones(2048, device="cuda")

    def run():
        user.grad = item.grad = None
        kernels.pair_bce(user, item, user_id, item_id, label).backward()

    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) <= 10, on_device


@pytest.mark.parametrize("name", ["catalog_bce", "catalog_ce"])
def test_the_logits_are_never_allocated(name):
    """[1024, 200,000] float32 logits would take 781 MiB; the gradients take 49."""
    query, item = rows(1024, 64, torch.float32, 0), rows(200_000, 64, torch.float32, 1)
    leaves, targets = (
        [x.requires_grad_() for x in (query, item)],
        (torch.arange(1025, device="cuda"), ids(200_000, (1024,), 2)),
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(lambda q, i: getattr(kernels, name)(q, i, *targets), leaves)
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_tensors_device_need_not_be_the_current_one():
    case = Case()
    first = step(case.calls("triton")["pair_dot"], case.fresh())
    case.leaves = [x.to("cuda:1") for x in case.leaves]
    case.user_id, case.pos = case.user_id.to("cuda:1"), case.pos.to("cuda:1")
    second = step(case.calls("triton")["pair_dot"], case.fresh())
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(first, second, strict=True))
