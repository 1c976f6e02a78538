r"""Stochastic Lanczos quadrature: the whole spectrum of one symmetric operator from a few products with random probes.

A unit probe v sees the operator through its own spectral measure, which puts :math:`(v^\top \phi_i)^2` on each
eigenvalue :math:`\lambda_i`. After m Lanczos steps the Ritz values and the squared first entries of their vectors are
the Gauss quadrature of that measure: exact for polynomials up to degree 2m - 1. The mean measure over probes is the
spectral density, 1/P on each eigenvalue. So there are two errors, and only the first is a random one: the scatter of
the probes, which is what the intervals here are about, and the resolution of m nodes.

Full reorthogonalisation is not a luxury here. What merely copies a converged Ritz value in
:mod:`~lightning_eoss.linalg.lanczos` would split its weight.

Source: Golub and Meurant, "Matrices, Moments and Quadrature with Applications", 2010; Ubaru, Chen and Saad, "Fast
estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl. 2017.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_eoss.linalg.lanczos import Matvec, _padded, _Recursion, check_start
from lightning_eoss.theory.statistics import Estimate, mean_estimate, moments, scaled

_ZERO = 100  # times eps and the spectrum's size: a node so close to the origin is a zero eigenvalue and its rounding


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Quadratures of B probes' spectral measures: each row's weights are positive and sum to one.

    A row that came to an end before the others is filled up with copies of its last node, of weight 0. A row whose
    products were not finite is NaN, and so is every estimate from it.
    """

    nodes: Tensor  # (B, m) Ritz values, ascending, float64 on the CPU as the following; eigenvalue
    weights: Tensor  # (B, m) squared first entries of the Ritz vectors
    ceiling: Tensor  # (B,) the largest mass at the origin that the first 2m - 1 moments allow
    complete: Tensor  # (B,) bool: nodes and weights are the probe's whole measure, up to rounding
    iterations: Tensor  # (B,) int64, products spent on each row
    dim: int  # P
    eps: float  # of the precision that the products were taken in

    @property
    def matvecs(self) -> int:
        """Products spent on all rows together."""
        return int(self.iterations.sum())

    def mean(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        r"""Mean of a function over the eigenvalues, with Student's interval over the probes.

        .. math:: \frac1P \operatorname{tr} f(A) \approx \frac1B \sum_b \sum_j w_{bj} f(\theta_{bj})

        The interval knows the scatter of the probes and not the quadrature's error, which is none for polynomials up to
        degree 2m - 1 and falls exponentially in m for smooth functions.

        Args:
            function: :math:`f`, element by element, ``(B, m) -> (B, m)``.

        Returns:
            The estimate, in units of :math:`f`; one probe has no interval.

        Example:
            >>> spread = torch.tensor([[-1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
            >>> density = spectral_density(lambda v: spread * v, torch.ones_like(spread))
            >>> round(density.mean(torch.exp).mean, 6)  # (1/e + 2 + e^2) / 4
            2.439234
        """
        return mean_estimate(moments((self.weights * function(self.nodes)).sum(1)))

    def moment(self, order: int) -> Estimate:
        r"""Mean power of the eigenvalues, :math:`\operatorname{tr} A^k / P`, exact for each probe.

        Args:
            order: The power k, from 0 to 2m - 1.

        Returns:
            The estimate, in units of the eigenvalues to the power k.

        Raises:
            ValueError: If the quadrature is not exact for this power.

        Example:
            >>> spread = torch.tensor([[-1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
            >>> density = spectral_density(lambda v: spread * v, torch.ones_like(spread))
            >>> round(density.moment(3).mean, 6)  # (-1 + 8) / 4
            1.75
        """
        exact = 2 * self.nodes.shape[1] - 1
        if not (order >= 0 and (order <= exact or bool(self.complete.all()))):
            raise ValueError(
                f"order={order} is not from 0 to 2 * steps - 1 = {exact}, up to where the quadrature is exact: "
                "beyond, the moment would be biased. Take more steps."
            )
        return self.mean(lambda nodes: nodes**order)

    @property
    def trace(self) -> Estimate:
        """Sum of the eigenvalues: P times the first moment, known after a single step."""
        return scaled(self.moment(1), self.dim)

    def mass_at_origin(self, tol: float | None = None, *, rule: Literal["sharp", "paper"] = "sharp") -> Estimate:
        r"""Rank degeneracy: the share of eigenvalues that are zero, as far as m steps can tell them from small ones.

        Nodes within ``tol`` of the origin are zeros that have converged, and rounding may have split them: their
        weights are added up. Else the zeros have no node of their own yet, and what 2m - 2 moments allow at most at the
        origin bounds them from above, sharply, by Christoffel's function:

        .. math:: \mu(\{0\}) \le \min_{p(0) = 1,\, \deg p < m} \int p^2 \, d\mu
            = \Bigl(\sum_{k < m} p_k(0)^2\Bigr)^{-1}

        with the orthonormal polynomials :math:`p_k` of the measure.

        It falls monotonically as m grows, and to nothing where the origin lies in a gap. Granziol et al. take the Ritz
        value nearest to the origin, and merge two where its weight has split: here the two that straddle the origin, or
        the one, where the spectrum lies on one side. That is a bound, too, because the open interval between two
        neighbours holds at most both their weights (Chebyshev, Markov, Stieltjes), but never below the sharp one. The
        nearest one's weight alone bounds nothing: it fell to .29 where half of the spectrum was zero.

        Where a row is complete its nodes are eigenvalues, and only those within ``tol`` count.

        Args:
            tol: What counts as zero, relative to the largest absolute node (default: 100 times the eps of the products'
                precision).
            rule: ``"sharp"``, or ``"paper"`` for the merge of two Ritz values.

        Returns:
            The estimate of the bound, in [0, 1].

        Raises:
            ValueError: If an argument is out of its range.

        Example:
            >>> spread = torch.tensor([[-1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
            >>> density = spectral_density(lambda v: spread * v, torch.ones_like(spread))
            >>> round(density.mass_at_origin().mean, 6)
            0.5

        References:
            Granziol, Zohren and Roberts, section 7.2; Akhiezer, "The Classical Moment Problem", 1965, chapter 2.
        """
        return mean_estimate(moments(self._masses(tol, rule)[:, 1]))

    def rank(self, tol: float | None = None) -> Estimate:
        """How many eigenvalues are not zero: P minus the zeros of :meth:`mass_at_origin`, so a bound from below.

        For the Hessian of a feed-forward network the paper bounds the rank by four times the outputs times the sum of
        all widths. That holds for one sample. N samples reach N times (twice the hidden widths plus the outputs), soon
        all of P; ``tests/linalg/test_density.py`` has counterexamples to print and the derivation.

        Args:
            tol: What counts as zero, relative to the largest absolute node (default as there).

        Returns:
            The estimate, in [0, P].

        Example:
            >>> spread = torch.tensor([[-1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
            >>> density = spectral_density(lambda v: spread * v, torch.ones_like(spread))
            >>> round(density.rank().mean, 6)
            2.0
        """
        return mean_estimate(moments(self.dim * (1 - self._masses(tol, "sharp")[:, 1])))

    def negative_mass(self, tol: float | None = None) -> Estimate:
        r"""Share of eigenvalues below zero, the zeros not counted.

        Zeros without a node of their own sit in the two nodes a < 0 < b next to the origin, and those of a large null
        space would pass for negative in one measurement and for positive in the next. So the mass at the origin is
        taken out of these two as a lever would share it, which leaves the first moment alone: b / (b - a) of it out of
        a, and no more than there is.

        Args:
            tol: What counts as zero, relative to the largest absolute node (default as in :meth:`mass_at_origin`).

        Returns:
            The estimate, in [0, 1].

        Example:
            >>> spread = torch.tensor([[-1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
            >>> density = spectral_density(lambda v: spread * v, torch.ones_like(spread))
            >>> round(density.negative_mass().mean, 6)
            0.25
        """
        return mean_estimate(moments(self._masses(tol, "sharp")[:, 0]))

    def stems(self) -> tuple[Tensor, Tensor]:
        """All probes' nodes and their weights divided by B: the spectral density as a sum of stems.

        Returns:
            Nodes in ascending order and weights that sum to one, both (M,), float64; no weight is zero.

        Example:
            >>> spread = torch.tensor([[-1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
            >>> nodes, weights = spectral_density(lambda v: spread * v, torch.ones_like(spread)).stems()
            >>> [round(weight, 6) for weight in weights.tolist()]  # at -1, 0 and 2
            [0.25, 0.5, 0.25]
        """
        used = self.weights != 0
        nodes, order = self.nodes[used].sort()
        return nodes, self.weights[used][order] / len(self.weights)

    def smoothed(self, grid: Tensor, width: float) -> Tensor:
        r"""The density on a grid, each stem broadened to a Gaussian; for figures.

        .. math:: \frac1B \sum_{bj} \frac{w_{bj}}{\sqrt{2\pi} s} e^{-(x - \theta_{bj})^2 / 2 s^2}

        Args:
            grid: Points x, (G,); eigenvalue.
            width: Standard deviation s; eigenvalue.

        Returns:
            The density, (G,), float64; 1 / eigenvalue.

        Raises:
            ValueError: If the width is not positive.

        Example:
            >>> one = torch.ones(1, 4, dtype=torch.float64)
            >>> density = spectral_density(lambda v: 3 * v, one)
            >>> round(float(density.smoothed(torch.tensor([3.0]), width=0.5)), 6)  # 2 / sqrt(2 pi)
            0.797885
        """
        if not width > 0:
            raise ValueError(f"width={width} must be positive: stems of no width are no function. See stems().")
        nodes, weights = self.stems()
        offsets = (grid.cpu().double()[:, None] - nodes) / width
        return torch.exp(-offsets.square() / 2) @ weights / (math.sqrt(2 * math.pi) * width)

    def _masses(self, tol: float | None, rule: str) -> Tensor:
        """(B, 2) share of the eigenvalues below the origin and at it."""
        if rule not in ("sharp", "paper"):
            raise ValueError(f"rule={rule!r} is no way to read a mass at the origin: use 'sharp' or 'paper'.")
        if tol is not None and not tol >= 0:
            raise ValueError(f"tol={tol} is a relative distance from the origin and cannot be negative.")
        zero = (_ZERO * self.eps if tol is None else tol) * self.nodes.abs().max()
        inside = self.nodes.abs() <= zero
        below, at = ((self.weights * mask).sum(1) for mask in (self.nodes < -zero, inside))
        # The nodes next to the origin, one on each side; where there is none, one of no weight.
        neighbours = (self.nodes < 0).sum(1, keepdim=True) + torch.arange(2)
        low, high = pad(self.nodes, (1, 1)).gather(1, neighbours).unbind(1)
        low_weight, high_weight = pad(self.weights, (1, 1)).gather(1, neighbours).unbind(1)
        if rule == "paper":
            bound, from_low = low_weight + high_weight, low_weight
        else:
            bound = self.ceiling
            from_low = (bound / (1 - low / high)).clamp(bound - high_weight, low_weight)
        known = inside.any(1) | self.complete
        return torch.stack([torch.where(known, below, below - from_low), torch.where(known, at, bound)], dim=1)


def random_probes(num_probes: int, dim: int, generator: torch.Generator, *, like: Tensor) -> Tensor:
    r"""Unit Rademacher probes, drawn on the CPU so that a seed means the same on every device.

    Signs and not Gaussian directions (:func:`~lightning_eoss.linalg.lanczos.random_start`), because for any function of
    the operator, A = f(H), they estimate tr A / P with the smaller variance:

    .. math:: \operatorname{Var} v^\top A v = \frac{2}{P^2} \sum_{i \ne j} A_{ij}^2 \quad\text{(signs)}, \qquad
        \frac{2}{P (P + 2)} \Bigl(\sum_{ij} A_{ij}^2 - \frac{(\operatorname{tr} A)^2}{P}\Bigr) \quad\text{(directions)}.

    The first is at most 1 + 2/P times the second, and nothing for a diagonal A. What a parameter without any influence
    (a dead unit, a constant input) adds to the null space is therefore counted without error.

    Args:
        num_probes: Number of probes B.
        dim: Dimension P.
        generator: A CPU generator; the global one is never touched.
        like: Gives dtype and device.

    Returns:
        ``(B, P)`` unit rows.

    Example:
        >>> probes = random_probes(2, 4, torch.Generator().manual_seed(0), like=torch.empty(0))
        >>> probes.abs().unique().tolist(), [float(row.norm()) for row in probes]
        ([0.5], [1.0, 1.0])

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix", Commun. Stat. Simul. Comput. 1990.
    """
    signs = torch.randint(2, (num_probes, dim), generator=generator, dtype=torch.int8).to(like)
    return signs.mul_(2).sub_(1).div_(math.sqrt(dim))


def spectral_density(
    matvec: Matvec,
    starts: Tensor,
    *,
    steps: int = 100,
    at_once: int | None = None,
    decide: Callable[[Tensor], Tensor] = lambda done: done,
) -> SpectralDensity:
    r"""Spectral density of a symmetric operator by stochastic Lanczos quadrature.

    .. math:: v^\top f(A) v \approx \sum_{j=1}^m w_j f(\theta_j), \qquad T_m s_j = \theta_j s_j, \quad w_j = s_{j1}^2

    Each row is an independent recursion, kept orthogonal to its whole basis in two passes. A row whose Krylov space
    turns out invariant knows its measure completely and stops; the others go on.

    Cost: ``steps`` products a probe, and one small transfer to the host a step. Memory: ``at_once * steps`` P-vectors.

    Args:
        matvec: ``(b, P) -> (b, P)`` for up to ``at_once`` rows at a time. It must not change its argument.
        starts: ``(B, P)`` probes, as :func:`random_probes` draws them, none of them zero; their lengths do not matter.
            Their dtype and device are those of the recursion.
        steps: Number of nodes m. The default is that of Granziol et al.
        at_once: How many probes advance together (default: all of them).
        decide: Passes on which rows are done; several workers that share an operator agree here.

    Returns:
        The quadratures, ``SpectralDensity``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> spread = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64)
        >>> density = spectral_density(lambda v: spread * v, torch.ones_like(spread))
        >>> [round(node, 9) for node in density.nodes[0].tolist()], bool(density.complete)
        ([1.0, 2.0, 5.0], True)
        >>> round(density.trace.mean, 9)
        8.0

    References:
        Granziol, Zohren and Roberts, appendix D (where the rule is said to match m moments: it matches 2m).
    """
    check_start("starts", starts)
    if steps < 1:
        raise ValueError(f"steps={steps} leaves no node for the quadrature: take at least 1.")
    parts = [_quadrature(matvec, rows, steps, decide) for rows in starts.split(at_once or len(starts))]
    nodes, weights, ceiling, complete, iterations = (torch.cat(each) for each in zip(*parts, strict=True))
    eps = torch.finfo(starts.dtype).eps
    return SpectralDensity(nodes, weights, ceiling, complete, iterations, starts.shape[1], eps)


def _quadrature(matvec: Matvec, starts: Tensor, steps: int, decide: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """The tensors of a `SpectralDensity`."""
    num_rows, dim = starts.shape
    steps = min(steps, dim)
    nodes = torch.full((num_rows, steps), math.nan, dtype=torch.float64)
    weights, ceiling = nodes.clone(), nodes[:, 0].clone()
    iterations = torch.zeros(num_rows, dtype=torch.int64)
    complete = iterations.bool()

    recursion, product = _Recursion(starts, keep_basis=True), matvec
    recursion.basis = starts.new_empty(num_rows, steps, dim)
    for step in range(1, steps + 1):
        recursion.advance(product(recursion.current))
        _, finite, broken = recursion.ends()
        done = decide(broken | ~finite) if step < steps else torch.ones_like(broken)
        iterations[recursion.rows] = step
        if bool(done.any()):
            good = done & finite
            rows, matrices = recursion.rows[good], recursion.matrices()[good]
            values, vectors = torch.linalg.eigh(matrices)
            nodes[rows] = values[:, torch.arange(steps).clamp(max=step - 1)]
            weights[rows] = pad(vectors[:, 0].square(), (0, steps - step))
            ceiling[rows] = _christoffel(matrices)
            complete[rows] = broken[good] | (step < steps)
            if bool(done.all()):
                break
            recursion.keep(~done)
            product = _padded(matvec, recursion.rows, num_rows)
        recursion.current.div_(recursion.beta.clamp(min=torch.finfo(starts.dtype).tiny)[:, None])
    return nodes, weights, ceiling, complete, iterations


def _christoffel(matrices: Tensor) -> Tensor:
    """(B,) Christoffel's function at the origin, 1 / sum p_k(0)^2, from (B, m, m) tridiagonal matrices.

    The orthonormal polynomials p_0 = 1, p_1, ... solve all rows of T p = 0 but the last. Far from a narrow spectrum
    they overflow, and nothing is left.
    """
    others: Tensor = torch.linalg.solve_triangular(matrices[:, :-1, 1:], matrices[:, :-1, :1], upper=False)
    return 1 / (1 + others.square().sum((1, 2))).nan_to_num(nan=math.inf, posinf=math.inf)
