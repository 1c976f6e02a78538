"""What a reader of the curves has to be told in words: why some are missing, or are not the whole truth."""

from lightning_eoss.curvature.measure import SharpnessMeasurement
from lightning_eoss.theory.stability import NoLimits, StabilityLimits


def notes(measurement: SharpnessMeasurement, limits: StabilityLimits | NoLimits, *, in_limits: bool) -> list[str]:
    """Says what a measurement does not show.

    Args:
        measurement: What was measured.
        limits: The optimizer's limits at that step.
        in_limits: Whether it was measured in units of them.

    Returns:
        Sentences, the same ones for the same reasons.
    """
    found = []
    if isinstance(limits, NoLimits):
        found.append(f"no threshold, edge ratio or phase is shown: {limits.reason}.")
    elif in_limits:
        found.append(
            "the stability limits differ between parameters, so edge ratios and predictions are in units of them; "
            "a threshold, which would be in other units, is not shown, nor is the sharpness itself without raw=True."
        )
    doubt = measurement.doubt
    singular = doubt is not None and not (doubt.differences or doubt.detached)
    what = "the second derivative of the loss" if singular else "the loss"
    if measurement.dropped and not measurement.mini_batch.values:  # often the first sign of divergence
        found.append(f"{what} is not finite: nothing is shown while that is so, and training goes on.")
    elif measurement.dropped:
        found.append(
            f"{what} of some mini-batches is not finite; MiniBS is the mean over the others, and the sharpest may be "
            "missing from it."
        )
    return found
