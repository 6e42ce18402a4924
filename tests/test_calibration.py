"""Calibration: the optimum of the likelihood, order kept, degenerate data, the error measure."""

import math

import pytest
import torch

from recbole_llm.calibration import expected_calibration_error, fit_platt


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


def test_the_error_is_the_gap_between_claimed_and_seen():
    probability = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.1, 0.1])
    label = torch.tensor([True, True, False, False, False, False])
    assert expected_calibration_error(probability, label) == pytest.approx((4 * 0.4 + 2 * 0.1) / 6)
    assert expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0.0
