"""Metrics of sharpness as torchmetrics knows them: thin shells over :mod:`lightning_eoss.theory.statistics`."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_eoss.theory.statistics import Estimate, control_variate_estimate, moments


class MiniBatchSharpness(Metric):
    r"""The mean sharpness over mini-batches, with its 95 % interval.

    .. math:: \mathrm{MiniBS}(b) = \mathbb E_B \, \lambda_{\max}(H_B)

    Any sharpness of one batch will do, directional sharpness too. Of all that was seen the metric keeps six sums, which
    add over processes. Values that are not finite are left out and counted in ``num_dropped``: read it, because the
    batches that overflow are the sharpest, and a mean without them is low.

    Args:
        control_mean: Mean of the controls over all batches, where controls are given and it is known
            (:func:`~lightning_eoss.theory.statistics.control_variate_estimate`). An attribute too: it changes with the
            weights, so set it anew after each ``reset``.
        confidence: Probability that the interval covers the mean.
        **kwargs: Arguments of every metric, see ``torchmetrics.Metric``.

    Example:
        >>> metric = MiniBatchSharpness()
        >>> metric.update(torch.tensor([1.0, 2.0]))
        >>> metric.update(torch.tensor([3.0, float("inf")]))
        >>> {name: round(value.item(), 6) for name, value in metric.compute().items()}  # 2 +- 4.302653 / sqrt(3)
        {'mean': 2.0, 'lower': -0.484138, 'upper': 4.484138, 'stderr': 0.57735}
        >>> metric.num_dropped.item()
        1

    References:
        Andreyev and Beneventano, "Edge of Stochastic Stability: Revisiting the Edge of Stability for SGD", 2024.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    moments: Tensor  # (6,) float64, see `theory.statistics.moments`
    num_dropped: Tensor  # () int64

    def __init__(self, *, control_mean: float | None = None, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.control_mean = control_mean
        self.confidence = confidence
        self.add_state("moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_dropped", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor, controls: Tensor | None = None) -> None:
        """Counts the sharpness of some batches.

        Args:
            values: Sharpness of each batch, of any shape.
            controls: Control of each batch, of the same shape, or None. The control variate is used only where every
                update gave controls.

        Raises:
            ValueError: If there is not one control for each value.
        """
        finite = values.isfinite()
        if controls is not None and controls.shape != values.shape:
            raise ValueError(f"controls must be shaped as values, {tuple(values.shape)}, got {tuple(controls.shape)}")
        sums = moments(values[finite], None if controls is None else controls[finite])
        self.moments += sums.to(self.moments.device)
        self.num_dropped += (~finite).sum().to(self.num_dropped.device)

    def estimate(self) -> Estimate:
        """The estimate from what this process has seen, NaN where undefined."""
        control_mean = math.nan if self.control_mean is None else self.control_mean
        return control_variate_estimate(self.moments, control_mean, confidence=self.confidence)

    def compute(self) -> dict[str, Tensor]:
        """The estimate from what all processes have seen: ``mean``, ``lower``, ``upper`` and ``stderr``, each ()."""
        estimate = self.estimate()
        return {name: self.moments.new_tensor(getattr(estimate, name)) for name in ("mean", "lower", "upper", "stderr")}
