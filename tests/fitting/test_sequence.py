"""The training of the sequence block: its stretches and batches, the chance of a candidate, what it learns and repeats."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_decay_search import METRIC, Case
from test_next_item import cycle, histories
from test_pipeline import Options, everyone, world

from recbole_llm.fitting import sequence
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.decay_search import choose_fading
from recbole_llm.fitting.pipeline import fit, fit_sequence_block, weigh
from recbole_llm.fitting.refit import Chosen, ChosenBlock, chosen_of, refit
from recbole_llm.fitting.sequence import batches, content_of, fit_sequence, log_chance, sequences_of, takes_part
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.sequence import LENGTH, SequenceBlock


def test_every_item_but_the_first_is_predicted_once_after_those_before_it():
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 2, 3, LENGTH, LENGTH + 1, LENGTH + 2, 2 * LENGTH + 1, 3 * LENGTH]
    walks = [(1 + torch.randperm(99, generator=generator)[:size]).tolist() for size in sizes]
    found = sequences_of(histories(walks))
    asked = [pair for walk in walks for pair in itertools.pairwise(walk)]
    pairs = []
    for items, size in zip(found.items.tolist(), found.sizes.tolist(), strict=True):
        assert 2 <= size <= LENGTH + 1 and not any(items[size:]) and all(items[:size])
        pairs += list(itertools.pairwise(items[:size]))
    assert len(pairs) == found.n_targets and sorted(pairs) == sorted(asked)
    newest = [walk[-LENGTH - 1 :] for walk in walks if len(walk) > 1]
    assert [items[:size] for items, size in zip(found.items.tolist(), found.sizes.tolist(), strict=True)][
        : len(newest)
    ] == newest


def test_batches_hold_every_sequence_once_within_their_size(monkeypatch):
    monkeypatch.setattr(sequence, "TOKENS", 40)
    generator = torch.Generator().manual_seed(1)
    walks = [(1 + torch.randperm(30, generator=generator)[:size]).tolist() for size in [2, 3, 9, 20, 4, 2, 21, 5] * 3]
    found = sequences_of(histories(walks))
    seen = []
    for items, mask in batches(found, generator):
        assert items.shape[1] == mask.shape[1] + 1
        assert mask.numel() <= 40 or len(items) == 1
        assert mask[:, 0].all() and mask.any(0).all()
        seen += [tuple(row[: int(own.sum()) + 1]) for row, own in zip(items.tolist(), mask, strict=True)]
    assert sorted(seen) == sorted(tuple(walk) for walk in walks)


def test_the_chance_of_a_candidate_is_how_often_it_is_one(monkeypatch):
    monkeypatch.setattr(sequence, "NEGATIVES", 6)
    popularity = torch.tensor([0, 40, 10, 0, 3, 1])
    trained = torch.tensor([False, True, True, True, True, True])
    found = log_chance(popularity, trained, 54, 5.0).exp()
    generator = torch.Generator().manual_seed(0)
    drawn = 1 + torch.randint(5, (20_000, 6), generator=generator)
    asked = torch.multinomial(popularity.double(), 20_000 * 5, True, generator=generator).view(-1, 5)
    among = torch.zeros(20_000, 6).scatter_(1, torch.cat([drawn, asked], 1), 1.0)
    torch.testing.assert_close(found[1:], among.mean(0)[1:], rtol=0.02, atol=0.01)


def test_content_is_read_by_its_principal_directions(monkeypatch):
    monkeypatch.setattr(sequence, "CONTENT_DIMS", 3)
    made = world(ordered=True)
    found, (vectors, present) = content_of(made.data), made.data.content["text"]
    assert found.shape == (made.data.n_items, 3) and not found[~present].any() and bool(found[present].any())
    assert content_of(replace(made.data, content={})) is None
    side = vectors[present].double() - vectors[present].double().mean(0)
    side = side / side.norm(dim=1, keepdim=True)
    strongest = torch.linalg.svdvals(side)[:3].square()
    torch.testing.assert_close(found.double().square().sum(0), strongest, rtol=1e-3, atol=1e-4)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sequence, "EPOCHS", 12)
    monkeypatch.setattr(sequence, "EPOCHS_BETWEEN", 3)
    monkeypatch.setattr(sequence, "WARM_UP", 5)
    monkeypatch.setattr(sequence, "TOKENS", 128)
    monkeypatch.setattr(sequence, "NEGATIVES", 16)


def test_what_comes_next_is_learned_and_the_best_epoch_counts(quick):
    ranked, targets = cycle(n_users=120)
    data = TrainingData(ranked, AllRows(20))
    metric, seen = TopKMetric("ndcg", 3), Rows(ranked.offsets, ranked.ids)
    values = []

    def value(scorer):
        values.append(float(user_metric(scorer, targets, seen, 20, metric).mean()))
        return values[-1]

    torch.manual_seed(0)
    block = fit_sequence(data, value, ranked)
    assert isinstance(block, SequenceBlock) and len(values) >= 2
    reached = float(user_metric(block.scorer(ranked), targets, seen, 20, metric).mean())
    assert reached == max(values) > 0.8
    best = 3 * (values.index(max(values)) + 1)
    assert block.constants == {"epochs": best}
    # so many epochs without a choice end in the same place
    torch.manual_seed(0)
    again = fit_sequence(data, None, ranked, best)
    torch.testing.assert_close(again.scores(ranked), block.scores(ranked), rtol=1e-4, atol=1e-4)


def test_histories_of_one_item_teach_nothing():
    ranked = histories([[3], [], [5]])
    assert fit_sequence(TrainingData(ranked, AllRows(9)), None, ranked) is None


def test_interactions_without_order_are_refused():
    made = world()
    with pytest.raises(ValueError, match="blocks names sequence, which reads the order of a history"):
        fit_sequence_block(made.data, made.validation)
    nothing = lambda: pytest.fail("it is said before anything is trained")  # noqa: E731
    with pytest.raises(ValueError, match="blocks names sequence, which reads the order of a history"):
        fit(made.data, made.validation, Options(blocks=("learned", "sequence")), nothing)
    kept = (ChosenBlock("learned", 1.0, None, 6, {}), ChosenBlock("sequence", 1.0, None, 64, {"epochs": 4.0}))
    chosen = Chosen(kept, None, 1, None, 1.0, 0.0, ProbabilityMap())
    with pytest.raises(ValueError, match="blocks names sequence, which reads the order of a history"):
        refit(made.data, chosen, Options(), nothing)
    with pytest.raises(ValueError, match="No block could be fitted"):
        weigh(made.data, made.validation, None, (), None)


def test_a_fit_weighs_the_block_and_a_refit_repeats_it(quick):
    made, options = world(ordered=True), Options(blocks=("closed_form", "sequence"))
    torch.manual_seed(1)
    fitted = fit(made.data, made.validation, options, made.train_towers)
    block = fitted.score.block("sequence")
    assert isinstance(block, SequenceBlock) and fitted.score.block("learned") is None
    chosen = chosen_of(fitted, made.data, 0)
    kept = next(each for each in chosen.blocks if each.name == "sequence")
    assert kept.constants == block.constants and kept.dim == block.dim
    again = refit(made.data, chosen, options, made.train_towers)
    assert again.score.block("sequence").constants == block.constants
    assert [each.name for each in again.score.blocks][-1] == "sequence"
    assert everyone(again.score, made.data).shape == everyone(fitted.score, made.data).shape


def test_the_block_may_be_the_only_one(quick):
    made = world(ordered=True)
    fitted = fit(made.data, made.validation, Options(blocks=("sequence",)), made.train_towers)
    assert [(block.name, block.scale) for block in fitted.score.blocks] == [("sequence", 1.0)]
    assert fitted.setting is None


def test_the_weight_is_searched_beside_those_of_the_other_blocks():
    case = Case(seed=5)

    def scorer(scores):
        return lambda rows: scores[rows]

    knows = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    knows[case.targets.row_of_entry(), case.targets.ids] = 40.0
    for scores, wanted in ((knows, True), (-knows, False)):
        choice = choose_fading(
            {tau: scorer(s) for tau, s in case.closed.items()},
            {tau: scorer(s) for tau, s in case.following.items()},
            scorer(case.learned),
            case.targets,
            case.seen,
            METRIC,
            case.excluded,
            sequence=scorer(scores),
        )
        assert (choice.sequence > 0) == wanted == (choice.value > 0.9)
        assert choice.sequence_factor == pytest.approx(choice.sequence / case.deviation(scores))
    assert "of the sequence block" not in str(choice)


def test_the_block_takes_part_by_itself_where_it_has_been_seen_to_pay(monkeypatch):
    def asks(blocks=("closed_form", "auto_sequence"), data=None, has_validation=True):
        return takes_part(blocks, data, has_validation)

    many, few = (TrainingData(cycle(40, n)[0], AllRows(n)) for n in (60, 20))
    monkeypatch.setattr(sequence, "AUTO_ITEMS", 50)
    assert asks(data=many) and not asks(data=few) and not asks(data=many, has_validation=False)
    assert not asks(("closed_form", "learned"), many)
    assert not asks(data=replace(many, history=replace(many.history, ranks=None)))
    assert asks(("sequence",), few, has_validation=False)
    monkeypatch.setattr(sequence, "AUTO_INTERACTIONS", 100)
    assert not asks(data=many) and asks(("sequence", "auto_sequence"), many)


def test_a_fit_trains_the_block_by_itself_and_one_at_random_does_not(quick, monkeypatch):
    monkeypatch.setattr(sequence, "AUTO_ITEMS", 5)
    options = Options(blocks=("closed_form", "auto_sequence"))
    for ordered in (True, False):
        made = world(ordered=ordered)
        fitted = fit(made.data, made.validation, options, made.train_towers)
        assert (fitted.score.block("sequence") is not None) == ordered
