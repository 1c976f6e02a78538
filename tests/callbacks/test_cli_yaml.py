"""`LightningCLI` can set the monitor from YAML."""

import sys
import warnings

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_eoss import SharpnessMonitor

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, which is not installed")

CONFIG = """
trainer:
  logger: false
  callbacks:
    - class_path: lightning_eoss.SharpnessMonitor
      init_args:
        every_n_train_steps: 25
        rel_error: 0.1
        full_batch_samples: null
        precision: as_trained
"""


def test_monitor_from_yaml(tmp_path, monkeypatch):
    """Plain types all along; what is not given keeps its default."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jsonargparse's, by Lightning's own use of it
        cli = LightningCLI(
            BoringModel, BoringDataModule, run=False, save_config_callback=None, seed_everything_default=False
        )
    (monitor,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, SharpnessMonitor))
    assert (monitor.every_n_train_steps, monitor.rel_error, monitor.precision) == (25, 0.1, "as_trained")
    assert monitor.full_batch_samples is None
    assert monitor.overhead is None
