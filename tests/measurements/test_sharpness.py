"""FullBS, MiniBS and directional sharpness against dense Hessians, and that measuring leaves no trace."""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_eoss import checks
from lightning_eoss.curvature.batches import BatchListSource, DatasetSource, Part, full_batch, random_batches
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import PLAIN, Coordinates, Sequential, Stacked
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.curvature.seeds import Use, derived_seed
from lightning_eoss.curvature.solver import Plan, Solver, WarmStart
from lightning_eoss.curvature.workers import Workers
from lightning_eoss.isolation.isolate import isolated
from lightning_eoss.measurements.sharpness import SharpnessMeasurement, measure_sharpness, sharpness
from tests.problems import (
    NETS,
    LossFn,
    assert_close,
    batch_norm_training,
    collated,
    cross_entropy,
    dense_gradient_and_hessian,
    dropout,
    made,
    mlp,
    objective_of,
    pictures,
    squared_error,
    sum_of_errors,
    top,
    weighted_cross_entropy,
)

torch.set_num_threads(1)

DATA = pictures()
TOL = 1e-6


def drawn(source: Any, plan: Plan, count: int, stream: int = 0) -> list[Any]:
    """The mini-batches that `sharpness` draws."""
    seed = derived_seed(plan.seed, Use.MINI_BATCHES, stream)
    batches = random_batches(source, plan.batch_size, parts=plan.parts, seed=seed)
    return list(itertools.islice(batches, count))


def dense_values(
    model: nn.Module, loss_fn: LossFn, batches: Any, scaling: Coordinates | None = None
) -> tuple[Any, Any]:
    """lambda_max and directional sharpness of each batch."""
    values, directional = [], []
    for batch in batches:
        pieces = [(part.weight, collated(DATA, part.indices)) for part in batch]
        pairs = [(weight, dense_gradient_and_hessian(model, loss_fn, samples)) for weight, samples in pieces]
        gradient = sum(weight * pair[0] for weight, pair in pairs)
        hessian = sum(weight * pair[1] for weight, pair in pairs)
        if scaling is not None and scaling.factors is not None and scaling.weight_decay is not None:
            factors = scaling.factors
            hessian = factors[:, None] * (hessian + torch.diag(scaling.weight_decay)) * factors
            gradient = factors * gradient
        values.append(top(hessian))
        directional.append(float(gradient @ hessian @ gradient / gradient.square().sum()))
    return values, directional


def measured(
    net: Callable[[], nn.Module], loss_fn: LossFn, plan: Plan, scaling: Any = None, **options: Any
) -> tuple[SharpnessMeasurement, Objective]:
    with objective_of(made(net), loss_fn, DATA) as objective:
        findings = preflight(objective, plan.batch_size, parts=plan.parts)
        if scaling is not None:
            scaling = scaling(objective.num_parameters)
        return sharpness(Solver(objective, plan, findings, coordinates=scaling or PLAIN), **options)[0], objective


# ---- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("loss_fn", [squared_error, cross_entropy])
@pytest.mark.parametrize("net", NETS)
def test_every_value_against_dense_hessians(net: Callable[[], nn.Module], loss_fn: LossFn, parts: int) -> None:
    """From scratch: FullBS, each lambda_max(H_B), and each directional sharpness."""
    plan = Plan(4, parts, num_batches=4, tol=TOL, seed=3)
    found, objective = measured(net, loss_fn, plan)
    batches = drawn(objective.source, plan, 4)
    values, directional = dense_values(objective.module, loss_fn, batches)
    assert len(found.plain.values) == 4
    assert_close(torch.tensor(found.plain.values) / torch.tensor(values), torch.ones(4), steps=10, dtype=torch.float32)
    assert torch.tensor(found.plain.values).double().tolist() == pytest.approx(values, rel=TOL)
    assert list(found.directional.values) == pytest.approx(directional, rel=1e-9)
    (full,), _ = dense_values(objective.module, loss_fn, [full_batch(objective.source, 22)])
    assert found.full_batch.value == pytest.approx(full, rel=TOL)
    assert found.full_batch.converged and found.full_batch.residual <= TOL * abs(full)
    assert found.plain.mean == pytest.approx(sum(values) / 4, rel=TOL)
    assert found.num_samples == 22 and found.batch_size == 4 * parts
    assert found.gap.mean == pytest.approx(found.mini_batch.mean - full, rel=1e-3, abs=1e-9)
    assert abs(found.audit) <= 10 * TOL


def test_the_current_batch() -> None:
    plan = Plan(4, num_batches=1, tol=TOL)
    batch = (Part(0.5, 4, tuple(range(4))), Part(0.5, 3, (9, 8, 7)))
    found, objective = measured(mlp, cross_entropy, plan, current=batch, full=False, mini=False)
    (value,), _ = dense_values(objective.module, cross_entropy, [batch])
    assert found.current_batch.value == pytest.approx(value, rel=TOL)
    assert math.isnan(found.full_batch.value) and math.isnan(found.mini_batch.mean) and math.isnan(found.gap.mean)
    assert found.hvps > 0 and found.full_passes == 0


def test_a_current_batch_that_is_loaded_already() -> None:
    plan = Plan(4, num_batches=1, tol=TOL)
    ready = (Part(1.0, 4, data=collated(DATA, range(4))),)
    found, _ = measured(mlp, cross_entropy, plan, current=ready, full=False, mini=False)
    same, _ = measured(mlp, cross_entropy, plan, current=(Part(1.0, 4, (0, 1, 2, 3)),), full=False, mini=False)
    assert found.current_batch == same.current_batch


def test_scaled_coordinates() -> None:
    """Edge ratios: limits that differ, one of them infinite (a learning rate of 0), and coupled weight decay."""

    def scaling(dim: int) -> Coordinates:
        generator = torch.Generator().manual_seed(0)
        limits = torch.rand(dim, generator=generator, dtype=torch.float64) + 0.5
        limits[3] = torch.inf
        return Coordinates(limits, torch.rand(dim, generator=generator, dtype=torch.float64))

    plan = Plan(5, num_batches=3, tol=TOL)
    found, objective = measured(mlp, cross_entropy, plan, scaling)
    coordinates = scaling(objective.num_parameters)
    batches = drawn(objective.source, plan, 3)
    values, directional = dense_values(objective.module, cross_entropy, batches, coordinates)
    assert list(found.plain.values) == pytest.approx(values, rel=TOL)
    assert list(found.directional.values) == pytest.approx(directional, rel=1e-9)
    (full,), _ = dense_values(objective.module, cross_entropy, [full_batch(objective.source, 22)], coordinates)
    assert found.full_batch.value == pytest.approx(full, rel=TOL)


def regression_data(num_samples: int = 7, dim: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64)
    return [(each, torch.zeros(1, dtype=torch.float64)) for each in inputs]


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_linear_regression_enumerated_over_all_batches(batch_size: int) -> None:
    """H_B = X_B'X_B / b whatever the parameters: the mean over all batches, each as often as any other, is MiniBS."""
    data, model = regression_data(), nn.Linear(3, 1, bias=False).double()
    inputs = torch.stack([each for each, _ in data])
    subsets = list(itertools.combinations(range(7), batch_size))
    exact = [top(inputs[list(subset)].T @ inputs[list(subset)] / batch_size) for subset in subsets]
    with isolated(model, [data]) as isolation, objective_of(model, squared_error, data) as objective:
        assert isolation
        plan = Plan(batch_size, num_batches=len(subsets), rel_error=1e-9, tol=TOL)
        every = iter([(Part(1.0, batch_size, subset),) for subset in subsets])
        findings = preflight(objective, batch_size)
        found, _ = sharpness(Solver(objective, plan, findings), batches=every)
        sampled, _ = sharpness(Solver(objective, Plan(batch_size, num_batches=200, tol=TOL), findings))
    assert list(found.plain.values) == pytest.approx(exact, rel=TOL)
    assert found.plain.mean == pytest.approx(sum(exact) / len(exact), rel=TOL)
    assert found.full_batch.value == pytest.approx(top(inputs.T @ inputs / 7), rel=TOL)
    assert abs(sampled.mini_batch.mean - sum(exact) / len(exact)) <= 4 * sampled.mini_batch.stderr
    assert math.isnan(found.control_mean) and math.isfinite(sampled.control_mean)


def test_the_mean_of_the_controls_is_known_exactly() -> None:
    """Over all batches, although FullBS is far from converged."""

    def undecided(decision: Any) -> Any:  # goes on to the last batch
        return decision if isinstance(decision, Tensor) else False

    data, model = regression_data(8, 30), nn.Linear(30, 1, bias=False).double()
    subsets = list(itertools.combinations(range(8), 3))
    for warm in (WarmStart(), WarmStart(*torch.eye(30, dtype=torch.float64)[:2])):
        with objective_of(model, squared_error, data) as objective:
            plan = Plan(3, num_batches=len(subsets), tol=0.05)
            findings = preflight(objective, 3)
            every = iter([(Part(1.0, 3, subset),) for subset in subsets])
            solver = Solver(objective, plan, findings, workers=Workers(decide=undecided))
            found, _ = sharpness(solver, warm, batches=every)
            known, _ = sharpness(Solver(objective, plan, findings), warm)
        assert len(found.controls) == len(subsets) and found.full_batch.residual > 1e-6
        assert sum(found.controls) / len(found.controls) == pytest.approx(known.control_mean, rel=1e-12)


def test_the_whole_data_set_is_one_batch() -> None:
    found, objective = measured(mlp, cross_entropy, Plan(22, tol=TOL))
    (full,), directional = dense_values(objective.module, cross_entropy, [full_batch(objective.source, 22)])
    estimate = found.mini_batch
    assert estimate.mean == pytest.approx(full, rel=TOL) == found.full_batch.value
    assert len(estimate.values) == 1 and estimate.stderr == 0 and estimate.lower == estimate.mean
    assert estimate.upper <= estimate.mean * (1 + 1e-5)
    assert [found.directional.mean] == pytest.approx(directional, rel=1e-9)


def test_a_subset_of_the_samples() -> None:
    """The full batch is then a fixed random subset, and no control variate is known."""
    found, objective = measured(mlp, squared_error, Plan(4, num_batches=2, tol=TOL, full_batch_samples=9, seed=5))
    chosen = full_batch(objective.source, 22, max_samples=9, seed=5)
    (value,), _ = dense_values(objective.module, squared_error, [chosen])
    assert len(set(chosen[0].indices)) == 9 == found.num_samples
    assert found.full_batch.value == pytest.approx(value, rel=TOL)
    assert math.isnan(found.control_mean)


def test_small_memory_gives_the_same_numbers() -> None:
    """Micro-batches of one sample, no graph kept, one row at a time."""
    usual, _ = measured(mlp, squared_error, Plan(5, num_batches=3, tol=TOL))
    small, _ = measured(mlp, squared_error, Plan(5, num_batches=3, tol=TOL, memory_bytes=1.0))
    assert small.full_batch.value == pytest.approx(usual.full_batch.value, rel=TOL)
    assert list(small.plain.values) == pytest.approx(list(usual.plain.values), rel=TOL)


def test_ready_batches_are_never_split() -> None:
    model = made(mlp)
    batches = [collated(DATA, range(first, first + 6)) for first in (0, 6, 12)]
    with isolated(model) as isolation:
        source = BatchListSource(batches, [6, 6, 6])
        objective = Objective(model, lambda batch: squared_error(model, batch), source, isolation)
        found, _ = sharpness(Solver(objective, Plan(1, num_batches=3, tol=TOL), preflight(objective, 1)))
    chunks = [(Part(1.0, 6, tuple(range(first, first + 6))),) for first in (0, 6, 12)]
    exact, _ = dense_values(model, squared_error, chunks)
    assert all(min(abs(value / each - 1) for each in exact) < TOL for value in found.plain.values)
    (full,), _ = dense_values(model, squared_error, [(Part(1.0, 18, tuple(range(18))),)])
    assert found.full_batch.value == pytest.approx(full, rel=TOL)
    assert found.batch_size == 6 and found.num_samples == 18


def test_curvlinops_agrees() -> None:
    """An independent implementation of the same products, with SciPy's solver."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops, the second oracle, is not installed")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    model = made(mlp)
    chunks = [collated(DATA, range(first, min(first + 8, 22))) for first in range(0, 22, 8)]
    operator = curvlinops.HessianLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y.argmax(-1)) for x, y in chunks],
        check_deterministic=False,
    )
    (expected,) = linalg.eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False, tol=1e-10)
    found, _ = measured(mlp, cross_entropy, Plan(4, num_batches=1, tol=TOL))
    assert found.full_batch.value == pytest.approx(float(expected), rel=TOL)


# ---- kinds of losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "loss_fn"),
    [(batch_norm_training, squared_error), (dropout, squared_error), (mlp, weighted_cross_entropy)],
)
def test_without_sample_means_the_estimate_is_the_plain_mean(net: Callable[[], nn.Module], loss_fn: LossFn) -> None:
    found, _ = measured(net, loss_fn, Plan(6, num_batches=20, rel_error=1e-9))
    assert math.isnan(found.control_mean) and len(found.plain.values) == 20
    assert found.mini_batch == found.plain
    assert found.plain.mean == pytest.approx(sum(found.plain.values) / 20)


def test_with_sample_means_the_control_variate_narrows_the_interval() -> None:
    found, _ = measured(mlp, squared_error, Plan(6, num_batches=40, rel_error=1e-9, seed=1))
    assert math.isfinite(found.control_mean) and len(found.controls) == 40
    assert found.mini_batch.stderr < 0.8 * found.plain.stderr
    assert abs(found.mini_batch.mean - found.plain.mean) <= 4 * found.plain.stderr


def test_a_sum_is_measured_as_it_is() -> None:
    found, objective = measured(mlp, sum_of_errors, Plan(4, num_batches=2, tol=TOL))
    values, _ = dense_values(objective.module, sum_of_errors, drawn(objective.source, Plan(4), 2))
    assert list(found.plain.values) == pytest.approx(values, rel=TOL)


def test_a_loss_without_curvature_is_measured_as_zero() -> None:
    def mean_output(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].flatten(1)).mean()

    found, _ = measured(lambda: nn.Linear(16, 3), mean_output, Plan(4, num_batches=3))
    assert found.full_batch.value == 0 and found.full_batch.converged
    assert found.mini_batch.mean == 0 == found.directional.mean


@pytest.mark.parametrize("stacked", [False, True])
def test_a_loss_that_is_not_finite_measures_nothing_and_raises_nothing(stacked: bool) -> None:
    def infinite(model: nn.Module, batch: Any) -> Tensor:
        return squared_error(model, batch) * torch.inf

    found, _ = measured(mlp, infinite, Plan(4))
    for value in (found.full_batch.value, found.mini_batch.mean, found.directional.mean, found.gap.mean, found.audit):
        assert math.isnan(value)
    assert found.mini_batch.values == () and not found.full_batch.converged
    with objective_of(made(mlp), infinite, DATA) as objective:
        findings = dataclasses.replace(preflight(objective, 4), stacked=stacked)
        warm = WarmStart(torch.ones(objective.num_parameters, dtype=torch.float64))
        again, kept = sharpness(Solver(objective, Plan(4), findings), warm)
    assert math.isnan(again.full_batch.value)
    assert kept is warm  # a start survives a step that cannot be measured


def test_batches_that_are_not_finite_are_left_out() -> None:
    data = [(inputs, target) for inputs, target in DATA]
    data[0] = (data[0][0] * torch.nan, data[0][1])
    with objective_of(made(mlp), squared_error, data) as objective:
        clean = preflight(objective, 3, seed=2)
        plan = Plan(3, num_batches=12, rel_error=1e-9)
        found, _ = sharpness(Solver(objective, plan, clean), full=False)
        bad = [any(0 in part.indices for part in batch) for batch in drawn(objective.source, plan, 12)]
    assert 0 < sum(bad) < 12
    assert len(found.plain.values) == 12 - sum(bad) == len(found.controls)
    assert abs(found.audit) < 0.05


# ---- the same again --------------------------------------------------------------------------------------------------


class Cropped(Dataset[Any]):
    """Owns a generator, counts its reads, and keeps what it did."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.reads = 0
        self.log: list[int] = []
        self.shifts = torch.zeros(3)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        self.log.append(index)
        self.shifts += 1
        noise = self.generator.normal() + np.random.standard_normal() + random.random() + float(torch.rand(()))
        inputs, target = DATA[index]
        return inputs + 0.01 * noise, target


class Restless(nn.Module):
    """Everything that a forward pass can move."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 3)
        )
        self.calls = 0
        self.seen: list[float] = []
        self.stats = {"largest": torch.zeros(())}

    def forward(self, pictures: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(pictures.mean()))
        self.stats["largest"].fill_(float(pictures.max()))
        outputs: Tensor = self.net(pictures)
        self.train(self.training)
        return outputs


def snapshot(model: Restless, data: Cropped) -> list[Any]:
    """Everything of them and of the random generators, by value."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}
    return [
        state,
        grads,
        [module.training for module in model.modules()],
        [id(parameter) for parameter in model.parameters()],
        (model.calls, list(model.seen), float(model.stats["largest"])),
        (data.reads, list(data.log), data.shifts.clone(), data.generator.bit_generator.state),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        torch.is_grad_enabled(),
        [dict(parameter._backward_hooks or {}) for parameter in model.parameters()],
    ]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def restless() -> tuple[Restless, Cropped]:
    model, data = made(Restless), Cropped()
    squared_error(model, collated(data, range(5))).backward()  # gradients that are there already
    model.net[2].eval()  # modes that differ
    next(iter(model.parameters())).register_hook(lambda gradient: 0.1 * gradient)
    return model, data


class Calls:
    """Counts where no isolation reaches: in a class."""

    number = 0


@pytest.mark.parametrize("fails_at", [None, 4, 18])
def test_nothing_is_changed(fails_at: int | None) -> None:
    model, data = restless()
    Calls.number = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        Calls.number += 1
        model.train()
        if Calls.number == fails_at:
            raise RuntimeError("half-way")
        return squared_error(model, batch)

    before = snapshot(model, data)
    if fails_at is None:
        found = measure_sharpness(model, loss_fn, data, batch_size=4, num_batches=3)
        assert found.full_batch.value > 0 and found.mini_batch.mean > 0
    else:
        with pytest.raises(RuntimeError, match="half-way"):
            measure_sharpness(model, loss_fn, data, batch_size=4, num_batches=3)
        assert Calls.number == fails_at
    for first, second in zip(before, snapshot(model, data), strict=True):
        assert same(first, second), (first, second)


def test_hooks_of_parameters_change_neither_number_nor_training() -> None:
    data, model, hooked = DATA, made(mlp), made(mlp)
    for parameter in hooked.parameters():
        parameter.register_hook(lambda gradient: 0.1 * gradient)
    plain = measure_sharpness(model, squared_error, data, batch_size=4, num_batches=3)
    found = measure_sharpness(hooked, squared_error, data, batch_size=4, num_batches=3)
    assert found.mini_batch == plain.mini_batch and found.full_batch == plain.full_batch
    for each in (model, hooked):
        squared_error(each, collated(data, range(5))).backward()
    for one, other in zip(model.parameters(), hooked.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(0.1 * one.grad, other.grad)


@pytest.mark.parametrize("net", [mlp, dropout, batch_norm_training])
def test_the_same_seed_gives_the_same_bits(net: Callable[[], nn.Module]) -> None:
    def run(seed: int) -> SharpnessMeasurement:
        data = Cropped()
        return measure_sharpness(made(net), squared_error, data, batch_size=4, num_batches=12, seed=seed)

    torch.manual_seed(0)
    first = run(3)
    torch.manual_seed(1)
    np.random.seed(5)
    again, other = run(3), run(4)
    for name in ("mini_batch", "directional", "full_batch", "gap", "controls", "audit", "hvps"):
        assert getattr(first, name) == getattr(again, name), name
    assert first.mini_batch.values != other.mini_batch.values


def test_every_pass_sees_the_same_augmentation() -> None:
    """Otherwise products with one batch would come from different operators, and no residual would shrink."""
    found = measure_sharpness(made(mlp), squared_error, Cropped(), batch_size=16, tol=1e-9)
    assert found.full_batch.converged and found.full_batch.relative_residual <= 1e-9
    with objective_of(made(dropout), squared_error, DATA) as objective:
        part = Part(1.0, 3, (0, 1, 2), seed=7)
        first, again = objective.evaluate(part), objective.evaluate(part)
        assert torch.equal(first, again)
        assert not torch.equal(first, objective.evaluate(Part(1.0, 3, (0, 1, 2), seed=8)))


def test_warm_starts_save_products() -> None:
    with objective_of(made(mlp), squared_error, DATA) as objective:
        findings, plan = preflight(objective, 6), Plan(6, num_batches=10)
        cold, warm = sharpness(Solver(objective, plan, findings))
        again, _ = sharpness(Solver(objective, plan, findings, stream=1), warm)
    assert again.full_passes < 0.75 * cold.full_passes
    assert again.full_batch.value == pytest.approx(cold.full_batch.value, rel=5e-3)


def test_reduce_and_decide_see_sums_and_decisions() -> None:
    """Two workers with the same batches: sums double, decisions agree, and nothing else changes."""
    sums, decisions = [], []

    def reduce(total: Tensor) -> Tensor:
        sums.append(total.shape)
        return total

    def decide(decision: Any) -> Any:
        decisions.append(decision)
        return decision

    with objective_of(made(mlp), squared_error, DATA) as objective:
        findings, plan = preflight(objective, 6), Plan(6, num_batches=10)
        plain, _ = sharpness(Solver(objective, plan, findings))
        found, _ = sharpness(Solver(objective, plan, findings, workers=Workers(reduce, decide)))
    assert found.mini_batch == plain.mini_batch
    assert torch.Size([6]) in sums and any(objective.num_parameters in shape for shape in sums)
    assert any(isinstance(each, bool) for each in decisions) and any(isinstance(each, Tensor) for each in decisions)


# ---- what data and networks may be -----------------------------------------------------------------------------------


def tokens(lengths: list[int], dtype: torch.dtype = torch.int64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 9, (length,), generator=generator).to(dtype) for length in lengths]


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1].long()).transpose(1, 2), batch[:, 1:].long(), ignore_index=0)


def language_model(sparse: bool = False) -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 3, sparse=sparse), nn.Linear(3, 9))


def test_only_batches_of_one_layout_are_stacked() -> None:
    data = tokens([5] * 4 + [3] * 2) + tokens([5] * 2, torch.int32)
    model = made(language_model)
    with isolated(model) as isolation:
        source = DatasetSource(data, pad_sequence_first)
        objective = Objective(model, lambda batch: next_token(model, batch), source, isolation)
        findings = dataclasses.replace(preflight(objective, 2), stacked=True)
        solver = Solver(objective, Plan(2), findings)

        def kind(*pairs: tuple[int, int]) -> Any:
            return type(solver.operator([(Part(1.0, 2, pair),) for pair in pairs]))

        assert kind((0, 1), (2, 3)) is Stacked
        assert kind((0, 1), (3, 4)) is Stacked  # padded to one length
        assert kind((0, 1), (4, 5)) is Sequential
        assert kind((0, 1), (6, 7)) is Sequential
        values = [
            sharpness(Solver(objective, Plan(2, num_batches=10), dataclasses.replace(findings, stacked=stacked)))[0]
            for stacked in (True, False)
        ]
    assert_close(values[0].mini_batch.values, values[1].mini_batch.values, dtype=torch.float32)


def pad_sequence_first(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_sparse_gradients() -> None:
    data = tokens([4] * 12)
    found, expected = (
        measure_sharpness(made(lambda sparse=sparse: language_model(sparse)), next_token, data, batch_size=4, tol=TOL)
        for sparse in (True, False)
    )
    assert found.full_batch.value == pytest.approx(expected.full_batch.value, rel=TOL)
    assert found.mini_batch.mean == pytest.approx(expected.mini_batch.mean, rel=1e-3)


def test_what_is_found_out_about_the_loss_is_said_where_the_call_stands() -> None:
    with pytest.warns(UserWarning, match="sum over the batch: .*FullBS is that of a sum over as many") as warned:
        measure_sharpness(made(mlp), sum_of_errors, DATA, batch_size=4)
    assert [each.filename for each in warned] == [__file__]


def test_a_measurement_is_shown_in_a_line() -> None:
    found = measure_sharpness(made(mlp), squared_error, DATA, batch_size=4)
    number = r"-?[\d.]+"
    interval = rf"{number} \[{number}, {number}\]"
    assert re.fullmatch(
        rf"SharpnessMeasurement\(MiniBS\(4\) = {interval}, FullBS = {number}, gap = {interval}, "
        rf"directional = {interval}, \d+ products, {number} s\)",
        repr(found),
    )
    assert repr(found.mini_batch).startswith("Estimate(mean=") and "values" not in repr(found.mini_batch)
    nothing, _ = measured(mlp, squared_error, Plan(4), full=False, mini=False)
    assert re.fullmatch(r"SharpnessMeasurement\(0 products, .* s\)", repr(nothing))


def test_numbers_of_numpy_are_numbers() -> None:
    plain = measure_sharpness(made(mlp), squared_error, DATA, batch_size=4, num_batches=10, seed=3, rel_error=0.25)
    found = measure_sharpness(
        made(mlp),
        squared_error,
        DATA,
        batch_size=np.int64(4),
        num_batches=np.int64(10),
        seed=np.int64(3),
        rel_error=np.float32(0.25),
    )
    assert found.mini_batch == plain.mini_batch


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must lie between 1 and the number of samples, 22:.*smaller batch_size"),
        ({"batch_size": 23}, r"batch_size=23 must lie between 1 and the number of samples, 22"),
        ({"dataset": []}, r"dataset is empty.*Pass training data"),
        ({"rel_error": 0.0}, r"rel_error=0.0 must be positive"),
        ({"rel_error": math.nan}, r"rel_error=nan must be positive"),
        ({"num_batches": 0}, r"num_batches=0 must be at least 1"),
        ({"full_batch_samples": 0}, r"full_batch_samples=0 must be positive, or None"),
        ({"tol": 0.0}, r"tol=0.0 must be positive, or None for 0.5 rel_error"),
        ({"seed": -1}, r"seed=-1 must not be negative"),
        ({"model": nn.Flatten()}, r"Flatten has no parameter with requires_grad=True.*Unfreeze"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, r"must be a scalar tensor, got a tensor of shape \(4, 3\)"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    arguments = {"model": made(mlp), "loss_fn": squared_error, "dataset": DATA, "batch_size": 4} | options
    with pytest.raises(ValueError, match=message):
        measure_sharpness(**arguments)


def test_good_arguments_pass() -> None:
    checks.arguments(rel_error=0.1)
    checks.batch_size_of_data(22, 22)


def test_a_loss_without_a_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        measure_sharpness(made(mlp), lambda model, batch: squared_error(model, batch).detach(), DATA, batch_size=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": squared_error}, "got a function as model"),
        ({"loss_fn": None}, "NoneType as loss_fn"),
        ({"dataset": torch.utils.data.DataLoader(DATA)}, "DataLoader its .dataset"),
        ({"batch_size": "4"}, "batch_size='4' must be a whole number"),
        ({"num_batches": 2.5}, "num_batches=2.5 must be a whole number"),
        ({"num_batches": 4.0}, "num_batches=4.0 must be a whole number"),
        ({"rel_error": "a"}, "rel_error='a' must be a number, got str"),
        ({"tol": "x"}, "tol='x' must be a number, got str"),
        ({"loss_fn": lambda batch: 0}, r"loss_fn=<function .*> must take \(module, batch\) and return the loss"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: dict[str, Any], message: str) -> None:
    given = {"model": made(mlp), "loss_fn": squared_error, "dataset": DATA, "batch_size": 4, **arguments}
    model, loss_fn, dataset = (given.pop(name) for name in ("model", "loss_fn", "dataset"))
    with pytest.raises(TypeError, match=message):
        measure_sharpness(model, loss_fn, dataset, **given)
