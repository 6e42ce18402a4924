"""Cost and quality of text encoders on a dataset: ``recbole-llm encode --benchmark``."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_llm.content.features import encode_texts
from recbole_llm.fitting.cold_start.hidden_draws import HiddenDraw, mean_and_error
from recbole_llm.fitting.validation import TopKMetric
from recbole_llm.scoring.rows import rows_from_pairs

SAMPLED = 200  # texts by which the cost is told
DRAWS = 2
METRIC = TopKMetric("ndcg", 10)


@dataclass(frozen=True)
class EncoderFigures:
    """What an encoder costs and is worth.

    Attributes:
        name: of the encoder.
        dim: of its vectors.
        texts_per_second: processor seconds of this process, on some of the data set's texts.
        cold: metric of hidden items among themselves by their texts alone, mean over users and draws.
        difference: from the first encoder's, mean over the same users; ``None`` for the first.
        error: standard error of the difference, or of ``cold`` for the first.
    """

    name: str
    dim: int
    texts_per_second: float
    cold: float
    difference: float | None
    error: float

    def line(self, width: int) -> str:
        """Format one line of a table."""
        beside = f"± {self.error:.4f}" if self.difference is None else f"{self.difference:+.4f} ± {self.error:.4f}"
        return f"{self.name:{width}}  {self.dim:>5}  {self.texts_per_second:>9,.0f}  {self.cold:>7.4f}  {beside}"


def compare_encoders(dataset: Any, names: Sequence[str]) -> list[EncoderFigures]:
    """Encode all items with each encoder, through the store, and rank hidden items by the vectors.

    Args:
        dataset: an ``LLMTwoTowerDataset``, not built.
        names: of encoders, each once.

    Raises:
        ValueError: if an encoder is named twice or cannot be loaded, or the items have no texts.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"benchmark names an encoder twice: {', '.join(names)}.")
    users, items = (
        torch.as_tensor(dataset.inter_feat[name].to_numpy().copy()) for name in (dataset.uid_field, dataset.iid_field)
    )
    history = rows_from_pairs(users.long(), items.long(), dataset.user_num)
    given = dataset.config["encoder"]
    found: list[EncoderFigures] = []
    draws: list[HiddenDraw] = []
    first: list[Tensor] = []
    try:
        for name in names:
            dataset.config["encoder"] = name
            table = dataset.item_vectors(("text",))["text"]
            draws = draws or [HiddenDraw(history, dataset.item_num, table.present, seed) for seed in range(DRAWS)]
            values = [draw.values({"text": (table.vectors, table.present)}, METRIC) for draw in draws]
            first = first or values
            cold, error = mean_and_error(values)
            difference = None
            if values is not first:
                difference, error = mean_and_error([one - other for one, other in zip(values, first, strict=True)])
            found.append(EncoderFigures(name, table.dim, _speed(dataset), cold, difference, error))
    finally:
        dataset.config["encoder"] = given
    return found


def _speed(dataset: Any) -> float:
    """Texts a processor second, without the store; the weights are loaded before."""
    texts = [text for text in dataset.item_texts() if text]
    step = max(len(texts) // SAMPLED, 1)
    sample = texts[::step][:SAMPLED]
    encoder = dataset.text_encoder()
    encode_texts(sample[:1], encoder)
    began = time.process_time()
    encode_texts(sample, encoder)
    return len(sample) / max(time.process_time() - began, 1e-9)
