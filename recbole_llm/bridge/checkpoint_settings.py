"""Which settings are taken from a checkpoint, and which must be given again.

A checkpoint is a file, and somebody else may have written it. From its settings a run takes the keys of :data:`TAKEN`:
numbers, choices and names of columns that decide how the data are read and split and how the model is made and trained. It
takes no path, neither to load from nor to save to. A resumed run cannot do without some of them, so it says what to give
again, with the value that the file holds:

- ``data_path`` (but for ml-100k, which ships with RecBole, and where it was left at RecBole's default),
- ``item_features_file``,
- ``item_modalities``, where an encoder in it is a folder, an ``onnx:FILE`` or a function,
- ``encoder``, where it is a folder or a function, ``module:function`` (a name on the hub is neither: it is taken, and loaded
  without running its code),
- ``feature_cache_dir``, where texts are encoded: another folder means that all are encoded once more.

``checkpoint_dir`` is the folder of the file that was named. Configuration files are not read again: what they said is in the
settings, and their paths are paths of the file's.
"""

import argparse
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recbole_llm.bridge.option_values import modalities
from recbole_llm.content.encoder_settings import is_function, is_onnx

MODEL = "LLMTwoTower"
HISTORIES = ("all", "train")  # interactions that recommendations are made from

_MODEL_KEYS = """
    item_text_fields item_text_template user_text_fields item_modalities item_columns encoder encoder_revision
    encoder_pooling encoder_prompt encoder_max_tokens encoder_overflow encoder_dim encoder_batch_size encoder_dtype
    feature_transform finetune blocks closed_form_dim tower_features embedding_size adapter_hidden_size use_item_id use_item_bias
    user_tower history_dropout history_exponent history_decay use_order order_test share_parameters cold_map cold_boost
    scoring scale_init
    loss_type neg_weight kernel_backend eval_backend shard_items refit_rows weight_field weight_exponent dislike_weight
"""
_TRAINING_KEYS = """
    gpu_id use_gpu worker seed reproducibility state show_progress shuffle epochs train_batch_size learner
    learning_rate train_neg_sample_args eval_step stopping_step clip_grad_norm weight_decay loss_decimal_place
    require_pow enable_amp enable_scaler transform eval_args repeatable metrics topk valid_metric
    valid_metric_bigger eval_batch_size metric_decimal_place tail_ratio
"""
_DATA_KEYS = """
    field_separator seq_separator encoding USER_ID_FIELD ITEM_ID_FIELD RATING_FIELD TIME_FIELD LABEL_FIELD seq_len
    threshold NEG_PREFIX LIST_SUFFIX POSITION_FIELD ITEM_LIST_LENGTH_FIELD MAX_ITEM_LIST_LENGTH numerical_features
    load_col unload_col unused_col additional_feat_suffix rm_dup_inter val_interval filter_inter_by_user_or_item
    user_inter_num_interval item_inter_num_interval alias_of_user_id alias_of_item_id preload_weight normalize_field
    normalize_all discretization benchmark_filename
"""
TAKEN = frozenset(f"{_MODEL_KEYS} {_TRAINING_KEYS} {_DATA_KEYS}".split())
NOT_TAKEN: dict[str, str] = {
    **dict.fromkeys(("data_path", "item_features_file"), "a path to load from; to be given again"),
    "feature_cache_dir": "a path to load from and save to; to be given again",
    **dict.fromkeys(("dataset_save_path", "dataloaders_save_path"), "a path to unpickle"),
    "checkpoint_dir": "a path to save to; the folder of the file that is read",
    "config_file": "a path to load from; its contents are in the settings",
    **dict.fromkeys(("save_dataset", "save_dataloaders"), "writes files that the caller has not asked for"),
    **dict.fromkeys(("log_wandb", "wandb_project"), "reaches for a server that the caller has not asked for"),
    **dict.fromkeys(("model", "dataset", "resume_from"), "stand beside the settings"),
    "refit_from": "a path to load from; what it held is in the checkpoint",
    **dict.fromkeys(
        (
            "HEAD_ENTITY_ID_FIELD",
            "TAIL_ENTITY_ID_FIELD",
            "RELATION_ID_FIELD",
            "ENTITY_ID_FIELD",
            "alias_of_entity_id",
            "alias_of_relation_id",
            "kg_reverse_r",
            "entity_kg_num_interval",
            "relation_kg_num_interval",
        ),
        "of models with a knowledge graph",
    ),
}
# what a command that reads a checkpoint is given again, with the help of its option
PATHS = {
    "data_path": ("FOLDER", "holds the dataset's folder, as for the training or where it is now"),
    "encoder": (
        "NAME",
        "text encoder: a folder, a hub name or module:function; where it was a folder or a function, or an "
        "export does not hold it",
    ),
    "item_features_file": ("FILE", "item vectors, as for the training; by modality as '{text: a.npy, image: b.npy}'"),
    "item_modalities": (
        "TEXT",
        "encoders beside that of texts, as for the training, such as '{image: onnx:FILE}'; where one was a folder, a file or a "
        "function",
    ),
    "feature_cache_dir": ("FOLDER", "where vectors of texts are kept, as for the training"),
}
_DEFAULT_DATA_PATH = "dataset"  # properties/overall.yaml
_SHIPPED = "ml-100k"


class ResumeSettings(NamedTuple):
    """What is taken of a checkpoint's settings.

    Attributes:
        dataset: its name.
        given: configuration values, as they were given to the run that wrote it.
        left: keys of the file that are not taken, sorted.
        model: LLMTwoTower, or a subclass that the caller has registered.
    """

    dataset: str
    given: dict[str, Any]
    left: tuple[str, ...]
    model: str = MODEL


def take_settings(
    settings: Any, file: str, own: Collection[str] = (), is_known: Callable[[str], bool] = MODEL.__eq__
) -> ResumeSettings:
    """Take what may be taken of a checkpoint's settings.

    Args:
        settings: ``settings`` of the checkpoint, plain values of any form.
        file: its name, for messages.
        own: the keys that the caller gives a value himself.
        is_known: whether a name is that of LLMTwoTower or of a subclass that this process has registered. The file chooses
            among these classes and names none.

    Raises:
        ValueError: if it is of another model, its settings are not of our form, or a path must be given again.
    """
    model, dataset, given = _parts_of(settings, file)
    if not is_known(model):
        raise ValueError(
            f"checkpoint: {file!r} is of {model[:64]!r}; {MODEL}'s alone are read, and those of its subclasses that are "
            "registered: for one of yours, import the module whose class has @recbole_llm.register_model first."
        )
    names = [dataset, *_names_of_files(given)]
    if wrong := [name for name in names if not isinstance(name, str) or not _is_plain(name)]:
        raise ValueError(
            f"checkpoint: {file!r} names {str(wrong[0])[:64]!r} as a dataset or a part of one: that is no name."
        )
    again = [option for key, option in _to_give_again(dataset, given) if key not in own]
    if again:
        raise ValueError(
            f"checkpoint: {file!r} was trained with {' '.join(again)}. A path is not taken out of a file, and neither is a "
            "function: somebody else may have written it. Give it again, on the command line or as an argument."
        )
    taken = {key: value for key, value in given.items() if key in TAKEN}
    left = sorted(key for key in given if key not in TAKEN and key not in own and key not in ("model", "dataset"))
    return ResumeSettings(dataset, taken, tuple(left), model)


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of :data:`PATHS`."""
    for name, (metavar, text) in PATHS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, metavar=metavar, help=text)


def add_history_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--history``, whose default is ``None``: an export is not asked."""
    parser.add_argument(
        "--history",
        choices=HISTORIES,
        default=None,
        help="of a checkpoint: the interactions that are histories and what users have seen: all of the data set, as where "
        "nothing is given, or those of the training split",
    )


def given_paths(options: argparse.Namespace) -> dict[str, str | None]:
    """Collect the values of the options of :data:`PATHS`, by name."""
    return {name: getattr(options, name) for name in PATHS}


def options_to_repeat(config: Any) -> list[str]:
    """List the options, such as ``--data-path=data``, that a command needs beside a checkpoint of this configuration."""
    return [option for _, option in _to_give_again(config["dataset"], config.external_config_dict)]


def command_to_resume(file: str, config: Any) -> str:
    """Write the command that resumes from a checkpoint of this configuration."""
    return " ".join(["recbole-llm run --resume", shlex.quote(file), *options_to_repeat(config)])


def _parts_of(settings: Any, file: str) -> tuple[str, str, dict[str, Any]]:
    parts = settings if isinstance(settings, Mapping) else {}
    model, dataset, given = parts.get("model"), parts.get("dataset"), parts.get("given")
    if not (isinstance(model, str) and isinstance(dataset, str) and isinstance(given, dict)):
        raise ValueError(
            f"checkpoint: {file!r} names no model, dataset and settings: it is not whole, or not of recbole-llm."
        )
    if not all(isinstance(key, str) for key in given):
        raise ValueError(f"checkpoint: {file!r} holds settings that are no names with values.")
    return model, dataset, given


def _names_of_files(given: Mapping[str, Any]) -> Iterator[Any]:
    """What RecBole puts between "{dataset}." and ".inter", or behind it (data/dataset/dataset.py, _load_data)."""
    for key in ("benchmark_filename", "additional_feat_suffix", "load_col", "unload_col"):
        value = given.get(key)
        if isinstance(value, (list, tuple, dict)):
            yield from value
        elif value:
            yield value


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[^/\\\x00]+", name) is not None and name not in (".", "..")


def _to_give_again(dataset: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List the keys that must be given again, with the options that give them. They are paths that change the run."""
    encodes = given.get("encoder", True) and not given.get("item_features_file")
    for key in PATHS:
        value = given.get(key)
        if not value or not isinstance(value, (str, Path, Mapping)):
            continue
        written = _as_option(value)
        needed = {
            "data_path": dataset != _SHIPPED and Path(written) != Path(_DEFAULT_DATA_PATH),
            "encoder": _is_elsewhere(written),
            "item_modalities": any(map(_is_elsewhere, _encoders_of(given.get("item_modalities")))),
            "feature_cache_dir": bool(encodes or given.get("item_modalities")),
        }
        if needed.get(key, True):
            yield key, f"--{key.replace('_', '-')}={shlex.quote(written)}"


def _as_option(value: Any) -> str:
    """Write a value as a command line gives it; what a file holds by modality as JSON, which is YAML too."""
    return json.dumps(value, default=str) if isinstance(value, Mapping) else str(value)


def _encoders_of(value: Any) -> list[str]:
    """The encoders that a value of ``item_modalities`` names; none of a value that :class:`Options` refuses."""
    try:
        return [source.encoder for source in modalities("item_modalities", value).values()]
    except ValueError:
        return []


def _is_elsewhere(encoder: str) -> bool:
    """Return whether an encoder is a folder, a file or a function, and no name on the hub."""
    return is_onnx(encoder) or is_function(encoder) or _is_folder(encoder)


def _is_folder(encoder: str) -> bool:
    """Return whether an encoder is a folder, on this machine or by its form, and no name on the hub."""
    return (
        encoder.startswith((".", "/", "~"))
        or "\\" in encoder
        or encoder.count("/") > 1
        or Path(encoder).expanduser().is_dir()
    )
