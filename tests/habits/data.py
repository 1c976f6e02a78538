"""Habits of data that measuring could disturb: what data sets, samplers and datamodules draw and count."""

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Sampler, WeightedRandomSampler

from tests.habits.modules import Case, Noise
from tests.runs import Regressor, loader, samples


class SlotNoise(Noise):
    __slots__ = ("drawn",)

    def __call__(self, inputs: Any) -> Any:
        self.drawn = getattr(self, "drawn", 0) + 1
        return super().__call__(inputs) + 0.01 * self.drawn


class ModuleNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, inputs: Tensor) -> Any:
        return self.noise(self.norm(inputs + torch.randn(2, 4))[0])


class Augmented(Dataset[Any]):
    """Noise from the global generators, or from one of its own; counts."""

    def __init__(self, own: bool) -> None:
        self.data = samples()
        self.generator = np.random.default_rng(5) if own else None
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        noise = (
            self.generator.normal() if self.generator else np.random.normal() + random.random() + float(torch.rand(()))
        )
        self.fetched += 1
        return inputs + 0.1 * noise, targets


def augmentation_by_global_generators() -> Case:
    return Regressor(), loader(Augmented(own=False), shuffle=True), {}


def augmentation_by_its_own_generator() -> Case:
    return Regressor(), loader(Augmented(own=True), shuffle=True), {}


class Data(LightningDataModule):
    """Draws in its transfer hook."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(7)
        self.seen: list[int] = []

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(len(self.seen))
        return batch[0] + 0.1 * self.generator.normal() + 0.01 * len(self.seen), batch[1]


def datamodule() -> Case:
    return Regressor(), Data(), {}


def shuffled() -> Case:
    return Regressor(), loader(shuffle=True, generator=torch.Generator().manual_seed(9)), {}


def weighted() -> Case:
    return Regressor(), loader(sampler=WeightedRandomSampler(np.linspace(1, 3, 24), 24)), {}


class Batches(Sampler[list[int]]):
    """Batches of four from the global generator, or from one of its own; counts epochs and tells no batch size."""

    def __init__(self, generator: Any = None) -> None:
        self.generator = generator
        self.epochs = 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        for _ in range(6):
            if isinstance(self.generator, np.random.Generator):
                yield self.generator.permutation(24)[:4].tolist()
            else:
                yield torch.randperm(24, generator=self.generator)[:4].tolist()


def custom_batch_sampler() -> Case:
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=Batches()), {}


def custom_batch_sampler_with_a_generator() -> Case:
    sampler = Batches(torch.Generator().manual_seed(11))
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=sampler), {}


def custom_batch_sampler_with_a_numpy_generator() -> Case:
    sampler = Batches(np.random.default_rng(11))
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=sampler), {}


def list_of_batches_as_sampler() -> Case:
    batches = [list(range(first, first + 4)) for first in range(0, 24, 4)]
    return Regressor(), torch.utils.data.DataLoader(samples(), batch_sampler=batches), {}


class Stream(IterableDataset[Any]):
    """Draws what it yields."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(13)
        self.fetched = 0

    def __iter__(self) -> Iterator[Any]:
        for inputs, targets in samples():
            self.fetched += 1
            yield inputs + self.generator.normal() + float(torch.rand(())), targets


def workers() -> Case:
    data = loader(Augmented(own=True), shuffle=True, num_workers=2, persistent_workers=True)
    return Regressor(), data, {}


class Transformed(Dataset[Any]):
    """Inputs through a transform; with weights that are one number, expanded."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.data = samples()
        self.transform = transform
        self.weights = torch.ones(1).expand(24)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        return self.transform(inputs), targets * self.weights[index]


def transformed_by(name: str, make: Callable[[], Callable[[Any], Any]]) -> Any:
    return pytest.param(lambda: (Regressor(), loader(Transformed(make()), shuffle=True), {}), id=name)


def closure() -> Callable[[Any], Any]:
    noise, calls = Noise(), 0

    def transform(inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        return noise(inputs) + 0.01 * calls

    return transform


def noisy_collate() -> Case:
    generator = torch.Generator().manual_seed(0)

    def collate(rows: list[Any]) -> Any:
        inputs, targets = torch.utils.data.default_collate(rows)
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator), targets

    return Regressor(), loader(collate_fn=collate), {}


class Owned(Dataset[Any]):
    """Draws from its datamodule's generator, and writes into its cache."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.data = samples()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        seen = self.owner.cache.setdefault("seen", [])
        seen.append(index)
        return inputs + 0.1 * self.owner.generator.normal() + 1e-3 * len(seen), targets


class Owner(Data):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, list[int]] = {}

    def train_dataloader(self) -> Any:
        return loader(Owned(self), shuffle=True)


def data_of_a_datamodule() -> Case:
    return Regressor(), Owner(), {}


class Mapped(Dataset[Any]):
    """A file that nobody may write to: to write what is there already kills the process."""

    def __init__(self) -> None:
        self.inputs, self.targets = samples().tensors
        with tempfile.NamedTemporaryFile(suffix=".npy") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of this very thing
            np.save(file.name, self.inputs.numpy())
            self.inputs = torch.from_numpy(np.load(file.name, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index].clone(), self.targets[index]


def memory_mapped() -> Case:
    return Regressor(), loader(Mapped()), {}


HABITS_OF_DATA = [
    transformed_by("closure", closure),
    transformed_by("partial", lambda: partial(lambda noise, inputs: noise(inputs), Noise())),
    transformed_by("bound_method", lambda: Noise().__call__),
    transformed_by("slots", SlotNoise),
    transformed_by("module", ModuleNoise),
    noisy_collate,
    data_of_a_datamodule,
    memory_mapped,
    augmentation_by_global_generators,
    augmentation_by_its_own_generator,
    datamodule,
    shuffled,
    weighted,
    custom_batch_sampler,
    custom_batch_sampler_with_a_generator,
    custom_batch_sampler_with_a_numpy_generator,
    list_of_batches_as_sampler,
    pytest.param(workers, marks=pytest.mark.processes),
]
