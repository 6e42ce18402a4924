"""What all operators promise beside their numbers: registration, compilation, autocast, gradients asked for, errors."""

import ast
import re
import subprocess
import sys
import threading
from pathlib import Path

import kernel_cases
import pytest
import torch
from ops_cases import DEVICE, LOW, biases, generator, ids, inside, names, raw_calls_of_operators, row_lists, rows
from torch.library import CustomOpDef
from waiting import LIMIT, join

import recbole_llm_kernels as kernels
from recbole_llm_kernels import backends, ops, pair_ops, reference
from recbole_llm_kernels.torch_ops import threads as pool

ROOT = Path(__file__).resolve().parents[2]
B, K, M, N, D = 40, 7, 30, 60, 12


class Case:
    """One call of every operator on shared data; ``leaves`` are the matrices and the bias."""

    def __init__(self, dtype=torch.float32, scale=1.0):
        self.leaves = [rows(B, D, dtype, 0, scale), rows(N, D, dtype, 1, scale), biases(N, seed=5)]
        allowed = inside(self.leaves[2])
        self.user_id, self.pos = ids(B, (B,), 2), allowed[ids(len(allowed), (B,), 3)]
        self.neg, self.shared = ids(N, (B, K), 4), ids(N, (M,), 5)
        self.label = torch.rand(B, generator=generator(6)).to(DEVICE)
        self.targets = row_lists(B, N, 5, 7, allowed)

    def calls(self, backend="auto", library=kernels, **options):
        """Name -> function of (user or query, item, bias)."""
        if library is kernels:
            options["backend"] = backend
        return kernel_cases.calls(self, library, **options)

    def fresh(self):
        return [x.detach().clone().requires_grad_() for x in self.leaves]


OPERATORS = list(Case().calls())


@pytest.mark.parametrize("name", OPERATORS)
def test_every_subset_of_gradients(backend, name):
    """A subset's gradients are those of the whole set, bit for bit, and without any the loss is the same."""
    case = Case()
    call = case.calls(backend)[name]
    leaves = case.fresh()
    value = call(*leaves)
    whole = torch.autograd.grad(value.sum(), leaves)
    for subset in range(8):
        wanted = [bool(subset >> bit & 1) for bit in range(3)]
        some = [x.detach().clone().requires_grad_(w) for x, w in zip(leaves, wanted, strict=True)]
        again = call(*some)
        assert torch.equal(again, value) and again.requires_grad == any(wanted)
        if any(wanted):
            got = iter(torch.autograd.grad(again.sum(), [x for x in some if x.requires_grad]))
            assert all(torch.equal(next(got), g) for g, w in zip(whole, wanted, strict=True) if w)
    with torch.no_grad():
        assert torch.equal(call(*leaves), value)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable(backend, name, threads):
    case = Case()
    call = case.calls(backend)[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(5):
            leaves = case.fresh()
            value = call(*leaves)
            runs.append([value, *torch.autograd.grad(value.sum(), leaves)])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_deterministic_algorithms_are_enough(backend, name):
    case = Case()
    leaves = case.fresh()
    torch.use_deterministic_algorithms(True)
    try:
        case.calls(backend)[name](*leaves).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPERATORS)
def test_non_contiguous_inputs(backend, name):
    case = Case()
    call = case.calls(backend)[name]
    value = call(*case.leaves)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in case.leaves]
    assert not strided[0].is_contiguous()
    leaves = [x.detach().requires_grad_() for x in strided]
    got, plain = call(*leaves), case.fresh()
    assert torch.equal(got, value)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(call(*plain).sum(), plain), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATORS)
def test_upstream_gradients_add_up(backend, name):
    """The gradient of 3 f + f(again) is 4 times that of f; one graph may be walked twice."""
    case = Case()
    leaves, call = case.fresh(), case.calls(backend)[name]
    value = call(*leaves).sum()
    once = torch.autograd.grad(value, leaves, retain_graph=True)
    twice = torch.autograd.grad(3 * value + call(*leaves).sum(), leaves)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(4 * a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", LOW, ids=names)
def test_autocast_casts_the_matrices_and_nothing_else(backend, name, dtype):
    """Float32 leaves under autocast: the loss is float32 and that of the rounded matrices; gradients are float32."""
    case = Case()
    with torch.autocast(DEVICE, dtype=dtype):
        leaves = case.fresh()
        value = case.calls(backend)[name](*leaves)
    rounded = [x.to(dtype) for x in case.leaves[:2]] + case.leaves[2:]
    assert value.dtype == torch.float32
    assert torch.equal(value, case.calls(backend)[name](*rounded))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(value.sum(), leaves))
    with torch.autocast(DEVICE, dtype=dtype):
        mixed = case.calls(backend)[name](case.leaves[0].to(dtype), *case.leaves[1:])
    assert torch.equal(mixed, value)


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_say_so(backend, name):
    case = Case()
    leaves = case.fresh()
    (grad,) = torch.autograd.grad(case.calls(backend)[name](*leaves).sigmoid().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only.*recbole_llm_kernels.reference"):
        grad.square().sum().backward()
    doubled = [x.double().requires_grad_() for x in case.leaves]
    value = case.calls(library=reference)[name](*doubled).sigmoid().sum()
    (grad,) = torch.autograd.grad(value, doubled[0], create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), doubled[0])[0].isfinite().all()


def raw_calls(backend):
    """Every registered operator with arguments that exercise it."""
    case = Case()
    user, item, bias = case.fresh()
    pair, row_ids = (user, item, case.user_id, case.pos, bias), (case.user_id, case.pos)
    weight, valid = torch.rand(B, device=DEVICE), torch.rand(B, K, device=DEVICE) < 0.8
    every = [True, True, True]
    log_q = torch.randn(N, device=DEVICE)
    yield pair_ops.pair_dot, (*pair, backend)
    yield pair_ops.pair_sigmoid, (*pair, backend)
    for reduction in ("mean", "none"):
        tail = (0.5, reduction, every, backend)
        yield pair_ops.pair_bce, (*pair, case.label, weight, reduction, backend)
        yield ops.sampled_bce, (user, item, bias, *row_ids, case.neg, log_q, valid, weight, *tail)
        yield ops.shared_bce, (user, item, bias, *row_ids, case.shared, log_q, None, weight, *tail)
        yield ops.catalog_bce, (user, item, bias, *case.targets, weight, *tail)
        yield ops.catalog_ce, (user, item, None, *case.targets, None, *tail[1:])
    yield from raw_calls_of_operators(case, backend)
    yield ops.score_topk, (user, item, 3, bias, *case.targets, backend)


RAW = len(list(raw_calls("torch")))


@pytest.mark.parametrize("number", range(RAW))
def test_registration(backend, number):
    """Schema, fake tensors, autograd and ahead-of-time dispatch agree with the real operator."""
    operator, args = list(raw_calls(backend))[number]
    torch.library.opcheck(operator, args)


def forward_operators():
    """Every registered operator that is no backward."""
    defined = {x for module in (ops, pair_ops) for x in vars(module).values() if isinstance(x, CustomOpDef)}
    return {x for x in defined if not x._name.endswith("backward")}


def test_registration_covers_every_operator():
    assert {operator for operator, _ in raw_calls("torch")} == forward_operators()


def test_every_operator_has_all_that_belongs_to_one():
    """As the list in kernels/README.md says: oracle, launchers twice, a case with shapes, a section."""
    readme = (Path(kernels.__file__).parents[1] / "README.md").read_text()
    sections = " ".join(line for line in readme.splitlines() if line.startswith("## "))
    for name in {*kernel_cases.OPERATORS, *(x for x in kernel_cases.calls(Case()) if not x.startswith("shared_"))}:
        assert callable(getattr(kernels, name, None) or getattr(kernels, f"{name}_"))
        assert callable(getattr(reference, name)) and name in sections
        assert name in {x for x, _ in kernel_cases.FULL} or name in ("pair_dot", "pair_sigmoid")
    package = Path(kernels.__file__).parent
    for file in sorted((package / "triton_ops").glob("*.py")):
        if passes := launchers_in(file):
            assert launchers_in(package / "torch_ops" / file.name) >= passes, file.name


def launchers_in(file):
    """Names of what a file defines as a forward or backward pass of an operator."""
    defined = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in defined if name.endswith(("_fwd", "_bwd"))}


def listed_files(operator):
    """The rows of "Add an operator" in kernels/README.md: for each the files it names, as paths below the root."""
    section = (ROOT / "kernels" / "README.md").read_text().split("## Add an operator")[1].split("\n## ")[0]
    for row in re.findall(r"^\| (`.*?) \|", section, re.M):
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = f"kernels/{first}" if first.startswith("recbole_llm_kernels/") else first
        paths = [folder, *(f"{Path(folder).parent}/{name}" for name in others)]
        yield {path.replace("<op>", operator) for path in paths}


def test_an_operator_touches_the_files_of_the_list_and_no_other():
    """Nothing else names ``sampled_ce``, and of every row one file does."""
    listed = list(listed_files("sampled_ce"))
    assert 0 < len(listed) <= 8
    found = {
        path.relative_to(ROOT).as_posix() for path in sources() if "sampled_ce" in path.read_text(encoding="utf-8")
    }
    assert found <= set().union(*listed)
    assert all(len(found & row) == 1 for row in listed)


def sources():
    """What is written by hand of the kernels, their tests and benchmarks, and of what checks them."""
    for place in ("kernels", "tests/ops", "benchmarks", ".github", "docs/generator"):
        for path in (ROOT / place).rglob("*"):
            if path.suffix in (".py", ".md", ".yml") and "results" not in path.parts and path != Path(__file__):
                yield path
    yield ROOT / "pyproject.toml"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(backend, dynamic):
    case = Case()

    def everything(u, i, b):
        losses = [call(u * 1.5, i, b).sum() for call in case.calls(backend).values()]
        return torch.stack(losses).sum(), kernels.score_topk(u, i, 3, item_bias=b, backend=backend).ids

    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    plain, leaves = case.fresh(), case.fresh()
    (want, best), (got, found) = everything(*plain), compiled(*leaves)
    assert torch.equal(found, best)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, plain), strict=True):
        torch.testing.assert_close(a, b)


def test_thread_settings_stay_as_found(monkeypatch):
    """Of this thread, and of threads started later, after calls that start the pool and use it."""
    monkeypatch.setattr(pool, "_pools", {})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        query, item = rows(600, 8, torch.float32, 0), rows(3000, 8, torch.float32, 1)
        offsets, target = row_lists(600, 3000, 3, 2)
        leaves = [x.cpu().requires_grad_() for x in (query, item)]
        kernels.catalog_bce(*leaves, offsets.cpu(), target.cpu(), backend="torch").backward()
        kernels.score_topk(*leaves, 5, backend="torch")
        assert torch.get_num_threads() == 2
        seen = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        join(later)
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_starts_its_own_pool():
    """A pool's threads do not survive a fork, and a thread may hold the lock at that moment; the child waits for neither."""
    code = (
        "import os, signal, sys, threading, time, torch\n"
        "from recbole_llm_kernels.torch_ops import threads\n"
        "torch.set_num_threads(2)\n"
        "jobs = [lambda n=n: n * n for n in range(4)]\n"
        "threads.run(jobs)\n"
        "held = threading.Event()\n"
        "def hold():\n"
        "    with threads._lock:\n"
        "        held.set()\n"
        "        time.sleep(0.2)\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(120)\n"
        "    os._exit(0 if threads.run(jobs) == [0, 1, 4, 9] else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=2 * LIMIT).returncode == 0


# --- errors


def bad_ids(case):
    """Calls with one id out of range, and what the message names."""
    u, i, b = case.leaves
    wrong = torch.full((B,), N, device=DEVICE)
    below = torch.full((B,), -1, device=DEVICE)
    offsets, target = case.targets
    outside = target.clone()
    outside[-1] = N
    return [
        ("user_id holds 40", lambda **o: kernels.pair_bce(u, i, wrong.clamp(max=B), case.pos, case.label, **o)),
        ("item_id holds 60.*60 rows.*40 of 40", lambda **o: kernels.pair_dot(u, i, case.user_id, wrong, **o)),
        ("item_id holds -1", lambda **o: kernels.pair_sigmoid(u, i, case.user_id, below, **o)),
        ("pos_id holds 60", lambda **o: kernels.sampled_bce(u, i, case.user_id, wrong, case.neg, **o)),
        ("neg_id holds -1", lambda **o: kernels.sampled_bce(u, i, case.user_id, case.pos, below[:, None], **o)),
        ("neg_id holds 60", lambda **o: kernels.sampled_bce(u, i, case.user_id, case.pos, wrong, **o)),
        ("target_ids holds 60", lambda **o: kernels.catalog_bce(u, i, offsets, outside, **o)),
        ("target_ids holds 60", lambda **o: kernels.catalog_ce(u, i, offsets, outside, **o)),
        ("seen_ids holds 60", lambda **o: kernels.score_topk(u, i, 3, seen_offsets=offsets, seen_ids=outside, **o)),
    ]


@pytest.mark.parametrize("number", range(9))
def test_ids_out_of_range(backend, number, monkeypatch):
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_DEBUG", "1")
    message, call = bad_ids(Case())[number]
    with pytest.raises(IndexError, match=message):
        call(backend=backend)


@pytest.mark.parametrize("number", range(9))
def test_ids_out_of_range_without_a_synchronisation(number, monkeypatch):
    """As on a GPU: the access is masked, the loss is NaN, nothing raises."""
    monkeypatch.setattr(backends, "synchronising_checks", lambda device: False)
    for module in (ops, pair_ops):
        monkeypatch.setattr(module, "synchronising_checks", lambda device: False)
    _, call = bad_ids(Case())[number]
    result = call(backend="torch")
    assert (result.scores if isinstance(result, kernels.TopK) else result).isnan().any()


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in ("pair_dot", "pair_sigmoid")])
def test_a_target_outside_the_catalogue(backend, name, monkeypatch):
    """An error where ids are looked at, a NaN loss elsewhere."""
    case = Case()
    case.leaves[2][case.pos[0]] = -torch.inf
    case.leaves[2][case.targets[1][0]] = -torch.inf
    case.label[0] = 0.5
    call = case.calls(backend)[name]
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"outside the catalogue \(item_bias is -inf\), for example item"):
        call(*case.leaves)
    for module in (ops, pair_ops):
        monkeypatch.setattr(module, "synchronising_checks", lambda device: False)
    assert call(*case.leaves).isnan()


def test_targets_must_be_in_order(monkeypatch):
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_DEBUG", "1")
    query, item = rows(2, 4, torch.float32, 0), rows(9, 4, torch.float32, 1)

    def call(offsets, target):
        kernels.catalog_bce(query, item, torch.tensor(offsets, device=DEVICE), torch.tensor(target, device=DEVICE))

    call([0, 2, 3], [3, 5, 1])  # descending from one row to the next is fine
    with pytest.raises(ValueError, match="target_ids must ascend within a row, but entries 0 and 1 are 5 and 3"):
        call([0, 2, 3], [5, 3, 1])
    with pytest.raises(ValueError, match="target_offsets must run from 0 to the 3 entries of target_ids, got 0 to 2"):
        call([0, 2, 2], [3, 5, 1])
    with pytest.raises(ValueError, match="target_offsets must not decrease, but it does at row 1"):
        kernels.catalog_bce(
            rows(3, 4, torch.float32, 0),
            item,
            torch.tensor([0, 3, 2, 3], device=DEVICE),
            torch.arange(3, device=DEVICE),
        )


MISTAKES = {
    r"user and item must have equal D, got shapes \(40, 12\) and \(60, 6\)": lambda c, u, i, b: kernels.pair_dot(
        u, i[:, :6], c.user_id, c.pos
    ),
    r"user must be a matrix \[rows, D\].*got shape \(40, 12, 1\)": lambda c, u, i, b: kernels.pair_dot(
        u[:, :, None], i, c.user_id, c.pos
    ),
    "user and item must have one dtype, got torch.float32 and torch.float16": lambda c, u, i, b: kernels.pair_dot(
        u, i.half(), c.user_id, c.pos
    ),
    "query must be float32, bfloat16, float16 or float64, got torch.int64": lambda c, u, i, b: kernels.score_topk(
        u.long(), i, 3
    ),
    "user_id must be int32 or int64, got torch.float32; convert it": lambda c, u, i, b: kernels.pair_dot(
        u, i, c.user_id.float(), c.pos
    ),
    r"item_id must be 1-dimensional, got shape \(40, 1\)": lambda c, u, i, b: kernels.pair_dot(
        u, i, c.user_id, c.pos[:, None]
    ),
    "user_id and item_id must have one entry per pair, got 40 and 39": lambda c, u, i, b: kernels.pair_dot(
        u, i, c.user_id, c.pos[1:]
    ),
    r"item_bias must have shape \(60,\), one per item, got \(59,\)": lambda c, u, i, b: kernels.pair_dot(
        u, i, c.user_id, c.pos, item_bias=b[1:]
    ),
    "label requires a gradient, but only matrices and item_bias get one": lambda c, u, i, b: kernels.pair_bce(
        u, i, c.user_id, c.pos, c.label.clone().requires_grad_()
    ),
    r"weight must have shape \(40,\), one per pair, got \(2,\)": lambda c, u, i, b: kernels.pair_bce(
        u, i, c.user_id, c.pos, c.label, weight=torch.ones(2)
    ),
    "reduction must be one of mean, sum, none, got 'avg'": lambda c, u, i, b: kernels.pair_bce(
        u, i, c.user_id, c.pos, c.label, reduction="avg"
    ),
    "backend must be one of auto, triton, torch, got 'cuda'": lambda c, u, i, b: kernels.pair_dot(
        u, i, c.user_id, c.pos, backend="cuda"
    ),
    r"neg_id must be \[B, K\] with B = 40 as user_id, or \[M\] shared": lambda c, u, i, b: kernels.sampled_bce(
        u, i, c.user_id, c.pos, c.neg[1:]
    ),
    r"neg_valid must be bool of shape \(40, 7\), got torch.float32": lambda c, u, i, b: kernels.sampled_bce(
        u, i, c.user_id, c.pos, c.neg, neg_valid=torch.ones(B, K)
    ),
    r"neg_valid must be bool of shape \(30,\) or \(40, 30\)": lambda c, u, i, b: kernels.sampled_bce(
        u, i, c.user_id, c.pos, c.shared, neg_valid=torch.ones(B, K) > 0
    ),
    "neg_weight must be a finite number of at least 0, got -1": lambda c, u, i, b: kernels.catalog_bce(
        u, i, *c.targets, neg_weight=-1
    ),
    "neg_weight must be a finite number of at least 0, got nan": lambda c, u, i, b: kernels.catalog_bce(
        u, i, *c.targets, neg_weight=float("nan")
    ),
    "target_offsets must have one entry per row and one more, 41 for 40 rows, got 40": lambda c, u, i, b: (
        kernels.catalog_ce(u, i, c.targets[0][1:], c.targets[1])
    ),
    "k must be a whole number of at least 1, got 0": lambda c, u, i, b: kernels.score_topk(u, i, 0),
    "seen_offsets was given without seen_ids": lambda c, u, i, b: kernels.score_topk(
        u, i, 3, seen_offsets=c.targets[0]
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        MISTAKES[message](case, *case.leaves)


def test_devices_must_agree():
    case = Case()
    u, i, _ = case.leaves
    with pytest.raises(ValueError, match="item_id must be on .* like the first matrix, got meta"):
        kernels.pair_dot(u, i, case.user_id, case.pos.to("meta"))
