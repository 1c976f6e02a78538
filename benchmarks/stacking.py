"""Mini-batches one after another against all in one stacked pass: what a product costs either way.

    python -m benchmarks.stacking

`curvature.preflight` stacks on accelerators, and on the CPU below 2**17 parameters; this is where the number is from.
"""

import time
from itertools import islice
from statistics import median

import torch
from torch import nn

from lightning_eoss.curvature.batches import DatasetSource, random_batches
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import Sequential, Stacked
from lightning_eoss.isolation.isolate import isolated

CELLS = tuple((width, batch_size) for width in (32, 128, 512, 2048) for batch_size in (8, 32, 128))


def seconds_per_product(width: int, batch_size: int, *, rows: int = 10, repeats: int = 9) -> tuple[int, float, float]:
    """P, and the median time of a product with ten batches, one after another and stacked."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    model = model.to(device)
    data = torch.utils.data.TensorDataset(torch.randn(1024, 64, device=device), torch.randn(1024, 10, device=device))
    with isolated(model) as isolation:
        objective = Objective(
            model, lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]), DatasetSource(data), isolation
        )
        batches = list(islice(random_batches(objective.source, batch_size, seed=0), rows))
        vectors = torch.randn(rows, objective.num_parameters, device=device)
        operators = Sequential(objective, batches), Stacked(objective, batches)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 2):
            for operator, taken in zip(operators, times, strict=True):
                began = time.perf_counter()
                float(operator.matvec(vectors)[0, 0])  # waits for the device
                taken.append(time.perf_counter() - began)
    return objective.num_parameters, median(times[0][2:]), median(times[1][2:])


def table() -> str:
    """The Markdown table."""
    rows = ["| P | b | one after another, ms | stacked, ms | gain |", "|---" * 5 + "|"]
    for width, batch_size in CELLS:
        parameters, sequential, stacked = seconds_per_product(width, batch_size)
        gain = sequential / stacked
        rows.append(f"| {parameters:,} | {batch_size} | {1e3 * sequential:.1f} | {1e3 * stacked:.1f} | {gain:.1f} x |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
