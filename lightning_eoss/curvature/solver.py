"""From batches to eigenvalues: which operator serves them, where the recursion starts, how precise it has to be."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_eoss.curvature.objective import Batch, Objective, split
from lightning_eoss.curvature.operators import Operator, Reduce, Scaling, Sequential, Stacked, krylov_dtype
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.linalg.lanczos import LanczosResult, lanczos, random_start

NUM_OUTLIERS = 10  # Ritz vectors of the full batch that go into the next start
MIN_STEPS = 3  # no row stops before: a stale start looks converged at its first step
MAX_STEPS = 200


@dataclass(frozen=True)
class Plan:
    """What a measurement is to be."""

    batch_size: int  # samples of one loader batch
    parts: int = 1  # loader batches of one optimizer step
    rel_error: float = 0.05  # half-width of MiniBS's interval, relative
    num_batches: int = 100  # upper limit
    full_batch_samples: int | None = 8192
    seed: int = 0
    tol: float | None = None  # relative residual of the solver; None: 0.4 rel_error
    memory_bytes: float = 2.0**30  # of graphs, of cached batches and of Krylov vectors, each

    @property
    def solver_tol(self) -> float:
        """Relative residual r at which a row stops; its value then errs by about r^2 over the relative gap, always low."""
        return 0.4 * self.rel_error if self.tol is None else self.tol

    @property
    def step_size(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.parts


@dataclass(frozen=True)
class WarmStart:
    """Where the next measurement starts: what the last one found of the spectrum's upper end."""

    top: Tensor | None = None  # (P,) unit top eigenvector
    others: Tensor | None = None  # (P,) unit mix of the other outliers, weighted by eigenvalue

    def mixed(self, leads: Tensor, noise: Tensor) -> Tensor:
        """(B, P) starts: mostly the unit `leads`, some of the other outliers in case they overtake, and a random part."""
        start = leads + 0.3 * noise
        return start if self.others is None else start + 0.25 * self.others

    @staticmethod
    def after(result: LanczosResult) -> "WarmStart":
        """From the eigenpairs of the first row."""
        assert result.vectors is not None
        values, vectors = result.values[0], result.vectors[0]
        if not math.isfinite(values[0]):
            return WarmStart()
        weights = torch.nan_to_num(values).clamp(min=0).to(vectors)
        weights[0] = 0.0
        others = weights @ torch.nan_to_num(vectors)
        norm = float(others.norm())
        return WarmStart(vectors[0].clone(), others / norm if norm > 0 else None)


@dataclass(frozen=True)
class Solver:
    """Everything that solving has in common within one measurement."""

    objective: Objective
    plan: Plan
    findings: Findings
    generator: torch.Generator
    scaling: Scaling = Scaling()
    reduce: Reduce = lambda total: total
    decide: Callable[[Any], Any] = lambda decision: decision

    @property
    def like(self) -> Tensor:
        """A vector with the Krylov dtype and device."""
        return torch.empty(0, dtype=krylov_dtype(self.objective), device=self.objective.parameters[0].device)

    @property
    def vector_bytes(self) -> int:
        """Memory of one P-vector."""
        return self.like.element_size() * self.objective.num_parameters

    @property
    def rows_at_once(self) -> int:
        """Mini-batches whose graphs and Krylov vectors fit the memory together."""
        row = self.findings.graph_bytes * self.plan.step_size + 6 * self.vector_bytes
        return max(1, min(32, int(self.plan.memory_bytes / row)))

    @property
    def piece(self) -> int:
        """Samples that go through the network at once where a batch may be split."""
        if self.findings.reduction != "mean" or self.findings.graph_bytes == 0:
            return self.plan.batch_size
        return max(1, min(self.plan.batch_size, int(self.plan.memory_bytes / self.findings.graph_bytes)))

    def random_starts(self, num_rows: int) -> Tensor:
        """(B, P) starts that know nothing."""
        return random_start(num_rows, self.objective.num_parameters, self.generator, like=self.like)

    def operator(self, batches: Sequence[Batch]) -> Operator:
        """The operator of these batches."""
        batches = [split(batch, self.piece) for batch in batches]
        if self.findings.stacked and len(batches) > 1:
            return Stacked(self.objective, batches, self.scaling, self.reduce)
        slots = int(self.plan.memory_bytes / (self.findings.graph_bytes * self.piece + self.vector_bytes))
        slots = max(slots, len(batches)) if all(len(batch) == 1 for batch in batches) else slots
        return Sequential(self.objective, batches, self.scaling, slots, self.findings.differences, self.reduce)

    def solve(self, operator: Operator, starts: Tensor, **options: Any) -> LanczosResult:
        """Top eigenvalues of the operator's rows."""
        options = {"tol": self.plan.solver_tol, "min_steps": MIN_STEPS, "max_steps": MAX_STEPS, **options}
        return lanczos(
            operator.matvec, starts, restrict=operator.restrict, generator=self.generator, decide=self.decide, **options
        )

    def solve_top(self, operator: Operator, warm: WarmStart) -> LanczosResult:
        """The one row of an operator, with the other outliers that come along and all their vectors."""
        noise = self.random_starts(1)
        start = noise if warm.top is None else warm.mixed(warm.top, noise)
        steps = max(30, min(MAX_STEPS, int(self.plan.memory_bytes / self.vector_bytes)))
        return self.solve(operator, start, k=NUM_OUTLIERS, leading=1, vectors=True, max_steps=steps)
