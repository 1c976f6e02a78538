"""Count sketches: how far off lengths and angles are, over many seeds."""

import math

import pytest
import torch

from lightning_eoss.linalg import sketch as projection
from lightning_eoss.linalg.sketch import count_sketch

K = 256
SEEDS = range(300)


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squares_of_lengths_are_off_by_the_root_of_two_over_k() -> None:
    x = normal(20_000)
    ratios = torch.tensor([float(count_sketch([[x]], K, seed).square().sum() / x.square().sum()) for seed in SEEDS])
    bound = math.sqrt(2 / K)
    assert abs(ratios.mean() - 1) < 3 * bound / math.sqrt(len(SEEDS))
    assert 0.85 * bound < ratios.std() < 1.15 * bound
    assert 0.85 * bound / 2 < ratios.sqrt().std() < 1.15 * bound / 2


def test_entries_of_one_sign_are_no_worse() -> None:
    """The random signs: without them all would add up in the buckets."""
    ratios = torch.tensor(
        [float(count_sketch([[torch.ones(20_000)]], K, seed).square().sum() / 20_000) for seed in SEEDS]
    )
    assert abs(ratios.mean() - 1) < 3 * math.sqrt(2 / K / len(SEEDS))
    assert ratios.std() < 1.15 * math.sqrt(2 / K)


@pytest.mark.parametrize("cosine", [0.0, 0.5, -0.9])
def test_cosines_are_off_by_the_root_of_one_over_k(cosine: float) -> None:
    one, other = normal(10_000), normal(10_000, 1)
    one, other = one / one.norm(), other - other @ one / one.norm() ** 2 * one
    x, y = one, cosine * one + math.sqrt(1 - cosine**2) * other / other.norm()
    errors = []
    for seed in SEEDS:
        sketches = count_sketch([[x]], K, seed)[0], count_sketch([[y]], K, seed)[0]
        errors.append(float(torch.cosine_similarity(*sketches, dim=0)) - cosine)
    spread = float(torch.tensor(errors).square().mean().sqrt())
    assert spread < 1.15 * (1 - cosine**2) / math.sqrt(K)  # the delta method; one over the root at right angles
    if cosine == 0:
        assert spread > 0.85 / math.sqrt(K)


def test_a_short_vector_is_copied() -> None:
    pieces = [[torch.arange(6.0).reshape(2, 3)], [torch.tensor(7.0), torch.zeros(0), torch.tensor([8.0])]]
    sketches = count_sketch(pieces, 10)
    assert sketches.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 7, 8, 0, 0]]
    assert len(count_sketch(pieces, 8).sum(0).unique()) == 8
    assert count_sketch(pieces, 7).sum(0).norm() != pytest.approx(count_sketch(pieces, 8).sum(0).norm())


def test_it_is_linear_and_pieces_add_up() -> None:
    x, y = normal(5000), normal(5000, 1)
    sketch = count_sketch([[x]], K)[0]
    torch.testing.assert_close(count_sketch([[x - 2 * y]], K)[0], sketch - 2 * count_sketch([[y]], K)[0])
    pieces = [[x[:10].reshape(5, 2), x[10:11]], [x[11:2011]], [x[2011:]]]
    torch.testing.assert_close(count_sketch(pieces, K).sum(0), sketch)
    rest = [[torch.zeros(11)], [x[11:2011]], [torch.zeros(2989)]]
    torch.testing.assert_close(count_sketch(rest, K)[1], count_sketch(pieces, K)[1])


def test_neither_blocks_nor_strides_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3000).reshape(50, 60)
    sketch = count_sketch([[x]], K)
    monkeypatch.setattr(projection, "_BLOCK", 7)
    torch.testing.assert_close(count_sketch([[x]], K), sketch)
    torch.testing.assert_close(count_sketch([[x.T.contiguous().T]], K), sketch)


def test_precision_is_kept() -> None:
    """A small step from large weights is the difference of two sketches."""
    x, step = normal(50_000) * 100, normal(50_000, 1) * 1e-6
    moved = count_sketch([[x + step]], K) - count_sketch([[x]], K)
    torch.testing.assert_close(moved, count_sketch([[step]], K), rtol=1e-4, atol=1e-9)


def reference(index: int, seed: int) -> int:
    """SplitMix64 in Python's own numbers."""
    mask = 2**64 - 1
    bits = ((index + 1) * 0x9E3779B97F4A7C15 + seed * 0xBF58476D1CE4E5B9) & mask
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    return bits ^ bits >> 31


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
def test_the_hash_stays_what_it_is(seed: int) -> None:
    """Checkpoints hold sketches: another hash in another version would tear a run in two."""
    found = projection._hashed(torch.arange(100), seed)
    assert [each % 2**64 for each in found.tolist()] == [reference(index, seed) for index in range(100)]


def test_buckets_and_signs_are_even() -> None:
    """Chi-squared with 2K - 1 degrees of freedom, over buckets and signs together, and between neighbours."""
    count = 200_000
    bits = projection._hashed(torch.arange(count), 3)
    cells = (bits & 0x7FFFFFFFFFFFFFFF) % K * 2 + (bits < 0)
    for these in (cells, (cells[1:] * 31 + cells[:-1]) % (2 * K)):
        observed = torch.bincount(these, minlength=2 * K).double()
        expected = len(these) / (2 * K)
        chi = float((observed - expected).square().sum() / expected)
        assert abs(chi - (2 * K - 1)) < 4 * math.sqrt(2 * (2 * K - 1))


def test_nothing_is_drawn_from_global_generators() -> None:
    before = torch.get_rng_state()
    count_sketch([[normal(5000)]], K)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("pieces", "dimension"), [([[torch.ones(3)]], 0), ([], 5), ([[]], 5)])
def test_nothing_has_no_sketch(pieces: list[list[torch.Tensor]], dimension: int) -> None:
    with pytest.raises(ValueError, match=f"dimension={dimension} must be positive, and there must be tensors"):
        count_sketch(pieces, dimension)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_the_same() -> None:
    x = normal(3_000_000)
    torch.testing.assert_close(count_sketch([[x.cuda()]], K).cpu(), count_sketch([[x]], K))
