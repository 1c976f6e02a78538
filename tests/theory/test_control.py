"""Decisions on learning rates: what they must never do, over many measurements."""

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from lightning_eoss.theory.control import CurvePoint, Reading, batch_factor, limit_rate, saturation, steer
from lightning_eoss.theory.statistics import Estimate

NAN = math.nan
CONTROL: dict[str, Any] = {"target": 1.0, "dead_band": 0.15, "max_change": 1.25, "lowest": 0.01, "highest": 2.0}


def exact(ratio: float) -> Estimate:
    return Estimate(ratio, 0.0, ratio, ratio)


def estimates(count: int = 500) -> list[Estimate]:
    """Of all sizes, precise and not, negative ones among them."""
    generator = np.random.default_rng(0)
    means = generator.normal(1.0, 1.0, count) * 10 ** generator.uniform(-1, 1, count)
    widths = 10 ** generator.uniform(-3, 1, count)
    return [Estimate(m, w / 2, m - w, m + w) for m, w in zip(means.tolist(), widths.tolist(), strict=True)]


# ---- batch size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["linear", "sqrt"])
def test_back_and_forth_ends_where_it_began(rule: Any) -> None:
    """Also over batch sizes whose ratios are no binary numbers, and however often."""
    factor, size = 1.0, 24
    for _ in range(20):
        for new in (7, 31, 100, 3, 24):
            factor, size = batch_factor(24, size, new, rule, old_factor=factor), new
            assert factor == (new / 24 if rule == "linear" else math.sqrt(new / 24))
    assert factor == 1.0


def test_the_threshold_curve_holds_the_rule_back() -> None:
    def grown(old: int, new: int, factor: float, saturating: float) -> float:
        return batch_factor(32, old, new, "linear", old_factor=factor, saturating=saturating)

    assert grown(32, 64, 1.0, 1.5) == 1.5
    assert grown(32, 64, 1.0, 3.0) == 2.0  # never more than the rule
    assert grown(64, 128, 1.5, 1.25) == 1.875
    assert grown(64, 128, 1.5, NAN) == 3.0  # from there on by the rule
    assert grown(128, 64, 1.875, 0.5) == 0.9375
    assert grown(64, 32, 1.5, 1.0) == 1.0  # exactly, whatever was in between
    assert grown(64, 16, 1.5, 1.0) == 0.5


def test_which_measurement_of_the_curve_can_be_used() -> None:
    point = CurvePoint(1000, 32, mini_batch=0.9, full_batch=0.3, num_samples=1000)

    def factor(old: int = 32, new: int = 64, step: int = 1001, **changed: Any) -> float:
        return saturation(CurvePoint(**{**vars(point), **changed}), old, new, step=step)

    assert 1 < factor() < 2
    assert factor(step=9000) == factor() == factor(mini_batch=9.0, full_batch=3.0)  # in any unit
    for unusable in (
        factor(old=16),  # of another batch size
        factor(step=999),  # of an earlier fit
        factor(mini_batch=NAN),
        factor(full_batch=NAN),
        factor(full_batch=-0.1),
    ):
        assert math.isnan(unusable)
    # A step has more samples than there are: all of them are what was measured.
    assert factor(old=2000, new=4000, batch_size=1000) == 1.0
    assert factor(new=4000) == factor(new=1000)


# ---- the limit -------------------------------------------------------------------------------------------------------


def test_a_limit_falls_at_once_and_rises_by_steps() -> None:
    assert limit_rate(math.inf, 0.5, exact(4.0), 2.0) == 0.25
    assert limit_rate(0.25, 0.25, exact(0.5), 2.0, max_change=1.5) == 0.375
    assert limit_rate(0.25, 0.25, exact(0.5), 2.0, max_change=1.0) == 0.25
    assert limit_rate(0.25, 0.125, exact(4.0), 2.0) == 0.0625
    assert limit_rate(0.25, 0.125, exact(0.75), 1.0) == 0.125 / 0.75  # also where the schedule is below it anyway
    assert limit_rate(0.25, 0.125, Estimate(0.4, 0.1, 0.2, 0.6), 1.0) == 0.25  # no contradiction


@pytest.mark.parametrize(
    "ratio",
    [
        Estimate(NAN, NAN, NAN, NAN),
        Estimate(NAN, 0.1, 0.1, 0.2),
        Estimate(math.inf, NAN, NAN, NAN),
        Estimate(-math.inf, NAN, NAN, -math.inf),
    ],
)
def test_what_is_not_a_number_changes_nothing(ratio: Estimate) -> None:
    assert limit_rate(0.25, 0.25, ratio, 1.0) == 0.25
    assert steer(0.5, ratio, **CONTROL) == 0.5
    assert steer(0.5, ratio, **CONTROL, cooling=True) == 0.5


def test_without_an_upper_end_nothing_is_raised() -> None:
    single = Estimate(0.1, NAN, NAN, NAN)  # of one batch
    assert limit_rate(0.25, 0.25, single, 1.0) == 0.25
    assert steer(0.5, single, **CONTROL) == 0.5
    single = Estimate(2.0, NAN, NAN, NAN)
    assert limit_rate(0.25, 0.25, single, 1.0) == 0.125
    assert steer(0.5, single, **CONTROL) == 0.4


def test_a_rate_of_zero_tells_nothing() -> None:
    assert limit_rate(0.25, 0.0, exact(0.0), 1.0) == 0.25


def test_a_limit_is_never_raised_where_the_interval_crosses_it() -> None:
    for ratio, limit in product(estimates(), (0.1, 1.0, math.inf)):
        rate = min(limit, 1.0)  # no step exceeds the limit
        new = limit_rate(limit, rate, ratio, 1.0)
        if ratio.upper >= 1.0:
            assert new <= limit
        if ratio.mean > 0:
            assert new <= rate / ratio.mean * (1 + 1e-12)
        if ratio.mean > 1:
            assert new < rate


# ---- the controller --------------------------------------------------------------------------------------------------


def test_a_factor_is_never_raised_where_the_interval_crosses_the_target() -> None:
    raised = lowered = kept = 0
    for ratio, cooling in product(estimates(), (False, True)):
        new = steer(1.0, ratio, **CONTROL, cooling=cooling)
        if ratio.upper >= 1.0:
            assert new <= 1.0
        if ratio.mean <= 1.15:
            assert new >= 1.0
        if new > 1.0:
            assert not cooling and ratio.mean < 0.85
            assert ratio.upper * new <= 1.0 + 1e-12  # and not beyond the target, either
        if new < 1 / 1.25:
            assert ratio.lower * new == pytest.approx(1.0)  # only what is surely too high
        assert 0.01 <= new <= 1.25
        raised, lowered, kept = raised + (new > 1), lowered + (new < 1), kept + (new == 1)
    assert min(raised, lowered, kept) > 20


def test_bounds_of_the_factor() -> None:
    assert steer(0.0125, exact(4.0), **CONTROL) == 0.01
    assert steer(1.75, exact(0.5), **CONTROL) == 2.0
    protecting = {**CONTROL, "highest": 1.0}
    assert steer(1.0, exact(0.1), **protecting) == 1.0
    assert steer(1.5, exact(0.1), **protecting) == 1.5  # bounds changed meanwhile: no jump
    assert steer(0.001, exact(4.0), **CONTROL) == 0.001
    assert steer(0.5, exact(-1.0), **CONTROL) == 0.625  # negative curvature is stable at any rate


def test_after_a_change_only_what_is_sure_counts() -> None:
    assert steer(1.0, Estimate(1.5, 0.1, 1.1, 1.9), **CONTROL, cooling=True) == 1.0
    assert steer(1.0, exact(0.5), **CONTROL, cooling=True) == 1.0
    assert steer(1.0, exact(2.0), **CONTROL, cooling=True) == 0.5


def test_the_controller_settles() -> None:
    """Where the edge ratio is proportional to the rate, and measured without noise."""
    for first in (20.0, 0.05):
        factor, path = 1.0, [1.0]
        for _ in range(40):
            factor = steer(factor, exact(first * factor), **{**CONTROL, "lowest": 1e-3, "highest": 1e3})
            path.append(factor)
        assert 0.85 <= first * factor <= 1.15
        assert all((b - a) * (path[-1] - path[0]) >= 0 for a, b in pairwise(path))  # without overshoot


def test_a_reading_holds_what_a_monitor_measured() -> None:
    reading = Reading(3, 32, exact(1.2), exact(1.0), 0.5, 1000)
    assert reading.step == 3 and reading.mini_batch.mean == 1.2
