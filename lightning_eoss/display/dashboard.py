"""The tags of a measurement, and the one TensorBoard page on which they are read.

Every tag of the package is named here and nowhere else. The page is a *Custom Scalars* layout, the only kind that a
training run can write by itself. What TensorBoard 2.21 makes of one decides its form:

* of several layouts in one run only the last is shown: one layout, written by one owner;
* layouts of several runs merge by title: titles are constant, no learning rate or step in them;
* in a category, multi-line charts come first and margin charts follow in reverse: no category has two margin charts;
* multi-line charts smooth by default, margin charts never do: what is compared with a limit is on a margin chart, where
  a series without an interval is its own lower and upper end;
* a margin series needs its three tags at identical steps, but series may differ: FullBS may be measured more rarely.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

MINI_BS = "sharpness/MiniBS"
FULL_BS = "sharpness/FullBS"
CURRENT_BATCH = "sharpness/current_batch"
DIRECTIONAL = "sharpness/directional"
GAP = "sharpness/gap"
BATCH_SIZE = "sharpness/batch_size"
THRESHOLD = "sharpness/threshold"
THRESHOLD_SMALL_BATCH = "sharpness/threshold_small_batch"
EDGE_RATIO = "sharpness/edge_ratio"
EDGE_RATIO_FULL_BS = "sharpness/edge_ratio_FullBS"
EDGE_RATIO_DIRECTIONAL = "sharpness/edge_ratio_directional"
EDGE = "sharpness/edge"
PHASE = "sharpness/phase"
PRECONDITIONER_SMALLEST = "sharpness/preconditioner_smallest"
PRECONDITIONER_MEDIAN = "sharpness/preconditioner_median"
PRECONDITIONER_LARGEST = "sharpness/preconditioner_largest"
EPS_SHARE = "sharpness/eps_share"
PREDICTION_SUBSPACE = "prediction/subspace"
PREDICTION_WIGNER = "prediction/wigner"
PREDICTION_MARCHENKO_PASTUR = "prediction/marchenko_pastur"
PREDICTION_OVERLAP = "prediction/overlap"
PREDICTION_VARIANCE = "prediction/variance"
PREDICTION_RANK = "prediction/rank"
PREDICTION_CRITICAL_BATCH_SIZE = "prediction/critical_batch_size"
SPECTRUM = "spectrum/density"  # a figure
SPECTRUM_TRACE = "spectrum/trace"
SPECTRUM_RANK = "spectrum/rank"
SPECTRUM_ZEROS = "spectrum/mass_at_origin"
SPECTRUM_NEGATIVE = "spectrum/negative_mass"
SPECTRUM_LARGEST = "spectrum/largest"
SPECTRUM_SMALLEST = "spectrum/smallest"
SPECTRUM_BATCH_LARGEST = "spectrum/batch_largest"
SPECTRUM_BATCH_SMALLEST = "spectrum/batch_smallest"
SPECTRUM_BATCH_NEGATIVE = "spectrum/batch_negative_mass"
SPECTRUM_SECONDS = "spectrum/seconds"
NOISE_TRACE = "gradient_noise/trace"
NOISE_PREDICTED = "gradient_noise/predicted_variance"
NOISE_MEASURED = "gradient_noise/measured_variance"
NOISE_SCALE = "gradient_noise/scale"
NOISE_CURVATURE_SCALE = "gradient_noise/curvature_scale"
NOISE_NORM = "gradient_noise/gradient_norm_squared"
NOISE_COSINE = "gradient_noise/cosine"
NOISE_SECONDS = "gradient_noise/seconds"
NOISE_CURVE = "gradient_noise/variance_against_batch_size"  # a figure
WEIGHTS_DISTANCE = "weights/distance"
WEIGHTS_ANGLE = "weights/angle"
WEIGHTS_LOG_SLOPE = "weights/log_slope"
WEIGHTS_LOG_R2 = "weights/log_r2"
WEIGHTS_POWER_EXPONENT = "weights/power_exponent"
WEIGHTS_POWER_R2 = "weights/power_r2"
LEARNING_RATE_APPLIED = "learning_rate/applied"
LEARNING_RATE_SUGGESTED = "learning_rate/suggested"
LEARNING_RATE_SCALE = "learning_rate/scale"
LEARNING_RATE_MOMENTUM = "learning_rate/momentum"
LEARNING_RATE_LARGEST = "learning_rate/largest"
LEARNING_RATE_SMALLEST = "learning_rate/smallest"
COST_SHARE = "cost/share"
COST_SECONDS = "cost/seconds"
COST_HVPS = "cost/hvps"
COST_RESIDUAL = "cost/residual"
COST_AUDIT = "cost/audit"
COST_MEMORY = "cost/memory"
COST_SAMPLES = "cost/full_batch_samples"

#: Estimates, logged together with the two ends of their interval.
WITH_INTERVAL = (
    MINI_BS,
    DIRECTIONAL,
    GAP,
    EDGE_RATIO,
    PREDICTION_SUBSPACE,
    PREDICTION_WIGNER,
    PREDICTION_MARCHENKO_PASTUR,
    PREDICTION_VARIANCE,
    PREDICTION_RANK,
    PREDICTION_CRITICAL_BATCH_SIZE,
    SPECTRUM_TRACE,
    SPECTRUM_RANK,
    SPECTRUM_ZEROS,
    SPECTRUM_NEGATIVE,
    SPECTRUM_BATCH_NEGATIVE,
    NOISE_TRACE,
    NOISE_PREDICTED,
    NOISE_MEASURED,
    NOISE_SCALE,
    NOISE_CURVATURE_SCALE,
)

LAMBDA_MAX = "sharpness/lambda_max"  # a histogram
PRECONDITIONER = "sharpness/log10_preconditioner"  # a histogram
GUIDE = "sharpness/guide"  # a text card; other callbacks' are named after their tags

#: What each scalar is, in one line.
DESCRIPTIONS: dict[str, str] = {
    MINI_BS: "mini-batch sharpness: mean largest Hessian eigenvalue over random batches as training draws them",
    FULL_BS: "full-batch sharpness: largest Hessian eigenvalue of the training set's loss",
    CURRENT_BATCH: "sharpness of the batch about to be stepped on",
    DIRECTIONAL: "directional sharpness: mean curvature along each batch's own gradient, E[g'Hg / g'g]",
    GAP: "MiniBS - FullBS",
    BATCH_SIZE: "the b of MiniBS(b): samples of a step, the mean where a sampler's batches differ",
    THRESHOLD: "the largest stable sharpness, where one number says it: 2/lr for plain SGD",
    THRESHOLD_SMALL_BATCH: "where momentum holds directional sharpness under small batches: 2 (1 - momentum)/lr",
    EDGE_RATIO: "MiniBS in units of the optimizer's stability limits; 1 is the edge",
    EDGE_RATIO_FULL_BS: "FullBS in the same units",
    EDGE_RATIO_DIRECTIONAL: "directional sharpness in the same units; the phase is judged on it",
    EDGE: "the constant 1",
    PHASE: "0 sharpening, 1 at the edge, 2 beyond it, 3 catapult; over the last five measurements",
    PRECONDITIONER_SMALLEST: "smallest implied curvature of an adaptive optimizer, sqrt(v) + eps for Adam",
    PRECONDITIONER_MEDIAN: "its median over the parameters",
    PRECONDITIONER_LARGEST: "its largest",
    EPS_SHARE: "share of parameters where eps outweighs it; the square-root rule wants few",
    PREDICTION_SUBSPACE: "MiniBS predicted from the full batch's outliers; `_trusted` is 0 where it should not be",
    PREDICTION_WIGNER: "MiniBS by Theorem 4 of Granziol et al., batch noise taken for homogeneous",
    PREDICTION_MARCHENKO_PASTUR: "MiniBS by their Theorem 7, corrected, the bulk taken for flat",
    PREDICTION_OVERLAP: "their Theorem 10: squared cosine between a batch's top eigenvector and the full batch's",
    PREDICTION_VARIANCE: "variance of the per-sample Hessian, P sigma^2 = E|H_i - H|^2 / P",
    PREDICTION_RANK: "rank of the full batch's Hessian, at least",
    PREDICTION_CRITICAL_BATCH_SIZE: "batch size at which MiniBS is twice FullBS: larger ones allow hardly more "
    "learning rate",
    SPECTRUM_TRACE: "sum of the full batch's Hessian eigenvalues",
    SPECTRUM_RANK: "how many of them are not zero, at least",
    SPECTRUM_ZEROS: "share of them that is zero, at most",
    SPECTRUM_NEGATIVE: "share of them below zero",
    SPECTRUM_LARGEST: "the largest of them",
    SPECTRUM_SMALLEST: "the smallest of them",
    SPECTRUM_BATCH_LARGEST: "largest Hessian eigenvalue of one random batch",
    SPECTRUM_BATCH_SMALLEST: "its smallest",
    SPECTRUM_BATCH_NEGATIVE: "share of its eigenvalues below zero",
    SPECTRUM_SECONDS: "seconds that the densities took",
    NOISE_TRACE: "variance of a single sample's gradient, the trace of its covariance C",
    NOISE_PREDICTED: "variance of the batch gradient that follows from it, (n - b) / (b (n - 1)) tr C",
    NOISE_MEASURED: "variance of the batch gradient over random batches",
    NOISE_SCALE: "simple noise scale, tr C / |g|^2: batches much larger than that are hardly better",
    NOISE_CURVATURE_SCALE: "the same weighted by curvature, tr HC / g'Hg",
    NOISE_NORM: "squared norm of the full batch's gradient",
    NOISE_COSINE: "cosine between the full batch's gradient and its Hessian's top eigenvector, without sign",
    NOISE_SECONDS: "seconds that the measurement took",
    WEIGHTS_DISTANCE: "distance of the weights from where training began",
    WEIGHTS_ANGLE: "angle between successive displacements, in degrees",
    WEIGHTS_LOG_SLOPE: "c of the law a + c log t for the distance",
    WEIGHTS_LOG_R2: "share of the distance's variance that the logarithmic law explains",
    WEIGHTS_POWER_EXPONENT: "exponent of the power law for the distance",
    WEIGHTS_POWER_R2: "share of the distance's variance that the power law explains",
    LEARNING_RATE_APPLIED: "the rate that the step really takes (first parameter group)",
    LEARNING_RATE_SUGGESTED: "the rate that the rule would have it take; another one under `dry_run` alone",
    LEARNING_RATE_SCALE: "factor to the schedule's own rate",
    LEARNING_RATE_MOMENTUM: "the momentum learned from the spectrum",
    LEARNING_RATE_LARGEST: "largest curvature that the learned rate goes by",
    LEARNING_RATE_SMALLEST: "smallest curvature that it goes by, the bulk left out",
    COST_SHARE: "share of wall time spent on measuring",
    COST_SECONDS: "seconds of one measurement",
    COST_HVPS: "Hessian-vector products of one measurement, counted in batches of training's size",
    COST_RESIDUAL: "relative residual of the eigenvalues, the largest",
    COST_AUDIT: "what solving again from a random start added, relative",
    COST_MEMORY: "MiB that one measurement took at its peak, beyond what was taken before",
    COST_SAMPLES: "samples that FullBS was measured on: under a share of wall time a fixed random part, which doubles",
}


def interval(tag: str) -> tuple[str, str]:
    """Names the two ends of an estimate's 95 % interval.

    Args:
        tag: The tag of an estimate, one of `WITH_INTERVAL`.

    Returns:
        The tags of the lower and of the upper end.

    Example:
        >>> interval(GAP)
        ('sharpness/gap_lower', 'sharpness/gap_upper')
    """
    return f"{tag}_lower", f"{tag}_upper"


class _Chart(NamedTuple):
    """A chart of the page: a multi-line chart if smoothed, else a margin chart."""

    title: str
    reading: str  # how to read it, in one line
    tags: tuple[str, ...]
    smoothed: bool = False


def _lines(title: str, reading: str, *tags: str) -> _Chart:
    """A multi-line chart."""
    return _Chart(title, reading, tags, smoothed=True)


#: The page, by category; those of `SHARPNESS` are shown wherever the sharpness is, the others where they have curves.
_CATEGORIES: dict[str, tuple[_Chart, ...]] = {
    "Am I at the edge?": (
        _Chart(
            "Edge ratio: the line at 1 is the edge",
            "below 1 the network is free to sharpen, at 1 the learning rate holds it back; the directional ratio "
            "settles at 1, with MiniBS above it and FullBS below",
            (EDGE_RATIO, EDGE_RATIO_DIRECTIONAL, EDGE_RATIO_FULL_BS, EDGE),
        ),
    ),
    "Sharpness": (
        _Chart(
            "Sharpness and its threshold",
            "the same in the units of the Hessian, with the limit that the learning rate sets",
            (MINI_BS, DIRECTIONAL, FULL_BS, THRESHOLD),
        ),
    ),
    "Momentum": (
        _Chart(
            "Directional sharpness and its two lines",
            "with large batches momentum lets it rise to the upper line, 2 (1 + momentum)/lr; with small ones it "
            "holds it at the lower, 2 (1 - momentum)/lr",
            (DIRECTIONAL, THRESHOLD, THRESHOLD_SMALL_BATCH),
        ),
    ),
    "Batch noise": (
        _Chart(
            "Sharpness of the current batch",
            "the very batches stepped on, one value each; they scatter around MiniBS",
            (CURRENT_BATCH, THRESHOLD),
            smoothed=True,
        ),
        _Chart("Gap: MiniBS - FullBS", "the sharpness that batch noise adds", (GAP,)),
    ),
    "Learning rate": (
        _Chart(
            "Learning rate",
            "what the steps really take, and what the rule suggests; they differ under `dry_run` alone",
            (LEARNING_RATE_APPLIED, LEARNING_RATE_SUGGESTED),
        ),
        _lines("Its scale", "the factor to the schedule's own rate", LEARNING_RATE_SCALE),
    ),
    "Learned rates": (
        _Chart(
            "Learned learning rate",
            "what the spectrum says, and what the steps take",
            (LEARNING_RATE_APPLIED, LEARNING_RATE_SUGGESTED),
        ),
        _lines("Learned momentum", "the wider the spectrum, the more", LEARNING_RATE_MOMENTUM),
        _lines("Curvature that they go by", "both ends of the spectrum", LEARNING_RATE_LARGEST, LEARNING_RATE_SMALLEST),
    ),
    "Spectrum": (
        _Chart(
            "Ends of the spectrum",
            "the largest and the smallest eigenvalue of the full batch and of one batch: batch noise widens it",
            (SPECTRUM_LARGEST, SPECTRUM_BATCH_LARGEST, SPECTRUM_SMALLEST, SPECTRUM_BATCH_SMALLEST),
            smoothed=True,
        ),
        _Chart("Sum of the eigenvalues", "the trace, most of it from few directions", (SPECTRUM_TRACE,), smoothed=True),
        _Chart("Rank", "how many directions curve at all, at least", (SPECTRUM_RANK,), smoothed=True),
        _Chart(
            "Share of negative eigenvalues",
            "how far from a minimum the loss is, and how much of that is batch noise",
            (SPECTRUM_NEGATIVE, SPECTRUM_BATCH_NEGATIVE),
        ),
    ),
    "Gradient noise": (
        _Chart(
            "Variance of the batch gradient",
            "measured over random batches, and as it follows from single samples; they agree",
            (NOISE_MEASURED, NOISE_PREDICTED),
        ),
        _Chart(
            "Noise scale",
            "batches much larger than this are hardly better; beside it the one that curvature weights",
            (NOISE_SCALE, NOISE_CURVATURE_SCALE),
            smoothed=True,
        ),
        _Chart(
            "Gradient along the top eigenvector",
            "the cosine between the two: how much of a step goes where the loss curves most",
            (NOISE_COSINE,),
            smoothed=True,
        ),
    ),
    "Weights": (
        _lines("Distance from the start", "like log t, if Hoffer et al. are right", WEIGHTS_DISTANCE),
        _lines("Angle between displacements", "90 degrees: a random walk", WEIGHTS_ANGLE),
        _lines(
            "Which law the distance follows",
            "share of its variance that each explains",
            WEIGHTS_LOG_R2,
            WEIGHTS_POWER_R2,
        ),
    ),
    "Predictions": (
        _Chart(
            "MiniBS measured against predicted",
            "what the theories make of the full batch, beside what was measured; bands are 95 % intervals",
            (MINI_BS, PREDICTION_SUBSPACE, PREDICTION_WIGNER, PREDICTION_MARCHENKO_PASTUR),
        ),
        _Chart(
            "Critical batch size",
            "above it, larger batches hardly allow a larger learning rate",
            (PREDICTION_CRITICAL_BATCH_SIZE, BATCH_SIZE),
            smoothed=True,
        ),
    ),
    "Cost": (
        _lines("Share of wall time", "what watching costs, since training began", COST_SHARE),
        _lines("Seconds per measurement", "the same, one measurement at a time", COST_SECONDS),
        _lines("Products per measurement", "the same, whatever the machine", COST_HVPS),
        _lines("Samples of FullBS", "FullBS jumps where they do: the fewer, the higher", COST_SAMPLES),
        _lines("Memory per measurement", "MiB, beyond what training takes", COST_MEMORY),
        _lines("Error of the solver", "relative, to be compared with `rel_error`", COST_RESIDUAL, COST_AUDIT),
    ),
}
SHARPNESS = frozenset({"Am I at the edge?", "Sharpness", "Batch noise", "Cost"})
MOMENTUM, LEARNING_RATE, PREDICTIONS = "Momentum", "Learning rate", "Predictions"
LEARNED_RATES, SPECTRUM_SHAPE, GRADIENT_NOISE, WEIGHTS = "Learned rates", "Spectrum", "Gradient noise", "Weights"
CATEGORIES = tuple(_CATEGORIES)
_CLOSED = {"Cost"}


def _shown(categories: Collection[str]) -> dict[str, tuple[_Chart, ...]]:
    """These categories in the page's order."""
    return {title: charts for title, charts in _CATEGORIES.items() if title in categories}


def layout(categories: Collection[str] = SHARPNESS) -> layout_pb2.Layout:
    """Builds the page: its categories, charts and tags.

    Args:
        categories: Titles of those that the run has, some of `CATEGORIES`.

    Returns:
        The layout, the same for every such run.

    Example:
        >>> [category.title for category in layout().category]
        ['Am I at the edge?', 'Sharpness', 'Batch noise', 'Cost']
    """
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=title, chart=[_message(chart) for chart in charts], closed=title in _CLOSED)
            for title, charts in _shown(categories).items()
        ]
    )


def _message(chart: _Chart) -> layout_pb2.Chart:
    """The chart as TensorBoard's message."""
    if chart.smoothed:  # here, and only here, tags are regular expressions, matched as prefixes
        lines = layout_pb2.MultilineChartContent(tag=[f"{re.escape(tag)}$" for tag in chart.tags])
        return layout_pb2.Chart(title=chart.title, multiline=lines)
    ends = (interval(tag) if tag in WITH_INTERVAL else (tag, tag) for tag in chart.tags)
    series = [
        layout_pb2.MarginChartContent.Series(value=tag, lower=lower, upper=upper)
        for tag, (lower, upper) in zip(chart.tags, ends, strict=True)
    ]
    return layout_pb2.Chart(title=chart.title, margin=layout_pb2.MarginChartContent(series=series))


def write_page(
    experiment: Any, shown: Collection[str], own: Collection[str] = SHARPNESS, notes: Sequence[str] = ()
) -> None:
    """Writes all that a callback's scalars are read with: the page of the whole run, and a text card of its own.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it is TensorBoard's `SummaryWriter`.
        shown: Titles of the categories that the run has.
        own: Those that the callback fills.
        notes: Facts of the run, one line each.

    Example:
        >>> write_page(object(), SHARPNESS)  # not TensorBoard: nothing happens
    """
    write_layout(experiment, shown)
    write_guide(experiment, notes, own)


def write_layout(experiment: Any, categories: Collection[str] = SHARPNESS) -> None:
    """Writes the page into a run; once a run is enough.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it is TensorBoard's `SummaryWriter`.
        categories: Titles of those that the run has.

    Example:
        >>> write_layout(object())  # not TensorBoard: nothing happens
    """
    # `SummaryWriter.add_custom_scalars` is public, but allows one margin series a chart.
    writer = getattr(experiment, "_get_file_writer", lambda: None)()
    if writer is None:  # also where Lightning hands out a dummy, on all processes but the first
        return
    page = layout(categories)
    text = TensorProto(dtype="DT_STRING", string_val=[page.SerializeToString()], tensor_shape=TensorShapeProto())
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME))
    writer.add_summary(Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=text, metadata=plugin)]))


def write_guide(experiment: Any, notes: Sequence[str], categories: Collection[str] = SHARPNESS) -> None:
    """Writes the text card: how to read each chart, what holds for this run, and what each tag is.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_text`.
        notes: Facts of the run, one line each, such as "FullBS: fixed random subset of 8,192 of 50,000 samples".
        categories: Titles of the categories that it explains; the first gives the card its name, `sharpness/guide`.

    Example:
        >>> write_guide(object(), ["batch size 16"])  # not TensorBoard: nothing happens
    """
    charts = [chart for charts in _shown(categories).values() for chart in charts]
    kinds = list(dict.fromkeys(tag.split("/")[0] for chart in charts for tag in chart.tags))
    lines = [
        "**This run**\n" if notes else "",
        *(f"- {note}" for note in notes),
        "\n**The charts of the *Custom Scalars* page**\n",
        *(f"- *{chart.title}*: {chart.reading}." for chart in charts),
        "\n**The tags**\n",
        *(f"- `{tag}`: {text}." for tag, text in DESCRIPTIONS.items() if tag.split("/")[0] in kinds),
    ]
    _call(experiment, "add_text", f"{kinds[0]}/guide", "\n".join(lines), 0)


def write_histogram(experiment: Any, values: Any, step: int, *, tag: str = LAMBDA_MAX) -> None:
    """Writes a histogram, if nothing else is said of the largest eigenvalues of the sampled mini-batches.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_histogram`.
        values: Shape `(K,)`, a tensor or an array.
        step: Position on the x-axis, the one of the scalars.
        tag: Its name.

    Example:
        >>> write_histogram(object(), [5.1, 5.8], step=0)  # not TensorBoard: nothing happens
    """
    _call(experiment, "add_histogram", tag, values, step)


def trusted(tag: str) -> str:
    """Names the flag of a prediction.

    Args:
        tag: The tag of a predicted MiniBS.

    Returns:
        The tag that is 1 where the prediction is to be trusted, else 0.

    Example:
        >>> trusted(PREDICTION_WIGNER)
        'prediction/wigner_trusted'
    """
    return f"{tag}_trusted"


def _call(experiment: Any, method: str, *args: Any) -> None:
    """Calls the method where there is one."""
    getattr(experiment, method, lambda *_: None)(*args)
