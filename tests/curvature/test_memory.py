"""What a measurement may take of the memory, and what it says that it took."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eoss import measure_sharpness
from lightning_eoss.curvature import memory
from lightning_eoss.curvature.memory import Gauge, memory_budget

CPU, MIB, GIB = torch.device("cpu"), 2**20, 2.0**30


def written(root: Path, **files: str) -> None:
    """Files as Linux has them: `__` stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"proc__meminfo": f"MemTotal: 9 kB\nMemAvailable: {24 * 2**20} kB\n"}, 24 * GIB),
        # A container's limit counts, and what it has cached can be had.
        (
            {
                "proc__meminfo": f"MemAvailable: {24 * 2**20} kB\n",
                "sys__fs__cgroup__memory_max": f"{4 * 2**30}\n",
                "sys__fs__cgroup__memory_current": f"{2 * 2**30}\n",
                "sys__fs__cgroup__memory_stat": f"anon 5\ninactive_file {2**30}\n",
            },
            3 * GIB,
        ),
        (
            {
                "proc__meminfo": f"MemAvailable: {2 * 2**20} kB\n",
                "sys__fs__cgroup__memory_max": "max\n",
                "sys__fs__cgroup__memory_current": "5\n",
                "sys__fs__cgroup__memory_stat": "inactive_file 1\n",
            },
            2 * GIB,
        ),
        ({}, 12 * GIB),  # nobody says
    ],
)
def test_three_budgets_take_a_quarter_of_what_is_free(
    files: dict[str, str], free: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, **files)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    budget = memory_budget(CPU)
    assert free / 8 < 3 * budget <= free / 4  # the next smaller power of two
    assert math.log2(budget).is_integer()


def test_a_full_machine_still_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, proc__meminfo="MemAvailable: 0 kB\n")
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory_budget(CPU) == 16 * MIB


def cuda(monkeypatch: pytest.MonkeyPatch, **numbers: float) -> SimpleNamespace:
    """A CUDA device that holds what it is told to."""
    state = SimpleNamespace(**numbers)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: getattr(state, name))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free, 80 * GIB))
    return state


def test_a_device_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has reserved and does not use can be had, too."""
    cuda(monkeypatch, free=40 * GIB, memory_reserved=10 * GIB, memory_allocated=2 * GIB)
    assert memory_budget(torch.device("cuda")) == 4 * GIB  # 48 / 12


def test_a_device_is_asked_and_its_record_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: pytest.fail("it belongs to the user"))
    state = cuda(monkeypatch, memory_allocated=100 * MIB, max_memory_allocated=500 * MIB)
    gauge = Gauge(torch.device("cuda"))
    state.memory_allocated = 130 * MIB
    gauge.note()
    state.memory_allocated = 100 * MIB
    assert gauge.added == 30  # below training's own peak, what was seen counts
    state.max_memory_allocated = 620 * MIB
    assert gauge.added == 520  # above, the device knows better


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what a process holds")
def test_what_a_process_takes_is_seen() -> None:
    gauge = Gauge(CPU)
    held = torch.ones(64 * MIB)  # 256 MiB
    gauge.note()
    del held
    assert gauge.added == pytest.approx(256, rel=0.05)  # give or take what else a process does


class Pictures(torch.utils.data.Dataset[Any]):
    """Made when they are loaded."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(2**19, generator=generator), torch.randn(1, generator=generator)  # 2 MiB


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what a process holds")
def test_a_measurement_says_what_it_took() -> None:
    """The full batch alone has 128 MiB, which are cached; beside it there are no more than a few copies of it."""
    net = nn.Sequential(nn.AvgPool1d(2**16), nn.Linear(8, 1))
    result = measure_sharpness(
        net, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), Pictures(), batch_size=8, num_batches=2
    )
    assert 128 <= result.memory <= 4 * 128


def test_where_nobody_says_there_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert math.isnan(Gauge(CPU).added)
