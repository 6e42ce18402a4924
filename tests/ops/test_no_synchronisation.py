"""Nothing between a call and its kernels waits for the device: read from the source, since a CPU cannot show it.

``test_gpu.py`` asks the card; ``test_triton_interpreted.py`` watches the operations of PyTorch on the way to the kernels.
"""

import ast
from pathlib import Path

import pytest

import recbole_llm_kernels

PACKAGE = Path(recbole_llm_kernels.__file__).parent
# what stands between a public function and the kernels; checks.py holds the looks themselves, see LOOKS
FILES = [
    *sorted((PACKAGE / "triton_ops").glob("*.py")),
    *(
        PACKAGE / f"{name}.py"
        for name in (
            "arguments",
            "backends",
            "functional",
            "ops",
            "optim",
            "pair_ops",
            "registration",
            "sampled_losses",
            "tower_ops",
        )
    ),
]
# methods and functions that read a tensor's values back, whatever the device
READS = {"item", "tolist", "nonzero", "cpu", "numpy", "unique", "unique_consecutive", "masked_select", "bincount",
         "is_nonzero", "argwhere", "synchronize"}  # fmt: skip
COPIES = {"tensor", "as_tensor", "from_numpy"}  # of host memory
LOOKS = {"check_ids", "check_inside", "check_rows", "without_repeats"}
# where a look is meant: asked for by RECBOLE_LLM_KERNELS_DEBUG, on a CPU, or before the operators of PyTorch
MAY_LOOK = {("backends.py", "checked"), ("backends.py", "checked_rows"), ("ops.py", "_sampled"),
            ("ops.py", "_targets"), ("optim.py", "rowwise_adagrad_"), ("pair_ops.py", "pair_bce")}  # fmt: skip


def kernels_of(tree):
    """Functions that Triton compiles: what looks like a Python number there is a value on the device."""
    return {
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }


def on_the_host(node, skipped):
    """Every node below ``node`` but those of kernels, with the name of the function it stands in."""
    pending = [(node, "")]
    while pending:
        at, function = pending.pop()
        if at in skipped:
            continue
        yield at, function
        name = at.name if isinstance(at, ast.FunctionDef) else function
        pending += [(child, name) for child in ast.iter_child_nodes(at)]


def is_number(index):
    """Whether an index selects by a Python integer somewhere; a slice does not."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return any(
        isinstance(ast.literal_eval(part), int) for part in parts if isinstance(part, (ast.Constant, ast.UnaryOp))
    )


def waits(source):
    """(line, function, what) of all that synchronises, or copies from the host."""
    tree = ast.parse(source)
    for node, function in on_the_host(tree, kernels_of(tree)):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and is_number(node.slice):
            # x[0] = 0 copies a number from the host and waits for it; x[:1] = 0 fills
            yield node.lineno, function, f"assigns to {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, function, what) for what in of_call(node))


def of_call(node):
    """What a call reads back or copies from the host."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in READS:
        yield f"calls {name}"
    if name in COPIES and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch":
        yield f"calls torch.{name}"
    if name == "where" and len(node.args) == 1:
        yield "calls where with a condition alone"
    if name == "repeat_interleave" and "output_size" not in {k.arg for k in node.keywords}:
        yield "calls repeat_interleave without output_size"
    if name in ("bool", "int", "float") and isinstance(node.func, ast.Name):
        yield f"calls {name}"
    if name in LOOKS:
        yield f"looks: {name}"


# conversions of what is no tensor
PLAIN = {("tuning.py", "_device_target", "calls int"), ("arguments.py", "negative_weight", "calls float"),
         ("optim.py", "rowwise_adagrad_", "calls float"), ("optim.py", "_check_step", "calls float")}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_nothing_on_the_way_to_a_kernel_waits(file):
    found = [
        f"{file.name}:{line}: {function} {what}"
        for line, function, what in waits(file.read_text())
        if (file.name, function, what) not in PLAIN
        and not (what.startswith("looks") and (file.name, function) in MAY_LOOK)
    ]
    assert not found, found


FAULTS = {
    "starts[0] = 0": "assigns to starts[0]",
    "y, starts[0] = z, 0": "assigns to starts[0]",
    "starts[:, -1] += 1": "assigns to starts[:, -1]",
    "n = x.sum().item()": "calls item",
    "n = (x > 0).nonzero()": "calls nonzero",
    "if bool((x > 0).any()):\n    pass": "calls bool",
    "x.add_(torch.tensor(1.0, device=x.device))": "calls torch.tensor",
    "x = torch.where(x > 0)": "calls where with a condition alone",
    "x = x.repeat_interleave(counts)": "calls repeat_interleave without output_size",
    "check_ids('ids', x, 3)": "looks: check_ids",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rules_see_a_fault(fault):
    assert [what for _, _, what in waits(fault)] == [FAULTS[fault]]


def test_fills_and_kernels_are_no_faults():
    assert not list(waits("x[:1] = 0\nx[1:n] = y[1:] != y[:-1]\nx = torch.where(a, b, c)"))
    assert not list(waits("@triton.jit\ndef kernel(x):\n    y = int(x)\n    y[0] = 1"))
