"""What loading costs is in the plan: a data set that takes 5 ms a sample, on a clock that only it and the code move."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_eoss import GradientNoiseMonitor, SharpnessMonitor, SpectralDensityMonitor
from lightning_eoss.curvature.batches import DatasetSource, full_batch
from lightning_eoss.training.schedule import EAGER_SECONDS
from tests.runs import Regressor, fit, seeded

SECONDS = 0.005  # to load a sample
TICK = 2e-5  # what happens between two looks at the clock: a product takes one or two


INPUTS, TARGETS = (torch.randn(2000, size, generator=torch.Generator().manual_seed(size)) for size in (4, 2))


class Clock:
    """Seconds that pass by being looked at, and by loading. Of the class: what data sets hold is put back."""

    now = 0.0


def looked_at() -> float:
    Clock.now += TICK
    return Clock.now


class Slow(Dataset[Any]):
    """Samples that take their time."""

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> Any:
        Clock.now += SECONDS
        return INPUTS[index], TARGETS[index]


def nets(kind: str) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), *([nn.BatchNorm1d(5)] if kind == "other" else []), nn.Linear(5, 2))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "now", 0.0)
    monkeypatch.setattr(time, "perf_counter", looked_at)


@pytest.mark.parametrize("kind", ["mean", "other"])
@pytest.mark.parametrize("memory", [2.0**30, 12_000.0])  # the second holds 500 samples of 24 bytes
@pytest.mark.filterwarnings("ignore:.*more than max_seconds:UserWarning")
def test_a_measurement_takes_what_it_may(
    kind: str, memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seconds, and a twentieth for what is not planned: a first FullBS begins with a 16th of its samples."""
    monkeypatch.setattr("lightning_eoss.training.watch.memory_budget", lambda device: memory)
    seeded()
    watch = SharpnessMonitor(every_n_train_steps=2, max_seconds=5)
    data = DataLoader(Slow(), 64, shuffle=True)
    fit(tmp_path, Regressor(nets(kind)), data, watch, max_epochs=1, limit_train_batches=5)
    assert len(watch.history) == 3
    for point in watch.history:
        assert 0.5 * 5 <= point["cost/seconds"] <= 1.05 * 5
        assert {"sharpness/MiniBS", "sharpness/FullBS", "sharpness/current_batch"} <= point.keys()


@pytest.mark.parametrize("kind", [GradientNoiseMonitor, SpectralDensityMonitor])
def test_other_monitors_keep_it_too(kind: Any, tmp_path: Path) -> None:
    seeded()
    watch = kind(every_n_train_steps=2, max_seconds=5)
    data = DataLoader(Slow(), 64, shuffle=True)
    fit(tmp_path, Regressor(nets("mean")), data, watch, max_epochs=1, limit_train_batches=3)
    assert 0.2 * 5 <= watch.latest.seconds <= 1.05 * 5


def test_predictions_keep_it_too(tmp_path: Path) -> None:
    seeded()
    watch = SharpnessMonitor(every_n_train_steps=2, max_seconds=5, predictions=True)
    data = DataLoader(Slow(), 64, shuffle=True)
    with pytest.warns(UserWarning, match="to load a sample, more than max_seconds=5"):
        fit(tmp_path, Regressor(nets("mean")), data, watch, max_epochs=1, limit_train_batches=1)
    assert watch.history[0]["cost/seconds"] <= 1.05 * (5 + 5)  # a measurement, and a prediction


@pytest.mark.slow
@pytest.mark.alone
def test_at_a_share_the_first_look_is_no_tenth_of_two_minutes(tmp_path: Path) -> None:
    """It took 13 s. Now it waits, or takes less than the eager seconds, the trial included."""
    seeded()
    watch = SharpnessMonitor()
    data = DataLoader(Slow(), 64, shuffle=True)
    fit(tmp_path, Regressor(nets("other")), data, watch, max_epochs=-1, max_steps=562)  # three minutes of loading
    assert 180 <= Clock.now <= 190
    (first, *_) = (point for point in watch.history if "sharpness/MiniBS" in point)
    assert first["step"] == 0 and first["cost/seconds"] <= EAGER_SECONDS
    assert watch.agenda.spent <= 1.1 * 0.05 * Clock.now
    shown = [tag for point in watch.history for tag in point]
    assert shown.count("sharpness/MiniBS") >= 2 and shown.count("sharpness/FullBS") >= 1


@pytest.mark.slow
@pytest.mark.alone
def test_monitors_of_all_kinds_have_one_share(tmp_path: Path) -> None:
    """On five minutes of loading, of which each would take 5 % by itself."""
    seeded()
    watches = [SharpnessMonitor(), GradientNoiseMonitor(max_seconds=5), SpectralDensityMonitor(max_seconds=5)]
    data = DataLoader(Slow(), 64, shuffle=True)
    fit(tmp_path, Regressor(nets("mean")), data, *watches, max_epochs=-1, max_steps=1000)
    spent = sum(watch.agenda.spent for watch in watches)
    assert 0.8 * 0.05 * Clock.now <= spent <= 1.1 * 0.05 * Clock.now
    assert all(watch.history for watch in watches)
    assert watches[0].history[-1]["cost/share"] == pytest.approx(spent / Clock.now, rel=0.1)


def test_a_growing_part_of_the_full_batch_lies_within_the_larger_ones() -> None:
    """And all of it is the subset that is measured under steps."""
    for count, most in ((2000, 500), (2000, None), (300, 8192)):
        source = DatasetSource(list(range(count)))
        parts = [
            {index for part in full_batch(source, 64, max_samples=most, first=first, seed=3) for index in part.indices}
            for first in (1, 64, 128, 256, min(most or count, count), 10**6, None)
        ]
        assert [len(part) for part in parts] == [1, 64, 128, 256, *[min(most or count, count)] * 3]
        assert all(one <= other for one, other in itertools.pairwise(parts))
        chunks = full_batch(source, 64, max_samples=most, first=256, seed=3)
        assert sum(part.weight for part in chunks) == pytest.approx(1) and sum(part.size for part in chunks) == 256
        whole = full_batch(source, 64, max_samples=most, seed=3)
        assert full_batch(source, 64, max_samples=most, first=10**6, seed=3) == whole
