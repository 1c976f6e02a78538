"""The corrected Algorithm 1 against dense per-sample Hessians."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_eoss.curvature.batches import Part
from lightning_eoss.measurements.variance import hessian_variance
from lightning_eoss.theory.statistics import mean_estimate, moments
from tests.oracles import independent_hessian_variance, sample_hessian_factor
from tests.problems import (
    Quadratic,
    dense_hessians,
    deviations,
    made,
    mlp,
    pictures,
    quadratic_loss,
    samples_of,
    solver_of,
    squared_error,
)


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_random_probes_are_unbiased(operator: str) -> None:
    """All samples, many probes: the mean is the dense value within four standard errors."""
    data, model = pictures(16), made(mlp)

    def outputs_fn(module: Any, batch: Any) -> Any:
        return module(batch[0]), lambda outputs: (outputs - batch[1]).square().sum(-1).mean() / 2

    named = {"operator": operator, "outputs_fn": outputs_fn if operator == "ggn" else None}
    with solver_of(model, squared_error, data, **named) as solver:
        found = hessian_variance(solver, num_batches=16, num_probes=200)
        basis = torch.eye(solver.objective.num_parameters, dtype=torch.float64)
        rows = [solver.operator([batch]) for batch in singles(16)]
        matrices = torch.stack([torch.cat([row.matvec(each[None]) for each in basis]) for row in rows])
    if operator == "hessian":
        assert torch.allclose(matrices, dense_hessians(model, squared_error, data), atol=1e-10)
    expected = float(deviations(matrices).square().sum() / 15 / len(basis))
    assert abs(found.mean - expected) <= 4 * found.stderr
    assert found.stderr <= 0.1 * expected


def singles(count: int) -> list[Any]:
    """Each sample as a batch."""
    return [(Part(1.0, 1, (index,)),) for index in range(count)]


def test_a_direction_has_its_own_variance() -> None:
    """Along the top eigenvector, its own component left out: D = sum over k >= 2 of c_k^2, exact with all samples."""
    data, model = pictures(12), made(mlp)
    hessians = dense_hessians(model, squared_error, data)
    vector = torch.linalg.eigh(hessians.mean(0)).eigenvectors[:, -1]
    images = deviations(hessians) @ vector
    images = images - (images @ vector)[:, None] * vector
    with solver_of(model, squared_error, data) as solver:
        found = hessian_variance(solver, num_batches=12, num_probes=2, direction=vector)
        assert found.mean == pytest.approx(float(images.square().sum() / 11), rel=1e-9)
        assert found.stderr == pytest.approx(0.0, abs=1e-9)


def test_two_diagonal_samples() -> None:
    """diag(2, 0) and 0: V(v) = 2 cos^2, on average 1; identical samples have none, where the printed form has some."""
    pair = torch.stack([torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64)), torch.zeros(2, 2).double()])
    with solver_of(Quadratic(2), quadratic_loss, samples_of(pair)) as solver:
        found = hessian_variance(solver, num_batches=2, num_probes=400)
        assert abs(found.mean - 1.0) <= 4 * found.stderr
    same = torch.eye(3, dtype=torch.float64).expand(6, 3, 3).clone()
    with solver_of(Quadratic(3), quadratic_loss, samples_of(same)) as solver:
        assert hessian_variance(solver, num_batches=6).mean == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize(("sampling", "other"), [("disjoint", "independent"), ("independent", "disjoint")])
def test_each_kind_of_sampling_has_its_factor(sampling: Any, other: Any) -> None:
    """Batches of 8 out of 40: the wrong factor is off by 20 %, ten standard errors and more."""
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(40, 4, 4, generator=generator, dtype=torch.float64)
    matrices = matrices + matrices.mT
    direction = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    images = deviations(matrices)[:, 1:, 0]
    expected = float(images.square().sum() / 39)
    with solver_of(Quadratic(4), quadratic_loss, samples_of(matrices)) as solver:
        estimator: Any = hessian_variance if sampling == "disjoint" else independent_hessian_variance
        given: dict[str, Any] = {"batch_size": 8, "direction": direction, "num_probes": 40}
        streams = (replace(solver, stream=each) for each in range(12))
        found = [estimator(each, num_batches=5, **given) for each in streams]
    estimate = mean_estimate(moments(torch.tensor([each.mean for each in found], dtype=torch.float64)))
    assert abs(estimate.mean - expected) <= 4 * estimate.stderr
    wrong = estimate.mean * sample_hessian_factor(8, 40, other) / sample_hessian_factor(8, 40, sampling)
    assert abs(wrong - expected) > 4 * estimate.stderr


def test_the_interval_covers() -> None:
    """Both kinds of luck, probes and samples, are in the interval: 95 % nominal, 90 of 100 at least."""
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(30, 6, 6, generator=generator, dtype=torch.float64)
    matrices = (matrices + matrices.mT) * torch.rand(30, 1, 1, generator=generator)
    expected = float(deviations(matrices).square().sum() / 29 / 6)
    covered = 0
    with solver_of(Quadratic(6), quadratic_loss, samples_of(matrices)) as solver:
        for stream in range(100):
            found = hessian_variance(replace(solver, stream=stream), num_batches=5)
            covered += found.lower <= expected <= found.upper
    assert covered >= 90


def test_what_has_no_variance_is_refused() -> None:
    with solver_of(made(mlp), squared_error, pictures(6)) as solver:
        with pytest.raises(ValueError, match="num_batches=1 of batch_size=1 is not a sample"):
            hessian_variance(solver, num_batches=1)
        with pytest.raises(ValueError, match=r"num_batches=4 of batch_size=2 .* from 6 samples"):
            hessian_variance(solver, num_batches=4, batch_size=2)
        assert independent_hessian_variance(solver, num_batches=4, batch_size=2).mean > 0
