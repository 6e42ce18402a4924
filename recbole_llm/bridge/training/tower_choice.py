"""Where a run chooses how its towers are trained, and how long it waits for them to improve."""

import math
from logging import getLogger
from typing import Any

from recbole_llm.bridge.options import CATALOG_LOSSES, default_values
from recbole_llm.fitting.tower_choice import MANY_ITEMS, TowerChoice, candidates, choose_towers
from recbole_llm.fitting.validation import Validation

PATIENCE_STEPS = 100  # of the learned block, whose validation dips for some 35 steps (ml-100k) before it rises for good
PATIENCE_OF_MANY = 3  # validations of a catalogue of many items, whose epochs have some 50 steps and take a while

CHOSEN_KEYS = ("loss_type", "scoring", "scale_init", "tower_features")


def explicit_keys(config: Any) -> set[str]:
    """The keys of a choice that a person has set: in a file, on a command line, or later in a program."""
    defaults = default_values()

    def is_set(name: str) -> bool:
        return name in config.external_config_dict or config[name] != defaults[name]

    found = {name for name in CHOSEN_KEYS if is_set(name)}
    if config["finetune"]:  # an encoder is tuned through towers that read it
        found.add("tower_features")
    # whoever weighs the negatives wants the loss that has them
    return found | {"loss_type"} if is_set("neg_weight") else found


def may_choose(model: Any) -> bool:
    """Whether a run of the model chooses how its towers are trained, by the options and the size of the catalogue."""
    return model.n_items > MANY_ITEMS and model.options.loss_type in CATALOG_LOSSES and not model.item_rows.sharded


def choose(trainer: Any, validation: Validation | None) -> bool:
    """Choose how the towers are trained, and give the model new ones where that is another way than the options say.

    Args:
        trainer: before its first epoch.
        validation: by which it is chosen; without it the options hold.

    Returns:
        Whether the model has new towers.
    """
    model, config = trainer.model, trainer.config
    if validation is None or not may_choose(model) or _has_loss_of_its_own(model):
        return False
    given = TowerChoice.of(model.options)
    explicit = explicit_keys(config)
    ways = candidates(given, dict.fromkeys(explicit), bool(model._features))
    choice = choose_towers(
        ways,
        model.make_towers,
        lambda parameters: trainer._build_optimizer(params=parameters),
        model.training_data(),
        validation,
        int(config["train_batch_size"]),
    )
    choice = trainer._tables.agree(choice)
    if choice == given:
        return False
    model.take_towers(choice)
    return True


def _has_loss_of_its_own(model: Any) -> bool:
    """Whether a subclass trains by another loss, which a trial would not see."""
    if type(model).calculate_loss.__module__ == "recbole_llm.model":
        return False
    getLogger().info("learned block: %s has a loss of its own, so that no other is tried", type(model).__name__)
    return True


def patience(trainer: Any, steps: int, verbose: bool = False) -> int:
    """Validations without a better one after which training stops; what a person gave stays.

    Args:
        trainer: before its first epoch.
        steps: from one validation to the next.
        verbose: whether the log says where it is another number than before.
    """
    present: int = trainer.stopping_step
    # by the user, or by a script that set it later
    if "stopping_step" in trainer.config.external_config_dict or present != default_values()["stopping_step"]:
        return present
    needed = math.ceil(PATIENCE_STEPS / max(steps, 1))
    found = max(PATIENCE_OF_MANY, needed) if may_choose(trainer.model) else max(present, needed)
    if verbose and found != present:
        getLogger().info("Steps to a validation: %d; stopping_step is %d and not %d", steps, found, present)
    return found
