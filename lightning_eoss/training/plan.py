"""What a measurement is to be and may cost: estimates before the first one, and the cut where they exceed the limit."""

from dataclasses import replace

from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.solver import Plan

COLD_PRODUCTS = 20  # of a value from scratch
WARM_PRODUCTS = 6  # of a mini-batch, the directional one included
USUAL_BATCHES = 40


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
        The plan, the expected seconds of each quantity from scratch, and what was cut in words (empty if nothing).
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
        "full": COLD_PRODUCTS * full / plan.step_size * product,
    }
    return plan, costs, message if cuts else ""


def described(plan: Plan, num_samples: int, num_parameters: int, seconds: float, schedule: str) -> list[str]:
    """Says what is going to be measured.

    Args:
        plan: The plan, cut to what may be spent.
        num_samples: Samples there are.
        num_parameters: P.
        seconds: What a full measurement is expected to take.
        schedule: When, in words.

    Returns:
        Clauses without a full stop.
    """
    full = min(plan.full_batch_samples or num_samples, num_samples)
    samples = "all" if full == num_samples else f"a fixed random subset of {full:,} of"
    return [
        f"MiniBS(b={plan.step_size}) over at most {plan.num_batches} mini-batches, "
        f"FullBS on {samples} {num_samples:,} samples, P = {num_parameters:,}",
        f"a full measurement takes about {seconds:.2g} s; {schedule}",
    ]
