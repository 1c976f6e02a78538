r"""What a batch size and a measured edge ratio say about the learning rate: the decisions of `LearningRateRescaler`.

An edge ratio is proportional to the learning rate (with the momentum and the weight decay as they are). So a
measurement taken at a rate :math:`\eta` tells where the edge is, :math:`\eta / \text{ratio}`, and what another rate
would make of it. What is remembered of measurements is therefore the edge ratio *per unit of learning rate*, of the
rate that steps really take: `RateState` knows no other unit. :func:`resized` and :func:`followed` lead from one state
to the next, by the formulas that come after them.

All of them lower a rate on the mean and raise it on the upper end of the interval alone: an estimate that may as well
lie beyond the limit raises nothing. What is NaN changes nothing.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_eoss import checks
from lightning_eoss.theory.scaling import Rule, saturating_factor, scale_learning_rate
from lightning_eoss.theory.statistics import Estimate, scaled


@dataclass(frozen=True)
class Reading:
    """A measurement as a controller sees it, in edge ratios."""

    step: int  # trainer.global_step of the measurement
    batch_size: int  # b of MiniBS(b)
    mini_batch: Estimate  # MiniBS's edge ratio; NaN where not measured
    directional: Estimate  # the directional edge ratio, FullBS's where one batch is all; NaN where not measured
    full_batch: float  # FullBS's edge ratio; NaN where not measured
    num_samples: int  # that batches are drawn from


@dataclass(frozen=True)
class CurvePoint:
    """What is known of the threshold curve: sharpness at one batch size and of the full batch, in one unit."""

    step: int = -1  # trainer.global_step of the newer of the two
    batch_size: int = 0
    mini_batch: float = math.nan
    full_batch: float = math.nan
    num_samples: int = 0  # that batches are drawn from


@dataclass(frozen=True)
class RateSettings:
    """How measurements may change a learning rate; `LearningRateRescaler` says what each of them does."""

    max_edge_ratio: float | None = None
    target_edge_ratio: float | None = None
    judged_on: Literal["directional", "MiniBS"] = "directional"
    dead_band: float = 0.15
    max_change: float = 1.1
    cool_down: int = 10
    warm_up: int | None = 0  # None, which only an optimizer can tell, counts as 0 here
    min_scale: float = 1e-3
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        checks.one_of("judged_on", self.judged_on, ("directional", "MiniBS"), "use 'directional' or 'MiniBS'.")
        for name in ("cool_down", "warm_up"):
            words = "must be a number of steps; 0 is none."
            checks.whole(name, getattr(self, name), 0, words, none=name == "warm_up")
        edge = "must be positive (1 is the edge), or None for none."
        for name in ("max_edge_ratio", "target_edge_ratio"):
            checks.number(name, getattr(self, name), edge, above=0, below=math.inf, none=True)
        for name in ("dead_band", "min_scale", "max_scale"):
            checks.number(name, getattr(self, name))
        if not 0 <= self.dead_band < 1:
            raise ValueError(f"dead_band={self.dead_band} is a relative deviation and must be from 0 to 1, as 0.15 is.")
        words = "is a factor and must be above 1: else the controller never moves."
        checks.number("max_change", self.max_change, words, above=1, below=math.inf)
        if not 0 < self.min_scale <= 1 <= self.max_scale < math.inf:
            raise ValueError(
                f"min_scale={self.min_scale} and max_scale={self.max_scale} must be positive and have 1 between them: "
                "training starts at the schedule's own rate."
            )


@dataclass(frozen=True)
class RateState:
    """What a learning rate has come to: plain numbers, which checkpoints hold."""

    base: float | None = None  # samples of a step that the schedule's own rates are meant for
    size: float | None = None  # samples of a step by now
    batch_factor: float = 1.0  # what the batch size makes of the schedule's rate
    controller: float = 1.0  # the controller's factor
    limit: float = 0.0  # edge ratio per unit of rate that max_edge_ratio is held against; 0: not measured
    changed: int | None = None  # step at which a measurement changed the rate last
    read: int = -1  # step of the last measurement that was followed
    curve: CurvePoint = field(default_factory=CurvePoint)  # edge ratios per unit of rate


@dataclass(frozen=True)
class Decision:
    """What comes of a batch size or of a measurement."""

    state: RateState
    reason: str = ""  # for what changes, where something does
    comparable: bool = True  # False: the measurement is of batches that steps do not have


def highest_rate(state: RateState, settings: RateSettings) -> float:
    """The largest learning rate below the limit; infinite without one.

    Args:
        state: What is known.
        settings: What is wanted.

    Returns:
        The rate.

    Example:
        >>> highest_rate(RateState(limit=10.0), RateSettings(max_edge_ratio=1.2))
        0.12
    """
    return settings.max_edge_ratio / state.limit if settings.max_edge_ratio and state.limit else math.inf


def held(state: RateState, settings: RateSettings, rate: float) -> bool:
    """Whether the limit is what decides.

    Args:
        state: What is known.
        settings: What is wanted.
        rate: The schedule's own rate, the largest of its groups.

    Returns:
        Whether.

    Example:
        >>> held(RateState(limit=10.0), RateSettings(max_edge_ratio=1.0), 0.2)
        True
    """
    return highest_rate(state, settings) < state.batch_factor * state.controller * rate


def rate_scale(state: RateState, settings: RateSettings, rate: float) -> float:
    r"""The factor to the schedule's own rates.

    .. math:: \max\!\left(\min\!\left(f c,\; \eta_{\max} / \eta\right),\; f\, s_{\min}\right)

    with the factors f of the batch size and c of the controller and the smallest factor :math:`s_{\min}`.

    Args:
        state: What is known.
        settings: What is wanted.
        rate: The schedule's own rate :math:`\eta`, the largest of its groups.

    Returns:
        The factor.

    Example:
        >>> state, settings = RateState(batch_factor=2.0, limit=10.0), RateSettings(max_edge_ratio=1.0)
        >>> rate_scale(state, settings, 0.01), rate_scale(state, settings, 0.2)
        (2.0, 0.5)
    """
    factor = state.batch_factor * state.controller
    if held(state, settings, rate):
        factor = highest_rate(state, settings) / rate
    return max(factor, state.batch_factor * settings.min_scale)


def resized(state: RateState, size: float, rule: Rule, *, step: int, base: float | None = None) -> Decision:
    """What a batch size makes of the rate: by the rule, held back by what was measured of the threshold curve.

    The limit follows as the rate does, until the next measurement.

    Args:
        state: What was known so far.
        size: Samples of a step from now on.
        rule: ``"linear"`` or ``"sqrt"``.
        step: The step that comes.
        base: Samples of a step that the schedule's own rates are meant for; None: those of the first.

    Returns:
        The state from now on, with the reason for a change.

    Example:
        >>> decision = resized(RateState(base=32, size=32, limit=10.0), 64, "linear", step=100)
        >>> decision.state.batch_factor, decision.state.limit
        (2.0, 5.0)
        >>> decision.reason
        'a step has 64 samples in place of 32, linear rule'
    """
    base = state.base or base or size
    old = state.size or base
    state = replace(state, base=base, size=size)
    if size == old:
        return Decision(state)
    allowed = saturation(state.curve, old, size, step=step)
    by_rule = batch_factor(base, old, size, rule, old_factor=state.batch_factor)
    factor = batch_factor(base, old, size, rule, old_factor=state.batch_factor, saturating=allowed)
    reason = f"a step has {size} samples in place of {old}, {rule} rule"
    if factor < by_rule:
        reason += f" cut to what the measured threshold curve allows, {factor / by_rule:.3g} of it"
    limit = state.limit * state.batch_factor / factor
    return Decision(replace(state, batch_factor=factor, limit=limit), reason)


def restarted(state: RateState, base: float | None = None) -> RateState:
    """The state with the batch size taken back: another rule, or another base, starts from the schedule's own rate.

    Args:
        state: What was known so far.
        base: Samples of a step that the schedule's own rates are meant for; None: the same as before.

    Returns:
        The state; its size is that of no step.

    Example:
        >>> restarted(RateState(base=32, size=64, batch_factor=2.0, limit=5.0)).limit
        10.0
    """
    limit = state.limit * state.batch_factor
    return replace(state, base=base or state.base, size=None, batch_factor=1.0, limit=limit)


def followed(
    state: RateState, reading: Reading, settings: RateSettings, *, step: int, rate: float, taken: tuple[int, float]
) -> Decision:
    """What a measurement makes of the rate: of the limit (:func:`limit_rate`) and of the controller (:func:`steer`).

    It counts once, and for the very step that it was taken for. It changes nothing while the optimizer warms up, and
    where it is of batches that steps do not have; the threshold curve (:func:`saturation`) is remembered even then.

    Args:
        state: What was known so far.
        reading: The measurement.
        settings: What is wanted.
        step: The step at hand.
        rate: The schedule's own rate, the largest of its groups.
        taken: The last step that can have been measured, and the largest rate that it takes.

    Returns:
        The state from now on, the very same where nothing has been learned, with the reason for a change.

    Example:
        Twice beyond the edge, at a rate of .1, and then at rest:

        >>> ratio = Estimate(2.0, 0.0, 2.0, 2.0)
        >>> reading = Reading(7, 32, mini_batch=ratio, directional=ratio, full_batch=1.0, num_samples=1000)
        >>> settings = RateSettings(max_edge_ratio=1.0)
        >>> decision = followed(RateState(size=32), reading, settings, step=7, rate=0.1, taken=(7, 0.1))
        >>> highest_rate(decision.state, settings)
        0.05
        >>> followed(decision.state, reading, settings, step=7, rate=0.1, taken=(7, 0.05)).state == decision.state
        True
    """
    measured_step, measured_rate = taken
    if reading.step != measured_step or reading.step <= state.read or not measured_rate > 0:
        return Decision(state)
    state = replace(state, read=reading.step, curve=_remembered(state.curve, reading, measured_rate))
    unlimited = settings.max_edge_ratio is None and settings.target_edge_ratio is None
    if unlimited or step < (settings.warm_up or 0) or state.size is None:
        return Decision(state)
    if reading.batch_size not in (round(state.size), round(min(state.size, reading.num_samples))):
        return Decision(state, comparable=False)
    ratio = reading.directional if settings.judged_on == "directional" else reading.mini_batch
    cooling = state.changed is not None and step - state.changed < settings.cool_down
    limit, crossed = state.limit, []
    if settings.max_edge_ratio is not None:
        before, most = highest_rate(state, settings), 1.0 if cooling else settings.max_change
        highest = limit_rate(before, measured_rate, ratio, settings.max_edge_ratio, max_change=most)
        if highest != before:
            limit = settings.max_edge_ratio / highest
            crossed.append(f"max_edge_ratio={settings.max_edge_ratio}")
    planned = rate * state.batch_factor * state.controller  # the rate that comes, without the limit
    controller = steer(state.controller, scaled(ratio, planned / measured_rate), settings, cooling=cooling)
    if controller != state.controller:
        crossed.append(f"target_edge_ratio={settings.target_edge_ratio}")
    after = replace(state, limit=limit, controller=controller)
    if rate_scale(after, settings, rate) != rate_scale(state, settings, rate):
        after = replace(after, changed=step)
    reason = f"the {settings.judged_on} edge ratio was {ratio}, with {' and '.join(crossed)}"
    return Decision(after, reason if crossed else "")


def _remembered(curve: CurvePoint, reading: Reading, rate: float) -> CurvePoint:
    """The threshold curve with what was measured of it, in units of the rate."""
    if math.isfinite(reading.full_batch):
        curve = replace(curve, step=reading.step, full_batch=reading.full_batch / rate)
    if math.isfinite(reading.mini_batch.mean):
        sizes = {"batch_size": reading.batch_size, "num_samples": reading.num_samples}
        curve = replace(curve, step=reading.step, mini_batch=reading.mini_batch.mean / rate, **sizes)
    return curve


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
    if point.batch_size != old or step < point.step or math.isnan(point.mini_batch):
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


def steer(factor: float, ratio: Estimate, settings: RateSettings, *, cooling: bool = False) -> float:
    r"""One move of a controller that holds an edge ratio near its target.

    Above the dead band (by the mean) and below it (the mean below the band, the upper end below the target),

    .. math:: f' = f \cdot \min\!\left(\max\!\left(\frac{t}{\text{mean}}, \frac1c\right), \frac{t}{\text{lower}}\right)
        \qquad\text{and}\qquad f' = f \cdot \min\!\left(\frac{t}{\text{upper}}, c\right)

    with the target t and the largest change c, and else :math:`f' = f`. So no move is larger than c, but one: what is
    *surely* above the target goes at once. Steps beyond the edge grow from one to the next, and by the time that small
    moves had arrived there would be nothing left to save.

    Args:
        factor: The factor f so far.
        ratio: The edge ratio that this factor leads to.
        settings: The target t, the dead band, the largest change c of one move, and the bounds of the factor.
        cooling: Whether a change has hardly had its effect yet: only what is surely above the dead band counts.

    Returns:
        The factor from now on; the same without a target.

    Example:
        >>> settings = RateSettings(target_edge_ratio=1.0, dead_band=0.15, max_change=1.25, min_scale=0.01)
        >>> steer(1.0, Estimate(2.0, 0.6, 0.8, 3.2), settings)
        0.8
        >>> steer(1.0, Estimate(4.5, 0.25, 4.0, 5.0), settings)  # surely four times too high
        0.25
        >>> steer(1.0, Estimate(1.125, 0.1, 1.0, 1.25), settings)  # in the dead band
        1.0
        >>> steer(0.5, Estimate(0.75, 0.1, 0.5, 1.0), settings)  # may be at the target
        0.5
        >>> steer(0.5, Estimate(0.25, 0.1, 0.2, 0.3), settings)
        0.625
    """
    target, band = settings.target_edge_ratio, settings.dead_band
    if target is None or not math.isfinite(ratio.mean) or (cooling and not ratio.lower > target * (1 + band)):
        return factor
    if ratio.mean > target * (1 + band):
        change = max(target / ratio.mean, 1 / settings.max_change)
        if ratio.lower > target:
            change = min(change, target / ratio.lower)
        return min(factor, max(factor * change, settings.min_scale))
    if ratio.mean < target * (1 - band) and ratio.upper < target:
        change = min(target / ratio.upper, settings.max_change) if ratio.upper > 0 else settings.max_change
        return max(factor, min(factor * change, settings.max_scale))
    return factor
