"""One measurement of the sharpness: FullBS, MiniBS with its interval, directional sharpness, the current batch.

The solver is fast because it starts from what the last measurement found, and it can be fooled for the same reason. So every start has a random
part, every row takes a minimum of steps, and two mini-batches of each measurement are solved again from scratch: the *audit*.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from lightning_eoss.curvature.isolation import isolated
from lightning_eoss.curvature.objective import (
    Batch,
    DatasetSource,
    Objective,
    derived_seed,
    full_batch,
    random_batches,
)
from lightning_eoss.curvature.operators import Reduce, Scaling
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.curvature.solver import MIN_STEPS, Plan, Solver, WarmStart
from lightning_eoss.linalg.lanczos import LanczosResult
from lightning_eoss.theory.statistics import (
    Estimate,
    control_variate_estimate,
    is_precise,
    mean_estimate,
    moments,
    next_count,
    shifted,
    with_audit,
)

NUM_AUDITS = 2


@dataclass(frozen=True)
class Eigenvalue:
    """A largest eigenvalue; NaN where it was not measured."""

    value: float = math.nan
    residual: float = math.nan  # |Hv - value v|, bounds the distance to the nearest eigenvalue
    converged: bool = False
    error: float = (
        math.nan
    )  # how far the true one may lie above: residual^2 / distance to the next Ritz value, at most the residual

    @property
    def relative_residual(self) -> float:
        """The residual over the value."""
        return self.residual / max(abs(self.value), 1e-30)


@dataclass(frozen=True)
class SharpnessMeasurement:
    """What was measured at one point of training, NaN where it was not.

    Everything is in the coordinates of the operator: sharpness, or edge ratios where limits differ between parameters.
    """

    mini_batch: Estimate  # MiniBS: mean of lambda_max(H_B), 95 % interval, the audit in `upper`
    plain: Estimate  # the same without the control variate
    directional: Estimate  # mean of g'H_B g / |g|^2 over the same batches, g the gradient of each
    gap: Estimate  # MiniBS - FullBS
    full_batch: Eigenvalue  # FullBS
    current_batch: Eigenvalue  # of the batch about to be stepped on
    controls: tuple[float, ...]  # v'H_B v of each mini-batch, v the top eigenvector of the full batch
    control_mean: float  # v'Hv; NaN where the control variate is not valid
    batch_size: int  # samples of a mini-batch
    num_samples: int  # samples that FullBS was measured on; 0 where it was not
    audit: float  # largest relative shortfall of an audited mini-batch
    residual: float  # largest relative residual of all values
    products_per_batch: float  # median over the mini-batches, audits apart
    full_passes: int  # products with the full batch
    hvps: float  # all products, in samples / batch_size
    seconds: float


def measure_sharpness(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataset: Any,
    *,
    batch_size: int,
    rel_error: float = 0.05,
    num_batches: int = 100,
    full_batch_samples: int | None = 8192,
    seed: int = 0,
    tol: float | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
) -> SharpnessMeasurement:
    r"""Measures MiniBS and FullBS of a model as it is, without a Trainer and without leaving a trace on it.

    .. math:: \text{MiniBS}(b) = \mathbb{E}_B\, \lambda_{\max}(\nabla^2 L_B), \quad |B| = b, \qquad
        \text{FullBS} = \lambda_{\max}(\nabla^2 L).

    Cost: about 20 products with the full batch, and 5 with each mini-batch (a product is 1.3 to 1.5 gradients).

    Args:
        model: The module, in the mode (train or eval) in which its loss is meant.
        loss_fn: ``loss_fn(model, batch) -> scalar``, with the reduction that training steps on.
        dataset: A map-style data set or a sequence of samples.
        batch_size: Samples b of a mini-batch.
        rel_error: Mini-batches are drawn until the 95 % interval of MiniBS is within this, relative.
        num_batches: Upper limit of mini-batches.
        full_batch_samples: FullBS is measured on a fixed random subset of this size; None: all samples.
        seed: Fixes batches, starts and the random numbers inside the model.
        tol: Relative residual of the eigenvalues (default: 0.4 ``rel_error``). An eigenvalue's own error is about its square.
        collate_fn: As a DataLoader's.

    Returns:
        The measurement.

    Raises:
        ValueError: If an argument is out of its range, or nothing can be measured.

    Example:
        For linear regression the Hessian is X'X / n whatever the parameters; here x = 1 or 3, so FullBS = 5, and MiniBS(1) is the mean of 1
        and 9.

        >>> data = [(torch.tensor([x]), torch.tensor([0.0])) for x in (1.0, 3.0)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2
        >>> result = measure_sharpness(nn.Linear(1, 1, bias=False), loss, data, batch_size=2)
        >>> round(result.full_batch.value, 4), round(result.mini_batch.mean, 4)
        (5.0, 5.0)
        >>> measure_sharpness(nn.Linear(1, 1, bias=False), loss, data, batch_size=1, num_batches=400).mini_batch.mean
        5.0

    Source: Andreyev & Beneventano, *Edge of Stochastic Stability*, definitions 3.1 and 3.2.
    """
    check_arguments(rel_error=rel_error, num_batches=num_batches, full_batch_samples=full_batch_samples, tol=tol)
    num_samples = len(dataset)
    check_batch_size(batch_size, num_samples)
    device = next(model.parameters()).device if any(True for _ in model.parameters()) else torch.device("cpu")

    def transfer(batch: Any) -> Any:
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

    source = DatasetSource(dataset, collate_fn, transfer)
    plan = Plan(batch_size, 1, rel_error, num_batches, full_batch_samples, seed, tol)
    with isolated(model, [dataset, collate_fn]) as isolation:
        objective = Objective(model, lambda batch: loss_fn(model, batch), source, isolation)
        findings = preflight(objective, batch_size, seed=seed)
        return measure(objective, plan, findings, WarmStart())[0]


def check_arguments(
    *, rel_error: float, num_batches: int, full_batch_samples: int | None, tol: float | None = None
) -> None:
    """Refuses settings out of range."""
    if not rel_error > 0:
        raise ValueError(
            f"rel_error={rel_error} must be positive: it is the half-width of MiniBS's interval, relative."
        )
    if num_batches < 1:
        raise ValueError(f"num_batches={num_batches} must be at least 1: MiniBS is a mean over mini-batches.")
    if full_batch_samples is not None and full_batch_samples < 1:
        raise ValueError(
            f"full_batch_samples={full_batch_samples} must be positive, or None to measure FullBS on all samples."
        )
    if tol is not None and not tol > 0:
        raise ValueError(f"tol={tol} must be positive, or None for 0.4 rel_error: it is a relative residual.")


def check_batch_size(batch_size: int, num_samples: int) -> None:
    """Refuses batch sizes that the data cannot give."""
    if num_samples < 1:
        raise ValueError("dataset is empty, so there is no loss whose sharpness could be measured. Pass training data.")
    if not 1 <= batch_size <= num_samples:
        raise ValueError(
            f"batch_size={batch_size} must lie between 1 and the number of samples, {num_samples}: mini-batches are drawn without "
            "replacement. Choose a smaller batch_size."
        )


def measure(
    objective: Objective,
    plan: Plan,
    findings: Findings,
    warm: WarmStart,
    *,
    stream: int = 0,
    full: bool = True,
    mini: bool = True,
    current: Batch | None = None,
    batches: Iterator[Batch] | None = None,
    scaling: Scaling | None = None,
    reduce: Reduce = lambda total: total,
    decide: Callable[[Any], Any] = lambda decision: decision,
) -> tuple[SharpnessMeasurement, WarmStart]:
    """Measures what is asked for at the module's present parameters.

    Cost, in products: FullBS 13 to 20 passes from scratch, about 3 from a warm start; each mini-batch about 4, and one for the directional
    sharpness; each of two audits 10 to 20.

    Args:
        objective: The loss, its parameters, its samples.
        plan: Precision and sizes.
        findings: What `preflight` found about the loss.
        warm: Where the last measurement ended.
        stream: Number of this measurement; with `plan.seed` it fixes all random numbers.
        full: Whether to measure FullBS.
        mini: Whether to measure MiniBS and directional sharpness.
        current: The batch about to be stepped on, to measure that, too.
        batches: Mini-batches in place of uniform ones (a sampler's); no control variate then.
        scaling: The coordinates; None: plain Hessians.
        reduce: Sums over workers; identity for one.
        decide: Makes workers agree; identity for one.

    Returns:
        The measurement, and where to start the next one.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(derived_seed(plan.seed, 2, stream))
    solver = Solver(objective, plan, findings, generator, scaling or Scaling(), reduce, decide)
    samples = 0.0  # that went through products

    current_value = Eigenvalue()
    if current is not None:
        result = solver.solve_top(solver.operator([current]), warm)
        current_value = _eigenvalue(result)
        samples += result.matvecs * sum(part.size for part in current)
        if warm.top is None:
            warm = WarmStart.after(result)  # better than nothing until FullBS is known

    full_value, passes = Eigenvalue(), 0
    chunks: Batch = ()
    if full:
        chunks = full_batch(objective.source, plan.batch_size, max_samples=plan.full_batch_samples, seed=plan.seed)
        result = solver.solve_top(solver.operator([chunks]), warm)
        full_value, warm, passes = _eigenvalue(result), WarmStart.after(result), result.matvecs
    num_samples = sum(part.size for part in chunks)
    samples += passes * num_samples

    sampled, control_mean, population = _Sampled(), math.nan, objective.source.num_samples
    if mini:
        whole = plan.step_size >= population and batches is None  # one batch, and it is all there is: no sampling error
        if batches is None:
            seed = derived_seed(plan.seed, 3, stream)
            batches = random_batches(objective.source, plan.batch_size, parts=plan.parts, seed=seed)
            if not whole and findings.reduction == "mean" and sum(len(part.indices) for part in chunks) == population:
                control_mean = full_value.value  # v'Hv, v the Ritz vector just found
        sampled = _sample(solver, batches, warm, control_mean, exact=whole)
        samples += sampled.products * plan.step_size
    estimate, plain = sampled.estimates(control_mean, reduce)
    gap_error = full_value.error if math.isfinite(full_value.error) else 0.0
    measurement = SharpnessMeasurement(
        mini_batch=with_audit(estimate, sampled.shortfalls),
        plain=with_audit(plain, sampled.shortfalls),
        directional=_estimate(sampled.directional, exact=sampled.exact, reduce=reduce),
        gap=shifted(with_audit(estimate, sampled.shortfalls), full_value.value, gap_error),
        full_batch=full_value,
        current_batch=current_value,
        controls=tuple(sampled.controls),
        control_mean=control_mean,
        batch_size=plan.step_size,
        num_samples=num_samples,
        audit=sampled.audit,
        residual=max(
            (
                each
                for each in (full_value.relative_residual, current_value.relative_residual, *sampled.residuals)
                if each == each
            ),
            default=math.nan,
        ),
        products_per_batch=median(sampled.iterations) if sampled.iterations else math.nan,
        full_passes=passes,
        hvps=samples / plan.step_size,
        seconds=time.perf_counter() - began,
    )
    return measurement, warm


@dataclass
class _Sampled:
    """What the mini-batches gave, a number a batch; those whose loss is not finite are left out."""

    values: list[float] = field(default_factory=list)
    controls: list[float] = field(default_factory=list)
    directional: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)  # relative
    iterations: list[int] = field(default_factory=list)
    shortfalls: list[float] = field(default_factory=list)  # of the audited batches: value from scratch - value
    audit: float = math.nan  # the largest of them, relative
    products: int = 0
    exact: bool = False  # one batch that is all there is

    def estimates(self, control_mean: float, reduce: Reduce) -> tuple[Estimate, Estimate]:
        """The best estimate of the mean and the plain one."""
        if self.exact or not self.values:
            return (_estimate(self.values, exact=self.exact, reduce=reduce),) * 2
        sums = reduce(moments(_tensor(self.values), _tensor(self.controls)))
        values = tuple(self.values)
        best = control_variate_estimate(sums, control_mean)
        return replace(best, values=values), replace(mean_estimate(sums), values=values)


def _estimate(values: list[float], *, exact: bool, reduce: Reduce) -> Estimate:
    """Mean of values with its interval, which is a point where they are not a sample."""
    if exact and values:
        return Estimate(values[0], 0.0, values[0], values[0], (values[0],))
    return replace(mean_estimate(reduce(moments(_tensor(values)))), values=tuple(values))


def _tensor(values: list[float]) -> Tensor:
    """Numbers as they are, in float64."""
    return torch.tensor(values, dtype=torch.float64)


def _sample(solver: Solver, batches: Iterator[Batch], warm: WarmStart, control_mean: float, *, exact: bool) -> _Sampled:
    """Draws mini-batches in rounds until their mean is known well enough."""
    plan, limit, drawn = solver.plan, 1 if exact else solver.plan.num_batches, 0
    sampled = _Sampled(exact=exact)
    while True:
        wanted = list(islice(batches, next_count(drawn, limit) - drawn))
        for first in range(0, len(wanted), solver.rows_at_once):
            group = wanted[first : first + solver.rows_at_once]
            _solve(solver, group, warm, sampled)
        if drawn == 0 and wanted:
            _audit(solver, wanted[:NUM_AUDITS], sampled)
            if warm.top is not None and solver.decide(sampled.audit > plan.rel_error):
                # The warm start hides the top of the batches' spectra: everything again from scratch.
                sampled = _Sampled(products=sampled.products, exact=sampled.exact)
                warm, control_mean = WarmStart(), math.nan
                batches = chain(wanted, batches)
                continue
        drawn += len(wanted)
        estimate, _ = sampled.estimates(control_mean, solver.reduce)
        if solver.decide(drawn >= limit or not wanted or is_precise(estimate, len(sampled.values), plan.rel_error)):
            return sampled


def _solve(solver: Solver, batches: list[Batch], warm: WarmStart, sampled: _Sampled) -> None:
    """Adds top eigenvalue, control and directional sharpness of some mini-batches."""
    operator = solver.operator(batches)
    gradients = operator.gradients()
    directions = gradients / gradients.norm(dim=1, keepdim=True)
    directional = torch.linalg.vecdot(directions, operator.matvec(directions)).tolist()
    starts, controls = solver.random_starts(len(batches)), [math.nan] * len(batches)
    products = len(batches)
    if warm.top is not None:
        # One product serves twice: v'H_B v is the control variate, and H_B v is nearer the batch's own top than v is.
        images = operator.matvec(warm.top.expand(len(batches), -1))
        controls = (images @ warm.top).tolist()
        starts = warm.mixed(images / images.norm(dim=1, keepdim=True), starts[:1])
        products += len(batches)
    result = solver.solve(operator, starts, min_steps=MIN_STEPS - 1 if warm.top is not None else MIN_STEPS)
    sampled.products += result.matvecs + products
    for row, value in enumerate(result.values[:, 0].tolist()):
        if math.isfinite(value):
            sampled.values.append(value)
            sampled.controls.append(controls[row])
            sampled.residuals.append(float(result.residuals[row, 0]) / max(abs(value), 1e-30))
            sampled.iterations.append(int(result.iterations[row]) + products // len(batches))
            if math.isfinite(directional[row]):  # a zero gradient has no direction
                sampled.directional.append(directional[row])


def _audit(solver: Solver, batches: list[Batch], sampled: _Sampled) -> None:
    """Solves the first mini-batches again, each from a start of its own that knows nothing, ten times as precisely."""
    if len(sampled.values) < len(batches):
        return  # losses that are not finite
    starts = solver.random_starts(len(batches))
    result = solver.solve(solver.operator(batches), starts, tol=solver.plan.solver_tol / 10)
    sampled.products += result.matvecs
    for exact, value in zip(result.values[:, 0].tolist(), sampled.values, strict=False):
        sampled.shortfalls.append(exact - value)
    sampled.audit = max(
        shortfall / max(abs(value), 1e-30) for shortfall, value in zip(sampled.shortfalls, sampled.values, strict=False)
    )


def _eigenvalue(result: LanczosResult) -> Eigenvalue:
    """The top eigenvalue of a result's first row."""
    values, residual = result.values[0].tolist(), float(result.residuals[0, 0])
    distance = values[0] - values[1] if len(values) > 1 and math.isfinite(values[1]) else 0.0
    error = min(residual, residual**2 / distance) if distance > 0 else residual
    return Eigenvalue(values[0], residual, bool(result.converged[0]), error)
