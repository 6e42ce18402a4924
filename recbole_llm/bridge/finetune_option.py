"""The key ``finetune``: its parts, their defaults, and what it cannot be combined with."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from recbole_llm.bridge import option_values as values
from recbole_llm.bridge.option_checks import CATALOG_LOSSES
from recbole_llm.content.encoder_settings import is_function, is_onnx
from recbole_llm.fitting.finetune_recipe import (
    LAST_LAYERS,
    LEARNING_RATES,
    LEAST_UNITS,
    METHODS,
    TUNABLE,
    WARMUP,
    Recipe,
)

EXAMPLE = "For example finetune: {encoder: text, method: lora, max_tokens: 32}."
_OF_LORA = ("rank", "alpha")


def _between(low: float, high: float, why: str = "") -> values.Reader:
    def read(name: str, value: Any) -> float:
        if values.is_number(value) and low <= value <= high:
            return float(value)
        raise values.fail(name, value, f"a number from {low:g} to {high:g}", why)

    return read


def _users(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= LEAST_UNITS:
        return value
    raise values.fail(
        name, value, f"an integer of at least {LEAST_UNITS}", "Fewer users cannot tell a gain from chance."
    )


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "encoder": values.choice(*TUNABLE),
    "method": values.choice(*METHODS),
    "layers": values.optional_count,
    "rank": values.count,
    "alpha": values.positive,
    "learning_rate": values.positive,
    "warmup": _between(*WARMUP, "Without a warm-up the first steps destroy what the encoder knows."),
    "decay": _between(0.0, 1.0),
    "steps": values.count,
    "items_per_step": values.count,
    "refresh": values.count,
    "max_tokens": values.optional_count,
    "gate_level": _between(1e-4, 0.05),
    "gate_users": _users,
}


def read_finetune(name: str, value: Any) -> Recipe | None:
    """Check for the parts of a fine-tuning; nothing, ``false`` and ``{}`` are none.

    Raises:
        ValueError: naming the part that is unknown or wrong, with what is expected.
    """
    given = values.from_text(name, value)
    if given in (None, "", False) or given == {}:
        return None
    if not isinstance(given, Mapping):
        raise values.fail(name, value, "the parts of a fine-tuning, or empty", EXAMPLE)
    for part in given:
        if part not in _READERS:
            near = difflib.get_close_matches(str(part), _READERS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(_READERS)}."
            raise ValueError(f"{name} has no part {str(part)!r}. {hint} {EXAMPLE}")
    if "encoder" not in given:
        raise values.fail(
            name, value, "a mapping that names encoder", f"It says what is tuned: {' or '.join(TUNABLE)}. {EXAMPLE}"
        )
    found = {part: _READERS[part](f"{name}.{part}", content) for part, content in given.items()}
    method = found.setdefault("method", METHODS[0])
    for part in _OF_LORA:
        if part in found and method != "lora":
            raise values.fail(f"{name}.{part}", found[part], "left out with method last_layers", "It belongs to lora.")
    if found.get("max_tokens") is not None and found["encoder"] != "text":
        raise values.fail(
            f"{name}.max_tokens", found["max_tokens"], "left out with encoder image", "Pictures have no tokens."
        )
    if method == "last_layers":
        found["layers"] = found.get("layers") or LAST_LAYERS
    found.setdefault("learning_rate", LEARNING_RATES[method])
    return Recipe(**found)


def settle_finetune(given: dict[str, Any], config: Any) -> None:
    """Take ``max_tokens`` over into ``encoder_max_tokens``, and raise where a fine-tuning cannot be combined with the rest.

    Args:
        given: our keys with their values in final form; changed.
        config: RecBole's.

    Raises:
        ValueError: naming the other key and the next step.
    """
    recipe: Recipe | None = given["finetune"]
    if recipe is None:
        return
    image = (given["item_modalities"] or {}).get("image")
    name = given["encoder"] if recipe.encoder == "text" else None if image is None else image.encoder
    by_file = given["item_features_file"]
    from_file = (
        recipe.encoder in by_file if isinstance(by_file, Mapping) else bool(by_file) and recipe.encoder == "text"
    )
    where = "encoder" if recipe.encoder == "text" else "item_modalities.image"
    tokens, own = recipe.max_tokens, given["encoder_max_tokens"]
    for fits, problem, step in (
        (
            "learned" in given["blocks"],
            f"blocks is {'+'.join(given['blocks'])}, without towers",
            "add learned to blocks",
        ),
        (
            given["tower_features"],
            "the towers read no content here (tower_features is false, or auto where the closed form carries the content), so that "
            "an encoder would have no effect on their loss",
            "set tower_features to true",
        ),
        (
            given["loss_type"] in CATALOG_LOSSES,
            f"loss_type is {given['loss_type']}, and an encoder is tuned through a loss over the whole catalogue",
            f"set loss_type to {' or '.join(CATALOG_LOSSES)}",
        ),
        (
            not given["shard_items"],
            "shard_items is true, and the vectors of all items are needed in one process",
            "set shard_items to false and start one process",
        ),
        (
            not from_file,
            f"the vectors of the {recipe.encoder} come from item_features_file",
            "leave the file out and name an encoder",
        ),
        (bool(name), f"there is no encoder to tune, {where} is empty", f"name one as {where}"),
        (
            not is_function(name),
            f"{where} is the function {name!r}, whose layers are not known",
            "name a model of transformers",
        ),
        (
            not is_onnx(name),
            f"{where} is {name!r}, and an ONNX file holds no layers to train",
            "name a model of transformers",
        ),
        (
            recipe.encoder == "image" or given["encoder_dtype"] == "float32",
            f"encoder_dtype is {given['encoder_dtype']}, in which small steps are lost",
            "set it to float32",
        ),
        (
            tokens is None or own in (None, tokens),
            f"max_tokens is {tokens} and encoder_max_tokens {own}",
            "give one of them: in a run of fine-tuning the frozen encoder reads as many tokens as the tuned one",
        ),
        (
            recipe.encoder != "text" or "text" not in given["user_tower"],
            f"user_tower is {'+'.join(given['user_tower'])}, and the users' texts would go through the tuned encoder untrained",
            "leave text out of user_tower",
        ),
        (not config["enable_scaler"], "enable_scaler is true", "set it to false"),
        (
            given["refit_rows"] is None,
            "a fit that repeats the choices of a checkpoint tunes no encoder",
            "export the checkpoint with --bundle-encoder and train with encoder=EXPORT/encoder and finetune left empty",
        ),
    ):
        if not fits:
            raise ValueError(f"finetune: {problem}. Next step: {step}, or leave finetune empty.")
    if tokens is not None:
        given["encoder_max_tokens"] = tokens
