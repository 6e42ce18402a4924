"""The sequence block: what it reads, that it is causal, its loss, and that a checkpoint gives it back."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from made_score import made_blocks

from recbole_llm.scoring.rows import Rows, rows_from_pairs
from recbole_llm.scoring.score import LinearBlock, Score
from recbole_llm.scoring.sequence import LENGTH, SequenceBlock, SequenceNetwork, sequence_block
from recbole_llm.scoring.state import score_from_state, score_to_state

N = 13


def network(content=True, seed=0, dim=8):
    torch.manual_seed(seed)
    found = SequenceNetwork(N, torch.randn(N, 5) if content else None, dim=dim)
    for parameter in found.parameters():  # nothing is at a value that hides a mistake
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return found.eval()


def table_of(net):
    return net.table(torch.ones(net.id.num_embeddings, dtype=torch.bool))


def queries(net, history):
    return net.layer.queries(table_of(net), history)


def histories(walks):
    users = torch.tensor([u for u, walk in enumerate(walks) for _ in walk], dtype=torch.int64)
    items = torch.tensor([i for walk in walks for i in walk], dtype=torch.int64)
    return rows_from_pairs(users, items, len(walks), torch.arange(len(users)))


def state_by_hand(net, walk):
    """The state after a walk, place by place and head by head in float64."""
    net = copy.deepcopy(net).double()
    walk = walk[-LENGTH:]
    e = net.id.weight[walk]
    if net.of_content is not None:
        e = e + net.content[walk] @ net.of_content.weight.T
    d, net = e.shape[1], net.layer
    x = e * d**0.5
    q, k, v = (net.before_attention(x) @ net.qkv.weight.T).split(d, 1)
    read = torch.zeros_like(x)
    for h in range(len(net.distance)):
        own = slice(h * d // 2, (h + 1) * d // 2)
        for t in range(len(walk)):
            logits = torch.stack(
                [q[t, own] @ k[s, own] / (d / 2) ** 0.5 + net.distance[h, t - s] for s in range(t + 1)]
            )
            read[t, own] = (logits.softmax(0)[:, None] * v[: t + 1, own]).sum(0)
    x = x + read @ net.out.weight.T
    x = x + net.mlp(net.before_mlp(x))
    return F.normalize(net.last(x), dim=-1)[-1]


@pytest.mark.parametrize("content", [True, False])
def test_a_query_is_the_state_after_the_newest_item(content):
    net = network(content)
    long = [1 + (5 * i) % 12 for i in range(12)]
    walks = [[3, 1, 2], [], [7], long, [2, 1, 3]]
    found = queries(net, histories(walks))
    assert not found[1].any()
    for row in (0, 2, 3, 4):
        torch.testing.assert_close(found[row].double(), state_by_hand(net, walks[row]).detach(), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[4]).abs().max() > 1e-3  # the order counts
    with pytest.raises(ValueError, match="reads the order of a history"):
        queries(net, Rows(torch.tensor([0, 1]), torch.tensor([3])))


def test_only_the_newest_items_are_read():
    torch.manual_seed(0)
    net = SequenceNetwork(60, None, dim=8).eval()
    walk = torch.randperm(60)[: LENGTH + 9].tolist()
    torch.testing.assert_close(queries(net, histories([walk])), queries(net, histories([walk[-LENGTH:]])))
    assert not torch.allclose(queries(net, histories([walk])), queries(net, histories([walk[1 - LENGTH :]])), atol=1e-4)


def test_no_state_reads_what_comes_later():
    net = network()
    first, second = net.items(torch.tensor([[3, 1, 2, 5], [3, 1, 9, 4]]))[:, None]
    torch.testing.assert_close(net.layer.states(first)[:, :2], net.layer.states(second)[:, :2])
    assert not torch.allclose(net.layer.states(first)[:, 2], net.layer.states(second)[:, 2], atol=1e-3)


def test_the_loss_is_the_softmax_over_all_items_where_all_are_candidates():
    net = network()
    sequences = torch.tensor([[3, 1, 2, 5], [7, 4, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    everything = torch.arange(N)
    found = net.loss(sequences, mask, everything, torch.zeros(N))
    states = net.layer.states(net.items(sequences[:, :-1]))[mask]
    logits = states @ F.normalize(table_of(net), dim=-1).T * net.log_scale.exp() + net.bias
    target = sequences[:, 1:][mask]
    torch.testing.assert_close(found, F.cross_entropy(logits, target), rtol=1e-5, atol=1e-5)
    # candidates are corrected by the chance that they are among them
    chance = torch.linspace(-3, -0.1, N)
    few = torch.tensor([2, 9, 11])
    candidates = torch.unique(torch.cat([few, target]))
    corrected = (logits - chance)[:, candidates]
    expected = F.cross_entropy(corrected, torch.searchsorted(candidates, target))
    torch.testing.assert_close(net.loss(sequences, mask, few, chance), expected, rtol=1e-5, atol=1e-5)
    net.loss(sequences, mask, few, chance).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def made(extra=()):
    net = network()
    trained = torch.arange(N) > 1
    block = sequence_block(net, trained, {"epochs": 4.0})
    listed = torch.arange(N) > 0
    return net, block, Score((*extra, block), listed, slope=0.7, intercept=0.2)


def test_the_block_scores_as_the_network_and_leaves_untrained_items_alone():
    net, block, score = made()
    history = histories([[3, 1, 2], [], [5, 6]])
    expected = (
        net.layer.queries(block.source, history) @ F.normalize(table_of(net), dim=-1).T * net.log_scale.exp() + net.bias
    )
    torch.testing.assert_close(block.scores(history)[:, 2:], expected[:, 2:], rtol=1e-5, atol=1e-5)
    assert not block.target[:2].any() and not block.bias[:2].any()
    # of an item that nobody has touched, its content is read
    torch.testing.assert_close(block.source[1], net.of_content.weight @ net.content[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(block.source[2:], table_of(net)[2:])
    scores = score.scores(history)
    torch.testing.assert_close(scores[:, 2:], 0.7 * expected[:, 2:] + 0.2, rtol=1e-5, atol=1e-5)
    assert math.isinf(scores[0, 0]) and block.dim == 8


def test_the_parts_of_a_score_add_up_and_no_item_of_the_history_owns_one_of_this_block():
    linear = next(block for block in made_blocks(identity=False) if block.name == "closed_form")
    _, _, score = made((linear,))
    history, items = histories([[3, 1, 2]]), torch.tensor([4, 2, 9])
    parts = score.parts(history, items)
    assert set(parts.of_history) == {"closed_form"} and set(parts.rest) == {"closed_form", "sequence"}
    torch.testing.assert_close(parts.total().float(), score.scores(history)[0, items], rtol=1e-4, atol=1e-4)
    assert parts.rest["sequence"].abs().min() > 1e-4


def test_a_checkpoint_gives_the_block_back():
    _, _, score = made()
    learned = LinearBlock("learned", torch.zeros(N, 2), torch.zeros(N, 2), bias=torch.zeros(N))
    score = Score((*score.blocks, LinearBlock("learned", None, torch.zeros(N, 2), scale=0.0)), score.listed)
    again = score_from_state(score_to_state(score), learned, score.rows or rows_of_all())
    block = again.block("sequence")
    assert isinstance(block, SequenceBlock) and block.constants == {"epochs": 4.0} and not block.is_linear
    history = histories([[3, 1, 2], [], [5, 6]])
    assert torch.equal(again.scores(history), score.scores(history))
    assert torch.equal(block.to("cpu").scores(history), score.block("sequence").scores(history))


def rows_of_all():
    from recbole_llm.scoring.item_rows import AllRows

    return AllRows(N)
