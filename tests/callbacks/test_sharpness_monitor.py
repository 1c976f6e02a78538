"""The numbers that the monitor shows, where it shows them, and how it goes on after an interruption."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_eoss import SharpnessMonitor, measure_sharpness
from lightning_eoss.callbacks import sharpness
from lightning_eoss.display import tags
from lightning_eoss.theory.statistics import PHASES
from lightning_eoss.training import schedule as agenda
from lightning_eoss.training import watch as watch_module
from tests.problems import collated, dense_gradient_and_hessian, squared_error, top
from tests.runs import Regressor, cells, fit, loader, monitor, points, samples, seeded, trainer_of

DOUBLE = torch.float64
OWN = ("sharpness", "cost")  # the rest has to be asked for
WITH_INTERVAL = [tag for tag in tags.WITH_INTERVAL if tag.split("/")[0] in OWN]
INTERVALS = {end for tag in WITH_INTERVAL for end in tags.interval(tag)}
ADAPTIVE = {tags.PRECONDITIONER_SMALLEST, tags.PRECONDITIONER_MEDIAN, tags.PRECONDITIONER_LARGEST, tags.EPS_SHARE}
# With momentum, as `Regressor` has.
EVERY_TAG = {tag for tag in tags.DESCRIPTIONS if tag.split("/")[0] in OWN} - ADAPTIVE | INTERVALS


class Note(Callback):
    """Notes what the monitor meets: weights, batch and generators at each batch, and the rate of each step."""

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.batches: list[Any] = []
        self.generators: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.modules.append(copy.deepcopy(pl_module.net))
        self.batches.append(batch)
        self.generators.append(torch.get_rng_state())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def regressor(net: nn.Module | None = None, **options: Any) -> Regressor:
    """In float64, from a seed."""
    seeded()
    return Regressor(net, **options).double()


def doubles(num_samples: int = 24) -> Any:
    return samples(num_samples, dtype=DOUBLE)


def dense_top(model: nn.Module, batch: Any, loss_fn: Any = squared_error) -> float:
    return top(dense_gradient_and_hessian(model, loss_fn, batch)[1])


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_every_tag_is_logged_at_the_x_of_the_loss(tmp_path: Path) -> None:
    note, watch = Note(), monitor(2)
    fit(tmp_path, regressor(), loader(doubles()), note, watch, max_epochs=2)
    shown = points(tmp_path)
    assert shown.keys() == EVERY_TAG
    for tag, values in shown.items():
        assert list(values) == ([4, 6, 8, 10] if tag == tags.PHASE else [0, 2, 4, 6, 8, 10]), tag
    assert set(shown[tags.PHASE].values()) <= set(map(float, range(len(PHASES))))
    assert set(shown[tags.EDGE].values()) == {1.0} and set(shown[tags.BATCH_SIZE].values()) == {4.0}
    losses = {int(row["step"]): float(row["train_loss_step"]) for row in cells(tmp_path) if "train_loss_step" in row}
    for step in shown[tags.MINI_BS]:
        assert losses[step] == pytest.approx(squared_error(note.modules[step], note.batches[step]).item())
    assert [{tag: point[tag] for tag in point if tag != "step"} for point in watch.history] == [
        {tag: values[step] for tag, values in shown.items() if step in values} for step in (0, 2, 4, 6, 8, 10)
    ]


def test_full_and_current_batch_are_those_of_dense_hessians(tmp_path: Path) -> None:
    note = Note()
    fit(tmp_path, regressor(), loader(doubles(), shuffle=True), note, monitor(3, rel_error=0.01))
    shown = points(tmp_path)
    for step, value in shown[tags.FULL_BS].items():
        model, batch = note.modules[step], note.batches[step]
        assert value == pytest.approx(dense_top(model, doubles().tensors), rel=1e-3)
        assert shown[tags.CURRENT_BATCH][step] == pytest.approx(dense_top(model, batch), rel=1e-3)
        assert shown[tags.THRESHOLD][step] == pytest.approx(2 * 1.5 / 0.05)
        assert shown[tags.EDGE_RATIO_FULL_BS][step] == pytest.approx(value * 0.05 / 3)
        assert shown[tags.EDGE_RATIO][step] == pytest.approx(shown[tags.MINI_BS][step] * 0.05 / 3)
        assert shown[tags.GAP][step] == pytest.approx(shown[tags.MINI_BS][step] - value)
        for tag in WITH_INTERVAL:
            lower, upper = (shown[end][step] for end in tags.interval(tag))
            assert lower < shown[tag][step] < upper


def test_mini_and_directional_are_means_over_all_batches(tmp_path: Path) -> None:
    """Eight samples make seventy batches of four."""
    data, note = doubles(8), Note()
    fit(tmp_path, regressor(), loader(data), note, monitor(2, rel_error=0.01, num_batches=100), max_epochs=3)
    shown = points(tmp_path)
    for step, value in shown[tags.MINI_BS].items():
        each = [dense_gradient_and_hessian(note.modules[step], squared_error, collated(data, [i])) for i in range(8)]
        gradients, hessians = (torch.stack(column) for column in zip(*each, strict=True))
        tops, ratios = [], []
        for indices in map(list, itertools.combinations(range(8), 4)):  # the loss is a mean over samples
            gradient, hessian = gradients[indices].mean(0), hessians[indices].mean(0)
            tops.append(top(hessian))
            ratios.append(float(gradient @ hessian @ gradient / gradient.square().sum()))
        for tag, expected in ((tags.MINI_BS, tops), (tags.DIRECTIONAL, ratios)):
            mean = sum(expected) / len(expected)
            half_width = (shown[tags.interval(tag)[1]][step] - shown[tags.interval(tag)[0]][step]) / 2
            assert abs(shown[tag][step] - mean) <= 2 * half_width  # four standard errors
            assert half_width < 0.15 * mean
        alone = measure_sharpness(
            note.modules[step], squared_error, data, batch_size=4, rel_error=0.01, num_batches=100, seed=5
        )
        assert alone.mini_batch.lower <= shown[tags.interval(tags.MINI_BS)[1]][step]
        assert alone.mini_batch.upper >= shown[tags.interval(tags.MINI_BS)[0]][step]
        assert alone.full_batch.value == pytest.approx(shown[tags.FULL_BS][step], rel=1e-3)
        assert value > shown[tags.FULL_BS][step]


def test_the_current_window_has_its_own_dropout_masks(tmp_path: Path) -> None:
    """Seven batches, three a step: the short last window keeps the divisor three."""
    note = Note()
    module = regressor(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)))
    watch = monitor(1, rel_error=0.01)
    fit(tmp_path, module, loader(doubles(28), shuffle=True), note, watch, accumulate_grad_batches=3)
    windows = [range(3), range(3, 6), range(6, 7), range(7, 10), range(10, 13), range(13, 14)]

    def loss_of_window(model: Any, window: Any) -> Tensor:
        terms = []
        for index in window:
            torch.set_rng_state(note.generators[index])
            terms.append(squared_error(model, note.batches[index]))
        return torch.stack(terms).sum() / 3

    shown = points(tmp_path)
    assert list(shown[tags.CURRENT_BATCH]) == list(range(6))
    for step, window in enumerate(windows):
        expected = dense_top(note.modules[window[-1]], window, loss_of_window)
        assert shown[tags.CURRENT_BATCH][step] == pytest.approx(expected, rel=1e-3)
    assert shown[tags.BATCH_SIZE] == {step: 4.0 * len(window) for step, window in enumerate(windows)}


class Warming(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_the_threshold_follows_the_rate_that_is_applied(tmp_path: Path) -> None:
    note = Note()
    fit(tmp_path, Warming(), loader(), note, monitor(2))
    shown = points(tmp_path)
    assert note.rates[0] == 0.0
    assert shown[tags.THRESHOLD] == pytest.approx({step: 3 / note.rates[step] for step in (2, 4, 6, 8, 10)})
    assert shown[tags.EDGE_RATIO][0] == 0.0  # a step of length zero is stable
    for step in (2, 4, 6, 8, 10):
        assert shown[tags.EDGE_RATIO][step] == pytest.approx(shown[tags.MINI_BS][step] * note.rates[step] / 3)


class Grouped(Regressor):
    """Three rates; the first layer decays, and the last bias is not trained."""

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[2]
        return torch.optim.SGD(
            [
                {"params": first.parameters(), "lr": 0.1, "weight_decay": 0.5},
                {"params": [last.weight], "lr": 0.02, "momentum": 0.9},
            ],
            lr=1.0,
        )


def test_rates_that_differ_are_the_coordinates(tmp_path: Path) -> None:
    seeded()
    note, module = Note(), Grouped().double()
    with pytest.warns(UserWarning, match="the stability limits differ between parameters") as warned:
        fit(tmp_path, module, loader(doubles()), note, monitor(3, rel_error=0.01))
    assert len([each for each in warned if "SharpnessMonitor" in str(each.message)]) == 1
    shown = points(tmp_path)
    edges = {tags.EDGE_RATIO, *tags.interval(tags.EDGE_RATIO), tags.EDGE_RATIO_FULL_BS, tags.EDGE_RATIO_DIRECTIONAL}
    costs = {tag for tag in EVERY_TAG if tag.startswith("cost/")}
    assert shown.keys() == edges | costs | {tags.EDGE, tags.PHASE, tags.BATCH_SIZE}
    sizes = [parameter.numel() for parameter in module.parameters()]
    limits = torch.cat(
        [torch.full((size,), limit) for size, limit in zip(sizes, (20.0, 20.0, 190.0, math.inf), strict=True)]
    )
    decay = torch.cat([torch.full((size,), each) for size, each in zip(sizes, (0.5, 0.5, 0.0, 0.0), strict=True)])
    factors = limits.double().rsqrt()
    for step, value in shown[tags.EDGE_RATIO_FULL_BS].items():
        _, hessian = dense_gradient_and_hessian(note.modules[step], squared_error, doubles().tensors)
        scaled = factors[:, None] * (hessian + decay.double().diag()) * factors
        assert value == pytest.approx(top(scaled), rel=1e-3)
        assert shown[tags.EDGE][step] == 1.0


class Adaptive(Regressor):
    """AdamW with an eps that outweighs some gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.8, 0.9), eps=0.05, weight_decay=0.5)


class NoteState(Note):
    """Notes the second moments as well."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def adaptive_run(root: Path, **options: Any) -> NoteState:
    seeded()
    note = NoteState()
    with pytest.warns(UserWarning, match="the stability limits differ between parameters"):
        fit(root, Adaptive().double(), loader(doubles()), note, monitor(3, rel_error=0.01, **options))
    return note


def test_adaptive_optimizers_are_judged_by_their_preconditioner_from_their_first_step_on(tmp_path: Path) -> None:
    note = adaptive_run(tmp_path)
    shown = points(tmp_path)
    assert list(shown[tags.EDGE_RATIO]) == [1, 3, 6, 9]  # before its first step Adam has no limits
    assert shown.keys() >= ADAPTIVE and not shown.keys() & {tags.MINI_BS, tags.THRESHOLD, tags.FULL_BS}
    for step, value in shown[tags.EDGE_RATIO_FULL_BS].items():
        moments = torch.cat([state["exp_avg_sq"].reshape(-1) for state in note.states[step].values()])
        curvature = (moments / (1 - 0.9**step)).sqrt()
        factors = ((curvature + 0.05) * (1 - 0.8**step) * 1.8 / 0.2 * (2 / 0.01 - 0.5)).rsqrt()
        _, hessian = dense_gradient_and_hessian(note.modules[step], squared_error, doubles().tensors)
        assert value == pytest.approx(top(factors[:, None] * hessian * factors), rel=1e-3)
        assert shown[tags.PRECONDITIONER_SMALLEST][step] == pytest.approx(float(curvature.min()) + 0.05, rel=1e-5)
        assert shown[tags.PRECONDITIONER_MEDIAN][step] == pytest.approx(float(curvature.median()) + 0.05, rel=1e-5)
        assert shown[tags.PRECONDITIONER_LARGEST][step] == pytest.approx(float(curvature.max()) + 0.05, rel=1e-5)
        assert shown[tags.EPS_SHARE][step] == pytest.approx(float((curvature <= 0.05).double().mean()))
    assert 0 < min(shown[tags.EPS_SHARE].values()) < 1


def test_raw_adds_the_sharpness_itself(tmp_path: Path) -> None:
    adaptive_run(tmp_path / "scaled")
    note = adaptive_run(tmp_path / "both", raw=True)
    scaled, both = points(tmp_path / "scaled"), points(tmp_path / "both")
    assert both[tags.EDGE_RATIO] == scaled[tags.EDGE_RATIO]
    raw = {*(tag for tag in WITH_INTERVAL if "edge" not in tag), tags.FULL_BS, tags.CURRENT_BATCH}
    assert both.keys() - scaled.keys() == raw | {end for tag in raw & {*WITH_INTERVAL} for end in tags.interval(tag)}
    for step in (1, 3, 6, 9):
        assert both[tags.COST_HVPS][step] > 1.5 * scaled[tags.COST_HVPS][step]
        full, current = (dense_top(note.modules[step], each) for each in (doubles().tensors, note.batches[step]))
        assert both[tags.FULL_BS][step] == pytest.approx(full, rel=1e-3)
        assert both[tags.CURRENT_BATCH][step] == pytest.approx(current, rel=0.01)


def test_the_preconditioner_has_a_histogram_in_decades(tmp_path: Path) -> None:
    seeded()
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="the stability limits differ"):
        trainer = fit(tmp_path, Adaptive(), loader(), monitor(5), logger=logger)
    second = torch.cat([each["exp_avg_sq"].reshape(-1) for each in trainer.optimizers[0].state.values()])
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    shown = {event.step: event.histogram_value for event in events.Histograms(tags.PRECONDITIONER)}
    assert list(shown) == [1, 5, 10]
    for histogram in shown.values():
        assert histogram.num == len(second) == 37
        assert math.log10(0.05) - 1e-6 <= histogram.min < histogram.max < 1


class Partial(Regressor):
    """One rate, for the last layer alone."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:SharpnessMonitor. the stability limits differ")
def test_what_no_optimizer_owns_does_not_count(tmp_path: Path) -> None:
    seeded()
    note = Note()
    fit(tmp_path, Partial().double(), loader(doubles()), note, monitor(3, rel_error=0.01))
    shown = points(tmp_path)
    for step, value in shown[tags.FULL_BS].items():
        _, hessian = dense_gradient_and_hessian(note.modules[step], squared_error, doubles().tensors)
        assert value == pytest.approx(top(hessian[-12:, -12:]), rel=1e-3)
        assert shown[tags.THRESHOLD][step] == pytest.approx(20)
        assert shown[tags.EDGE_RATIO_FULL_BS][step] == pytest.approx(value / 20)


class Signed(Regressor):
    def configure_optimizers(self) -> Any:
        return torch.optim.Rprop(self.parameters(), lr=0.01)


def test_an_optimizer_without_known_limits_has_no_threshold(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no threshold, edge ratio or phase is shown: (.|\n)*Rprop") as warned:
        fit(tmp_path, Signed(), loader(), monitor())
    assert len([each for each in warned if "SharpnessMonitor" in str(each.message)]) == 1
    edges = {tag for tag in EVERY_TAG if "edge" in tag}
    assert points(tmp_path).keys() == EVERY_TAG - edges - {tags.THRESHOLD, tags.THRESHOLD_SMALL_BATCH, tags.PHASE}


def test_another_batch_size_may_be_watched(tmp_path: Path) -> None:
    fit(tmp_path, Regressor(), loader(), monitor(batch_size=24, rel_error=0.01), accumulate_grad_batches=2)
    shown = points(tmp_path)
    assert set(shown[tags.BATCH_SIZE].values()) == {24.0}
    for step, value in shown[tags.FULL_BS].items():  # at b = N there is one batch
        assert shown[tags.MINI_BS][step] == pytest.approx(value, rel=5e-3)
        assert shown[tags.interval(tags.MINI_BS)[0]][step] == shown[tags.MINI_BS][step]


def test_training_may_unfreeze(tmp_path: Path) -> None:
    """A warm start of fewer parameters is of no use."""

    class Thawing(Regressor):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

    watch = monitor(3)
    fit(tmp_path, Thawing(), loader(), watch, max_epochs=2)
    assert list(points(tmp_path)[tags.FULL_BS]) == [0, 3, 6, 9]


# ---- where they go ---------------------------------------------------------------------------------------------------


def test_other_callbacks_can_watch(tmp_path: Path) -> None:
    watch = monitor()
    stop = EarlyStopping("sharpness/MiniBS", stopping_threshold=1e6, mode="min", patience=100)
    best = ModelCheckpoint(tmp_path / "best", monitor="sharpness/FullBS", filename="{epoch}", save_weights_only=True)
    trainer = fit(tmp_path, Regressor(), loader(), watch, stop, best, max_epochs=5, enable_checkpointing=True)
    assert trainer.current_epoch == 1 and stop.stopped_epoch == 0 and "threshold" in stop.stopping_reason_message
    last = watch.history[-1]
    assert float(best.best_model_score) == pytest.approx(last["sharpness/FullBS"])
    for tag, value in last.items():
        if tag != "step":
            assert float(trainer.callback_metrics[tag]) == pytest.approx(value)


def test_the_edge_ratio_is_on_the_progress_bar(tmp_path: Path) -> None:
    watch = monitor()
    trainer = fit(tmp_path, Regressor(), loader(), watch)
    assert trainer.progress_bar_metrics["edge_ratio"] == round(watch.history[-1][tags.EDGE_RATIO], 3)


def test_history_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "HISTORY", 8)
    watch = monitor(1)
    fit(tmp_path, Regressor(), loader(), watch)
    assert [point["step"] for point in watch.history] == [0, 4, 6, 7, 8, 9, 10, 11]


def test_the_metric_holds_the_last_measurement(tmp_path: Path) -> None:
    watch = monitor(2, num_batches=30)
    fit(tmp_path, regressor(), loader(doubles()), watch)
    values, last = watch.mini_batch_sharpness.compute(), watch.history[-1]
    assert float(values["mean"]) == pytest.approx(last[tags.MINI_BS], rel=1e-12)
    assert float(values["lower"]) == pytest.approx(last[tags.interval(tags.MINI_BS)[0]], rel=1e-12)


def test_no_logger_is_needed(tmp_path: Path) -> None:
    watch = monitor()
    fit(tmp_path, Regressor(), loader(), watch, logger=False)
    assert len(watch.history) == 6


def test_a_fast_run_works(tmp_path: Path) -> None:
    watch = monitor()
    fit(tmp_path, Regressor(), loader(), watch, fast_dev_run=True)
    assert [point["step"] for point in watch.history] == [0]


def test_a_logger_without_an_experiment_gets_the_scalars(tmp_path: Path) -> None:
    class Plain(CSVLogger):
        @property
        def experiment(self) -> Any:
            raise AttributeError

        def __init__(self) -> None:
            self.seen: list[int] = []

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.seen += [step] if tags.MINI_BS in metrics else []

        def log_hyperparams(self, *_: Any) -> None:
            pass

        def log_graph(self, *_: Any) -> None:
            pass

        def save(self) -> None:
            pass

        def finalize(self, status: str) -> None:
            pass

        name, version, log_dir, root_dir, save_dir = "plain", 0, None, None, None

    logger = Plain()
    fit(tmp_path, Regressor(), loader(), monitor(), logger=logger)
    assert logger.seen == [0, 2, 4, 6, 8, 10]


def test_all_loggers_get_the_same_and_tensorboard_a_dashboard(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board")
    csv = CSVLogger(tmp_path, name="logs", version=0)
    fit(tmp_path, Regressor(), loader(), monitor(), logger=[csv, board])
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    shown = points(tmp_path)
    ours = {tag for tag in events.Tags()["scalars"] if tag.startswith(("sharpness/", "cost/"))}
    assert ours == shown.keys()
    for tag, values in shown.items():
        seen = {event.step: event.value for event in events.Scalars(tag)}
        assert seen == pytest.approx(values, rel=1e-6)
    assert [event.step for event in events.Histograms(tags.LAMBDA_MAX)] == [0, 2, 4, 6, 8, 10]
    assert len(events.Tensors("custom_scalars__config__")) == 1
    (guide,) = events.Tensors(f"{tags.GUIDE}/text_summary")
    assert b"FullBS on all 24 samples" in guide.tensor_proto.string_val[0]


# ---- going on --------------------------------------------------------------------------------------------------------


class Decaying(Regressor):
    """Nothing random, so that training itself resumes exactly."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


CLOCK = ("cost/seconds", "cost/share", "cost/memory")  # the machine's, too


def stream(watch: SharpnessMonitor) -> list[dict[str, float]]:
    """The history without what depends on the clock."""
    return [{tag: value for tag, value in point.items() if tag not in CLOCK} for point in watch.history]


def interrupted(root: Path, first: SharpnessMonitor, second: SharpnessMonitor) -> tuple[Any, Path]:
    """Two epochs, and two more from the checkpoint."""
    seeded()
    trainer = fit(root / "first", Decaying(), loader(), first, max_epochs=2)
    path = root / "two-epochs.ckpt"
    trainer.save_checkpoint(path)
    seeded(1)
    return fit(root / "second", Decaying(), loader(), second, max_epochs=4, ckpt_path=path), path


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, first, second = monitor(4), monitor(4), monitor(4)
    seeded()
    trainer = fit(tmp_path / "whole", Decaying(), loader(), whole, max_epochs=4)
    resumed, path = interrupted(tmp_path, first, second)
    assert trainer.global_step == resumed.global_step == 24
    for one, other in zip(trainer.lightning_module.parameters(), resumed.lightning_module.parameters(), strict=True):
        assert torch.equal(one, other)  # else the next lines say nothing
    assert [point["step"] for point in whole.history] == [0, 4, 8, 12, 16, 20]
    assert stream(second) == stream(whole)
    assert [point["step"] for point in first.history] == [0, 4, 8]
    state = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    assert state["warm_start"][False]["top"].numel() == 37


def test_without_the_warm_start_the_numbers_agree_and_the_cost_does_not(tmp_path: Path) -> None:
    """How much a cold start would cost, and that the other one has none."""
    warm, cold = monitor(4, rel_error=0.01), monitor(4, rel_error=0.01, save_warm_start=False)
    for name, watch in (("warm", warm), ("cold", cold)):
        first = monitor(4, rel_error=0.01, save_warm_start=watch.save_warm_start)
        _, path = interrupted(tmp_path / name, first, watch)
        held = torch.load(path, weights_only=True)["callbacks"][watch.state_key]["warm_start"]
        assert bool(held) == (name == "warm")
    one, other = (next(point for point in watch.history if point["step"] == 12) for watch in (warm, cold))
    assert one["cost/hvps"] < other["cost/hvps"]
    assert one["cost/hvps"] < 0.8 * warm.history[0]["cost/hvps"]
    assert one[tags.FULL_BS] == pytest.approx(other[tags.FULL_BS], rel=1e-3)


def test_large_models_keep_no_warm_start_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sharpness, "SMALL_MODEL", 37)
    for save, kept in ((None, False), (True, True), (False, False)):
        watch = monitor(save_warm_start=save)
        fit(tmp_path / str(save), Regressor(), loader(), watch, max_steps=1)
        assert bool(watch.state_dict()["warm_start"]) == kept


def test_under_a_share_history_goes_on(tmp_path: Path) -> None:
    first, second = monitor(None, overhead=0.5), monitor(None, overhead=0.5)
    trainer, _ = interrupted(tmp_path, first, second)
    assert trainer.global_step == 24
    assert second.history[: len(first.history)] == first.history
    assert len(second.history) > len(first.history)
    steps = [point["step"] for point in second.history]
    assert steps == sorted(set(steps))


def test_a_resumed_run_obeys_its_own_arguments(tmp_path: Path) -> None:
    second = monitor(4, num_batches=12)
    interrupted(tmp_path, monitor(4), second)
    assert second.mini_batch_sharpness.moments[0] > 4


def test_two_monitors_keep_two_states(tmp_path: Path) -> None:
    watches = [monitor(2), monitor(3), monitor(2, batch_size=8), monitor(None), monitor(None, overhead=0.3)]
    assert len({watch.state_key for watch in watches}) == len(watches)
    trainer = trainer_of(tmp_path, watches[0], watches[1], logger=False)
    with pytest.warns(UserWarning, match="there are 2 of them .* write the same tags"):
        trainer.fit(Regressor(), loader())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert [len(states[watch.state_key]["history"]) for watch in watches[:2]] == [6, 4]


def test_a_monitor_may_watch_another_training(tmp_path: Path) -> None:
    """What was found out about one module does not hold for the next."""
    watch = monitor()
    fit(tmp_path / "one", Regressor(), loader(), watch)
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    fit(tmp_path / "two", Regressor(other), loader(batch_size=6), watch)
    assert len(watch.history) == 6 + 4
    assert watch.history[-1]["sharpness/batch_size"] == 6
    assert watch._warm[False].top.numel() == 4 * 3 + 3 + 6 + 6 + 2


def test_a_reloaded_loader_is_followed(tmp_path):
    """Data and batch size are those of the epoch, also where the loader is made anew for each."""

    class Growing(Regressor):
        def train_dataloader(self):
            return loader(samples(24, seed=self.current_epoch), batch_size=2 * (1 + self.current_epoch))

    module, watch = Growing(), monitor(1)
    fit(tmp_path, module, None, watch, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    sizes = [entry["sharpness/batch_size"] for entry in watch.history]
    assert sizes == [2.0] * 12 + [4.0] * 6
    assert torch.equal(watch.watch.data.source.dataset.tensors[0], samples(24, seed=1).tensors[0])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_writes_no_point_and_training_goes_on(tmp_path):
    """None means to Lightning that a batch is skipped, at the first measurement, too."""

    class Skipping(Regressor):
        def training_step(self, batch, batch_idx):
            return None if self.current_epoch == 0 else super().training_step(batch, batch_idx)

    watch = monitor(1)
    with pytest.warns(UserWarning, match="not finite"):
        fit(tmp_path, Skipping(), loader(), watch, max_epochs=2)
    assert all(entry["step"] >= 6 for entry in watch.history if tags.MINI_BS in entry)
    assert any(tags.MINI_BS in entry for entry in watch.history)


def test_divergence_is_said_once(tmp_path):
    """From the first loss that is not finite on there are no points; a warning says why."""
    watch = monitor(1, num_batches=2)
    with pytest.warns(UserWarning, match="the loss is not finite") as heard:
        fit(tmp_path, Regressor(learning_rate=1e30), loader(), watch, max_epochs=2)
    assert sum("the loss is not finite" in str(each.message) for each in heard) == 1


def test_a_schedule_that_comes_to_nothing_is_said(tmp_path, monkeypatch):
    """Under a share of wall time a short run may end before anything is paid for."""
    monkeypatch.setattr(agenda, "EAGER_SECONDS", 0.0)
    with pytest.warns(UserWarning, match="before the first measurement could be paid for"):
        fit(tmp_path, Regressor(), loader(), monitor(None, overhead=1e-6), max_epochs=1)
