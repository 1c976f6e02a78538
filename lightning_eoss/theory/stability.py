"""Stability limits of torch's optimizers: how sharp a loss may be before the steps diverge.

Near a minimum the loss is a quadratic with Hessian H, and an optimizer iterates a linear map on it. Along positive
curvature the steps contract while every eigenvalue of ``D^-1/2 (H + W) D^-1/2`` is below 1. The diagonal matrix D holds
the *limit* of each parameter, W its coupled weight decay, and the largest of those eigenvalues is the **edge ratio**: 1
is the edge, whatever the optimizer. Where D and W are the same for all parameters, the sharpness decides alone, and the
sharpness at the edge is the **threshold** ``D - W``.

Limits belong to a moment: a schedule that moves the learning rate or the momentum moves them too. Those of an adaptive
optimizer take its preconditioner and all coefficients as its state holds them now. Above them it need not diverge as
plain gradient descent does: its preconditioner grows with the gradient, and the limits with it.

References:
    Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021, appendix B.
    Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", 2022.
    "Momentum Further Constrains Sharpness at the Edge of Stochastic Stability", arXiv 2604.14108.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_eoss.theory.optimizers import ADAPTIVE, PLAIN, REFUSED, Group, Responder, Response, refusal


@dataclass(frozen=True, eq=False)
class StabilityLimits:
    """The diagonals of D and W, one entry for each trainable parameter tensor, in the optimizer's order."""

    parameters: tuple[Tensor, ...]
    limits: tuple[float | Tensor, ...]  # D; a tensor has its parameter's shape, (..., 2) if complex; infinite: no moves
    weight_decay: tuple[float, ...]  # W; coupled decay alone, which adds to the curvature
    preconditioners: tuple[Tensor, ...] = ()  # P of adaptive optimizers, for each parameter that has one
    eps_entries: tuple[Tensor, ...] = ()  # (), entries of each P where eps is at least the gradient's part
    effective_rates: tuple[float | None, ...] = ()  # lr (1 - dampening) / (1 - momentum) of SGD with momentum

    @property
    def scalar(self) -> tuple[float, float] | None:
        """D and W as two numbers, where they are the same for all parameters."""
        if any(isinstance(limit, Tensor) for limit in self.limits):
            return None
        pairs = set(zip(self.limits, self.weight_decay, strict=True))
        limit, decay = pairs.pop() if len(pairs) == 1 else (None, 0.0)
        return (limit, decay) if isinstance(limit, float) else None

    @property
    def threshold(self) -> float | None:
        """The sharpness at the edge, ``D - W``, where D and W are the same for all parameters."""
        return None if self.scalar is None else self.scalar[0] - self.scalar[1]

    @property
    def threshold_small_batch(self) -> float | None:
        r"""Where directional sharpness settles when momentum meets small batches.

        :math:`2 (1 - \mu) / (\eta (1 - \tau)) - W`. Momentum cancels what alternates, but it sums up the noise of small
        batches, to steps like those of plain SGD with the rate :math:`\eta (1 - \tau) / (1 - \mu)`: this is its limit.
        None without momentum, and where the parameters differ.
        """
        rates = set(self.effective_rates)
        rate = rates.pop() if len(rates) == 1 else None
        if self.scalar is None or rate is None:
            return None
        return (2 / rate if rate > 0 else math.inf) - self.scalar[1]


@dataclass(frozen=True)
class NoLimits:
    """What stands in for the limits of an optimizer that has none."""

    reason: str  # a clause without a full stop
    passing: bool = False  # whether the optimizer will have limits after its first step


def stability_limits(optimizer: Optimizer) -> StabilityLimits | NoLimits:
    r"""Reads the stability limits of an optimizer, as they are now.

    For SGD with learning rate :math:`\eta`, momentum :math:`\mu` and dampening :math:`\tau` (of the momentum)

    .. math:: D = \frac{2 (1 + \mu)}{\eta (1 - \tau)}, \qquad \text{and with Nesterov's momentum} \quad
        D = \frac{2 (1 + \mu)}{\eta (1 + 2 \mu)}.

    For Adam after t steps, with its average v of squared gradients (the largest so far under ``amsgrad``),

    .. math:: D = \frac{2 (1 + \beta_1)}{\eta (1 - \beta_1)} P_t (1 - \beta_1^t), \qquad
        P_t = \sqrt{v / (1 - \beta_2^t)} + \epsilon,

    and so for AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad and Adadelta, each with its own :math:`P_t` and momentum
    (``lightning_eoss.theory.optimizers`` lists them); ASGD takes plain steps. Decoupled decay :math:`\lambda` is no
    part of W: it puts :math:`2 - \eta \lambda` in the place of the 2. A parameter that an adaptive optimizer has never
    moved has an infinite limit.

    D is exact whatever the groups and entries differ in. Entry i of the weights follows its gradients by some
    :math:`-G_i(z)`, and modes z of the unit circle have :math:`\sum_i |w_i|^2 / G_i(z) + w^* (H + W) w = 0`. All the
    :math:`1 / G_i` have positive imaginary parts on the upper half of the circle. So modes leave it at -1 alone, and
    there :math:`1 / G_i = -D_i`.

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

        After one step of Adam, :math:`D = 2 (1 + \beta_1) (|g| + \epsilon) / \eta`:

        >>> adam = torch.optim.Adam([weight], lr=0.5, betas=(0.5, 0.75), eps=1.0)
        >>> stability_limits(adam)
        NoLimits(reason='Adam has no second moments before its first step', passing=True)
        >>> weight.grad = torch.tensor([0.0, 1.0, 3.0])
        >>> adam.step()
        >>> stability_limits(adam).limits
        (tensor([ 6., 12., 24.]),)
    """
    rule = _RULES.get(_step_of(type(optimizer)))
    if rule is None:
        return NoLimits(
            f"the stability limits of {type(optimizer).__name__} are not known; "
            "lightning_eoss.theory.stability.register_stability_limits teaches them"
        )
    return rule(optimizer)


def register_stability_limits(
    optimizer_class: type[Optimizer], rule: Callable[[Any], StabilityLimits | NoLimits]
) -> None:
    """Teaches ``stability_limits`` an optimizer, and its subclasses that keep its ``step``.

    Args:
        optimizer_class: A class with a ``step`` of its own; one that inherits it changes the rule of its parent.
        rule: Reads the limits off an optimizer, or says why it has none. Must not change it.

    Example:
        >>> import torch
        >>> class Halved(torch.optim.Optimizer):  # steps by half of its lr
        ...     def step(self, closure=None): ...
        >>> def limits_of_halved(optimizer):
        ...     (group,) = optimizer.param_groups
        ...     count = len(group["params"])
        ...     return StabilityLimits(tuple(group["params"]), (4 / group["lr"],) * count, (0.0,) * count)
        >>> register_stability_limits(Halved, limits_of_halved)
        >>> stability_limits(Halved([torch.ones(3, requires_grad=True)], {"lr": 0.1})).threshold
        40.0
    """
    _RULES[_step_of(optimizer_class)] = rule


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


def eps_share(limits: StabilityLimits) -> float:
    r"""The share of an adaptive optimizer's entries that its :math:`\epsilon` rules.

    These are the entries of P where :math:`\epsilon` is at least as large as the gradient's part, such as
    :math:`\sqrt{v / (1 - \beta_2^t)}`. They step in proportion to the gradient, as SGD does, and so their learning rate
    scales linearly with the batch size; the others step by a normalised gradient, whose rule is the square root.

    Args:
        limits: Limits of any optimizer.

    Returns:
        A number from 0 to 1; NaN where there is no preconditioner.

    Example:
        >>> import torch
        >>> weight = torch.ones(4, requires_grad=True)
        >>> adam = torch.optim.Adam([weight], eps=1e-3)
        >>> weight.grad = torch.tensor([0.0, 1e-4, 1e-2, 1.0])
        >>> adam.step()
        >>> eps_share(stability_limits(adam))
        0.5
    """
    entries = sum(preconditioner.numel() for preconditioner in limits.preconditioners)
    return sum(int(count) for count in limits.eps_entries) / entries if entries else math.nan


def _read_limits(optimizer: Optimizer, rule: Responder, *, adaptive: bool) -> StabilityLimits | NoLimits:
    """The limits of one of torch's optimizers, all parameters by the same rule."""
    groups = [_numbers(group, isinstance(optimizer, AdamW)) for group in optimizer.param_groups]
    owned = [(p, group) for group in groups for p in group["params"] if p.requires_grad]
    for _, group in owned:
        if reason := refusal(group):
            return NoLimits(reason)
    states = [optimizer.state.get(p, {}) for p, _ in owned]
    begun = [not adaptive or float(state.get("step", 0)) > 0 for state in states]  # Adagrad has a state at step 0
    if owned and not any(begun):
        return NoLimits(f"{type(optimizer).__name__} has no second moments before its first step", passing=True)
    responses = [
        rule(group, state) if moves else Response(0.0)
        for (_, group), state, moves in zip(owned, states, begun, strict=True)
    ]
    return StabilityLimits(
        parameters=tuple(p for p, _ in owned),
        limits=tuple(_limit(group, response) for (_, group), response in zip(owned, responses, strict=True)),
        weight_decay=tuple(_coupled(group) for _, group in owned),
        preconditioners=tuple(each.preconditioner for each in responses if each.preconditioner is not None),
        eps_entries=tuple(each.eps_entries for each in responses if each.eps_entries is not None),
        effective_rates=tuple(each.effective_rate for each in responses),
    )


def _numbers(group: Group, decoupled: bool) -> Group:
    """A group whose tensors of one element are numbers and which says whether its decay is decoupled."""
    known = {"decoupled_weight_decay": decoupled, **group}  # older AdamW has no such entry
    return {
        name: float(value) if isinstance(value, Tensor) else tuple(map(float, value)) if name == "betas" else value
        for name, value in known.items()
    }


def _limit(group: Group, response: Response) -> float | Tensor:
    """The curvature (with decay) at which a step just turns its mode around: the eigenvalue of the map is -1."""
    if response.rate == 0:
        return math.inf
    shrink = group["lr"] * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
    scale = (2 - shrink) / response.rate
    return scale if response.preconditioner is None else scale * response.preconditioner


def _coupled(group: Group) -> float:
    decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
    return float(decay + group.get("lambd", 0.0))  # ASGD's other decay, the same thing for plain steps


def _refuse(optimizer: Optimizer, *, reason: str) -> NoLimits:
    return NoLimits(reason)


def _step_of(optimizer_class: type[Optimizer]) -> Callable[..., Any]:
    step: Callable[..., Any] = inspect.unwrap(optimizer_class.step)
    return step


_RULES: dict[Callable[..., Any], Callable[[Any], StabilityLimits | NoLimits]] = {}

for _class, _rule in (PLAIN | ADAPTIVE).items():
    register_stability_limits(_class, partial(_read_limits, rule=_rule, adaptive=_class in ADAPTIVE))
for _name, _reason in REFUSED.items():
    if hasattr(torch.optim, _name):  # Muon is younger than the oldest torch that this runs on
        register_stability_limits(getattr(torch.optim, _name), partial(_refuse, reason=_reason))
