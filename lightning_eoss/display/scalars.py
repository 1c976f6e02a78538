"""A measurement as flat floats under their tags, and in words what it does not show.

Each function names the numbers of a result; `finite` makes flat floats of them, with the intervals that the table of
tags says there are.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_eoss.display import tags
from lightning_eoss.measurements.gradient_noise import GradientNoise
from lightning_eoss.measurements.prediction import SharpnessPrediction
from lightning_eoss.measurements.sharpness import SharpnessMeasurement
from lightning_eoss.measurements.spectrum import Spectra
from lightning_eoss.theory.control import Reading
from lightning_eoss.theory.stability import NoLimits, StabilityLimits, edge_ratio, eps_share
from lightning_eoss.theory.statistics import Estimate, exact, scaled, shifted

Numbers = dict[str, float | Estimate | None]  # by tag; None where nothing was measured
_ENTRIES = 2**20  # of a preconditioner that medians and histograms are made of, at most


def finite(values: Mapping[str, float | Estimate | None]) -> dict[str, float]:
    """Flat floats: what can be drawn, an estimate with both ends of its interval or neither."""
    flat: dict[str, float | None] = {}
    for tag, value in values.items():
        flat[tag] = value.mean if isinstance(value, Estimate) else value
        if isinstance(value, Estimate) and tag in tags.WITH_INTERVAL and math.isfinite(value.upper - value.lower):
            flat |= zip(tags.interval(tag), (value.lower, value.upper), strict=True)
    return {tag: float(value) for tag, value in flat.items() if value is not None and math.isfinite(value)}


# ---- sharpness -------------------------------------------------------------------------------------------------------


def scalars(
    measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool
) -> dict[str, float]:
    """Those of a measurement at the optimizer's limits of that step, in units of which it may have been made."""
    costs: Numbers = {
        tags.COST_SECONDS: measurement.seconds,
        tags.COST_HVPS: measurement.hvps,
        tags.COST_RESIDUAL: measurement.residual,
        tags.COST_AUDIT: measurement.audit,
        tags.COST_MEMORY: measurement.memory,
        tags.COST_SAMPLES: measurement.num_samples or None,
        tags.BATCH_SIZE: measurement.batch_size if measurement.mini_batch.values else None,
    }
    values = finite(costs)
    if not in_limits:
        values |= _sharpness(measurement, limits)
    if isinstance(limits, StabilityLimits):
        ratios = _ratios(measurement, limits, in_limits=in_limits)
        if drawn := finite(dict(zip(tags.RATIOS.values(), ratios, strict=True))):
            values |= {**drawn, tags.EDGE: 1.0}
        values |= finite(_preconditioner(limits))
    return values


def raw_scalars(raw: SharpnessMeasurement, beside: dict[str, float]) -> dict[str, float]:
    """The sharpness itself, beside the scalars of a measurement in units of the limits, and what both cost together."""
    costs = {tags.COST_SECONDS: raw.seconds, tags.COST_HVPS: raw.hvps}
    return _sharpness(raw, NoLimits("")) | {tag: beside[tag] + cost for tag, cost in costs.items()}


def _sharpness(measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits) -> dict[str, float]:
    """Sharpness in the units of the Hessian, with the thresholds where anything stands beside them."""
    sharpness: Numbers = {
        tags.MINI_BS: measurement.mini_batch,
        tags.DIRECTIONAL: measurement.directional,
        tags.GAP: measurement.gap,
        tags.FULL_BS: measurement.full_batch.value,
        tags.CURRENT_BATCH: measurement.current_batch.value,
    }
    values = finite(sharpness)
    if values and isinstance(limits, StabilityLimits):
        lines = (limits.threshold, limits.threshold_small_batch)
        values |= finite(dict(zip((tags.THRESHOLD, tags.THRESHOLD_SMALL_BATCH), lines, strict=True)))
    return values


def _preconditioner(limits: StabilityLimits) -> dict[str, float]:
    """Range and median of an adaptive optimizer's implied curvature, and how much of it eps outweighs."""
    if not limits.preconditioners:
        return {}
    return {
        tags.PRECONDITIONER_SMALLEST: min(float(each.min()) for each in limits.preconditioners),
        tags.PRECONDITIONER_MEDIAN: float(preconditioner_entries(limits).median()),
        tags.PRECONDITIONER_LARGEST: max(float(each.max()) for each in limits.preconditioners),
        tags.EPS_SHARE: eps_share(limits),
    }


def preconditioner_entries(limits: StabilityLimits) -> Tensor:
    """All entries, or evenly spaced ones of very many."""
    stride = 1 + sum(each.numel() for each in limits.preconditioners) // _ENTRIES
    return torch.cat([each.detach().reshape(-1)[::stride].float() for each in limits.preconditioners])


def reading(
    measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool, step: int
) -> Reading | None:
    """A measurement as edge ratios, if there are limits; the phase is judged on FullBS's where one batch is all."""
    if isinstance(limits, NoLimits):
        return None
    mini, directional, full = _ratios(measurement, limits, in_limits=in_limits)
    if measurement.mini_batch.stderr == 0 and math.isfinite(full.mean):
        directional = full
    return Reading(step, measurement.batch_size, mini, directional, full.mean, measurement.num_samples)


def _ratios(measurement: SharpnessMeasurement, limits: StabilityLimits, *, in_limits: bool) -> list[Estimate]:
    """MiniBS, directional sharpness and FullBS as edge ratios, (sharpness + W) / D."""
    full = measurement.full_batch.value
    found = [measurement.mini_batch, measurement.directional, exact(full)]
    if in_limits:
        return found
    offset = edge_ratio(0.0, limits)
    return [shifted(scaled(each, edge_ratio(1.0, limits) - offset), -offset) for each in found]


def notes(measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool) -> list[str]:
    """What a measurement does not show, and why; the same sentences for the same reasons."""
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


# ---- other measurements ----------------------------------------------------------------------------------------------


def prediction_scalars(prediction: SharpnessPrediction) -> dict[str, float]:
    """Those of a prediction at its first batch size, with a flag for each model: whether to trust it."""
    models = {
        tags.PREDICTION_SUBSPACE: prediction.subspace[0],
        tags.PREDICTION_WIGNER: prediction.wigner[0],
        tags.PREDICTION_MARCHENKO_PASTUR: prediction.marchenko_pastur[0],
    }
    values: Numbers = {
        tags.PREDICTION_OVERLAP: prediction.overlap[0],
        tags.PREDICTION_VARIANCE: prediction.variance,
        tags.PREDICTION_RANK: prediction.rank,
        tags.PREDICTION_CRITICAL_BATCH_SIZE: prediction.critical_batch_size,
    }
    for tag, model in models.items():
        values |= {tag: model.estimate, tags.trusted(tag): model.trusted}
    return finite(values)


def spectrum_scalars(spectra: Spectra) -> dict[str, float]:
    """Those of both spectra."""
    full, batch = spectra.full, spectra.batch
    values: Numbers = {
        tags.SPECTRUM_TRACE: full.trace,
        tags.SPECTRUM_RANK: _clipped(full.rank(), full.dim),
        tags.SPECTRUM_ZEROS: _clipped(full.mass_at_origin(), 1),
        tags.SPECTRUM_NEGATIVE: _clipped(full.negative_mass(), 1),
        tags.SPECTRUM_BATCH_NEGATIVE: _clipped(batch.negative_mass(), 1),
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
    """Those of the gradient's noise."""
    values: Numbers = {
        tags.NOISE_TRACE: noise.trace,
        tags.NOISE_PREDICTED: noise.predicted,
        tags.NOISE_MEASURED: noise.measured,
        tags.NOISE_SCALE: noise.scale,
        tags.NOISE_CURVATURE_SCALE: noise.curvature_scale,
        tags.NOISE_NORM: noise.norm_squared,
        tags.NOISE_COSINE: noise.cosine,
        tags.NOISE_SECONDS: noise.seconds,
    }
    return finite(values)
