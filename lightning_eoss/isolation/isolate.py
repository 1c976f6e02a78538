"""Looking at a model without touching it: whatever a forward pass can change is noted before and put back after.

Covered: all that `reachable` finds from the module and the objects that are handed in: parameters (values, `.grad`,
`requires_grad`, tensor hooks), buffers, modes, attributes, containers, tensors, arrays, random generators, closures;
and the global generators of torch (every device), numpy and python. `reachable` says where the walk ends, `snapshot`
how a thing is noted.

Not covered: files, globals and class attributes, live iterators, the inside of C++ extensions, tensors and arrays of
more than 8 MiB or in shared memory that data objects hold (training changes no data set that large, and a copy at each
measurement would cost too much), and frozen parameters beyond what is copied, whose change is reported.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_eoss.isolation.snapshot import Snapshot, seed

Restore = Callable[[], None]


@dataclass(frozen=True)
class Isolation:
    """The two things that can be done to what is isolated."""

    restore: Restore  # puts everything back; any number of times
    reseed: Callable[[int], None]  # seeds every generator, also those found inside the objects


@contextlib.contextmanager
def isolated(module: nn.Module, objects: Iterable[Any] = ()) -> Iterator[Isolation]:
    """Whatever happens inside leaves no trace on `module`, `objects` and the random generators; also when it raises.

    Inside, gradients are enabled, parameters have no tensor hooks (they would scale gradients and curvature), autocast
    is off, attention runs on its math kernel and compiled code eagerly (neither can be differentiated twice otherwise).

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with isolated(layer):
        ...     _ = layer(torch.ones(3, 2))
        >>> int(layer.num_batches_tracked)
        0
    """
    global_generators = noted_generators()
    with torch.inference_mode(False):  # what is copied here must be writable later
        snapshot = Snapshot(module, objects)

    def restore() -> None:
        global_generators()
        snapshot.restore()

    def reseed(number: int) -> None:
        _seed_globally(number)
        for each in snapshot.generators:
            seed(each, number)

    def close() -> str | None:
        global_generators()
        return snapshot.close()

    failure: BaseException | None = None
    try:
        with contextlib.ExitStack() as stack:
            for parameter in module.parameters():
                stack.callback(setattr, parameter, "_backward_hooks", parameter._backward_hooks)
                parameter._backward_hooks = None
            for context in _contexts(module):
                stack.enter_context(context)
            yield Isolation(restore, reseed)
    except BaseException as error:
        failure = error
        raise
    finally:
        try:
            complaint = close()
        except BaseException:  # Ctrl+C in the midst of it
            close()
            raise
        if complaint and (failure is None or isinstance(failure, Exception)):
            raise ValueError(complaint) from failure


def _contexts(module: nn.Module) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """The backends under which a loss can be differentiated twice."""
    yield torch.inference_mode(False)
    yield torch.enable_grad()
    for device_type in {"cpu", *(parameter.device.type for parameter in module.parameters())}:
        yield torch.autocast(device_type, enabled=False)
    yield sdpa_kernel(SDPBackend.MATH)
    if any(isinstance(each, nn.RNNBase) for each in module.modules()):
        yield torch.backends.cudnn.flags(enabled=False)
    if "torch._dynamo" in sys.modules:  # not imported: nothing is compiled
        yield torch.compiler.set_stance("force_eager")


# ---- random generators -----------------------------------------------------------------------------------------------
def accelerators() -> list[Any]:
    """The torch device modules whose generators exist already; asking must not initialise a device."""
    found: list[Any] = [torch.cuda] if torch.cuda.is_initialized() else []
    if torch.backends.mps.is_available():
        found.append(torch.mps)
    if hasattr(torch, "xpu") and torch.xpu.is_initialized():
        found.append(torch.xpu)
    return found


def noted_generators() -> Restore:
    """Notes the states of the global generators of torch (every device), numpy and python, to go back to them."""
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    states = [
        (each, each.get_rng_state_all() if hasattr(each, "get_rng_state_all") else each.get_rng_state())
        for each in accelerators()
    ]

    def restore() -> None:
        torch.set_rng_state(cpu)
        for each, state in states:
            (each.set_rng_state_all if hasattr(each, "set_rng_state_all") else each.set_rng_state)(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return restore


def _seed_globally(number: int) -> None:
    """Seeds what `noted_generators` notes."""
    torch.default_generator.manual_seed(number)
    for each in accelerators():
        (each.manual_seed_all if hasattr(each, "manual_seed_all") else each.manual_seed)(number)
    np.random.seed(number % 2**32)
    random.seed(number)
