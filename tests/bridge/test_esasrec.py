"""eSASRec as a row of the table: its layer by hand, what it reads, that it learns an order, how its training ends."""

import math
import random
from dataclasses import replace

import pytest
import torch

from recbole_llm.bridge.experiments.baselines import BASELINES, WITH_BUDGET, esasrec
from recbole_llm.bridge.experiments.baselines.esasrec import LENGTH, ESASRec, LiGRLayer, newest_items
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.validation import Validation
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows, rows_from_pairs

USERS, ITEMS = 150, 30


def histories(walks):
    user = torch.tensor([u for u, walk in enumerate(walks) for _ in walk], dtype=torch.int64)
    item = torch.tensor([i for walk in walks for i in walk], dtype=torch.int64)
    return rows_from_pairs(user, item, len(walks), torch.arange(len(user)))


@pytest.fixture
def circle():
    """Walks of one step at a time on a circle; all items are as popular."""
    rng = random.Random(0)
    starts = [rng.randrange(ITEMS) for _ in range(USERS)]
    walks = [[1 + (start + t) % ITEMS for t in range(rng.randint(4, 8))] for start in starts]
    train, later = histories([walk[:-2] for walk in walks]), histories([walk[:-1] for walk in walks])
    last, one_before = (torch.tensor([walk[at] for walk in walks]) for at in (-1, -2))
    users = torch.arange(USERS)
    validation = Validation(train, rows_from_pairs(users, one_before, USERS), train)
    data = TrainingData(train, AllRows(ITEMS + 1))
    return LeaveOneOut(
        data, torch.zeros(len(train.ids)).double(), validation, later, rows_from_pairs(users, last, USERS)
    )


def test_it_learns_an_order_far_above_popularity(circle, monkeypatch):
    for name, value in (("LEARNING_RATE", 0.02), ("NEGATIVES", 16), ("EPOCHS", 10), ("BATCH", 32)):
        monkeypatch.setattr(esasrec, name, value)
    torch.manual_seed(0)
    found = WITH_BUDGET["eSASRec"](circle, 1.0)
    value = float(circle.figures(found.scorer, "masked")["ndcg@10"].mean())
    bestsellers = float(circle.figures(BASELINES["Popularity"](circle).scorer, "masked")["ndcg@10"].mean())
    assert value > 0.9 and bestsellers < 0.4 and found.valid > 0.9
    assert "budget 1 processor minutes" in found.setting


def test_how_the_training_ended_is_said(circle, monkeypatch):
    fit = WITH_BUDGET["eSASRec"]
    monkeypatch.setattr(esasrec, "NEGATIVES", 8)
    assert fit(circle, 1e-6).setting == (
        "epoch 1 of 1 trained, ended by its budget, not by early stopping; budget 1e-06 processor minutes"
    )
    monkeypatch.setattr(esasrec, "EPOCHS", 3)
    assert "of 3 trained, all 3 epochs ran; budget 9 processor minutes" in fit(circle, 9.0).setting
    monkeypatch.setattr(esasrec, "EPOCHS", 50)
    monkeypatch.setattr(esasrec, "LEARNING_RATE", 0.0)
    monkeypatch.setattr(esasrec, "PATIENCE", 2)
    assert fit(circle, 9.0).setting.startswith("epoch 2 of 6 trained, ended by early stopping;")


def test_a_layer_is_its_formula():
    torch.manual_seed(0)
    layer = LiGRLayer(6, 2, 3, 0.3).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    found = layer(x, torch.ones(4, 4, dtype=torch.bool).triu(1))
    W = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def norm(row, name):
        centred = row - row.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * W[f"{name}.weight"] + W[f"{name}.bias"]

    for sequence, states in zip(x, found, strict=True):
        inside = [norm(row, "before_attention") for row in sequence]
        q, k, v = (
            [
                W["attention.in_proj_weight"][at : at + 6] @ row + W["attention.in_proj_bias"][at : at + 6]
                for row in inside
            ]
            for at in (0, 6, 12)
        )
        for t, row in enumerate(sequence):
            heads = []
            for part in (slice(0, 3), slice(3, 6)):
                weight = [math.exp(float(q[t][part] @ k[s][part]) / math.sqrt(3)) for s in range(t + 1)]
                heads.append(sum(w * v[s][part] for s, w in enumerate(weight)) / sum(weight))
            read = W["attention.out_proj.weight"] @ torch.cat(heads) + W["attention.out_proj.bias"]
            middle = row + torch.sigmoid(W["gate_attention.weight"] @ row + W["gate_attention.bias"]) * read
            hidden = norm(middle, "before_mlp")
            up = W["up.weight"] @ hidden
            wide = W["down.weight"] @ (up * torch.sigmoid(up) * (W["side.weight"] @ hidden))
            expected = middle + torch.sigmoid(W["gate_mlp.weight"] @ middle + W["gate_mlp.bias"]) * wide
            torch.testing.assert_close(states[t], expected)


def test_a_history_is_read_alike_beside_longer_ones_and_an_empty_one_is_zero():
    torch.manual_seed(0)
    network = ESASRec(90).eval()
    walks = [[4, 8, 15], [], list(range(1, 71)), [16]]
    score = network.scorer(histories(walks))(torch.arange(4))
    for row, walk in zip(score, walks, strict=True):
        alone = network.scorer(histories([walk]))(torch.tensor([0]))[0] if walk else torch.zeros(90)
        torch.testing.assert_close(row, alone)
    last = network.scorer(histories([walks[2][-LENGTH:]]))(torch.tensor([0]))[0]
    torch.testing.assert_close(score[2], last)  # the newest items count
    assert not torch.allclose(score[0], network.scorer(histories([[8, 4, 15]]))(torch.tensor([0]))[0], atol=1e-4)
    assert (score[:, 0] == 0).all()


def test_the_newest_items_stand_oldest_first():
    walk = (1 + torch.randperm(70, generator=torch.Generator().manual_seed(0))).tolist()
    items, sizes = newest_items(histories([walk, [3, 2]]))
    assert items[0].tolist() == walk[-LENGTH:] and sizes.tolist() == [LENGTH, 2]
    assert items[1].tolist() == [3, 2] + [0] * (LENGTH - 2)


def test_every_next_item_is_asked_for_once_in_an_epoch(circle, monkeypatch):
    asked = []

    def loss(states, table, rows, positive, negative):
        asked.extend(positive.tolist())
        assert states.shape == (len(positive), table.shape[1]) and negative.shape == (len(positive), 256)
        assert int(negative.min()) >= 1
        return states.sum() * 0.0

    monkeypatch.setattr(esasrec, "sampled_ce", loss)
    monkeypatch.setattr(esasrec, "EPOCHS", 1)
    WITH_BUDGET["eSASRec"](circle, 1.0)
    history = circle.data.history
    expected = history.ids[history.ranks < history.sizes[history.row_of_entry()] - 1]  # all but the oldest of each
    assert sorted(asked) == sorted(expected.tolist())


def test_users_without_a_history_do_not_stop_it(circle, monkeypatch):
    monkeypatch.setattr(esasrec, "EPOCHS", 1)
    empty = torch.arange(len(circle.data.history.ids)) >= 10
    history = circle.data.history.keep(empty)
    assert int(history.sizes.min()) == 0
    rows = replace(
        circle, data=TrainingData(Rows(history.offsets, history.ids, ranks=history.ranks), AllRows(ITEMS + 1))
    )
    assert WITH_BUDGET["eSASRec"](rows, 1.0).valid >= 0.0
