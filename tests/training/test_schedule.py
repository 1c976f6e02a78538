"""When the schedule measures: on a fake clock, and once on a real one."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from lightning_eoss.callbacks import sharpness
from lightning_eoss.training.schedule import Ledger, charged, check_schedule, due_by_share, due_by_step
from tests.runs import Regressor, fit, loader, points, samples, seeded

NAMES = ("current", "mini", "full")
COLD = 3  # times what it costs later, the first measurement takes


@dataclass
class Simulation:
    """A training whose clock is a number, with costs that begin high, scatter and drift, and steps that drift."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    shares: list[float] = field(default_factory=list)  # at each step, once five full measurements fit
    first: int | None = None  # step of the first measurement

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.overhead = float(random.choice([0.01, 0.05, 0.2, 0.5]))
        self.costs = np.sort(np.exp(random.uniform(np.log(0.01), np.log(100), size=3)))
        estimates = COLD * self.costs * np.exp(random.uniform(-0.7, 0.7, size=3))
        self.expected = float(estimates.sum())
        # From ever so short to a fifth of what passes between two full measurements.
        step = self.costs.sum() / self.overhead / 5 * np.exp(random.uniform(np.log(0.03), 0))
        ledgers = {name: Ledger(cost) for name, cost in zip(NAMES, estimates.tolist(), strict=True)}
        elapsed, spent, number, dearest = 0.0, 0.0, 0, float(self.costs.sum())
        period = self.costs.sum() / self.overhead
        while elapsed < 60 * period:
            due = due_by_share(ledgers, spent, elapsed, self.overhead, eager=0.0 if number else 5.0)
            total = 0.0
            for name, cost in zip(NAMES, self.costs, strict=True):
                if name in due:
                    drift = 1.5 ** np.sin(elapsed / period) * (COLD if self.counts[name] == 0 else 1)
                    seconds = float(cost * drift * random.lognormal(0, 0.1))
                    ledgers[name] = charged(ledgers[name], seconds)
                    total += seconds
            dearest = max(dearest, total, sum(ledger.cost for ledger in ledgers.values()))
            spent, elapsed = spent + total, elapsed + total
            self.counts.update(due)
            if due and self.first is None:
                self.first = number
            elapsed += float(step * 2 ** np.sin(3 * elapsed / period))
            number += 1
            if self.overhead * elapsed >= 5 * dearest:
                self.shares.append(spent / elapsed)


def test_the_share_is_kept() -> None:
    simulations = [Simulation(seed) for seed in range(120)]
    lowest = min(min(each.shares) / each.overhead for each in simulations)
    highest = max(max(each.shares) / each.overhead for each in simulations)
    assert lowest >= 0.8
    assert highest <= 1.1


def test_cheap_quantities_come_more_often() -> None:
    for seed in range(40):
        simulation = Simulation(seed)
        counts, costs = [simulation.counts[name] for name in NAMES], simulation.costs
        assert counts[0] >= counts[1] >= counts[2] >= 2
        for cheap in (0, 1):
            if costs[cheap + 1] > 10 * costs[cheap] and simulation.overhead < 0.5:
                assert counts[cheap] > counts[cheap + 1]


def test_the_first_measurement_waits_where_it_is_dear() -> None:
    simulations = [Simulation(seed) for seed in range(40)]
    assert {each.first == 0 for each in simulations} == {True, False}
    for each in simulations:
        assert (each.first == 0) == (each.expected < 5)


def test_nothing_is_starved_by_cheaper_quantities() -> None:
    """What is due next is saved up for."""
    ledgers = {"cheap": Ledger(0.01, 1000), "dear": Ledger(9.0, 0)}
    assert not due_by_share(ledgers, spent=10.0, elapsed=200.0, share=0.05)
    assert due_by_share(ledgers, spent=10.0, elapsed=400.0, share=0.05) == {"cheap", "dear"}


def test_a_dear_quantity_brings_cheap_ones_along() -> None:
    ledgers = {"cheap": Ledger(1.0, 10), "dear": Ledger(2.0, 0)}
    assert due_by_share(ledgers, spent=0.0, elapsed=58.0, share=0.05) == {"cheap", "dear"}
    assert not due_by_share(ledgers, spent=0.0, elapsed=56.0, share=0.05)


def test_the_first_cost_is_forgotten() -> None:
    ledger = Ledger(cost=1.0)
    for seconds, expected in ((8.0, 8.0), (2.0, 2.0), (4.0, 3.0)):
        ledger = charged(ledger, seconds)
        assert ledger.cost == expected
    assert ledger.count == 3


def test_steps() -> None:
    assert [step for step in range(10) if due_by_step(step, 4)] == [0, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0.05, 60.0), r"every_n_train_steps=10 and overhead=0.05 are two schedules"),
        ((0, None, 60.0), r"every_n_train_steps=0 must be at least 1"),
        ((-3, None, 60.0), r"every_n_train_steps=-3 must be at least 1"),
        ((None, 0.0, 60.0), r"overhead=0.0 is a share of the wall time and must lie between 0 and 1"),
        ((None, 1.0, 60.0), r"overhead=1.0 is a share"),
        ((None, -0.1, 60.0), r"overhead=-0.1 is a share"),
        ((None, None, 0.0), r"max_seconds=0.0 must be positive"),
        ((None, None, float("nan")), r"max_seconds=nan must be positive"),
    ],
)
def test_senseless_schedules_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(*arguments)


class Stopwatch(sharpness.SharpnessMonitor):
    """Measured from outside: the time that every hook takes, and the share of it at the end of each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.began, self.inside, self.readings = time.perf_counter(), 0.0, list[float]()

    def on_train_batch_start(self, *arguments: Any) -> None:
        arrived = time.perf_counter()
        super().on_train_batch_start(*arguments)
        now = time.perf_counter()
        self.inside += now - arrived
        if len(self.history) > len(self.readings):
            self.readings.append(self.inside / (now - self.began))


@pytest.mark.slow
@pytest.mark.alone
def test_a_real_run_keeps_its_share(tmp_path: Path) -> None:
    """Thirty seconds at the default of 5 %, first measurement included."""
    seeded()
    net = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 2))
    watch = Stopwatch(num_batches=20, full_batch_samples=256)
    watch.began = time.perf_counter()
    fit(tmp_path, Regressor(net), loader(samples(1024), 32, shuffle=True), watch, max_epochs=-1, max_time="00:00:00:30")
    elapsed = time.perf_counter() - watch.began
    shown = list(points(tmp_path)["cost/share"].values())
    assert len(shown) == len(watch.readings) >= 5
    assert watch.inside / elapsed <= 0.075
    assert watch.inside / elapsed >= 0.025  # the first measurement fills some of the half minute, a dear one may wait
    print(f"share {watch.inside / elapsed:.4f} over {elapsed:.1f} s, {len(shown)} measurements, logged {shown[-1]:.4f}")
    for logged, seen in zip(shown[1:], watch.readings[1:], strict=True):
        assert logged == pytest.approx(seen, rel=0.1)
