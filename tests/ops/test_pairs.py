"""pair_dot, pair_sigmoid and pair_bce against the float64 oracle."""

import pytest
import torch
from ops_cases import (
    A_FEW,
    DEVICE,
    LOW,
    REDUCTIONS,
    assert_within,
    biases,
    differentiate,
    eps,
    generator,
    ids,
    names,
    rows,
    skip_unsupported,
    sum_rows,
    truth,
    upstream,
)

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

# (pairs, users, items, dim): one full tile; ragged in every axis; wide rows; one hot item and a long sum; one pair;
# no pairs; one dimension
SHAPES = [(64, 50, 70, 64), (1000, 37, 211, 60), (129, 40, 40, 200), (2100, 300, 1, 3), (1, 1, 1, 8), (0, 3, 3, 8)]
RAGGED_D = [1, 3, 60, 64, 100, 128, 200, 256, 512]


def make(P, n_users, n_items, D, dtype, bias, scale=3.0, id_dtype=torch.int64):
    user, item = rows(n_users, D, dtype, 0, scale), rows(n_items, D, dtype, 1, scale)
    user_id, item_id = ids(n_users, (P,), 2, id_dtype), ids(n_items, (P,), 3, id_dtype)
    return (user, item, biases(n_items) if bias else None), (user_id, item_id)


def labels(item_id, bias):
    """Hard and soft labels; 0 where the item is outside the catalogue."""
    y = torch.rand(len(item_id), generator=generator(4)).to(DEVICE)
    y = torch.where(y < 0.3, 0, torch.where(y > 0.7, 1, y))
    return y if bias is None else y.masked_fill(bias[item_id.long()] == -torch.inf, 0)


def check(name, backend, operands, pair_ids, extra, slope_size, **options):
    """Value and gradients within rounding of the oracle; ``slope_size`` maps float64 logits to |slope| and |value|."""
    user, item, bias = operands
    user_id, item_id = pair_ids
    shape = () if options.get("reduction") in ("mean", "sum") else user_id.shape
    grad = upstream(shape)
    function = getattr(kernels, name)
    got, grads = differentiate(function, operands, (*pair_ids, *extra), grad, backend=backend, **options)
    want, wanted = truth(name, operands, (*pair_ids, *extra), grad, **options)

    u, i = user.double()[user_id.long()], item.double()[item_id.long()]
    b = torch.zeros(len(item)).to(user) if bias is None else bias
    b = b.double()[item_id.long()]
    delta = A_FEW * eps(user.dtype) * ((u.abs() * i.abs()).sum(1) + b.abs() + 1)
    live = b != -torch.inf
    slope, size = slope_size((u * i).sum(1) + b)
    slope, size, delta = (torch.where(live, x, 0) for x in (slope, size, delta))
    factor = 1 if options.get("weight") is None else options["weight"].double()
    if options.get("reduction") == "mean":
        factor = factor / len(user_id)
    value_bound = delta * size * factor
    assert_within(got, want, value_bound.sum() if shape == () else value_bound, name)
    spread = delta * slope * factor * grad.double().abs()
    assert_within(grads[0], wanted[0], sum_rows(user_id, spread[:, None] * i.abs(), len(user)), "user gradient")
    assert_within(grads[1], wanted[1], sum_rows(item_id, spread[:, None] * u.abs(), len(item)), "item gradient")
    if bias is not None:
        assert_within(grads[2], wanted[2], sum_rows(item_id, spread, len(item)), "bias gradient")


def bce_sizes(y):
    """|slope| and the value's own sensitivity, term by term: nothing cancels inside either bound."""
    y = y.double()

    def sizes(s):
        finite = torch.where(s == -torch.inf, 0, s)
        slope = (1 - y) * torch.sigmoid(finite) + y * torch.sigmoid(-finite)
        return slope, slope + (1 - y) * -torch.nn.functional.logsigmoid(-finite)

    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "P{}-U{}-I{}-D{}".format(*s))
def test_pair_bce(backend, shape, bias, dtype):
    skip_unsupported(backend, dtype)
    operands, pair_ids = make(*shape, dtype, bias)
    y = labels(pair_ids[1], operands[2])
    check("pair_bce", backend, operands, pair_ids, (y,), bce_sizes(y), reduction="none")


@pytest.mark.parametrize("D", RAGGED_D)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_pair_bce_at_every_width(backend, D, dtype):
    operands, pair_ids = make(150, 20, 30, D, dtype, True)
    y = labels(pair_ids[1], operands[2])
    check("pair_bce", backend, operands, pair_ids, (y,), bce_sizes(y), reduction="sum")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=names)
def test_pair_bce_reductions(backend, reduction, weighted, id_dtype):
    operands, pair_ids = make(777, 30, 50, 16, torch.float32, True, id_dtype=id_dtype)
    y = labels(pair_ids[1], operands[2])
    weight = torch.rand(777, generator=generator(6)).to(DEVICE) if weighted else None
    check("pair_bce", backend, operands, pair_ids, (y,), bce_sizes(y), reduction=reduction, weight=weight)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "P{}-U{}-I{}-D{}".format(*s))
def test_pair_dot_and_sigmoid(backend, shape, dtype):
    skip_unsupported(backend, dtype)
    operands, pair_ids = make(*shape, dtype, True)
    check("pair_dot", backend, operands, pair_ids, (), lambda s: (torch.ones_like(s), torch.ones_like(s)))
    sigma = torch.sigmoid
    check("pair_sigmoid", backend, operands, pair_ids, (), lambda s: (sigma(s) * sigma(-s), sigma(s)))


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_confident_pairs_keep_relative_precision(backend, y):
    """log(1 + exp(-s)) and sigma(s) - 1 both round to zero from s = 17 on; neither the loss nor its slope may."""
    s = torch.arange(-90, 90.01, 0.05, device=DEVICE)[:, None]
    one, number = torch.ones(1, 1, device=DEVICE), torch.arange(len(s), device=DEVICE)
    label, zero = torch.full((len(s),), y, device=DEVICE), torch.zeros(len(s), dtype=torch.long, device=DEVICE)
    user = s.clone().requires_grad_()
    loss = kernels.pair_bce(user, one, number, zero, label, reduction="none", backend=backend)
    (slope,) = torch.autograd.grad(loss.sum(), user)
    margin = (s if y else -s)[:, 0].double()  # > 0: the pair is classified right
    wrong = torch.sigmoid(-margin)
    step = torch.finfo(torch.float32).tiny  # what is smaller may be flushed to zero
    torch.testing.assert_close(loss.double(), -torch.nn.functional.logsigmoid(margin), rtol=1e-6, atol=step)
    torch.testing.assert_close(slope[:, 0].double(), -wrong if y else wrong, rtol=1e-6, atol=step)


def test_probabilities_keep_relative_precision(backend):
    s = torch.arange(-80, 80.01, 0.05, device=DEVICE)[:, None]
    one, number = torch.ones(1, 1, device=DEVICE), torch.arange(len(s), device=DEVICE)
    user = s.clone().requires_grad_()
    p = kernels.pair_sigmoid(user, one, number, torch.zeros_like(number), backend=backend)
    (slope,) = torch.autograd.grad(p.sum(), user)
    d = s[:, 0].double()
    torch.testing.assert_close(p.double(), torch.sigmoid(d), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope[:, 0].double(), torch.sigmoid(d) * torch.sigmoid(-d), rtol=1e-6, atol=0)


def test_items_outside_the_catalogue_have_no_part_whatever_they_hold(backend):
    """bias -inf: logit -inf, probability 0, loss 0, gradients exactly 0, though the vector and the upstream are NaN."""
    user, item = rows(4, 8, torch.float32, 0), rows(3, 8, torch.float32, 1)
    item[1] = torch.nan
    bias = torch.tensor([0.5, -torch.inf, -0.5], device=DEVICE)
    user_id = torch.tensor([0, 1, 2, 3], device=DEVICE)
    item_id = torch.tensor([0, 1, 2, 1], device=DEVICE)
    leaves = [x.clone().requires_grad_() for x in (user, item, bias)]
    calls = [
        (lambda u, i, b: kernels.pair_dot(u, i, user_id, item_id, item_bias=b, backend=backend), -torch.inf),
        (lambda u, i, b: kernels.pair_sigmoid(u, i, user_id, item_id, item_bias=b, backend=backend), 0.0),
    ]
    label = torch.tensor([1.0, 0.0, 0.0, 0.0], device=DEVICE)
    options = dict(reduction="none", backend=backend)
    calls.append((lambda u, i, b: kernels.pair_bce(u, i, user_id, item_id, label, item_bias=b, **options), 0.0))
    for call, expected in calls:
        value = call(*leaves)
        assert (value[[1, 3]] == expected).all() and value[[0, 2]].isfinite().all()
        grad = torch.tensor([1.0, torch.nan, 2.0, torch.inf], device=DEVICE)
        grad_user, grad_item, grad_bias = torch.autograd.grad(value, leaves, grad)
        assert (grad_user[[1, 3]] == 0).all() and (grad_item[1] == 0).all() and grad_bias[1] == 0
        assert grad_user[[0, 2]].isfinite().all() and (grad_user[[0, 2]] != 0).any(1).all()


def test_float16_gradients_survive_until_the_scaler_arrives(backend):
    """Slopes of 1e-8 round to 0 in float16; times GradScaler's factor they are ordinary numbers."""
    operands, pair_ids = make(64, 8, 8, 16, torch.float16, False)
    y = torch.rand(64, device=DEVICE)
    scale = torch.tensor(65536.0, device=DEVICE)
    weight = torch.full((64,), 1e-6, device=DEVICE)
    options = dict(weight=weight, backend=backend)
    _, grads = differentiate(kernels.pair_bce, operands, (*pair_ids, y), scale, **options)
    _, wanted = truth("pair_bce", operands, (*pair_ids, y), scale, weight=weight)
    torch.testing.assert_close(grads[0].double(), wanted[0], rtol=2**-10, atol=1e-7)


def test_ids_beyond_two_to_the_31_elements(backend):
    """Row 33,999,999 of 64 columns starts at element 2.2e9; a lazily mapped table costs no memory."""
    numpy = pytest.importorskip("numpy")
    n, D = 34_000_000, 64
    table = torch.from_numpy(numpy.zeros((n, D), dtype=numpy.int16)).view(torch.bfloat16)
    if DEVICE == "cuda":
        table = torch.zeros(n, D, dtype=torch.bfloat16, device=DEVICE)
    last = torch.tensor([n - 1, n - 2, 33_554_432, 5], device=DEVICE)
    table[last] = rows(4, D, torch.bfloat16, 1)
    user = rows(4, D, torch.bfloat16, 0)
    number = torch.arange(4, device=DEVICE)
    got = kernels.pair_dot(user, table, number, last, backend=backend)
    want = reference.pair_dot(user.double(), table[last].double(), number, number)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pair_dot", "pair_sigmoid", "pair_bce"])
def test_gradcheck(name):
    operands, pair_ids = make(23, 5, 7, 6, torch.float64, True)
    bias = operands[2].double()
    extra = (labels(pair_ids[1], bias).double(),) if name == "pair_bce" else ()
    finite = torch.where(bias == -torch.inf, 0, bias).requires_grad_()
    user, item = (x.clone().requires_grad_() for x in operands[:2])

    def call(u, i, b):
        b = torch.where(bias == -torch.inf, -torch.inf, b)
        value = getattr(kernels, name)(u, i, *pair_ids, *extra, item_bias=b)
        return value[value != -torch.inf] if name == "pair_dot" else value

    assert torch.autograd.gradcheck(call, (user, item, finite))
