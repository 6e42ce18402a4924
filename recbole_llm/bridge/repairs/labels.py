"""Interactions of label 0: in RecBole positives, targets and parts of histories; here what a user has seen and not liked.

Where a label is read, RecBole trains on it only with labels instead of drawn negatives, and tests by it only in the modes of
labelled evaluation. Everywhere else each row is a positive, whatever its label says. Rows of label 0 leave the splits of such a
run after the split was made, so that the others stay where they were; a split keeps them as ``negative_feat``. Those of earlier
splits have no place in a later one's ranking, as its other seen items.
"""

from collections.abc import Callable, Iterator, Sequence
from logging import getLogger
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import always, override, repair

UNTIL = "RecBole takes rows of label 0 for no positives where negatives are drawn or every item is ranked"
ISSUES = "#1862 asks how ratings below a threshold are treated"
NEGATIVES = "negative_feat"  # attribute of a split


def trains_on_labels(config: Any) -> bool:
    """Whether a model is trained on the label column itself: its loss reads it, and no negatives are drawn."""
    from recbole.utils import ModelType

    if config["MODEL_TYPE"] == ModelType.DECISIONTREE:
        return True
    drawn = (config["train_neg_sample_args"] or {}).get("distribution", "none") != "none"
    loss = getattr(getattr(config, "model_class", None), "calculate_loss", None)
    # not the input type: of a closed form, and of cross entropy over all items, that is "pointwise" too
    return not drawn and "LABEL" in getattr(getattr(loss, "__code__", None), "co_names", ())


def tests_on_labels(config: Any, phase: str) -> bool:
    """Whether a split is evaluated by the label column itself."""
    mode = (config["eval_args"] or {}).get("mode")
    return (mode.get(phase) if isinstance(mode, dict) else mode) == "labeled"


def without_negatives(dataset: Any, splits: Sequence[Any]) -> None:
    """Take the rows of label 0 out of splits, and leave them with each as ``negative_feat``.

    Args:
        dataset: what the splits were cut from.
        splits: training, validation, test; some may be lacking.
    """
    config, label = dataset.config, dataset.label_field
    own = [trains_on_labels(config), *(tests_on_labels(config, phase) for phase in ("valid", "test"))]
    counts = [0, 0]
    for split, by_label in zip(splits, own, strict=False):
        if by_label or label not in split.inter_feat:
            continue
        negative = split.inter_feat[label] <= 0
        counts[0] += int(negative.sum())
        counts[1] += len(negative)
        if bool(negative.any()):
            setattr(split, NEGATIVES, split.inter_feat[negative])
            split.inter_feat = split.inter_feat[~negative]
    if counts[0]:
        getLogger().info(
            "label 0: %d of %d interactions count as what users have seen, and as nobody's positives; labels are read where a "
            "model is trained on them (train_neg_sample_args empty, pointwise) and in eval_args.mode labeled",
            *counts,
        )
    if splits and not len(splits[0].inter_feat):
        raise ValueError(
            f"No interaction of the training split has a positive {label}: there is nothing to train on. Lower the threshold, "
            "or look at what the label column says."
        )


@repair(
    "recbole.data.dataset.dataset",
    upstream="data/dataset/dataset.py:1806-1873 (splits hold every row, whatever its label; :1106-1136 makes the labels)",
    issues=ISSUES,
    until=UNTIL,
    condition=always("label 0 (threshold, or a label column) is trained on as a positive, and is a hit at test"),
)
def _label_zero(module: ModuleType) -> None:
    """Rows of label 0 are nobody's positives: no model trains on them or is rewarded for them."""

    def make(stock: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        def build(self: Any) -> list[Any]:
            splits = stock(self)
            without_negatives(self, splits)
            return splits

        return build

    override(module.Dataset, "build", make)


# ---------------------------------------------------------------- histories of sequential models


def keep_in_lists(inter: Any, kept: Any, lists: Sequence[str], length: str) -> Any:
    """Lists of a table with some of their entries left out, the others moved to the front; rows left with none go.

    Args:
        inter: an ``Interaction`` of M rows.
        kept: ``[M, L]`` bool, entries to keep.
        lists: columns ``[M, L]`` or ``[M, L, ...]``.
        length: column of the lists' lengths, ``[M]``.
    """
    import torch

    order = torch.argsort(~kept, dim=1, stable=True)
    sizes = kept.sum(1)
    filled = torch.arange(kept.shape[1]) < sizes[:, None]
    for name in lists:
        column = inter[name]
        shape = (*kept.shape, *(1,) * (column.dim() - 2))
        moved = column.gather(1, order.view(shape).expand_as(column))
        inter.interaction[name] = moved * filled.view(shape)
    inter.interaction[length] = sizes.to(inter[length].dtype)
    return inter[sizes > 0]


def _list_columns(dataset: Any) -> Iterator[str]:
    suffix = dataset.config["LIST_SUFFIX"]
    for name in dataset.inter_feat:
        if name.endswith(suffix) and name[: -len(suffix)] in dataset.inter_feat:
            yield name


@repair(
    "recbole.data.dataset.sequential_dataset",
    "recbole.data.dataset.customized_dataset",
    upstream="data/dataset/sequential_dataset.py:77-144, data/dataset/customized_dataset.py:65 (every earlier row of a user is in"
    " the list, whatever its label)",
    issues=ISSUES,
    until=UNTIL,
    condition=always("items of label 0 are parts of the histories of sequential models"),
)
def _label_zero_histories(module: ModuleType) -> None:
    """Histories of sequential models hold positives alone, but for models that are trained on labels."""
    import torch

    def make(stock: Callable[[Any], None]) -> Callable[[Any], None]:
        def data_augmentation(self: Any) -> None:
            stock(self)
            if trains_on_labels(self.config) or self.label_field not in self.inter_feat:
                return
            labels = self.inter_feat[self.label_field + self.config["LIST_SUFFIX"]]
            sizes = self.inter_feat[self.item_list_length_field]
            filled = torch.arange(labels.shape[1]) < sizes[:, None]
            kept = filled & (labels > 0)
            if bool((kept == filled).all()):
                return
            columns = list(_list_columns(self))
            self.inter_feat = keep_in_lists(self.inter_feat, kept, columns, self.item_list_length_field)

        return data_augmentation

    for name in ("SequentialDataset", "DIENDataset"):
        if vars(module).get(name) is not None and "data_augmentation" in vars(vars(module)[name]):
            override(vars(module)[name], "data_augmentation", make)


# ---------------------------------------------------------------- what users have seen


@repair(
    "recbole.sampler.sampler",
    upstream="sampler/sampler.py:238-262 (what a user has seen is read off the positives)",
    issues=ISSUES,
    until=UNTIL,
    condition=always("an item that a user has seen and not liked would be offered again at validation and test"),
)
def _label_zero_seen(module: ModuleType) -> None:
    """Rows of label 0 of earlier splits have no place in the ranking of a later one."""

    def make(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def get_used_ids(self: Any) -> Any:
            used = stock(self)
            earlier: list[tuple[int, int]] = []
            for phase, dataset in zip(self.phases, self.datasets, strict=True):
                for user, item in earlier:
                    used[phase][user].add(item)
                negatives = getattr(dataset, NEGATIVES, None)
                if negatives is not None:
                    users, items = negatives[self.uid_field].tolist(), negatives[self.iid_field].tolist()
                    earlier += zip(users, items, strict=True)
            return used

        return get_used_ids

    override(module.Sampler, "get_used_ids", make)
