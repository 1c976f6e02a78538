"""Other callbacks and loggers in the same Trainer."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn

from lightning_eoss import SharpnessMonitor
from tests.runs import Regressor, fit, loader, samples
from tests.setups.case import Case

# ---- training in phases ----------------------------------------------------------------------------------------------


def normalised() -> LightningModule:
    return Regressor(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)))


class Finetuned(Regressor):
    """A head on a backbone that is frozen at first."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 2))
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh())

    def loss(self, batch: Any) -> Any:
        return super().loss((self.backbone(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.05)


class Sized(LightningDataModule):
    """Its batch size can be searched for."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return loader(samples(12), self.batch_size)


# ---- those that watch our values -------------------------------------------------------------------------------------


def stopped(trainer: Any, watch: SharpnessMonitor) -> None:
    (stopper,) = (each for each in trainer.callbacks if isinstance(each, EarlyStopping))
    assert float(stopper.best_score) == pytest.approx(min(point["sharpness/FullBS"] for point in watch.history[1:]))


def saved(trainer: Any, watch: SharpnessMonitor) -> None:
    assert float(trainer.checkpoint_callback.best_model_score) in [
        pytest.approx(point["sharpness/MiniBS"]) for point in watch.history
    ]
    assert Path(trainer.checkpoint_callback.best_model_path).exists()


# ---- loggers ---------------------------------------------------------------------------------------------------------


class StandIn(Logger):
    """What the loggers of services have in common; their clients are not installed here, so these are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int | None, dict[str, float]]] = []

    @property
    def experiment(self) -> Any:
        return self

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.told.append((step, dict(metrics)))


class LikeMLflow(StandIn):
    """Wants plain numbers, and names of letters, digits, `_`, `-`, `.`, ` ` and `/`."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert all(re.fullmatch(r"[/\w.\- ]+", name) for name in metrics)
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        super().log_metrics(metrics, step)


class LikeWandb(StandIn):
    """Keeps the step among the values, and never goes back."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is None or not self.told or step >= (self.told[-1][0] or 0)
        super().log_metrics(metrics, step)


class LikeComet(StandIn):
    """Takes what is not finite for an error."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert all(math.isfinite(value) for value in metrics.values())
        super().log_metrics(metrics, step)


def five_loggers(case: Case, root: Path, callbacks: tuple[Any, ...]) -> Any:
    known = [CSVLogger(root, name="logs", version=0), TensorBoardLogger(root, name="board", version=0)]
    return fit(root, case.build(), case.data(), *callbacks, logger=[*known, LikeMLflow(), LikeWandb(), LikeComet()])


def all_told(trainer: Any, watch: SharpnessMonitor) -> None:
    """The same points on each of them."""
    expected = [(point["step"], {key: each for key, each in point.items() if key != "step"}) for point in watch.history]
    for logger in trainer.loggers[2:]:
        assert [each for each in logger.told if "sharpness/MiniBS" in each[1]] == expected


CALLBACKS = [
    Case(
        "`StochasticWeightAveraging`, with BatchNorm",
        normalised,
        callbacks=lambda: [StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1)],
        options={"max_epochs": 3},
    ),
    Case("`EMAWeightAveraging`", callbacks=lambda: [EMAWeightAveraging(decay=0.9)], note="of the weights that train"),
    Case(
        "`LearningRateFinder`",
        callbacks=lambda: [LearningRateFinder(num_training_steps=4, early_stop_threshold=None)],
    ),
    Case(
        "`BatchSizeFinder`",
        data=Sized,
        callbacks=lambda: [BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=1)],
        chunks=lambda data: loader(samples(12), 4),
    ),
    Case(
        "`BackboneFinetuning`",
        Finetuned,
        callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)],
        says=("the stability limits differ between parameters",),
        note="of the parameters that train at the time",
    ),
    Case(
        "`GradientAccumulationScheduler`",
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})],
    ),
    Case(
        '`EarlyStopping("sharpness/FullBS", strict=False)`',
        watching=lambda root: [EarlyStopping("sharpness/FullBS", strict=False, patience=100)],
        also=stopped,
    ),
    Case(
        '`ModelCheckpoint(monitor="sharpness/MiniBS")`',
        watching=lambda root: [ModelCheckpoint(root / "saved", monitor="sharpness/MiniBS")],
        options={"enable_checkpointing": True},
        also=saved,
    ),
    Case(
        "five loggers: CSV, TensorBoard, and stand-ins for MLflow, Weights & Biases and Comet",
        train=five_loggers,
        also=all_told,
        note="the stand-ins take the same calls and names as the clients, which are not installed",
    ),
]
