"""What a share of wall time buys: on a fake clock, with costs that are computed from products and from loading."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_eoss.curvature.preflight import Findings
from lightning_eoss.curvature.solver import Plan
from lightning_eoss.training.plan import (
    COLD_PRODUCTS,
    FEWEST_BATCHES,
    WARM_PRODUCTS,
    affordable,
    expected,
    look_of,
    pass_seconds,
    settle,
)
from lightning_eoss.training.schedule import EAGER_SECONDS, Agenda

QUANTITIES = ("current", "mini", "full")
B, N = 64, 2000


class Trainer:
    """What monitors share."""


def findings(seconds: float, loading: float = 0.0, sample_bytes: float = 1000.0) -> Findings:
    """Of a network with BatchNorm."""
    return Findings("other", False, False, 0.0, seconds, (), loading, sample_bytes)


@dataclass
class Watched:
    """A `SharpnessMonitor` without a network: its looks take what their products and their loading take."""

    found: Findings
    share: float = 0.05
    trainer: Any = field(default_factory=Trainer)
    plan: Plan = field(default_factory=lambda: Plan(B, memory_bytes=2.0**30))
    counts: Counter[str] = field(default_factory=Counter)
    looks: list[Plan] = field(default_factory=list)
    dues: list[frozenset[str]] = field(default_factory=list)
    prepared: bool = False

    def __post_init__(self) -> None:
        self.agenda = Agenda(QUANTITIES, None, self.share)
        self.agenda.begin(self.trainer)

    def step(self, elapsed: float) -> float:
        """What the hook takes before a step."""
        due, begun = self.agenda.due(0, elapsed), 0.0
        if due and not self.prepared:
            self.prepared, begun = True, 25 * self.found.seconds + 4 * B * self.found.loading
            look = look_of(self.plan, self.found, N, self.agenda)
            self.agenda.expect(expected(look, self.found, N))
            due = self.agenda.due(0, elapsed + begun, begun)
        seconds = self.look(due) if due else 0.0
        if due or begun:
            self.agenda.tried(0)
        self.agenda.spent += begun + seconds
        return begun + seconds

    def look(self, due: frozenset[str]) -> float:
        look = look_of(self.plan, self.found, N, self.agenda)
        self.looks.append(look)
        self.dues.append(due)
        passes = WARM_PRODUCTS if self.counts["full"] else COLD_PRODUCTS
        samples = look.first_samples if "full" in due else 0
        batches = look.num_batches if "mini" in due else 0
        products = passes * samples / B + ("current" in due) * WARM_PRODUCTS
        products += (WARM_PRODUCTS * batches + 2 * COLD_PRODUCTS) * ("mini" in due)
        seconds = products * self.found.seconds + (samples + batches * B) * self.found.loading
        self.counts.update(due)
        measured: Any = SimpleNamespace(
            full_passes=passes if samples else 0,
            num_samples=samples,
            batch_size=B,
            hvps=products,
            mini_batch=SimpleNamespace(values=(0.0,) * batches),
        )
        settle(self.plan, self.found, self.agenda, measured, N, due, seconds)
        return seconds


def trained(seconds: float, *watched: Watched, step: float = 0.02) -> float:
    """Trains for so long, and returns the share of the hooks."""
    elapsed = 0.0
    while elapsed < seconds:
        elapsed += sum(each.step(elapsed) for each in watched) + step
    return sum(each.agenda.spent for each in watched) / elapsed


def test_a_minute_shows_mini_batches_often_and_the_full_batch_soon() -> None:
    """Three seconds at the default, with a product of 2 ms: three steps of a small network."""
    watched = Watched(findings(0.002))
    share = trained(60, watched, step=0.002)
    assert watched.counts["mini"] >= 10
    assert watched.counts["full"] >= 3
    assert 0.8 * 0.05 <= share <= 1.1 * 0.05


@pytest.mark.parametrize("seconds", [0.0005, 0.002, 0.01, 0.03, 0.1, 0.5])
@pytest.mark.parametrize("loading", [0.0, 0.0002, 0.005])
def test_mini_batches_come_before_all_else(seconds: float, loading: float) -> None:
    """What comes along with them apart: a point of the current batch where nothing else can be had at once."""
    watched = Watched(findings(seconds, loading))
    share = trained(4 * 3600, watched, step=0.5)
    first = next(index for index, due in enumerate(watched.dues) if "mini" in due)
    assert first <= 1 and watched.dues[0] <= {"current", "mini", "full"}
    assert watched.dues[:first] == [frozenset({"current"})] * first
    assert any("full" in due for due in [due for due in watched.dues if "mini" in due][:4])
    assert watched.counts["mini"] > watched.counts["full"] >= 3
    assert 0.8 * 0.05 <= share <= 1.1 * 0.05


def test_looks_grow_with_what_was_paid_and_the_full_batch_by_doubling() -> None:
    watched = Watched(findings(0.002))
    trained(3600, watched)
    batches = [look.num_batches for look in watched.looks]
    samples = [look.first_samples or 0 for look, due in zip(watched.looks, watched.dues, strict=True) if "full" in due]
    assert batches[0] == FEWEST_BATCHES and batches[-1] == watched.plan.num_batches
    assert batches == sorted(batches)
    assert sorted(set(samples)) == [256, 512, 1024, N] and samples == sorted(samples)
    assert all(samples.count(size) >= 3 for size in (256, 512, 1024))  # a curve, not single points


def test_a_look_that_has_grown_is_foreseen() -> None:
    """The ledger holds the cost of the next look, not that of the last."""
    watched = Watched(findings(0.002), plan=Plan(B, num_batches=30, memory_bytes=2.0**30))
    trained(1800, watched)
    look = look_of(watched.plan, watched.found, N, watched.agenda)
    costs = expected(look, watched.found, N, warm=True)
    for quantity in ("mini", "full"):
        assert watched.agenda.ledgers[quantity].cost == pytest.approx(costs[quantity], rel=0.3)


def test_under_steps_the_plan_is_the_plan() -> None:
    plan = Plan(B)
    assert look_of(plan, findings(0.01), N, Agenda(QUANTITIES, 10, None)) is plan


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_loading_cuts_the_plan() -> None:
    """Products that take nothing, and 5 ms a sample: five seconds load a thousand."""
    plan, cut = affordable(Plan(B), findings(1e-9, 0.005), N, 5.0)
    assert plan.full_batch_samples == 500
    assert plan.num_batches == int(500 / B)
    assert "FullBS is measured on 500 instead of 2,000 samples and MiniBS over at most 7 instead of 100" in cut
    assert "0.005 s to load a sample, more than max_seconds=5" in cut


def test_what_the_memory_does_not_hold_is_loaded_for_each_product() -> None:
    plan, found = Plan(B, memory_bytes=500e3), findings(0.0, 0.005, sample_bytes=1000)
    assert pass_seconds(plan, found, 500, passes=20) == pytest.approx(500 * 0.005)
    assert pass_seconds(plan, found, 501, passes=20) == pytest.approx((500 + 20) * 0.005)
    assert affordable(plan, found, N, 10.0)[0].full_batch_samples < 600  # 500 and 25 take a half of it


def test_the_batch_at_hand_is_there() -> None:
    assert expected(Plan(B), findings(0.01, 5.0), N)["current"] == pytest.approx(WARM_PRODUCTS * 0.01)


def test_a_first_look_that_loads_long_is_small() -> None:
    """The issue's run: 5 ms a sample, two minutes at the default. The first look took 13 s, or 11 %."""
    watched = Watched(findings(0.001, 0.005))
    first = watched.step(0.0)
    assert first <= EAGER_SECONDS < 0.05 * 120
    assert "mini" in watched.dues[0]
    assert trained(120, Watched(findings(0.001, 0.005))) <= 1.1 * 0.05


# ---- several monitors ------------------------------------------------------------------------------------------------


def test_five_monitors_have_one_share() -> None:
    trainer = Trainer()
    watched = [Watched(findings(seconds), trainer=trainer) for seconds in (0.001, 0.002, 0.004, 0.008, 0.016)]
    share = trained(1800, *watched, step=0.1)
    assert 0.8 * 0.05 <= share <= 1.1 * 0.05
    spent = [each.agenda.spent for each in watched]
    assert min(spent) >= 0.5 * sum(spent) / 5  # the dear ones are not starved by the cheap ones
    assert all(each.counts["mini"] >= 3 and each.counts["full"] >= 1 for each in watched)
    assert {round(each.agenda.total, 9) for each in watched} == {round(sum(spent), 9)}


def test_the_first_looks_of_several_are_not_eager_all() -> None:
    trainer = Trainer()
    watched = [Watched(findings(0.03), trainer=trainer) for _ in range(5)]
    assert sum(each.step(0.0) for each in watched) <= 2 * EAGER_SECONDS  # each would like three seconds at once


def test_a_smaller_share_is_a_part_of_the_larger_one() -> None:
    trainer = Trainer()
    small, large = (Watched(findings(0.002), share, trainer) for share in (0.01, 0.05))
    share = trained(3600, small, large, step=0.1)
    assert 0.8 * 0.05 <= share <= 1.1 * 0.05
    assert 0.8 * 0.01 <= small.agenda.spent / 3600 <= 1.1 * 0.01
    assert small.counts["mini"] >= 10


def test_monitors_by_steps_and_those_of_other_trainers_have_budgets_of_their_own() -> None:
    trainer = Trainer()
    watched, stepping, other = Watched(findings(0.002), trainer=trainer), Agenda(QUANTITIES, 10, None), Trainer()
    stepping.begin(trainer)
    stepping.spent = 1000.0
    elsewhere = Watched(findings(0.002), trainer=other)
    elsewhere.agenda.spent = 1000.0
    assert watched.agenda.total == 0.0 and stepping.total == 1000.0
    watched.agenda.begin(trainer)  # a second fit is no second monitor
    watched.agenda.spent = 1.0
    assert watched.agenda.total == 1.0


def test_an_agenda_goes_on_with_what_was_paid() -> None:
    """A resumed run does not begin with small looks again."""
    watched = Watched(findings(0.002))
    trained(1800, watched)
    resumed = Watched(findings(0.002))
    resumed.agenda.load_state_dict(watched.agenda.state_dict())
    before, after = (look_of(each.plan, each.found, N, each.agenda) for each in (watched, resumed))
    assert after == before and (before.first_samples or 0) > 256
    old = {name: {"cost": 1.0, "count": 2} for name in QUANTITIES}  # of an earlier version
    resumed.agenda.load_state_dict(old)
    assert look_of(resumed.plan, resumed.found, N, resumed.agenda) == replace(
        resumed.plan, num_batches=FEWEST_BATCHES, first_samples=256
    )
    assert not math.isnan(resumed.agenda.total)
