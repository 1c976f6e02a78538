"""What is due with the step that comes, under a schedule of steps or under a share of wall time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_eoss.training.schedule import Ledger, charged, due_by_share, due_by_step

EAGER_SECONDS = 5.0  # a first measurement cheaper than this does not wait


@dataclass
class Agenda:
    """The quantities of a monitor, from cheap to dear, and when each is due."""

    quantities: tuple[str, ...]
    every_n_steps: int | None
    share: float | None  # of wall time; one of the two
    seldom: Mapping[str, int] = field(default_factory=dict)  # under steps: only every so many measurements
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    _fresh: bool = True  # nothing has been tried yet in this fit
    _last_step: int = -1  # that was tried; manual optimisation may skip steps

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets all costs."""
        self.ledgers = {quantity: Ledger() for quantity in self.quantities}

    def begin(self) -> None:
        """Starts a fit."""
        self._fresh, self._last_step = True, -1

    def tried(self, step: int) -> None:
        """Notes that something was tried before this step."""
        self._fresh, self._last_step = False, step

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

    def due(self, step: int, spent: float, elapsed: float) -> frozenset[str]:
        """The quantities whose time has come.

        Args:
            step: Optimizer steps done.
            spent: Seconds spent on measuring since fit began.
            elapsed: Seconds since fit began.

        Returns:
            What to measure before the next step.
        """
        if self.every_n_steps is None:
            assert self.share is not None
            eager = EAGER_SECONDS if self._fresh else 0.0
            return due_by_share(self.ledgers, spent, elapsed, self.share, eager=eager)
        if step == self._last_step:
            return frozenset()
        every = {quantity: self.every_n_steps * self.seldom.get(quantity, 1) for quantity in self.ledgers}
        return frozenset(quantity for quantity, distance in every.items() if due_by_step(step, distance))

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
