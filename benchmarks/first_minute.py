"""What the default monitor shows of a minute's training: ``python -m benchmarks.first_minute [seconds]``.

A convolutional network with BatchNorm on pictures that are made, batches of 64. The share is that of an outer clock.
"""

import sys
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_eoss import SharpnessMonitor
from lightning_eoss.display import tags

SHOWN = (tags.MINI_BS, tags.FULL_BS, tags.CURRENT_BATCH)


class Timed(SharpnessMonitor):
    """The time in its hook."""

    taken = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        began = time.perf_counter()
        super().on_train_batch_start(*args)
        self.taken += time.perf_counter() - began


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        blocks += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
        self.net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(seconds: float = 60.0) -> None:
    """Trains, and says how often what was shown."""
    pictures = torch.randn(2000, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    left = pictures[..., :8].mean((1, 2, 3)) > 0
    labels = 2 * left.long() + (pictures.mean((1, 2, 3)) > 0).long()
    watch, quiet = Timed(), {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(max_epochs=-1, max_time={"seconds": seconds}, callbacks=[watch], accelerator="cpu", **quiet)
    began = time.perf_counter()
    trainer.fit(Network(), DataLoader(TensorDataset(pictures, labels), 64, shuffle=True))
    share = watch.taken / (time.perf_counter() - began)
    points = ", ".join(f"{tag}: {sum(tag in point for point in watch.history)}" for tag in SHOWN)
    print(f"{seconds:g} s, {trainer.global_step:,} steps, {100 * share:.1f} % of the time; points of {points}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
