"""The subspace predictor against exact enumeration and simulation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lightning_eoss.theory.outlier_subspace import OutlierSubspace, predict_from_subspace
from lightning_eoss.theory.random_matrix import wigner_outlier


def symmetric(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    matrices = rng.standard_normal((count, dim, dim))
    return (matrices + matrices.transpose(0, 2, 1)) / 2


def subspace_of(
    hessians: np.ndarray, k: int, *, group_size: int = 1, dataset_size: int | None = None
) -> OutlierSubspace:
    """What `measurements.subspace` would find, from dense Hessians of groups."""
    n, dim = hessians.shape[:2]
    mean = hessians.mean(0)
    values, vectors = np.linalg.eigh(mean)
    order = values.argsort()[::-1]
    values, vectors = values[order], vectors[:, order]
    inside, rest = vectors[:, :k], vectors[:, k:]
    compressions = inside.T @ hessians @ inside
    couplings = rest.T @ (hessians - mean) @ inside  # (n, P - k, k)
    quotients = np.zeros(n)
    for j, coupling in enumerate(couplings):
        leak = rest @ coupling.sum(1)
        quotients[j] = leak @ hessians[j] @ leak / max(leak @ leak, 1e-30)
    leakages = couplings.transpose(0, 2, 1) @ couplings
    tail = couplings.sum(2) if k < dim else np.ones((n, 1))
    return OutlierSubspace(
        values[:k],
        compressions,
        leakages,
        quotients,
        values[k:] if k < dim else np.zeros(1),
        (tail**2).sum(0) / (tail**2).sum(),
        group_size,
        dataset_size or n * group_size,
    )


def exact(hessians: np.ndarray, batch_size: int) -> float:
    """MiniBS over all batches."""
    batches = itertools.combinations(range(len(hessians)), batch_size)
    return float(np.mean([np.linalg.eigvalsh(hessians[list(each)].mean(0))[-1] for each in batches]))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_with_the_whole_space_it_is_exact(batch_size: int) -> None:
    """Nothing lies outside: only the luck of the simulated batches is left."""
    hessians = symmetric(np.random.default_rng(0), 6, 4)
    found = predict_from_subspace(subspace_of(hessians, 4), batch_size, draws=20_000)
    assert abs(found.estimate.mean - exact(hessians, batch_size)) <= 4 * found.estimate.stderr
    assert found.tail_share == pytest.approx(0, abs=1e-12) and found.trusted


def test_the_full_batch_is_itself() -> None:
    hessians = symmetric(np.random.default_rng(1), 6, 5)
    found = predict_from_subspace(subspace_of(hessians, 2), 6)
    top = np.linalg.eigvalsh(hessians.mean(0))[-1]
    assert found.estimate.mean == found.estimate.lower == found.estimate.upper == pytest.approx(top)
    assert found.trusted


def spiked(rng: np.random.Generator, count: int, dim: int, noise: float) -> np.ndarray:
    """Two outliers over a bulk, and rank-one fluctuations that lie partly along them."""
    vectors = rng.standard_normal((count, dim)) * np.where(np.arange(dim) < 2, [[1.5]], [[0.5]])
    return np.diag([3.0, 2.5, *([0.2] * (dim - 2))]) + noise * (
        vectors[:, :, None] * vectors[:, None, :] - np.diag(np.where(np.arange(dim) < 2, 2.25, 0.25))
    )


@pytest.mark.parametrize("batch_size", [2, 4, 8, 16])
def test_what_lies_outside_is_pushed_as_far_as_it_pushes(batch_size: int) -> None:
    """Against measured batches of the same data: within the interval, and far better than without the outside."""
    rng = np.random.default_rng(2)
    hessians = spiked(rng, 64, 40, 1.0)
    found = predict_from_subspace(subspace_of(hessians, 2), batch_size, draws=2000)
    tops = [np.linalg.eigvalsh(hessians[rng.choice(64, batch_size, replace=False)].mean(0))[-1] for _ in range(2000)]
    measured, stderr = np.mean(tops), np.std(tops) / np.sqrt(len(tops))
    assert found.estimate.lower - 4 * stderr <= measured <= found.estimate.upper + 4 * stderr
    assert abs(found.estimate.mean / measured - 1) < 0.03
    inside_only = found.estimate.mean * (1 - found.tail_share)
    assert abs(found.estimate.mean - measured) < 0.5 * abs(inside_only - measured)


def test_weak_homogeneous_noise_is_theorem_four() -> None:
    """The two agree to second order in q / lambda; what is left is of fourth order."""
    rng, dim, count = np.random.default_rng(3), 60, 40
    noise = symmetric(rng, count, dim) * 0.1
    noise -= noise.mean(0)
    hessians = np.diag([1.0, *([0.0] * (dim - 1))]) + noise
    variance = float((noise**2).sum() / (count - 1) / dim)
    found = predict_from_subspace(subspace_of(hessians, 1), 10, draws=5000)
    shift = wigner_outlier(1.0, variance, batch_size=10, dataset_size=count) - 1
    assert 0.005 < shift < 0.05
    # One direction of 60 is inside, and the luck of the first column of 40 matrices remains.
    assert found.estimate.mean - 1 == pytest.approx(shift, rel=0.15)


def test_units_do_not_matter() -> None:
    subspace = subspace_of(spiked(np.random.default_rng(4), 32, 20, 1.0), 2)
    tripled = replace(
        subspace,
        eigenvalues=3 * subspace.eigenvalues,
        compressions=3 * subspace.compressions,
        leakages=9 * subspace.leakages,
        quotients=3 * subspace.quotients,
        tail_nodes=3 * subspace.tail_nodes,
    )
    once, thrice = (predict_from_subspace(each, 4) for each in (subspace, tripled))
    assert thrice.estimate.mean == pytest.approx(3 * once.estimate.mean, rel=1e-9)
    assert thrice.estimate.upper == pytest.approx(3 * once.estimate.upper, rel=1e-9)
    assert thrice.tail_share == pytest.approx(once.tail_share, rel=1e-9)


def test_a_part_of_the_data_knows_what_it_does_not_know() -> None:
    """Predictions from 48 of 256 samples: their intervals cover what all samples predict."""
    rng = np.random.default_rng(5)
    hessians = spiked(rng, 256, 20, 1.0)
    truth = predict_from_subspace(subspace_of(hessians, 2), 8, draws=4000).estimate.mean
    values, vectors = np.linalg.eigh(hessians.mean(0))
    covered, widths = 0, []
    for _ in range(40):
        chosen = hessians[rng.choice(256, 48, replace=False)]
        part = subspace_of(chosen, 2, dataset_size=256)
        inside = vectors[:, ::-1][:, :2]
        part = replace(part, eigenvalues=values[::-1][:2].copy(), compressions=inside.T @ chosen @ inside)
        found = predict_from_subspace(part, 8).estimate
        covered += found.lower <= truth <= found.upper
        widths.append(found.upper - found.lower)
    assert covered >= 36
    assert np.mean(widths) < 0.4 * truth


def test_groups_serve_batches_made_of_them() -> None:
    """Pairs of samples: batches of four as from single samples, and batches of one are not trusted."""
    rng = np.random.default_rng(6)
    hessians = spiked(rng, 128, 20, 1.0)
    pairs = hessians[rng.permutation(128)].reshape(64, 2, 20, 20).mean(1)
    single = predict_from_subspace(subspace_of(hessians, 2), 8, draws=3000)
    paired = predict_from_subspace(subspace_of(pairs, 2, group_size=2), 8, draws=3000)
    assert paired.estimate.mean == pytest.approx(single.estimate.mean, rel=0.03)
    assert not predict_from_subspace(subspace_of(pairs, 2, group_size=2), 1).trusted


def test_a_prediction_from_outside_is_not_trusted() -> None:
    """Fluctuations that dwarf the outlier."""
    assert not predict_from_subspace(subspace_of(spiked(np.random.default_rng(7), 64, 40, 30.0), 1), 1).trusted
