"""Tiny trainings that a monitor watches: modules, data, a Trainer that is quiet, and what a run leaves behind."""

import csv
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import lightning_eoss
from lightning_eoss import SharpnessMonitor

OURS = (
    "sharpness/",
    "prediction/",
    "spectrum/",
    "learning_rate/",
    "gradient_noise/",
    "weights/",
    "cost/",
    "full_batch/",
)


class Regressor(LightningModule):
    """Half the squared error of a small network under plain SGD."""

    def __init__(self, net: nn.Module | None = None, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.learning_rate = learning_rate

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (self.net(inputs) - targets).square().sum(-1).mean() / 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.5)


def samples(num_samples: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Four inputs, two targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, 4, generator=generator, dtype=dtype)
    return TensorDataset(inputs, torch.tanh(inputs @ torch.randn(4, 2, generator=generator, dtype=dtype)))


def loader(dataset: Any = None, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples() if dataset is None else dataset, batch_size, **options)


def monitor(every_n_train_steps: int | None = 2, **options: Any) -> SharpnessMonitor:
    """A monitor that is content with four mini-batches."""
    options = {"every_n_train_steps": every_n_train_steps, "num_batches": 4, **options}
    return SharpnessMonitor(**options)


# All callbacks that a user can import, and what makes a short run show all that they show.
PUBLIC_CALLBACKS = [
    name
    for name in lightning_eoss.__all__
    if isinstance(getattr(lightning_eoss, name), type) and issubclass(getattr(lightning_eoss, name), Callback)
]
_BUSY: dict[str, dict[str, Any]] = {
    "GradientNoiseMonitor": {"every_n_train_steps": 2, "num_batches": 4},
    "SharpnessMonitor": {"every_n_train_steps": 2, "num_batches": 4, "predictions": True},
    "SpectralDensityMonitor": {"every_n_train_steps": 2, "steps": 5},
    "SpectralLearningRate": {"every_n_epochs": 1, "steps": 5},
    "WeightDistanceMonitor": {"every_n_train_steps": 2},
}


def public_callback(name: str) -> Any:
    """One of them, busy where its defaults would hardly do anything in a short run."""
    return getattr(lightning_eoss, name)(**_BUSY.get(name, {}))


def trainer_of(root: Path, *callbacks: Any, kind: type[Any] = Trainer, **options: Any) -> Any:
    """A Trainer on the CPU that says nothing and logs every step to a CSV file below `root`."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": CSVLogger(root, name="logs", version=0),
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return kind(default_root_dir=root, callbacks=list(callbacks), **{**defaults, **options})


def fit(root: Path, module: LightningModule, data: Any, *callbacks: Any, **options: Any) -> Any:
    """Fits, and returns the Trainer."""
    fit_options = {name: options.pop(name) for name in ("val_dataloaders", "ckpt_path") if name in options}
    trainer = trainer_of(root, *callbacks, **options)
    trainer.fit(module, data, **fit_options)
    return trainer


def seeded(seed: int = 0) -> None:
    """All global generators, without a word."""
    seed_everything(seed, verbose=False)


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def generators() -> dict[str, Any]:
    """The states of the global generators."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def applied_rates(trainer: Any) -> list[float]:
    """The learning rates that a step takes, one for each parameter group, whether they are covered just now or not."""
    rates = []
    overlays = [each.overlay for each in trainer.callbacks if hasattr(each, "overlay")]
    for optimizer in trainer.optimizers:
        applied = [each.applied for each in overlays if each.optimizer is optimizer]
        own = [group["lr"] for group in optimizer.param_groups]
        rates += [float(rate) for rate in (applied[0] if applied else own)]
    return rates


def state_of(trainer: Any) -> dict[str, Any]:
    """All that training has changed: module, optimizers, schedulers, loops and generators."""
    module = trainer.lightning_module
    return {
        "parameters": dict(module.named_parameters()),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "buffers": dict(module.named_buffers()),
        "modes": [each.training for each in module.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "loops": trainer.fit_loop.state_dict(),
        "generators": generators(),
        "steps": (trainer.global_step, trainer.current_epoch),
        "metrics": {tag: each for tag, each in trainer.callback_metrics.items() if not tag.startswith(OURS)},
    }


def assert_same(actual: Any, expected: Any, where: str = "state") -> None:
    """Equal to the last bit, all the way down."""
    assert type(actual) is type(expected), f"{where}: {type(actual)} is not {type(expected)}"
    if isinstance(expected, Tensor):
        assert torch.equal(*(each.to_dense() if each.is_sparse else each for each in (actual, expected))), (
            f"{where} differs"
        )
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(actual, expected), f"{where} differs"
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{where}: {actual.keys() ^ expected.keys()}"
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} instead of {len(expected)} entries"
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif not callable(expected):  # the functions of a OneCycleLR
        assert actual == expected, f"{where}: {actual!r} is not {expected!r}"


def cells(root: Path, *, ours: bool = False) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv with our columns alone or without them; rows of nothing else are dropped."""
    path = root / "logs" / "version_0" / "metrics.csv"
    with path.open(newline="") as file:
        rows = [
            {name: cell for name, cell in row.items() if cell and (name == "step" or name.startswith(OURS) == ours)}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def points(root: Path) -> dict[str, dict[int, float]]:
    """Our scalars in metrics.csv: tag to step to value."""
    found: dict[str, dict[int, float]] = {}
    for row in cells(root, ours=True):
        for tag, cell in row.items():
            if tag != "step":
                assert int(row["step"]) not in found.setdefault(tag, {}), f"{tag} is logged twice at step {row['step']}"
                found[tag][int(row["step"])] = float(cell)
    return found


def bytes_kept(function: Callable[[], Any]) -> int:
    """Bytes of tensors that were allocated by a call and not released again."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
        gc.collect()
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")
