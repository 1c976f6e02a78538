"""When to measure: pure functions of a step number or of a clock.

Under a share of wall time all quantities draw on one budget. Among them it is divided by their weights, so cheap
quantities come often and dear ones seldom; what one cannot use, because training steps are too far apart for it, the
others get.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lightning_eoss import checks


@dataclass(frozen=True)
class Ledger:
    """What is known of the cost of one quantity."""

    cost: float = 0.0  # seconds that the next measurement is expected to take
    count: int = 0  # measurements so far
    spent: float = 0.0  # seconds that they took


def check_schedule(every_n_train_steps: int | None, overhead: float | None, max_seconds: float) -> None:
    """Refuses schedules that make no sense.

    Args:
        every_n_train_steps: Steps between two measurements.
        overhead: Share of the wall time.
        max_seconds: Upper limit of one measurement.

    Raises:
        TypeError: If one of the numbers is none.
        ValueError: If both schedules are given, or one of the numbers is out of its range.
    """
    if every_n_train_steps is not None and overhead is not None:
        raise ValueError(
            f"every_n_train_steps={every_n_train_steps} and overhead={overhead} are two schedules: "
            "choose one, or neither for overhead=0.05."
        )
    steps = "must be at least 1; leave it out for a share of wall time."
    checks.whole("every_n_train_steps", every_n_train_steps, 1, steps, none=True)
    share = "is a share of the wall time and must lie between 0 and 1, as 0.05 does."
    checks.number("overhead", overhead, share, above=0, below=1, none=True)
    checks.number("max_seconds", max_seconds, "must be positive: it is the upper limit of one measurement.", above=0)


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


def claims(ledgers: Mapping[str, Ledger], weights: Mapping[str, float]) -> dict[str, float]:
    """What each quantity will have been given by its next measurement, over its weight: the lowest goes first.

    Reckoned at the present cost: the first measurement starts from nothing, and is not held against it.

    Args:
        ledgers: What each quantity costs.
        weights: Its part of the budget, relative to others; 1 where nothing else is said.

    Returns:
        Seconds.

    Example:
        >>> claims({"cheap": Ledger(cost=1.0, count=1), "dear": Ledger(cost=3.0)}, {"dear": 2.0})
        {'cheap': 2.0, 'dear': 1.5}
    """
    return {name: (each.count + 1) * each.cost / weights.get(name, 1.0) for name, each in ledgers.items()}


def due_by_share(
    ledgers: Mapping[str, Ledger],
    spent: float,
    elapsed: float,
    share: float,
    *,
    eager: float = 0.0,
    weights: Mapping[str, float] = MappingProxyType({}),
    others: Iterable[tuple[float, float]] = (),
) -> frozenset[str]:
    r"""The quantities that a share of the wall time pays for now.

    Something is measured as soon as

    .. math:: \text{spent} + \text{cost} \le \text{share} \cdot (\text{elapsed} + \text{cost}),

    both sides as they will be when the measurement ends. Just after the n-th of equal measurements their share is then
    just below `share`, and just before the next one n / (n + 1) of it.

    The quantity with the lowest of `claims` comes first. While that one cannot be paid, no cheaper one takes its turn.
    A quantity brings along those before it in `ledgers`: differences (MiniBS - FullBS) need both at one step.

    Args:
        ledgers: What each quantity costs, in the order in which they bring one another along.
        spent: Seconds spent on measuring since fit began.
        elapsed: Seconds since fit began, measurements included.
        share: Of the wall time, for all of them.
        eager: Everything is due if all of it is expected to cost less than this, in seconds; for the first step.
        weights: See `claims`.
        others: Claims and costs of what draws on the same budget elsewhere, and is saved up for in its turn.

    Returns:
        What to measure now.

    Example:
        >>> ledgers = {"cheap": Ledger(cost=1.0, count=1), "dear": Ledger(cost=3.0, count=1)}
        >>> [sorted(due_by_share(ledgers, 4.0, elapsed, 0.05)) for elapsed in (98.0, 99.0, 156.0)]
        [[], ['cheap'], ['cheap', 'dear']]
    """
    if sum(ledger.cost for ledger in ledgers.values()) < eager:
        return frozenset(ledgers)
    names, due, kept = list(ledgers), frozenset[str](), 0.0
    own = [(claim, 0.0, names.index(name) + 1) for name, claim in claims(ledgers, weights).items()]
    for _, elsewhere, end in sorted([*own, *((claim, cost, 0) for claim, cost in others)], key=lambda each: each[0]):
        wanted, kept = due.union(names[:end]), kept + elsewhere
        cost = kept + sum(ledgers[each].cost for each in wanted)
        if spent + cost > share * (elapsed + cost):
            break
        due = wanted
    return due


def charged(ledger: Ledger, seconds: float) -> Ledger:
    """Enters a measurement.

    The first one starts from nothing and says little about the next, so the second replaces it as the expected cost.

    Args:
        ledger: The ledger before.
        seconds: What the measurement took.

    Returns:
        The ledger after; the expected cost follows the newest measurements with a memory of about two.

    Example:
        >>> charged(Ledger(cost=4.0, count=3, spent=15.0), 2.0)
        Ledger(cost=3.0, count=4, spent=17.0)
    """
    cost = seconds if ledger.count < 2 else (ledger.cost + seconds) / 2
    return Ledger(cost, ledger.count + 1, ledger.spent + seconds)
