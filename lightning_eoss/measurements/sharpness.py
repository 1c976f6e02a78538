"""One measurement of the sharpness: FullBS, MiniBS with its interval, directional sharpness, the current batch.

The solver is fast because it starts from what the last measurement found, and it can be fooled for the same reason. So
every start has a random part, every row takes a minimum of steps, and two mini-batches of each measurement are solved
again from scratch: the *audit*.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, full_batch, random_batches, split
from lightning_eoss.curvature.derivatives import Doubt, doubt
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn
from lightning_eoss.curvature.preflight import FEW
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import COLD, Eigenvalue, Lead, Plan, Solver, WarmStart, top_eigenvalue
from lightning_eoss.measurements.sampling import Sampled, sample
from lightning_eoss.measurements.standalone import standalone
from lightning_eoss.theory.statistics import Estimate, shifted, with_audit

COARSER = 16  # a first measurement begins with this part of the data
# Residuals of FullBS, in units of the plan's: its outliers lie closer together than a mini-batch's and take turns
# at the top, so that only a small residual tells a stale one from a new one; before the first, nothing is known.
FULL_TOL, COLD_TOL = 0.4, 0.1


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
    controls: tuple[float, ...]  # v'H_B s of each mini-batch: v the top eigenvector, s the common start, mostly v
    control_mean: float  # v'Hs, the mean of the controls over all batches; NaN where the control variate is not valid
    batch_size: int  # samples of a mini-batch
    num_samples: int  # samples that FullBS was measured on; 0 where it was not
    dropped: int  # mini-batches whose loss or curvature is not finite; the estimates are over the others
    audit: float  # largest relative shortfall of an audited mini-batch; above rel_error, all was solved from scratch
    residual: float  # largest relative residual of all values
    products_per_batch: float  # median over the mini-batches, audits apart
    full_passes: int  # products with the full batch
    hvps: float  # all products, in samples / batch_size
    seconds: float
    memory: float  # MiB taken at the peak, beyond what was taken before
    doubt: Doubt | None = None  # of products by autograd, where the audit had one

    def __repr__(self) -> str:
        """What was measured and what it took, in a line."""
        named: dict[str, tuple[Any, float]] = {
            f"MiniBS({self.batch_size})": (self.mini_batch, self.mini_batch.mean),
            "FullBS": (self.full_batch, self.full_batch.value),
            "gap": (self.gap, self.gap.mean),
            "directional": (self.directional, self.directional.mean),
            "current batch": (self.current_batch, self.current_batch.value),
        }
        shown = [f"{name} = {each}" for name, (each, value) in named.items() if not math.isnan(value)]
        return f"SharpnessMeasurement({', '.join([*shown, f'{self.hvps:.0f} products'])}, {self.seconds:.2g} s)"


UNMEASURED = Eigenvalue()


def measure_sharpness(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    dataset: Any,
    *,
    batch_size: int,
    rel_error: float = 0.05,
    num_batches: int = 100,
    tol: float | None = None,
    full_batch_samples: int | None = 8192,
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    operator: Kind = "hessian",
    outputs_fn: OutputsFn | None = None,
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
        tol: Relative residual of the eigenvalues (default: 0.5 ``rel_error``). An eigenvalue's own error is about its
            square.
        full_batch_samples: FullBS is measured on a fixed random subset of this size; None: all samples.
        seed: Fixes batches, starts and the random numbers inside the model.
        collate_fn: As a DataLoader's.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix in its place.
        outputs_fn: ``outputs_fn(model, batch) -> (outputs, criterion)``, the outputs and the loss as a function of
            them, for ``"ggn"``; None: found where the loss is one call of torch's cross entropy or squared error.

    Returns:
        The measurement.

    Raises:
        ValueError: If an argument is out of its range, or nothing can be measured.

    Example:
        For linear regression the Hessian is X'X / n whatever the parameters. Here x is 1 or 3, so FullBS = 5, and so
        is MiniBS(1), the mean of 1 and 9: the control variate corrects the luck of the draw.

        >>> data = [(torch.tensor([x]), torch.tensor([0.0])) for x in (1.0, 3.0)] * 4
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2
        >>> result = measure_sharpness(nn.Linear(1, 1, bias=False), loss, data, batch_size=1)
        >>> round(result.full_batch.value, 4), round(result.mini_batch.mean, 4)
        (5.0, 5.0)

    Source: Andreyev & Beneventano, *Edge of Stochastic Stability*, definitions 3.1 and 3.2.
    """
    checks.arguments(rel_error=rel_error, tol=tol, num_batches=num_batches)
    checks.arguments(seed=seed, full_batch_samples=full_batch_samples)
    plan = Plan(batch_size, 1, rel_error, num_batches, full_batch_samples, seed, tol)
    given: dict[str, Any] = {"collate_fn": collate_fn, "operator": operator, "outputs_fn": outputs_fn}
    with standalone(model, loss_fn, dataset, plan, **given) as solver:
        measurement, _ = sharpness(solver)
    if measurement.doubt is not None:
        warnings.warn(measurement.doubt.message, stacklevel=2)
    return measurement


def sharpness(
    solver: Solver,
    warm: WarmStart = COLD,
    *,
    full: bool = True,
    mini: bool = True,
    current: Batch | None = None,
    batches: Iterator[Batch] | None = None,
) -> tuple[SharpnessMeasurement, WarmStart]:
    """Measures what is asked for at the module's present parameters, and says where to start the next time.

    With `batches` in place of uniform ones (a sampler's) there is no control variate.

    Cost, in products: FullBS 13 to 20 passes from scratch, about 3 from a warm start; each mini-batch about 4, and one
    for the directional sharpness; each of two audits 10 to 20. Two products of up to 32 samples are compared with
    differences of gradients; where they are wrong, all is measured once more by differences.
    """
    batches, again = (None, None) if batches is None else tee(batches)
    asked: dict[str, Any] = {"now": current or (), "full": full, "mini": mini}
    measurement, after = _measured(solver.drawing(Use.SHARPNESS), warm, batches, **asked)
    found = measurement.doubt
    if solver.workers.decide(found is not None and found.differences):
        solver = replace(solver, findings=replace(solver.findings, differences=True, stacked=False))
        redone, after = _measured(solver.drawing(Use.SHARPNESS), warm, again, **asked)
        hvps, seconds = redone.hvps + measurement.hvps, redone.seconds + measurement.seconds
        measurement = replace(redone, doubt=found, hvps=hvps, seconds=seconds)
    return measurement, after


def _measured(
    solver: Solver, warm: WarmStart, batches: Iterator[Batch] | None, *, now: Batch, full: bool, mini: bool
) -> tuple[SharpnessMeasurement, WarmStart]:
    """The same by one kind of products, and what there is to be said against them."""
    began, current, samples = time.perf_counter(), UNMEASURED, 0.0  # samples that went through products
    if now:
        result, _ = solver.solve_top(solver.operator([now]), warm)
        current = top_eigenvalue(result)
        samples += result.matvecs * _num_samples(now)
        if warm.top is None:
            warm = warm.after(result)  # better than nothing until FullBS is known
    of_all = _measure_full(solver, warm) if full else _Full(warm)
    sampled = _measure_mini(solver, of_all, batches) if mini else Sampled(solver.workers)
    samples += of_all.samples + sampled.products * solver.step_samples

    value, estimate = of_all.value, with_audit(sampled.estimate(), sampled.shortfalls)
    lost = (batch for batch, found in ((now, current), (of_all.chunks, value)) if math.isnan(found.value))
    audited = sampled.audited or of_all.chunks
    residuals = [each.relative_residual for each in (value, current)] + [row.residual for row in sampled.good]
    measurement = SharpnessMeasurement(
        mini_batch=estimate,
        plain=with_audit(sampled.plain(), sampled.shortfalls),
        directional=sampled.directional(),
        gap=shifted(estimate, value.value, value.error if math.isfinite(value.error) else 0.0),
        full_batch=value,
        current_batch=current,
        controls=tuple(row.control for row in sampled.good),
        control_mean=sampled.control_mean,
        batch_size=solver.step_samples,
        num_samples=_num_samples(of_all.chunks),
        dropped=len(sampled.rows) - len(sampled.good),
        audit=sampled.audit,
        residual=max((each for each in residuals if math.isfinite(each)), default=math.nan),
        products_per_batch=median(row.products for row in sampled.good) if sampled.good else math.nan,
        full_passes=of_all.passes,
        hvps=samples / solver.step_samples,
        seconds=time.perf_counter() - began,
        memory=solver.objective.memory.added,
        doubt=_doubt(solver, audited, of_all.warm.top, [*sampled.lost, *lost]),
    )
    return measurement, of_all.warm


def _doubt(solver: Solver, audited: Batch, top: torch.Tensor | None, suspects: list[Batch]) -> Doubt | None:
    """What is wrong with products by autograd: of batches that gave no number, else along the top and at random."""
    findings, look = solver.findings, partial(doubt, solver.objective, curvature=solver.curvature)
    if findings.differences or findings.detached:
        return None  # nothing new
    found = next(filter(None, (look(part) for batch in suspects for part in batch)), None)
    if found or not audited:
        return found
    part = (split(audited, FEW) if findings.reduction == "mean" else audited)[0]
    return look(part, None if top is None else solver.coordinates.applied(top))


@dataclass(frozen=True, eq=False)
class _Full:
    """What the full batch gave."""

    warm: WarmStart  # where the next measurement starts
    value: Eigenvalue = UNMEASURED
    chunks: Batch = ()
    passes: int = 0
    samples: float = 0.0  # that went through products
    lead: Lead | None = None  # where the mini-batches start


def _measure_full(solver: Solver, warm: WarmStart) -> _Full:
    """FullBS; before the first one, a part of the data leads most of the way at a part of the price."""
    plan, source, samples = solver.plan, solver.objective.source, 0.0
    chunks = solver.full_batch()
    fewer = _num_samples(chunks) // COARSER
    tol = FULL_TOL if warm.of_full else COLD_TOL
    if not warm.of_full and fewer >= plan.step_size:
        part = full_batch(source, min(solver.chunk_size, fewer), max_samples=fewer, seed=plan.seed)
        result, _ = solver.solve_top(solver.operator([part]), warm)
        warm = warm.after(result)
        samples += result.matvecs * _num_samples(part)
    result, start = solver.solve_top(solver.operator([chunks]), warm, tol=tol)
    value = top_eigenvalue(result)
    return _Full(
        warm=warm.after(result, of_full=True),
        value=value,
        chunks=chunks,
        passes=result.matvecs,
        samples=samples + result.matvecs * _num_samples(chunks),
        lead=Lead.known(start, result) if math.isfinite(value.value) else None,
    )


def _measure_mini(solver: Solver, full: _Full, batches: Iterator[Batch] | None) -> Sampled:
    """MiniBS over uniform batches unless others are given; with a control variate where its mean is known."""
    plan, source, control_mean = solver.plan, solver.objective.source, math.nan
    # With parts that differ in size a short one weighs as much as the others.
    even = plan.parts == 1 or source.num_samples % plan.batch_size == 0
    exact = plan.step_size >= source.num_samples and even and batches is None  # one batch, and it is all there is
    if batches is None:
        seed = solver.seed(Use.MINI_BATCHES)
        batches = random_batches(source, plan.batch_size, parts=plan.parts, seed=seed)
        complete = sum(len(part.indices) for part in full.chunks) == source.num_samples
        if full.lead and complete and not exact and solver.findings.reduction == "mean":
            control_mean = full.lead.mean
    lead = full.lead or Lead.guessed(full.warm, solver.random_starts(1))
    return sample(solver, batches, lead, control_mean, exact=exact)


def _num_samples(batch: Batch) -> int:
    """Samples of all its parts."""
    return sum(part.size for part in batch)
