"""Every example runs, shortened, as the script that it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What the examples that draw say they draw.
PICTURES = {
    "random_matrix": {
        "figure_1_simulated",
        "figure_6_spectrum_start",
        "figure_6_spectrum_end",
        "figure_7_gauss_newton_end",
        "figure_9_along_training",
        "gap_against_batch_size",
        "figure_17_kernel",
    },
    "learning_rate": {
        "figures_12_21_sgd",
        "figures_20_22_adam",
        "edge_figures_3_4_5_changes",
        "figures_17_18_learned",
    },
    "gradient_noise": {"figure_2_linear_regression", "figure_3_two_layers", "figure_4_digits"},
    "noisy_gradient_descent": {"figure_10_noisy_gradient_descent"},
    "random_walk": {"distance", "potential"},
}
TRAINED = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem not in PICTURES)


def run(script: Path, *options: str, directory: Path) -> str:
    """What it prints in a directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("script", TRAINED, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    """Runs it in an empty directory."""
    run(script, "--max-steps", "20", directory=tmp_path)
    assert any(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn(name, tmp_path):
    """All of them, in more colours than a blank page has, and each with its sentence."""
    image = pytest.importorskip("matplotlib.image")
    printed = run(ROOT / "examples" / f"{name}.py", "--quick", "--out", "pictures", directory=tmp_path)
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == PICTURES[name]
    for picture in PICTURES[name]:
        pixels = image.imread(tmp_path / "pictures" / f"{picture}.png")
        ink = (pixels[..., :3] < 0.95).any(axis=-1)
        assert ink.mean() > 0.01
        assert ink.any(axis=1).mean() > 0.5  # the drawing fills the page
        assert f"{picture}.png\n    " in printed
    assert "nan" not in printed.replace("\n", " ").split()
