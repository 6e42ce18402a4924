"""The fine-tuning of a run: what it reads of dataset and model, its checkpoints, and what becomes of a kept encoder."""

import os
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from recbole_llm.atomic import atomic_file
from recbole_llm.bridge import distributed
from recbole_llm.bridge.checkpoint import data_fingerprint, read_checkpoint, write_checkpoint
from recbole_llm.bridge.training.item_encoder import PictureItems, TextItems
from recbole_llm.bridge.tuned_content import TunedContent
from recbole_llm.content.store.feature_table import FeatureTable, fit_transform
from recbole_llm.content.tuning.adapter_file import Adapters, base_digest
from recbole_llm.content.tuning.trainable import TrainableEncoder
from recbole_llm.fitting.finetune import ItemEncoder, Tuning, fine_tune
from recbole_llm.fitting.finetune_recipe import Recipe
from recbole_llm.fitting.logs import stage
from recbole_llm.fitting.validation import Validation
from recbole_llm.scoring.block import LinearBlock

SUFFIX = ".finetune"  # of a fine-tuning that goes on, beside the checkpoint
ADAPTERS = "-adapters.safetensors"
MOST_DIFFERENCE = 1e-3  # between a vector of the merged encoder and of the trained one, of length about 1


def state_file(checkpoint: str) -> str:
    """Return the path of the state of a fine-tuning, beside a run's checkpoint."""
    return checkpoint.removesuffix(".pth") + SUFFIX


def adapters_file(checkpoint: str) -> str:
    """Return the path of the adapters of a kept encoder, beside a run's checkpoint."""
    return checkpoint.removesuffix(".pth") + ADAPTERS


def refuse_without_means(model: Any, validation: Validation | None) -> None:
    """Raise where a fine-tuning has no validation data, several processes train, or a subclass trains by another loss.

    Raises:
        ValueError: with the next step.
    """
    if model.options.finetune is None:
        return
    if distributed.active():
        raise ValueError(
            f"finetune: {distributed.world_size()} processes train, and an encoder is tuned in one. Next step: start one process, "
            "or leave finetune empty."
        )
    if type(model).calculate_loss.__module__ != "recbole_llm.model":
        raise ValueError(
            f"finetune: {type(model).__name__} has a loss of its own, and an encoder is tuned through LLMTwoTower's. Next step: "
            "leave finetune empty."
        )
    if validation is None:
        raise ValueError(
            "finetune: there is no validation split, by which a tuned encoder is compared with the frozen one. Next step: set "
            "eval_args.split to one with a validation part, or leave finetune empty."
        )


def towers_of_tuned_encoder(
    trainer: Any, train_data: Any, valid_data: Any, validation: Validation, train_towers: Callable[[], LinearBlock]
) -> Callable[[], LinearBlock]:
    """Train the towers, fine-tune the encoder that they read, and give what returns the towers' block.

    A kept encoder takes the place of its base in model and datasets, before anything else is fitted on the content.

    Args:
        trainer: of LLMTwoTower.
        train_data: its loader.
        valid_data: likewise.
        validation: by which it is told.
        train_towers: trains them.
    """
    model = trainer.model
    with stage("towers"):
        train_towers()
    if model.tuned is not None:
        getLogger().info("fine-tuning: the checkpoint holds a tuned encoder already")
    else:
        with stage("fine-tuning"):
            _tune(trainer, train_data._dataset, valid_data._dataset, validation)
    return model.towers.block  # type: ignore[no-any-return]


def _tune(trainer: Any, dataset: Any, valid_split: Any, validation: Validation) -> None:
    model = trainer.model
    recipe: Recipe = model.options.finetune
    tuning, trainable = tuning_of(model, dataset, trainer.config, recipe)
    history = model.history
    identity = {
        "data": data_fingerprint(history.offsets, history.ids),
        "base": base_digest(trainable.encoder.files.transformer()),
        "recipe": recipe.to_state(),
    }
    file = state_file(trainer.saved_model_file)

    def save(state: dict[str, Any]) -> None:
        if trainer._saves:
            with trainer._interruption.held():
                write_checkpoint(file, {**identity, "finetune": state}, trainer.config)

    resume = _state_of(file, identity, trainer.device) if trainer.config["resume_from"] else None
    outcome = fine_tune(tuning, model.training_data(), validation, resume, save)
    model.finetuning = outcome.verdict.to_state()
    getLogger().info("encoder: %s", outcome.verdict, extra={"content": True})
    if outcome.vectors is not None:
        _take(trainer, (dataset, valid_split), trainable.adapters(), outcome.vectors)


def tuning_of(model: Any, dataset: Any, config: Any, recipe: Recipe) -> tuple[Tuning, TrainableEncoder]:
    """Collect what a fine-tuning works on.

    Args:
        model: an ``LLMTwoTower`` whose towers have converged.
        dataset: of its training split.
        config: of the run.
        recipe: how the encoder is tuned.

    Returns:
        That, and the encoder in it.
    """
    options, seed = model.options, int(config["seed"])
    raw, device = dataset.raw_vectors(recipe.encoder), model.history.ids.device
    trainable, items = _encoder_of(dataset, recipe, options, seed)

    def space(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return fit_transform(FeatureTable(vectors.cpu(), raw.present, raw.modality, ""), options.feature_transform)

    tuning = Tuning(
        recipe,
        model.towers,
        model.loss,
        model._features[recipe.encoder][0],
        raw.vectors.to(device),
        raw.present.to(device),
        space,
        items,
        float(config["learning_rate"]),
        float(config["weight_decay"] or 0.0),
        int(config["train_batch_size"]),
        seed,
    )
    return tuning, trainable


def _encoder_of(dataset: Any, recipe: Recipe, options: Any, seed: int) -> tuple[TrainableEncoder, ItemEncoder]:
    """The encoder with gradients, and the items through it."""
    encoder = dataset.text_encoder() if recipe.encoder == "text" else dataset.encoder_of("image", "image")
    trainable = TrainableEncoder(encoder, recipe.method, recipe.layers, recipe.rank, recipe.alpha, seed)
    if recipe.encoder == "text":
        return trainable, TextItems(trainable, dataset.item_texts(), options.encoder_batch_size)
    return trainable, PictureItems(trainable, dataset.picture_files().paths)


def _state_of(file: str, identity: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The state of a fine-tuning that was stopped; ``None`` where it had not begun.

    Raises:
        ValueError: if it is of another fine-tuning.
    """
    if not os.path.isfile(file):
        return None
    state = read_checkpoint(file, device, parts={"finetune": dict, **dict.fromkeys(identity, (str, dict))})
    other = [name for name, value in identity.items() if state[name] != value]
    if other:
        raise ValueError(
            f"finetune: {file!r} is the state of another fine-tuning ({', '.join(other)} differ). Resume it with what it was begun "
            "with, or remove that file to begin anew."
        )
    found: dict[str, Any] = state["finetune"]
    getLogger().info("fine-tuning: goes on after step %s of %s", found.get("step"), identity["recipe"]["steps"])
    return found


def _take(trainer: Any, datasets: tuple[Any, ...], adapters: Adapters, trained: torch.Tensor) -> None:
    """Let the merged encoder make the vectors of model and datasets, and write the adapters beside the checkpoint.

    Raises:
        ValueError: if it gives other vectors than the trained one.
    """
    model, data, modality = trainer.model, adapters.to_bytes(), adapters.modality
    dataset = datasets[0]
    own = TunedContent(modality, data, torch.zeros(0, 0))
    for each in (*datasets, *(dataset.later_splits or ())):
        each.take_tuned(own)
    raw = dataset.raw_vectors(modality)
    difference = float(
        (raw.vectors - trained.cpu()).norm(dim=1).amax() / max(float(raw.vectors.norm(dim=1).amax()), 1e-12)
    )
    if not difference < MOST_DIFFERENCE:
        raise ValueError(
            f"finetune: the merged encoder's vectors differ from the trained one's by {difference:.2g} of their length. Set "
            "finetune.method to last_layers, and tell us of the encoder."
        )
    vectors = dataset.item_vectors((modality,))[modality].vectors
    model.take_tuned(TunedContent(modality, data, vectors))
    if trainer._saves:
        file = Path(adapters_file(trainer.saved_model_file))
        with atomic_file(file) as target:
            target.write(data)
        getLogger().info("fine-tuning: adapters written to %s, %.1f MB", file, len(data) / 1e6)


def remove_state(checkpoint: str) -> None:
    """Remove the state of a fine-tuning whose run has ended."""
    Path(state_file(checkpoint)).unlink(missing_ok=True)
