"""Looking at a model without touching it: whatever a forward pass can change is noted before and put back after.

Covered: parameters' tensor hooks, `.grad` references and `requires_grad`; buffers (identity and content); train and
eval modes; the random generators of torch (every device), numpy and python; attributes of the modules and of the
objects that are handed in, and what their lists, dicts, sets, deques, tensors, arrays and random generators hold, one
level deep.

Not covered: files, globals, the state of C++ extensions, what lies deeper inside containers, and tensors or arrays of
more than 2**20 elements that data objects hold (training changes no data set that large, and a copy at each measurement
would cost too much).
"""

import contextlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Restore = Callable[[], None]

_SMALL = 2**20  # elements of a tensor or array that is copied for a data object
_FEW = 256  # entries of a container that is searched for tensors, generators and objects
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_NOT_ENTERED = (
    nn.Module,
    Tensor,
    np.ndarray,
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    *_GENERATORS,
)
# Live iterators, their queues and locks: other threads change them meanwhile, and to put one back would lose batches.
_ALIVE = ("multiprocessing.", "threading", "queue", "_thread", "_queue", "torch.utils.data.dataloader")
_MODULE_INTERNALS = ("_parameters", "_buffers", "_modules")  # and all hook dictionaries


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

    Args:
        module: The module that is evaluated, its submodules included.
        objects: What else an evaluation may change: data sets, samplers, a datamodule, a collate function.

    Yields:
        An `Isolation`, to put everything back, or to seed it, between two evaluations.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with isolated(layer):
        ...     _ = layer(torch.ones(3, 2))
        >>> int(layer.num_batches_tracked)
        0
    """
    modules, parameters = list(module.modules()), list(module.parameters())
    held = _reachable(objects)
    generators = _found_generators([*modules, *held])
    restorers = [
        noted_generators(),
        *(_generator(each) for each in generators),
        *(_attributes(each, limit=sys.maxsize) for each in modules),
        *(_attributes(each, limit=_SMALL) for each in held),
        *(_slots(each._parameters) for each in modules),
        *(_slots(each._buffers) for each in modules),
        *(_buffers(each) for each in modules),
        *(_parameter(each) for each in parameters),
    ]

    def restore() -> None:
        for each in restorers:
            each()

    def reseed(seed: int) -> None:
        _seed_globally(seed)
        for each in generators:
            _seed(each, seed)

    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            stack.callback(setattr, parameter, "_backward_hooks", parameter._backward_hooks)
            parameter._backward_hooks = None
        stack.callback(restore)
        for context in _contexts(modules, parameters):
            stack.enter_context(context)
        yield Isolation(restore, reseed)


def _contexts(
    modules: list[nn.Module], parameters: list[nn.Parameter]
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """The backends under which a loss can be differentiated twice."""
    yield torch.inference_mode(False)
    yield torch.enable_grad()
    for device_type in {"cpu", *(parameter.device.type for parameter in parameters)}:
        yield torch.autocast(device_type, enabled=False)
    yield sdpa_kernel(SDPBackend.MATH)
    if any(isinstance(each, nn.RNNBase) for each in modules):
        yield torch.backends.cudnn.flags(enabled=False)
    if "torch._dynamo" in sys.modules:  # not imported: nothing is compiled
        yield torch.compiler.set_stance("force_eager")


# ---- random generators -----------------------------------------------------------------------------------------------


def _accelerators() -> list[Any]:
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
        for each in _accelerators()
    ]

    def restore() -> None:
        torch.set_rng_state(cpu)
        for each, state in states:
            (each.set_rng_state_all if hasattr(each, "set_rng_state_all") else each.set_rng_state)(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return restore


def _seed_globally(seed: int) -> None:
    """Seeds what `noted_generators` notes."""
    torch.default_generator.manual_seed(seed)
    for each in _accelerators():
        (each.manual_seed_all if hasattr(each, "manual_seed_all") else each.manual_seed)(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _generator(generator: Any) -> Restore:
    """Notes the state of one generator object."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: _discard(generator.set_state(state))
    if isinstance(generator, np.random.Generator):
        bits, numpy_state = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", numpy_state)
    if isinstance(generator, np.random.RandomState):
        legacy_state = generator.get_state()
        return lambda: generator.set_state(legacy_state)
    python_state = generator.getstate()
    return lambda: generator.setstate(python_state)


def _seed(generator: Any, seed: int) -> None:
    """Seeds one generator object."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits: Any = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed % 2**32)


def _found_generators(objects: Iterable[Any]) -> list[Any]:
    """Generator objects among the attributes and in small containers of the objects, each once."""
    found: dict[int, Any] = {}
    for each in objects:
        for value in _attributes_of(each).values():
            for inner in (value, *_few_entries(value)):
                if isinstance(inner, _GENERATORS) and inner is not torch.default_generator:
                    found[id(inner)] = inner
    return list(found.values())


# ---- modules, parameters and other objects ---------------------------------------------------------------------------


def _parameter(parameter: nn.Parameter) -> Restore:
    """Notes what an evaluation may switch on a parameter; its values are `preflight`'s concern."""
    grad, requires_grad = parameter.grad, parameter.requires_grad

    def restore() -> None:
        if parameter.requires_grad is not requires_grad:
            parameter.requires_grad_(requires_grad)
        if parameter.grad is not grad:
            parameter.grad = grad

    return restore


def _slots(slots: dict[str, Any]) -> Restore:
    """Notes which parameters or buffers a module has; `functional_call` loses those of modules that are used twice."""
    noted = dict(slots)

    def restore() -> None:
        if slots.keys() != noted.keys() or any(slots[name] is not value for name, value in noted.items()):
            slots.clear()
            slots.update(noted)

    return restore


def _buffers(module: nn.Module) -> Restore:
    """Notes the content of a module's own buffers."""
    noted = [_content(buffer) for buffer in module._buffers.values() if buffer is not None]

    def restore() -> None:
        for put_back in noted:
            put_back()

    return restore


def _attributes(target: Any, *, limit: int) -> Restore:
    """Notes an object's attributes, and what their containers, tensors and arrays (up to `limit` elements) hold."""
    attributes = target.__dict__
    noted = dict(attributes)
    contents = [
        content
        for name, value in noted.items()
        if name not in _MODULE_INTERNALS and not name.endswith("_hooks") and "hooks_" not in name
        for content in _contents(value, limit)
    ]

    def restore() -> None:
        if attributes.keys() != noted.keys() or any(attributes[name] is not value for name, value in noted.items()):
            attributes.clear()
            attributes.update(noted)
        for content in contents:
            content()

    return restore


def _contents(value: Any, limit: int) -> Iterator[Restore]:
    """Ways to put back what one attribute holds, one level deep."""
    if isinstance(value, (list, deque, set, dict)) and len(value) <= _SMALL:
        yield _container(value)
    for inner in (value, *_few_entries(value)):
        if isinstance(inner, Tensor) and not isinstance(inner, nn.Parameter) and inner.numel() <= limit:
            yield _content(inner)
        elif isinstance(inner, np.ndarray) and inner.size <= limit and inner.flags.writeable:
            yield _array(inner)


def _container(value: Any) -> Restore:
    """Notes the entries of a list, deque, set or dict."""
    noted = value.copy()

    def restore() -> None:
        if isinstance(value, dict):
            same = len(value) == len(noted) and all(key in value and value[key] is noted[key] for key in noted)
        else:
            same = len(value) == len(noted) and all(a is b for a, b in zip(value, noted, strict=True))
        if not same:
            value.clear()
            value.update(noted) if isinstance(value, (dict, set)) else value.extend(noted)

    return restore


def _content(tensor: Tensor) -> Restore:
    """Notes a tensor's elements. Through `.data`: a bumped version counter would spoil graphs that hold the tensor."""
    data, noted = tensor.data, tensor.detach().clone()
    return lambda: _discard(data.copy_(noted))


def _array(array: "np.ndarray[Any, Any]") -> Restore:
    """Notes an array's elements."""
    noted = array.copy()
    return lambda: np.copyto(array, noted)


def _attributes_of(target: Any) -> dict[str, Any]:
    """An object's attributes, without the way back to a Trainer."""
    attributes = getattr(target, "__dict__", {})
    return {name: value for name, value in attributes.items() if name.lstrip("_") != "trainer"}


def _few_entries(value: Any) -> tuple[Any, ...]:
    """The entries of a small container."""
    if not isinstance(value, (list, tuple, deque, set, dict)) or len(value) > _FEW:
        return ()
    return tuple(value.values() if isinstance(value, dict) else value)


def _reachable(objects: Iterable[Any], depth: int = 3) -> list[Any]:
    """The objects and what they hold (a Subset's data set, its transforms), each once."""
    found: dict[int, Any] = {}

    def visit(target: Any, remaining: int) -> None:
        if id(target) in found or isinstance(target, _NOT_ENTERED) or not hasattr(target, "__dict__"):
            return
        if type(target).__module__.startswith(_ALIVE):
            return
        found[id(target)] = target
        if remaining:
            for value in _attributes_of(target).values():
                for inner in (value, *_few_entries(value)):
                    visit(inner, remaining - 1)

    for each in objects:
        visit(each, depth)
    return list(found.values())


def _discard(_: object) -> None:
    """Swallows a return value."""
