"""The picture shows what was logged, leaves out what was not, and touches nothing of the caller's matplotlib."""

import io
import sys
from pathlib import Path

import pytest

from lightning_eoss.display import dashboard as tags
from lightning_eoss.display.figures import Curve, sharpness_figure

matplotlib = pytest.importorskip("matplotlib")
Curves = dict[str, Curve]


def labels(figure: object) -> set[str]:
    return {text.get_text() for text in figure.axes[0].get_legend().get_texts()}  # type: ignore[attr-defined]


def test_all_that_was_logged_is_drawn(curves: Curves) -> None:
    figure = sharpness_figure(curves, title="A run")
    sharpness, ratio = figure.axes
    assert labels(figure) == {"MiniBS", "directional", "FullBS", "current batch", "threshold (2/lr for SGD)"}
    assert (len(sharpness.lines), len(sharpness.collections)) == (5, 2)  # two bands
    assert (len(ratio.lines), len(ratio.collections)) == (4, 1)  # with the line at 1
    assert figure.get_suptitle() == "A run"
    mini_bs = next(line for line in sharpness.lines if line.get_label() == "MiniBS")
    assert (list(mini_bs.get_xdata()), list(mini_bs.get_ydata())) == curves[tags.MINI_BS]


def test_the_picture_is_1200_pixels_wide(curves: Curves, tmp_path: Path) -> None:
    sharpness_figure(curves).savefig(tmp_path / "sharpness.png")
    header = (tmp_path / "sharpness.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (1200, 900)


def test_what_was_not_logged_is_left_out(curves: Curves) -> None:
    figure = sharpness_figure({tags.FULL_BS: curves[tags.FULL_BS]})
    assert len(figure.axes) == 1
    assert labels(figure) == {"FullBS"}


def test_a_band_at_other_steps_is_not_drawn(curves: Curves) -> None:
    lower, upper = tags.interval(tags.MINI_BS)
    steps, values = curves[upper]
    cut = {tags.MINI_BS: curves[tags.MINI_BS], lower: curves[lower], upper: (steps[:-1], values[:-1])}
    assert not sharpness_figure(cut).axes[0].collections


def test_a_rare_batch_does_not_flatten_the_rest(curves: Curves) -> None:
    steps, values = curves[tags.CURRENT_BATCH]
    wild = {**curves, tags.CURRENT_BATCH: (steps, [1e6, *values[1:]])}
    assert sharpness_figure(wild).axes[0].get_ylim()[1] < 5


@pytest.mark.parametrize(("limits", "label"), [([1e6, 2.0], "2/lr for SGD"), ([1e6, 1e5], "above the picture, 1e+05")])
def test_neither_does_a_distant_threshold(curves: Curves, limits: list[float], label: str) -> None:
    figure = sharpness_figure({**curves, tags.THRESHOLD: ([0, 4000], limits)})
    assert figure.axes[0].get_ylim()[1] < 5
    assert f"threshold ({label})" in labels(figure)


def test_negative_sharpness_is_in_the_picture() -> None:
    assert sharpness_figure({tags.FULL_BS: ([0, 1], [-3.0, 1.0])}).axes[0].get_ylim()[0] < -3


def test_pyplot_and_the_settings_are_not_touched(curves: Curves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    before = {**matplotlib.rcParams, "backend": "svg"}
    with matplotlib.rc_context(before):
        sharpness_figure(curves).savefig(io.BytesIO())
        assert matplotlib.rcParams == before


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "lightning_eoss\[plot\]"'):
        sharpness_figure({})
