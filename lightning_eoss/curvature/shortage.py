"""Memory that runs out in a measurement: how it is told from other errors, and given back."""

import gc

import torch

from lightning_eoss.curvature.isolation import accelerators

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
