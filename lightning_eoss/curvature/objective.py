"""The loss of a batch as a function of the parameters, the same bits each time."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eoss.curvature.batches import Part, Source, copied, num_bytes
from lightning_eoss.curvature.memory import Gauge
from lightning_eoss.isolation.isolate import Isolation


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
