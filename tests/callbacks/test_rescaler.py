"""`LearningRateRescaler`: the rates that steps take, under every schedule and for every batch size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_eoss.callbacks.rescaler import LearningRateRescaler
from tests.callbacks.schedules import (
    SCHEDULERS,
    Accumulate,
    ByEpoch,
    Scheduled,
    every_scheduler,
    halved_from,
    interrupted,
    rescaler,
    said,
    shown,
    trained,
)
from tests.runs import (
    Regressor,
    assert_same,
    cells,
    fit,
    loader,
    monitor,
    points,
    samples,
    seeded,
    state_of,
    trainer_of,
)

# ---- every schedule keeps its shape ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch':RuntimeWarning")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@every_scheduler
def test_half_the_batch_is_half_the_rest_of_the_schedule(name: str, interval: str, tmp_path: Path) -> None:
    """To the last bit, in the steps and where it is shown, and no scheduler notices."""
    plain, scaled = (Scheduled(SCHEDULERS[name], interval) for _ in range(2))
    alone = trained(tmp_path / "alone", plain, Accumulate())
    trainer = trained(tmp_path / "scaled", scaled, LearningRateMonitor("step"), rescaler(), Accumulate())
    assert len({tuple(each) for each in plain.seen}) > 1  # a schedule
    assert scaled.seen == halved_from(plain.seen, 5)
    assert trainer.optimizers[0].momenta == alone.optimizers[0].momenta
    assert_same(state_of(trainer)["schedulers"], state_of(alone)["schedulers"])
    assert_same(
        [each["param_groups"] for each in state_of(trainer)["optimizers"]],
        [each["param_groups"] for each in state_of(alone)["optimizers"]],
    )
    assert shown(tmp_path / "scaled") == dict(enumerate(scaled.seen))


@pytest.mark.parametrize(
    ("name", "batches"),
    [*((name, 13) for name in SCHEDULERS), *(("LambdaLR", count) for count in (4, 7, 12, 17)), ("SequentialLR", 12)],
)
def test_with_a_resume_in_between(name: str, batches: int, tmp_path: Path) -> None:
    """Batches 7 and on are in the second epoch; step 5 starts at batch 10, after which each batch is a step."""
    whole, plain = interrupted(name, tmp_path / "alone", Accumulate, batches)
    scaled_whole, scaled = interrupted(name, tmp_path / "scaled", Accumulate, batches, rescaler)
    done = len(whole) - len(plain)
    assert 0 < done < len(whole) - 5
    if name != "ReduceLROnPlateau":  # Lightning forgets the step of this one that follows the checkpoint
        assert plain == whole[done:]
    assert scaled_whole == halved_from(whole, 5)
    assert scaled == halved_from(plain, 5 - done)
    assert list(shown(tmp_path / "scaled" / "resumed").values()) == scaled


@every_scheduler
def test_with_a_checkpoint_in_mid_accumulation(name: str, tmp_path: Path) -> None:
    """After the rate was halved, and between two batches of one step."""

    def shrink() -> Callback:
        return ByEpoch(4, 4, 2, 2)

    whole, plain = interrupted(name, tmp_path / "alone", shrink, 15)
    scaled_whole, scaled = interrupted(name, tmp_path / "scaled", shrink, 15, rescaler)
    assert len(whole) == 10 and len(plain) == 5
    assert scaled_whole == halved_from(whole, 4)
    assert scaled == halved_from(plain, -1)


@pytest.mark.parametrize("tensors", [False, True])
def test_weights_move_by_the_scaled_rates(tensors: bool, tmp_path: Path) -> None:
    """The rate as the weights feel it: along a gradient of one."""

    class Falling(Scheduled):
        def __init__(self) -> None:
            super().__init__(SCHEDULERS["LambdaLR"], tensors=tensors, momentum=0.0)
            self.net = nn.ParameterList([nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2)])
            self.moved: list[list[float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(self.net)

        def on_train_batch_end(self, *_: Any) -> None:
            if len(self.moved) < self.global_step:
                self.moved.append([-weight.item() for weight in self.net])
                for weight in self.net:
                    weight.data.zero_()

    plain, scaled = Falling(), Falling()
    alone = trained(tmp_path / "alone", plain, Accumulate())
    trainer = trained(tmp_path / "scaled", scaled, rescaler(), Accumulate())
    assert len(plain.moved) == 24 - 5
    assert scaled.moved == halved_from(plain.moved, 5)
    assert_same(trainer.optimizers[0].state_dict(), alone.optimizers[0].state_dict())


def test_scheduler_free_training_and_a_base(tmp_path: Path) -> None:
    module = Scheduled()
    trained(tmp_path, module, rescaler(base_batch_size=16), LearningRateMonitor())
    assert module.seen == [[0.1 / 4, 1 / 30 / 4]] * 24
    assert list(shown(tmp_path).values()) == module.seen


def test_weight_averaging_finds_and_keeps_its_own_rates(tmp_path: Path) -> None:
    """It reads the rate in a hook of its own, and lets a scheduler start from it."""

    def averaging() -> Callback:
        return StochasticWeightAveraging(swa_lrs=[0.02, 0.03], swa_epoch_start=2, annealing_epochs=2)

    plain, scaled = (Scheduled(SCHEDULERS["StepLR"], "epoch") for _ in range(2))
    trained(tmp_path / "alone", plain, Accumulate(), averaging())
    trained(tmp_path / "scaled", scaled, rescaler(), Accumulate(), averaging())
    assert scaled.seen == halved_from(plain.seen, 5)


# ---- what a step is made of ------------------------------------------------------------------------------------------


def test_accumulation_schedules_and_reloaded_loaders(tmp_path: Path) -> None:
    """From the first batch of the epoch on, and back to exactly where it was."""

    class Growing(Scheduled):
        def train_dataloader(self) -> Any:
            return loader(batch_size=(4, 12, 6, 4)[self.current_epoch])

    module = Growing(rates=(0.1,))
    trainer = trainer_of(
        tmp_path,
        *(rescaler(), GradientAccumulationScheduler({0: 1, 2: 2, 3: 1}), LearningRateMonitor("epoch")),
        max_epochs=4,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module)
    assert module.seen == [[0.1]] * 6 + [[0.1 * 3]] * 2 + [[0.1 * 3]] * 2 + [[0.1]] * 6
    assert [rates for _, rates in sorted(shown(tmp_path).items())] == [[0.1], [0.1 * 3], [0.1 * 3], [0.1]]


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_rules(rule: Any, factor: float, tmp_path: Path) -> None:
    module = Scheduled(rates=(0.1,))
    trained(tmp_path, module, rescaler(rule=rule), GradientAccumulationScheduler({0: 1, 2: 4}), max_epochs=3)
    assert module.seen == [[0.1]] * 12 + [[0.1 * factor]] * 2


def test_the_rule_follows_the_optimizer(tmp_path: Path) -> None:
    for kind, factor in ((SGD, 0.25), (torch.optim.AdamW, 0.5)):

        class Module(Regressor):
            def configure_optimizers(self, kind: Any = kind) -> Any:
                return kind(self.parameters(), lr=0.1)

        ours = LearningRateRescaler(base_batch_size=16)
        trainer = fit(tmp_path / kind.__name__, Module(), loader(), ours, max_epochs=1)
        assert trainer.callback_metrics["learning_rate/applied"].item() == pytest.approx(0.1 * factor)


def test_loaders_that_do_not_tell_their_batch_size(tmp_path: Path) -> None:
    class Batches(torch.utils.data.IterableDataset[Any]):
        def __init__(self, size: int) -> None:
            self.size = size

        def __iter__(self) -> Any:
            return iter(DataLoader(samples(), self.size))

    class Growing(Scheduled):
        def train_dataloader(self) -> Any:
            return DataLoader(Batches((4, 8)[self.current_epoch]), batch_size=None)

    module = Growing(rates=(0.1,))
    trainer = trainer_of(tmp_path, rescaler(), LearningRateMonitor(), reload_dataloaders_every_n_epochs=1)
    trainer.fit(module)
    assert module.seen == [[0.1]] * 6 + [[0.2]] * 3
    assert list(shown(tmp_path).values()) == module.seen


class Write(Callback):
    """Leaves the rates of each process behind."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (self.root / f"{trainer.global_rank}").write_text(str(pl_module.seen))


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
def test_processes_multiply_the_batch(tmp_path: Path) -> None:
    """Two of them, three batches an epoch for each; then two batches a step."""
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})
    callbacks = (rescaler(base_batch_size=4), Write(tmp_path), LearningRateMonitor(), accumulation)
    strategy = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"  # a fork need not import everything again
    fit(tmp_path, Scheduled(rates=(0.1,)), loader(), *callbacks, strategy=strategy, devices=2)
    for rank in range(2):
        assert (tmp_path / f"{rank}").read_text() == str([[0.2]] * 3 + [[0.4]] * 2)


def test_a_step_that_is_skipped_by_its_scaler(tmp_path: Path) -> None:
    """On overflow neither of the optimizer's hooks is called, and the schedule goes on."""

    class Overflowing(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (1e38 if self.trainer.global_step in (6, 8) else 1.0)

    runs = []
    for name, callbacks in (("alone", []), ("scaled", [rescaler(), LearningRateMonitor()])):
        module = Overflowing(SCHEDULERS["MultiplicativeLR"])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trained(tmp_path / name, module, *callbacks, Accumulate(), plugins=[plugin], precision=None)
        assert scaler.get_scale() == 2.0**8
        runs.append(module.seen)
    assert len(runs[0]) == 24 - 5 - 2
    assert runs[1] == halved_from(runs[0], 5)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning")
def test_steps_without_a_loss_and_clipped_gradients(tmp_path: Path) -> None:
    class Skipping(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 4 and self.current_epoch else loss

    plain, scaled = (Skipping(SCHEDULERS["StepLR"]) for _ in range(2))
    trained(tmp_path / "alone", plain, Accumulate(), gradient_clip_val=0.1)
    trained(tmp_path / "scaled", scaled, rescaler(), Accumulate(), gradient_clip_val=0.1)
    assert scaled.seen == halved_from(plain.seen, 5)


def test_lbfgs(tmp_path: Path) -> None:
    """It reads its rate before the training step, and evaluates that several times."""

    class Module(Regressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=self.learning_rate, max_iter=3)

    states = []
    for rate, callbacks in ((0.05, []), (0.1, [rescaler(base_batch_size=8)])):
        seeded()
        trainer = fit(tmp_path / str(rate), Module(learning_rate=rate), loader(), *callbacks, max_epochs=1)
        states.append(dict(trainer.lightning_module.named_parameters()))
    assert_same(states[1], states[0])


def test_another_optimizer_in_mid_training(tmp_path: Path) -> None:
    class Replace(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    module = Scheduled(rates=(0.1,))
    trained(tmp_path, module, rescaler(base_batch_size=8), Replace(), max_epochs=2)
    assert module.seen == [[0.05]] * 12


# ---- dry run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
def test_a_dry_run_is_no_run(watched: bool, tmp_path: Path, caplog: Any) -> None:
    """Bit for bit, and with its suggestions logged."""
    caplog.set_level("INFO")
    others = lambda: [monitor(3)] if watched else []  # noqa: E731
    options: dict[str, Any] = {"max_edge_ratio": 0.01, "target_edge_ratio": 0.01} if watched else {}
    trainers, states = [], []
    for name, ours in (("alone", []), ("dry", [LearningRateRescaler(dry_run=True, **options)])):
        seeded()
        module = Regressor(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 2)))
        callbacks = [*others(), *ours, GradientAccumulationScheduler({0: 1, 1: 2})]
        trainer = fit(tmp_path / name, module, loader(shuffle=True), *callbacks)
        assert trainer.callbacks == callbacks
        trainers.append(trainer)
        states.append(state_of(trainer))
    assert_same(states[1], states[0])
    assert cells(tmp_path / "dry") == cells(tmp_path / "alone")
    found = points(tmp_path / "dry")
    assert set(found["learning_rate/applied"].values()) == {0.05}
    assert found["learning_rate/suggested"][0] == 0.05 or watched
    assert found["learning_rate/suggested"][8] < 0.05 if watched else found["learning_rate/suggested"][8] == 0.1
    lines = said(caplog)
    assert lines and all(" would go from " in line or " would be held at " in line for line in lines)
