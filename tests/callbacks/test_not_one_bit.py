"""The guarantee: a run with the monitor and one without are the same, to the last bit.

Each case is a training with a habit that measuring could disturb. It runs twice from the same seeds, once watched. All
that training can see must be equal at the end, and every cell of `metrics.csv` on the way.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from tests.cases import CASES, run, unwatched
from tests.habits.data import Stream
from tests.habits.modules import (
    Case,
    Collecting,
    Habitual,
    accumulation,
    batch_norm,
    collecting,
    dropout,
    parameter_hooks,
)
from tests.runs import Regressor, assert_same, cells, loader, monitor, points, seeded, state_of, trainer_of


@pytest.mark.filterwarnings("ignore:.*SharpnessMonitor:UserWarning")
@pytest.mark.filterwarnings("ignore:SharpnessMonitor:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_watched_run_is_the_same_run(case: Any, tmp_path: Path) -> None:
    state, logged = unwatched(case)
    watch = monitor(raw=True)  # shows nothing more where limits are one number
    _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, state)
    assert cells(tmp_path / "watched") == logged
    shown = points(tmp_path / "watched")
    needed = {"sharpness/MiniBS", "sharpness/FullBS", "sharpness/directional", "sharpness/current_batch", "cost/share"}
    assert needed <= shown.keys()
    assert all(len(shown[tag]) >= 2 for tag in needed)


@pytest.mark.filterwarnings("ignore:SharpnessMonitor:UserWarning")
@pytest.mark.parametrize("case", [batch_norm, accumulation, collecting])
def test_a_share_of_wall_time_changes_nothing_either(case: Any, tmp_path: Path) -> None:
    """What is measured when depends on the clock, and training on none of it."""
    state, logged = unwatched(case)
    watch = monitor(None, overhead=0.5)
    _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, state)
    assert cells(tmp_path / "watched") == logged
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
