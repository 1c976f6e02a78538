"""The picture of a run: its sharpness against step, with the threshold, and the edge ratio below.

Drawn from plain curves, so that a live run, an event file and a test give the same picture. Matplotlib is optional and
used through its objects alone: neither pyplot nor a backend of the caller's is touched.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_eoss.display import dashboard as tags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
