"""What the scripts of this folder share: the command line, a sentence below each picture, a network and its losses.

`python papers/NAME.py` finds this module beside itself, whatever the directory and wherever the package is installed.
"""

import argparse
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_eoss.demo import digits
from lightning_eoss.display.figures import INK

Loss = Callable[[Tensor, Tensor], Tensor]
Picture = tuple[str, Any, str]  # the file's name, the figure, the sentence below it

FAINT = {"alpha": 0.18, "lw": 0}  # of bands around lines


def main(description: str, pictures: Callable[[Any], Iterable[Picture]], *, effort: Any, quick: Any) -> None:
    """The command line of a script: draws its pictures one by one, each with a sentence that is printed as well."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="directory for the pictures (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="coarse, in seconds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure, sentence in pictures(quick if options.quick else effort):
        wrapped = textwrap.fill(sentence, round(14 * figure.get_figwidth()))
        figure.supxlabel(wrapped, x=0.02, ha="left", fontsize=9, color=INK)
        figure.savefig(options.out / f"{name}.png")
        print(f"{options.out / name}.png\n    {sentence}\n", flush=True)


def classes(samples: int) -> TensorDataset:
    """The demonstration's digits with the numbers of their classes, as cross entropy takes them."""
    images, targets = digits(samples).tensors
    return TensorDataset(images, targets.argmax(1))


def network(width: int = 32, *, scale: float = 1.0, seed: int = 0) -> nn.Module:
    """A tanh network for the digits; with half of torch's usual initial weights it starts flat and sharpens."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half of it, summed over classes and averaged over samples."""
    return (outputs - targets).square().sum(-1).mean() / 2


def of_model(loss: Loss) -> Callable[[nn.Module, Sequence[Tensor]], Tensor]:
    """A loss of outputs and targets as one of a network and a batch, which is what measurements take."""
    return lambda model, batch: loss(model(batch[0]), batch[1])


def decay(share: float) -> float:
    """Granziol et al.'s equation (21): constant for half of training, then linear to a hundredth at nine tenths."""
    return 1 - 0.99 * min(max(share - 0.5, 0) / 0.4, 1)


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer on the CPU that writes and says nothing, for scripts that train many times."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", PossibleUserWarning)  # advice on workers and the like
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", **silent, **options)
