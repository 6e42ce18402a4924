"""The fit on made data: stages are values, an earlier fit is taken over, and several modalities work through all of it."""

from dataclasses import dataclass, fields, replace

import pytest
import torch

from recbole_llm.fitting import pipeline
from recbole_llm.fitting.cold_start.kernel_ridge import BANDWIDTH, MU
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.ease import Kernel, Setting
from recbole_llm.fitting.pipeline import fit
from recbole_llm.fitting.stage_values import FittedScore
from recbole_llm.fitting.validation import TopKMetric, Validation, user_metric
from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import rows_from_pairs

N, U, GROUPS, N_COLD = 96, 120, 6, 8
COLD = torch.arange(N - N_COLD, N)  # the last one has no content either
METRIC, WIDE = TopKMetric("ndcg", 5), TopKMetric("ndcg", 10)


@dataclass
class Options:
    blocks: tuple = ("closed_form", "learned")
    closed_form_dim: int | str = "full"
    cold_map: str = "ridge"
    cold_boost: float | str = 1.0


def group_of_items():
    return torch.arange(N) % GROUPS


def table(kind, generator):
    """Vectors that tell the group of an item, or nothing at all; NaN where an item has none."""
    vectors = torch.randn(N, 7, generator=generator)
    if kind == "useful":
        vectors = 0.25 * vectors + torch.nn.functional.one_hot(group_of_items(), 7)
    present = torch.rand(N, generator=generator) < 0.85
    present[[0, N - 1]] = False
    return vectors.masked_fill(~present[:, None], torch.nan), present


@dataclass
class World:
    data: TrainingData
    validation: Validation
    learned: LinearBlock

    def train_towers(self):
        return self.learned


def world(seed=0, kinds=(("text", "useful"),), ordered=False):
    """Users who stay within groups of items; cold items are in validation alone; user 0 and item 0 are padding."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(GROUPS, (U,), generator=generator)
    chance = torch.where(group[:, None] == group_of_items(), 0.3, 0.03)
    X = torch.rand(U, N, generator=generator) < chance
    X[0], X[:, 0] = False, False
    held = X & (torch.rand(X.shape, generator=generator) < 0.25)
    held[:, COLD] = X[:, COLD]
    content = {name: table(kind, generator) for name, kind in kinds}
    times = torch.randint(1000, X.shape, generator=generator) if ordered else None

    def rows(mask, times=None):
        row, item = mask.nonzero(as_tuple=True)
        return rows_from_pairs(row, item, U, None if times is None else times[row, item])

    history = rows(X & ~held, times)
    data = TrainingData(history, AllRows(N), content)
    like = torch.nn.functional.one_hot(group_of_items(), GROUPS).float() + 0.7 * torch.randn(
        N, GROUPS, generator=generator
    )
    like = like * data.trained[:, None]
    bias = -3.0 + 0.3 * torch.randn(N, generator=generator)
    bias[~data.trained] = bias.min()
    learned = LinearBlock("learned", like, like * 1.5, exponent=0.5, offset=torch.full((GROUPS,), 0.1), bias=bias)
    return World(data, Validation(history, rows(held), history, METRIC), learned)


def snapshot(value, path="score"):
    """Every tensor and number of a score by its place, copied."""
    if isinstance(value, torch.Tensor):
        return {path: value.clone()}
    if isinstance(value, (tuple, list)):
        return {k: v for n, each in enumerate(value) for k, v in snapshot(each, f"{path}[{n}]").items()}
    if isinstance(value, dict):
        return {k: v for n, each in value.items() for k, v in snapshot(each, f"{path}[{n}]").items()}
    if hasattr(value, "__dataclass_fields__"):
        return {k: v for f in fields(value) for k, v in snapshot(getattr(value, f.name), f"{path}.{f.name}").items()}
    return {path: value}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for place, value in before.items():
        same = torch.equal(value, after[place]) if isinstance(value, torch.Tensor) else value == after[place]
        assert same, place


def unfinished(score):
    """What a caller of a stage could see of the score: its values and its scores."""
    return snapshot(replace(score, rows=None))


def everyone(score, data):
    return score.of_users(torch.arange(U), data.history)


def value_of(score, made, metric=METRIC):
    """Mean metric among the trained items."""
    users = torch.nonzero(made.validation.targets.sizes).squeeze(1)
    targets, seen = made.validation.targets.select(users), made.validation.seen.select(users)
    scorer = pipeline._scorer(score, users, made.data.history)
    return float(user_metric(scorer, targets, seen, N, metric, ~made.data.trained).mean())


# ---------------------------------------------------------------- the whole


def test_a_fit_is_its_stages_one_after_the_other():
    made, options = world(), Options(cold_boost="auto")
    fitted = fit(made.data, made.validation, options, made.train_towers)
    closed = pipeline.fit_closed_form_block(made.data, made.validation, options)
    score = pipeline.weigh(made.data, made.validation, closed, (), made.learned)
    score = pipeline.choose_decays(score, made.data, made.validation)
    score = pipeline.place_cold_items(score, made.data, made.validation, options, closed.setting)
    score = pipeline.calibrate(score, made.data, made.validation)
    assert_same(unfinished(fitted.score), unfinished(score))
    assert fitted.setting == closed.setting

    assert [block.name for block in fitted.score.blocks] == ["closed_form", "learned"]
    together = value_of(fitted.score, made)
    for block in fitted.score.blocks:
        alone = value_of(replace(fitted.score, blocks=(block,)), made) if block.scale else 0.0
        assert together >= alone - 1e-9, "0 and nearly 1 are among the weights tried"
    assert fitted.score.slope > 0 and fitted.score.probability != ProbabilityMap()


@pytest.mark.parametrize("blocks", [("closed_form",), ("learned",)], ids="+".join)
def test_one_block_alone(blocks):
    made, called = world(), []

    def train_towers():
        called.append(1)
        return made.learned

    fitted = fit(made.data, made.validation, Options(blocks), train_towers)
    assert [(block.name, block.scale) for block in fitted.score.blocks] == [(blocks[0], 1.0)]
    assert len(called) == blocks.count("learned")
    assert (fitted.setting is None) == ("closed_form" not in blocks)
    assert fitted.score.cold is not None and fitted.score.listed[COLD[:-1]].any()


def test_no_stage_changes_what_it_was_given(monkeypatch):
    made, options = world(ordered=True), Options()
    closed = pipeline.fit_closed_form_block(made.data, made.validation, options)
    following = pipeline.fit_next_item_block(made.data, closed, made.validation)
    given = snapshot([closed, following, made.learned])
    score = pipeline.weigh(made.data, made.validation, closed, following, made.learned)
    assert_same(given, snapshot([closed, following, made.learned]))
    for stage in (
        lambda score: pipeline.choose_decays(score, made.data, made.validation),
        lambda score: pipeline.place_cold_items(score, made.data, made.validation, options, closed.setting),
        lambda score: pipeline.place_cold_items(
            score, made.data, made.validation, Options(cold_boost="auto"), closed.setting
        ),
        lambda score: pipeline.calibrate(score, made.data, made.validation),
        lambda score: pipeline.with_weights(score, [(block.name, 2.0, 3.0) for block in score.blocks]),
    ):
        before, scores = unfinished(score), everyone(score, made.data)
        found = stage(score)
        assert_same(before, unfinished(score))
        assert torch.equal(everyone(score, made.data), scores)
        score = found
    assert score.cold is not None and score.slope != 1.0
    assert_same(given, snapshot([closed, following, made.learned]))


def test_cold_items_are_placed_after_nothing_and_before_the_calibration():
    """A score that is calibrated and one that is not place the same items alike, in their own units."""
    made = world()
    score = pipeline.weigh(made.data, None, None, (), made.learned)
    options = Options(blocks=("learned",))
    first = pipeline.place_cold_items(score, made.data, made.validation, options, None)
    second = pipeline.place_cold_items(
        replace(score, slope=0.4, intercept=-1.5), made.data, made.validation, options, None
    )
    torch.testing.assert_close(
        everyone(second, made.data), 0.4 * everyone(first, made.data) - 1.5, rtol=1e-4, atol=1e-4
    )


# ---------------------------------------------------------------- an earlier fit


@pytest.mark.parametrize("dim", ["full", 12])
@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_an_earlier_fit_is_taken_over(ordered, dim, monkeypatch):
    made, options = world(ordered=ordered), Options(closed_form_dim=dim)
    fitted = fit(made.data, made.validation, options, made.train_towers)
    before = unfinished(fitted.score)
    for stage in ("fit_closed_form_block", "fit_next_item_block"):
        monkeypatch.setattr(pipeline, stage, lambda *args: pytest.fail("solved for again"))
    again = fit(made.data, made.validation, options, made.train_towers, start=fitted)
    assert_same(before, unfinished(fitted.score))
    assert again.setting == fitted.setting
    warm = made.data.trained
    for block in again.score.blocks:
        other = fitted.score.block(block.name)
        assert torch.equal(block.source[warm], other.source[warm])
        assert block.target is None or torch.equal(block.target[warm], other.target[warm])
    if not ordered:
        weights = [
            (name, pytest.approx(scale, rel=1e-4), tau) for name, scale, tau in pipeline.weights_of(fitted.score)
        ]
        assert pipeline.weights_of(again.score) == weights
        torch.testing.assert_close(
            everyone(again.score, made.data), everyone(fitted.score, made.data), rtol=1e-3, atol=1e-3
        )
    # decays and weights are chosen from those that were found, and none that are worse are taken
    both = [sum(value_of(found.score, made, metric) for metric in (METRIC, WIDE)) for found in (fitted, again)]
    assert both[1] >= both[0] - 1e-9


def test_an_earlier_fit_without_a_closed_form_is_none():
    made = world()
    fitted = fit(made.data, made.validation, Options(("learned",)), made.train_towers)
    again = fit(made.data, made.validation, Options(), made.train_towers, start=fitted)
    whole = fit(made.data, made.validation, Options(), made.train_towers)
    assert_same(unfinished(again.score), unfinished(whole.score))


def test_processes_agree_on_blocks_and_weights():
    made, asked = world(), []

    def agree(value):
        asked.append(value)
        if isinstance(value, list):
            return [(name, 0.25 if name == "learned" else scale, decay) for name, scale, decay in value]
        closed, following = value
        return replace(closed, block=replace(closed.block, source=closed.block.source * 2)), following

    fitted = fit(made.data, made.validation, Options(), made.train_towers, agree=agree)
    plain = fit(made.data, made.validation, Options(), made.train_towers)
    assert len(asked) == 2
    assert fitted.score.block("learned").scale == 0.25 != plain.score.block("learned").scale
    warm = made.data.trained
    torch.testing.assert_close(
        fitted.score.block("closed_form").source[warm], 2 * plain.score.block("closed_form").source[warm]
    )


# ---------------------------------------------------------------- without validation


def test_without_validation_data_the_documented_constants_apply():
    made, options = world(), Options(cold_boost="auto")
    fitted = fit(made.data, None, options, made.train_towers)
    score = fitted.score
    assert fitted.setting == Setting(8.0, (Kernel("text", 0.05, 1),))
    assert (score.slope, score.intercept, score.probability) == (1.0, 0.0, ProbabilityMap())
    users = torch.nonzero(made.data.history.sizes).squeeze(1)
    shares = []
    for block in score.blocks:
        block = block if block.name == "learned" else replace(block, exceptions=None)
        scores = replace(block, scale=1.0).scorer(made.data.history)(users)[:, made.data.trained]
        shares.append(block.scale * float(scores.double().std(correction=0)))
    assert shares == pytest.approx([1 - pipeline.DEFAULT_LEARNED_SHARE, pipeline.DEFAULT_LEARNED_SHARE], rel=1e-4)
    assert score.cold.joint and score.listed[score.cold.ids].all()
    assert (score.cold.kappa, score.cold.mu) == (1.0, MU)
    # a deviation of the user's scores below their map
    apart = fit(made.data, None, Options(cold_boost=1.0), made.train_towers).score
    users = torch.nonzero(made.data.history.sizes).squeeze(1)
    low, plain = (each.of_users(users, made.data.history)[:, score.cold.ids] for each in (score, apart))
    deviation = apart.of_users(users, made.data.history)[:, made.data.trained].std(1, correction=0)
    assert float((plain - low).mean()) == pytest.approx(float(deviation.mean()), rel=0.15)


def test_validation_data_without_a_target_weigh_as_none():
    """Scaled by the scores of nobody, every block would have a weight of 0."""
    made = world()
    nobody = made.validation.targets.keep(torch.zeros_like(made.validation.targets.ids, dtype=torch.bool))
    fitted = fit(made.data, replace(made.validation, targets=nobody), Options(), made.train_towers)
    without = fit(made.data, None, Options(), made.train_towers)
    assert [block.scale for block in fitted.score.blocks] == [block.scale for block in without.score.blocks]
    assert all(block.scale for block in fitted.score.blocks)


def test_without_validation_data_the_order_says_nothing():
    made = world(ordered=True)
    fitted = fit(made.data, None, Options(), made.train_towers)
    assert [block.name for block in fitted.score.blocks] == ["closed_form", "learned"]
    assert all(block.decay is None for block in fitted.score.blocks)


@pytest.mark.parametrize("kinds", [(("image", "useful"),), (("image", "useful"), ("text", "useful"))], ids=str)
def test_without_validation_data_the_first_modality_enters(kinds):
    made = world(kinds=kinds)
    fitted = fit(made.data, None, Options(), made.train_towers)
    assert fitted.setting.kernels == (Kernel("image", 0.05, 1),)
    bare = fit(replace(made.data, content={}), None, Options(), made.train_towers)
    assert bare.setting.kernels == ()
    assert not torch.equal(bare.score.block("closed_form").source, fitted.score.block("closed_form").source)


# ---------------------------------------------------------------- several modalities


@pytest.mark.parametrize("order", [("text", "image"), ("image", "text")], ids=str)
@pytest.mark.parametrize("useful", ["text", "image"])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_a_modality_enters_where_it_helps_and_another_does_not(seed, useful, order):
    made = world(seed, [(name, "useful" if name == useful else "useless") for name in order])
    fitted = fit(made.data, made.validation, Options(blocks=("closed_form",)), made.train_towers)
    useless = next(name for name in order if name != useful)
    assert fitted.setting.kernel(useful).weight > 0
    assert fitted.setting.kernel(useless).weight == 0
    # what was chosen is no worse than either alone, whatever the order of the modalities
    alone = replace(made.data, content={useful: made.data.content[useful]})
    single = fit(alone, made.validation, Options(blocks=("closed_form",)), made.train_towers)
    assert value_of(fitted.score, made) >= value_of(single.score, made) - 1e-6


def masked_kernel(content, ids, others):
    """The sum over the modalities that both items have, over all modalities; in float64."""
    K = torch.zeros(len(ids), len(others), dtype=torch.float64)
    for vectors, present in content.values():
        some = vectors[present].double()
        directions = torch.zeros(N, vectors.shape[1], dtype=torch.float64)
        directions[present] = some - some.mean(0)
        directions[present] /= directions[present].norm(dim=1, keepdim=True)
        squared = (directions[ids][:, None] - directions[others][None]).square().sum(2)
        both = present[ids][:, None] & present[others][None]
        K += torch.where(both, torch.exp(-squared / BANDWIDTH), 0.0) / len(content)
    return K


@pytest.mark.parametrize("dim", ["full", 12])
@pytest.mark.parametrize("seed", range(2))
def test_cold_items_are_mapped_by_the_modalities_they_share(seed, dim):
    """Through the whole fit; what an item lacks is NaN, and nobody reads it."""
    made = world(seed, [("text", "useful"), ("image", "useful")])
    data, content = made.data, made.data.content
    fitted = fit(data, made.validation, Options(closed_form_dim=dim), made.train_towers)
    score, cold = fitted.score, fitted.score.cold
    has = torch.stack([present for _, present in content.values()]).any(0)
    assert cold.ids.tolist() == [item for item in COLD.tolist() if has[item]] and len(cold.ids) < N_COLD
    known = torch.nonzero(data.trained & has).squeeze(1)
    kinds = {tuple(bool(present[i]) for _, present in content.values()) for i in cold.ids.tolist()}
    assert len(kinds) > 1, "all cold items have the same modalities"

    K = masked_kernel(content, known, known)
    W = masked_kernel(content, cold.ids, known) @ torch.linalg.inv(K + MU * torch.eye(len(known)))
    for block in score.counting:
        target = torch.eye(N) if block.target is None else block.target
        close = dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(cold.target[block.name].double(), W @ target[known].double(), **close)
        torch.testing.assert_close(cold.source[block.name].double(), W @ block.source[known].double(), **close)
        torch.testing.assert_close(block.source[cold.ids], cold.source[block.name])
    learned = score.block("learned")
    if learned.scale:
        bias = learned.bias.double()
        mean = bias[known].mean()
        torch.testing.assert_close(cold.bias["learned"].double(), W @ (bias[known] - mean) + mean, rtol=1e-3, atol=1e-4)

    scores = everyone(score, data)
    assert scores[:, 1:].isfinite().all()
    # a cold item's score is that sum of the known items' scores, but for the bias
    plain = score.slope * score.plain_bias + score.intercept
    wanted = (scores - plain)[:, known].double() @ W.T + plain[cold.ids].double()
    torch.testing.assert_close(scores[:, cold.ids].double(), wanted, rtol=1e-3, atol=1e-3)


def test_what_an_item_lacks_is_left_out_and_not_filled_in():
    """Other numbers in the rows of absent content change nothing, and a modality that nobody has is as if it were not there."""
    made = world(kinds=[("text", "useful"), ("image", "useless")])
    fitted = fit(made.data, made.validation, Options(), made.train_towers)
    content = {
        name: (vectors.masked_fill(~present[:, None], 1e6), present)
        for name, (vectors, present) in made.data.content.items()
    }
    other = fit(replace(made.data, content=content), made.validation, Options(), made.train_towers)
    assert_same(unfinished(fitted.score), unfinished(other.score))
    zeros = {
        name: (vectors.nan_to_num(0.0), torch.ones_like(present))
        for name, (vectors, present) in made.data.content.items()
    }
    filled = fit(replace(made.data, content=zeros), made.validation, Options(), made.train_towers)
    assert not torch.equal(filled.score.block("closed_form").source, fitted.score.block("closed_form").source)


def test_nothing_to_place_cold_items_by():
    made = world()
    for data, options in (
        (replace(made.data, content={}), Options()),
        (made.data, Options(cold_map="none")),
        (replace(made.data, content={"text": (torch.zeros(N, 3), torch.zeros(N, dtype=torch.bool))}), Options()),
    ):
        fitted = fit(data, made.validation, options, made.train_towers)
        assert fitted.score.cold is None and fitted.score.listed[1:].all()
        assert everyone(fitted.score, data)[:, 1:].isfinite().all()


def test_a_fit_of_one_modality_is_not_that_of_two():
    """The second modality reaches the score: the Gram matrix and the map of cold items."""
    made = world(kinds=[("text", "useful"), ("image", "useful")])
    whole = fit(made.data, made.validation, Options(), made.train_towers).score
    one = fit(
        replace(made.data, content={"text": made.data.content["text"]}), made.validation, Options(), made.train_towers
    ).score
    only = made.data.content["image"][1] & ~made.data.content["text"][1]
    assert only[whole.cold.ids].any() and not only[one.cold.ids].any()


# ---------------------------------------------------------------- values that travel


def test_settings_of_several_modalities_come_back_and_old_ones_too():
    setting = Setting(4.0, (Kernel("text", 0.05), Kernel("image", 0.2, 2)), 0.1, 0.2, 0.3)
    assert Setting.from_state(setting.to_state()) == setting
    flat = {"ridge": 4.0, "text_weight": 0.2, "text_power": 2, "user_exponent": 0.1, "ridge_exponent": 0.2, "tilt": 0.3}
    assert Setting.from_state(flat) == Setting(4.0, (Kernel("text", 0.2, 2),), 0.1, 0.2, 0.3)
    assert setting.with_kernel(Kernel("image", 0.0)).kernels == (Kernel("text", 0.05), Kernel("image", 0.0))
    assert setting.with_kernel(Kernel("audio", 0.1)).kernel("audio") == Kernel("audio", 0.1)
    assert not setting.is_linear and setting.linear().is_linear and setting.linear().kernel("image").weight == 0.2


def test_a_fit_is_a_value():
    made = world()
    fitted = fit(made.data, made.validation, Options(), made.train_towers)
    with pytest.raises(AttributeError):
        fitted.score = None
    with pytest.raises(AttributeError):
        fitted.score.slope = 2.0
    assert isinstance(fitted, FittedScore)


@pytest.mark.parametrize(("pairs", "users"), [(10 * N + 3, 10), (N // 2, 5), (10**9, None)])
def test_the_weight_of_a_block_is_chosen_by_no_more_pairs_than_stated(monkeypatch, pairs, users):
    made, seen, choose = world(), [], pipeline.choose_blend
    monkeypatch.setattr(pipeline, "MAX_PAIRS", pairs)
    monkeypatch.setattr(pipeline, "MIN_USERS", 5)
    monkeypatch.setattr(
        pipeline,
        "choose_blend",
        lambda a, b, rows, *more, **by: (seen.append(len(rows)), choose(a, b, rows, *more, **by))[1],
    )
    fit(made.data, made.validation, Options(), made.train_towers)
    assert seen == [int((made.validation.targets.sizes > 0).sum()) if users is None else users]
