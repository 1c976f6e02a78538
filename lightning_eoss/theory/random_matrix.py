r"""What batch size does to the largest eigenvalue of a Hessian: two random-matrix models and a measured curve.

The Hessian of a mini-batch is that of the full batch plus noise. Drawn without replacement, B of N samples give the
noise a covariance of u times that between samples, (n-1)-normalised, for any distribution:

.. math:: u = \frac{1}{B} - \frac{1}{N}

Everything here is a function of u, which is 0 at B = N, and not of the paper's b = 1 / u, which is infinite there.

The models are symmetric noise (Wigner, for Hessians) and positive noise (Marchenko-Pastur, for Gauss-Newton matrices).
Both take noise that points nowhere in particular. That of neural networks points along the top eigenvectors: on the
digits the Wigner model explained 2 to 7 % of the gap, where a curve through two measured batch sizes
(:func:`fit_batch_size_curve`) met the sharpness at the others within 2 % at the median and 14 % at worst. The models
explain, the curve predicts.

References:
    Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural
    Network Training", JMLR 2022. Numbers of theorems are theirs. Where print and derivation differ, the derivation is
    implemented, and the docstring says so.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from lightning_eoss.theory.statistics import Estimate

Array = NDArray[np.float64]
Real = float | Array  # a number, or numbers at once
Formula = Literal["corrected", "additive", "paper"]

_REFITS = 1000  # of a curve to redrawn measurements; they take some 3 ms
_SATURATED = 1e3  # largest d times smallest measured u; a larger one gives the same curve where it was measured


def inverse_effective_batch_size(batch_size: Real, dataset_size: int | None = None) -> Real:
    r"""The share of the noise between samples that is left in a batch: u = 1/B - 1/N.

    Args:
        batch_size: Samples B of a batch, drawn without replacement.
        dataset_size: Samples N that they are drawn from; None where no sample is ever seen twice (endless data, heavy
            augmentation). Then the "full batch" is the data-generating distribution, and u = 1/B (Remark 6).

    Returns:
        u, a number or of the shape of ``batch_size``; exactly 0 at B = N.

    Raises:
        ValueError: If B is not between 1 and N.

    Example:
        >>> inverse_effective_batch_size(64, 1024) == 1 / 68.26666666666667
        True
        >>> inverse_effective_batch_size(8, 8), inverse_effective_batch_size(8)
        (0.0, 0.125)
    """
    size, limit = np.asarray(batch_size, dtype=float), math.inf if dataset_size is None else dataset_size
    if not np.all((size >= 1) & (size <= limit)):
        raise ValueError(
            f"batch_size={batch_size!r} is not between 1 and dataset_size={dataset_size}: no such batch can be drawn "
            "without replacement; pass dataset_size=None where no sample is seen twice"
        )
    return _plain(1 / size - 1 / limit)


def wigner_outlier(eigenvalue: Real, variance: Real, *, batch_size: Real, dataset_size: int | None = None) -> Real:
    r"""Predicts an extremal eigenvalue of the batch Hessian from that of the full batch (Theorem 4).

    .. math:: \lambda' = \begin{cases} \lambda + q^2 / \lambda & |\lambda| > q \\
        2 q\, \operatorname{sign} \lambda & \text{otherwise} \end{cases}, \qquad q^2 = P \sigma^2 u

    For the largest eigenvalue and, below zero, for the smallest; 0 counts as a largest. In the limit of many parameters
    P; the edge of a finite matrix lies lower, at :math:`q (2 - 1.2065\, P^{-2/3})` on average.

    Args:
        eigenvalue: Eigenvalue :math:`\lambda` of the full batch's Hessian.
        variance: :math:`P \sigma^2 = \frac{1}{P} \frac{1}{N-1} \sum_i \lVert H_i - H \rVert_F^2`, in squared units of
            the eigenvalue, as ``hessian_variance`` returns it. P is in it: do not multiply by P again.
        batch_size: Samples of a batch.
        dataset_size: Samples they are drawn from; None: endless.

    Returns:
        The eigenvalue of the batch, a number or of the arguments' common shape; at B = N the very one passed.

    Raises:
        ValueError: If ``variance`` is negative or there is no such batch.

    Example:
        >>> wigner_outlier(np.array([1.0, 0.25, -2.0]), 4.0, batch_size=16).tolist()  # q = 1/2
        [1.25, 1.0, -2.125]
        >>> wigner_outlier(0.25, 4.0, batch_size=16, dataset_size=16)
        0.25

    Source: Granziol, Zohren and Roberts, Theorem 4; for finite matrices Bornemann, "On the numerical evaluation of
    distributions in random matrix theory", 2010.
    """
    value, q = np.asarray(eigenvalue, dtype=float), _half_width(variance, batch_size, dataset_size)
    outside = np.maximum(np.abs(value), q)
    return _plain(np.where(value < 0, -1, 1) * (outside + q * _ratio(q, outside)))


def wigner_edge(variance: Real, *, batch_size: Real, dataset_size: int | None = None) -> Real:
    r"""The edge of the batch Hessian's bulk, :math:`2 q`, which hides what is smaller in the full batch than q.

    Args:
        variance: :math:`P \sigma^2`, see :func:`wigner_outlier`.
        batch_size: Samples of a batch.
        dataset_size: Samples they are drawn from; None: endless.

    Returns:
        The upper edge, in units of the eigenvalues; the lower one is its negative.

    Raises:
        ValueError: If ``variance`` is negative or there is no such batch.

    Example:
        >>> wigner_edge(4.0, batch_size=np.array([4, 16])).tolist()
        [2.0, 1.0]

    Source: Granziol, Zohren and Roberts, Theorem 3.
    """
    return wigner_outlier(0.0, variance, batch_size=batch_size, dataset_size=dataset_size)


def eigenvector_overlap(eigenvalue: Real, variance: Real, *, batch_size: Real, dataset_size: int | None = None) -> Real:
    r"""Predicts how well an eigenvector of the batch Hessian agrees with that of the full batch (Theorem 10).

    .. math:: \langle \phi', \phi \rangle^2 = 1 - q^2 / \lambda^2 \quad \text{if } |\lambda| > q, \text{ else } 0

    Each outlier has its own :math:`\lambda`, where the paper prints that of the first; and the threshold is q, not the
    2 q of its Lemma 11, where the overlap would jump from 3/4 to 0. Outliers that lie close to one another mix, which
    this formula ignores: on the digits it promised .92 where .43 was measured.

    Args:
        eigenvalue: Eigenvalue :math:`\lambda` of the full batch's Hessian that belongs to the eigenvector.
        variance: :math:`P \sigma^2`, see :func:`wigner_outlier`.
        batch_size: Samples of a batch.
        dataset_size: Samples they are drawn from; None: endless.

    Returns:
        The squared overlap, between 0 and 1.

    Raises:
        ValueError: If ``variance`` is negative or there is no such batch.

    Example:
        >>> eigenvector_overlap(np.array([1.0, 0.5, -2.0]), 4.0, batch_size=16).tolist()
        [0.75, 0.0, 0.9375]

    Source: Granziol, Zohren and Roberts, Theorem 10; Benaych-Georges and Nadakuditi 2011.
    """
    q = _half_width(variance, batch_size, dataset_size)
    return _plain(1 - _ratio(q, np.maximum(np.abs(np.asarray(eigenvalue, dtype=float)), q)) ** 2)


def full_batch_eigenvalue(
    eigenvalue: Real, variance: Real, *, batch_size: Real, dataset_size: int | None = None
) -> Real:
    r"""Infers the full batch's eigenvalue from that of a subset: Theorem 4 backwards.

    .. math:: \lambda = \tfrac12 \left(x + \operatorname{sign}(x) \sqrt{x^2 - 4 q^2}\right), \qquad |x| \ge 2 q

    A subset whose largest eigenvalue lies in the bulk tells nothing about the full batch, not even an estimate with a
    wide interval. Just above the edge, errors of x are magnified without limit, as :math:`\lambda / \sqrt{x^2 - 4q^2}`.

    Args:
        eigenvalue: Eigenvalue x measured on a subset.
        variance: :math:`P \sigma^2` between samples; the subset's own, (n-1)-normalised, is unbiased.
        batch_size: Samples of the subset.
        dataset_size: Samples of the full batch. None: then the result belongs to the data-generating distribution (the
            "true Hessian"), and the full batch may itself be the subset.

    Returns:
        The eigenvalue of the full batch; NaN below the edge.

    Raises:
        ValueError: If ``variance`` is negative or there is no such subset.

    Example:
        >>> full_batch_eigenvalue(np.array([1.25, -2.125, 0.75]), 4.0, batch_size=16).tolist()
        [1.0, -2.0, nan]

    Source: Granziol, Zohren and Roberts, section 8.2, who propose it without the formula.
    """
    x, edge = np.asarray(eigenvalue, dtype=float), 2 * _half_width(variance, batch_size, dataset_size)
    size = np.where(np.abs(x) >= edge, np.abs(x), np.nan)
    return _plain((x + np.copysign(np.sqrt((size - edge) * (size + edge)), x)) / 2)


def marchenko_pastur_outlier(
    eigenvalue: Real,
    bulk: Real,
    *,
    num_parameters: int,
    batch_size: Real,
    dataset_size: int | None = None,
    formula: Formula = "corrected",
) -> Real:
    r"""Predicts the largest eigenvalue of a batch's Gauss-Newton matrix from that of the full batch (Theorem 7).

    With :math:`\gamma = P u`, an outlier above a threshold and the edge of the bulk below:

    - ``corrected``: :math:`\lambda + \gamma \sigma^2 \lambda / (\lambda - \sigma^2)` above
      :math:`\sigma^2 (1 + \sqrt\gamma)`, else :math:`\sigma^2 (1 + \sqrt\gamma)^2`
    - ``additive``: :math:`\lambda + \sigma^2 \lambda / (\lambda - \gamma \sigma^2)` above
      :math:`\sigma^2 (\gamma + \sqrt\gamma)`, else :math:`\sigma^2 (1 + \sqrt\gamma)^2`
    - ``paper``: :math:`\lambda + \sigma^2 \lambda / (\lambda - \gamma \sigma^2)` above
      :math:`\sigma^2 (1 + \gamma)`, else :math:`2 \sigma^2 (1 + \gamma)`

    ``corrected`` is a sample covariance with a spike, or information plus noise, the model that the paper sets up; at
    B = N it returns :math:`\lambda`. ``additive`` adds Wishart noise of mean :math:`\sigma^2` to a matrix that has
    :math:`\lambda`, so that the full batch has :math:`\lambda + \sigma^2`. ``paper`` is equation (16) as printed: the
    additive outlier with a threshold and an edge of its own. It too returns :math:`\lambda + \sigma^2` at B = N, and
    for :math:`\gamma > 1` it falls before it rises with :math:`\lambda`.

    Args:
        eigenvalue: Largest eigenvalue :math:`\lambda`. One below the bulk is not the largest, and counts as the edge.
        bulk: Level of the bulk :math:`\sigma^2`, in units of the eigenvalue: mean of all eigenvalues but the K
            outliers, :math:`(\operatorname{tr} G - \sum_{k \le K} \lambda_k) / (P - K)`. Not the variance that
            :func:`wigner_outlier` takes, which has squared units. At 0 there is no noise.
        num_parameters: Size P of the matrix.
        batch_size: Samples of a batch.
        dataset_size: Samples they are drawn from; None: endless.
        formula: Which of the three.

    Returns:
        The eigenvalue of the batch, a number or of the arguments' common shape.

    Raises:
        ValueError: If ``bulk`` or ``num_parameters`` is negative, ``formula`` unknown or there is no such batch.

    Example:
        >>> marchenko_pastur_outlier(np.array([5.0, 2.0]), 1.0, num_parameters=64, batch_size=16).tolist()  # gamma = 4
        [10.0, 9.0]
        >>> marchenko_pastur_outlier(12.0, 1.0, num_parameters=128, batch_size=16, formula="paper")  # gamma = 8
        15.0

    Source: Granziol, Zohren and Roberts, Theorem 7, corrected; Baik and Silverstein, "Eigenvalues of large sample
    covariance matrices of spiked population models", 2006.
    """
    if formula not in ("corrected", "additive", "paper"):
        raise ValueError(f"formula={formula!r} is unknown: choose 'corrected', 'additive' or 'paper'")
    dim = _not_negative("num_parameters", num_parameters)
    gamma = dim * np.asarray(inverse_effective_batch_size(batch_size, dataset_size))
    level = _not_negative("bulk", bulk)
    noise, pole = (gamma * level, level) if formula == "corrected" else (level, gamma * level)
    # Each outlier meets its edge at the threshold, so the edge is the outlier of an eigenvalue raised to the threshold.
    threshold = pole + level * (1 if formula == "paper" else np.sqrt(gamma))
    outside = np.maximum(np.asarray(eigenvalue, dtype=float), threshold)
    return _plain(outside + noise * _ratio(outside, outside - pole))


def marchenko_pastur_edge(
    bulk: Real,
    *,
    num_parameters: int,
    batch_size: Real,
    dataset_size: int | None = None,
    formula: Formula = "corrected",
) -> Real:
    r"""The upper edge of the bulk of a batch's Gauss-Newton matrix, :math:`\sigma^2 (1 + \sqrt\gamma)^2`.

    Args:
        bulk: Level of the full batch's bulk, see :func:`marchenko_pastur_outlier`.
        num_parameters: Size P of the matrix.
        batch_size: Samples of a batch.
        dataset_size: Samples they are drawn from; None: endless.
        formula: ``"paper"`` gives its :math:`2 \sigma^2 (1 + \gamma)`, which is too high but for :math:`\gamma = 1`.

    Returns:
        The edge, in units of the eigenvalues.

    Raises:
        ValueError: As :func:`marchenko_pastur_outlier`.

    Example:
        >>> marchenko_pastur_edge(1.0, num_parameters=64, batch_size=16)
        9.0
        >>> marchenko_pastur_edge(1.0, num_parameters=64, batch_size=16, formula="paper")
        10.0

    Source: Marchenko and Pastur 1967; Granziol, Zohren and Roberts, Theorem 7.
    """
    return marchenko_pastur_outlier(
        0.0, bulk, num_parameters=num_parameters, batch_size=batch_size, dataset_size=dataset_size, formula=formula
    )


def maximal_learning_rate(
    eigenvalue: Real, variance: Real, *, batch_size: Real, dataset_size: int | None = None
) -> Real:
    r"""The learning rate at which plain SGD reaches the edge of stability of its batches, :math:`2 / \lambda'(B)`.

    The paper concludes that this rate grows linearly with small batches. Its Theorem 4 does not say so: the exponent is
    :math:`q^2 / (\lambda^2 + q^2)` above the critical batch size, at most 1/2, and 1/2 below. With positive noise
    (:func:`marchenko_pastur_outlier`) the exponent tends to 1.

    Args:
        eigenvalue: Largest eigenvalue of the full batch's Hessian; below zero it counts as zero.
        variance: :math:`P \sigma^2`, see :func:`wigner_outlier`.
        batch_size: Samples of a batch.
        dataset_size: Samples they are drawn from; None: endless.

    Returns:
        The learning rate; infinite where nothing curves upwards.

    Raises:
        ValueError: If ``variance`` is negative or there is no such batch.

    Example:
        >>> maximal_learning_rate(1.0, 4.0, batch_size=np.array([1, 4, 16])).tolist()
        [0.5, 1.0, 1.6]

    Source: Granziol, Zohren and Roberts, section 10.1.
    """
    largest = wigner_outlier(np.maximum(eigenvalue, 0.0), variance, batch_size=batch_size, dataset_size=dataset_size)
    with np.errstate(divide="ignore"):
        return _plain(2 / np.asarray(largest))


@dataclass(frozen=True)
class CriticalBatchSize:
    """Where a model changes its regime, in samples, N at most; below 1 no batch is that small, 0 without noise."""

    linear_scaling: float  # MiniBS is twice FullBS: larger batches hardly allow larger learning rates
    visible: float  # the eigenvalue drowns in the batch's bulk: smaller batches tell nothing about it


def wigner_critical_batch_size(
    eigenvalue: float, variance: float, *, dataset_size: int | None = None
) -> CriticalBatchSize:
    r"""The batch size at which symmetric noise doubles the sharpness, and hides the eigenvalue at once.

    .. math:: \frac{1}{B} = \frac{\lambda^2}{P \sigma^2} + \frac{1}{N}

    Args:
        eigenvalue: Eigenvalue :math:`\lambda` of the full batch's Hessian.
        variance: :math:`P \sigma^2`, see :func:`wigner_outlier`.
        dataset_size: Samples the batches are drawn from; None: endless.

    Returns:
        Both batch sizes, which coincide: the broadening equals the eigenvalue at :math:`q = \lambda`.

    Raises:
        ValueError: If ``variance`` is negative or ``dataset_size`` less than 1.

    Example:
        >>> wigner_critical_batch_size(1.0, 4.0)
        CriticalBatchSize(linear_scaling=4.0, visible=4.0)
        >>> wigner_critical_batch_size(1.0, 4.0, dataset_size=4).visible
        2.0

    Source: Granziol, Zohren and Roberts, section 10.1.
    """
    noise = float(_not_negative("variance", variance))
    size = float(_batch_size_at(eigenvalue**2 / noise if noise else math.inf, dataset_size))
    return CriticalBatchSize(linear_scaling=size, visible=size)


def marchenko_pastur_critical_batch_size(
    eigenvalue: float, bulk: float, *, num_parameters: int, dataset_size: int | None = None
) -> CriticalBatchSize:
    r"""The batch sizes at which positive noise doubles the sharpness, and at which it hides the eigenvalue.

    .. math:: \gamma_{\text{linear}} = k, \qquad \gamma_{\text{visible}} = k^2, \qquad
        k = \lambda / \sigma^2 - 1, \quad \frac{1}{B} = \frac{\gamma}{P} + \frac{1}{N}

    Between the two the learning rate scales almost linearly. For k < 1 the eigenvalue is hidden first, and the edge of
    the bulk reaches :math:`2 \lambda` at :math:`\gamma_{\text{linear}} = (\sqrt{2 + 2 k} - 1)^2`.

    Args:
        eigenvalue: Largest eigenvalue :math:`\lambda`; one below the bulk counts as the bulk.
        bulk: Level of the bulk :math:`\sigma^2`, see :func:`marchenko_pastur_outlier`.
        num_parameters: Size P of the matrix.
        dataset_size: Samples the batches are drawn from; None: endless.

    Returns:
        Both batch sizes, by ``formula="corrected"``.

    Raises:
        ValueError: If ``bulk`` or ``num_parameters`` is negative or ``dataset_size`` less than 1.

    Example:
        >>> marchenko_pastur_critical_batch_size(5.0, 1.0, num_parameters=64)
        CriticalBatchSize(linear_scaling=16.0, visible=4.0)

    Source: Granziol, Zohren and Roberts, section 10.1, with Theorem 7 corrected.
    """
    level = float(_not_negative("bulk", bulk))
    k = max(eigenvalue / level - 1, 0.0) if level else math.inf
    gammas = np.array([k if k >= 1 else (math.sqrt(2 + 2 * k) - 1) ** 2, k**2])
    u = gammas / _not_negative("num_parameters", num_parameters)
    return CriticalBatchSize(*_batch_size_at(u, dataset_size).tolist())


@dataclass(frozen=True, eq=False)
class BatchSizeCurve:
    """MiniBS as a function of the batch size, ``eigenvalue + c u / (1 + d u)``, and how far it is known."""

    eigenvalue: float  # FullBS
    c: float  # gap for each u at large batches, in units of the eigenvalue, never negative
    d: float  # saturation at small batches, a pure number, never negative
    curves: Array  # (1 + refits, 3): eigenvalue, c and d; this curve first, then those of redrawn measurements
    dataset_size: int | None  # samples that batches are drawn from; None: endless

    @property
    def covariance(self) -> Array:
        """Covariance of the errors of eigenvalue, c and d, (3, 3)."""
        return np.cov(self.curves[1:], rowvar=False)

    def at(self, batch_size: float) -> Estimate:
        """Predicts MiniBS at a batch size.

        Args:
            batch_size: Samples of a batch.

        Returns:
            MiniBS with its 95 % interval, in units of the eigenvalue. At B = N it is the eigenvalue.

        Raises:
            ValueError: If there is no such batch.

        Example:
            >>> curve = fit_batch_size_curve(1.0, [1, 4], [3.0, 2.0], [0.1, 0.1])
            >>> round(curve.at(16).mean, 6)  # 1 + 6 / 16 / (1 + 2 / 16)
            1.333333
        """
        u = inverse_effective_batch_size(batch_size, self.dataset_size)
        eigenvalue, c, d = self.curves.T
        return _percentile_interval(eigenvalue + c * u / (1 + d * u))

    def critical_batch_size(self) -> Estimate:
        r"""Says at which batch size MiniBS is twice FullBS.

        .. math:: \frac{1}{B} = \frac{\lambda}{c - d \lambda} + \frac{1}{N}

        Larger batches hardly allow larger learning rates. A curve knows no bulk, so it has no ``visible`` batch size.

        Returns:
            The batch size with its 95 % interval, N at most. Below 1 no batch is that small; 0 where the gap saturates
            before it reaches FullBS.

        Example:
            >>> curve = fit_batch_size_curve(1.0, [1, 4], [3.0, 2.0], [0.1, 0.1])
            >>> round(curve.critical_batch_size().mean, 6)  # where the gap is 1, too
            4.0
        """
        eigenvalue, c, d = self.curves.T
        eigenvalue = np.maximum(eigenvalue, 0)
        slope = c - d * eigenvalue
        u = np.divide(eigenvalue, slope, out=np.full(slope.shape, np.inf), where=slope > 0)
        return _percentile_interval(_batch_size_at(u, self.dataset_size))


def fit_batch_size_curve(
    eigenvalue: float,
    batch_sizes: ArrayLike,
    sharpness: ArrayLike,
    stderr: ArrayLike,
    *,
    eigenvalue_stderr: float = 0.0,
    dataset_size: int | None = None,
) -> BatchSizeCurve:
    r"""Draws the curve of MiniBS over the batch size through a few measurements of it.

    .. math:: \text{MiniBS}(B) - \text{FullBS} = \frac{c u}{1 + d u}, \qquad c \ge 0, \quad d \ge 0

    The gap is c u for large batches (second-order perturbation of an isolated eigenvalue), and smaller batches gain
    ever less. Two measurements are met exactly wherever the two bounds allow it; more by weighted least squares.

    The interval is a parametric bootstrap: curves are fitted to measurements redrawn with their standard errors, which
    are taken as known. Linearised errors are as good where the curve is measured. At smaller batches, and where noise
    puts d on its bound (one fit in three, measured at 8 and 32 with twenty batches each), they covered 83 times in 100
    at twice the width, and the bootstrap 93 times (``tests/theory``).

    Args:
        eigenvalue: FullBS.
        batch_sizes: Samples of the measured batches, at least two different sizes below N. The smallest that will be
            asked for and another some ten times as large serve best.
        sharpness: MiniBS, one for each batch size.
        stderr: Standard errors of ``sharpness``, positive.
        eigenvalue_stderr: Standard error of ``eigenvalue``; shared by all gaps.
        dataset_size: Samples the batches are drawn from; None: endless.

    Returns:
        The curve.

    Raises:
        ValueError: If a measurement is not finite, a standard error not positive, or the batch sizes do not suffice.

    Example:
        >>> curve = fit_batch_size_curve(1.0, [1, 4], [3.0, 2.0], [0.1, 0.1])
        >>> round(curve.c, 6), round(curve.d, 6)  # 6 / (1 + 2) = 2 and 6 / 4 / (1 + 2 / 4) = 1
        (6.0, 2.0)
    """
    u = np.asarray(inverse_effective_batch_size(_points(batch_sizes), dataset_size))
    y, error = _points(sharpness), _points(stderr)
    finite = np.isfinite([*y, *error, eigenvalue, eigenvalue_stderr]).all()
    valid = finite and (error > 0).all() and eigenvalue_stderr >= 0
    if not (valid and u.shape == y.shape == error.shape and u.all() and np.unique(u).size > 1):
        raise ValueError(
            f"{batch_sizes=}, {sharpness=}, {stderr=}, {eigenvalue=}, {eigenvalue_stderr=} fix no curve: pass finite "
            f"values with positive errors at two batch sizes at least, below {dataset_size=}, where the gap is 0 anyway"
        )
    # The same random numbers each time: the bands of a chart then move with the measurements alone.
    noise = np.random.default_rng(0).standard_normal((1 + u.size, 1 + _REFITS))
    noise[:, 0] = 0
    eigenvalues = eigenvalue + eigenvalue_stderr * noise[0]
    c, d = _fit(u, y[:, None] + error[:, None] * noise[1:] - eigenvalues, error**-2.0)
    return BatchSizeCurve(eigenvalue, float(c[0]), float(d[0]), np.stack([eigenvalues, c, d], 1), dataset_size)


def gap_exponent(batch_sizes: ArrayLike, gaps: ArrayLike, *, dataset_size: int | None = None) -> Estimate:
    r"""The exponent :math:`\alpha` of :math:`\text{gap} \propto u^\alpha`: slope of log gap against log u.

    1 for an isolated eigenvalue in weak noise, 1/2 where it is degenerate or hidden. Against u, and never against 1/B:
    1/B makes the factor 1 - B/N, which every law has, look like a steeper law.

    Args:
        batch_sizes: Samples of a batch, all below N.
        gaps: MiniBS - FullBS, positive, one for each batch size.
        dataset_size: Samples the batches are drawn from; None: endless.

    Returns:
        The exponent with Student's interval; two points have a slope and no interval.

    Raises:
        ValueError: If a gap is not positive, or there are not two different batch sizes below N.

    Example:
        >>> exponent = gap_exponent([8, 16, 32], [3 * (1 / b - 1 / 64) for b in (8, 16, 32)], dataset_size=64)
        >>> round(exponent.mean, 6)
        1.0
    """
    u, gap = np.asarray(inverse_effective_batch_size(_points(batch_sizes), dataset_size)), _points(gaps)
    if u.shape != gap.shape or not np.all((gap > 0) & np.isfinite(gap) & (u > 0)) or np.unique(u).size < 2:
        raise ValueError(
            f"{gaps=} at {batch_sizes=} have no logarithms to draw a line through: take two batch sizes at least, all "
            f"below {dataset_size=}, and leave out gaps that are not positive"
        )
    x, y = np.log(u) - np.log(u).mean(), np.log(gap) - np.log(gap).mean()
    slope, degrees = float(x @ y / (x @ x)), u.size - 2
    stderr = math.sqrt(np.square(y - slope * x).sum() / (x @ x) / degrees) if degrees else math.nan
    half_width = float(stdtrit(degrees, 0.975)) * stderr
    return Estimate(slope, stderr, slope - half_width, slope + half_width)


def _fit(u: Array, gaps: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted least squares of c and d for each column of gaps (points, columns): c by its formula, d by bisection."""

    def best_c(d: Array) -> tuple[Array, Array]:
        shape = u[:, None] / (1 + d * u[:, None])
        return weights @ (gaps * shape) / (weights @ shape**2), shape

    low, high = np.zeros(gaps.shape[1]), np.full(gaps.shape[1], _SATURATED / u.min())
    for _ in range(64):  # down to 1e-16 / min u; where the squares grow from the start, low stays 0
        middle = (low + high) / 2
        c, shape = best_c(middle)
        grows = weights @ ((gaps - c * shape) * shape**2) >= 0  # derivative of the squares by d, but for a factor c
        low, high = np.where(grows, low, middle), np.where(grows, middle, high)
    return np.maximum(best_c(low)[0], 0), low


def _percentile_interval(values: Array) -> Estimate:
    """The estimate, first of the values, with the middle 95 % of the refits that follow it."""
    with np.errstate(invalid="ignore"):  # infinite batch sizes
        stderr = float(np.std(values[1:], ddof=1))
    lower, upper = np.quantile(values[1:], [0.025, 0.975], method="nearest")
    return Estimate(float(values[0]), stderr, float(lower), float(upper))


def _half_width(variance: Real, batch_size: Real, dataset_size: int | None) -> Array:
    """The q of the Wigner model: half of the bulk's edge."""
    return np.sqrt(_not_negative("variance", variance) * inverse_effective_batch_size(batch_size, dataset_size))


def _batch_size_at(u: Real, dataset_size: int | None) -> Array:
    """The batch size of an u, N at u = 0."""
    inverse_effective_batch_size(1, dataset_size)  # refuses empty data
    limit = math.inf if dataset_size is None else dataset_size
    with np.errstate(divide="ignore"):
        return np.minimum(1 / (np.asarray(u, dtype=float) + 1 / limit), limit)


def _ratio(part: Array, whole: Array) -> Array:
    """Part / whole, with 1 for 0 / 0: all ratios here tend to 1, or are multiplied by 0, as both vanish."""
    return np.divide(part, whole, out=np.ones(np.broadcast_shapes(part.shape, whole.shape)), where=whole != 0)


def _not_negative(name: str, value: Real) -> Array:
    """An argument that cannot be negative; NaN passes, as what is not known."""
    if np.any(np.less(value, 0)):
        raise ValueError(f"{name}={value!r} is negative, where 0 is the least: clip an estimate that scatters around 0")
    return np.asarray(value, dtype=float)


def _plain(values: Array) -> Real:
    """A float in place of an array without dimensions."""
    return float(values) if np.ndim(values) == 0 else values


def _points(values: ArrayLike) -> Array:
    """Measurements as an array with one dimension."""
    return np.atleast_1d(np.asarray(values, dtype=float))
