"""Parameters as networks hold them: complex ones, modules under two names, views that ask where numbers lie."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.func import functional_call

from lightning_eoss import GradientNoiseMonitor, SpectralDensityMonitor, measure_sharpness
from lightning_eoss.curvature.batches import Part, full_batch
from lightning_eoss.curvature.gauss_newton import gauss_newton
from lightning_eoss.curvature.objective import real
from lightning_eoss.curvature.operators import Sequential, Stacked, difference_product
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.theory.stability import NoLimits, stability_limits
from tests.oracles import gauss_newton_eigenvalues, per_sample_gradients
from tests.problems import (
    LossFn,
    assert_close,
    collated,
    dense_gradient_and_hessian,
    made,
    mlp,
    objective_of,
    pictures,
    squared_error,
    top,
)
from tests.runs import Regressor, fit, loader, monitor, points, samples, seeded

torch.set_num_threads(1)

EPS = torch.finfo(torch.float64).eps
BATCHES = [(Part(1.0, 3, (0, 1, 2)),), (Part(1.0, 3, (7, 4, 9)),)]


def directions(dim: int) -> Tensor:
    return torch.randn(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ---- complex numbers -------------------------------------------------------------------------------------------------


class Waves(nn.Module):
    """Complex weights between real ones, an odd number of which come first."""

    def __init__(self, inputs: int = 16, outputs: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.waves = nn.Parameter(torch.randn(inputs, 3, dtype=torch.cfloat) / inputs**0.5)
        self.head = nn.Linear(3, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        waves = inputs.flatten(1).to(self.waves.dtype) @ self.waves
        return self.head(self.scale * torch.tanh(waves.real * waves.imag + waves.abs()))


class Viewed(nn.Module):
    """Real weights that are seen as complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.waves = nn.Parameter(torch.randn(8, 2))

    def forward(self, pictures: Tensor) -> Tensor:
        waves = torch.complex(pictures.flatten(1)[:, :8], pictures.flatten(1)[:, 8:]) @ torch.view_as_complex(
            self.waves
        )
        return torch.tanh(waves.abs())[:, None] + self.bias


def drawn(net: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with seeded parameters in this precision, complex ones in its complex counterpart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net()
    return precise(model) if dtype is torch.float64 else model


def precise(model: nn.Module) -> nn.Module:
    """In double precision; `Module.double` leaves complex numbers as they are."""
    for each in model.parameters():
        each.data = each.data.to(torch.complex128 if each.is_complex() else torch.float64)
    return model


def dense(model: nn.Module, loss_fn: LossFn, batch: Any) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian in real coordinates, from real numbers alone."""
    named = dict(model.named_parameters())
    shapes = [real(each).shape for each in named.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = [
            piece.reshape(shape) for piece, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        values = {
            name: torch.complex(piece[..., 0], piece[..., 1])
            if named[name].is_complex()
            else 1.0 * piece  # new memory for the gradient, too
            for name, piece in zip(named, pieces, strict=True)
        }
        return loss_fn(lambda *inputs: functional_call(model, values, inputs), batch)  # type: ignore[arg-type]

    flat = torch.cat([real(each.detach()).reshape(-1) for each in named.values()])
    return torch.func.grad(loss)(flat), torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-any-return]


@pytest.mark.parametrize("net", [Waves, Viewed])
@pytest.mark.parametrize("operator_of", [Sequential, Stacked])
def test_complex_numbers_against_the_dense_hessian(net: Any, operator_of: Any) -> None:
    model = drawn(net)
    with objective_of(model, squared_error, pictures()) as objective:
        operator = operator_of(objective, BATCHES)
        vectors = directions(objective.num_parameters)
        gradients, products = operator.gradients(), operator.matvec(vectors)
        differences = difference_product(objective, BATCHES[0][0], vectors[0])
    for row, (part,) in enumerate(BATCHES):
        gradient, hessian = dense(model, squared_error, collated(pictures(), part.indices))
        assert_close(gradients[row], gradient)
        assert_close(products[row], hessian @ vectors[row])
        if row == 0:
            expected = hessian @ vectors[0]
            size = sum(float(each.detach().abs().square().sum()) for each in model.parameters())
            assert float((differences - expected).norm() / expected.norm()) <= 10 * size * EPS ** (
                2 / 3
            )  # steps are long


@pytest.mark.parametrize("net", [Waves, Viewed])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_sharpness_of_complex_networks(net: Any, dtype: torch.dtype) -> None:
    model = drawn(net, dtype)
    if net is Viewed:
        assert sum(each.numel() for each in model.parameters()) == 19
    found = measure_sharpness(model, squared_error, pictures(dtype=dtype), batch_size=5, tol=1e-6)
    _, hessian = dense(drawn(net), squared_error, collated(pictures(), range(22)))
    assert_close(found.full_batch.value, top(hessian), dtype=dtype)


def test_complex_outputs_have_a_gauss_newton_matrix() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.waves = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(16, 2, dtype=torch.cfloat))

        def forward(self, pictures: Tensor) -> Tensor:
            return self.odd * torch.sin(pictures.flatten(1).to(self.waves.dtype) @ self.waves / 9)

    model, batch = drawn(Outputs), (Part(1.0, 4, (0, 1, 2, 3)),)

    def criterion(outputs: Tensor) -> Tensor:
        return (outputs.abs() ** 4).sum() + outputs.real.prod()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return criterion(model(batch[0]))

    def outputs_fn(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), criterion

    with objective_of(model, loss_fn, pictures()) as objective:
        operators = [
            Sequential(objective, [batch], curvature=gauss_newton(outputs_fn), differences=each)
            for each in (False, True)
        ]
        basis = torch.eye(objective.num_parameters, dtype=torch.float64)
        matrix, nearly = (torch.stack([each.matvec(row[None])[0] for row in basis]) for each in operators)
        values = gauss_newton_eigenvalues(objective, batch, outputs_fn)
    flat = torch.cat([real(each.detach()).reshape(-1) for each in model.parameters()])

    def outputs(flat: Tensor) -> Tensor:
        values = {"odd": flat[:1], "waves": torch.view_as_complex(flat[1:].clone().reshape(16, 2, 2))}
        return real(functional_call(model, values, (collated(pictures(), range(4))[0],)))

    jacobian = torch.autograd.functional.jacobian(outputs, flat).reshape(16, -1)
    curved = torch.autograd.functional.hessian(
        lambda z: criterion(torch.view_as_complex(z.reshape(4, 2, 2))), outputs(flat).reshape(-1)
    )
    expected = jacobian.T @ curved @ jacobian
    assert_close(matrix, expected)
    assert float((nearly - expected).norm() / expected.norm()) <= 10 * EPS ** (2 / 3)
    assert_close(values, torch.linalg.eigvalsh(expected).flip(0)[:16])


def test_complex_gradients_of_single_samples() -> None:
    with objective_of(drawn(Waves), squared_error, pictures()) as objective:
        rows = per_sample_gradients(objective, BATCHES[1][0])
        for row, index in zip(rows, BATCHES[1][0].indices, strict=True):
            assert_close(row, dense(objective.module, squared_error, collated(pictures(), [index]))[0])


class Ratios(Callback):
    """The edge ratio before every step but the first, when Adam has no limits yet."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        limits = stability_limits(trainer.optimizers[0])
        if isinstance(limits, NoLimits):
            return
        pieces = zip(pl_module.net.parameters(), limits.limits, strict=True)
        diagonal = torch.cat([(torch.ones_like(real(p)) * limit).detach().reshape(-1) for p, limit in pieces]).double()
        data = collated([(x.double(), y.double()) for x, y in samples()], range(24))
        _, hessian = dense(precise(copy.deepcopy(pl_module.net)), squared_error, data)
        self.found[trainer.global_step] = top(diagonal.rsqrt()[:, None] * hessian * diagonal.rsqrt())


@pytest.mark.filterwarnings("ignore:.*the stability limits differ between parameters")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_edge_of_complex_networks_in_training(kind: Any, tmp_path: Path) -> None:
    """In units of the limits of all real coordinates."""

    class Module(Regressor):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=0.01)

    seeded()
    module, ratios = Module(Waves(4, 2)), Ratios()
    fit(tmp_path, module, loader(), monitor(1), ratios, max_epochs=1)
    found = points(tmp_path)["sharpness/edge_ratio_FullBS"]
    assert len(ratios.found) >= 5
    for step, expected in ratios.found.items():
        assert found[step] == pytest.approx(expected, rel=0.01)  # the relative residual of FullBS


# ---- two names -------------------------------------------------------------------------------------------------------


class Alias(nn.Module):
    def __init__(self, net: Callable[[], nn.Module] = mlp) -> None:
        super().__init__()
        self.net = net()
        self.alias = self.net

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


class Siamese(Alias):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) * self.alias(-inputs)


class Held(Alias):
    """A loss module that holds the network, beside it; and one matrix that two modules hold."""

    class Loss(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.tied = net, nn.Linear(1, 1)
            self.tied.weight = next(net.parameters())

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs) + self.tied.weight.square().mean()

    def __init__(self, net: Callable[[], nn.Module] = mlp) -> None:
        super().__init__(net)
        self.loss = self.Loss(self.net)
        self.loss.tied.bias = None

    def forward(self, inputs: Tensor) -> Tensor:
        return self.loss(inputs)


@pytest.mark.parametrize("net", [Alias, Siamese, Held])
def test_modules_under_two_names(net: Any) -> None:
    """Stacked as one after another, and after it the module holds its own parameters again."""
    model, data = made(net), pictures()
    originals = dict(model.named_parameters(remove_duplicate=False))
    with objective_of(model, squared_error, data) as objective:
        assert preflight(objective, 3).stacked
        sequential, stacked = Sequential(objective, BATCHES), Stacked(objective, BATCHES)
        vectors = directions(objective.num_parameters)
        assert_close(stacked.gradients(), sequential.gradients())
        assert_close(stacked.matvec(vectors), sequential.matvec(vectors))
        assert_close(per_sample_gradients(objective, BATCHES[0][0]).mean(0), sequential.gradients()[0])
        assert all(each is originals[name] for name, each in model.named_parameters(remove_duplicate=False))
        batch = full_batch(objective.source, 22)
    found = measure_sharpness(model, squared_error, data, batch_size=4, tol=1e-6)
    _, hessian = dense_gradient_and_hessian(model, squared_error, collated(data, batch[0].indices))
    assert_close(found.full_batch.value, top(hessian))


@pytest.mark.parametrize("net", [Alias, Siamese, Held])
def test_modules_under_two_names_in_training(net: Any, tmp_path: Path) -> None:
    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    seeded()
    monitors = [monitor(2), SpectralDensityMonitor(every_n_train_steps=4), GradientNoiseMonitor(every_n_train_steps=4)]
    fit(tmp_path, Regressor(net(small)), loader(), *monitors, max_epochs=1)
    assert set(points(tmp_path)["sharpness/MiniBS"]) == {0, 2, 4}
