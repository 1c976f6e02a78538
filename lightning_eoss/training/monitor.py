"""The base of the monitors that measure now and then: when, what that costs, and what goes into checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.solver import Plan
from lightning_eoss.training.probe import refuse, refuse_frozen, steps_now
from lightning_eoss.training.schedule import Agenda, check_schedule
from lightning_eoss.training.watch import Watch, now

_UNPAID = (
    "training ended before {} could be paid for. Raise overhead, or measure at fixed steps with every_n_train_steps."
)
_WORDS = {"current": "the current batch", "mini": "MiniBS", "full": "FullBS", "prediction": "predictions"}


class Monitor(Callback):
    """A callback with an agenda. One with a single quantity says in `_measure` what it measures and shows."""

    shares_batches = True
    _findings: Findings | None = None  # of the module that is trained
    # What follows is of one fit.
    _plan: Plan | None = None
    _shown = False  # whether anything has been measured

    def __init__(
        self,
        quantities: tuple[str, ...],
        every_n_train_steps: int | None,
        overhead: float | None,
        max_seconds: float,
        batch_size: int | None,
        full_batch_samples: int | None,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        dataloader: Iterable[Any] | None,
        seed: int,
        *,
        num_samples: int | Callable[[Any], int] | None,
        page: Callable[..., None],
        as_trained: bool = False,
        seldom: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        checks.settings(full_batch_samples=full_batch_samples, seed=seed, batch_size=batch_size, loss_fn=loss_fn)
        check_schedule(every_n_train_steps, overhead, max_seconds)
        self.every_n_train_steps = None if every_n_train_steps is None else int(every_n_train_steps)
        self.overhead = 0.05 if every_n_train_steps is None and overhead is None else overhead
        self.max_seconds, self.seed = max_seconds, int(seed)
        self.batch_size = None if batch_size is None else int(batch_size)
        self.full_batch_samples, self.loss_fn, self.dataloader = full_batch_samples, loss_fn, dataloader
        self.num_samples = num_samples
        name = type(self).__name__
        self._watch = Watch(name, loss_fn, dataloader, full_batch_samples, num_samples, as_trained, page, shares=True)
        self._agenda = Agenda(quantities, self.every_n_train_steps, self.overhead, seldom)

    @property
    def history(self) -> list[dict[str, float]]:
        """The scalars of every measurement, oldest first, each with its `step`; thinned above 10,000."""
        return self._watch.history

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be monitored, and forgets an earlier fit's plan; a checkpoint is loaded later."""
        if stage == "fit":
            refuse(trainer, pl_module, type(self).__name__, loss_fn=self._watch.loss_fn)
            self._watch.count_twins(trainer, self)
            self._findings = self._plan = self._watch.data = None
            self._agenda.forget()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        refuse_frozen(pl_module, type(self).__name__)
        self._watch.begin()
        self._agenda.begin(trainer)
        self._shown = False

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Says so where the schedule came to nothing."""
        if self._plan is not None and not self._shown:
            self._watch.say(_UNPAID.format("the first measurement"))
        elif missing := [_WORDS.get(name, name) for name in self._agenda.unpaid]:
            self._watch.tell([_UNPAID.format(" and ".join(missing))[:-1]])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of what monitors share."""
        self._watch.forget(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of what monitors share."""
        self._watch.forget(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measures before the step, where it is time, and keeps account of the time."""
        self._watch.see(trainer)
        arrived = None
        try:
            # With its last batch all of a step is known.
            if steps_now(trainer) and self._due_now(trainer) and self._watch.rested():
                began = arrived = now(pl_module)  # what the device is still doing is training's
                with self._watch.forgiving(first=self._plan is None):
                    self._watch.sparing(lambda: self._measure(trainer, pl_module, batch_idx, began))
        finally:
            if arrived is not None:
                self._agenda.tried(trainer.global_step)
                self._agenda.spent += now(pl_module) - arrived
            self._watch.release(trainer, self)

    def _due_now(self, trainer: Any, begun: float = 0.0) -> frozenset[str]:
        """The quantities whose time has come, so many seconds of which are gone."""
        return self._agenda.due(trainer.global_step, self._watch.elapsed, begun)

    def _measure(self, trainer: Any, pl_module: Any, batch_idx: int, arrived: float) -> None:
        """Measures and shows it."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The history and what measurements cost."""
        return {"history": self.history, "ledgers": self._agenda.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved monitor stood."""
        self._watch.history = list(state_dict["history"])
        self._agenda.load_state_dict(state_dict["ledgers"])
