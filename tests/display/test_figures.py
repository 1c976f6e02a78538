"""The picture shows what was logged, leaves out what was not, and touches nothing of the caller's matplotlib."""

import io
import sys
from pathlib import Path

import pytest

from lightning_eoss.display import tags
from lightning_eoss.display.figures import Curve, prediction_figure, sharpness_figure

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.collections")
Curves = dict[str, Curve]


def labels(figure: object) -> set[str]:
    return {text.get_text() for text in figure.axes[0].get_legend().get_texts()}  # type: ignore[attr-defined]


def test_all_that_was_logged_is_drawn(curves: Curves) -> None:
    figure = sharpness_figure(curves, title="A run")
    sharpness, ratio = figure.axes
    lines = {"threshold (2/lr for SGD)", "for small batches"}
    assert labels(figure) == {"MiniBS", "directional", "FullBS", "current batch"} | lines
    assert (len(sharpness.lines), len(sharpness.collections)) == (6, 2)  # two bands
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


# ---- predictions -----------------------------------------------------------------------------------------------------

MODELS = (tags.PREDICTION_SUBSPACE, tags.PREDICTION_WIGNER, tags.PREDICTION_MARCHENKO_PASTUR)


def predicted(curves: Curves, *models: str, factor: float = 1.0) -> Curves:
    """MiniBS, and every fifth measurement a prediction of it, trusted at every second one."""
    found = {tag: curves[tag] for tag in (tags.MINI_BS, *tags.interval(tags.MINI_BS))}
    steps, values = (list(each[::5]) for each in curves[tags.MINI_BS])
    for tag in models:
        lower, upper = tags.interval(tag)
        found[tag] = (steps, [factor * value for value in values])
        found[lower] = (steps, [0.9 * factor * value for value in values])
        found[upper] = (steps, [1.1 * factor * value for value in values])
        found[tags.trusted(tag)] = (steps, [float(index % 2 == 0) for index in range(len(steps))])
    return found


def test_predictions_are_drawn_with_their_bands_and_hollow_where_not_trusted(curves: Curves) -> None:
    figure = prediction_figure(predicted(curves, *MODELS), title="A run")
    (axes,) = figure.axes
    assert labels(figure) == {
        "MiniBS, measured",
        "outlier subspace",
        "Wigner (Theorem 4)",
        "Marchenko-Pastur (Theorem 7)",
        "hollow: not to be trusted",
    }
    dots = [each for each in axes.collections if isinstance(each, matplotlib.collections.PathCollection)]
    assert (len(dots), len(axes.collections)) == (3, 7)  # four bands
    white = [tuple(face) == (1, 1, 1, 1) for face in dots[0].get_facecolors()]  # type: ignore[attr-defined]
    assert white == [index % 2 == 1 for index in range(len(white))]
    assert figure.get_suptitle() == "A run"


def test_predictions_that_were_not_logged_are_left_out(curves: Curves) -> None:
    assert labels(prediction_figure(predicted(curves, tags.PREDICTION_WIGNER))) == {
        "MiniBS, measured",
        "Wigner (Theorem 4)",
        "hollow: not to be trusted",
    }
    assert labels(prediction_figure({tags.MINI_BS: curves[tags.MINI_BS]})) == {"MiniBS, measured"}


def test_a_flag_without_a_prediction_draws_nothing_and_confuses_no_other(curves: Curves) -> None:
    """An undefined prediction writes its flag and no value."""
    some = predicted(curves, tags.PREDICTION_SUBSPACE)
    for tag in (tags.PREDICTION_SUBSPACE, *tags.interval(tags.PREDICTION_SUBSPACE)):
        some[tag] = tuple(list(each[1::2]) for each in some[tag])  # type: ignore[assignment]
    (axes,) = prediction_figure(some).axes
    assert all(tuple(face) == (1, 1, 1, 1) for face in axes.collections[-1].get_facecolors())  # type: ignore[attr-defined]


def test_a_wild_prediction_does_not_flatten_the_rest_and_its_label_says_so(curves: Curves) -> None:
    figure = prediction_figure(predicted(curves, tags.PREDICTION_MARCHENKO_PASTUR, factor=50.0))
    assert figure.axes[0].get_ylim()[1] < 12
    assert "Marchenko-Pastur (Theorem 7), in part above the picture" in labels(figure)


def test_predictions_without_a_measurement_are_all_in_the_picture(curves: Curves) -> None:
    some = predicted(curves, tags.PREDICTION_SUBSPACE)
    some = {tag: curve for tag, curve in some.items() if tag.startswith("prediction")}
    assert prediction_figure(some).axes[0].get_ylim()[1] >= max(some[tags.PREDICTION_SUBSPACE][1])


def test_the_picture_of_predictions_is_1200_pixels_wide(curves: Curves, tmp_path: Path) -> None:
    prediction_figure(predicted(curves, *MODELS)).savefig(tmp_path / "predictions.png")
    header = (tmp_path / "predictions.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (1200, 660)


def test_predictions_in_units_of_the_limits_stand_beside_the_edge_ratio(curves: Curves) -> None:
    """Where the optimizer has no scalar threshold, MiniBS is measured and predicted in units of its limits."""
    some = predicted(curves, tags.PREDICTION_SUBSPACE)
    ends = zip(
        (tags.MINI_BS, *tags.interval(tags.MINI_BS)), (tags.EDGE_RATIO, *tags.interval(tags.EDGE_RATIO)), strict=True
    )
    for plain, ratio in ends:
        some[ratio] = some.pop(plain)
    (axes,) = prediction_figure(some).axes
    assert axes.get_ylabel() == "edge ratio"
    assert "MiniBS, measured" in {line.get_label() for line in axes.lines}
