"""Trainings whose rates are noted, under every schedule, and a monitor that is told what to measure.

Rates are read where they act: by an optimizer that notes them in its step, or by how far weights move along gradients
of one.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.optim import SGD, lr_scheduler

from lightning_eoss.callbacks.rescaler import LearningRateRescaler
from lightning_eoss.theory.control import Reading
from lightning_eoss.theory.statistics import Estimate
from tests.runs import Regressor, cells, fit, loader, seeded


class Noting(SGD):
    """Notes the rates and the momenta that each step takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rates: list[list[float]] = []
        self.momenta: list[float] = []

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        self.rates.append([float(group["lr"]) for group in self.param_groups])
        self.momenta.append(self.param_groups[0]["momentum"])
        super().step()
        return loss


Make = Callable[[Any], Any]  # optimizer to scheduler


class Scheduled(Regressor):
    """Any scheduler, several groups."""

    def __init__(
        self,
        make: Make | None = None,
        interval: str = "step",
        rates: tuple[float, ...] = (0.1, 1 / 30),
        tensors: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.make, self.interval, self.rates, self.tensors, self.options = make, interval, rates, tensors, options
        self.seen: list[list[float]] = []  # in the steps, over all fits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("fixed", 1.0)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        share = len(parameters) // len(self.rates)
        groups = [
            {
                "params": parameters[index * share : (index + 1) * share],
                "lr": torch.tensor(rate, dtype=torch.float64) if self.tensors else rate,
            }
            for index, rate in enumerate(self.rates)
        ]
        optimizer = Noting(groups, **{"momentum": 0.5, **self.options})
        optimizer.rates = self.seen
        if self.make is None:
            return optimizer
        config = {"scheduler": self.make(optimizer), "interval": self.interval, "monitor": "fixed"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Accumulate(Callback):
    """Two batches a step up to some step, and one from then on: the batch size is halved in mid-epoch."""

    def __init__(self, until: int = 5) -> None:
        self.until = until

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.accumulate_grad_batches = 2 if trainer.global_step < self.until else 1


class ByEpoch(Callback):
    """Lightning's GradientAccumulationScheduler does nothing in an epoch that is resumed."""

    def __init__(self, *windows: int) -> None:
        self.windows = windows or (1, 1, 2)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.accumulate_grad_batches = self.windows[trainer.current_epoch]


class Save(Callback):
    """Saves a checkpoint in some hook after some batches."""

    def __init__(self, path: Path, batches: int, hook: str = "on_train_batch_end") -> None:
        self.path, self.left = path, batches
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def rescaler(**options: Any) -> LearningRateRescaler:
    return LearningRateRescaler(**{"rule": "linear", **options})


SCHEDULERS: dict[str, Make] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 9], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=15, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.95**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, T_max=9)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.3, total_iters=4), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.6, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=6),
}

every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def shown(root: Path) -> dict[int, list[float]]:
    """What LearningRateMonitor wrote: step to rates of the groups."""
    rows = [row for row in cells(root) if any(column.startswith("lr-") for column in row)]
    return {
        int(row["step"]): [float(row[column]) for column in sorted(row) if column.startswith("lr-")] for row in rows
    }


def halved_from(rates: list[list[float]], step: int) -> list[list[float]]:
    return [[rate * (1.0 if index < step else 0.5) for rate in each] for index, each in enumerate(rates)]


def trained(root: Path, module: Scheduled, *callbacks: Any, **options: Any) -> Any:
    """Four epochs of six batches, from the seed; the module's weights too."""
    seeded()
    return fit(root, module, loader(), *callbacks, **{"max_epochs": 4, **options})


def interrupted(name: str, root: Path, habit: Any, batches: int, *ours: Any) -> Any:
    """The rates of a training as a whole, and of what is left of it after a checkpoint."""
    whole, rest, path = Scheduled(SCHEDULERS[name]), Scheduled(SCHEDULERS[name]), root / "saved.ckpt"
    trained(root / "whole", whole, *(make() for make in ours), habit(), Save(path, batches))
    trained(root / "resumed", rest, LearningRateMonitor(), *(make() for make in ours), habit(), ckpt_path=path)
    return whole.seen, rest.seen


# ---- what was measured -----------------------------------------------------------------------------------------------


def around(mean: float, half_width: float = 0.0) -> Estimate:
    return Estimate(mean, half_width / 2, mean - half_width, mean + half_width)


NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan)


class Told(Callback):
    """A monitor that is told what to measure; its ratios are those of the rate 0.1, and go with the rate."""

    def __init__(self, ratios: dict[int, Estimate | float], **others: Any) -> None:
        self.ratios = {step: around(each) if isinstance(each, (int, float)) else each for step, each in ratios.items()}
        self.others = others
        self.reading: Reading | None = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        step = trainer.global_step
        if step in self.ratios:
            share = trainer.optimizers[0].param_groups[0]["lr"] / 0.1
            each = self.ratios[step]
            ratio = Estimate(each.mean * share, 0.0, each.lower * share, each.upper * share)
            made = {"batch_size": 4, "mini_batch": ratio, "directional": ratio, "full_batch": ratio.mean / 2}
            self.reading = Reading(**{"step": step, "num_samples": 1000, **made, **self.others})


# As the package's own monitors, it is known by its name.
ToldMonitor = type("ToldMonitor", (Told,), {"__module__": "lightning_eoss.callbacks.told"})


def steered(root: Path, ratios: dict[int, Any], *callbacks: Any, **options: Any) -> list[float]:
    """The rates of twelve steps, which are also those that are shown."""
    module = Scheduled(rates=(0.1,))
    watcher = ToldMonitor(ratios)
    trained(root, module, *callbacks, LearningRateMonitor(), rescaler(**options), watcher, max_epochs=2)
    assert list(shown(root).values()) == module.seen
    return [rates[0] for rates in module.seen]


def said(caplog: Any) -> list[str]:
    return [line for line in caplog.messages if line.startswith("LearningRateRescaler")]
