"""Laws of the distance from the start, on walks whose law is known."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from lightning_eoss.theory.random_walk import angle, distance_laws, next_look

T = np.unique(np.round(np.geomspace(30, 3000, 40)))


def noisy(seed: int = 0) -> np.ndarray:
    return 2 + 1.5 * np.log(T) + 0.3 * np.random.default_rng(seed).standard_normal(len(T))


@pytest.mark.parametrize(("a", "c"), [(0.0, 2.28), (-3.0, 1.0), (5.0, -0.2)])
def test_a_logarithmic_law_is_recovered(a: float, c: float) -> None:
    laws = distance_laws(T, a + c * np.log(T))
    assert (laws.intercept, laws.slope, laws.log_r2) == pytest.approx((a, c, 1.0), rel=1e-9, abs=1e-9)
    assert laws.power_r2 < 0.9999


@pytest.mark.parametrize("exponent", [-0.5, 0.25, 0.5, 1.0, 2.5])
def test_a_power_law_is_recovered(exponent: float) -> None:
    laws = distance_laws(T, 0.3 * T**exponent)
    assert (laws.factor, laws.exponent, laws.power_r2) == pytest.approx((0.3, exponent, 1.0), rel=1e-6)
    assert laws.log_r2 < 0.998


def test_both_are_least_squares_of_the_distance() -> None:
    """By other routines; neither is fitted in logarithms."""
    d = noisy()
    laws = distance_laws(T, d)
    total = np.square(d - d.mean()).sum()
    (slope, intercept), off, *_ = np.polyfit(np.log(T), d, 1, full=True)
    assert (laws.slope, laws.intercept, laws.log_r2) == pytest.approx((slope, intercept, 1 - off[0] / total))
    (factor, exponent), _ = curve_fit(lambda t, factor, exponent: factor * t**exponent, T, d, p0=(4, 0.2))
    left = np.square(d - factor * T**exponent).sum()
    assert (laws.factor, laws.exponent, laws.power_r2) == pytest.approx((factor, exponent, 1 - left / total), rel=1e-5)


def test_steps_before_the_thirtieth_do_not_count() -> None:
    early, late = np.arange(30.0), T
    d = np.concatenate([np.random.default_rng(0).random(30), noisy()])
    assert distance_laws(np.concatenate([early, late]), d) == distance_laws(late, noisy())
    assert distance_laws(np.concatenate([early, late]), d, since=1) != distance_laws(late, noisy())


@pytest.mark.parametrize(
    ("steps", "distances"),
    [
        ([], []),
        (T[:4] * np.arange(1, 5), np.arange(4.0)),
        ([30, 35, 40, 45, 59], np.arange(5.0)),
        (np.arange(29), np.arange(29.0)),
        (T, np.full(len(T), 0.1)),
        (T, np.where(T > 1000, np.nan, T)),
    ],
)
def test_too_little_has_no_law(steps: object, distances: object) -> None:
    laws = distance_laws(steps, distances)
    assert all(math.isnan(each) for each in vars(laws).values())


def test_five_looks_over_a_factor_of_two_have_one() -> None:
    assert distance_laws([30, 35, 40, 45, 60], np.arange(5.0)).log_r2 < 1


def test_long_trainings_do_not_overflow() -> None:
    t = np.geomspace(1e6, 1e9, 50)
    assert distance_laws(t, t**0.5).exponent == pytest.approx(0.5, rel=1e-6)
    assert distance_laws(t, np.log(t)).slope == pytest.approx(1.0)


def test_free_random_walks_follow_a_power_law_and_the_trapped_one_a_logarithm() -> None:
    """Independent steps: t^0.5. Steps that shrink like 1/t along a line: log t."""
    steps = np.random.default_rng(0).standard_normal((3000, 2000))
    at = T.astype(int) - 1
    free = distance_laws(T, np.linalg.norm(steps.cumsum(0), axis=1)[at])
    assert free.exponent == pytest.approx(0.5, abs=0.02)
    assert free.power_r2 > 0.999 > 0.95 > free.log_r2
    trapped = distance_laws(T, np.cumsum(1 / np.arange(1, 3001))[at])
    assert trapped.slope == pytest.approx(1.0, rel=0.01)
    assert trapped.log_r2 > 0.9999 > trapped.power_r2


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps of shape \(2,\) and distances of shape \(3,\) are no pairs"):
        distance_laws([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="since=0 must be positive"):
        distance_laws([1, 2], [1, 2], since=0)


# ---- looks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 3, 20, 100])
def test_looks_are_all_powers_of_a_root_of_ten(points: int) -> None:
    looks, step = [], 0
    while step < 10_000:
        step = next_look(step, points)
        looks.append(step)
    assert looks == sorted({round(10 ** (j / points)) for j in range(4 * points + 1)})


def test_looks_are_not_missed_by_steps_that_are_skipped() -> None:
    """Manual optimisation: the next look is the first above."""
    assert [next_look(step, 20) for step in (0, 7, 105, 111, 112, 2000)] == [1, 8, 112, 112, 126, 2239]


# ---- angles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 30.0, 90.0, 150.0, 179.9999999, 180.0])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_angles(degrees: float, size: float) -> None:
    one = size * np.array([math.cos(0.3), math.sin(0.3)])
    other = 7 * np.array([math.cos(0.3 + math.radians(degrees)), math.sin(0.3 + math.radians(degrees))])
    assert angle(one, other) == pytest.approx(degrees, abs=1e-9)


@pytest.mark.parametrize("vector", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_what_has_no_direction_has_no_angle(vector: list[float]) -> None:
    assert math.isnan(angle([1.0, 0.0], vector)) and math.isnan(angle(vector, [1.0, 0.0]))
