"""The Lanczos recursion against dense eigenvalues, and its identities."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eoss.linalg.lanczos import LanczosResult, lanczos, random_start
from tests.problems import assert_close, random_symmetric, with_spectrum

torch.set_num_threads(1)

F64 = torch.float64


def product(matrices: Tensor) -> Any:
    """(B, P) -> (B, P) of dense (B, P, P) or diagonal (B, P) operators."""
    if matrices.ndim == 2:
        return lambda vectors: matrices * vectors
    return lambda vectors: torch.einsum("bij,bj->bi", matrices, vectors)


def starts(num_rows: int, dim: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return random_start(num_rows, dim, torch.Generator().manual_seed(seed), like=torch.empty(0, dtype=dtype))


class Counted:
    """A dense operator that notes for which rows it is multiplied."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices
        self.rows: list[list[int]] = []
        self.restrictions: list[list[int]] = []

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.some(range(len(self.matrices)), vectors)

    def some(self, rows: Sequence[int], vectors: Tensor) -> Tensor:
        self.rows.append(list(rows))
        return product(self.matrices[list(rows)])(vectors)

    def restrict(self, rows: Sequence[int]) -> Any:
        self.restrictions.append(list(rows))
        return lambda vectors: self.some(rows, vectors)


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("sign", [1, -1])
def test_reported_residuals_are_those_of_the_ritz_vectors(steps: int, sign: int) -> None:
    matrices = sign * random_symmetric(3, 30)
    result = lanczos(product(matrices), starts(3, 30), k=min(3, steps), vectors=True, tol=0, max_steps=steps)
    assert result.vectors is not None
    residuals = torch.einsum("bij,bkj->bki", matrices, result.vectors) - result.values[..., None] * result.vectors
    assert_close(residuals.norm(dim=2), result.residuals)
    assert float(result.residuals.min()) > 1e-6  # not all of them nothing
    overlaps = torch.einsum("bkp,blp->bkl", result.vectors, result.vectors)
    assert_close(overlaps, torch.eye(overlaps.shape[1], dtype=F64).expand_as(overlaps))
    quotients = torch.einsum("bkp,bpq,bkq->bk", result.vectors, matrices, result.vectors)
    assert_close(result.values, quotients)


def test_the_residual_is_the_same_without_vectors() -> None:
    """The lean recursion is the same one, as long as nothing has converged."""
    matrices, start = random_symmetric(3, 40), starts(3, 40)
    lean = lanczos(product(matrices), start, tol=0, max_steps=6)
    full = lanczos(product(matrices), start, tol=0, max_steps=6, vectors=True)
    assert_close(lean.values, full.values)
    assert_close(lean.residuals, full.residuals)
    assert lean.vectors is None


def test_ritz_values_lie_inside_the_spectrum_and_within_their_residuals_of_an_eigenvalue() -> None:
    matrices = random_symmetric(4, 25)
    spectra = torch.linalg.eigvalsh(matrices)
    for steps in range(1, 12):
        result = lanczos(product(matrices), starts(4, 25), tol=0, max_steps=steps)
        value, residual = result.values, result.residuals
        assert bool((value[:, 0] <= spectra[:, -1] + 1e-12).all())
        assert bool(((spectra - value).abs().amin(1) <= residual[:, 0] + 1e-12).all())


def test_the_first_coefficient_is_the_quotient_of_the_start() -> None:
    matrices, start = random_symmetric(3, 20), 7 * starts(3, 20)
    expected = torch.einsum("bi,bij,bj->b", start, matrices, start) / start.square().sum(1)
    for sign in (1, -1):
        assert_close(lanczos(product(sign * matrices), start).start_quotients, sign * expected)


# ---- against dense eigenvalues ---------------------------------------------------------------------------------------


def test_operators_of_different_difficulty_at_once() -> None:
    dim = 60
    hard = torch.linspace(0, 1, dim, dtype=F64)  # no gap to speak of
    easy = torch.cat([torch.linspace(0, 1, dim - 1, dtype=F64), torch.tensor([50.0], dtype=F64)])
    tiny, huge = 1e-8 * hard, 1e8 * easy
    matrices = torch.stack([with_spectrum(each, seed) for seed, each in enumerate([hard, easy, tiny, huge])])
    result = lanczos(product(matrices), starts(4, dim), tol=1e-8, max_steps=200)
    expected = torch.linalg.eigvalsh(matrices)[:, -1]
    assert_close(result.values[:, 0] / expected, torch.ones(4, dtype=F64))
    assert bool(result.converged.all())
    assert int(result.iterations[1]) < int(result.iterations[0]) / 2
    assert bool((result.residuals[:, 0] <= 1e-8 * expected).all())


def test_the_smallest_eigenvalues() -> None:
    matrices = random_symmetric(3, 30)
    result = lanczos(product(-matrices), starts(3, 30), k=2, tol=1e-9)
    assert_close(-result.values, torch.linalg.eigvalsh(matrices)[:, :2])


def test_algebraic_value_counts_and_not_magnitude() -> None:
    values = torch.cat([torch.tensor([-100.0, -50.0], dtype=F64), torch.linspace(-1, 2, 40, dtype=F64)])
    result = lanczos(product(with_spectrum(values)[None]), starts(1, len(values)), tol=1e-9, max_steps=200)
    assert_close(result.values[0, 0], 2.0, dtype=F64, steps=10000)  # eps of the norm, which is 100


def test_a_negative_definite_operator_has_a_negative_top() -> None:
    values = torch.linspace(-9, -3, 20, dtype=F64)
    result = lanczos(product(values[None]), starts(1, 20), tol=1e-10, max_steps=60)
    assert_close(result.values[0, 0], -3.0, dtype=F64)
    assert bool(result.converged[0])


def test_k_largest_with_vectors_and_multiplicities() -> None:
    """A Krylov space holds one vector of each eigenspace; the others come after the breakdown."""
    values = torch.tensor([7.0, 7.0, 7.0, 5.0, 5.0, 1.0, 0.0, 0.0, 0.0, -2.0], dtype=F64)
    matrix = with_spectrum(values)
    result = lanczos(product(matrix[None]), starts(1, 10), k=6, vectors=True, tol=1e-10)
    assert result.vectors is not None
    assert_close(result.values[0], values[:6], steps=1000)
    assert_close(result.vectors[0] @ result.vectors[0].T, torch.eye(6, dtype=F64), steps=1000)
    assert_close(result.vectors[0] @ matrix, result.values[0, :, None] * result.vectors[0], steps=1000)
    assert bool(result.converged[0])


def test_only_the_leading_residuals_have_to_be_small() -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(0, 1, 60, dtype=F64), torch.tensor([3.0], dtype=F64)]))
    first = lanczos(product(matrix[None]), starts(1, 61), k=5, leading=1, tol=1e-3)
    every = lanczos(product(matrix[None]), starts(1, 61), k=5, tol=1e-3)
    assert bool(first.converged[0]) and bool(every.converged[0])
    assert int(first.iterations[0]) < int(every.iterations[0])
    assert float(first.residuals[0, 0]) <= 1e-3 * 3 < float(first.residuals[0].max())
    assert bool((every.residuals[0] <= 1e-3 * every.values[0].abs()).all())


# ---- ends of the Krylov space ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_one_dimension(k: int) -> None:
    diagonal = torch.tensor([[3.0], [-2.0], [0.0]], dtype=F64)
    result = lanczos(product(diagonal), torch.tensor([[1.0], [-5.0], [2.0]], dtype=F64), k=k, vectors=True, min_steps=9)
    assert result.vectors is not None
    assert result.values[:, 0].tolist() == [3.0, -2.0, 0.0]
    assert result.residuals[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert bool(result.converged.all()) and result.iterations.tolist() == [1, 1, 1]
    assert bool(result.values[:, 1:].isnan().all())
    assert result.vectors[:, 0].abs().tolist() == [[1.0]] * 3


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("vectors", [False, True])
def test_fewer_dimensions_than_steps(dtype: torch.dtype, vectors: bool) -> None:
    matrices = random_symmetric(5, 4, dtype=dtype)
    result = lanczos(product(matrices), starts(5, 4, dtype=dtype), tol=0, min_steps=4, max_steps=300, vectors=vectors)
    assert_close(result.values[:, 0], torch.linalg.eigvalsh(matrices.double())[:, -1], dtype=dtype)
    assert bool((result.iterations <= 40).all())


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("place", [0, 5, 19])
def test_a_start_that_is_an_eigenvector_but_not_the_top(place: int, vectors: bool) -> None:
    """Its Krylov space is exhausted at once with residual 0; only a new start finds the top."""
    diagonal = torch.linspace(-4, 9, 20, dtype=F64)
    start = torch.eye(20, dtype=F64)[place][None]
    result = lanczos(product(diagonal[None]), start, tol=1e-9, vectors=vectors, max_steps=60)
    assert_close(result.values[0, 0], 9.0, dtype=F64)
    assert bool(result.converged[0])
    assert_close(result.start_quotients[0], diagonal[place])


def test_an_invariant_subspace_without_the_top() -> None:
    diagonal = torch.arange(12.0, dtype=F64)
    start = torch.zeros(2, 12, dtype=F64)
    start[0, [0, 3, 4]] = 1.0
    start[1] = 1.0
    result = lanczos(product(diagonal.expand(2, -1)), start, tol=1e-10, max_steps=60)
    assert_close(result.values[:, 0], [11.0, 11.0], dtype=F64)


@pytest.mark.parametrize("vectors", [False, True])
def test_the_zero_operator(vectors: bool) -> None:
    diagonal = torch.zeros(2, 8, dtype=F64)
    diagonal[1] = torch.arange(8.0)
    result = lanczos(product(diagonal), starts(2, 8), vectors=vectors, tol=1e-9)
    assert result.values[0, 0] == 0 and result.residuals[0, 0] == 0 and bool(result.converged.all())
    assert_close(result.values[1, 0], 7.0, dtype=F64)
    assert int(result.iterations[0]) == 2


def test_a_multiple_of_the_identity() -> None:
    result = lanczos(lambda vectors: -3 * vectors, starts(1, 9), k=3, vectors=True)
    assert result.vectors is not None
    assert_close(result.values[0], [-3.0, -3.0, -3.0], dtype=F64)
    assert_close(result.vectors[0] @ result.vectors[0].T, torch.eye(3, dtype=F64))


# ---- stops -----------------------------------------------------------------------------------------------------------


def staggered() -> tuple[Tensor, Tensor]:
    """Four operators that need more and more steps."""
    bulk = torch.linspace(0, 1, 60, dtype=F64)
    spectra = [torch.cat([bulk, torch.tensor([top], dtype=F64)]) for top in (100.0, 5.0, 1.5, 1.05)]
    return torch.stack([with_spectrum(each, seed) for seed, each in enumerate(spectra)]), starts(4, 61)


def test_rows_that_are_done_are_no_longer_multiplied() -> None:
    matrices, start = staggered()
    counted = Counted(matrices)
    result = lanczos(counted.matvec, start, tol=1e-4, restrict=counted.restrict)
    assert sorted(result.iterations.tolist()) == result.iterations.tolist()
    assert len(set(result.iterations.tolist())) == 4
    assert counted.restrictions == [[1, 2, 3], [2, 3], [3]]
    assert sum(map(len, counted.rows)) == result.matvecs == int(result.iterations.sum())
    assert [sum(row in rows for rows in counted.rows) for row in range(4)] == result.iterations.tolist()


def test_without_restriction_the_results_are_the_same() -> None:
    matrices, start = staggered()
    with_it = lanczos(product(matrices), start, tol=1e-4, restrict=lambda rows: product(matrices[list(rows)]))
    without = lanczos(product(matrices), start, tol=1e-4)
    for name in ("values", "residuals", "iterations", "converged"):
        assert_close(getattr(without, name), getattr(with_it, name), dtype=F64)


def test_rows_do_not_depend_on_their_company() -> None:
    matrices, start = staggered()
    together = lanczos(product(matrices), start, tol=1e-4)
    for row in range(4):
        alone = lanczos(product(matrices[row][None]), start[row][None], tol=1e-4)
        assert_close(alone.values[0], together.values[row])
        assert alone.iterations[0] == together.iterations[row]


def test_fewest_and_most_steps() -> None:
    matrices, start = staggered()
    assert lanczos(product(matrices), start, tol=1e9).iterations.tolist() == [1, 1, 1, 1]
    assert lanczos(product(matrices), start, tol=1e9, min_steps=4).iterations.tolist() == [4, 4, 4, 4]
    cut = lanczos(product(matrices), start, tol=1e-4, max_steps=5)
    assert int(cut.iterations.max()) == 5
    assert cut.converged.tolist() == [True, False, False, False]
    assert bool((cut.residuals[1:, 0] > 1e-4 * cut.values[1:, 0]).all())


def test_a_known_first_product_saves_one_and_changes_nothing() -> None:
    matrices, start = staggered()
    start = 3 * start
    counted = Counted(matrices)
    plain = lanczos(product(matrices), start, tol=1e-4)
    known = lanczos(counted.matvec, start, tol=1e-4, image=product(matrices)(start), restrict=counted.restrict)
    assert_close(known.values, plain.values)
    assert_close(known.start_quotients, plain.start_quotients)
    assert known.iterations.tolist() == [each - 1 for each in plain.iterations.tolist()]
    assert sum(map(len, counted.rows)) == known.matvecs


def test_workers_may_decide_together() -> None:
    """All rows stop where the slowest does."""
    matrices, start = staggered()
    apart = lanczos(product(matrices), start, tol=1e-4)
    together = lanczos(product(matrices), start, tol=1e-4, decide=lambda done: done & done.all())
    assert together.iterations.tolist() == [int(apart.iterations.max())] * 4


# ---- precision, what is not finite, random numbers -------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [False, True])
def test_single_precision(vectors: bool) -> None:
    matrices, start = staggered()
    single = lanczos(product(matrices.float()), start.float(), tol=1e-5, vectors=vectors)
    double = lanczos(product(matrices), start, tol=1e-9, vectors=vectors)
    assert_close(single.values, double.values, dtype=torch.float32)
    assert single.values.dtype == F64 and bool(single.converged.all())
    assert not vectors or (single.vectors is not None and single.vectors.dtype == torch.float32)


def test_single_precision_converges_even_where_tol_is_below_its_rounding() -> None:
    matrices, start = staggered()
    result = lanczos(product(matrices.float()), start.float(), tol=0, max_steps=400)
    assert bool(result.converged.all()) and int(result.iterations.max()) < 400
    assert_close(result.values[:, 0], torch.linalg.eigvalsh(matrices)[:, -1], dtype=torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("vectors", [False, True])
def test_an_operator_that_is_not_finite_does_not_spoil_the_others(bad: float, vectors: bool) -> None:
    matrices, start = staggered()
    alone = lanczos(product(matrices), start, tol=1e-4, vectors=vectors)
    matrices[1] = bad
    result = lanczos(product(matrices), start, tol=1e-4, vectors=vectors)
    others = [0, 2, 3]
    assert bool(result.values[1].isnan().all()) and bool(result.residuals[1].isnan().all())
    assert result.converged.tolist() == [True, False, True, True]
    assert_close(result.values[others], alone.values[others])
    assert result.iterations.tolist()[1] == 1
    if vectors:
        assert result.vectors is not None and bool(result.vectors[1].isnan().all())


def test_an_operator_that_turns_bad_later() -> None:
    calls = 0

    def matvec(vectors: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.arange(30.0, dtype=F64) * vectors * (torch.nan if calls == 4 else 1.0)

    result = lanczos(matvec, starts(1, 30))
    assert bool(result.values.isnan().all()) and result.iterations.tolist() == [4] and not bool(result.converged[0])


def test_random_numbers_come_from_the_given_generator_alone() -> None:
    def run(seed: int) -> LanczosResult:
        generator = torch.Generator().manual_seed(seed)
        start = torch.eye(6, dtype=F64)[:2]  # eigenvectors: both rows break down at once
        return lanczos(product(torch.arange(6.0, dtype=F64).expand(2, -1)), start, generator=generator, max_steps=3)

    before = torch.get_rng_state()
    first, again, other = run(1), run(1), run(2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)
    torch.manual_seed(5)
    assert torch.equal(first.values, run(1).values)


def test_random_starts_are_the_same_numbers_in_every_precision() -> None:
    single, double = starts(3, 50, dtype=torch.float32), starts(3, 50)
    assert_close(single, double, dtype=torch.float32)
    assert_close(double.norm(dim=1), torch.ones(3, dtype=F64))


def test_arguments_are_left_alone() -> None:
    matrices, start = staggered()
    image = product(matrices)(start)
    copies = start.clone(), image.clone()
    lanczos(lambda vectors: vectors, start, max_steps=4)  # an operator that returns its argument
    lanczos(product(matrices), start, image=image, vectors=True)
    assert torch.equal(start, copies[0]) and torch.equal(image, copies[1])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"start": torch.ones(3)},
            r"start must be a floating-point \(B, P\) tensor, got torch.float32 of shape \(3,\)",
        ),
        ({"start": torch.ones(2, 3, dtype=torch.int64)}, r"start must be a floating-point .* got torch.int64"),
        ({"start": torch.ones(0, 3)}, r"got torch.float32 of shape \(0, 3\)"),
        ({"image": torch.ones(2, 4)}, r"image must be the product of start.* got torch.float32 of shape \(2, 4\)"),
        ({"tol": -1.0}, r"tol=-1.0 is a relative residual and cannot be negative"),
        ({"min_steps": 0}, r"min_steps=0 and max_steps=100 must satisfy 1 <= min_steps <= max_steps"),
        ({"min_steps": 5, "max_steps": 4}, r"min_steps=5 and max_steps=4 must satisfy"),
        ({"k": 0}, r"k=0 and leading=None must satisfy 1 <= leading <= k"),
        ({"k": 2, "leading": 3}, r"k=2 and leading=3 must satisfy"),
        ({"k": 2, "leading": 0}, r"k=2 and leading=0 must satisfy"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    start = options.pop("start", torch.ones(2, 3))
    with pytest.raises(ValueError, match=message):
        lanczos(lambda vectors: vectors, start, **options)
