"""What is said about curves that are missing."""

from dataclasses import replace

import torch

from lightning_eoss.display.scalars import notes
from lightning_eoss.measurements.sharpness import measure_sharpness
from lightning_eoss.theory.stability import NoLimits, stability_limits
from tests.problems import made, mlp, pictures, squared_error


def test_each_reason_has_its_sentence() -> None:
    """And a measurement that shows everything has none."""
    model = made(mlp)
    measured = measure_sharpness(model, squared_error, pictures(), batch_size=4, num_batches=10)
    limits = stability_limits(torch.optim.SGD(model.parameters(), lr=0.1))
    assert notes(measured, limits, in_limits=False) == []
    assert notes(measured, NoLimits("of a reason"), in_limits=False) == [
        "no threshold, edge ratio or phase is shown: of a reason."
    ]
    (units,) = notes(measured, limits, in_limits=True)
    assert "differ between parameters" in units
    (some,) = notes(replace(measured, dropped=2), limits, in_limits=False)
    assert "mean over the others" in some
    nothing = replace(measured, dropped=10, mini_batch=replace(measured.mini_batch, values=()))
    (none,) = notes(nothing, limits, in_limits=False)
    assert "nothing is shown while that is so" in none
