"""Random-matrix models against enumeration and simulation, and the curve of the batch size against repeated studies.

A Gaussian matrix plus a spike along the first axis can be rotated around that axis into tridiagonal form, whose entries
are independent normal and chi numbers (Dumitriu and Edelman 2002). The draws below are therefore exact ones of matrices
with thousands of rows, and cost milliseconds. A dense simulation stands beside them.
"""

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import least_squares

from lightning_eoss.theory.random_matrix import (
    BatchSizeCurve,
    CriticalBatchSize,
    Formula,
    eigenvector_overlap,
    fit_batch_size_curve,
    full_batch_eigenvalue,
    gap_exponent,
    inverse_effective_batch_size,
    marchenko_pastur_critical_batch_size,
    marchenko_pastur_edge,
    marchenko_pastur_outlier,
    maximal_learning_rate,
    wigner_critical_batch_size,
    wigner_edge,
    wigner_outlier,
)

NAN = math.nan
Array = NDArray[np.float64]

VARIANCE = 4.0  # P sigma^2 of the checks: P = 1000 and sigma^2 = 4e-3
BATCH: dict[str, Any] = {"batch_size": 64, "dataset_size": 1024}
Q = math.sqrt(VARIANCE * (1 / 64 - 1 / 1024))  # .24206


def with_gamma(gamma: float, batch_size: int = 4) -> dict[str, Any]:
    """The arguments that give P u = gamma."""
    return {"num_parameters": gamma * batch_size, "batch_size": batch_size}


def within_four_errors(values: Array, expected: float, bias: float = 0.0) -> bool:
    """Whether the mean agrees with what is expected, up to a bias known beforehand."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    print(f"{values.mean():.5f} +- {error:.5f}, expected {expected:.5f}, bias up to {bias:.5f}")
    return bool(abs(values.mean() - expected) <= 4 * error + bias)


# --------------------------------------------------------------------------------------- sampling without replacement


def test_effective_batch_size() -> None:
    assert 1 / inverse_effective_batch_size(64, 1024) == pytest.approx(68.26666666666667, rel=1e-12)
    assert inverse_effective_batch_size(49, 49) == 0.0 and inverse_effective_batch_size(1, 1) == 0.0
    assert inverse_effective_batch_size(np.array([1, 2, 8]), 8).tolist() == [0.875, 0.375, 0.0]
    assert inverse_effective_batch_size(64) == 1 / 64


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_all_batches_of_a_small_data_set(n: int) -> None:
    """The covariance of H_B over every batch is u times the (n-1)-normalised one of H_i; n-normalised it is not."""
    raw = np.random.default_rng(n).standard_normal((n, 3, 3)) ** 3  # nothing Gaussian about it
    samples = (raw + raw.transpose(0, 2, 1)).reshape(n, 9)
    covariance = np.cov(samples, rowvar=False)
    variance = np.trace(covariance) / 3  # P sigma^2
    for size in range(1, n + 1):
        batches = np.array([samples[list(chosen)].mean(0) for chosen in combinations(range(n), size)])
        noise = batches - samples.mean(0)
        u = inverse_effective_batch_size(size, n)
        np.testing.assert_allclose(noise.T @ noise / len(noise), u * covariance, rtol=1e-11, atol=1e-13)
        edge = wigner_edge(variance, batch_size=size, dataset_size=n)
        assert (noise**2).sum() / len(noise) / 3 == pytest.approx((edge / 2) ** 2, rel=1e-11, abs=1e-13)
        if size < n:
            wrong = u * np.cov(samples, rowvar=False, ddof=0)
            assert np.trace(noise.T @ noise) / len(noise) / np.trace(wrong) == pytest.approx(n / (n - 1), rel=1e-11)


# ------------------------------------------------------------------------------------------------------------- Wigner


@pytest.mark.parametrize(
    ("eigenvalue", "outlier", "overlap"),
    [
        (1.0, 1.05859375, 0.94140625),
        (0.30, 0.4953125, 0.348958333333),
        (0.22, 0.484122918276, 0.0),
        (0.0, 0.484122918276, 0.0),
        (-0.8, -0.8732421875, 0.908447265625),
        (-0.2, -0.484122918276, 0.0),
    ],
)
def test_wigner_values(eigenvalue: float, outlier: float, overlap: float) -> None:
    assert wigner_outlier(eigenvalue, VARIANCE, **BATCH) == pytest.approx(outlier, rel=1e-9)
    assert eigenvector_overlap(eigenvalue, VARIANCE, **BATCH) == pytest.approx(overlap, rel=1e-9)
    assert wigner_edge(VARIANCE, **BATCH) == pytest.approx(0.484122918276, rel=1e-9)


@pytest.mark.parametrize("eigenvalue", [1.0, 0.30, 0.22, -0.8])
def test_wigner_scales(eigenvalue: float) -> None:
    for function, power in ((wigner_outlier, 1), (full_batch_eigenvalue, 1), (eigenvector_overlap, 0)):
        scaled = function(3 * eigenvalue, 9 * VARIANCE, **BATCH)
        assert scaled == pytest.approx(3**power * function(eigenvalue, VARIANCE, **BATCH), rel=1e-12, nan_ok=True)
    slower = maximal_learning_rate(3 * eigenvalue, 9 * VARIANCE, **BATCH)
    assert slower == pytest.approx(maximal_learning_rate(eigenvalue, VARIANCE, **BATCH) / 3, rel=1e-12)
    for size in ("linear_scaling", "visible"):
        one, other = (wigner_critical_batch_size(f * eigenvalue, f**2 * VARIANCE) for f in (1, 3))
        assert getattr(one, size) == pytest.approx(getattr(other, size), rel=1e-12)


def test_wigner_is_continuous() -> None:
    below, above = Q * (1 - 1e-8), Q * (1 + 1e-8)
    for function in (wigner_outlier, eigenvector_overlap):
        for sign in (1, -1):
            jump = function(sign * above, VARIANCE, **BATCH) - function(sign * below, VARIANCE, **BATCH)
            assert abs(jump) < 1e-6
    # The threshold of Lemma 11 would lose three quarters at once.
    assert eigenvector_overlap(2 * Q, VARIANCE, **BATCH) == pytest.approx(0.75)


@pytest.mark.parametrize("eigenvalue", [1.0, 0.1, 0.0, -0.3, 1 / 3])
def test_the_full_batch_is_itself(eigenvalue: float) -> None:
    full: dict[str, Any] = {"batch_size": 49, "dataset_size": 49}
    assert wigner_outlier(eigenvalue, VARIANCE, **full) == eigenvalue
    assert full_batch_eigenvalue(eigenvalue, VARIANCE, **full) == eigenvalue
    assert eigenvector_overlap(eigenvalue, VARIANCE, **full) == float(eigenvalue != 0)
    assert wigner_edge(VARIANCE, **full) == 0
    # No noise does the same at any batch size.
    assert wigner_outlier(eigenvalue, 0.0, **BATCH) == eigenvalue
    largest = max(eigenvalue, 0.0)
    assert maximal_learning_rate(eigenvalue, VARIANCE, **full) == (2 / largest if largest else math.inf)


def test_full_batch_eigenvalue_inverts() -> None:
    eigenvalues = np.array([2.0, 0.5, 1.01 * Q, -1.01 * Q, -0.9])
    seen = wigner_outlier(eigenvalues, VARIANCE, **BATCH)
    np.testing.assert_allclose(full_batch_eigenvalue(seen, VARIANCE, **BATCH), eigenvalues, rtol=1e-12)
    hidden = full_batch_eigenvalue(np.array([1.99 * Q, -1.99 * Q, 0.0]), VARIANCE, **BATCH)
    assert np.isnan(hidden).all()


def test_broadcasting_and_types() -> None:
    sizes = np.array([1, 16, 1024])
    table = wigner_outlier(np.array([[1.0], [-0.8]]), VARIANCE, batch_size=sizes, dataset_size=1024)
    assert isinstance(table, np.ndarray) and table.shape == (2, 3)
    assert table[1, 1] == wigner_outlier(-0.8, VARIANCE, batch_size=16, dataset_size=1024)
    assert marchenko_pastur_outlier(np.ones(2), np.ones((3, 1)), num_parameters=8, batch_size=2).shape == (3, 2)
    for value in (
        wigner_outlier(1, 4, batch_size=16),
        eigenvector_overlap(1, 4, batch_size=16),
        full_batch_eigenvalue(2, 4, batch_size=16),
        maximal_learning_rate(1, 4, batch_size=16),
        marchenko_pastur_outlier(5, 1, num_parameters=64, batch_size=16),
        inverse_effective_batch_size(np.int64(3)),
    ):
        assert type(value) is float


def test_what_is_not_known_stays_unknown() -> None:
    for function in (wigner_outlier, eigenvector_overlap, full_batch_eigenvalue, maximal_learning_rate):
        assert math.isnan(function(NAN, VARIANCE, **BATCH)) and math.isnan(function(1.0, NAN, **BATCH))
    for eigenvalue, bulk in ((NAN, 1.0), (5.0, NAN)):
        assert math.isnan(marchenko_pastur_outlier(eigenvalue, bulk, **with_gamma(2)))
        assert math.isnan(marchenko_pastur_critical_batch_size(eigenvalue, bulk, num_parameters=9).visible)
        assert math.isnan(wigner_critical_batch_size(eigenvalue, bulk, dataset_size=9).visible)


# --------------------------------------------------------------------------------------------------- Marchenko-Pastur


@pytest.mark.parametrize(
    ("formula", "eigenvalue", "gamma", "expected"),
    [
        ("corrected", 5.0, 2.0, 7.5),
        ("corrected", 3.2, 2.0, 6.10909090909),
        ("corrected", 0.6, 0.25, 2.25),
        ("corrected", 4.5, 4.0, 9.64285714286),
        ("additive", 5.0, 2.0, 6.66666666667),
        ("additive", 3.2, 2.0, 5.82842712475),
        ("additive", 0.6, 0.25, 2.25),
        ("additive", 4.5, 4.0, 9.0),
        ("paper", 5.0, 2.0, 6.66666666667),
        ("paper", 3.2, 2.0, 5.86666666667),
        ("paper", 0.6, 0.25, 2.5),
        ("paper", 4.5, 4.0, 10.0),
    ],
)
def test_marchenko_pastur_values(formula: Formula, eigenvalue: float, gamma: float, expected: float) -> None:
    batch = with_gamma(gamma)
    assert marchenko_pastur_outlier(eigenvalue, 1.0, **batch, formula=formula) == pytest.approx(expected, rel=1e-9)
    scaled = marchenko_pastur_outlier(3 * eigenvalue, 3.0, **batch, formula=formula)
    assert scaled == pytest.approx(3 * expected, rel=1e-9)
    edge = 2 * (1 + gamma) if formula == "paper" else (1 + math.sqrt(gamma)) ** 2
    assert marchenko_pastur_edge(1.0, **batch, formula=formula) == pytest.approx(edge, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.25, 2.0, 4.0])  # at 1 the two outliers agree
def test_equation_16_as_printed(gamma: float) -> None:
    for eigenvalue in (1.01 * (1 + gamma), 3 * (1 + gamma), 100.0):
        printed = (eigenvalue + 1 - gamma) / (1 - gamma / eigenvalue)
        ours = marchenko_pastur_outlier(eigenvalue, 1.0, **with_gamma(gamma), formula="paper")
        assert ours == pytest.approx(printed, rel=1e-12)
        assert abs(marchenko_pastur_outlier(eigenvalue, 1.0, **with_gamma(gamma)) - printed) > 1e-3
    if gamma > 1:  # falls where it should rise
        falling = marchenko_pastur_outlier(
            np.array([1.05, 1.2]) * (1 + gamma), 1.0, **with_gamma(gamma), formula="paper"
        )
        assert falling[0] > falling[1]


@pytest.mark.parametrize("formula", ["corrected", "additive", "paper"])
@pytest.mark.parametrize("gamma", [0.25, 1.0, 4.0])
def test_marchenko_pastur_is_continuous(formula: Formula, gamma: float) -> None:
    root = math.sqrt(gamma)
    threshold = {"corrected": 1 + root, "additive": gamma + root, "paper": 1 + gamma}[formula]
    near = threshold * (1 + 1e-8 * np.array([-1, 1]))
    below, above = marchenko_pastur_outlier(near, 1.0, **with_gamma(gamma), formula=formula)
    assert abs(above - below) < 1e-6


def test_the_corrected_formula_alone_is_exact_at_the_full_batch() -> None:
    full: dict[str, Any] = {"num_parameters": 1000, "batch_size": 49, "dataset_size": 49}
    for eigenvalue in (5.0, 1 / 3 + 1, 1.0):
        assert marchenko_pastur_outlier(eigenvalue, 1.0, **full) == eigenvalue
        assert marchenko_pastur_outlier(eigenvalue, 0.0, **full) == eigenvalue
    for formula in ("additive", "paper"):
        assert marchenko_pastur_outlier(5.0, 1.0, **full, formula=formula) == 6.0
    assert marchenko_pastur_edge(1.0, **full) == 1.0


def test_degenerate_bulks() -> None:
    for formula in ("corrected", "additive", "paper"):
        assert marchenko_pastur_outlier(5.0, 0.0, **with_gamma(2), formula=formula) == 5.0  # no noise
        assert marchenko_pastur_outlier(0.0, 0.0, **with_gamma(2), formula=formula) == 0.0
        inside = marchenko_pastur_outlier(np.array([0.9, 0.0, -3.0]), 1.0, **with_gamma(2), formula=formula)
        assert (inside == marchenko_pastur_edge(1.0, **with_gamma(2), formula=formula)).all()


# -------------------------------------------------------------------------------------------------------- simulations

Tridiagonal = tuple[Array, Array]


def goe(rng: np.random.Generator, size: int, q: float) -> Tridiagonal:
    """A GOE matrix with semicircle [-2q, 2q], rotated around the first axis: diagonal and its neighbour."""
    return rng.normal(0, q * math.sqrt(2 / size), size), q * np.sqrt(rng.chisquare(np.arange(size - 1, 0, -1)) / size)


def wishart(rng: np.random.Generator, size: int, count: int, first: float = 1.0) -> Tridiagonal:
    """X'X / count of normal samples, rotated around the first axis, along which the variance is ``first``."""
    rows = min(size, count)
    diagonal = np.sqrt(rng.chisquare(count - np.arange(rows)))
    above = np.sqrt(rng.chisquare(size - 1 - np.arange(min(rows, size - 1))))
    diagonal[0] *= math.sqrt(first)
    squares = np.zeros(min(size, count + 1))
    squares[:rows] += diagonal**2
    squares[1:] += above[: len(squares) - 1] ** 2
    return squares / count, diagonal[: len(squares) - 1] * above[: len(squares) - 1] / count


def extremal(matrix: Tridiagonal, spike: float, *, smallest: bool = False) -> tuple[float, float]:
    """An end of the spectrum after adding a spike along the first axis, and the overlap of its eigenvector with it."""
    diagonal, neighbour = matrix
    diagonal = diagonal + spike * (np.arange(len(diagonal)) == 0)
    index = 0 if smallest else len(diagonal) - 1
    value, vector = eigh_tridiagonal(diagonal, neighbour, select="i", select_range=(index, index))
    return value[0], vector[0, 0] ** 2


def test_tridiagonal_draws_are_those_of_dense_matrices() -> None:
    """Means of the largest eigenvalue and the overlap agree within four standard errors of their difference."""
    rng, size, spike = np.random.default_rng(1), 100, 0.4
    drawn, dense = [], []
    for _ in range(300):
        drawn.append(extremal(goe(rng, size, Q), spike))
        raw = rng.normal(0, Q / math.sqrt(2 * size), (size, size))
        matrix = raw + raw.T
        matrix[0, 0] += spike
        values, vectors = np.linalg.eigh(matrix)
        dense.append((values[-1], vectors[0, -1] ** 2))
    for one, other in zip(np.transpose(drawn), np.transpose(dense), strict=True):
        assert abs(one.mean() - other.mean()) < 4 * math.sqrt((one.var() + other.var()) / 300)


@pytest.mark.parametrize("spike", [1.0, 0.3, -0.8])
def test_wigner_outlier_and_overlap_in_simulation(spike: float) -> None:
    """Finite matrices err by a few q / P, the overlap near its threshold by 10 / P: far inside a standard error."""
    size, rng = 2000, np.random.default_rng(2)
    draws = np.array([extremal(goe(rng, size, Q), spike, smallest=spike < 0) for _ in range(150)])
    assert within_four_errors(draws[:, 0], wigner_outlier(spike, VARIANCE, **BATCH), bias=2 * Q / size)
    assert within_four_errors(draws[:, 1], eigenvector_overlap(spike, VARIANCE, **BATCH), bias=10 / size)
    if abs(spike) > 2 * Q:  # closer to the edge a single draw may lie in the bulk, and then says nothing
        inferred = full_batch_eigenvalue(draws[:, 0], VARIANCE, **BATCH)
        assert within_four_errors(inferred, spike, bias=4 * draws[:, 0].var())  # the mean of a curved function


@pytest.mark.parametrize("spike", [0.05, -0.05])
def test_wigner_edge_in_simulation(spike: float) -> None:
    """A hidden eigenvalue leaves the edge, which Tracy and Widom shift by 1.2065 q P^-2/3; the next order is q / P."""
    size, rng = 2000, np.random.default_rng(3)
    draws = np.array([extremal(goe(rng, size, Q), spike, smallest=spike < 0) for _ in range(300)])
    shifted = wigner_outlier(spike, VARIANCE, **BATCH) * (1 - 1.2065 / 2 * size ** (-2 / 3))
    assert within_four_errors(draws[:, 0], shifted, bias=Q / size)
    assert not within_four_errors(draws[:, 0], wigner_outlier(spike, VARIANCE, **BATCH), bias=Q / size)  # it is seen
    assert draws[:, 1].mean() < 20 / size


@pytest.mark.parametrize(("eigenvalue", "gamma"), [(5.0, 2.0), (4.5, 4.0), (2.0, 0.25), (12.0, 8.0)])
def test_sample_covariance_in_simulation(eigenvalue: float, gamma: float) -> None:
    """The corrected formula, in the model of B samples from endless data; finite matrices err by some 1 / B."""
    count, rng = 1000, np.random.default_rng(4)
    size = round(gamma * count)
    draws = np.array([extremal(wishart(rng, size, count, eigenvalue), 0.0)[0] for _ in range(150)])
    batch: dict[str, Any] = {"num_parameters": size, "batch_size": count}
    bias = 3 * eigenvalue / count
    assert within_four_errors(draws, marchenko_pastur_outlier(eigenvalue, 1.0, **batch), bias)
    for formula in ("additive", "paper"):
        wrong = marchenko_pastur_outlier(eigenvalue, 1.0, **batch, formula=formula)
        assert not within_four_errors(draws, wrong, bias)


@pytest.mark.parametrize(("eigenvalue", "gamma"), [(5.0, 2.0), (8.0, 4.0), (2.0, 0.25)])
def test_additive_noise_in_simulation(eigenvalue: float, gamma: float) -> None:
    count, rng = 1000, np.random.default_rng(5)
    size = round(gamma * count)
    draws = np.array([extremal(wishart(rng, size, count), eigenvalue)[0] for _ in range(150)])
    batch: dict[str, Any] = {"num_parameters": size, "batch_size": count}
    bias = 3 * eigenvalue / count
    assert within_four_errors(draws, marchenko_pastur_outlier(eigenvalue, 1.0, **batch, formula="additive"), bias)
    assert not within_four_errors(draws, marchenko_pastur_outlier(eigenvalue, 1.0, **batch), bias)


@pytest.mark.parametrize(("hidden", "gamma"), [(0.6, 0.25), (4.5, 4.0)])
def test_marchenko_pastur_edge_in_simulation(hidden: float, gamma: float) -> None:
    """Additive spikes between the thresholds: no outlier, though one is printed. The shift is Johnstone's (2001)."""
    count, rng = 1000, np.random.default_rng(6)
    size = round(gamma * count)
    draws = np.array([extremal(wishart(rng, size, count), 0.0)[0] for _ in range(300)])
    batch: dict[str, Any] = {"num_parameters": size, "batch_size": count}
    edge = marchenko_pastur_edge(1.0, **batch)
    roots = math.sqrt(count) + math.sqrt(size)
    shift = 1.2065 * roots * (1 / math.sqrt(count) + 1 / math.sqrt(size)) ** (1 / 3) / count
    assert within_four_errors(draws, edge - shift, bias=edge / count)
    outlier = np.array([extremal(wishart(rng, size, count), hidden)[0] for _ in range(100)]).mean()
    assert abs(outlier - edge) < 0.02 * edge
    assert marchenko_pastur_outlier(hidden, 1.0, **batch, formula="additive") == pytest.approx(edge)
    assert marchenko_pastur_outlier(hidden, 1.0, **batch, formula="paper") > 1.1 * edge


def test_information_plus_noise_is_the_corrected_formula() -> None:
    """The model of (14) and (15): E (J + e)(J + e)' has the eigenvalue theta + sigma^2 of the full batch."""
    size, count, signal, rng = 400, 200, 4.0, np.random.default_rng(7)
    draws = []
    for _ in range(60):
        jacobian = rng.standard_normal((count, size))
        jacobian[0, 0] += math.sqrt(signal * count)
        draws.append(np.linalg.norm(jacobian @ jacobian.T / count, 2))
    batch: dict[str, Any] = {"num_parameters": size, "batch_size": count}
    assert within_four_errors(np.array(draws), marchenko_pastur_outlier(signal + 1, 1.0, **batch), bias=3 * 5 / count)
    wrong = marchenko_pastur_outlier(signal + 1, 1.0, **batch, formula="paper")
    assert not within_four_errors(np.array(draws), wrong, bias=3 * 5 / count)


def test_real_subsamples_follow_the_effective_batch_size() -> None:
    """Batches of 32 out of 128 dense Hessians: 1/B - 1/N is right, and 1/B is not. Finite matrices err by q / P."""
    size, dataset, batch, spike, rng = 100, 128, 32, 0.5, np.random.default_rng(8)
    variance, draws = 2.0, []
    for _ in range(40):
        noise = rng.normal(0, math.sqrt(variance / 2 / size), (dataset, size, size))
        noise -= noise.mean(0)  # so that the full Hessian is the spike
        batch_noise = noise[rng.choice(dataset, batch, replace=False)].mean(0)
        hessian = batch_noise + batch_noise.T
        hessian[0, 0] += spike
        draws.append(np.linalg.eigvalsh(hessian)[-1])
    bias = wigner_edge(variance, batch_size=batch) / size
    predicted = wigner_outlier(spike, variance, batch_size=batch, dataset_size=dataset)
    assert within_four_errors(np.array(draws), predicted, bias)
    assert not within_four_errors(np.array(draws), wigner_outlier(spike, variance, batch_size=batch), bias)


# ---------------------------------------------------------------------------------------------- critical batch sizes


@pytest.mark.parametrize("dataset_size", [None, 1024, 50])
def test_wigner_critical_batch_size(dataset_size: int | None) -> None:
    """There the sharpness doubles, the overlap vanishes, and the eigenvalue is at the edge: all at once."""
    critical = wigner_critical_batch_size(0.5, 8.0, dataset_size=dataset_size)
    assert critical.linear_scaling == critical.visible == pytest.approx(1 / (1 / 32 + 1 / (dataset_size or math.inf)))
    at: dict[str, Any] = {"batch_size": critical.visible, "dataset_size": dataset_size}
    assert wigner_outlier(0.5, 8.0, **at) == pytest.approx(1.0, rel=1e-12)
    assert wigner_edge(8.0, **at) == pytest.approx(1.0, rel=1e-12)
    assert eigenvector_overlap(0.5, 8.0, **at) == pytest.approx(0.0, abs=1e-12)
    assert maximal_learning_rate(0.5, 8.0, **at) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("dataset_size", [None, 2048])
@pytest.mark.parametrize("eigenvalue", [1.2, 1.9, 2.0, 5.0, 20.0])
def test_marchenko_pastur_critical_batch_size(eigenvalue: float, dataset_size: int | None) -> None:
    critical = marchenko_pastur_critical_batch_size(eigenvalue, 1.0, num_parameters=10**5, dataset_size=dataset_size)
    options: dict[str, Any] = {"num_parameters": 10**5, "dataset_size": dataset_size}
    doubled = marchenko_pastur_outlier(eigenvalue, 1.0, batch_size=critical.linear_scaling, **options)
    assert doubled == pytest.approx(2 * eigenvalue, rel=1e-9)
    outlier = marchenko_pastur_outlier(eigenvalue, 1.0, batch_size=critical.visible, **options)
    assert outlier == pytest.approx(marchenko_pastur_edge(1.0, batch_size=critical.visible, **options), rel=1e-9)
    larger = min(1.01 * critical.visible, dataset_size or math.inf)
    outlier = marchenko_pastur_outlier(eigenvalue, 1.0, batch_size=larger, **options)
    assert outlier > marchenko_pastur_edge(1.0, batch_size=larger, **options)
    assert np.sign(critical.linear_scaling - critical.visible) == np.sign(eigenvalue - 2)


def test_critical_batch_sizes_at_their_ends() -> None:
    for size, whole in ((None, math.inf), (49, 49.0)):
        nothing = CriticalBatchSize(0.0, 0.0)
        assert wigner_critical_batch_size(1.0, 0.0, dataset_size=size) == nothing  # no noise
        assert marchenko_pastur_critical_batch_size(1.0, 0.0, num_parameters=9, dataset_size=size) == nothing
        assert wigner_critical_batch_size(0.0, 1.0, dataset_size=size) == CriticalBatchSize(whole, whole)
        # An eigenvalue in the bulk is not even seen in the full batch.
        assert marchenko_pastur_critical_batch_size(0.5, 1.0, num_parameters=9, dataset_size=size).visible == whole


def local_exponent(rate: Callable[[float], Any], size: float) -> float:
    """d log rate / d log B."""
    return float(math.log(rate(size * 1.0001) / rate(size / 1.0001)) / (2 * math.log(1.0001)))


def test_theorem_4_never_scales_linearly() -> None:
    """The maximal learning rate grows with B^(1/2) at most, in symmetric noise; in positive noise almost with B."""
    critical = wigner_critical_batch_size(1.0, 400.0).visible
    for ratio in (0.01, 0.5, 0.99, 1.01, 2.0, 50.0):
        exponent = local_exponent(lambda b: maximal_learning_rate(1.0, 400.0, batch_size=b), ratio * critical)
        assert exponent == pytest.approx(0.5 if ratio < 1 else 1 / (1 + ratio), abs=1e-3)
    k, size = 99.0, 10**8
    between = marchenko_pastur_critical_batch_size(k + 1, 1.0, num_parameters=size)
    for gamma, expected in ((k, 0.5), (k**1.5, 0.909), (0.99 * k**2, 0.99)):
        exponent = local_exponent(
            lambda b: 1 / marchenko_pastur_outlier(k + 1, 1.0, num_parameters=size, batch_size=b), size / gamma
        )
        assert exponent == pytest.approx(expected, abs=2e-3)
        assert between.visible <= size / gamma <= between.linear_scaling * 1.0001


# ------------------------------------------------------------------------------------------------------------- curves


def gaps_of(c: float, d: float, sizes: Any, dataset_size: int | None) -> Array:
    u = np.asarray(inverse_effective_batch_size(np.asarray(sizes), dataset_size))
    return c * u / (1 + d * u)


@pytest.mark.parametrize("dataset_size", [None, 1024])
@pytest.mark.parametrize(("c", "d"), [(33.0, 0.9), (60.0, 15.0), (0.02, 300.0), (5e4, 1e-3)])
@pytest.mark.parametrize("sizes", [(1, 32), (32, 8), (3, 17, 400)])
def test_exact_measurements_give_the_curve(
    c: float, d: float, sizes: tuple[int, ...], dataset_size: int | None
) -> None:
    measured = 4.0 + gaps_of(c, d, sizes, dataset_size)
    errors = [0.1 * (n + 1) for n in range(len(sizes))]  # of no consequence
    curve = fit_batch_size_curve(4.0, sizes, measured, errors, dataset_size=dataset_size)
    assert (curve.c, curve.d) == pytest.approx((c, d), rel=1e-6)
    for size in (1, 5, 100, 1024):
        assert curve.at(size).mean == pytest.approx(4.0 + gaps_of(c, d, size, dataset_size), rel=1e-9)


BENT: dict[str, Any] = {"eigenvalue": 2.0, "batch_sizes": [8, 64], "stderr": [0.1, 0.02], "dataset_size": 1024}
BENT["sharpness"] = 2.0 + gaps_of(60.0, 5.0, BENT["batch_sizes"], 1024)


def test_two_measurements_are_met_with_their_own_errors() -> None:
    curve = fit_batch_size_curve(**BENT)
    for size, value, error in zip(BENT["batch_sizes"], BENT["sharpness"], BENT["stderr"], strict=True):
        estimate = curve.at(size)
        assert estimate.mean == pytest.approx(value, rel=1e-9)
        assert estimate.stderr == pytest.approx(error, rel=0.1)  # of a thousand draws
        assert estimate.lower == pytest.approx(value - 1.96 * error, abs=0.3 * error)
        assert estimate.upper == pytest.approx(value + 1.96 * error, abs=0.3 * error)
    full = curve.at(1024)
    assert (full.mean, full.stderr, full.lower, full.upper) == (2.0, 0.0, 2.0, 2.0)


def test_an_uncertain_full_batch_widens_what_is_far_from_the_measurements() -> None:
    sure, unsure = fit_batch_size_curve(**BENT), fit_batch_size_curve(**BENT, eigenvalue_stderr=0.05)
    assert sure.at(1024).stderr == 0 and unsure.at(1024).stderr == pytest.approx(0.05, rel=0.1)
    for size in (8, 64):  # measured there, whatever FullBS is
        assert unsure.at(size).stderr == pytest.approx(sure.at(size).stderr, rel=1e-6)
    assert unsure.at(1).stderr > 1.1 * sure.at(1).stderr
    assert unsure.covariance[0, 0] == pytest.approx(0.0025, rel=0.2) and sure.covariance[0, 0] == 0
    assert unsure.covariance[0, 1] < 0  # a higher FullBS leaves smaller gaps


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_the_curve_scales(factor: float) -> None:
    measured, errors = np.array([8.7, 5.9, 5.0]), np.array([0.3, 0.1, 0.05])
    one, other = (
        fit_batch_size_curve(4.9 * f, [8, 32, 128], f * measured, f * errors, dataset_size=1024) for f in (1.0, factor)
    )
    assert (other.c, other.d) == pytest.approx((factor * one.c, one.d), rel=1e-9)
    assert other.at(2).upper == pytest.approx(factor * one.at(2).upper, rel=1e-9)
    assert other.critical_batch_size().lower == pytest.approx(one.critical_batch_size().lower, rel=1e-9)


@pytest.mark.parametrize("measured", [(8.7, 5.6, 5.2), (8.7, 6.2, 5.4), (16.0, 6.0, 5.0)])
def test_three_measurements_are_weighted_least_squares(measured: tuple[float, ...]) -> None:
    """No general solver finds a better curve, and the errors decide."""
    sizes, errors = np.array([8, 32, 128]), np.array([0.3, 0.1, 0.1])
    curve = fit_batch_size_curve(4.878, sizes, measured, errors, dataset_size=1024)

    def residuals(parameters: Array) -> Array:
        return (4.878 + gaps_of(*parameters, sizes, 1024) - measured) / errors

    ours = np.sum(residuals(np.array([curve.c, curve.d])) ** 2)
    theirs = [least_squares(residuals, (30.0, d), bounds=(0, np.inf), x_scale="jac") for d in (0.01, 1.0, 100.0)]
    assert ours <= 2 * min(result.cost for result in theirs) * (1 + 1e-6)
    tight = fit_batch_size_curve(4.878, sizes, measured, [0.3, 0.1, 1e-6], dataset_size=1024)
    assert tight.at(128).mean == pytest.approx(measured[-1], abs=1e-6)


@pytest.mark.parametrize(
    ("sharpness", "gap_ratio"),
    [
        pytest.param([14.0, 5.0], 4.0, id="gaps that grow faster than u: a straight line"),
        pytest.param([5.0, 6.0], 1.0, id="gaps that shrink with u: saturated"),
        pytest.param([5.0, 3.0], 4.0, id="a batch less sharp than all data"),
        pytest.param([3.0, 2.0], NAN, id="nothing but noise: no gap"),
    ],
)
def test_bounds(sharpness: list[float], gap_ratio: float) -> None:
    curve = fit_batch_size_curve(4.0, [8, 32], sharpness, [0.5, 0.5])
    assert curve.c >= 0 and curve.d >= 0
    gaps = [curve.at(size).mean - 4.0 for size in (8, 32)]
    if math.isnan(gap_ratio):
        assert curve.c == 0 and gaps == [0, 0] and curve.critical_batch_size().mean == 0
    else:
        assert gaps[0] / gaps[1] == pytest.approx(gap_ratio, rel=2e-3)
    for size in (1, 8, 32, 1024):
        estimate = curve.at(size)
        assert 4.0 <= estimate.lower <= estimate.mean <= estimate.upper


@pytest.mark.parametrize("dataset_size", [None, 1024])
def test_critical_batch_size_of_a_curve(dataset_size: int | None) -> None:
    sizes = (4, 64)
    curve = fit_batch_size_curve(
        2.0, sizes, 2.0 + gaps_of(60, 5, sizes, dataset_size), [0.3, 0.03], dataset_size=dataset_size
    )
    critical = curve.critical_batch_size()
    assert critical.mean == pytest.approx(1 / (2 / (60 - 5 * 2) + 1 / (dataset_size or math.inf)), rel=1e-9)
    assert curve.at(critical.mean).mean == pytest.approx(4.0, rel=1e-9)
    assert 0 < critical.lower < critical.mean < critical.upper < 40
    # A gap that saturates below FullBS never reaches it.
    flat = fit_batch_size_curve(
        20.0, sizes, 20.0 + gaps_of(60, 5, sizes, dataset_size), [0.3, 0.03], dataset_size=dataset_size
    )
    assert flat.critical_batch_size().mean == flat.critical_batch_size().upper == 0
    # Without a positive curvature, every batch is above it.
    sunk = fit_batch_size_curve(-1.0, sizes, [3.0, 1.0], [0.3, 0.03], dataset_size=dataset_size)
    assert sunk.critical_batch_size().mean == (dataset_size or math.inf)


def linearised_stderr(curve: BatchSizeCurve, sizes: Array, errors: Array, at: Array) -> Array:
    """Standard errors of the gap by the delta method."""

    def gradient(batch_sizes: Array) -> Array:
        u = 1 / batch_sizes - 1 / 1024
        shape = u / (1 + curve.d * u)
        return np.stack([shape, -curve.c * shape**2], 1)

    weighted = gradient(sizes) / errors[:, None]
    covariance = np.linalg.pinv(weighted.T @ weighted)
    return np.sqrt(np.einsum("ai,ij,aj->a", gradient(at), covariance, gradient(at)))


@pytest.mark.parametrize(
    ("eigenvalue", "c", "d", "sizes", "variations"),
    [
        pytest.param(4.88, 33.0, 0.9, (8, 32), (0.2, 0.12), id="almost straight"),
        pytest.param(0.23, 60.0, 15.0, (1, 32), (1.0, 0.44), id="bent"),
        pytest.param(4.88, 33.0, 0.9, (8, 32, 128), (0.2, 0.12, 0.08), id="three points"),
    ],
)
def test_coverage_of_the_curve(
    eigenvalue: float, c: float, d: float, sizes: tuple[int, ...], variations: tuple[float, ...]
) -> None:
    """Measurements of twenty batches each, as noisy as the digits' (the curves and variations are theirs).

    The bounds are four standard errors of a coverage of 95 % in this many repetitions.
    """
    repetitions, rng = 500, np.random.default_rng(9)
    at = np.array([1.0, 4.0, 16.0, 128.0])
    measured, truth = eigenvalue + gaps_of(c, d, sizes, 1024), eigenvalue + gaps_of(c, d, at, 1024)
    errors = measured * variations / math.sqrt(20)
    covered, linear, bound = np.zeros(4), np.zeros(4), 0
    for _ in range(repetitions):
        curve = fit_batch_size_curve(eigenvalue, sizes, rng.normal(measured, errors), errors, dataset_size=1024)
        estimates = [curve.at(size) for size in at]
        covered += [e.lower <= value <= e.upper for e, value in zip(estimates, truth, strict=True)]
        half_width = 1.96 * linearised_stderr(curve, np.array(sizes), errors, at)
        linear += np.abs([e.mean for e in estimates] - truth) <= half_width
        bound += curve.d == 0
    covered, linear = covered / repetitions, linear / repetitions
    print(f"B = {at}: covers {covered}, linearised {linear}; d = 0 in {bound / repetitions:.2f}")
    slack = 4 * math.sqrt(0.95 * 0.05 / repetitions)
    assert (covered >= 0.95 - slack).all()
    if d < 1:  # why not the delta method: with d on its bound it fails where the curve is extrapolated
        assert bound > 0.2 * repetitions and linear[0] < 0.95 - slack


# ----------------------------------------------------------------------------------------------------------- exponents


@pytest.mark.parametrize("dataset_size", [None, 64, 100, 10**6])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_gap_exponent(dataset_size: int | None, power: float) -> None:
    sizes = [2, 4, 8, 16, 32, 48]
    gaps = 3 * np.asarray(inverse_effective_batch_size(np.array(sizes), dataset_size)) ** power
    exponent = gap_exponent(sizes, gaps, dataset_size=dataset_size)
    assert exponent.mean == pytest.approx(power, rel=1e-9) and exponent.stderr < 1e-6


def test_regressing_on_the_batch_size_mistakes_the_finite_data_for_a_law() -> None:
    sizes = [64, 128, 256, 512]
    gaps = np.asarray(inverse_effective_batch_size(np.array(sizes), 1024))
    assert gap_exponent(sizes, gaps, dataset_size=1024).mean == pytest.approx(1.0, rel=1e-9)
    wrong = gap_exponent(sizes, gaps)
    assert wrong.mean - 3 * wrong.stderr > 1.0 and wrong.mean > 1.25


def test_gap_exponent_has_students_interval() -> None:
    """Of the line's slope, by its textbook formula; and it covers."""
    sizes = np.array([8, 16, 32, 64])
    exponent = gap_exponent(sizes, np.exp([3.0, 2.5, 1.4, 1.0]))
    x, y = -np.log(sizes), np.array([3.0, 2.5, 1.4, 1.0])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert (exponent.mean, exponent.stderr) == pytest.approx((slope, math.sqrt(covariance[0, 0])), rel=1e-9)
    assert exponent.upper - exponent.mean == pytest.approx(4.302652729911275 * exponent.stderr, rel=1e-9)
    rng = np.random.default_rng(10)
    draws = [gap_exponent(sizes, np.exp(rng.normal(0.7 * x, 0.1))) for _ in range(1000)]
    assert np.mean([e.lower <= 0.7 <= e.upper for e in draws]) == pytest.approx(0.95, abs=4 * 0.0069)
    two = gap_exponent(sizes[:2], [2.0, 1.0])
    assert two.mean == pytest.approx(1.0) and all(math.isnan(value) for value in (two.stderr, two.lower, two.upper))


def test_the_curve_has_the_exponents_of_the_paper() -> None:
    """A gap of an isolated eigenvalue goes with u, the sharpness of a hidden one with its root (footnote 6)."""
    sizes = np.array([64, 128, 256])
    isolated = wigner_outlier(1.0, 4.0, batch_size=sizes, dataset_size=512) - 1
    hidden = wigner_outlier(0.01, 4.0, batch_size=sizes, dataset_size=512)
    assert gap_exponent(sizes, isolated, dataset_size=512).mean == pytest.approx(1.0, rel=1e-6)
    assert gap_exponent(sizes, hidden, dataset_size=512).mean == pytest.approx(0.5, rel=1e-6)
    for before, after in pairwise(isolated):
        assert after < before


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("batch_size", [0, -3, 65, NAN, np.array([8, 65])])
def test_impossible_batches(batch_size: Any) -> None:
    at: dict[str, Any] = {"batch_size": batch_size, "dataset_size": 64}
    for call in (
        lambda: inverse_effective_batch_size(batch_size, 64),
        lambda: wigner_outlier(1.0, 1.0, **at),
        lambda: full_batch_eigenvalue(1.0, 1.0, **at),
        lambda: marchenko_pastur_edge(1.0, num_parameters=8, **at),
        lambda: gap_exponent([8, batch_size] if np.ndim(batch_size) == 0 else batch_size, [1.0, 2.0], dataset_size=64),
    ):
        with pytest.raises(
            ValueError, match=r"batch_size=.* is not between 1 and dataset_size=64.*pass dataset_size=None"
        ):
            call()


def test_impossible_noise() -> None:
    for call in (
        lambda: wigner_outlier(1.0, -1.0, batch_size=8),
        lambda: wigner_edge(np.array([1.0, -1.0]), batch_size=8),
        lambda: eigenvector_overlap(1.0, -1.0, batch_size=8),
        lambda: wigner_critical_batch_size(1.0, -1.0),
    ):
        with pytest.raises(ValueError, match=r"variance=.* is negative, where 0 is the least: clip"):
            call()
    with pytest.raises(ValueError, match=r"bulk=-1\.0 is negative"):
        marchenko_pastur_outlier(1.0, -1.0, **with_gamma(2))
    with pytest.raises(ValueError, match=r"bulk=-1\.0 is negative"):
        marchenko_pastur_critical_batch_size(1.0, -1.0, num_parameters=8)
    with pytest.raises(ValueError, match="num_parameters=-8 is negative"):
        marchenko_pastur_edge(1.0, num_parameters=-8, batch_size=2)
    with pytest.raises(ValueError, match="formula='printed' is unknown: choose 'corrected', 'additive' or 'paper'"):
        marchenko_pastur_edge(1.0, **with_gamma(2), formula="printed")  # type: ignore[arg-type]
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"dataset_size={size}"):
            wigner_critical_batch_size(1.0, 1.0, dataset_size=size)


@pytest.mark.parametrize(
    ("sizes", "sharpness", "stderr", "eigenvalue", "eigenvalue_stderr"),
    [
        pytest.param([8], [5.0], [0.1], 4.0, 0.0, id="one measurement"),
        pytest.param([8, 8], [5.0, 6.0], [0.1, 0.1], 4.0, 0.0, id="one batch size"),
        pytest.param([8, 64], [5.0, 4.0], [0.1, 0.1], 4.0, 0.0, id="the full batch"),
        pytest.param([8, 16], [5.0], [0.1, 0.1], 4.0, 0.0, id="a value is missing"),
        pytest.param([8, 16], [5.0, 4.5], [0.1], 4.0, 0.0, id="an error is missing"),
        pytest.param([8, 16], [5.0, NAN], [0.1, 0.1], 4.0, 0.0, id="a value is NaN"),
        pytest.param([8, 16], [5.0, 4.5], [0.1, NAN], 4.0, 0.0, id="an error is NaN"),
        pytest.param([8, 16], [5.0, 4.5], [0.1, 0.0], 4.0, 0.0, id="an error is 0"),
        pytest.param([8, 16], [5.0, 4.5], [0.1, 0.1], NAN, 0.0, id="FullBS is NaN"),
        pytest.param([8, 16], [5.0, 4.5], [0.1, 0.1], 4.0, -0.1, id="FullBS has a negative error"),
    ],
)
def test_measurements_that_fix_no_curve(
    sizes: list[int], sharpness: list[float], stderr: list[float], eigenvalue: float, eigenvalue_stderr: float
) -> None:
    with pytest.raises(ValueError, match=r"sharpness=.*stderr=.*fix no curve: pass finite values.*dataset_size=64"):
        fit_batch_size_curve(eigenvalue, sizes, sharpness, stderr, eigenvalue_stderr=eigenvalue_stderr, dataset_size=64)


@pytest.mark.parametrize(
    ("sizes", "gaps"),
    [([8], [1.0]), ([8, 8], [1.0, 1.0]), ([8, 64], [1.0, 0.1]), ([8, 16], [1.0, 0.0]), ([8, 16], [1.0])],
)
def test_gaps_without_a_line(sizes: list[int], gaps: list[float]) -> None:
    with pytest.raises(ValueError, match=r"gaps=.*no logarithms.*dataset_size=64, and leave out"):
        gap_exponent(sizes, gaps, dataset_size=64)
