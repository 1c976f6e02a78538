"""The picture of a run: its sharpness against step, with the threshold, and the edge ratio below.

Drawn from plain curves, so that a live run, an event file and a test give the same picture. Matplotlib is optional and
used through its objects alone: neither pyplot nor a backend of the caller's is touched.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_eoss.display import dashboard as tags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[int], Sequence[float]]  # steps and values, equally long

# Okabe and Ito's colours, told apart with any colour vision and in grey.
_BLUE, _GREEN, _VERMILLION, _GREY, _INK = "#0072B2", "#009E73", "#D55E00", "#8A8A8A", "#222222"
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10.5,
    "grid.color": "#E6E6E6",
    "legend.columnspacing": 1.6,
    "legend.frameon": False,
    "legend.handlelength": 1.7,
    "lines.linewidth": 2,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def sharpness_figure(curves: Mapping[str, Curve], *, title: str | None = None) -> "Figure":
    """Draws the sharpness of a run against its threshold.

    Above: MiniBS with its interval, directional sharpness, FullBS, the current batches as dots, and the threshold.
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
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "lightning_eoss[plot]"') from error

    has_ratio = any(tag in curves for tag in (tags.EDGE_RATIO, tags.EDGE_RATIO_DIRECTIONAL, tags.EDGE_RATIO_FULL_BS))
    with rc_context(_STYLE):
        figure = Figure(
            figsize=(8, 6 if has_ratio else 4.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        )
        heights = [2.2, 1] if has_ratio else [1]
        sharpness, *below = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _draw(sharpness, curves, tags.MINI_BS, _BLUE, "MiniBS")
        _draw(sharpness, curves, tags.DIRECTIONAL, _VERMILLION, "directional")
        _draw(sharpness, curves, tags.FULL_BS, _GREEN, "FullBS")
        bottom, top = sharpness.get_ylim()
        # Neither one batch in a hundred nor a warm-up's 2/lr, which starts near infinity, may flatten all the rest.
        if tags.CURRENT_BATCH in curves:
            steps, values = curves[tags.CURRENT_BATCH]
            dots: dict[str, Any] = {"ls": "", "marker": ".", "ms": 4, "mew": 0, "alpha": 0.6, "zorder": 1}
            sharpness.plot(steps, values, color=_GREY, label="current batch", **dots)
            top = max(top, 1.05 * sorted(values)[int(0.99 * (len(values) - 1))])
        if tags.THRESHOLD in curves:
            steps, values = curves[tags.THRESHOLD]
            in_sight = min(values) < 3 * top
            top = max(top, 1.1 * min(values)) if in_sight else top
            label = "threshold (2/lr for SGD)" if in_sight else f"threshold (above the picture, {values[-1]:.3g})"
            sharpness.plot(steps, values, "--", color=_INK, lw=1.5, label=label)
        sharpness.set_ylim(min(bottom, 0), top)
        sharpness.set_ylabel("sharpness")
        sharpness.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, markerscale=2)
        for ratio in below:
            _draw(ratio, curves, tags.EDGE_RATIO, _BLUE)
            _draw(ratio, curves, tags.EDGE_RATIO_DIRECTIONAL, _VERMILLION)
            _draw(ratio, curves, tags.EDGE_RATIO_FULL_BS, _GREEN)
            ratio.axhline(1, ls="--", color=_INK, lw=1.5)
            ratio.set_ylabel("edge ratio")
        figure.axes[-1].set_xlabel("step")
        figure.align_ylabels()
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _draw(axes: "Axes", curves: Mapping[str, Curve], tag: str, color: str, label: str | None = None) -> None:
    """Draws a tag's line, and its band where the ends of its interval were logged at the same steps."""
    if tag not in curves:
        return
    steps, values = curves[tag]
    axes.plot(steps, values, color=color, label=label)
    lower, upper = (curves.get(end) for end in tags.interval(tag))
    if lower and upper and list(steps) == list(lower[0]) == list(upper[0]):
        axes.fill_between(steps, lower[1], upper[1], color=color, alpha=0.18, lw=0)
