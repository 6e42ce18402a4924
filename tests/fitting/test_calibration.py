"""Calibration: the optimum of the likelihood, the map to probabilities, order kept, degenerate data, the error measure."""

import math

import numpy as np
import pytest
import torch
from test_blend import nearly_equal

from recbole_llm.fitting.calibration import expected_calibration_error, fit_platt, fit_probability
from recbole_llm.scoring.probability import ProbabilityMap


def made(slope, offset, n=40_000, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(n, generator=g) * 3 + shift
    return score, torch.rand(n, generator=g) < torch.sigmoid(slope * score + offset)


@pytest.mark.parametrize(("slope", "offset", "shift"), [(0.5, -2.0, 0.0), (2.0, 1.0, 0.0), (0.05, -6.0, 500.0)])
def test_the_parameters_that_made_the_labels_are_found(slope, offset, shift):
    score, label = made(slope, offset - slope * shift, shift=shift)
    a, c = fit_platt(lambda: zip(score.split(7_000), label.split(7_000), strict=True))
    p = torch.sigmoid(slope * (score - shift) + offset).double()
    x = score.double() - (p * (1 - p) * score).sum() / (p * (1 - p)).sum()
    standard_error = (p * (1 - p) * x * x).sum() ** -0.5  # of the slope, from the Fisher information
    assert abs(a - slope) < 4 * standard_error
    assert torch.sigmoid(a * score + c).mean() == pytest.approx(label.float().mean().item(), abs=1e-6)
    assert expected_calibration_error(torch.sigmoid(a * score + c), label) < 0.01


def test_the_gradient_of_the_likelihood_vanishes():
    score, label = made(1.3, -1.0, n=3_000)
    a, c = fit_platt(lambda: [(score, label)])
    residual = torch.sigmoid(a * score.double() + c) - label.double()
    assert abs(residual.mean()) < 1e-6
    assert abs((residual * score).mean()) < 1e-4


@pytest.mark.parametrize("label", [torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)])
def test_labels_that_are_all_alike_leave_the_score(label):
    assert fit_platt(lambda: [(torch.randn(5), label)]) == (1.0, 0.0)


def test_no_data_leaves_the_score():
    assert fit_platt(lambda: []) == (1.0, 0.0)


def test_a_ranking_is_never_turned_around():
    score, label = made(-2.0, 0.5, n=2_000)
    a, c = fit_platt(lambda: [(score, label)])
    assert a == 1.0
    assert torch.sigmoid(score + c).mean() == pytest.approx(label.float().mean().item(), abs=1e-4)


def test_equal_scores_give_the_share_of_positives():
    label = torch.tensor([True, False, False, False])
    a, c = fit_platt(lambda: [(torch.full((4,), 3.0), label)])
    assert 1 / (1 + math.exp(-(a * 3.0 + c))) == pytest.approx(0.25, abs=1e-3)


def test_no_slope_is_read_off_what_rounding_leaves_of_equal_scores():
    score = nearly_equal(4_000)
    label = (score > score.min()) & (torch.arange(4_000) % 5 == 0)
    a, c = fit_platt(lambda: [(score, label)])
    assert a == 1.0 and torch.sigmoid(score + c).mean() == pytest.approx(label.float().mean().item(), abs=1e-3)


def test_the_error_is_the_gap_between_claimed_and_seen():
    probability = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.1, 0.1])
    label = torch.tensor([True, True, False, False, False, False])
    assert expected_calibration_error(probability, label) == pytest.approx((4 * 0.4 + 2 * 0.1) / 6)
    assert expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0.0


CURVE = ProbabilityMap(-6.0, 0.25, 0.5, -7.0, (4.0, 1.5, 2.5), (0.8, 1.6))


def made_pairs(n=300_000, seed=0):
    """Scores on the scale of a Platt fit, log history lengths, and the true P of CURVE, in float64."""
    g = torch.Generator().manual_seed(seed)
    log_length = torch.empty(n, dtype=torch.float64).uniform_(math.log(5), math.log(300), generator=g)
    score = -6 + torch.empty(n, dtype=torch.float64).exponential_(0.8, generator=g).clamp(max=9)
    return score, log_length, torch.sigmoid(CURVE.logit(score, log_length)), g


def pieces(*tensors):
    return lambda: zip(*(tensor.split(70_000) for tensor in tensors), strict=True)


def test_what_turns_up_later_is_predicted_from_what_turns_up_in_validation():
    score, log_length, p, g = made_pairs()
    # either half of what is to come holds the pair with the chance q; P is that of the second, given that the first does not
    u = torch.rand(len(p), generator=g, dtype=torch.float64)
    q = p / (1 + p)
    first, second = u < q, (u >= q) & (u < 2 * q)
    found = fit_probability(pieces(score, log_length, first), -6.0)
    assert found.exponent == CURVE.exponent and len(found.knots) == 4
    predicted = torch.sigmoid(found.logit(score, log_length))
    assert float((predicted - p).abs()[~first].mean()) < 0.05 * float(p[~first].mean())
    head = ~first & (p > 0.3)
    share, claimed = second[head].double().mean(), predicted[head].mean()
    error = (share * (1 - share) / head.sum()).sqrt()
    assert abs(claimed - share) < 3 * error
    assert abs(first[p > 0.3].double().mean() - share) > 10 * error  # what validation's own share would have claimed


def test_probabilities_keep_the_order_of_scores_whatever_the_labels():
    score, log_length, p, g = made_pairs(20_000)
    found = fit_probability(pieces(score, log_length, torch.rand(len(p), generator=g) > p), -6.0)
    assert min(found.slopes) > 0
    rising = found.logit(torch.linspace(-9, 9, 500, dtype=torch.float64), 3.0)
    assert bool((rising.diff() > 0).all())


def test_few_positives_give_a_straight_line_and_none_the_score():
    score, log_length, p, g = made_pairs(1_000)
    assert fit_probability(pieces(score, log_length, torch.zeros(1_000, dtype=torch.bool)), -6.0) == ProbabilityMap()
    label = torch.rand(1_000, generator=g) < p / (1 + p)
    assert 20 < label.sum() < 100
    found = fit_probability(pieces(score, log_length, label), -6.0)
    assert (found.knots, found.exponent, found.user_gain) == ((), 0.0, 0.0)
    p = torch.sigmoid(found.logit(score, log_length))
    assert float((p / (1 + p)).sum()) == pytest.approx(int(label.sum()), rel=0.1)


def test_a_map_reads_tensors_and_arrays_alike_and_keeps_what_is_out():
    score = np.array([-np.inf, -8.0, -5.0, 0.0, 4.0])
    got = CURVE.logit(score, math.log(40))
    assert got[0] == -np.inf
    x = (score[1:] + 6) / 40**0.25
    along = 4 * np.minimum(x, 0.8) + 1.5 * np.clip(x - 0.8, 0, 0.8) + 2.5 * np.maximum(x - 1.6, 0)
    np.testing.assert_allclose(got[1:], -7 + 0.5 * math.log(40) + along)
    both = CURVE.logit(torch.tensor(score), torch.tensor(40.0).double().log())
    np.testing.assert_allclose(both.numpy(), got)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slopes": [1.0, -0.5], "knots": [0.0]}, "slopes are"),
        ({"slopes": [1.0]} | {"knots": [1.0]}, "expected 2 positive"),
        ({"slopes": [1.0] * 3, "knots": [1.0, 1.0]}, "knots are"),
        ({"offset": math.nan}, "finite"),
        ({"offset": "1"}, "finite"),
    ],
)
def test_a_map_that_would_turn_a_ranking_around_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ProbabilityMap.from_json(wrong)
