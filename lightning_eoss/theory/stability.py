"""Stability limits of torch's optimizers: how sharp a loss may be before the steps diverge.

Near a minimum the loss is a quadratic with Hessian H, and an optimizer iterates a linear map on it. Along positive
curvature the steps contract while every eigenvalue of ``D^-1/2 (H + W) D^-1/2`` is below 1. The diagonal matrix D holds
the *limit* of each parameter, W its coupled weight decay, and the largest of those eigenvalues is the **edge ratio**: 1
is the edge, whatever the optimizer. Where D and W are the same for all parameters, the sharpness decides alone, and the
sharpness at the edge is the **threshold** ``D - W``.

Limits belong to a moment: a schedule that moves the learning rate or the momentum moves them too.

References:
    Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021, appendix B.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer


@dataclass(frozen=True, eq=False)
class StabilityLimits:
    """The diagonals of D and W, one entry for each trainable parameter tensor, in the optimizer's order."""

    parameters: tuple[Tensor, ...]
    limits: tuple[float | Tensor, ...]  # D; a tensor has its parameter's shape; infinite where the learning rate is 0
    weight_decay: tuple[float, ...]  # W; coupled decay alone, which adds to the curvature

    @property
    def scalar(self) -> tuple[float, float] | None:
        """D and W as two numbers, where they are the same for all parameters."""
        pairs = set(zip(self.limits, self.weight_decay, strict=True))
        limit, decay = pairs.pop() if len(pairs) == 1 else (None, 0.0)
        return (limit, decay) if isinstance(limit, float) else None

    @property
    def threshold(self) -> float | None:
        """The sharpness at the edge, ``D - W``, where D and W are the same for all parameters."""
        return None if self.scalar is None else self.scalar[0] - self.scalar[1]


@dataclass(frozen=True)
class NoLimits:
    """What stands in for the limits of an optimizer that has none."""

    reason: str  # a clause without a full stop


def stability_limits(optimizer: Optimizer) -> StabilityLimits | NoLimits:
    r"""Reads the stability limits of an optimizer, as they are now.

    For SGD with learning rate :math:`\eta`, momentum :math:`\mu` and dampening :math:`\tau` (of the momentum)

    .. math:: D = \frac{2 (1 + \mu)}{\eta (1 - \tau)}, \qquad \text{and with Nesterov's momentum} \quad
        D = \frac{2 (1 + \mu)}{\eta (1 + 2 \mu)}.

    Its weight decay is coupled. D is exact for groups that differ in any of these too: each filters its gradients by
    some :math:`-G(z)` whose imaginary part, for :math:`\mu < 1`, keeps its sign on the upper half of the unit circle.
    So modes leave the circle at -1 alone, and there :math:`G(-1) = -1 / D`.

    Args:
        optimizer: An optimizer of torch, known by its ``step``: a subclass with a ``step`` of its own is unknown.

    Returns:
        The limits of all parameters that require a gradient, or the reason why there are none.

    Example:
        >>> import torch
        >>> weight = torch.ones(3, requires_grad=True)
        >>> stability_limits(torch.optim.SGD([weight], lr=0.1)).threshold
        20.0
        >>> stability_limits(torch.optim.SGD([weight], lr=0.5, momentum=0.5, weight_decay=2.0)).threshold
        4.0
        >>> stability_limits(torch.optim.LBFGS([weight]))
        NoLimits(reason='the stability limits of LBFGS are not known')
    """
    rule = _RULES.get(inspect.unwrap(type(optimizer).step))
    return rule(optimizer) if rule else NoLimits(f"the stability limits of {type(optimizer).__name__} are not known")


def edge_ratio(sharpness: float, limits: StabilityLimits) -> float:
    """Turns a sharpness into its edge ratio, ``(sharpness + W) / D``, where D and W are the same for all parameters.

    Args:
        sharpness: Largest eigenvalue of the Hessian, without weight decay, or a bound of it.
        limits: Limits that have a ``threshold``.

    Returns:
        The edge ratio: 1 where ``sharpness`` equals the threshold, 0 where the learning rate is 0.

    Raises:
        ValueError: The limits have no threshold.

    Example:
        >>> import torch
        >>> limits = stability_limits(torch.optim.SGD([torch.ones(3, requires_grad=True)], lr=0.5, weight_decay=1.0))
        >>> limits.threshold, edge_ratio(3.0, limits), edge_ratio(1.0, limits)
        (3.0, 1.0, 0.5)
    """
    if limits.scalar is None:
        raise ValueError(
            "limits.threshold=None: the limits differ between parameters, so the sharpness alone does not give the "
            "edge ratio; measure the largest eigenvalue of D^-1/2 (H + W) D^-1/2"
        )
    limit, decay = limits.scalar
    return (sharpness + decay) / limit


def _sgd(optimizer: Optimizer) -> StabilityLimits | NoLimits:
    owned = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    moving = [group for _, group in owned if group["lr"] > 0]
    for group in moving:
        if group["maximize"]:
            return NoLimits("maximize=True climbs the loss, which turns the sign of its Hessian")
        if group["momentum"] >= 1:
            return NoLimits(f"momentum={group['momentum']} is not below 1, where the formula of the limit ends")
        if group["momentum"] and group["dampening"] > 1:
            return NoLimits(f"dampening={group['dampening']} turns the sign of the gradient")
    return StabilityLimits(
        parameters=tuple(p for p, _ in owned),
        limits=tuple(_sgd_limit(group) for _, group in owned),
        weight_decay=tuple(float(group["weight_decay"]) for _, group in owned),
    )


def _sgd_limit(group: dict[str, Any]) -> float:
    """The curvature (with decay) at which a step just turns its mode around: the eigenvalue of the map is -1."""
    momentum = group["momentum"]
    undamped = 1.0 if momentum == 0 else 1 - group["dampening"]  # torch dampens nothing but the momentum
    gain = float(group["lr"]) * (1 + 2 * momentum if group["nesterov"] else undamped)
    return 2 * (1 + momentum) / gain if gain > 0 else math.inf


_RULES: dict[Callable[..., Any], Callable[[Optimizer], StabilityLimits | NoLimits]] = {inspect.unwrap(SGD.step): _sgd}
