"""What is due with the step that comes, under a schedule of steps or under a share of wall time."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from lightning_eoss.training.schedule import Ledger, charged, claims, due_by_share, due_by_step

EAGER_SECONDS = 5.0  # what is cheaper than this does not wait, the first time
WEIGHTS = {"mini": 3.0, "full": 2.0, "prediction": 2.0}  # parts of a share's budget; 1 for all else
FOREMOST = "mini"  # nothing that can be paid takes its turn before the first one
# Those of one Trainer that go by a share: the time that all of them may take is one.
_TOGETHER: WeakKeyDictionary[Any, "list[Agenda]"] = WeakKeyDictionary()


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
    _asleep: float = 0.0  # seconds since fit began before which its share pays for nothing

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets all costs."""
        self.ledgers = {quantity: Ledger() for quantity in self.quantities}

    def begin(self, trainer: Any) -> None:
        """Starts a fit.

        Args:
            trainer: The Trainer, which several monitors may share.
        """
        self._fresh, self._last_step, self.spent, self._peers = True, -1, 0.0, [self]
        if self.share is not None:
            self._peers = _TOGETHER.setdefault(trainer, [])
            self._peers[:] = [*(each for each in self._peers if each is not self), self]

    def tried(self, step: int) -> None:
        """Notes that something was tried before this step."""
        self._fresh, self._last_step, self._asleep = False, step, 0.0

    def expect(self, costs: Mapping[str, float]) -> None:
        """Enters estimates where nothing has been measured, and strikes out what has none.

        Args:
            costs: Quantity to seconds.
        """
        self.ledgers = {
            quantity: ledger if ledger.count else Ledger(costs[quantity])
            for quantity, ledger in self.ledgers.items()
            if quantity in costs
        }

    def rescale(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Notes that the next measurements are of other sizes than the last.

        Args:
            before: What was expected of the last ones, in seconds.
            after: What would have been expected of the next ones.
        """
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
        """The quantities whose time has come.

        Args:
            step: Optimizer steps done.
            elapsed: Seconds since fit began.
            begun: Seconds spent in a hook that has not ended yet.

        Returns:
            What to measure before the next step.
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
        return frozenset(quantity for quantity, distance in every.items() if due_by_step(step, distance))

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
