"""The picture of the law of the batch gradient's variance, and its scalars."""

import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_eoss.curvature.solver import WarmStart
from lightning_eoss.display import tags
from lightning_eoss.display.figures import noise_figure, write_noise
from lightning_eoss.display.scalars import noise_scalars
from lightning_eoss.measurements.gradient_noise import GradientNoise
from lightning_eoss.theory.gradient_noise import sampling_factor
from lightning_eoss.theory.statistics import Estimate

UNKNOWN = Estimate(math.nan, math.nan, math.nan, math.nan)


def around(mean: float, width: float = 0.1) -> Estimate:
    return Estimate(mean, width * mean / 2, mean * (1 - width), mean * (1 + width))


def found(trace: Estimate = around(40.0, 0.05), scale: Estimate = around(80.0)) -> GradientNoise:  # noqa: B008
    """1,000 samples, training's batch 32."""
    sizes = (2, 8, 32, 128, 512)
    return GradientNoise(
        trace=trace,
        norm_squared=around(0.5),
        predicted=around(40 * sampling_factor(32, 1000)),
        measured=around(1.3, 0.3),
        scale=scale,
        curvature_trace=around(3.0),
        curvature_scale=around(60.0),
        cosine=0.25,
        points=tuple((size, around(40 * sampling_factor(size, 1000), 0.3)) for size in sizes),
        batch_size=32,
        num_samples=1000,
        dataset_size=1000,
        seconds=2.0,
        warm=WarmStart(),
    )


def test_scalars_have_the_dashboards_tags_and_intervals() -> None:
    values = noise_scalars(found())
    with_ends = (
        tags.NOISE_TRACE,
        tags.NOISE_PREDICTED,
        tags.NOISE_MEASURED,
        tags.NOISE_SCALE,
        tags.NOISE_CURVATURE_SCALE,
    )
    ends = {end for tag in with_ends for end in tags.interval(tag)}
    assert values.keys() == {*with_ends, *ends, tags.NOISE_NORM, tags.NOISE_COSINE, tags.NOISE_SECONDS}
    assert set(with_ends) <= set(tags.WITH_INTERVAL)
    assert values.keys() - ends <= tags.DESCRIPTIONS.keys()
    assert values[tags.NOISE_SCALE] == 80 and values[tags.interval(tags.NOISE_SCALE)[1]] == pytest.approx(88)
    assert (values[tags.NOISE_NORM], values[tags.NOISE_COSINE], values[tags.NOISE_SECONDS]) == (0.5, 0.25, 2.0)


def test_what_is_undefined_is_not_there() -> None:
    values = noise_scalars(found(trace=UNKNOWN, scale=Estimate(3.0, 9.0, math.nan, math.nan)))
    assert tags.NOISE_TRACE not in values
    assert values[tags.NOISE_SCALE] == 3.0 and not set(tags.interval(tags.NOISE_SCALE)) & values.keys()


def test_the_picture_shows_the_law_with_its_band_and_the_points() -> None:
    (axes,) = noise_figure(found(), title="step 7").axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size b", "variance of the gradient")
    law, points, marked = axes.lines[0], axes.lines[1], axes.lines[-1]
    assert law.get_xdata()[0] == 1 and law.get_xdata()[-1] == 512
    for size, variance in zip(law.get_xdata(), law.get_ydata(), strict=True):
        assert variance == pytest.approx(40 * (1000 - size) / (size * 999))
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(1.05 * 40)
    assert points.get_xdata().tolist() == [2, 8, 32, 128, 512]
    assert points.get_ydata()[2] == pytest.approx(40 * 968 / (32 * 999))
    bars = list(axes.collections[1].get_segments())
    assert bars[2][:, 1] == pytest.approx([0.7 * 40 * 968 / (32 * 999), 1.3 * 40 * 968 / (32 * 999)])
    assert list(marked.get_xdata()) == [32, 32]
    assert len(axes.get_legend().get_texts()) == 3


def test_without_a_law_there_are_points() -> None:
    (axes,) = noise_figure(found(trace=UNKNOWN)).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["b = 32", "measured over random batches"]


def test_tensorboard_gets_the_picture(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_noise(writer, found(), 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images(tags.NOISE_CURVE)
    assert image.step == 7 and image.width == 1200


def test_others_get_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_noise(object(), found(), 0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with SummaryWriter(str(tmp_path)) as writer:
        write_noise(writer, found(), 0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == []
