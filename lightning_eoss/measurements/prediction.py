"""MiniBS predicted from the full batch: by the theorems on random matrices, and by a subspace that real networks need.

Predicting costs more than measuring MiniBS at one batch size. What it buys is the whole curve over batch sizes, the
batch size from which larger ones hardly help, and a test of the theory.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn
from lightning_eoss.curvature.operators import Operator
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import COLD, NUM_OUTLIERS, Eigenvalue, Plan, Solver, WarmStart, top_eigenvalue
from lightning_eoss.linalg.density import SpectralDensity, spectral_density
from lightning_eoss.linalg.lanczos import Matvec, lanczos
from lightning_eoss.measurements.standalone import standalone
from lightning_eoss.measurements.subspace import beyond, outlier_subspace
from lightning_eoss.measurements.variance import hessian_variance
from lightning_eoss.theory import random_matrix
from lightning_eoss.theory.outlier_subspace import OutlierSubspace, predict_from_subspace
from lightning_eoss.theory.statistics import UNKNOWN, Estimate, scaled, shifted

DENSITY_STEPS, DENSITY_PROBES = 24, 3  # of the bulk, for its trace and rank
VARIANCE_PROBES, VARIANCE_GROUPS = 10, 16
_ALIKE = 1.5  # times, up to which a model's fluctuation along the top eigenvector counts as the measured one
_ROOM = 0.05  # by which a theorem may miss the subspace's interval, relative
_NO_MEAN = (
    "the loss of a batch was not found to be a mean over its samples (BatchNorm in train mode, dropout, class weights, "
    "a sum, reduced precision, fewer than three samples), so nothing follows from the full batch for batches. Only "
    "measuring helps."
)
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
    checks.arguments(seed=seed, full_batch_samples=full_batch_samples)
    for name, value, least in (("num_outliers", num_outliers, 1), ("num_groups", num_groups, 2)):
        checks.whole(name, value, least, f"must be at least {least}: nothing could be predicted from fewer.", none=True)
    if not isinstance(batch_sizes, Iterable) or not (batch_sizes := tuple(batch_sizes)):
        raise ValueError(f"batch_sizes={batch_sizes!r} must hold at least one batch size, as [32, 128] does.")
    for batch_size in batch_sizes:
        checks.batch_size_of_data(batch_size, len(dataset))
    plan = Plan(min(batch_sizes), full_batch_samples=full_batch_samples, seed=seed)
    given: dict[str, Any] = {"collate_fn": collate_fn, "operator": operator, "outputs_fn": outputs_fn}
    with standalone(model, loss_fn, dataset, plan, **given) as solver:
        return prediction(solver, batch_sizes=batch_sizes, num_groups=num_groups, num_outliers=num_outliers)


def prediction(
    solver: Solver,
    warm: WarmStart = COLD,
    *,
    batch_sizes: Sequence[int],
    group_size: int = 1,
    num_groups: int | None = None,
    num_outliers: int = NUM_OUTLIERS,
) -> SharpnessPrediction:
    """Predicts MiniBS at the module's present parameters; raises `Unpredictable` where nothing can be.

    The subspace is built from `num_groups` groups of `group_size` samples, which go through the network together where
    single ones would be too dear; smaller batches cannot be predicted.
    """
    if solver.findings.reduction != "mean":
        raise Unpredictable(_NO_MEAN)
    began, solver = time.perf_counter(), solver.drawing(Use.PREDICTION)
    chunks, population = solver.full_batch(), solver.objective.source.num_samples
    full_samples = sum(part.size for part in chunks)
    if max(batch_sizes) > full_samples:
        raise ValueError(
            f"batch_sizes={tuple(batch_sizes)} reach beyond the {full_samples} samples that the full batch is made of: "
            "raise full_batch_samples."
        )
    counted = _Counted(solver.operator([chunks]))
    values, vectors, top = _outliers(solver, counted.matvec, warm, num_outliers)
    density = _bulk(solver, counted.matvec, vectors)
    given: dict[str, Any] = {"group_size": group_size, "num_groups": num_groups}
    subspace = outlier_subspace(solver, counted.matvec, values, vectors, **given)
    count = min(VARIANCE_GROUPS, population // group_size)
    variance = hessian_variance(solver, batch_size=group_size, num_batches=count, num_probes=VARIANCE_PROBES)
    models = _Models(solver, full_samples, top, variance, density.mean(lambda nodes: nodes), subspace)
    predicted = tuple(map(models.by_subspace, batch_sizes))
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
        directional_variance=models.directional,
        bulk=models.bulk,
        rank=_rank(density, values, solver.objective.num_parameters),
        critical_batch_size=models.critical_batch_size(max(1, round(math.sqrt(full_samples)))),
        num_parameters=solver.objective.num_parameters,
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
    fit, probes = int(solver.plan.memory_bytes / solver.vector_bytes), solver.probes(DENSITY_PROBES)
    steps = max(2, min(DENSITY_STEPS, fit))
    if len(vectors) < solver.objective.num_parameters:  # else nothing is outside, and the zero operator says so
        probes = outside(probes)
    at_once = max(1, fit // steps)
    return spectral_density(lambda some: outside(operator(outside(some))), probes, steps=steps, at_once=at_once)


@dataclass(frozen=True)
class _Models:
    """The two theorems and the subspace at one point of training."""

    solver: Solver
    num_samples: int  # of the full batch
    top: Eigenvalue
    variance: Estimate
    bulk: Estimate
    drawn: OutlierSubspace

    def wigner(self, batch_size: int, subspace: Prediction) -> Prediction:
        """Theorem 4."""
        given, mean = self._given(batch_size), max(self.variance.mean, 0.0)
        estimate = self._interval(partial(random_matrix.wigner_outlier, self.top.value, **given), self.variance)
        visible = bool(random_matrix.wigner_edge(mean, **given) <= 2 * self.top.value)
        return Prediction(estimate, trusted=visible and self._explains(mean) and _within(estimate, subspace))

    def marchenko_pastur(self, batch_size: int, subspace: Prediction) -> Prediction:
        """Theorem 7."""
        size = self.solver.objective.num_parameters
        model = partial(random_matrix.marchenko_pastur_outlier, self.top.value, num_parameters=size)
        estimate = self._interval(partial(model, **self._given(batch_size)), self.bulk)
        assumed = self.top.value * (size - 1) * max(self.bulk.mean, 0.0)
        return Prediction(estimate, trusted=self._explains(assumed) and _within(estimate, subspace))

    def overlap(self, batch_size: int) -> float:
        """Theorem 10."""
        given, mean = self._given(batch_size), max(self.variance.mean, 0.0)
        return float(random_matrix.eigenvector_overlap(self.top.value, mean, **given))

    def by_subspace(self, batch_size: int) -> Prediction:
        """By the outlier subspace."""
        found = predict_from_subspace(self.subspace, batch_size, seed=self.solver.plan.seed)
        mean, stderr, widened = found.estimate.mean, math.hypot(found.estimate.stderr, self.luck), 1.96 * self.luck
        estimate = Estimate(mean, stderr, found.estimate.lower - widened, found.estimate.upper + widened)
        return Prediction(estimate, found.trusted)

    def critical_batch_size(self, middle: int) -> Estimate:
        """Where MiniBS is twice FullBS, on the curve through the subspace's predictions; NaN where none is trusted."""
        subspace, seed = self.subspace, self.solver.plan.seed
        sizes = sorted({round(middle * each) for each in _CURVE})
        sizes = [each for each in sizes if subspace.group_size <= each < subspace.dataset_size]
        found = [(each, predict_from_subspace(subspace, each, draws=60, seed=seed)) for each in sizes]
        good = {each: prediction.estimate for each, prediction in found if prediction.trusted}
        if len(good) < 2:
            return UNKNOWN
        means = [each.mean for each in good.values()]
        spreads = [max((each.upper - each.lower) / (2 * 1.96), 1e-3 * abs(each.mean)) for each in good.values()]
        fit = partial(random_matrix.fit_batch_size_curve, self.top.value, dataset_size=subspace.dataset_size)
        return fit(list(good), means, spreads).critical_batch_size()

    @cached_property
    def subspace(self) -> OutlierSubspace:
        """The subspace as if batches were drawn from the full batch.

        A subset's own top is too high by the gap at its size, which such batches lack: to first order the two cancel.
        """
        return replace(self.drawn, dataset_size=self.num_samples)

    @cached_property
    def directional(self) -> float:
        """Sum of c_k^2 over k >= 2, for single samples."""
        columns = self.drawn.compressions[:, 1:, 0]
        inside = ((columns - columns.mean(0)) ** 2).sum()
        spread = inside + self.drawn.leakages[:, 0, 0].sum()
        return float(self.drawn.group_size * spread / (len(columns) - 1))

    @cached_property
    def luck(self) -> float:
        """Standard deviation of FullBS by the choice of its samples, v1'H v1 to first order."""
        u = max(1 / self.num_samples - 1 / self.solver.objective.source.num_samples, 0.0)
        return math.sqrt(u * self.drawn.group_size * float(self.drawn.compressions[:, 0, 0].var(ddof=1)))

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


def _rank(density: SpectralDensity, values: Tensor, size: int) -> Estimate:
    """How many eigenvalues are not zero, the outliers among them; zero is what rounding makes of it."""
    zero, largest = 100 * density.eps * float(values.abs().max()), float(density.nodes.abs().max())
    mass = density.mass_at_origin(zero / largest if largest > zero else 1.0)
    outliers = int((values.abs() > zero).sum())
    return shifted(scaled(mass, len(values) - size), len(values) - size - outliers)
