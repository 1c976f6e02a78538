"""`LightningCLI` can set every callback from YAML."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import lightning_eoss

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, which is not installed")

SETTINGS: dict[str, dict[str, Any]] = {
    "SharpnessMonitor": {
        "every_n_train_steps": 25,
        "rel_error": 0.1,
        "full_batch_samples": None,
        "precision": "as_trained",
        "raw": True,
    },
    "SpectralDensityMonitor": {"steps": 30, "mode": "eval"},
    "LearningRateRescaler": {"rule": "sqrt", "base_batch_size": 32, "max_edge_ratio": 1.2, "dry_run": True},
    "SpectralLearningRate": {"rule": "polyak", "every_n_epochs": 3, "max_learning_rate": 0.5, "dry_run": True},
    "GradientNoiseMonitor": {"max_seconds": 5.0, "num_batches": 16},
    "WeightDistanceMonitor": {"points_per_decade": 5, "projection": 64},
    "GradientNoiseInjector": {"noise": "isotropic", "batch_size": 16},
}


def test_every_callback_is_tried() -> None:
    public = {name: getattr(lightning_eoss, name) for name in lightning_eoss.__all__}
    assert {name for name, each in public.items() if isinstance(each, type) and issubclass(each, Callback)} == {
        *SETTINGS
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_callback_from_yaml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain types all along; what is not given keeps its default."""
    arguments = "\n".join(
        f"        {key}: {'null' if value is None else value}" for key, value in SETTINGS[name].items()
    )
    config = (
        f"trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_eoss.{name}\n"
        f"      init_args:\n{arguments}\n"
    )
    (tmp_path / "config.yaml").write_text(config)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jsonargparse's, by Lightning's own use of it
        cli = LightningCLI(
            BoringModel, BoringDataModule, run=False, save_config_callback=None, seed_everything_default=False
        )
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, getattr(lightning_eoss, name)))
    held = {key: getattr(callback, key) for key in SETTINGS[name]}
    assert held == SETTINGS[name]
