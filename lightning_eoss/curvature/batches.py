"""Where batches come from, and what they are made of.

A *batch* is a tuple of parts, each evaluated at once, with weights that sum up their losses. One notion serves all: the
micro-batches of an accumulation window (weight 1/k each), the chunks of the full batch (weight n_c / N), and the pieces
of a batch that is too large for memory.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from lightning_eoss.curvature.seeds import Use, derived_seed
from lightning_eoss.isolation.isolate import Restore


@dataclass(frozen=True)
class Part:
    """A piece of a batch that goes through the network at once."""

    weight: float  # of its loss in the batch's loss
    size: int  # samples
    indices: tuple[int, ...] = ()  # into the source
    seed: int = 0  # of every random generator, before loading and before each forward pass
    data: Any = None  # instead of indices: samples that are loaded already
    generators: Restore | None = None  # instead of a seed: brings them to where training's own pass finds them


Batch = tuple[Part, ...]


class Source(Protocol):
    """Where batches come from."""

    @property
    def num_samples(self) -> int:
        """Samples (or ready batches) that may be drawn."""

    @property
    def divisible(self) -> bool:
        """Whether batches can be cut; ready ones are drawn as a whole."""

    def take(self, indices: Sequence[int]) -> Any:
        """The data of these samples, on the module's device; all generators are seeded just before."""

    def size(self, indices: Sequence[int]) -> int:
        """How many samples that is (not `len(indices)` where the source is made of ready batches)."""

    def draw(self, generator: random.Random, batch_size: int, count: int) -> list[tuple[int, ...]]:
        """Random batches that share no sample, uniform without replacement; the last is short where samples run out."""
        drawn = generator.sample(range(self.num_samples), min(batch_size * count, self.num_samples))
        return _cut(drawn, batch_size)


@dataclass(frozen=True)
class DatasetSource(Source):
    """Batches from a map-style data set, collated as a DataLoader would."""

    divisible = True

    dataset: Any
    collate: Callable[[list[Any]], Any] = default_collate
    transfer: Callable[[Any], Any] = lambda batch: batch
    population: Sequence[int] | None = None  # indices that may be drawn; None: all

    @property
    def num_samples(self) -> int:
        """Samples that may be drawn."""
        return len(self.dataset if self.population is None else self.population)

    def take(self, indices: Sequence[int]) -> Any:
        """Loads, collates and transfers."""
        chosen = list(indices) if self.population is None else [self.population[index] for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)  # as torch's own fetcher does
        return self.transfer(self.collate(fetch(chosen) if fetch else [self.dataset[index] for index in chosen]))

    def size(self, indices: Sequence[int]) -> int:
        """One sample an index."""
        return len(indices)


@dataclass(frozen=True)
class BatchListSource(Source):
    """Ready batches, each drawn as a whole: what is left where there is no data set to index."""

    divisible = False
    batches: Sequence[Any]
    sizes: Sequence[int]
    transfer: Callable[[Any], Any] = lambda batch: batch

    @property
    def num_samples(self) -> int:
        """Batches that may be drawn."""
        return len(self.batches)

    def take(self, indices: Sequence[int]) -> Any:
        """Transfers one batch."""
        (index,) = indices
        return self.transfer(copied(self.batches[index]))

    def size(self, indices: Sequence[int]) -> int:
        """Samples of the batches."""
        return sum(self.sizes[index] for index in indices)


@dataclass(frozen=True)
class CombinedSource(Source):
    """Several data sets' batches side by side, as a CombinedLoader gives them, each drawn as a whole.

    Index e T + t is batch t of epoch e, an epoch having T. Epoch 0 has all samples in their order. The others, as many
    as anyone draws from, are those of training: shuffled where it shuffles.
    """

    divisible = False
    sources: Sequence[DatasetSource]
    batch_sizes: Sequence[int]
    shuffled: Sequence[bool]
    cycled: bool  # a data set that is exhausted begins anew; else None stands for its batches
    build: Callable[[list[Any]], Any] = list  # one batch of them all, transferred

    @property
    def num_samples(self) -> int:
        """Batches of an epoch: those of the longest data set."""
        return max(self._lengths)

    @property
    def _lengths(self) -> list[int]:
        """Batches of each data set."""
        return [-(-each.num_samples // size) for each, size in zip(self.sources, self.batch_sizes, strict=True)]

    def take(self, indices: Sequence[int]) -> Any:
        """Loads and transfers one batch."""
        (index,) = indices
        epoch, place = divmod(index, self.num_samples)
        taken = list[Any]()
        for which, source in enumerate(self.sources):
            piece: Sequence[int] = self._piece(which, place)
            if epoch and self.shuffled[which]:
                generator = random.Random(derived_seed(which, index))
                piece = generator.sample(range(source.num_samples), len(piece))
            exhausted = place >= self._lengths[which] and not self.cycled
            taken.append(None if exhausted else source.take(piece))
        return self.build(taken)

    def size(self, indices: Sequence[int]) -> int:
        """Samples of the batches, of all data sets; where one is exhausted as many as it had: each batch is a step."""
        places = [index % self.num_samples for index in indices]
        return sum(len(self._piece(which, place)) for which in range(len(self.sources)) for place in places)

    def draw(self, generator: random.Random, batch_size: int, count: int) -> list[tuple[int, ...]]:
        """Batches of random epochs."""
        return [(generator.randrange(self.num_samples, 2**31),) for _ in range(count)]

    def _piece(self, which: int, place: int) -> range:
        """What one data set gives to a batch of epoch 0."""
        first = place % self._lengths[which] * self.batch_sizes[which]
        return range(self.sources[which].num_samples)[first : first + self.batch_sizes[which]]


def copied(batch: Any) -> Any:
    """The batch as it is, with nothing shared: a training step may change what it is given."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), batch)


def num_bytes(batch: Any) -> int:
    """Memory of a batch's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(batch))


def num_samples_of(batch: Any) -> int | None:
    """Samples in a ready batch: what it says itself, or the length of all its tensors; None where they differ."""
    for each in (batch, *tree_leaves(batch, is_leaf=lambda part: isinstance(part, PackedSequence))):
        if isinstance(each, PackedSequence):
            return int(each.batch_sizes[0])
        for name in ("batch_size", "num_graphs"):  # TensorDict, DGL; PyTorch Geometric
            told = getattr(each, name, None)
            told = told[0] if isinstance(told, tuple) and told else told
            if isinstance(told, int):
                return told
    lengths = {len(tensor) for tensor in _tensors(batch) if tensor.ndim}
    return lengths.pop() if len(lengths) == 1 else None


def _tensors(batch: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors of a batch, those in objects included."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth:  # objects may hold one another
            slots = [getattr(leaf, name, None) for name in getattr(leaf, "__slots__", ())]
            yield from _tensors([*getattr(leaf, "__dict__", {}).values(), *slots], depth - 1)


def random_batches(source: Source, batch_size: int, *, parts: int = 1, seed: int) -> Iterator[Batch]:
    """Batches of `parts` loader batches, each with its own loss, drawn as training draws its own, without end."""
    for number in range(2**31):
        own = derived_seed(seed, number)
        pieces = source.draw(random.Random(own), batch_size, parts)
        yield tuple(
            Part(1 / len(pieces), source.size(piece), piece, derived_seed(own, index))
            for index, piece in enumerate(pieces)
        )


def disjoint_batches(source: Source, batch_size: int, *, seed: int) -> Iterator[Batch]:
    """The batches of one epoch: a random permutation cut in pieces of `batch_size`, the short last one left out."""
    drawn = random.Random(seed).sample(range(source.num_samples), source.num_samples)
    for number in range(source.num_samples // batch_size):
        piece = tuple(drawn[number * batch_size : (number + 1) * batch_size])
        yield (Part(1.0, source.size(piece), piece, derived_seed(seed, 2, number)),)


def full_batch(
    source: Source, chunk_size: int, *, max_samples: int | None = None, first: int | None = None, seed: int = 0
) -> Batch:
    """All samples (or a fixed random subset) as consecutive chunks, each weighted by its share of the samples.

    The subset depends on `seed` alone; its `first` samples are within all larger such parts.
    """
    chosen: Sequence[int] = range(source.num_samples)
    most = min(max_samples or len(chosen), len(chosen))
    if min(first or most, most) < len(chosen):
        chosen = sorted(random.Random(derived_seed(seed, Use.FULL_BATCH)).sample(chosen, most)[:first])
    pieces = _cut(chosen, chunk_size)
    total = sum(source.size(piece) for piece in pieces)
    return tuple(
        Part(source.size(piece) / total, source.size(piece), piece, derived_seed(seed, Use.CHUNKS, number))
        for number, piece in enumerate(pieces)
    )


def split(batch: Batch, size: int) -> Batch:
    """The batch in pieces of at most `size` samples; the same loss only where it is a mean over samples.

    Parts whose samples are loaded already stay whole.
    """

    def piece(part: Part, indices: tuple[int, ...]) -> Part:
        return replace(part, weight=part.weight * len(indices) / part.size, size=len(indices), indices=indices)

    pieces: list[Part] = []
    for part in batch:
        uncut = part.size <= size or not part.indices
        pieces += [part] if uncut else [piece(part, indices) for indices in _cut(part.indices, size)]
    return tuple(pieces)


def _cut(indices: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The same in pieces of so many, the last one may be shorter."""
    return [tuple(indices[first : first + size]) for first in range(0, len(indices), size)]
