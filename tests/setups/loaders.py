"""Where batches come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from tests.runs import Regressor, loader, samples
from tests.setups.case import Case

# ---- one loader ------------------------------------------------------------------------------------------------------


def weighted() -> DataLoader[Any]:
    sampler = WeightedRandomSampler(torch.arange(1.0, 13), 12, generator=torch.Generator().manual_seed(0))
    return loader(samples(12), sampler=sampler)


class Stream(IterableDataset[Any]):
    """Samples that come one after another."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples(12))


def stream() -> DataLoader[Any]:
    return loader(Stream())


class Described(Regressor):
    """Batches are dictionaries with more than tensors."""

    def loss(self, batch: Any) -> Tensor:
        assert batch["mask"] is None and len(batch["names"]) == len(batch["inputs"])
        return super().loss((batch["inputs"], batch["targets"]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=len(batch["inputs"]))
        return loss


def described(rows: list[Any]) -> dict[str, Any]:
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"inputs": inputs, "targets": targets, "names": [str(row[0]) for row in rows], "mask": None}


# ---- several ---------------------------------------------------------------------------------------------------------


class Both(Regressor):
    """Steps on a sum over the loaders that still have a batch."""

    def loss(self, batch: Any) -> Tensor:
        batches = batch.values() if isinstance(batch, dict) else batch
        losses = [super(Both, self).loss(each) for each in batches if each is not None]
        return torch.stack(losses).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


def combined(mode: str) -> Any:
    return CombinedLoader({"many": loader(samples(12)), "few": loader(samples(8, seed=1))}, mode)


# ---- objects ---------------------------------------------------------------------------------------------------------


@dataclass
class Graphs:
    """Some graphs as one: nodes, their neighbours, and the graph that each belongs to."""

    nodes: Tensor
    edges: Tensor
    graph: Tensor
    targets: Tensor
    name: str = "graphs"

    @property
    def num_graphs(self) -> int:
        return len(self.targets)


def graph(index: int) -> Graphs:
    """A circle of two to five nodes."""
    count = 2 + index % 4
    circle = torch.arange(count)
    nodes = torch.randn(count, 3, generator=torch.Generator().manual_seed(index))
    return Graphs(nodes, torch.stack([circle, circle.roll(1)]), torch.zeros(count).long(), nodes.square().mean()[None])


def union(graphs: list[Graphs]) -> Graphs:
    """As a library of graph networks collates them."""
    counts = [len(each.nodes) for each in graphs]
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    return Graphs(
        torch.cat([each.nodes for each in graphs]),
        torch.cat([each.edges + first for each, first in zip(graphs, firsts, strict=True)], 1),
        torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor(counts)),
        torch.cat([each.targets for each in graphs]),
    )


class GraphNetwork(Regressor):
    """Mean over the neighbours, mean over the nodes."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 1)]))

    def loss(self, batch: Any) -> Tensor:
        first, last = self.net
        hidden = torch.tanh(first(batch.nodes))
        gathered = torch.zeros_like(hidden).index_add(0, batch.edges[1], hidden[batch.edges[0]])
        of_graphs = torch.zeros(batch.num_graphs, 4, dtype=hidden.dtype).index_add(0, batch.graph, gathered)
        return (last(of_graphs)[:, 0] - batch.targets).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss


def graphs() -> list[Graphs]:
    return [graph(index) for index in range(10)]


def ready() -> list[Graphs]:
    """The last one is short."""
    every = graphs()
    return [union(every[first : first + 4]) for first in range(0, 10, 4)]


# ---- modules of data -------------------------------------------------------------------------------------------------


class Reloaded(LightningDataModule):
    """Other samples in each epoch."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return loader(samples(12, seed=self.trainer.current_epoch))


NO_SECOND = "SharpnessMonitor cannot read "
FRESH = "pass `dataloader=`, a list or loader of batches to measure on"

LOADERS = [
    Case("`shuffle=True`", data=lambda: loader(samples(12), shuffle=True)),
    Case("short last batch", data=lambda: loader(samples(10))),
    Case("`WeightedRandomSampler`", data=weighted, note="MiniBS from a copy of the sampler, FullBS uniform"),
    Case(
        "`IterableDataset`",
        data=stream,
        measured="refused",
        says=(NO_SECOND + "an IterableDataset a second time without disturbing training. Pass dataloader=",),
        note=FRESH,
    ),
    Case(
        "`IterableDataset`, with `dataloader=`",
        data=stream,
        monitor=lambda: {"dataloader": stream()},
        chunks=lambda data: data,
    ),
    *(
        Case(
            f'`CombinedLoader`, `"{mode}"`',
            Both,
            lambda mode=mode: combined(mode),
            chunks=lambda data: [batch for batch, *_ in data],
            sizes=lambda batch: 1,
            note="FullBS: over the batches of an epoch",
        )
        for mode in ("min_size", "max_size", "max_size_cycle")
    ),
    Case(
        '`CombinedLoader`, `"sequential"`',
        Both,
        lambda: combined("sequential"),
        measured="refused",
        says=('`_FitLoop` does not support the `CombinedLoader(mode="sequential")` mode',),
        note="by Lightning itself: this mode is not for training",
    ),
    Case(
        '`CombinedLoader`, `"min_size"`, with `dataloader=`',
        Both,
        lambda: combined("min_size"),
        monitor=lambda: {"dataloader": combined("min_size")},
        chunks=lambda data: [batch for batch, *_ in data],
        sizes=lambda batch: len(batch["many"][0]),
    ),
    Case(
        "a list of one loader",
        Both,
        lambda: [loader(samples(12))],
        chunks=lambda data: [[batch] for batch in data[0]],
        sizes=lambda batch: len(batch[0][0]),
    ),
    Case(
        "batches with strings and `None` beside tensors",
        Described,
        lambda: loader(samples(12), collate_fn=described),
        sizes=lambda batch: len(batch["inputs"]),
    ),
    Case(
        "ready batches with strings and `None` beside tensors, with `dataloader=`",
        Described,
        lambda: DataLoader(list(loader(samples(12), collate_fn=described)), batch_size=None),
        monitor=lambda: {"dataloader": list(loader(samples(12), collate_fn=described))},
        chunks=list,
        sizes=lambda batch: len(batch["inputs"]),
    ),
    Case(
        "graphs, joined by `collate_fn` into an object",
        GraphNetwork,
        lambda: loader(graphs(), collate_fn=union),
        sizes=lambda batch: batch.num_graphs,
    ),
    Case(
        "ready batches of objects (`batch_size=None`)",
        GraphNetwork,
        lambda: DataLoader(ready(), batch_size=None),
        measured="refused",
        says=(NO_SECOND + "a DataLoader without a batch sampler a second time",),
        note=FRESH,
    ),
    Case(
        "ready batches of objects, the last one short, with `dataloader=`",
        GraphNetwork,
        lambda: DataLoader(ready(), batch_size=None),
        monitor=lambda: {"dataloader": ready()},
        chunks=lambda data: ready(),
        sizes=lambda batch: batch.num_graphs,
    ),
    Case(
        "`LightningDataModule`, `reload_dataloaders_every_n_epochs=1`",
        data=Reloaded,
        options={"reload_dataloaders_every_n_epochs": 1},
        chunks=lambda data: loader(samples(12, seed=1)),
    ),
    Case(
        "`limit_train_batches=2`",
        options={"limit_train_batches": 2},
        chunks=lambda data: loader(torch.utils.data.Subset(samples(12), range(8))),
    ),
    Case(
        "`overfit_batches=2`",
        options={"overfit_batches": 2},
        chunks=lambda data: loader(torch.utils.data.Subset(samples(12), range(8))),
    ),
]
