"""A measurement as flat floats under their tags."""

import math

from lightning_eoss.curvature.measure import SharpnessMeasurement
from lightning_eoss.display import dashboard as tags
from lightning_eoss.theory.stability import NoLimits, StabilityLimits
from lightning_eoss.theory.statistics import Estimate, scaled, shifted


def scalars(
    measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool
) -> dict[str, float]:
    """The flat floats of one measurement under their tags, NaN where something was not measured.

    Args:
        measurement: What was measured.
        limits: The optimizer's limits at that step.
        in_limits: Whether it was measured in units of them.

    Returns:
        Tag to value.
    """
    values: dict[str, float] = {
        tags.BATCH_SIZE: measurement.batch_size if measurement.mini_batch.values else math.nan,
        tags.COST_SECONDS: measurement.seconds,
        tags.COST_HVPS: measurement.hvps,
        tags.COST_RESIDUAL: measurement.residual,
        tags.COST_AUDIT: measurement.audit,
    }
    full = measurement.full_batch.value
    if not in_limits:
        values |= _with_interval(tags.MINI_BS, measurement.mini_batch)
        values |= _with_interval(tags.DIRECTIONAL, measurement.directional)
        values |= _with_interval(tags.GAP, measurement.gap)
        values |= {tags.FULL_BS: full, tags.CURRENT_BATCH: measurement.current_batch.value}
    if isinstance(limits, NoLimits):
        return values
    mini, directional, exact = measurement.mini_batch, measurement.directional, Estimate(full, 0.0, full, full)
    if not in_limits:
        mini, directional, exact = (in_units_of(each, limits) for each in (mini, directional, exact))
        values[tags.THRESHOLD] = limits.threshold if limits.threshold is not None else math.nan
    values |= _with_interval(tags.EDGE_RATIO, mini)
    values |= {tags.EDGE_RATIO_FULL_BS: exact.mean, tags.EDGE_RATIO_DIRECTIONAL: directional.mean, tags.EDGE: 1.0}
    return values


def in_units_of(estimate: Estimate, limits: StabilityLimits) -> Estimate:
    """A sharpness as an edge ratio, (sharpness + W) / D, where both are the same for all parameters.

    Args:
        estimate: A sharpness with its interval.
        limits: Limits with a threshold.

    Returns:
        The edge ratio with its interval.
    """
    assert limits.scalar is not None
    limit, decay = limits.scalar
    return scaled(shifted(estimate, -decay), 1 / limit)


def _with_interval(tag: str, estimate: Estimate) -> dict[str, float]:
    """An estimate under its three tags; the bounds of a margin chart are there both or not at all."""
    lower, upper = tags.interval(tag)
    return {tag: estimate.mean, lower: estimate.lower, upper: estimate.upper}


def phase_point(
    measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool
) -> Estimate | None:
    """What the phase is judged on: the directional edge ratio, or FullBS's where one batch is all there is.

    Args:
        measurement: What was measured.
        limits: The optimizer's limits at that step.
        in_limits: Whether it was measured in units of them.

    Returns:
        An edge ratio; None where it was not measured or has no limits.
    """
    estimate, full = measurement.directional, measurement.full_batch.value
    if measurement.mini_batch.stderr == 0 and math.isfinite(full):
        estimate = Estimate(full, 0.0, full, full)
    if isinstance(limits, NoLimits) or not math.isfinite(estimate.mean):
        return None
    return estimate if in_limits else in_units_of(estimate, limits)
