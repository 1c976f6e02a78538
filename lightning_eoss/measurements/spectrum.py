"""The whole spectrum: of the full batch and of one mini-batch, at the same weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, random_batches
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn
from lightning_eoss.curvature.operators import Operator
from lightning_eoss.curvature.seeds import Use, derived_seed
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.linalg.density import SpectralDensity, spectral_density
from lightning_eoss.measurements.standalone import standalone
from lightning_eoss.measurements.variance import hessian_variance
from lightning_eoss.theory.statistics import UNKNOWN, Estimate


@dataclass(frozen=True)
class Spectra:
    """Spectral densities at one point of training, by stochastic Lanczos quadrature."""

    full: SpectralDensity = field(repr=False)  # of the full batch
    batch: SpectralDensity = field(repr=False)  # of one random mini-batch
    variance: Estimate  # P sigma^2 between samples; NaN where the loss is no mean over them
    batch_size: int  # samples of the mini-batch
    num_samples: int  # samples of the full batch
    hvps: float  # all products, in passes over the full batch
    seconds: float


def measure_spectra(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    dataset: Any,
    *,
    batch_size: int,
    steps: int = 60,
    num_probes: int = 4,
    augmented_passes: int = 1,
    full_batch_samples: int | None = 8192,
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    operator: Kind = "hessian",
    outputs_fn: OutputsFn | None = None,
) -> Spectra:
    r"""Measures the spectral density of the full batch's Hessian and of one mini-batch's, without a Trainer.

    .. math:: \mu(x) = \frac1P \sum_i \delta(x - \lambda_i) \approx \frac1B \sum_b \sum_j w_{bj} \delta(x - \theta_{bj})

    Cost: `num_probes` times `steps` passes over the data, times `augmented_passes`, and as many products with the
    mini-batch.

    Args:
        model: The module, in the mode (train or eval) in which its loss is meant.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        dataset: A map-style data set or a sequence of samples.
        batch_size: Samples of the mini-batch, and of the chunks of the full batch where its loss is no sample mean.
        steps: Nodes of each probe's quadrature.
        num_probes: Random probes; one gives no intervals.
        augmented_passes: How often each sample is loaded anew, with other random numbers. Data sets that augment at
            random then give the "true" Hessian, that of the augmented distribution.
        full_batch_samples: The full batch is a fixed random subset of this size; None: all samples.
        seed: Fixes all random numbers.
        collate_fn: As a DataLoader's.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix in its place.
        outputs_fn: For ``"ggn"``, see :func:`~lightning_eoss.measurements.sharpness.measure_sharpness`.

    Returns:
        The densities.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        Least squares on x = 1 and 3: the Hessian of one parameter is 5 for both, and 1 or 9 for one of them.

        >>> data = [(torch.tensor([x]), torch.tensor([0.0])) for x in (1.0, 3.0)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2
        >>> spectra = measure_spectra(nn.Linear(1, 1, bias=False), loss, data, batch_size=1)
        >>> round(spectra.full.trace.mean, 4), round(spectra.batch.trace.mean, 4) in (1.0, 9.0)
        (5.0, True)

    Source: Granziol, Zohren and Roberts, sections 7 and 12, appendices D and E.
    """
    checks.arguments(seed=seed, full_batch_samples=full_batch_samples, steps=steps)
    checks.arguments(num_probes=num_probes, augmented_passes=augmented_passes)
    plan = Plan(batch_size, full_batch_samples=full_batch_samples, seed=seed)
    given: dict[str, Any] = {"collate_fn": collate_fn, "operator": operator, "outputs_fn": outputs_fn}
    with standalone(model, loss_fn, dataset, plan, **given) as solver:
        return spectra(solver, steps=steps, num_probes=num_probes, augmented_passes=augmented_passes)


def spectra(solver: Solver, *, steps: int, num_probes: int, augmented_passes: int = 1) -> Spectra:
    """Measures both densities at the module's present parameters; with fewer nodes where memory does not hold them."""
    began, solver = time.perf_counter(), solver.drawing(Use.SPECTRUM)
    source, plan, once = solver.objective.source, solver.plan, solver.full_batch()
    chunks: Batch = tuple(
        replace(part, weight=part.weight / augmented_passes, seed=derived_seed(part.seed, number))
        for number in range(augmented_passes)
        for part in once
    )
    batch = next(random_batches(source, plan.batch_size, parts=plan.parts, seed=solver.seed(Use.SPECTRUM_BATCH)))
    full, one = (_density(solver, solver.operator([each]), steps, num_probes) for each in (chunks, batch))
    variance = UNKNOWN
    if solver.findings.reduction == "mean" and source.num_samples > 1:
        variance = hessian_variance(solver, num_batches=min(16, source.num_samples))
    samples = sum(part.size for part in chunks)
    return Spectra(
        full=full,
        batch=one,
        variance=variance,
        batch_size=solver.step_samples,
        num_samples=samples // augmented_passes,
        hvps=(full.matvecs * samples + one.matvecs * solver.step_samples) * augmented_passes / samples,
        seconds=time.perf_counter() - began,
    )


def _density(solver: Solver, operator: Operator, steps: int, num_probes: int) -> SpectralDensity:
    """The density of a one-row operator, one probe after another: their bases would not fit together."""
    steps = min(steps, max(30, int(solver.plan.memory_bytes / solver.vector_bytes)))
    return spectral_density(operator.matvec, solver.probes(num_probes), steps=steps, at_once=1)
