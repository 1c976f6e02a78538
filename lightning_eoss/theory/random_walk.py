r"""How far training has gone from where it began: ultra-slow diffusion, and when to look at it.

In a random potential whose differences grow with the distance to the power :math:`\alpha / 2`, a walker gets
:math:`|w_t - w_0| \sim (\log t)^{2 / \alpha}` far. Hoffer et al. find :math:`\alpha = 2`, so :math:`\log t`.

References:
    Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap in large batch training
    of neural networks", NeurIPS 2017, section 3 and appendix B; Marinari, Parisi, Ruelle and Windey, "Random walk in a
    random environment and 1/f noise", Physical Review Letters 1983.
"""

import math
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

SINCE = 30  # steps after which the logarithmic law is said to hold

_MIN_POINTS, _MIN_RATIO = 5, 2.0  # fewer points, or a shorter time, and any two-parameter law fits
_EXPONENTS = (-5.0, 5.0)  # searched for the power law
_FINE = {"xatol": 1e-10}  # of the exponent
_MIN_VARIATION = 1e-9  # of the distances, relative; less is rounding


@dataclass(frozen=True)
class DistanceLaws:
    """Two laws of two parameters each, fitted to the same distances; NaN where there is too little to fit."""

    intercept: float  # a of a + c log t, in units of the distance
    slope: float  # c, the same for each factor e in time
    log_r2: float  # share of the distances' variance that it explains
    factor: float  # A of A t^p
    exponent: float  # p
    power_r2: float  # the same share


def distance_laws(steps: ArrayLike, distances: ArrayLike, *, since: float = SINCE) -> DistanceLaws:
    r"""Fits the logarithmic law and a power law to distances from the start.

    .. math:: |w_t - w_0| \approx a + c \log t, \qquad |w_t - w_0| \approx A\, t^p, \qquad
        R^2 = 1 - \frac{\sum_t (|w_t - w_0| - \text{fit}_t)^2}{\sum_t (|w_t - w_0| - \text{mean})^2}

    Both are least squares of the distance itself, at the same points, so their :math:`R^2` compare. Each point counts
    alike: take them evenly in :math:`\log t` (:func:`next_look`), or the end of training outweighs all the rest.

    Args:
        steps: Optimizer steps :math:`t` since :math:`w_0`.
        distances: Distances at these steps.
        since: First step that counts.

    Returns:
        The laws; all NaN for fewer than five points, for points whose steps do not differ by a factor of two, and for
        distances that do not change.

    Raises:
        ValueError: If steps and distances are not pairs, or `since` is not positive.

    Example:
        >>> laws = distance_laws([30, 100, 300, 1000, 3000], 1 + 2 * np.log([30, 100, 300, 1000, 3000]))
        >>> round(laws.intercept, 6), round(laws.slope, 6), round(laws.log_r2, 6), round(laws.power_r2, 2)
        (1.0, 2.0, 1.0, 0.99)

    Source: Hoffer, Hubara and Soudry, section 3, Figure 2 (the law), and appendix C, Figure 4 (batch sizes).
    """
    t, d = (np.asarray(each, dtype=float) for each in (steps, distances))
    if t.shape != d.shape or t.ndim != 1:
        raise ValueError(f"steps of shape {t.shape} and distances of shape {d.shape} are no pairs: give one per step.")
    if not since > 0:
        raise ValueError(f"since={since} must be positive: the laws have no value at step 0. Take 1 for all steps.")
    t, d = t[t >= since], d[t >= since]
    nothing = DistanceLaws(*[math.nan] * 6)
    if len(t) < _MIN_POINTS or t.max() < _MIN_RATIO * t.min() or not np.isfinite(d).all():
        return nothing
    total = float(np.square(d - d.mean()).sum())
    if not total > np.square(d).sum() * _MIN_VARIATION**2:
        return nothing
    middle = float(np.log(t).mean())
    x = np.log(t) - middle  # in the middle, so that t^p neither overflows nor hides the factor
    slope = float(x @ d / (x @ x))
    off = float(np.square(d - d.mean() - slope * x).sum())

    def power(exponent: float) -> tuple[float, float]:
        """The best factor for an exponent, and what is left then."""
        shape: NDArray[np.float64] = np.exp(exponent * x)
        factor = float(shape @ d / (shape @ shape))
        return factor, float(np.square(d - factor * shape).sum())

    exponent = float(minimize_scalar(lambda p: power(p)[1], bounds=_EXPONENTS, method="bounded", options=_FINE).x)
    factor, left = power(exponent)
    return DistanceLaws(
        intercept=float(d.mean()) - slope * middle,
        slope=slope,
        log_r2=1 - off / total,
        factor=factor * math.exp(-exponent * middle),
        exponent=exponent,
        power_r2=1 - left / total,
    )


def next_look(step: int, points_per_decade: int) -> int:
    r"""The next step to look at, :math:`\mathrm{round}(10^{j/n})` with a whole :math:`j`: evenly in :math:`\log t`.

    Args:
        step: Steps done.
        points_per_decade: The number n of looks while the step grows tenfold; fewer where that would be more than one
            a step.

    Returns:
        The smallest such number above `step`.

    Example:
        >>> next_look(0, 20), next_look(1, 20), next_look(100, 20), next_look(1000, 1)
        (1, 2, 112, 10000)
    """
    first = math.floor(points_per_decade * math.log10(max(step, 1)))
    return next(due for j in count(first) if (due := round(10 ** (j / points_per_decade))) > step)


def angle(one: ArrayLike, other: ArrayLike) -> float:
    r"""The angle between two displacements, in degrees.

    .. math:: \arccos \frac{u \cdot v}{|u|\,|v|}

    90 in a walk whose steps know nothing of each other, less where it drifts, more where it swings back.

    Args:
        one: A vector u.
        other: A vector v of as many entries.

    Returns:
        The angle, from 0 to 180; NaN where a vector is zero or not finite.

    Example:
        >>> angle([1.0, 0.0], [-1.0, 1.0])
        135.0
    """
    u, v = (np.asarray(each, dtype=float) for each in (one, other))
    sizes = np.linalg.norm(u), np.linalg.norm(v)
    if not 0 < sizes[0] * sizes[1] < math.inf:
        return math.nan
    u, v = u / sizes[0], v / sizes[1]
    # The half angle's tangent: the arc cosine has lost half of the digits near 0 and 180.
    return math.degrees(2 * math.atan2(float(np.linalg.norm(u - v)), float(np.linalg.norm(u + v))))
