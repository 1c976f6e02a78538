"""Each limit is the place where the real optimizer's steps begin to diverge on a quadratic."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_eoss.theory.stability import NoLimits, StabilityLimits, edge_ratio, stability_limits

HESSIAN = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)


def parameters(size: int) -> list[Tensor]:
    """Scalar parameters, which sum up to a start with a component along every direction that the tests use."""
    return [torch.full((1,), 1.0 + i, dtype=torch.float64, requires_grad=True) for i in range(size)]


def diverges(optimizer: Optimizer, hessian: Tensor, steps: int = 1000) -> bool:
    """Whether the optimizer moves away from the minimum of ``w' hessian w / 2``."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    start = torch.cat(tensors).norm()
    for _ in range(steps):
        gradient = hessian @ torch.cat(tensors).detach()
        for parameter, entry in zip(tensors, gradient.split(1), strict=True):
            parameter.grad = entry
        optimizer.step()
    return not torch.cat(tensors).norm() < start  # nan counts


def boundary(make: Callable[[], Optimizer], hessian: Tensor) -> float:
    """The factor of ``hessian`` at which the steps begin to diverge, to .1 %, by bisection."""
    low, high = 1e-2, 1e4
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(make(), middle * hessian) else (middle, high)
    return math.sqrt(low * high)


def limits_of(optimizer: Optimizer) -> StabilityLimits:
    limits = stability_limits(optimizer)
    assert isinstance(limits, StabilityLimits)
    return limits


def scaled_edge_ratio(limits: StabilityLimits, hessian: Tensor) -> float:
    """The edge ratio by its definition, from dense matrices."""
    root = torch.tensor(limits.limits, dtype=torch.float64).rsqrt()
    decayed = hessian + torch.diag(torch.tensor(limits.weight_decay, dtype=torch.float64))
    return float(torch.linalg.eigvalsh(root[:, None] * decayed * root)[-1])


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({}, 20.0),
        ({"weight_decay": 0.3}, 19.7),
        ({"momentum": 0.9}, 38.0),
        ({"momentum": 0.9, "dampening": 0.9}, 380.0),
        ({"momentum": 0.5, "dampening": 0.2}, 37.5),
        ({"momentum": 0.9, "weight_decay": 0.3}, 37.7),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 0.28),
        ({"momentum": 0.5, "nesterov": True}, 15.0),
        ({"momentum": 0.5, "nesterov": True, "weight_decay": 0.3}, 14.7),
        ({"dampening": 0.5}, 20.0),  # torch ignores the dampening of no momentum
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, 20.0),
    ],
    ids=str,
)
def test_threshold_is_where_sgd_begins_to_diverge(options: dict[str, Any], threshold: float) -> None:
    def make() -> SGD:
        return SGD(parameters(1), **{"lr": 0.1, **options})

    limits = limits_of(make())
    assert limits.threshold == pytest.approx(threshold)
    assert edge_ratio(threshold, limits) == pytest.approx(1.0)
    assert boundary(make, torch.ones(1, 1, dtype=torch.float64)) == pytest.approx(threshold, rel=0.01)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"lr": 0.1}, {"lr": 0.02}),
        ({"lr": 0.1}, {"lr": 0.4, "weight_decay": 3.0}),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
        ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.4, "momentum": 0.3, "dampening": 0.5}),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.2, "momentum": 0.5, "weight_decay": 1.0}),
    ],
    ids=["rates", "decays", "nesterov", "momenta", "mixture"],
)
def test_groups_that_differ_diverge_at_edge_ratio_one(first: dict[str, Any], second: dict[str, Any]) -> None:
    def make() -> SGD:
        one, other = parameters(2)
        return SGD([{"params": [one], **first}, {"params": [other], **second}])

    limits = limits_of(make())
    assert limits.threshold is None
    assert scaled_edge_ratio(limits, boundary(make, HESSIAN) * HESSIAN) == pytest.approx(1.0, rel=0.01)
    with pytest.raises(ValueError, match=r"limits\.threshold=None: the limits differ between parameters"):
        edge_ratio(1.0, limits)


def test_entries_follow_the_groups_and_leave_frozen_parameters_out() -> None:
    one, frozen, other = parameters(3)
    frozen.requires_grad_(False)
    limits = limits_of(SGD([{"params": [other, frozen]}, {"params": [one], "lr": 0.5, "weight_decay": 0.1}], lr=0.1))
    assert [id(p) for p in limits.parameters] == [id(other), id(one)]
    assert limits.limits == (20.0, 4.0)
    assert limits.weight_decay == (0.0, 0.1)


def test_parameters_that_do_not_move_have_infinite_limits() -> None:
    one, other = parameters(2)
    resting = limits_of(SGD([one, other], lr=0.0, maximize=True))
    assert resting.limits == (math.inf, math.inf)
    assert edge_ratio(5.0, resting) == 0.0
    mixed = limits_of(SGD([{"params": [one], "lr": 0.0}, {"params": [other]}], lr=0.1))
    assert mixed.limits == (math.inf, 20.0)
    assert mixed.threshold is None
    assert limits_of(SGD([one], lr=0.1, momentum=0.9, dampening=1.0)).limits == (math.inf,)


class _OwnStep(SGD):
    def step(self, closure: Any = None) -> None:
        """Not the step of SGD."""


class _OwnName(SGD):
    pass


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (SGD(parameters(1), lr=0.1, maximize=True), "maximize=True"),
        (SGD(parameters(1), lr=0.1, momentum=1.0), "momentum=1.0"),
        (SGD(parameters(1), lr=0.1, momentum=0.9, dampening=1.5), "dampening=1.5"),
        (Adam(parameters(1)), "Adam"),
        (_OwnStep(parameters(1), lr=0.1), "_OwnStep"),
    ],
    ids=["maximize", "momentum", "dampening", "unknown", "subclass"],
)
def test_an_optimizer_without_limits_says_why(optimizer: Optimizer, reason: str) -> None:
    limits = stability_limits(optimizer)
    assert isinstance(limits, NoLimits)
    assert reason in limits.reason


def test_a_subclass_that_keeps_the_step_and_a_scheduled_optimizer_keep_their_limits() -> None:
    optimizer = _OwnName(parameters(1), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)  # replaces the step of the instance
    assert limits_of(optimizer).threshold == 40.0
