"""Repairs of RecBole's own defects, which show on every stack: metrics, folders, checkpoint names, splits, saved data."""

import copy
import os
import shutil
from collections.abc import Callable
from logging import getLogger
from types import ModuleType
from typing import Any

from recbole_llm.atomic import atomic_path
from recbole_llm.bridge.repairs.registry import always, override, repair


@repair(
    "recbole.evaluator.collector",
    upstream="evaluator/collector.py:227 (.cpu() on counts and Counters)",
    issues="none found",
    until="RecBole moves tensors only",
    condition=always(
        "ItemCoverage, GiniIndex, AveragePopularity and TailPercentage end in AttributeError on every stack"
    ),
)
def _collector(module: ModuleType) -> None:
    """Metrics that need the catalogue's size or the items' counts work."""
    import torch

    def make(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def get_data_struct(self: Any) -> Any:
            values = self.data_struct._data_dict
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    values[key] = value.cpu()
            result = copy.deepcopy(self.data_struct)
            for key in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):
                if key in self.data_struct:
                    del self.data_struct[key]
            return result

        return get_data_struct

    override(module.Collector, "get_data_struct", make)


@repair(
    "recbole.utils.utils",
    upstream="utils/utils.py:51 (asks whether a folder exists, then makes it)",
    issues="none found",
    until="ensure_dir passes exist_ok=True",
    condition=always("of two processes that start together in a fresh folder, one may end in FileExistsError"),
)
def _ensure_dir(module: ModuleType) -> None:
    """Folders for logs and checkpoints may be made by another process in the meantime."""

    def make(stock: Callable[[str], None]) -> Callable[[str], None]:
        def ensure_dir(dir_path: str) -> None:
            os.makedirs(dir_path, exist_ok=True)

        return ensure_dir

    override(module, "ensure_dir", make)


# ---------------------------------------------------------------- checkpoint names


def unique_file(file: str) -> str:
    """Return ``file`` with a part in its name that no other run draws, in whichever second and machine it starts.

    Args:
        file: path whose name begins with the model's, as in ``saved/BPR-Nov-30-2025_12-00-00.pth``. The part follows the
            model's name, so that what looks for the model in front or for the time at the end still finds it.
    """
    folder, name = os.path.split(file)
    model, dash, rest = name.partition("-")
    # not from a seeded stream: runs of one seed would draw the same
    return os.path.join(folder, f"{model}-{os.urandom(6).hex()}{dash}{rest}")


def _publish(file: str, name: str) -> None:
    """Give ``file`` the further name ``name`` at once, so that a reader finds the old content or the new, and whole."""
    with atomic_path(name) as draft:
        try:
            os.link(file, draft)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, draft)


@repair(
    "recbole.trainer.trainer",
    upstream="trainer/trainer.py:132 (model and second), :787-792 (model, dataset and epoch of a pretraining), :895-905"
    " (files of tree models)",
    issues="none found; #1811 hangs after loading",
    until="names of checkpoints hold something that no other run has, and all processes of a run agree on it",
    condition=always("runs that start in the same second overwrite and load each other's checkpoints, without a word"),
)
def _checkpoint_names(module: ModuleType) -> None:
    """Every run has checkpoint files of its own, whose names its processes share."""

    def make_trainer(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            stock(self, config, *args, **kwargs)
            self.saved_model_file = unique_file(self.saved_model_file)
            if not config["single_spec"]:
                from recbole_llm.bridge import distributed  # here: it loads torch

                self.saved_model_file = distributed.agreed(self.saved_model_file)

        return __init__

    def make_tree_trainer(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            stock(self, *args, **kwargs)
            self.saved_model_file = unique_file(self.saved_model_file)
            stem = os.path.splitext(self.saved_model_file)[0]
            self.temp_file, self.temp_best_file = f"{stem}-temp.pth", f"{stem}-temp-best.pth"

        return __init__

    def make_save(stock: Callable[..., None]) -> Callable[..., None]:
        def save_pretrained_model(self: Any, epoch: int, saved_model_file: str) -> None:
            # the name without a unique part is the one that configurations give as pre_model_path
            stock(self, epoch, unique_file(saved_model_file))
            _publish(self.saved_model_file, saved_model_file)

        return save_pretrained_model

    override(module.Trainer, "__init__", make_trainer)
    override(module.DecisionTreeTrainer, "__init__", make_tree_trainer)
    override(module.PretrainTrainer, "save_pretrained_model", make_save)


# ---------------------------------------------------------------- splits


def _has_time_split() -> tuple[bool, str]:
    from importlib.metadata import version

    found = version("recbole")
    if found == "1.2.0":
        return False, "RecBole 1.2.0 has no split by time"
    return True, "with order RO, split TS takes a user's test interactions at random, whatever their time"


@repair(
    "recbole.data.dataset.dataset",
    upstream="data/dataset/dataset.py:1756-1769 (a user's times are sorted, the rows that they choose are not)",
    issues="none found",
    until="time_based_split sorts the rows",
    condition=_has_time_split,
)
def _time_split(module: ModuleType) -> None:
    """Split TS tests on what came after its boundary, in every order."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def time_based_split(self: Any, ratios: Any, group_by: Any) -> Any:
            if self.time_field in self.inter_feat:
                times = self.inter_feat[self.time_field]
                if bool((times[1:] < times[:-1]).any()):
                    self.sort(by=self.time_field)
            return stock(self, ratios, group_by)

        return time_based_split

    override(module.Dataset, "time_based_split", make)


# ---------------------------------------------------------------- saved data


@repair(
    "recbole.data.utils",
    upstream="data/utils.py:55-71 (a dataset read back keeps the configuration of the run that saved it, which"
    " dataset.py:1825-1844 splits by)",
    issues="none found",
    until="create_dataset hands its config to the dataset that it reads",
    condition=always("a saved dataset is split by the eval_args of the run that saved it, without a word"),
)
def _saved_dataset(module: ModuleType) -> None:
    """A dataset read from a file is split, and its content read, by the present configuration."""

    def make(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def create_dataset(config: Any) -> Any:
            dataset = stock(config)
            if dataset.config is config:  # made and not read
                _tell_of_other_settings(config["dataset_save_path"])
            dataset.config = config
            return dataset

        return create_dataset

    override(module, "create_dataset", make)


@repair(
    "recbole.data.utils",
    upstream="data/utils.py:94-95 (takes the generators of the loaders that the run goes on with), :105-139 (loaders"
    " read back keep their batch sizes and their class)",
    issues="none found",
    until="save_split_dataloaders gives the generators back, and load_split_dataloaders compares the training arguments",
    condition=always("a run that saves its loaders shuffles otherwise than one that does not, or that reads them"),
)
def _saved_dataloaders(module: ModuleType) -> None:
    """Saving the data loaders changes nothing in the run; loaders of other batch sizes or rows are made anew."""

    def make_save(stock: Callable[..., None]) -> Callable[..., None]:
        def save_split_dataloaders(config: Any, dataloaders: Any) -> None:
            generators = [(loader.generator, getattr(loader.sampler, "generator", None)) for loader in dataloaders]
            try:
                stock(config, dataloaders)
            finally:
                for loader, (own, of_sampler) in zip(dataloaders, generators, strict=True):
                    loader.generator, loader.sampler.generator = own, of_sampler

        return save_split_dataloaders

    def make_load(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def load_split_dataloaders(config: Any) -> Any:
            loaders = stock(config)
            if loaders is None:
                _tell_of_other_settings(config["dataloaders_save_path"])
                return None
            other_rows = type(loaders[0]) is not module.get_dataloader(config, "train")
            if other_rows or any(loader.batch_sampler.batch_size != loader.step for loader in loaders):
                getLogger().info("The saved data loaders are of another training or batch size and are made anew.")
                return None
            for loader in loaders:
                loader._dataset.config = config
            return loaders

        return load_split_dataloaders

    override(module, "save_split_dataloaders", make_save)
    override(module, "load_split_dataloaders", make_load)


def _tell_of_other_settings(file: Any) -> None:
    """Say that a file that was named is left alone, which RecBole does without a word."""
    if file and os.path.exists(file):
        getLogger().warning(
            "%s was saved under other settings and is not used: the data are read from their files.", file
        )


# ---------------------------------------------------------------- case study


@repair(
    "recbole.utils.case_study",
    upstream="utils/case_study.py:51-66 (history of a user without a row in the split is None; rows of a sequential"
    " model are left out)",
    issues="none found",
    until="full_sort_scores checks the ids and the loader that it is given",
    condition=always("ids that are not in the split end in TypeError: full_like(NoneType), or are dropped"),
)
def _case_study(module: ModuleType) -> None:
    """full_sort_scores and full_sort_topk name the users whom the split does not have."""
    import numpy as np

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def full_sort_scores(uid_series: Any, model: Any, test_data: Any, device: Any = None) -> Any:
            from recbole.data.dataloader import FullSortEvalDataLoader

            if not isinstance(test_data, FullSortEvalDataLoader):
                raise ValueError(
                    f"test_data must be a loader of eval_args mode 'full', got a {type(test_data).__name__}: "
                    "a case study ranks the whole catalogue. Set eval_args.mode to full."
                )
            users = np.asarray([int(user) for user in uid_series], dtype=np.int64)
            dataset = test_data._dataset
            present = np.unique(dataset.inter_feat[dataset.uid_field].numpy())
            absent = np.unique(users[~np.isin(users, present)]).tolist()
            if not absent:
                return stock(users, model, test_data, device)
            tokens = dataset.field2id_token[dataset.uid_field]
            names = [
                f"{user} ({tokens[user]})" if 0 <= user < len(tokens) else f"{user} (no id)" for user in absent[:10]
            ]
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            raise ValueError(
                f"uid_series: {len(absent)} of {len(np.unique(users))} users have no interaction in this split: "
                f"{', '.join(names)}{more}. Give internal ids (dataset.token2id) of users whom the loader has: "
                "np.unique(test_data.dataset.inter_feat[test_data.uid_field])."
            )

        return full_sort_scores

    override(module, "full_sort_scores", make)
