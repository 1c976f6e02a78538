"""A spectrum as flat floats and as a picture."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_eoss.curvature.spectrum import Spectra
from lightning_eoss.display import dashboard as tags
from lightning_eoss.display.figures import BLUE, GREY, INK, VERMILLION, blank, write_figure
from lightning_eoss.display.scalars import finite, with_interval
from lightning_eoss.theory.random_matrix import wigner_edge, wigner_outlier
from lightning_eoss.theory.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FAINTEST = 1e-9  # weights below are the rounding of float32


def spectrum_scalars(spectra: Spectra) -> dict[str, float]:
    """The flat floats of a measurement of both spectra under their tags; what is undefined is not there.

    Args:
        spectra: What was measured.

    Returns:
        Tag to value, all finite.
    """
    full, batch = spectra.full, spectra.batch
    values = {
        **with_interval(tags.SPECTRUM_TRACE, full.trace),
        **with_interval(tags.SPECTRUM_RANK, _clipped(full.rank(), full.dim)),
        **with_interval(tags.SPECTRUM_ZEROS, _clipped(full.mass_at_origin(), 1)),
        **with_interval(tags.SPECTRUM_NEGATIVE, _clipped(full.negative_mass(), 1)),
        **with_interval(tags.SPECTRUM_BATCH_NEGATIVE, _clipped(batch.negative_mass(), 1)),
        tags.SPECTRUM_LARGEST: float(full.nodes.max()),
        tags.SPECTRUM_SMALLEST: float(full.nodes.min()),
        tags.SPECTRUM_BATCH_LARGEST: float(batch.nodes.max()),
        tags.SPECTRUM_BATCH_SMALLEST: float(batch.nodes.min()),
        tags.SPECTRUM_SECONDS: spectra.seconds,
    }
    return finite(values)


def _clipped(estimate: Estimate, most: float) -> Estimate:
    """The interval within what is possible."""
    return replace(estimate, lower=max(estimate.lower, 0.0), upper=min(estimate.upper, float(most)))


def spectrum_figure(spectra: Spectra, *, title: str | None = None) -> "Figure":
    """Draws the spectra of the full batch and of one batch on the same axes, as stems on a logarithmic scale.

    Where the loss is a mean over samples, Theorem 4 is marked: the edges that batch noise alone would have, and where
    it puts the full batch's largest and smallest eigenvalues.

    Args:
        spectra: What was measured.
        title: Title of the figure.

    Returns:
        A figure of 1,200 by 660 pixels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with blank(8, 4.4, title) as figure:
        axes = figure.subplots()
        for density, color, width, label in (
            (spectra.batch, VERMILLION, 1.2, f"one batch ({spectra.batch_size:,})"),
            (spectra.full, BLUE, 2.2, f"full batch ({spectra.num_samples:,})"),
        ):
            nodes, weights = density.stems()
            seen = weights > _FAINTEST
            axes.vlines(nodes[seen], _FAINTEST, weights[seen], color=color, lw=width, alpha=0.75, label=label)
        if math.isfinite(spectra.variance.mean) and spectra.batch_size < spectra.num_samples:
            variance = max(spectra.variance.mean, 0.0)
            given: dict[str, Any] = {"batch_size": spectra.batch_size, "dataset_size": spectra.num_samples}
            edge = float(wigner_edge(variance, **given))
            axes.axvline(-edge, color=GREY, ls="--", lw=1.2)
            axes.axvline(edge, color=GREY, ls="--", lw=1.2, label="edges of pure batch noise (Wigner)")
            smallest, largest = float(spectra.full.nodes.min()), float(spectra.full.nodes.max())
            ends = [largest, smallest] if smallest < -edge / 2 else [largest]  # others are nothing but noise
            moved = [float(wigner_outlier(each, variance, **given)) for each in ends]
            axes.plot(moved, [3e-1] * len(moved), "v", color=INK, ms=7, label="predicted for a batch (Theorem 4)")
        axes.set(yscale="log", ylim=(_FAINTEST, 2), xlabel="eigenvalue", ylabel="share of the spectrum")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def write_spectrum(experiment: Any, spectra: Spectra, step: int) -> None:
    """Writes the picture into a run.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_figure` and matplotlib is
            installed.
        spectra: What was measured.
        step: Position on the x-axis, the one of the scalars.
    """
    write_figure(experiment, tags.SPECTRUM, lambda: spectrum_figure(spectra), step)
