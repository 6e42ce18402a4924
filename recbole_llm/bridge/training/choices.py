"""Which choices a training is given, and what it leaves for a later one."""

from collections.abc import Callable
from dataclasses import replace
from logging import getLogger
from typing import Any

from recbole_llm.bridge.checkpoint import MODEL_PARTS, WRONG_CONTENTS, read_checkpoint
from recbole_llm.fitting.refit import Chosen
from recbole_llm.fitting.signals import choose_signals
from recbole_llm.fitting.validation import Validation


def given_choices(config: Any, model: Any) -> Chosen | None:
    """The choices that this training repeats; ``None`` where it chooses itself.

    Args:
        config: of the run.
        model: a resumed one holds what it was given.

    Raises:
        ValueError: if rows are to be joined and there are no choices, or the checkpoint holds none.
    """
    rows, file = model.options.refit_rows, model.options.refit_from
    if rows is None:
        if file:
            raise ValueError("refit_from belongs to refit_rows: valid or all; 'recbole-llm fit CHECKPOINT' sets both.")
        return None
    if not file:
        if model.chosen is None:
            raise ValueError(
                f"refit_rows is {rows!r}, so that nothing is left to choose by: name the checkpoint that has chosen, with "
                "'recbole-llm fit CHECKPOINT' or refit_from. Runs, compare and tune choose by validation themselves."
            )
        chosen: Chosen = model.chosen
    else:
        chosen = read_choices(file)
    getLogger().info(
        "fitted once more, with what validation chose: the training split holds %s, %d interactions",
        "training and validation, and test is held out"
        if rows == "valid"
        else "all rows, and no figure can be told of it",
        len(model.history.ids),
    )
    return chosen


def settled_choices(
    config: Any, model: Any, validation: Validation | None, agree: Callable[[Any], Any]
) -> tuple[Chosen | None, Validation | None]:
    """Let a model's interactions count as was chosen, or as is best on validation.

    Args:
        config: of the run.
        model: of LLMTwoTower.
        validation: by which it is chosen.
        agree: gives every process of a group the same value.

    Returns:
        The choices of :func:`given_choices`, and the validation data with histories that count so.

    Raises:
        ValueError: as there.
    """
    options, given = model.options, given_choices(config, model)
    signals = None if given is None else given.signals
    if signals is None:
        signals = agree(choose_signals(model.training_data(given=True), validation, options))
    model.take_signals(signals)
    return given, None if validation is None else replace(validation, history=model.history)


def read_choices(file: str) -> Chosen:
    """What the training of a checkpoint has chosen.

    Raises:
        ValueError: if it holds no choices.
    """
    state = read_checkpoint(file, parts=MODEL_PARTS)["other_parameter"].get("chosen")
    if state is None:
        raise ValueError(
            f"checkpoint: {file!r} holds no choices: it was written by an earlier recbole-llm, or by a run that has not ended. "
            "Train again with this version."
        )
    try:
        return Chosen.from_state(state)
    except WRONG_CONTENTS as error:
        raise ValueError(f"checkpoint: {file!r} holds choices of another form ({error}).") from error
