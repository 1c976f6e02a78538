"""`SpectralLearningRate` in real fits: what it sets against dense Hessians, what it leaves alone, what it refuses."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import Sampler, TensorDataset, WeightedRandomSampler

from lightning_eoss import SharpnessMonitor
from lightning_eoss.callbacks import spectral_learning_rate
from lightning_eoss.callbacks.spectral_learning_rate import SpectralLearningRate
from lightning_eoss.display import tags
from lightning_eoss.theory.scaling import nesterov, polyak
from tests.problems import dense_gradient_and_hessian, squared_error
from tests.runs import Regressor, assert_same, fit, loader, samples, seeded, state_of, trainer_of

ALL = 24  # samples: a batch of all of them is the same whichever is drawn


def callback(**options: Any) -> SpectralLearningRate:
    """Every second epoch, with more steps than there are parameters."""
    return SpectralLearningRate(**{"every_n_epochs": 2, "steps": 60, **options})


def doubles() -> TensorDataset:
    return samples(ALL, dtype=torch.float64)


class Grouped(Regressor):
    """The two layers in groups with options of their own; in float64."""

    def __init__(self, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, **options: Any):
        super().__init__()
        self.options = {"lr": 0.05, "momentum": 0.5, **options}
        self.first, self.second = first or {}, second or {}
        self.double()

    def configure_optimizers(self) -> Any:
        layers = [(self.net[0], self.first), (self.net[2], self.second)]
        return torch.optim.SGD([{"params": list(layer.parameters()), **own} for layer, own in layers], **self.options)


class Keep(Callback):
    """The parameters and the optimizer's groups as the first step of each epoch finds them."""

    def __init__(self) -> None:
        self.nets: list[nn.Module] = []
        self.groups: list[list[dict[str, Any]]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step % max(1, trainer.num_training_batches // trainer.accumulate_grad_batches) == 0:
            self.nets.append(copy.deepcopy(pl_module.net))
            self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


def dense(net: nn.Module, data: TensorDataset) -> Tensor:
    return dense_gradient_and_hessian(net, squared_error, data.tensors)[1]


# ---- what it sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["nesterov", "polyak"])
@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        ({}, {}, {}),
        ({}, {}, {"weight_decay": 0.3}),
        ({"lr": 0.01}, {}, {"weight_decay": 0.1, "momentum": 0.0}),
        ({}, {"lr": 0.02, "weight_decay": 0.5}, {"dampening": 0.5}),
        ({"lr": 0.0}, {}, {"weight_decay": 0.2}),
        ({}, {"lr": 0.0}, {}),  # zeros that are less than half
    ],
)
def test_rates_are_those_of_the_iterations_own_quadratic(
    rule: Any, first: Any, second: Any, options: Any, tmp_path: Path
) -> None:
    """Extremes of |R^1/2 (H + W) R^1/2|, densely; the groups keep the ratios of their rates."""
    seeded()
    keep, learning, module = Keep(), callback(rule=rule, every_n_epochs=1), Grouped(first, second, **options)
    fit(tmp_path, module, loader(doubles(), ALL), learning, keep, max_epochs=2)
    rates = [{"lr": 0.05, **first}["lr"], {"lr": 0.05, **second}["lr"]]
    decays = [{"weight_decay": 0.0, **options, **each}["weight_decay"] for each in (first, second)]
    sizes = [sum(each.numel() for each in module.net[layer].parameters()) for layer in (0, 2)]
    ratios = torch.tensor(np.repeat(rates, sizes) / max(rates))
    for net, groups, written in zip(keep.nets, keep.groups, learning.history, strict=True):
        hessian = dense(net, doubles()) + torch.diag(torch.tensor(np.repeat(decays, sizes)))
        curvature = torch.linalg.eigvalsh(ratios.sqrt()[:, None] * hessian * ratios.sqrt()).abs()
        moving = curvature[curvature > 1e-9]  # a group with a rate of 0 has none
        largest, smallest = float(moving.max()), float(moving.min())
        assert written[tags.LEARNING_RATE_LARGEST] == pytest.approx(largest, rel=1e-6)
        assert written[tags.LEARNING_RATE_SMALLEST] == pytest.approx(smallest, rel=1e-6)
        lr, momentum = (nesterov if rule == "nesterov" else polyak)(largest, smallest, max_momentum=0.99)
        for group, ratio in zip(groups, np.array(rates) / max(rates), strict=True):
            assert group["lr"] == pytest.approx(lr * ratio, rel=1e-6)
            assert group["momentum"] == pytest.approx(momentum, rel=1e-6)
            assert group["nesterov"] is (rule == "nesterov")
            assert group["dampening"] == 0
        assert written[tags.LEARNING_RATE_APPLIED] == written[tags.LEARNING_RATE_SUGGESTED] == groups[0]["lr"]
        assert written[tags.LEARNING_RATE_MOMENTUM] == groups[0]["momentum"]


def test_the_batch_is_that_of_an_optimizer_step(tmp_path: Path) -> None:
    """Six micro-batches make all samples; a random batch of four is less than that."""
    whole, part = callback(), callback()
    for directory, learning, size, count in [("a", whole, 4, 6), ("b", part, 4, 1)]:
        seeded()
        keep = Keep()
        data = loader(doubles(), size)
        fit(tmp_path / directory, Grouped(), data, learning, keep, max_epochs=1, accumulate_grad_batches=count)
        expected = float(torch.linalg.eigvalsh(dense(keep.nets[0], doubles())).abs().max())
        found = learning.history[0][tags.LEARNING_RATE_LARGEST]
        assert learning.latest is not None and learning.latest.batch_size == size * count
        assert (found == pytest.approx(expected, rel=1e-6)) is (count == 6)


def test_it_is_time_in_every_nth_epoch(tmp_path: Path) -> None:
    seeded()
    learning, keep = callback(every_n_epochs=3), Keep()
    fit(tmp_path, Regressor(), loader(), learning, keep, max_epochs=8)
    assert [entry["step"] for entry in learning.history] == [0, 18, 36]
    rates = [groups[0]["lr"] for groups in keep.groups]
    assert [len(set(rates[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(rates)) == 3


def test_limits_are_kept(tmp_path: Path) -> None:
    seeded()
    learning = callback(max_learning_rate=1e-3, max_momentum=0.1)
    trainer = fit(tmp_path, Regressor(), loader(), learning)
    (group,) = trainer.optimizers[0].param_groups
    assert (group["lr"], group["momentum"]) == (1e-3, pytest.approx(0.1))


def test_the_largest_group_is_what_is_limited(tmp_path: Path) -> None:
    seeded()
    trainer = fit(tmp_path, Grouped({"lr": 0.01}), loader(doubles()), callback(max_learning_rate=1e-3))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([2e-4, 1e-3])


def test_rates_of_nothing_become_equal(tmp_path: Path) -> None:
    seeded()
    trainer = fit(tmp_path, Grouped(lr=0.0), loader(doubles()), callback())
    first, second = (group["lr"] for group in trainer.optimizers[0].param_groups)
    assert first == second > 0


def test_a_tensor_stays_the_same_tensor(tmp_path: Path) -> None:
    class Captured(Regressor):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.05)
            return torch.optim.SGD(self.parameters(), lr=self.rate)

    seeded()
    module = Captured()
    trainer = fit(tmp_path, module, loader(), callback())
    assert trainer.optimizers[0].param_groups[0]["lr"] is module.rate
    assert float(module.rate) == pytest.approx(trainer.callback_metrics[tags.LEARNING_RATE_APPLIED])


def test_it_trains_faster_than_the_rate_it_replaces(tmp_path: Path) -> None:
    """Full-batch least squares, the case that the rules are made for."""
    losses = []
    for directory, callbacks in [("alone", []), ("nesterov", [callback(every_n_epochs=5)])]:
        seeded()
        module = Regressor(nn.Linear(4, 2))
        fit(tmp_path / directory, module, loader(batch_size=ALL), *callbacks, max_epochs=30)
        losses.append(float(module.loss(samples().tensors).detach()))
    inputs, targets = samples().tensors
    inputs = torch.cat([inputs, torch.ones(ALL, 1)], 1)
    best = inputs @ torch.linalg.lstsq(inputs, targets).solution
    residual = float((best - targets).square().sum(1).mean() / 2)
    assert losses[1] - residual < 1e-3 * (losses[0] - residual)


def test_the_gauss_newton_matrix_is_another_approximation(tmp_path: Path) -> None:
    seeded()
    keep = Keep()
    learning = callback(operator="ggn", outputs_fn=lambda module, batch: (module.net(batch[0]), _criterion(batch[1])))
    fit(tmp_path, Grouped(), loader(doubles(), ALL), learning, keep, max_epochs=1)
    (jacobian,) = [torch.cat([each.flatten(2) for each in _jacobian(keep.nets[0])], 2)]
    expected = torch.linalg.eigvalsh(torch.einsum("nkp,nkq->pq", jacobian, jacobian) / ALL)
    assert learning.history[0][tags.LEARNING_RATE_LARGEST] == pytest.approx(float(expected[-1]), rel=1e-6)


def _criterion(targets: Tensor) -> Any:
    return lambda outputs: (outputs - targets).square().sum(-1).mean() / 2


def _jacobian(net: nn.Module) -> list[Tensor]:
    names, values = zip(*net.named_parameters(), strict=True)
    return torch.autograd.functional.jacobian(
        lambda *each: torch.func.functional_call(net, dict(zip(names, each, strict=True)), (doubles().tensors[0],)),
        tuple(value.detach() for value in values),
    )


# ---- nothing else is changed -----------------------------------------------------------------------------------------


def noisy() -> Regressor:
    """All that an evaluation could disturb."""
    seeded()
    return Regressor(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)),
        learning_rate=0.01,
    )


def without_ours(state: dict[str, Any]) -> dict[str, Any]:
    metrics = {tag: each for tag, each in state["metrics"].items() if not tag.startswith("learning_rate/")}
    return {**state, "metrics": metrics}


def test_a_dry_run_does_not_change_one_bit(tmp_path: Path) -> None:
    alone = state_of(fit(tmp_path / "alone", noisy(), loader(shuffle=True), max_epochs=5))
    learning = callback(dry_run=True)
    watched = state_of(fit(tmp_path / "dry", noisy(), loader(shuffle=True), learning, max_epochs=5))
    assert_same(without_ours(watched), without_ours(alone))
    assert [entry["step"] for entry in learning.history] == [0, 12, 24]
    for entry in learning.history:
        assert entry[tags.LEARNING_RATE_APPLIED] == 0.01
        assert entry[tags.LEARNING_RATE_SUGGESTED] == pytest.approx(1 / entry[tags.LEARNING_RATE_LARGEST])


@pytest.mark.parametrize("rule", ["nesterov", "polyak"])
def test_nothing_but_the_rates_is_changed(rule: Any, tmp_path: Path) -> None:
    """The same run as one in which they are set by hand."""
    learning = callback(rule=rule, max_learning_rate=0.1)
    learned = state_of(fit(tmp_path / "learned", noisy(), loader(shuffle=True), learning, max_epochs=5))

    class ByHand(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for entry in learning.history:
                if entry["step"] == trainer.global_step:
                    lr, momentum = entry[tags.LEARNING_RATE_APPLIED], entry[tags.LEARNING_RATE_MOMENTUM]
                    for group in trainer.optimizers[0].param_groups:
                        group.update(lr=lr, momentum=momentum, nesterov=rule == "nesterov", dampening=0)

    by_hand = state_of(fit(tmp_path / "hand", noisy(), loader(shuffle=True), ByHand(), max_epochs=5))
    assert_same(without_ours(learned), without_ours(by_hand))
    assert len(learning.history) == 3


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """From the ends of epochs, from the midst of them, from just before it is time, and just after.

    The batches of an epoch are the same: in the midst of one, Lightning would begin again with the first. No dropout:
    Lightning keeps no generators in checkpoints.
    """
    data = TensorDataset(*(each[:4].repeat(6, 1) for each in samples().tensors))

    def run(name: str, *callbacks: Any, **options: Any) -> tuple[dict[str, Any], SpectralLearningRate]:
        seeded()
        module = Regressor(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)))
        learning = callback(max_learning_rate=0.1)
        trainer = fit(tmp_path / name, module, loader(data), learning, *callbacks, max_epochs=5, **options)
        return state_of(trainer), learning

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    expected, whole = run("whole", Save())
    assert [entry["step"] for entry in whole.history] == [0, 12, 24]
    for step in (1, 9, 11, 12, 13, 18, 29):
        found, later = run(f"from {step}", ckpt_path=tmp_path / f"{step}.ckpt")
        for name in ("parameters", "buffers", "optimizers", "steps"):
            assert_same(found[name], expected[name], f"{name} from {step}")
        assert later.history == whole.history


def test_what_has_been_set_is_not_set_again(tmp_path: Path) -> None:
    """A checkpoint between the change and the step that it was made for."""

    class Save(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "12.ckpt")

    seeded()
    fit(tmp_path / "first", Regressor(), loader(), callback(), Save(), max_epochs=3)
    later = callback()
    trainer = fit(tmp_path / "second", Regressor(), loader(), later, ckpt_path=tmp_path / "12.ckpt", max_epochs=4)
    assert [entry["step"] for entry in later.history] == [0, 12] and later.latest is None
    assert rates_of(trainer)[0] == later.history[1][tags.LEARNING_RATE_APPLIED]


def test_each_fit_begins_anew(tmp_path: Path) -> None:
    learning = callback()
    for directory in ("a", "b"):
        seeded()
        fit(tmp_path / directory, Regressor(), loader(), learning, max_epochs=1)
    first, second = learning.history
    assert first == second


# ---- where nothing is to be learned ----------------------------------------------------------------------------------


def rates_of(trainer: Any) -> tuple[Any, ...]:
    (group,) = trainer.optimizers[0].param_groups
    return tuple(group[name] for name in ("lr", "momentum", "nesterov", "dampening"))


def test_a_loss_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    class Broken(Regressor):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (math.nan if self.trainer.current_epoch in (0, 4) else 1.0)

    seeded()
    learning = callback()
    with pytest.warns(
        UserWarning, match="the loss is not finite and has no spectrum, so learning rate and momentum stay"
    ):
        trainer = fit(tmp_path / "a", Broken(), loader(), learning, max_epochs=1)
    assert rates_of(trainer) == (0.05, 0.5, False, 0)
    assert learning.history == [] and tags.LEARNING_RATE_APPLIED not in trainer.callback_metrics


def test_a_spectrum_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    """Later, when the loss is known already; said once."""

    class Breaking(Regressor):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (math.nan if self.trainer.current_epoch > 0 else 1.0)

    seeded()
    learning = callback()
    with pytest.warns(UserWarning, match="Ritz values are not finite") as warned:
        trainer = fit(tmp_path, Breaking(), loader(), learning, max_epochs=7)
    assert len([each for each in warned if "Ritz values" in str(each.message)]) == 1
    assert [entry["step"] for entry in learning.history] == [0]
    assert rates_of(trainer)[0] == learning.history[0][tags.LEARNING_RATE_APPLIED]


def test_a_single_curvature_moves_nothing(tmp_path: Path) -> None:
    """One parameter: its curvature holds all of the mass, and is the bulk."""
    seeded()
    data = TensorDataset(torch.randn(8, 1), torch.randn(8, 1))
    with pytest.warns(UserWarning, match="fewer than two are neither zero nor the bulk"):
        trainer = fit(tmp_path, Regressor(nn.Linear(1, 1, bias=False)), loader(data), callback())
    assert rates_of(trainer) == (0.05, 0.5, False, 0)


def test_a_measurement_that_fails_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    density, calls = spectral_learning_rate.spectral_density, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return density(*arguments, **options) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(spectral_learning_rate, "spectral_density", failing)
    seeded()
    learning = callback()
    with pytest.warns(UserWarning, match="a measurement failed and is left out.*ZeroDivisionError"):
        trainer = fit(tmp_path, Regressor(), loader(), learning, max_epochs=3)
    assert len(calls) == 2
    assert rates_of(trainer)[0] == learning.history[0][tags.LEARNING_RATE_APPLIED]


def test_a_first_measurement_that_fails_ends_training(tmp_path: Path) -> None:
    learning = callback(loss_fn=lambda module, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Regressor(), loader(), learning)


# ---- beside other callbacks ------------------------------------------------------------------------------------------


class Rates(LearningRateMonitor):
    """Keeps what it logs."""

    def __init__(self) -> None:
        super().__init__(logging_interval="step", log_momentum=True)
        self.seen: list[dict[str, float]] = []

    def _extract_stats(self, trainer: Any, interval: str) -> dict[str, float]:
        self.seen.append(super()._extract_stats(trainer, interval))
        return self.seen[-1]


def test_others_see_the_rate_of_the_step_that_comes(tmp_path: Path) -> None:
    """Wherever they stand in the list: LearningRateMonitor, and the threshold of SharpnessMonitor."""
    seeded()
    rates, monitor, keep, learning = (
        Rates(),
        SharpnessMonitor(every_n_train_steps=6, num_batches=4),
        Keep(),
        callback(every_n_epochs=1),
    )
    callbacks = [rates, monitor, keep, learning]
    trainer = fit(tmp_path, Regressor(), loader(), *callbacks, max_epochs=3)
    assert trainer.callbacks[0] is learning and [each for each in trainer.callbacks if each in callbacks[:3]]
    taken = [groups[0] for groups in keep.groups]
    shown = rates.seen[::6]
    assert [each["lr-SGD"] for each in shown] == [group["lr"] for group in taken]
    assert [each["lr-SGD-momentum"] for each in shown] == [group["momentum"] for group in taken]
    for entry, group in zip(monitor.history, taken, strict=True):
        limit = 2 * (1 + group["momentum"]) / (group["lr"] * (1 + 2 * group["momentum"]))
        assert entry[tags.THRESHOLD] == pytest.approx(limit)


def test_weights_are_averaged_by_lightnings_own_callback(tmp_path: Path) -> None:
    """The end of section 10.2: the run is the same, and what is left is the mean of the last epochs."""
    after: list[Tensor] = []

    class AverageLast(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None and epoch_idx >= 3

    class Watching(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            after.append(nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())

    seeded()
    alone, beside = callback(), callback()
    module = Regressor().double()
    fit(tmp_path / "beside", module, loader(doubles()), beside, AverageLast(), Watching(), max_epochs=5)
    averaged = nn.utils.parameters_to_vector(module.parameters()).detach()
    torch.testing.assert_close(averaged, (after[3] + after[4]) / 2)
    seeded()
    fit(tmp_path / "alone", Regressor().double(), loader(doubles()), alone, max_epochs=5)
    assert alone.history == beside.history and len(alone.history) == 3


def test_exponential_averages_do_not_disturb_it_either(tmp_path: Path) -> None:
    class Validated(Regressor):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    seeded()
    learning = callback()
    fit(tmp_path, Validated(), loader(), learning, EMAWeightAveraging(), val_dataloaders=loader(), max_epochs=3)
    assert len(learning.history) == 2


# ---- what is refused -------------------------------------------------------------------------------------------------


class With(Regressor):
    """A module with these optimizers."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class OwnStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def scheduled(parameters: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.AdamW, "does not work with AdamW: .*Use torch.optim.SGD"),
        (lambda p: OwnStep(p, lr=0.1), "does not work with OwnStep"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "does not work with maximize=True: .*negative loss"),
        (scheduled, r"does not work beside StepLR: .*Return the optimizer alone .*dry_run=True"),
    ],
)
def test_other_steps_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"SpectralLearningRate {message}"):
        fit(tmp_path, With(make), loader(), callback())


def test_a_dry_run_may_stand_beside_a_scheduler(tmp_path: Path) -> None:
    learning = callback(dry_run=True)
    trainer = fit(tmp_path, With(scheduled), loader(), learning, StochasticWeightAveraging(0.05, 1), max_epochs=3)
    assert len(learning.history) == 2 and trainer.lr_scheduler_configs


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    with pytest.raises(MisconfigurationException, match="works with one optimizer, and this Trainer has 2"):
        fit(tmp_path, Two(), loader(), callback(loss_fn=lambda module, batch: module.loss(batch)))


def test_a_module_that_steps_by_itself_is_refused(tmp_path: Path) -> None:
    module = Regressor()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="cannot evaluate a module with automatic_optimization=False"):
        fit(tmp_path, module, loader(), callback())


def test_averaging_with_a_scheduler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"beside StochasticWeightAveraging.*callbacks\.WeightAveraging"
    ):
        fit(tmp_path, Regressor(), loader(), callback(), StochasticWeightAveraging(0.05))


def test_a_scheduler_that_comes_up_later_is_not_fought(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizers[0], 1.0)
            trainer.lr_scheduler_configs.append(LRSchedulerConfig(scheduler))

    seeded()
    learning = callback(every_n_epochs=1)
    with pytest.warns(UserWarning, match="a scheduler has come up during training"):
        fit(tmp_path, Regressor(), loader(), learning, Late(), max_epochs=2)
    assert len(learning.history) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adam"}, "rule='adam' is unknown: use 'nesterov', or 'polyak'"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be at least 1"),
        ({"steps": 1}, "steps=1 must be at least 2"),
        ({"max_momentum": 1.0}, "max_momentum=1.0 is not from 0 to below 1"),
        ({"max_momentum": math.nan}, "max_momentum=nan"),
        ({"max_learning_rate": 0.0}, "max_learning_rate=0.0 must be positive"),
        ({"max_learning_rate": math.nan}, "max_learning_rate=nan must be positive"),
        ({"seed": -1}, "seed=-1"),
        ({"operator": "fisher"}, "operator='fisher'"),
    ],
)
def test_arguments_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralLearningRate(**options)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_batches_are_drawn_as_training_draws_them(tmp_path: Path) -> None:
    """A sampler that draws none but the first sample: all curvature is that of this one."""
    seeded()
    sampler, keep, learning = WeightedRandomSampler([1.0] + [0.0] * (ALL - 1), ALL), Keep(), callback()
    fit(tmp_path, Grouped(), loader(doubles(), 6, sampler=sampler), learning, keep, max_epochs=1)
    first = TensorDataset(*(each[:1] for each in doubles().tensors))
    expected = float(torch.linalg.eigvalsh(dense(keep.nets[0], first)).abs().max())
    assert learning.history[0][tags.LEARNING_RATE_LARGEST] == pytest.approx(expected, rel=1e-6)


def test_a_seed_fixes_all_random_numbers(tmp_path: Path) -> None:
    """Also those of a sampler that draws from a global generator; another vector and batch each time."""

    class Loose(Sampler[int]):
        def __iter__(self) -> Any:
            return iter(np.random.permutation(ALL)[:12].tolist())

        def __len__(self) -> int:
            return 12

    seeded()
    module, seen = Grouped(lr=0.0), []
    for number in range(3):
        seeded(number)
        learning = callback(dry_run=True, steps=4, every_n_epochs=1, seed=number // 2)
        fit(tmp_path / str(number), module, loader(doubles(), 6, sampler=Loose()), learning)
        seen.append([entry[tags.LEARNING_RATE_LARGEST] for entry in learning.history])
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][0] != seen[0][1]


def test_the_vector_is_a_new_one_each_time(tmp_path: Path) -> None:
    seeded()
    learning = callback(dry_run=True, steps=3, every_n_epochs=1)
    fit(tmp_path, Grouped(lr=0.0), loader(doubles(), ALL), learning)
    first, second = (entry[tags.LEARNING_RATE_LARGEST] for entry in learning.history)
    assert first != second


def test_data_and_loss_of_its_own(tmp_path: Path) -> None:
    """A list of one batch, and twice the loss: twice the curvature, half the rate."""
    seeded()
    keep = Keep()
    learning = callback(
        dataloader=[doubles().tensors], loss_fn=lambda module, batch: 2 * squared_error(module.net, batch)
    )
    fit(tmp_path, Grouped(), loader(doubles(), 4), learning, keep, max_epochs=1)
    expected = 2 * float(torch.linalg.eigvalsh(dense(keep.nets[0], doubles())).abs().max())
    assert learning.history[0][tags.LEARNING_RATE_LARGEST] == pytest.approx(expected, rel=1e-6)


def test_each_change_is_said_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seeded()
    with caplog.at_level("INFO"):
        fit(tmp_path, Regressor(), loader(), callback(max_learning_rate=0.125), max_epochs=3)
    lines = [each.getMessage() for each in caplog.records if "SpectralLearningRate: " in each.getMessage()]
    assert len(lines) == 2
    assert "epoch 0: lr 0.05, momentum 0.5 become lr 0.125, momentum" in lines[0]
    assert "epoch 2: lr 0.125, momentum" in lines[1] and "curvature of a batch of 4 from" in lines[1]


def test_a_trainer_is_left_in_order(tmp_path: Path) -> None:
    """First of all callbacks, and there once, after a second fit too."""
    learning, keep = callback(), Keep()
    trainer = trainer_of(tmp_path, keep, learning, max_epochs=1)
    for _ in range(2):
        seeded()
        trainer.fit(Regressor(), loader())
        assert trainer.callbacks[0] is learning and trainer.callbacks.count(learning) == 1
