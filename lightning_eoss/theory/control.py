r"""What a batch size and a measured edge ratio say about the learning rate: the decisions of `LearningRateRescaler`.

An edge ratio is proportional to the learning rate (with the momentum and the weight decay as they are). So a
measurement taken at a rate :math:`\eta` tells where the edge is, :math:`\eta / \text{ratio}`, and what another rate
would make of it.

All of them lower a rate on the mean and raise it on the upper end of the interval alone: an estimate that may as well
lie beyond the limit raises nothing. What is NaN changes nothing.
"""

import math
from dataclasses import dataclass

from lightning_eoss.theory.scaling import Rule, saturating_factor, scale_learning_rate
from lightning_eoss.theory.statistics import Estimate


@dataclass(frozen=True)
class Reading:
    """A measurement as a controller sees it, in edge ratios."""

    step: int  # trainer.global_step of the measurement
    batch_size: int  # b of MiniBS(b)
    mini_batch: Estimate  # MiniBS's edge ratio; NaN where not measured
    directional: Estimate  # the directional edge ratio, FullBS's where one batch is all; NaN where not measured
    full_batch: float  # FullBS's edge ratio; NaN where not measured
    num_samples: int  # that batches are drawn from


def batch_factor(
    base_batch_size: float,
    old_batch_size: float,
    new_batch_size: float,
    rule: Rule,
    *,
    old_factor: float,
    saturating: float = math.nan,
) -> float:
    r"""The factor to the rate of the base batch size, for another batch size.

    .. math:: f(B') = \min\!\left(r(B_0 \to B'),\; f(B)\, s(B \to B')\right) \quad \text{for } B' > B_0, \qquad
        f(B') = r(B_0 \to B') \quad \text{else}

    with the rule :math:`r` and what the threshold curve allows, :math:`s`; without a measurement of the curve the rule
    stands for it. It is taken from the base and not from the last change, so that going back and forth ends where it
    began.

    Args:
        base_batch_size: Batch size :math:`B_0` that the schedule's own rates are meant for.
        old_batch_size: Batch size :math:`B` so far.
        new_batch_size: Batch size :math:`B'` from now on.
        rule: ``"linear"`` or ``"sqrt"``.
        old_factor: The factor :math:`f(B)` so far.
        saturating: What the threshold curve allows from B to B', see
            :func:`~lightning_eoss.theory.scaling.saturating_factor`; NaN where it is not known.

    Returns:
        The factor; exactly 1 at the base batch size.

    Raises:
        ValueError: If a batch size is not positive.

    Example:
        >>> batch_factor(32, 32, 128, "linear", old_factor=1.0)
        4.0
        >>> batch_factor(32, 32, 128, "linear", old_factor=1.0, saturating=2.5)
        2.5
        >>> batch_factor(32, 128, 256, "linear", old_factor=2.5)
        5.0

    Source: Granziol, Zohren and Roberts, sections 10.1 and 11.
    """

    def ruled(old: float, new: float) -> float:
        return scale_learning_rate(1.0, old, new, rule)

    direct = ruled(base_batch_size, new_batch_size)
    if new_batch_size <= base_batch_size:
        return direct
    if math.isnan(saturating):
        if old_factor == ruled(base_batch_size, old_batch_size):  # the rule alone so far: no rounding of a product
            return direct
        saturating = ruled(old_batch_size, new_batch_size)
    return min(direct, old_factor * saturating)


@dataclass(frozen=True)
class CurvePoint:
    """What is known of the threshold curve: sharpness at one batch size and of the full batch, in one unit."""

    step: int  # trainer.global_step of the older of the two
    batch_size: int
    mini_batch: float
    full_batch: float
    num_samples: int  # that batches are drawn from


def saturation(point: CurvePoint, old_batch_size: float, new_batch_size: float, *, step: int) -> float:
    """What the measured threshold curve allows for another batch size, where the measurement can be used.

    It can be used where it was taken at the old batch size, however long ago: the *shape* of the curve changes slowly,
    and all that it can do is to hold the rule back.

    Args:
        point: What was measured.
        old_batch_size: Samples of a step so far.
        new_batch_size: Samples of a step from now on.
        step: The step that comes.

    Returns:
        The factor to the rate, or NaN.

    Example:
        >>> point = CurvePoint(90, 16, mini_batch=0.75, full_batch=0.25, num_samples=10**9)
        >>> round(saturation(point, 16, 64, step=100), 6)  # a gap of .5 becomes .25 at the least optimistic
        1.5
        >>> saturation(point, 32, 64, step=100)  # of another batch size
        nan
    """
    total = point.num_samples
    old, new = min(old_batch_size, total), min(new_batch_size, total)
    if point.batch_size != old or step < point.step:
        return math.nan
    sharpness = point.full_batch, point.mini_batch
    return saturating_factor(*sharpness, old_batch_size=old, new_batch_size=new, dataset_size=total)


def limit_rate(
    limit: float, rate: float, ratio: Estimate, max_edge_ratio: float, *, max_change: float = math.inf
) -> float:
    r"""The largest learning rate that keeps an edge ratio below its limit.

    .. math:: \eta_{\max}' = \min\!\left(\max\!\left(\eta_{\max},\; \eta\, \frac{m}{\text{upper}}\right),\;
        \eta\, \frac{m}{\text{mean}}\right)

    Between the two the measurement does not contradict the limit so far, and the limit stays.

    Args:
        limit: The limit :math:`\eta_{\max}` so far; infinite where nothing has been measured.
        rate: The rate :math:`\eta` that was measured at.
        ratio: The edge ratio at that rate.
        max_edge_ratio: The largest edge ratio m wanted.
        max_change: By which factor the limit may rise; it falls at once.

    Returns:
        The limit from now on; the same where the mean is NaN or the rate 0, and never a higher one where the upper end
        is NaN.

    Example:
        >>> limit_rate(math.inf, 0.5, Estimate(2.0, 0.25, 1.5, 2.5), max_edge_ratio=1.0)  # beyond: lowered to the mean
        0.25
        >>> limit_rate(0.25, 0.25, Estimate(0.9, 0.1, 0.7, 1.1), max_edge_ratio=1.0)  # may be beyond: not raised
        0.25
        >>> limit_rate(0.25, 0.25, Estimate(0.4, 0.05, 0.3, 0.5), max_edge_ratio=1.0)  # surely below: raised
        0.5
        >>> limit_rate(0.25, 0.25, Estimate(0.4, 0.05, 0.3, 0.5), max_edge_ratio=1.0, max_change=1.5)
        0.375
    """
    if not (rate > 0 and math.isfinite(ratio.mean)):  # at a rate of 0 nothing is learned about rates
        return limit
    at_least = rate * max_edge_ratio / ratio.upper if ratio.upper > 0 else math.inf
    at_least = 0.0 if math.isnan(ratio.upper) else min(at_least, limit * max_change)
    at_most = rate * max_edge_ratio / ratio.mean if ratio.mean > 0 else math.inf
    return min(max(limit, at_least), at_most)


def steer(
    factor: float,
    ratio: Estimate,
    *,
    target: float,
    dead_band: float,
    max_change: float,
    lowest: float,
    highest: float,
    cooling: bool = False,
) -> float:
    r"""One move of a controller that holds an edge ratio near its target.

    Above the dead band (by the mean) and below it (the mean below the band, the upper end below the target),

    .. math:: f' = f \cdot \min\!\left(\max\!\left(\frac{t}{\text{mean}}, \frac1c\right), \frac{t}{\text{lower}}\right)
        \qquad\text{and}\qquad f' = f \cdot \min\!\left(\frac{t}{\text{upper}}, c\right)

    with the target t, and else :math:`f' = f`. So no move is larger than c, but one: what is *surely* above the target
    goes at once. Steps beyond the edge grow from one to the next, and by the time that small moves had arrived there
    would be nothing left to save.

    Args:
        factor: The factor f so far.
        ratio: The edge ratio that this factor leads to.
        target: The edge ratio t wanted.
        dead_band: Relative deviation from the target at which nothing is done.
        max_change: Largest change c of one move.
        lowest: The factor is lowered to this at most.
        highest: The factor is raised to this at most.
        cooling: Whether a change has hardly had its effect yet: only what is surely above the dead band counts.

    Returns:
        The factor from now on.

    Example:
        >>> options = dict(target=1.0, dead_band=0.15, max_change=1.25, lowest=0.01, highest=1.0)
        >>> steer(1.0, Estimate(2.0, 0.6, 0.8, 3.2), **options)
        0.8
        >>> steer(1.0, Estimate(4.5, 0.25, 4.0, 5.0), **options)  # surely four times too high
        0.25
        >>> steer(1.0, Estimate(1.125, 0.1, 1.0, 1.25), **options)  # in the dead band
        1.0
        >>> steer(0.5, Estimate(0.75, 0.1, 0.5, 1.0), **options)  # may be at the target
        0.5
        >>> steer(0.5, Estimate(0.25, 0.1, 0.2, 0.3), **options)
        0.625
    """
    if not math.isfinite(ratio.mean) or (cooling and not ratio.lower > target * (1 + dead_band)):
        return factor
    if ratio.mean > target * (1 + dead_band):
        change = max(target / ratio.mean, 1 / max_change)
        if ratio.lower > target:
            change = min(change, target / ratio.lower)
        return min(factor, max(factor * change, lowest))
    if ratio.mean < target * (1 - dead_band) and ratio.upper < target:
        change = min(target / ratio.upper, max_change) if ratio.upper > 0 else max_change
        return max(factor, min(factor * change, highest))
    return factor
