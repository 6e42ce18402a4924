"""Where a report's model comes from, a run that has just ended or a checkpoint, and where its figures are kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.bridge.checkpoint import read_checkpoint, write_checkpoint
from recbole_llm.bridge.checkpoint_settings import PATHS
from recbole_llm.checkpoints import LoadedRun, load_run
from recbole_llm.reporting.quality import Trained
from recbole_llm.reporting.record import KEY, checked


def of_watch(watch: Any, metrics: Mapping[str, Any]) -> Trained:
    """What a run of this process has trained.

    Args:
        watch: :class:`recbole_llm.bridge.watched_run.Watch` of the run.
        metrics: results by split.
    """
    training, valid, test = watch.splits
    model = watch.trainer.model.eval()
    number = sum(len(split._dataset.inter_feat) for split in watch.splits if split)
    return Trained(watch.config, model, training._dataset, test, number, watch.history, metrics, valid)


def of_checkpoint(
    checkpoint: str | Path, config: Any, history: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Trained:
    """What other processes have trained and saved, read by this one.

    Args:
        checkpoint: the file.
        config: of the run, whose paths are given again.
        history: curves and times of the run.
        metrics: results by split.
    """
    given = config.external_config_dict
    paths = {name: given[name] for name in PATHS if isinstance(given.get(name), (str, Path, Mapping)) and given[name]}
    return of_loaded(load_run(checkpoint, **paths), history, metrics)


def of_loaded(
    loaded: LoadedRun, history: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
) -> Trained:
    """A model that was read from its checkpoint.

    Args:
        loaded: of :func:`recbole_llm.checkpoints.load_run`.
        history: curves and times of its run, where they are known.
        metrics: results by split, where they are known.
    """
    from recbole.data.utils import create_samplers, get_dataloader

    config = loaded.config
    loaders: dict[str, Any] = {}
    if any(len(split.inter_feat) for split in loaded.splits[1:]):
        _, *samplers = create_samplers(config, loaded.dataset, loaded.splits)
        for part, split, sampler in zip(("valid", "test"), loaded.splits[1:], samplers, strict=True):
            if len(split.inter_feat):
                loaders[part] = get_dataloader(config, part)(config, split, sampler, shuffle=False)
    number = sum(len(split.inter_feat) for split in loaded.splits)
    return Trained(
        config,
        loaded.model,
        loaded.splits[0],
        loaders.get("test"),
        number,
        history or {},
        metrics or {},
        loaders.get("valid"),
    )


def keep(checkpoint: str | Path, record: Mapping[str, Any], config: Any) -> None:
    """Write the figures into the checkpoint that they are of.

    Args:
        checkpoint: the file; it stays whole whatever happens.
        record: of :func:`recbole_llm.reporting.quality.measure`.
        config: of the run.

    Raises:
        OSError: if it cannot be written.
    """
    state = read_checkpoint(checkpoint)
    write_checkpoint(checkpoint, {**state, KEY: checked(record)}, config)
