"""The paired bootstrap and Holm's correction against what they must give."""

import numpy as np
import pytest

from recbole_llm.bridge.experiments.significance import holm, paired_bootstrap


def test_a_clear_difference_is_significant_and_its_interval_holds_it():
    rng = np.random.default_rng(1)
    base = rng.random(500)
    found = paired_bootstrap(base + 0.05 + 0.1 * rng.standard_normal(500), base)
    assert found.low < found.mean < found.high
    assert found.low > 0
    assert found.p < 0.001


def test_the_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal(2000), rng.standard_normal(2000)
    found = paired_bootstrap(first, second)
    error = (first - second).std() / 2000**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_p_is_uniform_when_there_is_no_difference():
    rng = np.random.default_rng(3)
    p = [paired_bootstrap(rng.standard_normal(80), rng.standard_normal(80), draws=400, seed=s).p for s in range(200)]
    # 200 draws of an event of probability .1: 20, standard deviation 4.2
    assert 5 <= sum(v < 0.1 for v in p) <= 37


def test_equal_models_are_not_different():
    values = np.random.default_rng(4).random(50)
    found = paired_bootstrap(values, values)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_order_of_the_pair_only_turns_the_sign():
    rng = np.random.default_rng(5)
    first, second = rng.random(60), rng.random(60)
    one, other = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert one.mean == -other.mean
    assert one.p == other.p


@pytest.mark.parametrize(
    "pair", [(np.zeros(3), np.zeros(4)), (np.zeros(0), np.zeros(0)), (np.zeros((2, 2)), np.zeros((2, 2)))]
)
def test_unpaired_data_are_refused(pair):
    with pytest.raises(ValueError, match="equally long and not empty"):
        paired_bootstrap(*pair)


def test_holm_against_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
