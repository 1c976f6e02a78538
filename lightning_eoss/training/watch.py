"""What every monitor does around a measurement: its clock, its way to the data, its words, its points."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_eoss.curvature.batches import num_samples_of
from lightning_eoss.curvature.memory import free, memory_budget, out_of_memory
from lightning_eoss.curvature.objective import LOADING, BatchCache, Objective, while_loading
from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.solver import Plan, demand
from lightning_eoss.display.page import write_page
from lightning_eoss.training.data import TrainingData, check_dataloader, is_live, training_data
from lightning_eoss.training.probe import batches_begun, logging_step, step_parts, training_loss
from lightning_eoss.training.quiet import quiet

Picture = Callable[..., None]  # writes more than scalars into a logger's `experiment`, at `step`
_FIRST = (
    "{} met this at its first measurement. Where training_step cannot be evaluated once more, pass loss_fn=, a "
    "function of (pl_module, batch) that returns the loss (for operator='ggn' outputs_fn=); without the callback "
    "training is what it was."
)
# Batches that the monitors of a Trainer have loaded for one step, by the loader that they come from.
_SHARED: WeakKeyDictionary[Any, tuple[int, dict[int, BatchCache]]] = WeakKeyDictionary()
HISTORY = 10_000  # entries, above which the older half is thinned
EARLY_SECONDS = 60.0  # of a fit, that an error at the first measurement may cost
TRIES = 6  # of a measurement that memory does not hold, before the last one


@dataclass
class Watch:
    """A training, seen from a monitor."""

    name: str  # the monitor's, for messages
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    dataloader: Iterable[Any] | None = None
    max_samples: int | None = None  # that an iterable of unknown length is read for
    num_samples: int | Callable[[Any], int] | None = None  # of a ready batch; None: as it says itself
    as_trained: bool = False  # under training's own autocast
    evaluating: bool = False  # with the module in eval mode
    history: list[dict[str, float]] = field(default_factory=list)
    data: TrainingData | None = None
    began: float = field(default_factory=time.perf_counter)
    shares: bool = False  # batches with other monitors of the step; then `release` has to be called
    _memory: float = math.inf  # bytes that may be taken at once in this fit, less once they have run out
    _wanted: float = math.inf  # bytes that a plan would take
    _failures: int = 0  # in a row
    _rests: int = 0  # turns to be left out
    _since: tuple[int, int] | None = None  # the epoch that this fit began in, and batches that were behind it
    notes: Sequence[str] = ()  # what holds for this run, for the dashboard
    _drawn: set[int] = field(default_factory=set)  # loggers of this fit that have the dashboard
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.dataloader is not None:
            check_dataloader(self.dataloader, self.name, ready=self.num_samples is not None)

    def begin(self) -> None:
        """Starts the clock of a fit."""
        self.began, self._drawn, self._failures, self._rests = time.perf_counter(), set(), 0, 0
        self._memory, self._since = math.inf, None

    @property
    def elapsed(self) -> float:
        """Seconds since fit began."""
        return time.perf_counter() - self.began

    @contextmanager
    def objective(self, trainer: Any, pl_module: Any, batch_idx: int) -> Iterator[Objective]:
        """The loss that training steps on, as a function of any samples; nothing that is done with it is ever seen."""
        if self.data is None or (self.dataloader is None and not is_live(self.data, trainer)):
            self.data = training_data(trainer, pl_module, self.name, self.dataloader, self.max_samples, self.count)
        with quiet(trainer, pl_module, (*self.data.objects, self.loss_fn)) as isolation:
            if self._memory == math.inf:
                self._memory = memory_budget(next(pl_module.parameters()).device)
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            modes = {"as_trained": self.as_trained, "evaluating": self.evaluating}
            yield Objective(
                pl_module,
                training_loss(trainer, pl_module, loss_fn=self.loss_fn, batch_idx=batch_idx, **modes),
                self.data.source,
                isolation,
                self._cache(trainer),
                owned={id(parameter) for group in groups for parameter in group["params"]} or None,
                # The divisor is the whole accumulation's, also where the epoch ends before it is full.
                scale=self._parts(trainer) / trainer.accumulate_grad_batches,
            )

    def count(self, batch: Any) -> int | None:
        """Samples in a ready batch; None where nobody tells."""
        if self.num_samples is None:
            return num_samples_of(batch)
        return self.num_samples if isinstance(self.num_samples, int) else int(self.num_samples(batch))

    def see(self, trainer: Any) -> None:
        """Notes, with its first batch, where a fit goes on in an epoch."""
        self._since = self._since or (trainer.current_epoch, batches_begun(trainer) - 1)

    def _parts(self, trainer: Any) -> int:
        """Loader batches of the step at hand."""
        epoch, since = self._since or (-1, 0)
        return step_parts(trainer, since if trainer.current_epoch == epoch else 0)

    def step_size(self, trainer: Any, batch_size: int | None) -> tuple[int, int]:
        """Samples of a loader batch (or as many as a user chose), and how many of them the step at hand has."""
        assert self.data is not None
        if batch_size is not None:
            return batch_size, 1
        there = -(-self.data.source.num_samples // self.data.batch_size)
        parts = max(1, self._parts(trainer))  # a sampler may draw more samples in an epoch than there are
        return self.data.batch_size, min(parts, there) if self.data.sampler is None else parts

    def _cache(self, trainer: Any) -> BatchCache:
        """What other monitors of the Trainer have loaded for the same step from the same loader."""
        if not self.shares or self.data is None or self.data.loader is None or self.dataloader is not None:
            return BatchCache(self._memory)
        step, caches = _SHARED.get(trainer, (-1, {}))
        if step != trainer.global_step:
            caches = {}
            _SHARED[trainer] = (trainer.global_step, caches)
        return caches.setdefault(id(self.data.loader), BatchCache(self._memory))

    def release(self, trainer: Any, monitor: Any) -> None:
        """Lets go of the batches that monitors share, once the last of them has had its turn."""
        if trainer in _SHARED:
            sharing = [each for each in trainer.callbacks if getattr(getattr(each, "watch", None), "shares", False)]
            if monitor is sharing[-1]:
                self.forget(trainer)

    def forget(self, trainer: Any) -> None:
        """Lets go of them whoever's turn it is: a fit ends, well or not."""
        _SHARED.pop(trainer, None)

    def publish(self, trainer: Any, callback: Any, values: dict[str, float], *pictures: Picture) -> None:
        """Keeps scalars and gives them to the Trainer and to every logger, with pictures, and first of all a dashboard.

        All that callbacks of this package write goes through here: what a logger does not take is lost, and no more.
        """
        step, values = logging_step(trainer), {tag: float(value) for tag, value in values.items()}
        self.history.append({"step": float(step), **values})
        if len(self.history) > HISTORY:
            self.history[: HISTORY // 2] = self.history[: HISTORY // 2 : 2]
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in values.items()})
        shown = frozenset().union(*(getattr(each, "dashboard_categories", ()) for each in trainer.callbacks))
        for logger in trainer.loggers:
            with self._losing(logger):
                logger.log_metrics(dict(values), step=step)
            with self._losing(logger):
                if id(logger) not in self._drawn:
                    experiment = getattr(logger, "experiment", None)
                    write_page(experiment, shown, callback.dashboard_categories, self.notes)
                    self._drawn.add(id(logger))
            for picture in pictures:
                with self._losing(logger):
                    picture(getattr(logger, "experiment", None), step=step)

    @contextmanager
    def _losing(self, logger: Any) -> Iterator[None]:
        """Lets a logger fail: training goes on, and other loggers get theirs."""
        try:
            yield
        except Exception as error:
            name, cause = type(logger).__name__, error.__cause__ or error  # a full disk, and not what comes of it
            self.say(
                f"{name} failed, and what it was given is not there; training goes on, and other loggers get theirs. "
                f"{type(cause).__name__}: {cause}",
                about=name,
            )

    def count_twins(self, trainer: Any, monitor: Any) -> None:
        """Warns where several monitors of one kind write the same tags; the last of them speaks."""
        twins = [other for other in trainer.callbacks if type(other) is type(monitor)]
        if len(twins) > 1 and monitor is twins[-1]:
            self.say(
                f"there are {len(twins)} of them in this Trainer, and all write the same tags: points of one step "
                "overwrite each other. Leave one, and measure other batch sizes without a Trainer."
            )

    @contextmanager
    def forgiving(self, *, first: bool, vital: bool = False) -> Iterator[None]:
        """Lets a measurement fail without ending training, unless nothing is lost with it.

        A first one ends it, as long as training has hardly begun: what is wrong with a loss will stay wrong. Samples
        that cannot be loaded and memory that runs out say nothing of the loss. Where training cannot go on without what
        is done here, all of them are vital.
        """
        early = first and self.elapsed < EARLY_SECONDS
        try:
            yield
            self._failures = self._rests = 0
        except Exception as error:
            notes = [LOADING] if while_loading(error) else []
            if vital or (early and not notes and not out_of_memory(error)):
                if not isinstance(error, MisconfigurationException):  # that has a way out of its own
                    error.add_note(_FIRST.format(self.name))
                raise
            self._rests, self._failures = 2**self._failures - 1, min(self._failures + 1, 10)
            kind = type(error).__name__
            if out_of_memory(error):
                notes = ["Less is needed with a smaller full_batch_samples= or batch_size=."]
            message = "a measurement failed and is left out, training goes on."
            self.say(" ".join([message, f"{kind}: {error}", *notes]), about=f"failed {kind}")

    def rested(self) -> bool:
        """Whether to try what is due: after each failure in a row, twice as many turns are left out as before."""
        self._rests -= 1
        return self._rests < 0

    def within(self, plan: Plan, findings: Findings, objective: Objective) -> Plan:
        """The plan in the memory that there has been so far."""
        plan = replace(plan, memory_bytes=min(plan.memory_bytes, self._memory))
        self._wanted = min(plan.memory_bytes, demand(plan, findings, objective))
        return plan

    def sparing(self, look: Callable[[], Any]) -> Any:
        """Looks; where memory runs out, with half as much at once, and again. What is learned of memory stays."""
        for _ in range(TRIES):
            self._wanted = math.inf
            try:
                return look()
            except Exception as error:
                if not out_of_memory(error) or self._wanted == math.inf:  # a plan is not what was too large
                    raise
            self._memory = self._wanted / 2
            _SHARED.clear()
            free()
        return look()

    def say(self, *messages: str, about: str | None = None) -> None:
        """Warns, once for each message, or for what several messages are about."""
        for message in messages:
            if (about or message) not in self._said:
                self._said.add(about or message)
                rank_zero_warn(f"{self.name}: {message}")

    def announce(self, notes: Sequence[str]) -> None:
        """Says in a line what is going to be measured, and notes it for the dashboard."""
        self.notes = notes
        self.tell(notes)

    def tell(self, notes: Iterable[str]) -> None:
        """Says something in a line."""
        rank_zero_info(f"{self.name}: {'; '.join(notes)}.")


def device_time(pl_module: Any) -> float:
    """The time at which the module's device has done all that it was told."""
    device = next(pl_module.parameters()).device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
