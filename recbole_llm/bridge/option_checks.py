"""Options that do not go together, and those that a file may not set."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.bridge import option_values as values
from recbole_llm.content.encoder_settings import is_function

CATALOG_LOSSES = ("catalog_bce", "catalog_ce")


def reject_functions_of_files(config: Any) -> None:
    """Raise where a configuration file, and nothing that the caller wrote himself, names a function to run."""
    own = config.cmd_config_dict | config.variable_config_dict
    for key in ("encoder", "item_modalities"):
        given = config.file_config_dict.get(key)
        if key in own or not given:
            continue
        named = (
            {"": given}
            if key == "encoder"
            else {name: each.encoder for name, each in values.modalities(key, given).items()}
        )
        for modality, encoder in named.items():
            if is_function(encoder):
                written = f"{{{modality}: {encoder}}}" if modality else encoder
                raise ValueError(
                    f"{key}: {encoder!r} is a function, which a configuration file may not name: reading a file runs no code. Give "
                    f"it on the command line, --{key}={written}, or in config_dict."
                )


def reject_what_shards_lack(given: Mapping[str, Any], config: Any) -> None:
    """Raise if ``shard_items`` is combined with what needs every item in one process."""
    blocks, loss, backend = given["blocks"], given["loss_type"], given["kernel_backend"]
    modes = (config["eval_args"] or {}).get("mode") or "full"
    modes = sorted(set(modes.values())) if isinstance(modes, Mapping) else [modes]
    ce_on_triton = loss == "catalog_ce" and backend == "triton"
    for fits, key, value, expected in (
        (blocks == ("learned",), "blocks", blocks, "learned (the closed form is fitted in one process)"),
        (loss in CATALOG_LOSSES, "loss_type", loss, " or ".join(CATALOG_LOSSES)),
        (not ce_on_triton, "kernel_backend", backend, "auto or torch for catalog_ce"),
        (given["eval_backend"] == "streamed", "eval_backend", given["eval_backend"], "streamed"),
        (modes == ["full"], "eval_args.mode", modes, "full"),
        (not given["weight_field"], "weight_field", given["weight_field"], "empty"),
        (not config["enable_scaler"], "enable_scaler", True, "false (enable_amp, in bfloat16, works)"),
    ):
        if not fits:
            raise ValueError(f"With shard_items, {key} must be {expected}, got {value!r}. Or set shard_items to false.")


@lru_cache(maxsize=1)
def stock_keys() -> frozenset[str]:
    """Return every key that RecBole's argument lists and the YAML files in its wheel name."""
    import recbole
    from recbole.utils import argument_list

    names = {key for value in vars(argument_list).values() if isinstance(value, list) for key in value}
    for path in (Path(recbole.__file__).parent / "properties").rglob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        names.update(key for key in content or () if isinstance(key, str))
    # read by Config and the quick-start functions, in no list
    others = "model dataset config_files nproc world_size ip port offset local_rank"
    return frozenset(names | set(others.split()))
