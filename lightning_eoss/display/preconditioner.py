"""The curvature that an adaptive optimizer goes by, its preconditioner, as flat floats and as a histogram.

Granziol et al., section 11 and Figure 19: it spans many orders of magnitude, down to eps. The square-root rule for the
learning rate wants eps to be small against it (`eps_share`).
"""

from typing import Any

import torch
from torch import Tensor

from lightning_eoss.display import dashboard as tags
from lightning_eoss.theory.stability import NoLimits, StabilityLimits, eps_share

_ENTRIES = 2**20  # of a preconditioner that medians and histograms are made of, at most


def preconditioner_scalars(limits: StabilityLimits) -> dict[str, float]:
    """Its range, its median, and how much of it eps outweighs.

    Args:
        limits: The optimizer's limits; without preconditioners there is nothing to say.

    Returns:
        Tag to value.
    """
    if not limits.preconditioners:
        return {}
    return {
        tags.PRECONDITIONER_SMALLEST: min(float(each.min()) for each in limits.preconditioners),
        tags.PRECONDITIONER_MEDIAN: float(_entries(limits).median()),
        tags.PRECONDITIONER_LARGEST: max(float(each.max()) for each in limits.preconditioners),
        tags.EPS_SHARE: eps_share(limits),
    }


def write_preconditioner(experiment: Any, limits: StabilityLimits | NoLimits, step: int) -> None:
    """Writes the histogram of its decimal logarithm.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_histogram`.
        limits: The optimizer's limits.
        step: Position on the x-axis, the one of the scalars.
    """
    if isinstance(limits, StabilityLimits) and limits.preconditioners:
        exponents = _entries(limits).clamp(min=1e-38).log10()
        tags.write_histogram(experiment, exponents, step, tag=tags.PRECONDITIONER)


def _entries(limits: StabilityLimits) -> Tensor:
    """All entries, or evenly spaced ones of very many."""
    stride = 1 + sum(each.numel() for each in limits.preconditioners) // _ENTRIES
    return torch.cat([each.detach().reshape(-1)[::stride].float() for each in limits.preconditioners])
