"""`SharpnessMonitor(predictions=True)`, the Gauss-Newton operator and the spectrum in real fits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from lightning_eoss import SharpnessMonitor, SpectralDensityMonitor
from lightning_eoss.callbacks import sharpness
from lightning_eoss.display import tags
from lightning_eoss.measurements.prediction import predict_sharpness
from lightning_eoss.measurements.sharpness import measure_sharpness
from tests.cases import CASES, run, unwatched
from tests.problems import dense_gradient_and_hessian, squared_error
from tests.runs import Regressor, assert_same, cells, fit, loader, monitor, points, samples, seeded

MODELS = (tags.PREDICTION_SUBSPACE, tags.PREDICTION_WIGNER, tags.PREDICTION_MARCHENKO_PASTUR)
NUMBERS = (tags.PREDICTION_OVERLAP, tags.PREDICTION_VARIANCE, tags.PREDICTION_RANK)


def spectrum(**options: Any) -> SpectralDensityMonitor:
    return SpectralDensityMonitor(**{"every_n_train_steps": 5, "steps": 6, **options})


def doubles(count: int = 24) -> Any:
    return samples(count, dtype=torch.float64)


def regressor() -> Regressor:
    seeded()
    return Regressor().double()


@pytest.mark.filterwarnings("ignore:.*(SharpnessMonitor|SpectralDensityMonitor):UserWarning")
@pytest.mark.filterwarnings("ignore:(SharpnessMonitor|SpectralDensityMonitor):UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_with_everything_on_a_watched_run_is_the_same_run(case: Any, tmp_path: Path) -> None:
    state, logged = unwatched(case)
    watch, density = monitor(4, predictions=True), spectrum(steps=2, num_probes=1)  # each pass is as all the others
    _, watched = run(case, tmp_path / "watched", watch, density)
    assert_same(watched, state)
    assert cells(tmp_path / "watched") == logged
    assert len(density.history) >= 1
    if watch.findings.reduction == "mean" and watch.watch.data.sampler is None:
        assert all(len(points(tmp_path / "watched")[tag]) >= 1 for tag in (*MODELS, *NUMBERS))


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    """Every fifth measurement; the same numbers as without a Trainer."""
    kept = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            kept[trainer.global_step] = {name: each.clone() for name, each in pl_module.net.state_dict().items()}

    fit(tmp_path, regressor(), loader(doubles(), 6), Keep(), monitor(1, predictions=True), max_epochs=3)
    shown = points(tmp_path)
    for tag in (*MODELS, *NUMBERS):
        assert list(shown[tag]) == [0, 5, 10], tag
    for tag in MODELS:
        assert set(shown[tags.trusted(tag)].values()) <= {0.0, 1.0}
        lower, upper = (shown[end] for end in tags.interval(tag))
        assert all(lower[step] <= value <= upper[step] for step, value in shown[tag].items())
    net = Regressor().double().net
    net.load_state_dict(kept[5])
    found = predict_sharpness(net, squared_error, doubles(), batch_sizes=[6])
    assert shown[tags.PREDICTION_SUBSPACE][5] == pytest.approx(found.subspace[0].estimate.mean, rel=0.02)
    assert shown[tags.PREDICTION_WIGNER][5] == pytest.approx(found.wigner[0].estimate.mean, rel=0.05)


def test_a_loss_that_is_no_mean_is_not_predicted(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match="not found to be a mean over its samples.*no predictions") as warned:
        fit(tmp_path, Regressor(net), loader(), monitor(1, predictions=True))
    assert len([each for each in warned if "no predictions" in str(each.message)]) == 1
    assert not [tag for tag in points(tmp_path) if tag.startswith("prediction/")]
    assert points(tmp_path)[tags.MINI_BS]


def test_batches_that_are_not_uniform_are_not_predicted(tmp_path: Path) -> None:
    seeded()
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 23 + [50.0], 24)
    with pytest.warns(UserWarning, match="the sampler is not uniform: .*no predictions"):
        fit(tmp_path, Regressor(), loader(sampler=sampler), monitor(1, predictions=True))
    assert not [tag for tag in points(tmp_path) if tag.startswith("prediction/")]


def test_a_prediction_that_fails_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharpness, "prediction", lambda *_, **__: 1 / 0)
    with pytest.warns(UserWarning, match="a measurement failed and is left out.*ZeroDivisionError"):
        fit(tmp_path, Regressor(), loader(), monitor(1, predictions=True))
    assert len(points(tmp_path)[tags.MINI_BS]) == 12


def test_a_loss_that_becomes_nan_is_not_predicted(tmp_path: Path) -> None:
    class Diverging(Regressor):
        def loss(self, batch: Any) -> Any:
            return super().loss(batch) * (torch.nan if self.trainer.global_step >= 5 else 1.0)

    seeded()
    with pytest.warns(UserWarning, match="the loss is not finite"):
        fit(tmp_path, Diverging(), loader(), monitor(1, predictions=True))
    assert list(points(tmp_path)[tags.PREDICTION_SUBSPACE]) == [0]


def test_predictions_are_paid_for_from_the_same_budget(tmp_path: Path) -> None:
    watch = monitor(None, overhead=0.5, predictions=True)
    fit(tmp_path, Regressor(), loader(), watch, max_epochs=20)
    assert watch.agenda.ledgers["prediction"].count >= 1
    assert watch.agenda.spent <= 0.9 * watch.watch.elapsed
    assert tags.PREDICTION_SUBSPACE in points(tmp_path)


def test_the_gauss_newton_matrix_may_be_watched(tmp_path: Path) -> None:
    """Half the squared error: G = J'J / b, whatever the targets."""

    def outputs_fn(module: Any, batch: Any) -> Any:
        return module.net(batch[0]), lambda outputs: (outputs - batch[1]).square().sum(-1).mean() / 2

    watch = monitor(4, operator="ggn", outputs_fn=outputs_fn, rel_error=0.01)
    module = regressor()
    net = Regressor().double().net
    net.load_state_dict(module.net.state_dict())
    fit(tmp_path, module, loader(doubles()), watch, max_epochs=1)

    inputs = doubles().tensors[0]
    with torch.no_grad():
        targets = net(inputs)  # no residuals: the Hessian is the Gauss-Newton matrix
    expected = float(torch.linalg.eigvalsh(dense_gradient_and_hessian(net, squared_error, (inputs, targets))[1])[-1])
    assert points(tmp_path)[tags.FULL_BS][0] == pytest.approx(expected, rel=1e-3)


def test_outputs_are_found_in_a_training_step(tmp_path: Path) -> None:
    class Classifier(Regressor):
        def loss(self, batch: Any) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1].argmax(-1))

    seeded()
    fit(tmp_path, Classifier(), loader(), monitor(3, operator="ggn", predictions=True))
    shown = points(tmp_path)
    assert all(value > 0 for value in shown[tags.MINI_BS].values())
    assert shown[tags.PREDICTION_SUBSPACE]


def test_hidden_outputs_are_asked_for(tmp_path: Path) -> None:
    seeded()
    with pytest.raises(ValueError, match="outputs_fn") as raised:
        fit(tmp_path, Regressor(), loader(), monitor(3, operator="ggn"))
    assert any("SharpnessMonitor met this at its first measurement" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "fisher"}, "operator='fisher' is unknown"),
        ({"outputs_fn": lambda module, batch: None}, "outputs_fn= is for operator='ggn'"),
    ],
)
def test_senseless_operators_are_refused(options: Any, message: str) -> None:
    for kind in (SharpnessMonitor, SpectralDensityMonitor):
        with pytest.raises(ValueError, match=message):
            kind(**options)


# ---- the spectrum ----------------------------------------------------------------------------------------------------


def test_the_spectrum_is_that_of_the_dense_hessian(tmp_path: Path) -> None:
    density = spectrum(steps=37, every_n_train_steps=100)
    module = regressor()
    net = Regressor().double().net
    net.load_state_dict(module.net.state_dict())
    fit(tmp_path, module, loader(doubles(), 6), density)
    hessian = dense_gradient_and_hessian(net, squared_error, doubles().tensors)[1]
    eigenvalues = torch.linalg.eigvalsh(hessian)
    shown = {tag: values[0] for tag, values in points(tmp_path).items()}
    assert shown[tags.SPECTRUM_LARGEST] == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert shown[tags.SPECTRUM_SMALLEST] == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    lower, upper = (shown[end] for end in tags.interval(tags.SPECTRUM_TRACE))
    assert lower <= float(eigenvalues.sum()) <= upper
    zeros = int((eigenvalues.abs() < 1e-12 * eigenvalues[-1]).sum())
    assert shown[tags.SPECTRUM_RANK] == pytest.approx(len(eigenvalues) - zeros, abs=2)
    assert shown[tags.SPECTRUM_BATCH_LARGEST] != shown[tags.SPECTRUM_LARGEST]
    assert density.latest is not None and density.latest.batch_size == 6


def test_batch_norm_has_two_spectra(tmp_path: Path) -> None:
    """In eval mode the layers use their running statistics, and training goes on in train mode."""
    largest = {}
    for mode in ("as_trained", "eval"):
        seeded()
        module = Regressor(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))).double()
        density = spectrum(mode=mode, every_n_train_steps=100, steps=30)
        fit(tmp_path / mode, module, loader(doubles()), density)
        largest[mode] = density.history[0][tags.SPECTRUM_LARGEST]
        assert module.training
        assert int(module.net[1].num_batches_tracked) == 12
    seeded()
    net = Regressor(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))).double().net.eval()
    dense = torch.linalg.eigvalsh(dense_gradient_and_hessian(net, squared_error, doubles().tensors)[1])[-1]
    assert largest["eval"] == pytest.approx(float(dense), rel=1e-5)
    assert largest["as_trained"] != pytest.approx(float(dense), rel=0.05)


class Noisy(torch.utils.data.Dataset[Any]):
    """Inputs with fresh noise each time that they are loaded."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        inputs, targets = doubles()[index]
        return inputs + 0.5 * torch.randn(4, dtype=torch.float64), targets


def test_augmented_passes_approach_the_true_hessian(tmp_path: Path) -> None:
    """Least squares: E[x x'] of the noisy inputs is that of the clean ones plus 0.25."""
    inputs = doubles().tensors[0]
    expected = float(torch.linalg.eigvalsh(inputs.T @ inputs / 24 + 0.25 * torch.eye(4).double())[-1])
    found = {}
    for passes in (1, 40):
        seeded()
        density = spectrum(augmented_passes=passes, every_n_train_steps=100, num_probes=1)
        module = Regressor(nn.Linear(4, 2, bias=False)).double()
        fit(tmp_path / str(passes), module, loader(Noisy()), density, max_steps=1)
        found[passes] = density.history[0][tags.SPECTRUM_LARGEST]
    assert abs(found[40] / expected - 1) < 0.08
    assert found[1] != found[40]


def test_a_share_of_wall_time_pays_for_the_spectrum(tmp_path: Path) -> None:
    density = spectrum(every_n_train_steps=None, overhead=0.5)
    fit(tmp_path, Regressor(), loader(), density, max_epochs=60)
    assert len(density.history) >= 2
    assert density.agenda.spent <= 0.9 * density.watch.elapsed


def test_a_resumed_spectrum_keeps_its_history(tmp_path: Path) -> None:
    density = spectrum()
    fit(tmp_path, Regressor(), loader(), density)
    again = spectrum()
    again.load_state_dict(density.state_dict())
    assert again.history == density.history and len(again.history) >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"num_probes": 0}, "num_probes=0 must be at least 1"),
        ({"augmented_passes": 0}, "augmented_passes=0 must be at least 1"),
        ({"mode": "test"}, "mode='test' is unknown"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"every_n_train_steps": 2, "overhead": 0.1}, "are two schedules"),
    ],
)
def test_bad_input_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralDensityMonitor(**options)


def test_without_a_trainer_the_same(tmp_path: Path) -> None:
    """`measure_sharpness` knows both operators, too."""
    net = regressor().net

    def outputs_fn(module: Any, batch: Any) -> Any:
        return module(batch[0]), lambda outputs: (outputs - batch[1]).square().sum(-1).mean() / 2

    data = doubles()
    found = measure_sharpness(net, squared_error, data, batch_size=4, operator="ggn", outputs_fn=outputs_fn)
    plain = measure_sharpness(net, squared_error, data, batch_size=4)
    assert found.full_batch.value != pytest.approx(plain.full_batch.value, rel=1e-3)
