"""What a Trainer is asked, and what is refused, cautioned or said about it."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_eoss import SharpnessMonitor
from lightning_eoss.training.data import TrainingData, sampler_batches, training_data
from lightning_eoss.training.probe import logging_step, refuse, step_parts, steps_now
from tests.problems import dense_gradient_and_hessian, squared_error, top
from tests.runs import Regressor, cells, fit, loader, monitor, points, samples, seeded


class Ask(Callback):
    """Puts a question before each batch."""

    def __init__(self, question: Callable[[Any, Any], Any]) -> None:
        self.question = question
        self.answers: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.answers.append(self.question(trainer, pl_module))


def asked(root: Path, question: Callable[[Any, Any], Any], data: Any, **options: Any) -> list[Any]:
    """The answers during a fit of at most two epochs."""
    ask = Ask(question)
    fit(root, Regressor(), data, ask, **options)
    return ask.answers


def data_of(root: Path, data: Any, dataloader: Any = None, **options: Any) -> TrainingData:
    """Training's data, as a monitor finds it."""
    answers = asked(root, lambda *them: training_data(*them, "Monitor", dataloader), data, max_steps=1, **options)
    found: TrainingData = answers[0]
    return found


def inputs_of(data: TrainingData) -> Tensor:
    """All samples that can be drawn."""
    return torch.stack([data.source.take([index])[0][0] for index in range(data.source.num_samples)])


ALL = samples().tensors[0]


# ---- which samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "indices"),
    [
        (lambda: loader(), {}, range(24)),
        (lambda: loader(shuffle=True), {}, range(24)),
        (lambda: loader(Subset(samples(), [3, 1, 20, 7, 5])), {}, [3, 1, 20, 7, 5]),
        (lambda: loader(), {"limit_train_batches": 2}, range(8)),
        (lambda: loader(), {"limit_train_batches": 0.5}, range(12)),
        (lambda: loader(shuffle=True), {"limit_train_batches": 2}, range(24)),  # others in each epoch
        (lambda: loader(), {"overfit_batches": 3}, range(12)),
        (lambda: loader(Subset(samples(), range(22)), drop_last=True), {}, range(20)),
        (lambda: loader(Subset(samples(), range(22)), drop_last=True, shuffle=True), {}, range(22)),
        (lambda: loader(sampler=SubsetRandomSampler([2, 4, 6, 8, 10])), {}, [2, 4, 6, 8, 10]),
    ],
    ids=["all", "shuffled", "subset", "limit", "half", "shuffled limit", "overfit", "drop", "shuffled drop", "sampler"],
)
def test_samples_are_those_that_training_can_draw(
    data: Any, options: dict[str, Any], indices: Any, tmp_path: Path
) -> None:
    found = data_of(tmp_path, data(), **options)
    assert found.sampler is None and found.batch_size == 4
    assert torch.equal(inputs_of(found), ALL[list(indices)])


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfitting_takes_no_other_samples_when_shuffled(tmp_path: Path) -> None:
    found = data_of(tmp_path, loader(shuffle=True), overfit_batches=2)
    assert torch.equal(inputs_of(found), ALL[:8])


def test_few_samples_make_a_small_batch(tmp_path: Path) -> None:
    assert data_of(tmp_path, loader(samples(3), batch_size=4)).batch_size == 3


class Reversed(Sampler[int]):
    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        return iter(range(23, -1, -1))


@pytest.mark.parametrize(
    "sampler", [WeightedRandomSampler([1.0] * 24, 24), RandomSampler(range(24), replacement=True), Reversed()]
)
def test_other_samplers_are_drawn_from(sampler: Any, tmp_path: Path) -> None:
    found = data_of(tmp_path, loader(sampler=sampler))
    assert found.sampler is not None and found.source.num_samples == 24


def test_batches_of_a_sampler_follow_its_weights(tmp_path: Path) -> None:
    weights = [3.0] * 6 + [1.0] * 18
    found = data_of(tmp_path, loader(sampler=WeightedRandomSampler(weights, 24)))
    batches = list(sampler_batches(found, parts=2, count=400, seed=1))
    assert len(batches) == 400
    assert all([part.size for part in batch] == [4, 4] and sum(part.weight for part in batch) == 1 for batch in batches)
    counts = Counter(index < 6 for batch in batches for part in batch for index in part.indices)
    share, stderr = counts[True] / 3200, np.sqrt(0.25 / 3200)
    assert abs(share - 0.5) < 4 * stderr
    again = list(sampler_batches(found, parts=2, count=400, seed=1))
    assert again == batches
    assert list(sampler_batches(found, parts=2, count=400, seed=2)) != batches


def test_a_short_batch_of_a_sampler_is_left_out(tmp_path: Path) -> None:
    found = data_of(tmp_path, loader(sampler=Reversed(), batch_size=5))
    batches = [batch[0] for batch in sampler_batches(found, parts=1, count=6, seed=0)]
    assert [batch.size for batch in batches] == [5] * 4  # its next epoch is the same
    assert {batch.indices for batch in batches} == {tuple(range(last, last - 5, -1)) for last in (23, 18, 13, 8)}


# ---- which window ----------------------------------------------------------------------------------------------------


def test_windows(tmp_path: Path) -> None:
    """Seven batches, three a step, twice: the last window is short, and loss and monitor share their x."""
    answers = asked(
        tmp_path,
        lambda trainer, _: (step_parts(trainer), steps_now(trainer), logging_step(trainer)),
        loader(samples(28)),
        accumulate_grad_batches=3,
    )
    assert [parts for parts, _, _ in answers] == [3, 3, 3, 3, 3, 3, 1] * 2
    assert [steps for _, steps, _ in answers] == [False, False, True, False, False, True, True] * 2
    assert [x for _, steps, x in answers if steps] == [0, 1, 2, 3, 4, 5]


# ---- data of its own -------------------------------------------------------------------------------------------------


def test_a_loader_of_its_own(tmp_path: Path) -> None:
    other = samples(10, seed=1)
    found = data_of(tmp_path, loader(), loader(other, batch_size=5))
    assert found.batch_size == 5
    assert torch.equal(inputs_of(found), other.tensors[0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(samples(10, seed=1))


@pytest.mark.parametrize(
    "batches", [lambda: loader(Stream(), batch_size=5), lambda: list(loader(samples(10, seed=1), batch_size=5))]
)
def test_batches_of_its_own(batches: Any, tmp_path: Path) -> None:
    found = data_of(tmp_path, loader(), batches())
    assert found.source.num_samples == 2 and found.source.size([0, 1]) == 10
    assert torch.equal(found.source.take([1])[0], samples(10, seed=1).tensors[0][5:])


def test_no_more_batches_are_kept_than_asked_for(tmp_path: Path) -> None:
    """A stream may have no end."""

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from samples()

    watch = monitor(dataloader=loader(Endless()), full_batch_samples=12)
    fit(tmp_path, Regressor(), loader(), watch, max_steps=1)
    assert watch.history[0]["sharpness/batch_size"] == 4


class Pairs(Regressor):
    """Its batches hold those of two loaders."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch["a"]) + super().loss(batch["b"])


def pairs() -> CombinedLoader:
    return CombinedLoader({"a": loader(shuffle=True), "b": loader(samples(24, seed=1))}, "min_size")


def test_combined_loaders_yield_more_than_batches(tmp_path: Path) -> None:
    watch = monitor(dataloader=pairs(), rel_error=0.01)
    listed = monitor(dataloader=[batch for batch, _, _ in iter(pairs())], rel_error=0.01)
    seeded()
    module = Pairs()
    for name, each in (("watch", watch), ("listed", listed)):
        fit(tmp_path / name, copy.deepcopy(module), pairs(), each, max_steps=1)
        assert each.history[0]["sharpness/batch_size"] == 4
    assert watch.history[0]["sharpness/FullBS"] == pytest.approx(listed.history[0]["sharpness/FullBS"], rel=1e-3)


@pytest.mark.parametrize("data", [lambda: loader(Stream()), lambda: [loader(), loader()]])
def test_data_of_its_own_serves_where_training_cannot_be_read_again(data: Any, tmp_path: Path) -> None:
    class Module(Regressor):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch[0] if isinstance(batch[0], list) else batch)

    watch = monitor(dataloader=loader(samples(16, seed=1)))
    fit(tmp_path, Module(), data(), watch, max_steps=3)
    assert [point["step"] for point in watch.history] == [0, 2]
    assert all(point["sharpness/MiniBS"] > 0 for point in watch.history)


# ---- a loss of its own -----------------------------------------------------------------------------------------------


class Manual(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Iterating(Regressor):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


def own_loss(module: Any, batch: Any) -> Tensor:
    return 3 * squared_error(module.net, batch)


def test_a_loss_of_its_own_is_what_is_measured(tmp_path: Path) -> None:
    seeded()
    module, watch = Manual(), monitor(loss_fn=own_loss, rel_error=0.01)
    _, hessian = dense_gradient_and_hessian(module.net, squared_error, samples().tensors)
    fit(tmp_path, module, loader(), watch, max_steps=1)
    assert watch.history[0]["sharpness/FullBS"] == pytest.approx(3 * top(hessian), rel=1e-3)


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_batch_that_only_training_sees_is_not_measured(tmp_path: Path) -> None:
    fit(tmp_path, Iterating(), loader(), monitor(loss_fn=own_loss))
    shown = points(tmp_path)
    assert len(shown["sharpness/MiniBS"]) == 6
    assert "sharpness/current_batch" not in shown


def test_a_step_is_measured_once(tmp_path: Path) -> None:
    """Where optimisation is manual, not every batch makes a step."""

    class Slow(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 3 == 2:
                super().training_step(batch, batch_idx)

    watch = monitor(1, loss_fn=own_loss)
    trainer = fit(tmp_path, Slow(), loader(), watch)
    assert trainer.global_step == len(watch.history) == 4


class AnyArguments(Regressor):
    def training_step(self, *args: Any) -> Any:
        batch, _ = args
        return self.loss(batch)


class Keyword(Regressor):
    def training_step(self, batch: Any, *, flag: bool = False) -> Any:
        assert flag is False
        return self.loss(batch)


class OtherName(Regressor):
    def training_step(self, batch: Any, number: int) -> Any:
        assert number == 0
        return self.loss(batch)


@pytest.mark.parametrize("module", [AnyArguments, Keyword, OtherName])
def test_training_step_gets_what_lightning_gives_it(module: Any, tmp_path: Path) -> None:
    watches = [monitor(), monitor()]
    for kind, watch in zip((Regressor, module), watches, strict=True):
        seeded()
        fit(tmp_path / kind.__name__, kind(), loader(), watch, max_steps=1)
    expected, found = (watch.history[0]["sharpness/FullBS"] for watch in watches)
    assert found == expected


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Manual, Iterating])
def test_a_step_that_cannot_be_repeated_is_refused(module: Any, tmp_path: Path) -> None:
    message = {"Manual": "automatic_optimization=False", "Iterating": r"training_step\(dataloader_iter\)"}
    with pytest.raises(MisconfigurationException, match=rf"{message[module.__name__]}(.|\n)*Pass loss_fn="):
        fit(tmp_path, module(), loader(), monitor())


def test_what_several_optimizers_mean_is_said(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"all trainable parameters.*several optimizers.*no threshold"):
        fit(tmp_path, Manual(), loader(), monitor())


def test_a_loss_of_a_batch_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"loss_fn=<function .*> must take \(module, batch\) and return the loss"):
        fit(tmp_path, Regressor(), loader(), monitor(loss_fn=lambda batch: batch))


def test_nothing_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"no parameter with requires_grad=True in Regressor"):
        fit(tmp_path, Regressor().requires_grad_(False), loader(), monitor())


def test_parameters_may_come_late(tmp_path: Path) -> None:
    class Late(Regressor):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            self.net = nn.Linear(4, 2)

    watch = monitor()
    fit(tmp_path, Late(), loader(), watch, max_steps=1)
    assert watch.history


@pytest.mark.parametrize(
    ("strategy", "name"), [(FSDPStrategy, "FSDPStrategy"), (DeepSpeedStrategy, "DeepSpeedStrategy")]
)
def test_sharded_strategies_are_refused_by_name(strategy: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They start on no machine without accelerators, so the Trainer only carries one."""

    class Carrier:
        strategy: Any = None
        world_size = 1

    carrier = Carrier()
    carrier.strategy = object.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=rf"strategy={name}(.|\n)*measure_sharpness\("):
        refuse(carrier, Regressor(), "SharpnessMonitor", loss_fn=None)


def test_several_processes_are_refused() -> None:
    class Carrier:
        strategy = object.__new__(DDPStrategy)
        world_size = 2

    with pytest.raises(MisconfigurationException, match=r"world_size=2(.|\n)*measure_sharpness\("):
        refuse(Carrier(), Regressor(), "SharpnessMonitor", loss_fn=None)


class Ready:
    """An iterable of batches, for Lightning a loader like any other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (lambda: loader(Stream()), "an IterableDataset"),
        (lambda: [loader(), loader(Stream())], "an IterableDataset"),
        (
            lambda: [loader(), loader(sampler=Reversed())],
            "one of several training loaders, whose sampler is not uniform,",
        ),
        (lambda: DataLoader(samples(), batch_size=None), "a DataLoader without a batch sampler"),
        (lambda: Ready(), "a Ready without a batch sampler"),
    ],
)
def test_data_that_cannot_be_read_again_is_refused(data: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=rf"cannot read {what} a second time(.|\n)*Pass dataloader="):
        fit(tmp_path, Regressor(), data(), monitor())


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"dataloader=\[\], which has no batches"):
        fit(tmp_path, Regressor(), loader(), monitor(dataloader=[]))


@pytest.mark.parametrize(
    "data",
    [
        5,
        "batches",
        lambda: loader(),
        samples(),
        Stream(),
        ALL,
        samples().tensors,
        {"train": loader()},
        iter(loader()),
        (batch for batch in loader()),
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_yields_no_batches_or_only_once_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match=rf"must be a DataLoader, a list.*, not {type(data).__name__}. Of a data set"):
        monitor(dataloader=data)


@pytest.mark.parametrize(
    "entries",
    [list(samples()), [(torch.zeros(3, 8, 8), 1)], [{"inputs": torch.zeros(4), "label": torch.tensor(1)}], [(0.5, 1)]],
)
def test_a_list_of_samples_is_refused(entries: Any) -> None:
    with pytest.raises(TypeError, match=r"is a sample, not a batch.*DataLoader\(samples, batch_size=...\)"):
        monitor(dataloader=entries)


@pytest.mark.parametrize(
    "batches",
    [list(loader()), [ALL[:4], ALL[4:8]], [[[ALL[:4], ALL[:4]], [ALL[:8], ALL[:8]]]], [{"words": "a b"}]],
    ids=["pairs", "tensors", "two loaders", "no tensors"],
)
def test_a_list_of_batches_is_not(batches: Any) -> None:
    monitor(dataloader=batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_train_steps": "10"}, "every_n_train_steps='10' must be a whole number, got str"),
        ({"every_n_train_steps": 2.0}, "every_n_train_steps=2.0 must be a whole number, got float"),
        ({"every_n_train_steps": True}, "every_n_train_steps=True must be a whole number, got bool"),
        ({"overhead": "0.05"}, "overhead='0.05' must be a number, got str"),
        ({"max_seconds": "60"}, "max_seconds='60' must be a number, got str"),
        ({"max_seconds": None}, "max_seconds=None must be a number, got NoneType"),
        ({"rel_error": "a"}, "rel_error='a' must be a number, got str"),
        ({"num_batches": 10.0}, "num_batches=10.0 must be a whole number, got float"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SharpnessMonitor(**arguments)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    watch = monitor(np.int64(2), num_batches=np.int64(4), seed=np.int64(1), max_seconds=np.float32(60))
    fit(tmp_path, Regressor(), loader(), watch)
    assert len(watch.history) == 6
    SharpnessMonitor(overhead=np.float64(0.1), max_seconds=float("inf"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_train_steps": 5, "overhead": 0.1}, "every_n_train_steps=5 and overhead=0.1 are two schedules"),
        ({"every_n_train_steps": 0}, "every_n_train_steps=0 must be at least 1"),
        ({"overhead": -0.5}, "overhead=-0.5 is a share of the wall time"),
        ({"max_seconds": 0}, "max_seconds=0 must be positive"),
        ({"rel_error": 0.0}, "rel_error=0.0 must be positive"),
        ({"rel_error": -1.0}, "rel_error=-1.0 must be positive"),
        ({"num_batches": 0}, "num_batches=0 must be at least 1"),
        ({"full_batch_samples": 0}, "full_batch_samples=0 must be positive"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"precision": "half"}, "precision='half' is unknown"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**arguments)


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=25 must lie between 1 and the number of samples, 24"):
        fit(tmp_path, Regressor(), loader(), monitor(batch_size=25))


def test_a_batch_of_ready_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 cannot be made of the ready batches"):
        fit(tmp_path, Regressor(), loader(), monitor(batch_size=8, dataloader=list(loader())))


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    class Module(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch[0]) - batch[1]).square()

    with pytest.raises(ValueError, match=r"must be a scalar tensor, got a tensor of shape \(\d, 2\)"):
        fit(tmp_path, Module(), loader(), monitor())


def test_a_step_that_changes_parameters_is_refused(tmp_path: Path) -> None:
    class Module(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.net[0].weight.clamp_(-0.1, 0.1)
            return self.loss(batch)

    with pytest.raises(ValueError, match=r"changed trainable parameters in place \(net.0.weight\)(.|\n)*Pass loss_fn="):
        fit(tmp_path, Module(), loader(), monitor())


# ---- what is said once -----------------------------------------------------------------------------------------------


class Overridden(Regressor):
    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)


class SAMLike(torch.optim.SGD):
    def first_step(self) -> None:
        """What marks a sharpness-aware optimizer."""


class Aware(Regressor):
    def configure_optimizers(self) -> Any:
        return SAMLike(self.parameters(), lr=0.01)


class Summed(Regressor):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * len(batch[0]) / 10


class Late(Regressor):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().param_groups[0]["lr"] = 0.01


def ours(warned: pytest.WarningsRecorder) -> list[str]:
    """The warnings of the monitor."""
    return [str(each.message) for each in warned if "SharpnessMonitor" in str(each.message)]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Regressor, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0 shortens steps, so the stability limit"),
        (Overridden, {}, "optimizer_step is overridden, so the stability limit"),
        (Aware, {}, "SAMLike steps on a gradient from elsewhere, so the stability limit"),
        (Summed, {}, "The loss is a sum over the batch"),
        (Late, {}, "the module's on_train_batch_start runs after the monitor's"),
    ],
)
def test_cautions_come_once(module: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="SharpnessMonitor") as warned:
        fit(tmp_path, module(), loader(), monitor(), **options)
    (said,) = ours(warned)
    assert message in said
    assert len(points(tmp_path)["sharpness/FullBS"]) == 6


def test_other_samplers_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        watch = monitor()
        fit(tmp_path, Regressor(), loader(sampler=Reversed()), watch, max_steps=1)
    (line,) = (each.getMessage() for each in caplog.records if "SharpnessMonitor" in each.getMessage())
    assert "the sampler is not uniform" in line
    assert "MiniBS(b=4) over at most 4 mini-batches, FullBS on all 24 samples, P = 37" in line
    assert "a full measurement takes about" in line and "every 2 steps" in line


def test_a_plan_that_takes_too_long_is_cut_once(tmp_path: Path) -> None:
    watch = SharpnessMonitor(every_n_train_steps=2, max_seconds=1e-3)
    with pytest.warns(UserWarning, match=r"more than max_seconds=0.001: (.|\n)*mini-batches") as warned:
        fit(tmp_path, Regressor(), loader(samples(512)), watch, max_steps=5)
    assert len(ours(warned)) == 1
    assert len(watch.history) == 3
    assert watch.mini_batch_sharpness.moments[0] == 2  # the fewest that have an interval


# ---- losses that are not finite --------------------------------------------------------------------------------------


class Overflowing(Regressor):
    """Its loss is not finite from `first` to `last`."""

    first, last = 2, 5

    def loss(self, batch: Any) -> Tensor:
        bad = self.first <= self.trainer.global_step <= self.last
        return super().loss(batch) * (float("nan") if bad else 1.0)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Throws the bad gradients away."""
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0)


class OverflowingAtOnce(Overflowing):
    first, last = 0, 3


@pytest.mark.filterwarnings("ignore:SharpnessMonitor. configure_gradient_clipping")
@pytest.mark.filterwarnings("ignore:SharpnessMonitor. [Tt]he loss is not finite")
@pytest.mark.parametrize(("module", "good"), [(Overflowing, [0, 6, 8, 10]), (OverflowingAtOnce, [4, 6, 8, 10])])
def test_a_loss_that_is_not_finite_writes_no_point(module: Any, good: list[int], tmp_path: Path) -> None:
    watch = monitor()
    trainer = fit(tmp_path, module(), loader(), watch)
    assert trainer.global_step == 12
    findings = watch.state_dict()["findings"]
    assert findings["reduction"] == "mean" and findings["graph_bytes"] > 0  # nothing was concluded from a bad loss
    shown = points(tmp_path)
    for tag, steps in shown.items():
        assert all(np.isfinite(list(steps.values()))), tag
        if tag.startswith("sharpness/") and tag != "sharpness/phase":
            assert list(steps) == good, tag
    assert not any(cell == "nan" for row in cells(tmp_path, ours=True) for cell in row.values())
    assert all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters())
