"""MiniBS predicted from the full batch: by the theorems on random matrices, and by a subspace that real networks need.

Predicting costs more than measuring MiniBS at one batch size. What it buys is the whole curve over batch sizes, the
batch size from which larger ones hardly help, and a test of the theory.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import full_batch
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, curvature_of
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import HESSIAN, Curvature, Operator, Scaling
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.seeds import derived_seed
from lightning_eoss.curvature.solver import NUM_OUTLIERS, Eigenvalue, Plan, Solver, WarmStart, top_eigenvalue
from lightning_eoss.linalg.density import SpectralDensity, random_probes, spectral_density
from lightning_eoss.linalg.lanczos import Matvec, lanczos
from lightning_eoss.measurements.standalone import standalone
from lightning_eoss.measurements.subspace import beyond, outlier_subspace
from lightning_eoss.measurements.variance import hessian_variance
from lightning_eoss.theory.outlier_subspace import OutlierSubspace, predict_from_subspace
from lightning_eoss.theory.random_matrix import (
    eigenvector_overlap,
    fit_batch_size_curve,
    marchenko_pastur_outlier,
    wigner_edge,
    wigner_outlier,
)
from lightning_eoss.theory.statistics import UNKNOWN, Estimate, scaled, shifted

DENSITY_STEPS, DENSITY_PROBES = 24, 3  # of the bulk, for its trace and rank
VARIANCE_PROBES, VARIANCE_GROUPS = 10, 16
_ALIKE = 1.5  # times, up to which a model's fluctuation along the top eigenvector counts as the measured one
_ROOM = 0.05  # by which a theorem may miss the subspace's interval, relative
_CURVE = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # batch sizes relative to the middle one, that the curve goes through


@dataclass(frozen=True)
class Prediction:
    """MiniBS by one model, at one batch size."""

    estimate: Estimate  # NaN where undefined
    trusted: bool


@dataclass(frozen=True)
class SharpnessPrediction:
    """What was predicted at one point of training; tuples are over `batch_sizes`."""

    batch_sizes: tuple[int, ...]
    full_batch: Eigenvalue  # FullBS, that all starts from
    wigner: tuple[Prediction, ...]  # Theorem 4, from `variance`
    marchenko_pastur: tuple[Prediction, ...]  # Theorem 7, corrected, from `bulk`
    subspace: tuple[Prediction, ...]
    overlap: tuple[float, ...]  # Theorem 10: squared cosine between a batch's top eigenvector and the full batch's
    variance: Estimate  # P sigma^2 = (1/P) E|H_i - H|_F^2
    directional_variance: float  # sum over k >= 2 of c_k^2: the same along the top eigenvector, which is what counts
    bulk: Estimate  # mean of the eigenvalues that are no outliers
    rank: Estimate  # of the full batch's Hessian, at least: small eigenvalues pass for zeros
    critical_batch_size: Estimate  # where MiniBS is twice FullBS; larger batches hardly allow a larger learning rate
    num_parameters: int
    num_samples: int  # that batches are drawn from
    hvps: float  # all products, in passes over `num_samples`
    seconds: float


class Unpredictable(ValueError):
    """The loss is no mean over samples, so the full batch says nothing about batches."""


def predict_sharpness(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataset: Any,
    *,
    batch_sizes: Sequence[int],
    num_groups: int | None = None,
    num_outliers: int = NUM_OUTLIERS,
    full_batch_samples: int | None = 8192,
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    operator: Kind = "hessian",
    outputs_fn: OutputsFn | None = None,
) -> SharpnessPrediction:
    r"""Predicts MiniBS at any batch sizes from the full batch and single samples, without leaving a trace on the model.

    Three models, each with an interval and a flag that says whether to trust it: the spiked Wigner matrix (Theorem 4),
    the Marchenko-Pastur law (Theorem 7, corrected) and the outlier subspace. The first two are trusted where the
    fluctuation along the top eigenvector that they assume is within a factor of 1.5 of the measured one and their value
    lies in the subspace's interval or within 5 % of it. On networks that fluctuation is some twenty times larger than
    homogeneous noise has it, and only the subspace comes close.

    Cost: some 40 passes for ten eigenvectors, 72 for rank and bulk, 4 for the tail, and 11 products with each single
    sample (11 passes); the same for any number of batch sizes. To measure MiniBS at one batch size b costs about
    200 b / N.

    Args:
        model: The module, in the mode in which its loss is meant.
        loss_fn: ``loss_fn(model, batch) -> scalar``, a mean over the samples of the batch.
        dataset: A map-style data set or a sequence of samples.
        batch_sizes: Samples b, any number of them.
        num_groups: Single samples that the subspace is built from; None: all.
        num_outliers: Dimensions k of the subspace.
        full_batch_samples: The full batch is a fixed random subset of this size, and its luck is in the intervals;
            None: all samples.
        seed: Fixes all random numbers.
        collate_fn: As a DataLoader's.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix in its place.
        outputs_fn: For ``"ggn"``, see :func:`~lightning_eoss.measurements.sharpness.measure_sharpness`.

    Returns:
        The predictions.

    Raises:
        Unpredictable: If the loss is no mean over samples (BatchNorm in train mode, class weights).
        ValueError: If an argument is out of its range.

    Example:
        Where all samples have the same Hessian, batches have the sharpness of the full batch, says every model:

        >>> data = [(torch.tensor([2.0]), torch.tensor([float(y)])) for y in range(8)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2
        >>> result = predict_sharpness(nn.Linear(1, 1, bias=False), loss, data, batch_sizes=[2])
        >>> [round(each[0].estimate.mean, 4) for each in (result.wigner, result.subspace)]
        [4.0, 4.0]

    Source: Granziol, Zohren and Roberts, Theorems 4, 7 and 10, with the corrections named in `theory.random_matrix`.
    """
    checks.settings(full_batch_samples=full_batch_samples, seed=seed)
    for name, value, least in (("num_outliers", num_outliers, 1), ("num_groups", num_groups, 2)):
        checks.whole(name, value, least, f"must be at least {least}: nothing could be predicted from fewer.", none=True)
    if not isinstance(batch_sizes, Iterable) or not (batch_sizes := tuple(batch_sizes)):
        raise ValueError(f"batch_sizes={batch_sizes!r} must hold at least one batch size, as [32, 128] does.")
    for batch_size in batch_sizes:
        checks.batch_size_of_data(batch_size, len(dataset))
    with standalone(model, loss_fn, dataset, collate_fn, batch_size=min(batch_sizes), seed=seed) as (objective, found):
        memory = objective.cache.limit
        plan = Plan(min(batch_sizes), full_batch_samples=full_batch_samples, seed=seed, memory_bytes=memory)
        curvature = curvature_of(operator, outputs_fn, objective, max(batch_sizes))
        given: dict[str, Any] = {"batch_sizes": batch_sizes, "num_groups": num_groups, "curvature": curvature}
        return predict(objective, plan, found, WarmStart(), num_outliers=num_outliers, **given)


def predict(
    objective: Objective,
    plan: Plan,
    findings: Findings,
    warm: WarmStart,
    *,
    batch_sizes: Sequence[int],
    group_size: int = 1,
    num_groups: int | None = None,
    num_outliers: int = NUM_OUTLIERS,
    stream: int = 0,
    scaling: Scaling | None = None,
    curvature: Curvature = HESSIAN,
) -> SharpnessPrediction:
    """Predicts MiniBS at the module's present parameters.

    Args:
        objective: The loss, its parameters, its samples.
        plan: Precision and sizes.
        findings: What `preflight` found about the loss.
        warm: Where the last measurement ended.
        batch_sizes: Samples b.
        group_size: Samples that go through the network together where single ones would be too dear; smaller batches
            cannot be predicted.
        num_groups: Groups that the subspace is built from; None: all there are.
        num_outliers: Dimensions k of the subspace.
        stream: Number of this measurement; with the plan's seed it fixes all random numbers.
        scaling: The coordinates; None: plain ones.
        curvature: The Hessian or the Gauss-Newton matrix.

    Returns:
        The predictions.

    Raises:
        Unpredictable: If the loss is no mean over samples.
    """
    if findings.reduction != "mean":
        raise Unpredictable(
            "the loss of a batch was not found to be a mean over its samples (BatchNorm in train mode, dropout, class "
            "weights, a sum, reduced precision, fewer than three samples), so nothing follows from the full batch for "
            "batches. Only measuring helps."
        )
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(derived_seed(plan.seed, 8, stream))
    solver = Solver(objective, plan, findings, generator, scaling or Scaling(), curvature)
    population = objective.source.num_samples
    chunks = full_batch(objective.source, solver.chunk_size, max_samples=plan.full_batch_samples, seed=plan.seed)
    full_samples = sum(part.size for part in chunks)
    if max(batch_sizes) > full_samples:
        raise ValueError(
            f"batch_sizes={tuple(batch_sizes)} reach beyond the {full_samples} samples that the full batch is made of: "
            "raise full_batch_samples."
        )
    counted = _Counted(solver.operator([chunks]))
    values, vectors, top = _outliers(solver, counted.matvec, warm, num_outliers)
    density = _bulk(solver, counted.matvec, vectors)
    subspace = outlier_subspace(
        solver, counted.matvec, values, vectors, group_size=group_size, num_groups=num_groups, stream=stream
    )
    # A subset's own top is too high by the gap at its size, which batches as if drawn from it lack: to first order the
    # two cancel.
    subspace = replace(subspace, dataset_size=full_samples)
    luck = _luck(subspace, 1 / full_samples - 1 / population)
    count = min(VARIANCE_GROUPS, population // group_size)
    variance = hessian_variance(
        solver, batch_size=group_size, num_batches=count, num_probes=VARIANCE_PROBES, stream=stream
    )
    directional = _directional_variance(subspace)
    bulk = density.mean(lambda nodes: nodes)
    size = objective.num_parameters
    predicted = tuple(_subspace(subspace, each, plan.seed, luck) for each in batch_sizes)
    models = _Models(top, variance, directional, bulk, size, full_samples, luck)
    groups = len(subspace.compressions) * (len(vectors) + 1) + VARIANCE_PROBES * VARIANCE_GROUPS
    passes = counted.products * full_samples + groups * group_size
    return SharpnessPrediction(
        batch_sizes=tuple(batch_sizes),
        full_batch=top,
        wigner=tuple(map(models.wigner, batch_sizes, predicted)),
        marchenko_pastur=tuple(map(models.marchenko_pastur, batch_sizes, predicted)),
        subspace=predicted,
        overlap=tuple(map(models.overlap, batch_sizes)),
        variance=variance,
        directional_variance=directional,
        bulk=bulk,
        rank=_rank(density, values, size),
        critical_batch_size=_critical_batch_size(subspace, top, max(1, round(math.sqrt(full_samples))), plan.seed),
        num_parameters=size,
        num_samples=population,
        hvps=passes / population,
        seconds=time.perf_counter() - began,
    )


class _Counted:
    """A one-row operator that serves any number of vectors one after another, and counts."""

    def __init__(self, operator: Operator) -> None:
        self.operator, self.products = operator, 0

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(B, P) -> (B, P)``."""
        self.products += len(vectors)
        return torch.cat([self.operator.matvec(vector[None]) for vector in vectors])


def _outliers(solver: Solver, operator: Matvec, warm: WarmStart, count: int) -> tuple[Tensor, Tensor, Eigenvalue]:
    """(k,) largest eigenvalues with (k, P) vectors, as many as exist; and the first with its error."""
    start = warm.mixed(solver.random_starts(1))
    steps = max(30, min(100, int(solver.plan.memory_bytes / solver.vector_bytes)))
    options: dict[str, Any] = {"k": count, "vectors": True, "max_steps": steps, "min_steps": 3}
    result = lanczos(operator, start, tol=solver.plan.solver_tol, generator=solver.generator, **options)
    assert result.vectors is not None
    known = torch.isfinite(result.values[0])
    return result.values[0, known], result.vectors[0, known.to(result.vectors.device)], top_eigenvalue(result)


def _bulk(solver: Solver, operator: Matvec, vectors: Tensor) -> SpectralDensity:
    """The spectral density without the outliers: no step is spent on what is known."""
    outside = partial(beyond, vectors)
    dim, fit = solver.objective.num_parameters, int(solver.plan.memory_bytes / solver.vector_bytes)
    steps = max(2, min(DENSITY_STEPS, fit))
    probes = random_probes(DENSITY_PROBES, dim, solver.generator, like=solver.like)
    if len(vectors) < dim:  # else nothing is outside, and the zero operator says so
        probes = outside(probes)
    at_once = max(1, fit // steps)
    return spectral_density(lambda some: outside(operator(outside(some))), probes, steps=steps, at_once=at_once)


def _directional_variance(subspace: OutlierSubspace) -> float:
    """Sum of c_k^2 over k >= 2, for single samples."""
    columns = subspace.compressions[:, 1:, 0]
    count = len(columns)
    inside = ((columns - columns.mean(0)) ** 2).sum()
    return float(subspace.group_size * (inside + subspace.leakages[:, 0, 0].sum()) / (count - 1))


@dataclass(frozen=True)
class _Models:
    """The two theorems at one point of training."""

    top: Eigenvalue
    variance: Estimate
    directional: float
    bulk: Estimate
    num_parameters: int
    num_samples: int
    luck: float  # standard deviation of FullBS by the choice of its samples

    def wigner(self, batch_size: int, subspace: Prediction) -> Prediction:
        """Theorem 4."""
        given, mean = self._given(batch_size), max(self.variance.mean, 0.0)
        estimate = self._interval(lambda variance: wigner_outlier(self.top.value, variance, **given), self.variance)
        visible = bool(wigner_edge(mean, **given) <= 2 * self.top.value)
        return Prediction(estimate, trusted=visible and self._explains(mean) and _within(estimate, subspace))

    def marchenko_pastur(self, batch_size: int, subspace: Prediction) -> Prediction:
        """Theorem 7."""
        given = {"num_parameters": self.num_parameters, **self._given(batch_size)}
        estimate = self._interval(lambda bulk: marchenko_pastur_outlier(self.top.value, bulk, **given), self.bulk)
        assumed = self.top.value * (self.num_parameters - 1) * max(self.bulk.mean, 0.0)
        return Prediction(estimate, trusted=self._explains(assumed) and _within(estimate, subspace))

    def overlap(self, batch_size: int) -> float:
        """Theorem 10."""
        return float(eigenvector_overlap(self.top.value, max(self.variance.mean, 0.0), **self._given(batch_size)))

    def _given(self, batch_size: int) -> dict[str, Any]:
        """What all of them ask for."""
        return {"batch_size": batch_size, "dataset_size": self.num_samples}

    def _interval(self, model: Callable[[float], Any], known: Estimate) -> Estimate:
        """A model that grows with its parameter, which is not negative, at its mean and its interval's two ends."""
        error = 1.96 * self.luck + (self.top.error if math.isfinite(self.top.error) else 0.0)
        low, middle, high = (float(model(max(each, 0.0))) for each in (known.lower, known.mean, known.upper))
        lower, upper = low - error, high + error
        return Estimate(middle, (upper - lower) / (2 * 1.96), lower, upper)

    def _explains(self, assumed: float) -> bool:
        """Whether a model assumes as much fluctuation along the top eigenvector as there is."""
        return self.directional / _ALIKE <= assumed <= self.directional * _ALIKE


def _within(estimate: Estimate, subspace: Prediction) -> bool:
    """Whether a theorem's value is possible by what single samples do, give or take a little."""
    room, seen = _ROOM * abs(subspace.estimate.mean), subspace.estimate
    return seen.lower - room <= estimate.mean <= seen.upper + room


def _luck(subspace: OutlierSubspace, u: float) -> float:
    """Standard deviation of the full batch's top eigenvalue by the choice of its samples, v1'H v1 to first order."""
    return math.sqrt(max(u, 0.0) * subspace.group_size * float(subspace.compressions[:, 0, 0].var(ddof=1)))


def _rank(density: SpectralDensity, values: Tensor, size: int) -> Estimate:
    """How many eigenvalues are not zero, the outliers among them; zero is what rounding makes of it."""
    zero, largest = 100 * density.eps * float(values.abs().max()), float(density.nodes.abs().max())
    mass = density.mass_at_origin(zero / largest if largest > zero else 1.0)
    outliers = int((values.abs() > zero).sum())
    return shifted(scaled(mass, len(values) - size), len(values) - size - outliers)


def _subspace(subspace: OutlierSubspace, batch_size: int, seed: int, luck: float) -> Prediction:
    """By the outlier subspace."""
    found = predict_from_subspace(subspace, batch_size, seed=seed)
    mean, stderr, widened = found.estimate.mean, math.hypot(found.estimate.stderr, luck), 1.96 * luck
    estimate = Estimate(mean, stderr, found.estimate.lower - widened, found.estimate.upper + widened)
    return Prediction(estimate, found.trusted)


def _critical_batch_size(subspace: OutlierSubspace, top: Eigenvalue, middle: int, seed: int) -> Estimate:
    """Where MiniBS is twice FullBS, on the curve through the subspace's predictions; NaN where none is trusted."""
    sizes = sorted({round(middle * each) for each in _CURVE})
    sizes = [each for each in sizes if subspace.group_size <= each < subspace.dataset_size]
    found = [(each, predict_from_subspace(subspace, each, draws=60, seed=seed)) for each in sizes]
    good = {each: prediction.estimate for each, prediction in found if prediction.trusted}
    if len(good) < 2:
        return UNKNOWN
    means = [each.mean for each in good.values()]
    spreads = [max((each.upper - each.lower) / (2 * 1.96), 1e-3 * abs(each.mean)) for each in good.values()]
    curve = fit_batch_size_curve(top.value, list(good), means, spreads, dataset_size=subspace.dataset_size)
    return curve.critical_batch_size()
