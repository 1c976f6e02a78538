"""The variance of mini-batch gradients against enumeration of all batches, exact quadrature and simulation.

Printed formulas that differ from those implemented stand beside them, so that it is seen that the oracles tell them
apart.
"""

import math
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.special import roots_genlaguerre
from sklearn.datasets import load_diabetes

from lightning_eoss.theory.gradient_noise import sampling_factor
from papers.batch_noise import (
    RegressionNoise,
    batch_gradient_covariance,
    batch_gradient_variance,
    combination_square,
    regression_noise,
    two_layer_polynomials,
)

Array = NDArray[np.float64]

GRADIENTS = np.array([[1.0, 0], [0, 2], [-1, 1], [3, 1], [2, -2], [0, 0]])
FIELDS = tuple(RegressionNoise.__dataclass_fields__)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def covariance(first: Array, second: Array | None = None, weights: Array | None = None) -> Array:
    """(p, p) between the rows of two tables, over rows that come with these probabilities."""
    second = first if second is None else second
    weights = np.full(len(first), 1 / len(first)) if weights is None else weights
    return (first.T * weights) @ second - np.outer(weights @ first, weights @ second)


# ---- given the weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", range(1, 7))
def test_lemma_1_is_the_variance_over_all_batches_of_any_linear_map(batch_size: int) -> None:
    for linear_map in (None, random(3, 2)):
        means = np.array([GRADIENTS[list(batch)].mean(0) for batch in combinations(range(6), batch_size)])
        mapped = means if linear_map is None else means @ linear_map.T
        found = batch_gradient_variance(GRADIENTS, batch_size, linear_map)
        assert found == pytest.approx(covariance(mapped).trace(), rel=1e-12, abs=1e-14)


def test_the_factor_is_one_for_single_samples_and_zero_for_all() -> None:
    assert sampling_factor(1, 1) == 0
    assert [sampling_factor(size, 9) for size in (1, 9)] == [1, 0]
    assert all(a > b for a, b in pairwise(sampling_factor(size, 9) for size in range(1, 10)))
    assert sampling_factor(3, 9) == pytest.approx((1 / 3 - 1 / 9) * 9 / 8, rel=1e-15)


def without_replacement(batch_size: int) -> tuple[Array, Array | None]:
    return np.array([GRADIENTS[list(each)].mean(0) for each in combinations(range(6), batch_size)]), None


def with_replacement(batch_size: int) -> tuple[Array, Array | None]:
    return np.array([GRADIENTS[list(each)].mean(0) for each in product(range(6), repeat=batch_size)]), None


def bernoulli(batch_size: int) -> tuple[Array, Array | None]:
    """Each sample is in with probability M / N, and the sum is divided by M."""
    chosen = np.array(list(product((0, 1), repeat=6)))
    chance = batch_size / 6
    return chosen @ GRADIENTS / batch_size, np.prod(np.where(chosen, chance, 1 - chance), axis=1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
@pytest.mark.parametrize("draw", [without_replacement, with_replacement, bernoulli], ids=lambda draw: draw.__name__)
def test_the_covariance_of_a_batch_is_that_over_all_draws(draw: Callable[..., Any], batch_size: int) -> None:
    if draw is with_replacement and batch_size == 6:
        batch_size = 5
    rows, weights = draw(batch_size)
    found = batch_gradient_covariance(GRADIENTS, batch_size, sampling=draw.__name__)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, covariance(rows, weights=weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_covariance_between_batches_of_an_epoch_is_that_over_all_disjoint_pairs(batch_size: int) -> None:
    batches = list(combinations(range(6), batch_size))
    pairs = [(one, two) for one in batches for two in batches if not {*one} & {*two}]
    one, two = (np.array([GRADIENTS[list(pair[which])].mean(0) for pair in pairs]) for which in (0, 1))
    found = batch_gradient_covariance(GRADIENTS, batch_size, same_batch=False)
    np.testing.assert_allclose(found, covariance(one, two), rtol=1e-12, atol=1e-12)
    mean = GRADIENTS.mean(0)
    assert not np.allclose(np.outer(mean, mean) / 5, covariance(one, two), atol=0.1)  # as printed


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_epoch_sums_up_to_no_noise(batch_size: int) -> None:
    count = 6 // batch_size
    within = batch_gradient_covariance(GRADIENTS, batch_size)
    between = batch_gradient_covariance(GRADIENTS, batch_size, same_batch=False)
    np.testing.assert_allclose(count * within + count * (count - 1) * between, 0, atol=1e-12)


def test_what_the_appendix_prints_is_another_covariance() -> None:
    second_moment, mean = GRADIENTS.T @ GRADIENTS / 6, GRADIENTS.mean(0)
    printed = (1 / 2 - 1 / 5) * second_moment + np.outer(mean, mean) / 5
    assert not np.allclose(printed, covariance(without_replacement(2)[0]), atol=0.1)
    eq_6 = (1 / 2 - 1 / 6) * second_moment
    assert not np.allclose(eq_6, covariance(with_replacement(2)[0]), atol=0.1)
    np.testing.assert_allclose(eq_6, batch_gradient_covariance(GRADIENTS, 2, sampling="bernoulli"), rtol=1e-12)


def test_traces_that_were_found_independently() -> None:
    traces = [
        batch_gradient_covariance(GRADIENTS, 2, **options).trace()  # type: ignore[arg-type]
        for options in (
            {},
            {"same_batch": False},
            {"sampling": "with_replacement"},
            {"sampling": "bernoulli"},
            {"sampling": "with_replacement", "same_batch": False},
            {"sampling": "bernoulli", "same_batch": False},
        )
    ]
    np.testing.assert_allclose(traces, [1.3444444444, -0.6722222222, 1.6805555556, 1.3888888889, 0, 0], atol=1e-9)


# ---- linear regression -----------------------------------------------------------------------------------------------

INPUTS, TARGETS, WEIGHTS = random(4, 2), random(4, seed=1), np.array([1.5, -0.5])
RATES = (0.3, 0.1, 0.25)


def sample_gradients(inputs: Array, targets: Array, weights: Array) -> Array:
    """(..., n, p) at weights (..., p)."""
    return (weights @ inputs.T - targets)[..., None] * inputs


def paths(batch_size: int) -> Iterator[Array]:
    """(number of histories, p) weights before each step and after the last, over all that could be drawn."""
    weights = WEIGHTS[None]
    batches = [list(each) for each in combinations(range(4), batch_size)]
    yield weights
    for rate in RATES:
        gradients = sample_gradients(INPUTS, TARGETS, weights)
        weights = np.concatenate([weights - rate * gradients[:, batch].mean(1) for batch in batches])
        yield weights


def enumerated(batch_size: int) -> RegressionNoise:
    rows = []
    for weights in paths(batch_size):
        gradients = sample_gradients(INPUTS, TARGETS, weights)
        full = gradients.mean(1)
        drawn = np.concatenate([gradients[:, list(batch)].mean(1) for batch in combinations(range(4), batch_size)])
        loss = np.square(weights @ INPUTS.T - TARGETS).mean() / 2
        rows.append((np.square(full).sum(1).mean(), covariance(full).trace(), covariance(drawn).trace(), loss))
    return RegressionNoise(*np.array(rows).T)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("field", FIELDS)
def test_the_recursion_is_the_mean_over_all_sequences_of_batches(field: str, batch_size: int) -> None:
    found = regression_noise(INPUTS, TARGETS, WEIGHTS, batch_size=batch_size, learning_rates=RATES)
    expected = getattr(enumerated(batch_size), field)
    np.testing.assert_allclose(getattr(found, field), expected, rtol=1e-10, atol=1e-14)


def standardised_diabetes() -> tuple[Array, Array]:
    """442 patients, ten features and an intercept."""
    inputs, targets = load_diabetes(return_X_y=True)
    inputs = np.column_stack([inputs / inputs.std(0), np.ones(len(inputs))])
    return inputs, (targets - targets.mean()) / targets.std()


def test_the_recursion_on_real_data_is_what_simulation_finds() -> None:
    (inputs, targets), rates, runs, size = standardised_diabetes(), (0.1, 0.1, 0.05, 0.05), 4000, 8
    exact = regression_noise(inputs, targets, np.full(11, 0.3), batch_size=size, learning_rates=rates)
    rng, weights = np.random.default_rng(0), np.full((runs, 11), 0.3)
    for step, rate in enumerate((*rates, 0.0)):
        batches = rng.random((runs, len(inputs))).argpartition(size, axis=1)[:, :size]
        errors = (weights[:, None] * inputs[batches]).sum(2) - targets[batches]
        drawn = (errors[:, :, None] * inputs[batches]).mean(1)
        residuals = weights @ inputs.T - targets
        full = residuals @ inputs / len(inputs)
        seen = {
            "gradient_square": np.square(full).sum(1),
            "gradient_variance": np.square(full - full.mean(0)).sum(1) * runs / (runs - 1),
            "batch_variance": np.square(drawn - drawn.mean(0)).sum(1) * runs / (runs - 1),
            "loss": np.square(residuals).mean(1) / 2,
        }
        for field, values in seen.items():
            expected, error = getattr(exact, field)[step], values.std(ddof=1) / math.sqrt(runs)
            print(f"t={step} {field}: {values.mean():.5f} +- {error:.5f}, exact {expected:.5f}")
            assert abs(values.mean() - expected) <= 4 * error + 1e-12, field
        weights = weights - rate * drawn


@pytest.mark.parametrize("field", FIELDS)
def test_all_moments_decrease_with_the_batch_size_at_every_step(field: str) -> None:
    """Theorems 1 and 2; also with rates at which the loss grows."""
    inputs, targets = random(9, 3), random(9, seed=1)
    rates = (0.2, 0.9, 0.1, 1.5, 0.05)
    found = [
        getattr(regression_noise(inputs, targets, np.ones(3), batch_size=size, learning_rates=rates), field)
        for size in range(1, 10)
    ]
    falls = -np.diff(np.array(found), axis=0)
    assert (falls[:, 1:] > 0).all()
    assert (falls[:, 0] > 0).all() if field == "batch_variance" else (falls[:, 0] == 0).all()


def test_all_samples_make_gradient_descent() -> None:
    found = regression_noise(INPUTS, TARGETS, WEIGHTS, batch_size=4, learning_rates=RATES)
    assert not found.gradient_variance.any()
    assert not found.batch_variance.any()
    weights = WEIGHTS
    for step, rate in enumerate((*RATES, 0.0)):
        gradient = sample_gradients(INPUTS, TARGETS, weights).mean(0)
        assert found.gradient_square[step] == pytest.approx(gradient @ gradient, rel=1e-12)
        weights = weights - rate * gradient


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_lemma_2_holds_with_half_the_printed_factor(batch_size: int) -> None:
    matrices, rate = random(4, 3, 2, seed=2), 0.3
    before = sample_gradients(INPUTS, TARGETS, WEIGHTS)

    def combined(batch: tuple[int, ...]) -> float:
        after = sample_gradients(INPUTS, TARGETS, WEIGHTS - rate * before[list(batch)].mean(0))
        return float(np.square(np.einsum("iqp,ip->q", matrices, after)).sum())

    expected = np.mean([combined(batch) for batch in combinations(range(4), batch_size)])
    found = combination_square(matrices, INPUTS, before, batch_size=batch_size, learning_rate=rate)
    assert found == pytest.approx(expected, rel=1e-10)

    total = np.einsum("iqp,ip,ir->qr", matrices, INPUTS, INPUTS)
    drift = np.einsum("iqp,ip->q", matrices - rate / 4 * total, before)
    pairs = sum(np.square(total @ (one - two)).sum() for one in before for two in before)

    def lemma(factor: float) -> float:
        return float(drift @ drift + rate**2 * sampling_factor(batch_size, 4) * factor * pairs)

    assert lemma(1 / (2 * 4**2)) == pytest.approx(expected, rel=1e-10)
    if batch_size < 4:
        for printed in (1 / 4**2, 1.0):
            assert lemma(printed) != pytest.approx(expected, rel=0.01)


# ---- a two-layer linear network --------------------------------------------------------------------------------------


def layer_gradients(first: Array, second: Array, target: Array, batch: Array) -> tuple[Array, Array]:
    """Gradients of half the mean squared error of a batch (b, p)."""
    moments = batch.T @ batch / len(batch)
    error = second @ first - target
    return second.T @ error @ moments, error @ moments @ first.T


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_variance_at_the_start_is_exact(batch_size: int) -> None:
    """Gauss-Hermite quadrature over all numbers of a batch integrates the fourth moments without error."""
    first, second, target = random(3, 2), random(2, 3, seed=1), random(2, 2, seed=2)
    nodes, weights = hermegauss(3)
    weights = weights / weights.sum()
    batches = np.array(list(product(nodes, repeat=2 * batch_size))).reshape(-1, batch_size, 2)
    chances = np.prod(list(product(weights, repeat=2 * batch_size)), axis=1)
    for layer, polynomial in enumerate(two_layer_polynomials(first, second, target)):
        rows = np.array([layer_gradients(first, second, target, batch)[layer].ravel() for batch in batches])
        assert polynomial(1 / batch_size) == pytest.approx(covariance(rows, weights=chances).trace(), rel=1e-12)
        assert polynomial.degree() == 1
        assert polynomial(0.0) == 0


SCALAR = (0.7, -1.2, 0.9, 0.4)  # w1, w2, target, learning rate


def variance_after_a_step(batch_size: int, layer: int) -> float:
    """By Gauss-Laguerre quadrature over the batches' means of x^2, which are Gamma distributed."""
    nodes, weights = roots_genlaguerre(12, batch_size / 2 - 1)
    means, chances = nodes * 2 / batch_size, weights / weights.sum()
    u, v, target, rate = SCALAR
    error = u * v - target
    rows = []
    for mean, after in product(means, repeat=2):
        new_u, new_v = u - rate * v * error * mean, v - rate * u * error * mean
        rows.append([(new_v, new_u)[layer] * (new_u * new_v - target) * after])
    return float(covariance(np.array(rows), weights=np.outer(chances, chances).ravel()).trace())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_polynomial_after_a_step_is_exact(layer: int) -> None:
    """It has seven coefficients, and is right at nine places."""
    u, v, target, rate = SCALAR
    polynomial = two_layer_polynomials([[u]], [[v]], [[target]], rate)[layer]
    print(polynomial.coef)
    assert polynomial.degree() == 6
    assert polynomial.coef[0] == 0
    for batch_size in (1, 2, 3, 4, 6, 9, 16, 64, 200):
        assert polynomial(1 / batch_size) == pytest.approx(variance_after_a_step(batch_size, layer), rel=1e-9)


def test_the_polynomial_after_a_step_is_what_the_network_does() -> None:
    """The oracle of the coefficients, from inputs: all numbers of two batches by quadrature."""
    nodes, weights = hermegauss(8)
    chances = weights / weights.sum()
    u, v, target, rate = SCALAR
    first, second, goal = (np.array([[each]]) for each in (u, v, target))
    for layer, polynomial in enumerate(two_layer_polynomials(first, second, goal, rate)):
        rows, probabilities = [], []
        for batch in product(range(8), repeat=2):
            inputs = nodes[list(batch)][:, None]
            g1, g2 = layer_gradients(first, second, goal, inputs)
            for next_batch in product(range(8), repeat=2):
                inputs = nodes[list(next_batch)][:, None]
                rows.append(layer_gradients(first - rate * g1, second - rate * g2, goal, inputs)[layer].ravel())
                probabilities.append(np.prod(chances[[*batch, *next_batch]]))
        found = covariance(np.array(rows), weights=np.array(probabilities)).trace()
        assert polynomial(1 / 2) == pytest.approx(found, rel=1e-10)


def test_coefficients_may_be_negative_and_the_first_is_not() -> None:
    found = [
        two_layer_polynomials([[u]], [[v]], [[1.0]], rate)[layer].coef
        for u, v, rate in product((-1.0, 0.3, 0.8), (0.5, 1.2), (0.05, 0.2))
        for layer in (0, 1)
    ]
    assert min(each[1] for each in found) >= 0
    assert min(each.min() for each in found) < -1e-3


def test_without_a_rate_the_step_changes_nothing() -> None:
    for before, after in zip(
        two_layer_polynomials([[0.7]], [[-1.2]], [[0.9]]),
        two_layer_polynomials([[0.7]], [[-1.2]], [[0.9]], 0.0),
        strict=True,
    ):
        assert after.trim(1e-12).coef == pytest.approx(before.coef, rel=1e-12)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling_factor(0, 5), "batch_size=0 is not between 1 and the number of samples, 5"),
        (lambda: sampling_factor(6, 5), "batch_size=6 is not between"),
        (lambda: batch_gradient_variance([1.0, 2.0], 1), r"gradients of shape \(2,\)"),
        (lambda: batch_gradient_covariance(GRADIENTS, 7), "batch_size=7 is not between"),
        (lambda: batch_gradient_covariance(GRADIENTS, 2, sampling="all"), "sampling='all' is unknown"),  # type: ignore[arg-type]
        (lambda: batch_gradient_covariance(GRADIENTS, 6, same_batch=False), "batch_size=6 is the whole epoch"),
        (
            lambda: regression_noise(INPUTS, TARGETS[:2], WEIGHTS, batch_size=1, learning_rates=[]),
            r"targets \(2,\).*\(n, p\), \(n,\) and \(p,\)",
        ),
        (
            lambda: regression_noise(INPUTS, TARGETS, WEIGHTS, batch_size=5, learning_rates=[]),
            "batch_size=5 is not between",
        ),
        (lambda: two_layer_polynomials([1.0], [[1.0]], [[1.0]]), "are no two-layer network"),
        (lambda: two_layer_polynomials(np.ones((2, 3)), np.ones((4, 2)), np.ones((3, 4))), "are no two-layer network"),
        (
            lambda: two_layer_polynomials(np.ones((2, 3)), np.ones((4, 2)), np.ones((4, 3)), 0.1),
            "learning_rate=0.1 asks for a step",
        ),
    ],
)
def test_what_has_no_answer_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
