"""A training with checkpoints that the machine ends, in a process of its own."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.runs import Regressor, fit, loader, public_callback, seeded


class Killed(Callback):
    """The machine goes down after a step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)


def checkpointed(root: Path, logs: str, names: Iterable[str], *more: Any, ckpt_path: Path | None = None) -> Any:
    """Four epochs with checkpoints every four steps."""
    seeded()
    callbacks = [public_callback(name) for name in names]
    save = ModelCheckpoint(root, every_n_train_steps=4, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True, "ckpt_path": ckpt_path}
    return fit(root / logs, Regressor(), loader(), *callbacks, save, *more, **options)


def killed(root: Path, names: Iterable[str]) -> None:
    warnings.simplefilter("ignore")
    checkpointed(root, "killed", names, Killed())


def started(root: Path, names: Iterable[str]) -> Any:
    """A process in which that is going on; a fork where torch can, because it need not import everything again."""
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=killed, args=(root, names))
    process.start()
    return process
