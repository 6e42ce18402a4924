"""Repairs of single stock models that cannot start, start without their defaults, are wrong, or slow others down."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import always, override, repair


@repair(
    "recbole.utils.utils",
    upstream="utils/utils.py:250 calls predict, which is `assert False` in sasreccpr.py:478 and gru4reccpr.py:482",
    issues="none found",
    until="RecBole counts FLOPs of models without predict in another way",
    condition=always("SASRecCPR and GRU4RecCPR cannot start on any stack"),
)
def _flops(module: ModuleType) -> None:
    """A count that only goes to the log does not stop a model that has no ``predict``."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def get_flops(model: Any, dataset: Any, device: Any, logger: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return stock(model, dataset, device, logger, *args, **kwargs)
            except (AssertionError, NotImplementedError):
                logger.info("FLOPs are not counted: %s does not predict single pairs.", type(model).__name__)
                return float("nan")

        return get_flops

    override(module, "get_flops", make)


@repair(
    "recbole.model.sequential_recommender.ksr",
    upstream="model/sequential_recommender/ksr.py:40,153 (float64 relation vectors times float32 states)",
    issues="none found",
    until="get_preload_weight gives float32, or KSR casts it",
    condition=always("KSR ends in RuntimeError: expected the same dtype on every stack"),
)
def _ksr(module: ModuleType) -> None:
    """Preloaded relation vectors have the dtype of the model."""

    def make(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            stock(self, *args, **kwargs)
            self.relation_Matrix = self.relation_Matrix.to(self.entity_embedding.weight.dtype)

        return __init__

    override(module.KSR, "__init__", make)


@repair(
    "recbole.model.general_recommender.pop",
    upstream="model/general_recommender/pop.py:47 (item_cnt[item] + 1 once per batch, drawn negatives included)",
    issues="#2198 #1844, PR #2199 (counts repeats, and drawn negatives too)",
    until="Pop counts the interactions of its training data",
    condition=always("Pop counts the batches that hold an item, as a drawn negative too, and depends on their size"),
)
def _pop(module: ModuleType) -> None:
    """Pop scores an item by its number of training interactions."""
    import numpy as np
    import torch

    def make_init(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, config: Any, dataset: Any) -> None:  # noqa: N807
            stock(self, config, dataset)
            # COO keeps repeats, and sequential datasets give their first items too
            count = np.bincount(dataset.inter_matrix(form="coo").col, minlength=self.n_items)
            self.item_cnt = torch.from_numpy(count.astype(np.int64)).unsqueeze(1).to(self.device)
            self.max_cnt = self.item_cnt.max(0)[0]

        return __init__

    def make_loss(stock: Callable[..., Any]) -> Callable[..., Any]:
        def calculate_loss(self: Any, interaction: Any) -> Any:
            return torch.nn.Parameter(torch.zeros(1)).to(self.device)

        return calculate_loss

    override(module.Pop, "__init__", make_init)
    override(module.Pop, "calculate_loss", make_loss)


@repair(
    "recbole.model.sequential_recommender.bert4rec",
    upstream="model/sequential_recommender/bert4rec.py:119 (the oldest item makes room for the mask where there is room)",
    issues="none found; #1113 #1530 are other faults of the same lines",
    until="BERT4Rec drops the oldest item of histories of full length only",
    condition=always("BERT4Rec ranks without the oldest item of a history, and without any where there is one only"),
)
def _bert4rec(module: ModuleType) -> None:
    """BERT4Rec ranks by the whole history where it and the mask have room."""
    import torch

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def predict(self: Any, interaction: Any) -> Any:
            sequence, length = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
            has_room = length < sequence.size(1)
            # an empty place in front is what is dropped then
            given = {
                self.ITEM_SEQ: torch.where(has_room.unsqueeze(1), sequence.roll(1, dims=1), sequence),
                self.ITEM_SEQ_LEN: length + has_room.to(length.dtype),
            }
            if self.ITEM_ID in interaction:
                given[self.ITEM_ID] = interaction[self.ITEM_ID]
            return stock(self, given)

        return predict

    override(module.BERT4Rec, "predict", make)
    override(module.BERT4Rec, "full_sort_predict", make)


_anomaly_mode_kept = False  # whether the repair below was there before the module's code ran


@contextmanager
def _keep_anomaly_mode() -> Iterator[None]:
    """Put PyTorch's anomaly mode back to what it was before."""
    import torch

    global _anomaly_mode_kept
    with torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()):
        yield
    _anomaly_mode_kept = True


@repair(
    "recbole.model.sequential_recommender.sine",
    upstream="model/sequential_recommender/sine.py:25 (set_detect_anomaly(True), run with every sequential model, as the"
    " package imports all of them)",
    issues="none found",
    until="sine.py leaves PyTorch's global modes alone",
    condition=always("after any sequential model, every training of the process checks each gradient for NaN"),
    during=_keep_anomaly_mode,
)
def _anomaly_mode(module: ModuleType) -> None:
    """Sequential models train without PyTorch's debugging mode, unless the program has turned it on itself."""
    import torch

    if not _anomaly_mode_kept:  # imported before us: what the mode was is not known, and PyTorch's default is off
        torch.autograd.set_detect_anomaly(False)


@repair(
    "recbole.model.general_recommender.dgcf",
    upstream="model/general_recommender/dgcf.py:50,81 (samples more users or items than there are)",
    issues="none found",
    until="DGCF bounds cor_batch_size by the numbers of users and of items",
    condition=always("DGCF ends in ValueError: Sample larger than population where few batches meet unequal sides"),
)
def _dgcf(module: ModuleType) -> None:
    """The correlation loss samples at most all users and all items."""

    def make(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            stock(self, *args, **kwargs)
            self.cor_batch_size = min(self.cor_batch_size, self.n_users, self.n_items)

        return __init__

    override(module.DGCF, "__init__", make)


class _SparseGraph:
    """A dataset that gives its collaborative knowledge graph as a sparse matrix where a DGL graph is asked for."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def ckg_graph(self, form: str = "coo", value_field: str | None = None) -> Any:
        return self._dataset.ckg_graph("coo" if form == "dgl" else form, value_field)


@repair(
    "recbole.model.knowledge_aware_recommender.kgat",
    upstream="model/knowledge_aware_recommender/kgat.py:87,146-157 and data/dataset/kg_dataset.py:557 (DGL, undeclared)",
    issues="none found",
    until="KGAT builds its initial attention from the sparse matrix that the dataset gives",
    condition=always("KGAT needs DGL for one step, and calls it by names that DGL has dropped (preserve_nodes)"),
)
def _kgat(module: ModuleType) -> None:
    """KGAT runs without DGL, which it uses only to cut the graph into its relations."""
    import numpy as np
    import torch
    from scipy.sparse import coo_matrix, diags

    def make_init(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, config: Any, dataset: Any) -> None:  # noqa: N807
            stock(self, config, _SparseGraph(dataset))

        return __init__

    def make_init_graph(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def init_graph(self: Any) -> Any:
            graph = self.ckg
            adjacency = coo_matrix(graph.shape, dtype=np.float64)
            for relation in range(1, self.n_relations):
                edges = graph.data == relation
                part = coo_matrix((np.ones(edges.sum()), (graph.row[edges], graph.col[edges])), shape=graph.shape)
                degree = np.asarray(part.sum(1)).ravel()
                inverse = np.divide(1.0, degree, out=np.zeros_like(degree), where=degree > 0)
                adjacency = adjacency + diags(inverse) @ part
            adjacency = adjacency.tocoo()
            indices = torch.from_numpy(np.stack([adjacency.row, adjacency.col]).astype(np.int64))
            values = torch.from_numpy(adjacency.data).float()
            return torch.sparse_coo_tensor(indices, values, self.matrix_size).to(self.device)

        return init_graph

    override(module.KGAT, "__init__", make_init)
    override(module.KGAT, "init_graph", make_init_graph)


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:241 (properties/model/XGBoost.yaml; the wheel has xgboost.yaml, and lightgbm.yaml)",
    issues="none found",
    until="the two files are named like their models",
    condition=always("XGBoost and LightGBM start without their defaults where file names are case-sensitive"),
)
def _tree_defaults(module: ModuleType) -> None:
    """A model's YAML file is found under its name in lower case where there is no other."""

    def make(stock: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def _update_internal_config_dict(self: Any, file: str) -> Any:
            result = stock(self, file)
            folder = Path(file).parent / "model"
            lower = folder / f"{self.model.lower()}.yaml"
            # a file system that ignores case has found it already
            if Path(file).name == "overall.yaml" and lower.is_file() and not (folder / f"{self.model}.yaml").is_file():
                stock(self, str(lower))
            return result

        return _update_internal_config_dict

    override(module.Config, "_update_internal_config_dict", make)
