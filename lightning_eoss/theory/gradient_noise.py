r"""The noise of the batch gradient: how much of it a batch has, and draws that are like it.

Per-sample gradients :math:`g_i` have the mean :math:`\bar g` and the covariance
:math:`C = \frac1N \sum_i (g_i - \bar g)(g_i - \bar g)^\top`.

References:
    "The Impact of the Mini-batch Size on the Dynamics of SGD: Variance and Beyond", submitted to ICLR 2021; Hoffer,
    Hubara and Soudry, "Train longer, generalize better", NeurIPS 2017. Where print and derivation differ, the
    derivation is implemented, and the docstring says so.
"""

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


# ---- given the weights -----------------------------------------------------------------------------------------------
def sampling_factor(batch_size: int, dataset_size: int) -> float:
    r"""The share of the samples' covariance C that a batch has, drawn without replacement.

    .. math:: c_b = \frac{n - b}{b (n - 1)}

    This is :math:`1/b - 1/n` times :math:`n / (n-1)`, as C divides by n, not by n - 1.

    Args:
        batch_size: Samples b of a batch.
        dataset_size: Samples n that they are drawn from.

    Returns:
        The factor: 1 for single samples, 0 for all of them.

    Raises:
        ValueError: If b is not between 1 and n.

    Example:
        >>> sampling_factor(1, 6), sampling_factor(2, 6), sampling_factor(6, 6)
        (1.0, 0.4, 0.0)

    Source: "The Impact of the Mini-batch Size", Lemma 1.
    """
    if not 1 <= batch_size <= dataset_size:
        raise ValueError(
            f"batch_size={batch_size} is not between 1 and the number of samples, {dataset_size}, so no such batch can "
            "be drawn without replacement: choose a smaller one."
        )
    return 0.0 if batch_size == dataset_size else (dataset_size - batch_size) / (batch_size * (dataset_size - 1))


Noise = Literal["full", "diagonal", "isotropic", "multiplicative"]


def gradient_with_noise(
    blocks: Iterable[Tensor], num_samples: int, *, noise: Noise, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""The mean gradient, and one draw of Gaussian noise like that of a batch of b samples.

    With the samples' mean :math:`\bar g` and covariance
    :math:`C = \frac1n \sum_i (g_i - \bar g)(g_i - \bar g)^\top`, a batch drawn without replacement has the covariance
    :math:`c_b C`, :math:`c_b = \frac{n - b}{b (n - 1)}`. With :math:`S = C + \bar g \bar g^\top` and independent normal
    numbers :math:`\xi_i`:

    ================== ================================================== ========================================
    noise              z                                                  covariance
    ================== ================================================== ========================================
    ``full``           :math:`\sqrt{c_b / n} \sum_i \xi_i (g_i-\bar g)`   :math:`c_b C`
    ``diagonal``       :math:`\sqrt{c_b C_{jj}}\, \xi_j`                  :math:`c_b \operatorname{diag} C`
    ``isotropic``      :math:`\sqrt{c_b \operatorname{tr} C / P}\,\xi_j`  :math:`c_b \frac{\operatorname{tr} C}{P} 1`
    ``multiplicative`` :math:`\sqrt{n / b - 1}\,\frac1n \sum_i \xi_i g_i` :math:`(\frac1b - \frac1n)\, S`
    ================== ================================================== ========================================

    ``multiplicative`` is what multiplying each sample's gradient by a number from :math:`\mathcal{N}(1, \sigma^2)` adds
    to their mean. The variance :math:`\sigma^2 = n / b - 1` gives it the covariance that Hoffer et al. ascribe to a
    batch (equation 6). With S in place of C, it also varies the length of the step.

    Args:
        blocks: (k, P) gradients of k samples each, n in all.
        num_samples: n.
        noise: Which covariance.
        batch_size: b, between 1 and n; all noise is exactly 0 at n.
        generator: On the CPU. The draws depend on its state, n and P alone, not on the blocks.

    Returns:
        :math:`\bar g` and z, (P,) each.

    Raises:
        ValueError: If there is no such batch, or if the blocks hold another number of samples.

    Example:
        The two samples differ in one direction. A batch of both is the full batch.

        >>> rows, generator = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.Generator().manual_seed(0)
        >>> mean, z = gradient_with_noise([rows], 2, noise="full", batch_size=1, generator=generator)
        >>> mean.tolist(), z.bool().tolist()
        ([2.0, 5.0], [True, False])
        >>> gradient_with_noise([rows], 2, noise="full", batch_size=2, generator=generator)[1].abs().tolist()
        [0.0, 0.0]

    Source: Andreyev and Beneventano, section 5.1 (the first three); Hoffer, Hubara and Soudry, section 4 and Figure 3
    of the appendix.
    """
    factor, by_sample = sampling_factor(batch_size, num_samples), noise in ("full", "multiplicative")
    count, shift, draws = 0, None, torch.empty(0)
    for rows in blocks:
        if shift is None:  # sums are taken around a first guess of the mean, so that nothing cancels
            shift = rows.mean(0)
            total, spread = torch.zeros_like(shift), torch.zeros_like(shift)
            draws = torch.randn(num_samples if by_sample else len(shift), generator=generator, dtype=shift.dtype)
            draws = draws.to(shift.device)
        beyond = rows - shift
        total += beyond.sum(0)
        some = draws[count : count + len(rows)]
        count += len(rows)
        if count <= num_samples:
            spread += some @ beyond if by_sample else beyond.square().sum(0)
    if shift is None or count != num_samples:
        raise ValueError(f"blocks hold {count} samples and num_samples={num_samples}, so their mean would be wrong.")
    offset = total / num_samples
    if noise == "full":
        return shift + offset, math.sqrt(factor / num_samples) * (spread - draws.sum() * offset)
    if noise == "multiplicative":
        return shift + offset, math.sqrt(num_samples / batch_size - 1) / num_samples * (spread + draws.sum() * shift)
    variance = factor * (spread / num_samples - offset.square()).clamp(min=0)  # NaN stays NaN
    return shift + offset, (variance if noise == "diagonal" else variance.mean()).sqrt() * draws
