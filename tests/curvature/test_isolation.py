"""What an evaluation may change, and that it is put back. `test_measure.py` holds the same for whole measurements."""

import multiprocessing
import queue
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_eoss.curvature.isolation import isolated, noted_generators
from lightning_eoss.curvature.objective import random_batches
from lightning_eoss.curvature.operators import Stacked
from tests.problems import made, mlp, objective_of, pictures, squared_error

torch.set_num_threads(1)


class Owner:
    """A data object with everything that is followed."""

    def __init__(self) -> None:
        self.count = 0
        self.items = [1, 2]
        self.queue = deque([1], maxlen=4)
        self.table = {"a": 1}
        self.names = {"x"}
        self.tensor = torch.zeros(3)
        self.array = np.zeros(3)
        self.rows = [torch.zeros(2), np.zeros(2)]
        self.generators = {
            "numpy": np.random.default_rng(0),
            "legacy": np.random.RandomState(0),
            "python": random.Random(0),
            "torch": torch.Generator().manual_seed(0),
        }
        self.read_only = np.zeros(2)
        self.read_only.flags.writeable = False

    def draws(self) -> list[float]:
        g = self.generators
        return [
            g["numpy"].random(),
            g["legacy"].rand(),
            g["python"].random(),
            float(torch.rand((), generator=g["torch"])),
        ]

    def disturb(self) -> None:
        self.count += 1
        self.items.append(3)
        self.queue.clear()
        self.table["b"] = 2
        self.names.clear()
        self.tensor += 1
        self.array += 1
        self.rows[0] += 1
        self.rows[1] += 1
        self.new = 1
        self.draws()


def state(owner: Owner) -> list[Any]:
    return [
        owner.count,
        list(owner.items),
        list(owner.queue),
        dict(owner.table),
        set(owner.names),
        owner.tensor.tolist(),
        owner.array.tolist(),
        [each.tolist() for each in owner.rows],
        hasattr(owner, "new"),
    ]


class Wrapper:
    def __init__(self, inner: Owner) -> None:
        self.inner = [inner]


@pytest.mark.parametrize("wrapped", [False, True])
def test_objects_are_put_back(wrapped: bool) -> None:
    owner, twin = Owner(), Owner()
    before, identities = state(owner), (id(owner.items), id(owner.tensor))
    with isolated(nn.Linear(1, 1), [Wrapper(owner) if wrapped else owner]) as isolation:
        owner.disturb()
        owner.items = [9]
        assert state(owner) != before
        isolation.restore()
        assert state(owner) == before
        owner.disturb()
    assert state(owner) == before and (id(owner.items), id(owner.tensor)) == identities
    assert owner.draws() == twin.draws()


def test_reseeding_reaches_every_generator() -> None:
    owner = Owner()

    def draws() -> list[float]:
        return [*owner.draws(), float(torch.rand(())), float(np.random.rand()), random.random()]

    with isolated(nn.Linear(1, 1), [owner]) as isolation:
        isolation.reseed(2**32 - 1)
        first = draws()
        assert all(one != other for one, other in zip(first, draws(), strict=True))
        isolation.reseed(2**32 - 1)
        assert draws() == first
        isolation.reseed(5)
        assert all(one != other for one, other in zip(first, draws(), strict=True))


def test_global_generators_go_back() -> None:
    back = noted_generators()
    first = float(torch.rand(())), float(np.random.rand()), random.random()
    back()
    assert (float(torch.rand(())), float(np.random.rand()), random.random()) == first


def test_modules_are_put_back_also_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.plain = torch.zeros(2)
    grads = [torch.ones_like(parameter) for parameter in model.parameters()]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    parameters, buffer = list(model.parameters()), model[1].running_mean
    with pytest.raises(KeyError), isolated(model):  # noqa: PT012
        model(torch.randn(4, 2))
        model.eval()
        model.extra = 1
        model.plain += 1
        model[1].running_mean = torch.ones(2)
        model.register_buffer("late", torch.ones(1))
        model[0].weight = nn.Parameter(torch.zeros(2, 2))
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        raise KeyError
    assert model.training and model[1].training and not hasattr(model, "extra") and not hasattr(model, "late")
    assert model[1].running_mean is buffer and buffer.tolist() == [0.0, 0.0] and int(model[1].num_batches_tracked) == 0
    assert model.plain.tolist() == [0.0, 0.0]
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(each.grad is grad and each.requires_grad for each, grad in zip(parameters, grads, strict=True))


class Twice(nn.Module):
    """One module used at two places, which `functional_call` does not put back by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.head = nn.Linear(16, 3)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(pictures.flatten(1))))))


def test_stacking_leaves_modules_that_are_used_twice_intact() -> None:
    model = made(Twice)
    weight = model.first.weight
    with objective_of(model, squared_error, pictures()) as objective:
        stream = random_batches(objective.source, 4, seed=0)
        Stacked(objective, [next(stream), next(stream)])
    assert model.first.weight is weight and isinstance(weight, nn.Parameter)


def test_stacking_takes_a_loss_that_is_the_module() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, batch: Any) -> torch.Tensor:
            return squared_error(self.net, batch)

    model = made(Own)
    parameters = list(model.parameters())
    with objective_of(model, lambda _, batch: model(batch), pictures()) as objective:
        objective.loss = model
        stream = random_batches(objective.source, 4, seed=0)
        batches = [next(stream), next(stream)]
        Stacked(objective, batches)
        assert Stacked(objective, batches).losses().shape == (2,)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_inside_everything_can_be_differentiated_twice() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), isolated(nn.Linear(1, 1)):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        (gradient,) = torch.autograd.grad(
            F.scaled_dot_product_attention(query, query, query).sum(), query, create_graph=True
        )
        torch.autograd.grad(gradient.square().sum(), query)
    assert torch.is_grad_enabled()


def test_live_iterators_and_queues_are_left_alone() -> None:
    """Other threads change them meanwhile: what they took out of a queue must not come back."""

    class Source:
        def __init__(self) -> None:
            self.queue = multiprocessing.Queue()
            self.threads = queue.SimpleQueue()
            self.pending = queue.Queue()
            self.pending.put("taken meanwhile")

    source = Source()
    with isolated(nn.Linear(1, 1), [source]) as isolation:
        source.pending.get()
        isolation.restore()
    assert source.pending.empty()
    source.queue.close()
