"""The pictures of a run: its sharpness, its predictions, spectra and gradient noise; and how a logger gets them.

Drawn from plain curves and result objects, so that a live run, an event file and a test give the same picture.
Matplotlib is optional and used through its objects alone: neither pyplot nor a backend of the caller's is touched.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_eoss.display import page, tags
from lightning_eoss.display.scalars import preconditioner_entries
from lightning_eoss.measurements.gradient_noise import GradientNoise
from lightning_eoss.measurements.spectrum import Spectra
from lightning_eoss.theory.random_matrix import wigner_edge, wigner_outlier
from lightning_eoss.theory.stability import NoLimits, StabilityLimits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[int], Sequence[float]]  # steps and values, equally long
# Okabe and Ito's colours, told apart with any colour vision and in grey.
BLUE, GREEN, VERMILLION, GREY, INK = "#0072B2", "#009E73", "#D55E00", "#8A8A8A", "#222222"
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "font.size": 10.5,
    "grid.color": "#E6E6E6",
    "legend.columnspacing": 1.6,
    "legend.handlelength": 1.7,
    "lines.linewidth": 2,
}
_ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}  # where legends are
_COLORS = {tags.MINI_BS: BLUE, tags.DIRECTIONAL: VERMILLION, tags.FULL_BS: GREEN}
_MODELS = {
    tags.PREDICTION_SUBSPACE: (VERMILLION, "outlier subspace"),
    tags.PREDICTION_WIGNER: (GREY, "Wigner (Theorem 4)"),
    tags.PREDICTION_MARCHENKO_PASTUR: (GREEN, "Marchenko-Pastur (Theorem 7)"),
}
_FAINTEST = 1e-9  # weights of a spectrum below are the rounding of float32


# ---- curves of a run -------------------------------------------------------------------------------------------------


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
    has_ratio = any(ratio in curves for ratio in tags.RATIOS.values())
    with blank(8, 6 if has_ratio else 4.4, title) as figure:
        heights = [2.2, 1] if has_ratio else [1]
        sharpness, *below = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for tag, color in _COLORS.items():
            _draw(sharpness, curves, tag, color, tag.removeprefix("sharpness/"))
        bottom, top = sharpness.get_ylim()
        # Neither one batch in a hundred nor a warm-up's 2/lr, which starts near infinity, may flatten all the rest.
        if tags.CURRENT_BATCH in curves:
            _, values = curves[tags.CURRENT_BATCH]
            top = max(top, 1.05 * sorted(values)[int(0.99 * (len(values) - 1))])
            dots: dict[str, Any] = {"ls": "", "marker": ".", "ms": 4, "mew": 0, "alpha": 0.6, "zorder": 1}
            _draw(sharpness, curves, tags.CURRENT_BATCH, GREY, "current batch", **dots)
        if tags.THRESHOLD in curves:
            _, values = curves[tags.THRESHOLD]
            in_sight = min(values) < 3 * top
            top = max(top, 1.1 * min(values)) if in_sight else top
            label = "threshold (2/lr for SGD)" if in_sight else f"threshold (above the picture, {values[-1]:.3g})"
            _draw(sharpness, curves, tags.THRESHOLD, INK, label, ls="--", lw=1.5)
        _draw(sharpness, curves, tags.THRESHOLD_SMALL_BATCH, INK, "for small batches", ls=":", lw=1.5)
        sharpness.set(ylim=(min(bottom, 0), top), ylabel="sharpness")
        sharpness.legend(ncols=5, markerscale=2, **_ABOVE)
        for ratio in below:
            for tag, color in _COLORS.items():
                _draw(ratio, curves, tags.RATIOS[tag], color)
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
        axes, doubted = figure.subplots(), False
        _draw(axes, curves, measured, BLUE, "MiniBS, measured")
        top = axes.get_ylim()[1]
        limit = 3 * top if measured in curves and top > 0 else math.inf
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
        axes.legend(ncols=3, **_ABOVE)
    return figure


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


# ---- results ---------------------------------------------------------------------------------------------------------


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
        axes.legend(ncols=2, **_ABOVE)
    return figure


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
        axes.legend(ncols=3, **_ABOVE)
    return figure


# ---- into a run ------------------------------------------------------------------------------------------------------


def write_figure(experiment: Any, tag: str, draw: Callable[[], "Figure"], step: int) -> None:
    """Draws a picture into `logger.experiment`, if that takes figures and matplotlib is installed."""
    if hasattr(experiment, "add_figure"):
        with suppress(ImportError):
            experiment.add_figure(tag, draw(), step, close=False)  # pyplot, which would close it, does not know it


def write_spectrum(experiment: Any, spectra: Spectra, step: int) -> None:
    """Draws both spectra into a run."""
    write_figure(experiment, tags.SPECTRUM, lambda: spectrum_figure(spectra), step)


def write_noise(experiment: Any, noise: GradientNoise, step: int) -> None:
    """Draws the variance of the gradient into a run."""
    write_figure(experiment, tags.NOISE_CURVE, lambda: noise_figure(noise), step)


def write_preconditioner(experiment: Any, limits: StabilityLimits | NoLimits, step: int) -> None:
    """Writes the histogram of its decimal logarithm, where the optimizer has one."""
    if isinstance(limits, StabilityLimits) and limits.preconditioners:
        exponents = preconditioner_entries(limits).clamp(min=1e-38).log10()
        page.write_histogram(experiment, exponents, step, tag=tags.PRECONDITIONER)


@contextmanager
def blank(width: float, height: float, title: str | None = None) -> "Iterator[Figure]":
    """An empty figure in the house style while it is drawn, in inches of 150 pixels."""
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
