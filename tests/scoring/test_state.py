"""A score as the plain values of a checkpoint: what comes back is the same score, and version 1 is read as it was meant."""

import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import ColdRows, Score
from recbole_llm.scoring.state import score_from_state, score_to_state, state_of_version_1

N, U, D = 12, 4, 3
COLD = torch.tensor([9, 4, 11])
SHOWN = ProbabilityMap(-3.0, 0.25, 0.4, -1.0, (2.0, 0.5), (0.5,))
HISTORY = Rows(
    torch.tensor([0, 3, 3, 8, 10]),
    torch.tensor([1, 4, 7, 0, 2, 4, 9, 10, 5, 6]),
    ranks=torch.tensor([1.0, 0.0, 2.0, 4.0, 0.0, 3.0, 1.0, 2.0, 0.0, 1.0]),
)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learned():
    """As the towers give it: of scale 1, without cold-start items."""
    tables = {"source": normal(N, D, seed=1), "target": F.normalize(normal(N, D, seed=2), dim=1)}
    added = {"offset": normal(D, seed=3), "bias": normal(N, seed=4), "user_part": normal(U, D, seed=5)}
    return LinearBlock("learned", **tables, **added, exponent=0.5, cosine=True, temperature=4.0)


def kept(state):
    """The state as a checkpoint gives it back, read without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("joint", [True, False, None], ids=["joint", "left out", "nothing cold"])
@pytest.mark.parametrize("form", ["identity", "vectors", "learned alone"])
def test_a_score_comes_back_from_its_plain_values(form, joint):
    width = N if form == "identity" else 5
    targets = {} if form == "identity" else {"target": normal(N, width, seed=10)}
    solved = (
        LinearBlock("closed_form", normal(N, width, seed=11), scale=0.6, decay=2.0, **targets),
        LinearBlock("next_item", normal(N, width, seed=12), scale=0.2, decay=8.0, exponent=0.25, **targets),
        LinearBlock(
            "more",
            normal(N, 2, seed=13),
            normal(N, 2, seed=14),
            0.3,
            bias=normal(N, seed=15),
            offset=normal(2, seed=16),
        ),
    )
    blocks = (replace(learned(), scale=1.7),) if form == "learned alone" else (*solved, replace(learned(), scale=1.7))
    rows = AllRows(N)
    score = Score(blocks, rows.listed(), 0.8, -2.5, SHOWN, rows=rows)
    if joint is not None:
        same = normal(3, width, seed=20)
        target = {block.name: same if block.target is None else normal(3, block.dim, seed=21) for block in blocks}
        source = {block.name: normal(3, block.dim, seed=22) for block in blocks}
        bias = {block.name: normal(3, seed=23) for block in blocks if block.bias is not None}
        shift = {block.name: normal(block.dim, seed=24) for block in blocks}
        score = score.with_cold(ColdRows(COLD, target, source, bias, joint, 0.75, shift, -3.0, 0.3))
    state = kept(score_to_state(score))
    assert not any("user_part" in values for values in state["blocks"])
    assert state["blocks"][-1] == {"name": "learned", "scale": 1.7}, "its tables are in the parameters"
    found = score_from_state(state, learned(), rows)

    users = torch.tensor([3, 0, 1, 2])
    assert torch.equal(found.of_users(users, HISTORY), score.of_users(users, HISTORY))
    length = HISTORY.sizes[users].clamp(min=1).log()[:, None]
    scores = score.of_users(users, HISTORY)
    assert torch.equal(found.probabilities(scores, length), score.probabilities(scores, length))
    assert torch.equal(found.listed, score.listed) and found.probability == SHOWN
    assert [vars(block).keys() for block in found.blocks] == [vars(block).keys() for block in score.blocks]
    for block, other in zip(found.blocks, score.blocks, strict=True):
        for name in ("name", "scale", "exponent", "decay", "cosine", "temperature"):
            assert getattr(block, name) == getattr(other, name)
    if joint is None:
        assert found.cold is None
        return
    for name in ("joint", "kappa", "mean_bias", "mu"):
        assert getattr(found.cold, name) == getattr(score.cold, name)
    for name in ("target", "source", "bias", "shift"):
        ours, theirs = getattr(found.cold, name), getattr(score.cold, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # and once more: nothing of the way there is lost
    assert torch.equal(score_from_state(kept(score_to_state(found)), learned(), rows).of_users(users, HISTORY), scores)


def test_a_block_that_does_not_count_has_no_placed_items():
    """Histories of one item leave the closed form's scores without a deviation, and its scale is 0."""
    rows = AllRows(N)
    silent = LinearBlock("closed_form", torch.zeros(N, N), scale=0.0)
    score = Score((silent, learned()), rows.listed(), rows=rows)
    mapped, _ = score.mapped(torch.tensor([1, 2]), normal(3, 2, seed=1), rows.listed())
    score = score.with_cold(replace(mapped, ids=COLD, joint=True))
    found = score_from_state(kept(score_to_state(score)), learned(), rows)
    users = torch.arange(U)
    assert torch.equal(found.of_users(users, HISTORY), score.of_users(users, HISTORY))
    assert found.block("closed_form").scale == 0.0 and found.cold.target.keys() == {"learned"}


# ---------------------------------------------------------------- version 1

SCALES = (0.7, 1.9)  # of the closed form and the learned block
CALIBRATION = (0.8, -2.5)


def version_1(form, following, joint, with_closed=True, **changes):
    """``other_parameter`` of a checkpoint before there was a score, with what it was made of.

    Blocks lie side by side: a closed form, a next-item block, the learned block. Sources hold the cold-start rows, targets do
    not; those are in ``cold``, in the order of the blocks.
    """
    width = N if form == "identity" else 5
    para = {
        "closed_form_source": normal(N, width, seed=30) if with_closed else None,
        "closed_form_target": normal(N, width, seed=31) if with_closed and form == "vectors" else None,
        "block_scales": SCALES,
        "calibration": CALIBRATION,
        "probability_map": vars(SHOWN),
        "cold": None,
        "setting": None,
        "closed_decay": 2.0 if following else None,
        "next_item": None,
        "later": None,
    }
    if following:
        target = normal(N, 4, seed=33) if form == "vectors" else None
        source = normal(N, N if target is None else 4, seed=32)
        para["next_item"] = {"source": source, "target": target, "decay": 8.0, "scale": 0.4, "value": 0.1}
    if joint is not None:
        sources = [para["closed_form_source"]] * with_closed + ([para["next_item"]["source"]] if following else [])
        columns = (N if form == "identity" else 5 + 4 * following) * with_closed
        para["cold"] = {
            "ids": COLD,
            "closed": normal(3, columns, seed=40),
            "learned": normal(3, D, seed=41),
            "bias": normal(3, seed=42),
            "joint": joint,
            "closed_source": normal(3, sum(table.shape[1] for table in sources), seed=43),
            "learned_source": normal(3, D, seed=44),
            "kappa": 0.75,
            "shift": normal(columns + D, seed=45),
            "mean_bias": -1.5,
            "mu": 0.3,
        }
        at = 0
        for table in sources:
            table[COLD] = para["cold"]["closed_source"][:, at : at + table.shape[1]]
            at += table.shape[1]
    return {**para, **changes}


def faded(history, user, tau):
    span = slice(int(history.offsets[user]), int(history.offsets[user + 1]))
    ranks = history.ranks[span].double()
    return history.ids[span], torch.ones_like(ranks) if tau is None else torch.exp(-ranks / tau)


def scores_of_version_1(para, history):
    """The scores as version 1 defined them, in float64: slope (c_closed (x + f y) W' + c_learned (z W' + b)) + offset."""
    block, cold = learned(), para["cold"]
    w, source, bias = (table.double().clone() for table in (block.target, block.source, block.bias))
    place = torch.zeros(N, dtype=torch.float64)
    place[0] = -torch.inf
    if cold is not None:
        w[COLD], source[COLD], bias[COLD] = (cold[name].double() for name in ("learned", "learned_source", "bias"))
        place[COLD] = 0.0 if cold["joint"] else -torch.inf
    scores = torch.zeros(len(history.sizes), N, dtype=torch.float64)
    following = para["next_item"]
    for user in range(len(scores)):
        ids, _ = faded(history, user, None)
        x = source[ids].sum(0) / max(len(ids), 1) ** 0.5 + block.offset.double() + block.user_part[user].double()
        scores[user] += SCALES[1] * (4.0 * x / x.norm() @ w.T + bias)
        if para["closed_form_source"] is None:
            continue
        ids, t = faded(history, user, para["closed_decay"])
        queries = [t @ para["closed_form_source"][ids].double()]
        targets = [para["closed_form_target"]]
        if following is not None:
            ids, t = faded(history, user, following["decay"])
            queries.append(following["scale"] * (t @ following["source"][ids].double()))
            targets.append(following["target"])
        if targets[0] is None:
            query, target = sum(queries), torch.eye(N, dtype=torch.float64)
        else:
            query, target = torch.cat(queries), torch.cat(targets, 1).double()
        if cold is not None:
            target = target.index_copy(0, COLD, cold["closed"].double())
        scores[user] += SCALES[0] * target @ query
    return CALIBRATION[0] * scores + CALIBRATION[1] + place


@pytest.mark.parametrize("joint", [True, False, None], ids=["joint", "left out", "nothing cold"])
@pytest.mark.parametrize("following", [True, False], ids=["next item", "unordered"])
@pytest.mark.parametrize("form", ["identity", "vectors"])
def test_a_checkpoint_of_version_1_scores_as_it_did(form, following, joint):
    rows, para = AllRows(N), version_1(form, following, joint)
    expected = scores_of_version_1(para, HISTORY)
    score = score_from_state(state_of_version_1(kept(para), rows), learned(), rows)
    found = score.of_users(torch.arange(U), HISTORY)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert score.probability == SHOWN
    assert [block.name for block in score.blocks] == ["closed_form"] + ["next_item"] * following + ["learned"]
    if joint is None:
        assert score.cold is None
        return
    cold, old = score.cold, para["cold"]
    assert (cold.joint, cold.kappa, cold.mu) == (joint, 0.75, 0.3)
    assert cold.mean_bias == pytest.approx(SCALES[1] * -1.5)  # of the score, before the calibration
    shift = torch.cat([cold.shift[block.name] for block in score.blocks if block.target is not None])
    wanted = old["shift"] if form == "vectors" else old["shift"][N:]
    assert torch.equal(shift, wanted)
    if form == "identity":
        for block in score.blocks[:-1]:
            assert torch.equal(cold.shift[block.name], old["shift"][:N])
    sources = torch.cat([cold.source[block.name] for block in score.blocks[:-1]], 1)
    assert torch.equal(sources, old["closed_source"]) and torch.equal(cold.source["learned"], old["learned_source"])
    # what version 1 said of the items among themselves
    among = score.scores(HISTORY, score.user_parts(torch.arange(U)), unlisted=True)
    joined = scores_of_version_1({**para, "cold": {**old, "joint": True}}, HISTORY)
    torch.testing.assert_close(among[:, COLD].double(), joined[:, COLD], rtol=1e-4, atol=1e-4)
    # a checkpoint of today keeps it
    again = score_from_state(kept(score_to_state(score)), learned(), rows)
    assert torch.equal(again.of_users(torch.arange(U), HISTORY), found)


@pytest.mark.parametrize("joint", [True, False, None])
def test_version_1_without_a_closed_form(joint):
    rows, para = AllRows(N), version_1("identity", False, joint, with_closed=False)
    score = score_from_state(state_of_version_1(kept(para), rows), learned(), rows)
    assert [block.name for block in score.blocks] == ["learned"]
    found = score.of_users(torch.arange(U), HISTORY)
    torch.testing.assert_close(found.double(), scores_of_version_1(para, HISTORY), rtol=1e-4, atol=1e-4)


def test_version_1_of_a_closed_form_alone():
    rows, para = AllRows(N), version_1("identity", False, True, block_scales=(1.0, 0.0))
    score = score_from_state(state_of_version_1(kept(para), rows), learned(), rows)
    assert [block.name for block in score.counting] == ["closed_form"]
    assert score.queries(HISTORY).shape == (U, N)
    assert torch.equal(score.block("closed_form").source, para["closed_form_source"])


def test_before_anything_was_fitted_there_is_no_score():
    para = version_1("identity", False, None, with_closed=False, block_scales=(0.0, 1.0), calibration=(1.0, 0.0))
    assert state_of_version_1(para, AllRows(N)) is None


def test_version_1_before_there_were_maps_and_orders():
    para = version_1("vectors", False, None)
    for key in ("probability_map", "closed_decay", "next_item"):
        del para[key]
    score = score_from_state(state_of_version_1(para, AllRows(N)), learned(), AllRows(N))
    assert score.probability == ProbabilityMap() and score.block("closed_form").decay is None
    expected = scores_of_version_1(version_1("vectors", False, None), HISTORY)
    torch.testing.assert_close(score.of_users(torch.arange(U), HISTORY).double(), expected, rtol=1e-4, atol=1e-4)
