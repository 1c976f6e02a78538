"""What TensorBoard reads beside the scalars: the one page of charts, the text cards that explain it, histograms.

All else that is called an experiment is left alone: what a logger cannot show is not written.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from lightning_eoss.display import tags


def layout(categories: Collection[str] = tags.SHARPNESS) -> layout_pb2.Layout:
    """The page of a run that has these categories: the same for every such run."""
    page = layout_pb2.Layout()
    for title, charts in tags.CATEGORIES.items():
        if title in categories:
            rows = [_message(*each) for each in charts.items()]
            page.category.add(title=title, chart=rows, closed=title == tags.COST)
    return page


def _message(title: str, chart: tags.Chart) -> layout_pb2.Chart:
    """The chart as TensorBoard's message."""
    if isinstance(chart, tags.Lines):  # here, and only here, tags are regular expressions, matched as prefixes
        lines = layout_pb2.MultilineChartContent(tag=[f"{re.escape(tag)}$" for tag in chart.tags])
        return layout_pb2.Chart(title=title, multiline=lines)
    bands = layout_pb2.MarginChartContent()
    for tag in chart.tags:
        lower, upper = tags.interval(tag) if tag in tags.WITH_INTERVAL else (tag, tag)
        bands.series.add(value=tag, lower=lower, upper=upper)
    return layout_pb2.Chart(title=title, margin=bands)


def write_page(
    experiment: Any, shown: Collection[str], own: Collection[str] = tags.SHARPNESS, notes: Sequence[str] = ()
) -> None:
    """Writes the page of the categories that are shown in a run, and the card of those that a callback fills."""
    write_layout(experiment, shown)
    write_guide(experiment, notes, own)


def write_layout(experiment: Any, categories: Collection[str] = tags.SHARPNESS) -> None:
    """Writes the page into a run; once a run is enough."""
    # `SummaryWriter.add_custom_scalars` is public, but allows one margin series a chart.
    writer = getattr(experiment, "_get_file_writer", lambda: None)()
    if writer is None:  # also where Lightning hands out a dummy, on all processes but the first
        return
    page = layout(categories).SerializeToString()
    text = TensorProto(dtype="DT_STRING", string_val=[page], tensor_shape=TensorShapeProto())
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME))
    writer.add_summary(Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=text, metadata=plugin)]))


def write_guide(experiment: Any, notes: Sequence[str], categories: Collection[str] = tags.SHARPNESS) -> None:
    """Writes the text card: what holds for this run, how to read each chart of some categories, what each tag is."""
    shown = [each for title, each in tags.CATEGORIES.items() if title in categories]
    charts = [item for each in shown for item in each.items()]
    kinds = [tag.split("/")[0] for _, chart in charts for tag in chart.tags]
    lines = [
        "**This run**\n" if notes else "",
        *(f"- {note}" for note in notes),
        "\n**The charts of the *Custom Scalars* page**\n",
        *(f"- *{title}*: {chart.reading}." for title, chart in charts),
        "\n**The tags**\n",
        *(f"- `{tag}`: {words}." for tag, words in tags.DESCRIPTIONS.items() if tag.split("/")[0] in kinds),
    ]
    if hasattr(experiment, "add_text"):
        experiment.add_text(f"{kinds[0]}/guide", "\n".join(lines), 0)


def write_histogram(experiment: Any, values: Any, step: int, *, tag: str = tags.LAMBDA_MAX) -> None:
    """Writes a histogram, if nothing else is said of the largest eigenvalues of the sampled mini-batches."""
    if hasattr(experiment, "add_histogram"):
        experiment.add_histogram(tag, values, step)
