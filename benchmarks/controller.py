"""What `LearningRateRescaler(target_edge_ratio=0.5)` saves, and what it costs where nothing has to be saved.

`python -m benchmarks.controller` prints the table that is committed under `benchmarks/results`: training losses of the
digits network after two epochs of SGD with batches of 16, alone and steered, a row for each learning rate and seed.
A training this far beyond the edge is lost within ten steps: it has to be measured every other step, and with a target
of 1, where nothing is lowered before the first steps, it is lost as well.
"""

import math
import tempfile
import warnings
from collections.abc import Iterable

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_eoss import LearningRateRescaler, SharpnessMonitor
from lightning_eoss.demo import DigitsMLP, digits

RATES = (0.5, 2.0)  # stable; far beyond the edge


def final_loss(rate: float, seed: int, *callbacks: Callback, epochs: int = 2) -> float:
    """Half the squared error on the training set in the end."""
    seed_everything(seed, verbose=False)
    module, data = DigitsMLP(rate), digits()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as root:
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "SharpnessMonitor", UserWarning)
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            logger=False,
            default_root_dir=root,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, 16, shuffle=True))
    with torch.no_grad():
        images, targets = data.tensors
        return float((module.net(images) - targets).square().sum(-1).mean() / 2)


def table(rates: Iterable[float] = RATES, seeds: Iterable[int] = range(5)) -> str:
    """The Markdown table."""
    rows = ["| lr | seed | alone | steered |", "|---|---|---|---|"]
    for rate in rates:
        for seed in seeds:
            steering = (
                LearningRateRescaler(target_edge_ratio=0.5),
                SharpnessMonitor(every_n_train_steps=2, num_batches=6),
            )
            losses = [final_loss(rate, seed), final_loss(rate, seed, *steering)]
            cells = " | ".join(f"{loss:.4f}" if math.isfinite(loss) else "diverged" for loss in losses)
            rows.append(f"| {rate} | {seed} | {cells} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
