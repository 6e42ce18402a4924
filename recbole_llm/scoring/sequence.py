r"""The sequence block: a query that a causal attention layer reads off the order of a history.

    e_i  = id_i + W c_i                          c: the first directions of the content; W starts as the identity
    h_t  = one transformer layer over e of the last ``LENGTH`` items, with a learned bias for each distance between two of them
    s_ui = (<norm(h_last), norm(e_i)> exp(log_scale) + b_i)

Its scores are a dot product of a query and an item vector, as those of every block, so that ranking, kernels and weights need
nothing of their own. Its source vectors are e, and its query is a function of those of a history and of their order. It is no sum
over the history, so no part of a score belongs to one item of the history alone. :mod:`recbole_llm.export.sequence` is the same
layer in NumPy.

Shapes: B histories, T places of the longest of them, N items with padding row 0, d columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows
from recbole_llm_kernels import catalog_ce

SEQUENCE = "sequence"
LENGTH = 20  # items of a history that are read, the newest ones
TEMPERATURE = 0.1  # at the start
CHUNK = 1024  # histories read at once


class SequenceLayer(nn.Module):
    """One causal attention layer, from the vectors of a history's items to a state.

    Args:
        dim: d, a multiple of ``heads``.
        heads: of the attention.
        dropout: of item vectors and of both parts of the layer.
    """

    def __init__(self, dim: int = 64, heads: int = 2, dropout: float = 0.4) -> None:
        super().__init__()
        self.shape = {"dim": dim, "heads": heads, "dropout": dropout}
        self.distance = nn.Parameter(-0.3 * torch.arange(LENGTH).float().repeat(heads, 1))  # [heads, LENGTH]
        self.before_attention, self.before_mlp, self.last = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        # the GELU by tanh is what NumPy can compute alike
        gelu = nn.GELU("tanh")
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), gelu, nn.Dropout(dropout), nn.Linear(2 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def states(self, vectors: Tensor) -> Tensor:
        """Compute unit states after every place, ``[B, T, d]`` item vectors oldest first -> ``[B, T, d]``."""
        B, T, d = vectors.shape
        heads = len(self.distance)
        x = self.drop(vectors * d**0.5)
        q, k, v = self.qkv(self.before_attention(x)).view(B, T, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        place = torch.arange(T, device=x.device)
        back = place[:, None] - place
        weight = q @ k.transpose(-1, -2) * (d // heads) ** -0.5 + self.distance[:, back.clamp(min=0)]
        read = weight.masked_fill(back < 0, float("-inf")).softmax(-1) @ v
        x = x + self.drop(self.out(read.transpose(1, 2).reshape(B, T, d)))
        return F.normalize(self.last(x + self.drop(self.mlp(self.before_mlp(x)))), dim=-1)

    @torch.no_grad()
    def queries(self, table: Tensor, history: Rows) -> Tensor:
        """Compute the state after the newest item of each history, ``[B, d]``; 0 for an empty one.

        Args:
            table: ``[N, d]`` item vectors e.
            history: with ranks.

        Raises:
            ValueError: if the histories have no ranks.
        """
        if history.ranks is None:
            raise ValueError("The sequence block reads the order of a history, and these have none; give the times.")
        found = torch.zeros(len(history.sizes), table.shape[1], device=history.ids.device)
        sizes = history.sizes.clamp(max=LENGTH)
        ranks = history.ranks.long()
        longest = int(ranks.max()) + 1 if len(ranks) else 1
        order = torch.argsort(history.row_of_entry() * longest + ranks, stable=True)
        newest_first = history.ids[order]
        for size in sizes.unique().tolist():  # histories of one length need no mask
            for rows in torch.nonzero(sizes == size).squeeze(1).split(CHUNK) if size else ():
                at = history.offsets[rows][:, None] + torch.arange(size - 1, -1, -1, device=rows.device)
                found[rows] = self.states(table[newest_first[at]])[:, -1]
        return found

    def to_state(self) -> dict[str, Any]:
        """Convert to plain numbers and tensors for a checkpoint."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return {"shape": dict(self.shape), "tensors": tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "SequenceLayer":
        """Invert :meth:`to_state`; in evaluation mode."""
        layer = cls(**state["shape"])
        layer.load_state_dict(state["tensors"])
        return layer.eval()


class SequenceNetwork(nn.Module):
    """Item vectors of IDs and content, and the layer that reads them: what is trained.

    Args:
        n_items: N.
        content: ``[N, k]`` directions of the content, frozen; ``None`` for IDs alone.
        dim: d, a multiple of ``heads``.
        heads: of the attention.
        dropout: of item vectors and of both parts of the layer.
    """

    def __init__(
        self, n_items: int, content: Tensor | None, dim: int = 64, heads: int = 2, dropout: float = 0.4
    ) -> None:
        super().__init__()
        self.register_buffer("content", content)
        self.id = nn.Embedding(n_items, dim)
        nn.init.normal_(self.id.weight, std=0.02)
        self.of_content = None if content is None else nn.Linear(content.shape[1], dim, bias=False)
        if self.of_content is not None:
            nn.init.eye_(self.of_content.weight)
        self.bias = nn.Parameter(torch.zeros(n_items))
        self.log_scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())
        self.layer = SequenceLayer(dim, heads, dropout)

    def items(self, ids: Tensor) -> Tensor:
        """Compute e of some items, any shape -> the shape and ``[d]``."""
        return self._of_content(ids, self.id(ids))

    def _of_content(self, ids: Tensor, found: Tensor) -> Tensor:
        if self.of_content is not None:
            assert isinstance(self.content, Tensor)
            found = found + self.of_content(self.content[ids])
        return found

    @torch.no_grad()
    def table(self, trained: Tensor) -> Tensor:
        """Compute e of all items, ``[N, d]``; of those that are not ``trained`` (``[N]`` bool) by their content alone."""
        ids = torch.arange(len(self.bias), device=self.bias.device)
        return torch.cat([self._of_content(few, self.id(few) * trained[few, None]) for few in ids.split(4096)])

    def loss(self, sequences: Tensor, mask: Tensor, negatives: Tensor, log_chance: Tensor) -> Tensor:
        """Compute the softmax loss of every next item against negatives that the batch shares, a mean in nats.

        The candidates are the negatives and the next items of the whole batch. Each one's logit is corrected by the log of the
        chance that it is among them, so that the loss estimates the one over all items (Jean et al., ACL 2015).

        Args:
            sequences: ``[B, T + 1]`` item ids, oldest first, then padding.
            mask: ``[B, T]`` bool, whether the next item of a place is one.
            negatives: ``[M]`` item ids.
            log_chance: ``[N]``, log of the chance that an item is a candidate.
        """
        ids, place = torch.unique(torch.cat([sequences.flatten(), negatives]), return_inverse=True)
        vectors = self.items(ids)
        inside = place[: sequences.numel()].view(sequences.shape)
        states = self.layer.states(vectors[inside[:, :-1]])[mask]
        target = inside[:, 1:][mask]
        candidate, target = torch.unique(torch.cat([target, place[sequences.numel() :]]), return_inverse=True)
        target = target[: len(states)]
        bias = self.bias[ids[candidate]] - log_chance[ids[candidate]]
        offsets = torch.arange(len(states) + 1, device=ids.device)
        table = F.normalize(vectors[candidate], dim=-1) * self.log_scale.exp()
        return catalog_ce(states, table, offsets, target, item_bias=bias)


@dataclass(frozen=True, eq=False)
class SequenceBlock(LinearBlock):
    """The sequence block as a block of a score; its sources are the item vectors that the layer reads.

    Attributes:
        layer: from the vectors of a history to a query, in evaluation mode.
    """

    layer: SequenceLayer | None = field(default=None, repr=False)

    is_linear = False

    def queries(self, history: Rows, part: Tensor | None = None, rows: AllRows | None = None) -> Tensor:
        """Compute the queries, ``[B, d]``; a user's own part and the weights of a history have no place in them."""
        assert self.layer is not None and self.source is not None
        return self.layer.queries(self.source, history) * self.temperature

    def to(self, device: torch.device | str) -> "SequenceBlock":
        """Return the same block on another device."""
        moved = super().to(device)
        assert isinstance(moved, SequenceBlock) and moved.layer is not None
        return replace(moved, layer=SequenceLayer.from_state(moved.layer.to_state()).to(device))


def sequence_block(network: SequenceNetwork, trained: Tensor, constants: Mapping[str, float]) -> SequenceBlock:
    """Read a block off a network.

    Args:
        network: trained.
        trained: ``[N]`` bool, items that may be recommended; the targets of others are zero.
        constants: numbers that a fit which repeats it needs.
    """
    network = network.eval()
    table = network.table(trained)
    return SequenceBlock(
        SEQUENCE,
        source=table,
        target=F.normalize(table, dim=-1) * trained[:, None],
        temperature=float(network.log_scale.detach().exp()),
        bias=(network.bias.detach() * trained).clone(),
        constants=constants,
        layer=network.layer,
    )
