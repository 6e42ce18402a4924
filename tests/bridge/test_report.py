"""What a bug report contains."""

import pytest

import recbole_llm
import recbole_llm_kernels

pytest.importorskip("recbole")
import torch

from recbole_llm.bridge import environment as report
from recbole_llm.bridge.repairs.registry import REPAIRS


def test_the_report_has_everything_a_bug_report_should(monkeypatch, tmp_path):
    monkeypatch.setenv("RECBOLE_LLM_TRACEBACK", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "x")
    found = report.environment()
    assert found["versions"]["recbole-llm"] == recbole_llm.__version__
    assert {"python", "recbole", "torch", "numpy", "pandas", "scipy", "transformers"} <= set(found["versions"])
    assert found["machine"]["cpu threads"] == torch.get_num_threads()
    assert found["machine"]["device"]
    assert found["environment"]["RECBOLE_LLM_TRACEBACK"] == "1"
    assert "SECRET_TOKEN" not in found["environment"]
    assert found["kernels"]["backend"] in ("torch", "triton")
    assert found["kernels"]["file"] == recbole_llm_kernels.__file__
    assert found["kernels"]["version"] == recbole_llm_kernels.__version__ == recbole_llm.__version__
    assert set(found["repairs"]) == {repair.name for repair in REPAIRS}
    assert all(len(state.partition(": ")[2]) > 10 for state in found["repairs"].values())
    assert str(tmp_path) in found["caches"]["features"]


def test_it_is_rendered_a_section_a_paragraph():
    text = report.render({"versions": {"torch": "2", "recbole-llm": "1"}, "empty": {}})
    assert text == "versions\n  torch        2\n  recbole-llm  1\n\nempty"
