"""What a row of the table is: a small training, and what the monitor is expected to make of it.

Each case trains twice from the same seeds, with the monitor and without. The last measurement is compared with dense
Hessians: of the step's own batches (`current`) and of all samples, in chunks of training's batch size (`full`).
"""

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_eoss import SharpnessMonitor
from tests.problems import top
from tests.runs import Regressor, assert_same, cells, fit, generators, loader, samples, seeded, state_of

REL_ERROR = 2e-4  # asked of the monitor
# Its solver stops at a relative residual of rel_error / 2, which bounds the distance to an eigenvalue; float32 products
# are an order of magnitude better than that.
SOLVED = REL_ERROR / 2
# Central differences of float32 gradients, with steps of eps^(1/3): rounding and the third derivative contribute some
# eps^(2/3) each, in units of gradient and parameters, which in these networks are ten times the curvature at most.
BY_DIFFERENCES = 10 * torch.finfo(torch.float32).eps ** (2 / 3)

NEEDED = {f"sharpness/{name}" for name in ("MiniBS", "MiniBS_lower", "FullBS", "directional", "current_batch", "gap")}

Kind = Literal["right", "differences", "refused"]
Weighted = list[tuple[float, Any, Callable[[], None] | None]]  # weight, batch, and what sets the generators for it


@dataclass(frozen=True)
class Case:
    """A row."""

    name: str
    build: Callable[[], LightningModule] = Regressor
    data: Callable[[], Any] = lambda: loader(samples(12))
    measured: Kind = "right"
    current: float | None = SOLVED  # largest relative error against the dense Hessian; None: not compared
    full: float | None = SOLVED
    says: tuple[str, ...] = ()  # how the monitor's warnings begin, or the message of its refusal
    note: str = ""  # what a reader of the table should know
    options: Mapping[str, Any] = field(default_factory=dict)  # of the Trainer
    callbacks: Callable[[], list[Any]] = list  # of both runs
    watching: Callable[[Path], list[Any]] = lambda root: []  # of the run with the monitor, whose values they read
    monitor: Callable[[], dict[str, Any]] = dict  # options of the monitor
    warns: tuple[str, ...] = ()  # Lightning's own advice, as regular expressions
    twin: Callable[[], LightningModule] | None = None  # a module of the same loss for the dense Hessian
    chunks: Callable[[Any], Iterable[Any]] | None = None  # all samples in chunks; None: the loader's
    sizes: Callable[[Any], int] = lambda batch: len(batch[0])  # samples of a chunk
    train: Callable[..., Any] | None = None  # trains in its own way: (case, root, callbacks) -> Trainer
    also: Callable[[Any, SharpnessMonitor], None] = lambda trainer, watch: None  # more to check after the watched run
    by_hand: Callable[[Path], None] | None = None  # the whole check, where there is no Trainer
    broken: str = ""  # what is at fault where the row does not hold yet: "point N: ..."
    slow: bool = False


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a training leaves behind."""

    trainer: Any
    state: dict[str, Any]
    logged: list[dict[str, str]]
    heard: list[str]  # warnings


def trained(case: Case, root: Path, *callbacks: Any) -> Run:
    """Trains a case from its seeds."""
    seeded()
    with warnings.catch_warnings(record=True) as heard:
        for words in (*case.warns, *("SharpnessMonitor: " for _ in case.says)):
            warnings.filterwarnings("always", message=words)
        trainer = (case.train or _fitted)(case, root, callbacks)
    logged = cells(root) if (root / "logs" / "version_0" / "metrics.csv").exists() else []
    return Run(trainer, state_of(trainer), logged, [str(each.message) for each in heard])


def _fitted(case: Case, root: Path, callbacks: tuple[Any, ...]) -> Any:
    return fit(root, case.build(), case.data(), *case.callbacks(), *callbacks, **case.options)


def monitor_of(case: Case) -> SharpnessMonitor:
    """Few mini-batches, precise eigenvalues; sharpness itself also where all is in units of an optimizer's limits."""
    defaults = {"every_n_train_steps": 2, "num_batches": 2, "rel_error": REL_ERROR, "raw": True}
    return SharpnessMonitor(**{**defaults, **case.monitor()})


# ---- what it should have measured ------------------------------------------------------------------------------------


@dataclass
class Moment:
    """The training before a step."""

    weights: dict[str, Tensor]
    trained: set[str]  # names of the parameters that an optimizer owns
    modes: dict[str, bool]
    window: Weighted


class Note(Callback):
    """Notes all that a measurement before a step depends on, under the x at which it is shown."""

    def __init__(self) -> None:
        self.moments: dict[int, Moment] = {}
        self._window: Weighted = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._window.append((1 / trainer.accumulate_grad_batches, copy.deepcopy(batch), generators_as_they_are()))
        if not trainer.fit_loop._should_accumulate():
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.moments[step] = moment_of(pl_module, trainer.optimizers, self._window)
            self._window = []


def moment_of(module: Any, optimizers: list[Any], window: Weighted) -> Moment:
    """The moment at hand."""
    owned = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
    return Moment(
        {name: value.detach().clone() for name, value in module.state_dict().items()},
        {plain(name) for name, each in module.named_parameters() if each.requires_grad and id(each) in owned},
        {plain(name): each.training for name, each in module.named_modules()},
        window,
    )


def plain(name: str) -> str:
    """A name in a module that is not compiled."""
    return name.replace("_orig_mod.", "").replace("._orig_mod", "")


def generators_as_they_are() -> Callable[[], None]:
    """Brings the global generators back to where they are now."""
    now = generators()

    def back() -> None:
        torch.set_rng_state(now["torch"])
        np.random.set_state(now["numpy"])
        random.setstate(now["python"])

    return back


def dense_top(case: Case, moment: Moment, batches: Weighted) -> float:
    """The largest eigenvalue of the dense Hessian of a weighted sum of losses, in float64.

    Its columns are central differences of gradients: nothing is differentiated twice, so that it holds for any layer.
    """
    twin = (case.twin or case.build)().double()
    twin.load_state_dict({plain(name): value for name, value in moment.weights.items()})
    for name, mode in moment.modes.items():
        twin.get_submodule(name).training = mode
    parameters = [each for name, each in twin.named_parameters() if name in moment.trained]
    assert len(parameters) == len(moment.trained)

    precision = next(value.dtype for value in moment.weights.values() if value.is_floating_point())

    def doubled(tensor: Tensor) -> Tensor:  # rounded first, as training rounds its inputs
        return tensor.to(precision).double() if tensor.is_floating_point() else tensor

    prepared = [(weight, apply_to_collection(batch, Tensor, doubled), back) for weight, batch, back in batches]
    buffers = {name: value.clone() for name, value in twin.named_buffers()}

    def gradient() -> Tensor:
        total = torch.zeros(sum(each.numel() for each in parameters), dtype=torch.float64)
        for weight, batch, back in prepared:
            for name, value in twin.named_buffers():
                value.copy_(buffers[name])
            if back is not None:
                back()
            twin.zero_grad()
            loss_of(case, twin, copy.deepcopy(batch)).backward()
            pieces = [torch.zeros_like(each) if each.grad is None else each.grad.to_dense() for each in parameters]
            total += weight * torch.cat([piece.reshape(-1) for piece in pieces])
        return total

    before = generators_as_they_are()
    columns, length = [], torch.finfo(torch.float64).eps ** (1 / 3)
    for parameter in parameters:
        entries = parameter.data.view(-1)
        for index in range(len(entries)):
            value = float(entries[index])
            ends = []
            for sign in (1, -1):
                entries[index] = value + sign * length
                ends.append(gradient())
            entries[index] = value
            columns.append((ends[0] - ends[1]) / (2 * length))
    before()
    matrix = torch.stack(columns)
    return top((matrix + matrix.T) / 2)


def loss_of(case: Case, module: Any, batch: Any) -> Tensor:
    """The loss that is measured: the monitor's own where it has one."""
    own = case.monitor().get("loss_fn")
    return module.loss(batch) if own is None else own(module, batch)


def all_chunks(case: Case) -> Weighted:
    """All samples in consecutive chunks of training's batch size, weighted by samples."""
    data = case.data()
    if case.chunks is not None:
        chunks = list(case.chunks(data))
    else:
        chunks = list(DataLoader(data.dataset, data.batch_size, collate_fn=data.collate_fn))
    sizes = [case.sizes(chunk) for chunk in chunks]
    return [(size / sum(sizes), chunk, None) for size, chunk in zip(sizes, chunks, strict=True)]


# ---- the check -------------------------------------------------------------------------------------------------------


def check(case: Case, root: Path) -> None:
    """Raises where the row is not true."""
    if case.by_hand is not None:
        return case.by_hand(root)
    note, watch = Note(), monitor_of(case)
    if case.measured == "refused":
        return check_refused(case, root, watch)
    alone = trained(case, root / "alone", Note())
    watched = trained(case, root / "watched", note, watch, *case.watching(root))
    assert_same(watched.state, alone.state)
    assert watched.logged == alone.logged
    check_heard(case, alone, watched)
    (watch,) = (each for each in watched.trainer.callbacks if isinstance(each, SharpnessMonitor))
    check_numbers(case, watch, note.moments)
    case.also(watched.trainer, watch)


def check_refused(case: Case, root: Path, watch: SharpnessMonitor) -> None:
    """A message that begins as it should, before anything is trained."""
    (said,) = case.says
    with pytest.raises((MisconfigurationException, ValueError), match=re.escape(said)):
        trained(case, root, watch)


def check_numbers(case: Case, watch: SharpnessMonitor, moments: Mapping[int, Moment]) -> None:
    """Compares the last measurement with dense Hessians."""
    shown = {key: value for key, value in watch.history[-1].items() if key.startswith(("sharpness/", "step"))}
    assert watch.findings is not None
    assert watch.findings.differences == (case.measured == "differences")
    moment = moments[int(shown["step"])]
    for bound, tag, batches in (
        (case.current, "sharpness/current_batch", moment.window),
        (case.full, "sharpness/FullBS", None if case.full is None else all_chunks(case)),
    ):
        if bound is not None:
            expected = dense_top(case, moment, batches or [])
            error = abs(shown[tag] - expected) / abs(expected)
            assert error <= bound, f"{tag} is {shown[tag]}, not {expected}: off by {error:.2g}"
    assert shown.keys() >= NEEDED and len(watch.history) >= 1 + (case.options.get("fast_dev_run") is None)


def check_heard(case: Case, alone: Run, watched: Run) -> None:
    """All that was expected has been said, and by the watched run alone what the monitor says."""
    ours = [each.removeprefix("SharpnessMonitor: ") for each in watched.heard if each.startswith("SharpnessMonitor: ")]
    assert not [each for each in alone.heard if each.startswith("SharpnessMonitor")]
    assert len(ours) == len(case.says) and all(
        heard.startswith(said) for heard, said in zip(ours, case.says, strict=True)
    ), ours
    for words in case.warns:
        assert any(re.match(words, each) for each in (*alone.heard, *watched.heard)), words
