"""A made score with every kind of block, made histories, and what they score in float64."""

import math

import torch

from recbole_llm.scoring.block import Exceptions, LinearBlock
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Score

N, U = 13, 6
EXCEPTIONS = torch.tensor([8, 3])  # unsorted
UNLISTED = (0, 11)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made_blocks(identity=True):
    """Every kind of block: what it is made of, how it weighs histories, and what is added to them."""
    rows = Exceptions(EXCEPTIONS, normal(2, N, seed=20))
    wide = {"exceptions": rows} if identity else {"target": normal(N, N, seed=21)}
    return (
        LinearBlock("closed_form", normal(N, N, seed=1), scale=0.7, decay=2.0, **wide),
        LinearBlock("silent", normal(N, 9, seed=2), normal(N, 9, seed=3), scale=0.0, bias=normal(N, seed=4)),
        LinearBlock(
            "learned",
            normal(N, 4, seed=5),
            normal(N, 4, seed=6),
            scale=1.3,
            exponent=0.5,
            cosine=True,
            temperature=3.0,
            offset=normal(4, seed=7),
            bias=normal(N, seed=8),
            user_part=normal(U, 4, seed=9),
        ),
        LinearBlock("next_item", normal(N, N, seed=10), scale=0.4, decay=5.0, exponent=0.3, **wide),
        LinearBlock(  # users by ID alone
            "users", None, normal(N, 3, seed=11), offset=normal(3, seed=12), user_part=normal(U, 3, seed=13)
        ),
        LinearBlock(
            "plain", normal(N, 2, seed=14), normal(N, 2, seed=15), scale=-0.6, temperature=0.2, bias=normal(N, seed=16)
        ),
    )


def made_score(identity=True, blocks=None):
    listed = torch.ones(N, dtype=torch.bool)
    listed[list(UNLISTED)] = False
    return Score(made_blocks(identity) if blocks is None else blocks, listed, slope=0.8, intercept=-1.5)


HISTORIES = ("plain", "weights", "ranks", "both")


def made_history(kind):
    """Rows of 3, 0, 5, 1, 0 and 12 entries, one for every user."""
    sizes = [3, 0, 5, 1, 0, 12]
    generator = torch.Generator().manual_seed(30)
    items = [torch.randperm(N - 1, generator=generator)[:size].add(1).sort().values for size in sizes]
    ranks = torch.cat([torch.randperm(size, generator=generator) for size in sizes]).float()
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    weights = torch.rand(int(offsets[-1]), generator=generator) + 0.1 if kind in ("weights", "both") else None
    return Rows(offsets, torch.cat(items), weights, ranks if kind in ("ranks", "both") else None)


def targets_of(block):
    if block.target is not None:
        return block.target.double()
    eye = torch.eye(N, dtype=torch.float64)
    if block.exceptions is not None:
        eye[block.exceptions.ids] = block.exceptions.rows.double()
    return eye


def entry_weights(block, history, user):
    span = slice(int(history.offsets[user]), int(history.offsets[user + 1]))
    t = [1.0] * (span.stop - span.start) if history.weights is None else history.weights[span].tolist()
    if block.decay is not None and history.ranks is not None:
        t = [w * math.exp(-rank / block.decay) for w, rank in zip(t, history.ranks[span].tolist(), strict=True)]
    return [each / sum(t) ** block.exponent for each in t], history.ids[span].tolist()


def summands(block, history, user, part):
    """What each entry adds to a user's scores ``[N, h]``, and what the rest of the query does ``[N]``; with slope 1, in float64."""
    weights, items = entry_weights(block, history, user)
    entries = (
        [a * block.source[j].double() for a, j in zip(weights, items, strict=True)] if block.source is not None else []
    )
    rest = torch.zeros(block.dim, dtype=torch.float64)
    for summand in (block.offset, None if part is None else part.get(block.name)):
        if summand is not None:
            rest = rest + (summand if summand.dim() == 1 else summand[user]).double()
    x = rest + sum(entries, torch.zeros_like(rest))
    factor = block.scale * block.temperature / (max(float(x.norm()), 1e-300) if block.cosine else 1.0)
    target = targets_of(block)
    columns = (
        torch.stack([target @ entry for entry in entries], 1) if entries else torch.zeros(N, 0, dtype=torch.float64)
    )
    if block.direct is not None:
        M = dense_direct(block.direct)
        columns = (
            columns
            + torch.stack([a * M[j] for a, j in zip(weights, items, strict=True)] or [M[0] * 0], 1)[:, : len(items)]
        )
    rest = target @ rest
    if part is not None and block.direct is not None and block.dislikes:
        rest = rest - block.dislikes * dense_direct(block.direct)[block.disliked.select(torch.tensor([user])).ids].sum(
            0
        )
    return factor * columns, factor * rest


def dense_direct(direct):
    M = torch.zeros(N, N, dtype=torch.float64)
    M[direct.row_of_entry(), direct.ids] = direct.weights.double()
    return M


def made_direct(seed=50):
    """Direct rows of 0 to 4 items, some empty, ascending; neither from nor to padding, and none of the items never listed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 5, (N,), generator=generator)
    sizes[[0, 4, 11]] = 0
    places = [i for i in range(1, N) if i != 11]
    rows = [
        torch.tensor(places)[torch.randperm(len(places), generator=generator)[:size]].sort().values for size in sizes
    ]
    ids = torch.cat(rows)
    return Rows(torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]), ids, normal(len(ids), seed=seed + 1))


def direct_blocks():
    """Two blocks with direct rows, with decay, exponent, temperature and dislikes, beside others."""
    disliked = Rows(torch.tensor([0, 0, 2, 2, 3, 3, 6]), torch.tensor([2, 7, 9, 1, 3, 12]))
    return (
        LinearBlock(
            "closed_form", normal(N, 3, seed=52), normal(N, 3, seed=53), scale=0.7, decay=2.0, dislikes=0.4,
            disliked=disliked, direct=made_direct(),
        ),
        LinearBlock(
            "next_item", normal(N, 2, seed=54), normal(N, 2, seed=55), scale=1.2, exponent=0.3, temperature=0.5,
            direct=made_direct(60),
        ),
        made_blocks()[2],
    )  # fmt: skip


def expected_scores(score, history, part):
    total = torch.zeros(len(history.sizes), N, dtype=torch.float64)
    for block in score.blocks:
        for user in range(len(total)):
            entries, rest = summands(block, history, user, part)
            total[user] += entries.sum(1) + rest
        if block.bias is not None:
            total += block.scale * block.bias.double()
    total = score.slope * total + score.intercept
    total[:, ~score.listed] = -math.inf
    return total


def close(found, expected, rtol=2e-4, atol=2e-4):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)
