"""When to measure: pure functions of a step number or of a clock.

Every quantity keeps a ledger of what it has cost. Under a share of wall time it is measured again as soon as its own
part of the share pays for it, so cheap quantities come often and dear ones seldom, and the sum of all stays at the
share.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Ledger:
    """What one quantity has cost since fit began, and what it is expected to cost next."""

    spent: float = 0.0  # seconds
    cost: float = 0.0  # seconds of the next measurement
    count: int = 0  # measurements so far


def due_by_step(step: int, every_n_steps: int) -> bool:
    """Whether a measurement falls on this optimizer step: 0, n, 2n, ...

    Args:
        step: Optimizer steps done.
        every_n_steps: The distance n.

    Returns:
        Whether to measure before the next step.

    Example:
        >>> [step for step in range(7) if due_by_step(step, 3)]
        [0, 3, 6]
    """
    return step % every_n_steps == 0


def due_by_share(ledger: Ledger, elapsed: float, share: float, *, free_first: float = 0.0) -> bool:
    r"""Whether a share of the wall time pays for one more measurement.

    .. math:: \text{spent} + \text{cost} \le \text{share} \cdot (\text{elapsed} + \text{cost}),

    both sides as they will be when the measurement ends. Just after the n-th of equal measurements their share is then
    just below `share`, and just before the next one n / (n + 1) of it.

    Args:
        ledger: What the quantity has cost.
        elapsed: Seconds since fit began, measurements included.
        share: The quantity's part of the wall time.
        free_first: The first measurement does not wait where it is expected to cost less than this, in seconds.

    Returns:
        Whether to measure now.

    Example:
        >>> due_by_share(Ledger(spent=0.0, cost=1.0, count=1), elapsed=18.0, share=0.05)
        False
        >>> due_by_share(Ledger(spent=0.0, cost=1.0, count=1), elapsed=19.0, share=0.05)
        True
    """
    if ledger.count == 0 and ledger.cost < free_first:
        return True
    return ledger.spent + ledger.cost <= share * (elapsed + ledger.cost)


def charged(ledger: Ledger, seconds: float) -> Ledger:
    """Enters a measurement.

    The first one starts from nothing and says little about the next, so the second replaces it as the expected cost.

    Args:
        ledger: The ledger before.
        seconds: What the measurement took.

    Returns:
        The ledger after; the expected cost follows the newest measurements with a memory of about two.

    Example:
        >>> charged(Ledger(spent=1.0, cost=4.0, count=3), 2.0)
        Ledger(spent=3.0, cost=3.0, count=4)
    """
    cost = seconds if ledger.count < 2 else (ledger.cost + seconds) / 2
    return replace(ledger, spent=ledger.spent + seconds, cost=cost, count=ledger.count + 1)
