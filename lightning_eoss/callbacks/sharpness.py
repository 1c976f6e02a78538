"""`SharpnessMonitor`: when to measure the sharpness of a running training, and where to show it."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_eoss.curvature.isolation import noted_generators
from lightning_eoss.curvature.measure import SharpnessMeasurement, check_arguments, check_batch_size, measure
from lightning_eoss.curvature.objective import Batch, Objective, Part, copied, derived_seed, num_samples_of
from lightning_eoss.curvature.operators import krylov_dtype
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.curvature.solver import Plan, WarmStart
from lightning_eoss.display import dashboard as tags
from lightning_eoss.display.scalars import phase_point, scalars
from lightning_eoss.metrics import MiniBatchSharpness
from lightning_eoss.theory.stability import NoLimits, StabilityLimits
from lightning_eoss.theory.statistics import Estimate, phase
from lightning_eoss.training.plan import affordable
from lightning_eoss.training.probe import (
    TrainingData,
    applied_limits,
    cautions,
    effective_parts,
    logging_step,
    refuse,
    sampler_batches,
    scaling_of,
    steps_now,
    training_data,
    training_loss,
)
from lightning_eoss.training.quiet import quiet
from lightning_eoss.training.schedule import Ledger, charged, due_by_share, due_by_step

QUANTITIES = (
    "current",
    "mini",
    "full",
)  # from cheap to dear; directional sharpness comes with "mini", from the same graphs
SMALL_MODEL = 10_000_000  # parameters up to which warm starts go into checkpoints
HISTORY = 10_000  # entries, above which the older half is thinned
EAGER_SECONDS = 5.0  # a first measurement cheaper than this does not wait


class SharpnessMonitor(Callback):
    r"""Shows, while a model trains, where it stands against the edge of stability, with error bars.

    Not one bit of training is changed. Measures in `on_train_batch_start`, at the weights and the learning rate of the step that comes: MiniBS with its 95
    % interval, directional sharpness, FullBS, the sharpness of the batch at hand, their threshold and edge ratios, and
    what all that costs. Goes to every logger of the Trainer as flat scalars, to TensorBoard also as a dashboard
    (*Custom Scalars*).

    Cost: `overhead` of the wall time, or with `every_n_train_steps` some 150 products of a batch plus 3 passes over the
        data each time (20 passes the first time), a product being about 1.4 gradients.

    Args:
        every_n_train_steps: Measure everything before every n-th optimizer step.
        overhead: Measure as often as this share of the wall time allows; cheap quantities come more often than dear
            ones. At most one of
            the two; neither means 0.05.
        max_seconds: Upper limit of one measurement: a plan that would take longer is cut, once and said.
        rel_error: Mini-batches are drawn until the interval of MiniBS is within this, relative.
        num_batches: Upper limit of mini-batches.
        batch_size: The b of MiniBS(b); None: training's, accumulation included.
        full_batch_samples: FullBS is measured on a fixed random subset of this size; None: all samples.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar`` in place of `training_step`, where that cannot be evaluated
            twice.
        dataloader: Data to measure on, in place of training's: a DataLoader or an iterable of batches.
        seed: Fixes all random numbers of the monitor.
        precision: ``"parameters"``: autocast off; ``"as_trained"``: under training's own autocast, with its noise.
        save_warm_start: Whether checkpoints hold the last eigenvectors (2 P numbers); None: below 1e7 parameters.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At `setup`, if the training cannot be monitored.

    Example:
        >>> SharpnessMonitor(every_n_train_steps=100).state_key
        "SharpnessMonitor{'batch_size': None, 'every_n_train_steps': 100, 'overhead': None}"

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
        seed: int = 0,
        precision: Literal["parameters", "as_trained"] = "parameters",
        save_warm_start: bool | None = None,
    ) -> None:
        check_arguments(rel_error=rel_error, num_batches=num_batches, full_batch_samples=full_batch_samples)
        _check_schedule(every_n_train_steps, overhead, max_seconds)
        if precision not in ("parameters", "as_trained"):
            raise ValueError(f"precision={precision!r} is unknown: use 'parameters' (autocast off) or 'as_trained'.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive, or None for training's own.")
        self.every_n_train_steps = every_n_train_steps
        self.overhead = 0.05 if every_n_train_steps is None and overhead is None else overhead
        self.max_seconds = max_seconds
        self.rel_error = rel_error
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.full_batch_samples = full_batch_samples
        self.loss_fn = loss_fn
        self.dataloader = dataloader
        self.seed = seed
        self.precision = precision
        self.save_warm_start = save_warm_start

        self.history: list[dict[str, float]] = []
        self.mini_batch_sharpness = MiniBatchSharpness()
        self._schedule_arguments = (every_n_train_steps, overhead)
        self._warm = WarmStart()
        self._points: deque[Estimate] = deque(maxlen=5)  # directional edge ratios, for the phase
        self._ledgers = {quantity: Ledger() for quantity in QUANTITIES}
        self._spent = 0.0  # seconds in hooks since fit began
        self._plan: Plan | None = None
        self._findings: Findings | None = None
        self._data: TrainingData | None = None
        self._window: list[Part] = []
        self._began = time.perf_counter()
        self._notes: list[str] = []
        self._drawn = False  # whether this run has its dashboard
        self._said: set[str] = set()

    # ---- hooks: when
    # -----------------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be monitored."""
        if stage == "fit":
            refuse(trainer, pl_module, type(self).__name__, loss_fn=self.loss_fn)

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self._began, self._spent, self._data, self._drawn = time.perf_counter(), 0.0, None, False
        self._ledgers = {quantity: replace(ledger, spent=0.0) for quantity, ledger in self._ledgers.items()}

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measures before the step, where it is time."""
        arrived = _now(pl_module)
        parts = effective_parts(trainer)
        if (
            parts > 1
        ):  # the micro-batches of a window are measured together, each with the random numbers of its own pass
            self._window.append(
                Part(1 / parts, num_samples_of(batch), data=copied(batch), generators=noted_generators())
            )
        if not steps_now(trainer):
            return
        window = tuple(self._window) or (Part(1.0, num_samples_of(batch), data=batch, generators=noted_generators()),)
        self._window = []
        due = self._due(trainer.global_step)
        first = self._plan is None
        if not due and not first:
            return
        try:
            self._visit(trainer, pl_module, window, batch_idx, due, arrived)
        except Exception as error:
            if first:  # nothing is lost yet, and what is wrong now will stay wrong
                raise
            self._say(
                f"step {trainer.global_step}: a measurement failed and is left out, training goes on. "
                f"{type(error).__name__}: {error}"
            )
        finally:
            self._spent += _now(pl_module) - arrived

    def _due(self, step: int) -> set[str]:
        """The quantities whose time has come."""
        if self.every_n_train_steps is not None:
            return set(QUANTITIES) if due_by_step(step, self.every_n_train_steps) else set()
        assert self.overhead is not None
        elapsed, share = time.perf_counter() - self._began, self.overhead / len(QUANTITIES)
        eager = EAGER_SECONDS if sum(ledger.cost for ledger in self._ledgers.values()) < EAGER_SECONDS else 0.0
        return {
            quantity
            for quantity, ledger in self._ledgers.items()
            if due_by_share(ledger, elapsed, share, free_first=eager)
        }

    # ---- one measurement: what
    # -------------------------------------------------------------------------------------------------------

    def _visit(
        self, trainer: Any, pl_module: Any, window: Batch, batch_idx: int, due: set[str], arrived: float
    ) -> None:
        """Looks at the module as it is, and logs what was seen."""
        name, step = type(self).__name__, trainer.global_step
        if self._data is None:
            self._data = training_data(trainer, pl_module, name, self.dataloader)
        with quiet(trainer, pl_module, (*self._data.objects, self.loss_fn)) as isolation:
            as_trained = self.precision == "as_trained"
            loss = training_loss(trainer, pl_module, loss_fn=self.loss_fn, batch_idx=batch_idx, as_trained=as_trained)
            objective = Objective(pl_module, loss, self._data.source, isolation)
            if self._plan is None or self._findings is None:
                self._findings = self._prepare(trainer, objective)
                due = self._due(step)
                if not due:
                    return
            plan = self._plan_now(trainer)
            limits = applied_limits(trainer)
            scaling = (
                None if isinstance(limits, NoLimits) else scaling_of(limits, objective.parameters, _like(objective))
            )
            batches = None
            if self._data.sampler is not None and "mini" in due:
                isolation.reseed(derived_seed(self.seed, 4, step))
                batches = sampler_batches(
                    self._data, parts=plan.parts, count=plan.num_batches, seed=derived_seed(self.seed, 5, step)
                )
            measurement, self._warm = measure(
                objective,
                plan,
                self._findings,
                _moved(self._warm, _like(objective)),
                stream=step,
                full="full" in due,
                mini="mini" in due,
                current=window if "current" in due else None,
                batches=batches,
                scaling=scaling,
            )
        now = _now(pl_module)
        self._charge(due, measurement, now - arrived)
        share = (self._spent + now - arrived) / (now - self._began)
        self._show(trainer, measurement, limits, in_limits=scaling is not None, share=share)

    def _prepare(self, trainer: Any, objective: Objective) -> Findings:
        """Finds out what the loss allows and what a measurement costs, cuts what is too dear, and says so in a line."""
        assert self._data is not None
        source, name = objective.source, type(self).__name__
        batch_size = self.batch_size or self._data.batch_size
        check_batch_size(batch_size, source.num_samples)
        parts = self._parts(trainer, batch_size)
        findings = preflight(objective, batch_size, parts=parts, seed=self.seed)
        for warning in (*findings.warnings, *cautions(trainer, objective.module)):
            self._say(warning)
        plan = Plan(batch_size, parts, self.rel_error, self.num_batches, self.full_batch_samples, self.seed)
        plan, costs, cut = affordable(plan, findings, source.num_samples, self.max_seconds)
        if cut:
            self._say(cut)
        self._ledgers = {quantity: replace(ledger, cost=costs[quantity]) for quantity, ledger in self._ledgers.items()}
        self._plan = plan
        full = (
            source.num_samples if plan.full_batch_samples is None else min(plan.full_batch_samples, source.num_samples)
        )
        samples = (
            f"all {full:,}"
            if full == source.num_samples
            else f"a fixed random subset of {full:,} of {source.num_samples:,}"
        )
        schedule = (
            f"every {self.every_n_train_steps} steps"
            if self.every_n_train_steps
            else f"{self.overhead:.0%} of wall time"
        )
        self._notes = [
            f"MiniBS(b={plan.step_size}) over at most {plan.num_batches} mini-batches, "
            f"FullBS on {samples} samples, P = {objective.num_parameters:,}",
            f"a full measurement takes about {sum(costs.values()):.2g} s; {schedule}",
        ]
        if self._data.sampler is not None:
            self._notes.append(
                "the sampler is not uniform: MiniBS from a copy of it, FullBS uniform over the samples, "
                "no control variate"
            )
        rank_zero_info(f"{name}: {'; '.join(self._notes)}.")
        return findings

    def _parts(self, trainer: Any, batch_size: int) -> int:
        """Loader batches of one optimizer step, or 1 where the user chose a batch size."""
        assert self._data is not None
        return (
            1 if self.batch_size else max(1, min(effective_parts(trainer), self._data.source.num_samples // batch_size))
        )

    def _plan_now(self, trainer: Any) -> Plan:
        """The plan, with the accumulation that holds now."""
        assert self._plan is not None
        self._plan = replace(self._plan, parts=self._parts(trainer, self._plan.batch_size))
        return self._plan

    def _charge(self, due: set[str], measurement: SharpnessMeasurement, seconds: float) -> None:
        """Shares the seconds out: to FullBS by its products, among the others as they were expected."""
        full = measurement.full_passes * measurement.num_samples / measurement.batch_size
        shares = {"full": full / measurement.hvps if measurement.hvps else 0.0}
        others = due - {"full"}
        expected = sum(self._ledgers[quantity].cost for quantity in others)
        for quantity in others:
            shares[quantity] = (1 - shares["full"]) * (
                self._ledgers[quantity].cost / expected if expected else 1 / len(others)
            )
        for quantity in due:
            self._ledgers[quantity] = charged(self._ledgers[quantity], seconds * shares[quantity])

    # ---- where it goes
    # ---------------------------------------------------------------------------------------------------------------

    def _show(
        self,
        trainer: Any,
        measurement: SharpnessMeasurement,
        limits: StabilityLimits | NoLimits,
        *,
        in_limits: bool,
        share: float,
    ) -> None:
        """Scalars to every logger, the dashboard to those that have one, the last values to the Trainer."""
        step = logging_step(trainer)
        self._note_limits(limits, in_limits=in_limits)
        values = scalars(measurement, limits, in_limits=in_limits)
        point = phase_point(measurement, limits, in_limits=in_limits)
        if point is not None:
            self._points.append(point)
            current_phase = phase(self._points)
            if current_phase is not None:
                values[tags.PHASE] = float(current_phase)
        values[tags.COST_SHARE] = share
        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self.history.append({"step": float(step), **values})
        if len(self.history) > HISTORY:
            self.history = self.history[: HISTORY // 2 : 2] + self.history[HISTORY // 2 :]
        self.mini_batch_sharpness.reset()
        self.mini_batch_sharpness.control_mean = measurement.control_mean
        if measurement.mini_batch.values:
            self.mini_batch_sharpness.update(
                torch.tensor(measurement.mini_batch.values), torch.tensor(measurement.controls)
            )
        for logger in trainer.loggers:
            if not self._drawn:
                tags.write_layout(logger.experiment)
                tags.write_guide(logger.experiment, self._notes)
            logger.log_metrics(values, step=step)
            if measurement.mini_batch.values:
                tags.write_histogram(logger.experiment, torch.tensor(measurement.mini_batch.values), step)
        self._drawn = True
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in values.items()})
        if tags.EDGE_RATIO in values:
            trainer.progress_bar_metrics["edge_ratio"] = round(values[tags.EDGE_RATIO], 3)

    def _note_limits(self, limits: StabilityLimits | NoLimits, *, in_limits: bool) -> None:
        """Says once why some curves are missing."""
        if isinstance(limits, NoLimits):
            self._say(f"no threshold, edge ratio or phase is shown: {limits.reason}.")
        elif in_limits:
            self._say(
                "the stability limits differ between parameters, so edge ratios are measured in units of them; "
                "sharpness and threshold, which would "
                "be in other units, are not shown."
            )

    def _say(self, message: str) -> None:
        """Warns, each message once."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"{type(self).__name__}: {message}")

    # ---- checkpoints
    # -----------------------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        """Monitors with other schedules or batch sizes keep states of their own."""
        every, overhead = self._schedule_arguments
        return self._generate_state_key(every_n_train_steps=every, overhead=overhead, batch_size=self.batch_size)

    @override
    def state_dict(self) -> dict[str, Any]:
        """All that the next measurement depends on: numbers, strings and tensors."""
        top = self._warm.top
        save = top is not None and (top.numel() < SMALL_MODEL if self.save_warm_start is None else self.save_warm_start)
        return {
            "history": self.history,
            "points": [(point.mean, point.stderr, point.lower, point.upper) for point in self._points],
            "ledgers": {quantity: asdict(ledger) for quantity, ledger in self._ledgers.items()},
            "plan": None if self._plan is None else asdict(self._plan),
            "findings": None if self._findings is None else asdict(self._findings),
            "notes": self._notes,
            "warm_start": {"top": top, "others": self._warm.others} if save else {},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved monitor stood."""
        self.history = list(state_dict["history"])
        self._points = deque((Estimate(*point) for point in state_dict["points"]), maxlen=5)
        self._ledgers = {quantity: Ledger(**ledger) for quantity, ledger in state_dict["ledgers"].items()}
        self._plan = Plan(**state_dict["plan"]) if state_dict["plan"] else None
        self._findings = Findings(**state_dict["findings"]) if state_dict["findings"] else None
        self._notes = list(state_dict["notes"])
        self._warm = WarmStart(**state_dict["warm_start"])


def _check_schedule(every_n_train_steps: int | None, overhead: float | None, max_seconds: float) -> None:
    """Refuses schedules that make no sense."""
    if every_n_train_steps is not None and overhead is not None:
        raise ValueError(
            f"every_n_train_steps={every_n_train_steps} and overhead={overhead} are two schedules: "
            "choose one, or neither for overhead=0.05."
        )
    if every_n_train_steps is not None and every_n_train_steps < 1:
        raise ValueError(
            f"every_n_train_steps={every_n_train_steps} must be at least 1; leave it out for a share of wall time."
        )
    if overhead is not None and not 0 < overhead < 1:
        raise ValueError(f"overhead={overhead} is a share of the wall time and must lie between 0 and 1, as 0.05 does.")
    if not max_seconds > 0:
        raise ValueError(f"max_seconds={max_seconds} must be positive: it is the upper limit of one measurement.")


def _now(pl_module: Any) -> float:
    """The time at which the device has done all that it was told."""
    device = next(pl_module.parameters()).device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def _like(objective: Objective) -> Tensor:
    """A vector with the dtype and device of Krylov vectors."""
    return torch.empty(0, dtype=krylov_dtype(objective), device=objective.parameters[0].device)


def _moved(warm: WarmStart, like: Tensor) -> WarmStart:
    """A warm start from a checkpoint, on the device of the parameters."""
    return WarmStart(*(None if vector is None else vector.to(like) for vector in (warm.top, warm.others)))
