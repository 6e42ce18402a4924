"""A fit with every choice given is the fit that chose, on the same data; on more, blocks keep their weights."""

import json
from dataclasses import replace

import pytest
import torch
from test_pipeline import N, Options, assert_same, everyone, snapshot, world

from recbole_llm.fitting.next_item import NextItemSetting, directions_of, next_item_blocks
from recbole_llm.fitting.pipeline import fit
from recbole_llm.fitting.refit import Chosen, ChosenBlock, chosen_of, deviation, refit
from recbole_llm.fitting.stage_values import FittedScore
from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.rows import union
from recbole_llm.scoring.score import Score
from recbole_llm.scoring.state import score_from_state, score_to_state

CASES = {
    "full": ({}, {}),
    "factors": ({}, {"closed_form_dim": 8}),
    "by time": ({"ordered": True, "seed": 2}, {}),
    "by time, factors": ({"ordered": True, "seed": 2}, {"closed_form_dim": 8}),
    "auto": ({}, {"cold_boost": "auto"}),
    "closed form": ({}, {"blocks": ("closed_form",)}),
    "learned": ({}, {"blocks": ("learned",)}),
}


def fitted_and_chosen(case):
    of_world, of_options = CASES[case]
    made, options = world(**of_world), Options(**{"cold_boost": 0.8, **of_options})
    fitted = fit(made.data, made.validation, options, made.train_towers)
    return made, options, fitted, chosen_of(fitted, made.data, epochs=7)


@pytest.mark.parametrize("case", CASES)
def test_the_same_data_give_the_same_score(case):
    made, options, fitted, chosen = fitted_and_chosen(case)
    again = refit(made.data, chosen, options, made.train_towers)
    assert again.setting == fitted.setting
    names = [(block.name, block.decay) for block in fitted.score.blocks]
    assert [(block.name, block.decay) for block in again.score.blocks] == names
    first, second = (everyone(each.score, made.data) for each in (fitted, again))
    assert torch.equal(first.isinf(), second.isinf())
    finite = first.isfinite()
    torch.testing.assert_close(first[finite], second[finite], rtol=1e-3, atol=1e-3)
    assert again.score.probability == fitted.score.probability
    assert (again.score.slope, again.score.intercept) == (fitted.score.slope, fitted.score.intercept)
    placed, cold = again.score.cold, fitted.score.cold
    assert (placed.mu, placed.kappa, placed.offset, placed.joint) == (cold.mu, cold.kappa, cold.offset, cold.joint)


@pytest.mark.parametrize("case", ["full", "by time"])
def test_more_interactions_change_the_blocks_and_not_their_weights(case):
    made, options, fitted, chosen = fitted_and_chosen(case)
    data = replace(made.data, history=union(made.data.history, made.validation.targets))
    if made.data.is_ordered:
        ranks = torch.arange(len(data.history.ids)) - data.history.offsets[:-1][data.history.row_of_entry()]
        data = replace(data, history=replace(data.history, ranks=ranks.float()))
    again = refit(data, chosen, options, made.train_towers)
    assert not again.score.cold or set(again.score.cold.ids.tolist()) < set(fitted.score.cold.ids.tolist())
    for block in chosen.blocks:
        found = again.score.block(block.name)
        weight = found.scale * deviation(again.score, found, data) if found.scale else 0.0
        assert weight == pytest.approx(block.weight, rel=1e-3)
    before = fitted.score.block("closed_form").source
    assert not torch.allclose(again.score.block("closed_form").source, before, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_choices_come_back_from_plain_values(case):
    _, _, fitted, chosen = fitted_and_chosen(case)
    state = json.loads(json.dumps(chosen.to_state()))
    assert Chosen.from_state(state) == chosen
    assert chosen.epochs == 7 and (chosen.setting is None) == (case == "learned")


def test_what_a_checkpoint_holds_is_enough_to_choose_again():
    made, _, fitted, chosen = fitted_and_chosen("by time")
    state = score_to_state(fitted.score)
    back = score_from_state(state, fitted.score.block("learned"), made.data.rows)
    assert_same(
        {key: value for key, value in snapshot(chosen).items()},
        {key: value for key, value in snapshot(chosen_of(FittedScore(back, fitted.setting), made.data, 7)).items()},
    )


def test_a_block_without_weight_is_neither_measured_nor_counted():
    made = world()
    silent = LinearBlock("closed_form", torch.zeros(N, 3), torch.zeros(N, 3), scale=0.0)
    score = Score((silent, made.learned), torch.ones(N, dtype=torch.bool))
    chosen = chosen_of(FittedScore(score), made.data, 1)
    assert chosen.block("closed_form") is None and chosen.blocks[0].weight == 0
    assert chosen.block("learned").weight > 0


@pytest.mark.parametrize("dim", ["full", 5])
def test_a_next_item_block_is_solved_with_its_constants(dim):
    made, options, _, chosen = fitted_and_chosen("by time")
    following = ChosenBlock("next_item", 0.4, 2.0, dim, {"tau": 3.0, "ridge": 4.0})
    (closed,) = (block for block in chosen.blocks if block.name == "closed_form")
    chosen = replace(chosen, blocks=(closed, following))
    score = refit(made.data, chosen, options, made.train_towers).score
    rank = None if dim == "full" else dim
    (expected,) = next_item_blocks(made.data.history, N, NextItemSetting(3.0, 4.0), rank, {})
    block = score.block("next_item")
    trained = made.data.trained
    torch.testing.assert_close(block.source[trained], expected.source[trained])
    assert block.decay == 2.0 and block.constants == {"tau": 3.0, "ridge": 4.0, "floor": 0.0}
    assert block.scale * deviation(score, block, made.data) == pytest.approx(0.4, rel=1e-3)
    assert score.block("learned") is None
    data = replace(made.data, history=replace(made.data.history, ranks=None))
    with pytest.raises(ValueError, match="the histories have no order"):
        refit(data, chosen, options, made.train_towers)


def test_the_content_of_a_next_item_block_is_solved_with_its_constants():
    made, options, _, chosen = fitted_and_chosen("by time")
    constants = {"tau": 2.0, "ridge": 8.0, "floor": 0.1, "content.text": 0.2}
    (closed,) = (block for block in chosen.blocks if block.name == "closed_form")
    following = ChosenBlock("next_item", 0.4, 2.0, "full", constants)
    content = ChosenBlock("next_item_content", 0.3, 3.0, 8, constants)
    score = refit(made.data, replace(chosen, blocks=(closed, following, content)), options, made.train_towers).score
    directions = directions_of(made.data.content, made.data.trained)
    setting = NextItemSetting(2.0, 8.0, 0.1, (("text", 0.2),))
    for expected, weight, decay in zip(
        next_item_blocks(made.data.history, N, setting, None, directions), (0.4, 0.3), (2.0, 3.0), strict=True
    ):
        block, trained = score.block(expected.name), made.data.trained
        torch.testing.assert_close(block.source[trained], expected.source[trained])
        assert block.decay == decay and block.constants == constants
        assert block.scale * deviation(score, block, made.data) == pytest.approx(weight, rel=1e-3)
    # one that validation weighed at nothing is left out of the score
    alone = refit(made.data, replace(chosen, blocks=(closed, following)), options, made.train_towers).score
    assert [block.name for block in alone.counting] == ["closed_form", "next_item"]
