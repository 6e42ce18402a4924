"""Checkpoints: the newest of a folder, and a trained LLMTwoTower from one, without running code from a file.

RecBole's ``load_data_and_model`` unpickles a ``Config``, and a saved dataset where it finds one; here the configuration is
made anew from the settings that the checkpoint names, the dataset is read and split as it was, and its digest proves that
it is the split the model was trained on.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# of pandas: RecBole's is "python"; "c" takes a quarter of its time, and the digest of the interactions tells whether both
# read alike
PARSERS = ("c", "python")


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A trained model with the data it was made of.

    Attributes:
        config: RecBole's ``Config``, made anew.
        model: in evaluation mode, on the device of its configuration.
        dataset: all interactions.
        splits: training, validation and test data; as RecBole's ``Dataset.build`` gives them.
        state: what else the checkpoint holds, plain values and tensors.
    """

    config: Any
    model: Any
    dataset: Any
    splits: list[Any]
    state: dict[str, Any]


def load_trained(
    checkpoint: str | Path,
    *,
    data_path: str | Path | None = None,
    encoder: str | None = None,
    item_features_file: str | Path | None = None,
    item_modalities: str | Mapping[str, Any] | None = None,
    feature_cache_dir: str | Path | None = None,
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, on the device of its configuration, with the dataset of its training split.

    Args:
        checkpoint: as for :func:`load_run`, like the rest.
        data_path: as there.
        encoder: as there.
        item_features_file: as there.
        item_modalities: as there.
        feature_cache_dir: as there.

    Raises:
        ValueError: as there.
    """
    found = load_run(
        checkpoint,
        data_path=data_path,
        encoder=encoder,
        item_features_file=item_features_file,
        item_modalities=item_modalities,
        feature_cache_dir=feature_cache_dir,
    )
    return found.model, found.splits[0]


def load_run(
    checkpoint: str | Path,
    *,
    data_path: str | Path | None = None,
    encoder: str | None = None,
    item_features_file: str | Path | None = None,
    item_modalities: str | Mapping[str, Any] | None = None,
    feature_cache_dir: str | Path | None = None,
) -> LoadedRun:
    """Load a trained model with all its splits.

    Texts are encoded where the feature store lacks their vectors.

    Args:
        checkpoint: what ``recbole-llm run`` saved. No path is taken out of it: those that the training was given are given again.
        data_path: the folder that holds the dataset's folder now.
        encoder: the folder of the encoder, or its name on the hub instead of the one in the checkpoint.
        item_features_file: the file of item vectors.
        item_modalities: encoders of pictures, as for the training.
        feature_cache_dir: where vectors of texts are kept.

    Raises:
        ValueError: if the file is none of ours or damaged, a path must be given again, or the dataset is not there or not the
            one trained on.
    """
    from recbole_llm.bridge.checkpoint import MODEL_PARTS, WRONG_CONTENTS, as_given, data_fingerprint, read_checkpoint
    from recbole_llm.bridge.checkpoint_settings import take_settings
    from recbole_llm.bridge.register import is_ours, registered, resolve

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # of files that are not ours
        state = read_checkpoint(checkpoint, parts=MODEL_PARTS)
    paths = {
        "data_path": data_path,
        "encoder": encoder,
        "item_features_file": item_features_file,
        "item_modalities": item_modalities,
        "feature_cache_dir": feature_cache_dir,
    }
    own = {key: str(value) for key, value in paths.items() if value is not None}
    settings = take_settings(state.get("settings"), str(checkpoint), own, is_ours)
    registration = registered(settings.model)
    assert registration is not None
    assert registration.dataset is not None
    model_class, dataset_class = resolve(registration.model), resolve(registration.dataset)
    dataset_name, given = settings.dataset, as_given(settings.given | own)
    from recbole.config import Config
    from recbole.utils import init_seed

    with _no_command_line():
        config = Config(settings.model, dataset_name, config_dict=given)
    _require_files(config, checkpoint)
    for name in ("user_inter_num_interval", "item_inter_num_interval"):
        if config[name] == "[0,inf)":  # counts everybody and drops nobody: 1.2 s of a million interactions
            config[name] = None
    for parser in PARSERS:
        init_seed(config["seed"], config["reproducibility"])
        try:
            with _csv_parser(parser):
                dataset = dataset_class(config)
                dataset.take_tuned(_tuned_of(state, checkpoint))
                splits = dataset.build()
        except ValueError:
            if parser == PARSERS[-1]:
                raise
            continue
        history = splits[0].training_rows()
        if state["data"] == data_fingerprint(history.offsets, history.ids):
            break
    else:
        raise ValueError(
            f"checkpoint: {str(checkpoint)!r} was trained on other interactions than {config['data_path']} gives now. "
            "Put the files back as they were, name their folder with --data-path FOLDER, or train again."
        )
    model = model_class(config, splits[0]).to(config["device"])
    try:
        model.load_state_dict(state["state_dict"])
        model.load_other_parameter(state["other_parameter"])
    except WRONG_CONTENTS as error:
        raise ValueError(
            f"checkpoint: {str(checkpoint)!r} holds another model than this version of recbole-llm makes of its settings "
            f"({error}). Use the version that wrote it, or train again."
        ) from error
    return LoadedRun(config, model.eval(), dataset, splits, state)


def _tuned_of(state: Mapping[str, Any], checkpoint: str | Path) -> Any:
    """The fine-tuned encoder in a checkpoint; ``None`` without one."""
    from recbole_llm.bridge.checkpoint import WRONG_CONTENTS
    from recbole_llm.bridge.tuned_content import TunedContent

    found = state["other_parameter"].get("encoder")
    try:
        return None if found is None else TunedContent.from_state(found)
    except WRONG_CONTENTS as error:
        raise ValueError(
            f"checkpoint: {str(checkpoint)!r} holds a fine-tuned encoder of another form ({error})."
        ) from error


def picture_encoders(item_modalities: str | Mapping[str, Any] | None) -> tuple[str, ...]:
    """List the encoders of pictures that a caller names.

    Args:
        item_modalities: as the configuration key.

    Raises:
        ValueError: if it is not of that form.
    """
    from recbole_llm.bridge.option_values import modalities

    named = modalities("item_modalities", item_modalities)
    return (named["image"].encoder,) if "image" in named else ()


def sound_encoder_of(item_modalities: str | Mapping[str, Any] | None) -> tuple[str, float | None] | None:
    """Return the encoder of sounds that a caller names with the seconds of its windows, or ``None``; raises as above."""
    from recbole_llm.bridge.option_values import modalities

    source = modalities("item_modalities", item_modalities).get("audio")
    return None if source is None else (source.encoder, source.seconds)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint in ``folder`` that was written last; those of a run's last epoch do not count.

    Args:
        folder: such as RecBole's ``checkpoint_dir``. Checkpoints of LLMTwoTower and of its registered subclasses count.

    Returns:
        ``None`` where there is none.
    """
    from recbole_llm.bridge.register import our_models

    paths = [path for name in our_models() for path in Path(folder).glob(f"{name}-*.pth")]
    found = [path for path in paths if not path.stem.endswith("-last")]
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


@contextmanager
def _csv_parser(engine: str) -> Iterator[None]:
    """Let RecBole's dataset read its files with another of pandas' parsers than the one it names; numbers alike."""
    import recbole.data.dataset.dataset as module

    from recbole_llm.bridge.repairs.registry import ModuleView

    stock = module.pd
    chosen = {"engine": engine} | ({"float_precision": "round_trip"} if engine == "c" else {})
    read_csv = lambda *given, **named: stock.read_csv(*given, **(named | chosen))  # noqa: E731
    module.pd = ModuleView(stock, {"read_csv": read_csv})
    try:
        yield
    finally:
        module.pd = stock


@contextmanager
def _no_command_line() -> Iterator[None]:
    """Hide the process's arguments, which ``Config`` would take for its own."""
    kept = sys.argv
    sys.argv = kept[:1]
    try:
        yield
    finally:
        sys.argv = kept


def _require_files(config: Any, checkpoint: str | Path) -> None:
    """Raise before RecBole offers a download."""
    from recbole_llm.bridge.files import missing_files

    missing = missing_files(config)
    if missing:
        raise ValueError(
            f"checkpoint: {str(checkpoint)!r} was trained on dataset {config['dataset']!r}, and there is no "
            f"{' and no '.join(missing)} in {Path(config['data_path'])}. Run this where the model was trained, or name the "
            f"folder that holds {config['dataset']}/ with --data-path FOLDER."
        )
