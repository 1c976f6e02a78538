"""`WeightDistanceMonitor` in real fits: the same run, known walks, resumed runs."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn

from lightning_eoss.callbacks import weights
from lightning_eoss.callbacks.weights import WeightDistanceMonitor
from lightning_eoss.display import tags
from lightning_eoss.theory.random_walk import distance_laws, next_look
from tests.cases import CASES, run, unwatched
from tests.runs import Regressor, assert_same, cells, fit, loader, points, seeded, trainer_of

LAWS = {tags.WEIGHTS_LOG_SLOPE, tags.WEIGHTS_LOG_R2, tags.WEIGHTS_POWER_EXPONENT, tags.WEIGHTS_POWER_R2}
each_kind = pytest.mark.parametrize("projection", [None, 16], ids=["copy", "sketch"])


def of(layer: str) -> str:
    return f"{tags.WEIGHTS_DISTANCE}/{layer}"


class Told(torch.optim.SGD):
    """Moves the weights along a path that is told, from wherever they are."""

    def __init__(self, parameters: Any, path: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.path, self.t = path, 0

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.t += 1
        moved = torch.as_tensor(self.path(self.t)) - torch.as_tensor(self.path(self.t - 1))
        with torch.no_grad():
            for group in self.param_groups:
                group["params"][0].view(-1)[: len(moved)] += moved
        return loss


class Walker(Regressor):
    def __init__(self, path: Any) -> None:
        super().__init__(nn.Linear(4, 2, dtype=torch.float64))
        self.path = path

    def loss(self, batch: Any) -> Any:
        return super().loss([each.double() for each in batch])

    def configure_optimizers(self) -> Any:
        return Told(self.parameters(), self.path)


class Keep(Callback):
    """The weights before each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        named = pl_module.named_parameters()
        self.weights.setdefault(trainer.global_step, {name: each.detach().clone() for name, each in named})

    def distance(self, step: int, layer: str = "") -> float:
        pairs = [(each, self.weights[0][name]) for name, each in self.weights[step].items() if name.startswith(layer)]
        return float(torch.cat([(now - then).flatten() for now, then in pairs]).norm())


@pytest.mark.filterwarnings("ignore:.*WeightDistanceMonitor:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_watched_run_is_the_same_run(case: Any, tmp_path: Path) -> None:
    state, logged = unwatched(case)
    watch = WeightDistanceMonitor(every_n_train_steps=1, projection=16)
    _, watched = run(case, tmp_path / "watched", watch)
    assert_same(watched, state)
    assert cells(tmp_path / "watched") == logged
    assert len(points(tmp_path / "watched")[tags.WEIGHTS_DISTANCE]) >= 2


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_distances_are_those_of_the_weights(tmp_path: Path) -> None:
    keep, watch = Keep(), WeightDistanceMonitor()
    seeded()
    fit(tmp_path, Regressor(), loader(), keep, watch, max_epochs=20)  # of 6 steps
    shown = points(tmp_path)
    looks = [step for step in range(1, 120) if next_look(step - 1, 20) == step]
    assert list(shown[tags.WEIGHTS_DISTANCE]) == looks
    for step in looks:
        assert shown[tags.WEIGHTS_DISTANCE][step] == pytest.approx(keep.distance(step), rel=1e-5)
        for layer in ("net.0", "net.2"):
            assert shown[of(layer)][step] == pytest.approx(keep.distance(step, layer), rel=1e-5)
    late = [step for step in looks if step >= 30]
    laws = distance_laws(late, [keep.distance(step) for step in late])
    assert shown[tags.WEIGHTS_LOG_SLOPE][late[-1]] == pytest.approx(laws.slope, rel=1e-4)
    assert shown[tags.WEIGHTS_POWER_R2][late[-1]] == pytest.approx(laws.power_r2, abs=1e-4)
    assert watch.latest.slope == shown[tags.WEIGHTS_LOG_SLOPE][late[-1]]


def test_the_law_of_a_known_walk_is_found(tmp_path: Path) -> None:
    """One entry goes to 0.5 + 2 log t; a power law does not do as well."""
    path = lambda t: torch.tensor([0.5 + 2 * math.log(t) if t else 0.0], dtype=torch.float64)  # noqa: E731
    fit(tmp_path, Walker(path), loader(), WeightDistanceMonitor(), max_epochs=100)
    shown, looks = points(tmp_path), list(points(tmp_path)[tags.WEIGHTS_DISTANCE])
    # Looks at 32, 35, 40, 45, 50, 56, 63, 71: the first that is twice 32 is 71.
    assert all(list(shown[tag]) == [step for step in looks if step >= 71] for tag in LAWS)
    assert all(value == pytest.approx(2.0, rel=1e-6) for value in shown[tags.WEIGHTS_LOG_SLOPE].values())
    assert all(value == pytest.approx(1.0, abs=1e-9) for value in shown[tags.WEIGHTS_LOG_R2].values())
    assert all(value < 0.9999 for value in shown[tags.WEIGHTS_POWER_R2].values())


def test_the_power_law_of_a_known_walk_is_found(tmp_path: Path) -> None:
    path = lambda t: torch.tensor([0.3 * t**0.5], dtype=torch.float64)  # noqa: E731
    watch = WeightDistanceMonitor(points_per_decade=10)
    fit(tmp_path, Walker(path), loader(), watch, max_epochs=100)
    assert (watch.latest.exponent, watch.latest.factor) == pytest.approx((0.5, 0.3), rel=1e-5)
    assert watch.latest.power_r2 > 0.999999 > watch.latest.log_r2


@each_kind
@pytest.mark.parametrize("turn", [0.0, 25.0, 90.0, 180.0])
def test_the_angle_of_known_displacements(turn: float, projection: int | None, tmp_path: Path) -> None:
    """A polygon, whose sides turn by the same angle each time. Ten parameters fit into sixteen numbers."""

    def path(t: int) -> torch.Tensor:
        sides = torch.arange(t, dtype=torch.float64) * math.radians(turn)
        return torch.stack([sides.cos().sum(), sides.sin().sum()])

    fit(tmp_path, Walker(path), loader(), WeightDistanceMonitor(every_n_train_steps=1, projection=projection))
    angles = points(tmp_path)[tags.WEIGHTS_ANGLE]
    assert list(angles) == list(range(2, 12))
    assert list(angles.values()) == pytest.approx([turn] * 10, abs=1e-5)


def test_weights_that_rest_have_neither_angle_nor_law(tmp_path: Path) -> None:
    fit(
        tmp_path,
        Walker(lambda t: torch.zeros(1, dtype=torch.float64)),
        loader(),
        WeightDistanceMonitor(),
        max_epochs=20,
    )
    assert points(tmp_path).keys() == {tags.WEIGHTS_DISTANCE, of("net")}
    assert set(points(tmp_path)[tags.WEIGHTS_DISTANCE].values()) == {0.0}


@pytest.mark.parametrize("layers", [[], ["net"], ["net.0", "net.1"], ["net.0.0", "net.0.1", "net.1"]], ids=len)
def test_layers_are_as_deep_as_asked(layers: list[str], tmp_path: Path) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)), nn.Linear(5, 2))
    fit(tmp_path, Regressor(net), loader(), WeightDistanceMonitor(layer_depth=len(layers)))
    shown = [tag.removeprefix(of("")) for tag in points(tmp_path) if tag.startswith(of(""))]
    assert sorted(shown) == layers


def test_steps_are_those_of_the_optimizer(tmp_path: Path) -> None:
    """Twelve batches an epoch, three to a step: t is a step, and each is looked at once."""
    keep = Keep()
    watch = WeightDistanceMonitor(every_n_train_steps=2)
    fit(tmp_path, Regressor(), loader(batch_size=2), keep, watch, max_epochs=3, accumulate_grad_batches=3)
    shown = points(tmp_path)[tags.WEIGHTS_DISTANCE]
    assert list(shown) == [2, 4, 6, 8, 10]
    assert [point[0] for point in watch.points] == [2, 4, 6, 8, 10]
    assert shown[4] == pytest.approx(keep.distance(4), rel=1e-5)


def test_between_looks_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [], weights.count_sketch
    monkeypatch.setattr(weights, "count_sketch", lambda *given: read.append(1) or original(*given))
    fit(tmp_path, Regressor(), loader(), WeightDistanceMonitor(points_per_decade=1), max_epochs=20)
    assert len(read) == 1 + 3  # w_0, and 1, 10, 100


def test_modules_that_step_by_themselves_may_be_watched(tmp_path: Path) -> None:
    class Manual(Regressor):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    Manual.automatic_optimization = property(lambda self: False, lambda self, value: None)
    watch = WeightDistanceMonitor(points_per_decade=5)
    fit(tmp_path, Manual(), loader(), watch, max_epochs=4)
    assert [point[0] for point in watch.points] == [2, 4, 6, 10, 16, 26, 40]


# ---- projections -----------------------------------------------------------------------------------------------------


def test_a_projection_is_as_far_off_as_it_says(tmp_path: Path) -> None:
    """Over projections; k = 64 of 1,002 parameters."""
    errors, angles = [], []
    for seed in range(12):
        root, keep, watch = tmp_path / str(seed), Keep(), WeightDistanceMonitor(projection=64, seed=seed)
        seeded()
        net = nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 5), nn.Linear(5, 2))
        fit(root, Regressor(net), loader(), keep, watch, max_steps=15, max_epochs=3)
        shown = points(root)
        errors.append(shown[tags.WEIGHTS_DISTANCE][14] / keep.distance(14) - 1)
        angles.append(shown[tags.WEIGHTS_ANGLE][14])
        assert shown[of("net.3")][14] == pytest.approx(keep.distance(14, "net.3"), rel=0.3)
    spread = float(torch.tensor(errors).square().mean().sqrt())
    assert 0.3 * math.sqrt(1 / 128) < spread < 1.6 * math.sqrt(1 / 128)
    assert len(set(angles)) == 12


def test_large_models_are_projected_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SMALL", 36)  # one fewer than there are
    monkeypatch.setattr(weights, "SKETCH", 8)
    watch = WeightDistanceMonitor()
    fit(tmp_path, Regressor(), loader(), watch)
    assert [tuple(each.shape) for each in watch._initial] == [(2, 8)]
    monkeypatch.setattr(weights, "SMALL", 37)
    watch = WeightDistanceMonitor()
    fit(tmp_path / "copy", Regressor(), loader(), watch)
    assert [tuple(each.shape) for each in watch._initial] == [(5, 4), (5,), (2, 5), (2,)]


@each_kind
def test_the_size_of_checkpoints_is_said(
    projection: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    watch = WeightDistanceMonitor(projection=projection)
    monkeypatch.setattr(watch.watch, "announce", lambda notes: said.extend(notes))
    fit(tmp_path, Regressor(), loader(), watch)
    state = watch.state_dict()
    size = sum(each.nbytes for each in (*state["_initial"], *state["_last"]))
    assert f"checkpoints grow by {size / 2**20:.2g} MiB" in said
    assert size == (4 * 37 if projection is None else 8 * 16 * 2) + 2 * 8 * (projection or 8192)


# ---- checkpoints and later fits --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@each_kind
@pytest.mark.parametrize("at", [3, 47, 75])  # the last two between looks
def test_a_resumed_run_is_the_same_run(at: int, projection: int | None, tmp_path: Path) -> None:
    """Other random weights and another `w_0` at the start of the resumed one do not matter."""

    def trained(name: str, seed: int, **options: Any) -> WeightDistanceMonitor:
        seeded(seed)
        watch = WeightDistanceMonitor(projection=projection)
        keep = ModelCheckpoint(tmp_path, f"{name}-{{step}}", every_n_train_steps=at, save_top_k=-1)
        options = {"enable_checkpointing": True, "max_epochs": 100, **options}
        one = loader(batch_size=24)  # a step an epoch: Lightning begins an epoch anew where it is resumed within it
        fit(tmp_path / name, Regressor(), one, watch, keep, **options)
        return watch

    whole = trained("whole", 0)
    saved = tmp_path / f"whole-step={at}.ckpt"
    resumed = trained("resumed", 1, ckpt_path=saved)
    assert resumed.history == whole.history and len(whole.history) > 20
    assert resumed.latest == whole.latest
    last = points(tmp_path / "whole")
    for tag, values in points(tmp_path / "resumed").items():
        assert values == {step: value for step, value in last[tag].items() if step >= at}


def test_a_checkpoint_may_be_loaded_with_weights_only(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Regressor(), loader(), WeightDistanceMonitor())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    state = torch.load(tmp_path / "kept.ckpt", weights_only=True)["callbacks"]
    assert any("WeightDistanceMonitor" in key for key in state)


def test_a_second_fit_goes_on_from_the_first_start(tmp_path: Path) -> None:
    """With another Trainer, whose steps begin at 0."""
    module, watch, keep = Regressor(), WeightDistanceMonitor(every_n_train_steps=5), Keep()
    fit(tmp_path / "first", module, loader(), keep, watch)  # 12 steps
    fit(tmp_path / "second", module, loader(), watch)
    assert [point[0] for point in watch.points] == [5, 10, 15, 20]
    shown = points(tmp_path / "second")[tags.WEIGHTS_DISTANCE]
    assert list(shown) == [3, 8]
    moved = [each.detach() - keep.weights[0][name] for name, each in module.named_parameters()]
    assert watch.points[-1][1] == shown[8] > watch.points[1][1]
    trainer = trainer_of(tmp_path / "third", watch, max_epochs=1)
    trainer.fit(module, loader())
    assert [point[0] for point in watch.points] == [5, 10, 15, 20, 25]
    assert watch.points[-1][1] == pytest.approx(float(torch.cat([each.flatten() for each in moved]).norm()), rel=0.2)


def test_another_model_starts_anew(tmp_path: Path) -> None:
    watch = WeightDistanceMonitor(every_n_train_steps=1)
    fit(tmp_path / "first", Regressor(), loader(), watch)
    with pytest.warns(UserWarning, match="these are not the parameters of the first fit, so distances start anew"):
        fit(tmp_path / "second", Regressor(nn.Linear(4, 2)), loader(), watch)
    assert [point[0] for point in watch.points] == list(range(1, 12))


def test_the_steps_before_an_error_count(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("no more")

    module, watch = Regressor(), WeightDistanceMonitor(every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="no more"):
        fit(tmp_path / "first", module, loader(), watch, Stop())
    fit(tmp_path / "second", module, loader(), watch, max_epochs=1)
    assert [point[0] for point in watch.points] == [1, 2, 3, *range(4, 10)]


class Thaw(BaseFinetuning):
    """The first layer is frozen for an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_what_is_frozen_at_the_start_does_not_count(tmp_path: Path) -> None:
    """Nor after it thaws, also in a second fit that begins with it thawed."""
    module, watch = Regressor(), WeightDistanceMonitor(every_n_train_steps=1)
    fit(tmp_path / "first", module, loader(), Thaw(), watch, max_epochs=3)
    fit(tmp_path / "second", module, loader(), watch)
    assert list(watch._shapes) == ["net.2.weight", "net.2.bias"]
    assert not [tag for tag in points(tmp_path / "first") if tag.endswith("net.0")]
    assert len(watch.points) == 17 + 12


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:.*UninitializedParameter:UserWarning")
def test_what_has_no_values_yet_is_left_out(tmp_path: Path) -> None:
    watch = WeightDistanceMonitor(every_n_train_steps=1)
    with pytest.warns(UserWarning, match=r"net\.0\.weight, net\.0\.bias have no values before the first step"):
        fit(tmp_path, Regressor(nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2))), loader(), watch)
    assert list(watch._shapes) == ["net.1.weight", "net.1.bias"]


def test_weights_that_are_lost_end_no_training(tmp_path: Path) -> None:
    class Nan(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                pl_module.net[0].bias.data.fill_(torch.nan)

    watch = WeightDistanceMonitor(every_n_train_steps=1)
    trainer = fit(tmp_path, Regressor(), loader(), watch, Nan())
    assert trainer.global_step == 12
    assert list(points(tmp_path)[tags.WEIGHTS_DISTANCE]) == [1, 2, 3, 4]
    assert [point[0] for point in watch.points] == [1, 2, 3, 4]  # else no law could ever be fitted again


def test_a_look_that_fails_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "angle", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="a measurement failed and is left out.*ZeroDivisionError"):
        assert fit(tmp_path, Regressor(), loader(), WeightDistanceMonitor(every_n_train_steps=1)).global_step == 12


@pytest.mark.filterwarnings("ignore:.*configure_optimizers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*returned `None`:UserWarning")
def test_a_module_that_is_not_trained_is_said_to_be(tmp_path: Path) -> None:
    class Frozen(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    module = Frozen()
    module.requires_grad_(False)
    with pytest.warns(UserWarning, match="WeightDistanceMonitor: nothing is trained") as warned:
        fit(tmp_path, module, loader(), WeightDistanceMonitor())
    assert len(warned) >= 1


def test_sharded_parameters_are_refused() -> None:
    trainer = SimpleNamespace(strategy=type("FSDPStrategy", (), {})(), callbacks=[])
    with pytest.raises(MisconfigurationException, match="strategy=FSDPStrategy: parameters are sharded"):
        WeightDistanceMonitor().setup(trainer, nn.Linear(1, 1), "fit")


def test_complex_parameters_have_a_distance(tmp_path: Path) -> None:
    class Complex(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))

        def loss(self, batch: Any) -> Any:
            return super().loss(batch) + (self.phase - 1).abs().square().sum()

    keep = Keep()
    fit(tmp_path, Complex(), loader(), keep, WeightDistanceMonitor(every_n_train_steps=1))
    moved = (keep.weights[9]["phase"] - keep.weights[0]["phase"]).abs().square().sum().sqrt()
    assert points(tmp_path)[of("phase")][9] == pytest.approx(float(moved), rel=1e-5)


def test_a_long_history_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "HISTORY", 8)
    watch = WeightDistanceMonitor(every_n_train_steps=1)
    fit(tmp_path, Regressor(), loader(), watch)
    assert [point[0] for point in watch.points] == [1, 5, 9, 10, 11] or len(watch.points) <= 8


def test_it_fills_its_category() -> None:
    assert WeightDistanceMonitor().dashboard_categories == {tags.WEIGHTS}
    assert tags.WEIGHTS in tags.CATEGORIES


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_train_steps": 0}, ValueError, "every_n_train_steps=0 must be at least 1, or left out"),
        ({"points_per_decade": 0}, ValueError, "points_per_decade=0 must be at least 1"),
        ({"projection": 0}, ValueError, "projection=0 must be at least 1"),
        ({"layer_depth": -1}, ValueError, "layer_depth=-1 must be at least 0"),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0"),
        ({"points_per_decade": None}, TypeError, "points_per_decade=None must be a whole number"),
        ({"projection": 2.5}, TypeError, "projection=2.5 must be a whole number"),
    ],
)
def test_bad_input_is_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightDistanceMonitor(**options)
