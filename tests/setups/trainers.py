"""What Trainers are told, how modules step, and what else runs them."""

import copy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_eoss import measure_sharpness
from tests.problems import dense_gradient_and_hessian, squared_error, top
from tests.runs import Regressor, assert_same, fit, generators, loader, samples, seeded
from tests.setups.case import REL_ERROR, SOLVED, Case

# ---- steps of their own ----------------------------------------------------------------------------------------------


class Manual(Regressor):
    """Steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Adversarial(LightningModule):
    """A generator, its critic, an optimizer for each."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.critic = nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.softplus(-self.critic(self.net(batch[0]))).mean()

    def critics_loss(self, batch: Any) -> Tensor:
        fake, real = self.critic(self.net(batch[0]).detach()), self.critic(batch[1])
        return nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer, loss in zip(self.optimizers(), (self.loss, self.critics_loss), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.05) for each in (self.net, self.critic)]


# ---- compiled --------------------------------------------------------------------------------------------------------


def needs_a_compiler() -> None:
    """Inductor writes C++ for CPUs."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler for CPUs, and there is no g++")


def compiled_submodule() -> LightningModule:
    needs_a_compiler()
    module = Regressor()
    module.net = torch.compile(module.net)  # type: ignore[assignment]
    return module


class Silent(Regressor):
    """Lightning 2.6 cannot compile a `self.log` under newer versions of torch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


def compiled_module() -> LightningModule:
    needs_a_compiler()
    module: LightningModule = torch.compile(Silent())  # type: ignore[assignment]
    return module


# ---- other ways to run -----------------------------------------------------------------------------------------------


def resumed(case: Case, root: Path, callbacks: tuple[Any, ...]) -> Any:
    """Trains an epoch, saves, and goes on from the file with all things new."""
    first = [copy.deepcopy(each) for each in callbacks]
    before = fit(root / "first", Regressor(), case.data(), *first, max_epochs=1)
    before.save_checkpoint(root / "last.ckpt")
    return fit(root, Regressor(), case.data(), *callbacks, ckpt_path=root / "last.ckpt")


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(samples(12))


def from_yaml(case: Case, root: Path, callbacks: tuple[Any, ...]) -> Any:
    """`python train.py fit --config config.yaml`: the monitor is made by the command line."""
    note, *monitors = callbacks
    root.mkdir()
    lines = [
        "trainer: {accelerator: cpu, max_epochs: 2, log_every_n_steps: 1, enable_checkpointing: false,",
        "  enable_progress_bar: false, enable_model_summary: false, num_sanity_val_steps: 0,",
        f"  logger: {{class_path: CSVLogger, init_args: {{save_dir: {root}, name: logs, version: 0}}}},",
    ]
    lines += ["  callbacks: [{class_path: lightning_eoss.SharpnessMonitor, init_args: {every_n_train_steps: 2,"] * len(
        monitors
    )
    lines += [f"    num_batches: 2, rel_error: {REL_ERROR}}}}}]"] * len(monitors)
    (root / "config.yaml").write_text("\n".join([*lines, "}"]))
    made = {"trainer_defaults": {"callbacks": note}, "save_config_callback": None, "seed_everything_default": 0}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jsonargparse's, by Lightning's own use of it
        patch.setattr(sys, "argv", ["train.py", "fit", "--config", str(root / "config.yaml")])
        return LightningCLI(Regressor, Data, **made).trainer


def in_fabric(root: Path) -> None:
    """A loop by hand measures before each step."""
    states, values = [], []
    for watched in (False, True):
        seeded()
        fabric = Fabric(accelerator="cpu", devices=1)
        plain = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.0), nn.Tanh(), nn.Linear(5, 2))
        net, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        for batch in fabric.setup_dataloaders(loader(samples(12), shuffle=True)):
            if watched:
                result = measure_sharpness(
                    net, squared_error, samples(12), batch_size=4, num_batches=2, rel_error=REL_ERROR
                )
                whole = tuple(each.double() for each in samples(12).tensors)
                dense = dense_gradient_and_hessian(copy.deepcopy(plain).double(), squared_error, whole)[1]
                values.append((result.full_batch.value, top(dense)))
            optimizer.zero_grad()
            fabric.backward(squared_error(net, batch))
            optimizer.step()
        states.append({"weights": net.state_dict(), "generators": generators()})
    assert_same(states[1], states[0])
    for value, expected in values:
        assert value == pytest.approx(expected, rel=SOLVED)


PASS_LOSS = "pass `loss_fn=`"

TRAINERS = [
    Case("`accumulate_grad_batches=2`", options={"accumulate_grad_batches": 2}),
    Case(
        "`fast_dev_run=2`",
        options={"fast_dev_run": 2},
        chunks=lambda data: loader(Subset(samples(12), range(8))),
        note="`history` has the numbers, loggers are off",
    ),
    Case(
        "`barebones=True`",
        Silent,
        options={"barebones": True, "logger": None, "enable_checkpointing": None, "log_every_n_steps": None}
        | dict.fromkeys(("enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")),
        note="`history` has the numbers, loggers are off",
    ),
    Case("`detect_anomaly=True`", options={"detect_anomaly": True}),
    Case(
        "manual optimisation",
        Manual,
        measured="refused",
        says=("SharpnessMonitor cannot evaluate a module with automatic_optimization=False",),
        note=PASS_LOSS,
    ),
    Case(
        "manual optimisation, with `loss_fn=`",
        Manual,
        monitor=lambda: {"loss_fn": lambda module, batch: module.loss(batch)},
    ),
    Case(
        "two optimizers (a GAN), with `loss_fn=`",
        Adversarial,
        monitor=lambda: {"loss_fn": lambda module, batch: module.loss(batch)},
        says=("no threshold, edge ratio or phase is shown: there are 2 optimizers",),
        note="the Hessian of that loss by the parameters of both",
    ),
    Case("`torch.compile` of a submodule", compiled_submodule, twin=Regressor, slow=True),
    Case("`torch.compile` of the LightningModule", compiled_module, twin=Silent, slow=True),
    Case("resumed from a checkpoint", train=resumed),
    Case("`LightningCLI`, from YAML", train=from_yaml),
    Case(
        "Fabric, `measure_sharpness` in the loop",
        by_hand=in_fabric,
        current=None,
    ),
]
