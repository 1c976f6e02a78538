"""Products by autograd that are wrong, and those that are right and must not be doubted."""

import copy
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eoss import measure_sharpness
from lightning_eoss.curvature.batches import Part, full_batch, random_batches
from lightning_eoss.curvature.derivatives import doubt
from lightning_eoss.curvature.gauss_newton import discovered_outputs, gauss_newton
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import Sequential, gradient_graph, hessian_product
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.measurements.sharpness import sharpness
from tests.problems import (
    LossFn,
    Sample,
    collated,
    cross_entropy,
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

F64, F32 = torch.float64, torch.float32
CLEAN = Findings("mean", differences=False, stacked=False, graph_bytes=0.0, seconds=0.0, warnings=())


def precision(model: nn.Module, dtype: torch.dtype) -> float:
    """Of central differences, whose step is in units of the parameters; third derivatives are of the order of 1."""
    size = sum(float(each.detach().square().sum()) for each in model.parameters())
    return 10 * max(1.0, size) * torch.finfo(dtype).eps ** (2 / 3)


def sharpness_of(model: nn.Module, loss_fn: LossFn, data: list[Sample]) -> float:
    """FullBS from a dense Hessian in double precision."""
    twin = copy.deepcopy(model).double()
    batch = [each.double() for each in collated(data, range(len(data)))]
    return top(dense_gradient_and_hessian(twin, loss_fn, batch)[1])


# ---- silently wrong --------------------------------------------------------------------------------------------------


class Keeping(torch.autograd.Function):
    """x sigmoid(x), whose backward pass takes the sigmoid of the forward pass: a constant, for autograd."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, above: float) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.kept, ctx.above = inputs.sigmoid(), above
        return inputs * ctx.kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        gate = torch.where(inputs > ctx.above, ctx.kept, inputs.sigmoid())
        return gradient * gate * (1 + inputs * (1 - gate)), None


class Swish(nn.Module):
    """As it should be, or with a wrong second derivative for inputs above a number."""

    def __init__(self, above: float | None = None) -> None:
        super().__init__()
        self.above = above

    def forward(self, inputs: Tensor) -> Tensor:
        return F.silu(inputs) if self.above is None else Keeping.apply(inputs, self.above)  # type: ignore[no-any-return]


def swish(*, wrong: bool, inputs: int = 16, outputs: int = 3, above: float = -1e9) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5), Swish(above if wrong else None), nn.Linear(5, outputs))


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_symmetric_error_is_measured_around(seed: int, dtype: torch.dtype) -> None:
    """7 to 10 % of FullBS, as in activations that keep what they should save."""
    data = [(x, 4 * y) for x, y in pictures(dtype=dtype)]
    model, honest = (made(lambda wrong=wrong: swish(wrong=wrong), seed, dtype) for wrong in (True, False))
    twice = [(x.double(), y.double()) for x, y in data]
    expected = sharpness_of(honest, squared_error, data)
    _, hessian = dense_gradient_and_hessian(
        made(lambda: swish(wrong=True), seed), squared_error, collated(twice, range(22))
    )
    assert 0.06 < 1 - top((hessian + hessian.T) / 2) / expected < 0.1  # what would be shown
    with pytest.warns(UserWarning, match=r"differ by \d+%: some layer's second derivative is silently wrong.*Keeping"):
        found = measure_sharpness(model, squared_error, data, batch_size=8, tol=1e-5)
    assert found.full_batch.value == pytest.approx(expected, rel=precision(honest, dtype))


def test_an_error_in_training_is_measured_around(tmp_path: Path) -> None:
    class Watched(Regressor):
        def on_train_batch_end(self, *_: Any) -> None:
            honest = swish(wrong=False, inputs=4, outputs=2)
            honest.load_state_dict(self.net.state_dict())
            expected[self.trainer.global_step] = sharpness_of(honest, squared_error, list(samples()))

    expected: dict[int, float] = {}
    seeded()
    module = Watched(swish(wrong=True, inputs=4, outputs=2))
    with pytest.warns(UserWarning, match=r"SharpnessMonitor: The Hessian by autograd and a finite difference"):
        fit(tmp_path, module, loader(), monitor(2), max_epochs=1)
    found = points(tmp_path)["sharpness/FullBS"]
    for step in (2, 4):
        assert found[step] == pytest.approx(expected[step], rel=0.01)  # the relative residual of FullBS


class Quiet(nn.Module):
    """Beside a network's outputs, those of a layer where an activation is flat, less its slope: without gradient."""

    def __init__(self, *, wrong: bool) -> None:
        super().__init__()
        self.net, self.linear, self.activation = mlp(), nn.Linear(16, 5), Swish(-1e9 if wrong else None)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = self.linear(pictures.flatten(1))
        return torch.cat([self.net(pictures), self.activation(hidden) - hidden / 2], dim=1)


def quietly(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0])
    return (outputs[:, :3] - batch[1]).square().sum(1).mean() / 2 + outputs[:, 3:].sum(1).mean()


@pytest.mark.parametrize("along", ["gradient", "audit"])
def test_an_error_off_the_gradient_is_found(along: str) -> None:
    """In a layer whose own gradient is zero: along the gradient nothing is to be seen."""
    wrong, honest = (made(lambda wrong=wrong: Quiet(wrong=wrong)) for wrong in (True, False))
    expected = sharpness_of(honest, quietly, pictures())
    with objective_of(wrong, quietly, pictures()) as objective:
        part = full_batch(objective.source, 22)[0]
        graph = gradient_graph(objective, part)
        sizes = [each.numel() for each in objective.parameters]
        assert not bool(torch.cat([*graph.gradient.split(sizes)][4:]).any())
        if along == "gradient":
            found = doubt(objective, part)
            assert found is not None and found.differences
            return
        measurement, _ = sharpness(Solver(objective, Plan(8, tol=1e-6), CLEAN))
    assert measurement.doubt is not None and measurement.doubt.differences
    assert measurement.full_batch.value == pytest.approx(expected, rel=precision(honest, F64))


def test_an_error_that_comes_up_in_training_is_found_at_an_audit(tmp_path: Path) -> None:
    """Where the wrong side of the activation is reached; what follows is measured by differences."""

    class Shifted(Regressor):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.net[1].bias.add_(4 * (self.trainer.global_step == 2))
            honest = swish(wrong=False, inputs=4, outputs=2)
            honest.load_state_dict(self.net.state_dict())
            expected[self.trainer.global_step] = sharpness_of(honest, squared_error, list(samples()))

    expected: dict[int, float] = {}
    seeded()
    module, watching = Shifted(swish(wrong=True, inputs=4, outputs=2, above=3.5), 0.001), monitor(1)
    with pytest.warns(UserWarning, match=r"finite difference of gradients differ by") as caught:
        fit(tmp_path, module, loader(), watching, max_epochs=1)
    assert len([each for each in caught if "differ by" in str(each.message)]) == 1
    assert watching.findings is not None and watching.findings.differences
    found = points(tmp_path)["sharpness/FullBS"]
    for step in range(1, 6):
        assert found[step] == pytest.approx(expected[step], rel=0.01)


def test_what_is_sampled_is_drawn_again_for_differences() -> None:
    """A sampler's own batches go through both kinds of products."""
    model = made(lambda: swish(wrong=True))
    with objective_of(model, squared_error, pictures()) as objective:
        batches = list(zip(*[random_batches(objective.source, 4, seed=1)], range(6), strict=False))
        plan = Plan(4, num_batches=6, rel_error=1e-9, tol=1e-5)
        found, _ = sharpness(Solver(objective, plan, CLEAN), full=False, batches=iter([b for b, _ in batches]))
        redone, _ = sharpness(
            Solver(objective, plan, CLEAN.after(found.doubt)), full=False, batches=iter([b for b, _ in batches])
        )
    assert len(found.mini_batch.values) == 6
    assert found.mini_batch.values == redone.mini_batch.values and redone.doubt is None


# ---- right -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        activation = random.choice(["relu", "gelu"])
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation=activation)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(pictures.flatten(1, 2))).mean(1))


def some_network() -> nn.Module:
    """Any of the usual layers, with any activation."""
    act = random.choice([nn.ReLU, nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish])
    width = random.choice([8, 32, 128])
    channels = width // 4
    conv = nn.Conv2d(1, channels, 3, padding=1)
    return random.choice(
        [
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, width), act(), nn.Linear(width, 3)),
            lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(16, width), act(), nn.Linear(width, width), act(), nn.Linear(width, 3)
            ),
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.LayerNorm(width), act(), nn.Linear(width, 3)),
            lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(16, width), nn.BatchNorm1d(width), act(), nn.Linear(width, 3)
            ),
            lambda: nn.Sequential(
                conv, nn.BatchNorm2d(channels), act(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width, 3)
            ),
            Encoder,
        ]
    )()


@pytest.mark.parametrize("seed", range(40))
def test_correct_networks_are_not_doubted(seed: int) -> None:
    """Neither at the start nor later, on few samples or many, along the gradient, at random or along the top."""
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.manual_seed(seed)
        dtype, loss_fn = random.choice([F32, F32, F64]), random.choice([squared_error, cross_entropy])
        model, data = some_network().to(dtype), pictures(32, seed, dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(random.choice([0, 30, 200])):
            optimizer.zero_grad()
            loss_fn(model, collated(data, range(32))).backward()
            optimizer.step()
    with objective_of(model, loss_fn, data) as objective:
        (part,) = next(random_batches(objective.source, random.choice([2, 4, 8, 32]), seed=seed))
        graph = gradient_graph(objective, part)
        vector = graph.gradient
        for _ in range(8):
            vector = hessian_product(objective, graph, vector, keep=True)
            vector = vector / vector.norm()
        assert doubt(objective, part) is None
        assert doubt(objective, part, vector) is None


def test_a_gauss_newton_matrix_is_compared_with_its_own_differences() -> None:
    """It has no second derivatives to be wrong; the Hessian of the same network has."""
    with objective_of(made(lambda: swish(wrong=True)), cross_entropy, pictures()) as objective:
        (part,) = full_batch(objective.source, 22)
        assert doubt(objective, part) is not None
        assert doubt(objective, part, curvature=gauss_newton(discovered_outputs(objective.loss))) is None


# ---- detached targets ------------------------------------------------------------------------------------------------


def chased(model: nn.Module, batch: Any) -> Tensor:
    """A target that moves with the weights, as in Q learning: the gradient is no loss's."""
    targets = model(batch[0].flip(0)).detach() ** 2
    return (model(batch[0]) - targets).square().mean()


@pytest.mark.parametrize("dtype", [F64, F32])
def test_detached_targets_are_warned_about_once(dtype: torch.dtype) -> None:
    data, model = pictures(dtype=dtype), made(mlp, dtype=dtype)
    with objective_of(model, chased, data) as objective:
        findings = preflight(objective, 8)
        assert findings.detached and not findings.differences
        (warning,) = findings.warnings
        assert (
            "finite difference of gradients differ by" in warning
            and "not symmetric, as where targets are det" in warning
        )
        measurement, _ = sharpness(Solver(objective, Plan(8), findings))
        assert measurement.doubt is None
        again, _ = sharpness(Solver(objective, Plan(8), replace(findings, detached=False)))
        assert again.doubt is not None and findings.after(again.doubt) == findings
        assert again.full_batch.value == pytest.approx(measurement.full_batch.value, rel=0.01)


# ---- not finite ------------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))


def distances(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0])
    return (outputs[:, None] - outputs[None]).norm(dim=-1).square().mean()


def covariance(data: list[Sample]) -> Tensor:
    inputs = torch.stack([x.flatten() for x, _ in data]).double()
    centred = inputs - inputs.mean(0)
    return centred.T @ centred / len(data)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_distances_of_a_point_to_itself(dtype: torch.dtype) -> None:
    """The mean over pairs of |W (x - y)|^2 has the Hessian 2 E (x - y)(x - y)' = 4 cov for each row of W."""
    data, model = pictures(8, dtype=dtype), made(linear, dtype=dtype)
    expected = 4 * top(covariance(data))
    with pytest.warns(
        UserWarning, match=r"Products by autograd are not finite \(.*LinalgVectorNormBackward0\).*finite diff"
    ):
        found = measure_sharpness(model, distances, data, batch_size=8, tol=1e-6)
    assert found.full_batch.value == pytest.approx(expected, rel=precision(model, dtype))
    assert found.mini_batch.mean == pytest.approx(expected, rel=precision(model, dtype))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, batch: (F.normalize(model(batch[0])) - batch[1][:, :2]).square().mean(),
        lambda model, batch: -F.cosine_similarity(model(batch[0]), batch[1][:, :2]).mean(),
        lambda model, batch: (model(batch[0] * 0).std() + model(batch[0]).square().mean()).reshape(()),
    ],
)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_rows_of_zeros(loss_fn: LossFn, dtype: torch.dtype) -> None:
    """Padding: rows that no weight moves have no part in the Hessian, whatever autograd makes of them."""
    data = [(x * (number > 2), y) for number, (x, y) in enumerate(pictures(10, dtype=dtype))]
    model = made(linear, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure_sharpness(model, loss_fn, data, batch_size=10, tol=1e-6)
    twin = made(linear)

    def twice(flat: Tensor) -> Tensor:
        rows = [each for each in data if bool(each[0].any())]
        x, y = (each.double() for each in collated(rows, range(len(rows))))
        return loss_fn(lambda inputs: F.linear(inputs.flatten(1), flat.reshape(2, 16)), (x, y)) * len(rows) / 10  # type: ignore[arg-type]

    hessian = torch.nan_to_num(torch.autograd.functional.hessian(twice, twin[1].weight.detach().reshape(-1)))
    inputs = torch.stack([x.flatten() for x, _ in data if bool(x.any())])
    outputs = F.linear(inputs, model[1].weight.detach())
    steepness = (
        float((inputs.norm(dim=1) / outputs.norm(dim=1)).max()) ** 2
    )  # of 1 / |Wx|, whose step is in units of |W|
    assert found.full_batch.value == pytest.approx(top(hessian), rel=steepness * precision(model, dtype))


def test_rows_of_zeros_that_come_up_late() -> None:
    """Only some batches have them, and none that is tried before."""
    data = pictures(200)
    with objective_of(made(linear), distances, data) as objective:
        tried = {i for part in next(random_batches(objective.source, 32, seed=0)) for i in part.indices}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (F.normalize(model(batch[0])) - batch[1][:, :2]).square().sum(-1).mean()

    padded = [(x * 0 if number not in tried and number % 9 == 0 else x, y) for number, (x, y) in enumerate(data)]
    with objective_of(made(linear), loss_fn, padded) as objective:
        findings = preflight(objective, 8)
        assert not findings.differences
        found, _ = sharpness(Solver(objective, Plan(8, num_batches=8), findings))
    assert found.doubt is not None and found.doubt.differences
    assert "LinalgVectorNorm" in found.doubt.message
    assert found.dropped == 0 and found.full_batch.value > 0


def kinked() -> nn.Module:
    model = linear()
    nn.init.zeros_(model[1].weight)
    return model


def lengths(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).norm(dim=-1).mean() + squared_error(nn.Sequential(model, nn.ZeroPad1d((0, 1))), batch)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_no_second_derivative(dtype: torch.dtype) -> None:
    """A norm at zero has a kink; differences grow without bound."""
    data, model = pictures(dtype=dtype), made(kinked, dtype=dtype)
    with pytest.warns(UserWarning, match=r"no second derivative at these weights .*LinalgVectorNorm.*under a root"):
        found = measure_sharpness(model, lengths, data, batch_size=8)
    assert found.full_batch.value != found.full_batch.value and found.dropped > 0 and not found.mini_batch.values


def test_no_second_derivative_in_training(tmp_path: Path) -> None:
    class Module(Regressor):
        def loss(self, batch: Any) -> Tensor:
            return self.net(batch[0]).norm(dim=-1).mean() + super().loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    seeded()
    net = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(net.weight)
    with pytest.warns(UserWarning, match="second derivative") as caught:
        fit(tmp_path, Module(net), loader(), monitor(2), max_epochs=1)
    said = " ".join(str(each.message) for each in caught)
    assert "no second derivative at these weights" in said
    assert "the second derivative of the loss is not finite: nothing is shown" in said
    assert "sharpness/FullBS" not in points(tmp_path)


def test_a_loss_that_is_not_finite_says_nothing_about_products() -> None:
    with objective_of(made(mlp), lambda model, batch: squared_error(model, batch) * torch.nan, pictures()) as objective:
        assert doubt(objective, Part(1.0, 4, (0, 1, 2, 3))) is None
        operator = Sequential(objective, [full_batch(objective.source, 22)])
        assert not bool(torch.isfinite(operator.losses()).any())
    assert isinstance(objective, Objective)
