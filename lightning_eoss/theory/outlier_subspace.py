r"""MiniBS for every batch size, from what single samples do to the outliers of the full batch.

The theorems on random matrices take the difference between a batch and the full batch for homogeneous noise. It is not:
it lies along the outliers, and these are nearly degenerate. So the outliers are treated exactly, as a small random
matrix that is cheap to draw again and again, and only the rest of the spectrum by approximation.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_eoss.theory.random_matrix import inverse_effective_batch_size
from lightning_eoss.theory.statistics import Estimate, exact

Array = npt.NDArray[np.float64]

_MOST_TAIL = 0.5  # share of a prediction that may come from outside the subspace
_MOST_DOUBT = 0.1  # that may hang on the samples' own curvature there
_RESAMPLES = 20  # of the groups
_BISECTIONS = 6  # of a bracket that is a tenth of the value or so


@dataclass(frozen=True, eq=False)
class OutlierSubspace:
    """The k top eigenvectors V of the full batch's Hessian H, and what n disjoint groups of samples do to them."""

    eigenvalues: Array  # (k,) of the full batch, largest first
    compressions: Array  # (n, k, k) V'H_j V
    leakages: Array  # (n, k, k) C_j'C_j, with C_j the part of (H_j - H) V outside the span of V
    quotients: Array  # (n,) curvature of H_j along its own leakage, z'H_j z / z'z for z in the span of C_j
    tail_nodes: Array  # (m,) eigenvalues of H that the leakage reaches, as a quadrature
    tail_weights: Array  # (m,) its share on each, summing to 1
    group_size: int  # samples of a group
    dataset_size: int  # samples N in all

    @property
    def complete(self) -> bool:
        """Whether the groups are all the data there is."""
        return len(self.compressions) * self.group_size == self.dataset_size

    def resampled(self, rng: np.random.Generator) -> "OutlierSubspace":
        """The same from as many groups drawn with replacement."""
        chosen = rng.integers(len(self.compressions), size=len(self.compressions))
        arrays = (self.compressions[chosen], self.leakages[chosen], self.quotients[chosen])
        return OutlierSubspace(
            self.eigenvalues, *arrays, self.tail_nodes, self.tail_weights, self.group_size, self.dataset_size
        )


@dataclass(frozen=True)
class SubspacePrediction:
    """A predicted MiniBS."""

    estimate: Estimate  # the interval holds the luck of the samples and the doubt about what lies outside
    tail_share: float  # of the prediction that comes from outside the subspace
    trusted: bool  # whether that is little, and little of it in doubt


def predict_from_subspace(
    subspace: OutlierSubspace, batch_size: int, *, draws: int = 400, seed: int = 0
) -> SubspacePrediction:
    r"""Predicts MiniBS(B) as the mean over simulated batches of a k x k eigenvalue.

    The largest eigenvalue of a batch solves, exactly, with its compression A to the span of V, its coupling C to the
    rest, and its rest T (Schur's complement),

    .. math:: \lambda = \lambda_{\max}\bigl(A + C (\lambda - T)^{-1} C^\top\bigr).

    A is the mean of the samples' compressions. For the second term, the couplings of different samples are taken for
    orthogonal, as few vectors in many dimensions are; and T, along the coupling of sample i, for the full batch's
    plus that sample's own share:

    .. math:: C (\lambda - T)^{-1} C^\top \approx \frac1{B^2} \sum_{i \in B} C_i^\top C_i
        \sum_t \frac{w_t}{\lambda - \nu_t - q_i / B}

    with :math:`\nu_t, w_t` the full batch's spectrum as the couplings see it. Finite data shrink all fluctuations by
    1 - B/N. Leaving out the q_i gives a lower value; the difference is the doubt that enters the interval on both
    sides.

    Where the groups are all the data, batches of whole groups are drawn without replacement. Else they are drawn with
    replacement around the full batch, with fluctuations scaled to the variance of true batches, and the groups are
    resampled for the interval.

    Cost: no product; some 16 `draws` eigenvalues of k x k matrices and as many resolvents of all n groups, .3 s for
    n = 1,024 on a CPU.

    Args:
        subspace: What `measurements.subspace.outlier_subspace` found.
        batch_size: Samples B.
        draws: Simulated batches.
        seed: Of the simulation.

    Returns:
        The prediction. It is not trusted where more than half of it lies outside the subspace, where the doubt exceeds
        a tenth, or where the batch is smaller than the groups.

    Example:
        Samples of curvature 1 and 5 along one direction: batches of two have 1, 3 or 5, and all three are as likely.

        >>> two = OutlierSubspace(
        ...     np.array([3.0]),
        ...     np.array([1.0, 5.0, 1.0, 5.0]).reshape(4, 1, 1),
        ...     np.zeros((4, 1, 1)),
        ...     np.zeros(4),
        ...     np.zeros(1),
        ...     np.ones(1),
        ...     group_size=1,
        ...     dataset_size=4,
        ... )
        >>> abs(predict_from_subspace(two, 2, draws=10_000).estimate.mean - 3) < 0.05
        True

    Source: second-order perturbation theory with the outliers deflated; measured against in `benchmarks/results`.
    """
    u = float(inverse_effective_batch_size(batch_size, subspace.dataset_size))
    if u == 0:
        top = float(subspace.eigenvalues[0])
        return SubspacePrediction(exact(top), 0.0, trusted=True)
    rng = np.random.default_rng(seed)
    bare, lower, full = _simulated(subspace, batch_size, u, draws, rng)
    variance = float(full.var(ddof=1)) / draws
    if not subspace.complete:
        means = [
            _simulated(subspace.resampled(rng), batch_size, u, max(draws // 8, 2), rng)[2].mean()
            for _ in range(_RESAMPLES)
        ]
        variance += float(np.var(means, ddof=1))
    mean, stderr, doubt = float(full.mean()), float(np.sqrt(variance)), float((full - lower).mean())
    tail_share = 1 - float(bare.mean()) / mean if mean > 0 else 1.0
    trusted = tail_share <= _MOST_TAIL and doubt <= _MOST_DOUBT * mean and batch_size >= subspace.group_size
    half_width = 1.96 * stderr + max(doubt, 0.0)
    return SubspacePrediction(Estimate(mean, stderr, mean - half_width, mean + half_width), tail_share, trusted)


def _simulated(
    subspace: OutlierSubspace, batch_size: int, u: float, draws: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """(draws,) largest eigenvalues inside the subspace, with the outside without the q_i, and with all."""
    n = len(subspace.compressions)
    members = max(1, round(batch_size / subspace.group_size))
    shrunk = u * subspace.group_size * members * n / (n - 1)  # 1 - B/N, up to 1/n
    if subspace.complete and batch_size % subspace.group_size == 0:
        counts = (rng.random((draws, n)).argsort(1) < members).astype(np.float64)
        scale = 1.0
    else:
        counts = rng.multinomial(members, np.full(n, 1 / n), size=draws).astype(np.float64)
        scale = np.sqrt(shrunk)
    deviations = subspace.compressions - subspace.compressions.mean(0)
    inside = np.diag(subspace.eigenvalues) + scale * _summed(counts / members, deviations)
    bare = _top(inside)

    def solved(quotients: Array) -> Array:
        def pushed(x: Array) -> Array:
            weights = (shrunk / members**2) * counts * _resolvent(subspace, x, quotients)
            return _top(inside + _summed(weights, subspace.leakages))

        # What is pushed falls as x grows, so the solution lies between any x and what is pushed there.
        low, high = bare, pushed(np.maximum(bare, subspace.eigenvalues[0]))
        low, high = np.minimum(low, high), np.maximum(pushed(bare), high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = pushed(middle) > middle
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return (low + high) / 2

    return bare, solved(np.zeros(n)), solved(shrunk * subspace.quotients / members)


def _summed(weights: Array, matrices: Array) -> Array:
    """(draws, k, k) weighted sums of (n, k, k)."""
    return np.asarray(np.tensordot(weights, matrices, 1), dtype=np.float64)


def _top(matrices: Array) -> Array:
    """Largest eigenvalues."""
    return np.asarray(np.linalg.eigvalsh(matrices)[..., -1], dtype=np.float64)


def _resolvent(subspace: OutlierSubspace, x: Array, quotients: Array) -> Array:
    """(draws, n) sum_t w_t / (x - nu_t - q_i); poles are cut off at a fiftieth of the full batch's eigenvalue."""
    least = max(abs(float(subspace.eigenvalues[0])) / 50, 1e-30)
    distance = x[:, None] - quotients
    total = np.zeros_like(distance)
    for weight, node in zip(subspace.tail_weights, subspace.tail_nodes, strict=True):
        total += weight / np.maximum(distance - node, least)
    return total
