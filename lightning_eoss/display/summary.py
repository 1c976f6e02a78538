"""A run in a few lines of text, read from the event files that it left."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from lightning_eoss.display import tags
from lightning_eoss.display.figures import Curve
from lightning_eoss.theory.statistics import mean_estimate, moments

_WINDOW = 5  # measurements, as many as the phase is judged on
_VERDICTS = ("Sharpening", "At the edge", "Beyond the edge", "Catapult")  # by phase
_ROWS = (tags.MINI_BS, tags.DIRECTIONAL, tags.FULL_BS, tags.CURRENT_BATCH, tags.GAP, tags.THRESHOLD)


def read_curves(logdir: str | Path) -> dict[str, dict[str, Curve]]:
    """Reads the scalars of every run below a directory that has sharpness among them.

    Args:
        logdir: Directory of TensorBoard's event files, searched recursively.

    Returns:
        Steps and values of each tag, by the run's path below `logdir`; the run written to last comes last.

    Example:
        >>> read_curves("no/such/directory")
        {}
    """
    # Of a run with several files the last one counts.
    written = dict(sorted((file.parent, file.stat().st_mtime) for file in Path(logdir).rglob("*tfevents*")))
    runs: dict[str, dict[str, Curve]] = {}
    for directory in sorted(written, key=lambda run: (written[run], run)):
        events = EventAccumulator(str(directory), size_guidance={SCALARS: 0})  # 0: all of them
        events.Reload()
        curves: dict[str, Curve] = {}
        for tag in events.Tags()[SCALARS]:
            points = events.Scalars(tag)
            curves[tag] = ([one.step for one in points], [one.value for one in points])
        if tags.DESCRIPTIONS.keys() & curves.keys():
            runs[directory.relative_to(logdir).as_posix()] = curves
    return runs


def summary_table(curves: Mapping[str, Curve]) -> str:
    """Tabulates a run: each quantity's first, largest and last value, with its interval and its edge ratio.

    Args:
        curves: Steps and values of each tag, as `read_curves` returns them for one run.

    Returns:
        The table, one line a quantity that was logged.

    Example:
        >>> print(summary_table({"sharpness/FullBS": ([0, 200], [1.3, 1.75]), "sharpness/threshold": ([0], [2.0])}))
                   first   max  last  95 % interval  edge ratio
        FullBS       1.3  1.75  1.75
        threshold      2     2     2
    """
    rows: list[tuple[str, ...]] = [("", "first", "max", "last", "95 % interval", "edge ratio")]
    for tag in _ROWS:
        if tag not in curves:
            continue
        _, values = curves[tag]
        ends = [_number(curves[end][1][-1]) for end in tags.interval(tag) if end in curves]
        ratio = curves.get(tags.RATIOS.get(tag, ""))
        rows.append(
            (
                tag.removeprefix("sharpness/"),
                *(_number(value) for value in (values[0], max(values), values[-1])),
                f"[{', '.join(ends)}]" if ends else "",
                f"{ratio[1][-1]:.2f}" if ratio else "",
            )
        )
    name, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = "  ".join([f"{{:<{name}}}", *(f"{{:>{width}}}" for width in widths)])
    return "\n".join(form.format(*row).rstrip() for row in rows)


def verdict(curves: Mapping[str, Curve]) -> str:
    """Says in one line where a run stands: its phase, and the mean edge ratio of the last five measurements.

    The phase is the one that was logged. The ratio is the one that phases are judged on, that of directional sharpness,
    with Student's interval over the five; FullBS's where no directional one was logged.

    Args:
        curves: Steps and values of each tag, as `read_curves` returns them for one run.

    Returns:
        The line.

    Example:
        >>> steps = [0, 100, 200]
        >>> verdict({"sharpness/edge_ratio_directional": (steps, [0.9, 1.0, 1.1]), "sharpness/phase": ([200], [1.0])})
        'At the edge: directional edge ratio = 1.00 [0.75, 1.25] over the last 3 measurements'
    """
    judged = tags.DIRECTIONAL if tags.EDGE_RATIO_DIRECTIONAL in curves else tags.FULL_BS
    name, tag = judged.removeprefix("sharpness/"), tags.RATIOS[judged]
    if tag not in curves:
        return "No verdict: no edge ratio was logged"
    ratios = curves[tag][1][-_WINDOW:]
    estimate = mean_estimate(moments(torch.tensor(ratios)))
    if tags.PHASE not in curves:
        return f"Too early for a verdict: {name} edge ratio = {ratios[-1]:.2f} at measurement {len(ratios)}"
    phase = _VERDICTS[int(curves[tags.PHASE][1][-1])]
    mean, interval = f"{estimate.mean:.2f}", f"[{estimate.lower:.2f}, {estimate.upper:.2f}]"
    return f"{phase}: {name} edge ratio = {mean} {interval} over the last {len(ratios)} measurements"


def _number(value: float) -> str:
    """Three digits, and never an exponent for a large threshold."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
