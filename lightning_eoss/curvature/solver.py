"""From batches to eigenvalues: which operator serves them, where the recursion starts, how precise it has to be."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_eoss.curvature.batches import Batch, full_batch, split
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import HESSIAN, PLAIN, Coordinates, Curvature, Operator, Sequential, Stacked
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.seeds import Use, derived_seed
from lightning_eoss.curvature.workers import ALONE, Workers
from lightning_eoss.linalg.density import random_probes
from lightning_eoss.linalg.lanczos import LanczosResult, lanczos, random_start

NUM_OUTLIERS = 10  # Ritz vectors of the full batch that go into the next start
MIN_STEPS = 3  # no row stops before: a stale start looks converged at its first step
MAX_STEPS = 200
FULL_CHUNK = 256  # samples of the full batch that go through the network at once, where the loss is a mean over samples
_ROWS = 32  # mini-batches that are solved together, at most
_NOISE, _OTHERS = 0.3, 0.25  # shares of the random part and of the other outliers, relative to the top eigenvector
_PRECISER = 10  # times, what is solved from scratch
_REST = 0.35  # share of what the full batch's start held besides its top eigenvector


@dataclass(frozen=True)
class Plan:
    """What a measurement is to be."""

    batch_size: int  # samples of one loader batch
    parts: int = 1  # loader batches of one optimizer step
    rel_error: float = 0.05  # half-width of MiniBS's interval, relative
    num_batches: int = 100  # upper limit
    full_batch_samples: int | None = 8192
    seed: int = 0
    tol: float | None = None  # relative residual of the solver; None: 0.5 rel_error
    memory_bytes: float = 2.0**30  # of graphs, of cached batches and of Krylov vectors, each
    samples: int | None = None  # of a step, where a sampler makes its batches
    first_samples: int | None = None  # of the full batch's, while more cannot be paid for

    @property
    def solver_tol(self) -> float:
        """Relative residual r at which a row stops; its value errs by about r^2 over the relative gap, always low."""
        return 0.5 * self.rel_error if self.tol is None else self.tol

    @property
    def step_size(self) -> int:
        """Samples of one optimizer step."""
        return self.samples or self.batch_size * self.parts


def demand(plan: Plan, findings: Findings, objective: Objective) -> float:
    """Bytes of graphs, or of vectors, that a measurement would hold at once if it could."""
    there = objective.source.num_samples
    samples = max(_ROWS * plan.step_size, min(plan.full_batch_samples or there, there))
    vector = objective.like.element_size() * objective.num_parameters
    return max(findings.graph_bytes * samples, float(MAX_STEPS * vector))


@dataclass(frozen=True, eq=False)
class WarmStart:
    """Where the next measurement starts: what the last one found of the spectrum's upper end."""

    top: Tensor | None = None  # (P,) unit top eigenvector
    others: Tensor | None = None  # (P,) unit mix of the other outliers, weighted by eigenvalue
    of_full: bool = False  # whether they are the full batch's

    def mixed(self, noise: Tensor) -> Tensor:
        """(B, P) starts from unit noise: mostly the top, some of the other outliers in case they overtake."""
        start = _NOISE * noise
        if self.others is not None:
            start = start + _OTHERS * self.others
        return start if self.top is None else start + self.top

    def fitting(self, objective: Objective) -> "WarmStart":
        """The same on the device of the parameters; nothing where it is of other parameters."""
        if self.top is None or self.top.numel() != objective.num_parameters:
            return WarmStart()
        like = objective.like
        return replace(self, top=self.top.to(like), others=None if self.others is None else self.others.to(like))

    def after(self, result: LanczosResult, *, of_full: bool = False) -> "WarmStart":
        """From the eigenpairs of a result's only row; unchanged where they are not finite."""
        assert result.vectors is not None
        values, vectors = result.values[0], result.vectors[0]
        if not math.isfinite(values[0]):
            return self
        weights = torch.nan_to_num(values).clamp(min=0).to(vectors)
        weights[0] = 0.0
        others = weights @ torch.nan_to_num(vectors)
        norm = float(torch.linalg.vector_norm(others))
        return WarmStart(vectors[0].clone(), others / norm if norm > 0 else None, of_full)


COLD = WarmStart()


@dataclass(frozen=True, eq=False)
class Lead:
    r"""Where the recursions of all mini-batches begin, s, and what their first product gives away.

    The first product H_B s yields v'H_B s with the full batch's top eigenvector v: linear in H_B, so its mean over all
    batches is v'Hs, and nearly v'H_B v, because s is mostly v.
    """

    start: Tensor  # (P,) unit s
    top: Tensor  # (P,) unit v
    mean: float = math.nan  # v'Hs, where the full batch has been measured

    @staticmethod
    def guessed(warm: WarmStart, noise: Tensor) -> "Lead | None":
        """From an earlier measurement, and (1, P) unit noise."""
        start = warm.mixed(noise)[0]
        return None if warm.top is None else Lead(start / torch.linalg.vector_norm(start), warm.top)

    @staticmethod
    def known(start: Tensor, result: LanczosResult) -> "Lead":
        """From the recursion that has just solved the full batch, and its (P,) start.

        s = v + c u, with u the part of that start (random numbers and other outliers) that is orthogonal to v. Both lie
        in the Krylov space, and Hv - theta v is orthogonal to all of it: v'Hs = theta v's exactly, converged or not.
        """
        assert result.vectors is not None
        top = result.vectors[0, 0]
        rest = start / torch.linalg.vector_norm(start)
        for _ in range(2):
            rest = rest - (rest @ top) * top
        size = float(torch.linalg.vector_norm(rest))
        lead = top + _REST / size * rest if size > 1e-3 else top
        lead = lead / torch.linalg.vector_norm(lead)
        return Lead(lead, top, float(result.values[0, 0]) * float(lead @ top))


@dataclass(frozen=True)
class Solver:
    """What a measurement is of, and how: the context of all of them."""

    objective: Objective
    plan: Plan
    findings: Findings
    _: KW_ONLY
    stream: int = 0  # number of the measurement; with the plan's seed it fixes all random numbers
    coordinates: Coordinates = PLAIN
    curvature: Curvature = HESSIAN
    workers: Workers = ALONE
    generator: torch.Generator = field(default_factory=torch.Generator, repr=False)  # of starts and probes

    def seed(self, use: Use, *more: int) -> int:
        """The seed of one use of random numbers in this measurement."""
        return derived_seed(self.plan.seed, use, self.stream, *more)

    def drawing(self, use: Use) -> "Solver":
        """The same with starts and probes of its own."""
        return replace(self, generator=torch.Generator().manual_seed(self.seed(use)))

    @property
    def like(self) -> Tensor:
        """A vector with the Krylov dtype and device."""
        return self.objective.like

    def probes(self, count: int) -> Tensor:
        """(count, P) unit rows of random signs."""
        return random_probes(count, self.objective.num_parameters, self.generator, like=self.like)

    @property
    def vector_bytes(self) -> int:
        """Memory of one P-vector."""
        return self.like.element_size() * self.objective.num_parameters

    @property
    def step_samples(self) -> int:
        """Samples of one optimizer step, also where the source is made of ready batches."""
        source, total = self.objective.source, self.objective.source.num_samples
        return self.plan.samples or round(min(self.plan.step_size, total) * source.size(range(total)) / total)

    @property
    def rows_at_once(self) -> int:
        """Mini-batches whose graphs and Krylov vectors fit the memory together."""
        row = self.findings.graph_bytes * self.step_samples + 6 * self.vector_bytes
        return max(1, min(_ROWS, int(self.plan.memory_bytes / row)))

    @property
    def chunk_size(self) -> int:
        """Samples of a chunk of the full batch."""
        return max(self.plan.batch_size, FULL_CHUNK) if self.findings.reduction == "mean" else self.plan.batch_size

    def full_batch(self) -> Batch:
        """All samples, or the fixed random subset that the plan allows, in chunks."""
        source, plan = self.objective.source, self.plan
        given: dict[str, Any] = {"max_samples": plan.full_batch_samples, "first": plan.first_samples}
        return full_batch(source, self.chunk_size, seed=plan.seed, **given)

    @property
    def piece_size(self) -> int:
        """Samples whose graph fits the memory."""
        return max(1, int(self.plan.memory_bytes / max(self.findings.graph_bytes, 1.0)))

    def random_starts(self, num_rows: int) -> Tensor:
        """(B, P) starts that know nothing."""
        return random_start(num_rows, self.objective.num_parameters, self.generator, like=self.like)

    def operator(self, batches: Sequence[Batch]) -> Operator:
        """The operator of these batches, those that are too large for memory in pieces where their loss allows it."""
        if self.findings.reduction == "mean":
            batches = [split(batch, self.piece_size) for batch in batches]
        stackable = self.findings.stacked and self.curvature is HESSIAN and len(batches) > 1
        if stackable and self._alike(batches):
            return Stacked(self.objective, batches, self.coordinates, self.workers)
        largest = max(part.size for batch in batches for part in batch)
        slots = int(self.plan.memory_bytes / (self.findings.graph_bytes * largest + self.vector_bytes))
        if all(len(batch) == 1 for batch in batches):
            slots = max(slots, len(batches))
        return Sequential(
            self.objective, batches, self.coordinates, slots, self.findings.differences, self.workers, self.curvature
        )

    def _alike(self, batches: Sequence[Batch]) -> bool:
        """Whether tensors of one shape and dtype stand at the same places of all; padding is as long as each needs."""
        layouts = ([_layout(self.objective.load(part)) for part in batch] for batch in batches)
        first = next(layouts)
        stackable = all(leaf is not None for _, leaves in first for leaf in leaves)
        return stackable and all(each == first for each in layouts)

    def solve(self, operator: Operator, starts: Tensor, **options: Any) -> LanczosResult:
        """Top eigenvalues of the operator's rows."""
        options = {"tol": self.plan.solver_tol, "min_steps": MIN_STEPS, "max_steps": MAX_STEPS, **options}
        given: dict[str, Any] = {"restrict": operator.restrict, "generator": self.generator}
        return lanczos(operator.matvec, starts, decide=self.workers.decide, **given, **options)

    def solve_from_scratch(self, operator: Operator, num_rows: int) -> LanczosResult:
        """The same from random starts, each row from its own, and ten times as precisely.

        Where the second eigenvalue is near, a residual that is not small stands for either of them.
        """
        return self.solve(operator, self.random_starts(num_rows), tol=self.plan.solver_tol / _PRECISER)

    def solve_top(self, operator: Operator, warm: WarmStart, *, tol: float = 1.0) -> tuple[LanczosResult, Tensor]:
        """The one row of an operator, with the other outliers that come along and all their vectors; and its start.

        `tol` is in units of the plan's. Memory bounds the steps, because all their vectors are kept.
        """
        start = warm.mixed(self.random_starts(1))
        steps = max(30, min(MAX_STEPS, int(self.plan.memory_bytes / self.vector_bytes)))
        options = {"k": NUM_OUTLIERS, "leading": 1, "vectors": True, "max_steps": steps}
        return self.solve(operator, start, tol=tol * self.plan.solver_tol, **options), start[0]


def _layout(batch: Any) -> tuple[Any, ...]:
    """The structure of a batch, and the shapes and dtypes of its tensors."""
    leaves, structure = tree_flatten(batch)
    return structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves]


@dataclass(frozen=True)
class Eigenvalue:
    """A largest eigenvalue; NaN where it was not measured."""

    value: float = math.nan
    residual: float = math.nan  # |Hv - value v|, bounds the distance to the nearest eigenvalue
    converged: bool = False
    error: float = math.nan  # how far off: residual^2 / distance to the next Ritz value, the residual at most

    @property
    def relative_residual(self) -> float:
        """The residual over the value."""
        return self.residual / max(abs(self.value), 1e-30)

    def __str__(self) -> str:
        """The value."""
        return f"{self.value:.4g}"


def top_eigenvalue(result: LanczosResult) -> Eigenvalue:
    """The top eigenvalue of a result's first row, with its error."""
    values, residual = result.values[0].tolist(), float(result.residuals[0, 0])
    distance = values[0] - values[1] if len(values) > 1 and math.isfinite(values[1]) else 0.0
    error = min(residual, residual**2 / distance) if distance > 0 else residual
    return Eigenvalue(values[0], residual, bool(result.converged[0]), error)
