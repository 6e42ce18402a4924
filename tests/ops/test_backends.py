"""Which backend runs: by the tensors' device, by argument, by the environment; and where ids are looked at."""

import pytest
import torch
from test_contract import Case

import recbole_llm_kernels as kernels
from recbole_llm_kernels import backends, checks


def test_triton_on_a_cpu_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    cpu = [x.cpu() for x in Case().leaves]
    with pytest.raises(ValueError, match='TRITON_INTERPRET=1 before Python starts.*use backend="torch"'):
        kernels.score_topk(*cpu[:2], 3, backend="triton")
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        kernels.score_topk(*cpu[:2], 3, backend="triton")


def test_triton_refuses_float64(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    with pytest.raises(ValueError, match='float64; use backend="torch"'):
        kernels.score_topk(*Case(torch.float64).leaves[:2], 3, backend="triton")


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("RECBOLE_LLM_KERNELS_BACKEND", raising=False)
    assert kernels.default_backend("cpu") == "torch" and kernels.default_backend("cuda") == "triton"
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_BACKEND", "triton")
    assert kernels.default_backend("cpu") == "triton"
    cpu = [x.cpu() for x in Case().leaves]
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        kernels.score_topk(*cpu[:2], 3)
    kernels.score_topk(*cpu[:2], 3, backend="torch")
    kernels.score_topk(*(x.double() for x in cpu[:2]), 3)  # float64 always runs on PyTorch
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="RECBOLE_LLM_KERNELS_BACKEND must be one of auto, triton, torch, got 'cuda'"):
        kernels.score_topk(*cpu[:2], 3)


def test_debug_mode_checks_on_any_device(monkeypatch):
    assert checks.synchronising_checks(torch.device("cpu"))
    monkeypatch.delenv("RECBOLE_LLM_KERNELS_DEBUG", raising=False)
    assert not checks.synchronising_checks(torch.device("cuda"))
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_DEBUG", "1")
    assert checks.synchronising_checks(torch.device("cuda"))
