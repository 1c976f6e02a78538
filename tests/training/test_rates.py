"""The overlay by itself: on and off without a trace, whatever the optimizer's rates are made of."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler

from lightning_eoss import SharpnessMonitor
from lightning_eoss.theory.scaling import largest_rate
from lightning_eoss.training.rates import (
    Overlay,
    StepSize,
    between,
    frame_watchers,
    optimizer_with_rates,
    refuse_other_steps,
    unframe_watchers,
)
from tests.runs import applied_rates, loader, samples


def weight(value: float = 0.0) -> Tensor:
    return torch.full((1,), value, dtype=torch.float64, requires_grad=True)


def sgd(*rates: Any, **options: Any) -> torch.optim.SGD:
    """One weight and one group for each rate."""
    return torch.optim.SGD([{"params": [weight()], "lr": rate} for rate in rates], lr=1.0, **options)


def over(optimizer: torch.optim.Optimizer, factor: float | Callable[[Any], float] = 0.5) -> Overlay:
    overlay = Overlay(factor if callable(factor) else lambda _: factor)
    overlay.attach(optimizer)
    return overlay


def rates(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


# ---- on and off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.3, 1.0, 1 / 7, 1e-12])
def test_own_rates_come_back_bit_for_bit(factor: float) -> None:
    own = [0.1, 1 / 3, 1, 0.0]  # a factor and its inverse would not bring a third of these back
    optimizer = sgd(*own)
    overlay = over(optimizer, factor)
    for _ in range(3):  # as often as one likes
        overlay.apply()
        assert rates(optimizer) == [rate * factor for rate in own]
        assert overlay.own == own
    overlay.undo()
    overlay.undo()
    assert rates(optimizer) == own == overlay.own
    assert [type(rate) for rate in rates(optimizer)] == [type(rate) for rate in own]


def test_tensors_are_written_in_place() -> None:
    rate = torch.tensor(1 / 3)
    optimizer = sgd(rate, 0.5)
    overlay = over(optimizer, 0.3)
    overlay.apply()
    assert optimizer.param_groups[0]["lr"] is rate
    assert torch.equal(rate, torch.tensor(1 / 3) * 0.3)
    overlay.undo()
    assert optimizer.param_groups[0]["lr"] is rate
    assert torch.equal(rate, torch.tensor(1 / 3))


def test_a_tensor_that_groups_share_is_scaled_once() -> None:
    shared = torch.tensor(0.5)
    optimizer = torch.optim.SGD([{"params": [weight()]}, {"params": [weight()]}], lr=shared)
    assert optimizer.param_groups[1]["lr"] is shared
    overlay = over(optimizer)
    overlay.apply()
    assert shared.item() == 0.25
    assert overlay.own == [0.5, 0.5]
    overlay.apply()
    assert shared.item() == 0.25
    overlay.undo()
    assert shared.item() == 0.5


@pytest.mark.parametrize("as_tensor", [False, True])
def test_what_is_set_meanwhile_is_the_new_own_rate(as_tensor: bool) -> None:
    optimizer = sgd(torch.tensor(0.5) if as_tensor else 0.5, 0.5)
    overlay = over(optimizer)
    overlay.apply()
    if as_tensor:
        optimizer.param_groups[0]["lr"].fill_(0.25)
    else:
        optimizer.param_groups[0]["lr"] = float("0.25")  # equal to what was there, and yet a new own rate
    assert overlay.own == [0.25, 0.5]
    overlay.apply()
    assert rates(optimizer) == [0.125, 0.25]
    overlay.undo()
    assert rates(optimizer) == [0.25, 0.5]


def test_a_group_that_comes_later_is_covered_too() -> None:
    optimizer = sgd(0.5)
    overlay = over(optimizer)
    overlay.apply()
    optimizer.add_param_group({"params": [weight()], "lr": 0.25})
    assert overlay.own == [0.5, 0.25]
    overlay.apply()
    assert rates(optimizer) == [0.25, 0.125]
    overlay.undo()
    assert rates(optimizer) == [0.5, 0.25]


def test_states_that_are_loaded_meanwhile_stay() -> None:
    optimizer = sgd(0.5)
    overlay = over(optimizer)
    overlay.apply()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.75
    optimizer.load_state_dict(state)
    overlay.undo()
    assert rates(optimizer) == [0.75]


def test_the_factor_may_depend_on_the_own_rates() -> None:
    optimizer = sgd(0.5, torch.tensor(0.25))
    overlay = over(optimizer, lambda own: min(1.0, 0.125 / largest_rate(own)))
    overlay.apply()
    assert rates(optimizer) == [0.125, 0.0625]
    overlay.undo()
    optimizer.param_groups[0]["lr"] = 0.0625
    overlay.apply()
    assert rates(optimizer) == [0.03125, 0.125]


# ---- in steps --------------------------------------------------------------------------------------------------------


def stepped(optimizer: torch.optim.Optimizer, seen: list[Any] | None = None) -> list[float]:
    """How far one step along gradients of one moves each weight, that is, the rates that it took."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.item() for parameter in parameters]

    def closure() -> Tensor:
        if seen is not None:
            seen.append(rates(optimizer))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return torch.zeros(())

    optimizer.step(closure)
    return [old - parameter.item() for old, parameter in zip(before, parameters, strict=True)]


@pytest.mark.parametrize("keyword", [False, True])
def test_steps_take_the_scaled_rates_and_training_steps_see_their_own(keyword: bool) -> None:
    optimizer = sgd(0.5, torch.tensor(0.25, dtype=torch.float64))
    overlay = over(optimizer)
    if keyword:  # as Lightning passes it
        step = optimizer.step
        optimizer.step = lambda closure: step(closure=closure)  # type: ignore[method-assign, misc]
    seen: list[Any] = []
    assert stepped(optimizer, seen) == [0.25, 0.125]
    assert seen == [[0.5, 0.25]]
    assert rates(optimizer) == [0.5, 0.25]
    overlay.apply()
    assert stepped(optimizer) == [0.25, 0.125]
    assert rates(optimizer) == [0.5, 0.25]
    overlay.detach()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert sum(stepped(optimizer)) == 0.75


def test_a_step_without_a_closure() -> None:
    optimizer = sgd(0.5)
    over(optimizer)
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.item() == -0.25
    assert rates(optimizer) == [0.5]


def test_a_rate_set_by_the_training_step_is_scaled_too() -> None:
    optimizer = sgd(0.5)
    over(optimizer)
    parameter = optimizer.param_groups[0]["params"][0]

    def closure() -> Tensor:
        optimizer.param_groups[0]["lr"] *= 0.5  # relative to the own rate, which is what it sees
        parameter.grad = torch.ones_like(parameter)
        return torch.zeros(())

    optimizer.step(closure)
    assert parameter.item() == -0.125
    assert rates(optimizer) == [0.25]


def test_lbfgs_reads_its_rate_before_its_closure() -> None:
    moved = []
    for rate, factor in ((0.25, 1.0), (0.5, 0.5), (0.5, 1.0)):
        parameter = weight(4.0)
        optimizer = torch.optim.LBFGS([parameter], lr=rate, max_iter=3)
        over(optimizer, factor)

        def closure(parameter: Tensor = parameter, optimizer: Any = optimizer, rate: float = rate) -> Tensor:
            assert rates(optimizer) == [rate]
            optimizer.zero_grad()
            loss = parameter.square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        assert rates(optimizer) == [rate]
        moved.append(parameter.item())
    assert moved[0] == moved[1] != moved[2]


def test_an_error_in_the_training_step_leaves_own_rates() -> None:
    optimizer = sgd(0.5)
    over(optimizer)

    def closure() -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.step(closure)
    assert rates(optimizer) == [0.5]


def test_subclasses_with_a_step_of_their_own_are_scaled_once() -> None:
    """Both steps call hooks."""

    class Wrapped(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    sgd(0.5)
    parameter = weight()
    optimizer = Wrapped([parameter], lr=0.5)
    over(optimizer)
    assert stepped(optimizer) == [0.25]
    assert rates(optimizer) == [0.5]


def test_a_step_that_a_scaler_skips_touches_nothing() -> None:
    optimizer = sgd(0.5)
    over(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parameter = optimizer.param_groups[0]["params"][0]
    for gradient in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(parameter.float().sum() * gradient).backward()
        scaler.step(optimizer)
        scaler.update()
        assert rates(optimizer) == [0.5]
    assert parameter.item() == -0.25


def test_another_optimizer_is_let_go_of() -> None:
    first, second = sgd(0.5), sgd(0.5)
    overlay = over(first)
    overlay.apply()
    overlay.attach(second)
    assert rates(first) == [0.5]
    assert stepped(first) == [0.5]
    assert stepped(second) == [0.25]


def test_checkpoints_are_corrected_only_where_rates_are_covered() -> None:
    optimizer = sgd(0.5, torch.tensor(0.25))
    overlay = over(optimizer)
    for covered in (True, False):
        (overlay.apply if covered else overlay.undo)()
        checkpoint = {"optimizer_states": [optimizer.state_dict()]}
        overlay.correct(checkpoint)
        overlay.correct({})  # weights alone
        assert [group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == [0.5, 0.25]
        assert rates(optimizer) == ([0.25, 0.125] if covered else [0.5, 0.25])


# ---- who sees it -----------------------------------------------------------------------------------------------------


class LoggingRates(LearningRateMonitor):
    """A user's own."""


def test_the_order_of_callbacks() -> None:
    ours, watcher, last = Callback(), SharpnessMonitor(every_n_train_steps=5), ModelCheckpoint(save_last=True)
    own, plain, late = LoggingRates(), LearningRateMonitor(), EarlyStopping("loss")
    accumulation, user = GradientAccumulationScheduler({0: 1}), Callback()
    given = [own, watcher, user, ours, accumulation, plain, late, last]
    trainer: Any = SimpleNamespace(callbacks=given)
    overlay = Overlay(lambda _: 1.0)
    for _ in range(2):  # a second fit
        frame_watchers(trainer, ours, overlay, print)
        assert [each for each in trainer.callbacks if not isinstance(each, LambdaCallback)] == [
            *(user, accumulation, late),  # theirs, in their order
            *(ours, watcher, own, plain, last),
        ]
        assert [index for index, each in enumerate(trainer.callbacks) if isinstance(each, LambdaCallback)] == [5, 8]
    assert given == [own, watcher, user, ours, accumulation, plain, late, last]  # Lightning walks through it
    with pytest.raises(MisconfigurationException, match="not the only callback of this Trainer"):
        frame_watchers(trainer, user, Overlay(lambda _: 1.0), print)
    unframe_watchers(trainer, overlay)
    assert len(trainer.callbacks) == len(given)


def test_applied_rates_are_those_of_the_step_at_any_time() -> None:
    optimizer, other = sgd(0.5, torch.tensor(0.25)), sgd(0.125)
    overlay = over(optimizer)
    trainer: Any = SimpleNamespace(optimizers=[optimizer, other], callbacks=[Callback()])
    assert applied_rates(trainer) == [0.5, 0.25, 0.125]  # nobody's overlay
    trainer.callbacks.append(between(overlay, on_train_batch_start=print))
    for switch in (overlay.apply, overlay.undo):
        switch()
        assert applied_rates(trainer) == [0.25, 0.125, 0.125]


# ---- the batch size --------------------------------------------------------------------------------------------------


def fake_trainer(*loaders: Any, accumulate: int = 1, world_size: int = 1, **options: Any) -> Any:
    combined = CombinedLoader(list(loaders))
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(
        fit_loop=SimpleNamespace(_combined_loader=combined, _skip_backward=False),
        accumulate_grad_batches=accumulate,
        num_training_batches=24,
        current_epoch=0,
        world_size=world_size,
        distributed_sampler_kwargs=None,
        strategy=strategy,
        **options,
    )


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(samples(8))


class Custom:
    """Something that only has an iterator."""

    def __iter__(self) -> Any:
        return iter([torch.zeros(3, 4)])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: [loader(batch_size=4)], 4),
        (lambda: [loader(batch_size=4), loader(batch_size=8)], 12),  # a step sees a batch of each
        (lambda: [DataLoader(Stream(), batch_size=4)], 4),
        (lambda: [DataLoader(samples(), batch_sampler=BatchSampler(SequentialSampler(range(24)), 6, False))], 6),
        (lambda: [DataLoader(Stream(), batch_size=None)], None),
        (lambda: [DataLoader(samples(), batch_sampler=[[0, 1, 2], [3]])], 2),
        (lambda: [Custom()], None),
        (lambda: [loader(batch_size=4), Custom()], None),
    ],
)
def test_samples_of_a_step(made: Any, expected: int | None) -> None:
    assert StepSize().samples(fake_trainer(*made())) == expected
    several = fake_trainer(*made(), accumulate=3, world_size=2)
    assert StepSize().samples(several) == (None if expected is None else 6 * expected)
    if expected is None:
        known = 4 if len(made()) == 2 else 0
        assert StepSize().samples(several, torch.zeros(5, 2)) == 6 * (known + 5)


def test_a_step_has_no_more_samples_than_there_are() -> None:
    for data, there in ((loader(batch_size=100), 24), (loader(batch_size=8, sampler=SubsetRandomSampler(range(6))), 6)):
        assert StepSize().samples(fake_trainer(data)) == there
        assert StepSize().samples(fake_trainer(data, accumulate=3, world_size=2)) == 2 * there


def test_processes_that_share_their_samples_count_once() -> None:
    trainer = fake_trainer(loader(batch_size=4), world_size=4)
    trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": 0}  # two of them hold one model
    assert StepSize().samples(trainer) == 8


def test_a_loader_that_does_not_tell_is_counted_once() -> None:
    custom = Custom()
    size = StepSize()
    assert size.samples(fake_trainer(custom)) is None
    assert size.samples(fake_trainer(custom), torch.zeros(5, 2)) == 5
    assert size.samples(fake_trainer(custom), torch.zeros(2, 2)) == 5  # a short batch at the end
    assert size.samples(fake_trainer(custom)) == 5
    assert size.samples(fake_trainer(Custom())) is None  # reloaded
    assert size.samples(fake_trainer(Custom()), {"x": torch.zeros(7, 2)}) == 7


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    class DeepSpeedStrategy:
        pass

    class Manual:
        automatic_optimization = False

    single = SimpleNamespace(strategy=object())
    refuse_other_steps(single, object(), "Us")
    with pytest.raises(
        MisconfigurationException, match=r"Us does not support strategy=DeepSpeedStrategy: .*Use another strategy"
    ):
        refuse_other_steps(SimpleNamespace(strategy=DeepSpeedStrategy()), object(), "Us")
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False: Manual decides itself"):
        refuse_other_steps(single, Manual(), "Us")
    with pytest.raises(MisconfigurationException, match="works with one optimizer, and this Trainer has 2"):
        optimizer_with_rates(SimpleNamespace(optimizers=[sgd(0.5), sgd(0.5)]), "Us")
    with pytest.raises(MisconfigurationException, match=r"learning rates \[None\] in SGD"):
        optimizer_with_rates(SimpleNamespace(optimizers=[sgd(None)]), "Us")
    with pytest.raises(MisconfigurationException, match="no register_step_pre_hook"):
        optimizer_with_rates(SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])]), "Us")
    optimizer = sgd(0.5)
    assert optimizer_with_rates(SimpleNamespace(optimizers=[optimizer]), "Us") is optimizer
