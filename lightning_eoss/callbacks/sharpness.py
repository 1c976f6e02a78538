"""`SharpnessMonitor`: when to measure the sharpness of a running training, and where to show it."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, check_operator, curvature_of
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import Curvature, Scaling, krylov_like
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.curvature.seeds import derived_seed
from lightning_eoss.curvature.solver import Plan, WarmStart
from lightning_eoss.display import page, tags
from lightning_eoss.display.figures import write_preconditioner
from lightning_eoss.display.scalars import notes, prediction_scalars, raw_scalars, reading, scalars
from lightning_eoss.measurements.prediction import SharpnessPrediction, predict
from lightning_eoss.measurements.sharpness import SharpnessMeasurement, measure
from lightning_eoss.metrics import MiniBatchSharpness
from lightning_eoss.theory.control import Reading
from lightning_eoss.theory.stability import NoLimits, StabilityLimits
from lightning_eoss.theory.statistics import Estimate, phase
from lightning_eoss.training import probe
from lightning_eoss.training.data import check_chosen_batch_size, sampler_batches
from lightning_eoss.training.monitor import Monitor
from lightning_eoss.training.plan import foreseen, look_of, predictable, settle
from lightning_eoss.training.watch import now
from lightning_eoss.training.window import Window

# From cheap to dear. Directional sharpness comes with "mini", from the same graphs.
QUANTITIES = ("current", "mini", "full", "prediction")
PREDICTION_EVERY = {"prediction": 5}  # measurements, under a schedule of steps
SMALL_MODEL = 10_000_000  # parameters up to which warm starts go into checkpoints


@dataclass(frozen=True)
class _Seen:
    """What one look at the training showed."""

    measurement: SharpnessMeasurement
    raw: SharpnessMeasurement | None  # the same in the units of the Hessian, beside one in units of the limits
    prediction: SharpnessPrediction | None
    limits: StabilityLimits | NoLimits
    in_limits: bool  # whether all is in units of the limits


class SharpnessMonitor(Monitor):
    r"""Shows, while a model trains, where it stands against the edge of stability, with error bars.

    Not one bit of training is changed. Measures in `on_train_batch_start`, at the weights and the learning rate of the
    step that comes: MiniBS with its 95 % interval, directional sharpness, FullBS, the sharpness of the batch at hand,
    their threshold and edge ratios, and what all that costs. Goes to every logger of the Trainer as flat scalars, to
    TensorBoard also as a dashboard (*Custom Scalars*).

    Cost: `overhead` of the wall time, or with `every_n_train_steps` some 150 products of a batch plus 3 passes over the
    data each time (20 passes the first time), a product being about 1.4 gradients.

    Args:
        every_n_train_steps: Measure everything before every n-th optimizer step.
        overhead: Measure as often as this share of the wall time allows, shared by all monitors of the Trainer that go
            by one: MiniBS first, cheap quantities more often than dear ones, with more mini-batches and samples of the
            full batch as time is paid for. At most one of the two; neither means 0.05.
        max_seconds: Upper limit of one measurement, loading included: a plan that would take longer is cut, once and
            said.
        rel_error: Mini-batches are drawn until the interval of MiniBS is within this, relative.
        num_batches: Upper limit of mini-batches.
        batch_size: The b of MiniBS(b); None: training's, accumulation included.
        full_batch_samples: FullBS is measured on a fixed random subset of this size; None: all samples.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar`` in place of `training_step`, where that cannot be evaluated
            twice.
        dataloader: Data to measure on, in place of training's: a DataLoader or an iterable of batches.
        num_samples: Samples of a ready batch of ``dataloader``, a number or a function of a batch; None: what the batch
            says (``batch_size``, ``num_graphs``), or the length that all its tensors have.
        seed: Fixes all random numbers of the monitor.
        precision: ``"parameters"``: autocast off; ``"as_trained"``: under training's own autocast, with its noise.
        save_warm_start: Whether checkpoints hold the last eigenvectors (2 P numbers); None: below 1e7 parameters.
        predictions: Whether to predict MiniBS from the full batch, too, and from which batch size on larger ones hardly
            help; costs some 130 passes over the data, every fifth measurement or as often as the share allows.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix in its place.
        outputs_fn: ``outputs_fn(pl_module, batch) -> (outputs, criterion)``, the outputs and the loss as a function of
            them, for ``"ggn"``; None: found where the loss is one call of torch's cross entropy or squared error.
        raw: Whether to measure the sharpness itself, too, where limits differ between parameters (adaptive optimizers,
            groups) and all else is in units of them; doubles the cost.

    Adaptive optimizers are judged by the preconditioner that their state holds. Above its limit a run need not diverge:
    the preconditioner grows with the gradient. Nor does the threshold say all about SGD with momentum: under small
    batches directional sharpness stops at ``2 (1 - momentum) / lr`` already (*Momentum Further Constrains Sharpness at
    the Edge of Stochastic Stability*, arXiv 2604.14108), which is drawn beside it.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At `setup`, if the training cannot be monitored.

    Example:
        >>> SharpnessMonitor(every_n_train_steps=100).state_key
        "SharpnessMonitor{'every_n_train_steps': 100, 'overhead': None, 'batch_size': None}"

    Source: Andreyev & Beneventano, *Edge of Stochastic Stability*.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        overhead: float | None = None,
        max_seconds: float = 60.0,
        rel_error: float = 0.05,
        num_batches: int = 100,
        batch_size: int | None = None,
        full_batch_samples: int | None = 8192,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | Callable[[Any], int] | None = None,
        seed: int = 0,
        precision: Literal["parameters", "as_trained"] = "parameters",
        save_warm_start: bool | None = None,
        predictions: bool = False,
        operator: Kind = "hessian",
        outputs_fn: OutputsFn | None = None,
        raw: bool = False,
    ) -> None:
        checks.settings(rel_error=rel_error, num_batches=num_batches)
        check_operator(operator, outputs_fn)
        words = "use 'parameters' (autocast off) or 'as_trained'."
        checks.one_of("precision", precision, ("parameters", "as_trained"), words)
        given = (every_n_train_steps, overhead, max_seconds, batch_size, full_batch_samples, loss_fn, dataloader, seed)
        super().__init__(
            *(QUANTITIES if predictions else QUANTITIES[:-1], *given),
            num_samples=num_samples,
            page=page.write_page,
            as_trained=precision == "as_trained",
            seldom=PREDICTION_EVERY,
        )
        self.rel_error = rel_error
        self.num_batches = int(num_batches)
        self.precision = precision
        self.save_warm_start = save_warm_start
        self.predictions = predictions
        self.operator = operator
        self.outputs_fn = outputs_fn
        self.raw = raw
        self.latest: Reading | None = None  # the last measurement, for whoever steers by it

        self.mini_batch_sharpness = MiniBatchSharpness()
        self._schedule_arguments = (every_n_train_steps, overhead)
        self._warm = dict.fromkeys((False, True), WarmStart())  # of measurements in plain coordinates and in limits
        self._points: deque[Estimate] = deque(maxlen=5)  # directional edge ratios, for the phase
        # What follows is of one fit.
        self._due: frozenset[str] = frozenset()  # what to measure with the step that comes
        self._put_off: frozenset[str] = frozenset()  # until an adaptive optimizer has taken its first step
        self._window = Window()
        self._momentum = False  # whether small batches have a lower line

    @property
    def dashboard_categories(self) -> frozenset[str]:
        """What it shows on the dashboard."""
        more = {tags.PREDICTIONS: self.predictions, tags.MOMENTUM: self._momentum}
        return tags.SHARPNESS | {title for title, shown in more.items() if shown}

    # ---- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be monitored, and forgets an earlier fit's plan; a checkpoint is loaded later."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._momentum, self.latest = False, None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        super().on_fit_start(trainer, pl_module)
        self._window, self._put_off = Window(), frozenset()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measures before the step, where it is time."""
        self._watch.see(trainer)
        arrived = time.perf_counter()
        if self._window.begins:
            self._due = frozenset() if probe.trains_nothing(trainer) else self._due_now(trainer)
            self._due = self._due if self._due and self._watch.rested() else frozenset()
            if self._due and probe.limits_to_come(trainer):
                self._put_off, self._due = self._due, frozenset()
        self._window.begins = probe.steps_now(trainer)
        try:
            if self._due:
                arrived = now(pl_module)  # what the device is still doing is training's
                size = self._watch.count(batch) or 1
                self._window.collect(batch, size, copy=trainer.accumulate_grad_batches > 1)
                if self._window.begins:
                    self._measure(trainer, pl_module, batch_idx, arrived)
        finally:
            self._watch.release(trainer, self)
            self._agenda.spent += (now(pl_module) if self._due else time.perf_counter()) - arrived

    def _due_now(self, trainer: Any, begun: float = 0.0) -> frozenset[str]:
        """Those whose time has come, and those that were put off."""
        due = super()._due_now(trainer, begun)
        return due if self.every_n_train_steps is None else due | (self._put_off & self._agenda.ledgers.keys())

    # ---- what --------------------------------------------------------------------------------------------------------

    def _measure(self, trainer: Any, pl_module: Any, batch_idx: int, arrived: float) -> None:
        """Measures and shows it. A defect of the first measurement ends training, later ones do not."""
        window, seen = self._window.close(), None
        try:
            with self._watch.forgiving(first=self._plan is None):
                seen = self._watch.sparing(lambda: self._look(trainer, pl_module, window, batch_idx, arrived))
        finally:
            self._agenda.tried(trainer.global_step)
            self._put_off = frozenset()
        if seen is None:
            return
        seconds = now(pl_module) - arrived
        self._charge(seen, seconds)
        for note in notes(seen.measurement, seen.limits, in_limits=seen.in_limits):
            self._watch.say(note)
        share = (self._agenda.total + seconds) / self._watch.elapsed
        self.latest = reading(seen.measurement, seen.limits, in_limits=seen.in_limits, step=trainer.global_step)
        self._show(trainer, seen, self._values(seen, share=share))

    def _look(self, trainer: Any, pl_module: Any, window: Batch, batch_idx: int, arrived: float) -> _Seen | None:
        """A measurement of the module as it is."""
        step = trainer.global_step
        with self._watch.objective(trainer, pl_module, batch_idx) as (objective, isolation):
            data = self._watch.data
            assert data is not None
            limits = probe.applied_limits(trainer)
            scaling = None
            if isinstance(limits, StabilityLimits):
                scaling = probe.scaling_of(limits, objective.parameters, krylov_like(objective))
            if self._plan is None:
                # In units of the limits there is no curve for the current batch.
                shown = (scaling is None or self.raw) and probe.sees_batches(pl_module)
                self._prepare(trainer, objective, current=shown)
                self._due = self._due_now(trainer, time.perf_counter() - arrived)
            if self._plan is None or not self._due:
                return None
            assert self._findings is not None
            batch_size, parts = self._watch.step_size(trainer, self.batch_size)
            size = data.sizes.mean if data.sizes else batch_size
            samples = None if data.sampler is None else round(parts * size)
            self._plan = replace(self._plan, batch_size=batch_size, parts=parts, samples=samples)
            plan = look_of(self._plan, self._findings, objective.source.num_samples, self._agenda)
            plan = self._watch.within(plan, self._findings, objective)
            curvature = curvature_of(self.operator, self.outputs_fn, objective, plan.batch_size)

            def look(current: Batch | None, scaling: Scaling | None) -> SharpnessMeasurement:
                assert self._findings is not None
                batches = None
                if data.sampler is not None and "mini" in self._due:
                    isolation.reseed(derived_seed(self.seed, 4, step))
                    given: dict[str, Any] = {"seed": derived_seed(self.seed, 5, step), "batch_size": self.batch_size}
                    batches = sampler_batches(data, plan.parts, plan.num_batches, **given)
                measurement, self._warm[scaling is not None] = measure(
                    objective,
                    plan,
                    self._findings,
                    self._warm[scaling is not None].fitting(objective),
                    stream=step,
                    full="full" in self._due,
                    mini="mini" in self._due,
                    current=current,
                    batches=batches,
                    scaling=scaling,
                    curvature=curvature,
                )
                if measurement.doubt is not None:
                    self._watch.say(measurement.doubt.message)
                    self._findings = self._findings.after(measurement.doubt)
                return measurement

            current, raw = window if "current" in self._due else None, None
            if self.raw and scaling is not None:
                raw, current = look(current, None), None
            measurement = look(current, scaling)
            prediction = None
            if "prediction" in self._due and math.isfinite(measurement.full_batch.value):
                with self._watch.forgiving(first=False):  # what was measured is not lost with it
                    prediction = self._watch.sparing(lambda: self._predicted(objective, plan, scaling, curvature, step))
        return _Seen(measurement, raw, prediction, limits, scaling is not None)

    def _predicted(
        self, objective: Objective, plan: Plan, scaling: Scaling | None, curvature: Curvature, step: int
    ) -> SharpnessPrediction:
        """MiniBS predicted at the measured batch size."""
        assert self._findings is not None
        plan = self._watch.within(plan, self._findings, objective)
        plan, size, groups, _ = predictable(plan, self._findings, objective.source.num_samples, self.max_seconds)
        return predict(
            objective,
            plan,
            self._findings,
            self._warm[scaling is not None].fitting(objective),
            batch_sizes=(min(plan.step_size, objective.source.num_samples),),
            group_size=size,
            num_groups=groups,
            stream=step,
            scaling=scaling,
            curvature=curvature,
        )

    def _prepare(self, trainer: Any, objective: Objective, *, current: bool) -> None:
        """Finds out what the loss allows and what a measurement costs, cuts what is too dear, and says so in a line."""
        data = self._watch.data
        assert data is not None
        check_chosen_batch_size(self.batch_size, data)
        batch_size, parts = self._watch.step_size(trainer, self.batch_size)
        checks.batch_size_of_data(batch_size, data.source.num_samples)
        findings = self._findings or preflight(objective, batch_size, parts=parts, seed=self.seed)
        for warning in (*findings.warnings, *probe.cautions(trainer, objective.module)):
            self._watch.say(warning)
        if findings.seconds == 0:  # a loss that is not finite lets nothing be found out
            return
        self._findings = replace(findings, stacked=findings.stacked and self.operator == "hessian")
        full, memory = data.batches_of(self.full_batch_samples), objective.cache.limit
        prospect = foreseen(
            Plan(batch_size, parts, self.rel_error, self.num_batches, full, self.seed, None, memory),
            self._findings,
            self._agenda,
            objective,
            max_seconds=self.max_seconds,
            uniform=data.sampler is None,
            current=current,
        )
        for warning in prospect.warnings:
            self._watch.say(warning)
        self._agenda.expect(prospect.costs)
        self._plan = prospect.plan
        if data.sizes:
            _, least, most = data.sizes
            prospect.notes.append(f"its batches have {least} to {most} samples, each counts as one step")
        self._watch.announce(prospect.notes)

    def _charge(self, seen: _Seen, seconds: float) -> None:
        """Enters what it has cost."""
        assert self._plan is not None and self._findings is not None and self._watch.data is not None
        if seen.prediction is not None:
            self._agenda.charge("prediction", seen.prediction.seconds)
            seconds -= seen.prediction.seconds
        count = self._watch.data.source.num_samples
        settle(self._plan, self._findings, self._agenda, seen.measurement, count, self._due, seconds)

    # ---- where -------------------------------------------------------------------------------------------------------

    def _values(self, seen: _Seen, *, share: float) -> dict[str, float]:
        """The scalars of a measurement, the phase among them."""
        values = {**scalars(seen.measurement, seen.limits, in_limits=seen.in_limits), tags.COST_SHARE: share}
        if seen.raw is not None:
            values |= raw_scalars(seen.raw, values)
        if seen.prediction is not None:
            values |= prediction_scalars(seen.prediction)
            values[tags.COST_SECONDS] += seen.prediction.seconds
        if self.latest is not None and math.isfinite(self.latest.directional.mean):
            self._points.append(self.latest.directional)
            if (judged := phase(self._points)) is not None:
                values[tags.PHASE] = float(judged)
        return values

    def _show(self, trainer: Any, seen: _Seen, values: dict[str, float]) -> None:
        """Scalars to every logger, the dashboard to those that have one, the last values to the Trainer."""
        measurement = seen.measurement
        eigenvalues = torch.tensor(measurement.mini_batch.values, dtype=torch.float64)
        if len(eigenvalues):
            self.mini_batch_sharpness.reset()
            self.mini_batch_sharpness.control_mean = measurement.control_mean
            controls = torch.tensor(measurement.controls, dtype=torch.float64)
            self.mini_batch_sharpness.update(eigenvalues, controls)
        self._momentum = self._momentum or tags.THRESHOLD_SMALL_BATCH in values
        histograms = [partial(page.write_histogram, values=eigenvalues)] if len(eigenvalues) else []
        self._watch.publish(trainer, self, values, *histograms, partial(write_preconditioner, limits=seen.limits))
        self._shown = True
        if tags.EDGE_RATIO in values:
            trainer.progress_bar_metrics["edge_ratio"] = round(values[tags.EDGE_RATIO], 3)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Monitors with other schedules or batch sizes keep states of their own."""
        every, overhead = self._schedule_arguments
        return self._generate_state_key(every_n_train_steps=every, overhead=overhead, batch_size=self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """All that the next measurement depends on: numbers, strings and tensors."""
        largest = max(0 if warm.top is None else warm.top.numel() for warm in self._warm.values())
        save = largest < SMALL_MODEL if self.save_warm_start is None else self.save_warm_start
        return {
            **super().state_dict(),
            "points": [(point.mean, point.stderr, point.lower, point.upper) for point in self._points],
            "findings": None if self._findings is None else asdict(self._findings),
            "warm_start": {which: dict(vars(warm)) for which, warm in self._warm.items()} if save else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved monitor stood."""
        super().load_state_dict(state_dict)
        self._points = deque((Estimate(*point) for point in state_dict["points"]), maxlen=5)
        self._findings = Findings(**state_dict["findings"]) if state_dict["findings"] else None
        self._warm |= {which: WarmStart(**fields) for which, fields in state_dict["warm_start"].items()}
