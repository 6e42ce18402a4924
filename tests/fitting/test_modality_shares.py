"""Each modality's share of the cold map: chosen by how well cold items are ranked, 0 allowed; what an item lacks is a mask."""

import math
from dataclasses import replace

import pytest
import torch

from recbole_llm.fitting.cold_start import placement
from recbole_llm.fitting.cold_start.boost import ColdBoost
from recbole_llm.fitting.cold_start.kernel_ridge import fit_cold_map, map_weights, share_candidates
from recbole_llm.fitting.cold_start.placement import Evidence, choose_place, map_items, place, placed_in_words
from recbole_llm.fitting.refit import ChosenPlace
from recbole_llm.fitting.validation import TopKMetric
from recbole_llm.scoring.rows import pool, rows_from_pairs
from recbole_llm.scoring.score import ColdRows, LinearBlock, Score
from recbole_llm.scoring.state import score_from_state, score_to_state

N, U, F, V = 120, 300, 12, 6
COLD = torch.arange(90, 120)
SHARES = {"text": 0.75, "image": 0.25}


def world(useful, seed=0):
    """Items whose vectors follow from one modality; the other is noise. The 30 cold ones are bought in validation alone."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N, F, generator=generator)
    truth = features @ torch.randn(F, V, generator=generator) / F**0.5
    users = torch.randn(U, V, generator=generator)
    item = (users @ truth.T + 0.3 * torch.randn(U, N, generator=generator)).topk(30, 1).indices.flatten()
    user = torch.arange(U).repeat_interleave(30)
    trained = torch.arange(N) < len(COLD) * 3
    late = ~trained[item] | (torch.rand(len(item), generator=generator) < 0.2)
    train, valid = (rows_from_pairs(user[mask], item[mask], U) for mask in (~late, late))
    everything = torch.ones(N, dtype=torch.bool)
    content = {
        name: (features if name == useful else torch.randn(N, F, generator=generator), everything.clone())
        for name in ("text", "image")
    }
    evidence = Evidence(train, valid, TopKMetric("ndcg", 5), content, trained, torch.bincount(train.ids, minlength=N))
    block = LinearBlock(
        "closed_form",
        source=truth * 2 * trained[:, None],
        target=truth * trained[:, None],
        user_part=users - pool(truth * 2 * trained[:, None], train),
    )
    return evidence, Score((block,), trained.clone())


def refuse(left):
    raise AssertionError("fitted again although validation decides")


def explicit(content, ids, known, mu, shares, h=0.8):
    """Weights of the map in float64, by the definition: a sum over the modalities that both items have."""

    def kernel(ones, others):
        K = torch.zeros(len(ones), len(others), dtype=torch.float64)
        for name, (vectors, present) in content.items():
            directions = vectors.double() - vectors[present].double().mean(0)
            directions = directions / directions.norm(dim=1, keepdim=True)
            for a, i in enumerate(ones.tolist()):
                for b, j in enumerate(others.tolist()):
                    if present[i] and present[j]:
                        K[a, b] += shares[name] * torch.exp(-((directions[i] - directions[j]) ** 2).sum() / h)
        return K

    inverse = torch.linalg.inv(kernel(known, known) + mu * torch.eye(len(known), dtype=torch.float64))
    return kernel(ids, known) @ inverse


def with_gaps(seed=0, n=24):
    generator = torch.Generator().manual_seed(seed)
    content = {}
    for name, width in (("text", 8), ("image", 5)):
        present = torch.rand(n, generator=generator) < 0.6
        vectors = torch.randn(n, width, generator=generator)
        content[name] = (torch.where(present[:, None], vectors, torch.nan), present)
    return content, torch.arange(n) % 3 != 0


@pytest.mark.parametrize("seed", range(3))
def test_shares_weigh_the_masked_sum(seed):
    content, warm = with_gaps(seed)
    some = torch.stack([present for _, present in content.values()]).any(0)
    known, ids = torch.nonzero(warm & some).squeeze(1), torch.nonzero(~warm & some).squeeze(1)
    found, weights = map_weights(content, warm, ids, mu=0.3, shares=SHARES)
    assert torch.equal(found, known)
    torch.testing.assert_close(weights.double(), explicit(content, ids, known, 0.3, SHARES), rtol=1e-4, atol=1e-5)
    values = torch.randn(len(warm), 4)
    fitted = fit_cold_map(content, warm, values, mu=0.3, shares=SHARES)
    for name in content:  # items of one modality alone, as an export places them
        alone = ids[content[name][1][ids] & (sum(present[ids].int() for _, present in content.values()) == 1)]
        wanted = (weights @ values[known])[torch.isin(ids, alone)]
        torch.testing.assert_close(fitted({name: content[name][0][alone]}), wanted, rtol=1e-4, atol=1e-5)
        _, anchors, coefficients = fitted.of_modality(name)
        assert len(anchors) == len(coefficients) == int(content[name][1][known].sum())


def test_equal_shares_are_what_no_shares_are():
    content, warm = with_gaps()
    ids = torch.nonzero(~warm & content["text"][1]).squeeze(1)
    ((_, plain), (_, equal)) = (
        map_weights(content, warm, ids, shares=shares) for shares in (None, {"text": 0.5, "image": 0.5})
    )
    torch.testing.assert_close(plain, equal, rtol=1e-5, atol=1e-6)


def test_a_share_of_zero_is_a_model_without_that_modality():
    content, warm = with_gaps()
    ids = torch.nonzero(~warm & content["text"][1]).squeeze(1)
    without = map_weights({"text": content["text"]}, warm, ids)
    for shares in ({"text": 1.0, "image": 0.0}, {"text": 1.0}):
        for one, other in zip(map_weights(content, warm, ids, shares=shares), without, strict=True):
            assert torch.equal(one, other)


def test_candidates_add_up_to_one_and_hold_each_alone():
    assert share_candidates(["text"]) == [{}]
    assert share_candidates(["text", "image"]) == [
        {},
        {"text": 0.75, "image": 0.25},
        {"text": 0.25, "image": 0.75},
        {"text": 1.0, "image": 0.0},
        {"text": 0.0, "image": 1.0},
    ]
    for shares in share_candidates(["text", "image", "audio"])[1:]:
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("useful", ["text", "image"])
def test_the_modality_that_tells_of_cold_items_gets_the_larger_share(useful):
    evidence, score = world(useful)
    mu, boost, shares = choose_place(evidence, COLD, score, refuse)
    useless = {"text": "image", "image": "text"}[useful]
    assert shares[useful] > shares[useless] and sum(shares.values()) == 1
    only = replace(evidence, content={useful: evidence.content[useful]})
    assert choose_place(only, COLD, score, refuse)[2] == {}
    placed = place(evidence, COLD, score, boost, mu, shares)
    assert placed.cold is not None and placed.cold.shares == shares


def test_hidden_items_choose_the_shares_with_one_fit(monkeypatch):
    evidence, score = world("text")
    monkeypatch.setattr(placement, "UNTOLD_WARM_FLOOR", 0.8)
    warm = replace(evidence, targets=evidence.targets.keep(evidence.trained[evidence.targets.ids]))
    fits = []

    def refit(left):
        fits.append(left)
        source = score.blocks[0].source
        part = score.blocks[0].user_part + pool(source, evidence.history) - pool(source, left)
        return score.with_blocks(replace(score.blocks[0], user_part=part)), left

    _, _, shares = choose_place(warm, COLD, score, refit)
    assert len(fits) == 1 and shares["text"] > shares["image"]


def test_items_whose_content_has_no_share_get_no_place(caplog):
    evidence, score = world("text")
    present = evidence.content["text"][1].clone()
    present[COLD[:4]] = False
    evidence = replace(evidence, content=evidence.content | {"text": (evidence.content["text"][0], present)})
    with caplog.at_level("INFO"):
        placed = place(evidence, COLD, score, ColdBoost(joint=True), 1.0, {"text": 1.0, "image": 0.0})
    assert "4 have nothing but content without a share" in caplog.text
    assert placed.cold.ids.tolist() == COLD[4:].tolist()
    assert not placed.listed[COLD[:4]].any() and placed.listed[COLD[4:]].all()
    nobody = place(evidence, COLD[:4], score, ColdBoost(joint=True), 1.0, {"text": 1.0, "image": 0.0})
    assert nobody is score


def test_each_modality_of_the_placed_items_is_counted():
    content, _ = with_gaps()
    ids = torch.arange(10)
    text, image = (int(content[name][1][:10].sum()) for name in ("text", "image"))
    said = placed_in_words(content, ids)
    assert f"10 of them have a text or image and are placed by it (text {text}, image {image};" in said
    assert placed_in_words({"text": content["text"]}, ids) == "10 of them have a text and are placed by it"


def test_shares_are_kept_by_checkpoints_and_older_ones_have_equal_ones():
    evidence, score = world("text")
    score = place(evidence, COLD, score, ColdBoost(joint=True), 0.3, SHARES)
    learned = LinearBlock("learned", torch.zeros(N, 2), torch.zeros(N, 2), bias=torch.zeros(N))
    state = score_to_state(score)
    assert score_from_state(state, learned, score.rows).cold.shares == SHARES
    state["cold"].pop("shares")
    assert score_from_state(state, learned, score.rows).cold.shares == {}
    assert ChosenPlace(0.3, True, 1.0, 0.0).shares == {}
    assert math.isclose(sum(map_items(score, evidence, evidence.trained, COLD, 0.3, SHARES)[0].shares.values()), 1)
    assert isinstance(score.cold, ColdRows)
