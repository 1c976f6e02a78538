"""The Gauss-Newton matrix against J' (d^2 l / dz^2) J made dense, and against Hessians and Fisher matrices."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_eoss.curvature.batches import Batch, Part, full_batch, random_batches, split
from lightning_eoss.curvature.gauss_newton import (
    OutputsFn,
    check_outputs,
    curvature_of,
    discovered_outputs,
    gauss_newton,
)
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import Coordinates, Sequential
from papers.tangent_kernel import ntk
from tests.oracles import empirical_fisher_eigenvalues, gauss_newton_eigenvalues
from tests.problems import (
    Attention,
    Tied,
    assert_close,
    batch_norm,
    cnn,
    collated,
    dense_gradient_and_hessian,
    layer_norm,
    made,
    mlp,
    objective_of,
    pictures,
)

torch.set_num_threads(1)

Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and one-hot targets

DATA = pictures()
NETS = [mlp, cnn, layer_norm, batch_norm, Attention, Tied]
WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1).mean() / 2


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets.argmax(-1))


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(outputs, dim=-1), targets.argmax(-1))


TORCHS: dict[str, Loss] = {  # one call of a function of torch's each, the convex ones
    "mse": nn.MSELoss(),
    "mse_sum": nn.MSELoss(reduction="sum"),
    "mse_swapped": lambda outputs, targets: F.mse_loss(targets, outputs),
    "mse_by_name": lambda outputs, targets: F.mse_loss(target=targets, input=outputs),
    "cross_entropy": cross_entropy,
    "label_smoothing": lambda outputs, targets: F.cross_entropy(outputs, targets.argmax(-1), label_smoothing=0.2),
    "class_weights": lambda outputs, targets: nn.CrossEntropyLoss(WEIGHTS)(outputs, targets.argmax(-1)),
    "soft_targets": lambda outputs, targets: F.cross_entropy(outputs, targets.add(0.5).div(2.5)),
    "bce": lambda outputs, targets: F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=WEIGHTS),
    "nll": nll,
    "nll_modules": lambda outputs, targets: nn.NLLLoss()(nn.LogSoftmax(-1)(outputs), targets.argmax(-1)),
    "nll_methods": lambda outputs, targets: F.nll_loss(outputs.log_softmax(1), targets.argmax(-1)),
}
LOSSES: dict[str, Loss] = TORCHS | {
    "half_square": half_square,
    "log_cosh": lambda outputs, targets: (outputs - targets).cosh().log().mean(),
    "contrastive": lambda outputs, targets: F.cross_entropy(outputs @ outputs.T, targets.argmax(-1)),  # couples samples
    "indefinite": lambda outputs, targets: (3 * outputs * targets.add(0.3)).sin().sum(-1).mean(),
    "affine": lambda outputs, targets: (outputs * targets).mean(),
}

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_net = pytest.mark.parametrize("net", NETS)


def outputs_of(loss: Loss) -> OutputsFn:
    """As a user writes it."""

    def outputs_fn(module: nn.Module, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        inputs, targets = batch
        return module(inputs), lambda outputs: loss(outputs, targets)

    return outputs_fn


def loss_of(loss: Loss) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def jacobian_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """(m, P) by rows, the oracle."""
    named = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    parts = torch.func.jacrev(lambda values: functional_call(model, values, (inputs,)).flatten())(named)
    return torch.cat([parts[name].flatten(1) for name in named], dim=1)


def dense(model: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    """(P, P) of a batch, part by part."""
    total = torch.zeros((), dtype=torch.float64)
    for part in batch:
        inputs, targets = collated(DATA, part.indices)
        jacobian, outputs = jacobian_of(model, inputs), model(inputs).detach()
        middle = torch.autograd.functional.hessian(lambda z, targets=targets: loss(z, targets), outputs)
        size = outputs.numel()
        total = total + part.weight * jacobian.T @ middle.reshape(size, size) @ jacobian
    return total


def dense_by_rows(objective: Objective, loss: Loss, batch: Batch, data: Any = DATA) -> Tensor:
    """(P, P) for networks that `torch.func` refuses."""
    total = torch.zeros((), dtype=torch.float64)
    for part in batch:
        inputs, targets = collated(data, part.indices)
        outputs = objective.module(inputs)
        rows = [torch.autograd.grad(each, objective.parameters, retain_graph=True) for each in outputs.flatten()]
        jacobian = torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows])
        middle = torch.autograd.functional.hessian(lambda z, targets=targets: loss(z, targets), outputs.detach())
        total = total + part.weight * jacobian.T @ middle.reshape(len(rows), -1) @ jacobian
    return total


@contextmanager
def some_batches(
    net: Callable[[], nn.Module], loss: Loss, *, size: int = 5, parts: int = 1, count: int = 2
) -> Iterator[tuple[Objective, list[Batch]]]:
    with objective_of(made(net), loss_of(loss), DATA) as objective:
        stream = random_batches(objective.source, size, parts=parts, seed=1)
        yield objective, [next(stream) for _ in range(count)]


def probes(objective: Objective, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, objective.num_parameters, generator=generator, dtype=torch.float64)


def operator_of(objective: Objective, batches: list[Batch], loss: Loss, *args: Any, **options: Any) -> Sequential:
    return Sequential(objective, batches, *args, curvature=gauss_newton(outputs_of(loss)), **options)


def assert_same_spectrum(found: Tensor, matrix: Tensor) -> None:
    """Equal up to zeros, of which a Gram matrix has fewer, or more."""
    values = torch.linalg.eigvalsh(matrix)
    found, values = (
        torch.cat([each, each.new_zeros(max(len(found), len(values)) - len(each))]) for each in (found, values)
    )
    assert_close(found.sort().values, values.sort().values, steps=1000)


# ---- products --------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("loss", [half_square, cross_entropy])
@pytest.mark.parametrize("parts", [1, 3])
def test_products_of_networks(net: Callable[[], nn.Module], loss: Loss, parts: int) -> None:
    """One by one and in windows of micro-batches; losses and gradients are those of the Hessian's operator."""
    with some_batches(net, loss, parts=parts, size=4) as (objective, batches):
        operator, hessian = operator_of(objective, batches, loss), Sequential(objective, batches)
        vectors = probes(objective, 2)
        found = operator.matvec(vectors)
        assert_close(operator.losses(), hessian.losses())
        assert_close(operator.gradients(), hessian.gradients())
        assert torch.equal(operator.restrict([1])(vectors[1:]), found[1:])
        expected = torch.stack([dense(objective.module, loss, batch) for batch in batches])
    assert_close(found, torch.einsum("bpq,bq->bp", expected, vectors), steps=1000)
    assert all(each.grad is None for each in objective.parameters)


@every_loss
def test_products_of_losses(loss: Loss) -> None:
    with some_batches(mlp, loss) as (objective, batches):
        vectors = probes(objective, 2)
        products = operator_of(objective, batches, loss).matvec(vectors)
        expected = torch.stack([dense(objective.module, loss, batch) for batch in batches])
    assert_close(products, torch.einsum("bpq,bq->bp", expected, vectors), steps=1000)


@pytest.mark.parametrize("slots", [0, 1])
def test_graphs_that_do_not_fit_are_built_anew(slots: int) -> None:
    with some_batches(cnn, cross_entropy, parts=2) as (objective, batches):
        vectors = probes(objective, 2)
        kept = operator_of(objective, batches, cross_entropy)
        some = operator_of(objective, batches, cross_entropy, graph_slots=slots)
        for _ in range(2):
            assert torch.equal(some.matvec(vectors), kept.matvec(vectors))


def test_full_batch_does_not_depend_on_its_chunks() -> None:
    with some_batches(mlp, cross_entropy) as (objective, _):
        vectors = probes(objective, 1)
        products = [
            operator_of(objective, [full_batch(objective.source, chunk)], cross_entropy).matvec(vectors)
            for chunk in (22, 7)
        ]
        assert_close(*products, steps=1000)


def test_scaled_coordinates() -> None:
    r"""D^{-1/2} (G + W) D^{-1/2}."""
    with some_batches(mlp, cross_entropy) as (objective, batches):
        limits, decay = probes(objective, 2).abs() + 0.5
        vectors = probes(objective, 2)
        operator = operator_of(objective, batches, cross_entropy, Coordinates(limits, decay))
        products, gradients = operator.matvec(vectors), operator.gradients()
        for row, batch in enumerate(batches):
            matrix = (dense(objective.module, cross_entropy, batch) + torch.diag(decay)) / (
                limits[:, None] * limits
            ).sqrt()
            assert_close(products[row], matrix @ vectors[row], steps=1000)
        assert_close(gradients, Sequential(objective, batches).gradients() * limits.rsqrt())


@pytest.mark.parametrize("net", [lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), mlp])
def test_linear_models_have_the_hessian(net: Callable[[], nn.Module]) -> None:
    """And others do not."""
    with some_batches(net, half_square) as (objective, batches):
        vectors = probes(objective, 2)
        hessian = Sequential(objective, batches).matvec(vectors)
        difference = float(
            (operator_of(objective, batches, half_square).matvec(vectors) - hessian).norm() / hessian.norm()
        )
    assert (difference > 0.01) if net is mlp else (difference < 1e-14)


@pytest.mark.parametrize(
    ("loss", "module"), [("mse_sum", nn.MSELoss(reduction="sum")), ("cross_entropy", nn.CrossEntropyLoss())]
)
@pytest.mark.parametrize("net", [mlp, cnn, layer_norm])
def test_against_curvlinops(net: Callable[[], nn.Module], loss: str, module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvlinops = pytest.importorskip("curvlinops")
    with some_batches(net, TORCHS[loss], count=1) as (objective, batches):
        vectors = probes(objective, 1)
        inputs, targets = collated(DATA, batches[0][0].indices)
        data = [(inputs, targets if loss == "mse_sum" else targets.argmax(-1))]
        oracle = curvlinops.GGNLinearOperator(objective.module, module, objective.parameters, data)
        assert_close(operator_of(objective, batches, TORCHS[loss]).matvec(vectors)[0], oracle @ vectors[0], steps=1000)


class Corners(nn.Module):
    """What a parameter can be: unused, frozen, an output by itself; and a random mask."""

    def __init__(self) -> None:
        super().__init__()
        self.nobody = nn.Parameter(torch.ones(5))
        self.frozen = nn.Linear(16, 4).requires_grad_(False)
        self.linear = nn.Linear(4, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.linear(F.dropout(self.frozen(pictures.flatten(1)).tanh(), 0.5))


def test_unused_and_frozen_parameters_and_dropout() -> None:
    """Masks are the same in each pass, so that the linear layer's Hessian comes out."""
    with some_batches(Corners, cross_entropy) as (objective, batches):
        vectors = probes(objective, 2)
        products = operator_of(objective, batches, cross_entropy, graph_slots=0).matvec(vectors)
        assert_close(products, Sequential(objective, batches).matvec(vectors))
        assert bool((products[:, :5] == 0).all())


@pytest.mark.parametrize("where", ["outputs", "criterion"])
def test_nothing_to_differentiate(where: str) -> None:
    def outputs_fn(module: nn.Module, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        outputs = module(batch[0])
        if where == "outputs":
            return outputs.detach(), lambda outputs: outputs.square().mean()
        return outputs, lambda outputs: outputs.detach().mean()

    with some_batches(mlp, half_square) as (objective, batches):
        for differences in (False, True):
            operator = Sequential(objective, batches, differences=differences, curvature=gauss_newton(outputs_fn))
            assert bool((operator.matvec(probes(objective, 2)) == 0).all())
            assert bool((operator.gradients() == 0).all())
        values = gauss_newton_eigenvalues(objective, batches[0], outputs_fn)
    assert values.tolist() == [0.0] * 15


# ---- without differentiating the network twice -----------------------------------------------------------------------


class Bag(nn.Module):
    """Words in a bag; torch cannot differentiate it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 3, mode="mean")
        self.head = nn.Linear(3, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(words)))


def test_differences_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(6, (12, 4), generator=generator)
    data = [(each, F.one_hot(each.sum() % 3, 3).double()) for each in words]
    with objective_of(made(Bag), loss_of(cross_entropy), data) as objective:
        batches = [full_batch(objective.source, 5)]
        vectors = probes(objective, 1)
        with pytest.raises(RuntimeError, match="_embedding_bag_backward"):
            operator_of(objective, batches, cross_entropy).matvec(vectors)
        operator = operator_of(objective, batches, cross_entropy, differences=True)
        product, gradient = operator.matvec(vectors)[0], operator.gradients()[0]
        assert_close(gradient, Sequential(objective, batches, differences=True).gradients()[0])
        expected = dense_by_rows(objective, cross_entropy, batches[0], data) @ vectors[0]
    assert float((product - expected).norm() / expected.norm()) < 1e-8


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Once.apply(inputs)


def weight_norm() -> nn.Module:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))
    return nn.Sequential(nn.Flatten(), linear, nn.Tanh(), nn.Linear(4, 3))


def sine() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), Sine(), nn.Linear(4, 3))


@pytest.mark.parametrize(("net", "right"), [(weight_norm, True), (sine, False)])
def test_layers_whose_hessian_is_silently_wrong(net: Callable[[], nn.Module], right: bool) -> None:
    """Where autograd's product is wrong too, it is not symmetric; differences serve both."""
    with some_batches(net, cross_entropy, count=1) as (objective, [batch]):
        vectors = probes(objective, 2)
        expected = dense_by_rows(objective, cross_entropy, batch) @ vectors.T
        for differences in (False, True):
            operator = operator_of(objective, [batch], cross_entropy, differences=differences)
            images = torch.stack([operator.matvec(each[None])[0] for each in vectors])
            asymmetry = float((vectors[0] @ images[1] - vectors[1] @ images[0]).abs())
            error = float((images.T - expected).norm() / expected.norm())
            assert (max(error, asymmetry) < 1e-8) if right or differences else (min(error, asymmetry) > 0.1)


# ---- small batches ---------------------------------------------------------------------------------------------------


@every_net
def test_eigenvalues_of_networks(net: Callable[[], nn.Module]) -> None:
    with some_batches(net, cross_entropy, size=4, parts=2, count=1) as (objective, [batch]):
        found = gauss_newton_eigenvalues(objective, batch, outputs_of(cross_entropy))
        matrix = dense(objective.module, cross_entropy, batch)
    assert found.shape == (24,) and found.dtype == torch.float64 and bool((found.diff() <= 0).all())
    assert_same_spectrum(found, matrix)


@every_loss
def test_eigenvalues_of_losses(loss: Loss) -> None:
    """Indefinite ones included."""
    with some_batches(mlp, loss, count=1) as (objective, [batch]):
        found = gauss_newton_eigenvalues(objective, batch, outputs_of(loss))
        matrix = dense(objective.module, loss, batch)
    assert_same_spectrum(found, matrix)
    if loss is LOSSES["indefinite"]:
        assert found[0] > 0.1 and found[-1] < -0.1
    if loss in TORCHS.values():
        assert float(found[-1]) > -1e-12 * float(found[0])


def test_more_outputs_than_parameters() -> None:
    net = lambda: nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 3))  # noqa: E731
    with some_batches(net, cross_entropy, size=20, count=1) as (objective, [batch]):
        found = gauss_newton_eigenvalues(objective, batch, outputs_of(cross_entropy))
        assert len(found) == 60 > objective.num_parameters == 6
        assert_same_spectrum(found, dense(objective.module, cross_entropy, batch))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 3))


def test_rows_one_by_one_where_vmap_refuses() -> None:
    with some_batches(group_norm, cross_entropy, count=1) as (objective, [batch]):
        found = gauss_newton_eigenvalues(objective, batch, outputs_of(cross_entropy))
        assert_same_spectrum(found, dense_by_rows(objective, cross_entropy, batch))


@pytest.mark.parametrize("net", [mlp, cnn])
def test_ntk(net: Callable[[], nn.Module]) -> None:
    """J J' / b: G for half the squared error, 3 / 2 of G for torch's, twice G at least for cross entropy."""
    with some_batches(net, half_square, count=1) as (objective, [batch]):
        kernel = ntk(objective, batch, outputs_of(half_square))
        jacobian = jacobian_of(objective.module, collated(DATA, batch[0].indices)[0])
        values = [
            gauss_newton_eigenvalues(objective, batch, outputs_of(loss))[0]
            for loss in (half_square, nn.MSELoss(), cross_entropy)
        ]
    assert_close(kernel, jacobian @ jacobian.T / 5, steps=1000)
    largest = torch.linalg.eigvalsh(kernel)[-1]
    assert_close(values[0], largest, steps=1000)
    assert_close(values[1], 2 / 3 * largest, steps=1000)
    assert values[2] < largest / 2


# ---- Fisher matrices -------------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module, losses: list[Tensor]) -> Tensor:
    rows = [torch.autograd.grad(each, list(model.parameters()), retain_graph=True) for each in losses]
    return torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows])


def test_fisher_of_cross_entropy() -> None:
    """E[g g'] over labels drawn from the model, all of them with their probabilities."""
    model, (inputs, _) = made(mlp), collated(DATA, range(5))
    outputs = model(inputs)
    fisher = torch.zeros(())
    for each in outputs:
        gradients = gradients_of(model, [-each.log_softmax(0)[label] for label in range(3)])
        fisher = fisher + gradients.T @ torch.diag(each.detach().softmax(0)) @ gradients / 5
    assert_close(dense(model, cross_entropy, (Part(1.0, 5, tuple(range(5))),)), fisher, steps=1000)


def test_fisher_of_squared_error() -> None:
    """Labels z + e with E[e e'] = 1: six points that have this second moment give the expectation exactly."""
    model, (inputs, _) = made(mlp), collated(DATA, range(5))
    outputs = model(inputs)
    noise = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    fisher = torch.zeros(())
    for each in outputs:
        gradients = gradients_of(model, [half_square(each, each.detach() + error) for error in noise])
        fisher = fisher + gradients.T @ gradients / 6 / 5
    assert_close(dense(model, half_square, (Part(1.0, 5, tuple(range(5))),)), fisher, steps=1000)


def test_empirical_fisher() -> None:
    with some_batches(mlp, cross_entropy, size=3, parts=2, count=1) as (objective, [batch]):
        found = empirical_fisher_eigenvalues(objective, batch)
        samples = [collated(DATA, [index]) for part in batch for index in part.indices]
        gradients = torch.stack(
            [dense_gradient_and_hessian(objective.module, loss_of(cross_entropy), sample)[0] for sample in samples]
        )
        assert_same_spectrum(found, gradients.T @ gradients / 6)
        loaded = (Part(1.0, 2, data=collated(DATA, [0, 1])),)
        with pytest.raises(ValueError, match="loaded as a whole"):
            empirical_fisher_eigenvalues(objective, loaded)


# ---- which outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", TORCHS.values(), ids=TORCHS)
def test_discovered_outputs_are_the_explicit_ones(loss: Loss) -> None:
    with some_batches(mlp, loss, parts=2) as (objective, batches):
        vectors = probes(objective, 2)
        found = discovered_outputs(objective.loss)
        check_outputs(objective, found, batches[0][0])
        check_outputs(objective, outputs_of(loss), batches[0][0])
        operator, explicit = (
            Sequential(objective, batches, curvature=gauss_newton(each)) for each in (found, outputs_of(loss))
        )
        assert_close(operator.losses(), explicit.losses())
        assert_close(operator.gradients(), explicit.gradients())
        assert_close(operator.matvec(vectors), explicit.matvec(vectors))


def test_metrics_and_running_totals_do_not_matter() -> None:
    """A second loss is logged, and the result comes as 0 + loss of shape (1,)."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        F.mse_loss(outputs, batch[1])
        total = torch.zeros(1, dtype=torch.float64)
        total += cross_entropy(outputs, batch[1])
        with torch.no_grad():
            cross_entropy(outputs, batch[1])
        F.mse_loss(outputs.softmax(-1), batch[1])
        return total

    with objective_of(made(mlp), loss_fn, DATA) as objective:
        batches = [full_batch(objective.source, 22)]
        vectors = probes(objective, 1)
        found = discovered_outputs(objective.loss)
        check_outputs(objective, found, batches[0][0])
        products = Sequential(objective, batches, curvature=gauss_newton(found)).matvec(vectors)
        assert_close(products, operator_of(objective, batches, cross_entropy).matvec(vectors))


def test_autocast_is_repeated() -> None:
    """The loss function gets bfloat16 and computes in float32; without a word on it, the criterion would not."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(batch[0]), batch[1])

    with objective_of(made(mlp, dtype=torch.float32), loss_fn, pictures(dtype=torch.float32)) as objective:
        found, part = discovered_outputs(objective.loss), Part(1.0, 5, tuple(range(5)))
        outputs, criterion = found(objective.module, objective.load(part))
        loss = objective.evaluate(part)
        assert outputs.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert torch.equal(criterion(outputs), loss)
        check_outputs(objective, found, part)


def test_half_precision_parameters_have_single_precision_vectors() -> None:
    data = pictures(dtype=torch.bfloat16)
    with objective_of(made(mlp, dtype=torch.bfloat16), loss_of(cross_entropy), data) as objective:
        batches = [full_batch(objective.source, 22)]
        vectors = probes(objective, 1).float()
        product = operator_of(objective, batches, cross_entropy).matvec(vectors)
        values = gauss_newton_eigenvalues(objective, batches[0], outputs_of(cross_entropy))
    exact = made(mlp)
    exact.load_state_dict(objective.module.state_dict())
    matrix = dense(exact, cross_entropy, batches[0])
    assert product.dtype == torch.float32 and values.dtype == torch.float64
    expected = matrix @ vectors[0].double()
    assert float((product[0] - expected).norm() / expected.norm()) < 0.05
    assert float(values[0]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=0.05)


def classes(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1].argmax(-1))


def test_a_sum_in_place_of_a_mean_is_refused() -> None:
    """On one sample they are the same: the check takes a batch."""

    def summed(module: Any, batch: Any) -> Any:
        return module(batch[0]), lambda outputs: F.cross_entropy(outputs, batch[1].argmax(-1), reduction="sum")

    with objective_of(made(mlp), classes, DATA) as objective, pytest.raises(ValueError, match="reduction, weights"):
        curvature_of("ggn", summed, objective, 1)


def test_a_network_that_needs_several_samples_may_be_watched() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with objective_of(net, classes, DATA) as objective:
        assert curvature_of("ggn", None, objective, 4) is not None


def test_a_diverged_loss_is_found_too() -> None:
    def diverged() -> nn.Module:
        model = mlp()
        next(model.parameters()).data.fill_(torch.nan)
        return model

    with some_batches(diverged, cross_entropy) as (objective, batches):
        operator = Sequential(objective, batches, curvature=gauss_newton(discovered_outputs(objective.loss)))
        assert bool(operator.losses().isnan().all()) and bool(
            operator.matvec(probes(objective, 2)).isnan().any(1).all()
        )


@pytest.mark.parametrize("value", [torch.nan, 2.0])
def test_a_loss_without_a_graph_is_its_own_output(value: float) -> None:
    """NaN is what stands for a batch that training skips."""
    with objective_of(made(mlp), lambda model, batch: torch.tensor(value).double(), DATA) as objective:
        batches = [full_batch(objective.source, 22)]
        operator = Sequential(objective, batches, curvature=gauss_newton(discovered_outputs(objective.loss)))
        hessian = Sequential(objective, batches)
        for found, expected in (
            (operator.losses(), hessian.losses()),
            (operator.gradients(), hessian.gradients()),
            (operator.matvec(probes(objective, 1)), hessian.matvec(probes(objective, 1))),
        ):
            assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(
                found.nan_to_num(), expected.nan_to_num()
            )


class LearnedTargets(nn.Module):
    """The targets are a network too."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = mlp(), mlp()


HIDDEN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "own formula": (loss_of(half_square), "The loss, .* is not the result of one call of F.cross_entropy, F.mse_loss"),
    "two terms": (
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]) + F.mse_loss(model(batch[0]), batch[1]),
        "Pass outputs_fn, a function of .module, batch.",
    ),
    "a penalty": (
        lambda model, batch: (
            F.mse_loss(model(batch[0]), batch[1]) + sum(each.square().sum() for each in model.parameters())
        ),
        "is not the result of one call",
    ),
    "a factor": (lambda model, batch: 0.5 * F.mse_loss(model(batch[0]), batch[1]), "is not the result of one call"),
    "probabilities": (
        lambda model, batch: F.nll_loss(model(batch[0]).softmax(-1).log(), batch[1].argmax(-1)),
        "Gauss-Newton matrix is 0.*let the outputs be logits",
    ),
    "no scalar": (
        lambda model, batch: F.mse_loss(model(batch[0]), batch[1], reduction="none"),
        "must be a scalar tensor",
    ),
    "no tensor": (lambda model, batch: 1.0, "must be a scalar tensor, got float"),
}


@pytest.mark.parametrize(("loss_fn", "message"), HIDDEN.values(), ids=HIDDEN)
def test_outputs_that_cannot_be_discovered(loss_fn: Callable[[Any, Any], Any], message: str) -> None:
    with objective_of(made(mlp), loss_fn, DATA) as objective, pytest.raises(ValueError, match=message):
        gauss_newton(discovered_outputs(objective.loss)).graph(objective, Part(1.0, 2, (0, 1)))


def test_learned_targets_are_refused() -> None:
    def loss_fn(model: LearnedTargets, batch: Any) -> Tensor:
        return F.mse_loss(model.student(batch[0]), model.teacher(batch[0]))

    with (
        objective_of(made(LearnedTargets), loss_fn, DATA) as objective,
        pytest.raises(ValueError, match="2 of the tensors that mse_loss is given depend on the parameters"),
    ):
        discovered_outputs(objective.loss)(objective.module, collated(DATA, [0, 1]))


def penalised(module: nn.Module, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The criterion knows the parameters by another way."""
    penalty = next(module.parameters()).square().sum()
    return module(batch[0]), lambda outputs: half_square(outputs, batch[1]) + penalty - penalty.detach()


MISMATCHES: dict[str, OutputsFn] = {
    "another factor": outputs_of(lambda outputs, targets: 2 * half_square(outputs, targets)),
    "same value, another gradient": outputs_of(
        lambda outputs, targets: 2 * (each := half_square(outputs, targets)) - each.detach()
    ),
    "detached outputs": lambda module, batch: (
        module(batch[0]).detach(),
        lambda outputs: half_square(outputs, batch[1]),
    ),
    "outputs that lack a layer": lambda module, batch: (
        module(batch[0]).mul(1.0 + 1e-2),
        lambda outputs: half_square(outputs / (1.0 + 2e-2), batch[1]),
    ),
}


@pytest.mark.parametrize("outputs_fn", MISMATCHES.values(), ids=MISMATCHES)
def test_criteria_that_are_not_the_loss(outputs_fn: OutputsFn) -> None:
    with some_batches(mlp, half_square) as (objective, batches):
        value = float(Sequential(objective, batches).losses()[0])
        with pytest.raises(
            ValueError, match=f"training steps on is {value:.6g}.*as a function of the outputs alone it is"
        ):
            check_outputs(objective, outputs_fn, batches[0][0])


def test_a_loss_that_bypasses_the_outputs() -> None:
    """Equal in value, and only the gradient tells."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return penalised(model, batch)[1](model(batch[0]))

    with (
        objective_of(made(mlp), loss_fn, DATA) as objective,
        pytest.raises(ValueError, match="of the gradient is missing"),
    ):
        check_outputs(objective, penalised, Part(1.0, 2, (0, 1)))


@pytest.mark.parametrize("found", [None, torch.ones(()), (torch.ones(2), torch.ones(())), ([1.0], torch.sum)])
def test_outputs_fn_of_another_kind(found: Any) -> None:
    with some_batches(mlp, half_square) as (objective, batches), pytest.raises(TypeError, match="Pass outputs_fn"):
        check_outputs(objective, lambda module, batch: found, batches[0][0])


def test_a_criterion_that_is_no_scalar() -> None:
    outputs_fn = outputs_of(lambda outputs, targets: (outputs - targets).square())
    with (
        some_batches(mlp, half_square) as (objective, batches),
        pytest.raises(ValueError, match="got a tensor of shape"),
    ):
        check_outputs(objective, outputs_fn, batches[0][0])


def test_pieces_of_a_batch() -> None:
    with some_batches(cnn, cross_entropy, size=7, count=1) as (objective, [batch]):
        whole, pieces = (
            gauss_newton_eigenvalues(objective, each, outputs_of(cross_entropy)) for each in (batch, split(batch, 3))
        )
    assert_close(pieces, whole, steps=1000)
