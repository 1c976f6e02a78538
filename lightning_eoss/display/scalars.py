"""A measurement as flat floats under their tags."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_eoss.display import tags
from lightning_eoss.measurements.prediction import SharpnessPrediction
from lightning_eoss.measurements.sharpness import SharpnessMeasurement
from lightning_eoss.measurements.spectrum import Spectra
from lightning_eoss.theory.control import Reading
from lightning_eoss.theory.stability import NoLimits, StabilityLimits, edge_ratio
from lightning_eoss.theory.statistics import Estimate, scaled, shifted

if TYPE_CHECKING:
    pass
import torch
from torch import Tensor

from lightning_eoss.measurements.gradient_noise import GradientNoise
from lightning_eoss.theory.stability import eps_share


def scalars(
    measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool
) -> dict[str, float]:
    """The flat floats of one measurement under their tags; what was not measured is not there.

    Args:
        measurement: What was measured.
        limits: The optimizer's limits at that step.
        in_limits: Whether it was measured in units of them.

    Returns:
        Tag to value, all finite.
    """
    values = {
        tags.COST_SECONDS: measurement.seconds,
        tags.COST_HVPS: measurement.hvps,
        tags.COST_RESIDUAL: measurement.residual,
        tags.COST_AUDIT: measurement.audit,
        tags.COST_MEMORY: measurement.memory,
        tags.COST_SAMPLES: measurement.num_samples or math.nan,
    }
    if measurement.mini_batch.values:
        values[tags.BATCH_SIZE] = measurement.batch_size
    if not in_limits:
        values |= _sharpness(measurement, limits)
    if isinstance(limits, StabilityLimits):
        values |= _edge_ratios(measurement, limits, in_limits=in_limits)
        values |= preconditioner_scalars(limits)
    return finite(values)


def raw_scalars(raw: SharpnessMeasurement, beside: dict[str, float]) -> dict[str, float]:
    """The sharpness itself, beside a measurement in units of the limits, and what both cost together.

    Args:
        raw: What was measured in the units of the Hessian.
        beside: The scalars of the other measurement.

    Returns:
        Tag to value, all finite.
    """
    costs = {tags.COST_SECONDS: raw.seconds, tags.COST_HVPS: raw.hvps}
    return {**_sharpness(raw, NoLimits("")), **{tag: beside[tag] + cost for tag, cost in costs.items()}}


def prediction_scalars(prediction: SharpnessPrediction) -> dict[str, float]:
    """The flat floats of a prediction at one batch size under their tags; what is undefined is not there.

    Args:
        prediction: What was predicted; its first batch size counts.

    Returns:
        Tag to value, all finite.
    """
    models = {
        tags.PREDICTION_SUBSPACE: prediction.subspace[0],
        tags.PREDICTION_WIGNER: prediction.wigner[0],
        tags.PREDICTION_MARCHENKO_PASTUR: prediction.marchenko_pastur[0],
    }
    values = {
        tags.PREDICTION_OVERLAP: prediction.overlap[0],
        **with_interval(tags.PREDICTION_VARIANCE, prediction.variance),
        **with_interval(tags.PREDICTION_RANK, prediction.rank),
        **with_interval(tags.PREDICTION_CRITICAL_BATCH_SIZE, prediction.critical_batch_size),
    }
    for tag, model in models.items():
        values |= {**with_interval(tag, model.estimate), tags.trusted(tag): float(model.trusted)}
    return finite(values)


def _sharpness(measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits) -> dict[str, float]:
    """Sharpness in the units of the Hessian, with the threshold where anything stands beside it."""
    values = finite(
        {
            **with_interval(tags.MINI_BS, measurement.mini_batch),
            **with_interval(tags.DIRECTIONAL, measurement.directional),
            **with_interval(tags.GAP, measurement.gap),
            tags.FULL_BS: measurement.full_batch.value,
            tags.CURRENT_BATCH: measurement.current_batch.value,
        }
    )
    if values and isinstance(limits, StabilityLimits) and limits.threshold is not None:
        values[tags.THRESHOLD] = limits.threshold
        if limits.threshold_small_batch is not None:
            values[tags.THRESHOLD_SMALL_BATCH] = limits.threshold_small_batch
    return values


def _edge_ratios(measurement: SharpnessMeasurement, limits: StabilityLimits, *, in_limits: bool) -> dict[str, float]:
    """Sharpness in units of the limits, with the constant 1 where anything stands beside it."""
    mini, directional, exact = _ratios(measurement, limits, in_limits=in_limits)
    values = finite(
        {
            **with_interval(tags.EDGE_RATIO, mini),
            tags.EDGE_RATIO_FULL_BS: exact.mean,
            tags.EDGE_RATIO_DIRECTIONAL: directional.mean,
        }
    )
    return {**values, tags.EDGE: 1.0} if values else {}


def finite(values: dict[str, float]) -> dict[str, float]:
    """Leaves out what cannot be drawn.

    Args:
        values: Tag to value.

    Returns:
        Those that are finite, as floats.
    """
    return {tag: float(value) for tag, value in values.items() if math.isfinite(value)}


def in_units_of(estimate: Estimate, limits: StabilityLimits) -> Estimate:
    """A sharpness as an edge ratio, (sharpness + W) / D, where both are the same for all parameters.

    Args:
        estimate: A sharpness with its interval.
        limits: Limits with a threshold.

    Returns:
        The edge ratio with its interval.
    """
    unit = edge_ratio(1.0, limits) - edge_ratio(0.0, limits)
    return shifted(scaled(estimate, unit), -edge_ratio(0.0, limits))


def with_interval(tag: str, estimate: Estimate) -> dict[str, float]:
    """An estimate under its three tags; the bounds of a margin chart are there both or not at all.

    Args:
        tag: One of `dashboard.WITH_INTERVAL`.
        estimate: What stands under it.

    Returns:
        Tag to value.
    """
    if not math.isfinite(estimate.upper - estimate.lower):
        return {tag: estimate.mean}
    lower, upper = tags.interval(tag)
    return {tag: estimate.mean, lower: estimate.lower, upper: estimate.upper}


def reading(
    measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool, step: int
) -> Reading | None:
    """A measurement as edge ratios; directional is what the phase is judged on: FullBS's where one batch is all.

    Args:
        measurement: What was measured.
        limits: The optimizer's limits at that step.
        in_limits: Whether it was measured in units of them.
        step: Optimizer steps taken before.

    Returns:
        The reading; None where there are no limits.
    """
    if isinstance(limits, NoLimits):
        return None
    full = measurement.full_batch.value
    mini, directional, exact = _ratios(measurement, limits, in_limits=in_limits)
    if measurement.mini_batch.stderr == 0 and math.isfinite(full):
        directional = exact
    return Reading(step, measurement.batch_size, mini, directional, exact.mean, measurement.num_samples)


def _ratios(measurement: SharpnessMeasurement, limits: StabilityLimits, *, in_limits: bool) -> list[Estimate]:
    """MiniBS, directional sharpness and FullBS in units of the limits."""
    full = measurement.full_batch.value
    ratios = [measurement.mini_batch, measurement.directional, Estimate(full, 0.0, full, full)]
    return ratios if in_limits else [in_units_of(each, limits) for each in ratios]


def spectrum_scalars(spectra: Spectra) -> dict[str, float]:
    """The flat floats of a measurement of both spectra under their tags; what is undefined is not there.

    Args:
        spectra: What was measured.

    Returns:
        Tag to value, all finite.
    """
    full, batch = spectra.full, spectra.batch
    values = {
        **with_interval(tags.SPECTRUM_TRACE, full.trace),
        **with_interval(tags.SPECTRUM_RANK, _clipped(full.rank(), full.dim)),
        **with_interval(tags.SPECTRUM_ZEROS, _clipped(full.mass_at_origin(), 1)),
        **with_interval(tags.SPECTRUM_NEGATIVE, _clipped(full.negative_mass(), 1)),
        **with_interval(tags.SPECTRUM_BATCH_NEGATIVE, _clipped(batch.negative_mass(), 1)),
        tags.SPECTRUM_LARGEST: float(full.nodes.max()),
        tags.SPECTRUM_SMALLEST: float(full.nodes.min()),
        tags.SPECTRUM_BATCH_LARGEST: float(batch.nodes.max()),
        tags.SPECTRUM_BATCH_SMALLEST: float(batch.nodes.min()),
        tags.SPECTRUM_SECONDS: spectra.seconds,
    }
    return finite(values)


def _clipped(estimate: Estimate, most: float) -> Estimate:
    """The interval within what is possible."""
    return replace(estimate, lower=max(estimate.lower, 0.0), upper=min(estimate.upper, float(most)))


def noise_scalars(noise: GradientNoise) -> dict[str, float]:
    """The flat floats of a measurement under their tags; what is undefined is not there.

    Args:
        noise: What was measured.

    Returns:
        Tag to value, all finite.
    """
    return finite(
        {
            **with_interval(tags.NOISE_TRACE, noise.trace),
            **with_interval(tags.NOISE_PREDICTED, noise.predicted),
            **with_interval(tags.NOISE_MEASURED, noise.measured),
            **with_interval(tags.NOISE_SCALE, noise.scale),
            **with_interval(tags.NOISE_CURVATURE_SCALE, noise.curvature_scale),
            tags.NOISE_NORM: noise.norm_squared.mean,
            tags.NOISE_COSINE: noise.cosine,
            tags.NOISE_SECONDS: noise.seconds,
        }
    )


_ENTRIES = 2**20  # of a preconditioner that medians and histograms are made of, at most


def preconditioner_scalars(limits: StabilityLimits) -> dict[str, float]:
    """Its range, its median, and how much of it eps outweighs.

    Args:
        limits: The optimizer's limits; without preconditioners there is nothing to say.

    Returns:
        Tag to value.
    """
    if not limits.preconditioners:
        return {}
    return {
        tags.PRECONDITIONER_SMALLEST: min(float(each.min()) for each in limits.preconditioners),
        tags.PRECONDITIONER_MEDIAN: float(_entries(limits).median()),
        tags.PRECONDITIONER_LARGEST: max(float(each.max()) for each in limits.preconditioners),
        tags.EPS_SHARE: eps_share(limits),
    }


def _entries(limits: StabilityLimits) -> Tensor:
    """All entries, or evenly spaced ones of very many."""
    stride = 1 + sum(each.numel() for each in limits.preconditioners) // _ENTRIES
    return torch.cat([each.detach().reshape(-1)[::stride].float() for each in limits.preconditioners])


def notes(measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool) -> list[str]:
    """Says what a measurement does not show.

    Args:
        measurement: What was measured.
        limits: The optimizer's limits at that step.
        in_limits: Whether it was measured in units of them.

    Returns:
        Sentences, the same ones for the same reasons.
    """
    found = []
    if isinstance(limits, NoLimits):
        found.append(f"no threshold, edge ratio or phase is shown: {limits.reason}.")
    elif in_limits:
        found.append(
            "the stability limits differ between parameters, so edge ratios and predictions are in units of them; "
            "a threshold, which would be in other units, is not shown, nor is the sharpness itself without raw=True."
        )
    doubt = measurement.doubt
    singular = doubt is not None and not (doubt.differences or doubt.detached)
    what = "the second derivative of the loss" if singular else "the loss"
    if measurement.dropped and not measurement.mini_batch.values:  # often the first sign of divergence
        found.append(f"{what} is not finite: nothing is shown while that is so, and training goes on.")
    elif measurement.dropped:
        found.append(
            f"{what} of some mini-batches is not finite; MiniBS is the mean over the others, and the sharpest may be "
            "missing from it."
        )
    return found
