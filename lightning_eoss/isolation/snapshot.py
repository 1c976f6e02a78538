"""How everything reachable was, to put it back where it differs.

Nothing is written that has not changed: memory may be read-only, or mapped from a file.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_eoss.isolation.reachable import CONTAINERS, GENERATORS, members, reachable

# Puts one thing back, a parameter's says whether it differed. False: between two evaluations, cheaply; True: for good.
Note = Callable[[bool], object]
_LONG = 1024  # entries of a container whose length alone is compared between evaluations
_SHORT = 2**16  # bytes of a tensor or array whose content is compared between evaluations
_DATA = 2**23, 2**28  # bytes of one tensor or array of data, and of all, that are copied; training changes none larger
_FROZEN = 2**28  # bytes of frozen parameters that are always copied
_UNSET = object()  # what an empty slot or cell holds
_WAY_OUT = "Pass loss_fn=, a function of (module, batch) that returns the loss and changes nothing."
_MOVED = (
    "Evaluating the loss changed trainable parameters in place ({}), so what was measured is not the loss at these "
    f"weights; they are put back. {_WAY_OUT}"
)
_LOST = (
    "Evaluating the loss changed frozen parameters ({}) that are too large to be copied for every measurement, so "
    f"training has been changed. {_WAY_OUT}"
)


class Snapshot:
    """The state of a module and of other objects.

    Between evaluations, what changed is found by what is cheap to ask: identity, length, torch's version counters, the
    content of what is small. Only at the end all contents are compared, so that no change remains.

    Trainable parameters belong to the measurement, which moves them; they are compared at the end alone. Frozen ones
    (a momentum teacher, a target network) are copied up to four times the memory of the trainable ones, or 256 MiB. Of
    larger ones (a backbone) a change is only noticed, by their version counters.
    """

    def __init__(self, module: nn.Module, objects: Iterable[Any]) -> None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        trained = {id(each): each for each in module.parameters() if each.requires_grad}
        frozen, data = max(_FROZEN, 4 * sum(each.nbytes for each in trained.values())), _DATA[1]  # bytes to spare
        self.generators: list[Any] = []
        self._often: list[Note] = []  # put back between evaluations and at the end
        self._late: list[Note] = []  # at the end
        self._watched: list[tuple[str, Note]] = []  # parameters that must not change, and what is said if they do
        for found in reachable([module, *objects]):
            value, owned = found.value, found.owned
            try:
                if isinstance(value, nn.Parameter):
                    name = names.get(id(value), "of another module")
                    if id(value) in trained:
                        self._watched.append((_MOVED.format(name), _tensor(value, False)))
                    elif value.nbytes <= frozen:
                        frozen -= value.nbytes
                        self._often.append(_tensor(value, True))
                    else:
                        self._watched.insert(0, (_LOST.format(name), _version_of(value)))
                    self._often.append(_switches(value))
                elif isinstance(value, (Tensor, np.ndarray)) and not owned:
                    if value.nbytes <= min(data, _DATA[0]) and not _others_write(value):
                        data -= value.nbytes
                        self._often.extend(_notes(value, owned))
                else:
                    (self._late if found.hooks else self._often).extend(_notes(value, owned))
            except Exception:  # what cannot be read is left alone
                continue
            if isinstance(value, GENERATORS):
                self.generators.append(value)

    def restore(self) -> None:
        """Puts back what an evaluation may have changed."""
        _put_back(self._often, for_good=False)

    def close(self) -> str | None:
        """Puts everything back; says what is wrong with an evaluation that changes parameters, if it did."""
        complaints = [words for words, note in self._watched if _put_back([note], for_good=True)]
        _put_back([*self._often, *self._late], for_good=True)
        return complaints[0] if complaints else None


def _put_back(notes: Iterable[Note], *, for_good: bool) -> bool:
    """Puts back, and says whether a parameter differed; what cannot be written is left alone."""
    changed = False
    for note in notes:
        try:
            changed |= bool(note(for_good))
        except Exception:
            continue
    return changed


def _others_write(value: Any) -> bool:
    """Whether memory is shared with other processes."""
    if isinstance(value, np.ndarray):
        return isinstance(value, np.memmap)
    return value.is_cpu and value.layout is torch.strided and value.is_shared()


def _notes(value: Any, owned: bool) -> Iterator[Note]:
    """The ways to put one thing back."""
    if isinstance(value, Tensor):
        yield _tensor(value, owned)
    elif isinstance(value, np.ndarray):
        yield _array(value)
    elif isinstance(value, GENERATORS):
        yield _generator(value)
    elif isinstance(value, CONTAINERS) and len(value) <= 2**20:
        yield _container(value)
    if members(value):
        yield _members(value)


def _container(value: Any) -> Note:
    """Notes the entries of a list, deque, set or dict (an object's attributes), by identity."""
    kind: Any = next(each for each in CONTAINERS if isinstance(value, each))
    mapping = issubclass(kind, dict)
    keys = [*kind.__iter__(value)]
    values = [*kind.values(value)] if mapping else []
    count = len(keys)

    def same() -> bool:
        return (
            kind.__len__(value) == count
            and all(map(is_, kind.__iter__(value), keys))
            and (not mapping or all(map(is_, kind.values(value), values)))
        )

    def put_back(for_good: bool) -> None:
        if kind.__len__(value) == count and ((count > _LONG and not for_good) or same()):
            return
        if mapping:  # an attribute that did not change is there all the time
            noted = dict(zip(keys, values, strict=True))
            for key in [key for key in kind.__iter__(value) if key not in noted]:
                kind.__delitem__(value, key)
            kind.update(value, noted)
        if not same():
            kind.clear(value)
            kind.update(value, noted) if mapping else (kind.update if kind is set else kind.extend)(value, keys)

    return put_back


def _members(value: Any) -> Note:
    """Notes what the slots of an object hold, or a cell."""
    noted = [_held(member, value) for member in members(value)]

    def put_back(_: bool) -> None:
        for member, old in zip(members(value), noted, strict=True):
            if old is not _held(member, value):
                member.__delete__(value) if old is _UNSET else member.__set__(value, old)

    return put_back


def _held(member: Any, value: Any) -> Any:
    """What one slot holds."""
    try:
        return member.__get__(value)
    except (AttributeError, ValueError):
        return _UNSET


def _tensor(tensor: Tensor, owned: bool) -> Note:
    """Notes a tensor's memory, its place and its shape.

    The memory is written as bytes: bits are compared, NaN and expanded tensors included, and the version counter is
    not bumped, which would spoil graphs that hold the tensor.
    """
    if tensor.layout is not torch.strided:
        return _opaque(tensor)
    alias, place, version = tensor.data, tensor.data_ptr(), _version(tensor)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    width = tensor.element_size()
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    size = extent * width if tensor.numel() else 0
    memory.set_(tensor.untyped_storage(), tensor.storage_offset() * width, (size,), (1,))
    noted = memory.clone()
    short = owned and memory.is_cpu and len(memory) <= _SHORT

    def put_back(for_good: bool) -> bool:
        nonlocal version
        moved = tensor.data_ptr() != place or tensor.shape != alias.shape
        differs = moved and not torch.equal(tensor.detach(), alias)
        if moved:
            tensor.data = alias
        asked = for_good or short or moved or _version(tensor) != version
        # Between evaluations an accelerator is not asked, which would mean to wait for it.
        if asked and (not (for_good or memory.is_cpu) or not torch.equal(memory, noted)):
            memory.copy_(noted)
            differs = True
        version = _version(tensor)
        return differs

    return put_back


def _opaque(tensor: Tensor) -> Note:
    """Notes a sparse tensor, which has no memory of its own to look at."""
    noted, version = tensor.detach().clone(), _version(tensor)

    def put_back(_: bool) -> bool:
        nonlocal version
        if _version(tensor) == version:
            return False
        with torch.no_grad():
            tensor.copy_(noted)
        version = _version(tensor)
        return True

    return put_back


def _version_of(tensor: Tensor) -> Note:
    """Only notices that a tensor has changed."""
    place, version = tensor.data_ptr(), _version(tensor)
    return lambda _: tensor.data_ptr() != place or _version(tensor) != version


def _version(tensor: Tensor) -> int:
    """How often torch has written a tensor; inference tensors are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _array(array: "np.ndarray[Any, Any]") -> Note:
    """Notes an array's elements."""
    noted = array.copy()

    def put_back(for_good: bool) -> None:
        asked = array.flags.writeable and (array.nbytes <= _SHORT or for_good)
        if asked and array.tobytes() != noted.tobytes():
            np.copyto(array, noted)

    return put_back


def _switches(parameter: nn.Parameter) -> Note:
    """Notes whether a parameter is trained, and which tensor its gradient is."""
    grad, requires_grad = parameter.grad, parameter.requires_grad

    def put_back(_: bool) -> None:
        if parameter.requires_grad is not requires_grad:
            parameter.requires_grad_(requires_grad)
        if parameter.grad is not grad:
            parameter.grad = grad

    return put_back


# ---- random generators -----------------------------------------------------------------------------------------------
def _generator(generator: Any) -> Note:
    """Notes the state of one generator object."""
    if isinstance(generator, np.random.Generator):
        bits, noted = generator.bit_generator, generator.bit_generator.state
        return lambda _: setattr(bits, "state", noted)
    if isinstance(generator, random.Random):
        known = generator.getstate()
        return lambda _: generator.setstate(known)
    state = generator.get_state()
    return lambda _: generator.set_state(state)


def seed(generator: Any, number: int) -> None:
    """Seeds one generator object.

    Example:
        >>> generator = random.Random()
        >>> seed(generator, 1)
        >>> generator.random() == random.Random(1).random()
        True
    """
    if isinstance(generator, torch.Generator):
        generator.manual_seed(number)
    elif isinstance(generator, np.random.Generator):
        bits: Any = generator.bit_generator
        bits.state = type(bits)(number).state
    elif not isinstance(generator, random.SystemRandom):
        generator.seed(number % 2**32)
