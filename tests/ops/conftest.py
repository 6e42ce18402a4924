"""Fresh buffers hold NaN, and every test that takes ``backend`` runs on each implementation there is."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # ops_cases, shared by the files here
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # kernel_cases, the table of operators

from ops_cases import BACKENDS


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def poison_fresh_buffers(monkeypatch):
    """An element that a kernel leaves unwritten is NaN instead of right by luck."""

    def poisoned(make):
        def fresh(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return fresh

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
