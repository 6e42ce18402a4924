r"""The training of the sequence block (:mod:`recbole_llm.scoring.sequence`), where interactions are split by time.

Every item of a history but the first is to be predicted from those before it, by a softmax against shared uniform negatives. AdamW,
its rate falling to 0; the epoch that is best on validation counts. Without validation data, as many epochs as were chosen.

Batches hold sequences of like lengths, ``TOKENS`` places at most, and share their negatives.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger

import torch
from torch import Tensor

from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.next_item import directions_of
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer
from recbole_llm.scoring.sequence import LENGTH, SEQUENCE, SequenceBlock, SequenceNetwork, sequence_block

CONTENT_DIMS = 192  # principal directions of the content that are read
TOKENS = 2048
NEGATIVES = 512
EPOCHS = 48
EPOCHS_BETWEEN = 4  # two validations
PATIENCE = 3  # validations without a better one
LEARNING_RATE = 0.003
WARM_UP = 100  # steps
WEIGHT_DECAY, BIAS_DECAY = 0.05, 0.5
CLIP = 1.0

AUTO = "auto_sequence"  # of blocks: the block where what follows holds
AUTO_ITEMS = 1_000  # at least; smaller catalogues were not measured
AUTO_INTERACTIONS = 300_000  # at most; about a quarter of an hour of a core

log = getLogger(__name__)


def takes_part(blocks: Sequence[str], data: TrainingData, has_validation: bool) -> bool:
    """Whether the sequence block is trained: where ``blocks`` names it, or names ``auto_sequence`` and it has been seen to pay.

    Args:
        blocks: of the options.
        data: training data.
        has_validation: whether there is validation data, by which its epochs and its weight are chosen.
    """
    if SEQUENCE in blocks:
        return True
    if AUTO not in blocks or not data.is_ordered or not has_validation or data.rows.sharded:
        return False
    n_items, n_interactions = int(data.trained.sum()), len(data.history.ids)
    if n_interactions > AUTO_INTERACTIONS:
        log.info(
            f"sequence block: left out, {n_interactions} interactions are more than {AUTO_INTERACTIONS}; blocks that name sequence "
            "train it"
        )
    return n_items >= AUTO_ITEMS and n_interactions <= AUTO_INTERACTIONS


def require_order(blocks: Sequence[str], data: TrainingData) -> None:
    """Refuse the sequence block where histories have no order; asked before anything is fitted, which may take hours.

    Args:
        blocks: names of those that are to be fitted.
        data: training data.

    Raises:
        ValueError: if the sequence block is among them and the interactions have no order.
    """
    if SEQUENCE in blocks and not data.is_ordered:
        raise ValueError(
            "blocks names sequence, which reads the order of a history, and the interactions have none: set eval_args.order "
            "to TO, load the time column and leave history_decay empty, or leave sequence out."
        )


@dataclass(frozen=True)
class Sequences:
    """Stretches of the histories, oldest item first.

    Attributes:
        items: ``[S, longest + 1]`` item ids, then padding.
        sizes: ``[S]`` int64, items in each, at least 2.
    """

    items: Tensor
    sizes: Tensor

    @property
    def n_targets(self) -> int:
        """Items that are to be predicted."""
        return int((self.sizes - 1).sum())


def sequences_of(history: Rows, longest: int = LENGTH) -> Sequences:
    """Cut histories into stretches whose last ``longest`` items are to be predicted, from the newest one backwards.

    Args:
        history: with ranks.
        longest: items that are read at once.
    """
    assert history.ranks is not None
    order = torch.argsort(history.row_of_entry() * (int(history.ranks.max()) + 1) + history.ranks.long())
    newest_first, offsets, sizes = history.ids[order], history.offsets, history.sizes
    items, lengths = [], []
    for skip in range(
        0, int(sizes.max()) - 1, longest
    ):  # stretches meet at an item that one predicts and one begins with
        rows = torch.nonzero(sizes - skip >= 2).squeeze(1)
        size = (sizes[rows] - skip).clamp(max=longest + 1)
        back = size[:, None] - 1 - torch.arange(longest + 1, device=rows.device)
        at = (offsets[rows] + skip)[:, None] + back.clamp(min=0)
        items.append(newest_first[at].masked_fill(back < 0, 0))
        lengths.append(size)
    return Sequences(torch.cat(items), torch.cat(lengths))


def batches(sequences: Sequences, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield items ``[B, T + 1]`` and the mask of places that have a next item ``[B, T]``, in random order."""
    sizes = sequences.sizes.cpu()
    order = torch.argsort(sizes + 1.5 * torch.rand(len(sizes), generator=generator))
    cuts, begin = [], 0
    lengths = (sizes[order] - 1).tolist()
    longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if (place + 1 - begin) * longest > TOKENS and place > begin:
            cuts.append(order[begin:place])
            begin, longest = place, length
    cuts.append(order[begin:])
    for number in torch.randperm(len(cuts), generator=generator).tolist():
        rows = cuts[number].to(sequences.items.device)
        size = sequences.sizes[rows]
        width = int(size.max())
        mask = torch.arange(1, width, device=rows.device) < size[:, None]
        yield sequences.items[rows][:, :width], mask


def content_of(data: TrainingData) -> Tensor | None:
    """Compute the first principal directions of the items' content, ``[N, k]`` float32; ``None`` without content."""
    directions = directions_of(data.content, torch.ones_like(data.trained))
    if not directions:
        return None
    side = torch.cat(list(directions.values()), 1)
    axes = torch.linalg.svd((side.T @ side).double())[0][:, :CONTENT_DIMS]
    return side @ axes.float()


def log_chance(popularity: Tensor, trained: Tensor, n_targets: int, tokens: float) -> Tensor:
    """Compute the log of the chance that an item is among a batch's candidates, ``[N]`` float32.

    Args:
        popularity: ``[N]`` how often each item is to be predicted.
        trained: ``[N]`` bool, the items that negatives are drawn of.
        n_targets: in an epoch.
        tokens: of a batch.
    """
    drawn = NEGATIVES * torch.log1p(-1.0 / trained.sum().double().clamp(min=2)) * trained
    asked = tokens * torch.log1p(-(popularity.double() / max(n_targets, 1)).clamp(max=0.999))
    return (1 - (drawn + asked).exp()).clamp(min=1e-12).log().float()


def fit_sequence(
    data: TrainingData, value: Callable[[Scorer], float] | None, histories: Rows, epochs: int | None = None
) -> SequenceBlock | None:
    """Train the sequence block.

    Args:
        data: what it is trained on, with ranks.
        value: validation value of a scorer of the rows of ``histories``; ``None`` to train for ``epochs`` without a choice.
        histories: of the rows that ``value`` asks for.
        epochs: how many; ``None`` for the best of at most ``EPOCHS``.

    Returns:
        The block, of scale 1, how many epochs it took among its constants; ``None`` where no history has two items.
    """
    if not bool((data.history.sizes > 1).any()):
        log.info("sequence block: left out, no history has two items")
        return None
    device = data.history.ids.device
    seed = int(torch.randint(2**31, (1,)))
    generator = torch.Generator().manual_seed(seed)
    network = SequenceNetwork(data.n_items, content_of(data)).to(device)
    sequences = sequences_of(data.history)
    per_epoch = sum(1 for _ in batches(sequences, torch.Generator().manual_seed(seed)))
    asked = sequences.items[:, 1:][torch.arange(1, LENGTH + 1, device=device) < sequences.sizes[:, None]]
    chance = log_chance(torch.bincount(asked, minlength=data.n_items), data.trained, len(asked), len(asked) / per_epoch)
    items = torch.nonzero(data.trained).squeeze(1)
    optimizer = _optimizer(network)
    best: tuple[float, int, SequenceNetwork] | None = None
    waited = step = 0
    for epoch in range(1, (epochs or EPOCHS) + 1):
        network.train()
        for batch, mask in batches(sequences, generator):
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - step / (EPOCHS * per_epoch))
            for group in optimizer.param_groups:
                group["lr"] = rate
            negatives = items[torch.randint(len(items), (NEGATIVES,), generator=generator).to(device)]
            optimizer.zero_grad()
            network.loss(batch, mask, negatives, chance).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            step += 1
        if value is None or epoch % EPOCHS_BETWEEN:
            continue
        found = value(sequence_block(network, data.trained, {}).scorer(histories))
        log.info(f"sequence block, epoch {epoch}: {found:.4f}")
        if best is None or found > best[0]:
            best, waited = (found, epoch, copy.deepcopy(network)), 0
        elif (waited := waited + 1) >= PATIENCE:
            break
    if best is not None:
        return sequence_block(best[2], data.trained, {"epochs": float(best[1])})
    return sequence_block(network, data.trained, {"epochs": float(epochs or EPOCHS)})


def _optimizer(network: SequenceNetwork) -> torch.optim.Optimizer:
    others = [parameter for name, parameter in network.named_parameters() if name != "bias"]
    groups = [
        {"params": others, "weight_decay": WEIGHT_DECAY},
        {"params": [network.bias], "weight_decay": BIAS_DECAY},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
