r"""The score: blocks of one dot product, a bias and a calibration.

    s(u, i)     = slope sum_b scale_b (<q_ub, w_ib> + beta_ib) + intercept
    q_ub        = temperature_b x_ub                                [temperature_b x_ub / |x_ub| with cosine]
    x_ub        = sum_{j in H_u} a_uj v_jb + offset_b + part_ub     a_uj: recbole_llm.scoring.rows
    P(i|u)      = sigmoid(probability(s(u, i), log |H_u|))

A block holds source vectors v (what an item of the history contributes), target vectors w and the weights of histories. All
blocks side by side are one query and one item vector: one kernel scores, one index serves. Only this file knows how they lie.
Direct rows of a block (:mod:`recbole_llm.scoring.block`) are no part of these vectors: they add to whole rows of scores.

Shapes: B users, N items with padding row 0 (n of them in this process), D columns of all blocks, d of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from recbole_llm.scoring.block import Exceptions, LinearBlock, Scorer, direct_entries, identity_rows
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.item_table import ItemTable, OwnColumns
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows
from recbole_llm_kernels import pair_dot

NOT_IN_CATALOGUE = float("-inf")  # the kernels' mark for an item that no loss, gradient or ranking may see
SCORES_AT_ONCE = 2**23  # where whole rows of scores are needed for a few pairs

__all__ = ["ColdRows", "Exceptions", "ItemTable", "LinearBlock", "OwnColumns", "Score", "ScoreParts", "Scorer"]


@dataclass(frozen=True, eq=False)
class ColdRows:
    """Items without a training interaction as a model ranks them. Mappings go by the name of the block.

    Attributes:
        ids: ``[C]`` int64.
        target: ``[C, d]`` of each block, ``[C, N]`` where its target is the identity.
        source: ``[C, d]``.
        bias: ``[C]`` of each block that has one, in its units.
        joint: whether they take part in the ranking of all items.
        kappa: factor of the mapped target and bias, already in them.
        shift: ``[d]`` of each block, added to its mapped targets, already in them.
        mean_bias: of the items mapped onto, in units of the score before calibration.
        mu, shares: ridge of the map, and of each modality its part of the kernel (empty: equal parts).
        offset: that ``shift`` stands for, in deviations of a user's scores.
    """

    ids: Tensor
    target: Mapping[str, Tensor]
    source: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]
    joint: bool = False
    kappa: float = 1.0
    shift: Mapping[str, Tensor] = field(default_factory=dict)
    mean_bias: float = 0.0
    mu: float = 0.0
    offset: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "ColdRows":
        """Return the same rows on another device."""
        moved = {
            name: {block: tensor.to(device) for block, tensor in getattr(self, name).items()}
            for name in ("target", "source", "bias", "shift")
        }
        return replace(self, ids=self.ids.to(device), **moved)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class ScoreParts:
    """One user's scores of M items taken apart. ``of_history``, ``rest`` and ``bias`` add up to the scores.

    Attributes:
        of_history: by block ``[M, h]``, what each of the h entries of the history adds.
        rest: by block ``[M]``, what its offset and the user's own part add; all that a block adds that is not linear.
        bias: ``[M]``, each item's bias and the calibration's intercept.
    """

    of_history: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    bias: Tensor

    def total(self) -> Tensor:
        """Add the parts up to the scores, ``[M]``."""
        return self.bias + sum(part.sum(1) for part in self.of_history.values()) + sum(self.rest.values())


@dataclass(frozen=True, eq=False)
class Score:
    """Blocks, the items that take part, calibration; a value that never changes.

    Attributes:
        blocks: at least one; those of scale 0 take no part.
        listed: ``[n]`` bool, items that a ranking may hold.
        slope: of the calibration, positive.
        intercept: of the calibration.
        probability: from the score to the logit of P(i|u).
        cold: the items placed by their content, already in the blocks.
        content: likeness of the items' content, a block for each modality; no part of :meth:`scores`.
        rows: which items are in this process.

    Example:
        >>> closed = LinearBlock("closed_form", source=torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> popular = LinearBlock("popular", source=None, target=torch.zeros(2, 1), bias=torch.tensor([1.0, 0.5]), scale=2.0)
        >>> score = Score((closed, popular), torch.tensor([True, True]))
        >>> score.scores(Rows(torch.tensor([0, 1]), torch.tensor([0]))).tolist()
        [[2.0, 3.0]]
    """

    blocks: tuple[LinearBlock, ...]
    listed: Tensor
    slope: float = 1.0
    intercept: float = 0.0
    probability: ProbabilityMap = field(default_factory=ProbabilityMap)
    cold: ColdRows | None = None
    content: tuple[LinearBlock, ...] = ()
    rows: AllRows | None = None

    # ------------------------------------------------------------------ blocks

    @cached_property
    def counting(self) -> tuple[LinearBlock, ...]:
        """The blocks whose scale is not 0; the first one where none is left."""
        return tuple(block for block in self.blocks if block.scale) or self.blocks[:1]

    def block(self, name: str) -> LinearBlock | None:
        """Return the block of this name, ``None`` if there is none."""
        return next((block for block in self.blocks if block.name == name), None)

    def with_blocks(self, *blocks: LinearBlock | None) -> "Score":
        """Return the score with each of these in the place of the block of its name."""
        new = {block.name: block for block in blocks if block is not None}
        return replace(self, blocks=tuple(new.get(block.name, block) for block in self.blocks))

    @cached_property
    def _groups(self) -> tuple[tuple[LinearBlock, ...], ...]:
        """Blocks that share columns: those with identity targets, then each of the others alone."""
        shared = tuple(block for block in self.counting if block.target is None)
        others = tuple((block,) for block in self.counting if block.target is not None)
        return (shared, *others) if shared else others

    @property
    def has_vectors(self) -> bool:
        """Whether a score is a product of stored vectors: no target is the identity, and no block has direct rows."""
        return all(block.target is not None and block.direct is None for block in self.counting)

    # ------------------------------------------------------------------ queries and item vectors

    def user_parts(self, users: Tensor) -> dict[str, Tensor]:
        """Return each block's own summand of known users, ``[B]`` int64 -> ``[B, d]`` by block name.

        What disliked items take from every item by direct rows is there too, ``[B, N]`` by ``direct_part`` of the name.
        """
        parts = {b.name: part for b in self.counting if (part := b.part_of(users)) is not None}
        return parts | {direct_part(b.name): p for b in self.counting if (p := b.direct_part_of(users)) is not None}

    def queries(self, history: Rows, part: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute the queries of all blocks side by side; every factor of the score is in them.

        Args:
            history: B rows.
            part: what :meth:`user_parts` gives for known users; ``None`` for new ones.

        Returns:
            ``[B, D]``.
        """
        parts = part or {}
        columns = []
        for group in self._groups:
            found = [
                block.queries(history, parts.get(block.name), self.rows) * (self.slope * block.scale) for block in group
            ]
            columns.append(found[0] if len(found) == 1 else sum(found[1:], found[0]))
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)

    def item_table(self) -> ItemTable:
        """Lay the targets of all blocks side by side, for :func:`recbole_llm_kernels.score_topk`, export and index."""
        groups = self._groups
        shared = groups[0] if groups[0][0].target is None else ()
        tables = [group[0].target for group in groups if group[0].target is not None]
        vectors = [table for table in tables if table is not None]
        if len(vectors) == 1:
            together = vectors[0]
        else:
            together = torch.cat(vectors, 1) if vectors else self.item_bias.new_zeros(len(self.listed), 0)
        return ItemTable(together, self.item_bias, bool(shared), shared[0].exceptions if shared else None)

    @cached_property
    def plain_bias(self) -> Tensor:
        """Each item's bias before calibration, ``[n]``."""
        bias = torch.zeros(len(self.listed), device=self.listed.device)
        for block in self.counting:
            if block.bias is not None:
                bias = bias + block.scale * block.bias
        return bias

    @cached_property
    def item_bias(self) -> Tensor:
        """What an item's score starts from, ``[n]``; -inf for items that have no place."""
        return (self.slope * self.plain_bias + self.intercept).masked_fill(~self.listed, NOT_IN_CATALOGUE)

    # ------------------------------------------------------------------ scores

    def scores(self, history: Rows, part: Mapping[str, Tensor] | None = None, unlisted: bool = False) -> Tensor:
        """Compute the scores of every item.

        Args:
            history: B rows.
            part: as for :meth:`queries`.
            unlisted: whether items without a place are scored too; they get -inf otherwise.

        Returns:
            ``[B, N]`` in a fresh tensor.
        """
        score = self.all_listed() if unlisted else self
        found = score.add_direct(score.item_table().scores(score.queries(history, part)), history, part)
        return found if self.rows is None else self.rows.gather(found)

    def add_direct(self, scores: Tensor, history: Rows, part: Mapping[str, Tensor] | None = None) -> Tensor:
        """Add what direct rows give, every factor in it, to ``scores`` ``[B, N]`` in place; arguments as of :meth:`queries`."""
        for block in self.counting:
            own = (part or {}).get(direct_part(block.name))
            scores = block.add_direct(scores, history, own, self.slope * block.scale)
        return scores

    def all_listed(self) -> "Score":
        """Return the score with a place for every item."""
        return replace(self, listed=torch.ones_like(self.listed))

    def refreshed(self, block: LinearBlock) -> "Score":
        """Return the score with new tables for the block of this name, whose scale and placed items stay."""
        old = self.block(block.name)
        assert old is not None
        block = replace(block, scale=old.scale)
        if self.cold is not None and block.name in self.cold.target:
            cold, name = self.cold, block.name
            block = block.with_rows(cold.ids, cold.source.get(name), cold.target[name], cold.bias.get(name))
        return self.with_blocks(block)

    def of_users(self, users: Tensor, histories: Rows) -> Tensor:
        """Compute the scores of every item for known users, ``[B]`` int64 -> ``[B, N]``.

        Args:
            users: their ids.
            histories: a row for every known user.
        """
        return self.scores(histories.select(users), self.user_parts(users))

    def probabilities(self, scores: Tensor, log_length: Tensor) -> Tensor:
        """Turn scores into P(i|u); 0 for -inf.

        Args:
            scores: any shape.
            log_length: log of the length of each score's history (1 for an empty one), broadcast to ``scores``.
        """
        return torch.sigmoid(self.probability.logit(scores, log_length))

    def pairs(
        self,
        history: Rows,
        row: Tensor,
        items: Tensor,
        part: Mapping[str, Tensor] | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Compute the scores of (row, item) pairs.

        Args:
            history: B rows.
            row: ``[P]`` int64, the row of ``history`` of each pair.
            items: ``[P]`` int64.
            part: as for :meth:`queries`.
            backend: of the kernel.

        Returns:
            ``[P]``.
        """
        table = self.item_table()
        if self.has_vectors:
            return pair_dot(
                self.queries(history, part), table.vectors, row, items, item_bias=table.bias, backend=backend
            )
        found = torch.empty(len(items), device=items.device)
        if not len(items):
            return found
        # a query is the user's scores of all items, so a few users at a time
        for few in torch.arange(len(history.sizes), device=items.device).split(
            max(1, SCORES_AT_ONCE // len(self.listed))
        ):
            here = (row >= few[0]) & (row <= few[-1])
            some = None if part is None else {name: rows[few] for name, rows in part.items()}
            scores = self.add_direct(table.scores(self.queries(history.select(few), some)), history.select(few), some)
            found[here] = scores[row[here] - few[0], items[here]]
        return found

    def parts(self, history: Rows, items: Tensor, part: Mapping[str, Tensor] | None = None) -> ScoreParts:
        """Take one user's scores apart, in float64.

        Args:
            history: one row of h entries.
            items: ``[M]`` int64.
            part: as for :meth:`queries`.
        """
        of_history, rest = {}, {}
        for block in self.counting:
            stored, n = block.target, len(self.listed)
            target = (identity_rows(items, n, block.exceptions) if stored is None else stored[items]).double()
            own = (part or {}).get(block.name)
            factor = self.slope * block.scale * block.temperature
            x = block.queries(history, own)  # cosine and temperature are in it
            if not block.is_linear:
                rest[block.name] = self.slope * block.scale * (target @ x[0].double())
                continue
            if block.cosine:
                plain = replace(block, cosine=False, temperature=1.0).queries(history, own)
                factor /= max(float(plain.norm()), torch.finfo(torch.float32).tiny)
            if block.source is not None:
                weights = block.weights(history)
                source = block.source[history.ids].double()
                source = source if weights is None else source * weights[:, None].double()
                of_history[block.name] = factor * (target @ source.T)
            if block.direct is not None:
                entries = direct_entries(block.direct, history.ids, items)
                entries = entries if weights is None else entries * weights.double()
                of_history[block.name] += factor * entries
            own_columns = [summand.double() for summand in (block.offset, own) if summand is not None]
            constant = sum((summand.reshape(-1) for summand in own_columns), torch.zeros_like(x[0].double()))
            rest[block.name] = factor * (target @ constant)
            against = (part or {}).get(direct_part(block.name))
            if against is not None:
                rest[block.name] += factor * against[0, items].double()
        return ScoreParts(of_history, rest, self.item_bias[items].double())

    # ------------------------------------------------------------------ items placed by their content

    def mapped(self, known: Tensor, weights: Tensor, among: Tensor) -> tuple[ColdRows, Tensor]:
        """Compute rows of items as weighted sums of the rows of others.

        Of a block with direct rows its vectors are mapped: an item without an interaction has no entry in direct rows.

        The bias of each block is mapped as its difference from a mean: an item unlike all others gets the mean, and not 0,
        which is far above any trained item's bias.

        Args:
            known: ``[m]`` int64, the items mapped from.
            weights: ``[C, m]``.
            among: ``[N]`` bool, the items over which that mean is taken.

        Returns:
            The rows by block, and the total bias of each item, ``[C]``, in units of the score.
        """
        target, source, bias = {}, {}, {}
        identity: Tensor | None = None
        for block in self.counting:
            if block.target is not None:
                target[block.name] = weights @ block.target[known]
            else:
                if identity is None:
                    identity = weights.new_zeros(len(weights), len(self.listed))
                    identity[:, known] = weights
                target[block.name] = identity
            if block.source is not None:
                source[block.name] = weights @ block.source[known]
            if block.bias is not None:
                mean = block.bias[among].mean()
                bias[block.name] = weights @ (block.bias[known] - mean) + mean
        total = weights.new_full((len(weights),), self.intercept)
        for block in self.counting:
            if block.name in bias:
                total = total + (self.slope * block.scale) * bias[block.name]
        mean_bias = float(self.plain_bias[among].mean())
        return ColdRows(torch.zeros(0, dtype=torch.int64), target, source, bias, mean_bias=mean_bias), total

    def side_by_side(self, by_block: Mapping[str, Tensor]) -> Tensor:
        """Lay targets by block out as columns of :meth:`queries`, ``[C, D]``."""
        columns = [by_block[group[0].name] for group in self._groups]
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)

    def by_block(self, columns: Tensor) -> dict[str, Tensor]:
        """Invert :meth:`side_by_side` for one vector, ``[D]`` -> ``[d]`` by block."""
        found, at = {}, 0
        for group in self._groups:
            part = columns[at : at + group[0].dim]
            at += group[0].dim
            found.update({block.name: part for block in group})
        return found

    def own_columns(self, n_users: int) -> OwnColumns:
        """Lay out the blocks in the order of :attr:`counting`; identity targets are written out, a copy for each block."""
        columns = []
        for block in self.counting:
            zero = torch.zeros(len(self.listed), block.dim, device=self.listed.device)
            target = block.target
            if target is None:
                target = ItemTable(zero[:, :0], self.item_bias, True, block.exceptions).dense()
            offset = zero[0] if block.offset is None else block.offset
            part = zero[:1].expand(n_users, -1) if block.user_part is None else block.user_part
            columns.append((target, zero if block.source is None else block.source, offset, part))
        return OwnColumns(*(torch.cat(tables, -1) for tables in zip(*columns, strict=True)))

    def in_own_columns(self, by_block: Mapping[str, Tensor]) -> Tensor:
        """Lay one vector ``[d]`` of each block out as a row of :meth:`own_columns`, ``[D]``."""
        return torch.cat([by_block[block.name] for block in self.counting])

    def with_cold(self, cold: ColdRows) -> "Score":
        """Return the score with these items' rows; they are listed if they take part."""
        blocks = tuple(
            block.with_rows(cold.ids, cold.source.get(block.name), cold.target[block.name], cold.bias.get(block.name))
            if block.name in cold.target
            else block
            for block in self.blocks
        )
        listed = self.listed.index_fill(0, cold.ids, cold.joint)
        return replace(self, blocks=blocks, listed=listed, cold=cold)


def direct_part(name: str) -> str:
    """Name what disliked items take from every item by the direct rows of the block ``name``, in parts of users."""
    return f"{name}/direct"
