r"""eSASRec, trained here within a stated budget: SASRec with LiGR layers and a sampled softmax.

    x_t  = e_{i_t} + position of t, counted from the newest item
    x    = x + sigmoid(W1 x) * attention(norm(x))                      causal
    x    = x + sigmoid(W2 x) * (V3 (silu(V1 norm(x)) * (V2 norm(x))))  SwiGLU
    s_ui = <x_newest, e_i>

Each item of a history but the first is predicted from those before it, by a softmax against ``NEGATIVES`` items drawn uniformly
for it alone. The layer, the loss and the constants are those of Tikhonovich et al., "eSASRec: Enhancing Transformer-based
Recommendations in a Modular Fashion" (RecSys 2025), whose README names them for Beauty: 64 columns, one layer, one head, dropout
.2, 50 items, 256 negatives, Adam at .001, at most 200 epochs. Written anew. A drawn item that is the positive does not count.

The budget is in minutes of the processor. The epoch that is best on validation counts.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from logging import getLogger

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_llm.bridge.experiments.baselines.solved import Solved
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting.sequence import sequences_of
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer
from recbole_llm_kernels import sampled_ce

DIM, HEADS, LAYERS, WIDER, DROPOUT = 64, 1, 1, 4, 0.2
LENGTH = 50  # items of a history that are read, the newest ones
NEGATIVES = 256
BATCH = 128  # histories
LEARNING_RATE = 0.001
EPOCHS = 200
EPOCHS_BETWEEN = 2  # two validations
PATIENCE = 10  # validations without a better one
VALIDATED = 4_000  # users of a validation during the training
CHUNK = 1024  # histories read at once

log = getLogger(__name__)


class LiGRLayer(nn.Module):
    """One transformer layer with gated residuals (Borisyuk et al., arXiv 2502.03417).

    Args:
        dim: d, a multiple of ``heads``.
        heads: of the attention.
        wider: hidden columns of the feed-forward part, in multiples of d.
        dropout: of the attention's weights, of the hidden columns and of both parts.
    """

    def __init__(self, dim: int, heads: int, wider: int, dropout: float) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.gate_attention, self.gate_mlp = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.up, self.side = nn.Linear(dim, wider * dim, bias=False), nn.Linear(dim, wider * dim, bias=False)
        self.down = nn.Linear(wider * dim, dim, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Compute the next states, ``[B, T, d]``, of which place t reads those that ``hidden[t]`` (``[T, T]`` bool) leaves."""
        inside = self.before_attention(x)
        read, _ = self.attention(inside, inside, inside, attn_mask=hidden, need_weights=False)
        x = x + torch.sigmoid(self.gate_attention(x)) * self.drop(read)
        inside = self.before_mlp(x)
        wide = self.down(self.drop(F.silu(self.up(inside)) * self.side(inside)))
        return x + torch.sigmoid(self.gate_mlp(x)) * self.drop(wide)


class ESASRec(nn.Module):
    """Item vectors, positions from the newest item, and LiGR layers.

    Args:
        n_items: N, the padding item 0 among them.
    """

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.item = nn.Embedding(n_items, DIM, padding_idx=0)
        self.position = nn.Embedding(LENGTH, DIM)
        self.layers = nn.ModuleList(LiGRLayer(DIM, HEADS, WIDER, DROPOUT) for _ in range(LAYERS))
        self.drop = nn.Dropout(DROPOUT)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            self.item.weight[0] = 0.0

    def forward(self, items: Tensor, sizes: Tensor) -> Tensor:
        """Compute the state after every place.

        Args:
            items: ``[B, T]`` item ids, oldest first, then padding.
            sizes: ``[B]`` int64, how many of them are items.

        Returns:
            ``[B, T, d]``.
        """
        place = torch.arange(items.shape[1], device=items.device)
        x = self.drop(self.item(items) + self.position((sizes[:, None] - 1 - place).clamp(min=0)))
        hidden = place > place[:, None]
        for layer in self.layers:
            x = layer(x, hidden)
        return x

    def scorer(self, histories: Rows) -> Scorer:
        """Return a scorer of histories with ranks; an empty one has zeros."""
        items, sizes = newest_items(histories)

        @torch.no_grad()
        def scorer(users: Tensor) -> Tensor:
            found = torch.zeros(len(users), len(self.item.weight))
            some = torch.nonzero(sizes[users]).squeeze(1)
            for few in some.split(CHUNK):
                own = sizes[users[few]]
                states = self(items[users[few], : int(own.max())], own)
                found[few] = states[torch.arange(len(few)), own - 1] @ self.item.weight.T
            return found

        return scorer


def newest_items(histories: Rows) -> tuple[Tensor, Tensor]:
    """Write the newest ``LENGTH`` items of each history, ``[U, LENGTH]`` oldest first, then padding, and how many there are."""
    assert histories.ranks is not None
    sizes = histories.sizes.clamp(max=LENGTH)
    row, rank = histories.row_of_entry(), histories.ranks.long()
    kept = rank < LENGTH
    items = torch.zeros(len(sizes), LENGTH, dtype=torch.int64)
    items[row[kept], sizes[row[kept]] - 1 - rank[kept]] = histories.ids[kept]
    return items, sizes


def batches(sequences: Tensor, sizes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield items ``[B, T + 1]`` and their numbers ``[B]``, in random order."""
    for rows in torch.randperm(len(sizes)).split(BATCH):
        own = sizes[rows]
        yield sequences[rows, : int(own.max())], own


def train_epoch(network: ESASRec, optimizer: torch.optim.Optimizer, sequences: Tensor, sizes: Tensor) -> None:
    """Pass once over the sequences, ``[S, LENGTH + 1]`` item ids and ``[S]`` numbers of items."""
    network.train()
    n_items = len(network.item.weight)
    for items, own in batches(sequences, sizes):
        states = network(items[:, :-1], own - 1)
        asked = torch.arange(items.shape[1] - 1) < (own - 1)[:, None]
        states, positive = states[asked], items[:, 1:][asked]
        negative = torch.randint(1, n_items, (len(positive), NEGATIVES))
        loss = sampled_ce(states, network.item.weight, torch.arange(len(positive)), positive, negative)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fit_esasrec(rows: LeaveOneOut, minutes: float) -> Solved:
    """Train eSASRec until validation stops rising, or the budget or the epochs end.

    Args:
        rows: the data.
        minutes: of the processor.
    """
    started = time.process_time()
    history, n = rows.data.history, rows.data.n_items
    found = sequences_of(history, LENGTH)
    network = ESASRec(n)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    some = replace(rows.validation, max_users=VALIDATED).subset(n)
    best, waited, epoch, ended = (-1.0, 0, network), 0, 0, f"all {EPOCHS} epochs ran"
    for epoch in range(1, EPOCHS + 1):
        train_epoch(network, optimizer, found.items, found.sizes)
        over = time.process_time() - started >= 60 * minutes
        if epoch % EPOCHS_BETWEEN and not over and epoch < EPOCHS:
            continue
        value = some.value(network.eval().scorer(some.history), n, rows.padding)
        log.info(f"eSASRec, epoch {epoch}: {value:.4f}")
        waited += 1
        if value > best[0]:
            best, waited = (value, epoch, copy.deepcopy(network)), 0
        if waited >= PATIENCE:
            ended = "ended by early stopping"
            break
        if over:
            ended = "ended by its budget, not by early stopping"
            break
    chosen = best[2].eval()
    valid = rows.validation.value(chosen.scorer(history), n, rows.padding)
    setting = f"epoch {best[1]} of {epoch} trained, {ended}; budget {minutes:g} processor minutes"
    return Solved(setting, valid, chosen.scorer(rows.later))
