"""The demonstration: scikit-learn's digits, a small network and plain SGD, at the edge of stability within seconds.

With half of torch's usual initial weights the network starts flat and sharpens, until the learning rate stops it. With
the usual ones, or with a small learning rate, digits are learned before anything happens.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eoss import SharpnessMonitor


class DigitsMLP(LightningModule):
    """A tanh network 64-128-128-10 under half the squared error, stepped by plain SGD.

    Args:
        learning_rate: Step size; the threshold is 2 / learning_rate.
        init_scale: Factor on torch's initial parameters.

    Example:
        >>> sum(parameter.numel() for parameter in DigitsMLP().parameters())
        26122
    """

    def __init__(self, learning_rate: float = 1.0, init_scale: float = 0.5) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(init_scale)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Half the squared error, summed over classes and averaged over samples."""
        images, targets = batch
        loss: Tensor = (self.net(images) - targets).square().sum(-1).mean() / 2
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def digits(num_samples: int = 1024) -> TensorDataset:
    """Loads the first of scikit-learn's digits, standardised, with one-hot targets.

    Args:
        num_samples: How many, up to 1,797.

    Returns:
        Images `(num_samples, 64)` and targets `(num_samples, 10)`, float32.

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> [tuple(tensor.shape) for tensor in digits(100).tensors]
        [(100, 64), (100, 10)]
    """
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array[:num_samples]) for array in load_digits(return_X_y=True))
    images = (images - images.mean(0)) / (images.std(0) + 0.1)
    return TensorDataset(images.float(), nn.functional.one_hot(labels, 10).float())


def train(
    out: str | Path,
    *,
    max_steps: int = 4000,
    batch_size: int = 16,
    learning_rate: float = 1.0,
    every_n_train_steps: int = 100,
    seed: int = 0,
) -> Path:
    """Trains the network under a `SharpnessMonitor`, logging to TensorBoard.

    Args:
        out: Directory below which the run becomes `lightning_logs/version_0`, `version_1` and so on.
        max_steps: Steps to train.
        batch_size: Samples in a batch; 1,024 is full-batch gradient descent.
        learning_rate: Step size.
        every_n_train_steps: Steps between two measurements.
        seed: Seed of the initial weights and of the batches.

    Returns:
        The directory of the run's event files.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(out)
    with warnings.catch_warnings():  # Lightning's advice on workers and the like, which a demonstration does not need
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        # No cut by time: on how many samples FullBS is measured must not depend on how busy the machine is.
        monitor = SharpnessMonitor(every_n_train_steps=every_n_train_steps, max_seconds=3600, seed=seed)
        trainer = _trainer(max_steps=max_steps, callbacks=[monitor], logger=logger)
        trainer.fit(DigitsMLP(learning_rate), DataLoader(digits(), batch_size, shuffle=True))
    return Path(logger.log_dir)


def _trainer(**options: Any) -> Trainer:
    """A Trainer that says nothing about the machine; what its callbacks say while it trains is heard."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        return Trainer(
            accelerator="cpu", log_every_n_steps=10, enable_checkpointing=False, enable_model_summary=False, **options
        )
    finally:
        log.setLevel(level)
