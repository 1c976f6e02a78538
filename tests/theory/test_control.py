"""Decisions on learning rates: what they must never do, over many measurements."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from lightning_eoss.theory.control import (
    CurvePoint,
    RateSettings,
    RateState,
    Reading,
    batch_factor,
    followed,
    held,
    highest_rate,
    limit_rate,
    rate_scale,
    resized,
    restarted,
    saturation,
    steer,
)
from lightning_eoss.theory.statistics import Estimate

NAN = math.nan
CONTROLLER = RateSettings(target_edge_ratio=1.0, dead_band=0.15, max_change=1.25, min_scale=0.01, max_scale=2.0)


def exact(ratio: float) -> Estimate:
    return Estimate(ratio, 0.0, ratio, ratio)


def around(mean: float, half_width: float) -> Estimate:
    return Estimate(mean, half_width / 2, mean - half_width, mean + half_width)


def estimates(count: int = 500) -> list[Estimate]:
    """Of all sizes, precise and not, negative ones among them."""
    generator = np.random.default_rng(0)
    means = generator.normal(1.0, 1.0, count) * 10 ** generator.uniform(-1, 1, count)
    widths = 10 ** generator.uniform(-3, 1, count)
    return [Estimate(m, w / 2, m - w, m + w) for m, w in zip(means.tolist(), widths.tolist(), strict=True)]


# ---- from state to state ---------------------------------------------------------------------------------------------

LIMIT = RateSettings(max_edge_ratio=1.0, max_change=1.5, cool_down=4)
STEERED = RateSettings(target_edge_ratio=1.0, max_change=1.25, cool_down=4)
SEEN = RateState(base=16, size=16)  # before the first measurement


def reading(ratio: Estimate | float, step: int = 10, **others: Any) -> Reading:
    """Of the steps' own batches, out of a thousand samples; FullBS is half as sharp."""
    ratio = ratio if isinstance(ratio, Estimate) else exact(ratio)
    made = {"batch_size": 16, "mini_batch": ratio, "directional": ratio, "full_batch": ratio.mean / 2}
    return Reading(**{"step": step, "num_samples": 1000, **made, **others})


def after(
    ratio: Estimate | float, settings: RateSettings = LIMIT, state: RateState = SEEN, step: int = 10, **others: Any
) -> RateState:
    """What a measurement makes of a state, at a schedule's rate of 0.25 and as the state has scaled it."""
    taken = (step, 0.25 * rate_scale(state, settings, 0.25))
    return followed(state, reading(ratio, step, **others), settings, step=step, rate=0.25, taken=taken).state


def test_a_measurement_beyond_the_limit_lowers_the_rate_to_it() -> None:
    lowered = after(2.0)
    assert lowered.limit == 8.0  # edge ratio per unit of rate, which is 2 at a rate of 1/4
    assert highest_rate(lowered, LIMIT) == 0.125 and rate_scale(lowered, LIMIT, 0.25) == 0.5
    assert lowered.changed == 10 and held(lowered, LIMIT, 0.25) and not held(lowered, LIMIT, 0.125)
    assert rate_scale(lowered, LIMIT, 0.0625) == 1.0  # a schedule below it
    assert rate_scale(lowered, replace(LIMIT, max_edge_ratio=2.0), 0.25) == 1.0  # another limit, and the same state
    assert rate_scale(lowered, replace(LIMIT, min_scale=0.75), 0.25) == 0.75


def test_a_limit_is_raised_by_steps_and_after_the_cool_down() -> None:
    lowered = after(4.0)
    assert rate_scale(lowered, LIMIT, 0.25) == 0.25
    cooling, raised = (after(0.25, state=lowered, step=step) for step in (13, 14))
    assert rate_scale(cooling, LIMIT, 0.25) == 0.25 and cooling.changed == 10
    assert rate_scale(raised, LIMIT, 0.25) == pytest.approx(0.375) and raised.changed == 14
    assert rate_scale(after(2.0, state=lowered, step=11), LIMIT, 0.25) == 0.125  # lowered it is at any time


def test_what_a_limit_above_the_schedule_does_is_no_change() -> None:
    lower = after(0.5)
    assert lower.limit == 2.0 and lower.changed is None and rate_scale(lower, LIMIT, 0.25) == 1.0


def test_the_controller_moves_by_the_rate_that_comes() -> None:
    assert after(around(1.5, 0.6), STEERED).controller == 0.8
    assert after(4.0, STEERED).controller == 0.25
    assert after(1.1, STEERED) == replace(after(1.1, STEERED), controller=1.0, changed=None)  # in the dead band
    lowered = after(4.0, STEERED)
    assert after(0.25, STEERED, lowered, 13).controller == 0.25  # cools down
    assert after(0.25, STEERED, lowered, 14).controller == 0.3125
    # Measured at half of the rate that the schedule has by now.
    found = followed(SEEN, reading(1.0), STEERED, step=10, rate=0.25, taken=(10, 0.125)).state
    assert found.controller == 0.5


def test_both_say_why() -> None:
    both = replace(LIMIT, target_edge_ratio=0.5)
    for settings, why in ((LIMIT, "max_edge_ratio=1.0"), (both, "max_edge_ratio=1.0 and target_edge_ratio=0.5")):
        decision = followed(SEEN, reading(2.0), settings, step=10, rate=0.25, taken=(10, 0.25))
        assert decision.reason == f"the directional edge ratio was {exact(2.0)}, with {why}"
    assert not followed(SEEN, reading(NAN), LIMIT, step=10, rate=0.25, taken=(10, 0.25)).reason
    judged = replace(LIMIT, judged_on="MiniBS")
    assert after(2.0, judged, directional=exact(0.5)).limit == 8.0
    assert after(2.0, judged, mini_batch=exact(0.5)).limit == 2.0


def test_a_measurement_counts_once_and_for_its_own_step() -> None:
    for stale in (reading(2.0, step=9), reading(2.0, step=11)):
        assert followed(SEEN, stale, LIMIT, step=10, rate=0.25, taken=(10, 0.25)).state is SEEN
    assert followed(SEEN, reading(2.0), LIMIT, step=10, rate=0.0, taken=(10, 0.0)).state is SEEN  # of no rate
    once = after(around(2.0, 1.5), STEERED)
    again = followed(once, reading(around(2.0, 1.5)), STEERED, step=10, rate=0.25, taken=(10, 0.2)).state
    assert once.controller == 0.8 and again is once
    late = followed(SEEN, reading(2.0), LIMIT, step=11, rate=0.25, taken=(10, 0.25)).state  # in a dry run
    assert late.limit == 8.0 and late.changed == 11


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        (RateSettings(), {}),  # nothing is asked for
        (replace(LIMIT, warm_up=11), {}),
        (LIMIT, {"batch_size": 32}),
        (LIMIT, {"directional": Estimate(NAN, NAN, NAN, NAN)}),
    ],
)
def test_where_a_measurement_changes_nothing_the_curve_is_remembered(settings: RateSettings, others: Any) -> None:
    found = after(2.0, settings, **others)
    curve = CurvePoint(10, others.get("batch_size", 16), mini_batch=8.0, full_batch=4.0, num_samples=1000)
    assert found == replace(SEEN, read=10, curve=curve)


def test_batches_that_steps_do_not_have_are_told_apart() -> None:
    def comparable(size: float | None, **others: Any) -> bool:
        state = replace(SEEN, size=size)
        return followed(state, reading(2.0, **others), LIMIT, step=10, rate=0.25, taken=(10, 0.25)).comparable

    assert comparable(16) and comparable(16.3) and comparable(None) and not comparable(8)
    assert comparable(64, batch_size=40, num_samples=40)  # all samples there are
    assert comparable(64, batch_size=64, num_samples=40)


def test_another_batch_size_without_a_curve_goes_by_the_rule() -> None:
    lowered = after(2.0)
    unknown = replace(lowered, curve=CurvePoint())
    for rule, factor in (("linear", 4.0), ("sqrt", 2.0)):
        decision = resized(unknown, 64, rule, step=11)  # type: ignore[arg-type]
        assert decision.state.batch_factor == factor
        assert decision.state.limit == 8.0 / factor  # the limit is of the schedule's rate, and follows
        assert rate_scale(decision.state, LIMIT, 0.25) == factor / 2
        assert decision.reason == f"a step has 64 samples in place of 16, {rule} rule"
    assert resized(unknown, 64, "linear", step=11).state.curve == CurvePoint()


def test_another_batch_size_with_a_curve_is_held_back() -> None:
    curve = CurvePoint(10, 16, mini_batch=3.0, full_batch=1.0, num_samples=10**9)
    decision = resized(replace(SEEN, curve=curve), 64, "linear", step=11)
    assert decision.state.batch_factor == pytest.approx(1.5)  # the gap of 2 is one of 1 at the least optimistic
    assert decision.reason.endswith("linear rule cut to what the measured threshold curve allows, 0.375 of it")
    back = resized(decision.state, 16, "linear", step=12)
    assert back.state.batch_factor == 1.0 and not math.isnan(back.state.limit)


def test_the_first_batch_size_is_the_base_and_changes_nothing() -> None:
    first = resized(RateState(), 16, "linear", step=0)
    assert first.state == SEEN and not first.reason
    told = resized(RateState(), 16, "linear", step=0, base=64)
    assert (told.state.base, told.state.batch_factor) == (64, 0.25)
    assert told.reason == "a step has 16 samples in place of 64, linear rule"


def test_another_base_starts_from_the_schedules_own_rate() -> None:
    grown = resized(replace(after(2.0), curve=CurvePoint()), 64, "linear", step=11).state
    again = restarted(grown, 32)
    assert (again.base, again.size, again.batch_factor, again.limit) == (32, None, 1.0, 8.0)
    assert restarted(grown).base == 16


def test_a_state_is_plain_numbers() -> None:
    state = after(2.0)
    kept = json.loads(json.dumps(asdict(state)))
    assert RateState(**{**kept, "curve": CurvePoint(**kept["curve"])}) == state


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
    assert steer(0.5, ratio, CONTROLLER) == 0.5
    assert steer(0.5, ratio, CONTROLLER, cooling=True) == 0.5


def test_without_an_upper_end_nothing_is_raised() -> None:
    single = Estimate(0.1, NAN, NAN, NAN)  # of one batch
    assert limit_rate(0.25, 0.25, single, 1.0) == 0.25
    assert steer(0.5, single, CONTROLLER) == 0.5
    single = Estimate(2.0, NAN, NAN, NAN)
    assert limit_rate(0.25, 0.25, single, 1.0) == 0.125
    assert steer(0.5, single, CONTROLLER) == 0.4


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
        new = steer(1.0, ratio, CONTROLLER, cooling=cooling)
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
    assert steer(0.0125, exact(4.0), CONTROLLER) == 0.01
    assert steer(1.75, exact(0.5), CONTROLLER) == 2.0
    protecting = replace(CONTROLLER, max_scale=1.0)
    assert steer(1.0, exact(0.1), protecting) == 1.0
    assert steer(1.5, exact(0.1), protecting) == 1.5  # bounds changed meanwhile: no jump
    assert steer(0.001, exact(4.0), CONTROLLER) == 0.001
    assert steer(0.5, exact(-1.0), CONTROLLER) == 0.625  # negative curvature is stable at any rate


def test_after_a_change_only_what_is_sure_counts() -> None:
    assert steer(1.0, Estimate(1.5, 0.1, 1.1, 1.9), CONTROLLER, cooling=True) == 1.0
    assert steer(1.0, exact(0.5), CONTROLLER, cooling=True) == 1.0
    assert steer(1.0, exact(2.0), CONTROLLER, cooling=True) == 0.5


def test_the_controller_settles() -> None:
    """Where the edge ratio is proportional to the rate, and measured without noise."""
    for first in (20.0, 0.05):
        factor, path = 1.0, [1.0]
        for _ in range(40):
            factor = steer(factor, exact(first * factor), replace(CONTROLLER, min_scale=1e-3, max_scale=1e3))
            path.append(factor)
        assert 0.85 <= first * factor <= 1.15
        assert all((b - a) * (path[-1] - path[0]) >= 0 for a, b in pairwise(path))  # without overshoot


def test_a_reading_holds_what_a_monitor_measured() -> None:
    reading = Reading(3, 32, exact(1.2), exact(1.0), 0.5, 1000)
    assert reading.step == 3 and reading.mini_batch.mean == 1.2
