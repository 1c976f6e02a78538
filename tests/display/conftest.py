"""Curves like those of a run of the demonstration, at the edge, and event files that hold them."""

from collections.abc import Callable, Collection, Container
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_eoss.display import page, tags

Curves = dict[str, tuple[list[int], list[float]]]


@pytest.fixture
def curves() -> Curves:
    """Scalars at the monitor's cadences: the current batch every 10 steps, MiniBS every 100, FullBS every 200."""
    generator = np.random.default_rng(0)
    steps = np.arange(0, 4001, 100)
    rise = 1 - np.exp(-steps / 500)
    threshold = 2.0
    mini = threshold * (0.68 + 0.70 * rise + 0.02 * generator.standard_normal(len(steps)))
    directional = threshold * (0.47 + 0.56 * (1 - np.exp(-steps / 1200)) + 0.02 * generator.standard_normal(len(steps)))
    full = threshold * (0.63 + 0.22 * rise)
    values = {
        tags.MINI_BS: mini,
        tags.DIRECTIONAL: directional,
        tags.GAP: mini - full,
        tags.EDGE_RATIO: mini / threshold,
    }
    for tag, width in ((tags.MINI_BS, 0.1), (tags.DIRECTIONAL, 0.12), (tags.GAP, 0.1), (tags.EDGE_RATIO, 0.05)):
        lower, upper = tags.interval(tag)
        values |= {lower: values[tag] - width, upper: values[tag] + width}
    values |= {
        tags.EDGE_RATIO_DIRECTIONAL: directional / threshold,
        tags.THRESHOLD: np.full(len(steps), threshold),
        tags.EDGE: np.ones(len(steps)),
        tags.BATCH_SIZE: np.full(len(steps), 16.0),
        tags.PHASE: np.digitize(directional / threshold, [0.85]).astype(float),
        tags.COST_SHARE: 0.05 + 0.1 * np.exp(-steps / 300),
        tags.COST_SECONDS: 0.2 + 0.3 * np.exp(-steps / 300),
        tags.COST_HVPS: 100 + 200 * np.exp(-steps / 300),
        tags.COST_RESIDUAL: np.full(len(steps), 0.01),
        tags.COST_AUDIT: np.full(len(steps), 0.002),
        tags.COST_MEMORY: np.full(len(steps), 120.0),
        tags.COST_SAMPLES: np.full(len(steps), 8192.0),
    }
    curves = {tag: (steps.tolist(), value.tolist()) for tag, value in values.items()}
    for tag, divisor in ((tags.FULL_BS, 1.0), (tags.EDGE_RATIO_FULL_BS, threshold)):
        curves[tag] = (steps[::2].tolist(), (full[::2] / divisor).tolist())
    batch_steps = np.arange(0, 4001, 10)
    batch = np.interp(batch_steps, steps, mini) * np.exp(0.15 * generator.standard_normal(len(batch_steps)))
    for tag, factor in ((tags.PREDICTION_SUBSPACE, 0.98), (tags.PREDICTION_WIGNER, 0.7)):
        predicted, seldom = factor * mini[::5], steps[::5].tolist()
        curves[tag] = (seldom, predicted.tolist())
        for end, sign in zip(tags.interval(tag), (-1, 1), strict=True):
            curves[end] = (seldom, (predicted + 0.1 * sign).tolist())
    for end in (tags.PREDICTION_MARCHENKO_PASTUR, *tags.interval(tags.PREDICTION_MARCHENKO_PASTUR)):
        curves[end] = (steps[::5].tolist(), (1.5 * mini[::5]).tolist())
    curves[tags.PREDICTION_CRITICAL_BATCH_SIZE] = (steps[::5].tolist(), (8 + rise[::5]).tolist())
    rate = np.where(steps < 2000, 0.1, 0.05)
    curves[tags.THRESHOLD_SMALL_BATCH] = (steps.tolist(), np.full(len(steps), 0.3 * threshold).tolist())
    curves[tags.LEARNING_RATE_APPLIED] = (steps.tolist(), rate.tolist())
    curves[tags.LEARNING_RATE_SUGGESTED] = (steps.tolist(), (0.9 * rate).tolist())
    curves[tags.LEARNING_RATE_SCALE] = (steps.tolist(), (rate / 0.1).tolist())
    for tag in (tags.NOISE_MEASURED, tags.NOISE_PREDICTED, tags.NOISE_SCALE, tags.NOISE_CURVATURE_SCALE):
        for each, sign in zip((tag, *tags.interval(tag)), (0, -1, 1), strict=True):
            curves[each] = (steps.tolist(), (1 + 0.5 * rise + 0.1 * sign).tolist())
    for tag in (tags.LEARNING_RATE_MOMENTUM, tags.LEARNING_RATE_LARGEST, tags.LEARNING_RATE_SMALLEST):
        curves[tag] = (steps.tolist(), (0.5 + 0.1 * rise).tolist())
    for tag in (tags.NOISE_COSINE, tags.WEIGHTS_ANGLE, tags.WEIGHTS_LOG_R2, tags.WEIGHTS_POWER_R2):
        curves[tag] = (steps.tolist(), (0.8 + 0.1 * np.sin(steps / 500)).tolist())
    ends = (tags.SPECTRUM_LARGEST, tags.SPECTRUM_SMALLEST, tags.SPECTRUM_BATCH_LARGEST, tags.SPECTRUM_BATCH_SMALLEST)
    curves |= dict.fromkeys(ends, (steps[::5].tolist(), (1 + rise[::5]).tolist()))
    for tag in (tags.SPECTRUM_TRACE, tags.SPECTRUM_RANK, tags.SPECTRUM_NEGATIVE, tags.SPECTRUM_BATCH_NEGATIVE):
        for each, sign in zip((tag, *tags.interval(tag)), (0, -1, 1), strict=True):
            curves[each] = (steps[::5].tolist(), (0.5 - 0.2 * rise[::5] + 0.01 * sign).tolist())
    curves[tags.WEIGHTS_DISTANCE] = (steps.tolist(), np.log1p(steps).tolist())
    curves[tags.CURRENT_BATCH] = (batch_steps.tolist(), batch.tolist())
    return curves


@pytest.fixture
def write_run(curves: Curves) -> Callable[..., None]:
    """Writes those curves, the layout, the guide and a histogram into a directory of event files."""

    def write(logdir: Path, without: Container[str] = (), *, categories: Collection[str] = tags.SHARPNESS) -> None:
        with SummaryWriter(str(logdir)) as writer:
            page.write_layout(writer, categories)
            notes = ["FullBS: fixed random subset of 8,192 of 50,000 samples"]
            page.write_guide(writer, notes, categories)
            for tag, (steps, values) in curves.items():
                for step, value in zip(steps, values, strict=True) if tag not in without else ():
                    writer.add_scalar(tag, value, step)
            page.write_histogram(writer, np.array(curves[tags.MINI_BS][1]), step=0)

    return write
