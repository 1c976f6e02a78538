"""The one TensorBoard page on which all is read, and the text cards that explain it."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from lightning_eoss.display.tags import (
    _CATEGORIES,
    DESCRIPTIONS,
    LAMBDA_MAX,
    SHARPNESS,
    WITH_INTERVAL,
    _Chart,
    interval,
)

_CLOSED = {"Cost"}


def _shown(categories: Collection[str]) -> dict[str, dict[str, _Chart]]:
    """These categories in the page's order."""
    return {title: charts for title, charts in _CATEGORIES.items() if title in categories}


def layout(categories: Collection[str] = SHARPNESS) -> layout_pb2.Layout:
    """Builds the page: its categories, charts and tags.

    Args:
        categories: Titles of those that the run has, some of `CATEGORIES`.

    Returns:
        The layout, the same for every such run.

    Example:
        >>> [category.title for category in layout().category]
        ['Am I at the edge?', 'Sharpness', 'Batch noise', 'Cost']
    """
    page = layout_pb2.Layout()
    for title, charts in _shown(categories).items():
        page.category.add(title=title, chart=[_message(*each) for each in charts.items()], closed=title in _CLOSED)
    return page


def _message(title: str, chart: _Chart) -> layout_pb2.Chart:
    """The chart as TensorBoard's message."""
    if chart.smoothed:  # here, and only here, tags are regular expressions, matched as prefixes
        lines = layout_pb2.MultilineChartContent(tag=[f"{re.escape(tag)}$" for tag in chart.tags])
        return layout_pb2.Chart(title=title, multiline=lines)
    bands = layout_pb2.MarginChartContent()
    for tag in chart.tags:
        lower, upper = interval(tag) if tag in WITH_INTERVAL else (tag, tag)
        bands.series.add(value=tag, lower=lower, upper=upper)
    return layout_pb2.Chart(title=title, margin=bands)


def write_page(
    experiment: Any, shown: Collection[str], own: Collection[str] = SHARPNESS, notes: Sequence[str] = ()
) -> None:
    """Writes all that a callback's scalars are read with: the page of the whole run, and a text card of its own.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it is TensorBoard's `SummaryWriter`.
        shown: Titles of the categories that the run has.
        own: Those that the callback fills.
        notes: Facts of the run, one line each.

    Example:
        >>> write_page(object(), SHARPNESS)  # not TensorBoard: nothing happens
    """
    write_layout(experiment, shown)
    write_guide(experiment, notes, own)


def write_layout(experiment: Any, categories: Collection[str] = SHARPNESS) -> None:
    """Writes the page into a run; once a run is enough.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it is TensorBoard's `SummaryWriter`.
        categories: Titles of those that the run has.

    Example:
        >>> write_layout(object())  # not TensorBoard: nothing happens
    """
    # `SummaryWriter.add_custom_scalars` is public, but allows one margin series a chart.
    writer = getattr(experiment, "_get_file_writer", lambda: None)()
    if writer is None:  # also where Lightning hands out a dummy, on all processes but the first
        return
    page = layout(categories)
    text = TensorProto(dtype="DT_STRING", string_val=[page.SerializeToString()], tensor_shape=TensorShapeProto())
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME))
    writer.add_summary(Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=text, metadata=plugin)]))


def write_guide(experiment: Any, notes: Sequence[str], categories: Collection[str] = SHARPNESS) -> None:
    """Writes the text card: how to read each chart, what holds for this run, and what each tag is.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_text`.
        notes: Facts of the run, one line each, such as "FullBS: fixed random subset of 8,192 of 50,000 samples".
        categories: Titles of the categories that it explains; the first gives the card its name, `sharpness/guide`.

    Example:
        >>> write_guide(object(), ["batch size 16"])  # not TensorBoard: nothing happens
    """
    charts = [item for charts in _shown(categories).values() for item in charts.items()]
    kinds = list(dict.fromkeys(tag.split("/")[0] for _, chart in charts for tag in chart.tags))
    lines = [
        "**This run**\n" if notes else "",
        *(f"- {note}" for note in notes),
        "\n**The charts of the *Custom Scalars* page**\n",
        *(f"- *{title}*: {chart.reading}." for title, chart in charts),
        "\n**The tags**\n",
        *(f"- `{tag}`: {text}." for tag, text in DESCRIPTIONS.items() if tag.split("/")[0] in kinds),
    ]
    _call(experiment, "add_text", f"{kinds[0]}/guide", "\n".join(lines), 0)


def write_histogram(experiment: Any, values: Any, step: int, *, tag: str = LAMBDA_MAX) -> None:
    """Writes a histogram, if nothing else is said of the largest eigenvalues of the sampled mini-batches.

    Args:
        experiment: `logger.experiment` of any logger. Nothing happens unless it has `add_histogram`.
        values: Shape `(K,)`, a tensor or an array.
        step: Position on the x-axis, the one of the scalars.
        tag: Its name.

    Example:
        >>> write_histogram(object(), [5.1, 5.8], step=0)  # not TensorBoard: nothing happens
    """
    _call(experiment, "add_histogram", tag, values, step)


def _call(experiment: Any, method: str, *args: Any) -> None:
    """Calls the method where there is one."""
    getattr(experiment, method, lambda *_: None)(*args)
