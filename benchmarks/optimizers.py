"""The edge of stability under torch's optimizers, on scikit-learn's digits: the course of the edge ratio.

`python -m benchmarks.optimizers` prints two tables (some minutes on one core):

* each optimizer with full and with small batches, at a learning rate that takes it to its edge. With full batches the
  edge ratio settles at 1 whatever the optimizer: for adaptive ones by the preconditioner that their state holds (Cohen
  et al., "Adaptive Gradient Methods at the Edge of Stability", 2022);
* momentum against the batch size. With small batches it is not stopped at its threshold, 2 (1 + momentum) / lr, but at
  2 (1 - momentum) / lr ("Momentum Further Constrains Sharpness at the Edge of Stochastic Stability", arXiv 2604.14108).
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer, seed_everything
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader

from lightning_eoss import SharpnessMonitor
from lightning_eoss.demo import DigitsMLP, digits
from lightning_eoss.display import tags

Make = Callable[..., Optimizer]
Course = list[dict[str, float]]

RATIOS = (tags.EDGE_RATIO, tags.EDGE_RATIO_FULL_BS, tags.EDGE_RATIO_DIRECTIONAL)
FULL, SMALL, MOMENTUM = 1024, 16, 0.9

#: Each with its learning rates, for full and for small batches.
OPTIMIZERS: dict[str, tuple[Make, float, float]] = {
    "SGD": (SGD, 1.0, 0.7),
    "momentum .9": (partial(SGD, momentum=MOMENTUM), 0.15, 0.1),
    "Nesterov .9": (partial(SGD, momentum=MOMENTUM, nesterov=True), 0.15, 0.1),
    "AdamW": (AdamW, 0.001, 0.003),
    "RMSprop": (RMSprop, 0.0003, 0.001),
}
STEPS = {FULL: 2100, SMALL: 4200}
POINTS = 8
MOMENTUM_SIZES = (8, 16, 32, 64, FULL)  # b = 4 diverges at this rate, as SGD does at ten times it


class Digits(DigitsMLP):
    """The demonstration's network under any optimizer."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


def course(make: Make, batch_size: int, steps: int, *, points: int = POINTS, seed: int = 0) -> Course:
    """Trains, and measures at evenly spaced steps from the first to the last.

    The state of an adaptive optimizer is empty before its first step, so there its course begins with the second.
    """
    seed_everything(seed, verbose=False)
    monitor = SharpnessMonitor(every_n_train_steps=steps // (points - 1), max_seconds=3600, seed=seed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as root:
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*limits differ between parameters")  # edge ratios are what is wanted
        trainer = Trainer(
            max_steps=steps + 1,  # measurements come before steps
            callbacks=[monitor],
            logger=False,
            default_root_dir=root,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Digits(make), DataLoader(digits(), batch_size, shuffle=True))
    return monitor.history


def settled(history: Course) -> dict[str, float]:
    """Mean edge ratios over the last third of the steps."""
    late = [entry for entry in history if entry["step"] >= 2 * history[-1]["step"] / 3]
    return {tag: fmean(entry[tag] for entry in late) for tag in RATIOS}


def cell(ratios: dict[str, float]) -> str:
    """MiniBS / FullBS / directional, to two digits."""
    return " / ".join(f"{ratios[tag]:.{2 if abs(ratios[tag]) >= 0.0995 else 3}f}" for tag in RATIOS)


def table(optimizers: Iterable[str] = OPTIMIZERS, sizes: Iterable[int] = (FULL, SMALL)) -> str:
    """The courses, a row an optimizer and batch size."""
    shares = " | ".join(f"{point}/{POINTS - 1}" for point in range(1, POINTS - 1))
    rows = [f"| optimizer | lr | b | steps | start | {shares} | end |", "|---" * (POINTS + 4) + "|"]
    for size in sizes:
        for name in optimizers:
            kind, *rates = OPTIMIZERS[name]
            rate = rates[size != FULL]
            cells = " | ".join(cell(entry) for entry in course(partial(kind, lr=rate), size, STEPS[size]))
            rows.append(f"| {name} | {rate} | {size} | {STEPS[size]} | {cells} |")
    return "\n".join(rows)


def momentum_table(sizes: Iterable[int] = MOMENTUM_SIZES) -> str:
    """Where momentum settles, in units of either line."""
    kind, full_rate, small_rate = OPTIMIZERS["momentum .9"]
    lower = (1 - MOMENTUM) / (1 + MOMENTUM)
    rows = ["| b | lr | edge ratios | directional * lr / (2 (1 - momentum)) |", "|---" * 4 + "|"]
    for size in sizes:
        rate, steps = (full_rate, STEPS[FULL]) if size == FULL else (small_rate, STEPS[SMALL])
        found = settled(course(partial(kind, lr=rate), size, steps))
        rows.append(f"| {size} | {rate} | {cell(found)} | {found[tags.EDGE_RATIO_DIRECTIONAL] / lower:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print("Edge ratios along training: MiniBS / FullBS / directional\n")
    print(table())
    print("\nMomentum .9: means over the last third\n")
    print(momentum_table())
