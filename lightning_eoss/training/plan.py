"""What a measurement is to be and may cost: estimates before the first one, and the cut where they exceed the limit."""

from dataclasses import dataclass, replace

from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.solver import Plan
from lightning_eoss.training.agenda import Agenda

COLD_PRODUCTS = 20  # of a value from scratch
WARM_PRODUCTS = 6  # of a mini-batch, the directional one included
USUAL_BATCHES = 40
FIRST_BATCHES = 10  # under a share of wall time: better a wide interval soon than a narrow one late
PREDICTION_PASSES = 120  # with the full batch: outliers 40, bulk 72, tail 4
GROUP_PRODUCTS = 11  # with each group of samples
MIN_GROUPS, MAX_GROUPS = 16, 1024
SIMULATION_SECONDS = 1.0  # of batches made of that many groups, on a CPU


@dataclass(frozen=True)
class Prospect:
    """What is going to be measured, and at what price."""

    plan: Plan
    costs: dict[str, float]  # expected seconds of each quantity
    warnings: list[str]  # what was cut or will be missing, sentences
    notes: list[str]  # what is going to be measured, clauses


def foreseen(
    plan: Plan,
    findings: Findings,
    agenda: Agenda,
    *,
    num_samples: int,
    num_parameters: int,
    max_seconds: float,
    uniform: bool,
    current: bool,
) -> Prospect:
    """Cuts a plan to what may be spent and says what comes of it.

    Args:
        plan: What was asked for.
        findings: What `preflight` found about the loss.
        agenda: Which quantities are wanted, and how often.
        num_samples: Samples there are.
        num_parameters: P.
        max_seconds: Of one measurement.
        uniform: Whether training draws its batches uniformly.
        current: Whether the batch at hand can be measured.

    Returns:
        The prospect.
    """
    plan, costs, cut = affordable(plan, findings, num_samples, max_seconds)
    warnings, notes = [cut] if cut else [], []
    if not current:
        costs.pop("current")
    if "prediction" in agenda.quantities and findings.reduction == "mean" and uniform:
        smaller, _, groups, seconds = predictable(plan, findings, num_samples, max_seconds)
        costs["prediction"] = seconds
        drawn = f"{smaller.full_batch_samples:,} samples and {groups:,} groups of them"
        notes.append(f"predictions from {drawn} take about {seconds:.2g} s")
    elif "prediction" in agenda.quantities:
        warnings.append(
            "the loss of a batch was not found to be a mean over its samples (BatchNorm in train mode, dropout, "
            "class weights, fewer than three samples), or the sampler is not uniform: nothing follows from the "
            "full batch for batches, so there are no predictions."
        )
    schedule, first = f"every {agenda.every_n_steps} steps", costs.pop("first")
    wanted = [quantity for quantity in agenda.quantities if quantity in costs]
    if agenda.share is not None:
        often = len(wanted) * first / agenda.share
        schedule = f"{100 * agenda.share:g} % of wall time, that is MiniBS every {often:.0f} s or so"
        costs["mini"] = first
    if not uniform:
        notes.append(
            "the sampler is not uniform: MiniBS from a copy of it, FullBS uniform over the samples, no control variate"
        )
    seconds = sum(costs[quantity] for quantity in wanted)
    return Prospect(
        plan, costs, warnings, described(plan, findings, num_samples, num_parameters, seconds, schedule) + notes
    )


def affordable(
    plan: Plan, findings: Findings, num_samples: int, max_seconds: float
) -> tuple[Plan, dict[str, float], str]:
    """Cuts a plan to what `max_seconds` allow, half for FullBS and half for the mini-batches.

    Args:
        plan: What was asked for.
        findings: The time of a product.
        num_samples: Samples there are.
        max_seconds: Of one measurement.

    Returns:
        The plan, the expected seconds of each quantity from scratch (`"first"`: of the first MiniBS), and what was cut
        in words (empty if nothing).
    """
    product = findings.seconds
    full = min(plan.full_batch_samples or num_samples, num_samples)
    dear = {
        "full": COLD_PRODUCTS * full / plan.step_size * product,
        "mini": (WARM_PRODUCTS * plan.num_batches + 2 * COLD_PRODUCTS) * product,
    }
    cuts, half = [], max_seconds / 2
    if dear["full"] > half:
        kept = max(plan.batch_size, int(full * half / dear["full"]))
        cuts.append(f"FullBS is measured on {kept:,} instead of {full:,} samples")
        plan = replace(plan, full_batch_samples=kept)
    if dear["mini"] > half:
        kept = max(2, int((half / product - 2 * COLD_PRODUCTS) / WARM_PRODUCTS))
        cuts.append(f"MiniBS over at most {kept} instead of {plan.num_batches} mini-batches")
        plan = replace(plan, num_batches=kept)
    message = (
        f"a measurement would take an estimated {sum(dear.values()):.2g} s at {product:.2g} s a product, "
        f"more than max_seconds={max_seconds:g}: "
        f"{' and '.join(cuts)}."
    )
    usual = min(plan.num_batches, USUAL_BATCHES)
    full = min(plan.full_batch_samples or num_samples, num_samples)
    costs = {
        "current": WARM_PRODUCTS * product,
        "mini": (WARM_PRODUCTS * usual + 2 * COLD_PRODUCTS) * product,
        "first": (WARM_PRODUCTS * min(plan.num_batches, FIRST_BATCHES) + 2 * COLD_PRODUCTS) * product,
        "full": COLD_PRODUCTS * full / plan.step_size * product,
    }
    return plan, costs, message if cuts else ""


def described(
    plan: Plan, findings: Findings, num_samples: int, num_parameters: int, seconds: float, schedule: str
) -> list[str]:
    """Says what is going to be measured.

    Args:
        plan: The plan, cut to what may be spent.
        findings: How the loss is made of its samples' losses.
        num_samples: Samples there are.
        num_parameters: P.
        seconds: What a full measurement is expected to take.
        schedule: When, in words.

    Returns:
        Clauses without a full stop.
    """
    full = min(plan.full_batch_samples or num_samples, num_samples)
    samples = "all" if full == num_samples else f"a fixed random subset of {full:,} of"
    parts = [
        f"MiniBS(b={plan.step_size}) over at most {plan.num_batches} mini-batches, "
        f"FullBS on {samples} {num_samples:,} samples, P = {num_parameters:,}",
        f"a full measurement takes about {seconds:.2g} s; {schedule}",
    ]
    if findings.reduction == "other":
        parts.append(
            "the loss of a batch is no mean over its samples (class weights, BatchNorm in train mode, dropout, random "
            f"augmentation), so FullBS is the top of the mean Hessian over chunks of {plan.batch_size}"
        )
    return parts


def predictable(plan: Plan, findings: Findings, num_samples: int, max_seconds: float) -> tuple[Plan, int, int, float]:
    """What predictions are made of within `max_seconds`, half for the full batch and half for small groups of samples.

    Args:
        plan: The measurement's.
        findings: The time of a product, and whether batches can be stacked: where not, single samples are too dear.
        num_samples: Samples there are.
        max_seconds: Of one prediction.

    Returns:
        The plan with the full batch cut, samples of a group, number of groups, and the expected seconds.
    """
    product, half = findings.seconds, max_seconds / 2
    full = min(plan.full_batch_samples or num_samples, num_samples)
    passes = PREDICTION_PASSES * product / plan.step_size  # seconds for each sample of the full batch
    kept = max(min(full, int(half / passes)), min(full, 4 * plan.step_size))
    size = 1 if findings.stacked else max(1, plan.step_size // 8)
    group = GROUP_PRODUCTS * product * (size / plan.step_size if findings.stacked else 0.5)
    groups = max(MIN_GROUPS, min(MAX_GROUPS, int(half / group)))
    groups = min(groups, num_samples // size)
    seconds = passes * kept + group * groups + SIMULATION_SECONDS * groups / MAX_GROUPS
    return replace(plan, full_batch_samples=kept), size, groups, seconds
