"""Each optimizer at its edge, on the setting of `benchmarks/optimizers.py` and in fewer steps than its table."""

import math
from functools import partial

import pytest

from benchmarks.optimizers import FULL, MOMENTUM, OPTIMIZERS, RATIOS, SMALL, Course, course, settled
from lightning_eoss.display import tags

MINI_BS, FULL_BS, DIRECTIONAL = RATIOS


def at_full_batch(name: str, steps: int) -> Course:
    kind, rate, _ = OPTIMIZERS[name]
    return course(partial(kind, lr=rate), FULL, steps, points=7)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("SGD", 1200), ("momentum .9", 1200), ("Nesterov .9", 600)])
def test_full_batches_settle_at_the_edge(name: str, steps: int) -> None:
    """MiniBS is FullBS there, and both start far below."""
    history = at_full_batch(name, steps)
    found = settled(history)
    assert history[0][FULL_BS] < 0.7
    assert found[MINI_BS] == pytest.approx(found[FULL_BS], rel=0.01)
    assert found[FULL_BS] == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_adaptive_optimizers_settle_at_the_edge_of_their_preconditioner(name: str) -> None:
    """Measured at every point but the first step's, where there is no state."""
    history = at_full_batch(name, 600)
    assert [entry["step"] for entry in history] == [1, 100, 200, 300, 400, 500, 600]
    assert all(math.isfinite(entry[tag]) for entry in history for tag in RATIOS)
    assert not any(tags.THRESHOLD in entry for entry in history)
    assert settled(history)[FULL_BS] == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_momentum_with_small_batches_stops_far_below_its_threshold() -> None:
    """At 2 (1 - momentum) / lr, where SGD of the rate lr / (1 - momentum) would: a twentieth of the threshold."""
    kind, _, rate = OPTIMIZERS["momentum .9"]
    found = settled(course(partial(kind, lr=rate), SMALL, 2400, points=7))
    in_units = found[DIRECTIONAL] * (1 + MOMENTUM) / (1 - MOMENTUM)
    assert 0.85 <= in_units <= 1.5
    assert found[FULL_BS] < found[MINI_BS] < 0.15
