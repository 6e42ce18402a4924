r"""What a trained LLMTwoTower computes, as plain arrays: item tables, pooling, and the map that places new texts.

The model is read through the attributes named here and nothing else; RecBole is not imported.

A new item's text direction e goes through the model's own kernel ridge map onto its trained items (``cold_map.py``),

    w = kappa f_w(e) + r,    b = kappa slope s (m + f_b(e)) + c,    v = f_v(e)

kappa and r being those of the model's own cold items, m the trained items' mean bias, slope and c the model's calibration, s
the learned block's scale.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.cold_map import MU, ColdMap, fit_cold_map
from recbole_llm.probability import ProbabilityMap
from recbole_llm.serving.manifest import Block
from recbole_llm.serving.text_map import TextMap

MAX_TABLE_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class ModelTables:
    """Arrays of a model without its padding rows; fields as in :class:`ExportContents`.

    Attributes:
        blocks: the columns.
        vector: ``[N, D]`` targets.
        source: ``[N, D]`` sources; of cold items, those of their texts.
        bias: ``[N]``, finite.
        trained: ``[N]`` bool.
        listed: ``[N]`` bool, whether the model ranks the item among all others.
        offset: ``[D]``.
        user_part: ``[U, D]`` or ``None``.
        similar_by: ``vector`` or ``source``.
        cold_map: the map fitted for new items, on text vectors as the model holds them, or ``None``.
        kappa: factor of a new item's target and bias.
        shift: r, ``[D]``.
        bias_scale: slope s.
        bias_offset: c.
        probability: the map from scores to probabilities; ``None`` for the plain sigmoid.
        history_rank: ``[nnz]`` of the training histories, 0 for the newest; ``None`` where no block fades.
    """

    blocks: tuple[Block, ...]
    vector: np.ndarray
    source: np.ndarray
    bias: np.ndarray
    trained: np.ndarray
    listed: np.ndarray
    offset: np.ndarray
    user_part: np.ndarray | None
    similar_by: str
    cold_map: ColdMap | None
    kappa: float
    shift: np.ndarray
    bias_scale: float
    bias_offset: float
    probability: ProbabilityMap | None = None
    history_rank: np.ndarray | None = None

    def text_map(self, center: Tensor, transform: Tensor | None) -> TextMap | None:
        """The map from raw text vectors.

        Args:
            center: ``[F]`` of :func:`recbole_llm.content.feature_table.fit_transform`.
            transform: ``[F, F]`` of the same, or ``None``.
        """
        if self.cold_map is None:
            return None
        D = self.vector.shape[1]
        coefficients = _numpy(self.cold_map.coefficients)
        # (f - center) T - centre = (f - center - centre T^-1) T
        centre = self.cold_map.centre.cpu().double()
        if transform is not None:
            centre = torch.linalg.lstsq(transform.T, centre[:, None]).solution[:, 0]
        return TextMap(
            kind="rbf",
            center=_numpy(center + centre),
            transform=None if transform is None else _numpy(transform),
            normalize=True,
            support=_numpy(self.cold_map.anchors),
            gamma=1.0 / self.cold_map.bandwidth,
            vector=(self.kappa * coefficients[:, :D]).astype(np.float32),
            source=np.ascontiguousarray(coefficients[:, D : 2 * D]),
            bias=(self.kappa * self.bias_scale * coefficients[:, -1]).astype(np.float32),
            vector_offset=self.shift,
            source_offset=np.zeros(D, np.float32),
            bias_offset=self.bias_offset,
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


@torch.no_grad()
def tables_of(model: Any) -> ModelTables:
    """The arrays of a trained model in evaluation mode.

    Raises:
        ValueError: if the tables would be too large to serve.
    """
    vector, bias = model.item_vectors()
    with_closed = model._closed_counts
    # where the full form and the next-item block share their targets, the identity, each gets a copy
    shared = with_closed and not model.has_item_vectors and model._next is not None
    if shared:
        vector = torch.cat([vector[:, : model.n_items], vector], 1)
    _refuse_large(vector)
    closed = model._closed_sources() if with_closed else []
    with_learned = vector.shape[1] > sum(table.shape[1] for table in closed)
    slope, shift = (float(value) for value in model.calibration)
    closed_scale, learned_scale = (slope * float(scale) for scale in model.block_scales)
    blocks: list[Block] = []
    sources, offsets, parts = [], [], []
    decays = [model.closed_decay if model.uses_order else None]
    names, scales = ["closed_form"], [closed_scale]
    if model._next is not None:
        names, scales = [*names, "next_item"], [*scales, closed_scale * model._next.scale]
        decays.append(model._next.decay)
    for name, table, scale, decay in zip(names, closed, scales, decays, strict=False):
        blocks.append(Block(name, table.shape[1], 0.0, scale, decay=decay))
        sources.append(table)
        offsets.append(torch.zeros(table.shape[1], device=vector.device))
        parts.append(torch.zeros(model.n_users, table.shape[1], device=vector.device))
    raw_bias = torch.zeros_like(bias)
    if with_learned:
        tower, options = model.user_tower, model.options
        source, w, raw_bias = model._ranking_tables()
        scale = learned_scale * float(model.log_scale.exp())
        blocks.append(Block("learned", w.shape[1], float(options.history_exponent), scale, options.scoring))
        sources.append(source if tower.uses_history else torch.zeros_like(source))
        offsets.append(tower.offset)
        everyone = torch.arange(model.n_users, device=vector.device)
        parts.append(tower(everyone, torch.zeros(model.n_users, w.shape[1], device=vector.device)) - tower.offset)
    source, part = torch.cat(sources, 1), torch.cat(parts, 1)
    trained, listed = model._trained.value, bias.isfinite()
    cold_map, kappa, direction, mean_bias = None, 1.0, torch.zeros(vector.shape[1]), 0.0
    features, present = next(iter(model._features.values()), (None, None))
    if features is not None and present is not None and model.options.cold_map != "none":
        known = trained & present.value
        if bool(known.any()):
            raw_bias = raw_bias.nan_to_num(neginf=0.0)
            mean_bias = float(raw_bias[known].mean())
            values = torch.cat([vector, source, (raw_bias - mean_bias)[:, None]], 1)
            popularity = torch.bincount(model.history.ids, minlength=model.n_items)
            placed = model.cold_items
            mu = MU if placed is None else placed.mu
            cold_map = fit_cold_map(features.value, present.value, trained, values, popularity, mu=mu)
            if placed is not None and placed.joint:
                kappa, direction = placed.kappa, _columns(placed.shift, model, with_closed, with_learned)
                direction = torch.cat([direction[: model.n_items], direction]) if shared else direction
    bias_scale = learned_scale if with_learned and model._learned_counts else 0.0
    finite = bias[listed].min() if bool(listed.any()) else bias.new_zeros(())
    return ModelTables(
        blocks=tuple(blocks),
        vector=_numpy(vector)[1:],
        source=_numpy(source)[1:],
        bias=_numpy(torch.where(listed, bias, finite))[1:],
        trained=trained.cpu().numpy()[1:].astype(bool),
        listed=listed.cpu().numpy()[1:],
        offset=_numpy(torch.cat(offsets)),
        user_part=_numpy(part)[1:] if bool(part.any()) else None,
        # the full form's targets are the identity: no two of them are similar
        similar_by="vector" if model.has_item_vectors else "source",
        cold_map=cold_map,
        kappa=kappa,
        shift=_numpy(direction),
        bias_scale=bias_scale,
        bias_offset=shift + kappa * bias_scale * mean_bias,
        probability=None if model.probability_map == ProbabilityMap() else model.probability_map,
        history_rank=_numpy(model._ranks.value) if any(block.decay is not None for block in blocks) else None,
    )


def _refuse_large(vector: Tensor) -> None:
    size = 2 * vector.numel() * 4
    if size > MAX_TABLE_BYTES:
        raise ValueError(
            f"The item tables would take {size / 2**30:.1f} GiB ({vector.shape[0]} items, {vector.shape[1]} columns): "
            "train with a smaller closed_form_dim, such as 2048."
        )


def _columns(shift: Tensor, model: Any, with_closed: bool, with_learned: bool) -> Tensor:
    """The columns of a model's shift that its item vectors have."""
    D = model.options.embedding_size
    parts = [shift[:-D]] * with_closed + [shift[-D:]] * with_learned
    return torch.cat(parts)
