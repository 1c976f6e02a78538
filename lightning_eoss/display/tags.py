"""The one table: every tag with its words, every chart with its tags, and how to read it.

A scalar is a row of the first part: `_estimate` where both ends of its interval are logged beside it. A chart is a row
of the second part, under its category; what no chart shows is in `UNDRAWN`, and a test finds what is in neither.
The page, its text cards and the ends of intervals follow from here; the README is compared. A package with a
monitor of its own adds to the table with `declare`.

The page is a *Custom Scalars* layout, the only kind that a training run can write by itself. What TensorBoard 2.21
makes of one decides its form:

* of several layouts in one run only the last is shown: one layout, written by one owner;
* layouts of several runs merge by title: titles are constant, no learning rate or step in them;
* in a category, multi-line charts come first and margin charts follow in reverse: no category has two margin charts;
* multi-line charts smooth by default, margin charts never do: what is compared with a limit is on a margin chart, where
  a series without an interval is its own lower and upper end;
* a margin series needs its three tags at identical steps, but series may differ: FullBS may be measured more rarely.
"""

from typing import NamedTuple

DESCRIPTIONS: dict[str, str] = {}  # what each scalar is, in one line
WITH_INTERVAL: set[str] = set()  # estimates, logged together with the two ends of their interval


def _tag(name: str, words: str) -> str:
    """A scalar."""
    DESCRIPTIONS[name] = words
    return name


def _estimate(name: str, words: str) -> str:
    """A scalar that has an interval."""
    WITH_INTERVAL.add(name)
    return _tag(name, words)


# ---- scalars, in the order of the cards ------------------------------------------------------------------------------

MINI_BS = _estimate(
    "sharpness/MiniBS",
    "mini-batch sharpness: mean largest Hessian eigenvalue over random batches as training draws them",
)
FULL_BS = _tag("sharpness/FullBS", "full-batch sharpness: largest Hessian eigenvalue of the training set's loss")
CURRENT_BATCH = _tag("sharpness/current_batch", "sharpness of the batch about to be stepped on")
DIRECTIONAL = _estimate(
    "sharpness/directional", "directional sharpness: mean curvature along each batch's own gradient, E[g'Hg / g'g]"
)
GAP = _estimate("sharpness/gap", "MiniBS - FullBS")
BATCH_SIZE = _tag(
    "sharpness/batch_size", "the b of MiniBS(b): samples of a step, the mean where a sampler's batches differ"
)
THRESHOLD = _tag("sharpness/threshold", "the largest stable sharpness, where one number says it: 2/lr for plain SGD")
THRESHOLD_SMALL_BATCH = _tag(
    "sharpness/threshold_small_batch",
    "where momentum holds directional sharpness under small batches: 2 (1 - momentum)/lr",
)
EDGE_RATIO = _estimate("sharpness/edge_ratio", "MiniBS in units of the optimizer's stability limits; 1 is the edge")
EDGE_RATIO_FULL_BS = _tag("sharpness/edge_ratio_FullBS", "FullBS in the same units")
EDGE_RATIO_DIRECTIONAL = _tag(
    "sharpness/edge_ratio_directional", "directional sharpness in the same units; the phase is judged on it"
)
EDGE = _tag("sharpness/edge", "the constant 1")
PHASE = _tag("sharpness/phase", "0 sharpening, 1 at the edge, 2 beyond it, 3 catapult; over the last five measurements")
PRECONDITIONER_SMALLEST = _tag(
    "sharpness/preconditioner_smallest", "smallest implied curvature of an adaptive optimizer, sqrt(v) + eps for Adam"
)
PRECONDITIONER_MEDIAN = _tag("sharpness/preconditioner_median", "its median over the parameters")
PRECONDITIONER_LARGEST = _tag("sharpness/preconditioner_largest", "its largest")
EPS_SHARE = _tag("sharpness/eps_share", "share of parameters where eps outweighs it; the square-root rule wants few")
PREDICTION_SUBSPACE = _estimate(
    "prediction/subspace", "MiniBS predicted from the full batch's outliers; `_trusted` is 0 where it should not be"
)
PREDICTION_WIGNER = _estimate(
    "prediction/wigner", "MiniBS by Theorem 4 of Granziol et al., batch noise taken for homogeneous"
)
PREDICTION_MARCHENKO_PASTUR = _estimate(
    "prediction/marchenko_pastur", "MiniBS by their Theorem 7, corrected, the bulk taken for flat"
)
PREDICTION_OVERLAP = _tag(
    "prediction/overlap", "their Theorem 10: squared cosine between a batch's top eigenvector and the full batch's"
)
PREDICTION_VARIANCE = _estimate(
    "prediction/variance", "variance of the per-sample Hessian, P sigma^2 = E|H_i - H|^2 / P"
)
PREDICTION_RANK = _estimate("prediction/rank", "rank of the full batch's Hessian, at least")
PREDICTION_CRITICAL_BATCH_SIZE = _estimate(
    "prediction/critical_batch_size",
    "batch size at which MiniBS is twice FullBS: larger ones allow hardly more learning rate",
)
SPECTRUM_TRACE = _estimate("spectrum/trace", "sum of the full batch's Hessian eigenvalues")
SPECTRUM_RANK = _estimate("spectrum/rank", "how many of them are not zero, at least")
SPECTRUM_ZEROS = _estimate("spectrum/mass_at_origin", "share of them that is zero, at most")
SPECTRUM_NEGATIVE = _estimate("spectrum/negative_mass", "share of them below zero")
SPECTRUM_LARGEST = _tag("spectrum/largest", "the largest of them")
SPECTRUM_SMALLEST = _tag("spectrum/smallest", "the smallest of them")
SPECTRUM_BATCH_LARGEST = _tag("spectrum/batch_largest", "largest Hessian eigenvalue of one random batch")
SPECTRUM_BATCH_SMALLEST = _tag("spectrum/batch_smallest", "its smallest")
SPECTRUM_BATCH_NEGATIVE = _estimate("spectrum/batch_negative_mass", "share of its eigenvalues below zero")
SPECTRUM_SECONDS = _tag("spectrum/seconds", "seconds that the densities took")
NOISE_TRACE = _estimate("gradient_noise/trace", "variance of a single sample's gradient, the trace of its covariance C")
NOISE_PREDICTED = _estimate(
    "gradient_noise/predicted_variance",
    "variance of the batch gradient that follows from it, (n - b) / (b (n - 1)) tr C",
)
NOISE_MEASURED = _estimate("gradient_noise/measured_variance", "variance of the batch gradient over random batches")
NOISE_SCALE = _estimate(
    "gradient_noise/scale", "simple noise scale, tr C / |g|^2: batches much larger than that are hardly better"
)
NOISE_CURVATURE_SCALE = _estimate("gradient_noise/curvature_scale", "the same weighted by curvature, tr HC / g'Hg")
NOISE_NORM = _tag("gradient_noise/gradient_norm_squared", "squared norm of the full batch's gradient")
NOISE_COSINE = _tag(
    "gradient_noise/cosine", "cosine between the full batch's gradient and its Hessian's top eigenvector, without sign"
)
NOISE_SECONDS = _tag("gradient_noise/seconds", "seconds that the measurement took")
WEIGHTS_DISTANCE = _tag("weights/distance", "distance of the weights from where training began")
WEIGHTS_ANGLE = _tag("weights/angle", "angle between successive displacements, in degrees")
WEIGHTS_LOG_SLOPE = _tag("weights/log_slope", "c of the law a + c log t for the distance")
WEIGHTS_LOG_R2 = _tag("weights/log_r2", "share of the distance's variance that the logarithmic law explains")
WEIGHTS_POWER_EXPONENT = _tag("weights/power_exponent", "exponent of the power law for the distance")
WEIGHTS_POWER_R2 = _tag("weights/power_r2", "share of the distance's variance that the power law explains")
LEARNING_RATE_APPLIED = _tag("learning_rate/applied", "the rate that the step really takes (first parameter group)")
LEARNING_RATE_SUGGESTED = _tag(
    "learning_rate/suggested", "the rate that the rule would have it take; another one under `dry_run` alone"
)
LEARNING_RATE_SCALE = _tag("learning_rate/scale", "factor to the schedule's own rate")
LEARNING_RATE_MOMENTUM = _tag("learning_rate/momentum", "the momentum learned from the spectrum")
LEARNING_RATE_LARGEST = _tag("learning_rate/largest", "largest curvature that the learned rate goes by")
LEARNING_RATE_SMALLEST = _tag("learning_rate/smallest", "smallest curvature that it goes by, the bulk left out")
COST_SHARE = _tag("cost/share", "share of wall time spent on measuring")
COST_SECONDS = _tag("cost/seconds", "seconds of one measurement")
COST_HVPS = _tag("cost/hvps", "Hessian-vector products of one measurement, counted in batches of training's size")
COST_RESIDUAL = _tag("cost/residual", "relative residual of the eigenvalues, the largest")
COST_AUDIT = _tag("cost/audit", "what solving again from a random start added, relative")
COST_MEMORY = _tag("cost/memory", "MiB that one measurement took at its peak, beyond what was taken before")
COST_SAMPLES = _tag(
    "cost/full_batch_samples",
    "samples that FullBS was measured on: under a share of wall time a fixed random part, which doubles",
)

# What a sharpness is called in units of the optimizer's limits.
RATIOS = {MINI_BS: EDGE_RATIO, DIRECTIONAL: EDGE_RATIO_DIRECTIONAL, FULL_BS: EDGE_RATIO_FULL_BS}

# ---- what is written beside them -------------------------------------------------------------------------------------

SPECTRUM = "spectrum/density"  # a figure
NOISE_CURVE = "gradient_noise/variance_against_batch_size"  # a figure
LAMBDA_MAX = "sharpness/lambda_max"  # a histogram
PRECONDITIONER = "sharpness/log10_preconditioner"  # a histogram
GUIDE = "sharpness/guide"  # a text card; other callbacks' are named after their tags


# ---- charts, in the order of the page --------------------------------------------------------------------------------


class Chart(NamedTuple):
    """A chart of the page."""

    reading: str  # how to read it, in one line
    tags: list[str]  # four at most: curves of one run differ by their markers alone


class Lines(Chart):
    """A multi-line chart, which smooths its curves."""


class Bands(Chart):
    """A margin chart, which shows curves as they are, with their intervals."""


MOMENTUM, LEARNING_RATE, PREDICTIONS, COST = "Momentum", "Learning rate", "Predictions", "Cost"
LEARNED_RATES, SPECTRUM_SHAPE, GRADIENT_NOISE, WEIGHTS = "Learned rates", "Spectrum", "Gradient noise", "Weights"

CATEGORIES: dict[str, dict[str, Chart]] = {}  # what the page shows, by the titles of categories and charts
CATEGORIES["Am I at the edge?"] = {
    "Edge ratio: the line at 1 is the edge": Bands(
        "below 1 the network is free to sharpen, at 1 the learning rate holds it back; the directional ratio "
        "settles at 1, with MiniBS above it and FullBS below",
        [EDGE_RATIO, EDGE_RATIO_DIRECTIONAL, EDGE_RATIO_FULL_BS, EDGE],
    ),
}
CATEGORIES["Sharpness"] = {
    "Sharpness and its threshold": Bands(
        "the same in the units of the Hessian, with the limit that the learning rate sets",
        [MINI_BS, DIRECTIONAL, FULL_BS, THRESHOLD],
    ),
}
CATEGORIES[MOMENTUM] = {
    "Directional sharpness and its two lines": Bands(
        "with large batches momentum lets it rise to the upper line, 2 (1 + momentum)/lr; with small ones it "
        "holds it at the lower, 2 (1 - momentum)/lr",
        [DIRECTIONAL, THRESHOLD, THRESHOLD_SMALL_BATCH],
    ),
}
CATEGORIES["Batch noise"] = {
    "Sharpness of the current batch": Lines(
        "the very batches stepped on, one value each; they scatter around MiniBS", [CURRENT_BATCH, THRESHOLD]
    ),
    "Gap: MiniBS - FullBS": Bands("the sharpness that batch noise adds", [GAP]),
}
CATEGORIES[LEARNING_RATE] = {
    "Learning rate": Bands(
        "what the steps really take, and what the rule suggests; they differ under `dry_run` alone",
        [LEARNING_RATE_APPLIED, LEARNING_RATE_SUGGESTED],
    ),
    "Its scale": Lines("the factor to the schedule's own rate", [LEARNING_RATE_SCALE]),
}
CATEGORIES[LEARNED_RATES] = {
    "Learned learning rate": Bands(
        "what the spectrum says, and what the steps take", [LEARNING_RATE_APPLIED, LEARNING_RATE_SUGGESTED]
    ),
    "Learned momentum": Lines("the wider the spectrum, the more", [LEARNING_RATE_MOMENTUM]),
    "Curvature that they go by": Lines("both ends of the spectrum", [LEARNING_RATE_LARGEST, LEARNING_RATE_SMALLEST]),
}
CATEGORIES[SPECTRUM_SHAPE] = {
    "Ends of the spectrum": Lines(
        "the largest and the smallest eigenvalue of the full batch and of one batch: batch noise widens it",
        [SPECTRUM_LARGEST, SPECTRUM_BATCH_LARGEST, SPECTRUM_SMALLEST, SPECTRUM_BATCH_SMALLEST],
    ),
    "Sum of the eigenvalues": Lines("the trace, most of it from few directions", [SPECTRUM_TRACE]),
    "Rank": Lines("how many directions curve at all, at least", [SPECTRUM_RANK]),
    "Share of negative eigenvalues": Bands(
        "how far from a minimum the loss is, and how much of that is batch noise",
        [SPECTRUM_NEGATIVE, SPECTRUM_BATCH_NEGATIVE],
    ),
}
CATEGORIES[GRADIENT_NOISE] = {
    "Variance of the batch gradient": Bands(
        "measured over random batches, and as it follows from single samples; they agree",
        [NOISE_MEASURED, NOISE_PREDICTED],
    ),
    "Noise scale": Lines(
        "batches much larger than this are hardly better; beside it the one that curvature weights",
        [NOISE_SCALE, NOISE_CURVATURE_SCALE],
    ),
    "Gradient along the top eigenvector": Lines(
        "the cosine between the two: how much of a step goes where the loss curves most", [NOISE_COSINE]
    ),
}
CATEGORIES[WEIGHTS] = {
    "Distance from the start": Lines("like log t, if Hoffer et al. are right", [WEIGHTS_DISTANCE]),
    "Angle between displacements": Lines("90 degrees: a random walk", [WEIGHTS_ANGLE]),
    "Which law the distance follows": Lines(
        "share of its variance that each explains", [WEIGHTS_LOG_R2, WEIGHTS_POWER_R2]
    ),
}
CATEGORIES[PREDICTIONS] = {
    "MiniBS measured against predicted": Bands(
        "what the theories make of the full batch, beside what was measured; bands are 95 % intervals",
        [MINI_BS, PREDICTION_SUBSPACE, PREDICTION_WIGNER, PREDICTION_MARCHENKO_PASTUR],
    ),
    "Critical batch size": Lines(
        "above it, larger batches hardly allow a larger learning rate", [PREDICTION_CRITICAL_BATCH_SIZE, BATCH_SIZE]
    ),
}
CATEGORIES[COST] = {
    "Share of wall time": Lines("what watching costs, since training began", [COST_SHARE]),
    "Seconds per measurement": Lines("the same, one measurement at a time", [COST_SECONDS]),
    "Products per measurement": Lines("the same, whatever the machine", [COST_HVPS]),
    "Samples of FullBS": Lines("FullBS jumps where they do: the fewer, the higher", [COST_SAMPLES]),
    "Memory per measurement": Lines("MiB, beyond what training takes", [COST_MEMORY]),
    "Error of the solver": Lines("relative, to be compared with `rel_error`", [COST_RESIDUAL, COST_AUDIT]),
}

# Shown wherever the sharpness is, the others where they have curves.
SHARPNESS = frozenset({"Am I at the edge?", "Sharpness", "Batch noise", COST})
# What no chart shows: it is read in logs and tables, or tells little as a curve.
UNDRAWN = {
    *(PHASE, PRECONDITIONER_SMALLEST, PRECONDITIONER_MEDIAN, PRECONDITIONER_LARGEST, EPS_SHARE),
    *(PREDICTION_OVERLAP, PREDICTION_VARIANCE, PREDICTION_RANK, SPECTRUM_ZEROS, SPECTRUM_SECONDS),
    *(NOISE_TRACE, NOISE_NORM, NOISE_SECONDS, WEIGHTS_LOG_SLOPE, WEIGHTS_POWER_EXPONENT),
}


def declare(
    name: str, words: str, *, category: str, title: str, reading: str, interval: bool = False, smoothed: bool = True
) -> str:
    """Adds a scalar to the table, and draws it: for monitors outside this package.

    A category and a chart that are not there are made. A monitor shows a category that it names in its
    `dashboard_categories`. Declaring the same again changes nothing.

    Args:
        name: The tag, `kind/quantity`; the tags of one kind share a text card.
        words: What it is, in one line.
        category: Title of the category that the chart stands in.
        title: Title of the chart, the same for every run.
        reading: How to read the chart, in one line.
        interval: Whether it has an interval, to be logged under the names that `interval` gives.
        smoothed: Whether the chart smooths its curves; only one that does not shows intervals, and there may be one of
            those in a category.

    Returns:
        The tag.

    Example:
        >>> ENTROPY = declare(
        ...     "outputs/entropy",
        ...     "mean entropy of the predicted classes, in nats",
        ...     category="Outputs",
        ...     title="Entropy",
        ...     reading="it falls as the network grows sure",
        ... )
        >>> CATEGORIES["Outputs"]["Entropy"].tags
        ['outputs/entropy']
        >>> del CATEGORIES["Outputs"], DESCRIPTIONS[ENTROPY]  # an example leaves nothing behind
    """
    kind = Lines if smoothed else Bands
    chart = CATEGORIES.setdefault(category, {}).setdefault(title, kind(reading, []))
    if name not in chart.tags:
        chart.tags.append(name)
    return _estimate(name, words) if interval else _tag(name, words)


# ---- names that follow from a tag's ----------------------------------------------------------------------------------


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
