"""Lanczos for many symmetric operators at once: extreme eigenvalues with their residuals, from any start.

One call advances B independent Lanczos recursions in lock step, one product with each operator a step. What it is built for:
operators that cost much (a Hessian-vector product each), good starts (the last eigenvector), and stops at a loose but known
residual. So each row stops by itself, rows that are done cost nothing more, and every value comes with its residual.

The *largest algebraic* eigenvalue is meant, never the largest magnitude: a Ritz value lies inside the spectrum, so it errs low.
Its residual bounds the distance to the *nearest* eigenvalue; that the nearest is the largest rests on the start having a part
along the top eigenvector. Mix a random part into every start (Kuczynski & Wozniakowski 1992 bound the probability of failure).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LanczosResult:
    """Extreme eigenpairs of B symmetric operators, the wanted end first.

    Numbers are float64 on the CPU, whatever the operators' precision and device. Where a row has fewer than k pairs (P < k, or a
    stop after fewer than k steps) the rest is NaN.
    """

    values: Tensor  # (B, k) Ritz values
    residuals: Tensor  # (B, k) |A v - value v|, in the unit of the values
    converged: Tensor  # (B,) bool: the leading residuals are within tol
    iterations: Tensor  # (B,) int64, products spent on each row
    start_quotients: Tensor  # (B,) s'As / s's of the start s: the first Lanczos coefficient
    vectors: Tensor | None  # (B, k, P) unit Ritz vectors in the start's dtype and device, or None

    @property
    def matvecs(self) -> int:
        """Products spent on all rows together."""
        return int(self.iterations.sum())


def random_start(num_rows: int, dim: int, generator: torch.Generator, *, like: Tensor) -> Tensor:
    """Unit Gaussian directions, drawn on the CPU so that a seed means the same on every device.

    Args:
        num_rows: Number of directions B.
        dim: Dimension P.
        generator: A CPU generator; the global one is never touched.
        like: Gives dtype and device.

    Returns:
        ``(B, P)`` unit rows.

    Example:
        >>> start = random_start(2, 5, torch.Generator().manual_seed(0), like=torch.empty(0))
        >>> [round(float(row.norm()), 6) for row in start]
        [1.0, 1.0]
    """
    directions = torch.randn(num_rows, dim, generator=generator, dtype=torch.float32).to(like)
    return directions / directions.norm(dim=1, keepdim=True)


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    k: int = 1,
    which: Literal["largest", "smallest"] = "largest",
    tol: float = 1e-6,
    min_steps: int = 1,
    max_steps: int = 100,
    leading: int | None = None,
    vectors: bool = False,
    restrict: Callable[[Sequence[int]], Matvec] | None = None,
    generator: torch.Generator | None = None,
    decide: Callable[[Tensor], Tensor] = lambda done: done,
) -> LanczosResult:
    r"""Extreme eigenvalues of B symmetric operators by the Lanczos recursion.

    .. math:: A Q_m = Q_m T_m + \beta_m q_{m+1} e_m^\top, \qquad T_m s = \theta s
        \;\Rightarrow\; \lVert A Q_m s - \theta Q_m s \rVert = \beta_m |s_m|.

    A single value without its vector (``k=1, vectors=False``) needs three vectors a row and no reorthogonalisation: lost
    orthogonality copies values that have converged already, it makes no wrong ones. Otherwise the basis is kept and every new vector is
    reorthogonalised twice against all of it, as two matrix products ("twice is enough", Parlett 1980).

    An invariant subspace (the recursion breaks down) proves only that *its* eigenvalues are exact. The row goes on once more from a random
    vector, so that a start without any part along the top eigenvector is not the end of it.

    Cost: one product a step for each row that is not done, and one small transfer to the host a step for the tridiagonal matrices,
    which are solved in float64.

    Args:
        matvec: ``(B, P) -> (B, P)``, row b times operator b. It must not change its argument.
        start: ``(B, P)`` starts, none of them zero; its dtype and device are those of the recursion.
        k: Number of eigenpairs a row.
        which: The end of the spectrum, by algebraic value.
        tol: A row stops where its leading residuals are at most ``tol * |value|``.
        min_steps: No row stops before, unless its Krylov space is exhausted.
        max_steps: No row goes on after.
        leading: How many of the k pairs must be within ``tol`` (default: all of them).
        vectors: Whether to return Ritz vectors. Memory: one P-vector a step and row.
        restrict: ``restrict(rows)`` gives the product for these rows (their indices in ``start``) alone, so that rows that are done are not
            multiplied. Without it they are multiplied as zeros.
        generator: Source of the vectors after a breakdown (default: a CPU generator with a fixed seed).
        decide: Passes on which rows are done; several workers that share an operator agree here.

    Returns:
        The eigenpairs, ``LanczosResult``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> diagonal = torch.tensor([[-9.0, 1.0, 4.0], [0.0, 2.0, 3.0]], dtype=torch.float64)
        >>> result = lanczos(lambda v: diagonal * v, torch.ones_like(diagonal))
        >>> [round(float(value), 9) for value in result.values[:, 0]]
        [4.0, 3.0]
    """
    _check(start, k, which, tol, min_steps, max_steps, leading)
    num_rows, dim = start.shape
    leading = min(leading or k, dim)
    sign = 1.0 if which == "largest" else -1.0
    generator = generator or torch.Generator().manual_seed(0)
    reorthogonalise = vectors or k > 1
    if reorthogonalise:
        max_steps = min(max_steps, dim)

    values = torch.full((num_rows, k), torch.nan, dtype=torch.float64)
    residuals, quotients = values.clone(), values[:, 0].clone()
    converged = torch.zeros(num_rows, dtype=torch.bool)
    iterations = torch.zeros(num_rows, dtype=torch.int64)
    ritz = start.new_full((num_rows, k, dim), torch.nan) if vectors else None

    active = torch.arange(num_rows)
    current = start / start.norm(dim=1, keepdim=True)
    previous = torch.zeros_like(current)
    beta = current.new_zeros(num_rows)
    basis = current.new_empty(num_rows, 0, dim)
    diagonal = torch.empty(num_rows, 0, dtype=torch.float64)
    offdiagonal = diagonal.clone()
    block = torch.zeros(num_rows, dtype=torch.int64)  # where the present Krylov space began: 0, or after a breakdown
    product = matvec

    for step in range(1, max_steps + 1):
        image = sign * product(current)
        alpha = torch.linalg.vecdot(image, current)
        image = image - alpha[:, None] * current - beta[:, None] * previous
        if reorthogonalise:
            basis = _grown(basis, step)
            basis[:, step - 1] = current
            for _ in range(2):
                coefficients = torch.einsum("bmp,bp->bm", basis[:, :step], image)
                image = image - torch.einsum("bmp,bm->bp", basis[:, :step], coefficients)
        beta = torch.linalg.vector_norm(image, dim=1)

        alpha_host, beta_host = torch.stack([alpha, beta]).to("cpu", torch.float64)
        diagonal = torch.cat([diagonal, alpha_host[:, None]], dim=1)
        scale = torch.maximum(diagonal.abs().amax(1), torch.cat([offdiagonal, beta_host[:, None]], 1).abs().amax(1))
        finite = torch.isfinite(scale)
        negligible = torch.finfo(start.dtype).eps * scale
        broken = beta_host <= 10 * negligible
        iterations[active] = step
        if step == 1:
            quotients = sign * alpha_host

        done = ~finite | torch.full_like(finite, step == max_steps)
        if step >= min_steps or bool((broken | done).any()):
            tridiagonal = _tridiagonal(diagonal, offdiagonal, finite)
            theta, weights = (pairs.flip(-1) for pairs in torch.linalg.eigh(tridiagonal))
            found = torch.where(broken, 0.0, beta_host)[:, None] * weights[:, -1, :].abs()
            within = _within(theta, found, tol, negligible, leading)
            # After a breakdown the earlier blocks are exact; the residual of the present one's own top must be small, too.
            own = _top_of_block(theta, weights, block)
            within &= (found.gather(1, own) <= tol * theta.gather(1, own).abs() + 10 * negligible[:, None])[:, 0]
            exhausted = broken & (
                (block > 0) & (theta.gather(1, own)[:, 0] <= theta[:, min(leading, step) - 1]) | (step >= dim)
            )
            exhausted &= torch.tensor(step >= leading)
            within = within & ~broken & (step >= min_steps) | exhausted
            done = decide(done | within)
            if bool(done.any()):
                rows, pairs = active[done], min(k, step)
                values[rows, :pairs] = sign * torch.where(finite[done, None], theta[done, :pairs], torch.nan)
                residuals[rows, :pairs] = torch.where(finite[done, None], found[done, :pairs], torch.nan)
                converged[rows] = (within & finite)[done]
                if ritz is not None:
                    combination = weights[done, :, :pairs].to(basis)
                    raw = torch.einsum("bmp,bmk->bkp", basis[done.to(basis.device), :step], combination)
                    ritz[rows.to(ritz.device), :pairs] = raw / raw.norm(dim=2, keepdim=True)
                if bool(done.all()):
                    break
                keep = ~done
                kept = keep.nonzero()[:, 0].to(current.device)
                active, diagonal, offdiagonal, block = active[keep], diagonal[keep], offdiagonal[keep], block[keep]
                broken, beta_host, beta = broken[keep], beta_host[keep], beta[kept]
                image, current = image[kept], current[kept]
                basis = basis[kept] if reorthogonalise else basis
                product = restrict(active.tolist()) if restrict else _padded(matvec, active, num_rows)

        previous, current = current, image / torch.where(beta > 0, beta, torch.ones_like(beta))[:, None]
        if bool(broken.any()):
            current = _restarted(current, broken, basis[:, :step], generator)
            block = torch.where(broken, step, block)
            beta_host = torch.where(broken, 0.0, beta_host)
            beta = beta_host.to(beta)
        offdiagonal = torch.cat([offdiagonal, beta_host[:, None]], dim=1)

    return LanczosResult(values, residuals, converged, iterations, quotients, ritz)


def _check(start: Tensor, k: int, which: str, tol: float, min_steps: int, max_steps: int, leading: int | None) -> None:
    """Refuses arguments out of range."""
    if start.ndim != 2 or 0 in start.shape or not start.is_floating_point():
        raise ValueError(
            f"start must be a floating-point (B, P) tensor, got {start.dtype} of shape {tuple(start.shape)}."
        )
    if which not in ("largest", "smallest"):
        raise ValueError(f"which={which!r} is not an end of the spectrum: use 'largest' or 'smallest'.")
    if tol < 0:
        raise ValueError(f"tol={tol} is a relative residual and cannot be negative.")
    if not 1 <= min_steps <= max_steps:
        raise ValueError(f"min_steps={min_steps} and max_steps={max_steps} must satisfy 1 <= min_steps <= max_steps.")
    if k < 1 or not 1 <= (leading or k) <= k:
        raise ValueError(f"k={k} and leading={leading} must satisfy 1 <= leading <= k.")


def _grown(basis: Tensor, step: int) -> Tensor:
    """The basis with room for `step` vectors: doubled when full, so that memory follows the steps really taken."""
    if basis.shape[1] >= step:
        return basis
    return torch.cat([basis, basis.new_zeros(len(basis), max(4, step - 1), basis.shape[2])], dim=1)


def _tridiagonal(diagonal: Tensor, offdiagonal: Tensor, finite: Tensor) -> Tensor:
    """(A, m, m) symmetric matrices from (A, m) and (A, m - 1) coefficients; zeros where they are not finite."""
    matrix = torch.diag_embed(diagonal)
    if offdiagonal.shape[1]:
        matrix = matrix + torch.diag_embed(offdiagonal, 1) + torch.diag_embed(offdiagonal, -1)
    return torch.where(finite[:, None, None], matrix, 0.0)


def _within(theta: Tensor, found: Tensor, tol: float, negligible: Tensor, leading: int) -> Tensor:
    """(A,) whether the leading residuals are within tol; rounding noise of the operator's scale always is."""
    if theta.shape[1] < leading:
        return torch.zeros(len(theta), dtype=torch.bool)
    return (found <= tol * theta.abs() + 10 * negligible[:, None])[:, :leading].all(1)


def _top_of_block(theta: Tensor, weights: Tensor, block: Tensor) -> Tensor:
    """(A, 1) index of the largest Ritz value whose vector lies in the present Krylov space."""
    inside = torch.arange(theta.shape[1])[None, :] >= block[:, None]
    share = (weights.square() * inside[:, :, None]).sum(1)
    return torch.where(share > 0.5, theta, -torch.inf).argmax(1, keepdim=True)


def _padded(matvec: Matvec, active: Tensor, num_rows: int) -> Matvec:
    """The product for the active rows through one that wants all rows."""

    def product(vectors: Tensor) -> Tensor:
        rows = active.to(vectors.device)
        return matvec(vectors.new_zeros(num_rows, vectors.shape[1]).index_copy(0, rows, vectors))[rows]

    return product


def _restarted(current: Tensor, broken: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Random unit vectors, orthogonal to the basis where one is kept, in the rows that broke down."""
    fresh = random_start(len(current), current.shape[1], generator, like=current)
    for _ in range(2 if basis.shape[1] else 0):
        fresh = fresh - torch.einsum("bmp,bm->bp", basis, torch.einsum("bmp,bp->bm", basis, fresh))
    return torch.where(broken.to(current.device)[:, None], fresh / fresh.norm(dim=1, keepdim=True), current)
