"""Triton kernels in the checking interpreter, against the float64 oracle; ``test_interpreter_checks.py`` seeds faults.

Triton interprets for a whole process or not at all, so these run where TRITON_INTERPRET=1 is set before Python starts;
``test_triton_runs.py`` starts such a process.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter_checks
import kernel_cases
import test_catalog
import test_checkpointing
import test_pairs
import test_sampled
import test_topk
from ops_cases import LOW, biases, emulated_operators, ids, names, row_lists, rows
from test_contract import Case, forward_operators, raw_calls
from torch.utils._python_dispatch import TorchDispatchMode

import recbole_llm_kernels as kernels
from recbole_llm_kernels import backends, ops, optim, pair_ops, reference
from recbole_llm_kernels.triton_ops import pairs, segment_sum, slopes, targets, topk, tuning

interpreter_checks.install()

DTYPES = [torch.float32, *LOW]


@pytest.fixture(autouse=True)
def programs_in_any_order():
    with interpreter_checks.program_order(11):
        yield


# --- kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", ["pair_dot", "pair_sigmoid", "pair_bce"])
def test_pairs_against_the_oracle(name, dtype):
    operands, ids = test_pairs.make(70, 9, 13, 40, dtype, True)
    y = test_pairs.labels(ids[1], operands[2])
    sigma = torch.sigmoid
    extra, sizes = {
        "pair_dot": ((), lambda s: (torch.ones_like(s), torch.ones_like(s))),
        "pair_sigmoid": ((), lambda s: (sigma(s) * sigma(-s), sigma(s))),
        "pair_bce": ((y,), test_pairs.bce_sizes(y)),
    }[name]
    options = dict(reduction="mean", weight=torch.rand(70)) if name == "pair_bce" else {}
    test_pairs.check(name, "triton", operands, ids, extra, sizes, **options)


def test_places_are_counted_as_they_are_sorted(monkeypatch):
    """Few pairs are ordered by counting, many by a stable sort: the same keys and order, pairs without gradient last."""
    user_id, item_id = ids(7, (300,), 1), ids(40, (300,), 2)
    user_id[[5, 200]], item_id[[9, 290]] = 7, -1  # out of range
    given = user_id, item_id, biases(40), 7, 40, [True, False, True]
    counted = pairs.order_pairs(*given)
    monkeypatch.setattr(tuning, "COUNTED_PAIRS", 0)
    for a, b in zip(counted, pairs.order_pairs(*given), strict=True):
        assert torch.equal(a.key, b.key.long()) and torch.equal(a.order, b.order)
        assert (a.key.diff() >= 0).all() and (a.key[-4:] >= 7).all()


# what a device is kept busy with by an operation of PyTorch: nothing for views and fresh memory
NO_LAUNCH = {"aten::detach", "aten::view", "aten::empty", "aten::empty_like", "aten::select", "aten::expand", "aten::t",
             "aten::unbind", "aten::alias", "aten::new_empty", "aten::slice", "aten::squeeze", "aten::unsqueeze"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Operations of PyTorch that launch something; those of the interpreter itself are not counted."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        if name not in NO_LAUNCH and not interpreter_checks.launching:
            self.found.append(name)
        return function(*args, **kwargs or {})


def test_a_small_batch_of_pairs_takes_ten_launches(monkeypatch):
    """Forward and backward, fills included, and nothing reads a value back."""
    monkeypatch.undo()  # fresh buffers stay as they are: no fills that the code has not asked for
    monkeypatch.setattr(backends, "synchronising_checks", lambda device: False)  # as on a GPU
    for module in (ops, pair_ops):
        monkeypatch.setattr(module, "synchronising_checks", lambda device: False)
    user, item = (rows(50, 16, torch.float32, seed).requires_grad_() for seed in (0, 1))
    user_id, item_id, label = ids(50, (200,), 2), ids(50, (200,), 3), torch.ones(200)
    one = torch.ones(())
    before = interpreter_checks.launches
    with Launches() as operations:
        kernels.pair_bce(user, item, user_id, item_id, label, backend="triton").backward()
    assert operations.found == [
        "recbole_llm_kernels::pair_bce",
        "aten::ones_like",
        "recbole_llm_kernels::pair_backward",
    ]
    # the pairs, their places, and for each matrix the sums of chunks and over chunks
    assert interpreter_checks.launches - before == 6
    with Launches() as operations, torch.no_grad():
        _, slope = pairs.pair_bce_fwd(user, item, user_id, item_id, label, None, None, "mean")
        pairs.pair_bwd(one, slope, user, item, user_id, item_id, None, [True, True, False])
    assert sorted(operations.found) == ["aten::mean", "aten::zeros", "aten::zeros"]


@pytest.mark.parametrize("G", [1, 40, 130, 20_000])
def test_the_largest_keys_are_found_without_a_sort(G):
    """Many equal keys, of which the first count; negative ones; more than a block holds."""
    keys = torch.randint(-7, 7, (3, G), dtype=torch.int32)
    keys[0] = torch.iinfo(torch.int32).max - torch.arange(G, dtype=torch.int32)
    keys[1, : G // 2] = torch.iinfo(torch.int32).min
    for k in {1, min(G, 20), G}:
        want = keys.sort(dim=1, descending=True, stable=True).indices[:, :k].sort().values
        assert torch.equal(topk.largest(keys, k), want)


class Waits(TorchDispatchMode):
    """Operations of PyTorch that on a device would read a value back, or copy one from the host."""

    READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount"}

    def __init__(self):
        super().__init__()
        self.found, self.numbers = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if interpreter_checks.launching:
            return result
        name = function.name()
        if (
            name == "aten::lift_fresh"
        ):  # a Python number, in host memory; kept alive, so that its identity stays its own
            self.numbers.append(result)
        indices = args[1] if name.split(".")[0] in ("aten::index", "aten::index_put_", "aten::index_put") else ()
        if (
            name in self.READS
            or name == "aten::repeat_interleave.Tensor"
            or any(x is not None and x.dtype == torch.bool for x in indices)
            or (name == "aten::copy_" and any(args[1] is x for x in self.numbers))
        ):
            self.found.append(name)
        return result


def test_nothing_waits_for_the_device(monkeypatch):
    """Every operator and its backward, watched below the registration; the rules see what they are meant to."""
    monkeypatch.setattr(backends, "synchronising_checks", lambda device: False)  # as on a GPU
    for module in (ops, pair_ops):
        monkeypatch.setattr(module, "synchronising_checks", lambda device: False)
    every, operators = [True] * 3, set()
    for operator, args in raw_calls("triton"):
        operators.add(operator)
        with Waits() as watched, torch.no_grad():
            result = operator._init_fn(*args)
            backward = getattr(ops, f"{operator._name}_backward", None)
            if backward is not None:
                backward._init_fn(torch.ones_like(result[0]), list(result[1:]), *args)
            elif operator is not ops.score_topk:
                value, slope = result if isinstance(result, tuple) else (result, None)
                pair_ops.pair_backward._init_fn(torch.ones_like(value), slope, *args[:5], every, "triton")
        assert not watched.found, (operator._name, watched.found)
    assert operators == forward_operators()
    monkeypatch.setattr(optim, "synchronising_checks", lambda device: False)
    for name, step in kernel_cases.steps(Case(), *Case().leaves, backend="triton").items():
        with Waits() as watched:
            step()
        assert not watched.found, (name, watched.found)
    x, faults = torch.ones(4), [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.__setitem__(0, 0)]
    faults += [lambda x: x.__setitem__(x > 0, 1.0), lambda x: x.nonzero(), lambda x: x.repeat_interleave(x.long())]
    for fault in faults:
        with Waits() as watched:
            fault(x)
        assert watched.found
    with Waits() as watched:
        x[:1] = 0
    assert not watched.found


@pytest.mark.parametrize("hot", [False, True], ids=["many", "hot"])
def test_segments_cross_chunks(hot):
    """Segments inside a chunk, over a boundary, over whole chunks, and one over all of them; D in two pieces."""
    P, n_out, D = 330, 1 if hot else 12, 130
    out_id, in_id = torch.randint(n_out, (P,)), torch.randint(7, (P,))
    value, source = torch.randn(P), torch.randn(7, D)
    got = segment_sum.segment_sum(out_id, in_id, value, source, n_out, torch.float32)
    terms = value.double()[:, None] * source.double()[in_id]
    zero = torch.zeros(n_out, D, dtype=torch.float64)
    want, size = zero.index_add(0, out_id, terms), zero.index_add(0, out_id, terms.abs())
    assert ((got.double() - want).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("name", test_catalog.LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_catalogue_against_the_oracle(name, dtype):
    """Two row blocks, column tiles in two parts, several targets in one mark, one row that targets everything."""
    options = dict(neg_weight=0.3) if name == "catalog_bce" else {}
    operands, row_targets = test_catalog.make(70, 1100, 20, 9, dtype)
    test_catalog.check(name, "triton", operands, row_targets, reduction="none", weight=torch.rand(70), **options)
    test_catalog.check(name, "triton", *test_catalog.make(7, 5, 3, 5, dtype), reduction="mean")


@pytest.mark.parametrize("name", test_catalog.LOSSES)
def test_catalogue_wider_than_a_tile(name):
    test_catalog.check(name, "triton", *test_catalog.make(20, 90, 200, 3, torch.float32), reduction="sum")


class Pieces:
    """The pieces that passes over tiles are cut in; those of wide vectors are small, and columns have parts."""

    def __init__(self, monkeypatch):
        self.made = []
        monkeypatch.setattr(slopes, "ENTRIES", 32 * 256)
        monkeypatch.setattr(slopes, "WIDTH", 256)
        monkeypatch.setattr(tuning, "INTERPRETER", tuning.INTERPRETER._replace(processors=8))
        whole = slopes.Workspace.__init__

        def init(workspace, *args):
            whole(workspace, *args)
            self.made.append(workspace)

        monkeypatch.setattr(slopes.Workspace, "__init__", init)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", test_catalog.LOSSES)
def test_pieces_of_wide_vectors_add_up(name, dtype, monkeypatch):
    """Pieces of rows and of columns, parts of a piece, weighted negatives; each logit is in one piece."""
    pieces = Pieces(monkeypatch)
    options = dict(neg_weight=0.3) if name == "catalog_bce" else {}
    operands, row_targets = test_catalog.make(70, 600, 130, 9, dtype)
    test_catalog.check(name, "triton", operands, row_targets, reduction="none", weight=torch.rand(70), **options)
    assert len(pieces.made) == 2
    assert dtype != torch.float32 or max(x.products for x in pieces.made) > 1
    for workspace in pieces.made:
        R, C = workspace.rows.length, workspace.cols.length
        covered = torch.zeros(R, C)
        for lo, hi, first, last in workspace.pieces:
            covered[lo:hi, first:last] += 1
        assert (covered == 1).all() and workspace.entries.shape[1:].numel() <= 128 * slopes.WIDTH
    cuts = [{x[0] for x in w.pieces} for w in pieces.made], [{x[2] for x in w.pieces} for w in pieces.made]
    assert all(max(map(len, of)) > 1 for of in cuts)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_pieces_of_wide_shared_negatives_add_up(dtype, monkeypatch):
    """Columns by their ids, hits left out by key, a mask of what counts."""
    pieces = Pieces(monkeypatch)
    operands, row_ids = test_sampled.make(40, 300, 70, 300, 130, dtype, True)
    options = test_sampled.everything(operands, 40, 300, True, per_row=True)
    test_sampled.check("triton", operands, row_ids, reduction="none", **options)
    assert max(len(x.pieces) for x in pieces.made) > 1


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_catalogue_at_lower_precision(precision):
    """The interpreter multiplies exactly, so only bfloat16 slopes, rounded once at "medium", are seen here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        test_catalog.check("catalog_bce", "triton", *test_catalog.make(20, 90, 24, 3, torch.float32))
        rounded = pytest.raises(AssertionError, match="gradient") if precision == "medium" else nullcontext()
        with rounded:
            test_catalog.check("catalog_bce", "triton", *test_catalog.make(20, 90, 24, 3, torch.bfloat16))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", test_catalog.LOSSES)
def test_trained_catalogue(name):
    test_catalog.check(name, "triton", *test_catalog.trained(20, 200, 24, torch.float32), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_sampled_against_the_oracle(shared, dtype):
    operands, row_ids = test_sampled.make(40, 19, 7, 60, 20, dtype, shared)
    options = test_sampled.everything(operands, 40, 19, shared, per_row=shared)
    test_sampled.check("triton", operands, row_ids, reduction="none", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", emulated_operators())
def test_operators_against_the_oracle(name, dtype):
    """What else there is, as the emulator runs it; two widths, one of them no power of two."""
    for D in (20, 64):
        emulated_operators()[name](dtype, D)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", [(5, 200, 20, 3), (20, 200, 20, 3), (3, 40, 3, 39), (2, 6, 8, 20)], ids=str)
def test_topk_against_the_oracle(shape, dtype):
    """Fewer groups wanted than there are, by few queries and by more; all of them; more places than items."""
    test_topk.test_ids_and_ties_are_exact("triton", shape, dtype)


@pytest.mark.parametrize("name", [*Case().calls(), "score_topk"])
def test_program_order_changes_nothing(name):
    case, runs = Case(), []
    for seed in (None, 1, 2):
        with interpreter_checks.program_order(seed):
            if name == "score_topk":
                runs.append(kernels.score_topk(*case.leaves[:2], 5, item_bias=case.leaves[2], backend="triton"))
                continue
            leaves = case.fresh()
            value = case.calls("triton")[name](*leaves)
            runs.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("number", range(9))
def test_ids_out_of_range_are_masked(number, monkeypatch):
    """As on a GPU, where nothing looks at ids first: every access stays inside, the loss is NaN, gradients exist."""
    from test_contract import bad_ids

    monkeypatch.setattr(backends, "synchronising_checks", lambda device: False)
    for module in (ops, pair_ops):
        monkeypatch.setattr(module, "synchronising_checks", lambda device: False)
    case = Case()
    case.leaves = case.fresh()
    result = bad_ids(case)[number][1](backend="triton")
    value = result.scores if isinstance(result, kernels.TopK) else result
    assert value.isnan().any()
    if value.requires_grad:
        torch.autograd.grad(value.sum(), case.leaves[:2])


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors recomputed", "reentrant"])
@pytest.mark.parametrize("name", Case().calls())
def test_activation_checkpointing(name, reentrant):
    test_checkpointing.test_gradients_under_checkpointing("triton", name, reentrant)


def test_marks_name_every_target_once():
    """Runs of a tile within a block of entries and over several; ids more than once; 32-bit lists."""
    for B, N, most, times in ((5, 200, 30, 1), (1, 1, 30, 1), (3, 700, 300, 1), (40, 65, 30, 3), (0, 5, 30, 1)):
        offsets, ids = row_lists(B, N, most, 3, dtype=torch.int64 if B == 5 else torch.int32)
        hot = reference._multi_hot(offsets, ids, B, N)
        offsets, ids = times * offsets, ids.repeat_interleave(times)
        for marks, want in (
            (targets.mark(offsets, ids, N), hot),
            (targets.mark_transposed(offsets, ids, N), hot.T),
        ):
            got = torch.zeros_like(want)
            for row in range(len(want)):
                entries = range(int(marks.starts[row]), int(marks.ends[row]))
                tiles = [int(marks.tiles[e]) for e in entries]
                assert tiles == sorted(set(tiles))
                for e, tile in zip(entries, tiles, strict=True):
                    bits = int(marks.bits[e])
                    columns = [targets.TILE * tile + c for c in range(targets.TILE) if bits >> c & 1]
                    assert columns
                    got[row, columns] = True
            assert torch.equal(got, want)


def test_every_launch_is_watched():
    before = interpreter_checks.launches
    case = Case()
    case.calls("triton")["pair_dot"](*case.leaves)
    assert interpreter_checks.launches == before + 1
