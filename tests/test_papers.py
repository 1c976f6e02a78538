"""The scripts that draw the papers' figures run, coarsely, and draw what they say."""

import runpy

import pytest

from tests.scripts import ROOT, run

PAPERS = ROOT / "papers"
#: What the scripts say they draw.
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


def test_no_script_is_forgotten():
    """All but what they share, and formulas."""
    assert {path.stem for path in PAPERS.glob("*.py")} == PICTURES.keys() | {"common", "batch_noise", "tangent_kernel"}


@pytest.mark.parametrize("name", PICTURES)
def test_script_finds_what_it_imports(name, monkeypatch):
    """A quick look at what the slow tests below run."""
    monkeypatch.syspath_prepend(PAPERS)  # as Python does for a script
    script = runpy.run_path(str(PAPERS / f"{name}.py"))
    assert script["QUICK"] != script["Effort"]()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn(name, tmp_path):
    """All of them, in more colours than a blank page has, and each with its sentence."""
    image = pytest.importorskip("matplotlib.image")
    printed = run(PAPERS / f"{name}.py", "--quick", "--out", "pictures", directory=tmp_path).stdout
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == PICTURES[name]
    for picture in PICTURES[name]:
        pixels = image.imread(tmp_path / "pictures" / f"{picture}.png")
        ink = (pixels[..., :3] < 0.95).any(axis=-1)
        assert ink.mean() > 0.01
        assert ink.any(axis=1).mean() > 0.5  # the drawing fills the page
        assert f"{picture}.png\n    " in printed
    assert "nan" not in printed.replace("\n", " ").split()
