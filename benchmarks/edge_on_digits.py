"""The edge of stochastic stability on scikit-learn's digits: where the sharpness settles, in units of 2/lr.

`python -m benchmarks.edge_on_digits` prints the table that is committed under `benchmarks/results`.
"""

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from statistics import fmean

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, Sampler

from lightning_eoss import SharpnessMonitor
from lightning_eoss.demo import DigitsMLP, digits
from lightning_eoss.display import tags

#: Batch size, learning rate, steps; 1,024 is full-batch gradient descent.
CELLS = ((16, 1.0, 6000), (64, 1.0, 6000), (1024, 1.0, 3600), (16, 0.5, 6000))
RATIOS = (tags.EDGE_RATIO, tags.EDGE_RATIO_FULL_BS, tags.EDGE_RATIO_DIRECTIONAL)


class Shuffled(Sampler[int]):
    """The permutations that a plain loop over `torch.randperm` draws, one an epoch.

    The order is part of the setting: at b = 16, lr = 1 plain SGD, watched or not, diverges before step 6,000 in about
    four orders of ten (`DataLoader(shuffle=True)`: seeds 0, 1, 2 and 4 of 0 to 5; this one: seed 3).
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=self.generator).tolist())


def settled(batch_size: int, learning_rate: float, steps: int, *, seed: int = 0) -> dict[str, float]:
    """Trains one cell and averages its edge ratios over the last third of the steps."""
    seed_everything(seed, verbose=False)
    monitor = SharpnessMonitor(every_n_train_steps=steps // 18, max_seconds=3600, seed=seed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as root:
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        trainer = Trainer(
            max_steps=steps,
            callbacks=[monitor],
            logger=False,
            default_root_dir=root,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = digits()
        order = Shuffled(len(data), seed)
        trainer.fit(DigitsMLP(learning_rate), DataLoader(data, batch_size, sampler=order))
    late = [entry for entry in monitor.history if entry["step"] >= 2 * steps / 3]
    return {tag: fmean(entry[tag] for entry in late if tag in entry) for tag in RATIOS}


def table(cells: Iterable[tuple[int, float, int]] = CELLS, seeds: Iterable[int] = (0, 1, 2)) -> str:
    """The Markdown table, a row a cell and seed."""
    rows = ["| b | lr | seed | MiniBS / threshold | FullBS / threshold | directional / threshold |", "|---" * 6 + "|"]
    for batch_size, learning_rate, steps in cells:
        for seed in seeds:
            found = settled(batch_size, learning_rate, steps, seed=seed)
            numbers = " | ".join(f"{found[tag]:.2f}" for tag in RATIOS)
            rows.append(f"| {batch_size} | {learning_rate} | {seed} | {numbers} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
