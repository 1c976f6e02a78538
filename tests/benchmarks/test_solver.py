"""The promise of `benchmarks/solver.py`, on its own setting: few products, and a mean that is hardly off."""

import pytest
import torch

from benchmarks.solver import PIXELS, measured


@pytest.mark.slow
def test_a_warm_measurement_is_cheap_and_right() -> None:
    torch.set_num_threads(1)
    soon, late = measured(PIXELS, batches=10)
    for row, passes in ((soon, 3), (late, 6)):
        assert row.products <= 5
        assert abs(row.mini_error) <= 0.005
        assert row.passes <= passes
        assert abs(row.full_error) <= 0.005
    assert (soon.steps, late.steps) == (20, 200)
