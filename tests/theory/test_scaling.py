"""Rules for learning rates against exact laws of the sharpness, enumerated batches and the optimizers themselves."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from lightning_eoss.theory import scaling
from lightning_eoss.theory.random_matrix import fit_batch_size_curve, wigner_outlier
from lightning_eoss.theory.scaling import (
    curvature_range,
    curve_factor,
    nesterov,
    polyak,
    saturating_factor,
    scale_learning_rate,
    scaling_rule,
    without_bulk,
)
from lightning_eoss.theory.stability import NoLimits, StabilityLimits, edge_ratio, stability_limits

NAN = math.nan
ADAPTIVE = ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta"]


def weight(size: int = 4) -> Tensor:
    return torch.ones(size, dtype=torch.float64, requires_grad=True)


# ------------------------------------------------------------------------------------------------------- the two rules


def test_rules_scale_there_and_back() -> None:
    assert scale_learning_rate(0.1, 128, 1024, "linear") == pytest.approx(0.8)
    assert scale_learning_rate(0.1, 128, 512, "sqrt") == pytest.approx(0.2)
    assert scale_learning_rate(0.1, 128, 8, "sqrt") == pytest.approx(0.025)
    for rule in ("linear", "sqrt"):
        assert scale_learning_rate(0.3, 7, 7, rule) == 0.3
        there = scale_learning_rate(0.3, 7, 24, rule)
        assert scale_learning_rate(there, 24, 7, rule) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NAN, 1, 2, "linear"), "lr=nan"),
        ((-0.1, 1, 2, "linear"), "lr=-0.1"),
        ((math.inf, 1, 2, "linear"), "lr=inf"),
        ((0.1, 0, 2, "linear"), "old_batch_size=0"),
        ((0.1, 1, NAN, "sqrt"), "new_batch_size=nan"),
        ((0.1, 1, -4, "sqrt"), "new_batch_size=-4"),
        ((0.1, 1, 2, "cubic"), "rule='cubic' is unknown: choose 'linear'.*or 'sqrt'"),
    ],
)
def test_what_cannot_be_scaled_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_learning_rate(*arguments)


@pytest.mark.parametrize("name", ["SGD", "ASGD"])
def test_steps_proportional_to_the_gradient_scale_linearly(name: str) -> None:
    assert scaling_rule(getattr(torch.optim, name)([weight()], lr=0.1)) == "linear"


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_optimizers_scale_with_the_root(name: str) -> None:
    """Before and after a step; a subclass that leaves the step alone is what it is derived from."""
    kind = getattr(torch.optim, name)
    parameter = weight()
    optimizer = type("Renamed", (kind,), {})([parameter], lr=0.1)
    assert scaling_rule(optimizer) == "sqrt"
    for _ in range(20):
        parameter.grad = torch.full_like(parameter, 3.0)
        optimizer.step()
    assert scaling_rule(optimizer) == "sqrt"


def test_optimizers_that_are_not_known_are_refused() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for optimizer in (torch.optim.LBFGS([weight()]), Own([weight()], lr=0.1), torch.optim.Rprop([weight()])):
        with pytest.raises(ValueError, match=f"^{type(optimizer).__name__} is no .*rule='linear' if.*rule='sqrt' if"):
            scaling_rule(optimizer)


@pytest.mark.parametrize(("hidden", "rule"), [(0, "sqrt"), (2, "sqrt"), (3, "linear"), (4, "linear")])
def test_where_eps_hides_the_preconditioner_the_rule_is_linear(hidden: int, rule: str) -> None:
    """Of four parameters so many have gradients far below eps; half is not more than half."""
    parameter = weight()
    optimizer = torch.optim.Adam([parameter], lr=0.1, eps=1e-3)
    assert scaling_rule(optimizer) == "sqrt"  # before the first step nothing is known
    parameter.grad = torch.tensor([1e-6] * hidden + [1.0] * (4 - hidden), dtype=torch.float64)
    optimizer.step()
    assert scaling_rule(optimizer) == rule


@pytest.mark.parametrize(("eps", "exponent"), [(1e-12, 0.5), (1e6, 1.0)])
def test_the_rule_is_the_exponent_of_the_stable_rate(eps: float, exponent: float) -> None:
    """Where all sharpness and all gradients are noise, an edge ratio of 1 is met at a rate that grows by the rule.

    Least squares with one input of a thousand that is not zero, so that a batch holds at most one: H_B = h / B.
    """

    def stable_rate(batch_size: int) -> float:
        generator = torch.Generator().manual_seed(0)
        parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([parameter], lr=1e-9, betas=(0.9, 0.999), eps=eps)
        for _ in range(6000):  # several memories of the second moment
            noise = torch.randn(1, generator=generator, dtype=torch.float64) / math.sqrt(batch_size)
            parameter.grad = noise
            optimizer.step()
        second = optimizer.state[parameter]["exp_avg_sq"]
        preconditioner = float(second.sqrt() + eps)
        return 38.0 * preconditioner / (1000.0 / batch_size)

    measured = math.log(stable_rate(64) / stable_rate(4)) / math.log(16)
    assert measured == pytest.approx(exponent, abs=0.01)


# ---------------------------------------------------------------------------------------------------------- saturation


def factor(full: float, mini: float, old: float, new: float, dataset_size: int | None = 1024) -> float:
    return saturating_factor(full, mini, old_batch_size=old, new_batch_size=new, dataset_size=dataset_size)


def test_the_same_batch_size_changes_nothing() -> None:
    for full, mini, size in [(1.0, 5.0, 7), (1.0, 0.5, 7), (2.0, 2.0, 1024), (1.0, 3.0, 1024)]:
        assert factor(full, mini, size, size) == 1.0


@pytest.mark.parametrize("old", [2, 16, 128, 700])
@pytest.mark.parametrize("new", [1, 8, 64, 512, 1024])
@pytest.mark.parametrize("noise", [0.01, 1.0, 100.0])
def test_it_is_at_most_what_either_law_allows(old: int, new: int, noise: float) -> None:
    """And the linear rule bounds it: above for larger batches, below for smaller ones."""

    def u(size: int) -> float:
        return 1 / size - 1 / 1024

    for exponent in (0.5, 0.75, 1.0):

        def sharpness(size: int, exponent: float = exponent) -> float:
            return 1 + noise * u(size) ** exponent

        found, true = factor(1.0, sharpness(old), old, new), sharpness(old) / sharpness(new)
        low, high = sorted([1.0, new / old])
        assert low <= found <= high
        assert found <= max(true, low) + 1e-12


def test_a_law_at_either_end_is_met() -> None:
    assert factor(1.0, 3.0, 16, 64, None) == pytest.approx(3 / (1 + 2 * 0.5))  # exponent 1/2
    assert factor(1.0, 3.0, 16, 4, None) == pytest.approx(3 / (1 + 2 * 4.0))  # exponent 1
    r = (1 / 64 - 1 / 100) / (1 / 16 - 1 / 100)  # of a finite data set, where the gap ends at N
    assert factor(1.0, 3.0, 16, 64, 100) == pytest.approx(3 / (1 + 2 * math.sqrt(r)))
    assert factor(1.0, 3.0, 16, 100, 100) == pytest.approx(3.0)


def test_without_a_gap_there_is_nothing_to_gain_and_noise_is_no_gap() -> None:
    for new in (1, 8, 64, 1024):
        assert factor(2.0, 2.0, 16, new) == factor(2.0, 1.9, 16, new) == factor(2.0, 1.0, 16, new) == 1.0


def test_noise_of_the_gap_next_to_the_full_batch_is_not_magnified() -> None:
    """u is 4e-7 at 1023 of 1024, and 2,400 times as large at 512."""
    assert factor(1.0, 1.1, 1023, 512) == pytest.approx(512 / 1023)
    assert factor(1.0, 5.0, 512, 1024) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "arguments",
    [
        (NAN, 1.0, 8, 16),
        (1.0, NAN, 8, 16),
        (1.0, math.inf, 8, 16),
        (0.0, 1.0, 8, 16),
        (-1.0, 1.0, 8, 16),
        (1.0, -1.0, 8, 16),
        (1.0, 1.0, 1024, 16),
    ],
)
def test_what_is_not_known_is_nan(arguments: Any) -> None:
    assert math.isnan(factor(*arguments))


@pytest.mark.parametrize(("old", "new"), [(0, 8), (8, 2000), (NAN, 8), (8, 0.5)])
def test_batches_that_cannot_be_drawn_are_refused(old: float, new: float) -> None:
    with pytest.raises(ValueError, match=r"is not between 1 and dataset_size=1024"):
        factor(1.0, 2.0, old, new)


def test_positive_curvature_is_bounded_by_the_linear_rule() -> None:
    """Enumerated: all batches of a Gauss-Newton matrix, whose gap follows no power law."""
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def sharpness(size: int) -> float:
        rows = torch.stack([inputs[list(chosen)] for chosen in combinations(range(8), size)])
        return float(torch.linalg.eigvalsh(rows.mT @ rows / size)[:, -1].mean())

    known = {size: sharpness(size) for size in range(1, 9)}
    for old in range(1, 8):
        for new in range(1, 9):
            true = known[old] / known[new]
            low, high = sorted([1.0, new / old])
            assert low - 1e-12 <= true <= high + 1e-12
            found = factor(known[8], known[old], old, new, 8)
            assert found <= 1.07 * true  # next to N a gap may grow a little faster than u: exponent 1.03


def test_it_holds_for_symmetric_noise() -> None:
    """The Wigner model, whose gap goes as u at large batches and as its root at small ones."""
    for old, new in [(4, 8), (16, 64), (64, 1000), (16, 8), (64, 16), (200, 100)]:
        mini, target = (wigner_outlier(1.0, 4.0, batch_size=size, dataset_size=1024) for size in (old, new))
        assert factor(1.0, mini, old, new) <= mini / target + 1e-12


# ---------------------------------------------------------------------------------------------------- a measured curve


def curve(error: float = 0.1, eigenvalue_stderr: float = 0.0, full: float = 1.0) -> Any:
    """Gap 6 u / (1 + 2 u), endless."""
    return fit_batch_size_curve(
        full, [1, 4], [full + 2.0, full + 1.0], [error, error], eigenvalue_stderr=eigenvalue_stderr
    )


def test_a_curve_is_met_exactly() -> None:
    found = curve()
    assert curve_factor(found, old_batch_size=4, new_batch_size=16) == pytest.approx(2 / (1 + 6 / 18))
    assert curve_factor(found, old_batch_size=4, new_batch_size=1) == pytest.approx(2 / 3)
    assert curve_factor(found, old_batch_size=16, new_batch_size=4) == pytest.approx((1 + 6 / 18) / 2)
    assert curve_factor(found, old_batch_size=9, new_batch_size=9) == 1.0


def test_a_curve_is_bounded_by_the_linear_rule() -> None:
    steep = fit_batch_size_curve(1.0, [100, 900], [9.0, 2.0], [0.1, 0.1], dataset_size=1000)
    assert steep.at(900).mean / steep.at(1000).mean > 1000 / 900
    assert curve_factor(steep, old_batch_size=900, new_batch_size=1000) == pytest.approx(1000 / 900)
    assert curve_factor(steep, old_batch_size=1000, new_batch_size=900) == pytest.approx(900 / 1000)


@pytest.mark.parametrize(("old", "new"), [(2, 32), (32, 2)])
def test_the_conservative_end_is_the_lower_one(old: int, new: int) -> None:
    """And it is nearer than that of two independent intervals, whose errors do not cancel."""
    found = curve(0.2)
    middle = curve_factor(found, old_batch_size=old, new_batch_size=new)
    low = curve_factor(found, old_batch_size=old, new_batch_size=new, conservative=True)
    assert found.at(old).lower / found.at(new).upper < low < middle
    draws = found.curves[1:, :, None]
    sharpness = draws[:, 0] + draws[:, 1] / (np.array([old, new]) + draws[:, 2])  # c u / (1 + d u) with u = 1/B
    assert low == pytest.approx(np.quantile(sharpness[:, 0] / sharpness[:, 1], 0.025), rel=0.01)


def test_a_curve_that_is_not_positive_says_nothing() -> None:
    assert math.isnan(curve_factor(curve(full=-5.0), old_batch_size=4, new_batch_size=16))
    uncertain = curve(eigenvalue_stderr=2.0)  # one refit in three is below zero
    assert curve_factor(uncertain, old_batch_size=4, new_batch_size=16) == pytest.approx(1.5)
    assert math.isnan(curve_factor(uncertain, old_batch_size=4, new_batch_size=16, conservative=True))


# --------------------------------------------------------------------------------------- rates learned from a spectrum


def shrinkage(optimizer: Callable[[list[Tensor]], torch.optim.SGD], spectrum: Tensor, steps: int = 1600) -> float:
    """By how much a quadratic's parameters shrink a step in the long run; larger than 1 where they grow."""
    parameter = nn.Parameter(torch.ones_like(spectrum))
    sgd = optimizer([parameter])
    norms = []
    for step in range(steps):
        parameter.grad = spectrum * parameter.detach()
        sgd.step()
        if step + 1 in (steps // 2, steps):
            norms.append(float(parameter.detach().norm()))
        if not float(parameter.detach().norm()) < 1e100:
            return math.inf
    return (norms[1] / norms[0]) ** (2 / steps)


def radius(optimizer: Callable[[list[Tensor]], torch.optim.SGD], curvature: float) -> float:
    """Spectral radius of a step with momentum, a linear map of the parameter and its buffer."""
    columns = []
    for start, buffer in [(1.0, 0.0), (0.0, 1.0)]:
        parameter = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        sgd = optimizer([parameter])
        sgd.state[parameter]["momentum_buffer"] = torch.tensor([buffer], dtype=torch.float64)
        parameter.grad = curvature * parameter.detach()
        sgd.step()
        moving = sgd.param_groups[0]["momentum"] > 0
        columns.append([float(parameter.detach()), float(sgd.state[parameter]["momentum_buffer"]) if moving else 0.0])
    return float(np.abs(np.linalg.eigvals(np.array(columns).T)).max())


SPECTRUM = torch.linspace(1.0, 100.0, 34, dtype=torch.float64)


def test_the_heavy_ball_is_as_fast_as_polyak_says() -> None:
    lr, momentum = polyak(100.0, 1.0)
    assert (lr, momentum) == (pytest.approx(0.0330579, rel=1e-5), pytest.approx(0.6694215))
    found = shrinkage(lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum), SPECTRUM)
    assert found == pytest.approx(0.81818, abs=1e-3)  # both ends are double roots, t .818^t, which costs 2^(1/800)
    for other_lr, other_momentum in [(0.95 * lr, momentum), (lr, 0.6), (lr, 0.75)]:  # it is the best there is
        assert shrinkage(lambda p, a=other_lr, m=other_momentum: torch.optim.SGD(p, lr=a, momentum=m), SPECTRUM) > found


def test_nesterovs_gradient_is_as_fast_as_it_should_be() -> None:
    lr, momentum = nesterov(100.0, 1.0)
    assert (lr, momentum) == (pytest.approx(0.01), pytest.approx(0.8181818))
    found = shrinkage(lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, nesterov=True), SPECTRUM)
    assert found == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("printed", "options"), [(2 / 11, {"momentum": 81 / 121}), (0.1, {"momentum": 9 / 11, "nesterov": True})]
)
def test_the_printed_rates_diverge(printed: float, options: dict[str, Any]) -> None:
    """Equation (24): 2 / (sqrt l1 + sqrt lP) and sqrt(lP / l1)."""
    assert shrinkage(lambda p: torch.optim.SGD(p, lr=printed, **options), SPECTRUM) == math.inf


@pytest.mark.parametrize("smallest", [0.01, 1.0, 25.0, 100.0])
def test_how_far_from_the_edge_they_are(smallest: float) -> None:
    """Polyak's is next to it, Nesterov's never nearer than 3/4; just inside steps shrink, just outside they grow."""
    for rule, ratio in [
        (polyak, 100 / (100 + smallest)),
        (nesterov, (1 + 2 * nesterov(100.0, smallest)[1]) / (2 + 2 * nesterov(100.0, smallest)[1])),
    ]:
        lr, momentum = rule(100.0, smallest)

        def sgd(
            p: list[Tensor], lr: float = lr, momentum: float = momentum, nesterovs: bool = rule is nesterov
        ) -> torch.optim.SGD:
            return torch.optim.SGD(p, lr=lr, momentum=momentum, nesterov=nesterovs and momentum > 0)

        limits = stability_limits(sgd([weight()]))
        assert isinstance(limits, StabilityLimits)
        assert edge_ratio(100.0, limits) == pytest.approx(ratio)
        assert ratio <= 0.75 or rule is polyak
        assert radius(sgd, 0.999 * 100 / ratio) < 1 < radius(sgd, 1.001 * 100 / ratio)


@pytest.mark.parametrize("rule", [polyak, nesterov])
@pytest.mark.parametrize("limit", [0.0, 0.5, 0.9, 0.99])
def test_a_bounded_momentum_stays_stable(rule: Any, limit: float) -> None:
    """A flat direction asks for a momentum of 1: what is returned belongs to the smallest curvature that is allowed."""
    lr, momentum = rule(100.0, 0.0, max_momentum=limit)
    assert momentum == pytest.approx(limit)
    optimizer = torch.optim.SGD([weight()], lr=lr, momentum=momentum, nesterov=rule is nesterov and momentum > 0)
    limits = stability_limits(optimizer)
    assert isinstance(limits, StabilityLimits) and edge_ratio(100.0, limits) < 1
    root = math.sqrt(limit) if rule is polyak else limit
    raised = 100.0 * ((1 - root) / (1 + root)) ** 2
    assert_allclose(rule(100.0, raised), (lr, momentum))
    assert rule(100.0, 50.0, max_momentum=0.9) == rule(100.0, 50.0)  # far from its limit nothing changes


@pytest.mark.parametrize("rule", [polyak, nesterov])
def test_rates_have_units(rule: Any) -> None:
    """Twice the curvature, half the rate, the same momentum; equal eigenvalues need one step without momentum."""
    assert_allclose(rule(20.0, 3.0), np.array(rule(10.0, 1.5)) * [0.5, 1.0])
    assert rule(4.0, 4.0) == (0.25, 0.0)
    assert all(math.isnan(rule(4.0, NAN)[1]) and math.isnan(each) for each in rule(NAN, NAN))


@pytest.mark.parametrize("rule", [polyak, nesterov])
def test_what_is_not_convex_is_refused(rule: Any) -> None:
    for largest, smallest in [(0.0, 0.0), (-1.0, -2.0), (1.0, -1e-3), (1.0, 2.0)]:
        with pytest.raises(ValueError, match=rf"largest={largest} and smallest={smallest} bound no convex"):
            rule(largest, smallest)
    for limit in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=f"max_momentum={limit} is not from 0 to 1"):
            rule(2.0, 1.0, max_momentum=limit)


# ------------------------------------------------------------------------------------------------------------ the bulk


def test_the_bulk_is_what_holds_more_than_half() -> None:
    values, weights = without_bulk(np.array([-0.5, 0.0, 2.0, 9.0]), np.array([0.1, 0.6, 0.2, 0.1]))
    assert_allclose(values, [-0.5, 2.0, 9.0])
    assert_allclose(weights, [0.25, 0.5, 0.25])


def test_a_bulk_is_not_invented() -> None:
    for mass in ([0.5, 0.25, 0.25], [0.4, 0.3, 0.3]):
        values, weights = without_bulk([1.0, 2.0, 3.0], mass)
        assert values.tolist() == [1.0, 2.0, 3.0] and weights.tolist() == mass


def test_mass_need_not_be_normalised_before() -> None:
    values, weights = without_bulk([1.0, 2.0, 3.0], [6.0, 3.0, 1.0])
    assert values.tolist() == [2.0, 3.0] and weights.tolist() == [0.75, 0.25]


def test_of_a_single_value_nothing_is_left() -> None:
    values, weights = without_bulk([3.0], [1.0])
    assert values.shape == weights.shape == (0,)


def test_each_value_needs_a_weight() -> None:
    with pytest.raises(ValueError, match=r"values of shape \(2,\) with weights of shape \(3,\)"):
        without_bulk([1.0, 2.0], [0.5, 0.25, 0.25])


def test_the_range_is_that_of_the_sizes() -> None:
    assert curvature_range([-6.0, -0.5, 0.01, 4.0], [0.1, 0.1, 0.7, 0.1]) == (6.0, 0.5)
    assert curvature_range([-6.0, -0.5, 0.01, 4.0], [0.1, 0.3, 0.5, 0.1]) == (6.0, 0.01)  # half is no bulk


def test_zeros_are_no_curvature() -> None:
    """Less than half of the mass, up to rounding; one curvature alone is no range."""
    values, weights = [-1e-9, 0.0, 2e-6, 0.5, 4.0], [0.2, 0.2, 0.2, 0.2, 0.2]
    assert curvature_range(values, weights) == (4.0, 1e-9)
    assert curvature_range(values, weights, tol=1e-7) == (4.0, 2e-6)
    assert curvature_range(values, weights, tol=1e-6) == (4.0, 0.5)
    assert all(math.isnan(each) for each in curvature_range(values, weights, tol=0.2))


def test_a_bulk_at_the_top_is_left_out_below_alone() -> None:
    """A rate that goes by the rest, 2, would diverge at 10."""
    largest, smallest = curvature_range([1.0, 2.0, 10.0], [0.1, 0.1, 0.8])
    assert (largest, smallest) == (10.0, 1.0)
    lr, momentum = nesterov(largest, smallest)
    spectrum = torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64)
    assert shrinkage(lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, nesterov=True), spectrum) < 1
    assert shrinkage(lambda p: torch.optim.SGD(p, lr=1 / 2), spectrum) == math.inf


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ([], []),
        ([3.0], [1.0]),
        ([0.0, 3.0], [0.6, 0.4]),
        ([0.0, 0.0], [0.5, 0.5]),
        ([1.0, 2.0, NAN], [0.4, 0.3, 0.3]),
        ([NAN, NAN], [NAN, NAN]),
        ([1.0, 2.0, math.inf], [0.4, 0.3, 0.3]),
    ],
)
def test_too_little_is_no_range(values: list[float], weights: list[float]) -> None:
    assert all(math.isnan(each) for each in curvature_range(values, weights))


def test_limits_without_a_preconditioner_do_not_change_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "stability_limits", lambda _: NoLimits("none"))
    assert scaling_rule(torch.optim.Adam([weight()])) == "sqrt"
