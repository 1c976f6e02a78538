"""The layout says what the monitor logs, survives the way through an event file, and bothers no other logger."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch.utils.tensorboard import SummaryWriter

from lightning_eoss.display import tags
from lightning_eoss.display.page import layout, write_guide, write_histogram, write_layout

KNOWN = {*tags.DESCRIPTIONS, *(end for tag in tags.WITH_INTERVAL for end in tags.interval(tag))}


def charts() -> Iterator[layout_pb2.Chart]:
    for category in layout(tags.CATEGORIES).category:
        yield from category.chart


def test_the_first_question_stands_alone_and_costs_are_folded() -> None:
    first, *_, last = layout().category
    assert first.title == "Am I at the edge?"
    assert [series.value for series in first.chart[0].margin.series][::3] == [tags.EDGE_RATIO, tags.EDGE]
    assert len(first.chart) == 1
    assert [category.title for category in layout().category if category.closed] == [last.title] == ["Cost"]


def test_no_category_has_two_margin_charts() -> None:  # TensorBoard would show them in reverse
    for category in layout(tags.CATEGORIES).category:
        assert sum(chart.HasField("margin") for chart in category.chart) <= 1


def test_margin_series_are_tags_with_their_own_ends() -> None:
    all_series = [series for chart in charts() for series in chart.margin.series]
    assert all_series
    for series in all_series:
        assert {series.value, series.lower, series.upper} <= KNOWN
        ends = tags.interval(series.value) if series.value in tags.WITH_INTERVAL else (series.value, series.value)
        assert (series.lower, series.upper) == ends


def test_line_regexes_match_their_tag_and_no_other() -> None:
    regexes = [regex for chart in charts() for regex in chart.multiline.tag]
    assert regexes
    for regex in regexes:
        assert regex.endswith("$")
        matched = [tag for tag in KNOWN if re.match(regex, tag)]
        assert matched == [regex.removesuffix("$")]


def test_every_chart_can_be_told_apart_by_eye() -> None:  # four markers of one colour
    titles = [chart.title for chart in charts()]
    assert len(set(titles)) == len(titles)
    assert all(1 <= len(chart.margin.series) + len(chart.multiline.tag) <= 4 for chart in charts())


def test_every_description_is_one_line() -> None:
    assert all(text and "\n" not in text for text in tags.DESCRIPTIONS.values())


def test_an_event_file_gives_back_one_layout(tmp_path: Path, write_run: Callable[[Path], None]) -> None:
    write_run(tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    assert layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]) == layout()
    plugin = events.SummaryMetadata(metadata.CONFIG_SUMMARY_TAG).plugin_data.plugin_name
    assert plugin == metadata.PLUGIN_NAME


def test_the_guide_explains_every_chart_and_tag_and_holds_the_notes(
    tmp_path: Path, write_run: Callable[[Path], None]
) -> None:
    write_run(tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors(f"{tags.GUIDE}/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    titles = [chart.title for category in layout().category for chart in category.chart]
    shown = [tag for tag in tags.DESCRIPTIONS if tag.startswith(("sharpness/", "cost/"))]
    for part in (*titles, *shown, "random subset of 8,192 of 50,000 samples"):
        assert part in text
    assert "prediction/" not in text
    assert events.Histograms(tags.LAMBDA_MAX)[0].histogram_value.num == 41


@pytest.mark.parametrize("kind", ["csv", "dummy", "none"])
def test_other_loggers_are_left_alone(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    experiment = {"csv": CSVLogger(tmp_path).experiment, "dummy": DummyExperiment(), "none": None}[kind]
    write_layout(experiment)
    write_guide(experiment, ["a note"])
    write_histogram(experiment, [1.0], 0)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not recwarn.list
    assert capsys.readouterr() == ("", "")


def test_a_guide_needs_no_notes(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_guide(writer, [])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors(f"{tags.GUIDE}/text_summary")
    assert b"This run" not in event.tensor_proto.string_val[0]
