"""Makes `v0.1.ckpt` and `v0.1.json`: a checkpoint with the state of all callbacks, and what the run goes on to see.

Run once, with the package whose checkpoints are to be read by those that come: ``python -m tests.checkpoints.make``.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lightning_eoss import (
    GradientNoiseMonitor,
    LearningRateRescaler,
    SharpnessMonitor,
    SpectralDensityMonitor,
    SpectralLearningRate,
    WeightDistanceMonitor,
)
from tests.runs import Regressor, fit, loader, seeded

HERE = Path(__file__).parent
NAME = "v0.1"
FIRST, LAST = 4, 8  # epochs until the checkpoint and until the end


def callbacks() -> list[Any]:
    """All that have a state, as the run of the checkpoint has them."""
    return [
        GradientAccumulationScheduler({2: 2}),
        LearningRateRescaler(max_edge_ratio=0.02, target_edge_ratio=0.015),
        SpectralLearningRate(every_n_epochs=2, steps=5, dry_run=True),
        SharpnessMonitor(every_n_train_steps=2, num_batches=12, predictions=True),
        SpectralDensityMonitor(every_n_train_steps=6, steps=5),
        GradientNoiseMonitor(every_n_train_steps=6, num_batches=8),
        WeightDistanceMonitor(every_n_train_steps=2, projection=64),
    ]


def run(root: Path, epochs: int, **options: Any) -> list[list[dict[str, float]]]:
    """The histories of all callbacks, times and memory left out."""
    seeded()
    made = callbacks()
    fit(root, Regressor(), loader(), *made, *options.pop("more", ()), max_epochs=epochs, **options)
    histories = [each.history for each in made if hasattr(each, "history")]
    unlike = ("cost/share", "cost/seconds", "cost/memory", "spectrum/seconds", "gradient_noise/seconds")
    return [[{t: v for t, v in entry.items() if t not in unlike} for entry in history] for history in histories]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        keep = ModelCheckpoint(root, filename="kept", every_n_epochs=1, save_top_k=-1)
        run(root / "first", FIRST, more=[keep], enable_checkpointing=True)
        shutil.copy(root / "kept.ckpt", HERE / f"{NAME}.ckpt")
        seen = run(root / "second", LAST, ckpt_path=str(HERE / f"{NAME}.ckpt"))
    assert all(math.isfinite(v) for history in seen for entry in history for v in entry.values())
    (HERE / f"{NAME}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
