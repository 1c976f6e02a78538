"""Products, gradients and losses of batches against dense Hessians."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eoss.curvature.batches import Batch, Part, full_batch, random_batches, split
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import (
    Coordinates,
    Sequential,
    Stacked,
    agrees_when_stacked,
    difference_product,
    gradient_graph,
)
from tests.problems import (
    NETS,
    Bag,
    LossFn,
    assert_close,
    batch_norm_training,
    cnn,
    collated,
    cross_entropy,
    dense_gradient_and_hessian,
    dropout,
    made,
    mlp,
    objective_of,
    pictures,
    sentences,
    squared_error,
)

torch.set_num_threads(1)

DATA = pictures()


def dense(model: nn.Module, loss_fn: LossFn, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian of a batch, part by part."""
    loss, gradient, hessian = 0.0, 0.0, 0.0
    for part in batch:
        samples = collated(DATA, part.indices)
        its_gradient, its_hessian = dense_gradient_and_hessian(model, loss_fn, samples)
        loss = loss + part.weight * loss_fn(model, samples).detach()
        gradient, hessian = gradient + part.weight * its_gradient, hessian + part.weight * its_hessian
    return loss, gradient, hessian


@contextmanager
def some_batches(
    net: Callable[[], nn.Module], loss_fn: LossFn, *, size: int = 5, parts: int = 1, count: int = 3
) -> Iterator[tuple[Objective, list[Batch]]]:
    with objective_of(made(net), loss_fn, DATA) as objective:
        stream = random_batches(objective.source, size, parts=parts, seed=1)
        yield objective, [next(stream) for _ in range(count)]


def probes(objective: Objective, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, objective.num_parameters, generator=generator, dtype=torch.float64)


def symmetric_pairs(operator: Any, vectors: Tensor) -> Tensor:
    return torch.linalg.vecdot(vectors, operator.matvec(vectors))


# ---- batch after batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", [squared_error, cross_entropy])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("parts", [1, 3])
def test_sequential_operator(net: Callable[[], nn.Module], loss_fn: LossFn, parts: int) -> None:
    """Loss, gradient and product of each batch, as one and as a window of micro-batches (weights 1/k)."""
    with some_batches(net, loss_fn, parts=parts, size=4) as (objective, batches):
        operator = Sequential(objective, batches)
        vectors = probes(objective, 3)
        found = operator.losses(), operator.gradients(), operator.matvec(vectors)
        again = operator.restrict([2])(vectors[2:])
    expected = [dense(objective.module, loss_fn, batch) for batch in batches]
    losses, gradients, hessians = (torch.stack(column) for column in zip(*expected, strict=True))
    assert_close(found[0], losses)
    assert_close(found[1], gradients)
    assert_close(found[2], torch.einsum("bpq,bq->bp", hessians, vectors), steps=1000)
    assert torch.equal(again[0], found[2][2])


@pytest.mark.parametrize("slots", [0, 1, 100])
def test_graphs_that_do_not_fit_are_built_anew(slots: int) -> None:
    with some_batches(mlp, squared_error, parts=2) as (objective, batches):
        vectors = probes(objective, 3)
        kept = Sequential(objective, batches)
        some = Sequential(objective, batches, graph_slots=slots)
        assert torch.equal(some.matvec(vectors), kept.matvec(vectors))
        assert torch.equal(some.matvec(vectors), kept.matvec(vectors))
        assert torch.equal(some.gradients(), kept.gradients())


def test_retired_rows_free_their_graphs() -> None:
    with some_batches(mlp, squared_error) as (objective, batches):
        operator = Sequential(objective, batches)
        evaluations = []
        loss = objective.loss
        objective.loss = lambda batch: evaluations.append(1) or loss(batch)
        operator.matvec(probes(objective, 3))
        assert len(evaluations) == 3
        rest = operator.restrict([1])
        rest(probes(objective, 1))
        assert len(evaluations) == 3  # its graph is still there
        operator.matvec(probes(objective, 3))
        assert len(evaluations) == 5  # those of the others are not


# ---- the full batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", [squared_error, cross_entropy])
@pytest.mark.parametrize("chunk", [1, 5, 7, 21, 22, 100])
def test_full_batch_does_not_depend_on_its_chunks(loss_fn: LossFn, chunk: int) -> None:
    """22 samples: a ragged last chunk, none, or one for all."""
    with objective_of(made(cnn), loss_fn, DATA) as objective:
        batch = full_batch(objective.source, chunk)
        vectors = probes(objective, 1)
        operator = Sequential(objective, [batch])
        loss, gradient, product = operator.losses(), operator.gradients(), operator.matvec(vectors)
        value = loss_fn(objective.module, collated(DATA, range(22))).detach()
        expected = dense_gradient_and_hessian(objective.module, loss_fn, collated(DATA, range(22)))
    assert [part.size for part in batch] == [chunk] * (22 // chunk) + ([22 % chunk] if 22 % chunk else [])
    assert_close(loss[0], value)
    assert_close(gradient[0], expected[0])
    assert_close(product[0], expected[1] @ vectors[0], steps=1000)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_batch_in_pieces_is_the_batch(size: int) -> None:
    with some_batches(mlp, cross_entropy, size=7, parts=2) as (objective, batches):
        pieces = [split(batch, size) for batch in batches]
        vectors = probes(objective, 3)
        whole, split_up = Sequential(objective, batches), Sequential(objective, pieces)
        assert_close(split_up.losses(), whole.losses())
        assert_close(split_up.gradients(), whole.gradients())
        assert_close(split_up.matvec(vectors), whole.matvec(vectors), steps=1000)
    assert all(part.size <= size for batch in pieces for part in batch)
    for batch in pieces:
        assert_close(sum(part.weight for part in batch), 1.0, dtype=torch.float64)
        assert sum(part.size for part in batch) == 14


# ---- all batches in one pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", [squared_error, cross_entropy])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("parts", [1, 2])
def test_stacked_equals_sequential(net: Callable[[], nn.Module], loss_fn: LossFn, parts: int) -> None:
    with some_batches(net, loss_fn, parts=parts, count=5) as (objective, batches):
        assert agrees_when_stacked(objective, batches)
        vectors = probes(objective, 5)
        sequential, stacked = Sequential(objective, batches), Stacked(objective, batches)
        assert_close(stacked.losses(), sequential.losses())
        assert_close(stacked.gradients(), sequential.gradients())
        expected = sequential.matvec(vectors)
        assert_close(stacked.matvec(vectors), expected, steps=1000)
        for rows in ([0, 1, 3, 4], [1, 4], [2]):  # padded, stacked anew, stacked anew with one row
            assert_close(stacked.restrict(rows)(vectors[rows]), expected[rows], steps=1000)


def test_stacked_in_scaled_coordinates() -> None:
    with some_batches(mlp, squared_error) as (objective, batches):
        limits = probes(objective, 1)[0].abs() + 0.5
        scaling = Coordinates(limits, 0.1 * limits)
        vectors = probes(objective, 3)
        sequential, stacked = Sequential(objective, batches, scaling), Stacked(objective, batches, scaling)
        assert_close(stacked.gradients(), sequential.gradients())
        expected = sequential.matvec(vectors)
        assert_close(stacked.matvec(vectors), expected, steps=1000)
        assert_close(stacked.restrict([0])(vectors[:1]), expected[:1], steps=1000)


class Branch(nn.Module):
    """Looks at its data before it decides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        outputs = self.linear(pictures.flatten(1))
        return outputs.tanh() if float(outputs.detach().sum()) > 0 else outputs.sigmoid()


@pytest.mark.parametrize("net", [dropout, batch_norm_training, Branch])
def test_what_cannot_be_stacked_is_found_out(net: Callable[[], nn.Module]) -> None:
    with some_batches(net, squared_error) as (objective, batches):
        state = {name: value.clone() for name, value in objective.module.state_dict().items()}
        assert not agrees_when_stacked(objective, batches)
        objective.isolation.restore()
        for name, value in objective.module.state_dict().items():
            assert torch.equal(value, state[name]), name
            assert type(value) in (Tensor, nn.Parameter)


def test_batches_of_different_sizes_cannot_be_stacked() -> None:
    with some_batches(mlp, squared_error) as (objective, batches):
        assert not agrees_when_stacked(objective, [batches[0], split(batches[1], 3)])


# ---- coordinates -----------------------------------------------------------------------------------------------------


def test_scaled_operator() -> None:
    r"""D^{-1/2} (H + W) D^{-1/2} and D^{-1/2} g, with a learning rate of 0 for some parameters."""
    with some_batches(mlp, cross_entropy) as (objective, batches):
        limits = probes(objective, 1)[0].abs() + 0.5
        limits[::7] = torch.inf
        decay = probes(objective, 2)[1].abs()
        operator = Sequential(objective, batches, Coordinates(limits, decay))
        vectors = probes(objective, 3)
        products, gradients = operator.matvec(vectors), operator.gradients()
    factors = limits.rsqrt()
    assert bool((factors[::7] == 0).all()) and bool((products[:, ::7] == 0).all())
    for row, batch in enumerate(batches):
        _, gradient, hessian = dense(objective.module, cross_entropy, batch)
        matrix = torch.diag(factors) @ (hessian + torch.diag(decay)) @ torch.diag(factors)
        assert_close(products[row], matrix @ vectors[row], steps=1000)
        assert_close(gradients[row], factors * gradient)


def test_weight_decay_alone() -> None:
    with some_batches(mlp, squared_error) as (objective, batches):
        decay = probes(objective, 1)[0].abs()
        vectors = probes(objective, 3)
        plain = Sequential(objective, batches).matvec(vectors)
        assert_close(Sequential(objective, batches, Coordinates(None, decay)).matvec(vectors), plain + decay * vectors)


# ---- parameters ------------------------------------------------------------------------------------------------------


class Unused(nn.Module):
    """Has a parameter that no loss knows, one that is frozen, and one that the loss is linear in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 3)
        self.nobody = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.first(pictures.flatten(1)) * self.frozen


def test_unused_frozen_and_linear_parameters() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return squared_error(model.module, batch) + 3 * model.module.shift.sum()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Unused()

    with some_batches(Holder, loss_fn) as (objective, batches):
        operator = Sequential(objective, batches)
        vectors = probes(objective, 3)
        gradients, products = operator.gradients(), operator.matvec(vectors)
        assert objective.num_parameters == 16 * 3 + 3 + 5 + 1
    for row, batch in enumerate(batches):
        names = [name for name, each in objective.module.named_parameters() if each.requires_grad]
        assert names == ["module.nobody", "module.shift", "module.first.weight", "module.first.bias"]
        assert gradients[row][:5].tolist() == [0.0] * 5 and gradients[row][5] == 3.0
        assert products[row][:6].tolist() == [0.0] * 6
        samples = collated(DATA, batch[0].indices)
        gradient, hessian = dense_gradient_and_hessian(objective.module.module.first, flat_squared_error, samples)
        assert_close(gradients[row][6:], gradient)
        assert_close(products[row][6:], hessian @ vectors[row][6:], steps=1000)


def flat_squared_error(model: nn.Module, batch: Any) -> Tensor:
    return squared_error(model, (batch[0].flatten(1), batch[1]))


def test_an_affine_loss_has_no_curvature() -> None:
    def mean_output(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].flatten(1)).mean()

    with some_batches(lambda: nn.Linear(16, 3), mean_output) as (objective, batches):
        operator = Sequential(objective, batches)
        assert bool((operator.matvec(probes(objective, 3)) == 0).all())
        assert bool((operator.gradients().norm(dim=1) > 0).all())


def test_a_loss_without_any_parameter() -> None:
    with some_batches(mlp, lambda model, batch: batch[0].mean()) as (objective, batches):
        operator = Sequential(objective, batches)
        assert bool((operator.matvec(probes(objective, 3)) == 0).all())
        assert bool((operator.gradients() == 0).all())


# ---- finite differences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finite_differences_against_a_twin(dtype: torch.dtype) -> None:
    """The error of a central difference is of the order eps^(2/3)."""
    data = [(words, target.to(dtype)) for words, target in sentences()]
    model = made(Bag, dtype=dtype)
    originals = [parameter.detach().clone() for parameter in model.parameters()]
    with objective_of(model, squared_error, data) as objective:
        batch = full_batch(objective.source, 5)
        vectors = probes(objective, 1).to(dtype)
        operator = Sequential(objective, [batch], differences=True)
        product, gradient = operator.matvec(vectors)[0], operator.gradients()[0]
        assert bool((difference_product(objective, batch[0], 0 * vectors[0]) == 0).all())
        with pytest.raises(RuntimeError, match="_embedding_bag_backward"):
            Sequential(objective, [batch]).matvec(vectors)
    twin = made(lambda: Bag(twin=True))
    expected = dense_gradient_and_hessian(twin, squared_error, collated(sentences(), range(12)))
    assert_close(gradient, expected[0], dtype=dtype)
    error = float((product - expected[1] @ vectors[0].double()).norm() / product.norm())
    assert error <= 10 * torch.finfo(dtype).eps ** (2 / 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), originals, strict=True))


def test_differences_put_the_parameters_back_when_the_loss_raises() -> None:
    model, calls = made(mlp), []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no second time")
        return squared_error(model, batch)

    originals = [parameter.detach().clone() for parameter in model.parameters()]
    with objective_of(model, loss_fn, DATA) as objective, pytest.raises(RuntimeError, match="no second time"):
        difference_product(objective, Part(1.0, 2, (0, 1)), probes(objective, 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), originals, strict=True))


def test_half_precision_parameters_have_single_precision_vectors() -> None:
    with objective_of(made(mlp, dtype=torch.bfloat16), squared_error, pictures(dtype=torch.bfloat16)) as objective:
        graph = gradient_graph(objective, Part(1.0, 2, (0, 1)))
        assert graph.gradient.dtype == torch.float32
        operator = Sequential(objective, [(Part(1.0, 2, (0, 1)),)])
        assert operator.matvec(graph.gradient[None]).dtype == torch.float32
        scale = float(symmetric_pairs(operator, graph.gradient[None] / graph.gradient.norm()))
        assert scale != 0
