"""What a measurement is to be and may cost: estimates before the first one, and the cut where they exceed the limit."""

from dataclasses import dataclass, field, replace

from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.solver import Plan
from lightning_eoss.measurements.sharpness import SharpnessMeasurement
from lightning_eoss.training.schedule import WEIGHTS, Agenda

COLD_PRODUCTS = 20  # of a value from scratch
WARM_PRODUCTS = 6  # of a mini-batch, the directional one included, and of the full batch
USUAL_BATCHES = 40
# Under a share of wall time: better a wide interval soon than a narrow one late. A look begins with so many
# mini-batches, FullBS on so many steps' samples, and grows while it takes no more than this part of all earlier ones.
FEWEST_BATCHES, FEWEST_STEPS = 5, 4
GROWTH = {"mini": 1 / 10, "full": 1 / 4}
PREDICTION_PASSES = 120  # with the full batch: outliers 40, bulk 72, tail 4
GROUP_PRODUCTS = 11  # with each group of samples
MIN_GROUPS, MAX_GROUPS = 16, 1024
VARIANCE_SAMPLES = 160  # or groups of them, that are loaded for the variance of their Hessians
SIMULATION_SECONDS = 1.0  # of batches made of that many groups, on a CPU


@dataclass(frozen=True)
class Prospect:
    """What is going to be measured, and at what price."""

    plan: Plan
    costs: dict[str, float]  # expected seconds of each quantity
    notes: list[str]  # what is going to be measured, clauses
    warnings: list[str] = field(default_factory=list)  # what was cut or will be missing, sentences


def foreseen(
    plan: Plan,
    findings: Findings,
    agenda: Agenda,
    objective: Objective,
    *,
    max_seconds: float,
    uniform: bool,
    current: bool,
) -> Prospect:
    """Cuts a plan to what may be spent and says what comes of it."""
    num_samples = objective.source.num_samples
    plan, cut = affordable(plan, findings, num_samples, max_seconds)
    look = look_of(plan, findings, num_samples, agenda)
    costs, warnings, notes = expected(look, findings, num_samples), [cut] if cut else [], []
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
    schedule = f"every {agenda.every_n_steps} steps"
    wanted = [quantity for quantity in agenda.quantities if quantity in costs]
    if agenda.share is not None:
        often = sum(WEIGHTS.get(quantity, 1.0) for quantity in wanted) / WEIGHTS["mini"] * costs["mini"] / agenda.share
        schedule = (
            f"{100 * agenda.share:g} % of wall time, that is MiniBS every {often:.0f} s or so, at first over "
            f"{look.num_batches} mini-batches and FullBS on {look.first_samples:,} samples (`cost/full_batch_samples`)"
        )
    if not uniform:
        notes.append(
            "the sampler is not uniform: MiniBS from a copy of it, FullBS uniform over the samples, no control variate"
        )
    most = expected(plan, findings, num_samples)
    seconds = sum(most.get(quantity, costs[quantity]) for quantity in wanted)
    said = described(plan, findings, num_samples, objective.num_parameters, seconds, schedule)
    return Prospect(plan, costs, said + notes, warnings)


def pass_seconds(plan: Plan, findings: Findings, samples: float, passes: float) -> float:
    """Seconds of products with so many samples, loaded once while they fit memory, beyond it for each product."""
    beyond = max(0.0, samples - plan.memory_bytes / max(findings.sample_bytes, 1.0))
    loads = samples + beyond * (passes - 1)
    return passes * samples / plan.step_size * findings.seconds + loads * findings.loading


def mini_seconds(plan: Plan, findings: Findings, count: float) -> float:
    """Seconds of so many mini-batches, which are new each time, and of two audits."""
    return (WARM_PRODUCTS * count + 2 * COLD_PRODUCTS) * findings.seconds + count * plan.step_size * findings.loading


def full_samples(plan: Plan, num_samples: int) -> int:
    """Samples that FullBS is measured on."""
    return min(plan.first_samples or num_samples, plan.full_batch_samples or num_samples, num_samples)


def cut_full(plan: Plan, num_samples: int, dear: float, limit: float) -> tuple[Plan, float]:
    """The full batch, all of which takes `dear` seconds, cut to a limit; and what is left of the seconds."""
    full = full_samples(plan, num_samples)
    kept = max(plan.step_size, round(full * min(1.0, max(0.0, limit) / dear)))
    return replace(plan, full_batch_samples=kept), dear * kept / full


def expected(plan: Plan, findings: Findings, num_samples: int, *, warm: bool = False) -> dict[str, float]:
    """Seconds of each quantity, that of FullBS from scratch unless `warm`."""
    passes = WARM_PRODUCTS if warm else COLD_PRODUCTS
    return {
        "current": WARM_PRODUCTS * findings.seconds,  # training has loaded it
        "mini": mini_seconds(plan, findings, min(plan.num_batches, USUAL_BATCHES)),
        "full": pass_seconds(plan, findings, full_samples(plan, num_samples), passes),
    }


def look_of(plan: Plan, findings: Findings, num_samples: int, agenda: Agenda) -> Plan:
    """The plan of the next look: under a share of wall time cut to what has been paid for."""
    if agenda.share is None:
        return plan
    paid = {quantity: part * agenda.ledgers[quantity].spent for quantity, part in GROWTH.items()}
    each = mini_seconds(plan, findings, 1) - mini_seconds(plan, findings, 0)
    batches = int((paid["mini"] - mini_seconds(plan, findings, 0)) / each)
    most = full_samples(plan, num_samples)
    samples = FEWEST_STEPS * plan.step_size
    while samples < most and pass_seconds(plan, findings, 2 * samples, WARM_PRODUCTS) <= paid["full"]:
        samples *= 2
    count = min(max(batches, FEWEST_BATCHES), plan.num_batches)
    return replace(plan, num_batches=count, first_samples=min(samples, most))


def settle(
    plan: Plan,
    findings: Findings,
    agenda: Agenda,
    measured: SharpnessMeasurement,
    num_samples: int,
    due: frozenset[str],
    seconds: float,
) -> None:
    """Shares the seconds of a look out, and says what the next one is expected to take.

    To FullBS by its products and its loading, among the others as they were expected.
    """

    def next_look() -> dict[str, float]:
        warm = agenda.ledgers["full"].count > 0
        return expected(look_of(plan, findings, num_samples, agenda), findings, num_samples, warm=warm)

    before, passed = next_look(), measured.full_passes * measured.num_samples / measured.batch_size
    full = passed * findings.seconds + measured.num_samples * findings.loading
    others = len(measured.mini_batch.values) * measured.batch_size * findings.loading
    others += (measured.hvps - passed) * findings.seconds
    part = full / max(full + others, 1e-30)
    cheap = {quantity: agenda.ledgers[quantity].cost for quantity in due & {"current", "mini"}}
    for quantity, cost in cheap.items():
        agenda.charge(quantity, seconds * (1 - part) * cost / max(sum(cheap.values()), 1e-30))
    if "full" in due:
        agenda.charge("full", seconds * part)
    agenda.rescale(before, next_look())


def affordable(plan: Plan, findings: Findings, num_samples: int, max_seconds: float) -> tuple[Plan, str]:
    """Cuts a plan to `max_seconds`, half for FullBS, half for the mini-batches, and what the other leaves."""
    full, half, cuts = full_samples(plan, num_samples), max_seconds / 2, []
    dear = {
        "full": pass_seconds(plan, findings, full, COLD_PRODUCTS),
        "mini": mini_seconds(plan, findings, plan.num_batches),
    }
    audits = mini_seconds(plan, findings, 0)
    rooms = {"full": max(half, max_seconds - dear["mini"]), "mini": max(half, max_seconds - dear["full"])}
    if dear["full"] > rooms["full"]:
        kept = max(plan.batch_size, round(full * rooms["full"] / dear["full"]))
        cuts.append(f"FullBS is measured on {kept:,} instead of {full:,} samples")
        plan = replace(plan, full_batch_samples=kept)
    if dear["mini"] > rooms["mini"]:
        kept = max(2, int((rooms["mini"] - audits) / (dear["mini"] - audits) * plan.num_batches))
        cuts.append(f"MiniBS over at most {kept} instead of {plan.num_batches} mini-batches")
        plan = replace(plan, num_batches=kept)
    message = (
        f"a measurement would take an estimated {sum(dear.values()):.2g} s at {findings.seconds:.2g} s a product and "
        f"{findings.loading:.2g} s to load a sample, more than max_seconds={max_seconds:g}: {' and '.join(cuts)}."
    )
    return plan, message if cuts else ""


def described(
    plan: Plan, findings: Findings, num_samples: int, num_parameters: int, seconds: float, schedule: str
) -> list[str]:
    """Says what is going to be measured."""
    full = full_samples(plan, num_samples)
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
    """What predictions are made of within `max_seconds`, half for the full batch, half for groups of samples."""
    product, half, plan = findings.seconds, max_seconds / 2, replace(plan, first_samples=None)
    full = full_samples(plan, num_samples)
    kept = round(full * min(1.0, half / pass_seconds(plan, findings, full, PREDICTION_PASSES)))
    kept = max(kept, min(full, 4 * plan.step_size))
    size = 1 if findings.stacked else max(1, plan.step_size // 8)
    group = GROUP_PRODUCTS * product * (size / plan.step_size if findings.stacked else 0.5) + size * findings.loading
    variance = VARIANCE_SAMPLES * size * findings.loading
    groups = max(MIN_GROUPS, min(MAX_GROUPS, int((half - variance) / group)))
    groups = min(groups, num_samples // size)
    seconds = pass_seconds(plan, findings, kept, PREDICTION_PASSES) + variance
    seconds += group * groups + SIMULATION_SECONDS * groups / MAX_GROUPS
    return replace(plan, full_batch_samples=kept), size, groups, seconds
