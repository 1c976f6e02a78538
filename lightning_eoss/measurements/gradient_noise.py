r"""The noise of the mini-batch gradient: its variance, the law in b that it follows, and how it lies to the curvature.

Samples i have gradients :math:`g_i` with mean g and covariance
:math:`C = \frac1n \sum_i (g_i - g)(g_i - g)^\top`. A batch of b of them, drawn without replacement, has the covariance
:math:`c_b C`, :math:`c_b = \frac{n-b}{b(n-1)}`. So C predicts the variance at every batch size, and random batches test
the prediction.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, random_batches, split
from lightning_eoss.curvature.operators import Sequential, gradient_graph
from lightning_eoss.curvature.per_sample import is_mean, sample_gradients, vectorises
from lightning_eoss.curvature.seeds import Use, derived_seed
from lightning_eoss.curvature.solver import COLD, Plan, Solver, WarmStart
from lightning_eoss.linalg.lanczos import Matvec
from lightning_eoss.measurements.standalone import standalone
from lightning_eoss.theory.gradient_noise import sampling_factor
from lightning_eoss.theory.statistics import UNKNOWN, Estimate, exact, mean_estimate, moments, quotient, scaled

PRODUCTS = 8  # with the full batch's Hessian, that the curvature-weighted scale is estimated from
_TOP_TOL = 0.1  # of the top eigenvector, in units of the plan's: an angle errs more than an eigenvalue
_OTHER_SIZES = (1 / 16, 1 / 4, 4, 16)  # of the curve, in units of training's
_FEWEST = 4  # batches that make a point of it


@dataclass(frozen=True, eq=False)
class GradientNoise:
    """The noise of the gradient at one point of training, in squared units of the gradient; NaN where undefined.

    Intervals are 95 %. What all n samples were asked for is exact: its interval is a point. Those of the curvature know
    the luck of the batches and not that of a subset's Hessian.
    """

    trace: Estimate  # tr C, C the covariance between samples, normalised by n
    norm_squared: Estimate  # |g|^2; over a subset the noise of its mean is subtracted, so that it can be negative
    predicted: Estimate  # variance of the batch gradient, c_b tr C
    measured: Estimate  # the same, E|g_B - E g_B|^2 over random batches
    scale: Estimate  # simple noise scale tr C / |g|^2, in samples
    curvature_trace: Estimate  # tr HC, H the full batch's Hessian
    curvature_scale: Estimate  # tr HC / g'Hg, in samples; NaN where the loss is not convex along g
    cosine: float  # |cos| of the angle between g and the top eigenvector of H
    points: tuple[tuple[int, Estimate], ...]  # batch sizes, ascending, and the variance measured there
    batch_size: int  # b, samples of one optimizer step
    num_samples: int  # samples of the full batch
    dataset_size: int  # n, samples there are
    seconds: float
    warm: WarmStart = field(repr=False)  # where the next measurement starts

    def variance_at(self, batch_size: int) -> Estimate:
        """The variance of the gradient of a batch of another size at the same weights, by the law.

        Args:
            batch_size: Its samples.

        Returns:
            c_b tr C.

        Raises:
            ValueError: If the data do not hold such a batch.
        """
        return scaled(self.trace, sampling_factor(batch_size, self.dataset_size))


def measure_gradient_noise(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataset: Any,
    *,
    batch_size: int,
    num_batches: int = 32,
    full_batch_samples: int | None = 8192,
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
) -> GradientNoise:
    r"""Measures the noise of the mini-batch gradient of a model as it is, without a Trainer.

    .. math:: \operatorname{tr} C = \frac1n \sum_i \lVert g_i - g \rVert^2, \qquad
        \mathbb{E}\, \lVert g_B - g \rVert^2 = c_b \operatorname{tr} C, \qquad
        \operatorname{tr} HC = \mathbb{E}\, z^\top H z, \quad z = \frac{g_B - g}{\sqrt{c_b}}

    The first from gradients of single samples, where `vmap` gives them, else from pairs of disjoint micro-batches of s
    samples, :math:`\frac{s}{2} \lVert g_1 - g_2 \rVert^2` (the two sizes are s and 2s). Where the full batch is a
    subset of the data, the noise of its own mean is subtracted from :math:`\lVert g \rVert^2` and :math:`g^\top H g`
    (from the second up to a term of order 1/m in its m samples). Of a loss that is no mean over samples, only what
    needs no single samples is measured.

    Cost, in passes over the full batch: 3 to 40 for the gradients of all samples, 10 for the curvature along the noise,
    about 20 for the top eigenvector. And `num_batches` gradients of a batch, and of those at up to four other sizes:
    each size a pass or as many samples, at most.

    Args:
        model: The module, in the mode (train or eval) in which its loss is meant.
        loss_fn: ``loss_fn(model, batch) -> scalar``, with the reduction that training steps on.
        dataset: A map-style data set or a sequence of samples.
        batch_size: Samples b of a mini-batch.
        num_batches: Batches that the variance is measured over, two at least.
        full_batch_samples: The full batch is a fixed random subset of this size; None: all samples.
        seed: Fixes all random numbers.
        collate_fn: As a DataLoader's.

    Returns:
        The measurement.

    Raises:
        ValueError: If an argument is out of its range, or nothing can be measured.

    Example:
        Least squares at w = 1 on x = 1 and 3: the samples' gradients are 1 and 9, their mean 5, their variance 16.

        >>> data = [(torch.tensor([x]), torch.tensor([0.0])) for x in (1.0, 3.0)]
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2
        >>> noise = measure_gradient_noise(model, loss, data * 4, batch_size=1)
        >>> round(noise.trace.mean, 4), round(noise.scale.mean, 4)
        (16.0, 0.64)

    References:
        McCandlish, Kaplan, Amodei et al., "An empirical model of large-batch training", 2018, equations 2.8 and 2.9,
        appendix A.1.
    """
    checks.whole("num_batches", num_batches, 2, "must be at least 2: one batch has no variance.")
    checks.arguments(seed=seed, full_batch_samples=full_batch_samples)
    plan = Plan(batch_size, full_batch_samples=full_batch_samples, seed=seed)
    with standalone(model, loss_fn, dataset, plan, collate_fn=collate_fn) as solver:
        return gradient_noise(solver, num_batches=num_batches)


def gradient_noise(solver: Solver, warm: WarmStart = COLD, *, num_batches: int) -> GradientNoise:
    """Measures the noise of the gradient at the module's present parameters."""
    began, solver = time.perf_counter(), solver.drawing(Use.NOISE)
    source, plan = solver.objective.source, solver.plan
    operator = solver.operator([solver.full_batch()])
    assert isinstance(operator, Sequential)  # one row is not stacked
    full = _Full(solver, operator.batches[0], operator.gradients()[0])
    size, n = solver.step_samples, source.num_samples
    num_batches = min(num_batches, max(PRODUCTS, int(plan.memory_bytes / solver.vector_bytes)))

    deviations = full.deviations(plan.batch_size, plan.parts, num_batches)
    points = {size: _mean(_squares(deviations))}
    trace = norm = curvature_trace = curvature = UNKNOWN
    if full.means:
        trace = full.trace_by_samples() or full.trace_by_pairs(num_batches)
        points |= full.other_points(num_batches)
        norm, curvature_trace, curvature = full.forms(operator.matvec, deviations, trace)
    elif full.count == n:
        norm = exact(float(full.gradient @ full.gradient))

    result, _ = solver.solve_top(operator, warm.fitting(solver.objective), tol=_TOP_TOL)
    assert result.vectors is not None
    return GradientNoise(
        trace=trace,
        norm_squared=norm,
        predicted=scaled(trace, sampling_factor(size, n) if full.means else math.nan),
        measured=points[size],
        scale=quotient(trace, norm),
        curvature_trace=curvature_trace,
        curvature_scale=quotient(curvature_trace, curvature),
        cosine=float((result.vectors[0, 0] @ full.gradient).abs() / full.gradient.norm()),
        points=tuple(sorted(points.items())),
        batch_size=size,
        num_samples=sum(part.size for part in full.chunks),
        dataset_size=source.size(range(n)),
        seconds=time.perf_counter() - began,
        warm=warm.after(result, of_full=True),
    )


@dataclass(frozen=True, eq=False)
class _Full:
    """The full batch, and how gradients of others differ from its own."""

    solver: Solver
    chunks: Batch
    gradient: Tensor  # (P,)

    @property
    def means(self) -> bool:
        """Whether single samples have gradients."""
        return self.solver.findings.reduction == "mean"

    @property
    def count(self) -> int:
        """How many of all samples (or ready batches) it is."""
        return sum(len(part.indices) for part in self.chunks)

    def deviations(self, size: int, parts: int, count: int) -> Tensor:
        """(K, P) gradients of random batches less their mean, known or not: with their covariance, unbiased."""
        solver, source = self.solver, self.solver.objective.source
        if self.means and size * parts >= source.num_samples:
            return torch.zeros(count, solver.objective.num_parameters).to(solver.like)  # without the rounding
        seed = derived_seed(solver.seed(Use.NOISE_BATCHES), size * parts)
        batches = islice(random_batches(source, size, parts=parts, seed=seed), count)
        gradients = torch.stack([_gradient(solver, batch) for batch in batches])
        if self.means and self.count == source.num_samples:
            return gradients - self.gradient
        drawn = len(gradients)
        return (gradients - gradients.mean(0)) * math.sqrt(drawn / (drawn - 1))

    def other_points(self, num_batches: int) -> dict[int, Estimate]:
        """The variance at other batch sizes than training's, where the data hold such batches."""
        size, found = self.solver.step_samples, dict[int, Estimate]()
        for other in {max(1, int(factor * size)) for factor in _OTHER_SIZES} - {size}:
            count = min(num_batches, max(self.count, num_batches * size) // other)
            if other < self.solver.objective.source.num_samples and count >= _FEWEST:
                found[other] = _mean(_squares(self.deviations(other, 1, count)))
        return found

    def forms(self, product: Matvec, deviations: Tensor, trace: Estimate) -> tuple[Estimate, Estimate, Estimate]:
        """|g|^2, tr HC and g'Hg, from deviations at training's batch size and tr C."""
        n, m, size = self.solver.objective.source.num_samples, self.count, self.solver.step_samples
        # Covariances of means of m and of b samples in units of S, which is C normalised by n - 1.
        noise, unit, to_s = 1 / m - 1 / n, 1 / size - 1 / n or math.nan, n / max(n - 1, 1)
        norm = _form(self.gradient, self.gradient, deviations, deviations, noise, unit, scaled(trace, to_s))
        some = deviations[: PRODUCTS if size < n else 0]
        image, *rest = (product(each[None]) for each in (self.gradient, *some))
        images = torch.cat([image[:0], *rest])
        trace_s = _mean((some * images).sum(1) / unit)
        return norm, scaled(trace_s, 1 / to_s), _form(self.gradient, image[0], some, images, noise, unit, trace_s)

    def trace_by_samples(self) -> Estimate | None:
        """Trace of C from all samples of the full batch; None where `vmap` does not give their gradients."""
        solver, n = self.solver, self.solver.objective.source.num_samples
        if not vectorises(solver.objective, self.chunks[0]):
            return None
        at_once = max(1, int(solver.plan.memory_bytes / (4 * solver.vector_bytes + solver.findings.graph_bytes)))
        total, squares = torch.zeros_like(self.gradient), []
        for part in self.chunks:
            for rows in sample_gradients(solver.objective, part, at_once):
                total += rows.sum(0)
                squares.append(_squares(rows - self.gradient))
        values = torch.cat(squares)
        m = len(values)
        if not is_mean(total / m, self.gradient, values.mean() + self.gradient @ self.gradient):
            return None
        estimate = scaled(_mean(values), (n - 1) / n * m / (m - 1) if m > 1 else math.nan)
        left = math.sqrt(1 - m / n)  # of the error, once so many of the samples are known
        lower, upper = (estimate.mean + left * (end - estimate.mean) for end in (estimate.lower, estimate.upper))
        return replace(estimate, stderr=left * estimate.stderr, lower=lower, upper=upper)

    def trace_by_pairs(self, count: int) -> Estimate:
        """Trace of C from the differences between disjoint micro-batches."""
        solver, source = self.solver, self.solver.objective.source
        n, size = source.num_samples, max(1, min(solver.step_samples, source.num_samples) // 2)
        if 2 * size > n:
            return UNKNOWN
        seed = derived_seed(solver.seed(Use.NOISE_BATCHES), 0)
        pairs = islice(random_batches(source, size, parts=2, seed=seed), count)
        differences = [_gradient(solver, pair[:1]) - _gradient(solver, pair[1:]) for pair in pairs]
        # Each half has the weight 1/2 in its batch.
        return scaled(_mean(_squares(torch.stack(differences))), 2 * size * (n - 1) / n)


def _gradient(solver: Solver, batch: Batch) -> Tensor:
    """(P,) of one batch, in pieces where it is larger than training's or than memory allows."""
    most = min(solver.chunk_size, solver.piece_size)
    pieces = split(batch, most) if solver.findings.reduction == "mean" else batch
    terms = [part.weight * gradient_graph(solver.objective, part, create_graph=False).gradient for part in pieces]
    return torch.stack(terms).sum(0)


def _squares(rows: Tensor) -> Tensor:
    """(K,) squared norms of (K, P) rows."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.double().square()


def _mean(values: Tensor) -> Estimate:
    """The mean of independent values."""
    return mean_estimate(moments(values))


def _form(
    gradient: Tensor, image: Tensor, deviations: Tensor, images: Tensor, noise: float, unit: float, trace: Estimate
) -> Estimate:
    r"""The form g'Ag from the gradient of a subset; `image` and `images` are A times what stands before them.

    The subset's mean g + e has e of covariance `noise` S. :math:`\mathbb{E}\, e^\top A e` is subtracted, with `trace`
    for tr AS. What is left errs by :math:`2 e^\top A g + e^\top A e` around its mean. The variance of that,
    :math:`4 (Ag)^\top S (Ag)` times `noise` and :math:`2 \operatorname{tr} (AS)^2` times its square, is told by the
    deviations, of covariance `unit` S. In place of g there is g + e, which puts twice the second into the first.
    """
    value = float(gradient @ image)
    if noise == 0:
        return exact(value)
    count, share = len(deviations), noise / unit
    gram = (deviations @ images.T).square()
    first = 4 * share * float((deviations @ image).square().mean())
    second = 2 * share**2 * float(gram.sum() - gram.diagonal().sum()) / max(count * (count - 1), 1)
    variance = max(first - second, second) + (noise * trace.stderr) ** 2
    half_width = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance)
    value -= noise * trace.mean
    return Estimate(value, math.sqrt(variance), value - half_width, value + half_width)
