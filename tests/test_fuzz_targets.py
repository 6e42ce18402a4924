"""The targets of the coverage-guided fuzzer: right inputs pass, wrong ones are refused, and a fault of the product is seen."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("recbole")
pytest.importorskip("fastapi", reason="extra 'serve'")
from tests.fuzz import checkpoints, exports, targets


@pytest.fixture(params=targets.TARGETS)
def target(request):
    with targets.TARGETS[request.param]() as made:
        yield made


def test_seeds_and_what_is_near_them(target):
    draw, seeds = random.Random(0), list(target.seeds())
    assert len(seeds) >= 4
    for seed in seeds:
        target.run(seed)
        for _ in range(5):
            target.run(checkpoints.change_bytes(seed, draw))
    for nothing in (b"", b"\x00", b"\xff" * 100):
        target.run(nothing)


def test_seeds_are_right_inputs(monkeypatch):
    seen = []
    for module in (exports, checkpoints):
        monkeypatch.setattr(module, "outcome", lambda path, known=module.outcome: seen.append(known(path)))
    for name in ("exports", "checkpoints"):
        with targets.TARGETS[name]() as made:
            for seed in made.seeds():
                made.run(seed)
    # the pickle of another checkpoint names tensors that the archive does not hold
    assert seen.count("loaded") >= 8 and seen[:7] == ["loaded"] * 7


def test_an_input_changes_nothing_for_the_next(tmp_path):
    with targets.Exports() as made:
        for number in range(len(made.files)):
            made.run(bytes([number]) + b"{}")
        assert exports.outcome(made.export) == "loaded"


def test_another_error_leaves_the_target(monkeypatch):
    monkeypatch.setattr(exports, "build", lambda *_: 1 / 0)
    with targets.Exports() as made, pytest.raises(ZeroDivisionError):
        made.run(b"\x00")


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_target_has_imported_what_it_runs(name):
    """The fuzzer sees no branch of a module that is imported later."""
    code = (
        "import sys; from tests.fuzz import coverage, targets\n"
        f"with targets.TARGETS[{name!r}]() as target:\n"
        "    before = set(sys.modules)\n"
        "    for seed in target.seeds(): target.run(seed)\n"
        "    print(sorted(m for m in set(sys.modules) - before if m.startswith(tuple(coverage.INSTRUMENTED))))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
