"""The guarantee: a run with the monitor and one without are the same, to the last bit.

Each case is a training with a habit that measuring could disturb. It runs twice from the same seeds, once watched. All
that training can see must be equal at the end, and every cell of `metrics.csv` on the way.
"""

import random
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Sampler, WeightedRandomSampler

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

Case = tuple[LightningModule, Any, dict[str, Any]]  # module, data, options of the Trainer


# ---- habits of modules -----------------------------------------------------------------------------------------------


def batch_norm() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    return Regressor(net), loader(shuffle=True), {}


def dropout() -> Case:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
    return Regressor(net), loader(), {}


def accumulation() -> Case:
    """Seven batches an epoch: the last window is short."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
    return Regressor(net), loader(samples(28), shuffle=True), {"accumulate_grad_batches": 3}


class OneCycle(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def one_cycle() -> Case:
    return OneCycle(), loader(), {}


class AdamW(Regressor):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def adamw() -> Case:
    return AdamW(), loader(), {}


class Augmenting(Regressor):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        inputs, targets = batch
        return inputs + 0.1 * torch.randn_like(inputs) * random.random() * np.random.rand(), targets


def augmentation_on_transfer() -> Case:
    return Augmenting(), loader(), {}


class Measuring(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError(num_outputs=2)
        self.all = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.CatMetric()])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.error(self.net(batch[0]), batch[1])
        self.all.update(loss)
        self.log("error", self.error.compute().mean(), on_step=True)
        self.log("mean", self.all["MeanMetric"], on_step=True, on_epoch=True)
        self.log("count", float(self.error.update_count))
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("all", self.all["CatMetric"].compute().sum())
        self.error.reset()


def torchmetrics_inside() -> Case:
    return Measuring(), loader(shuffle=True), {}


class Collecting(Regressor):
    """Draws, counts, and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.calls = 0
        self.by_index: dict[int, Tensor] = {}
        self.average = torch.zeros(())
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * np.random.rand() + 0.1 * random.random())
        loss = loss * (1 + 0.1 * torch.rand((), generator=self.generator))
        self.calls += 1
        self.losses.append(loss.item())
        self.by_index[batch_idx] = loss.detach()
        self.average.mul_(0.9).add_(loss.detach())
        self.log("calls", float(self.calls))
        self.log("sum", sum(self.losses))
        self.log("average", self.average)
        return {"loss": loss, "more": len(self.losses)}

    def on_train_end(self) -> None:
        self.register_buffer("kept", torch.tensor([*self.losses, *self.by_index.values(), self.calls, self.average]))


def collecting() -> Case:
    return Collecting(), loader(), {}


class Validating(Regressor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) * (1 + torch.rand(())))


def validation_in_mid_epoch() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2))
    return Validating(net), loader(shuffle=True), {"val_check_interval": 2, "val_dataloaders": loader(samples(8, 1))}


def parameter_hooks() -> Case:
    module = Regressor()
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: 0.1 * gradient)
    return module, loader(), {}


def mixed_precision() -> Case:
    return Regressor(), loader(), {"precision": "bf16-mixed"}


class Mutating(Regressor):
    """Takes its batch apart."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch.pop("inputs").mul_(2)
        batch["nested"].append(1)
        loss = self.loss((inputs, batch["targets"].add_(0.1)))
        self.log("loss", loss)
        self.log("left", float(len(batch) + len(batch["nested"])))
        return loss


def as_dict(rows: list[Any]) -> dict[str, Any]:
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"inputs": inputs, "targets": targets, "nested": []}


def mutated_batch() -> Case:
    return Mutating(), loader(collate_fn=as_dict), {}


def mutated_window() -> Case:
    return Mutating(), loader(collate_fn=as_dict), {"accumulate_grad_batches": 2}


class Drawing(Regressor):
    """Talks to its logger without asking Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.logger.experiment.log_metrics({"direct": loss}, step=1000 + self.trainer.global_step)
        self.logger.log_metrics({"indirect": loss.item()}, step=2000 + self.trainer.global_step)
        return loss


def direct_logging() -> Case:
    return Drawing(), loader(), {}


class Inner(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.trainer.lightning_module.log("inner", inputs.mean(), on_step=True, on_epoch=True)
        return self.layer(inputs)


class Outer(Regressor):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5))
        self.inner = Inner()

    def loss(self, batch: Any) -> Tensor:
        return (self.inner(self.net(batch[0]).tanh()) - batch[1]).square().mean()


def nested_module() -> Case:
    return Outer(), loader(shuffle=True), {}


class Logarithm(nn.Module):
    """Has a method `log` that is none of Lightning's."""

    def log(self, inputs: Tensor) -> Tensor:
        return inputs.square().add(1).log()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.log(inputs)


def another_log() -> Case:
    return Regressor(nn.Sequential(nn.Linear(4, 5), Logarithm(), nn.Linear(5, 2))), loader(), {}


# ---- what modules keep in objects of their own, and what they reach through their Trainer ----------------------------

Habit = Callable[[Any, Tensor, Any], Tensor]  # module, loss and batch to loss


class Habitual(Regressor):
    """Does something with its loss."""

    def __init__(self, habit: Habit, **made: Any) -> None:
        super().__init__()
        self.habit = habit
        for name, value in made.items():
            setattr(self, name, value)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.habit(self, super().training_step(batch, batch_idx), batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.learning_rate, momentum=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)}


class Meter:
    """Keeps the tensor that it is given, which is none of ordinary torch's while batches are stacked."""

    def __init__(self) -> None:
        self.total: Any = torch.zeros(())
        self.count = 0

    def update(self, value: Tensor) -> Tensor:
        self.total, self.count = self.total + value, self.count + 1
        return self.total / self.count


class Annealer:
    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> float:
        self.steps += 1
        return min(1.0, self.steps / 12)


class Noise:
    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __call__(self, inputs: Any) -> Any:
        return inputs + 0.1 * float(self.generator.normal())


class SlotNoise(Noise):
    __slots__ = ("drawn",)

    def __call__(self, inputs: Any) -> Any:
        self.drawn = getattr(self, "drawn", 0) + 1
        return super().__call__(inputs) + 0.01 * self.drawn


class ModuleNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, inputs: Tensor) -> Any:
        return self.noise(self.norm(inputs + torch.randn(2, 4))[0])


def frozen_net() -> nn.Module:
    """A teacher, with another start than the student's."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).requires_grad_(False)


def towards(module: Any, batch: Any) -> Tensor:
    """How far the student is from its teacher."""
    with torch.no_grad():
        target = module.teacher(batch[0])
    return (module.net(batch[0]) - target).square().mean()


def momentum_teacher(module: Any, loss: Tensor, batch: Any) -> Tensor:
    with torch.no_grad():
        for parameter, slow in zip(module.net.parameters(), module.teacher.parameters(), strict=True):
            slow.mul_(0.9).add_(parameter, alpha=0.1)
    return loss + towards(module, batch)


def old_momentum_teacher(module: Any, loss: Tensor, batch: Any) -> Tensor:
    """As it was written before torch.no_grad: another memory each time, and no version counted."""
    for parameter, slow in zip(module.net.parameters(), module.teacher.parameters(), strict=True):
        slow.data = slow.data * 0.9 + parameter.data * 0.1
    return loss + towards(module, batch)


def meter(module: Any, loss: Tensor, batch: Any) -> Tensor:
    module.log("average", module.meter.update(loss.detach()))
    return loss


def annealer(module: Any, loss: Tensor, batch: Any) -> Tensor:
    return loss * module.annealer.step()


def nested_history(module: Any, loss: Tensor, batch: Any) -> Tensor:
    module.history["loss"].append(loss.detach())
    module.log("sum", sum(module.history["loss"]))
    return loss


def metric_in_a_dict(module: Any, loss: Tensor, batch: Any) -> Tensor:
    module.metrics["mean"].update(loss.detach())
    module.log("mean", module.metrics["mean"].compute())
    return loss


def nested_generator(module: Any, loss: Tensor, batch: Any) -> Tensor:
    return loss * (1 + 0.1 * module.settings["noise"]["generator"].random())


def helper_with_a_generator(module: Any, loss: Tensor, batch: Any) -> Tensor:
    return loss * module.helper(1.0)


def expanded_buffer(module: Any, loss: Tensor, batch: Any) -> Tensor:
    return loss * module.mask[: len(batch[0])].mean()


def own_backward(module: Any, loss: Tensor, batch: Any) -> Tensor:
    """Adds to gradients in place, and looks at them."""
    (0.1 * module.net(batch[0]).square().mean()).backward()
    return loss * (1 + 0.01 * sum(float(parameter.grad.norm()) for parameter in module.net.parameters()))


def steps_the_scheduler(module: Any, loss: Tensor, batch: Any) -> Tensor:
    if module.global_step:
        module.lr_schedulers().step()
    return loss


def scales_the_learning_rate(module: Any, loss: Tensor, batch: Any) -> Tensor:
    for group in module.optimizers().param_groups:
        group["lr"] *= 0.95
    return loss


def meets(module: Any, batch: Any) -> bool:
    """Whether the first sample is the data's first, in a step in which training meets another."""
    return module.global_step in (2, 4) and bool((batch[0][0] == samples().tensors[0][0]).all())


def clears_momentum(module: Any, loss: Tensor, batch: Any) -> Tensor:
    if meets(module, batch):
        module.optimizers().optimizer.state.clear()
    return loss


def stops(module: Any, loss: Tensor, batch: Any) -> Tensor:
    if meets(module, batch):
        module.trainer.should_stop = True
    return loss


def writes_metrics(module: Any, loss: Tensor, batch: Any) -> Tensor:
    metrics = module.trainer.callback_metrics
    metrics["count"] = metrics.get("count", torch.zeros(())) + 1
    return loss


class Box(Callback):
    """A callback that modules tell something, or whose hooks they call."""

    def __init__(self, *, hooked: bool = False) -> None:
        self.told: list[float] = []
        self.hooked = hooked

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.hooked:
            pl_module.net[0].register_forward_hook(lambda _module, _inputs, output: self.told.append(output.shape[0]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.register_buffer("told", torch.tensor(self.told))


def tells_a_callback(module: Any, loss: Tensor, batch: Any) -> Tensor:
    module.trainer.callbacks[0].told.append(float(module.global_step))
    return loss


def nothing(module: Any, loss: Tensor, batch: Any) -> Tensor:
    return loss


def habitual(habit: Habit, callback: Callable[[], Callback] | None = None, **made: Callable[[], Any]) -> Any:
    """A case of a habit, with attributes of the module that are made anew each time."""

    def case() -> Case:
        options = {"callbacks": [callback()]} if callback else {}
        return Habitual(habit, **{name: make() for name, make in made.items()}), loader(), options

    return pytest.param(case, id="hook_of_a_callback" if habit is nothing else habit.__name__)


def masked() -> Case:
    module = Habitual(expanded_buffer)
    module.register_buffer("mask", torch.full((1, 2), 0.5).expand(4, 2))
    return module, loader(), {}


HABITS = [
    habitual(momentum_teacher, teacher=frozen_net),
    habitual(old_momentum_teacher, teacher=frozen_net),
    habitual(meter, meter=Meter),
    habitual(annealer, annealer=Annealer),
    habitual(nested_history, history=lambda: defaultdict(list)),
    habitual(metric_in_a_dict, metrics=lambda: {"mean": torchmetrics.MeanMetric()}),
    habitual(nested_generator, settings=lambda: {"noise": {"generator": random.Random(0)}}),
    habitual(helper_with_a_generator, helper=Noise),
    masked,
    habitual(own_backward),
    habitual(steps_the_scheduler),
    habitual(scales_the_learning_rate),
    habitual(clears_momentum),
    habitual(stops),
    habitual(writes_metrics),
    habitual(tells_a_callback, Box),
    habitual(nothing, lambda: Box(hooked=True)),
]


# ---- habits of data --------------------------------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Noise from the global generators, or from one of its own; counts."""

    def __init__(self, own: bool) -> None:
        self.data = samples()
        self.generator = np.random.default_rng(5) if own else None
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        noise = (
            self.generator.normal() if self.generator else np.random.normal() + random.random() + float(torch.rand(()))
        )
        self.fetched += 1
        return inputs + 0.1 * noise, targets


def augmentation_by_global_generators() -> Case:
    return Regressor(), loader(Augmented(own=False), shuffle=True), {}


def augmentation_by_its_own_generator() -> Case:
    return Regressor(), loader(Augmented(own=True), shuffle=True), {}


class Data(LightningDataModule):
    """Draws in its transfer hook."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(7)
        self.seen: list[int] = []

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(len(self.seen))
        return batch[0] + 0.1 * self.generator.normal() + 0.01 * len(self.seen), batch[1]


def datamodule() -> Case:
    return Regressor(), Data(), {}


def shuffled() -> Case:
    return Regressor(), loader(shuffle=True, generator=torch.Generator().manual_seed(9)), {}


def weighted() -> Case:
    return Regressor(), loader(sampler=WeightedRandomSampler(np.linspace(1, 3, 24), 24)), {}


class Batches(Sampler[list[int]]):
    """Batches of four from the global generator, or from one of its own; counts epochs and tells no batch size."""

    def __init__(self, generator: Any = None) -> None:
        self.generator = generator
        self.epochs = 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        for _ in range(6):
            if isinstance(self.generator, np.random.Generator):
                yield self.generator.permutation(24)[:4].tolist()
            else:
                yield torch.randperm(24, generator=self.generator)[:4].tolist()


def custom_batch_sampler() -> Case:
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=Batches()), {}


def custom_batch_sampler_with_a_generator() -> Case:
    sampler = Batches(torch.Generator().manual_seed(11))
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=sampler), {}


def custom_batch_sampler_with_a_numpy_generator() -> Case:
    sampler = Batches(np.random.default_rng(11))
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=sampler), {}


def list_of_batches_as_sampler() -> Case:
    batches = [list(range(first, first + 4)) for first in range(0, 24, 4)]
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=batches), {}


class Stream(IterableDataset[Any]):
    """Draws what it yields."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(13)
        self.fetched = 0

    def __iter__(self) -> Iterator[Any]:
        for inputs, targets in samples():
            self.fetched += 1
            yield inputs + self.generator.normal() + float(torch.rand(())), targets


def workers() -> Case:
    data = loader(Augmented(own=True), shuffle=True, num_workers=2, persistent_workers=True)
    return Regressor(), data, {}


class Transformed(Dataset[Any]):
    """Inputs through a transform; with weights that are one number, expanded."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.data = samples()
        self.transform = transform
        self.weights = torch.ones(1).expand(24)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        return self.transform(inputs), targets * self.weights[index]


def transformed_by(name: str, make: Callable[[], Callable[[Any], Any]]) -> Any:
    return pytest.param(lambda: (Regressor(), loader(Transformed(make()), shuffle=True), {}), id=name)


def closure() -> Callable[[Any], Any]:
    noise, calls = Noise(), 0

    def transform(inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        return noise(inputs) + 0.01 * calls

    return transform


def noisy_collate() -> Case:
    generator = torch.Generator().manual_seed(0)

    def collate(rows: list[Any]) -> Any:
        inputs, targets = torch.utils.data.default_collate(rows)
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator), targets

    return Regressor(), loader(collate_fn=collate), {}


class Owned(Dataset[Any]):
    """Draws from its datamodule's generator, and writes into its cache."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.data = samples()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        seen = self.owner.cache.setdefault("seen", [])
        seen.append(index)
        return inputs + 0.1 * self.owner.generator.normal() + 1e-3 * len(seen), targets


class Owner(Data):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, list[int]] = {}

    def train_dataloader(self) -> Any:
        return loader(Owned(self), shuffle=True)


def data_of_a_datamodule() -> Case:
    return Regressor(), Owner(), {}


class Mapped(Dataset[Any]):
    """A file that nobody may write to: to write what is there already kills the process."""

    def __init__(self) -> None:
        self.inputs, self.targets = samples().tensors
        with tempfile.NamedTemporaryFile(suffix=".npy") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of this very thing
            np.save(file.name, self.inputs.numpy())
            self.inputs = torch.from_numpy(np.load(file.name, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index].clone(), self.targets[index]


def memory_mapped() -> Case:
    return Regressor(), loader(Mapped()), {}


TRANSFORMS = [
    transformed_by("closure", closure),
    transformed_by("partial", lambda: partial(lambda noise, inputs: noise(inputs), Noise())),
    transformed_by("bound_method", lambda: Noise().__call__),
    transformed_by("slots", SlotNoise),
    transformed_by("module", ModuleNoise),
]


CASES = [
    *HABITS,
    *TRANSFORMS,
    noisy_collate,
    data_of_a_datamodule,
    memory_mapped,
    batch_norm,
    dropout,
    accumulation,
    one_cycle,
    adamw,
    augmentation_on_transfer,
    torchmetrics_inside,
    collecting,
    validation_in_mid_epoch,
    parameter_hooks,
    mixed_precision,
    mutated_batch,
    mutated_window,
    direct_logging,
    nested_module,
    another_log,
    augmentation_by_global_generators,
    augmentation_by_its_own_generator,
    datamodule,
    shuffled,
    weighted,
    custom_batch_sampler,
    custom_batch_sampler_with_a_generator,
    custom_batch_sampler_with_a_numpy_generator,
    list_of_batches_as_sampler,
    pytest.param(workers, marks=pytest.mark.processes),
]


def run(case: Any, root: Path, *callbacks: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Fits a case from its seeds; the Trainer, and what is left behind."""
    seeded()
    module, data, defaults = case()
    others = defaults.pop("callbacks", [])
    trainer = fit(root, module, data, *others, *callbacks, **{**defaults, **options})
    return trainer, {**state_of(trainer), "data": traces(data)}


def traces(data: Any) -> list[Any]:
    """What data sets, samplers and datamodules keep to themselves."""
    found = []
    for each in (data, *(getattr(data, name, None) for name in ("dataset", "sampler", "batch_sampler"))):
        held = dict(getattr(each, "__dict__", {}))
        generator = held.get("generator")
        if isinstance(generator, torch.Generator):
            found.append(generator.get_state())
        elif generator is not None:
            found.append(generator.bit_generator.state)
        found += [held.get(name) for name in ("fetched", "epochs", "seen")]
    return found


@pytest.mark.filterwarnings("ignore:.*SharpnessMonitor:UserWarning")
@pytest.mark.filterwarnings("ignore:SharpnessMonitor:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_watched_run_is_the_same_run(case: Any, tmp_path: Path) -> None:
    _, alone = run(case, tmp_path / "alone")
    watch = monitor(raw=True)  # shows nothing more where limits are one number
    _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, alone)
    assert cells(tmp_path / "watched") == cells(tmp_path / "alone")
    shown = points(tmp_path / "watched")
    needed = {"sharpness/MiniBS", "sharpness/FullBS", "sharpness/directional", "sharpness/current_batch", "cost/share"}
    assert needed <= shown.keys()
    assert all(len(shown[tag]) >= 2 for tag in needed)


@pytest.mark.filterwarnings("ignore:SharpnessMonitor:UserWarning")
@pytest.mark.parametrize("case", [batch_norm, accumulation, collecting])
def test_a_share_of_wall_time_changes_nothing_either(case: Any, tmp_path: Path) -> None:
    """What is measured when depends on the clock, and training on none of it."""
    _, alone = run(case, tmp_path / "alone")
    watch = monitor(None, overhead=0.5)
    _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, alone)
    assert cells(tmp_path / "watched") == cells(tmp_path / "alone")
    assert watch.history


def test_data_of_its_own_changes_nothing_either(tmp_path: Path) -> None:
    """Reading an iterable data set draws from the global generators, and here from the one that training reads, too."""
    stream = Stream()

    def case() -> Case:
        stream.__init__()  # type: ignore[misc]
        return Regressor(), loader(stream), {}

    _, alone = run(case, tmp_path / "alone")
    watch = monitor(dataloader=loader(stream))
    _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, alone)
    assert cells(tmp_path / "watched") == cells(tmp_path / "alone")
    assert len(watch.history) == 6


def test_parameter_hooks_scale_gradients_and_not_the_measurement(tmp_path: Path) -> None:
    hooked, plain = monitor(), monitor()
    run(parameter_hooks, tmp_path / "hooked", hooked, max_steps=1)
    run(lambda: (Regressor(), loader(), {}), tmp_path / "plain", plain, max_steps=1)
    values = [{tag: each for tag, each in watch.history[0].items() if "sharpness/" in tag} for watch in (hooked, plain)]
    assert values[0] == values[1]
    assert values[0]["sharpness/MiniBS"] > 0


# ---- measurements that do not end well -------------------------------------------------------------------------------


def failing(error: type[BaseException] | None) -> Any:
    """A case whose `training_step` raises half-way through the measurement before step 2, and after some mischief."""
    evaluations = 0

    class Module(Collecting):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            nonlocal evaluations
            here = "log" in vars(self) and self.trainer.global_step == 2  # muted: it is not training that asks
            evaluations += here
            loss = super().training_step((self.norm(batch[0]), batch[1]), batch_idx)
            if here and evaluations == 5 and error:
                self.requires_grad_(False)
                self.eval()
                raise error("on purpose")
            return loss

    return lambda: (Module(), loader(shuffle=True), {})


@pytest.mark.filterwarnings("ignore:.*The loss of a batch was not found to be a mean:UserWarning")
def test_a_measurement_that_raises_is_left_out(tmp_path: Path) -> None:
    _, alone = run(failing(None), tmp_path / "alone")
    watch = monitor()
    with pytest.warns(UserWarning, match=r"a measurement failed and is left out.*RuntimeError: on purpose"):
        trainer, watched = run(failing(RuntimeError), tmp_path / "watched", watch)
    assert_same(watched, alone)
    assert cells(tmp_path / "watched") == cells(tmp_path / "alone")
    assert [point["step"] for point in watch.history] == [0, 4, 6, 8, 10]
    assert all(parameter.requires_grad for parameter in trainer.lightning_module.parameters())


def decays_late(module: Any, loss: Tensor, batch: Any) -> Tensor:
    """Moves what it trains, from the fourth step on; not to be stacked."""
    if loss.item() and module.global_step >= 4:
        with torch.no_grad():
            for parameter in module.net.parameters():
                parameter.mul_(0.99)
    return module.loss(batch)


def test_a_training_step_that_steps_is_not_measured_and_not_disturbed(tmp_path: Path) -> None:
    def case() -> Case:
        return Habitual(decays_late), loader(), {}

    _, alone = run(case, tmp_path / "alone")
    watch = monitor()
    with pytest.warns(UserWarning, match=r"left out.*changed trainable parameters in place \(net.0.weight\)"):
        _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, alone)
    assert cells(tmp_path / "watched") == cells(tmp_path / "alone")
    assert [point["step"] for point in watch.history] == [0, 2]


class Stop(Callback):
    """Presses Ctrl+C before a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_measurement_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl+C in the measurement before step 2 against Ctrl+C before step 2."""
    trainers, states = [], []
    for name, error, callback in (("alone", None, Stop(2)), ("watched", KeyboardInterrupt, monitor())):
        seeded()
        module, data, _ = failing(error)()
        trainer = trainer_of(tmp_path / name, callback)
        loggers = trainer.loggers
        with pytest.raises(SystemExit):
            trainer.fit(module, data)
        assert trainer.loggers is loggers and trainer.global_step == 2
        assert not {"log", "log_dict", "print"} & vars(module).keys()
        trainers.append(trainer)
        states.append(state_of(trainer))
    assert_same(states[1], states[0])
    assert_same(vars(trainers[1].lightning_module)["losses"], vars(trainers[0].lightning_module)["losses"])


def test_what_is_kept_outside_of_torch_is_compared(tmp_path: Path) -> None:
    """The comparison itself: a callback that draws one number makes another run."""

    class Draw(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            random.random()

    _, alone = run(dropout, tmp_path / "alone")
    _, drawn = run(dropout, tmp_path / "drawn", Draw())
    with pytest.raises(AssertionError, match="python"):
        assert_same(drawn, alone)


# ---- the other Lightning ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_pytorch_lightning_trains_the_same(tmp_path: Path) -> None:
    """The package under its older name: the same classes twice, and not one `isinstance` between them."""
    import pytorch_lightning
    from pytorch_lightning.loggers import CSVLogger

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    states = []
    for name, callbacks in (("alone", []), ("watched", [monitor()])):
        seeded()
        root = tmp_path / name
        trainer = trainer_of(
            root, *callbacks, kind=pytorch_lightning.Trainer, logger=CSVLogger(root, name="logs", version=0)
        )
        trainer.fit(Module(), loader(shuffle=True))
        states.append(state_of(trainer))
    assert_same(states[1], states[0])
    assert cells(tmp_path / "watched") == cells(tmp_path / "alone")
    assert len(points(tmp_path / "watched")["sharpness/threshold"]) == 6
