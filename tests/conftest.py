"""What holds for all tests."""

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # little matrices; and the machine is shared


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """The collector need not look through all that was imported again and again: half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning stops listening to Ctrl+C once it was pressed."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
