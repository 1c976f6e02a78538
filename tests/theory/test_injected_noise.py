"""The injected noise against the exact covariance of mini-batches.

Bounds are five standard errors of Gaussian samples; all seeds are fixed.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_eoss.theory.gradient_noise import Noise, gradient_with_noise
from tests.oracles import injected_covariance

NOISES = get_args(Noise)
ROWS = torch.tensor([[1.0, 0, 2], [0, 2, 1], [-1, 1, 0], [3, 1, 1], [2, -2, 0], [1, 0, -1]], dtype=torch.float64)
exact = partial(injected_covariance, rows=ROWS)


def draw(noise: Noise, batch_size: int, seed: int = 0, rows: Tensor = ROWS, blocks: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return gradient_with_noise(rows.split(blocks), len(rows), noise=noise, batch_size=batch_size, generator=generator)


def assert_gaussian_moments(samples: NDArray[np.float64], covariance: NDArray[np.float64]) -> None:
    """Mean zero and this covariance, entry by entry, up to what so many Gaussian samples leave open."""
    variances = covariance.diagonal()
    of_mean = np.sqrt(variances / len(samples))
    of_entries = np.sqrt((np.outer(variances, variances) + covariance**2) / len(samples))
    found = samples.T @ samples / len(samples)
    assert (np.abs(samples.mean(0)) <= 5 * of_mean + 1e-12).all()
    assert (np.abs(found - covariance) <= 5 * of_entries + 1e-12).all()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_the_noise_has_the_covariance_of_a_batch(noise: Noise, batch_size: int) -> None:
    samples = np.array([draw(noise, batch_size, seed)[1].numpy() for seed in range(4000)])
    assert_gaussian_moments(samples, exact(noise, batch_size))


def test_the_bounds_tell_the_covariances_apart() -> None:
    """Each is refused in the place of each other one, and so are factors that are nearly right."""
    samples = {noise: np.array([draw(noise, 2, seed)[1].numpy() for seed in range(4000)]) for noise in NOISES}
    for noise in NOISES:
        others = [exact(other, 2) for other in NOISES if other != noise]
        others.append(exact(noise, 2) * 6 / 5)  # 1/b - 1/n in place of c_b, or the reverse
        others.append(exact(noise, 2) * (1 / 2) / (1 / 2 - 1 / 6))  # as if n were infinite
        for other in others:
            with pytest.raises(AssertionError):
                assert_gaussian_moments(samples[noise], other)


def test_full_noise_keeps_to_the_directions_of_the_samples() -> None:
    """In more dimensions than samples, the diagonal and the isotropic one leave them."""
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beyond = rows - rows.mean(0)
    for noise in ("full", "diagonal", "isotropic"):
        z = draw(noise, 2, rows=rows)[1]
        outside = z - torch.linalg.lstsq(beyond.T, z[:, None], driver="gelsd").solution.T[0] @ beyond
        assert bool(outside.norm() < 1e-12 * z.norm()) == (noise == "full")


@pytest.mark.parametrize("noise", NOISES)
def test_the_mean_is_exact_and_a_batch_of_all_has_no_noise(noise: Noise) -> None:
    mean, z = draw(noise, 6)
    assert torch.allclose(mean, ROWS.mean(0), rtol=1e-14, atol=1e-15)
    assert not z.any()


@pytest.mark.parametrize("noise", NOISES)
def test_blocks_change_nothing_but_rounding(noise: Noise) -> None:
    whole = draw(noise, 2, blocks=6)
    for blocks in (1, 4, 5):
        for found, expected in zip(draw(noise, 2, blocks=blocks), whole, strict=True):
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("noise", NOISES)
def test_no_more_than_a_block_is_held(noise: Noise) -> None:
    """Blocks are read one at a time, each after the one before is done with."""
    alive: list[Any] = []

    def blocks() -> Iterator[Tensor]:
        for row in ROWS:
            block = row.clone()[None]
            alive.append(block)
            yield block
            block.fill_(math.nan)  # nothing looks at it again

    mean, z = gradient_with_noise(blocks(), 6, noise=noise, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert len(alive) == 6
    assert torch.allclose(mean, ROWS.mean(0))
    assert torch.allclose(z, draw(noise, 2)[1])


@pytest.mark.parametrize("noise", ["full", "diagonal", "isotropic"])
def test_a_large_mean_does_not_cancel_the_noise(noise: Noise) -> None:
    """In float32, sums of squares around zero would lose the variance."""
    far = (ROWS + 2.0**14).float()
    for found, expected in zip(draw(noise, 2, rows=far), draw(noise, 2, rows=ROWS.float() + 0), strict=True):
        assert torch.allclose(found - found.mean().round(), expected - expected.mean().round(), atol=2e-3)


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    before = torch.get_rng_state()
    first, again, other = draw("full", 2)[1], draw("full", 2)[1], draw("full", 2, seed=1)[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_finite_shows() -> None:
    rows = ROWS.clone()
    rows[1, 1] = math.nan
    for noise in NOISES:
        mean, z = draw(noise, 2, rows=rows)
        assert mean.isnan().tolist() == [False, True, False]
        assert bool(z[1].isnan())


@pytest.mark.parametrize("count", [5, 7])
@pytest.mark.parametrize("noise", NOISES)
def test_another_number_of_samples_is_refused(noise: Noise, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=f"blocks hold 6 samples and num_samples={count}"):
        gradient_with_noise(ROWS.split(4), count, noise=noise, batch_size=2, generator=generator)


def test_a_batch_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=7 is not between 1 and the number of samples, 6"):
        draw("full", 7)
