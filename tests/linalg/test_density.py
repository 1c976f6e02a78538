"""Stochastic Lanczos quadrature against dense spectra, exact moments and the inequalities of Gauss quadrature."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eoss.linalg.density import SpectralDensity, random_probes, spectral_density
from lightning_eoss.linalg.lanczos import random_start
from lightning_eoss.theory.statistics import Estimate
from tests.problems import assert_close, dense_gradient_and_hessian, made, random_symmetric, with_spectrum

torch.set_num_threads(1)

F64 = torch.float64


def product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """(B, P) -> (B, P) of one symmetric operator, dense (P, P) or diagonal (P,)."""
    return (lambda vectors: vectors * matrix) if matrix.ndim == 1 else (lambda vectors: vectors @ matrix)


def probes(num_probes: int, dim: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return random_probes(num_probes, dim, torch.Generator().manual_seed(seed), like=torch.empty(0, dtype=dtype))


def density_of(matrix: Tensor, num_probes: int = 8, steps: int = 100, seed: int = 0) -> SpectralDensity:
    return spectral_density(product(matrix), probes(num_probes, len(matrix), seed, matrix.dtype), steps=steps)


def measures(matrix: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) eigenvalues and (B, P) the weight of each unit probe on each."""
    values, vectors = torch.linalg.eigh(matrix)
    return values, (starts @ vectors).square() / starts.square().sum(1, keepdim=True)


def numbers(num: int, seed: int = 0) -> Tensor:
    """Standard normal."""
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=F64)


def holds(estimate: Estimate, truth: float, sigmas: float = 4.0) -> bool:
    return abs(estimate.mean - truth) <= sigmas * estimate.stderr + 1e-9 * max(1.0, abs(truth))


# ---- the quadrature of each probe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 40.0, -40.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_first_2m_moments_are_exact(shift: float, steps: int) -> None:
    matrix = random_symmetric(1, 40)[0] + shift * torch.eye(40, dtype=F64)
    starts = probes(3, 40)
    density = spectral_density(product(matrix), starts, steps=steps)
    assert density.nodes.shape == density.weights.shape == (3, steps) and not bool(density.complete.any())
    powers = starts
    for order in range(2 * steps + 1):
        expected = (starts * powers).sum(1)
        found = (density.weights * density.nodes**order).sum(1)
        error = (found - expected).abs() / (density.weights * density.nodes.abs() ** order).sum(1)
        assert bool((error <= 1e-9).all()) == (order < 2 * steps) or shift  # far from the origin the next is close, too
        if order < 2 * steps:
            estimate = density.moment(order)
            assert estimate.mean == pytest.approx(float(expected.mean()), rel=1e-9, abs=1e-9 * float(found.abs().max()))
            assert estimate.stderr == pytest.approx(float(expected.std()) / math.sqrt(3), rel=1e-6, abs=1e-6)
        powers = powers @ matrix


def test_nodes_and_weights_keep_the_inequalities_of_chebyshev_markov_and_stieltjes() -> None:
    """What lies below a node is at least the weight of the nodes before it, and at most that with its own."""
    matrix, starts = random_symmetric(1, 80)[0], probes(5, 80)
    values, masses = measures(matrix, starts)
    for steps in (2, 7, 20):
        density = spectral_density(product(matrix), starts, steps=steps)
        assert bool((density.nodes.diff(dim=1) > 0).all()) and bool((density.weights > 0).all())
        assert_close(density.weights.sum(1), torch.ones(5, dtype=F64))
        cumulative = density.weights.cumsum(1)
        exact = (masses[:, None, :] * (values < density.nodes[:, :, None])).sum(2)
        assert bool((exact <= cumulative + 1e-12).all())
        assert bool((exact >= cumulative - density.weights - 1e-12).all())


def test_the_length_of_a_start_does_not_matter() -> None:
    matrix, starts = random_symmetric(1, 20)[0], probes(2, 20)
    unit = spectral_density(product(matrix), starts, steps=6)
    scaled = spectral_density(product(matrix), 1e3 * starts, steps=6)
    assert_close(scaled.nodes, unit.nodes)
    assert_close(scaled.weights, unit.weights)


def test_single_precision() -> None:
    matrix, starts = random_symmetric(1, 60)[0], probes(4, 60)
    single = spectral_density(product(matrix.float()), starts.float(), steps=20)
    double = spectral_density(product(matrix), starts, steps=20)
    assert single.nodes.dtype == single.weights.dtype == F64 and single.eps == torch.finfo(torch.float32).eps
    assert_close(single.nodes, double.nodes, dtype=torch.float32, steps=1000)
    assert_close(single.weights, double.weights, dtype=torch.float32, steps=1000)


# ---- the density over probes -----------------------------------------------------------------------------------------


def test_the_semicircle_of_a_random_matrix() -> None:
    dim, num_probes, steps = 600, 10, 40
    matrix = random_symmetric(1, dim)[0] * math.sqrt(2 / dim)  # variance 1 / P off the diagonal: support [-2, 2]
    density = density_of(matrix, num_probes, steps)
    nodes, weights = density.stems()
    x = nodes.clamp(-2, 2)
    semicircle = 0.5 + x * (4 - x.square()).sqrt() / (4 * math.pi) + torch.asin(x / 2) / math.pi
    distance = (weights.cumsum(0) - weights / 2 - semicircle).abs().max()
    # A quadrature errs by no more than a node's weight, at most 4 / (pi m) for a semicircle; a probe's measure of
    # (-inf, x] has a variance of at most 1 / 2P; and P eigenvalues keep their places to within some 1 / P.
    resolution, sampling, rigidity = 4 / (math.pi * steps), math.sqrt(1 / (2 * dim * num_probes)), 2 / dim
    assert float(distance) <= resolution + 4 * sampling + rigidity
    assert holds(density.moment(2), float(matrix.square().sum()) / dim) and density.moment(2).mean == pytest.approx(
        1, abs=0.02
    )


def test_a_gap_is_resolved_exactly() -> None:
    """Probes of signs weigh the eigenvalues of a diagonal operator alike; nothing is left to chance."""
    spectrum = torch.cat([torch.linspace(-3, -2, 90, dtype=F64), torch.linspace(1, 2, 210, dtype=F64)])
    nodes, weights = density_of(spectrum, 3, steps=30).stems()
    assert float(weights[nodes < -0.5].sum()) == pytest.approx(0.3, abs=1e-8)
    cumulative = weights.cumsum(0) - weights / 2
    exact = (spectrum <= nodes[:, None]).double().mean(1)
    assert float((cumulative - exact).abs().max()) <= float(density_of(spectrum, 1, steps=30).weights.max())


def test_smoothing_is_a_sum_of_gaussians() -> None:
    density = density_of(random_symmetric(1, 50)[0], 4, steps=12)
    grid = torch.linspace(-40, 40, 4001, dtype=F64)
    smooth = density.smoothed(grid, width=0.5)
    assert smooth.shape == grid.shape and smooth.dtype == F64
    assert float(torch.trapezoid(smooth, grid)) == pytest.approx(1, abs=1e-9)
    assert float(torch.trapezoid(smooth * grid.square(), grid)) == pytest.approx(density.moment(2).mean + 0.25)
    normal = torch.distributions.Normal(density.nodes.flatten(), torch.tensor(0.5, dtype=F64))
    assert_close(smooth, (normal.log_prob(grid[:, None]).exp() @ density.weights.flatten()) / 4)


def test_stems_are_sorted_and_hold_no_padding() -> None:
    starts = probes(2, 9)
    starts[1] = torch.eye(9, dtype=F64)[4]
    density = spectral_density(product(torch.arange(9.0, dtype=F64)), starts)
    nodes, weights = density.stems()
    assert len(nodes) == 9 + 1 and bool((nodes.diff() >= 0).all())
    assert float(weights.sum()) == pytest.approx(1)


# ---- trace and other means -------------------------------------------------------------------------------------------


def test_the_trace_is_within_its_error() -> None:
    for seed, dim in enumerate((30, 200)):
        matrix = random_symmetric(1, dim, seed)[0] + 0.3 * torch.eye(dim, dtype=F64)
        estimate = density_of(matrix, 20, steps=3, seed=seed).trace
        assert holds(estimate, float(matrix.trace()))
        assert 0 < estimate.stderr < 3 * math.sqrt(2 * float(matrix.square().sum()) / 20)


def test_the_interval_of_the_trace_covers_it() -> None:
    num_probes, repetitions = 8, 500
    matrix = random_symmetric(1, 60)[0]
    pool = density_of(matrix, num_probes * repetitions, steps=1)
    covered = 0
    for rows in torch.arange(num_probes * repetitions).split(num_probes):
        few = replace(pool, nodes=pool.nodes[rows], weights=pool.weights[rows], complete=pool.complete[rows])
        covered += few.trace.lower <= float(matrix.trace()) <= few.trace.upper
    assert abs(covered / repetitions - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / repetitions)


def test_the_mean_of_a_smooth_function() -> None:
    matrix = with_spectrum(numbers(200))
    assert holds(density_of(matrix, 20, steps=25).mean(torch.exp), float(numbers(200).exp().mean()))


def test_one_probe_has_no_interval() -> None:
    trace = density_of(random_symmetric(1, 30)[0], 1, steps=3).trace
    assert math.isfinite(trace.mean) and math.isnan(trace.stderr) and math.isnan(trace.upper)


@pytest.mark.parametrize("kind", ["random", "diagonal", "projector"])
def test_signs_have_the_variance_that_is_said_and_never_more_than_directions(kind: str) -> None:
    dim, num_probes = 40, 20000
    matrix = {
        "random": random_symmetric(1, dim)[0],
        "diagonal": torch.diag(numbers(dim)),
        "projector": with_spectrum(torch.arange(dim) < 10),
    }[kind]
    signs = probes(num_probes, dim)
    directions = random_start(num_probes, dim, torch.Generator().manual_seed(0), like=signs)
    found = [float(((starts @ matrix) * starts).sum(1).var()) for starts in (signs, directions)]
    squares = float(matrix.square().sum())
    of_signs = 2 / dim**2 * (squares - float(matrix.diagonal().square().sum()))
    of_directions = 2 / (dim * (dim + 2)) * (squares - float(matrix.trace()) ** 2 / dim)
    assert found == pytest.approx([of_signs, of_directions], rel=0.06, abs=1e-15)
    assert of_signs <= (1 + 2 / dim) * of_directions


# ---- the mass at the origin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("rank", [1, 7, 40, 199])
@pytest.mark.parametrize("rule", ["sharp", "paper"])
def test_a_known_rank(rank: int, dtype: torch.dtype, rule: Any) -> None:
    """Enough steps to find every eigenvalue, and more: rounding must not split the zeros."""
    spectrum = torch.cat([torch.linspace(-3, 5, rank, dtype=F64) + 0.011, torch.zeros(200 - rank, dtype=F64)])
    matrix, starts = with_spectrum(spectrum).to(dtype), probes(12, 200, dtype=dtype)
    density = spectral_density(product(matrix), starts, steps=200)
    values, masses = measures(matrix.double(), starts.double())
    exact = masses[:, values.abs() < 1e-5].sum(1)
    found = density.mass_at_origin(rule=rule)
    assert found.mean == pytest.approx(float(exact.mean()), abs=1e-9 if dtype == F64 else 1e-4)
    assert holds(density.rank(), rank)
    assert density.rank().mean == pytest.approx(200 * (1 - found.mean))


@pytest.mark.parametrize("noise", [1e-7, 1e-6])
def test_zeros_that_noise_has_split_are_one_mass(noise: float) -> None:
    dim, rank = 300, 6
    spectrum = torch.cat([torch.tensor([-2.0, -1, 1, 2, 3, 4], dtype=F64), torch.zeros(dim - rank, dtype=F64)])
    matrix = (with_spectrum(spectrum) + noise / math.sqrt(dim) * random_symmetric(1, dim, 1)[0]).float()
    density = density_of(matrix, 8, steps=40)
    assert holds(density.rank(tol=1e-5), rank)
    assert holds(density.negative_mass(tol=1e-5), 2 / dim)


def test_two_ritz_values_that_straddle_the_origin() -> None:
    """A symmetric spectrum and an even number of nodes: there is none at the origin, and its mass is halved."""
    spectrum = torch.cat([torch.zeros(100, dtype=F64), torch.linspace(0.2, 1, 50, dtype=F64)])
    spectrum = torch.cat([spectrum, -spectrum[100:]])
    density = density_of(spectrum, 2, steps=8)
    nearest = density.weights.gather(1, density.nodes.abs().argmin(1, keepdim=True))
    paper, sharp = density.mass_at_origin(rule="paper").mean, density.mass_at_origin().mean
    assert_close(density.nodes, -density.nodes.flip(1), steps=10000)
    assert float(nearest.max()) < 0.3 < 0.5 <= sharp <= paper < 0.6
    assert paper == pytest.approx(2 * float(nearest.mean()))
    assert density.negative_mass().mean == pytest.approx((1 - sharp) / 2)
    odd = density_of(spectrum, 2, steps=9)  # one node at the origin, and nothing to merge
    assert odd.mass_at_origin(rule="paper").mean == pytest.approx(odd.mass_at_origin().mean)
    assert odd.mass_at_origin().mean == pytest.approx(sharp, abs=0.02)


def test_a_spectrum_on_one_side_has_nothing_to_merge() -> None:
    spectrum = torch.cat([torch.zeros(80, dtype=F64), torch.linspace(0.01, 1, 120, dtype=F64)])
    for sign, end in ((1, 0), (-1, -1)):
        density = density_of(sign * spectrum, 2, steps=5)
        assert density.mass_at_origin(rule="paper").mean == pytest.approx(float(density.weights[:, end].mean()))
        assert 0.4 <= density.mass_at_origin().mean <= density.mass_at_origin(rule="paper").mean < 0.6
        assert density.negative_mass().mean == pytest.approx(0 if sign > 0 else 1 - density.mass_at_origin().mean)


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_the_sharp_bound_is_the_least_square_of_a_polynomial_that_is_one_at_the_origin(steps: int) -> None:
    matrix = random_symmetric(1, 30)[0] / 5
    starts = probes(3, 30)
    values, masses = measures(matrix, starts)
    powers = values[:, None] ** torch.arange(steps)
    gram = torch.einsum("bp,pk,pl->bkl", masses, powers, powers)
    expected = 1 / torch.linalg.inv(gram)[:, 0, 0]
    for row in range(3):
        density = spectral_density(product(matrix), starts[row][None], steps=steps)
        assert density.mass_at_origin().mean == pytest.approx(float(expected[row]), rel=1e-7)


@pytest.mark.parametrize("zeros", [0, 300, 800])
def test_more_steps_lower_the_bound_towards_the_truth(zeros: int) -> None:
    """A spectrum as networks have it: zeros, many small eigenvalues of both signs, a few large ones."""
    small = torch.exp(2 * numbers(990 - zeros) - 4) * torch.where(numbers(990 - zeros, 1) > -0.5, 1.0, -1.0)
    spectrum = torch.cat([torch.zeros(zeros, dtype=F64), small, torch.linspace(1, 10, 10, dtype=F64)])
    starts = probes(1, 1000)
    last = 1.0
    for steps in (5, 10, 20, 40, 80):
        density = spectral_density(product(spectrum), starts, steps=steps)
        sharp, paper = density.mass_at_origin().mean, density.mass_at_origin(rule="paper").mean
        assert zeros / 1000 - 1e-9 <= sharp <= min(paper, last) + 1e-9
        # What is too much at the origin is what the negative part may lack.
        exact = float((spectrum < 0).double().mean())
        assert exact - (sharp - zeros / 1000) - 1e-9 <= density.negative_mass().mean <= exact + (paper - zeros / 1000)
        last = sharp
    assert zeros < 800 or last < 0.84


@pytest.mark.parametrize("steps", [6, 7, 20])
def test_the_zeros_leave_the_nodes_next_to_the_origin_without_moving_the_first_moment(steps: int) -> None:
    spectrum = torch.cat([torch.zeros(100, dtype=F64), torch.linspace(-1, 0, 30, dtype=F64), 3 * numbers(70).abs()])
    density = density_of(spectrum, 1, steps=steps)
    nodes, weights = density.nodes[0], density.weights[0]
    first = int((nodes < 0).sum())
    low, high = nodes[first - 1], nodes[first]
    origin, negative = density.mass_at_origin().mean, density.negative_mass().mean
    left = [negative - float(weights[: first - 1].sum()), 1 - origin - negative - float(weights[first + 1 :].sum())]
    assert min(left) > 0  # there is enough of both
    expected = float(weights[first - 1] * low + weights[first] * high)
    assert left[0] * float(low) + left[1] * float(high) == pytest.approx(expected)
    assert sum(left) == pytest.approx(float(weights[first - 1] + weights[first]) - origin)


@pytest.mark.parametrize("shift", [1.5, -1.5])
def test_nothing_is_degenerate_where_the_origin_lies_in_a_gap(shift: float) -> None:
    spectrum = torch.linspace(-0.5, 0.5, 200, dtype=F64) + shift
    density = density_of(spectrum, 2, steps=25)
    assert density.mass_at_origin().mean < 1e-12 < 1e-4 < density.mass_at_origin(rule="paper").mean
    assert density.rank().mean == pytest.approx(200)
    assert density_of(spectrum + 1e5 * shift, 2, steps=80).mass_at_origin().mean == 0  # beyond all numbers
    assert density.negative_mass().mean == pytest.approx(float(shift < 0), abs=1e-12)


def test_what_counts_as_zero_may_be_said() -> None:
    density = density_of(torch.tensor([-5.0, -1e-3, 1e-4, 0.0, 10.0], dtype=F64), 2)
    assert [density.mass_at_origin(tol).mean for tol in (None, 2e-5, 2e-4)] == pytest.approx([0.2, 0.4, 0.6])
    assert [density.negative_mass(tol).mean for tol in (None, 2e-5, 2e-4)] == pytest.approx([0.4, 0.4, 0.2])
    assert density.rank(2e-5).mean == pytest.approx(3)


def test_the_negative_mass_of_a_known_operator() -> None:
    spectrum = torch.cat([torch.linspace(-2, -1, 60, dtype=F64), torch.linspace(0.5, 3, 140, dtype=F64)])
    assert density_of(spectrum, 2, steps=30).negative_mass().mean == pytest.approx(0.3, abs=1e-6)
    estimate = density_of(with_spectrum(spectrum), 20, steps=30).negative_mass()
    assert holds(estimate, 0.3) and 0 < estimate.stderr < 0.05


# ---- ends of the Krylov space ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_fewer_dimensions_than_steps(dtype: torch.dtype) -> None:
    matrix, starts = random_symmetric(1, 6)[0].to(dtype), probes(4, 6, dtype=dtype)
    density = spectral_density(product(matrix), starts, steps=50)
    values, masses = measures(matrix.double(), starts.double())
    assert density.nodes.shape == (4, 6) and bool(density.complete.all())
    assert_close(density.nodes, values.expand(4, 6), dtype=dtype)
    assert_close(density.weights, masses, dtype=dtype, steps=1000)
    assert density.mass_at_origin().mean == 0 and density.rank().mean == 6
    assert density.moment(30).mean == pytest.approx(float((masses * values**30).sum(1).mean()), rel=1e-3)


def test_one_dimension() -> None:
    density = spectral_density(product(torch.tensor([-3.0])), torch.tensor([[1.0], [-2.0]]))
    assert density.nodes.tolist() == [[-3.0], [-3.0]] and density.weights.tolist() == [[1.0], [1.0]]
    assert density.trace.mean == -3 and density.negative_mass().mean == 1 and density.rank().mean == 1


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_a_multiple_of_the_identity(value: float, dtype: torch.dtype) -> None:
    density = spectral_density(lambda vectors: value * vectors, probes(3, 50, dtype=dtype), steps=20)
    assert density.nodes.shape == (3, 20) and bool(density.complete.all())
    assert density.iterations.tolist() == [1, 1, 1] and density.matvecs == 3
    assert_close(density.nodes, torch.full((3, 20), value, dtype=F64), dtype=dtype)
    assert_close(density.weights.sum(1), torch.ones(3, dtype=F64))
    assert density.mass_at_origin().mean == (value == 0) and density.negative_mass().mean == (value < 0)
    assert density.trace.mean == pytest.approx(50 * value, rel=1e-5)
    assert density.rank().mean == (0 if value == 0 else 50)


def test_rows_that_are_complete_stop_and_the_others_go_on() -> None:
    diagonal = torch.arange(-3.0, 17.0, dtype=F64)
    starts = probes(4, 20)
    starts[1] = torch.eye(20, dtype=F64)[3]  # the eigenvector of 0
    starts[2, 2:] = 0.0  # two eigenvectors, of -3 and -2
    seen: list[list[int]] = []

    def matvec(vectors: Tensor) -> Tensor:
        seen.append((vectors.abs().sum(1) > 0).nonzero()[:, 0].tolist())
        return vectors * diagonal

    density = spectral_density(matvec, starts, steps=9)
    assert density.iterations.tolist() == [9, 1, 2, 9] and density.complete.tolist() == [False, True, True, False]
    assert density.matvecs == sum(map(len, seen)) and seen[:3] == [[0, 1, 2, 3], [0, 2, 3], [0, 3]]
    assert_close(density.nodes[1], torch.zeros(9, dtype=F64), dtype=F64)
    assert_close(density.nodes[2], [-3.0] + 8 * [-2.0], dtype=F64)  # filled up with the last node
    assert_close(density.weights[2], [0.5, 0.5] + 7 * [0.0], dtype=F64)
    alone = spectral_density(product(diagonal), starts[[0, 3]], steps=9)
    assert_close(density.nodes[[0, 3]], alone.nodes)
    assert_close(density.weights[[0, 3]], alone.weights)


# ---- rows, random numbers, what is not finite ------------------------------------------------------------------------


def test_rows_do_not_depend_on_their_company() -> None:
    matrix, starts = random_symmetric(1, 50)[0], probes(5, 50)
    together = spectral_density(product(matrix), starts, steps=20)
    for at_once in (1, 2):
        apart = spectral_density(product(matrix), starts, steps=20, at_once=at_once)
        assert_close(apart.nodes, together.nodes)
        assert_close(apart.weights, together.weights)
        assert apart.iterations.tolist() == together.iterations.tolist() == [20] * 5
        assert apart.trace.mean == pytest.approx(together.trace.mean)


def test_no_more_rows_at_once_than_asked_for() -> None:
    sizes: list[int] = []

    def matvec(vectors: Tensor) -> Tensor:
        sizes.append(len(vectors))
        return vectors * torch.arange(12.0, dtype=F64)

    spectral_density(matvec, probes(5, 12), steps=3, at_once=2)
    assert sizes == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_the_same_generator_gives_the_same_numbers() -> None:
    before = torch.get_rng_state()
    matrix = random_symmetric(1, 30)[0]
    first, again, other = (density_of(matrix, 3, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.nodes, again.nodes) and torch.equal(first.weights, again.weights)
    assert not torch.equal(first.nodes, other.nodes)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(probes(3, 30).sign(), probes(3, 30, dtype=torch.float32).double().sign())
    assert_close(probes(3, 30).square().sum(1), torch.ones(3, dtype=F64))


def test_a_row_that_is_not_finite_is_nan_and_so_are_the_estimates() -> None:
    def matvec(vectors: Tensor) -> Tensor:
        image = vectors * torch.arange(1.0, 31.0, dtype=F64)
        image[1:2] *= torch.nan
        return image

    density = spectral_density(matvec, probes(3, 30), steps=6)
    assert density.nodes.isnan().all(1).tolist() == density.weights.isnan().all(1).tolist() == [False, True, False]
    assert density.complete.tolist() == [False, False, False] and density.iterations.tolist() == [6, 1, 6]
    estimates = density.trace, density.rank(), density.mass_at_origin(rule="paper"), density.negative_mass()
    assert all(math.isnan(estimate.mean) for estimate in estimates)
    assert bool(density.smoothed(torch.zeros(2), 1.0).isnan().all())
    nothing = spectral_density(lambda vectors: vectors * torch.inf, probes(2, 30), steps=6)
    assert bool(nothing.nodes.isnan().all()) and math.isnan(nothing.trace.mean)


def test_workers_may_decide_together() -> None:
    """A row that another worker takes for complete is complete; one that it does not goes on, without harm."""
    diagonal, starts = torch.arange(8.0, dtype=F64), probes(2, 8)
    starts[1] = torch.eye(8, dtype=F64)[5]
    stopped = spectral_density(product(diagonal), starts, decide=lambda done: torch.ones_like(done))
    assert stopped.iterations.tolist() == [1, 1] and bool(stopped.complete.all())
    going = spectral_density(product(diagonal), starts, steps=4, decide=lambda done: torch.zeros_like(done))
    assert going.iterations.tolist() == [4, 4]
    assert float((going.weights * going.nodes).sum(1)[1]) == pytest.approx(5)


def test_arguments_are_left_alone() -> None:
    starts = probes(2, 12)
    copy = starts.clone()
    spectral_density(lambda vectors: vectors, starts)  # an operator that returns its argument
    spectral_density(product(torch.arange(12.0, dtype=F64)), starts, steps=4)
    assert torch.equal(starts, copy)


# ---- networks --------------------------------------------------------------------------------------------------------


def mlp_hessian(widths: list[int], num_samples: int) -> Tensor:
    """The (P, P) Hessian of the cross-entropy of a random tanh network without biases, at random data."""

    def net() -> nn.Module:
        layers = [layer for ends in pairwise(widths) for layer in (nn.Linear(*ends, bias=False), nn.Tanh())]
        return nn.Sequential(*layers[:-1])

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, widths[0], generator=generator, dtype=F64)
    classes = torch.randint(widths[-1], (num_samples,), generator=generator)
    return dense_gradient_and_hessian(
        made(net), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), (inputs, classes)
    )[1]


def rank_of(matrix: Tensor) -> int:
    sizes = torch.linalg.eigvalsh(matrix).abs()
    return int((sizes > 1e-10 * sizes.max()).sum())


@pytest.mark.parametrize("widths", [[9, 6, 3], [7, 6, 5, 3]])
@pytest.mark.parametrize("num_samples", [1, 2, 4])
def test_the_rank_of_a_network_grows_with_the_samples(widths: list[int], num_samples: int) -> None:
    r"""One sample's Hessian has rank 2 sum(hidden) + d_y at most, N samples' no more than N times that.

    To second order a sample sees layer l only through dW_l a_{l-1} (as many numbers as l has outputs) and, for all but
    the first, dW_l' delta_l (as many as it has inputs).
    """
    hessian = mlp_hessian(widths, num_samples)
    rank, bound = rank_of(hessian), num_samples * (2 * sum(widths[1:-1]) + widths[-1])
    assert rank <= min(bound, len(hessian))
    assert num_samples > 1 or rank == bound - (len(widths) - 1)  # a scale per hidden layer and one for softmax are free
    assert holds(density_of((hessian + hessian.T) / 2, 12).rank(), rank)


def test_the_papers_bound_on_the_rank_does_not_hold_for_a_data_set() -> None:
    """Section 7.1 prints 4 d_y (sum_l N_l + d_x), without N. It holds for a sample, and not for a hundred."""
    widths = [16, 16, 1 + 1]
    printed = 4 * widths[-1] * (sum(widths[1:-1]) + widths[0])
    assert rank_of(mlp_hessian(widths, 1)) <= printed
    hessian = mlp_hessian(widths, 100)
    assert rank_of(hessian) > printed


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: spectral_density(product(torch.ones(3)), torch.ones(3)),
            r"starts must be a floating-point \(B, P\) tensor, got torch.float32 of shape \(3,\)",
        ),
        (lambda: spectral_density(product(torch.ones(3)), torch.ones(2, 3, dtype=torch.int64)), "got torch.int64"),
        (lambda: spectral_density(product(torch.ones(3)), torch.ones(0, 3)), r"of shape \(0, 3\)"),
        (lambda: density_of(torch.arange(9.0), steps=0), "steps=0 leaves no node for the quadrature"),
        (lambda: density_of(torch.arange(9.0), steps=3).moment(6), r"order=6 is not from 0 to 2 \* steps - 1 = 5"),
        (lambda: density_of(torch.arange(9.0)).moment(-1), "order=-1 is not from 0"),
        (lambda: density_of(torch.arange(9.0)).mass_at_origin(rule="nearest"), "rule='nearest' is no way to read"),  # type: ignore[arg-type]
        (lambda: density_of(torch.arange(9.0)).rank(-1.0), "tol=-1.0 is a relative distance"),
        (lambda: density_of(torch.arange(9.0)).smoothed(torch.zeros(2), 0.0), "width=0.0 must be positive"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
