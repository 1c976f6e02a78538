"""The whole spectrum: of the full batch and of one mini-batch, at the same weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, full_batch, random_batches
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, curvature_of
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import HESSIAN, Curvature, Operator
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.seeds import derived_seed
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.linalg.density import SpectralDensity, random_probes, spectral_density
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
    loss_fn: Callable[[nn.Module, Any], Tensor],
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
    checks.settings(full_batch_samples=full_batch_samples, seed=seed)
    check_spectrum(steps, num_probes, augmented_passes)
    with standalone(model, loss_fn, dataset, collate_fn, batch_size=batch_size, seed=seed) as (objective, findings):
        plan = Plan(batch_size, full_batch_samples=full_batch_samples, seed=seed, memory_bytes=objective.cache.limit)
        curvature = curvature_of(operator, outputs_fn, objective, batch_size)
        given: dict[str, Any] = {"steps": steps, "num_probes": num_probes, "augmented_passes": augmented_passes}
        return spectra(objective, plan, findings, curvature=curvature, **given)


def check_spectrum(steps: int, num_probes: int, augmented_passes: int) -> None:
    """Refuses settings of the wrong kind and out of range.

    Args:
        steps: Nodes of each quadrature.
        num_probes: Random probes.
        augmented_passes: Passes over the data.
    """
    for name, value in (("steps", steps), ("num_probes", num_probes), ("augmented_passes", augmented_passes)):
        checks.whole(name, value, 1, "must be at least 1: nothing would be measured.")


def spectra(
    objective: Objective,
    plan: Plan,
    findings: Findings,
    *,
    steps: int,
    num_probes: int,
    augmented_passes: int = 1,
    stream: int = 0,
    curvature: Curvature = HESSIAN,
) -> Spectra:
    """Measures both densities at the module's present parameters.

    Args:
        objective: The loss, its parameters, its samples.
        plan: Sizes.
        findings: What `preflight` found about the loss.
        steps: Nodes of each probe's quadrature; fewer where memory does not hold as many vectors.
        num_probes: Random probes.
        augmented_passes: Passes over the data, each with its own random numbers.
        stream: Number of this measurement; with the plan's seed it fixes all random numbers.
        curvature: The Hessian or the Gauss-Newton matrix.

    Returns:
        The densities.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(derived_seed(plan.seed, 9, stream))
    solver = Solver(objective, plan, findings, generator, curvature=curvature)
    chunks: Batch = ()
    for number in range(augmented_passes):
        once = full_batch(objective.source, solver.chunk_size, max_samples=plan.full_batch_samples, seed=plan.seed)
        chunks += tuple(
            replace(part, weight=part.weight / augmented_passes, seed=derived_seed(part.seed, number)) for part in once
        )
    seed = derived_seed(plan.seed, 10, stream)
    batch = next(random_batches(objective.source, plan.batch_size, parts=plan.parts, seed=seed))
    full, one = (_density(solver, solver.operator([each]), steps, num_probes) for each in (chunks, batch))
    variance = UNKNOWN
    if findings.reduction == "mean" and objective.source.num_samples > 1:
        variance = hessian_variance(solver, num_batches=min(16, objective.source.num_samples), stream=stream)
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
    probes = random_probes(num_probes, solver.objective.num_parameters, solver.generator, like=solver.like)
    return spectral_density(operator.matvec, probes, steps=steps, at_once=1)
