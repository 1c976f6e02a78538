"""The learning rate that steps really take, where it is not the schedule's own.

A factor to the learning rate cannot simply be multiplied into the optimizer: recursive schedulers (StepLR) would carry
it on, closed-form ones (LambdaLR, OneCycleLR) overwrite it at the next step, and checkpoints would hold it. So it is an
*overlay*. It lies over the schedule's own rate only while the optimizer steps, and while callbacks that watch the rate
look at it. Schedulers, checkpoints and the module's hooks see the schedule's own rate, to the last bit; the factor is
all that there is to save.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.optim import Optimizer

from lightning_eoss.curvature.batches import num_samples_of
from lightning_eoss.training import probe
from lightning_eoss.training.data import PASS_NUM_SAMPLES, own_batch_sizes

Factor = Callable[[Sequence[Any]], float]  # the groups' own rates, numbers or tensors, to the factor to all of them


# ---- the overlay -----------------------------------------------------------------------------------------------------


@dataclass
class _Covered:
    """A parameter group whose rate is covered."""

    group: dict[str, Any]
    own: Any  # its own rate; of a tensor a copy
    applied: Any  # what was put there; of a tensor the tensor itself
    version: int  # of the tensor

    def untouched(self) -> bool:
        """Whether the group still has the rate that was put there; seen without waiting for a device."""
        return self.group["lr"] is self.applied and getattr(self.applied, "_version", 0) == self.version


class Overlay:
    """A factor over the learning rates of an optimizer, on and off again without a trace.

    A rate that somebody else sets while it is covered (a warm-up by hand) is taken for the group's new own rate.
    """

    def __init__(self, factor: Factor) -> None:
        """Covers nothing yet; `factor` says by how much, each time anew, from the groups' own rates."""
        self.optimizer: Optimizer | None = None
        self._factor = factor
        self._covered: list[_Covered] = []
        self._handles: list[Any] = []

    @property
    def own(self) -> list[Any]:
        """The own rates of the groups, covered or not."""
        assert self.optimizer is not None
        own = {id(each.group): each.own for each in self._covered if each.untouched()}
        return [own.get(id(group), group["lr"]) for group in self.optimizer.param_groups]

    @property
    def applied(self) -> list[Any]:
        """The rates of the groups that a step takes, covered just now or not."""
        own = self.own
        factor = self._factor(own) if self._handles else 1.0
        return [rate * factor for rate in own]

    def attach(self, optimizer: Optimizer, *, dry: bool = False) -> None:
        """Covers the rates in each of the optimizer's steps from now on; in a dry run in none."""
        self.detach()
        self.optimizer = optimizer
        if not dry:  # a step that a GradScaler skips calls none of them: its rates are not touched
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self.undo),
            ]

    def detach(self) -> None:
        """Uncovers the rates and lets go of the optimizer."""
        self.undo()
        for handle in self._handles:
            handle.remove()
        self._handles, self.optimizer = [], None

    def apply(self) -> None:
        """Covers the rates; where they are covered, they are covered anew."""
        self.undo()
        if self.optimizer is None or not self._handles:
            return
        groups = self.optimizer.param_groups
        factor = self._factor([group["lr"] for group in groups])
        if factor == 1:
            return
        for rate in {id(group["lr"]): group["lr"] for group in groups}.values():  # groups may share one tensor
            own = rate.detach().clone() if isinstance(rate, Tensor) else rate
            sharing = [group for group in groups if group["lr"] is rate]
            for group in sharing:
                write_rate(group, own * factor)
            self._covered += [_Covered(each, own, each["lr"], getattr(each["lr"], "_version", 0)) for each in sharing]

    def undo(self, *_: Any) -> None:
        """Puts the own rates back, bit for bit, whoever calls; nothing happens where they are not covered."""
        covered, self._covered = self._covered, []
        untouched = [each for each in covered if each.untouched()]  # before a tensor that groups share is written to
        for each in untouched:
            write_rate(each.group, each.own)

    def correct(self, checkpoint: dict[str, Any]) -> None:
        """Puts the own rates into a checkpoint of Lightning's that was made while they were covered."""
        for state in checkpoint.get("optimizer_states", [])[:1] if self._covered else []:
            for group, own in zip(state.get("param_groups", []), self.own, strict=False):
                group["lr"] = own

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Covers the rates, but not for the training step that the optimizer calls."""
        self.apply()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def uncovered() -> Any:
            self.undo()  # an exception leaves it at that
            result = closure()
            self.apply()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": uncovered}
        return (args[0], uncovered, *args[2:]), kwargs


def write_rate(group: dict[str, Any], rate: Any) -> None:
    """Into a parameter group, in place where that has a tensor: compiled and captured steps hold on to it."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].copy_(torch.as_tensor(rate, dtype=group["lr"].dtype))
    else:
        group["lr"] = rate


# ---- who sees it -----------------------------------------------------------------------------------------------------


def frame_watchers(trainer: Any, callback: Callback, overlay: Overlay, look: Callable[..., None]) -> None:
    """Orders the callbacks at `setup`, around those that look at learning rates.

    1. All that know nothing of rates, or set them: schedulers of the accumulation, finetuning, weight averaging, a
       user's own warm-up. They see and set the schedule's own rates.
    2. The callback that covers the rates, in its `on_train_epoch_start` and `on_train_batch_start`.
    3. The monitors of this package, which measure at the rates that the step is going to take.
    4. `look`, an `on_train_batch_start` that may change them by what was measured.
    5. LearningRateMonitor, which shows the rates that the step takes.
    6. The end of the cover: the module's own hooks come next.
    7. Checkpoint callbacks.

    The Trainer gets a new list, since it walks through the old one just now. Another callback that covers the rates is
    refused.
    """
    unframe_watchers(trainer, overlay)
    if any(isinstance(getattr(each, "overlay", None), Overlay) for each in trainer.callbacks):
        raise MisconfigurationException(
            f"{type(callback).__name__} is not the only callback of this Trainer that changes the learning rate of "
            "each step, and one would take the other's rate for the schedule's own. Leave one of them."
        )
    looking = between(overlay, on_train_batch_start=look)
    ending = between(overlay, on_train_batch_start=overlay.undo, on_train_epoch_start=overlay.undo)
    ours = {id(callback): 2, id(looking): 4, id(ending): 6}
    trainer.callbacks = sorted(
        [*trainer.callbacks, looking, ending], key=lambda each: ours.get(id(each)) or _place(each)
    )


def unframe_watchers(trainer: Any, overlay: Overlay) -> None:
    """Takes what an overlay needs between callbacks out of their list."""
    trainer.callbacks = [each for each in trainer.callbacks if getattr(each, "overlay", None) is not overlay]


def between(overlay: Overlay, **hooks: Callable[..., None]) -> LambdaCallback:
    """Does something for an overlay between callbacks; Trainers have it while they fit."""
    callback = LambdaCallback(**hooks)
    callback.overlay = overlay  # type: ignore[attr-defined]  # by which it is known again
    return callback


def _place(callback: Any) -> int:
    """Where somebody else's callback stands."""
    measures = any(
        kind.__module__.startswith("lightning_eoss.") and kind.__name__.endswith("Monitor")
        for kind in type(callback).__mro__
    )
    return 7 if is_a(callback, "Checkpoint") else 3 if measures else 5 if is_a(callback, "LearningRateMonitor") else 1


def is_a(callback: Any, name: str) -> bool:
    """Whether it is of a class of that name: Lightning's classes exist twice."""
    return any(kind.__name__ == name for kind in type(callback).__mro__)


# ---- what a step is made of ------------------------------------------------------------------------------------------


@dataclass
class StepSize:
    """Samples of an optimizer step: a loader batch's, times the accumulation, times the processes that share the data.

    Of several loaders, all of which give a batch to each step, the sum. Of a batch sampler of the user's own the mean
    over an epoch. Where a loader does not tell (`batch_size=None`) batches are counted: the first one, and from the
    second epoch on the mean of the one before. An epoch that ends within the accumulation makes its steps smaller.
    """

    count: Callable[[Any], int | None] = num_samples_of  # samples in a ready batch
    _loaders: list[Any] = field(default_factory=list, repr=False)
    _told: list[tuple[float, float] | None] = field(default_factory=list)  # mean samples of their batches, of all
    _counted: float | None = None  # of those that do not tell, together
    _epoch: int = -1  # whose batches are being counted
    _counts: list[int] = field(default_factory=list, repr=False)
    _longest: tuple[int, int] = (0, 0)  # accumulation, and most batches of a step where the epoch's length is unknown

    def samples(self, trainer: Any, batch: Any = None) -> float | None:
        """The samples of a step, in `on_train_epoch_start` or later, with the batch at hand where there is one.

        None where only a batch or the step itself can tell, and where nothing is trained.
        """
        loaders = trainer.fit_loop._combined_loader.flattened
        if [id(each) for each in self._loaders] != [id(each) for each in loaders]:
            self._loaders, self._told = list(loaders), [_batch_size(each) for each in loaders]
            self._counted, self._counts = None, []
        if None in self._told and batch is not None:
            self._count(trainer, batch)
        parts = self.parts(trainer)
        if probe.trains_nothing(trainer) or not parts or (None in self._told and self._counted is None):
            return None
        samples = parts * (self._counted or 0) + sum(min(parts * each[0], each[1]) for each in self._told if each)
        sharing = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
        samples *= int(sharing)  # processes that each draw samples of their own
        return int(samples) if samples == int(samples) else round(samples, 2)

    def _count(self, trainer: Any, batch: Any) -> None:
        """Counts a batch; the mean of an epoch leaves a short last one out."""
        size = self.count(batch)
        if size is None:
            raise MisconfigurationException(
                f"The samples of a batch ({type(batch).__name__}) are not known: its tensors differ in length, or "
                f"there are none, and its loader has no batch_size. So no rule gives the rate. {PASS_NUM_SAMPLES}"
            )
        if trainer.current_epoch != self._epoch or self._counted is None:
            usual = self._counts[:-1] if len(self._counts) > 1 and self._counts[-1] < self._counts[0] else self._counts
            self._counted = float(trainer.strategy.broadcast(fmean(usual or [size])))  # the same on all processes
            self._epoch, self._counts = trainer.current_epoch, []
        self._counts.append(size)

    def parts(self, trainer: Any) -> int:
        """Batches of a usual step; 0 where the first one has yet to show how many the epoch has."""
        accumulated = int(trainer.accumulate_grad_batches)
        if accumulated == 1 or trainer.num_training_batches < math.inf:
            return probe.usual_parts(trainer)
        if self._longest[0] != accumulated:
            self._longest = (accumulated, 0)
        if probe.steps_now(trainer):
            self._longest = max(self._longest, (accumulated, probe.step_parts(trainer)))
        return self._longest[1]


def _batch_size(loader: Any) -> tuple[float, float] | None:
    """Samples of a loader's batches, in the mean, and of all of them together; None where it does not tell."""
    if own := own_batch_sizes(loader):
        return own.mean, math.inf
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int) or size < 1:
        return None
    try:
        return size, max(1, len(loader.sampler))  # one batch may be all there is
    except (AttributeError, TypeError):  # a stream
        return size, math.inf


# ---- what is refused -------------------------------------------------------------------------------------------------


def refuse_other_steps(trainer: Any, pl_module: Any, name: str) -> None:
    """Raises at `setup` where steps are not Lightning's."""
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy:
        raise MisconfigurationException(
            f"{name} does not support strategy={strategy}: its engine steps and schedules by itself, so the rate of a "
            "step cannot be changed from outside. Use another strategy, or scale the rates where they are set."
        )
    if not getattr(pl_module, "automatic_optimization", True):
        raise MisconfigurationException(
            f"{name} does not support automatic_optimization=False: {type(pl_module).__name__} decides itself when "
            "which of its optimizers steps, and several optimizers (as a GAN has) have no common learning rate. Scale "
            "the rates where they are set, with lightning_eoss.theory.scaling.scale_learning_rate(...)."
        )


def optimizer_with_rates(trainer: Any, name: str) -> Optimizer:
    """The optimizer of a Trainer, at `on_fit_start` or later; raises where its rates cannot be covered."""
    otherwise = (
        "which of them a batch size or an edge ratio belongs to is not known. Scale them in configure_optimizers."
    )
    optimizer: Optimizer = probe.only_optimizer(trainer, name, otherwise)
    rates = [group.get("lr") for group in getattr(optimizer, "param_groups", [])]
    if not rates or not all(isinstance(rate, (int, float, Tensor)) for rate in rates):
        raise MisconfigurationException(
            f"{name} found the learning rates {rates} in {type(optimizer).__name__}, and they are no numbers: there is "
            "nothing to rescale. Give the optimizer a learning rate, or leave the callback out."
        )
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise MisconfigurationException(
            f"{name} cannot reach into the steps of {type(optimizer).__name__}: it has no register_step_pre_hook. "
            "Derive it from torch.optim.Optimizer."
        )
    return optimizer
