"""`GradientNoiseInjector`: the gradients that optimizers get, and that nothing else of training changes."""

import math
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_eoss.callbacks.injector import GradientNoiseInjector
from lightning_eoss.theory.gradient_noise import Noise
from lightning_eoss.training import watch
from tests.oracles import injected_covariance as exact
from tests.runs import Regressor, assert_same, cells, fit, loader, monitor, samples, seeded, state_of, trainer_of

NOISES = get_args(Noise)
DATA = samples(12, dtype=torch.float64)


def linear(learning_rate: float = 0.05) -> Regressor:
    """Eight parameters; in float64, so that only the noise is left to judge."""
    seeded()
    return Regressor(nn.Linear(4, 2, bias=False), learning_rate).double()


def network(**options: Any) -> Regressor:
    seeded()
    return Regressor(**options).double()


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters()]).clone()  # type: ignore[union-attr]


def sample_gradients(module: Regressor, data: Any = DATA) -> Tensor:
    """(n, P) one by one."""
    rows = []
    for sample in data:
        loss = module.loss([each[None] for each in sample])
        rows.append(torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(rows)


class Recorder(Callback):
    """Notes what the optimizer gets, before it is clipped; stands behind the injector."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.expected: list[Tensor] = []  # the mean over all samples

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(flat_gradient(pl_module))
        self.expected.append(sample_gradients(pl_module).mean(0))


def recorded(root: Path, module: Any, injector: GradientNoiseInjector, data: Any = None, **options: Any) -> Recorder:
    recorder = Recorder()
    fit(root, module, loader(DATA) if data is None else data, injector, recorder, **options)
    return recorder


# ---- what the optimizer gets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
def test_the_noise_has_the_covariance_of_a_batch_at_the_weights(noise: Noise, tmp_path: Path) -> None:
    """At a learning rate of 0 all steps see the same weights. Whitened, the noise of 48 steps is chi-squared."""
    module = linear(0.0)
    rows = sample_gradients(module)
    injector = GradientNoiseInjector(noise=noise, batch_size=3)
    found = recorded(tmp_path, module, injector, max_epochs=16, logger=False).gradients
    noise_seen = (torch.stack(found) - rows.mean(0)).numpy()
    assert noise_seen.shape == (48, 8)

    def squares(covariance: Any) -> float:
        """Mean over steps and directions of what is 1 in its own units."""
        return float((noise_seen @ np.linalg.inv(covariance) * noise_seen).mean())

    def surprise(covariance: Any) -> float:
        """Minus twice the logarithm of a Gaussian density, a number of the data."""
        return squares(covariance) + float(np.linalg.slogdet(covariance)[1]) / 8

    assert abs(squares(exact(noise, 3, rows)) - 1) <= 4 * math.sqrt(2 / noise_seen.size)
    others = [exact(other, 3, rows) for other in NOISES if other != noise]
    others += [exact(noise, size, rows) for size in (2, 4)]
    assert all(surprise(other) > surprise(exact(noise, 3, rows)) for other in others)


@pytest.mark.parametrize("options", [{"noise": "none"}, *({"noise": each, "batch_size": 12} for each in NOISES)])
def test_without_noise_it_is_the_full_gradient(options: Any, tmp_path: Path) -> None:
    recorder = recorded(tmp_path, network(), GradientNoiseInjector(**options), loader(DATA, 5))
    assert len(recorder.gradients) == 6
    for found, expected in zip(recorder.gradients, recorder.expected, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_without_noise_training_is_gradient_descent_to_the_bit(tmp_path: Path) -> None:
    states = []
    for number, callbacks in enumerate([(), (GradientNoiseInjector(noise="none"),)]):
        states.append(state_of(fit(tmp_path / str(number), network(), loader(DATA, 12), *callbacks, max_epochs=5)))
    assert_same(*states)


def test_batches_of_any_size_descend_alike_without_noise(tmp_path: Path) -> None:
    """Two epochs of three batches are six epochs of one; steps of unequal batches are weighted by their samples."""
    whole = fit(tmp_path / "whole", network(), loader(DATA, 12), max_epochs=6).lightning_module
    cut = fit(tmp_path / "cut", network(), loader(DATA, 5), GradientNoiseInjector(noise="none")).lightning_module
    for expected, found in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_the_default_imitates_the_step_of_training(tmp_path: Path) -> None:
    """Four samples of each of two batches."""

    def gradients(batch_size: int | None, name: str) -> list[Tensor]:
        injector = GradientNoiseInjector(batch_size=batch_size)
        return recorded(tmp_path / name, linear(), injector, accumulate_grad_batches=2).gradients

    expected = gradients(8, "named")
    assert_same(gradients(None, "default"), expected)
    assert not torch.equal(gradients(4, "other")[0], expected[0])


def test_a_step_of_accumulated_batches_is_replaced_once(tmp_path: Path) -> None:
    """And is not divided by their number."""
    recorder = recorded(tmp_path, network(), GradientNoiseInjector(noise="none"), accumulate_grad_batches=3)
    assert len(recorder.gradients) == 2
    assert_same([each.shape for each in recorder.gradients], [each.shape for each in recorder.expected])
    for found, expected in zip(recorder.gradients, recorder.expected, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_clipping_comes_after(tmp_path: Path) -> None:
    module, clip = linear(learning_rate=1.0), 1e-3
    before = [parameter.detach().clone() for parameter in module.parameters()]
    recorder = recorded(
        tmp_path, module, GradientNoiseInjector(batch_size=1), max_steps=1, max_epochs=None, gradient_clip_val=clip
    )
    moved = torch.cat([(old - new).reshape(-1) for old, new in zip(before, module.parameters(), strict=True)])
    (gradient,) = recorder.gradients
    assert gradient.norm() > 10 * clip
    assert torch.allclose(moved, gradient * clip / gradient.norm(), rtol=1e-4)


def test_a_subset_stays_the_same_and_stands_for_all(tmp_path: Path) -> None:
    """Its members are found from gradients: the mean of some five samples, at each step of the same ones."""
    module = linear(0.0)
    rows, found = sample_gradients(module), []
    for noise in ("none", "full"):
        injector = GradientNoiseInjector(noise=noise, batch_size=5, full_batch_samples=5, seed=3)
        found += recorded(tmp_path / noise, module, injector, max_epochs=1).gradients
    for each in found[1:]:
        assert torch.allclose(each, found[0], rtol=1e-12)
    shares = torch.from_numpy(np.linalg.lstsq(rows.T.numpy(), found[0].numpy(), rcond=None)[0])
    assert not torch.allclose(found[0], rows.mean(0))
    assert torch.allclose(shares @ rows, found[0])
    members = {
        frozenset(each)
        for each in torch.combinations(torch.arange(12), 5).tolist()
        if torch.allclose(rows[each].mean(0), found[0], rtol=1e-9)
    }
    assert len(members) == 1


@pytest.mark.parametrize("noise", ["full", "none"])
def test_other_data_and_another_loss_take_training_s_place(noise: Any, tmp_path: Path) -> None:
    module = linear(0.0)
    batches = list(loader(Subset(DATA, range(7)), 3))  # of 3, 3 and 1
    injector = GradientNoiseInjector(
        noise=noise, batch_size=7, loss_fn=lambda module, batch: 2 * module.loss(batch), dataloader=batches
    )
    expected = 2 * sample_gradients(module)[:7].mean(0)
    for found in recorded(tmp_path, module, injector).gradients:
        assert torch.allclose(found, expected, rtol=1e-12)


class Lazy(Regressor):
    """One of its layers is used by no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_what_no_sample_uses_has_no_gradient(tmp_path: Path) -> None:
    module = Lazy()
    fit(tmp_path, module, loader(), GradientNoiseInjector())
    assert [parameter.grad for parameter in module.unused.parameters()] == [None, None]
    assert all(parameter.grad is not None for parameter in module.net.parameters())


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_the_seed_and_the_step_decide(tmp_path: Path) -> None:
    def gradients(seed: int, name: str) -> list[Tensor]:
        return recorded(tmp_path / name, linear(0.0), GradientNoiseInjector(batch_size=2, seed=seed)).gradients

    first = gradients(0, "first")
    assert_same(gradients(0, "again"), first)
    assert not torch.equal(gradients(1, "other")[0], first[0])
    assert len({tuple(each.tolist()) for each in first}) == 6  # each step draws anew


def test_training_goes_on_from_a_checkpoint_with_the_same_steps(tmp_path: Path) -> None:
    """One from the midst of an epoch, of which nothing but the noise is random."""
    path = tmp_path / "half.ckpt"

    class Saver(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(path)

    def run(name: str, *callbacks: Any, **options: Any) -> list[Tensor]:
        trainer = fit(
            tmp_path / name, network(), loader(DATA), GradientNoiseInjector(batch_size=2), *callbacks, **options
        )
        return [each.detach() for each in trainer.lightning_module.parameters()]

    whole = run("whole", Saver(), max_epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning's, about checkpoints within an epoch
        assert_same(run("rest", max_epochs=4, ckpt_path=path), whole)
    assert not torch.equal(run("short", max_epochs=2)[0], whole[0])


def test_an_optimizer_that_asks_again_gets_the_same_noise(tmp_path: Path) -> None:
    """As LBFGS does within one step."""

    class Twice(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before = flat_gradient(pl_module)
            injector.on_before_optimizer_step(trainer, pl_module, optimizer)
            assert torch.equal(flat_gradient(pl_module), before)

    injector = GradientNoiseInjector()
    assert fit(tmp_path, linear(), loader(DATA), injector, Twice()).global_step == 6


# ---- what stays as it is ---------------------------------------------------------------------------------------------


class Habits(Regressor):
    """Draws random numbers, keeps statistics, logs; and sees what `training_step` is told."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), 0.0)
        self.told: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.told.append(batch_idx)
        self.log("drawn", torch.rand(()))
        return super().training_step(batch, batch_idx)


def test_only_the_gradient_is_replaced(tmp_path: Path) -> None:
    """At a learning rate of 0 all else must be what it is without the callback."""
    states = []
    for name, callbacks in (("plain", ()), ("injected", (GradientNoiseInjector(noise="none"),))):
        seeded()
        module = Habits()
        state = state_of(fit(tmp_path / name, module, loader(shuffle=True), *callbacks))
        gradients, optimizers = state.pop("gradients"), state.pop("optimizers")  # the latter hold momentum
        states.append({**state, "told": module.told})
        assert len(optimizers) == 1
        assert all(each is not None for each in gradients)
    assert_same(states[1], states[0])
    assert cells(tmp_path / "injected") == cells(tmp_path / "plain")


def test_it_says_once_that_training_changes(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, linear(), loader(DATA), GradientNoiseInjector(noise="diagonal", batch_size=3))
    said = [each.getMessage() for each in caplog.records if "GradientNoiseInjector" in each.getMessage()]
    assert said == [
        "GradientNoiseInjector: this changes training: each step goes by the gradient of 12 samples, with diagonal "
        "noise as of 3."
    ]


class Summed(Regressor):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * len(batch[0])


@pytest.mark.parametrize("summed", [False, True])
def test_samples_without_a_gradient_of_their_own_are_noticed(summed: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(tmp_path, Summed() if summed else Regressor(), loader(), GradientNoiseInjector())
    assert any("do not average to that of their batch" in str(each.message) for each in found) == summed


def test_layers_that_need_a_batch_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """One sample has no batch statistics."""
    with pytest.raises(MisconfigurationException, match=r"a batch of one has no loss here .*noise='none'"):
        fit(tmp_path, Habits(), loader(), GradientNoiseInjector())


@pytest.mark.parametrize("noise", ["full", "none"])
def test_dropout_is_drawn_anew_at_each_step(noise: Any, tmp_path: Path) -> None:
    module = network(net=nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)), learning_rate=0.0)
    first, *others = recorded(tmp_path, module, GradientNoiseInjector(noise=noise, batch_size=12)).gradients
    assert all(not torch.allclose(first, other) for other in others)


def test_a_failure_ends_training(tmp_path: Path) -> None:
    """A step on another gradient would go unnoticed."""

    def loss_fn(module: Any, batch: Any) -> Tensor:
        if module.global_step == 3:
            raise RuntimeError("out of luck")
        return module.loss(batch)

    injector = GradientNoiseInjector(noise="none", loss_fn=loss_fn)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, linear(), loader(DATA), injector)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise": "white"}, ValueError, "noise='white' is unknown: choose one of full, diagonal"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be positive"),
        ({"batch_size": 1.5}, TypeError, "batch_size=1.5 must be a whole number"),
        ({"full_batch_samples": 0}, ValueError, "full_batch_samples=0 must be positive"),
        ({"seed": -1}, ValueError, "seed=-1 must not be negative"),
        ({"loss_fn": lambda: 0}, TypeError, "loss_fn=.* must take"),
        ({"dataloader": 3}, TypeError, "dataloader= must be"),
    ],
)
def test_arguments_out_of_range_are_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        GradientNoiseInjector(**options)


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=13 is not between 1 and the number of samples, 12"):
        fit(tmp_path, linear(), loader(DATA), GradientNoiseInjector(batch_size=13))


class Manual(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    injector = GradientNoiseInjector(loss_fn=lambda module, batch: module.loss(batch))
    with pytest.raises(MisconfigurationException, match="works with one optimizer, and this Trainer has 2"):
        fit(tmp_path, Manual(), loader(), injector)


def test_manual_optimization_needs_a_loss(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False"):
        fit(tmp_path, Manual(), loader(), GradientNoiseInjector())


def test_an_optimizer_that_unscales_by_itself_is_refused(tmp_path: Path) -> None:
    class Fused(Regressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), fused=True)

    trainer = trainer_of(tmp_path, GradientNoiseInjector())
    trainer.precision_plugin.scaler = object()
    with pytest.raises(MisconfigurationException, match="does not support fused=True"):
        trainer.fit(Fused(), loader())


def test_ready_batches_whose_samples_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    class Named(Regressor):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch["pair"] if isinstance(batch, dict) else batch)

    ready = [{"pair": [each[i : i + 4] for each in DATA.tensors], "name": "a"} for i in (0, 4, 8)]
    seeded()
    with pytest.raises(MisconfigurationException, match="those of a ready batch cannot be told apart"):
        fit(tmp_path, Named().double(), loader(DATA), GradientNoiseInjector(dataloader=ready), max_epochs=1)


def test_no_batch_is_kept_from_step_to_step(tmp_path: Path) -> None:
    trainer = fit(tmp_path, linear(), loader(DATA), GradientNoiseInjector(), monitor(1), max_epochs=1)
    assert trainer not in watch._SHARED
