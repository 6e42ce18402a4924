"""A score as the plain values of a checkpoint, and back.

Tables of the learned block are not among them: they are read off the towers, whose parameters a checkpoint holds anyway.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import ColdRows, Exceptions, LinearBlock, Score
from recbole_llm.scoring.sequence import SequenceBlock, SequenceLayer

LEARNED = "learned"
_BLOCK_FIELDS = (
    "name",
    "source",
    "target",
    "scale",
    "exponent",
    "decay",
    "cosine",
    "temperature",
    "offset",
    "bias",
    "constants",
    "dislikes",
)
_COLD_FIELDS = ("ids", "target", "source", "bias", "joint", "kappa", "shift", "mean_bias", "mu", "offset", "shares")


def score_to_state(score: Score) -> dict[str, Any]:
    """Convert a score to plain tensors, numbers and names; inverse of :func:`score_from_state`."""
    cold = score.cold
    return {
        "blocks": [
            {"name": block.name, "scale": block.scale}
            if block.name == LEARNED
            else {name: getattr(block, name) for name in _BLOCK_FIELDS}
            | ({} if block.direct is None else {"direct": vars(block.direct)})
            | ({"layer": block.layer.to_state()} if isinstance(block, SequenceBlock) and block.layer else {})
            for block in score.blocks
        ],
        "listed": None if cold is None else score.listed,
        "slope": score.slope,
        "intercept": score.intercept,
        "probability": vars(score.probability),
        "cold": None if cold is None else {name: getattr(cold, name) for name in _COLD_FIELDS},
    }


def score_from_state(state: Mapping[str, Any], learned: LinearBlock, rows: AllRows) -> Score:
    """Rebuild the score that a state describes, on the device of the learned block.

    Args:
        state: of :func:`score_to_state` or :func:`state_of_version_1`.
        learned: the learned block as the towers give it, without cold-start items.
        rows: which items are in this process.
    """
    assert learned.bias is not None
    device = learned.bias.device
    cold = None if state["cold"] is None else ColdRows(**state["cold"]).to(device)
    blocks = []
    for values in state["blocks"]:
        if values["name"] == LEARNED:
            block = replace(learned, scale=values["scale"])
            if cold is not None and LEARNED in cold.target:
                block = block.with_rows(
                    cold.ids, cold.source.get(LEARNED), cold.target[LEARNED], cold.bias.get(LEARNED)
                )
        else:
            block = _block_of(values).to(device)
            if block.target is None and cold is not None and block.name in cold.target:  # not where it does not count
                block = replace(block, exceptions=Exceptions(cold.ids, cold.target[block.name]))
        blocks.append(block)
    return Score(
        tuple(blocks),
        (rows.listed() if state["listed"] is None else state["listed"]).to(device),
        state["slope"],
        state["intercept"],
        ProbabilityMap.from_json(state["probability"]),
        cold,
        rows=rows,
    )


def _block_of(values: Mapping[str, Any]) -> LinearBlock:
    if values.get("direct") is not None:
        values = {**values, "direct": Rows(**values["direct"])}
    if "layer" not in values:
        return LinearBlock(**values)
    return SequenceBlock(**{**values, "layer": SequenceLayer.from_state(values["layer"])})


def state_of_version_1(para: Mapping[str, Any], rows: AllRows) -> dict[str, Any] | None:
    """Convert the state of a checkpoint whose score was two scales, two blocks and their cold-start rows side by side.

    Args:
        para: ``other_parameter`` of that checkpoint.
        rows: which items are in this process.

    Returns:
        ``None`` where nothing had been fitted yet.
    """
    closed_scale, learned_scale = para["block_scales"]
    source, following, cold = para["closed_form_source"], para.get("next_item"), para["cold"]
    blocks: list[dict[str, Any]] = []
    if source is not None:
        closed = LinearBlock(
            "closed_form", source, para["closed_form_target"], closed_scale, decay=para.get("closed_decay")
        )
        blocks.append({name: getattr(closed, name) for name in _BLOCK_FIELDS})
        if following is not None:
            block = LinearBlock(
                "next_item",
                following["source"],
                following["target"],
                closed_scale * following["scale"],
                decay=following["decay"],
            )
            blocks.append({name: getattr(block, name) for name in _BLOCK_FIELDS})
    elif tuple(para["block_scales"]) == (0.0, 1.0) and tuple(para["calibration"]) == (1.0, 0.0) and cold is None:
        return None
    blocks.append({"name": LEARNED, "scale": learned_scale})
    listed = rows.listed()
    if cold is not None:
        cold = _cold_of_version_1(cold, blocks, learned_scale)
        listed[cold["ids"].cpu()] = cold["joint"]
        if source is not None:  # sources of version 1 hold the cold-start rows already, targets do not
            for values in blocks[:-1]:
                if values["target"] is not None:
                    values["target"] = values["target"].index_copy(0, cold["ids"], cold["target"][values["name"]])
    slope, intercept = para["calibration"]
    return {
        "blocks": blocks,
        "listed": listed,
        "slope": slope,
        "intercept": intercept,
        "probability": para.get("probability_map") or {},
        "cold": cold,
    }


def _cold_of_version_1(cold: Mapping[str, Any], blocks: list[dict[str, Any]], learned_scale: float) -> dict[str, Any]:
    """Cold-start rows by block, from those of the closed form's blocks side by side."""
    D = cold["learned"].shape[1]
    target: dict[str, Tensor] = {LEARNED: cold["learned"]}
    source: dict[str, Tensor] = {LEARNED: cold["learned_source"]}
    shift: dict[str, Tensor] = {LEARNED: cold["shift"][-D:]}
    of_closed = cold["shift"][:-D]
    at = at_source = 0
    for values in blocks[:-1]:
        name = values["name"]
        if values["target"] is None:  # identity targets share their columns
            target[name], shift[name] = cold["closed"], of_closed
        else:
            width = values["target"].shape[1]
            target[name], shift[name] = cold["closed"][:, at : at + width], of_closed[at : at + width]
            at += width
        width = values["source"].shape[1]
        source[name] = cold["closed_source"][:, at_source : at_source + width]
        at_source += width
    return {
        "ids": cold["ids"],
        "target": target,
        "source": source,
        "bias": {LEARNED: cold["bias"]},
        "joint": cold["joint"],
        "kappa": cold["kappa"],
        "shift": shift,
        "mean_bias": cold["mean_bias"] * learned_scale,
        "mu": cold["mu"],
    }
