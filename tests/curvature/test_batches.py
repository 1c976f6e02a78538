"""Batches, their weights, and losses evaluated again and again."""

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_eoss.curvature.batches import (
    BatchListSource,
    DatasetSource,
    Part,
    copied,
    full_batch,
    num_bytes,
    num_samples_of,
    random_batches,
    split,
)
from lightning_eoss.curvature.objective import BatchCache
from lightning_eoss.curvature.seeds import Use, derived_seed
from tests.problems import assert_close, made, mlp, objective_of, pictures, squared_error

torch.set_num_threads(1)


def test_batches_are_uniform_without_replacement_and_fixed_by_the_seed() -> None:
    """All 10 pairs of 5 samples are equally frequent: a chi-square of 9 degrees stays below its 99.99 % point, 33.7."""
    source = DatasetSource(list(range(5)))
    stream = random_batches(source, 2, seed=0)
    pairs = Counter(tuple(sorted(part.indices)) for (part,) in itertools.islice(stream, 2000))
    assert set(pairs) == set(itertools.combinations(range(5), 2))
    assert sum((count - 200) ** 2 / 200 for count in pairs.values()) < 33.7
    one, same, other = (list(itertools.islice(random_batches(source, 2, seed=seed), 3)) for seed in (1, 1, 2))
    assert one == same != other
    assert len({part.seed for (part,) in one}) == 3


def test_a_window_of_loader_batches() -> None:
    (batch,) = itertools.islice(random_batches(DatasetSource(list(range(12))), 3, parts=4, seed=0), 1)
    assert [part.size for part in batch] == [3] * 4 and [part.weight for part in batch] == [0.25] * 4
    assert sorted(index for part in batch for index in part.indices) == list(range(12))
    assert len({part.seed for part in batch}) == 4


def test_chunks_are_weighted_by_their_samples() -> None:
    chunks = full_batch(DatasetSource(list(range(10))), 4)
    assert [part.indices for part in chunks] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert_close(torch.tensor([part.weight for part in chunks]), torch.tensor([0.4, 0.4, 0.2]))
    ready = full_batch(BatchListSource([0, 1, 2], [4, 4, 2]), 1)
    assert_close(torch.tensor([part.weight for part in ready]), torch.tensor([0.4, 0.4, 0.2]))
    assert [part.size for part in ready] == [4, 4, 2]


def test_a_subset_depends_on_the_seed_alone() -> None:
    source = DatasetSource(list(range(100)))
    first, coarse, other = (
        [index for part in full_batch(source, chunk, max_samples=30, seed=seed) for index in part.indices]
        for chunk, seed in ((7, 1), (30, 1), (7, 2))
    )
    assert first == coarse == sorted(set(first)) and len(first) == 30
    assert first != other


def test_a_population_restricts_what_is_drawn() -> None:
    data = [torch.tensor(float(value)) for value in range(10)]
    source = DatasetSource(data, population=[2, 3, 5, 7])
    assert source.num_samples == 4
    assert source.take([0, 3]).tolist() == [2.0, 7.0]


def test_batched_fetching_is_used_where_a_data_set_offers_it() -> None:
    class Fetching(list[Any]):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [10 * self[index] for index in indices]

    assert DatasetSource(Fetching([1, 2, 3])).take([0, 2]).tolist() == [10, 30]


def test_what_a_loss_does_to_its_batch_is_not_seen_by_the_next() -> None:
    def greedy(model: Any, batch: Any) -> torch.Tensor:
        loss = squared_error(model, batch)
        batch[0].zero_()
        batch.clear()
        return loss

    with objective_of(made(mlp), greedy, pictures()) as objective:
        for part in (
            Part(1.0, 2, (0, 1)),
            Part(1.0, 2, data=[torch.ones(2, 1, 4, 4).double(), torch.ones(2, 3).double()]),
        ):
            assert torch.equal(objective.evaluate(part), objective.evaluate(part))


@pytest.mark.parametrize(("cache_bytes", "reads"), [(2**30, 3), (0, 6)])
def test_batches_are_kept_while_they_fit(cache_bytes: int, reads: int) -> None:
    counted = []

    class Data(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            counted.append(index)
            return super().__getitem__(index)

    with objective_of(made(mlp), squared_error, Data(pictures()), cache=BatchCache(cache_bytes)) as objective:
        first = objective.evaluate(Part(1.0, 3, (0, 1, 2)))
        second = objective.evaluate(Part(0.5, 3, (0, 1, 2)))  # the weight does not matter
    assert torch.equal(first, second) and len(counted) == reads


def test_generators_instead_of_a_seed() -> None:
    called = []
    with objective_of(made(mlp), squared_error, pictures()) as objective:
        objective.evaluate(Part(1.0, 2, (0, 1), generators=lambda: called.append(1)))
    assert called == [1, 1]  # before loading and before the forward pass


def test_pieces_of_ready_data_stay_whole() -> None:
    part = Part(1.0, 8, data=torch.zeros(8))
    assert split((part,), 2) == (part,)


def test_sizes() -> None:
    batch = {"x": [torch.zeros(3, 2), 7], "y": torch.zeros((), dtype=torch.float64)}
    assert num_bytes(batch) == 32 and num_samples_of(batch) == 3 and num_samples_of([1, "a"]) is None
    twin = copied(batch)
    assert twin["x"][0] is not batch["x"][0] and twin["x"][1] == 7


def test_objects_take_memory() -> None:
    class Held:
        def __init__(self) -> None:
            self.inner = {"x": torch.zeros(4, 2)}
            self.me = self

    assert num_bytes([Held(), "a"]) >= 32 and num_samples_of(Held()) == 4


def test_derived_seeds_differ_and_stay() -> None:
    seeds = {derived_seed(seed, *keys) for seed in range(3) for keys in [(0,), (1,), (0, 1), (1, 0)]}
    assert len(seeds) == 12 and all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(0, 1) == derived_seed(0, 1)


def test_no_two_uses_share_a_seed() -> None:
    assert len({int(use) for use in Use.__members__.values()}) == len(Use.__members__)
    assert len({derived_seed(0, use) for use in Use}) == len(Use)


def test_copies_share_nothing() -> None:
    @dataclass
    class Sample:
        inputs: torch.Tensor
        names: list[str]

    batch = {"sample": Sample(torch.ones(2), ["a"]), "weights": [torch.ones(1)]}
    twin = copied(batch)
    twin["sample"].inputs.zero_()
    twin["sample"].names.append("b")
    twin["weights"][0].zero_()
    assert torch.equal(batch["sample"].inputs, torch.ones(2)) and batch["sample"].names == ["a"]
    assert batch["weights"][0].item() == 1
