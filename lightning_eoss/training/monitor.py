"""The base of all monitors: when they measure, what that costs, and where it is shown.

A monitor of the loss says three things: what it can measure and what that costs (`foresee`), the measurement
(`measure`), and what is shown of it (`show`). All else is here. `CONTRIBUTING.md` has one in thirty lines.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, Part, copied
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, check_operator, curvature_of
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.display import tags
from lightning_eoss.isolation.isolate import noted_generators
from lightning_eoss.training import probe
from lightning_eoss.training.data import TrainingData, check_chosen_batch_size
from lightning_eoss.training.plan import Prospect
from lightning_eoss.training.schedule import Agenda, check_schedule
from lightning_eoss.training.watch import Picture, Watch, device_time

_UNPAID = (
    "training ended before {} could be paid for. Raise overhead, or measure at fixed steps with every_n_train_steps."
)
_MISSING = "{}.{} is missing: return {} (CONTRIBUTING.md, To add a monitor)."
_WORDS = {"current": "the current batch", "mini": "MiniBS", "full": "FullBS", "prediction": "predictions"}


class Publisher(Callback):
    """A callback that shows scalars. The page that they are read on is no afterthought: without one there is no class.

    What it shows goes through `watch.publish`.
    """

    dashboard_categories: frozenset[str]  # of `display.tags`, that its scalars fill
    watch: Watch

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses what would be drawn nowhere."""
        super().__init_subclass__(**options)
        named = getattr(cls, "dashboard_categories", "")
        if cls.__module__ != __name__ and isinstance(named, str):
            raise TypeError(
                f"{cls.__name__} has no dashboard_categories, so nobody would see what it measures. Name those of "
                "display.tags that its scalars fill, as in dashboard_categories = frozenset({tags.WEIGHTS})."
            )
        if isinstance(named, frozenset | set) and (unknown := sorted(named - tags.CATEGORIES.keys())):
            raise ValueError(
                f"{cls.__name__} has dashboard_categories={unknown}, which no chart is in, so nobody would see it. "
                f"Declare its tags before the class, by display.tags.declare; there are {', '.join(tags.CATEGORIES)}."
            )

    @property
    def history(self) -> list[dict[str, float]]:
        """The scalars of every measurement, oldest first, each with its `step`; thinned above 10,000."""
        return self.watch.history


@dataclass
class _Window:
    """The loader batches of one optimizer step, kept until all of them are there."""

    begins: bool = True  # whether the next one is the first of a step
    parts: list[Part] = field(default_factory=list)

    def collect(self, batch: Any, size: int, *, copy: bool) -> None:
        """Keeps one, with the random numbers of its own pass; a copy where training may change it meanwhile."""
        self.parts.append(Part(1.0, size, data=copied(batch) if copy else batch, generators=noted_generators()))

    def close(self) -> Batch:
        """Hands out what was kept, and forgets it."""
        parts, self.parts = self.parts, []
        return tuple(replace(part, weight=1 / len(parts)) for part in parts)


@dataclass(frozen=True)
class Look:
    """A training before one of its steps, as a monitor of the loss sees it."""

    trainer: Any
    data: TrainingData
    solver: Solver  # with the loss, the plan and what is known of the loss
    due: frozenset[str]  # quantities whose time has come
    batch: Batch = ()  # that the step is going to take, where `keeps_batch`


class Monitor(Publisher):
    """A monitor of the loss: measures it now and then, before a step, and no bit of training is changed.

    Args:
        quantities: What it measures, from cheap to dear; a schedule decides when each of them is due.
        every_n_train_steps: Measure before every n-th optimizer step.
        overhead: Measure as often as this share of the wall time allows. At most one of the two; neither means 0.05.
        max_seconds: Upper limit of one measurement, for `foresee` to hold.
        batch_size: Samples of a batch; None: training's.
        full_batch_samples: The full batch is a fixed random subset of this size; None: all samples.
        loss_fn: In place of `training_step`.
        dataloader: Data of its own.
        num_samples: Samples of a ready batch of `dataloader`.
        seed: Fixes all random numbers.
        operator: ``"hessian"`` or ``"ggn"``.
        outputs_fn: For ``"ggn"``.
        as_trained: Under training's own autocast.
        evaluating: With the module in eval mode.
        seldom: Quantities that a schedule of steps gives only every so many measurements.
    """

    keeps_batch = False  # whether it measures the very batch that a step takes
    against_limits = False  # whether it compares with stability limits: nothing is measured before there are any
    follows_sampler = True  # whether its batches are those of a batch sampler that makes its own
    findings: Findings | None = None  # about the loss that is trained
    # What follows is of one fit.
    plan: Plan | None = None
    share = 0.0  # of wall time, as of the last measurement
    _shown = False  # whether anything has been measured
    _due: frozenset[str] = frozenset()  # what to measure with the step that comes

    def __init__(
        self,
        *quantities: str,
        every_n_train_steps: int | None = None,
        overhead: float | None = None,
        max_seconds: float = 60.0,
        batch_size: int | None = None,
        full_batch_samples: int | None = 8192,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | Callable[[Any], int] | None = None,
        seed: int = 0,
        operator: Kind = "hessian",
        outputs_fn: OutputsFn | None = None,
        as_trained: bool = False,
        evaluating: bool = False,
        seldom: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        if not quantities or not all(isinstance(each, str) for each in quantities):
            raise TypeError(
                f"{type(self).__name__} measures quantities={quantities!r}, so it would never be time. Name what it "
                "measures, as in super().__init__('loss', ...)."
            )
        checks.arguments(batch_size=batch_size, loss_fn=loss_fn, seed=seed, full_batch_samples=full_batch_samples)
        check_schedule(every_n_train_steps, overhead, max_seconds)
        check_operator(operator, outputs_fn)
        self.every_n_train_steps = None if every_n_train_steps is None else int(every_n_train_steps)
        self.overhead = 0.05 if every_n_train_steps is None and overhead is None else overhead
        self.max_seconds, self.seed = max_seconds, int(seed)
        self.batch_size = None if batch_size is None else int(batch_size)
        self.full_batch_samples, self.loss_fn = full_batch_samples, loss_fn
        self.dataloader, self.num_samples = dataloader, num_samples
        self.operator, self.outputs_fn = operator, outputs_fn
        self.latest: Any = None  # what was measured last
        self.watch = Watch(
            type(self).__name__,
            loss_fn=loss_fn,
            dataloader=dataloader,
            max_samples=full_batch_samples,
            num_samples=num_samples,
            as_trained=as_trained,
            evaluating=evaluating,
            shares=True,
        )
        self.agenda = Agenda(quantities, self.every_n_train_steps, self.overhead, seldom)
        self._window = _Window()

    # ---- what a monitor says -----------------------------------------------------------------------------------------

    def foresee(self, look: Look) -> Prospect:
        """What is going to be measured within `max_seconds`, and what each quantity is expected to cost."""
        raise NotImplementedError(_MISSING.format(type(self).__name__, "foresee", "a Prospect: plan, costs and notes"))

    def measure(self, look: Look) -> Any:
        """Measures what is due. None: there is nothing to show."""
        raise NotImplementedError(_MISSING.format(type(self).__name__, "measure", "what was measured"))

    def show(self, trainer: Any, result: Any) -> tuple[dict[str, float], list[Picture]]:
        """The scalars of a measurement and its pictures; in training's own state, so it draws and changes nothing."""
        raise NotImplementedError(_MISSING.format(type(self).__name__, "show", "scalars and pictures"))

    def charge(self, result: Any, seconds: float) -> None:
        """Enters what a measurement has cost, its own `seconds` where it has them; several quantities share it out."""
        if len(self.agenda.quantities) != 1:
            raise NotImplementedError(
                f"{type(self).__name__} measures {', '.join(self.agenda.quantities)}, and only it can tell what each "
                "has cost: override charge(result, seconds) to share it out, by self.agenda.charge(quantity, seconds)."
            )
        self.agenda.charge(self.agenda.quantities[0], getattr(result, "seconds", seconds))

    # ---- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be monitored, and forgets an earlier fit's plan; a checkpoint is loaded later."""
        if stage == "fit":
            probe.refuse(trainer, pl_module, self.watch.name, loss_fn=self.loss_fn)
            self.watch.count_twins(trainer, self)
            self.findings = self.plan = self.watch.data = None
            self.agenda.forget()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        probe.refuse_frozen(pl_module, self.watch.name)
        self.watch.begin()
        self.agenda.begin(trainer)
        self._window, self._shown = _Window(), False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measures before the step, where it is time, and keeps account of the time."""
        self.watch.see(trainer)
        arrived = time.perf_counter()
        steps = probe.steps_now(trainer)  # with its last batch all of a step is known
        if self._window.begins if self.keeps_batch else steps:
            due = frozenset[str]() if probe.trains_nothing(trainer) else self._due_now(trainer)
            self._due = due if due and self.watch.rested() else frozenset()
            if self._due and self.against_limits and probe.limits_to_come(trainer):
                self.agenda.postpone(self._due)
                self._due = frozenset()
        self._window.begins = steps
        acts = bool(self._due) and (self.keeps_batch or steps)
        try:
            if acts:
                arrived = device_time(pl_module)  # what the device is still doing is training's
                if self.keeps_batch:
                    copy = trainer.accumulate_grad_batches > 1
                    self._window.collect(batch, self.watch.count(batch) or 1, copy=copy)
                if steps:
                    self._turn(trainer, pl_module, batch_idx, arrived)
        finally:
            self.watch.release(trainer, self)
            self.agenda.spent += (device_time(pl_module) if acts else time.perf_counter()) - arrived

    def _due_now(self, trainer: Any, begun: float = 0.0) -> frozenset[str]:
        """The quantities whose time has come, so many seconds of which are gone."""
        return self.agenda.due(trainer.global_step, self.watch.elapsed, begun)

    def _turn(self, trainer: Any, pl_module: Any, batch_idx: int, arrived: float) -> None:
        """Measures and shows it. A defect of the first measurement ends training, later ones do not."""
        batch = self._window.close()
        try:
            with self.watch.forgiving(first=self.plan is None):
                result = self.watch.sparing(lambda: self._looked(trainer, pl_module, batch, batch_idx, arrived))
                if result is not None:
                    self.latest, self._shown = result, True
                    seconds = device_time(pl_module) - arrived
                    self.charge(result, seconds)
                    self.share = (self.agenda.total + seconds) / self.watch.elapsed
                    values, pictures = self.show(trainer, result)
                    self.watch.publish(trainer, self, values, *pictures)
        finally:
            self.agenda.tried(trainer.global_step)

    def _looked(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int, arrived: float) -> Any:
        """A measurement of the module as it is, planned where it is the first."""
        with self.watch.objective(trainer, pl_module, batch_idx) as objective:
            data = self.watch.data
            assert data is not None
            if self.plan is None:
                self._prepare(trainer, data, objective)
                self._due = self._due_now(trainer, device_time(pl_module) - arrived)
            if self.plan is None or self.findings is None or not self._due:
                return None
            size, parts = self.watch.step_size(trainer, self.batch_size)
            self.plan = replace(self.plan, batch_size=size, parts=parts)
            plan = self.watch.within(self.plan, self.findings, objective)
            curvature = curvature_of(self.operator, self.outputs_fn, objective, size)
            solver = Solver(objective, plan, self.findings, stream=trainer.global_step, curvature=curvature)
            return self.measure(Look(trainer, data, solver, self._due, batch))

    def _prepare(self, trainer: Any, data: TrainingData, objective: Objective) -> None:
        """Finds out what the loss allows and what a measurement costs, and says so."""
        check_chosen_batch_size(self.batch_size, data, sampler=self.follows_sampler)
        size, parts = self.watch.step_size(trainer, self.batch_size)
        checks.batch_size_of_data(size, data.source.num_samples)
        findings = self.findings or preflight(objective, size, parts=parts, seed=self.seed)
        self.watch.say(*findings.warnings, *(probe.cautions(trainer, objective.module) if self.against_limits else ()))
        if findings.seconds == 0:  # a loss that is not finite lets nothing be found out
            return
        findings = replace(findings, stacked=findings.stacked and self.operator == "hessian")
        full = data.batches_of(self.full_batch_samples)
        plan = Plan(size, parts, full_batch_samples=full, seed=self.seed, memory_bytes=objective.cache.limit)
        solver = Solver(objective, plan, findings, stream=trainer.global_step)
        prospect = self.foresee(Look(trainer, data, solver, self._due))
        if not prospect.costs or prospect.costs.keys() - set(self.agenda.quantities):
            raise ValueError(
                f"{type(self).__name__}.foresee expects costs of {', '.join(prospect.costs) or 'nothing'}, and its "
                f"quantities are {', '.join(self.agenda.quantities)}: it would never be time. Name what is measured."
            )
        self.findings, self.plan = findings, prospect.plan
        self.agenda.expect(prospect.costs)
        self.watch.say(*prospect.warnings)
        self.watch.announce(prospect.notes)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Says so where the schedule came to nothing."""
        if self.plan is not None and not self._shown:
            self.watch.say(_UNPAID.format("the first measurement"))
        elif missing := [_WORDS.get(name, name) for name in self.agenda.unpaid]:
            self.watch.tell([_UNPAID.format(" and ".join(missing))[:-1]])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of what monitors share."""
        self.watch.forget(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of what monitors share."""
        self.watch.forget(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The history and what measurements cost."""
        return {"history": self.history, "ledgers": self.agenda.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved monitor stood."""
        self.watch.history = list(state_dict["history"])
        self.agenda.load_state_dict(state_dict["ledgers"])
