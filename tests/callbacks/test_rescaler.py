"""`LearningRateRescaler`: the rates that steps take, under every schedule and in every kind of training.

Rates are read where they act: by an optimizer that notes them in its step, or by how far weights move along gradients
of one.
"""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from lightning_eoss.callbacks.rescaler import LearningRateRescaler
from lightning_eoss.theory.control import Reading
from lightning_eoss.theory.statistics import Estimate
from lightning_eoss.training.rates import applied_rates
from tests import runs
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

OUR_TAGS = ("learning_rate/applied", "learning_rate/suggested", "learning_rate/scale")


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "OURS", (*runs.OURS, "learning_rate/"))


class Noting(SGD):
    """Notes the rates and the momenta that each step takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rates: list[list[float]] = []
        self.momenta: list[float] = []

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        self.rates.append([float(group["lr"]) for group in self.param_groups])
        self.momenta.append(self.param_groups[0]["momentum"])
        super().step()
        return loss


Make = Callable[[Any], Any]  # optimizer to scheduler


class Scheduled(Regressor):
    """Any scheduler, several groups."""

    def __init__(
        self,
        make: Make | None = None,
        interval: str = "step",
        rates: tuple[float, ...] = (0.1, 1 / 30),
        tensors: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.make, self.interval, self.rates, self.tensors, self.options = make, interval, rates, tensors, options
        self.seen: list[list[float]] = []  # in the steps, over all fits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("fixed", 1.0)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        share = len(parameters) // len(self.rates)
        groups = [
            {
                "params": parameters[index * share : (index + 1) * share],
                "lr": torch.tensor(rate, dtype=torch.float64) if self.tensors else rate,
            }
            for index, rate in enumerate(self.rates)
        ]
        optimizer = Noting(groups, **{"momentum": 0.5, **self.options})
        optimizer.rates = self.seen
        if self.make is None:
            return optimizer
        config = {"scheduler": self.make(optimizer), "interval": self.interval, "monitor": "fixed"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Accumulate(Callback):
    """Two batches a step up to some step, and one from then on: the batch size is halved in mid-epoch."""

    def __init__(self, until: int = 5) -> None:
        self.until = until

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.accumulate_grad_batches = 2 if trainer.global_step < self.until else 1


class ByEpoch(Callback):
    """Lightning's GradientAccumulationScheduler does nothing in an epoch that is resumed."""

    def __init__(self, *windows: int) -> None:
        self.windows = windows or (1, 1, 2)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.accumulate_grad_batches = self.windows[trainer.current_epoch]


class Save(Callback):
    """Saves a checkpoint in some hook after some batches."""

    def __init__(self, path: Path, batches: int, hook: str = "on_train_batch_end") -> None:
        self.path, self.left = path, batches
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def rescaler(**options: Any) -> LearningRateRescaler:
    return LearningRateRescaler(**{"rule": "linear", **options})


SCHEDULERS: dict[str, Make] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 9], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=15, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.95**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, T_max=9)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.3, total_iters=4), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.6, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=6),
}

every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def shown(root: Path) -> dict[int, list[float]]:
    """What LearningRateMonitor wrote: step to rates of the groups."""
    rows = [row for row in cells(root) if any(column.startswith("lr-") for column in row)]
    return {
        int(row["step"]): [float(row[column]) for column in sorted(row) if column.startswith("lr-")] for row in rows
    }


def halved_from(rates: list[list[float]], step: int) -> list[list[float]]:
    return [[rate * (1.0 if index < step else 0.5) for rate in each] for index, each in enumerate(rates)]


def trained(root: Path, module: Scheduled, *callbacks: Any, **options: Any) -> Any:
    """Four epochs of six batches, from the seed; the module's weights too."""
    seeded()
    return fit(root, module, loader(), *callbacks, **{"max_epochs": 4, **options})


def interrupted(name: str, root: Path, habit: Any, batches: int, *ours: Any) -> Any:
    """The rates of a training as a whole, and of what is left of it after a checkpoint."""
    whole, rest, path = Scheduled(SCHEDULERS[name]), Scheduled(SCHEDULERS[name]), root / "saved.ckpt"
    trained(root / "whole", whole, *(make() for make in ours), habit(), Save(path, batches))
    trained(root / "resumed", rest, LearningRateMonitor(), *(make() for make in ours), habit(), ckpt_path=path)
    return whole.seen, rest.seen


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


# ---- who sees which rate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["step", "epoch", None])
@pytest.mark.parametrize("first", [False, True])
def test_learning_rate_monitor_shows_what_is_used(interval: Any, first: bool, tmp_path: Path) -> None:
    """Wherever the user puts it."""
    module, watching, ours = Scheduled(SCHEDULERS["OneCycleLR"]), LearningRateMonitor(interval), rescaler()
    accumulation = GradientAccumulationScheduler({0: 4, 2: 2})
    order = [watching, ours, accumulation] if first else [ours, accumulation, watching]
    trainer = trained(tmp_path, module, *order)
    expected = dict(enumerate(module.seen))
    if interval == "epoch":
        expected = {step: module.seen[step] for step in (0, 2, 4, 7)}
    assert shown(tmp_path) == expected
    assert len(trainer.callbacks) == len(order) and set(trainer.callbacks) == set(order)


def test_the_sharpness_monitor_measures_with_what_is_used(tmp_path: Path) -> None:
    """Wherever the user puts it."""
    for name, order in (("first", (0, 1)), ("last", (1, 0))):
        ours = (monitor(1), rescaler(base_batch_size=8))
        module = Regressor(learning_rate=0.1)
        trainer = fit(tmp_path / name, module, loader(), *(ours[index] for index in order), max_epochs=1)
        threshold = points(tmp_path / name)["sharpness/threshold"]
        assert threshold == {step: pytest.approx(3 / 0.05) for step in range(6)}
        assert trainer.callback_metrics["learning_rate/applied"].item() == pytest.approx(0.05)


def test_modules_see_and_set_the_schedules_own_rates(tmp_path: Path) -> None:
    """In all of their hooks, also relative to what they find."""
    hooks = (
        *("on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward"),
        *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end"),
    )

    class Warming(Scheduled):
        def __init__(self, hook: str) -> None:
            super().__init__()
            setattr(self, hook, self.warm)
            self.found: list[list[float]] = []

        def warm(self, *_: Any) -> None:
            groups = self.trainer.optimizers[0].param_groups
            self.found.append([group["lr"] for group in groups])
            for group in groups:
                group["lr"] *= 1.25

    for hook in hooks:
        plain, scaled = Warming(hook), Warming(hook)
        trained(tmp_path / hook / "alone", plain, Accumulate(), max_epochs=2)
        trained(tmp_path / hook / "scaled", scaled, rescaler(), Accumulate(), max_epochs=2)
        assert scaled.seen == halved_from(plain.seen, 5), hook
        assert scaled.found == plain.found, hook


def test_a_warm_up_by_hand_in_optimizer_step(tmp_path: Path) -> None:
    """Before the step, and after it, as Lightning's documentation has it."""

    class Warming(Scheduled):
        def __init__(self, before: bool) -> None:
            super().__init__()
            self.before = before

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if not self.before:
                optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 10)
            if self.before:
                optimizer.step(closure=optimizer_closure)

    for before in (True, False):
        plain, scaled = Warming(before), Warming(before)
        trained(tmp_path / str(before) / "alone", plain, Accumulate())
        trained(tmp_path / str(before) / "scaled", scaled, rescaler(), Accumulate())
        assert scaled.seen == halved_from(plain.seen, 5)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_callbacks_see_and_set_the_schedules_own_rates(hook: str, tmp_path: Path) -> None:
    class Warming(Callback):
        def __init__(self) -> None:
            setattr(self, hook, self.warm)

        def warm(self, trainer: Any, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= 1.25

    plain, scaled = Scheduled(), Scheduled()
    trained(tmp_path / "alone", plain, Accumulate(), Warming())
    trained(tmp_path / "scaled", scaled, rescaler(), Accumulate(), LearningRateMonitor(), Warming())
    assert scaled.seen == halved_from(plain.seen, 5)
    assert shown(tmp_path / "scaled") == dict(enumerate(scaled.seen))


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_finetuning_adds_groups_at_the_schedules_own_rate(tmp_path: Path) -> None:
    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 3:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, initial_denom_lr=4)

    class Frozen(Scheduled):
        def configure_optimizers(self) -> Any:
            optimizer = Noting([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
            optimizer.rates = self.seen
            return optimizer

    plain, scaled = Frozen(), Frozen()
    trained(tmp_path / "alone", plain, Accumulate(), Finetuning())
    trained(tmp_path / "scaled", scaled, rescaler(), Accumulate(), Finetuning())
    assert plain.seen[-1] == [0.1, 0.025]
    assert scaled.seen == halved_from(plain.seen, 5)


def test_one_function_tells_the_applied_rates_anywhere(tmp_path: Path) -> None:
    class Ask(Scheduled):
        def __init__(self) -> None:
            super().__init__(SCHEDULERS["LambdaLR"])
            self.told: list[list[float]] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.told.append(applied_rates(self.trainer))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert applied_rates(self.trainer) == self.told[-1]
            return super().training_step(batch, batch_idx)

    module = Ask()
    trained(tmp_path, module, rescaler(base_batch_size=12))
    assert module.told == module.seen
    assert module.seen[0] == [0.1 * (4 / 12), 1 / 30 * (4 / 12)]


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
    fit(tmp_path, Scheduled(rates=(0.1,)), loader(), *callbacks, strategy="ddp_spawn", devices=2)
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


# ---- checkpoints -----------------------------------------------------------------------------------------------------

HOOKS = (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start"),
    *("on_validation_end", "on_train_epoch_end", "on_train_end"),
)


def saved(path: Path) -> Any:
    checkpoint = torch.load(path, weights_only=True)
    groups = [
        {key: group[key] for key in group if key != "params"}
        for group in checkpoint["optimizer_states"][0]["param_groups"]
    ]
    return groups, checkpoint["lr_schedulers"]


class Validated(Scheduled):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_checkpoints_hold_the_schedules_own_rates(hook: str, tensors: bool, tmp_path: Path) -> None:
    """Whoever makes them, and when."""
    contents = []
    for name, ours in (("alone", []), ("scaled", [rescaler(base_batch_size=12)])):
        often = 1 if hook in ("on_train_start", "on_train_end") else 2
        save = Save(tmp_path / f"{name}.ckpt", often, hook)
        module = Validated(SCHEDULERS["MultiplicativeLR"], tensors=tensors)
        trained(tmp_path / name, module, *ours, save, accumulate_grad_batches=2, val_dataloaders=loader(), max_epochs=2)
        contents.append(saved(tmp_path / f"{name}.ckpt"))
    assert_same(contents[1], contents[0])


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # LearningRateMonitor does
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_also_where_a_watcher_saves(hook: str, tensors: bool, tmp_path: Path) -> None:
    """While the rates are covered."""

    class Saving(LearningRateMonitor):
        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

    def save(self: Any, trainer: Any, *args: Any) -> None:
        getattr(LearningRateMonitor, hook)(self, trainer, *args)
        self.covered = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        trainer.save_checkpoint(self.path)

    setattr(Saving, hook, save)
    contents = []
    for name, ours in (("alone", []), ("scaled", [rescaler(base_batch_size=12)])):
        watcher = Saving(tmp_path / f"{name}.ckpt")
        module = Scheduled(tensors=tensors)
        trained(tmp_path / name, module, *ours, watcher, max_epochs=2)
        contents.append(saved(tmp_path / f"{name}.ckpt"))
        assert watcher.covered == pytest.approx(module.seen[-1])
    assert_same(contents[1], contents[0])


@pytest.mark.filterwarnings("ignore:.*ckpt_path=:UserWarning")  # Lightning would like to resume from the last one
@pytest.mark.parametrize("where", ["training_step", "optimizer", "watcher"])
def test_errors_leave_the_schedules_own_rates(where: str, tmp_path: Path) -> None:
    class Failing(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if where == "training_step" and self.global_step == 3:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()

            def foreach(*_: Any) -> None:
                if where == "optimizer" and len(self.seen) == 3:
                    raise RuntimeError("on purpose")

            optimizer.register_step_post_hook(foreach)  # before ours
            return optimizer

    class Watcher(LearningRateMonitor):
        def on_train_batch_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            if where == "watcher" and trainer.global_step == 3:
                raise RuntimeError("on purpose")

    module = Failing()
    ours = (rescaler(base_batch_size=8), Watcher(), OnExceptionCheckpoint(tmp_path, "failed"))
    trainer = trainer_of(tmp_path, *ours, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, loader())
    optimizer = trainer.optimizers[0]
    assert module.seen[0] == [0.05, 1 / 60]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1 / 30]
    assert [group["lr"] for group in saved(tmp_path / "failed.ckpt")[0]] == [0.1, 1 / 30]
    assert not optimizer._optimizer_step_pre_hooks and len(optimizer._optimizer_step_post_hooks) == 1
    assert len(trainer.callbacks) == 3


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    module, ours = Scheduled(), rescaler(base_batch_size=8)
    trainer = trained(tmp_path, module, ours, max_epochs=1)
    assert trainer.callbacks == [ours]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 1 / 30]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert applied_rates(trainer) == [0.1, 1 / 30]
    trainer.fit_loop.max_epochs = 2  # once more
    trainer.fit(module, loader())
    assert module.seen == [[0.05, 1 / 60]] * 12
    assert trainer.callbacks == [ours]


def test_a_new_training_has_a_base_of_its_own(tmp_path: Path) -> None:
    ours = rescaler()
    for name, batch_size in (("first", 4), ("second", 8)):
        module = Scheduled(rates=(0.1,))
        fit(tmp_path / name, module, loader(batch_size=batch_size), ours, max_epochs=1)
        assert set(map(tuple, module.seen)) == {(0.1,)}


def test_a_resumed_training_knows_its_base(tmp_path: Path) -> None:
    """The batch size changes while training is down."""
    path, module = tmp_path / "saved.ckpt", Scheduled(rates=(0.1,))
    fit(tmp_path / "a", module, loader(batch_size=4), rescaler(), Save(path, 6), max_epochs=1)
    resumed = Scheduled(rates=(0.1,))
    fit(tmp_path / "b", resumed, loader(batch_size=8), rescaler(), ckpt_path=path, max_epochs=2)
    assert resumed.seen == [[0.2]] * 3
    told = Scheduled(rates=(0.1,))
    fit(tmp_path / "c", told, loader(batch_size=8), rescaler(base_batch_size=16), ckpt_path=path, max_epochs=2)
    assert told.seen == [[0.05]] * 3


# ---- what was measured -----------------------------------------------------------------------------------------------


def around(mean: float, half_width: float = 0.0) -> Estimate:
    return Estimate(mean, half_width / 2, mean - half_width, mean + half_width)


NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan)


class Told(Callback):
    """A monitor that is told what to measure; its ratios are those of the rate 0.1, and go with the rate."""

    def __init__(self, ratios: dict[int, Estimate | float], **others: Any) -> None:
        self.ratios = {step: around(each) if isinstance(each, (int, float)) else each for step, each in ratios.items()}
        self.others = others
        self.latest: Reading | None = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        step = trainer.global_step
        if step in self.ratios:
            share = trainer.optimizers[0].param_groups[0]["lr"] / 0.1
            each = self.ratios[step]
            ratio = Estimate(each.mean * share, 0.0, each.lower * share, each.upper * share)
            made = {"batch_size": 4, "mini_batch": ratio, "directional": ratio, "full_batch": ratio.mean / 2}
            self.latest = Reading(**{"step": step, "num_samples": 1000, **made, **self.others})


# As the package's own monitors, it is known by its name.
ToldMonitor = type("ToldMonitor", (Told,), {"__module__": "lightning_eoss.callbacks.told"})


def steered(root: Path, ratios: dict[int, Any], *callbacks: Any, **options: Any) -> list[float]:
    """The rates of twelve steps, which are also those that are shown."""
    module = Scheduled(rates=(0.1,))
    watcher = ToldMonitor(ratios)
    trained(root, module, *callbacks, LearningRateMonitor(), rescaler(**options), watcher, max_epochs=2)
    assert list(shown(root).values()) == module.seen
    return [rates[0] for rates in module.seen]


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
    stale.latest = Reading(-3, 4, around(5.0), around(5.0), 5.0, 1000)
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
            self.latest = Reading(step, 4, mini, NOTHING, full, 10**9)

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


def test_steering_survives_a_checkpoint(tmp_path: Path) -> None:
    """Cool-down and factors; taken in every step in turn, the rest is the same."""
    ratios = {step: around(1.5, 0.6) if step in (1, 2, 3, 8) else 0.5 for step in range(12)} | {6: 4.0}
    options = {"target_edge_ratio": 1.0, "max_edge_ratio": 1.4, "cool_down": 2, "max_change": 1.25}
    whole = Scheduled(rates=(0.1,))
    trained(tmp_path / "a", whole, rescaler(**options), ToldMonitor(ratios), max_epochs=2)
    assert len({rate for rates in whole.seen for rate in rates}) >= 3
    for step in range(1, 12):
        path = tmp_path / f"{step}.ckpt"
        trained(
            tmp_path / f"{step}a",
            Scheduled(rates=(0.1,)),
            rescaler(**options),
            ToldMonitor(ratios),
            Save(path, step),
            max_epochs=2,
        )
        rest = Scheduled(rates=(0.1,))
        trained(tmp_path / f"{step}b", rest, rescaler(**options), ToldMonitor(ratios), max_epochs=2, ckpt_path=path)
        assert rest.seen == whole.seen[step:]


def test_limits_that_are_no_longer_wanted_are_gone(tmp_path: Path) -> None:
    path, told = tmp_path / "saved.ckpt", ToldMonitor({1: 4.0})
    for name, options in (("limit", {"max_edge_ratio": 1.0}), ("target", {"target_edge_ratio": 1.0})):
        module, resumed = Scheduled(rates=(0.1,)), Scheduled(rates=(0.1,))
        trained(tmp_path / name, module, rescaler(**options), told, Save(path, 4), max_epochs=1)
        assert module.seen[-1] == pytest.approx([0.025])
        trained(tmp_path / f"{name}_resumed", resumed, rescaler(), max_epochs=1, ckpt_path=path)
        assert resumed.seen == [[0.1]] * 2


def test_the_same_callbacks_go_on_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    """As in a notebook, after a training that went wrong."""
    path, ratios, options = tmp_path / "saved.ckpt", {8: 2.0}, {"max_edge_ratio": 1.0}
    ours, told = rescaler(**options), ToldMonitor(ratios)
    trained(tmp_path / "a", Scheduled(rates=(0.1,)), ours, told, Save(path, 3), max_epochs=2)
    again = Scheduled(rates=(0.1,))
    trained(tmp_path / "b", again, ours, ToldMonitor(ratios), ckpt_path=path, max_epochs=2)
    assert again.seen == [[0.1]] * 5 + [[0.05]] * 4


def test_nothing_is_left_of_an_earlier_training_where_a_checkpoint_knows_nothing(tmp_path: Path) -> None:
    ours, path = rescaler(max_edge_ratio=1.0), tmp_path / "saved.ckpt"
    trained(tmp_path / "a", Scheduled(rates=(0.1,)), ours, ToldMonitor({2: 4.0}), max_epochs=1)
    fit(tmp_path / "b", Scheduled(rates=(0.1,)), loader(batch_size=8), Save(path, 2), max_epochs=1)
    module = Scheduled(rates=(0.1,))
    fit(tmp_path / "c", module, loader(batch_size=8), ours, ToldMonitor({}), ckpt_path=path, max_epochs=2)
    assert module.seen == [[0.1]] * 4


def test_a_checkpoint_before_the_first_step_holds_the_base(tmp_path: Path) -> None:
    path, resumed = tmp_path / "saved.ckpt", Scheduled(rates=(0.1,))
    fit(
        tmp_path / "a", Scheduled(rates=(0.1,)), loader(), rescaler(), Save(path, 1), max_epochs=1,
        accumulate_grad_batches=4,
    )  # fmt: skip
    fit(tmp_path / "b", resumed, loader(), rescaler(), ckpt_path=path, max_epochs=1, accumulate_grad_batches=2)
    assert resumed.seen[0] == [0.05]


def test_other_arguments_hold_from_a_resume_on(tmp_path: Path) -> None:
    path, told = tmp_path / "saved.ckpt", {1: 4.0}
    first = rescaler(max_edge_ratio=1.0, rule="linear")
    trained(tmp_path / "a", Scheduled(rates=(0.1,)), first, ToldMonitor(told), Save(path, 3), max_epochs=1)
    for ratio, rate in ((2.0, 0.05), (10.0, 0.1)):
        module = Scheduled(rates=(0.1,))
        trained(tmp_path / f"{ratio}", module, rescaler(max_edge_ratio=ratio), ToldMonitor({}), ckpt_path=path)
        assert module.seen[0] == pytest.approx([rate])
    half = tmp_path / "half.ckpt"
    options = {"base_batch_size": 16}
    fit(
        tmp_path / "b",
        Scheduled(rates=(0.1,)),
        loader(),
        rescaler(rule="linear", **options),
        Save(half, 3),
        max_epochs=1,
    )
    module = Scheduled(rates=(0.1,))
    fit(tmp_path / "c", module, loader(), rescaler(rule="sqrt", **options), ckpt_path=half, max_epochs=1)
    assert module.seen == [[0.05]] * 3


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


def test_it_can_be_pickled_while_training(tmp_path: Path) -> None:
    class Pickle(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            pickle.dumps(ours)

    ours = rescaler()
    trained(tmp_path, Scheduled(rates=(0.1,)), ours, Pickle(), max_epochs=1)


# ---- what it says ----------------------------------------------------------------------------------------------------


def said(caplog: Any) -> list[str]:
    return [line for line in caplog.messages if line.startswith("LearningRateRescaler")]


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


@pytest.mark.parametrize("first", [True, False])
def test_a_dry_run_suggests_what_a_run_does_first(first: bool, tmp_path: Path) -> None:
    """Whatever the order of the callbacks."""
    ours, watcher = rescaler(max_edge_ratio=1.0, dry_run=True), ToldMonitor({2: 2.0, 8: 4.0})
    trained(tmp_path, Scheduled(rates=(0.1,)), *((ours, watcher) if first else (watcher, ours)), max_epochs=2)
    suggested = list(points(tmp_path)["learning_rate/suggested"].values())
    delay = 1 if first else 0
    assert suggested == [0.1] * (2 + delay) + [0.05] * 6 + [0.025] * (4 - delay)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    def refused(match: str, module: LightningModule, *callbacks: Any, **options: Any) -> None:
        trainer = trainer_of(tmp_path, *callbacks, **options)
        with pytest.raises(MisconfigurationException, match=match):
            trainer.fit(module, loader())
        assert len(trainer.callbacks) == len(callbacks)

    class Gan(Scheduled):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [SGD(self.net[0].parameters(), lr=0.1), SGD(self.net[2].parameters(), lr=0.1)]

    class Idle(Regressor):
        def configure_optimizers(self) -> Any:
            return Noting(self.parameters(), lr=0.1)

    refused("automatic_optimization=False: Gan decides itself .* several optimizers", Gan(), rescaler())
    refused("2 callbacks LearningRateRescaler.*Leave one", Regressor(), Told({}), *_two())
    learning = type("SpectralLearningRate", (Callback,), {"dry_run": False})
    refused("and SpectralLearningRate are both in this Trainer", Regressor(), rescaler(), learning())
    for argument in ("max_edge_ratio", "target_edge_ratio"):
        match = rf"LearningRateRescaler\({argument}=1.0\) has nobody to measure .* Add a SharpnessMonitor\(\)"
        refused(match, Regressor(), rescaler(**{argument: 1.0}))
    match = r"rule='auto'\): Noting is no optimizer whose learning rate .* Choose rule='linear'"
    refused(match, Idle(), LearningRateRescaler())


def _two() -> list[Callback]:
    """Lightning itself refuses two that would share a state."""
    twin = type("Twin", (LearningRateRescaler,), {})
    return [LearningRateRescaler(), twin()]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rule": "cubic"}, ValueError, "rule='cubic' is unknown: use 'linear', 'sqrt', or 'auto'"),
        ({"judged_on": "FullBS"}, ValueError, "judged_on='FullBS' is unknown"),
        ({"base_batch_size": 0}, ValueError, "base_batch_size=0 must be positive"),
        ({"base_batch_size": 1.5}, TypeError, "base_batch_size=1.5 must be a whole number"),
        ({"max_edge_ratio": 0.0}, ValueError, "max_edge_ratio=0.0 must be positive"),
        ({"target_edge_ratio": math.nan}, ValueError, "target_edge_ratio=nan must be positive"),
        ({"target_edge_ratio": "1"}, TypeError, "target_edge_ratio='1' must be a number"),
        ({"dead_band": 1.0}, ValueError, "dead_band=1.0 is a relative deviation"),
        ({"max_change": 1.0}, ValueError, "max_change=1.0 is a factor and must be above 1"),
        ({"cool_down": -1}, ValueError, "cool_down=-1 must be a number of steps"),
        ({"warm_up": 0.5}, TypeError, "warm_up=0.5 must be a whole number"),
        ({"min_scale": 0.0}, ValueError, "min_scale=0.0 and max_scale=1.0 must be positive and have 1 between"),
        ({"max_scale": 0.5}, ValueError, "max_scale=0.5 must be positive and have 1 between"),
    ],
)
def test_arguments(options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        LearningRateRescaler(**options)


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
