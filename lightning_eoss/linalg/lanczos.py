"""Lanczos for many symmetric operators at once: extreme eigenvalues with their residuals, from any start.

One call advances B independent Lanczos recursions in lock step, one product with each operator a step. What it is built
for: operators that cost much (a Hessian-vector product each), good starts (the last eigenvector), and stops at a loose
but known residual. So each row stops by itself, rows that are done cost nothing more, and every value comes with its
residual.

The *largest algebraic* eigenvalue is meant, never the largest magnitude: a Ritz value lies inside the spectrum, so it
errs low. Its residual bounds the distance to the *nearest* eigenvalue; that the nearest is the largest rests on the
start having a part along the top eigenvector. Mix a random part into every start (Kuczynski & Wozniakowski 1992 bound
the probability of failure).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]

_SEED = 0x9E3779B9  # of new vectors after a breakdown; a caller's start from the same seed would be no news
_ROUNDING = 10  # times eps and the operator's scale: what is below that is rounding noise


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """Top eigenpairs of B symmetric operators, the largest first.

    Numbers are float64 on the CPU, whatever the operators' precision and device. Where a row has fewer than k pairs
    (P < k, or a stop after fewer than k steps) the rest is NaN.
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
    return directions.div_(torch.linalg.vector_norm(directions, dim=1, keepdim=True))


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    k: int = 1,
    tol: float = 1e-6,
    min_steps: int = 1,
    max_steps: int = 100,
    leading: int | None = None,
    vectors: bool = False,
    image: Tensor | None = None,
    restrict: Callable[[Sequence[int]], Matvec] | None = None,
    generator: torch.Generator | None = None,
    decide: Callable[[Tensor], Tensor] = lambda done: done,
) -> LanczosResult:
    r"""Largest eigenvalues of B symmetric operators by the Lanczos recursion; negate them for the smallest.

    .. math:: A Q_m = Q_m T_m + \beta_m q_{m+1} e_m^\top, \qquad T_m s = \theta s
        \;\Rightarrow\; \lVert A Q_m s - \theta Q_m s \rVert = \beta_m |s_m|.

    A single value without its vector (``k=1, vectors=False``) needs three vectors a row and no reorthogonalisation:
    lost orthogonality copies values that have converged already, it makes no wrong ones. Otherwise the basis is kept
    and every new vector is reorthogonalised twice against all of it, as two matrix products ("twice is enough", Parlett
    1980).

    An invariant subspace (the recursion breaks down) proves only that *its* eigenvalues are exact. The row goes on once
    more from a random vector, so that a start without any part along the top eigenvector is not the end of it.

    Cost: one product a step for each row that is not done, and one small transfer to the host a step for the
    tridiagonal matrices, which are solved in float64.

    Args:
        matvec: ``(B, P) -> (B, P)``, row b times operator b. It must not change its argument.
        start: ``(B, P)`` starts, none of them zero; its dtype and device are those of the recursion.
        k: Number of eigenpairs a row.
        tol: A row stops where its leading residuals are at most ``tol * |value|``.
        min_steps: No row stops before, unless its Krylov space is exhausted.
        max_steps: No row goes on after.
        leading: How many of the k pairs must be within ``tol`` (default: all of them).
        vectors: Whether to return Ritz vectors. Memory: one P-vector a step and row.
        image: ``(B, P)``, the operators times ``start`` where that is known already; saves the first product.
        restrict: ``restrict(rows)`` gives the product for these rows (their indices in ``start``) alone, so that rows
            that are done are not multiplied. Without it they are multiplied as zeros.
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
    _check(start, k, tol, min_steps, max_steps, leading, image)
    num_rows, dim = start.shape
    leading = min(leading or k, dim)
    generator = generator or torch.Generator().manual_seed(_SEED)
    known = 0 if image is None else 1
    if vectors or k > 1:
        max_steps = min(max_steps, dim)

    result = _unknown(start, k, vectors)
    recursion, product = _Recursion(start, keep_basis=vectors or k > 1), matvec
    for step in range(1, max_steps + 1):
        if image is not None and step == 1:
            recursion.advance(image / torch.linalg.vector_norm(start, dim=1, keepdim=True))
        else:
            recursion.advance(product(recursion.current))
        ritz = recursion.ritz()
        if step == 1:
            result.start_quotients.copy_(recursion.diagonal[:, 0])
        settled = ritz.exhausted(leading, dim) | (ritz.within(tol, leading) if step >= min_steps else False)
        done = decide(settled | ~ritz.finite) if step < max_steps else torch.ones_like(settled)
        result.iterations[recursion.rows] = step - known
        if bool(done.any()):
            _record(result, recursion, ritz, done, settled)
            if bool(done.all()):
                break
            recursion.keep(~done)
            rows = recursion.rows.tolist()
            product = restrict(rows) if restrict else _padded(matvec, recursion.rows, num_rows)
        recursion.turn(ritz.broken[~done], generator)
    return result


class _Recursion:
    """The A recursions that go on, of B that began; after step m."""

    def __init__(self, start: Tensor, *, keep_basis: bool) -> None:
        num_rows, dim = start.shape
        self.rows = torch.arange(num_rows)  # (A,) which of the B they are
        # (A, P) q_m and q_{m-1}, and between `advance` and `turn` beta_m q_{m+1} and q_m, with (A,) beta_m beside them
        self.current = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
        self.previous = torch.zeros_like(start)
        self.beta = start.new_zeros(num_rows)
        self.basis = start.new_empty(num_rows, 0, dim) if keep_basis else None  # (A, at least m, P) all of q_1 ... q_m
        self.diagonal = torch.empty(num_rows, 0, dtype=torch.float64)  # (A, m) alpha, on the CPU as the following
        self.offdiagonal = self.diagonal  # (A, m) beta; its last entry leads out of the Krylov space
        self.block = torch.zeros(num_rows, dtype=torch.int64)  # (A,) where that space began: 0, or the last breakdown

    def advance(self, image: Tensor) -> None:
        """One step, from the products of the current vectors."""
        alpha = torch.linalg.vecdot(image, self.current)
        rest = torch.addcmul(image, self.current, -alpha[:, None])  # new memory: the image may be anyone's
        rest.addcmul_(self.previous, -self.beta[:, None])
        if self.basis is not None:
            known = self.diagonal.shape[1]
            self.basis = _with_room(self.basis, known + 1)
            self.basis[:, known] = self.current
            rest = _orthogonalised(rest, self.basis[:, : known + 1])
        self.beta = torch.linalg.vector_norm(rest, dim=1)
        self.previous, self.current = self.current, rest
        coefficients = torch.stack([alpha, self.beta]).to("cpu", torch.float64)
        self.diagonal = torch.cat([self.diagonal, coefficients[0, :, None]], dim=1)
        self.offdiagonal = torch.cat([self.offdiagonal, coefficients[1, :, None]], dim=1)

    def matrices(self) -> Tensor:
        """(A, m, m) the tridiagonal matrices."""
        inner = self.offdiagonal[:, :-1]
        return torch.diag_embed(self.diagonal) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)

    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """(A,) each: rounding noise of the operator, whether all is finite, whether the Krylov space is invariant."""
        scale = torch.maximum(self.diagonal.abs().amax(1), self.offdiagonal.abs().amax(1))
        noise = _ROUNDING * torch.finfo(self.current.dtype).eps * scale
        return noise, torch.isfinite(scale), self.offdiagonal[:, -1] <= noise

    def ritz(self) -> "_Ritz":
        """Eigenpairs of the tridiagonal matrices."""
        noise, finite, broken = self.ends()
        values, weights = torch.linalg.eigh(torch.where(finite[:, None, None], self.matrices(), 0.0))
        values, weights = values.flip(-1), weights.flip(-1)
        residuals = torch.where(broken, 0.0, self.offdiagonal[:, -1])[:, None] * weights[:, -1, :].abs()
        return _Ritz(values, weights, residuals, noise, finite, broken, self.block)

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only (a mask)."""
        here = rows.nonzero()[:, 0].to(self.current.device)
        self.current, self.previous, self.beta = self.current[here], self.previous[here], self.beta[here]
        self.basis = None if self.basis is None else self.basis[here]
        self.rows, self.block = self.rows[rows], self.block[rows]
        self.diagonal, self.offdiagonal = self.diagonal[rows], self.offdiagonal[rows]

    def turn(self, broken: Tensor, generator: torch.Generator) -> None:
        """To the next vectors: the normalised rest, or random ones after a breakdown."""
        self.current.div_(torch.where(self.beta > 0, self.beta, 1.0)[:, None])
        if not bool(broken.any()):
            return
        fresh = random_start(self.current.shape[0], self.current.shape[1], generator, like=self.current)
        if self.basis is not None:
            fresh = _orthogonalised(fresh, self.basis[:, : self.diagonal.shape[1]])
            fresh = fresh / torch.linalg.vector_norm(fresh, dim=1, keepdim=True)
        there = broken.to(self.current.device)
        self.current = torch.where(there[:, None], fresh, self.current)
        self.beta = torch.where(there, 0.0, self.beta)
        self.offdiagonal[broken, -1] = 0.0
        self.block = torch.where(broken, self.diagonal.shape[1], self.block)


@dataclass(frozen=True, eq=False)
class _Ritz:
    """The m Ritz pairs of A recursions, largest first."""

    values: Tensor  # (A, m)
    weights: Tensor  # (A, m, m) their vectors in the Lanczos basis, one a column
    residuals: Tensor  # (A, m)
    noise: Tensor  # (A,) rounding noise of the operator
    finite: Tensor  # (A,) bool
    broken: Tensor  # (A,) bool: the Krylov space is invariant
    block: Tensor  # (A,) where the present Krylov space began

    def within(self, tol: float, leading: int) -> Tensor:
        """(A,) whether the leading residuals are within tol, and not because the space has just turned out invariant.

        After a breakdown the pairs of earlier blocks are exact. The present one's own top must be within tol, too.
        """
        if self.values.shape[1] < leading:
            return torch.zeros_like(self.broken)
        small = self.residuals <= tol * self.values.abs() + self.noise[:, None]
        return small[:, :leading].all(1) & small.gather(1, self.own)[:, 0] & self.finite & ~self.broken

    def exhausted(self, leading: int, dim: int) -> Tensor:
        """(A,) whether nothing is left to be found: the whole space is known, or a random vector found nothing new."""
        size = self.values.shape[1]
        if size < leading:
            return torch.zeros_like(self.broken)
        nothing_new = (self.block > 0) & (self.values.gather(1, self.own)[:, 0] <= self.values[:, leading - 1])
        return self.broken & self.finite & (nothing_new | (size >= dim))

    @property
    def own(self) -> Tensor:
        """(A, 1) index of the largest Ritz value whose vector lies in the present Krylov space."""
        inside = torch.arange(self.values.shape[1]) >= self.block[:, None]
        share = (self.weights.square() * inside[:, :, None]).sum(1)
        return torch.where(share > 0.5, self.values, -torch.inf).argmax(1, keepdim=True)


def _unknown(start: Tensor, k: int, vectors: bool) -> LanczosResult:
    """A result that is still to be filled in."""
    num_rows, dim = start.shape
    values = torch.full((num_rows, k), torch.nan, dtype=torch.float64)
    return LanczosResult(
        values=values,
        residuals=values.clone(),
        converged=torch.zeros(num_rows, dtype=torch.bool),
        iterations=torch.zeros(num_rows, dtype=torch.int64),
        start_quotients=values[:, 0].clone(),
        vectors=start.new_full((num_rows, k, dim), torch.nan) if vectors else None,
    )


def _record(result: LanczosResult, recursion: _Recursion, ritz: _Ritz, done: Tensor, settled: Tensor) -> None:
    """Fills in the rows that are done."""
    good = done & ritz.finite
    rows, pairs = recursion.rows[good], min(result.values.shape[1], ritz.values.shape[1])
    result.values[rows, :pairs] = ritz.values[good, :pairs]
    result.residuals[rows, :pairs] = ritz.residuals[good, :pairs]
    result.converged[rows] = settled[good]
    if result.vectors is not None and recursion.basis is not None:
        basis = recursion.basis[good.to(recursion.basis.device), : ritz.values.shape[1]]
        raw = torch.einsum("bmp,bmk->bkp", basis, ritz.weights[good, :, :pairs].to(basis))
        result.vectors[rows.to(raw.device), :pairs] = raw / torch.linalg.vector_norm(raw, dim=2, keepdim=True)


def _with_room(basis: Tensor, size: int) -> Tensor:
    """The basis with room for `size` vectors: doubled when full, so that memory follows the steps really taken."""
    if basis.shape[1] >= size:
        return basis
    return torch.cat([basis, basis.new_zeros(len(basis), max(4, size - 1), basis.shape[2])], dim=1)


def _orthogonalised(vectors: Tensor, basis: Tensor) -> Tensor:
    """(A, P) vectors without their parts along an orthonormal basis (A, m, P); twice, because once leaves rounding."""
    rows = vectors[:, None]
    for _ in range(2):
        rows = rows - torch.bmm(torch.bmm(rows, basis.mT), basis)
    return rows[:, 0]


def _padded(matvec: Matvec, rows: Tensor, num_rows: int) -> Matvec:
    """The product for some rows through one that wants all rows."""

    def product(vectors: Tensor) -> Tensor:
        index = rows.to(vectors.device)
        return matvec(vectors.new_zeros(num_rows, vectors.shape[1]).index_copy(0, index, vectors))[index]

    return product


def check_start(name: str, start: Tensor) -> None:
    """Refuses what is no rows to start from."""
    if start.ndim != 2 or 0 in start.shape or not start.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point (B, P) tensor, got {start.dtype} of shape {tuple(start.shape)}."
        )


def _check(
    start: Tensor, k: int, tol: float, min_steps: int, max_steps: int, leading: int | None, image: Tensor | None
) -> None:
    """Refuses arguments out of range."""
    check_start("start", start)
    if image is not None and (image.shape != start.shape or image.dtype != start.dtype):
        raise ValueError(
            f"image must be the product of start, {start.dtype} of shape {tuple(start.shape)}, "
            f"got {image.dtype} of shape {tuple(image.shape)}."
        )
    if not tol >= 0:
        raise ValueError(f"tol={tol} is a relative residual and cannot be negative.")
    if not 1 <= min_steps <= max_steps:
        raise ValueError(f"min_steps={min_steps} and max_steps={max_steps} must satisfy 1 <= min_steps <= max_steps.")
    if k < 1 or not 1 <= (k if leading is None else leading) <= k:
        raise ValueError(f"k={k} and leading={leading} must satisfy 1 <= leading <= k.")
