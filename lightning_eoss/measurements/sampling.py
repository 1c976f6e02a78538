"""MiniBS: mini-batches are solved until their mean is known well enough, and two of them once more from scratch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from lightning_eoss.curvature.batches import Batch
from lightning_eoss.curvature.operators import Operator
from lightning_eoss.curvature.solver import Lead, Solver
from lightning_eoss.curvature.workers import ALONE, Workers
from lightning_eoss.theory import statistics

NUM_AUDITS = 2


@dataclass(frozen=True)
class Row:
    """What one mini-batch gave."""

    value: float  # NaN where its loss or its curvature is not finite
    control: float  # v'H_B s, see `Lead`
    directional: float
    residual: float  # relative
    products: int


@dataclass
class Sampled:
    """What all mini-batches gave. Those whose loss or curvature is not finite do not count."""

    workers: Workers = ALONE
    exact: bool = False  # one batch that is all there is
    control_mean: float = math.nan  # of the controls over all batches; NaN where it is not known
    rows: list[Row] = field(default_factory=list)
    shortfalls: list[float] = field(default_factory=list)  # by how much the audited values may be too low
    differences: list[float] = field(default_factory=list)  # that the audits found, relative
    lost: list[Batch] = field(default_factory=list)  # those that do not count
    audited: Batch = ()  # one of those that were solved again
    products: int = 0

    @property
    def audit(self) -> float:
        """The largest difference that an audit found."""
        return max(self.differences, default=math.nan)

    @property
    def good(self) -> list[Row]:
        """The rows that count."""
        return [row for row in self.rows if math.isfinite(row.value)]

    def plain(self) -> statistics.Estimate:
        """MiniBS as the mean of the values."""
        return self._mean([row.value for row in self.good])

    def estimate(self) -> statistics.Estimate:
        """MiniBS with the help of the controls."""
        good = self.good
        if self.exact or not good:
            return self.plain()
        values, controls = (tuple(column) for column in zip(*((row.value, row.control) for row in good), strict=True))
        sums = self.workers.sum(statistics.moments(_tensor(values), _tensor(controls)))
        return replace(statistics.control_variate_estimate(sums, self.control_mean), values=values)

    def directional(self) -> statistics.Estimate:
        """Directional sharpness. A batch whose gradient is zero has none."""
        return self._mean([row.directional for row in self.good if math.isfinite(row.directional)])

    def _mean(self, values: list[float]) -> statistics.Estimate:
        """Mean of values with its interval, which is a point where they are not a sample."""
        if self.exact and values:
            return replace(statistics.exact(values[0]), values=(values[0],))
        sums = self.workers.sum(statistics.moments(_tensor(values)))
        return replace(statistics.mean_estimate(sums), values=tuple(values))


def sample(solver: Solver, batches: Iterator[Batch], lead: Lead | None, control_mean: float, *, exact: bool) -> Sampled:
    """Draws mini-batches in rounds until their mean is known well enough.

    Where the audit finds a value short by more than `rel_error`, the warm start hides the top of the batches' spectra:
    the first round is solved again from scratch, and so are all that follow.
    """
    plan, limit = solver.plan, 1 if exact else solver.plan.num_batches
    sampled = Sampled(solver.workers, exact, control_mean)
    wanted = list(islice(batches, statistics.next_count(0, limit)))
    _add(solver, wanted, lead, sampled)
    _audit(solver, wanted, sampled)
    if lead is not None and solver.workers.decide(sampled.audit > plan.rel_error):
        # The warm start hides the top of the batches' spectra: everything again from scratch.
        sampled = replace(sampled, rows=[], shortfalls=[], lost=[], audited=())
        lead = None
        _add(solver, wanted, lead, sampled)
        _audit(solver, wanted, sampled)
    while sampled.good:
        drawn = len(sampled.rows)
        estimate = sampled.estimate()
        if solver.workers.decide(drawn >= limit or statistics.is_precise(estimate, len(sampled.good), plan.rel_error)):
            break
        wanted = list(islice(batches, statistics.next_count(drawn, limit) - drawn))
        if not wanted:
            break
        _add(solver, wanted, lead, sampled)
    return sampled


def _add(solver: Solver, batches: list[Batch], lead: Lead | None, sampled: Sampled) -> None:
    """Solves some mini-batches, as many at a time as fit the memory."""
    for first in range(0, len(batches), solver.rows_at_once):
        operator = solver.operator(batches[first : first + solver.rows_at_once])
        rows = _solve(solver, operator, lead)
        sampled.rows.extend(rows)
        sampled.lost += [batch for row, batch in zip(rows, batches[first:], strict=False) if math.isnan(row.value)]
        sampled.products += sum(row.products for row in rows)


def _solve(solver: Solver, operator: Operator, lead: Lead | None) -> list[Row]:
    """Top eigenvalue, control and directional sharpness of each row."""
    gradients = operator.gradients()
    num_rows, sizes = len(gradients), torch.linalg.vector_norm(gradients, dim=1)
    directions = gradients / torch.where(sizes > 0, sizes, 1.0)[:, None]
    directional = torch.linalg.vecdot(directions, operator.matvec(directions))
    directional = torch.where(sizes > 0, directional, torch.nan)
    del gradients, directions
    if lead is None:
        controls, products = torch.full((num_rows,), math.nan), 1
        result = solver.solve_from_scratch(operator, num_rows)
    else:
        starts = lead.start.expand(num_rows, -1).contiguous()
        images = operator.matvec(starts)
        controls, products = images @ lead.top, 2
        result = solver.solve(operator, starts, image=images)
    columns = (result.values[:, 0], controls, directional, result.residuals[:, 0], result.iterations)
    return [
        Row(value, control, along, residual / max(abs(value), 1e-30), int(iterations) + products)
        for value, control, along, residual, iterations in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _audit(solver: Solver, batches: list[Batch], sampled: Sampled) -> None:
    """Solves some mini-batches again from scratch: those with the lowest values, which most likely missed something."""
    finite = [place for place, row in enumerate(sampled.rows) if math.isfinite(row.value)]
    chosen = sorted(finite, key=lambda place: sampled.rows[place].value)[:NUM_AUDITS]
    if not chosen:
        return
    result = solver.solve_from_scratch(solver.operator([batches[place] for place in chosen]), len(chosen))
    sampled.products += result.matvecs
    sampled.audited = batches[chosen[0]]
    values, residuals = result.values[:, 0].tolist(), result.residuals[:, 0].tolist()
    for place, value, residual in zip(chosen, values, residuals, strict=True):
        found = sampled.rows[place].value
        sampled.shortfalls.append(value + residual - found)  # the audit errs low itself, by its residual at most
        sampled.differences.append((value - found) / max(abs(found), 1e-30))


def _tensor(values: Sequence[float]) -> Tensor:
    """Numbers as they are, in float64."""
    return torch.tensor(values, dtype=torch.float64)
