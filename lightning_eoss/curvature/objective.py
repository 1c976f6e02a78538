"""The loss of a batch as a function of the parameters, the same bits each time; and where batches come from.

A *batch* is a tuple of parts, each evaluated at once, with weights that sum up their losses. One notion serves all: the
micro-batches of an accumulation window (weight 1/k each), the chunks of the full batch (weight n_c / N), and the pieces
of a batch that is too large for memory.
"""

import copy
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from lightning_eoss.curvature.isolation import Isolation, Restore
from lightning_eoss.curvature.memory import Gauge


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

    def take(self, indices: Sequence[int]) -> Any:
        """The batch of these samples, on the module's device; all generators are seeded just before."""

    def size(self, indices: Sequence[int]) -> int:
        """How many samples that is (not `len(indices)` where the source is made of ready batches)."""

    def draw(self, generator: random.Random, batch_size: int, count: int) -> list[tuple[int, ...]]:
        """Random batches that share no sample."""

    @property
    def divisible(self) -> bool:
        """Whether batches can be cut; ready ones are drawn as a whole."""


def disjoint(generator: random.Random, num_samples: int, batch_size: int, count: int) -> list[tuple[int, ...]]:
    """Batches that share no sample, uniform without replacement; the last is short where there are no more samples."""
    drawn = generator.sample(range(num_samples), min(batch_size * count, num_samples))
    return _cut(drawn, batch_size)


@dataclass(frozen=True)
class DatasetSource:
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

    def draw(self, generator: random.Random, batch_size: int, count: int) -> list[tuple[int, ...]]:
        """Uniform without replacement."""
        return disjoint(generator, self.num_samples, batch_size, count)


@dataclass(frozen=True)
class BatchListSource:
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

    def draw(self, generator: random.Random, batch_size: int, count: int) -> list[tuple[int, ...]]:
        """Uniform without replacement."""
        return disjoint(generator, self.num_samples, batch_size, count)


@dataclass(frozen=True)
class CombinedSource:
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


def scalar(loss: Any) -> Tensor:
    """The loss of a batch as a tensor without dimensions.

    Raises:
        ValueError: If it is not a scalar tensor.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        raise ValueError(
            f"The loss of a batch must be a scalar tensor, got {what}: a sharpness is the curvature of one number. "
            "Reduce it (mean over the samples) in training_step or loss_fn."
        )
    return loss if loss.ndim == 0 else loss.reshape(())  # a view would hide which function made it


def real(tensor: Tensor) -> Tensor:
    """A tensor in real coordinates: two for each complex number, in a last dimension of their own.

    Autograd's complex gradient is dL/dRe + i dL/dIm, so that this is the gradient in these coordinates.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


LOADING = (
    "This came up while samples were loaded for a measurement, in the process that trains: what workers alone open (in "
    "a worker_init_fn) is not there. Open it where a sample is first asked for, or measure on other samples: batches "
    "that are there already, as in dataloader=list(itertools.islice(loader, 100))."
)


@contextmanager
def loading() -> Iterator[None]:
    """Notes on errors that they came up while samples were loaded."""
    try:
        yield
    except Exception as error:
        error.add_note(LOADING)
        raise


@dataclass
class BatchCache:
    """Batches on the device, kept for the next pass while they fit."""

    limit: float = 2.0**30  # bytes
    batches: dict[Part, Any] = field(default_factory=dict, repr=False)
    held: int = 0  # bytes
    # All that was ever loaded: samples, bytes, and seconds that it took.
    loaded: int = 0
    read: int = 0
    seconds: float = 0.0

    def get(self, part: Part, load: Callable[[], Any]) -> Any:
        """A part's samples, loaded where they are not there yet; never twice the same object.

        Args:
            part: Which samples, and the seed that they are loaded with.
            load: Loads them.

        Returns:
            The batch.
        """
        key = replace(part, weight=1.0)
        if key not in self.batches:
            began = time.perf_counter()
            batch = load()
            self.seconds += time.perf_counter() - began
            self.loaded += part.size
            self.read += num_bytes(batch)
            if self.held + num_bytes(batch) > self.limit:
                return batch
            self.batches[key] = batch
            self.held += num_bytes(batch)
        return copied(self.batches[key])


@dataclass
class Objective:
    """The loss of a batch at the module's present parameters, the same bits each time that it is evaluated.

    Before each loading and each forward pass everything that an earlier pass may have changed (buffers, counters, the
    data set's own generators) is put back and all generators are seeded with the part's seed: every pass sees the same
    crops and dropout masks.
    """

    module: nn.Module
    loss: Callable[[Any], Tensor]
    source: Source
    isolation: Isolation
    cache: BatchCache = field(default_factory=BatchCache)
    owned: Collection[int] | None = None  # ids of the parameters that are trained; None: all that require a gradient
    scale: float = 1.0  # factor to the loss: what a step makes of it
    parameters: list[nn.Parameter] = field(init=False)
    memory: Gauge = field(init=False)

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.parameters = [each for each in trained if self.owned is None or id(each) in self.owned]
        if not self.parameters:
            raise ValueError(
                f"{type(self.module).__name__} has no parameter with requires_grad=True, so its loss has no Hessian. "
                "Unfreeze what is trained before measuring."
            )
        self.memory = Gauge(self.parameters[0].device)

    @property
    def num_parameters(self) -> int:
        """P, the dimension of the Hessian; a complex number counts twice."""
        return sum(real(parameter).numel() for parameter in self.parameters)

    @property
    def rounding(self) -> float:
        """Relative rounding error of the coarsest parameters."""
        return max(float(torch.finfo(parameter.dtype).eps) for parameter in self.parameters)

    def load(self, part: Part) -> Any:
        """The part's samples on the device, kept for the next pass while they fit."""
        if part.data is not None:
            return copied(part.data)

        def load() -> Any:
            self.prepare(part)
            with loading():
                return self.source.take(part.indices)

        return self.cache.get(part, load)

    def evaluate(self, part: Part) -> Tensor:
        """The loss of one part, with its graph.

        Raises:
            ValueError: If the loss is not a scalar tensor.
        """
        batch = self.load(part)
        self.prepare(part)
        return self.scaled(self.loss(batch))

    def scaled(self, loss: Any) -> Tensor:
        """The loss of a batch as the optimizer steps on it, a scalar."""
        found = scalar(loss)
        return found if self.scale == 1 else self.scale * found

    def prepare(self, part: Part) -> None:
        """Puts back what an earlier pass changed and sets the generators."""
        self.isolation.restore()
        if part.generators is not None:
            part.generators()
        else:
            self.isolation.reseed(part.seed)


# ---- which samples ---------------------------------------------------------------------------------------------------


def derived_seed(seed: int, *keys: int) -> int:
    """A seed for each combination of keys, independent of all global state (numpy's SeedSequence).

    Example:
        >>> derived_seed(0, 1) != derived_seed(0, 2)
        True
    """
    return int(np.random.SeedSequence([seed, len(keys), *keys]).generate_state(1)[0])


def random_batches(source: Source, batch_size: int, *, parts: int = 1, seed: int) -> Iterator[Batch]:
    """Batches of `parts` times `batch_size` samples, drawn as training draws its own, independent of one another.

    Args:
        source: Where the samples come from.
        batch_size: Samples of one part (a loader batch).
        parts: Loader batches of one accumulation window, each with its own loss, weighted 1 / parts.
        seed: Fixes the whole stream.

    Yields:
        Batch after batch, without end.
    """
    for number in range(2**31):
        own = derived_seed(seed, number)
        pieces = source.draw(random.Random(own), batch_size, parts)
        yield tuple(
            Part(1 / len(pieces), source.size(piece), piece, derived_seed(own, index))
            for index, piece in enumerate(pieces)
        )


def disjoint_batches(source: Source, batch_size: int, *, seed: int) -> Iterator[Batch]:
    """The batches of one epoch: a random permutation cut in pieces of `batch_size`, the short last one left out.

    Args:
        source: Where the samples come from.
        batch_size: Samples of a batch.
        seed: Fixes the permutation.

    Yields:
        Batches that share no sample.
    """
    drawn = random.Random(seed).sample(range(source.num_samples), source.num_samples)
    for number in range(source.num_samples // batch_size):
        piece = tuple(drawn[number * batch_size : (number + 1) * batch_size])
        yield (Part(1.0, source.size(piece), piece, derived_seed(seed, 2, number)),)


def full_batch(
    source: Source, chunk_size: int, *, max_samples: int | None = None, first: int | None = None, seed: int = 0
) -> Batch:
    """All samples (or a fixed random subset) as consecutive chunks, each weighted by its share of the samples.

    Args:
        source: Where the samples come from.
        chunk_size: Samples of one chunk; the last one may be smaller.
        max_samples: Size of the subset, which depends on `seed` alone; None: all samples.
        first: Only so many of those, each such part within all larger ones; None: all.
        seed: Seed of the subset and of the chunks.

    Returns:
        The chunks.
    """
    chosen: Sequence[int] = range(source.num_samples)
    most = min(max_samples or len(chosen), len(chosen))
    if min(first or most, most) < len(chosen):
        chosen = sorted(random.Random(derived_seed(seed, 0)).sample(chosen, most)[:first])
    pieces = _cut(chosen, chunk_size)
    total = sum(source.size(piece) for piece in pieces)
    return tuple(
        Part(source.size(piece) / total, source.size(piece), piece, derived_seed(seed, 1, number))
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
        whole = part.size <= size or not part.indices
        pieces += [part] if whole else [piece(part, indices) for indices in _cut(part.indices, size)]
    return tuple(pieces)


def _cut(indices: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The same in pieces of so many, the last one may be shorter."""
    return [tuple(indices[first : first + size]) for first in range(0, len(indices), size)]
