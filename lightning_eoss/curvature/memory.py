"""How much memory a measurement may take, and how much it took; of the device that the parameters are on."""

import gc
import math
import mmap
from pathlib import Path

import torch

from lightning_eoss.isolation.isolate import accelerators

_PART = 1 / 12  # of what is free: graphs, cached batches and Krylov vectors get as much each, a quarter together
_LEAST, _UNKNOWN = 2.0**24, 2.0**30 / _PART  # bytes; the second is taken for free where nobody says what is
_ROOT = Path("/")


def memory_budget(device: torch.device) -> float:
    """Bytes that graphs, cached samples and Krylov vectors may take each, a quarter of what is free together."""
    # A power of two: what else runs on the machine shall not show in the last bits of a sharpness.
    return 2.0 ** math.floor(math.log2(max(_LEAST, _PART * _free(device))))


class Gauge:
    """The memory that is taken beyond what was taken at the start, seen where `note` is called.

    And where the device's own highest mark rose meanwhile, that. It is never reset: it belongs to the user.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._seen = _taken(device)
        self._mark = _highest(device)

    def note(self) -> None:
        """Looks; to be called where much is held."""
        self._seen = max(self._seen, _taken(self._device))

    @property
    def added(self) -> float:
        """MiB at the peak; NaN where the machine does not say."""
        self.note()
        mark = _highest(self._device)
        return (max(self._seen, mark if mark > self._mark else 0.0) - self._start) / 2**20


def _free(device: torch.device) -> float:
    """Bytes that may still be taken."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    group = "sys/fs/cgroup/memory."  # a container's; what it has cached is given up where something else needs it
    left = _number(f"{group}max") - _number(f"{group}current") + _number(f"{group}stat", "inactive_file")
    there = (1024 * _number("proc/meminfo", "MemAvailable:"), left)
    return min((each for each in there if not math.isnan(each)), default=_UNKNOWN)


def _taken(device: torch.device) -> float:
    """Bytes allocated on a CUDA device, else those that the process holds."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    return mmap.PAGESIZE * _number("proc/self/statm", 1)


def _highest(device: torch.device) -> float:
    """The highest mark of that."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024 * _number("proc/self/status", "VmHWM:")


def _number(path: str, at: str | int = 0) -> float:
    """The number at a place or after a name in a file of Linux; NaN where there is none, as "max" (no limit)."""
    try:
        words = (_ROOT / path).read_text().split()
        return float(words[at if isinstance(at, int) else words.index(at) + 1])
    except (OSError, ValueError, IndexError):
        return math.nan


_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # of devices and libraries


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory has run out, on whichever device.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
        True
    """
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return said or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def free() -> None:
    """Gives back what nobody holds any more, also to other processes."""
    gc.collect()
    for each in accelerators():
        each.empty_cache()
