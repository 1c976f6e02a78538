"""What an evaluation can reach, and so change: the walk from a module and other objects to everything that holds state.

It follows attributes (`__dict__` and slots), entries of containers, what functions close over, bound methods,
`functools.partial`, submodules wherever they are, hooks and gradients, breadth first: what is near comes first.

It ends at classes, imported modules and globals; at objects of the standard library and of torch's inside (queues,
locks, threads, files, iterators: others change them meanwhile, and to put one back would lose batches) and at what
holds a thread or a process; at the Trainer's loops, loggers, strategies, progress bars and monitors; in containers of
more than 1024 entries, which are noted but not searched; and after 4096 things, the network's own not counted.
"""

import contextlib
import functools
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
CONTAINERS = (OrderedDict, dict, list, deque, set)  # the more special class first
_FEW = 1024  # entries of a container that is searched
_MANY = 2**12  # things noted beside the network's own
_WAITING = 2**14  # things that wait to be looked at
_LEAVES = {int, float, complex, bool, str, bytes, type(None), range, slice, torch.dtype, torch.device, torch.Size}
_NOT_ENTERED = (type, ModuleType)
_BOUND = (MethodType, BuiltinFunctionType)
_ALWAYS_ENTERED = (nn.Module, Tensor, tuple, frozenset, CellType, functools.partial, *_BOUND, *CONTAINERS)
# Of what is standard or torch's, state that users hold.
_STANDARD = ("collections", "types", "argparse")
_TORCH = ("torch.optim", "torch.utils.data", "torch.nn", "torch.distributions", "torch.amp", "torch.cuda.amp")
# Whatever is derived from these lives: other threads change it, or it is what runs this very measurement.
_LIGHTNING = (
    *("trainer", "loops", "loggers", "strategies", "plugins", "profilers", "callbacks.progress"),
    "utilities.combined_loader",
)
_ALIVE = (
    *("_thread", "threading", "queue", "_queue", "multiprocessing.", "concurrent.", "asyncio.", "subprocess", "socket"),
    *("io", "_io", "weakref", "torch.utils.data.dataloader", "lightning_eoss.callbacks", "lightning_eoss.training"),
    *(f"{package}.{part}" for package in ("lightning.pytorch", "pytorch_lightning") for part in _LIGHTNING),
)


@dataclass(frozen=True)
class Found:
    """Something that holds state."""

    value: Any
    owned: bool  # by a module: whatever its size, training may change it
    hooks: bool = False  # a module's dictionary of hooks; measurements register some of their own


def reachable(roots: Iterable[Any]) -> Iterator[Found]:
    """Everything mutable that can be reached.

    Example:
        >>> [type(each.value).__name__ for each in reachable([([1], {"a": [2]})])]
        ['list', 'dict', 'list']
    """
    seen: dict[int, Any] = {}
    waiting = deque((root, False) for root in roots)
    noted = 0
    while waiting:
        value, owned = waiting.popleft()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if not _entered(value):
            continue
        inside: list[Any] = []
        if isinstance(value, nn.Module):
            owned = True
            for name, inner in vars(value).items():
                hooks = name.endswith("_hooks") or "hooks_" in name
                if isinstance(inner, dict) and (hooks or name in ("_parameters", "_buffers", "_modules")):
                    seen[id(inner)] = inner
                    yield Found(inner, owned, hooks)
                    waiting.extend((each, owned) for each in inner.values())
            inside = [vars(value)]
        elif noted < _MANY or (owned and isinstance(value, Tensor)):
            owned = owned and not isinstance(value, (Dataset, Sampler))
            if isinstance(value, (Tensor, np.ndarray, *CONTAINERS, *GENERATORS)) or members(value):
                noted += not (owned and isinstance(value, Tensor))
                yield Found(value, owned)
            with contextlib.suppress(Exception):  # what cannot be read is left alone
                inside = [each for each in _inside(value) if type(each) not in _LEAVES]
        if len(waiting) < _WAITING or owned:
            waiting.extend((each, owned) for each in inside)


def members(value: Any) -> tuple[Any, ...]:
    """The descriptors of an object's slots, or of what a cell holds."""
    kind: Any = type(value)
    return _members(kind)


@functools.lru_cache(maxsize=1024)
def _members(kind: Any) -> tuple[Any, ...]:
    """The same of a class."""
    if kind is CellType:
        return (vars(CellType)["cell_contents"],)
    if issubclass(kind, (*_NOT_ENTERED, *_ALWAYS_ENTERED, FunctionType)):
        return ()
    return tuple(
        each for base in kind.__mro__ for each in vars(base).values() if isinstance(each, MemberDescriptorType)
    )


def _entered(value: Any) -> bool:
    """Whether something is state that belongs to what is measured."""
    with contextlib.suppress(Exception):
        if isinstance(value, (*_ALWAYS_ENTERED, np.ndarray, *GENERATORS)):
            return value is not torch.default_generator  # noted with the global ones
        kind: Any = value.__module__ or "" if isinstance(value, FunctionType) else type(value)
        held = getattr(value, "__dict__", {}).values()
        return not isinstance(value, _NOT_ENTERED) and _belongs(kind) and not any(map(_works, held))
    return False


def _works(value: Any) -> bool:
    """Whether this is a thread or a process, which changes the object that holds it."""
    return isinstance(value, (threading.Thread, BaseProcess, Executor))


@functools.lru_cache(maxsize=1024)
def _belongs(kind: Any) -> bool:
    """Whether instances of a class, or functions of a module of this name, are neither live nor a library's inside."""
    bases = [kind] if isinstance(kind, str) else [str(each.__module__) for each in kind.__mro__]
    if any(each.startswith(_ALIVE) for each in bases):
        return False
    package = bases[0].split(".")[0]
    if package == "torch":
        return bases[0].startswith(_TORCH)
    return package not in sys.stdlib_module_names or package in _STANDARD


def _inside(value: Any) -> Iterator[Any]:
    """What something holds."""
    if isinstance(value, Tensor):
        if value.is_leaf and value.grad is not None:
            yield value.grad
        return
    if isinstance(value, (np.ndarray, *GENERATORS)):
        return
    if isinstance(value, (tuple, frozenset, *CONTAINERS)) and len(value) <= _FEW:
        yield from value.values() if isinstance(value, dict) else value
    if isinstance(value, FunctionType):
        yield from (*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__)
    if isinstance(value, _BOUND):
        yield from (value.__self__, getattr(value, "__func__", None))
    if isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    yield getattr(value, "__dict__", None)
    for member in members(value):
        with contextlib.suppress(AttributeError, ValueError):  # an empty slot, an empty cell
            yield member.__get__(value)
