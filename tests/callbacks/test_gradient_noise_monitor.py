"""`GradientNoiseMonitor` in real fits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_eoss import SharpnessMonitor
from lightning_eoss.callbacks import gradient_noise as module
from lightning_eoss.callbacks.gradient_noise import GradientNoiseMonitor
from lightning_eoss.display import tags
from lightning_eoss.theory.gradient_noise import sampling_factor
from lightning_eoss.training import monitor as training_monitor
from tests.cases import CASES, run, unwatched
from tests.habits.modules import batch_norm
from tests.problems import dense_gradient_and_hessian, squared_error
from tests.runs import Regressor, assert_same, cells, fit, loader, monitor, points, samples, seeded

PREDICTED = (tags.NOISE_TRACE, tags.NOISE_PREDICTED, tags.NOISE_SCALE)
ALWAYS = (tags.NOISE_MEASURED, tags.NOISE_NORM, tags.NOISE_COSINE, tags.NOISE_SECONDS)


def noise(**options: Any) -> GradientNoiseMonitor:
    return GradientNoiseMonitor(**{"every_n_train_steps": 5, "num_batches": 4, **options})


def doubles(count: int = 24) -> Any:
    return samples(count, dtype=torch.float64)


def regressor() -> Regressor:
    seeded()
    return Regressor().double()


@pytest.mark.filterwarnings("ignore:.*GradientNoiseMonitor:UserWarning")
@pytest.mark.filterwarnings("ignore:GradientNoiseMonitor:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_watched_run_is_the_same_run(case: Any, tmp_path: Path) -> None:
    state, logged = unwatched(case)
    watch = noise()
    _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, state)
    assert cells(tmp_path / "watched") == logged
    shown = points(tmp_path / "watched")
    assert len(watch.history) >= 1 and watch.findings is not None
    needed = ALWAYS + (PREDICTED if watch.findings.reduction == "mean" else ())
    assert all(len(shown[tag]) == len(watch.history) for tag in needed)


@pytest.mark.filterwarnings("ignore:GradientNoiseMonitor:UserWarning")
def test_a_share_of_wall_time_changes_nothing_either(tmp_path: Path) -> None:
    _, alone = run(batch_norm, tmp_path / "alone", max_epochs=20)
    watch = noise(every_n_train_steps=None, overhead=0.5)
    _, watched = run(batch_norm, tmp_path / "watched", watch, max_epochs=20)
    assert_same(watched, alone)
    assert watch.history and watch.agenda.spent <= 0.9 * watch.watch.elapsed


def test_the_numbers_are_those_of_dense_gradients(tmp_path: Path) -> None:
    """Accumulation of two batches of six: b = 12 of n = 24."""
    module, watch = regressor(), noise(num_batches=100, every_n_train_steps=100)
    net = Regressor().double().net
    net.load_state_dict(module.net.state_dict())
    fit(tmp_path, module, loader(doubles(), 6), watch, accumulate_grad_batches=2)
    inputs, targets = doubles().tensors
    rows = torch.stack(
        [
            dense_gradient_and_hessian(net, squared_error, (inputs[index : index + 1], targets[index : index + 1]))[0]
            for index in range(24)
        ]
    )
    gradient, hessian = dense_gradient_and_hessian(net, squared_error, (inputs, targets))
    trace, square = float((rows - gradient).square().sum(1).mean()), float(gradient @ gradient)
    shown = {tag: values[0] for tag, values in points(tmp_path).items()}
    assert shown[tags.NOISE_TRACE] == pytest.approx(trace)
    assert shown[tags.NOISE_NORM] == pytest.approx(square)
    assert shown[tags.NOISE_SCALE] == pytest.approx(trace / square)
    assert shown[tags.NOISE_PREDICTED] == pytest.approx(sampling_factor(12, 24) * trace)
    top = torch.linalg.eigh(hessian)[1][:, -1]
    assert shown[tags.NOISE_COSINE] == pytest.approx(float((top @ gradient).abs()) / square**0.5, rel=0.01)
    lower, upper = (shown[end] for end in tags.interval(tags.NOISE_MEASURED))
    assert lower <= shown[tags.NOISE_MEASURED] <= upper
    assert abs(shown[tags.NOISE_MEASURED] - shown[tags.NOISE_PREDICTED]) < upper - lower
    assert watch.latest is not None and watch.latest.batch_size == 12


FETCHED: list[tuple[int, ...]] = []  # a global, which no isolation puts back


class Counted(torch.utils.data.TensorDataset):
    """Notes the batches that are fetched."""

    def __getitems__(self, indices: list[int]) -> Any:
        FETCHED.append(tuple(indices))
        return [self[index] for index in indices]


def fetches(root: Path, *callbacks: Any) -> int:
    """How often the full batch of 24 was fetched before the first step."""
    FETCHED.clear()
    seeded()
    fit(root, Regressor(), loader(Counted(*samples().tensors)), *callbacks, max_steps=1)
    return FETCHED.count(tuple(range(24)))


def test_monitors_of_one_step_load_the_full_batch_once(tmp_path: Path) -> None:
    assert fetches(tmp_path / "nobody") == 0
    assert fetches(tmp_path / "noise", noise()) == 1
    assert fetches(tmp_path / "both", monitor(1), noise(every_n_train_steps=1)) == 1
    assert fetches(tmp_path / "turned", noise(every_n_train_steps=1), monitor(1)) == 1


def test_a_loss_that_is_no_mean_is_measured_with_one_warning(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match="not found to be a mean over its samples.*not predicted") as warned:
        fit(tmp_path, Regressor(net), loader(), noise())
    assert len([each for each in warned if "not predicted" in str(each.message)]) == 1
    shown = points(tmp_path)
    assert all(shown[tag] for tag in ALWAYS)
    assert not {*PREDICTED, tags.NOISE_CURVATURE_SCALE} & shown.keys()


def test_tensorboard_gets_the_curve_and_the_page(tmp_path: Path) -> None:
    seeded()
    logger = TensorBoardLogger(tmp_path, name="logs", version=0)
    fit(tmp_path, Regressor(), loader(), noise(), SharpnessMonitor(every_n_train_steps=5, num_batches=4), logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [image.step for image in events.Images(tags.NOISE_CURVE)] == [0, 5, 10]
    assert [scalar.step for scalar in events.Scalars(tags.NOISE_PREDICTED)] == [0, 5, 10]
    assert tags.GRADIENT_NOISE in noise().dashboard_categories


def test_what_exceeds_the_limit_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training_monitor.preflight

    def slow(*args: Any, **options: Any) -> Any:
        return module.replace(original(*args, **options), seconds=0.5)

    monkeypatch.setattr(training_monitor, "preflight", slow)
    watch = noise(max_seconds=60, num_batches=50)  # 60 passes over 24 samples would take 180 s, and 50 batches 25 s
    fit(tmp_path, Regressor(), loader(), watch, max_epochs=1)
    assert watch.plan is not None and watch.latest is not None
    assert watch.plan.full_batch_samples == watch.latest.num_samples == 6
    assert watch.plan.num_batches == 30
    assert watch.latest.dataset_size == 24


def test_the_warm_start_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    original = module.gradient_noise

    def watched(solver: Any, warm: Any, **options: Any) -> Any:
        starts.append(warm)
        return original(solver, warm, **options)

    monkeypatch.setattr(module, "gradient_noise", watched)
    watch = noise()
    fit(tmp_path, Regressor(), loader(), watch)
    assert len(starts) == 3 and starts[0].top is None
    assert all(start.top is not None and start.of_full for start in starts[1:])


def test_data_and_loss_of_its_own(tmp_path: Path) -> None:
    def doubled(pl_module: Any, batch: Any) -> Tensor:
        return 2 * pl_module.loss(batch)

    own = samples(10, seed=7)
    found = {}
    for name, options in (("plain", {}), ("doubled", {"loss_fn": doubled})):
        seeded()
        watch = noise(dataloader=loader(own, 5), **options)
        fit(tmp_path / name, Regressor(), loader(), watch, max_steps=1)
        assert watch.latest is not None and (watch.latest.dataset_size, watch.latest.batch_size) == (10, 5)
        found[name] = watch.latest
    assert found["doubled"].trace.mean == pytest.approx(4 * found["plain"].trace.mean, rel=1e-4)
    assert found["doubled"].scale.mean == pytest.approx(found["plain"].scale.mean, rel=1e-4)


def test_a_batch_size_of_its_own(tmp_path: Path) -> None:
    watch = noise(batch_size=7)
    fit(tmp_path, Regressor(), loader(), watch, max_steps=1, accumulate_grad_batches=2)
    assert watch.latest is not None and watch.latest.batch_size == 7


def test_ready_batches_have_no_other_size(tmp_path: Path) -> None:
    seeded()
    watch = noise(batch_size=2, dataloader=list(loader()))
    with pytest.raises(ValueError, match="batch_size=2 cannot be made of the ready batches"):
        fit(tmp_path, Regressor(), loader(), watch)


def test_a_resumed_monitor_keeps_its_history(tmp_path: Path) -> None:
    watch = noise()
    fit(tmp_path, Regressor(), loader(), watch)
    again = noise()
    again.load_state_dict(watch.state_dict())
    assert again.history == watch.history and len(again.history) == 3
    assert again.agenda.state_dict() == watch.agenda.state_dict()


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    histories = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        seeded()
        watch = noise(seed=seed)
        fit(tmp_path / name, Regressor(), loader(), watch, max_steps=1)
        histories.append({tag: value for tag, value in watch.history[0].items() if tag != tags.NOISE_SECONDS})
    assert histories[0] == histories[1]
    assert histories[0][tags.NOISE_MEASURED] != histories[2][tags.NOISE_MEASURED]
    assert histories[0][tags.NOISE_TRACE] == pytest.approx(histories[2][tags.NOISE_TRACE])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_batches": 1}, "num_batches=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"full_batch_samples": 0}, "full_batch_samples=0 must be positive"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"overhead": 0.1}, "are two schedules"),
        ({"max_seconds": 0}, "max_seconds=0"),
    ],
)
def test_bad_input_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise(**options)


def test_what_is_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="loss_fn="):
        noise(loss_fn=lambda module: None)
    with pytest.raises(TypeError, match=r"num_batches=2\.5 must be a whole number"):
        noise(num_batches=2.5)
