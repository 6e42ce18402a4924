"""Repairs of RecBole 1.2 for today's NumPy, pandas, SciPy, PyTorch and hyperopt, and without ray."""

import builtins
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.files import load_tensors
from recbole_llm.bridge.repairs.ray import AbsentModule
from recbole_llm.bridge.repairs.registry import ModuleView, always, override, repair

# ---------------------------------------------------------------- ray


class _Tune(ModuleType):
    """Stands for ``ray.tune`` in quick_start.py, whose sole use of it is ``tune.report(**test_result)``."""

    def __init__(self) -> None:
        super().__init__("ray.tune")

    @staticmethod
    def report(**metrics: Any) -> None:
        """Report to Ray Tune if the program has loaded it, under either of its signatures; otherwise do nothing."""
        tune = sys.modules.get("ray.tune")
        if tune is None or isinstance(tune, AbsentModule):
            return
        if "metrics" in inspect.signature(tune.report).parameters:  # ray >= 2.7
            tune.report(metrics)
        else:
            tune.report(**metrics)


class _RayForOneStatement(ModuleType):
    """Answers ``from ray import tune`` and leaves ``sys.modules`` as it does so, before any further import."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name != "tune":
            raise AttributeError(f"module 'ray' has no attribute {name!r}")
        if sys.modules.get("ray") is self:
            del sys.modules["ray"]
        return _Tune()


@contextmanager
def _without_ray() -> Iterator[None]:
    stub = None
    if "ray" not in sys.modules:
        stub = sys.modules["ray"] = _RayForOneStatement()
    try:
        yield
    finally:
        if stub is not None and sys.modules.get("ray") is stub:
            del sys.modules["ray"]


@repair(
    "recbole.quick_start.quick_start",
    upstream="quick_start/quick_start.py:20 (from ray import tune), :223 (tune.report)",
    issues="#1518 #1820 #2215, PR #2078 #2187",
    until="RecBole imports ray only where Ray Tune is used",
    condition=always("Ray is needed under Ray Tune only; the releases RecBole allows need pkg_resources and NumPy 1"),
    during=_without_ray,
)
def _ray(module: ModuleType) -> None:
    """RecBole imports without ray; inside a Ray Tune session results are reported as before."""
    module.__dict__["tune"] = _Tune()


# ---------------------------------------------------------------- NumPy


_NUMPY_ALIASES = {
    "bool": "bool_",
    "int": "int_",
    "float": "float64",
    "complex": "complex128",
    "object": "object_",
    "str": "str_",
    "long": "int_",
    "unicode": "str_",
}


def _needs_numpy() -> tuple[bool, str]:
    import numpy as np

    missing = [f"np.{name}" for name in (*_NUMPY_ALIASES, "float_", "complex_", "unicode_") if name not in vars(np)]
    return bool(missing), f"NumPy {np.__version__} has {'no ' + ', '.join(missing) if missing else 'every name'}"


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:625-635; uses in data/interaction.py:31, dataset.py:652, metrics.py:90-287,"
    " model/layers.py:932-1415, model/abstract_recommender.py:309,316, ffm.py:210,218, trainer/hyper_tuning.py:386",
    issues="#2215 #1714 #1604, PR #2203 #2187",
    until="RecBole writes np.float64, np.int64 and so on",
    condition=_needs_numpy,
)
def _numpy(module: ModuleType) -> None:
    """The aliases that RecBole itself puts on NumPy, made from names that NumPy 1 and 2 have, and from the import on.

    Stock sets them when a Config is made, which does not happen when one is read from a checkpoint.
    """
    import numpy as np

    def make(stock: Callable[[Any], None]) -> Callable[[Any], None]:
        def compatibility_settings(self: Any) -> None:
            for alias, name in _NUMPY_ALIASES.items():
                if alias not in vars(np):
                    setattr(np, alias, getattr(np, name))

        return compatibility_settings

    override(module.Config, "compatibility_settings", make)
    module.Config.compatibility_settings(None)


# ---------------------------------------------------------------- torch


def _needs_torch_load() -> tuple[bool, str]:
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (
        2,
        6,
    ), f"torch.load of PyTorch {torch.__version__} reads {'weights only' if version >= (2, 6) else 'objects'}"


@repair(
    "recbole.utils.utils",
    upstream="trainer/trainer.py:323,583; quick_start/quick_start.py:250; neumf.py:84-85 convncf.py:82 nais.py:127"
    " ract.py:75,84 s3rec.py:120 kd_dagfm.py:56",
    issues="#2215 #2212, PR #2219",
    until="RecBole passes weights_only=False, or saves checkpoints that hold tensors only",
    condition=_needs_torch_load,
)
def _torch_load(module: ModuleType) -> None:
    """``torch.load`` reads whole objects for callers inside RecBole, whose checkpoints hold a Config; for no other.

    Its trainers and ``load_data_and_model`` read what the run wrote or their caller named. Its models read pretrained weights
    from a path in their configuration: of those files, tensors alone are read.
    """
    import torch

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("recbole.model."):
                return load_tensors(stock, *args, **kwargs)
            if caller == "recbole" or caller.startswith("recbole."):
                kwargs.setdefault("weights_only", False)
            return stock(*args, **kwargs)

        return load

    override(torch, "load", make)


# ---------------------------------------------------------------- SciPy


def _needs_dok() -> tuple[bool, str]:
    import scipy
    from scipy.sparse import dok_matrix

    has = hasattr(dok_matrix, "_update")
    return not has, f"dok_matrix of SciPy {scipy.__version__} has {'its' if has else 'no'} _update"


@repair(
    "recbole.data.dataset.dataset",
    upstream="A._update(entries): lightgcn.py:111 ngcf.py:110 gcmc.py:174 spectralcf.py:123 ncl.py:131"
    " kgin.py:356 mcclk.py:425",
    issues="#2034 #2090 #2185",
    until="RecBole builds its adjacency matrices as COO",
    condition=_needs_dok,
)
def _dok(module: ModuleType) -> None:
    """The private bulk insertion that SciPy 1.13 removed from ``dok_matrix``."""
    from scipy.sparse import dok_matrix

    def _update(self: Any, data: Mapping[tuple[int, int], float]) -> None:
        self._dict.update(data)

    dok_matrix._update = _update


# ---------------------------------------------------------------- pandas


def _needs_agg_len() -> tuple[bool, str]:
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = isinstance(pd.Series([[1], [2, 3]]).agg(builtins.len), pd.Series)
    return not cells, f"Series.agg(len) of pandas {pd.__version__} counts {'each cell' if cells else 'the rows'}"


@repair(
    "recbole.data.dataset.dataset",
    "recbole.data.dataset.kg_dataset",
    "recbole.data.dataset.sequential_dataset",
    upstream=".agg(len): data/dataset/dataset.py:712,792,809,1217 kg_dataset.py:316 sequential_dataset.py:165",
    issues="none found",
    until="RecBole writes .map(len)",
    condition=_needs_agg_len,
)
def _agg_len(module: ModuleType) -> None:
    """``feat[field].agg(len)`` gives the length of each cell, as on pandas 2, in the modules that rely on it."""
    import pandas as pd

    def len(obj: Any) -> Any:
        # only pandas calls the module's ``len`` with a whole column and means its cells
        if isinstance(obj, pd.Series) and sys._getframe(1).f_globals.get("__name__", "").startswith("pandas."):
            return obj.map(builtins.len)
        return builtins.len(obj)

    module.__dict__["len"] = len


def _needs_fillna() -> tuple[bool, str]:
    import pandas as pd

    frame = pd.DataFrame({"x": [float("nan")]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame["x"].fillna(0, inplace=True)
    lost = bool(frame["x"].isna().any())
    return (
        lost,
        f"frame[column].fillna(inplace=True) of pandas {pd.__version__} {'changes a copy' if lost else 'works'}",
    )


@repair(
    "recbole.data.dataset.dataset",
    upstream="feat[field].fillna(inplace=True): data/dataset/dataset.py:501,648,650",
    issues="none found",
    until="RecBole assigns the result of fillna",
    condition=_needs_fillna,
)
def _fillna(module: ModuleType) -> None:
    """Missing values are filled. Without this they stay, silently: ids become -9223372036854775808, floats NaN.

    That hits every user or item without a row in its file, and row 0 ([PAD]) always.
    """
    import numpy as np
    import pandas as pd
    from recbole.utils import FeatureType

    def make(stock: Callable[[Any], None]) -> Callable[[Any], None]:
        def _fill_nan(self: Any) -> None:
            for feat_name in self.feat_name_list:
                feat = getattr(self, feat_name)
                for column in feat:
                    kind = self.field2type[column]
                    if kind == FeatureType.TOKEN:
                        feat[column] = feat[column].fillna(value=0)
                    elif kind == FeatureType.FLOAT:
                        feat[column] = feat[column].fillna(value=feat[column].mean())
                    else:
                        empty = np.array([], dtype=np.int64 if kind == FeatureType.TOKEN_SEQ else np.float64)
                        feat[column] = [empty if isinstance(cell, float) else cell for cell in feat[column]]

        return _fill_nan

    def read_csv(*args: Any, **kwargs: Any) -> Any:
        frame = pd.read_csv(*args, **kwargs)
        sequences = [column for column in frame.columns if str(column).endswith("_seq")]
        frame[sequences] = frame[sequences].fillna("")
        return frame

    override(module.Dataset, "_fill_nan", make)
    module.__dict__["pd"] = ModuleView(pd, {"read_csv": read_csv})


# ---------------------------------------------------------------- warnings


@repair(
    "recbole.data.dataset.dataset",
    "recbole.trainer.trainer",
    upstream="data/dataset/dataset.py:501 (chained fillna), :2202 (tensor of a read-only column); trainer/trainer.py:235 (amp)",
    issues="none found",
    until="the lines are changed upstream",
    condition=always("three warnings of every run concern lines that are repaired here, or harmless"),
)
def _warnings(module: ModuleType) -> None:
    """RecBole's own lines do not fill the screen: the fill that :func:`_fillna` did before, a column that is only read."""
    import pandas as pd

    inside = r"recbole\.(data\.dataset\.\w+|trainer\.trainer)"
    warnings.filterwarnings("ignore", category=pd.errors.ChainedAssignmentError, module=inside)
    warnings.filterwarnings("ignore", message="A value is trying to be set on a copy", module=inside)  # pandas 2
    warnings.filterwarnings("ignore", message="using <built-in function len> in Series.agg", module=inside)  # pandas 2
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", module=inside)
    warnings.filterwarnings("ignore", message=r"`torch\.cuda\.amp\.GradScaler", module=inside)


# ---------------------------------------------------------------- hyperopt


def _needs_hyper() -> tuple[bool, str]:
    try:
        version = metadata.version("hyperopt")
    except metadata.PackageNotFoundError:
        return False, "hyperopt is not installed"
    new = tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) >= (0, 2, 6)
    return new, f"hyperopt {version} calls {'integers of numpy.random.Generator' if new else 'RandomState'}"


@repair(
    "recbole.trainer.hyper_tuning",
    upstream="trainer/hyper_tuning.py:117 (np.random.RandomState in the default search)",
    issues="#1868 #1240 #1081",
    until="RecBole uses numpy.random.default_rng",
    condition=_needs_hyper,
)
def _hyper(module: ModuleType) -> None:
    """The exhaustive search, HyperTuning's default, gets the random generator that hyperopt calls."""
    import numpy as np

    module.__dict__["np"] = ModuleView(np, {"random": ModuleView(np.random, {"RandomState": np.random.default_rng})})
