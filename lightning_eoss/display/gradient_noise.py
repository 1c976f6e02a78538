"""The noise of the gradient as flat floats and as a picture."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_eoss.curvature.gradient_noise import GradientNoise
from lightning_eoss.display import dashboard as tags
from lightning_eoss.display.figures import BLUE, GREY, VERMILLION, blank, write_figure
from lightning_eoss.display.scalars import finite, with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def noise_scalars(noise: GradientNoise) -> dict[str, float]:
    """The flat floats of a measurement under their tags; what is undefined is not there.

    Args:
        noise: What was measured.

    Returns:
        Tag to value, all finite.
    """
    return finite(
        {
            **with_interval(tags.NOISE_TRACE, noise.trace),
            **with_interval(tags.NOISE_PREDICTED, noise.predicted),
            **with_interval(tags.NOISE_MEASURED, noise.measured),
            **with_interval(tags.NOISE_SCALE, noise.scale),
            **with_interval(tags.NOISE_CURVATURE_SCALE, noise.curvature_scale),
            tags.NOISE_NORM: noise.norm_squared.mean,
            tags.NOISE_COSINE: noise.cosine,
            tags.NOISE_SECONDS: noise.seconds,
        }
    )


def noise_figure(noise: GradientNoise, *, title: str | None = None) -> "Figure":
    """Draws the variance of the batch gradient against the batch size, both on logarithmic scales.

    The line is the law, with its 95 % band where it was estimated; points are random batches. The batch size that was
    asked for is marked.

    Args:
        noise: What was measured.
        title: Title of the figure.

    Returns:
        A figure of 1,200 by 660 pixels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with blank(8, 4.4, title) as figure:
        axes = figure.subplots()
        points = [(size, each) for size, each in noise.points if each.mean > 0]
        if noise.trace.mean > 0:
            # Beyond half of the data the law falls to 0, and would take all of the picture.
            last = max([noise.dataset_size // 2, 1, *(size for size, _ in points)])
            sizes = np.unique(np.geomspace(1, last, 100).astype(int)).tolist()
            law = [noise.variance_at(size) for size in sizes]
            label = "law: (n - b) / (b (n - 1)) tr C"
            axes.plot(sizes, [each.mean for each in law], color=BLUE, label=label)
            if math.isfinite(noise.trace.upper - noise.trace.lower):
                lower, upper = [max(each.lower, 0.0) for each in law], [each.upper for each in law]
                axes.fill_between(sizes, lower, upper, color=BLUE, alpha=0.18, lw=0)
        if points:
            ends = [(each.mean - max(each.lower, 1e-3 * each.mean), each.upper - each.mean) for _, each in points]
            sizes, means = [size for size, _ in points], [each.mean for _, each in points]
            style: dict[str, Any] = {"fmt": "o", "color": VERMILLION, "capsize": 3, "lw": 1.3, "ms": 5}
            errors = np.nan_to_num(np.array(ends).T)
            axes.errorbar(sizes, means, yerr=errors, label="measured over random batches", **style)
        axes.axvline(noise.batch_size, color=GREY, ls="--", lw=1.2, label=f"b = {noise.batch_size:,}")
        axes.set(xscale="log", yscale="log", xlabel="batch size b", ylabel="variance of the gradient")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


def write_noise(experiment: Any, noise: GradientNoise, step: int) -> None:
    """Writes the picture into a run.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_figure` and matplotlib is
            installed.
        noise: What was measured.
        step: Position on the x-axis, the one of the scalars.
    """
    write_figure(experiment, tags.NOISE_CURVE, lambda: noise_figure(noise), step)
