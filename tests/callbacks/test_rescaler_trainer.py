"""`LearningRateRescaler` among others: which rate callbacks and modules see, what checkpoints hold, what is refused."""

import math
import pickle
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
)
from torch.optim import SGD

from lightning_eoss.callbacks.rescaler import LearningRateRescaler
from tests.callbacks.schedules import (
    SCHEDULERS,
    Accumulate,
    Noting,
    Save,
    Scheduled,
    Told,
    ToldMonitor,
    around,
    halved_from,
    rescaler,
    shown,
    trained,
)
from tests.runs import Regressor, applied_rates, assert_same, fit, loader, monitor, points, trainer_of

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


@pytest.mark.parametrize("first", [True, False])
def test_a_dry_run_suggests_what_a_run_does_first(first: bool, tmp_path: Path) -> None:
    """Whatever the order of the callbacks."""
    ours, watcher = rescaler(max_edge_ratio=1.0, dry_run=True), ToldMonitor({2: 2.0, 8: 4.0})
    trained(tmp_path, Scheduled(rates=(0.1,)), *((ours, watcher) if first else (watcher, ours)), max_epochs=2)
    suggested = list(points(tmp_path)["learning_rate/suggested"].values())
    delay = 1 if first else 0
    assert suggested == [0.1] * (2 + delay) + [0.05] * 6 + [0.025] * (4 - delay)


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


def test_it_can_be_pickled_while_training(tmp_path: Path) -> None:
    class Pickle(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            pickle.dumps(ours)

    ours = rescaler()
    trained(tmp_path, Scheduled(rates=(0.1,)), ours, Pickle(), max_epochs=1)


# ---- checkpoints of what was measured --------------------------------------------------------------------------------


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
