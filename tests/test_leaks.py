"""Nothing stays behind: neither a byte of a tensor nor the memory of a process grows with measurements and fits.

A graph that holds itself (a saved output that a hook has packed as it is) goes through C++, where Python's collector
does not look. So live tensors are not counted by the collector alone: torch's profiler reports what the allocator hands
out and gets back.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eoss import measure_sharpness
from tests.problems import squared_error
from tests.runs import PUBLIC_CALLBACKS, Regressor, bytes_kept, fit, loader, public_callback, seeded

pytestmark = pytest.mark.filterwarnings("ignore")  # what is said of these trainings is tested elsewhere


def bytes_seen() -> int:
    """Bytes of all tensors that the collector knows of, each storage once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def resident() -> int:
    """Bytes of the process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measuring(width: int = 8) -> Callable[[], Any]:
    """A measurement without a Trainer, of layers that save their output."""
    net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1), nn.ReLU())
    data = [(torch.tensor([x]), torch.tensor([1.0])) for x in (0.5, 1.0, 1.5, 2.0)]
    return lambda: measure_sharpness(net, squared_error, data, batch_size=2, num_batches=2)


def fitting(name: str, root: Path) -> Callable[[], Any]:
    """A fit, from the module on."""

    def run() -> None:
        seeded()
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
        fit(root, Regressor(net), loader(batch_size=8), public_callback(name), max_epochs=1, logger=False)

    return run


def test_the_count_sees_what_the_collector_does_not() -> None:
    kept = []

    def leak() -> None:
        inputs = torch.ones(256, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            inputs.tanh()

    assert bytes_kept(lambda: torch.ones(256)) == 0
    assert bytes_kept(lambda: kept.append(torch.ones(256))) == 1024
    assert bytes_kept(leak) >= 1024  # the output, and what it was made of


def test_a_measurement_keeps_no_byte() -> None:
    measure = measuring()
    measure()  # what is loaded once
    assert [bytes_kept(measure) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("name", PUBLIC_CALLBACKS)
def test_a_fit_keeps_no_byte(name: str, tmp_path: Path) -> None:
    run = fitting(name, tmp_path)
    run()
    assert bytes_kept(run) == 0


@pytest.mark.slow
def test_five_hundred_measurements_need_no_memory() -> None:
    """What one of them kept before would be 130 kB."""
    measure = measuring(width=8192)
    for _ in range(20):
        measure()
    tensors, before = bytes_seen(), resident()
    for _ in range(500):
        measure()
    assert bytes_seen() == tensors
    assert resident() - before < 500 * 16_384


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC_CALLBACKS)
def test_twenty_fits_need_no_memory(name: str, tmp_path: Path) -> None:
    run = fitting(name, tmp_path)
    for _ in range(3):
        run()
    tensors, before = bytes_seen(), resident()
    for _ in range(20):
        run()
    assert bytes_seen() == tensors
    assert resident() - before < 2**23
