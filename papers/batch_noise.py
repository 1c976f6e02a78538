r"""How much the gradient of a mini-batch scatters: its covariance, and how that develops in networks that are solvable.

Per-sample gradients :math:`g_i` have the mean :math:`\bar g` and the covariance
:math:`C = \frac1N \sum_i (g_i - \bar g)(g_i - \bar g)^\top`. Which multiple of C a batch has depends on how it is
drawn. How C changes along a training is known exactly in two cases: linear regression, at every step
(:func:`regression_noise`), and a two-layer linear network, at its first steps (:func:`two_layer_polynomials`).

References:
    "The Impact of the Mini-batch Size on the Dynamics of SGD: Variance and Beyond", submitted to ICLR 2021; lemmas and
    theorems are numbered as there. Hoffer, Hubara and Soudry, "Train longer, generalize better", NeurIPS 2017,
    appendix A. Where print and derivation differ, the derivation is implemented, and the docstring says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import ArrayLike, NDArray

from lightning_eoss.theory.gradient_noise import sampling_factor

Array = NDArray[np.float64]
Sampling = Literal["without_replacement", "with_replacement", "bernoulli"]


def batch_gradient_variance(gradients: ArrayLike, batch_size: int, linear_map: ArrayLike | None = None) -> float:
    r"""Variance of a mini-batch gradient, or of a linear map of it, given the weights.

    .. math:: \operatorname{var}(A g_b) = c_b\, \frac1n \sum_i \lVert A (g_i - \bar g) \rVert^2

    For any loss that is a mean over samples; the paper says so of squared errors.

    Args:
        gradients: Per-sample gradients :math:`g_i`, (n, p).
        batch_size: Samples b of a batch, drawn without replacement.
        linear_map: A, (q, p); None: the identity.

    Returns:
        The variance, a trace.

    Raises:
        ValueError: If there is no such batch, or ``gradients`` has not two dimensions.

    Example:
        >>> batch_gradient_variance([[0.0], [2.0], [4.0]], 2), batch_gradient_variance([[0.0], [2.0], [4.0]], 3)
        (0.6666666666666666, 0.0)

    Source: "The Impact of the Mini-batch Size", Lemma 1.
    """
    _, scatter = _centred(gradients)
    mapped = scatter if linear_map is None else scatter @ np.asarray(linear_map, dtype=float).T
    return sampling_factor(batch_size, len(scatter)) * float(np.square(mapped).sum()) / len(scatter)


def batch_gradient_covariance(
    gradients: ArrayLike, batch_size: int, *, sampling: Sampling = "without_replacement", same_batch: bool = True
) -> Array:
    r"""Covariance of a mini-batch gradient, or between those of two batches, given the weights.

    ======================= ==================================== ==============================
    sampling                of a batch                           between two of them
    ======================= ==================================== ==============================
    ``without_replacement`` :math:`\frac{N - M}{M (N - 1)}\, C`  :math:`-\frac{1}{N - 1}\, C`
    ``with_replacement``    :math:`\frac1M\, C`                  0
    ``bernoulli``           :math:`(\frac1M - \frac1N)\, S`      0
    ======================= ==================================== ==============================

    with :math:`S = \frac1N \sum_i g_i g_i^\top`. Without replacement, the two are different batches of one epoch: they
    share no sample, and an epoch of equal batches sums up to the full batch, without any noise. The appendix prints
    :math:`(\frac1M - \frac{1}{N-1}) S + \frac{1}{N-1} \bar g \bar g^\top`, which is not zero at M = N, and
    :math:`+\frac{1}{N-1} \bar g \bar g^\top` between batches. What it prints for replacement (equation 6) belongs to
    samples that are chosen one by one with probability M / N, their sum divided by M: ``bernoulli``.

    Args:
        gradients: Per-sample gradients, (N, p).
        batch_size: Samples M of a batch (for ``bernoulli`` on average).
        sampling: How they are drawn.
        same_batch: Whether of one batch, or between two.

    Returns:
        The covariance, (p, p).

    Raises:
        ValueError: If ``sampling`` is unknown, there is no such batch, or ``gradients`` has not two dimensions.

    Example:
        >>> gradients = [[1, 0], [0, 2], [-1, 1], [3, 1], [2, -2], [0, 0]]
        >>> batch_gradient_covariance(gradients, 2).round(4).tolist()
        [[0.7222, -0.2444], [-0.2444, 0.6222]]
        >>> float(batch_gradient_covariance(gradients, 2, same_batch=False).trace().round(4))
        -0.6722

    Source: Hoffer, Hubara and Soudry, appendix A, corrected.
    """
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling={sampling!r} is unknown, so no covariance follows: choose one of {Sampling}.")
    mean, scatter = _centred(gradients)
    count = len(scatter)
    within = sampling_factor(batch_size, count)  # also refuses what is no batch
    if sampling == "without_replacement":
        if not same_batch and batch_size == count:
            raise ValueError(
                f"batch_size={batch_size} is the whole epoch, so there is no other batch that it could vary with: "
                "choose a smaller one."
            )
        factor = within if same_batch else -1 / (count - 1)
    else:
        factor = 1 / batch_size if same_batch else 0.0
    if sampling == "bernoulli":
        scatter, factor = scatter + mean, factor * (1 - batch_size / count)
    return factor / count * (scatter.T @ scatter)


def _centred(gradients: ArrayLike) -> tuple[Array, Array]:
    """Mean, and what gradients are beyond it."""
    array = np.asarray(gradients, dtype=float)
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"gradients of shape {array.shape} are not (samples, parameters), so they have no mean over samples: pass "
            "one row for each sample."
        )
    mean = array.mean(0)
    return mean, array - mean


# ---- linear regression, at every step --------------------------------------------------------------------------------
@dataclass(frozen=True)
class RegressionNoise:
    """What SGD does on average, before each step and after the last; the mean is over all batches drawn so far."""

    gradient_square: Array  # (T + 1,) E |grad L|^2
    gradient_variance: Array  # (T + 1,) E |grad L|^2 - |E grad L|^2
    batch_variance: Array  # (T + 1,) E |g_b|^2 - |E g_b|^2, the next batch's draw included
    loss: Array  # (T + 1,) E L


def regression_noise(
    inputs: ArrayLike, targets: ArrayLike, weights: ArrayLike, *, batch_size: int, learning_rates: Sequence[float]
) -> RegressionNoise:
    r"""Exact moments of SGD on linear regression, :math:`L(w) = \frac{1}{2n} \sum_i (x_i^\top w - y_i)^2`.

    With :math:`\tilde w = (w, 1)`, :math:`z_i = (x_i, -y_i)` and :math:`G = \frac1n \sum_i x_i z_i^\top`, gradients are
    linear, :math:`\nabla L = G \tilde w`, and mean m and covariance K of :math:`\tilde w` follow

    .. math:: m \leftarrow T m, \qquad K \leftarrow T K T^\top + \alpha^2 c_b\, (S - G M G^\top), \qquad
        T = 1 - \alpha G, \quad M = K + m m^\top, \quad S = \frac1n \sum_i (z_i^\top M z_i)\, x_i x_i^\top

    where G and S are filled up with zeros in the place of the constant 1. A step costs :math:`O(n p^2)`, where the
    paper goes through sums over pairs of samples. Nothing is approximated: every batch that could be drawn counts.

    All four results are decreasing functions of b, at every step (Theorems 1 and 2).

    Args:
        inputs: :math:`x_i`, (n, p); append a constant for an intercept.
        targets: :math:`y_i`, (n,).
        weights: Initial weights :math:`w_0`, (p,).
        batch_size: Samples b of a batch, each drawn without replacement from all n, independent of those before.
        learning_rates: :math:`\alpha_t` of each of T steps.

    Returns:
        The moments.

    Raises:
        ValueError: If shapes do not fit, or there is no such batch.

    Example:
        Of two samples that pull to 0 and to 2, each alone takes the weight halfway there.

        >>> noise = regression_noise([[1.0], [1.0]], [0.0, 2.0], [1.0], batch_size=1, learning_rates=[0.5])
        >>> noise.gradient_variance.tolist(), noise.batch_variance.tolist(), noise.loss.tolist()
        ([0.0, 0.25], [1.0, 1.25], [0.5, 0.625])

    Source: "The Impact of the Mini-batch Size", section 3.1, where Lemma 2 gives a step of it.
    """
    x, y, w = (np.asarray(each, dtype=float) for each in (inputs, targets, weights))
    if x.ndim != 2 or y.shape != x.shape[:1] or w.shape != x.shape[1:]:
        raise ValueError(
            f"inputs {x.shape}, targets {y.shape} and weights {w.shape} are no linear regression: their shapes must be "
            "(n, p), (n,) and (p,)."
        )
    count, dim = x.shape
    factor = sampling_factor(batch_size, count)
    z = np.column_stack([x, -y])
    gradient_map = x.T @ z / count
    mean, covariance = np.append(w, 1.0), np.zeros((dim + 1, dim + 1))
    rows = []
    for rate in (*learning_rates, 0.0):  # after the last step there is only something to see
        gradient, of_gradient = gradient_map @ mean, gradient_map @ covariance @ gradient_map.T
        squares = np.square(z @ mean) + ((z @ covariance) * z).sum(1)  # of the residuals
        noise = factor * ((x.T * squares) @ x / count - of_gradient - np.outer(gradient, gradient))
        variance = of_gradient.trace()
        rows.append((variance + gradient @ gradient, variance, variance + noise.trace(), squares.mean() / 2))
        step = np.eye(dim + 1)
        step[:dim] -= rate * gradient_map
        mean, covariance = step @ mean, step @ covariance @ step.T
        covariance[:dim, :dim] += rate**2 * noise
    return RegressionNoise(*np.array(rows).T)


def combination_square(
    matrices: ArrayLike, inputs: ArrayLike, gradients: ArrayLike, *, batch_size: int, learning_rate: float
) -> float:
    r"""Lemma 2, corrected: a sum of sample gradients after a step of SGD on linear regression, from those before it.

    .. math:: \mathbb{E} \Bigl\lVert \sum_i A_i g_i' \Bigr\rVert^2 = \Bigl\lVert \sum_i B_i g_i \Bigr\rVert^2
        + \frac{\alpha^2 c_b}{2 n^2} \sum_{k, l} \lVert A (g_k - g_l) \rVert^2, \qquad
        A = \sum_i A_i x_i x_i^\top, \quad B_i = A_i - \frac{\alpha}{n} A

    The double sum over all ordered pairs, with its factor, is :math:`\alpha^2 \operatorname{var}(A g_b)`, and so it is
    computed. The paper prints it without :math:`1 / 2n^2` (its appendix with :math:`1 / n^2`), and :math:`B_i` without
    :math:`1 / n`.

    Args:
        matrices: :math:`A_i`, (n, q, p).
        inputs: :math:`x_i`, (n, p).
        gradients: :math:`g_i` at the weights before the step, (n, p).
        batch_size: Samples b of a batch.
        learning_rate: :math:`\alpha`.

    Returns:
        The expectation over the step's batch.

    Raises:
        ValueError: If there is no such batch.

    Example:
        >>> combination_square([[[0.5]], [[0.5]]], [[1.0], [1.0]], [[1.0], [-1.0]], batch_size=1, learning_rate=0.5)
        0.25

    Source: "The Impact of the Mini-batch Size", Lemma 2 and its proof (Lemma 4), corrected.
    """
    a, x, g = (np.asarray(each, dtype=float) for each in (matrices, inputs, gradients))
    total = np.einsum("iqp,ip,ir->qr", a, x, x)
    drift = np.einsum("iqp,ip->q", a, g) - learning_rate * total @ g.mean(0)
    return float(drift @ drift) + learning_rate**2 * batch_gradient_variance(g, batch_size, total)


# ---- a two-layer linear network, at its first steps ------------------------------------------------------------------
def two_layer_polynomials(
    first: ArrayLike, second: ArrayLike, target: ArrayLike, learning_rate: float | None = None
) -> tuple[Polynomial, Polynomial]:
    r"""Variance of the mini-batch gradients of a two-layer linear network, as polynomials in 1/b.

    The loss is :math:`\frac12 \mathbb{E} \lVert (W_2 W_1 - W^*) x \rVert^2`, and batches are fresh draws of
    :math:`x \sim \mathcal{N}(0, 1_p)`. At the initial weights, with :math:`E = W_2 W_1 - W^*`,

    .. math:: \operatorname{var} g_1 = \frac{p + 1}{b} \lVert W_2^\top E \rVert_F^2, \qquad
        \operatorname{var} g_2 = \frac1b \left( \lVert W_1 \rVert_F^2 \lVert E \rVert_F^2
        + \lVert E W_1^\top \rVert_F^2 \right)

    After a step, the scalar network (all sizes 1) has degree 6, which is :math:`2 \cdot 3^t` at t = 1: a batch enters
    through the mean s of its :math:`x^2` alone, and :math:`\mathbb{E} s^k = \prod_{j < k} (1 + 2 j / b)`. There is no
    constant term (Theorem 4, whose text has :math:`2 \cdot 3^t` and :math:`2 \cdot 3^{t+1}`). Coefficients may be
    negative, so the variance need not be monotone where batches are small (Theorem 5).

    Args:
        first: :math:`W_1`, (p1, p).
        second: :math:`W_2`, (p2, p1).
        target: :math:`W^*`, (p2, p).
        learning_rate: Of the step that has been taken, for the scalar network only; None: at the initial weights.

    Returns:
        The variance of each layer's gradient; evaluate it at ``1 / b``.

    Raises:
        ValueError: If shapes do not fit, or a step of a network that is not scalar is asked for.

    Example:
        >>> first_layer, second_layer = two_layer_polynomials([[1.0]], [[2.0]], [[1.0]])
        >>> float(first_layer(1 / 4)), float(second_layer(1 / 4))  # 2 * 2^2 / 4 and 2 / 4
        (2.0, 0.5)
        >>> two_layer_polynomials([[1.0]], [[2.0]], [[1.0]], 0.1)[0].degree()
        6

    Source: "The Impact of the Mini-batch Size", section 3.2, Theorems 4 and 5; the closed forms are not in print.
    """
    w1, w2, goal = (np.asarray(each, dtype=float) for each in (first, second, target))
    if not w1.ndim == w2.ndim == goal.ndim == 2 or w2.shape[1:] != w1.shape[:1] or goal.shape != (len(w2), w1.shape[1]):
        raise ValueError(
            f"first {w1.shape}, second {w2.shape} and target {goal.shape} are no two-layer network: their shapes must "
            "be (p1, p), (p2, p1) and (p2, p)."
        )
    error = w2 @ w1 - goal
    if learning_rate is None:
        by_second = np.square(w1).sum() * np.square(error).sum() + np.square(error @ w1.T).sum()
        return Polynomial([0, (w1.shape[1] + 1) * np.square(w2.T @ error).sum()]), Polynomial([0, by_second])
    if not w1.size == w2.size == goal.size == 1:
        raise ValueError(
            f"learning_rate={learning_rate} asks for a step of a network with matrices of shapes {w1.shape} and "
            f"{w2.shape}, whose polynomial is not known in closed form: pass a scalar network, or None for t = 0."
        )
    u, v, e, goal_value = w1.item(), w2.item(), error.item(), goal.item()
    new_first, new_second = (Polynomial([a, -learning_rate * c * e]) for a, c in ((u, v), (v, u)))  # in s
    new_error = new_first * new_second - goal_value
    return _variance_of_product(new_second * new_error), _variance_of_product(new_first * new_error)


def _variance_of_product(factor: Polynomial) -> Polynomial:
    """Variance of f(s) s' for independent s and s', as a polynomial in 1/b."""

    def mean(function: Polynomial) -> Polynomial:
        total, moment = Polynomial([0.0]), Polynomial([1.0])  # of E s^k
        for k, coefficient in enumerate(function.coef):
            total, moment = total + coefficient * moment, moment * Polynomial([1.0, 2.0 * k])
        return total

    variance = Polynomial([1.0, 2.0]) * mean(factor**2) - mean(factor) ** 2
    return Polynomial([0.0, *variance.coef[1:]])  # the constants cancel but for rounding
