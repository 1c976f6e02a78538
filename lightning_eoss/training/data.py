"""A second way to the samples that training draws from, past its live iterator: sources, samplers, ready batches."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_eoss.curvature.batches import (
    Batch,
    BatchListSource,
    CombinedSource,
    DatasetSource,
    Part,
    Source,
    num_samples_of,
)
from lightning_eoss.curvature.objective import loading
from lightning_eoss.curvature.seeds import derived_seed
from lightning_eoss.isolation.isolate import isolated

_ENDLESS = 10_000  # batches of a sampler without an end that are looked at
PASS_NUM_SAMPLES = "Pass num_samples=, the samples of each batch, or a function of a batch that returns them."


def check_dataloader(dataloader: Any, name: str, *, ready: bool = False) -> None:
    """Raises where data of a monitor's own are not batches, or come only once."""
    once = isinstance(dataloader, Iterator) and not hasattr(dataloader, "flattened")  # as CombinedLoaders have
    indexed = hasattr(dataloader, "__getitem__") and not isinstance(dataloader, list)
    if not isinstance(dataloader, Iterable) or isinstance(dataloader, Dataset) or once or indexed:
        raise TypeError(
            f"{name}: dataloader= must be a DataLoader, a list of the batches that training_step gets, or an iterable "
            f"that yields them anew each time, not {type(dataloader).__name__}. Of a data set, pass "
            "DataLoader(dataset, batch_size=...)."
        )
    if isinstance(dataloader, list) and dataloader and not ready and _is_sample(dataloader[0]):
        raise TypeError(
            f"{name}: the first entry of dataloader= is a sample, not a batch: what it consists of differs in length. "
            "Pass DataLoader(samples, batch_size=...), or, if these are batches, DataLoader(batches, batch_size=None) "
            "and num_samples=, the samples of each."
        )


def _is_sample(entry: Any) -> bool:
    """Whether tensors and numbers side by side have not all one length, as those of a batch have."""
    fields = entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, (list, tuple)) else ()
    lengths = {
        len(each) if isinstance(each, Tensor) and each.ndim else 0
        for each in fields
        if isinstance(each, (Tensor, int, float))
    }
    return len(lengths) > 1 or lengths == {0}


class BatchSizes(NamedTuple):
    """Samples of the batches that a sampler makes."""

    mean: float
    least: int
    most: int


@dataclass(frozen=True)
class TrainingData:
    """A second way to the samples that training draws from."""

    source: Source
    batch_size: int  # of a loader batch, the mean where they differ; 1 where the source counts ready batches
    objects: tuple[Any, ...]  # that loading may change
    sampler: Any = None  # a batch sampler that is not uniform; None: batches are uniform without replacement
    sizes: BatchSizes | None = None  # of a batch sampler that makes batches of its own
    loader: Any = None  # that they were taken from

    def batches_of(self, num_samples: int | None) -> int | None:
        """A number of samples in units of the source: ready batches count as one each."""
        total = self.source.num_samples
        return num_samples and -(-num_samples * total // self.source.size(range(total)))


def is_live(data: TrainingData, trainer: Any) -> bool:
    """Whether training still draws from the loader that the data were taken from: Trainers can reload it."""
    return any(data.loader is loader for loader in trainer.fit_loop._combined_loader.flattened)


def training_data(
    trainer: Any,
    pl_module: nn.Module,
    name: str,
    dataloader: Iterable[Any] | None = None,
    max_samples: int | None = None,
    count: Callable[[Any], int | None] = num_samples_of,
) -> TrainingData:
    """The samples that training can draw, reached past its live iterator."""

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # type: ignore[operator]
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    if dataloader is None:
        return _read_again(trainer, pl_module, name, transfer)
    combined = getattr(dataloader, "flattened", [])  # the loaders of a CombinedLoader
    with isolated(pl_module, [each for one in (dataloader, *combined) for each in _reachable(one)]):
        if _indexable(dataloader):
            return _indexed(dataloader, transfer, None)
        its_batches = (batch for batch, _idx, _dataloader_idx in dataloader) if combined else dataloader
        with loading():
            batches = list(_first_samples(its_batches, max_samples, count))
    if not batches:
        raise MisconfigurationException(
            f"{name} got dataloader={dataloader!r}, which has no batches. Pass data to measure on."
        )
    structure = tree_flatten(getattr(dataloader, "iterables", None))[1] if combined else None
    sizes = [_num_samples(batch, count, structure) for batch in batches]
    if None in sizes:
        raise MisconfigurationException(
            f"{name} cannot tell how many samples a batch of dataloader= has ({type(batches[0]).__name__}: its tensors "
            f"differ in length, or there are none), and FullBS is a mean over samples. {PASS_NUM_SAMPLES}"
        )
    known = [size or 0 for size in sizes]
    known = [max(known)] * len(known) if combined else known  # each is a step, also where a loader is exhausted
    return TrainingData(BatchListSource(batches, known, transfer), 1, ())


def _num_samples(batch: Any, count: Callable[[Any], int | None], structure: Any) -> int | None:
    """Samples in a ready batch, in one of several loaders those of all of them; None where that is not known."""
    size = count(batch)
    if size is not None or structure is None:
        return size
    pieces = [count(each) for each in structure.flatten_up_to(batch) if each is not None]
    return None if None in pieces else sum(each or 0 for each in pieces)


def _read_again(trainer: Any, pl_module: nn.Module, name: str, transfer: Callable[[Any], Any]) -> TrainingData:
    """The samples of training's own loaders."""
    combined = trainer.fit_loop._combined_loader
    loaders, structure = combined.flattened, tree_flatten(combined.iterables)[1]
    several = len(loaders) > 1
    strange = [each for each in loaders if not _indexable(each) or (several and not _is_uniform(each))]
    if strange or not loaders:
        raise MisconfigurationException(
            f"{name} cannot read {_kind(strange)} a second time without disturbing training. Pass dataloader=, "
            "a loader (or a list) of the batches that training_step gets, on data to measure on."
        )

    def build(batches: list[Any]) -> Any:
        return transfer(tree_unflatten(batches, structure))

    with isolated(pl_module, [each for loader in loaders for each in _reachable(loader)]):
        if not several:
            return _indexed(loaders[0], lambda batch: build([batch]), _reach(trainer, loaders[0]))
        found = [_indexed(each, lambda batch: batch, _reach(trainer, each)) for each in loaders]
    source = CombinedSource(
        [data.source for data in found if isinstance(data.source, DatasetSource)],
        [data.batch_size for data in found],
        [not isinstance(each.sampler, SequentialSampler) for each in loaders],
        combined._mode != "max_size",
        build,
    )
    return TrainingData(source, 1, tuple(each for data in found for each in data.objects), loader=loaders[0])


def _reachable(loader: Any) -> list[Any]:
    """A loader, and what iterating it draws from."""
    return [loader, *(getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler"))]


def check_chosen_batch_size(batch_size: int | None, data: TrainingData, *, sampler: bool = True) -> None:
    """Raises where batches of a chosen size cannot be drawn."""
    if batch_size is not None and ((sampler and data.sizes) or not data.source.divisible):
        raise ValueError(
            f"batch_size={batch_size} cannot be made of the ready batches of dataloader=, of several loaders or of a "
            "batch sampler that makes its own: leave it out, or pass a DataLoader over a map-style data set."
        )


def _first_samples(
    batches: Iterable[Any], num_samples: int | None, count: Callable[[Any], int | None]
) -> Iterator[Any]:
    """Batches until so many samples have come; one at least, where a batch does not tell."""
    seen = 0
    for batch in batches:
        yield batch
        seen += count(batch) or 1
        if num_samples is not None and seen >= num_samples:
            return


def _indexable(loader: Any) -> bool:
    """Whether a loader's samples can be fetched by index."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _kind(loaders: list[Any]) -> str:
    """Names what cannot be read again."""
    if not loaders:
        return "no training loader"
    if isinstance(getattr(loaders[0], "dataset", None), IterableDataset):
        return "an IterableDataset"
    if _indexable(loaders[0]):
        return "one of several training loaders, whose sampler is not uniform,"
    return f"a {type(loaders[0]).__name__} without a batch sampler"


def _is_uniform(loader: Any) -> bool:
    """Whether batches of a fixed size come uniformly and without replacement."""
    sampler = loader.sampler
    known = type(sampler) in (RandomSampler, SequentialSampler, SubsetRandomSampler)
    again = getattr(sampler, "replacement", False) or getattr(sampler, "num_samples", 0) > len(loader.dataset)
    return type(loader.batch_sampler) is BatchSampler and known and not again


def _reach(trainer: Any, loader: Any) -> int | None:
    """Samples from the first on that a sequential pass comes to under limit_train_batches; None: all."""
    if not isinstance(loader.sampler, SequentialSampler) or trainer.num_training_batches == float("inf"):
        return None
    return int(trainer.num_training_batches) * (loader.batch_size or 1)


def _indexed(loader: Any, transfer: Callable[[Any], Any], reach: int | None) -> TrainingData:
    """Samples by index, drawn as the loader's sampler would."""
    dataset, batch_sampler, sampler = loader.dataset, loader.batch_sampler, loader.sampler
    population: Any = None
    uniform, own = _is_uniform(loader), own_batch_sizes(loader)
    if uniform and isinstance(sampler, SubsetRandomSampler):
        population = tuple(int(index) for index in sampler.indices)
    elif uniform and isinstance(sampler, SequentialSampler) and reach is not None and reach < len(dataset):
        population = range(reach)
    batch_size = max(1, round(own.mean)) if own else batch_sampler.batch_size
    collate = loader.collate_fn
    return TrainingData(
        source=DatasetSource(dataset, collate, transfer, population),
        batch_size=min(batch_size, len(population or dataset)),
        objects=(dataset, sampler, batch_sampler, getattr(collate, "__self__", collate)),
        sampler=None if uniform else batch_sampler,
        sizes=own,
        loader=loader,
    )


def own_batch_sizes(loader: Any) -> BatchSizes | None:
    """Sizes of an epoch's batches where a batch sampler of its own makes them, from a copy; None where torch's does.

    What such a sampler calls its `batch_size` need not be a number of samples, nor need its batches have one size
    (token budgets, buckets).
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None or type(batch_sampler) is BatchSampler:
        return None
    with isolated(nn.Module(), _reachable(loader)):
        sizes = [len(each) for each in _epoch(batch_sampler, 0)] or [1]
    return BatchSizes(fmean(sizes), min(sizes), max(sizes))


def sampler_batches(
    data: TrainingData, parts: int, count: int, *, seed: int, batch_size: int | None = None
) -> Iterator[Batch]:
    """Batches as a weighted or custom sampler draws them, from a copy of it on a generator of our own.

    A sampler may sort its batches, so steps are taken from anywhere in an epoch. One whose epochs are all the same has
    nothing new to give after the first.
    """
    found, chooser, known = list[list[tuple[int, ...]]](), random.Random(seed), set[int]()
    for epoch in range(count):
        drawn = [tuple(each) for each in _epoch(data.sampler, derived_seed(seed, epoch), batch_size)]
        full = [each for each in drawn if len(each) == (batch_size or data.batch_size) or data.sizes]
        drawn = full if len(full) >= parts else drawn
        steps = [drawn[first : first + parts] for first in range(0, len(drawn) - parts + 1, parts)]
        several = known or len(steps) < count  # epochs; they are compared whatever their order
        alike = hash(tuple(sorted(map(hash, map(tuple, steps))))) if several else 0
        if not steps or alike in known:
            break
        known.add(alike)
        found += chooser.sample(steps, min(len(steps), count - len(found)))
        if len(found) == count:
            break
    return (
        tuple(
            Part(1 / parts, len(each), each, derived_seed(seed, 2**31 + number * parts + place))
            for place, each in enumerate(step)
        )
        for number, step in enumerate(found)
    )


def _epoch(sampler: Any, seed: int, batch_size: int | None = None) -> Iterator[Any]:
    """An epoch's batches, or the first of them where there is no end, from a copy of a batch sampler."""
    twin = _reseeded(sampler, seed)
    if batch_size is not None:
        twin.batch_size = batch_size
    try:
        len(twin)
    except (TypeError, NotImplementedError, AttributeError):
        return islice(twin, _ENDLESS)
    return iter(twin)


def _reseeded(sampler: Any, seed: int) -> Any:
    """A copy of a sampler that draws from a torch generator of its own; others are seeded with the isolation."""
    twin = copy.copy(sampler)
    for name, value in getattr(twin, "__dict__", {}).items():
        if isinstance(value, torch.Generator) or (name == "generator" and value is None):
            setattr(twin, name, torch.Generator().manual_seed(seed))
        elif name == "sampler":
            setattr(twin, name, _reseeded(value, seed))
    if hasattr(twin, "set_epoch"):  # it makes a generator of the epoch's number
        twin.set_epoch(seed % 2**31)
    return twin
