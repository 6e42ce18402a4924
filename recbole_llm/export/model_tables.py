r"""A score as the arrays of an export: the NumPy twin's tables, and the map that places new texts.

A new item's text direction e goes through the model's own kernel ridge map onto its trained items
(:mod:`recbole_llm.fitting.cold_start.kernel_ridge`),

    w = kappa f_w(e) + r,    b = kappa slope (m + f_b(e)) + c,    v = f_v(e)

kappa and r being those of the model's own cold-start items, m the trained items' mean bias before calibration, slope and c the
calibration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.export.direct import DirectRows
from recbole_llm.export.manifest import Block
from recbole_llm.export.neighbours import neighbours
from recbole_llm.export.search_tables import SearchTables, TextSpace
from recbole_llm.export.sequence import SCORING, SequenceWeights
from recbole_llm.export.text_map import TextMap
from recbole_llm.fitting.cold_start.kernel_ridge import MU, ColdMap, any_present, fit_cold_map
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.ease import content_centre, content_directions
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock, Score
from recbole_llm.scoring.sequence import SequenceBlock

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
        shift: r, ``[D]``; ``None`` for zeros.
        bias_scale: slope.
        bias_offset: bias of a new item unlike all others.
        probability: the map from scores to probabilities; ``None`` for the plain sigmoid.
        history_rank: ``[nnz]`` of the histories, 0 for the newest; ``None`` where no block fades or reads the order.
        content: by modality ``[N, f]`` directions, zero where an item has none.
        sequence: of the block that reads the order of a history, or ``None``.
        direct: direct rows by the place of their block in ``blocks``.
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
    cold_map: ColdMap | None = None
    kappa: float = 1.0
    shift: np.ndarray | None = None
    bias_scale: float = 0.0
    bias_offset: float = 0.0
    probability: ProbabilityMap | None = None
    history_rank: np.ndarray | None = None
    content: Mapping[str, np.ndarray] = field(default_factory=dict)
    sequence: SequenceWeights | None = None
    direct: Mapping[int, DirectRows] = field(default_factory=dict)

    def map_of(self, modality: str, center: Tensor, transform: Tensor | None) -> TextMap | None:
        """Build the map from raw vectors of a modality, ``None`` where it places no item.

        Args:
            modality: ``text`` or ``image``.
            center: ``[F]`` of :func:`recbole_llm.content.store.feature_table.fit_transform`.
            transform: ``[F, F]`` of the same, or ``None``.
        """
        if self.cold_map is None or modality not in self.cold_map.centres:
            return None
        D = self.vector.shape[1]
        centre, anchors, values = self.cold_map.of_modality(modality)
        coefficients = _numpy(values)
        return TextMap(
            kind="rbf",
            center=_numpy(_combined_center(center, transform, centre)),
            transform=None if transform is None else _numpy(transform),
            normalize=True,
            support=_numpy(anchors),
            gamma=1.0 / self.cold_map.bandwidth,
            vector=(self.kappa * coefficients[:, :D]).astype(np.float32),
            source=np.ascontiguousarray(coefficients[:, D : 2 * D]),
            bias=(self.kappa * self.bias_scale * coefficients[:, -1]).astype(np.float32),
            vector_offset=np.zeros(D, np.float32) if self.shift is None else self.shift,
            source_offset=np.zeros(D, np.float32),
            bias_offset=self.bias_offset,
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _combined_center(center: Tensor, transform: Tensor | None, centre: Tensor) -> Tensor:
    """One vector for two: (f - center) T - centre = (f - center - centre T^-1) T."""
    centre = centre.cpu().double()
    if transform is not None:
        centre = torch.linalg.lstsq(transform.T, centre[:, None]).solution[:, 0]
    return center + centre


def text_space(data: TrainingData, center: Tensor, transform: Tensor | None, modality: str = "text") -> TextSpace:
    """The way of a raw vector into the space of :func:`content_blocks`; arguments as :meth:`ModelTables.text_map`."""
    centre = content_centre(*data.content[modality])
    return TextSpace(
        _numpy(_combined_center(center, transform, centre)), None if transform is None else _numpy(transform)
    )


def search_tables(
    data: TrainingData,
    space: TextSpace | None,
    titles: np.ndarray | None,
    has_title: np.ndarray | None,
) -> SearchTables:
    """What searches need beside the content.

    Args:
        data: what the model was fitted on; its interactions make the neighbours.
        space: of :func:`text_space`; ``None`` where no text can be asked for.
        titles: ``[N, F]`` raw vectors of the titles, without the padding item; with ``space``.
        has_title: ``[N]`` bool; with ``space``.
    """
    history = data.history.to("cpu")
    found = neighbours(history.offsets.numpy()[1:], history.ids.numpy() - 1, data.n_items - 1)
    if space is None or titles is None or has_title is None:
        return SearchTables(*found)
    directions = np.where(has_title[:, None], space.directions(titles), np.float32(0))
    return SearchTables(*found, directions, space)


@torch.no_grad()
def tables_of(
    score: Score, data: TrainingData, n_users: int, cold_map: bool, history: Rows | None = None
) -> ModelTables:
    """Lay out a score as the arrays of an export.

    Args:
        score: a trained model's, all of whose items are in this process.
        data: what it was fitted on.
        n_users: known users, padding included.
        cold_map: whether new items can be placed by their content.
        history: from which recommendations are made; ``None`` for that of ``data``.

    Raises:
        ValueError: if the tables would be too large to serve.
    """
    blocks = score.counting
    n_items = len(score.listed)
    _refuse_large(n_items, sum(block.dim for block in blocks))
    vector, source, offset, part = score.own_columns(n_users)
    bias, listed = score.item_bias, score.listed
    finite = bias[listed].min() if bool(listed.any()) else bias.new_zeros(())
    new_items = _new_items(score, data, vector, source) if cold_map and data.content else {}
    reads_ranks = any(block.decay is not None or isinstance(block, SequenceBlock) for block in blocks)
    ranks = (data.history if history is None else history).ranks
    return ModelTables(
        blocks=tuple(block_of(block, score.slope) for block in blocks),
        vector=_numpy(vector)[1:],
        source=_numpy(source)[1:],
        bias=_numpy(torch.where(listed, bias, finite))[1:],
        trained=data.trained.cpu().numpy()[1:].astype(bool),
        listed=listed.cpu().numpy()[1:],
        offset=_numpy(offset),
        user_part=_numpy(part)[1:] if bool(part.any()) else None,
        # the full form's targets are the identity, no two of which are similar; direct rows belong to sources
        similar_by="vector" if score.has_vectors else "source",
        probability=None if score.probability == ProbabilityMap() else score.probability,
        history_rank=_numpy(ranks) if reads_ranks and ranks is not None else None,
        content={
            block.name.partition(".")[2]: _numpy(block.source)[1:]
            for block in score.content
            if block.source is not None
        },
        sequence=_sequence_of(blocks),
        direct={b: direct_of(block.direct) for b, block in enumerate(blocks) if block.direct is not None},
        **new_items,
    )


def _sequence_of(blocks: Sequence[LinearBlock]) -> SequenceWeights | None:
    """The weights of the block that reads the order of a history."""
    for block in blocks:
        if isinstance(block, SequenceBlock) and block.layer is not None:
            return SequenceWeights({name: _numpy(array) for name, array in block.layer.state_dict().items()})
    return None


def direct_of(rows: Rows) -> DirectRows:
    """Convert a block's direct rows to those of an export, without the padding item."""
    assert rows.weights is not None
    offsets, items = rows.offsets.cpu().numpy(), rows.ids.cpu().numpy()
    first = int(offsets[1])
    if first or (items == 0).any():
        raise ValueError("Direct rows hold the padding item 0, which no export has: leave it out of them.")
    return DirectRows(offsets[1:], (items - 1).astype(np.int32), _numpy(rows.weights))


def block_of(block: LinearBlock, slope: float) -> Block:
    """Describe a block as an export does; the scale is the query's whole factor."""
    scoring = SCORING if isinstance(block, SequenceBlock) else "cosine" if block.cosine else "dot"
    scale = slope * block.scale * block.temperature
    dislikes = 0.0 if block.disliked is None else block.dislikes
    return Block(block.name, block.dim, float(block.exponent), scale, scoring, block.decay, dislikes)


def content_blocks(data: TrainingData) -> tuple[LinearBlock, ...]:
    """Make a block for each modality that measures likeness of content.

    The likeness of two items is <direction_j, direction_i> of their centred unit vectors.
    """
    blocks = []
    for modality, (vectors, present) in data.content.items():
        directions = content_directions(vectors, present, content_centre(vectors, present))
        blocks.append(LinearBlock(f"content.{modality}", directions, directions))
    return tuple(blocks)


def _new_items(score: Score, data: TrainingData, vector: Tensor, source: Tensor) -> dict[str, Any]:
    """Compute the fields of :class:`ModelTables` that place new items."""
    known = data.trained & any_present(data.content)
    if not bool(known.any()):
        return {}
    raw = score.plain_bias
    mean = float(raw[known].mean())
    values = torch.cat([vector, source, (raw - mean)[:, None]], 1)
    placed = score.cold
    mu = MU if placed is None else placed.mu
    shares = None if placed is None else placed.shares
    cold_map = fit_cold_map(data.content, data.trained, values, data.popularity, mu=mu, shares=shares)
    kappa, shift = 1.0, torch.zeros(vector.shape[1])
    if placed is not None and placed.joint:
        kappa = placed.kappa
        shift = score.in_own_columns(placed.shift)
    return {
        "cold_map": cold_map,
        "kappa": kappa,
        "shift": _numpy(shift),
        "bias_scale": score.slope,
        "bias_offset": score.intercept + kappa * score.slope * mean,
    }


def _refuse_large(n_items: int, columns: int) -> None:
    size = 2 * n_items * columns * 4
    if size > MAX_TABLE_BYTES:
        raise ValueError(
            f"The item tables would take {size / 2**30:.1f} GiB ({n_items} items, {columns} columns): "
            "train with a smaller closed_form_dim, such as 2048."
        )
