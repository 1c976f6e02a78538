"""`LearningRateRescaler`: the learning rate follows the batch size, and what was measured of the edge."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_eoss import checks
from lightning_eoss.display import tags
from lightning_eoss.theory import control
from lightning_eoss.theory.control import Decision, RateSettings, RateState, Reading
from lightning_eoss.theory.optimizers import PLAIN
from lightning_eoss.theory.scaling import largest_rate, scaling_rule
from lightning_eoss.training import rates
from lightning_eoss.training.monitor import Publisher
from lightning_eoss.training.probe import logging_step, step_parts, steps_now
from lightning_eoss.training.watch import Watch

_YOUNG = 10  # steps until an adaptive optimizer's limits say something: the first gradient's are ten times too low


class LearningRateRescaler(Publisher):
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
        *,
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
        first = "must be positive, or None for the batch size of the first step."
        checks.whole("base_batch_size", base_batch_size, 1, first, none=True)
        self.rule, self.base_batch_size, self.dry_run = rule, base_batch_size, dry_run
        self.max_edge_ratio, self.target_edge_ratio, self.judged_on = max_edge_ratio, target_edge_ratio, judged_on
        self.dead_band, self.max_change, self.cool_down, self.warm_up = dead_band, max_change, cool_down, warm_up
        self.min_scale, self.max_scale = min_scale, max_scale
        self._settings = self._asked()
        self.watch = Watch(type(self).__name__, num_samples=num_samples)
        self._overlay = rates.Overlay(self._scale)
        self._state = RateState()
        self._monitor: Any = None

    def _asked(self) -> RateSettings:
        """What the attributes ask for."""
        return RateSettings(**{each.name: getattr(self, each.name) for each in fields(RateSettings)})

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
        measuring = [each for each in trainer.callbacks if isinstance(getattr(each, "reading", 0), Reading | None)]
        measuring.sort(key=lambda each: getattr(each, "batch_size", None) is not None)  # that of steps comes first
        self._monitor = measuring[0] if measuring else None
        for argument in ("max_edge_ratio", "target_edge_ratio"):
            if getattr(self, argument) is not None and self._monitor is None:
                raise MisconfigurationException(
                    f"{name}({argument}={getattr(self, argument)}) has nobody to measure an edge ratio, so it would "
                    "never act. Add a SharpnessMonitor() to the callbacks, or leave the argument out."
                )
        if trainer.global_step == 0:  # another Trainer; a checkpoint is loaded later
            self._state = RateState()
        if not self.dry_run:
            rates.frame_watchers(trainer, self, self._overlay, self._follow_and_show)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses optimizers without a rate or without a rule."""
        self.watch.begin()
        optimizer = rates.optimizer_with_rates(trainer, type(self).__name__)
        if self.rule == "auto":
            try:
                scaling_rule(optimizer)
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__}(rule='auto'): {error}") from None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Reaches into the optimizer's steps, after a checkpoint has been loaded."""
        self._state = replace(self._state, read=-1)
        self._step_size = rates.StepSize(self.watch.count)
        self._taken: tuple[int, float] | None = None  # the step that can be measured, and the largest rate it takes
        self._held: bool | None = None  # whether the limit is what counts
        self._news, self._logged = True, -1  # whether there is something to log, and where that was last
        self._reach(trainer)

    def _reach(self, trainer: Any) -> None:
        """Holds on to the optimizer, and to another one where the Trainer has got it meanwhile."""
        optimizer = rates.optimizer_with_rates(trainer, type(self).__name__)
        if optimizer is not self._overlay.optimizer:
            self._overlay.attach(optimizer, dry=self.dry_run)
            self._settings = self._asked()
            if self.warm_up is None and not isinstance(optimizer, tuple(PLAIN)):
                self._settings = replace(self._settings, warm_up=_YOUNG)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Shows those who log once an epoch the rate that is going to be used."""
        self._reach(trainer)
        if self._state.size is not None or self.base_batch_size is not None:  # else the first step tells the base
            self._follow_batch_size(trainer)
        self._overlay.apply()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Follows the batch size, and shows the monitors the rate of the step that comes."""
        self._reach(trainer)
        if self.dry_run:  # callbacks have stayed where they were: the monitor may come later
            self._follow_monitor(trainer)
        self._follow_batch_size(trainer, batch)
        # A step that the epoch's end cuts short says nothing about the others.
        if steps_now(trainer) and step_parts(trainer) >= self._step_size.parts(trainer):
            self._taken = (trainer.global_step, largest_rate(self._overlay.applied))
        self._overlay.apply()
        if self.dry_run:
            self._follow_and_show(trainer)

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

    # ---- what is decided is done, said and logged --------------------------------------------------------------------

    def _scale(self, own: Sequence[Any]) -> float:
        """The factor to the schedule's own rates."""
        return control.rate_scale(self._state, self._settings, largest_rate(own))

    def _follow_batch_size(self, trainer: Any, batch: Any = None) -> None:
        """Follows the batch size, and notices where the schedule meets the limit."""
        size = self._step_size.samples(trainer, batch)
        if size is not None and size != self._state.size:
            assert self._overlay.optimizer is not None
            rule = scaling_rule(self._overlay.optimizer) if self.rule == "auto" else self.rule
            self._adopt(
                trainer, control.resized(self._state, size, rule, step=trainer.global_step, base=self.base_batch_size)
            )
        rate = largest_rate(self._overlay.own)
        held = control.held(self._state, self._settings, rate)
        if self._held is (not held):
            comes = f"held at {rate * self._scale([rate]):.4g}" if held else "the schedule's own again"
            allowed = f"{control.highest_rate(self._state, self._settings):.4g}"
            verb = "would be" if self.dry_run else "is"
            self._say(trainer, f"{verb} {comes}: max_edge_ratio={self.max_edge_ratio} allows {allowed}")
        self._held = held

    def _follow_monitor(self, trainer: Any) -> None:
        """Follows a measurement of the step at hand (in a dry run of the one before), where there is one."""
        reading: Reading | None = getattr(self._monitor, "reading", None)
        if reading is None or self._taken is None:
            return
        rate = largest_rate(self._overlay.own)
        decision = control.followed(
            self._state, reading, self._settings, step=trainer.global_step, rate=rate, taken=self._taken
        )
        if decision.state is self._state:
            return
        if not decision.comparable:
            self.watch.say(
                f"measurements are of batches of {reading.batch_size} samples and steps have {self._state.size}, so "
                "the learning rate does not follow them. Leave batch_size= of the SharpnessMonitor out."
            )
        self._adopt(trainer, decision)
        self._held = control.held(self._state, self._settings, rate)

    def _adopt(self, trainer: Any, decision: Decision) -> None:
        """Goes by a decision from now on, and says what it changes."""
        rate = largest_rate(self._overlay.own)
        before, after = (control.rate_scale(s, self._settings, rate) for s in (self._state, decision.state))
        self._state = decision.state
        if after != before:
            verb = "would go" if self.dry_run else "goes"
            self._say(trainer, f"{verb} from {rate * before:.4g} to {rate * after:.4g}: {decision.reason}")

    def _say(self, trainer: Any, what: str) -> None:
        """A change, in a line."""
        self._news = True
        groups = len(self._overlay.own)
        which = "the learning rate" if groups == 1 else f"the largest learning rate of {groups} groups"
        self.watch.tell([f"step {trainer.global_step}, {which} {what}"])

    def _follow_and_show(self, trainer: Any, *_: Any) -> None:
        """Follows what monitors have just measured, for the step that they have measured, and logs the rate."""
        self._follow_monitor(trainer)
        self._overlay.apply()
        x, every = logging_step(trainer), trainer.log_every_n_steps
        if self._news or (every and (x + 1) % every == 0 and x != self._logged):  # where LearningRateMonitor logs, too
            self._news, self._logged = False, x
            own = self._overlay.own
            values = {
                tags.LEARNING_RATE_APPLIED: float(self._overlay.applied[0]),
                tags.LEARNING_RATE_SUGGESTED: float(own[0] * self._scale(own)),
                tags.LEARNING_RATE_SCALE: self._scale(own),
            }
            self.watch.publish(trainer, self, values)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The factor's parts and what they rest on: plain numbers."""
        return {**asdict(self._state), "rule": self.rule, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved callback stood, as far as the arguments are the same."""
        saved = _translated(state_dict) if "control" in state_dict else state_dict
        known = {each.name: saved[each.name] for each in fields(RateState)}
        state = RateState(**{**known, "curve": control.CurvePoint(**saved["curve"])})
        if self.max_edge_ratio is None:
            state = replace(state, limit=0.0)
        if self.target_edge_ratio is None:
            state = replace(state, controller=1.0)
        if self.rule != saved["rule"] or self.base_batch_size not in (None, state.base):
            state = control.restarted(state, self.base_batch_size)
        self._state, self.watch.history = state, list(saved["history"])


def _translated(old: dict[str, Any]) -> dict[str, Any]:
    """A state of version 0.1, which held the limit as a rate of the schedule's, and the curve in two parts."""
    nothing = (-1, math.nan, 0, 0)
    full, mini = old["full"] or nothing, old["mini"] or nothing
    curve = control.CurvePoint(max(full[0], mini[0]), mini[2], mini[1], full[1], mini[3])
    limit = (old["max_edge_ratio"] or 0.0) / (old["limit"] * old["batch_factor"])
    return {**old, "controller": old["control"], "limit": limit, "curve": asdict(curve), "read": -1}
