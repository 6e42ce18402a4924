"""When a repair is applied: its condition on today's libraries and on older ones, and what becomes of the others."""

import os
import sys
import types

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole_llm.bridge.repairs import activation  # noqa: F401  (loads every repair)
from recbole_llm.bridge.repairs import libraries as compat
from recbole_llm.bridge.repairs import registry as repairs


@pytest.fixture
def of(monkeypatch):
    """The condition of a repair, by its name."""
    return lambda name: next(r for r in repairs.REPAIRS if r.name == name).condition()


def test_numpy_is_left_alone_where_it_has_every_name(of, monkeypatch):
    import numpy as np

    names = {*compat._NUMPY_ALIASES, "float_", "complex_", "unicode_"}
    for name in names - vars(np).keys():
        monkeypatch.setattr(np, name, object, raising=False)
    assert of("numpy") == (False, f"NumPy {np.__version__} has every name")
    monkeypatch.delattr(np, "float_")
    assert of("numpy") == (True, f"NumPy {np.__version__} has no np.float_")


@pytest.mark.parametrize(("version", "needed"), [("2.5.1+cu121", False), ("2.6.0", True), ("2.13.0+cpu", True)])
def test_torch_load_goes_by_the_version(of, monkeypatch, version, needed):
    import torch

    monkeypatch.setattr(torch, "__version__", version)
    assert of("torch_load")[0] is needed


def test_dok_is_left_alone_where_it_can_update(of, monkeypatch):
    from scipy.sparse import dok_matrix

    monkeypatch.setattr(dok_matrix, "_update", dict.update, raising=False)
    assert of("dok")[0] is False
    monkeypatch.delattr(dok_matrix, "_update")
    if not hasattr(dok_matrix, "_update"):
        assert of("dok")[0] is True


@pytest.mark.parametrize("cells", [True, False])
def test_agg_len_goes_by_what_agg_does(of, monkeypatch, cells):
    import pandas as pd

    monkeypatch.setattr(pd.Series, "agg", lambda self, f: self.map(f) if cells else f(self))
    assert of("agg_len")[0] is not cells


@pytest.mark.parametrize("writes", [True, False])
def test_fillna_goes_by_what_fillna_does(of, monkeypatch, writes):
    import pandas as pd

    class Column(list):
        def fillna(self, value, inplace):
            self[:] = [value] if writes else self

        def isna(self):
            return pd.Series(self).isna()

    column = Column([float("nan")])
    monkeypatch.setattr(pd, "DataFrame", lambda data: {"x": column})
    assert of("fillna")[0] is not writes


@pytest.mark.parametrize(("version", "needed"), [("0.2.5", False), ("0.2.6", True), ("0.2.7", True), ("0.3.0", True)])
def test_hyper_goes_by_hyperopts_version(of, monkeypatch, version, needed):
    monkeypatch.setattr(compat.metadata, "version", lambda name: version)
    assert of("hyper")[0] is needed


@pytest.mark.parametrize(("version", "needed"), [("1.2.0", False), ("1.2.1", True)])
def test_time_split_goes_by_recboles_version(of, monkeypatch, version, needed):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert of("time_split")[0] is needed


def test_hyper_is_left_out_without_hyperopt(of, monkeypatch):
    def version(name):
        raise compat.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.metadata, "version", version)
    assert of("hyper") == (False, "hyperopt is not installed")


def test_a_repair_whose_condition_fails_changes_nothing(monkeypatch):
    touched = []
    repair = repairs.Repair("none", ("os",), "x.py:1", "none", "never", lambda: (False, "not here"), touched.append)
    monkeypatch.setattr(repairs, "_decisions", {})
    repair(os)
    assert touched == []
    monkeypatch.setattr(repairs, "REPAIRS", [repair])
    assert [(r.name, r.state, r.reason) for r in repairs.records()] == [("none", "not applied", "not here")]


def test_a_repair_that_fails_names_itself_and_the_versions(monkeypatch):
    def cure(module):
        raise KeyError("Config")

    monkeypatch.setattr(repairs, "_decisions", {})
    repair = repairs.Repair("broken", ("os",), "x.py:1", "none", "never", lambda: (True, "here"), cure)
    with pytest.raises(
        ImportError, match=r"repair 'broken' \(RecBole x.py:1\) with recbole 1\.2.*pandas.*SKIP_REPAIRS=broken"
    ):
        repair(os)


# ---------------------------------------------------------------- ray


def test_results_reach_ray_tune_under_either_signature(monkeypatch):
    got = []
    tune = compat._Tune()
    monkeypatch.delitem(sys.modules, "ray.tune", raising=False)
    tune.report(ndcg=0.5)
    for report in (lambda metrics, *, checkpoint=None: got.append(metrics), lambda _metric=None, **kw: got.append(kw)):
        module = types.ModuleType("ray.tune")
        module.report = report
        monkeypatch.setitem(sys.modules, "ray.tune", module)
        tune.report(ndcg=0.5)
    assert got == [{"ndcg": 0.5}, {"ndcg": 0.5}]


def test_every_repair_gives_its_lines_its_reason_and_its_end():
    for repair in repairs.REPAIRS:
        assert ".py:" in repair.upstream, repair.name
        assert repair.until
        assert repair.issues
        assert len(repair.condition()[1]) > 10
        assert repair.cure.__doc__, repair.name
