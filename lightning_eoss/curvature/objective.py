"""The loss of a batch as a function of the parameters, the same bits each time."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eoss.curvature.batches import Part, Source, copied, num_bytes
from lightning_eoss.curvature.memory import Gauge
from lightning_eoss.isolation.isolate import Isolation


def scalar(loss: Any) -> Tensor:
    """The loss of a batch as a tensor without dimensions."""
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


def flattened(tensors: Sequence[Tensor | None], parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One vector of all pieces, zeros where a piece is missing."""
    pieces = [
        torch.zeros_like(real(parameter), dtype=dtype).reshape(-1)
        if tensor is None
        else real((tensor.to_dense() if tensor.is_sparse else tensor).detach()).reshape(-1).to(dtype)
        for tensor, parameter in zip(tensors, parameters, strict=True)
    ]
    return torch.cat(pieces)


def unflattened(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a (..., P) vector in the shapes and dtypes of the parameters.

    A view at an odd offset is none of complex numbers, which a network may ask of its gradients: there, it is a copy.
    """
    shapes = [real(parameter).shape for parameter in parameters]
    pieces = vector.split([shape.numel() for shape in shapes], dim=-1)
    copies = []
    for piece, shape, parameter in zip(pieces, shapes, parameters, strict=True):
        shaped = piece.reshape((*vector.shape[:-1], *shape))
        odd = piece.storage_offset() % 2 != 0 or any(stride % 2 for stride in piece.stride()[:-1])
        own = shaped.to(parameter.dtype.to_real(), memory_format=torch.contiguous_format, copy=odd)
        copies.append(torch.view_as_complex(own) if parameter.is_complex() else own)
    return copies


LOADING = (
    "This came up while samples were loaded for a measurement, in the process that trains: what workers alone open (in "
    "a worker_init_fn) is not there. Open it where a sample is first asked for, or measure on other samples: batches "
    "that are there already, as in dataloader=list(itertools.islice(loader, 100))."
)


@contextmanager
def loading() -> Iterator[None]:
    """Marks errors that come up while samples are loaded."""
    try:
        yield
    except Exception as error:
        error.add_note(LOADING)
        vars(error)["while_loading"] = True
        raise


def while_loading(error: BaseException) -> bool:
    """Whether it came up while samples were loaded."""
    return "while_loading" in vars(error)


@dataclass
class BatchCache:
    """Samples on the device, kept for the next pass while they fit."""

    limit: float = 2.0**30  # bytes
    kept: dict[Part, Any] = field(default_factory=dict, repr=False)
    held: int = 0  # bytes
    # All that was ever loaded: samples, bytes, and seconds that it took.
    loaded: int = 0
    read: int = 0
    seconds: float = 0.0

    def get(self, part: Part, load: Callable[[], Any]) -> Any:
        """A part's samples, loaded where they are not there yet; never twice the same object."""
        key = replace(part, weight=1.0)
        if key not in self.kept:
            began = time.perf_counter()
            data = load()
            self.seconds += time.perf_counter() - began
            self.loaded += part.size
            self.read += (read := num_bytes(data))
            if self.held + read > self.limit:
                return data
            self.kept[key] = data
            self.held += read
        return copied(self.kept[key])


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
    def like(self) -> Tensor:
        """An empty vector with the device and dtype of Krylov vectors: the parameters' precision, float32 at least."""
        dtypes = (parameter.dtype.to_real() for parameter in self.parameters)
        return torch.empty(
            0, dtype=reduce(torch.promote_types, dtypes, torch.float32), device=self.parameters[0].device
        )

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
        """The loss of one part, with its graph."""
        data = self.load(part)
        self.prepare(part)
        return self.scaled(self.loss(data))

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
