"""When to measure: pure functions of a step number or of a clock, and the agenda of a monitor that goes by them.

Under a share of wall time all quantities draw on one budget. Among them it is divided by their weights, so cheap
quantities come often and dear ones seldom; what one cannot use, because training steps are too far apart for it, the
others get.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from lightning_eoss import checks

EAGER_SECONDS = 5.0  # what is cheaper than this does not wait, the first time
WEIGHTS = {"mini": 3.0, "full": 2.0, "prediction": 2.0}  # parts of a share's budget; 1 for all else
FOREMOST = "mini"  # nothing that can be paid takes its turn before the first one
# Those of one Trainer that go by a share: the time that all of them may take is one.
_TOGETHER: WeakKeyDictionary[Any, "list[Agenda]"] = WeakKeyDictionary()


@dataclass(frozen=True)
class Ledger:
    """What is known of the cost of one quantity."""

    cost: float = 0.0  # seconds that the next measurement is expected to take
    count: int = 0  # measurements so far
    spent: float = 0.0  # seconds that they took


def check_schedule(every_n_train_steps: int | None, overhead: float | None, max_seconds: float) -> None:
    """Refuses schedules that make no sense."""
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

    Example:
        >>> [step for step in range(7) if due_by_step(step, 3)]
        [0, 3, 6]
    """
    return step % every_n_steps == 0


def claims(ledgers: Mapping[str, Ledger], weights: Mapping[str, float]) -> dict[str, float]:
    """What each quantity will have been given by its next measurement, over its weight: the lowest goes first.

    Reckoned at the present cost: the first measurement starts from nothing, and is not held against it.

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

    Example:
        >>> charged(Ledger(cost=4.0, count=3, spent=15.0), 2.0)
        Ledger(cost=3.0, count=4, spent=17.0)
    """
    cost = seconds if ledger.count < 2 else (ledger.cost + seconds) / 2
    return Ledger(cost, ledger.count + 1, ledger.spent + seconds)


@dataclass(eq=False)
class Agenda:
    """The quantities of a monitor, from cheap to dear, and when each is due."""

    quantities: tuple[str, ...]
    every_n_steps: int | None
    share: float | None  # of wall time; one of the two
    seldom: Mapping[str, int] = field(default_factory=dict)  # under steps: only every so many measurements
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    spent: float = 0.0  # seconds in hooks since fit began
    _peers: "list[Agenda]" = field(default_factory=list, repr=False)  # itself among them
    _fresh: bool = True  # nothing has been tried yet in this fit
    _last_step: int = -1  # that was tried; manual optimisation may skip steps
    _postponed: frozenset[str] = frozenset()  # to the next step, under a schedule of steps
    _asleep: float = 0.0  # seconds since fit began before which its share pays for nothing

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets all costs."""
        self.ledgers = {quantity: Ledger() for quantity in self.quantities}

    def begin(self, trainer: Any) -> None:
        """Starts a fit of a Trainer, which several monitors may share."""
        self._fresh, self._last_step, self.spent, self._peers, self._postponed = True, -1, 0.0, [self], frozenset()
        if self.share is not None:
            self._peers = _TOGETHER.setdefault(trainer, [])
            self._peers[:] = [*(each for each in self._peers if each is not self), self]

    def tried(self, step: int) -> None:
        """Notes that something was tried before this step."""
        self._fresh, self._last_step, self._asleep, self._postponed = False, step, 0.0, frozenset()

    def postpone(self, due: frozenset[str]) -> None:
        """Puts off to the next step what a schedule of steps would give only at its next turn."""
        self._postponed = due

    def expect(self, costs: Mapping[str, float]) -> None:
        """Enters estimates, in seconds, where nothing has been measured, and strikes out what has none."""
        self.ledgers = {
            quantity: ledger if ledger.count else Ledger(costs[quantity])
            for quantity, ledger in self.ledgers.items()
            if quantity in costs
        }

    def rescale(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Notes that measurements have other sizes from now on, by the seconds expected of the old and the new ones."""
        for quantity, ledger in self.ledgers.items():
            if before.get(quantity):
                self.ledgers[quantity] = replace(ledger, cost=ledger.cost * after[quantity] / before[quantity])

    @property
    def total(self) -> float:
        """Seconds that all monitors have spent that draw on the same budget."""
        return sum(peer.spent for peer in self._peers)

    @property
    def unpaid(self) -> list[str]:
        """Quantities that a share has not paid for so far."""
        return [name for name, ledger in self.ledgers.items() if self.share is not None and not ledger.count]

    def due(self, step: int, elapsed: float, begun: float = 0.0) -> frozenset[str]:
        """What to measure before the next step: the quantities whose time has come.

        `elapsed` seconds since fit began, `begun` of them in a hook that has not ended yet.
        """
        if self.every_n_steps is None:
            if elapsed < self._asleep:  # steps are many, and asking takes time
                return frozenset()
            due = self._due_by_share(elapsed, begun)
            if not due and not self._fresh and self.share:
                costs = [ledger.cost for ledger in self.ledgers.values()]
                self._asleep = min(((self.spent + cost) / self.share - cost for cost in costs), default=0.0)
            return due
        if step == self._last_step:
            return frozenset()
        every = {quantity: self.every_n_steps * self.seldom.get(quantity, 1) for quantity in self.ledgers}
        turn = frozenset(quantity for quantity, distance in every.items() if due_by_step(step, distance))
        return turn | (self._postponed & self.ledgers.keys())

    def _due_by_share(self, elapsed: float, begun: float) -> frozenset[str]:
        """What this monitor's share pays for, and the largest one among its peers for all together."""
        assert self.share is not None
        total, ledgers, eager = self.total + begun, self.ledgers, 0.0
        if self._fresh and (cheap := self._cheap(total)):
            ledgers, eager = {name: ledgers[name] for name in cheap}, math.inf
        options: dict[str, Any] = {"eager": eager, "weights": self._weights}
        others = [each for peer in self._peers if peer is not self for each in peer._claims(elapsed)]
        most = max(peer.share or 0.0 for peer in self._peers)
        due = due_by_share(ledgers, total, elapsed, most, others=others, **options)
        return due & due_by_share(ledgers, self.spent + begun, elapsed, self.share, **options)

    def _cheap(self, total: float) -> list[str]:
        """What does not wait, the first time: half of those seconds are the foremost's alone."""
        names, sums = list(self.ledgers), accumulate((each.cost for each in self.ledgers.values()), initial=total)
        free = names.index(FOREMOST) if FOREMOST in names else len(names)
        ends = enumerate(list(sums)[1:])
        return names[: sum(end < EAGER_SECONDS / (1 if place <= free else 2) for place, end in ends)]

    @property
    def _weights(self) -> dict[str, float]:
        """Parts of the monitor's budget, 1 together; before the foremost is there, it goes before all else."""
        weights = {name: WEIGHTS.get(name, 1.0) for name in self.ledgers}
        parts = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        return parts if FOREMOST not in parts or self.ledgers[FOREMOST].count else {**parts, FOREMOST: math.inf}

    def _claims(self, elapsed: float) -> list[tuple[float, float]]:
        """Claims and costs of what its own share would pay for."""
        share, claim = self.share or 0.0, claims(self.ledgers, self._weights)
        costs = {name: ledger.cost for name, ledger in self.ledgers.items()}
        return [(claim[name], c) for name, c in costs.items() if self.spent + c <= share * (elapsed + c)]

    def charge(self, quantity: str, seconds: float) -> None:
        """Enters what a quantity has cost."""
        self.ledgers[quantity] = charged(self.ledgers[quantity], seconds)

    def state_dict(self) -> dict[str, Any]:
        """All ledgers as numbers."""
        return {quantity: asdict(ledger) for quantity, ledger in self.ledgers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the ledgers of quantities that are measured now, too."""
        known = {quantity: Ledger(**ledger) for quantity, ledger in state_dict.items()}
        self.ledgers = {quantity: known.get(quantity, ledger) for quantity, ledger in self.ledgers.items()}
