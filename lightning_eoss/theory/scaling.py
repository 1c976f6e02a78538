r"""Learning rates: how they follow the batch size, and how they follow the spectrum.

The stable learning rate goes as :math:`1 / \lambda'(B)`, with the sharpness :math:`\lambda'` of batches of B samples.
Small batches are all noise, and the rate is proportional to B; large ones are as sharp as the full batch, and there is
nothing more to gain. Adaptive optimizers divide by a root of squared gradients, which takes a root of B away again.

References:
    Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural
    Network Training", JMLR 2022, sections 10 and 11.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.optim import Optimizer

from lightning_eoss.theory.optimizers import ADAPTIVE, PLAIN
from lightning_eoss.theory.random_matrix import BatchSizeCurve, inverse_effective_batch_size
from lightning_eoss.theory.stability import StabilityLimits, eps_share, stability_limits

Array = NDArray[np.float64]
Rule = Literal["linear", "sqrt"]
Acceleration = Literal["nesterov", "polyak"]

_CONFIDENCE = 0.025  # quantile of a curve's refits that stands for its conservative end, as in the curve's own interval


# ---- how they follow the batch size ----------------------------------------------------------------------------------


def scale_learning_rate(lr: float, old_batch_size: float, new_batch_size: float, rule: Rule) -> float:
    r"""Scales a learning rate to another batch size.

    .. math:: \eta' = \eta\, \frac{B'}{B} \quad\text{(linear)}, \qquad \eta' = \eta \sqrt{\frac{B'}{B}}
        \quad\text{(sqrt)}

    Both hold while the noise of the batches dominates. Beyond, see :func:`saturating_factor`.

    Args:
        lr: Learning rate :math:`\eta` at the old batch size.
        old_batch_size: Samples B of a step so far.
        new_batch_size: Samples B' of a step from now on.
        rule: ``"linear"`` or ``"sqrt"``; :func:`scaling_rule` says which an optimizer needs.

    Returns:
        The learning rate at the new batch size; the very one passed where the batch size stays.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> scale_learning_rate(0.1, 32, 128, "linear"), scale_learning_rate(0.1, 32, 128, "sqrt")
        (0.4, 0.2)

    Source: Granziol, Zohren and Roberts, sections 10.1 and 11.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule={rule!r} is unknown: choose 'linear' (SGD) or 'sqrt' (Adam and its kin).")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr={lr!r} is no learning rate, so there is nothing to scale: pass a finite one, 0 at least.")
    ratio = _size_ratio(old_batch_size, new_batch_size)
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def scaling_rule(optimizer: Optimizer) -> Rule:
    r"""Says by which rule an optimizer's learning rate follows the batch size.

    Plain and averaged SGD (with any momentum): linear, as their stable rate is. Optimizers that divide by a root of
    squared gradients (Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta): square root. Where noise
    dominates, their divisor shrinks as :math:`1 / \sqrt B`, which is half of the linear rule already.

    That half is missing where eps hides the divisor's root. An adaptive optimizer is SGD with a constant factor there,
    and linear again, if that is so for more than half of the parameters. Only its state can tell: before the first
    step, the answer is the square root.

    Args:
        optimizer: An optimizer of torch, known by its ``step``: a subclass with a ``step`` of its own is unknown.

    Returns:
        The rule.

    Raises:
        ValueError: If the optimizer is not known.

    Example:
        >>> import torch
        >>> weight = torch.ones(3, requires_grad=True)
        >>> scaling_rule(torch.optim.SGD([weight], lr=0.1)), scaling_rule(torch.optim.AdamW([weight]))
        ('linear', 'sqrt')

    Source: Granziol, Zohren and Roberts, section 11 ("necessity of small numerical stability coefficient").
    """
    rule = _RULES.get(inspect.unwrap(type(optimizer).step))
    if rule is None:
        raise ValueError(
            f"{type(optimizer).__name__} is no optimizer whose learning rate is known to follow the batch size by "
            "either rule. Choose rule='linear' if its steps are proportional to the gradient, rule='sqrt' if it "
            "divides them by the size of the gradients."
        )
    if rule == "sqrt":
        limits = stability_limits(optimizer)
        if isinstance(limits, StabilityLimits) and eps_share(limits) > 0.5:
            return "linear"
    return rule


_RULES: dict[Callable[..., Any], Rule] = {
    **{inspect.unwrap(kind.step): "linear" for kind in PLAIN},
    **{inspect.unwrap(kind.step): "sqrt" for kind in ADAPTIVE},
}


def saturating_factor(
    full_batch: float,
    mini_batch: float,
    *,
    old_batch_size: float,
    new_batch_size: float,
    dataset_size: int | None = None,
) -> float:
    r"""The factor that another batch size allows the learning rate, from the sharpness measured at this one.

    .. math:: \frac{\eta'}{\eta} = \frac{\lambda'(B)}{\lambda'(B')}, \qquad
        \lambda'(B') = \lambda + (\lambda'(B) - \lambda)\, \max(r, \sqrt r), \quad
        r = \frac{1/B' - 1/N}{1/B - 1/N}

    One point of the curve is known, its law is not: the gap goes as :math:`u^\alpha` in :math:`u = 1/B - 1/N`, with
    :math:`\alpha` between 1/2 (hidden or degenerate eigenvalues) and 1 (an isolated one)
    (:func:`~lightning_eoss.theory.random_matrix.gap_exponent`). Of the factors in between, this is the smallest, for
    larger batches and for smaller ones.

    The linear rule bounds it in both directions. A batch is the mean of smaller ones, and positive curvature cannot
    cancel, so B'/B times as many samples are at least B/B' times as sharp; this keeps the noise of a gap measured close
    to B = N, where r is huge, out of the result.

    For adaptive optimizers, pass sharpness in units of the frozen preconditioner (edge ratios). The factor then holds
    while the preconditioner stays what it was at B. But it follows the noise: where that dominates it shrinks by up to
    :math:`\sqrt{B / B'}` within some :math:`1 / (1 - \beta_2)` steps, and the factor with it. At the most that is the
    square-root rule (the linear one, times that), so take the smaller of the two, and look again after the change: a
    curve that has saturated, under a preconditioner that still shrinks, allows less than either.

    Args:
        full_batch: FullBS :math:`\lambda`.
        mini_batch: MiniBS :math:`\lambda'(B)`. One below FullBS is so by noise, and counts as FullBS.
        old_batch_size: Samples B of the batches that were measured.
        new_batch_size: Samples B' of a step from now on.
        dataset_size: Samples N that batches are drawn from; None: endless.

    Returns:
        The factor, 1 at B' = B. NaN where nothing is known: a sharpness that is not positive, or B = N, where there is
        no gap to go by.

    Raises:
        ValueError: If a batch size is not between 1 and N.

    Example:
        The gap of 2 becomes 1 for batches four times as large at the least optimistic, and 8 for those a quarter as
        large.

        >>> saturating_factor(1.0, 3.0, old_batch_size=16, new_batch_size=64)
        1.5
        >>> round(saturating_factor(1.0, 3.0, old_batch_size=16, new_batch_size=4), 6)
        0.333333

    Source: Granziol, Zohren and Roberts, section 10.1, where the crossover is described without a formula.
    """
    old, new = (_u(size, dataset_size) for size in (old_batch_size, new_batch_size))
    if not (0 < full_batch < math.inf and 0 < mini_batch < math.inf):
        return math.nan
    if new_batch_size == old_batch_size:
        return 1.0
    if old == 0:
        return math.nan
    gap, ratio = max(mini_batch - full_batch, 0.0), new / old
    factor = (full_batch + gap) / (full_batch + gap * max(ratio, math.sqrt(ratio)))
    return _within_linear(factor, _size_ratio(old_batch_size, new_batch_size))


def curve_factor(
    curve: BatchSizeCurve, *, old_batch_size: float, new_batch_size: float, conservative: bool = False
) -> float:
    r"""The same factor from a curve through several batch sizes: its law is known, so nothing has to be bracketed.

    .. math:: \frac{\eta'}{\eta} = \frac{\lambda'(B)}{\lambda'(B')}

    Args:
        curve: MiniBS over the batch size.
        old_batch_size: Samples B of a step so far.
        new_batch_size: Samples B' of a step from now on.
        conservative: The lower end of the factor's 95 % interval in place of the factor. Errors that both ends of the
            curve share cancel.

    Returns:
        The factor, 1 at B' = B, bounded by the linear rule as :func:`saturating_factor`, where adaptive optimizers are
        spoken of, too. NaN where the curve is not positive.

    Raises:
        ValueError: If a batch size is not between 1 and N.

    Example:
        >>> from lightning_eoss.theory.random_matrix import fit_batch_size_curve
        >>> curve = fit_batch_size_curve(1.0, [1, 4], [3.0, 2.0], [0.1, 0.1])
        >>> round(curve_factor(curve, old_batch_size=1, new_batch_size=4), 6)
        1.5
    """
    eigenvalue, c, d = curve.curves.T if conservative else curve.curves[:1].T
    shares = (_u(size, curve.dataset_size) for size in (old_batch_size, new_batch_size))
    old, new = (eigenvalue + c * u / (1 + d * u) for u in shares)
    known = (old > 0) & (new > 0)  # a refit that is not positive allows nothing
    factors = np.divide(old, new, out=np.full(old.shape, -np.inf), where=known)
    factor = float(np.quantile(factors[1:], _CONFIDENCE, method="nearest") if conservative else factors[0])
    if not (known[0] and math.isfinite(factor)):
        return math.nan
    return _within_linear(factor, _size_ratio(old_batch_size, new_batch_size))


# ---- how they follow the spectrum ------------------------------------------------------------------------------------


def polyak(largest: float, smallest: float, *, max_momentum: float = 1.0) -> tuple[float, float]:
    r"""Learning rate and momentum of the fastest heavy ball on a quadratic.

    .. math:: \alpha = \left(\frac{2}{\sqrt{\lambda_1} + \sqrt{\lambda_P}}\right)^2, \qquad
        \rho = \left(\frac{\sqrt{\lambda_1} - \sqrt{\lambda_P}}{\sqrt{\lambda_1} + \sqrt{\lambda_P}}\right)^2

    The paper prints :math:`\alpha` without the square, and diverges. All modes then shrink by :math:`\sqrt\rho` a step.
    It is fast because it is next to the edge: the edge ratio is :math:`\lambda_1 / (\lambda_1 + \lambda_P)`, and
    eigenvalues above :math:`\lambda_1 + \lambda_P` diverge. Those of batches differ by more than that. :func:`nesterov`
    is slower, and has a third to spare.

    Args:
        largest: Largest eigenvalue :math:`\lambda_1`, coupled weight decay included.
        smallest: Smallest eigenvalue :math:`\lambda_P`, 0 at least.
        max_momentum: Upper limit of the momentum, up to 1. The learning rate goes with it, to what belongs to a larger
            :math:`\lambda_P`: with less momentum alone the steps would diverge.

    Returns:
        Learning rate and momentum; NaN where an eigenvalue is.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> lr, momentum = polyak(100.0, 1.0)
        >>> round(lr, 6), round(momentum, 6)  # (2/11)^2 and (9/11)^2
        (0.033058, 0.669421)

    Source: Granziol, Zohren and Roberts, equations (24) and (25), corrected; Polyak, "Some methods of speeding up the
    convergence of iteration methods", 1964.
    """
    contraction = min(_contraction(largest, smallest, max_momentum), math.sqrt(max_momentum))
    return (1 + contraction) ** 2 / largest, contraction**2


def nesterov(largest: float, smallest: float, *, max_momentum: float = 1.0) -> tuple[float, float]:
    r"""Learning rate and momentum of Nesterov's accelerated gradient on a strongly convex function.

    .. math:: \alpha = \frac{1}{\lambda_1}, \qquad
        \rho = \frac{\sqrt{\lambda_1} - \sqrt{\lambda_P}}{\sqrt{\lambda_1} + \sqrt{\lambda_P}}

    The paper prints :math:`\alpha = \sqrt{\lambda_P / \lambda_1}`, which is no learning rate (it has no unit) and
    diverges. The slowest mode shrinks by :math:`1 - \sqrt{\lambda_P / \lambda_1}` a step. The edge ratio,
    :math:`(1 + 2\rho) / (2 + 2\rho)`, stays below 3/4: eigenvalues may exceed ``largest`` by a third.

    Args:
        largest: Largest eigenvalue :math:`\lambda_1`, coupled weight decay included.
        smallest: Smallest eigenvalue :math:`\lambda_P`, 0 at least.
        max_momentum: Upper limit of the momentum, up to 1.

    Returns:
        Learning rate and momentum; NaN where an eigenvalue is.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> lr, momentum = nesterov(100.0, 1.0)
        >>> lr, round(momentum, 6)  # 9/11
        (0.01, 0.818182)

    Source: Granziol, Zohren and Roberts, equations (24) and (25), corrected; Nesterov, "Introductory Lectures on Convex
    Optimization", 2004, section 2.2.
    """
    contraction = min(_contraction(largest, smallest, max_momentum), max_momentum)
    return 1 / largest, contraction


def without_bulk(values: ArrayLike, weights: ArrayLike) -> tuple[Array, Array]:
    """Drops the Ritz value that holds more than half of the spectral mass, if there is one.

    Networks have a bulk of eigenvalues next to zero. Taken for the smallest curvature, it would ask for a momentum
    of 1.

    Args:
        values: Ritz values, (M,).
        weights: Their spectral mass, (M,), not negative.

    Returns:
        The remaining values, in their order, and their mass, which sums to one again. Nothing remains of a single one.

    Raises:
        ValueError: If there is not one weight for each value.

    Example:
        >>> values, weights = without_bulk([-1.0, 0.0, 4.0], [0.125, 0.75, 0.125])
        >>> values.tolist(), weights.tolist()
        ([-1.0, 4.0], [0.5, 0.5])

    Source: Granziol, Zohren and Roberts, section 10.2.
    """
    nodes, mass = (np.atleast_1d(np.asarray(each, dtype=float)) for each in (values, weights))
    if nodes.shape != mass.shape or nodes.ndim != 1:
        raise ValueError(
            f"values of shape {np.shape(values)} with weights of shape {np.shape(weights)} are no spectral density: "
            "pass one weight for each value."
        )
    kept = ~(2 * mass > mass.sum())
    return nodes[kept], mass[kept] / mass[kept].sum() if kept.any() else mass[kept]


def curvature_range(values: ArrayLike, weights: ArrayLike, *, tol: float = 0.0) -> tuple[float, float]:
    r"""The largest and the smallest curvature that a learning rate goes by, of a positive-definite approximation.

    .. math:: \lambda_1 = \max_j |\theta_j|, \qquad \lambda_P = \min_{j \ne \text{bulk}} |\theta_j|

    The approximation is :math:`|H|`, which has the eigenvectors of H and the sizes of its eigenvalues: along negative
    curvature steps are as cautious as along positive curvature. The bulk (:func:`without_bulk`) is left out below, and
    so are zeros, directions that the loss does not know. Nothing is left out above: if ever the bulk is there, a
    learning rate that ignores it diverges.

    Args:
        values: Ritz values :math:`\theta_j`, (M,).
        weights: Their spectral mass, (M,).
        tol: Values up to this, relative to the largest one, are zeros and their rounding.

    Returns:
        The largest and the smallest, in units of the values. NaN, both, where they say nothing: a value that is not
        finite, or fewer than two that are neither the bulk nor zero.

    Raises:
        ValueError: If there is not one weight for each value.

    Example:
        >>> curvature_range([-1.0, 0.0, 0.25, 4.0], [0.125, 0.625, 0.125, 0.125])
        (4.0, 0.25)

    Source: Granziol, Zohren and Roberts, section 10.2; Dauphin et al., "Identifying and attacking the saddle point
    problem in high-dimensional non-convex optimization", 2014, for :math:`|H|`.
    """
    sizes, rest = np.abs(np.atleast_1d(np.asarray(values, dtype=float))), np.abs(without_bulk(values, weights)[0])
    largest = float(sizes.max(initial=0.0))
    curved = rest[rest > tol * largest]  # nothing is larger than NaN, or than 0 times infinity
    return (largest, float(curved.min())) if curved.size > 1 else (math.nan, math.nan)


@dataclass(frozen=True)
class LearnedRates:
    """What one look at the spectrum says."""

    lr: float  # of the parameter group with the largest one
    momentum: float
    largest: float  # curvature that they go by, coupled weight decay included
    smallest: float
    batch_size: int  # samples of the batch that was measured


def learned_rates(
    values: ArrayLike,
    weights: ArrayLike,
    acceleration: Acceleration,
    *,
    batch_size: int,
    tol: float = 0.0,
    max_momentum: float = 1.0,
    max_learning_rate: float | None = None,
) -> LearnedRates | None:
    """Learning rate and momentum, read off a spectral density.

    Args:
        values: Ritz values, (M,).
        weights: Their spectral mass, (M,).
        acceleration: ``"nesterov"`` or ``"polyak"``, by the functions of these names.
        batch_size: Samples of the batch whose spectrum it is.
        tol: Values up to this, relative to the largest one, are zeros and their rounding.
        max_momentum: Upper limit of the momentum, up to 1.
        max_learning_rate: Upper limit of the learning rate; None: none.

    Returns:
        The rates; None where the density has no :func:`curvature_range`.

    Raises:
        ValueError: If there is not one weight for each value.

    Example:
        >>> learned = learned_rates([1.0, 0.0, 100.0], [0.2, 0.7, 0.1], "nesterov", batch_size=32)
        >>> learned.lr, round(learned.momentum, 6), learned.smallest
        (0.01, 0.818182, 1.0)
    """
    largest, smallest = curvature_range(values, weights, tol=tol)
    if math.isnan(largest):
        return None
    best = nesterov if acceleration == "nesterov" else polyak
    lr, momentum = best(largest, smallest, max_momentum=max_momentum)
    lr = lr if max_learning_rate is None else min(lr, max_learning_rate)
    return LearnedRates(lr, momentum, largest, smallest, batch_size)


def largest_rate(rates: Iterable[Any]) -> float:
    """The largest of some learning rates.

    Args:
        rates: The rates, numbers or tensors.

    Returns:
        The largest; NaN of none.

    Example:
        >>> import torch
        >>> largest_rate([0.1, torch.tensor(0.5)])
        0.5
    """
    return max((float(rate) for rate in rates), default=math.nan)


def relative_rates(rates: Sequence[Any]) -> list[float]:
    """Learning rates relative to the largest one.

    Args:
        rates: The rates of parameter groups, numbers or tensors.

    Returns:
        Numbers up to 1; all are 1 where all rates are 0.

    Example:
        >>> relative_rates([0.25, 0.5]), relative_rates([0.0, 0.0])
        ([0.5, 1.0], [1.0, 1.0])
    """
    largest = largest_rate(rates)
    return [float(rate) / largest if largest > 0 else 1.0 for rate in rates]


def relative_limits(optimizer: Optimizer) -> StabilityLimits:
    r"""The coordinates in which all parameter groups of SGD have one learning rate.

    In them the Hessian is :math:`R^{1/2} (H + W) R^{1/2}`, with the rates R of the groups relative to the largest one
    and the coupled weight decay W.

    Args:
        optimizer: The optimizer.

    Returns:
        :math:`R^{-1}` in the place of D, infinite for groups that do not move, and W.

    Example:
        >>> import torch
        >>> groups = [{"params": [torch.ones(3)], "lr": 0.1}, {"params": [torch.ones(2)], "lr": 0.05}]
        >>> limits = relative_limits(torch.optim.SGD(groups, weight_decay=0.5))
        >>> limits.limits, limits.weight_decay
        ((1.0, 2.0), (0.5, 0.5))
    """
    ratios = relative_rates([group["lr"] for group in optimizer.param_groups])
    entries = [
        (parameter, math.inf if ratio == 0 else 1 / ratio, float(group["weight_decay"]))
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True)
        for parameter in group["params"]
    ]
    parameters, limits, decays = zip(*entries, strict=True)
    return StabilityLimits(parameters, limits, decays)


# ---- what they share -------------------------------------------------------------------------------------------------


def _contraction(largest: float, smallest: float, max_momentum: float) -> float:
    """(sqrt l1 - sqrt lP) / (sqrt l1 + sqrt lP), by which all modes of the best heavy ball shrink; NaN passes."""
    if largest <= 0 or smallest < 0 or smallest > largest:
        raise ValueError(
            f"largest={largest!r} and smallest={smallest!r} bound no convex quadratic, so nothing says which learning "
            "rate is best: pass 0 <= smallest <= largest with a positive largest (a positive-definite approximation)."
        )
    if not 0 <= max_momentum <= 1:
        raise ValueError(f"max_momentum={max_momentum!r} is not from 0 to 1: more than 1 diverges, whatever the rate.")
    root = math.sqrt(smallest / largest)
    return (1 - root) / (1 + root)


def _within_linear(factor: float, ratio: float) -> float:
    """The factor between 1 and the linear rule."""
    return min(max(factor, min(ratio, 1.0)), max(ratio, 1.0))


def _size_ratio(old_batch_size: float, new_batch_size: float) -> float:
    """B'/B."""
    for name, size in (("old_batch_size", old_batch_size), ("new_batch_size", new_batch_size)):
        if not 0 < size < math.inf:
            raise ValueError(
                f"{name}={size!r} is no batch size, so nothing can be scaled by it: pass the samples of an optimizer "
                "step, accumulation and all processes included."
            )
    return new_batch_size / old_batch_size


def _u(batch_size: float, dataset_size: int | None) -> float:
    """1/B - 1/N of a single batch size."""
    return float(inverse_effective_batch_size(batch_size, dataset_size))
