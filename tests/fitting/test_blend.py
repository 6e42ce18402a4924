"""The blend of two blocks against scores whose best weight is known, and the deviation that scales them."""

import pytest
import torch

from recbole_llm.fitting import blend
from recbole_llm.fitting.blend import choose_blend, score_deviation


def test_deviation_is_the_population_one():
    scores = torch.randn(30, 11, dtype=torch.float64) * 3 + 100
    columns = torch.arange(11) % 2 == 0
    got = score_deviation(lambda rows: scores[rows], torch.arange(30), 11, columns)
    assert got == pytest.approx(float(scores[:, columns].std(unbiased=False)), rel=1e-9)
    assert score_deviation(lambda rows: scores[rows], torch.arange(0), 11) == 0.0


def scorer_of(scores):
    return lambda rows: scores[rows].clone()


def test_blend_finds_the_weight_and_goes_beyond_the_grid_edge():
    first, second = torch.randn(6, 8), 5 * torch.randn(6, 8)
    rows = torch.arange(6)

    def closeness_to(weight):
        wanted = (1 - weight) * first / first.std(unbiased=False) + weight * second / second.std(unbiased=False)
        return lambda scorer: -float((scorer(rows) - wanted).square().sum())

    inside = choose_blend(scorer_of(first), scorer_of(second), rows, 8, closeness_to(0.35))
    assert inside.weight == 0.35
    assert len(inside.trials) == 7
    assert inside.scales == pytest.approx(
        (0.65 / float(first.std(unbiased=False)), 0.35 / float(second.std(unbiased=False)))
    )
    beyond = choose_blend(scorer_of(first), scorer_of(second), rows, 8, closeness_to(0.94))
    assert beyond.weight == 0.95


def test_blend_takes_the_smaller_of_equal_weights_and_skips_a_constant_block():
    scores, constant = torch.randn(4, 5), torch.ones(4, 5)
    rows = torch.arange(4)
    tied = choose_blend(scorer_of(scores), scorer_of(scores), rows, 5, lambda scorer: 0.0)
    assert tied.weight == 0.0
    assert len(tied.trials) == 7
    assert choose_blend(scorer_of(scores), scorer_of(constant), rows, 5, lambda scorer: 0.0).scales[1] == 0.0
    assert choose_blend(scorer_of(constant), scorer_of(scores), rows, 5, lambda scorer: 0.0).weight == 1.0


def nearly_equal(*shape):
    """Scores that differ by what float32 rounds alone."""
    low = torch.full(shape, 0.1234567)
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5, low, low.nextafter(low + 1))


def test_what_rounding_leaves_of_equal_scores_is_no_deviation():
    """Scaled to a deviation of 1 it would be scores of 10^7, beside which float32 keeps nothing of the other block."""
    noise, scores, rows = nearly_equal(300, 40), torch.randn(300, 40), torch.arange(300)
    assert score_deviation(scorer_of(noise), rows, 40) == 0.0
    found = choose_blend(scorer_of(noise), scorer_of(scores), rows, 40, lambda scorer: 0.0)
    assert found.scales == (0.0, pytest.approx(1 / float(scores.std(unbiased=False)), rel=1e-4))
    assert score_deviation(scorer_of(100 * noise + 1e-3 * scores), rows, 40) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("most", [0, 10**9])
def test_scores_are_computed_once_where_they_fit(monkeypatch, most):
    monkeypatch.setattr(blend, "MAX_REMEMBERED", most)
    asked = []

    def scorer(rows):
        asked.append(rows.tolist())
        return rows[:, None] * torch.arange(1.0, 4.0)

    kept = blend.remembered(scorer, torch.arange(5), 3)
    first = kept(torch.tensor([4, 1]))
    assert first.tolist() == [[4, 8, 12], [1, 2, 3]]
    first.zero_()  # the caller may write into it
    assert kept(torch.tensor([4])).tolist() == [[4, 8, 12]]
    assert asked == ([[0, 1, 2, 3, 4]] if most else [[4, 1], [4]])
