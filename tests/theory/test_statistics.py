"""Estimates, intervals and phases: closed forms, and coverage on tables of lambda_max.

The tables hold the largest Hessian eigenvalue of mini-batches, and the quotient v'H_B v with the full batch's top
eigenvector v as its control: softmax regression on the digits at three stages of training, and log-normal values with
the coefficients of variation that neural networks show. A table is the whole population, so its mean is the truth.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import linregress, t

from lightning_eoss.theory.statistics import (
    Estimate,
    control_variate_estimate,
    is_precise,
    mean_estimate,
    moments,
    next_count,
    phase,
    scaled,
    shifted,
    with_audit,
)

NAN = math.nan
Array = NDArray[np.float64]


def exact(ratio: float, half_width: float = 0.0) -> Estimate:
    return Estimate(ratio, half_width / 2, ratio - half_width, ratio + half_width)


def interval(estimate: Estimate) -> list[float]:
    return [estimate.mean, estimate.stderr, estimate.lower, estimate.upper]


def sample(n: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and controls with a correlation of about .9."""
    generator = torch.Generator().manual_seed(seed)
    x = 5 + torch.randn(n, dtype=torch.float64, generator=generator)
    return 2 * x + torch.randn(n, dtype=torch.float64, generator=generator), x


# --------------------------------------------------------------------------------------------------- sums and means


def test_moments_of_a_union_are_the_sum_of_the_moments() -> None:
    y, x = sample()
    assert torch.allclose(moments(y[:7], x[:7]) + moments(y[7:], x[7:]), moments(y, x), rtol=1e-14)
    assert torch.equal(moments(y[:0], x[:0]), torch.zeros(6, dtype=torch.float64))


def test_moments_are_float64_whatever_comes_in() -> None:
    values = torch.full((1000, 3), 1e8, dtype=torch.float32, requires_grad=True)
    sums = moments(values)
    assert sums.dtype == torch.float64 and not sums.requires_grad
    assert sums[:3].tolist() == [3000.0, 3e11, 3e19]


def test_values_without_controls_never_pass_for_a_control_variate() -> None:
    y, x = sample()
    mixed = moments(y[:20], x[:20]) + moments(y[20:])
    assert control_variate_estimate(mixed, 5.0) == mean_estimate(mixed)


def test_every_value_needs_its_control() -> None:
    with pytest.raises(ValueError, match="3 values and 1 controls"):
        moments(torch.ones(3), torch.ones(1))


def test_mean_has_students_interval() -> None:
    y = torch.tensor([4.1, 5.3, 6.2, 4.9, 5.0, 3.8, 6.6, 5.5, 4.4, 5.7], dtype=torch.float64)
    estimate = mean_estimate(moments(y))
    stderr = y.std().item() / math.sqrt(10)
    half_width = 2.262157162740992 * stderr
    expected = [y.mean().item(), stderr, y.mean().item() - half_width, y.mean().item() + half_width]
    assert interval(estimate) == pytest.approx(expected, rel=1e-10)
    narrower = mean_estimate(moments(y), confidence=0.5)
    assert narrower.upper - narrower.mean == pytest.approx(t.ppf(0.75, 9) * stderr, rel=1e-10)


def test_few_values() -> None:
    assert interval(mean_estimate(moments(torch.ones(0)))) == pytest.approx([NAN] * 4, nan_ok=True)
    assert interval(mean_estimate(moments(torch.ones(1)))) == pytest.approx([1.0, NAN, NAN, NAN], nan_ok=True)
    assert interval(mean_estimate(moments(torch.ones(2)))) == [1.0, 0.0, 1.0, 1.0]


def test_the_sums_are_precise_enough_for_values_that_hardly_scatter() -> None:
    y = 1e3 + 1e-2 * sample()[0]
    assert mean_estimate(moments(y)).stderr == pytest.approx(y.std().item() / math.sqrt(30), rel=1e-5)


# ------------------------------------------------------------------------------------------------- control variates


def test_control_variate_is_a_regression_with_a_discounted_correlation() -> None:
    y, x = sample()
    estimate = control_variate_estimate(moments(y, x), 5.1)
    line = linregress(x.numpy(), y.numpy())
    s_xx = x.var(correction=0).item() * 30
    s_yy = y.var(correction=0).item() * 30
    residual = s_yy * (1 - line.rvalue**2 + 3 / 23) / 28
    stderr = math.sqrt(residual * (1 / 30 + (x.mean().item() - 5.1) ** 2 / s_xx))
    mean, half_width = line.intercept + line.slope * 5.1, t.ppf(0.975, 28) * stderr
    assert interval(estimate) == pytest.approx([mean, stderr, mean - half_width, mean + half_width], rel=1e-9)


@pytest.mark.parametrize("slope", [2.0, -0.3])
def test_a_control_that_explains_everything_gives_the_exact_mean(slope: float) -> None:
    x = sample(12)[1]
    estimate = control_variate_estimate(moments(7 + slope * x, x), 4.5)
    assert estimate.mean == pytest.approx(7 + slope * 4.5, rel=1e-10)


@pytest.mark.parametrize(
    ("n", "control_mean", "control"),
    [
        pytest.param(10, 5.0, "good", id="too few values"),
        pytest.param(30, NAN, "good", id="unknown mean"),
        pytest.param(30, 5.0, "unrelated", id="no correlation"),
        pytest.param(30, 5.0, "constant", id="constant but for rounding"),
        pytest.param(30, 5.0, "broken", id="a control that is not finite"),
        pytest.param(30, 50.0, "good", id="mean far from every control"),
    ],
)
def test_falls_back_to_the_plain_mean(n: int, control_mean: float, control: str) -> None:
    y, x = sample(n)
    controls = {"good": x, "unrelated": sample(n, seed=1)[1], "constant": 3.1 + 1e-9 * x, "broken": x / (x != x[3])}
    assert control_variate_estimate(moments(y, controls[control]), control_mean) == mean_estimate(moments(y))


def test_helps_from_eleven_values_on() -> None:
    _, x = sample(11)
    assert control_variate_estimate(moments(2 * x, x), 5.0).stderr < mean_estimate(moments(2 * x)).stderr


def test_constant_values_have_no_width() -> None:
    _, x = sample()
    assert interval(control_variate_estimate(moments(torch.full((30,), 2.0), x), 5.0)) == [2.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_estimates_scale_with_the_values_and_not_with_the_controls(factor: float) -> None:
    y, x = sample()
    one = control_variate_estimate(moments(y, x), 5.1)
    assert one != mean_estimate(moments(y))
    other = control_variate_estimate(moments(factor * y, x), 5.1)
    assert interval(other) == pytest.approx(interval(scaled(one, factor)), rel=1e-8)
    other = control_variate_estimate(moments(y, factor * x), factor * 5.1)
    assert interval(other) == pytest.approx(interval(one), rel=1e-8)


# ------------------------------------------------------------------------------------------------- stopping, changes


def test_counts_grow_by_a_quarter_up_to_the_limit() -> None:
    counts = [next_count(0, 100)]
    while counts[-1] < 100:
        counts.append(next_count(counts[-1], 100))
    assert counts == [10, 13, 17, 22, 28, 35, 44, 55, 69, 87, 100]
    assert next_count(0, 1) == 1 and next_count(1, 1) == 1 and next_count(12, 10) == 12


def test_is_precise() -> None:
    assert is_precise(exact(2.0, 0.0625), 10, 0.05)
    assert is_precise(exact(-2.0, 0.0625), 10, 0.05)
    assert not is_precise(exact(2.0, 0.0625), 9, 0.05)
    assert not is_precise(exact(2.0, 0.125), 1000, 0.05)
    assert not is_precise(mean_estimate(moments(torch.ones(1))), 10, 0.05)
    assert is_precise(with_audit(exact(2.0, 0.0625), [5.0]), 10, 0.05)


def test_audits_raise_the_upper_bound_alone() -> None:
    estimate = Estimate(2.0, 0.25, 1.5, 2.5, (2.0,))
    assert with_audit(estimate, [0.25, 0.5, -1.0]) == Estimate(2.0, 0.25, 1.5, 3.0, (2.0,))
    assert with_audit(estimate, [-1.0]) == with_audit(estimate, []) == estimate
    assert math.isnan(with_audit(estimate, [0.5, NAN]).upper) and math.isnan(with_audit(estimate, [NAN, 0.5]).upper)


def test_shifted_and_scaled() -> None:
    estimate = Estimate(2.0, 0.25, 1.5, 3.0, (1.0, 3.0))
    assert shifted(estimate, 0.5) == Estimate(1.5, 0.25, 1.0, 2.5, (0.5, 2.5))
    assert shifted(estimate, 0.5, error=0.25) == Estimate(1.5, 0.25, 0.75, 2.75, (0.5, 2.5))
    assert scaled(estimate, 2.0) == Estimate(4.0, 0.5, 3.0, 6.0, (2.0, 6.0))
    assert scaled(estimate, -2.0) == Estimate(-4.0, 0.5, -6.0, -3.0, (-2.0, -6.0))


# ----------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize(
    ("ratios", "half_width", "expected"),
    [
        ([], 0.0, None),
        ([1.0, 1.0], 0.0, None),
        ([NAN, 1.0, 1.0], 0.0, None),
        ([1.0, 1.0, 1.0, 1.0, NAN, NAN, NAN], 0.0, None),
        ([0.2, 0.3, 0.4], 0.0, 0),
        ([0.7, 0.75, 0.8], 0.1, 1),  # the interval meets the band
        ([0.4, 0.5, 0.7, 0.9, 0.95, 1.0], 0.0, 1),
        ([0.9, 1.1, 0.9, 1.1, 0.9], 0.0, 1),
        ([1.2, 1.3, 1.2, 1.3, 1.2], 0.1, 1),  # above, but not for sure
        ([0.9, 1.0, 1.2, 1.3, 1.4], 0.0, 2),
        ([0.5, 0.5, 0.5, 9.0, 0.5], 0.0, 0),  # one spike decides nothing
        ([1.0, 1.0, 9.0, 1.0, 1.0], 0.0, 1),
        ([1.3, 2.0, 4.0, 2.0, 0.6], 0.1, 3),
        ([4.0, 2.0, 0.6], 0.1, 3),
        ([4.0, 0.6, 0.5], 0.1, 0),  # the second drop is within the intervals
        ([1.3, 2.0, 4.0, 2.0], 0.1, 2),  # a single drop
        ([1.1, 0.9, 0.7], 0.0, 1),  # falls, but was never beyond
        ([4.0, 0.7, 0.6, 0.5, 0.4, 0.3], 0.0, 0),  # was beyond, but not lately
    ],
)
def test_phases(ratios: list[float], half_width: float, expected: int | None) -> None:
    assert phase([exact(ratio, half_width) for ratio in ratios]) == expected


def test_the_band_of_the_edge_is_closed() -> None:
    assert phase([exact(0.85)] * 3) == 1 and phase([exact(0.85 - 1e-9)] * 3) == 0
    assert phase([exact(1.15)] * 3) == 1 and phase([exact(1.15 + 1e-9)] * 3) == 2


# --------------------------------------------------------------------------------------------------------- coverage

REPETITIONS = 5000
DIGITS = {f"digits, {step:3d} steps, b={b:3d}": (step, b) for step in (0, 20, 400) for b in (8, 32, 128)}
LOG_NORMAL = {
    f"log-normal, cv {cv}, correlation {r:.2f}": (cv, r) for cv in (0.12, 0.25, 0.45) for r in (0.0, 0.5, 0.85, 0.95)
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on matrices of 70 x 70."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    digits.cache_clear()  # 120 MB


@cache
def digits() -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Per-sample Hessians (N, P, P) of softmax regression on 6 principal components, and v'Hv, after some steps."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(data.data[:1024])
    x = x - x.mean(0)
    x = x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -6:]
    x = torch.cat([x / x.std(), torch.ones(1024, 1)], 1).double()
    target = torch.eye(10, dtype=torch.float64)[torch.from_numpy(data.target[:1024])]
    weights, stages = torch.zeros(7, 10, dtype=torch.float64), {}
    for step in range(401):
        p = (x @ weights).softmax(1)
        if step in (0, 20, 400):
            outputs = p.diag_embed() - p[:, :, None] * p[:, None]
            hessians = torch.einsum("nab,nc,nd->nacbd", outputs, x, x).reshape(1024, 70, 70)
            top = torch.linalg.eigh(hessians.mean(0)).eigenvectors[:, -1]
            stages[step] = hessians, hessians @ top @ top
        weights -= 0.5 * x.T @ (p - target) / 1024
    return stages


@cache
def table(name: str) -> tuple[Array, Array]:
    """Values and controls of the whole population, (M,) each."""
    rng = np.random.default_rng(0)
    if name in LOG_NORMAL:
        cv, correlation = LOG_NORMAL[name]
        variance = math.log1p(cv**2)
        inner = math.log1p(correlation * cv**2) / variance  # of the logarithms
        a, b = rng.standard_normal((2, 100_000)) * math.sqrt(variance)
        return np.exp(a), np.exp(inner * a + math.sqrt(1 - inner**2) * b)
    step, b = DIGITS[name]
    hessians, quotients = digits()[step]
    chosen = torch.zeros(800, 1024, dtype=torch.float64)
    for row in chosen:
        row[rng.choice(1024, b, replace=False)] = 1 / b
    batches = (chosen @ hessians.reshape(1024, -1)).reshape(-1, 70, 70)
    return torch.linalg.eigvalsh(batches)[:, -1].numpy(), (chosen @ quotients).numpy()


def draws(name: str, count: int) -> tuple[Array, Array, float, float]:
    """Values and controls (REPETITIONS, count), and their true means."""
    y, x = table(name)
    index = np.random.default_rng(1).integers(len(y), size=(REPETITIONS, count))
    return y[index], x[index], float(y.mean()), float(x.mean())


def sums_at(n: int, y: Array, x: Array) -> list[torch.Tensor]:
    """The moments of the first n values of each repetition, added up for all at once."""
    y, x = y[:, :n], x[:, :n]
    sums = [np.full(len(y), float(n)), *(a.sum(1) for a in (y, y * y, x, x * x, x * y))]
    rows = torch.from_numpy(np.stack(sums, 1))
    torch.testing.assert_close(rows[0], moments(torch.from_numpy(y[0]), torch.from_numpy(x[0])))
    return list(rows.unbind())


def coverage(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([estimate.lower <= truth <= estimate.upper for estimate in estimates]))


def mean_width(estimates: list[Estimate]) -> float:
    return float(np.mean([estimate.upper - estimate.lower for estimate in estimates]))


@pytest.mark.parametrize("name", [*DIGITS, *LOG_NORMAL])
def test_coverage_of_twenty_values(name: str) -> None:
    y, x, truth, control_mean = draws(name, 20)
    rows = sums_at(20, y, x)
    plain = [mean_estimate(row) for row in rows]
    controlled = [control_variate_estimate(row, control_mean) for row in rows]
    narrowing = mean_width(controlled) / mean_width(plain)
    values, controls = table(name)
    print(
        f"{name}: cv {values.std() / values.mean():.2f}, correlation {np.corrcoef(values, controls)[0, 1]:.2f}; "
        f"K = 20 covers {coverage(plain, truth):.3f}, controlled {coverage(controlled, truth):.3f} "
        f"with {narrowing:.2f} of the width"
    )
    assert 0.92 <= coverage(plain, truth) <= 0.97
    assert coverage(controlled, truth) >= 0.92
    assert narrowing <= 1
    assert all(one.stderr <= other.stderr for one, other in zip(controlled, plain, strict=True))


@pytest.mark.parametrize(
    ("name", "controlled"),
    [(name, True) for name in [*DIGITS, *LOG_NORMAL]]
    + [(name, False) for name in [*DIGITS, *LOG_NORMAL] if not name.endswith(("0.50", "0.85", "0.95"))],
)
def test_coverage_of_sequential_stopping(name: str, controlled: bool) -> None:
    limit = 100
    y, x, truth, control_mean = draws(name, limit)
    if not controlled:
        control_mean = NAN
    active, stopped, counts, n = list(range(REPETITIONS)), [], [], 0
    while active:
        n = next_count(n, limit)
        estimates = [control_variate_estimate(row, control_mean) for row in sums_at(n, y[active], x[active])]
        done = [n == limit or is_precise(estimate, n, 0.05) for estimate in estimates]
        stopped += [estimate for estimate, stop in zip(estimates, done, strict=True) if stop]
        counts += [n] * sum(done)
        active = [index for index, stop in zip(active, done, strict=True) if not stop]
    print(f"{name}, {controlled=}: covers {coverage(stopped, truth):.3f} with {np.mean(counts):.1f} batches")
    assert coverage(stopped, truth) >= 0.92


def test_a_textbook_regression_does_not_cover() -> None:
    """Why correlations are discounted: lambda_max bends away from v'H_B v where another eigenvector wins."""
    y, x, truth, control_mean = draws("digits, 400 steps, b=128", 20)
    dy, dx = y - y.mean(1, keepdims=True), x - x.mean(1, keepdims=True)
    offset, s_xx = x.mean(1) - control_mean, (dx**2).sum(1)
    slope = (dx * dy).sum(1) / s_xx
    variance = ((dy - slope[:, None] * dx) ** 2).sum(1) / 18 * (1 / 20 + offset**2 / s_xx)
    error = np.abs(y.mean(1) - slope * offset - truth)
    assert np.mean(error <= t.ppf(0.975, 18) * np.sqrt(variance)) < 0.9
