"""The noise of the gradient against dense gradients and Hessians, and its estimators over many seeds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eoss.curvature import solver
from lightning_eoss.curvature.batches import Part, full_batch
from lightning_eoss.curvature.operators import Sequential
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.curvature.solver import COLD, Plan, Solver, WarmStart
from lightning_eoss.measurements import gradient_noise as module
from lightning_eoss.measurements.gradient_noise import GradientNoise, gradient_noise
from lightning_eoss.theory.gradient_noise import sampling_factor
from lightning_eoss.theory.statistics import Estimate, quotient
from tests.problems import (
    batch_norm,
    collated,
    cross_entropy,
    dense_gradient_and_hessian,
    made,
    mlp,
    objective_of,
    pictures,
    squared_error,
)

N = 22
DATA = pictures(N)
SMALL = [(inputs[0, 0], targets[:2]) for inputs, targets in pictures(60, seed=3)]  # four numbers to two
TINY = SMALL[:12]


def linear() -> nn.Module:
    return nn.Linear(4, 2)


def noise_of(
    net: Any,
    data: Any = DATA,
    loss_fn: Any = squared_error,
    *,
    warm: WarmStart = COLD,
    stream: int = 0,
    **options: Any,
) -> GradientNoise:
    """A measurement by default on all samples, at b = 4."""
    plan = Plan(**{"batch_size": 4, "full_batch_samples": None, **options})
    with objective_of(net, loss_fn, data) as objective:
        findings = preflight(objective, plan.batch_size, parts=plan.parts)
        return gradient_noise(Solver(objective, plan, findings, stream=stream), warm, num_batches=plan.num_batches)


def dense(net: Any, data: Any = DATA, loss_fn: Any = squared_error) -> tuple[Tensor, Tensor, Tensor]:
    """(n, P) gradients of samples, (P,) their mean, (P, P) Hessian."""
    rows = [dense_gradient_and_hessian(net, loss_fn, collated(data, [index]))[0] for index in range(len(data))]
    gradient, hessian = dense_gradient_and_hessian(net, loss_fn, collated(data, range(len(data))))
    return torch.stack(rows), gradient, hessian


def holds(estimate: Estimate, truth: float, stderrs: float = 4.0) -> None:
    """The truth is where an unbiased estimate may leave it."""
    assert estimate.stderr > 0
    assert abs(estimate.mean - truth) <= stderrs * estimate.stderr, f"{estimate} is not {truth:.4g}"


def is_exact(estimate: Estimate, truth: float) -> None:
    assert estimate.mean == pytest.approx(truth, rel=1e-9)
    assert estimate.stderr == 0 and estimate.lower == estimate.upper == estimate.mean


@pytest.mark.parametrize("loss_fn", [squared_error, cross_entropy])
@pytest.mark.parametrize("net", [mlp, batch_norm])
def test_over_all_samples_it_is_exact(net: Callable[[], nn.Module], loss_fn: Any) -> None:
    rows, gradient, hessian = dense(made(net), loss_fn=loss_fn)
    covariance = (rows - gradient).T @ (rows - gradient) / N
    noise = noise_of(made(net), loss_fn=loss_fn, num_batches=200, tol=1e-4)
    trace, square = float(covariance.trace()), float(gradient @ gradient)
    is_exact(noise.trace, trace)
    is_exact(noise.norm_squared, square)
    is_exact(noise.scale, trace / square)
    is_exact(noise.predicted, (N - 4) / (4 * (N - 1)) * trace)
    assert noise.cosine == pytest.approx(
        float((torch.linalg.eigh(hessian)[1][:, -1] @ gradient).abs() / square**0.5), rel=1e-4
    )
    assert (noise.batch_size, noise.num_samples, noise.dataset_size) == (4, N, N)
    holds(noise.measured, noise.predicted.mean)
    holds(noise.curvature_trace, float((hessian @ covariance).trace()))
    curvature = float(gradient @ hessian @ gradient)
    if curvature > 0:
        holds(noise.curvature_scale, float((hessian @ covariance).trace()) / curvature)
        assert noise.curvature_scale.mean == pytest.approx(noise.curvature_trace.mean / curvature)
    else:
        assert math.isnan(noise.curvature_scale.mean)


def test_the_law_holds_at_every_batch_size() -> None:
    """Against all subsets of six samples."""
    rows, gradient, _ = dense(made(mlp), DATA[:6])
    noise = noise_of(made(mlp), DATA[:6], batch_size=2)
    for size in range(1, 7):
        means = torch.stack([rows[list(drawn)].mean(0) for drawn in combinations(range(6), size)])
        expected = float((means - gradient).square().sum(1).mean())
        assert noise.variance_at(size).mean == pytest.approx(expected, rel=1e-9, abs=1e-25)
    for size in (0, 7):
        with pytest.raises(ValueError, match=f"batch_size={size} is not between 1"):
            noise.variance_at(size)


def test_random_batches_agree_with_the_law_at_every_point() -> None:
    data = pictures(150)
    noise = noise_of(made(mlp), data, batch_size=8, num_batches=100)
    assert [size for size, _ in noise.points] == [1, 2, 8, 32, 128]
    for size, measured in noise.points:
        holds(measured, noise.variance_at(size).mean)
    assert dict(noise.points)[8] == noise.measured


def test_a_window_of_parts_is_one_batch() -> None:
    noise = noise_of(made(mlp), batch_size=3, parts=4, num_batches=200)
    assert noise.batch_size == 12
    assert noise.predicted.mean == pytest.approx(noise.variance_at(12).mean)
    holds(noise.measured, noise.predicted.mean)


def test_a_batch_of_everything_has_no_noise() -> None:
    noise = noise_of(made(mlp), batch_size=N)
    assert noise.measured.mean == noise.predicted.mean == 0 and noise.measured.stderr == 0
    is_exact(noise.trace, noise_of(made(mlp)).trace.mean)
    assert math.isnan(noise.curvature_scale.mean) and noise.scale.mean > 0


def test_one_sample_has_none_either() -> None:
    noise = noise_of(made(mlp), DATA[:1], batch_size=1)
    assert noise.measured.mean < 1e-20 and math.isnan(noise.scale.mean)
    assert noise.cosine > 0


# ---- unbiased: the mean over all that could have been drawn is the truth --------------------------------------------


FEW = TINY[:6]


def all_batches(source: Any, size: int, *, parts: int, seed: int) -> Iterator[Any]:
    """Each batch of so many parts, once."""
    for drawn in combinations(range(source.num_samples), size * parts):
        for first in combinations(drawn, size) if parts == 2 else [drawn]:
            pieces = [first, tuple(sorted(set(drawn) - set(first)))][:parts]
            yield tuple(Part(1 / parts, size, piece) for piece in pieces)


@pytest.fixture
def all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "random_batches", all_batches)
    monkeypatch.setattr(module, "PRODUCTS", 100)
    monkeypatch.setattr(module, "_OTHER_SIZES", ())


@pytest.mark.usefixtures("all_drawn")
def test_batches_are_unbiased() -> None:
    rows, gradient, hessian = dense(made(linear), FEW)
    covariance = (rows - gradient).T @ (rows - gradient) / 6
    variance = sampling_factor(2, 6) * float(covariance.trace())
    noise = noise_of(made(linear), FEW, batch_size=2, num_batches=15)
    assert noise.measured.mean == pytest.approx(variance)
    assert noise.curvature_trace.mean == pytest.approx(float((hessian @ covariance).trace()))
    # Where the mean is not known: independent batches have that of their own, which takes 1/15 away.
    noise = noise_of(made(linear), FEW, batch_size=2, num_batches=15, full_batch_samples=5)
    assert noise.measured.mean == pytest.approx(variance * 15 / 14)


@pytest.mark.usefixtures("all_drawn")
@pytest.mark.parametrize("size", [1, 3])
def test_two_sizes_of_micro_batches_are_unbiased(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "vectorises", lambda *_: False)
    rows, gradient, _ = dense(made(linear), FEW)
    noise = noise_of(made(linear), FEW, batch_size=2 * size if size == 1 else 5, num_batches=1000)
    assert noise.trace.mean == pytest.approx(float((rows - gradient).square().sum(1).mean()))
    assert noise.trace.stderr > 0
    is_exact(noise.norm_squared, float(gradient @ gradient))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.usefixtures("all_drawn")
def test_subsets_are_unbiased(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All subsets of four of six."""
    if not together:
        monkeypatch.setattr(module, "vectorises", lambda *_: False)
    rows, gradient, hessian = dense(made(linear), FEW)
    covariance = (rows - gradient).T @ (rows - gradient) / 6
    found = []
    for drawn in combinations(range(6), 4):
        subset = (Part(1.0, 4, drawn),)
        monkeypatch.setattr(Solver, "full_batch", lambda _, subset=subset: subset)
        found.append(noise_of(made(linear), FEW, batch_size=2, num_batches=1000, full_batch_samples=4))
    means = {
        name: sum(getattr(noise, name).mean for noise in found) / len(found)
        for name in ("trace", "norm_squared", "curvature_trace")
    }
    assert {noise.num_samples for noise in found} == {4}
    assert means["trace"] == pytest.approx(float(covariance.trace()))
    assert means["norm_squared"] == pytest.approx(float(gradient @ gradient))
    assert means["curvature_trace"] * 14 / 15 == pytest.approx(float((hessian @ covariance).trace()))


def mean_is(estimates: list[Estimate], truth: float, *, least: float = 0.75) -> None:
    """The mean over seeds is the truth, as far as so many seeds can tell; they scatter as they say."""
    values = torch.tensor([each.mean for each in estimates]).double()
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - truth) < 4 * error, f"{values.mean():.5g} +- {error:.2g} is not {truth:.5g}"
    said = torch.tensor([each.stderr for each in estimates]).double().square().mean().sqrt()
    assert least < float(said / values.std()) < 1.35


def test_standard_errors_are_the_scatter_over_seeds() -> None:
    """A third of the samples, a few of the batches."""
    rows, gradient, hessian = dense(made(linear), SMALL)
    covariance = (rows - gradient).T @ (rows - gradient) / 60
    plan, found = Plan(3, full_batch_samples=20), []
    with pytest.MonkeyPatch.context() as patch, objective_of(made(linear), squared_error, SMALL) as objective:
        patch.setattr(module, "_OTHER_SIZES", ())
        findings = preflight(objective, 3)
        for seed in range(120):
            solver = Solver(objective, replace(plan, seed=seed), findings)
            found.append(gradient_noise(solver, num_batches=12))
    mean_is([noise.trace for noise in found], float(covariance.trace()))
    mean_is([noise.norm_squared for noise in found], float(gradient @ gradient))
    mean_is([noise.measured for noise in found], sampling_factor(3, 60) * float(covariance.trace()))
    # The luck of twenty samples' Hessian is not in it.
    mean_is([noise.curvature_trace for noise in found], float((hessian @ covariance).trace()), least=0.6)


def test_gradients_that_do_not_average_to_the_batch_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sample_gradients", lambda objective, part, at_once: iter([torch.ones(part.size, 83)]))
    noise = noise_of(made(mlp), num_batches=100)
    holds(noise.trace, noise_of(made(mlp)).trace.mean)


def test_intervals_of_a_ratio_hold_those_of_both() -> None:
    above, below = Estimate(6.0, 1.0, 4.0, 8.0), Estimate(2.0, 0.5, 1.0, 3.0)
    ratio = quotient(above, below)
    assert (ratio.mean, ratio.lower, ratio.upper) == (3.0, 4 / 3, 8.0)
    assert ratio.stderr == pytest.approx(3 * math.hypot(1 / 6, 0.5 / 2))
    assert math.isnan(quotient(above, Estimate(2.0, 2.0, -2.0, 6.0)).upper)
    assert math.isnan(quotient(above, Estimate(-2.0, 0.1, -2.2, -1.8)).mean)


# ---- how -------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_mean_has_its_variance_measured() -> None:
    noise = noise_of(made(batch_norm).train(), batch_size=4, num_batches=50)
    for estimate in (noise.trace, noise.predicted, noise.scale, noise.curvature_scale, noise.variance_at(2)):
        assert math.isnan(estimate.mean)
    assert noise.measured.lower > 0 and noise.norm_squared.mean > 0 and 0 <= noise.cosine <= 1
    assert [size for size, _ in noise.points] == [4]
    net = made(batch_norm).train()
    drawn = torch.Generator().manual_seed(0)
    losses = [squared_error(net, collated(DATA, torch.randperm(N, generator=drawn)[:4])) for _ in range(400)]
    gradients = [torch.autograd.grad(loss, list(net.parameters())) for loss in losses]
    rows = torch.stack([torch.cat([each.flatten() for each in gradient]) for gradient in gradients])
    holds(noise.measured, float((rows - rows.mean(0)).square().sum(1).mean()))


def test_samples_are_streamed() -> None:
    """Never all gradients at once; the same numbers."""
    sizes = []

    def watched(objective: Any, part: Any, at_once: int) -> Any:
        for rows in original(objective, part, at_once):
            sizes.append(len(rows))
            yield rows

    original = module.sample_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample_gradients", watched)
        few = noise_of(made(mlp), memory_bytes=3 * (4 * 8 * 83 + 2000.0))
    assert max(sizes) < 10 and sum(sizes) == N
    assert few.trace.mean == pytest.approx(noise_of(made(mlp)).trace.mean, rel=1e-12)


def test_the_chunks_are_those_of_the_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        solver, "full_batch", lambda *args, **options: seen.append((args, options)) or full_batch(*args, **options)
    )
    noise_of(made(mlp), full_batch_samples=9, seed=5)
    ((_, size), options) = seen[0]
    assert size == 256 and options == {"max_samples": 9, "first": None, "seed": 5}


def test_the_last_eigenvector_is_where_the_next_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    original = Sequential.matvec
    monkeypatch.setattr(Sequential, "matvec", lambda self, vectors: products.append(1) or original(self, vectors))
    found = []
    for warm in (COLD, COLD, noise_of(made(mlp)).warm):
        products.clear()
        found.append((noise_of(made(mlp), warm=warm, stream=1), len(products)))
    (cold, many), (_, again), (warm, few) = found
    assert many == again > few
    assert warm.cosine == pytest.approx(cold.cosine, rel=0.02)
    assert cold.warm.of_full


def test_a_loss_that_is_not_finite_gives_no_numbers() -> None:
    net = made(linear)
    with torch.no_grad():
        net.weight.fill_(torch.inf)
    plan = Plan(4, full_batch_samples=None)
    with objective_of(made(linear), squared_error, TINY) as objective:
        findings = preflight(objective, 4)
    with objective_of(net, squared_error, TINY) as objective:
        noise = gradient_noise(Solver(objective, plan, findings), num_batches=32)
    for estimate in (noise.trace, noise.measured, noise.norm_squared, noise.scale, noise.curvature_scale):
        assert not math.isfinite(estimate.mean)
    assert math.isnan(noise.cosine)


def test_float32_gives_the_same() -> None:
    noise = noise_of(made(mlp, dtype=torch.float32), pictures(N, dtype=torch.float32))
    exact = noise_of(made(mlp))
    assert noise.trace.mean == pytest.approx(exact.trace.mean, rel=1e-5)
    assert noise.measured.mean == pytest.approx(exact.measured.mean, rel=1e-5)
    assert noise.curvature_trace.mean == pytest.approx(exact.curvature_trace.mean, rel=1e-3)
