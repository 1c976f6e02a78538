"""The picture of a run: its sharpness against step, with the threshold, and the edge ratio below.

Drawn from plain curves, so that a live run, an event file and a test give the same picture. Matplotlib is optional and
used through its objects alone: neither pyplot nor a backend of the caller's is touched.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_eoss.display import page, tags
from lightning_eoss.display.scalars import _entries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from lightning_eoss.measurements.spectrum import Spectra
from lightning_eoss.theory.random_matrix import wigner_edge, wigner_outlier

if TYPE_CHECKING:
    from matplotlib.figure import Figure
import numpy as np

from lightning_eoss.measurements.gradient_noise import GradientNoise
from lightning_eoss.theory.stability import NoLimits, StabilityLimits

Curve = tuple[Sequence[int], Sequence[float]]  # steps and values, equally long
# Okabe and Ito's colours, told apart with any colour vision and in grey.
BLUE, GREEN, VERMILLION, GREY, INK = "#0072B2", "#009E73", "#D55E00", "#8A8A8A", "#222222"
_MODELS = {
    tags.PREDICTION_SUBSPACE: (VERMILLION, "outlier subspace"),
    tags.PREDICTION_WIGNER: (GREY, "Wigner (Theorem 4)"),
    tags.PREDICTION_MARCHENKO_PASTUR: (GREEN, "Marchenko-Pastur (Theorem 7)"),
}
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10.5,
    "grid.color": "#E6E6E6",
    "legend.columnspacing": 1.6,
    "legend.frameon": False,
    "legend.handlelength": 1.7,
    "lines.linewidth": 2,
    "xtick.color": INK,
    "ytick.color": INK,
}


def sharpness_figure(curves: Mapping[str, Curve], *, title: str | None = None) -> "Figure":
    """Draws the sharpness of a run against its threshold.

    Above: MiniBS with its interval, directional sharpness, FullBS, the current batches as dots, and the threshold; with
    momentum also the line at which small batches hold directional sharpness.
    Below, where it was logged: the edge ratio, whose edge is the line at 1. What was not logged is left out. One batch
    in a hundred and a distant threshold may lie above the picture.

    Args:
        curves: Steps and values of each tag, as `read_curves` returns them for one run.
        title: Title of the figure.

    Returns:
        A figure of 1,200 by 900 pixels; `figure.savefig("sharpness.png")` saves it.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = sharpness_figure({"sharpness/MiniBS": ([0, 100], [1.3, 2.1])})
        >>> figure.axes[0].get_ylabel()
        'sharpness'
    """
    has_ratio = any(tag in curves for tag in (tags.EDGE_RATIO, tags.EDGE_RATIO_DIRECTIONAL, tags.EDGE_RATIO_FULL_BS))
    with blank(8, 6 if has_ratio else 4.4, title) as figure:
        heights = [2.2, 1] if has_ratio else [1]
        sharpness, *below = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _draw(sharpness, curves, tags.MINI_BS, BLUE, "MiniBS")
        _draw(sharpness, curves, tags.DIRECTIONAL, VERMILLION, "directional")
        _draw(sharpness, curves, tags.FULL_BS, GREEN, "FullBS")
        bottom, top = sharpness.get_ylim()
        # Neither one batch in a hundred nor a warm-up's 2/lr, which starts near infinity, may flatten all the rest.
        if tags.CURRENT_BATCH in curves:
            steps, values = curves[tags.CURRENT_BATCH]
            dots: dict[str, Any] = {"ls": "", "marker": ".", "ms": 4, "mew": 0, "alpha": 0.6, "zorder": 1}
            sharpness.plot(steps, values, color=GREY, label="current batch", **dots)
            top = max(top, 1.05 * sorted(values)[int(0.99 * (len(values) - 1))])
        if tags.THRESHOLD in curves:
            steps, values = curves[tags.THRESHOLD]
            in_sight = min(values) < 3 * top
            top = max(top, 1.1 * min(values)) if in_sight else top
            label = "threshold (2/lr for SGD)" if in_sight else f"threshold (above the picture, {values[-1]:.3g})"
            sharpness.plot(steps, values, "--", color=INK, lw=1.5, label=label)
        if tags.THRESHOLD_SMALL_BATCH in curves:
            steps, values = curves[tags.THRESHOLD_SMALL_BATCH]
            sharpness.plot(steps, values, ":", color=INK, lw=1.5, label="for small batches")
        sharpness.set(ylim=(min(bottom, 0), top), ylabel="sharpness")
        sharpness.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, markerscale=2)
        for ratio in below:
            _draw(ratio, curves, tags.EDGE_RATIO, BLUE)
            _draw(ratio, curves, tags.EDGE_RATIO_DIRECTIONAL, VERMILLION)
            _draw(ratio, curves, tags.EDGE_RATIO_FULL_BS, GREEN)
            ratio.axhline(1, ls="--", color=INK, lw=1.5)
            ratio.set_ylabel("edge ratio")
        figure.axes[-1].set_xlabel("step")
        figure.align_ylabels()
    return figure


def prediction_figure(curves: Mapping[str, Curve], *, title: str | None = None) -> "Figure":
    """Draws MiniBS as measured against what each model makes of the full batch.

    Lines are means, bands 95 % intervals. A hollow point is a prediction that says itself that it is not to be trusted
    at that step. What was not logged is left out; where limits differ between parameters, edge ratios stand for
    sharpness. A prediction more than three times the measured values may lie above the picture, which its label then
    says.

    Args:
        curves: Steps and values of each tag, as `read_curves` returns them for one run with predictions.
        title: Title of the figure.

    Returns:
        A figure of 1,200 by 660 pixels.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = prediction_figure({"sharpness/MiniBS": ([0, 100], [1.3, 2.1])})
        >>> figure.axes[0].get_ylabel()
        'sharpness'
    """
    in_limits = tags.MINI_BS not in curves and tags.EDGE_RATIO in curves
    measured = tags.EDGE_RATIO if in_limits else tags.MINI_BS
    with blank(8, 4.4, title) as figure:
        axes = figure.subplots()
        _draw(axes, curves, measured, BLUE, "MiniBS, measured")
        limit, doubted = math.inf, False
        if measured in curves and axes.get_ylim()[1] > 0:
            limit = 3 * axes.get_ylim()[1]
        for tag, (color, label) in _MODELS.items():
            if tag not in curves:
                continue
            steps, values = curves[tag]
            flags = dict(zip(*curves.get(tags.trusted(tag), ((), ())), strict=True))
            faces = [color if flags.get(step, True) else "white" for step in steps]
            doubted = doubted or "white" in faces
            above = ", in part above the picture" if max(values, default=0) > limit else ""
            _draw(axes, curves, tag, color, f"{label}{above}", lw=1.3)
            axes.scatter(steps, values, s=28, facecolors=faces, edgecolors=color, zorder=3)
        if doubted:
            axes.plot([], [], "o", ms=5.3, mfc="white", mec=INK, label="hollow: not to be trusted")
        bottom, top = axes.get_ylim()
        axes.set(ylim=(min(bottom, 0), min(top, limit)), xlabel="step")
        axes.set_ylabel("edge ratio" if in_limits else "sharpness")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


def write_figure(experiment: Any, tag: str, draw: Callable[[], "Figure"], step: int) -> None:
    """Writes a picture into a run.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_figure` and matplotlib is
            installed.
        tag: Its name.
        draw: Draws it.
        step: Position on the x-axis, the one of the scalars.
    """
    if not hasattr(experiment, "add_figure"):
        return
    try:
        figure = draw()
    except ImportError:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # TensorBoard draws through the figure's own canvas
    experiment.add_figure(tag, figure, step, close=False)


@contextmanager
def blank(width: float, height: float, title: str | None = None) -> "Iterator[Figure]":
    """An empty figure in the house style, while it is drawn.

    Args:
        width: Inches, of 150 pixels.
        height: The same.
        title: Above everything.

    Yields:
        The figure; pyplot does not know it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "lightning_eoss[plot]"') from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        if title:
            figure.suptitle(title, fontsize=12)
        yield figure


def _draw(
    axes: "Axes", curves: Mapping[str, Curve], tag: str, color: str, label: str | None = None, **line: Any
) -> None:
    """Draws a tag's line, and its band where the ends of its interval were logged at the same steps."""
    if tag not in curves:
        return
    steps, values = curves[tag]
    axes.plot(steps, values, color=color, label=label, **line)
    lower, upper = (curves.get(end) for end in tags.interval(tag))
    if lower and upper and list(steps) == list(lower[0]) == list(upper[0]):
        axes.fill_between(steps, lower[1], upper[1], color=color, alpha=0.18, lw=0)


_FAINTEST = 1e-9  # weights below are the rounding of float32


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


def write_preconditioner(experiment: Any, limits: StabilityLimits | NoLimits, step: int) -> None:
    """Writes the histogram of its decimal logarithm.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_histogram`.
        limits: The optimizer's limits.
        step: Position on the x-axis, the one of the scalars.
    """
    if isinstance(limits, StabilityLimits) and limits.preconditioners:
        exponents = _entries(limits).clamp(min=1e-38).log10()
        page.write_histogram(experiment, exponents, step, tag=tags.PRECONDITIONER)
