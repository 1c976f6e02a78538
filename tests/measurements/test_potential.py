"""The random potential of losses whose differences are known in closed form."""

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_eoss.measurements.potential import RandomPotential, measure_random_potential
from tests.problems import squared_error

P = 20
SLOPE = torch.linspace(0.5, 1.5, P, dtype=torch.float64)
CURVES = torch.linspace(0.0, 4.0, P, dtype=torch.float64)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, P, dtype=torch.float64))


DATA = torch.ones(8, 1, dtype=torch.float64)


def measured(slope: Tensor | float = SLOPE, curves: Tensor | float = 0.0, **options: Any) -> RandomPotential:
    """Of a loss with this gradient and these eigenvalues of the Hessian at the present weights."""
    model = Weights()
    start = model.w.detach().clone()

    def loss(model: Any, batch: Any) -> Tensor:
        step = model.w - start
        return batch.mean() * ((slope * step).sum() + (curves * step.square()).sum() / 2 + 3)

    return measure_random_potential(model, loss, DATA, **{"distances": [0.1, 1.0, 10.0], **options})


def closed(z: float, slope: Tensor, curves: Tensor) -> tuple[float, float]:
    """Moments of the uniform distribution on the sphere: E v_i^2 v_j^2 = (1 + 2 [i = j]) / P(P + 2)."""
    linear = z**2 * slope.square().sum() / P
    second = z**4 / 4 * (curves.sum() ** 2 + 2 * curves.square().sum()) / (P * (P + 2))
    mean = z**2 * curves.sum() / (2 * P)
    return math.sqrt(linear + second), math.sqrt(linear + second - mean**2)


def test_a_linear_loss_is_taylors_line() -> None:
    found = measured(num_directions=1500)
    assert found.taylor_slope == pytest.approx(float(SLOPE.norm()) / math.sqrt(P), rel=1e-12)
    assert found.loss == pytest.approx(3.0)
    for z, rms, std in zip(found.distances, found.rms, found.std, strict=True):
        assert rms.mean == pytest.approx(z * found.taylor_slope, rel=0.05)
        assert std.mean == pytest.approx(z * found.taylor_slope, rel=0.05)
        assert rms.lower < rms.mean < rms.upper < 1.06 * rms.mean
    assert found.beyond_taylor(found.rms) == found.beyond_taylor(found.std) == 3
    assert math.isnan(found.rms_exponent.mean) and math.isnan(found.std_exponent.mean)


def test_a_quadratic_loss_has_both_in_closed_form() -> None:
    found = measured(curves=CURVES, distances=[0.05, 0.5, 2.0, 8.0, 32.0, 128.0, 512.0], num_directions=1200)
    for z, rms, std in zip(found.distances, found.rms, found.std, strict=True):
        expected = closed(z, SLOPE, CURVES)
        assert (rms.mean, std.mean) == pytest.approx(expected, rel=0.05)
    assert found.rms[-1].mean > 3 * found.std[-1].mean
    assert found.beyond_taylor(found.rms) == 2  # 2.1 against 1.04 at z = 2
    assert found.beyond_taylor(found.std) == 4
    assert found.rms_exponent.mean == pytest.approx(2.0, abs=0.1)
    assert found.std_exponent.lower < 2.0 < found.std_exponent.upper


def test_at_the_bottom_of_a_round_bowl_nothing_scatters() -> None:
    found = measured(0.0, 2.0, distances=[0.5, 1.0, 2.0, 4.0], num_directions=5)
    assert [each.mean for each in found.rms] == pytest.approx([z**2 for z in found.distances], rel=1e-9)
    assert [each.mean for each in found.std] == pytest.approx([0.0] * 4, abs=1e-9)
    assert found.taylor_slope == 0
    assert found.rms_exponent.mean == pytest.approx(2.0, rel=1e-6)


def test_intervals_cover() -> None:
    truth = closed(2.0, SLOPE, CURVES)
    covered = np.zeros(2)
    for seed in range(60):
        found = measured(curves=CURVES, distances=[2.0], num_directions=50, seed=seed)
        pairs = zip((found.rms[0], found.std[0]), truth, strict=True)
        covered += [each.lower <= value <= each.upper for each, value in pairs]
    assert (covered >= 52).all() and (covered < 60).any()


def test_directions_are_uniform_and_new_for_each_distance() -> None:
    """On the sphere one coordinate has the variance 1 / P, and the distances know nothing of each other."""
    one = torch.eye(P, dtype=torch.float64)[3]
    rows = measured(one, distances=[1.0, 2.0], num_directions=2000).differences
    assert float(rows[0].square().mean()) == pytest.approx(1 / P, rel=0.12)
    assert abs(float(torch.corrcoef(rows)[0, 1])) < 0.08
    assert abs(float(rows[0].mean())) < 4 / math.sqrt(2000 * P)


def test_the_seed_decides_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = measured(num_directions=3)
    torch.manual_seed(2)
    assert torch.equal(measured(num_directions=3).differences, first.differences)
    assert not torch.equal(measured(num_directions=3, seed=1).differences, first.differences)


# ---- on networks -----------------------------------------------------------------------------------------------------


def problem(norm: bool = False) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Tanh(), nn.Linear(6, 2))
    return model, list(zip(torch.randn(30, 4), torch.randn(30, 2), strict=True))


def test_the_loss_is_that_of_all_samples_whatever_the_chunks() -> None:
    model, data = problem()
    whole = measure_random_potential(model, squared_error, data, distances=[0.5, 1.0], num_directions=4)
    chunks = measure_random_potential(model, squared_error, data, distances=[0.5, 1.0], num_directions=4, batch_size=7)
    torch.testing.assert_close(chunks.differences, whole.differences, rtol=1e-4, atol=1e-6)
    assert chunks.taylor_slope == pytest.approx(whole.taylor_slope, rel=1e-5)
    batch = tuple(torch.stack(column) for column in zip(*data, strict=True))
    assert whole.loss == pytest.approx(squared_error(model, batch).item(), rel=1e-5)
    assert (whole.num_samples, whole.num_parameters) == (30, 44)
    assert measure_random_potential(model, squared_error, data, distances=[1.0], full_batch_samples=9).num_samples == 9


def test_small_distances_show_the_gradient() -> None:
    model, data = problem()
    doubles = [(x.double(), y.double()) for x, y in data]
    found = measure_random_potential(model.double(), squared_error, doubles, distances=[1e-4], num_directions=1000)
    assert found.rms[0].mean / 1e-4 == pytest.approx(found.taylor_slope, rel=0.08)


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left(fails: bool) -> None:
    model, data = problem(norm=True)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.get_rng_state()

    def loss(model: Any, batch: Any) -> Tensor:
        if fails and not torch.equal(model[0].weight, before["0.weight"]):
            raise RuntimeError("no more")
        return squared_error(model, batch) * (1 + torch.rand(()))

    with pytest.raises(RuntimeError, match="no more") if fails else contextlib.nullcontext():
        measure_random_potential(model, loss, data, distances=[1.0], num_directions=20)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[3].weight.grad is None
    assert model.training


def test_a_loss_that_overflows_has_no_exponent() -> None:
    found = measure_random_potential(
        Weights(), lambda model, batch: (model.w**2).sum().exp() + 0 * batch.sum(), DATA, distances=[1.0, 30.0, 60, 90]
    )
    assert math.isfinite(found.rms[0].mean) and not math.isfinite(found.rms[-1].mean)
    assert math.isnan(found.rms_exponent.mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distances": []}, "must be positive, finite and increasing"),
        ({"distances": [1.0, 1.0]}, "must be positive, finite and increasing"),
        ({"distances": [0.0, 1.0]}, "must be positive, finite and increasing"),
        ({"distances": [1.0, math.inf]}, "must be positive, finite and increasing"),
        ({"num_directions": 1}, "num_directions=1 has no scatter"),
        ({"batch_size": 9}, "batch_size=9 must lie between 1"),
        ({"full_batch_samples": 0}, "full_batch_samples=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(**options)
