"""Habits of modules that measuring could disturb: what they draw, keep, count, and reach through their Trainer."""

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from tests.runs import Regressor, loader, samples

Case = tuple[LightningModule, Any, dict[str, Any]]  # module, data, options of the Trainer


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


HABITS_OF_MODULES = [
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
]
