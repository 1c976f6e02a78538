"""`LearningRateRescaler`: the learning rate follows the batch size, and what was measured of the edge."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_eoss import checks
from lightning_eoss.display import page, tags
from lightning_eoss.theory.control import CurvePoint, Reading, batch_factor, limit_rate, saturation, steer
from lightning_eoss.theory.optimizers import PLAIN
from lightning_eoss.theory.scaling import Rule, scaling_rule
from lightning_eoss.theory.statistics import scaled
from lightning_eoss.training import rates
from lightning_eoss.training.probe import logging_step, step_parts, steps_now
from lightning_eoss.training.watch import Watch


class LearningRateRescaler(Callback):
    r"""Rescales the learning rate when the batch size changes, and keeps it below the edge where one is measured.

    This changes training. The rate of a step is

    .. math:: \eta = f(B) \cdot \min(c \cdot \eta_{\text{schedule}},\; \eta_{\max})

    - :math:`f(B)`, the rule: :math:`B / B_0` for SGD, :math:`\sqrt{B / B_0}` for Adam and its kin. B is the *effective*
      batch size, the loader's times the accumulation times the processes, so this reacts to
      GradientAccumulationScheduler and to reloaded loaders. Where a `SharpnessMonitor` has measured the threshold curve
      at the batch size before, a larger batch gets no more than that allows.
    - :math:`\eta_{\max}`, with ``max_edge_ratio``: the rate at which the measured edge ratio would be that.
    - :math:`c`, with ``target_edge_ratio``: a slow controller, that by default only lowers.

    It composes with every scheduler: the factor lies over the schedule's own rate during steps alone, so schedulers,
    checkpoints and the module's hooks see the rates that they set (also if ``training_step`` logs one itself).
    LearningRateMonitor and the monitors of this package see the rate that is used; they are moved behind this callback.

    **Choosing them.** Both are judged on the directional edge ratio. Under plain SGD it rises by itself until it swings
    around 1, whatever the batch size. So choose a target of 1, and a limit with room for the swings, 1.2. Less does not
    hold a network still: it goes on sharpening, and the rate follows, down and down. But with momentum :math:`\mu` and
    small batches it settles at :math:`(1 - \mu) / (1 + \mu)`. There, choose no more than that: training may diverge
    below 1. MiniBS (``judged_on="MiniBS"``) lies above 1 at the edge, the more the smaller the batches.

    Measure often: a training far beyond the edge is lost within ten steps, and what is measured then saves nothing.

    A measurement counts for the very step that it was taken for. What is NaN, of another batch size, or of an earlier
    step changes nothing. A rate is lowered on the mean, and raised on the upper end of the 95 % interval alone.

    Args:
        rule: ``"linear"``, ``"sqrt"``, or ``"auto"`` for what the optimizer needs.
        base_batch_size: Effective batch size :math:`B_0` that the configured rate is meant for; None: that of the first
            step.
        max_edge_ratio: Largest edge ratio, kept at once and between measurements; needs a `SharpnessMonitor`.
        target_edge_ratio: Edge ratio that the controller holds; needs a `SharpnessMonitor`.
        judged_on: Which edge ratio.
        dead_band: Relative deviation from the target at which the controller does nothing.
        max_change: Largest factor by which a measurement changes the rate, unless it is surely too high.
        cool_down: Steps after a change in which a measurement changes nothing, unless the rate is surely too high.
        warm_up: Steps at the start in which no measurement changes the rate; None: 10 for adaptive optimizers, whose
            preconditioner has seen too few gradients before, and 0 for SGD.
        min_scale: Neither controller nor limit lower the schedule's rate by more than this factor.
        max_scale: The controller raises it by no more than this factor; 1: it only protects.
        dry_run: Show what would be done and do nothing.
        num_samples: Samples of a batch where its loader does not tell, a number or a function of a batch; None: what
            the batch says (``batch_size``, ``num_graphs``), or the length that all its tensors have.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of its range.
        MisconfigurationException: At `setup` or `on_fit_start`, if the rate cannot be changed, or if there is no
            monitor to go by.

    Example:
        >>> LearningRateRescaler(max_edge_ratio=1.2).rule
        'auto'

    Source: Granziol, Zohren and Roberts, sections 10 and 11.
    """

    dashboard_categories = frozenset({tags.LEARNING_RATE})  # what it shows on the dashboard

    def __init__(
        self,
        rule: Literal["auto", "linear", "sqrt"] = "auto",
        base_batch_size: int | None = None,
        max_edge_ratio: float | None = None,
        target_edge_ratio: float | None = None,
        judged_on: Literal["directional", "MiniBS"] = "directional",
        dead_band: float = 0.15,
        max_change: float = 1.1,
        cool_down: int = 10,
        warm_up: int | None = None,
        min_scale: float = 1e-3,
        max_scale: float = 1.0,
        dry_run: bool = False,
        num_samples: int | Callable[[Any], int] | None = None,
    ) -> None:
        checks.one_of("rule", rule, ("auto", "linear", "sqrt"), "use 'linear', 'sqrt', or 'auto' for the optimizer's.")
        checks.one_of("judged_on", judged_on, ("directional", "MiniBS"), "use 'directional' or 'MiniBS'.")
        first = "must be positive, or None for the batch size of the first step."
        checks.whole("base_batch_size", base_batch_size, 1, first, none=True)
        checks.whole("cool_down", cool_down, 0, "must be a number of steps; 0 is none.")
        checks.whole("warm_up", warm_up, 0, "must be a number of steps; 0 is none.", none=True)
        _check_limits(max_edge_ratio, target_edge_ratio, dead_band, max_change, min_scale, max_scale)
        self.rule = rule
        self.base_batch_size = base_batch_size
        self.max_edge_ratio = max_edge_ratio
        self.target_edge_ratio = target_edge_ratio
        self.judged_on = judged_on
        self.dead_band = dead_band
        self.max_change = max_change
        self.cool_down = cool_down
        self.warm_up = warm_up
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.dry_run = dry_run
        self._watch = Watch(type(self).__name__, num_samples=num_samples, page=page.write_page)
        self._overlay = rates.Overlay(self._scale)
        self._monitor: Any = None
        self._forget()

    def _forget(self) -> None:
        """Nothing has been seen."""
        self._step_size = rates.StepSize(self._watch.count)
        # What checkpoints hold.
        self._base: float | None = None  # batch size that the schedule's rates are meant for
        self._size: float | None = None  # batch size now
        self._batch_factor = 1.0
        self._control = 1.0  # the controller's factor
        self._changed: int | None = None  # step at which a measurement changed the rate last
        self._limit = math.inf  # of the schedule's rate times the controller's factor
        # Step and edge ratio, by the rate that it was measured at; of MiniBS also b and the number of samples.
        self._full: tuple[int, float] | None = None
        self._mini: tuple[int, float, int, int] | None = None
        # What is of one fit.
        self._stepped: tuple[int, float] | None = None  # the step at hand, and the largest rate that it would take
        self._used = -1  # step of the last measurement considered

    @property
    def history(self) -> list[dict[str, float]]:
        """What was logged, oldest first, each with its `step`; thinned above 10,000."""
        return self._watch.history

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be rescaled, and takes its place among the callbacks."""
        if stage != "fit":
            return
        name = type(self).__name__
        rates.refuse_other_steps(trainer, pl_module, name)
        twins = [each for each in trainer.callbacks if isinstance(each, LearningRateRescaler)]
        if len(twins) > 1:
            raise MisconfigurationException(
                f"This Trainer has {len(twins)} callbacks {name}, and each would rescale what the other has rescaled. "
                "Leave one."
            )
        learning = [each for each in trainer.callbacks if type(each).__name__ == "SpectralLearningRate"]
        if learning and not (self.dry_run or learning[0].dry_run):
            raise MisconfigurationException(
                f"{name} and SpectralLearningRate are both in this Trainer: one learns the rate anew at each "
                "batch size, the other would multiply it by the rule once more. Leave one, or set dry_run=True for one."
            )
        if trainer.global_step == 0:  # another Trainer; a checkpoint is loaded later
            self._forget()
        measuring = [each for each in trainer.callbacks if isinstance(getattr(each, "latest", 0), Reading | None)]
        measuring.sort(key=lambda each: getattr(each, "batch_size", None) is not None)  # that of steps comes first
        self._monitor = measuring[0] if measuring else None
        for argument in ("max_edge_ratio", "target_edge_ratio"):
            if getattr(self, argument) is not None and self._monitor is None:
                raise MisconfigurationException(
                    f"{name}({argument}={getattr(self, argument)}) has nobody to measure an edge ratio, so it would "
                    "never act. Add a SharpnessMonitor() to the callbacks, or leave the argument out."
                )
        if not self.dry_run:
            rates.frame_watchers(trainer, self, self._overlay, self._look_again)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses optimizers without a rate or without a rule."""
        self._watch.begin()
        optimizer = rates.the_optimizer(trainer, type(self).__name__)
        if self.rule == "auto":
            try:
                scaling_rule(optimizer)
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__}(rule='auto'): {error}") from None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Reaches into the optimizer's steps, after a checkpoint has been loaded."""
        self._step_size, self._stepped, self._used = rates.StepSize(self._watch.count), None, -1
        self._held: bool | None = None  # whether the limit is what counts
        self._news = True  # whether there is something to log
        self._logged = -1  # where it was logged last
        self._reach(trainer)

    def _reach(self, trainer: Any) -> None:
        """Holds on to the optimizer, and to another one where the Trainer has got it meanwhile."""
        optimizer = rates.the_optimizer(trainer, type(self).__name__)
        if optimizer is self._overlay.optimizer:
            return
        if self.dry_run:
            self._overlay.optimizer = optimizer
        else:
            self._overlay.attach(optimizer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Shows those who log once an epoch the rate that is going to be used."""
        self._reach(trainer)
        if self._size is not None or self.base_batch_size is not None:  # else the first step tells the base
            self._look_at_batch_size(trainer)
        if not self.dry_run:
            self._overlay.apply()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Follows the batch size, and shows the monitors the rate of the step that comes."""
        self._reach(trainer)
        if self.dry_run:  # callbacks have stayed where they were: the monitor may come later
            self._look_at_reading(trainer)
        self._look_at_batch_size(trainer, batch)
        own = self._overlay.own
        usual = steps_now(trainer) and step_parts(trainer) >= self._step_size.parts(trainer)
        if self._monitor is not None and usual:  # a step that the epoch's end cuts short says nothing about the others
            self._stepped = (trainer.global_step, rates.largest_rate(own) * (1.0 if self.dry_run else self._scale(own)))
        if self.dry_run:
            self._look_again(trainer)
        else:
            self._overlay.apply()

    def _look_again(self, trainer: Any) -> None:
        """Follows what monitors have just measured, for the step that they have measured, and logs the rate."""
        if self._look_at_reading(trainer) and not self.dry_run:
            self._overlay.apply()
        x, every = logging_step(trainer), trainer.log_every_n_steps
        if self._news or (every and (x + 1) % every == 0 and x != self._logged):  # where LearningRateMonitor logs, too
            self._news, self._logged = False, x
            own = self._overlay.own
            scale = self._scale(own)
            values = {
                tags.LEARNING_RATE_APPLIED: float(own[0] * (1.0 if self.dry_run else scale)),
                tags.LEARNING_RATE_SUGGESTED: float(own[0] * scale),
                tags.LEARNING_RATE_SCALE: scale,
            }
            self._watch.publish(trainer, self, values)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Checkpoints hold the schedule's own rates, even one that is made by a callback that sees the others."""
        self._overlay.correct(checkpoint)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lets go of the optimizer."""
        self._overlay.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of the optimizer, before a checkpoint is made of it; `teardown` does not come."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the list of callbacks as long as it was."""
        self._overlay.detach()
        rates.unframe_watchers(trainer, self._overlay)

    # ---- decisions ---------------------------------------------------------------------------------------------------

    def _scale(self, own: Sequence[Any]) -> float:
        """The factor to the schedule's own rates."""
        factor = self._control
        if self._limit < math.inf:
            largest = rates.largest_rate(own)
            factor = min(factor, self._limit / largest) if largest > 0 else factor
        return self._batch_factor * max(factor, self.min_scale)

    def _look_at_batch_size(self, trainer: Any, batch: Any = None) -> None:
        """Follows the batch size, and notices where the schedule meets the limit."""
        own = self._overlay.own
        largest, before = rates.largest_rate(own), self._scale(own)
        reasons = self._follow_batch_size(trainer, batch)
        self._say_change(trainer, largest, before, self._scale(own), reasons)
        held = self._limit < self._control * largest
        if self._held is (not held):
            now = f"held at {largest * self._scale(own):.4g}" if held else "the schedule's own again"
            limit = f"max_edge_ratio={self.max_edge_ratio} allows {self._limit * self._batch_factor:.4g}"
            self._say(trainer, f"{'would be' if self.dry_run else 'is'} {now}: {limit}")
        self._held = held

    def _look_at_reading(self, trainer: Any) -> bool:
        """Follows a measurement of the step at hand, where there is one; whether that changed the rate."""
        reading = self._next_reading()
        if reading is None:
            return False
        own, step = self._overlay.own, trainer.global_step
        largest, before = rates.largest_rate(own), self._scale(own)
        reasons = self._follow(reading, largest, step)
        after = self._scale(own)
        self._say_change(trainer, largest, before, after, reasons)
        self._held = self._limit < self._control * largest
        if after != before:
            self._changed = step
        return after != before

    def _say_change(self, trainer: Any, largest: float, before: float, after: float, reasons: list[str]) -> None:
        """A change of the factor, with its reasons."""
        if after != before:
            verb = "would go" if self.dry_run else "goes"
            self._say(trainer, f"{verb} from {largest * before:.4g} to {largest * after:.4g}: {' and '.join(reasons)}")

    def _say(self, trainer: Any, what: str) -> None:
        """A change, in a line."""
        self._news = True
        groups = len(self._overlay.own)
        which = "the learning rate" if groups == 1 else f"the largest learning rate of {groups} groups"
        self._watch.tell([f"step {trainer.global_step}, {which} {what}"])

    def _follow_batch_size(self, trainer: Any, batch: Any) -> list[str]:
        """Rescales by the rule; the reason, where there is one."""
        size = self._step_size.now(trainer, batch)
        if size is None or size == self._size:
            return []
        if self._base is None:
            self._base = self.base_batch_size or size
        old, self._size = self._size or self._base, size
        if size == old:
            return []
        assert self._overlay.optimizer is not None
        rule: Rule = scaling_rule(self._overlay.optimizer) if self.rule == "auto" else self.rule
        allowed = math.nan
        if self._full and self._mini:
            (full_step, full), (mini_step, mini, mini_size, num_samples) = self._full, self._mini
            point = CurvePoint(min(full_step, mini_step), mini_size, mini, full, num_samples)
            allowed = saturation(point, old, size, step=trainer.global_step)
        by_rule = batch_factor(self._base, old, size, rule, old_factor=self._batch_factor)
        self._batch_factor = batch_factor(
            self._base, old, size, rule, old_factor=self._batch_factor, saturating=allowed
        )
        why = f"a step has {size} samples in place of {old}, {rule} rule"
        if self._batch_factor < by_rule:
            why += f" cut to what the measured threshold curve allows, {self._batch_factor / by_rule:.3g} of it"
        return [why]

    def _next_reading(self) -> Reading | None:
        """A measurement of the step at hand (in a dry run of the one before), each once."""
        reading: Reading | None = getattr(self._monitor, "latest", None)
        if reading is None or self._stepped is None or not self._used < reading.step <= self._stepped[0]:
            return None
        self._used, (step, rate) = reading.step, self._stepped
        if reading.step != step or not rate > 0:  # too old, or of no rate at all
            return None
        if math.isfinite(reading.full_batch):
            self._full = (step, reading.full_batch / rate)
        if math.isfinite(reading.mini_batch.mean):
            self._mini = (step, reading.mini_batch.mean / rate, reading.batch_size, reading.num_samples)
        return reading

    def _follow(self, reading: Reading, largest: float, step: int) -> list[str]:
        """Judges a measurement by limit and target; the reasons for what changes."""
        assert self._stepped is not None and self._size is not None
        if (self.max_edge_ratio is None and self.target_edge_ratio is None) or step < self._first_step():
            return []
        if reading.batch_size not in (round(self._size), round(min(self._size, reading.num_samples))):
            self._watch.say(
                f"measurements are of batches of {reading.batch_size} samples and steps have {self._size}, so the "
                "learning rate does not follow them. Leave batch_size= of the SharpnessMonitor out."
            )
            return []
        ratio = reading.directional if self.judged_on == "directional" else reading.mini_batch
        rate = self._stepped[1] / self._batch_factor
        cooling = self._changed is not None and step - self._changed < self.cool_down
        limit, control, crossed = self._limit, self._control, []
        if self.max_edge_ratio is not None:
            most = 1.0 if cooling else self.max_change
            self._limit = limit_rate(limit, rate, ratio, self.max_edge_ratio, max_change=most)
            if limit != self._limit:
                crossed.append(f"max_edge_ratio={self.max_edge_ratio}")
        if self.target_edge_ratio is not None:
            self._control = steer(
                control,
                scaled(ratio, largest * control / rate),  # at the rate that comes, and without the limit
                target=self.target_edge_ratio,
                dead_band=self.dead_band,
                max_change=self.max_change,
                lowest=self.min_scale,
                highest=self.max_scale,
                cooling=cooling,
            )
            if control != self._control:
                crossed.append(f"target_edge_ratio={self.target_edge_ratio}")
        return [f"the {self.judged_on} edge ratio was {ratio}, with {' and '.join(crossed)}"] if crossed else []

    def _first_step(self) -> int:
        """The first whose measurement may change the rate."""
        if self.warm_up is not None:
            return self.warm_up
        return 0 if isinstance(self._overlay.optimizer, tuple(PLAIN)) else _YOUNG

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The factor's parts and what they rest on: plain numbers."""
        asked = {"rule": self.rule, "max_edge_ratio": self.max_edge_ratio, "history": self.history}
        return {name: getattr(self, f"_{name}") for name in _SAVED} | asked

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved callback stood."""
        for name in _SAVED:
            setattr(self, f"_{name}", state_dict[name])
        self._watch.history = list(state_dict["history"])
        was = state_dict["max_edge_ratio"]
        self._limit = self._limit * self.max_edge_ratio / was if self.max_edge_ratio and was else math.inf
        if self.rule != state_dict["rule"]:  # from the base on by the new one
            self._size, self._batch_factor = None, 1.0
        if self.target_edge_ratio is None:
            self._control = 1.0
        if self.base_batch_size not in (None, self._base):  # another one by now: the rule starts anew
            self._base = self._size = None
            self._batch_factor = 1.0


_YOUNG = 10  # steps until an adaptive optimizer's limits say something: the first gradient's are ten times too low
_SAVED = ("base", "size", "batch_factor", "control", "changed", "limit", "full", "mini")


def _check_limits(
    max_edge_ratio: float | None,
    target_edge_ratio: float | None,
    dead_band: float,
    max_change: float,
    min_scale: float,
    max_scale: float,
) -> None:
    """Refuses limits that hold nothing."""
    for name, ratio in (("max_edge_ratio", max_edge_ratio), ("target_edge_ratio", target_edge_ratio)):
        words = "must be positive (1 is the edge), or None for none."
        checks.number(name, ratio, words, above=0, below=math.inf, none=True)
    for name, value in (("dead_band", dead_band), ("min_scale", min_scale), ("max_scale", max_scale)):
        checks.number(name, value)
    if not 0 <= dead_band < 1:
        raise ValueError(f"dead_band={dead_band} is a relative deviation and must be from 0 to 1, as 0.15 is.")
    words = "is a factor and must be above 1: else the controller never moves."
    checks.number("max_change", max_change, words, above=1, below=math.inf)
    if not 0 < min_scale <= 1 <= max_scale < math.inf:
        raise ValueError(
            f"min_scale={min_scale} and max_scale={max_scale} must be positive and have 1 between them: training "
            "starts at the schedule's own rate."
        )
