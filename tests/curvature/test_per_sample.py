"""Gradients of single samples against autograd, one by one."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eoss.curvature import per_sample
from lightning_eoss.curvature.batches import Part, full_batch
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import gradient_graph
from lightning_eoss.curvature.per_sample import is_mean, sample_gradients, vectorises
from tests import oracles
from tests.oracles import per_sample_gradients
from tests.problems import (
    Attention,
    Tempered,
    Tied,
    assert_close,
    batch_norm,
    cnn,
    collated,
    cross_entropy,
    dense_gradient_and_hessian,
    layer_norm,
    made,
    mlp,
    objective_of,
    pictures,
    squared_error,
)

DATA = pictures(9)
NETS = [mlp, cnn, layer_norm, batch_norm, Attention, Tied, Tempered]


def one_by_one(model: nn.Module, loss_fn: Any = squared_error, indices: Any = range(9)) -> Tensor:
    return torch.stack([dense_gradient_and_hessian(model, loss_fn, collated(DATA, [index]))[0] for index in indices])


def whole(objective: Objective) -> Part:
    (part,) = full_batch(objective.source, 9)
    return part


@pytest.mark.parametrize("loss_fn", [squared_error, cross_entropy])
@pytest.mark.parametrize("net", NETS)
def test_they_are_those_of_autograd_one_by_one(net: Any, loss_fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def graph(objective: Objective, part: Part, **options: Any) -> Any:
        taken.append(part.size)
        return gradient_graph(objective, part, **options)

    for module in (per_sample, oracles):
        monkeypatch.setattr(module, "gradient_graph", graph)
    model = made(net)
    expected = one_by_one(model, loss_fn)
    with objective_of(model, loss_fn, DATA) as objective:
        rows = per_sample_gradients(objective, whole(objective))
    assert rows.shape == expected.shape and not rows.requires_grad
    assert_close(rows, expected)
    assert taken == [9]  # their mean's, which all of them together are compared with


def test_float32_and_some_samples_in_their_order() -> None:
    model = made(mlp, dtype=torch.float32)
    with objective_of(model, squared_error, pictures(9, dtype=torch.float32)) as objective:
        rows = per_sample_gradients(objective, Part(0.5, 3, (7, 0, 4), seed=3))
    assert_close(rows, one_by_one(made(mlp), indices=(7, 0, 4)), dtype=torch.float32)


def test_frozen_parameters_have_none() -> None:
    model = made(mlp)
    model[1].weight.requires_grad_(False)
    expected = one_by_one(model)
    with objective_of(model, squared_error, DATA) as objective:
        assert_close(per_sample_gradients(objective, whole(objective)), expected)


def test_parameters_that_others_train_have_none() -> None:
    model = made(mlp)
    owned = {id(parameter) for parameter in model[3].parameters()}
    expected = one_by_one(model)[:, -sum(parameter.numel() for parameter in model[3].parameters()) :]
    with objective_of(model, squared_error, DATA, owned=owned) as objective:
        assert_close(per_sample_gradients(objective, whole(objective)), expected)


def test_an_unused_parameter_has_zeros() -> None:
    model = nn.ModuleDict({"net": made(mlp), "unused": nn.Linear(2, 2).double()})
    with objective_of(model, lambda module, batch: squared_error(module["net"], batch), DATA) as objective:
        rows = per_sample_gradients(objective, whole(objective))
    assert_close(rows[:, :-6], one_by_one(made(mlp)))
    assert not rows[:, -6:].any()


def branching(model: nn.Module, batch: Any) -> Tensor:
    """No `vmap` follows a branch on data."""
    loss = squared_error(model, batch)
    return 2 * loss if float(loss.detach()) > 1.0 else loss / 2


def test_what_cannot_be_vectorised_is_taken_one_by_one() -> None:
    model = made(mlp)
    expected = one_by_one(model, branching)
    plain = one_by_one(model)
    assert {round(float(ratio), 6) for ratio in expected.norm(dim=1) / plain.norm(dim=1)} == {0.5, 2.0}
    with objective_of(model, branching, DATA) as objective:
        assert not vectorises(objective, whole(objective))
        assert_close(per_sample_gradients(objective, whole(objective)), expected)


def test_batches_that_hold_more_than_tensors_are_taken_one_by_one() -> None:
    named = [{"picture": picture, "target": target, "name": "a name"} for picture, target in DATA]
    model = made(mlp)
    with objective_of(model, lambda m, b: squared_error(m, (b["picture"], b["target"])), named) as objective:
        assert not vectorises(objective, whole(objective))
        assert_close(per_sample_gradients(objective, whole(objective)), one_by_one(model))


def transposed(samples: Any) -> Any:
    """Time first, and as many moments as samples."""
    inputs, targets = torch.utils.data.default_collate(samples)
    return inputs.transpose(0, 1), targets.transpose(0, 1)


def test_samples_that_do_not_lie_along_the_first_dimension() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(6, 3, generator=generator).double(), torch.randn(6, 2).double()) for _ in range(6)]
    model = nn.Linear(3, 2).double()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        moments = torch.arange(1.0, 7.0).double()[: len(inputs), None, None]
        return (moments * (model(inputs) - targets).square()).sum((0, 2)).mean()

    expected = torch.stack([dense_gradient_and_hessian(model, loss_fn, transposed([each]))[0] for each in data])
    with objective_of(model, loss_fn, data) as objective:
        object.__setattr__(objective.source, "collate", transposed)
        (part,) = full_batch(objective.source, 6)
        assert_close(per_sample_gradients(objective, part), expected)


@pytest.mark.parametrize("loss_fn", [squared_error, branching])
def test_a_few_at_a_time_and_every_sample_loaded_once(loss_fn: Any) -> None:
    fetched: list[int] = []

    class Counted(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            fetched.append(index)
            return super().__getitem__(index)

    model = made(mlp)
    with objective_of(model, loss_fn, Counted(DATA)) as objective:
        blocks = list(sample_gradients(objective, whole(objective), 4))
    assert [len(block) for block in blocks] == [4, 4, 1]
    assert_close(torch.cat(blocks), one_by_one(model, loss_fn))
    assert fetched == list(range(9))


def test_ready_samples() -> None:
    model = made(mlp)
    with objective_of(model, squared_error, DATA) as objective:
        assert vectorises(objective, whole(objective))
        rows = per_sample_gradients(objective, Part(1.0, 9, data=collated(DATA, range(9))))
    assert_close(rows, one_by_one(model))


@pytest.mark.parametrize("together", [True, False])
def test_a_loss_that_changes_its_batch_or_its_module_leaves_no_trace(together: bool) -> None:
    model = made(mlp)
    model.register_buffer("count", torch.zeros(()))
    model.seen, model.calls = [], 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        model.calls += 1
        loss = squared_error(model, batch) * model.calls
        batch[1].mul_(0)
        model.seen.append(loss.detach())
        model.count = model.count + loss.detach()
        assert together or float(loss.detach()) >= 0  # no `vmap` gets past this, and the batch is changed already
        return loss

    with objective_of(model, loss_fn, DATA) as objective:
        part = whole(objective)
        assert vectorises(objective, part) == together
        assert_close(torch.cat(list(sample_gradients(objective, part, 4))), one_by_one(made(mlp)))
        assert_close(gradient_graph(objective, part).gradient, one_by_one(made(mlp)).mean(0))
    assert model.seen == [] and model.calls == 0 and float(model.count) == 0.0


def test_a_teacher_that_follows_by_data_does_not_hang() -> None:
    """Under `torch.func.grad` this never returns."""

    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher = made(mlp), made(mlp, seed=1).requires_grad_(False)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        for parameter, slow in zip(model.net.parameters(), model.teacher.parameters(), strict=True):
            slow.data = slow.data * 0.9 + parameter.data * 0.1
        return squared_error(model.net, batch) + (model.net(batch[0]) - model.teacher(batch[0])).square().mean()

    model = Taught()
    with objective_of(model, loss_fn, DATA) as objective:
        part = whole(objective)
        assert not vectorises(objective, part)
        rows = per_sample_gradients(objective, part)
        assert_close(rows.mean(0), gradient_graph(objective, part).gradient)


def test_agreement_is_judged_by_the_size_of_single_gradients() -> None:
    """At a minimum the mean is nothing but rounding."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1e-7]])
    mean, square = rows.mean(0), rows.square().sum(1).mean()
    assert is_mean(mean, torch.zeros(2), square)
    assert not is_mean(mean, torch.tensor([0.01, 0.0]), square)
    assert not is_mean(mean, torch.tensor([torch.nan, 0.0]), square)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_mean(mean, mean, torch.tensor(torch.nan))
