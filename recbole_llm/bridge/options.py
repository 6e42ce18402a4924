"""The configuration keys we own: one frozen dataclass, validated once.

RecBole's own keys keep their meaning and are not touched here. A key that RecBole, a stock model's YAML or this file knows
is never an error, however similar it looks to one of ours (``reg_weight`` is 0.9 similar to ``neg_weight``).
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.content.encoder_settings import DTYPES, OVERFLOWS, POOLINGS

LOSS_TYPES = ("catalog_bce", "catalog_ce", "sampled_bce", "pair_bce")
CATALOG_LOSSES = ("catalog_bce", "catalog_ce")
USER_TOWER_PARTS = ("history", "id", "text")
BLOCKS = ("closed_form", "learned")
EVAL_BACKENDS = ("streamed", "stock")
NEG_VALID_FIELD = "neg_valid"  # column of a batch whose rows share their negatives: where one counts
# at this similarity an unknown key is taken for a misspelt one of ours
MISSPELLING_RATIO = 0.85

_CHOICES: dict[str, tuple[Any, ...]] = {
    "encoder_pooling": ("auto", *POOLINGS),
    "encoder_overflow": OVERFLOWS,
    "encoder_dtype": DTYPES,
    "feature_transform": ("center", "none", "standardize", "whiten"),
    "cold_map": ("ridge", "none"),
    "scoring": ("dot", "cosine"),
    "loss_type": LOSS_TYPES,
    "kernel_backend": ("auto", "triton", "torch"),
    "eval_backend": EVAL_BACKENDS,
}

# keys that change what the dataset carries: a saved dataset made with other values is stale
DATASET_KEYS = (
    "item_text_fields",
    "item_text_template",
    "user_text_fields",
    "item_features_file",
    "encoder",
    "encoder_revision",
    "encoder_pooling",
    "encoder_prompt",
    "encoder_max_tokens",
    "encoder_overflow",
    "encoder_dim",
    "encoder_dtype",
    "feature_transform",
)


@dataclass(frozen=True)
class Options:
    """Every key of ours with its type; ``recbole_llm/properties/LLMTwoTower.yaml`` says what each one does."""

    item_text_fields: tuple[str, ...] | None
    item_text_template: str | None
    user_text_fields: tuple[str, ...] | None
    item_features_file: str | None
    encoder: str | None
    encoder_revision: str | None
    encoder_pooling: str
    encoder_prompt: str | None
    encoder_max_tokens: int | None
    encoder_overflow: str
    encoder_dim: int | None
    encoder_batch_size: int
    encoder_dtype: str
    feature_cache_dir: str | None
    feature_transform: str
    blocks: tuple[str, ...]
    closed_form_dim: int | str
    tower_features: bool
    embedding_size: int
    adapter_hidden_size: int | None
    use_item_id: bool
    use_item_bias: bool
    user_tower: tuple[str, ...]
    history_dropout: float
    history_exponent: float
    history_decay: float | None
    use_order: bool
    share_parameters: bool
    cold_map: str
    cold_boost: float | str
    scoring: str
    scale_init: float
    loss_type: str
    neg_weight: float
    kernel_backend: str
    eval_backend: str
    shard_items: bool
    resume_from: str | None

    @property
    def trains_on_users(self) -> bool:
        """Whether a training row is a user with all its items (catalogue losses) and not an interaction."""
        return self.loss_type in CATALOG_LOSSES

    @classmethod
    def from_config(cls, config: Any) -> "Options":
        """Read and validate our keys.

        Args:
            config: RecBole's ``Config``, or any mapping that gives ``None`` for an absent key.

        Raises:
            ValueError: on a value of the wrong type or outside its range, or a key that looks like a misspelt one of ours.
        """
        external = getattr(config, "external_config_dict", None)
        if external is not None:
            reject_misspelt_keys(external)
        defaults = default_values()  # a checkpoint may be older than a key
        values: dict[str, Any] = {
            name: _READERS[name](name, config[name] if name in config else defaults[name])
            for name in (f.name for f in fields(cls))
        }
        preloaded = None if values["item_features_file"] else preloaded_vectors(config)
        if preloaded is not None:
            values["item_features_file"] = preloaded.file
        if values["tower_features"] is None:  # the closed form already carries the text
            values["tower_features"] = "closed_form" not in values["blocks"] or not values["use_item_id"]
        if values["shard_items"]:
            _reject_what_shards_lack(values, config)
        return cls(**values)


@dataclass(frozen=True)
class PreloadedVectors:
    """Item vectors that RecBole's own ``preload_weight`` names: the atomic file and its two columns."""

    file: str
    id_field: str
    vector_field: str


def preloaded_vectors(config: Any) -> PreloadedVectors | None:
    """The item vectors that ``preload_weight`` names, if it names some."""
    preload = config["preload_weight"]
    if not preload:
        return None
    item_ids = {config["ITEM_ID_FIELD"], *(config["alias_of_item_id"] or ())}
    for id_field, vector_field in preload.items():
        for suffix, columns in (config["load_col"] or {}).items() if id_field in item_ids else ():
            if vector_field in (columns or ()):
                file = Path(config["data_path"]) / f"{config['dataset']}.{suffix}"
                return PreloadedVectors(str(file), id_field, vector_field)
    return None


def _reject_what_shards_lack(values: Mapping[str, Any], config: Any) -> None:
    """Raise where ``shard_items`` meets what needs every item in one process."""
    blocks, loss, backend = values["blocks"], values["loss_type"], values["kernel_backend"]
    modes = (config["eval_args"] or {}).get("mode") or "full"
    modes = sorted(set(modes.values())) if isinstance(modes, Mapping) else [modes]
    ce_on_triton = loss == "catalog_ce" and backend == "triton"
    for fits, key, value, expected in (
        (blocks == ("learned",), "blocks", blocks, "learned (the closed form is fitted in one process)"),
        (loss in CATALOG_LOSSES, "loss_type", loss, " or ".join(CATALOG_LOSSES)),
        (not ce_on_triton, "kernel_backend", backend, "auto or torch for catalog_ce"),
        (values["eval_backend"] == "streamed", "eval_backend", values["eval_backend"], "streamed"),
        (modes == ["full"], "eval_args.mode", modes, "full"),
        (not config["enable_scaler"], "enable_scaler", True, "false (enable_amp, in bfloat16, works)"),
    ):
        if not fits:
            raise ValueError(f"With shard_items, {key} must be {expected}, got {value!r}. Or set shard_items to false.")


def _fail(name: str, value: Any, expected: str, hint: str = "") -> ValueError:
    return ValueError(f"{name} must be {expected}, got {value!r}.{' ' + hint if hint else ''}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, Path):
        return str(value)
    # RecBole turns a command-line value such as 2020 into a number; a name may well look like one
    if _is_number(value):
        return str(value)
    raise _fail(name, value, "a string or empty")


def _names(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        names = tuple(value)
        if all(isinstance(n, str) and n for n in names):
            return names
    raise _fail(name, value, "a list of column names", f"For example {name}: [title, description].")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _fail(name, value, "true or false")


def _choice(name: str, value: Any) -> str:
    known = _CHOICES[name]
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=1)
    raise _fail(name, value, f"one of {', '.join(known)}", f"Did you mean {near[0]!r}?" if near else "")


def _count(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise _fail(name, value, "an integer of at least 1")


def _optional_count(name: str, value: Any) -> int | None:
    return None if value is None else _count(name, value)


def _hidden(name: str, value: Any) -> int | None:
    return None if value in (None, 0, False) else _count(name, value)


def _positive(name: str, value: Any) -> float:
    if _is_number(value) and 0 < value < float("inf"):
        return float(value)
    raise _fail(name, value, "a finite number above 0")


def _optional_positive(name: str, value: Any) -> float | None:
    return None if value is None else _positive(name, value)


def _not_negative(name: str, value: Any) -> float:
    if _is_number(value) and 0 <= value < float("inf"):
        return float(value)
    raise _fail(name, value, "a finite number of at least 0")


def _share(name: str, value: Any) -> float:
    if _is_number(value) and 0 <= value < 1:
        return float(value)
    raise _fail(name, value, "a number in [0, 1)")


def _auto_flag(name: str, value: Any) -> bool | None:
    if value == "auto" or isinstance(value, bool):
        return None if value == "auto" else value
    raise _fail(name, value, "auto, true or false")


def _boost(name: str, value: Any) -> float | str:
    if value == "auto":
        return value
    if _is_number(value) and 0 < value < float("inf"):
        return float(value)
    raise _fail(name, value, "auto or a number above 0")


def _rank(name: str, value: Any) -> int | str:
    if value in ("auto", "full"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise _fail(name, value, "auto, full or an integer of at least 1")


def _sum_of(known: tuple[str, ...]) -> Callable[[str, Any], tuple[str, ...]]:
    expected = f"one of {', '.join(known)}, or a sum such as {'+'.join(known[:2])}"

    def read(name: str, value: Any) -> tuple[str, ...]:
        parts = [p.strip() for p in value.split("+")] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not parts:
            raise _fail(name, value, expected)
        unknown = [p for p in parts if p not in known]
        if unknown:
            raise _fail(name, value, expected, f"Unknown: {unknown}.")
        return tuple(dict.fromkeys(parts))

    return read


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "item_text_fields": _names,
    "item_text_template": _text,
    "user_text_fields": _names,
    "item_features_file": _text,
    "encoder": _text,
    "encoder_revision": _text,
    "encoder_pooling": _choice,
    "encoder_prompt": _text,
    "encoder_max_tokens": _optional_count,
    "encoder_overflow": _choice,
    "encoder_dim": _optional_count,
    "encoder_batch_size": _count,
    "encoder_dtype": _choice,
    "feature_cache_dir": _text,
    "feature_transform": _choice,
    "blocks": _sum_of(BLOCKS),
    "closed_form_dim": _rank,
    "tower_features": _auto_flag,
    "embedding_size": _count,
    "adapter_hidden_size": _hidden,
    "use_item_id": _flag,
    "use_item_bias": _flag,
    "user_tower": _sum_of(USER_TOWER_PARTS),
    "history_dropout": _share,
    "history_exponent": _not_negative,
    "history_decay": _optional_positive,
    "use_order": _flag,
    "share_parameters": _flag,
    "cold_map": _choice,
    "cold_boost": _boost,
    "scoring": _choice,
    "scale_init": _positive,
    "loss_type": _choice,
    "neg_weight": _not_negative,
    "kernel_backend": _choice,
    "eval_backend": _choice,
    "shard_items": _flag,
    "resume_from": _text,
}
OWN_KEYS = tuple(_READERS)


@lru_cache(maxsize=1)
def default_values() -> dict[str, Any]:
    """What ``properties/LLMTwoTower.yaml`` says."""
    path = Path(__file__).resolve().parents[1] / "properties" / "LLMTwoTower.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def stock_keys() -> frozenset[str]:
    """Every key that RecBole's argument lists and the YAML files in its wheel name."""
    import recbole
    from recbole.utils import argument_list

    names = {key for value in vars(argument_list).values() if isinstance(value, list) for key in value}
    for path in (Path(recbole.__file__).parent / "properties").rglob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        names.update(key for key in content or () if isinstance(key, str))
    # read by Config and the quick-start functions, in no list
    return frozenset(
        names | {"model", "dataset", "config_files", "nproc", "world_size", "ip", "port", "offset", "local_rank"}
    )


def reject_misspelt_keys(given: Iterable[str]) -> None:
    """Raise on a key that nobody knows and that looks like one of ours; name the other unknown keys in one log line."""
    unknown = sorted(key for key in given if key not in OWN_KEYS and key not in stock_keys())
    for key in unknown:
        near = difflib.get_close_matches(key, OWN_KEYS, n=1, cutoff=MISSPELLING_RATIO)
        if near:
            raise ValueError(
                f"Unknown configuration key {key!r}: did you mean {near[0]!r}? "
                "Rename it, or remove it if it belongs to something else."
            )
    if unknown:
        getLogger().info("Configuration keys that neither RecBole nor recbole-llm reads: %s", ", ".join(unknown))
