"""What goes wrong while a training is watched costs measurements at most: the training is that of a run without us."""

import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_eoss import GradientNoiseInjector
from lightning_eoss.display import tags
from lightning_eoss.training.watch import _SHARED
from tests.killed import checkpointed, started
from tests.runs import (
    Regressor,
    assert_same,
    bytes_kept,
    cells,
    fit,
    loader,
    monitor,
    points,
    public_callback,
    samples,
    seeded,
    state_of,
    trainer_of,
)

MEASURING = ("GradientNoiseMonitor", "SharpnessMonitor", "SpectralDensityMonitor")  # by evaluating the loss

SEEN: list[int] = []  # steps of faults; a global, because what a module reaches is put back after a measurement
Fault = Callable[[Any, Any], None]  # of the module and the batch


def no_fault(module: Any, batch: Any) -> None:
    pass


class Faulty(Regressor):
    """Something happens when the loss is evaluated for a measurement."""

    def __init__(self, fault: Fault = no_fault) -> None:
        super().__init__()
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if "log" in vars(self):  # muted: it is not training that asks
            self.fault(self, batch)
        return super().training_step(batch, batch_idx)


def run(root: Path, module: Regressor, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    """From the same seed: training's state and log, and the weights."""
    seeded()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module.net.load_state_dict(Regressor().net.state_dict())
    trainer = fit(root, module, loader(shuffle=True), *callbacks, **options)
    return state_of(trainer), cells(root)


def history(name_or_monitor: Any) -> list[int]:
    """The steps that were measured."""
    return [int(point["step"]) for point in name_or_monitor.history]


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURING)
def test_an_error_in_a_measurement_is_a_warning(name: str, tmp_path: Path) -> None:
    def fault(module: Any, batch: Any) -> None:
        if module.trainer.global_step == 4:
            raise RuntimeError("on purpose")

    callback = public_callback(name)
    with pytest.warns(UserWarning, match=f"{name}: a measurement failed.*training goes on. RuntimeError: on purpose"):
        watched = run(tmp_path / "watched", Faulty(fault), callback)
    assert_same(watched, run(tmp_path / "alone", Faulty()))
    assert history(callback) == [0, 2, 6, 8, 10]


def test_what_never_works_is_tried_ever_more_rarely_and_said_once(tmp_path: Path) -> None:
    SEEN.clear()

    def fault(module: Any, batch: Any) -> None:
        if module.trainer.global_step:
            SEEN.append(module.trainer.global_step)
            raise RuntimeError(f"on purpose, for the {len(SEEN)}. time")

    with pytest.warns(UserWarning, match="a measurement failed") as said:
        run(tmp_path, Faulty(fault), monitor(1), max_epochs=8)
    assert SEEN == [1, 2, 4, 8, 16, 32]
    assert len([each for each in said if "a measurement failed" in str(each.message)]) == 1


def test_a_first_measurement_ends_only_a_training_that_has_hardly_begun(tmp_path: Path) -> None:
    def fault(module: Any, batch: Any) -> None:
        raise RuntimeError("on purpose")

    class Later(Callback):
        """A minute later."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            watch.watch.began -= 61

    with pytest.raises(RuntimeError, match="on purpose") as raised:
        run(tmp_path / "early", Faulty(fault), monitor())
    assert any("SharpnessMonitor met this at its first measurement" in note for note in raised.value.__notes__)
    watch = monitor()
    with pytest.warns(UserWarning, match="a measurement failed and is left out.*on purpose"):
        watched = run(tmp_path / "late", Faulty(fault), watch, Later())
    assert_same(watched, run(tmp_path / "alone", Faulty()))


# ---- samples that cannot be loaded -----------------------------------------------------------------------------------


class Opened(Dataset[Any]):
    """Reads from a file that each worker opens for itself."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.file.seek(4 * 6 * index)  # type: ignore[attr-defined]
        numbers = torch.frombuffer(bytearray(self.file.read(4 * 6)), dtype=torch.float32)  # type: ignore[attr-defined]
        return numbers[:4], numbers[4:]


def opens(_worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    info.dataset.file = info.dataset.path.open("rb")  # type: ignore[union-attr]


@pytest.fixture
def by_workers(tmp_path: Path) -> DataLoader[Any]:
    """The usual samples, from a file that only a worker has open."""
    rows = torch.cat(samples().tensors, dim=1)
    path = tmp_path / "samples"
    path.write_bytes(rows.numpy().tobytes())
    return DataLoader(Opened(path), 4, num_workers=1, worker_init_fn=opens)


@pytest.mark.processes
@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning", "ignore:.*single samples have no:UserWarning")
def test_samples_that_only_workers_can_load(name: str, by_workers: DataLoader[Any], tmp_path: Path) -> None:
    def trained(where: str, *callbacks: Any) -> Any:
        seeded()
        return state_of(fit(tmp_path / where, Regressor(), by_workers, *callbacks, max_epochs=1))

    alone, callback = trained("alone"), public_callback(name)
    with pytest.warns(UserWarning, match=f"{name}: a measurement failed.*'seek'.*dataloader=list") as said:
        assert_same(trained("watched", callback), alone)
    assert not callback.history
    assert len([each for each in said if "'seek'" in str(each.message)]) == 1
    # The way out that it names.
    callback = type(callback)(every_n_train_steps=2, dataloader=list(by_workers))
    assert_same(trained("out", callback), alone)
    assert history(callback) == [0, 2, 4]


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_the_injector_says_that_it_is_the_samples(by_workers: DataLoader[Any], tmp_path: Path) -> None:
    """Its steps cannot do without them; the loss is not to blame."""
    with pytest.raises(AttributeError, match="'seek'") as raised:
        fit(tmp_path, Regressor(), by_workers, GradientNoiseInjector(), max_epochs=1)
    assert any("dataloader=list" in note for note in raised.value.__notes__)


def test_refusals_name_one_way_out(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples())

    with pytest.raises(MisconfigurationException, match="Pass dataloader=") as raised:
        fit(tmp_path, Regressor(), DataLoader(Stream(), 4), monitor())
    assert not getattr(raised.value, "__notes__", ())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("on purpose")])
def test_nothing_is_shared_after_the_end(error: BaseException, tmp_path: Path) -> None:
    """The first of two monitors ends training in the midst of its measurement."""

    def fault(module: Any, batch: Any) -> None:
        SEEN.append(0)
        if len(SEEN) == 12:
            raise error

    SEEN.clear()
    trainer = trainer_of(tmp_path, monitor(), public_callback("GradientNoiseMonitor"))
    with pytest.raises((SystemExit, KeyboardInterrupt, RuntimeError)):
        trainer.fit(Faulty(fault), loader())
    assert len(SEEN) == 12
    assert trainer not in _SHARED


def test_a_step_that_goes_on_after_a_checkpoint_has_lost_its_first_half(tmp_path: Path) -> None:
    """Two of four batches were behind it, and their gradients are not in the checkpoint."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    class Stepped(Regressor):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            gradients.append([each.grad.clone() for each in self.parameters()])

    gradients: list[list[Tensor]] = []
    fit(tmp_path / "first", Stepped(), loader(), Saves(), max_steps=1, accumulate_grad_batches=4)
    watch, module = monitor(1, rel_error=1e-3), Stepped()
    gradients.clear()
    options = {"max_epochs": 1, "accumulate_grad_batches": 4}
    fit(tmp_path / "again", module, loader(), watch, ckpt_path=tmp_path / "half.ckpt", **options)
    first = next(point for point in watch.history if point["step"] == 0)
    assert first["sharpness/batch_size"] == 8  # of two batches
    # The gradient of that very step says so, too: half of the mean of two.
    saved = Stepped()
    saved.load_state_dict(torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"])
    inputs, targets = samples().tensors
    half = torch.autograd.grad(
        saved.loss((inputs[:8], targets[:8])) / 2, list(saved.parameters())
    )  # loaders start anew
    torch.testing.assert_close(gradients[0], list(half))
    full = [point for point in watch.history if point["step"] == 1]
    assert full[0]["sharpness/batch_size"] == 8  # the epoch's end: two of four


def test_a_loader_of_ones_own_that_fails_is_said_to(tmp_path: Path) -> None:
    class Broken(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise OSError("no such file")

    with pytest.warns(UserWarning, match=r"a measurement failed.*OSError: no such file This came up while samples"):
        watched = run(tmp_path / "watched", Faulty(), monitor(dataloader=Broken()))
    assert_same(watched, run(tmp_path / "alone", Faulty()))


# ---- interrupts ------------------------------------------------------------------------------------------------------


class Interrupt(Callback):
    """Presses Ctrl+C before a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("name", MEASURING)
def test_a_signal_in_a_measurement_is_one_before_the_step(name: str, tmp_path: Path) -> None:
    def fault(module: Any, batch: Any) -> None:
        if module.trainer.global_step == 4:
            module.net[0].weight.requires_grad_(False)
            signal.raise_signal(signal.SIGINT)

    states = []
    for where, module, callback in (
        ("alone", Faulty(), Interrupt()),
        ("watched", Faulty(fault), public_callback(name)),
    ):
        seeded()
        trainer = trainer_of(tmp_path / where, callback)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            module.net.load_state_dict(Regressor().net.state_dict())
        with pytest.raises(SystemExit):
            trainer.fit(module, loader(shuffle=True))
        assert trainer.interrupted and trainer.global_step == 4
        assert not {"log", "log_dict", "print"} & vars(module).keys()
        states.append(state_of(trainer))
    assert_same(states[1], states[0])


# ---- losses that are not finite --------------------------------------------------------------------------------------


class Dips(Regressor):
    """The loss is NaN for some steps, which go nowhere then, as those that a GradScaler skips."""

    steps = range(0)

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        return loss * torch.nan if self.trainer.global_step in self.steps else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            torch.nan_to_num_(parameter.grad, nan=0.0)


@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.parametrize(("dip", "seen"), [(range(4), [4, 6, 8, 10]), (range(3, 8), [0, 2, 8, 10])])
@pytest.mark.filterwarnings("ignore:.*not finite:UserWarning")
def test_losses_that_are_not_finite_for_a_while(dip: range, seen: list[int], name: str, tmp_path: Path) -> None:
    class Dipping(Dips):
        steps = dip

    callback = public_callback(name)
    watched = run(tmp_path / "watched", Dipping(), callback)
    alone = run(tmp_path / "alone", Dipping())
    for state, _ in (watched, alone):
        del state["metrics"]  # NaN is not NaN
    assert_same(watched, alone)
    main = {"GradientNoiseMonitor": tags.NOISE_MEASURED, "SharpnessMonitor": tags.FULL_BS}
    assert list(points(tmp_path / "watched")[main.get(name, tags.SPECTRUM_LARGEST)]) == seen


# ---- memory ----------------------------------------------------------------------------------------------------------

ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "80000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def holds(most: int, error: Exception, since: int = 0) -> Fault:
    """Memory for so many samples at once."""

    def fault(module: Any, batch: Any) -> None:
        if module.trainer.global_step >= since and len(batch[0]) > most:
            SEEN.append(module.trainer.global_step)
            raise type(error)(*error.args)  # a new one: an error holds on to all frames that it came through

    return fault


@cache
def with_memory(name: str) -> tuple[Any, Any]:
    """A callback in a run where memory is enough, and what that leaves behind: once for all that compare with it."""
    callback = public_callback(name)
    with tempfile.TemporaryDirectory() as folder:
        return callback, run(Path(folder), Faulty(), callback, max_epochs=1)


@pytest.mark.parametrize(("since", "error"), [(0, ON_CUDA), (2, ON_CPU)], ids=["CUDA", "CPU"])
@pytest.mark.parametrize("name", MEASURING)
def test_less_at_once_where_memory_runs_out(name: str, since: int, error: Exception, tmp_path: Path) -> None:
    """Batches of training's size fit, and the full batch does not: it goes in pieces, with the same result."""
    SEEN.clear()
    callback = public_callback(name)
    watched = run(tmp_path, Faulty(holds(8, error, since)), callback, max_epochs=1)
    assert set(SEEN) == {since}  # what was learned of memory stays
    free, expected = with_memory(name)
    assert_same(watched, expected)
    assert history(callback) == history(free) == [0, 2, 4]
    measured = {"GradientNoiseMonitor": tags.NOISE_NORM, "SharpnessMonitor": tags.FULL_BS}
    tag = measured.get(name, tags.SPECTRUM_LARGEST)
    # Equal but for the order of sums, and for where a solver stops on the way to its residual.
    assert [each[tag] for each in callback.history] == pytest.approx([each[tag] for each in free.history], rel=1e-3)


@pytest.mark.parametrize(("since", "error"), [(0, ON_CUDA), (2, ON_CPU)], ids=["CUDA", "CPU"])
@pytest.mark.parametrize("name", MEASURING)
def test_where_nothing_fits_nothing_is_measured(name: str, since: int, error: Exception, tmp_path: Path) -> None:
    callback = public_callback(name)
    with pytest.warns(UserWarning, match=f"{name}: a measurement failed and is left out.*memory"):
        watched = run(tmp_path / "watched", Faulty(holds(0, error, since)), callback, max_epochs=1)
    assert_same(watched, run(tmp_path / "alone", Faulty(), max_epochs=1))
    assert history(callback) == list(range(0, since, 2))


@pytest.mark.parametrize("most", [0, 8])
@pytest.mark.filterwarnings("ignore:.*a measurement failed:UserWarning")
@pytest.mark.filterwarnings("ignore:Experiment logs directory:UserWarning")
def test_memory_that_runs_out_leaves_nothing_behind(most: int, tmp_path: Path) -> None:
    def watched() -> None:
        run(tmp_path, Faulty(holds(most, ON_CPU)), public_callback("SharpnessMonitor"), max_epochs=1)

    watched()
    assert bytes_kept(watched) == 0


# ---- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory:UserWarning")  # which the resumed run finds there
def test_a_run_that_is_killed_goes_on_as_one_without_us(tmp_path: Path) -> None:
    watching = (*MEASURING, "WeightDistanceMonitor")
    children = [started(tmp_path / where, names) for where, names in (("watched", watching), ("alone", ()))]
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [-signal.SIGKILL] * 2
    states = []
    for where, names in (("watched", watching), ("alone", ())):
        (last,) = (tmp_path / where).glob("*step=8.ckpt")
        trainer = checkpointed(tmp_path / where, "resumed", names, ckpt_path=last)
        assert trainer.global_step == 24
        states.append((state_of(trainer), cells(tmp_path / where / "resumed")))
    assert_same(states[0], states[1])
