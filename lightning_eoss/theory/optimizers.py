"""What torch's optimizers make of a gradient that turns around at every step.

At the edge of stability a mode alternates, ``w, -w, w, ...``, and its gradient g with it. Every running average of such
a gradient is a multiple of the present one, so with the coefficients that the state holds now each optimizer steps ::

    w  <-  (1 - shrink) w - rate * g / P        shrink: lr * weight_decay where that is decoupled, else 0

and takes w to -w where the curvature, ``g = h w``, is its limit ``h = D = (2 - shrink) P / rate``. The rules below read
rate and P off the group and the state of a parameter; t is the number of its steps so far.

References:
    Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", 2022, for the frozen preconditioner.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim


@dataclass(frozen=True)
class Response:
    """The answer to an alternating gradient."""

    rate: float  # learning rate times the gain of momentum and bias corrections
    preconditioner: Tensor | None = None  # P, float32 at least; None is 1
    eps_entries: Tensor | None = None  # (), how many entries of P have eps at least as large as the gradient's part
    effective_rate: float | None = None  # of SGD with momentum: how fast a gradient that stays moves the weights


Group = Mapping[str, Any]  # a param_group, its tensors of one element turned into numbers
State = Mapping[str, Any]
Responder = Callable[[Group, State], Response]


def refusal(group: Group) -> str | None:
    """Why the steps of a group have no limit: a clause, or None where they have one."""
    momentum = group.get("momentum", 0.0)
    if group["lr"] == 0:
        return None
    if group["maximize"]:
        return "maximize=True climbs the loss, which turns the sign of its Hessian"
    if momentum >= 1:
        return f"momentum={momentum} is not below 1, where the formula of the limit ends"
    if momentum and group.get("dampening", 0.0) > 1:
        return f"dampening={group['dampening']} turns the sign of the gradient"
    if group.get("decoupled_weight_decay") and group["lr"] * group["weight_decay"] >= 2:
        return f"decoupled weight_decay={group['weight_decay']} diverges by itself from 2/lr on"
    return None


def sgd(group: Group, state: State) -> Response:
    """Sum of gradients: ``b <- mu b + (1 - tau) g``, which is ``b = (1 - tau) g / (1 + mu)`` when g alternates."""
    lr, momentum = group["lr"], group["momentum"]
    if momentum == 0:  # torch dampens nothing but the momentum
        return Response(lr)
    kept = 1 - group["dampening"]
    gain = (1 + 2 * momentum if group["nesterov"] else kept) / (1 + momentum)
    return Response(lr * gain, effective_rate=lr * kept / (1 - momentum))


def asgd(group: Group, state: State) -> Response:
    """Plain steps; the rate of the next one is in the state."""
    return Response(float(state.get("eta", group["lr"])))


def adam(group: Group, state: State) -> Response:
    """``P = sqrt(v / (1 - beta2^t)) + eps``; Adam and AdamW."""
    (beta1, beta2), t = group["betas"], float(state["step"])
    v = _read(state, "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    return _adaptive(group["lr"] * _average(beta1, t), (v / (1 - beta2**t)).sqrt(), group["eps"])


def nadam(group: Group, state: State) -> Response:
    """Adam's P; the gradient and its average enter with weights of their own."""
    (beta1, beta2), t, product = group["betas"], float(state["step"]), float(state["mu_product"])
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (t, t + 1))
    gain = (1 - mu) / (1 - product) + mu_next / (1 - product * mu_next) * _average(beta1)
    return _adaptive(group["lr"] * gain, (_read(state, "exp_avg_sq") / (1 - beta2**t)).sqrt(), group["eps"])


def radam(group: Group, state: State) -> Response:
    """``P = (sqrt(v) + eps) / sqrt(1 - beta2^t)``, rectified; plain momentum while v has seen too little."""
    (beta1, beta2), t = group["betas"], float(state["step"])
    unbiased = 1 - beta2**t
    rate = group["lr"] * _average(beta1, t)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / unbiased
    if length <= 5:
        return Response(rate)
    rectification = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    root = (_read(state, "exp_avg_sq") / unbiased).sqrt()
    return _adaptive(rate * math.sqrt(rectification), root, group["eps"] / math.sqrt(unbiased))


def adamax(group: Group, state: State) -> Response:
    """``P = max(beta2 P, |g| + eps)``."""
    rate = group["lr"] * _average(group["betas"][0], float(state["step"]))
    return _adaptive(rate, _read(state, "exp_inf") - group["eps"], group["eps"])


def rmsprop(group: Group, state: State) -> Response:
    """``P = sqrt(v) + eps``, v less the squared mean if centered; its momentum sums what is preconditioned already."""
    v = _read(state, "square_avg")
    if group["centered"]:
        v = (v - _read(state, "grad_avg").square()).clamp_min(0)  # rounding
    return _adaptive(group["lr"] / (1 + group["momentum"]), v.sqrt(), group["eps"])


def adagrad(group: Group, state: State) -> Response:
    """``P = sqrt(sum g^2) + eps``."""
    rate = group["lr"] / (1 + (float(state["step"]) - 1) * group["lr_decay"])
    return _adaptive(rate, _read(state, "sum").sqrt(), group["eps"])


def adadelta(group: Group, state: State) -> Response:
    """``P = sqrt(v + eps) / sqrt(a + eps)`` with the averages v of squared gradients and a of squared steps."""
    v, a, eps = _read(state, "square_avg"), _read(state, "acc_delta"), group["eps"]
    return Response(group["lr"], ((v + eps) / (a + eps)).sqrt(), (v <= eps).sum())


PLAIN: dict[type[optim.Optimizer], Responder] = {optim.SGD: sgd, optim.ASGD: asgd}

ADAPTIVE: dict[type[optim.Optimizer], Responder] = {
    optim.Adam: adam,
    optim.AdamW: adam,
    optim.NAdam: nadam,
    optim.RAdam: radam,
    optim.Adamax: adamax,
    optim.RMSprop: rmsprop,
    optim.Adagrad: adagrad,
    optim.Adadelta: adadelta,
}

REFUSED = {
    "Adafactor": "Adafactor caps the size of its updates, and a capped step has no limit",
    "LBFGS": "LBFGS steps along a direction that it builds anew from its last gradients",
    "Muon": "Muon orthogonalises its updates, which are as long for any size of the gradient",
    "Rprop": "Rprop steps by the signs of the gradient, as far for any size of it",
    "SparseAdam": "SparseAdam moves no entries but those of the batch, so none of its steps is the same linear map",
}


def _average(beta: float, t: float = math.inf) -> float:
    """What the running average of an alternating gradient is in units of it, its bias of t steps corrected."""
    return (1 - beta) / (1 + beta) / float(1 - beta**t)


def _read(state: State, name: str) -> Tensor:
    """A tensor of the state, in float32 at least; of a complex parameter for each of its real coordinates."""
    value: Tensor = state[name].detach()
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _adaptive(rate: float, root: Tensor, eps: float) -> Response:
    return Response(rate, root + eps, (root <= eps).sum())
