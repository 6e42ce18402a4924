"""Properties checked on made-up inputs: on few, and on many with ``-m slow``."""

import pytest
from hypothesis import HealthCheck, given, settings


def fuzz(**strategies):
    """As ``hypothesis.given``, on 30 inputs, and on 500 in a slow form of the test."""

    def decorate(test):
        def run(examples):
            bounds = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
            bounds(given(**strategies)(test))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("examples", [30, pytest.param(500, marks=pytest.mark.slow)])(run)

    return decorate
