"""`SharpnessMonitor`: where a running training stands against the edge of stability."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn
from lightning_eoss.curvature.operators import PLAIN, Coordinates
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import Solver, WarmStart
from lightning_eoss.display import tags
from lightning_eoss.display.figures import write_preconditioner
from lightning_eoss.display.page import write_histogram
from lightning_eoss.display.scalars import notes, prediction_scalars, raw_scalars, reading, scalars
from lightning_eoss.measurements.prediction import SharpnessPrediction, prediction
from lightning_eoss.measurements.sharpness import SharpnessMeasurement, sharpness
from lightning_eoss.metrics import MiniBatchSharpness
from lightning_eoss.theory.control import Reading
from lightning_eoss.theory.stability import NoLimits, StabilityLimits
from lightning_eoss.theory.statistics import Estimate, phase
from lightning_eoss.training import probe
from lightning_eoss.training.data import sampler_batches
from lightning_eoss.training.monitor import Look, Monitor
from lightning_eoss.training.plan import Prospect, foreseen, look_of, predictable, settle
from lightning_eoss.training.watch import Picture

# From cheap to dear. Directional sharpness comes with "mini", from the same graphs.
QUANTITIES = ("current", "mini", "full", "prediction")
PREDICTION_EVERY = {"prediction": 5}  # measurements, under a schedule of steps
SMALL_MODEL = 10_000_000  # parameters up to which warm starts go into checkpoints


@dataclass(frozen=True)
class MonitoredSharpness:
    """What one look at a training showed."""

    measurement: SharpnessMeasurement
    raw: SharpnessMeasurement | None  # the same in the units of the Hessian, beside one in units of the limits
    prediction: SharpnessPrediction | None
    limits: StabilityLimits | NoLimits  # of the optimizer, at that step
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

    keeps_batch = against_limits = True

    def __init__(
        self,
        *,
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
        checks.arguments(rel_error=rel_error, num_batches=num_batches)
        words = "use 'parameters' (autocast off) or 'as_trained'."
        checks.one_of("precision", precision, ("parameters", "as_trained"), words)
        super().__init__(
            *(QUANTITIES if predictions else QUANTITIES[:-1]),
            every_n_train_steps=every_n_train_steps,
            overhead=overhead,
            max_seconds=max_seconds,
            batch_size=batch_size,
            full_batch_samples=full_batch_samples,
            loss_fn=loss_fn,
            dataloader=dataloader,
            num_samples=num_samples,
            seed=seed,
            operator=operator,
            outputs_fn=outputs_fn,
            as_trained=precision == "as_trained",
            seldom=PREDICTION_EVERY,
        )
        self.rel_error, self.num_batches, self.precision = rel_error, int(num_batches), precision
        self.save_warm_start, self.predictions, self.raw = save_warm_start, predictions, raw
        self.reading: Reading | None = None  # the last measurement as edge ratios, for whoever steers by it
        self.mini_batch_sharpness = MiniBatchSharpness()
        self._schedule_arguments = (every_n_train_steps, overhead)
        self._warm = dict.fromkeys((False, True), WarmStart())  # of measurements in plain coordinates and in limits
        self._points: deque[Estimate] = deque(maxlen=5)  # directional edge ratios, for the phase
        self._momentum = False  # whether small batches have a lower line, in this fit

    @property
    def dashboard_categories(self) -> frozenset[str]:  # type: ignore[override]
        """What it shows on the dashboard."""
        more = {tags.PREDICTIONS: self.predictions, tags.MOMENTUM: self._momentum}
        return tags.SHARPNESS | {title for title, shown in more.items() if shown}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be monitored, and forgets an earlier fit's plan; a checkpoint is loaded later."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._momentum, self.reading = False, None

    # ---- what --------------------------------------------------------------------------------------------------------

    def foresee(self, look: Look) -> Prospect:
        """What was asked for, cut to what is not too dear."""
        data, solver, (_, coordinates) = look.data, look.solver, _coordinates(look)
        prospect = foreseen(
            replace(solver.plan, rel_error=self.rel_error, num_batches=self.num_batches),
            solver.findings,
            self.agenda,
            solver.objective,
            max_seconds=self.max_seconds,
            uniform=data.sampler is None,
            # In units of the limits there is no curve for the current batch.
            current=(coordinates is PLAIN or self.raw) and probe.sees_batches(solver.objective.module),
        )
        if data.sizes:
            _, least, most = data.sizes
            prospect.notes.append(f"its batches have {least} to {most} samples, each counts as one step")
        return prospect

    def measure(self, look: Look) -> MonitoredSharpness:
        """Each quantity that is due, in units of the limits where they differ between parameters."""
        data, (limits, coordinates) = look.data, _coordinates(look)
        assert self.plan is not None
        if data.sampler is not None:
            size = data.sizes.mean if data.sizes else self.plan.batch_size
            self.plan = replace(self.plan, samples=round(self.plan.parts * size))
        plan = replace(look.solver.plan, samples=self.plan.samples)
        plan = look_of(plan, look.solver.findings, data.source.num_samples, self.agenda)
        solver, raw = replace(look.solver, plan=plan), None
        current = look.batch if "current" in look.due else ()
        if self.raw and coordinates is not PLAIN:
            raw, current = self._measured(look, solver, current), ()
        solver = replace(solver, coordinates=coordinates)
        measurement = self._measured(look, solver, current)
        predicted = None
        if "prediction" in look.due and math.isfinite(measurement.full_batch.value):
            with self.watch.forgiving(first=False):  # what was measured is not lost with it
                predicted = self.watch.sparing(lambda: self._predicted(solver))
        return MonitoredSharpness(measurement, raw, predicted, limits, coordinates is not PLAIN)

    def _measured(self, look: Look, solver: Solver, current: Batch) -> SharpnessMeasurement:
        """A measurement in the solver's coordinates, from where the last one in them ended."""
        assert self.findings is not None
        batches, solver = None, replace(solver, findings=self.findings)
        if look.data.sampler is not None and "mini" in look.due:
            solver.objective.isolation.reseed(solver.seed(Use.SAMPLER_ISOLATION))
            plan, seed = solver.plan, solver.seed(Use.SAMPLER_BATCHES)
            batches = sampler_batches(look.data, plan.parts, plan.num_batches, seed=seed, batch_size=self.batch_size)
        which = solver.coordinates.limits is not None
        measurement, self._warm[which] = sharpness(
            solver,
            self._warm[which].fitting(solver.objective),
            full="full" in look.due,
            mini="mini" in look.due,
            current=current,
            batches=batches,
        )
        if measurement.doubt is not None:
            self.watch.say(measurement.doubt.message)
            self.findings = self.findings.after(measurement.doubt)
        return measurement

    def _predicted(self, solver: Solver) -> SharpnessPrediction:
        """MiniBS predicted at the measured batch size."""
        assert self.findings is not None
        num_samples = solver.objective.source.num_samples
        plan = self.watch.within(solver.plan, self.findings, solver.objective)
        size = min(plan.step_size, num_samples)
        plan, group_size, num_groups, _ = predictable(plan, self.findings, num_samples, self.max_seconds)
        return prediction(
            replace(solver, plan=plan, findings=self.findings),
            self._warm[solver.coordinates.limits is not None].fitting(solver.objective),
            batch_sizes=(size,),
            group_size=group_size,
            num_groups=num_groups,
        )

    def charge(self, result: MonitoredSharpness, seconds: float) -> None:
        """Shares the seconds out among the quantities."""
        assert self.plan is not None and self.findings is not None and self.watch.data is not None
        if result.prediction is not None:
            self.agenda.charge("prediction", result.prediction.seconds)
            seconds -= result.prediction.seconds
        count = self.watch.data.source.num_samples
        settle(self.plan, self.findings, self.agenda, result.measurement, count, self._due, seconds)

    # ---- where -------------------------------------------------------------------------------------------------------

    def show(self, trainer: Any, result: MonitoredSharpness) -> tuple[dict[str, float], list[Picture]]:
        """Scalars with the phase among them, the eigenvalues of the mini-batches, the preconditioner."""
        measurement, limits, in_limits = result.measurement, result.limits, result.in_limits
        self.watch.say(*notes(measurement, limits, in_limits=in_limits))
        self.reading = reading(measurement, limits, in_limits=in_limits, step=trainer.global_step)
        values = {**scalars(measurement, limits, in_limits=in_limits), tags.COST_SHARE: self.share}
        if result.raw is not None:
            values |= raw_scalars(result.raw, values)
        if result.prediction is not None:
            values |= prediction_scalars(result.prediction)
            values[tags.COST_SECONDS] += result.prediction.seconds
        if self.reading is not None and math.isfinite(self.reading.directional.mean):
            self._points.append(self.reading.directional)
            if (judged := phase(self._points)) is not None:
                values[tags.PHASE] = float(judged)
        if tags.EDGE_RATIO in values:
            trainer.progress_bar_metrics["edge_ratio"] = round(values[tags.EDGE_RATIO], 3)
        self._momentum = self._momentum or tags.THRESHOLD_SMALL_BATCH in values
        pictures: list[Picture] = [partial(write_preconditioner, limits=limits)]
        eigenvalues = torch.tensor(measurement.mini_batch.values, dtype=torch.float64)
        if len(eigenvalues):
            self.mini_batch_sharpness.reset()
            self.mini_batch_sharpness.control_mean = measurement.control_mean
            self.mini_batch_sharpness.update(eigenvalues, torch.tensor(measurement.controls, dtype=torch.float64))
            pictures.insert(0, partial(write_histogram, values=eigenvalues))
        return values, pictures

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
            "findings": None if self.findings is None else asdict(self.findings),
            "warm_start": {which: dict(vars(warm)) for which, warm in self._warm.items()} if save else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved monitor stood."""
        super().load_state_dict(state_dict)
        self._points = deque((Estimate(*point) for point in state_dict["points"]), maxlen=5)
        self.findings = Findings(**state_dict["findings"]) if state_dict["findings"] else None
        self._warm |= {which: WarmStart(**fields) for which, fields in state_dict["warm_start"].items()}


def _coordinates(look: Look) -> tuple[StabilityLimits | NoLimits, Coordinates]:
    """The optimizer's limits, and the coordinates that they ask for: plain ones where one number tells all."""
    limits, objective = probe.applied_limits(look.trainer), look.solver.objective
    if isinstance(limits, NoLimits):
        return limits, PLAIN
    owned = {id(parameter) for parameter in limits.parameters}
    if limits.scalar is not None and all(id(parameter) in owned for parameter in objective.parameters):
        return limits, PLAIN
    return limits, probe.coordinates_of(limits, objective.parameters, objective.like)
