"""What an evaluation may change, and that it is put back. `test_measure.py` holds the same for whole measurements."""

import multiprocessing
import queue
import random
import threading
import time
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_eoss.curvature.batches import random_batches
from lightning_eoss.curvature.operators import Stacked
from lightning_eoss.isolation import snapshot
from lightning_eoss.isolation.isolate import isolated, noted_generators
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


def test_only_what_differs_is_written() -> None:
    """Bits are compared: NaN and minus zero included, through strides and expansion."""
    plain = torch.tensor([float("nan"), 0.0, 1.0])
    expanded, strided = torch.ones(1, 2).expand(3, 2), torch.arange(12.0).reshape(3, 4)[:, ::2]
    sparse, inference = torch.eye(2).to_sparse(), None
    with torch.inference_mode():
        inference = torch.zeros(2)
    model = nn.Linear(1, 1)
    for name, buffer in (("plain", plain), ("expanded", expanded), ("strided", strided), ("sparse", sparse)):
        model.register_buffer(name, buffer)
    model.inference = inference
    written, version = plain._version, strided._version
    with isolated(model) as isolation:
        isolation.restore()
        plain.numpy()[:] = -plain.numpy()  # behind torch's back
        expanded.data.as_strided((2,), (1,)).fill_(5)
        strided.mul_(2)
        sparse.mul_(2)
        inference.numpy()[:] = 1
        isolation.restore()
        assert strided.tolist() == [[0, 2], [4, 6], [8, 10]] and sparse.to_dense().tolist() == [[1, 0], [0, 1]]
        plain.data.fill_(3)
    assert plain.isnan().tolist() == [True, False, False] and plain[1:].tolist() == [0.0, 1.0]
    assert not plain[1].signbit() and expanded.tolist() == [[1, 1]] * 3 and inference.tolist() == [0, 0]
    assert plain._version == written and strided._version == version + 1  # by its owner


def test_other_memory_and_other_shapes_are_taken_back() -> None:
    buffer = torch.zeros(2)
    model = nn.Linear(1, 1)
    model.register_buffer("buffer", buffer)
    place = buffer.data_ptr()
    with isolated(model) as isolation:
        buffer.data = torch.ones(5)
        isolation.restore()
        assert buffer.tolist() == [0, 0]
        buffer.data = torch.ones(2)
    assert buffer.data_ptr() == place and buffer.tolist() == [0, 0]


class Slotted:
    __slots__ = ("__private", "generator", "missing")

    def __init__(self) -> None:
        self.__private = 0
        self.generator = random.Random(0)

    def disturb(self) -> None:
        self.__private += 1
        self.missing = 1
        self.generator.random()

    def state(self) -> Any:
        return self.__private, hasattr(self, "missing"), self.generator.random()


def disturbing(found: list[Any], owner: Owner) -> Any:
    """A function with a cell, a default and an attribute; all ways to an owner and to slots."""
    count, slotted = 0, Slotted()

    def function(kept: list[int] = []) -> None:  # noqa: B006
        nonlocal count
        count += 1
        kept.append(count)
        function.calls += 1
        slotted.disturb()
        owner.disturb()

    function.calls = 0
    found.append(lambda: (count, function.calls, list(function.__defaults__[0]), slotted.state(), state(owner)))
    return function


@pytest.mark.parametrize(
    "way",
    [
        lambda function, owner: function,
        lambda function, owner: partial(lambda inner: inner(), inner=function),
        lambda function, owner: {"deep": [({"down": deque([function])},)]},
        lambda function, owner: None,  # a hook of the module
    ],
)
def test_functions_are_followed(way: Any) -> None:
    found: list[Any] = []
    owner = Owner()
    function = disturbing(found, owner)
    before = disturbing(found, Owner()) and found[1]()
    handed = way(function, owner)
    model = nn.Linear(1, 1)
    if handed is None:
        model.register_forward_hook(lambda *_: function())
    with isolated(model, [handed]) as isolation:
        function()
        isolation.restore()
        function()
    assert found[0]() == before
    assert owner.draws() == Owner().draws()


def test_bound_methods_are_followed() -> None:
    owner, twin = Owner(), Owner()
    generators = owner.generators
    draws = [generators["numpy"].normal, generators["legacy"].rand, generators["python"].random, owner.items.append]
    with isolated(nn.Linear(1, 1), draws):
        for draw in draws[:3]:
            draw()
        owner.items.append(3)
    assert owner.draws() == twin.draws() and owner.items == [1, 2]


def test_modules_inside_of_other_objects_are_put_back() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: each.clone() for name, each in inner.state_dict().items()}
    with isolated(nn.Linear(1, 1), [{"encoder": [inner]}]), torch.no_grad():
        inner(torch.randn(4, 2))
        inner[0].weight.zero_()
        inner.eval()
    assert inner.training and all(torch.equal(each, before[name]) for name, each in inner.state_dict().items())


def test_a_frozen_parameter_is_put_back_each_time_and_a_large_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 9).requires_grad_(False))
    before = model[1].weight.clone()
    with isolated(model) as isolation, torch.no_grad():
        model[1].weight.mul_(0.9)
        isolation.restore()
        assert torch.equal(model[1].weight, before)
        model[1].weight.data = model[1].weight + 1
    assert torch.equal(model[1].weight, before)

    monkeypatch.setattr(snapshot, "_FROZEN", 0)
    model[1].requires_grad_(False)
    model[0].weight.requires_grad_(False)
    with isolated(model):
        pass
    with pytest.raises(ValueError, match=r"frozen parameters \(1.weight\) that are too large"), isolated(model):
        model[1].weight.mul_(0.9)


def test_a_trainable_parameter_is_put_back_and_refused() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"in place \(weight\)"), isolated(model) as isolation:  # noqa: PT012
        model.weight.data.mul_(2)  # as finite differences do, which put it back
        isolation.restore()
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)
    with pytest.raises(ValueError, match="in place"), isolated(model):  # noqa: PT012
        model.weight.data.mul_(2)
        raise RuntimeError("a graph that holds the parameter is spoilt")
    assert torch.equal(model.weight, before)
    with pytest.raises(KeyboardInterrupt), isolated(model):  # noqa: PT012
        model.weight.data.mul_(2)
        raise KeyboardInterrupt
    assert torch.equal(model.weight, before)


def test_gradients_are_put_back_with_what_they_hold() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    grad = model.weight.grad
    with isolated(model) as isolation:
        model(torch.ones(2)).backward()
        assert model.weight.grad.tolist() == [[2, 2]]
        isolation.restore()
        assert model.weight.grad.tolist() == [[1, 1]] and model.bias.grad is None
        model(torch.ones(2)).backward()
    assert model.weight.grad is grad and grad.tolist() == [[1, 1]] and model.bias.grad is None


def test_what_others_write_meanwhile_is_left_alone() -> None:
    class Source:
        def __init__(self) -> None:
            self.shared = torch.zeros(1).share_memory_()

    class Prefetching(Source):
        def __init__(self) -> None:
            super().__init__()
            self.ready: list[int] = []
            self.thread = threading.Thread(target=lambda: None)

    source, prefetching = Source(), Prefetching()
    with isolated(nn.Linear(1, 1), [source, prefetching]) as isolation:
        source.shared += 1
        prefetching.ready.append(1)
        isolation.restore()
    assert source.shared == 1 and prefetching.ready == [1]


def test_what_cannot_be_read_or_written_is_left_alone() -> None:
    class Stubborn:
        def __init__(self) -> None:
            self.inner = Owner()

        def __len__(self) -> int:
            raise OSError

        def __setattr__(self, name: str, value: Any) -> None:
            if name in vars(self):
                raise OSError
            super().__setattr__(name, value)

        @property
        def __class__(self) -> type:
            raise OSError

    with isolated(nn.Linear(1, 1), [Stubborn(), Owner()]) as isolation:
        isolation.restore()


def test_hooks_registered_inside_stay_until_the_end() -> None:
    model = nn.Linear(1, 1)
    calls: list[int] = []
    with isolated(model) as isolation:
        model.register_forward_hook(lambda *_: calls.append(1))
        isolation.restore()
        model(torch.ones(1))
    model(torch.ones(1))
    assert calls == [1]


def test_a_long_list_costs_nothing_between_evaluations() -> None:
    class Paths:
        def __init__(self) -> None:
            self.paths = [str(number) for number in range(300_000)]
            self.labels = dict.fromkeys(self.paths)

    paths = Paths()
    with isolated(nn.Linear(1, 1), [paths]) as isolation:
        started = time.perf_counter()
        for _ in range(20):
            isolation.restore()
        assert time.perf_counter() - started < 0.1  # 20 comparisons take longer
        paths.paths[7] = "other"
        paths.paths.append("new")
        isolation.restore()
        assert len(paths.paths) == 300_000 and paths.paths[7] == "7"
        paths.paths[7] = "other"
    assert paths.paths[7] == "7"
