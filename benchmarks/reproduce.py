"""Makes the long tables again: `make reproduce` writes them, all and dated, to `benchmarks/results`."""

import os
import platform
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import lightning
import torch

from benchmarks import controller, edge_on_digits, optimizers, random_matrix, solver, stacking

RESULTS = Path(__file__).parent / "results"

#: All that is written, in its order: headings, and what makes the tables.
SECTIONS: dict[str, Callable[[], str]] = {
    "Digits: where the sharpness settles (means over the last third, in units of 2/lr)": edge_on_digits.table,
    "Optimizers: edge ratios along training, MiniBS / FullBS / directional": optimizers.table,
    "Momentum .9: means over the last third": optimizers.momentum_table,
    "Controller: training loss after two epochs, alone and under target_edge_ratio=0.5 (b = 16)": controller.table,
    "Solver: what a warm start costs and misses": solver.table,
    "Predictions: MiniBS measured, and the relative error of each model "
    "(? where it is not to be trusted, as it says)": random_matrix.table,
    "Stacking: a product with ten mini-batches": stacking.table,
}


def report(sections: Mapping[str, Callable[[], str]] = SECTIONS) -> str:
    """The whole file: what it was made with, and every section."""
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    parts = [f"# Reproduced on {date.today()}", f"{os.cpu_count()} CPU cores, {versions}. `make reproduce`"]
    for heading, table in sections.items():
        parts += [f"## {heading}", table()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Runs every benchmark and writes one file."""
    text = report()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
