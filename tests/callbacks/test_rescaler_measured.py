"""`LearningRateRescaler`: the limit and the controller, by what a monitor has measured."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from torch.optim import lr_scheduler

from lightning_eoss.callbacks.rescaler import LearningRateRescaler
from lightning_eoss.theory.control import Reading
from lightning_eoss.theory.statistics import Estimate
from tests.callbacks.schedules import (
    NOTHING,
    ByEpoch,
    Save,
    Scheduled,
    Told,
    ToldMonitor,
    around,
    rescaler,
    said,
    shown,
    steered,
    trained,
)
from tests.runs import Regressor, applied_rates, fit, loader, monitor, points, samples, seeded


def test_a_limit_is_kept_from_the_measured_step_on(tmp_path: Path) -> None:
    """Down at once; up by steps, and where it is sure; never above the schedule's own rate."""
    ratios = {0: 0.5, 2: 2.0, 4: around(1.8, 0.4), 6: 1.0, 7: 1.0, 8: 1.0, 11: 4.0}
    options = {"max_edge_ratio": 1.0, "max_change": 1.25, "cool_down": 0}
    limits = [0.2, 0.2, 0.05, 0.05, 0.05, 0.05, 0.0625, 0.078125, 0.09765625, 0.09765625, 0.09765625, 0.025]
    assert steered(tmp_path / "a", ratios, **options) == pytest.approx([min(limit, 0.1) for limit in limits])
    # With a cool-down, the limit rises after it, and falls within it.
    limits = [0.2, 0.2, 0.05, 0.05, 0.05, 0.05, 0.0625, 0.0625, 0.0625, 0.0625, 0.0625, 0.025]
    options["cool_down"] = 3
    assert steered(tmp_path / "b", ratios, **options) == pytest.approx([min(limit, 0.1) for limit in limits])


def test_a_limit_is_kept_between_measurements(tmp_path: Path) -> None:
    """A warm-up runs into it, a decay leaves it."""
    path = tmp_path / "saved.ckpt"

    def make(optimizer: Any) -> Any:
        return lr_scheduler.LambdaLR(optimizer, lambda t: min(0.1 * (t + 1), 2.4 - 0.2 * t))

    modules = [Scheduled(make, rates=(0.1,)) for _ in range(2)]
    options = {"max_edge_ratio": 1.0}
    watching = LearningRateMonitor()
    trained(
        tmp_path / "a", modules[0], rescaler(**options), ToldMonitor({1: 2.0}), watching, Save(path, 7), max_epochs=2
    )
    expected = [0.01, 0.02, 0.03, 0.04] + [0.05] * 6 + [0.04, 0.02]
    assert [rates[0] for rates in modules[0].seen] == pytest.approx(expected)
    assert list(shown(tmp_path / "a").values()) == modules[0].seen
    trained(tmp_path / "b", modules[1], rescaler(**options), ToldMonitor({}), max_epochs=2, ckpt_path=path)
    assert modules[1].seen == modules[0].seen[7:]


def test_the_controller_moves_slowly_and_only_down_from_where_it_began(tmp_path: Path) -> None:
    ratios = dict.fromkeys(range(12), 0.2) | {3: around(1.5, 0.6), 4: 0.2, 5: 0.2}
    rates = steered(tmp_path / "a", ratios, target_edge_ratio=1.0, max_change=1.25, cool_down=2)
    assert rates == pytest.approx([0.1] * 3 + [0.08] * 2 + [0.1] * 7)
    upwards = steered(tmp_path / "b", ratios, target_edge_ratio=1.0, max_change=1.25, cool_down=2, max_scale=1.5)
    assert upwards == pytest.approx([0.125, 0.125, 0.15, 1 / 9, 1 / 9, 1.25 / 9, 1.25 / 9] + [0.15] * 5)


def test_what_is_surely_beyond_the_target_goes_at_once(tmp_path: Path) -> None:
    ratios = {0: around(6.0, 2.0), 1: around(6.0, 2.0)}
    assert steered(tmp_path, ratios, target_edge_ratio=1.0)[:2] == pytest.approx([0.1 / 4, 0.1 / 4])


def test_warm_up_is_the_schedules(tmp_path: Path) -> None:
    ratios = dict.fromkeys(range(12), 2.0)
    rates = steered(tmp_path, ratios, target_edge_ratio=1.0, warm_up=5, dead_band=0.0)
    assert rates == pytest.approx([0.1] * 5 + [0.05] * 7)


def test_the_rate_has_a_floor(tmp_path: Path) -> None:
    for name, options in (("a", {"target_edge_ratio": 1.0}), ("b", {"max_edge_ratio": 1.0})):
        rates = steered(tmp_path / name, {2: 1e6, 3: 1e6}, min_scale=0.5, **options)
        assert rates == pytest.approx([0.1] * 2 + [0.05] * 10)


def test_limit_and_target_together(tmp_path: Path) -> None:
    """The limit acts on what the controller leaves."""
    ratios = {0: around(3.0, 2.5), 11: around(3.0, 2.5)}
    rates = steered(tmp_path, ratios, max_edge_ratio=1.5, target_edge_ratio=1.0, max_change=1.25)
    assert rates == pytest.approx([0.05] * 12)
    rates = steered(tmp_path / "b", ratios, max_edge_ratio=1.5, target_edge_ratio=1.0, max_change=4.0)
    assert rates == pytest.approx([0.1 / 3] * 12)


@pytest.mark.parametrize(
    "options", [{"max_edge_ratio": 1.0}, {"target_edge_ratio": 1.0}, {"max_edge_ratio": 1.0, "judged_on": "MiniBS"}]
)
def test_what_cannot_be_used_moves_nothing(options: Any, tmp_path: Path) -> None:
    def unmoved(name: str, watcher: Any, **more: Any) -> bool:
        module = Scheduled(rates=(0.1,))
        trained(tmp_path / name, module, rescaler(**options), watcher, max_epochs=2, **more)
        return module.seen == [[0.1]] * 12

    assert unmoved("missing", ToldMonitor({}))
    nan = ToldMonitor(dict.fromkeys(range(12), NOTHING))
    assert unmoved("nan", nan)
    infinite = Estimate(math.inf, math.nan, math.nan, math.inf)
    assert unmoved("infinite", ToldMonitor(dict.fromkeys(range(12), infinite)))
    stale = ToldMonitor({})
    stale.reading = Reading(-3, 4, around(5.0), around(5.0), 5.0, 1000)
    assert unmoved("stale", stale)
    late = ToldMonitor(dict.fromkeys(range(1, 12), 5.0), step=0)  # again and again of the first step
    assert unmoved("late", late)
    other = "directional" if options.get("judged_on") else "mini_batch"
    beyond = ToldMonitor(dict.fromkeys(range(12), 0.1), **{other: around(5.0)})
    assert unmoved("of_the_other", beyond)
    with pytest.warns(UserWarning, match="measurements are of batches of 8 samples and steps have 4"):
        assert unmoved("other_batch_size", ToldMonitor(dict.fromkeys(range(12), 5.0), batch_size=8))


def test_a_measurement_counts_once(tmp_path: Path) -> None:
    """The same number after number of steps would lower the rate each time."""
    rates = steered(tmp_path, {0: around(2.0, 1.5)}, target_edge_ratio=1.0, cool_down=0, max_change=1.25)
    assert rates == pytest.approx([0.08] * 12)


def test_a_measurement_in_mid_accumulation(tmp_path: Path) -> None:
    """Monitors measure at the last batch of a step, for that step."""
    module = Scheduled(rates=(0.1,))

    class Last(Told):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if not trainer.fit_loop._should_accumulate():
                super().on_train_batch_start(trainer, *args)

    kind = type("LastMonitor", (Last,), {"__module__": "lightning_eoss.callbacks.told"})
    ours = (rescaler(max_edge_ratio=1.0), kind({2: 2.0}, batch_size=8))
    trained(tmp_path, module, *ours, LearningRateMonitor(), max_epochs=2, accumulate_grad_batches=2)
    assert module.seen == [[0.1]] * 2 + [[0.05]] * 4


def test_the_measured_threshold_curve_holds_the_rule_back(tmp_path: Path) -> None:
    """Mini-batches hardly sharper than the full batch: four times the batch allows hardly more."""
    ratio = around(0.6)

    def grown(name: str, **told: Any) -> float:
        module = Scheduled(rates=(0.1,))
        watcher = ToldMonitor({11: 0.0}, **{"mini_batch": ratio, "directional": ratio, **told})
        trained(tmp_path / name, module, rescaler(), watcher, GradientAccumulationScheduler({0: 1, 2: 2}), max_epochs=3)
        return module.seen[-1][0]

    u = (1 / 8 - 1 / 1000) / (1 / 4 - 1 / 1000)
    assert grown("known", full_batch=0.4) == pytest.approx(0.1 * 0.6 / (0.4 + 0.2 * math.sqrt(u)))
    assert grown("noise", full_batch=0.01) == pytest.approx(0.1 * 0.6 / (0.01 + 0.59 * math.sqrt(u)))
    assert grown("unknown", full_batch=math.nan) == 0.2
    assert grown("of_another_batch", full_batch=0.4, batch_size=16) == 0.2


def test_full_and_mini_batches_may_be_measured_at_different_steps(tmp_path: Path) -> None:
    """And at different rates."""

    class Turns(Told):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            step, rate = trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]
            mini, full = (NOTHING, 4.0 * rate) if step == 3 else (around(6.0 * rate), math.nan)
            self.reading = Reading(step, 4, mini, NOTHING, full, 10**9)

    kind = type("TurnsMonitor", (Turns,), {"__module__": "lightning_eoss.callbacks.told"})
    module = Scheduled(lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9), rates=(0.1,))
    path = tmp_path / "saved.ckpt"
    accumulation = ByEpoch()
    trained(tmp_path / "a", module, rescaler(), kind({}), accumulation, Save(path, 12), max_epochs=3)
    own = 0.1 * 0.9**14
    assert module.seen[-1][0] == pytest.approx(own * 6 / (4 + 2 * math.sqrt(0.5)), rel=1e-6)
    resumed = Scheduled(module.make, rates=(0.1,))
    trained(tmp_path / "b", resumed, rescaler(), ToldMonitor({}), accumulation, ckpt_path=path, max_epochs=3)
    assert resumed.seen == module.seen[12:]


def test_measurements_wait_for_the_preconditioner(tmp_path: Path) -> None:
    """After one gradient an adaptive optimizer's limits are far too low."""

    class Adaptive(Scheduled):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    class Rates(Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.rates.append(applied_rates(trainer)[0])

    def rates(name: str, **options: Any) -> list[float]:
        note = Rates()
        told = ToldMonitor(dict.fromkeys(range(12), 2.0))
        trained(tmp_path / name, Adaptive(), note, rescaler(max_edge_ratio=1.0, **options), told, max_epochs=2)
        return note.rates

    assert rates("by_default") == pytest.approx([0.1] * 10 + [0.05] * 2)
    assert rates("at_once", warm_up=0) == pytest.approx([0.05] * 12)
    late = steered(tmp_path / "late", {2: 2.0, 5: 2.0}, max_edge_ratio=1.0, warm_up=4)
    assert late == pytest.approx([0.1] * 5 + [0.05] * 7)


def test_the_monitor_is_one_and_that_of_steps(tmp_path: Path) -> None:
    class Newest(Callback):
        latest = "path"

    other = ToldMonitor({2: 4.0}, batch_size=8)
    other.batch_size = 8  # type: ignore[attr-defined]
    assert steered(tmp_path, {3: 2.0}, Newest(), other, max_edge_ratio=1.0) == pytest.approx([0.1] * 3 + [0.05] * 9)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_each_change_is_said_once_and_logged(tmp_path: Path, caplog: Any) -> None:
    module = Scheduled(rates=(0.1,))
    caplog.set_level("INFO")
    told = ToldMonitor({2: around(2.0, 0.1), 3: around(2.0, 0.1)}, full_batch=math.nan)
    ours = (rescaler(max_edge_ratio=1.0), told)
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})
    trained(tmp_path, module, *ours, accumulation, max_epochs=2, log_every_n_steps=5)
    assert said(caplog) == [
        "LearningRateRescaler: step 2, the learning rate goes from 0.1 to 0.05: the directional edge ratio was "
        "2 [1.9, 2.1], with max_edge_ratio=1.0.",
        "LearningRateRescaler: step 6, the learning rate goes from 0.05 to 0.1: a step has 8 samples in place of 4, "
        "linear rule.",
    ]
    found = points(tmp_path)
    assert found["learning_rate/applied"] == {0: 0.1, 2: 0.05, 4: 0.05, 6: 0.1}
    assert found["learning_rate/suggested"] == found["learning_rate/applied"]
    assert found["learning_rate/scale"] == {0: 1.0, 2: 0.5, 4: 0.5, 6: 1.0}


def test_meeting_the_limit_is_said(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    make = lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.4 if t in (0, 1, 5) else 1.0)  # noqa: E731
    trained(tmp_path, Scheduled(make, rates=(0.1,)), rescaler(max_edge_ratio=1.0), ToldMonitor({1: 2.0}), max_epochs=1)
    assert said(caplog) == [
        "LearningRateRescaler: step 2, the learning rate is held at 0.05: max_edge_ratio=1.0 allows 0.05.",
        "LearningRateRescaler: step 5, the learning rate is the schedule's own again: max_edge_ratio=1.0 allows 0.05.",
    ]


# ---- with a real monitor ---------------------------------------------------------------------------------------------


def final_loss(root: Path, rate: float, *callbacks: Any, seed: int) -> float:
    """Of the training set, after ten epochs with momentum 0.5."""
    seeded(seed)
    module, data = Regressor(learning_rate=rate), samples(64)
    fit(root, module, loader(data, shuffle=True, batch_size=8), *callbacks, max_epochs=10)
    with torch.no_grad():
        return float(module.loss(data.tensors))


# Where small batches with momentum 0.5 hold directional sharpness, (1 - 0.5) / (1 + 0.5) of the edge.
HELD: list[dict[str, Any]] = [{"target_edge_ratio": 1 / 3}, {"max_edge_ratio": 1 / 3}]


@pytest.mark.slow
@pytest.mark.parametrize("options", HELD, ids=["target", "limit"])
def test_a_training_that_diverges_trains(options: Any, tmp_path: Path) -> None:
    """However much too high its rate is; the rate that comes out is the same."""
    for seed in range(2):
        losses = []
        for rate in (2.0, 20.0):
            assert math.isnan(final_loss(tmp_path / f"alone{rate}{seed}", rate, seed=seed))
            ours = (LearningRateRescaler(**options), monitor(4, num_batches=8))
            losses.append(final_loss(tmp_path / f"steered{rate}{seed}", rate, *ours, seed=seed))
        assert losses[0] < 0.005  # 0.03 with a rate of 0.05
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", HELD, ids=["target", "limit"])
def test_a_stable_training_loses_nothing(options: Any, tmp_path: Path) -> None:
    """Nothing happens far below the limit, and nothing that matters close to it."""

    def losses(rate: float, seed: int) -> list[float]:
        ours = (LearningRateRescaler(**options), monitor(10, num_batches=8))
        return [
            final_loss(tmp_path / f"{rate}{seed}{len(callbacks)}", rate, *callbacks, seed=seed)
            for callbacks in ((), ours)
        ]

    alone, steered = losses(0.05, 0)
    assert alone == steered
    alone, steered = torch.tensor([losses(0.5, seed) for seed in range(5)]).T
    assert steered.mean() < alone.mean() + alone.std() / 2
