"""Makes the long tables again: `make reproduce` writes them, dated, to `benchmarks/results`."""

import os
import platform
from datetime import date
from pathlib import Path

import lightning
import torch

from benchmarks import edge_on_digits, optimizers, random_matrix, solver, stacking

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs every benchmark and writes one file."""
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    text = f"""# Reproduced on {date.today()}

{os.cpu_count()} CPU cores, {versions}. `make reproduce`

## Digits: where the sharpness settles (means over the last third, in units of 2/lr)

{edge_on_digits.table()}

## Optimizers: edge ratios along training, MiniBS / FullBS / directional

{optimizers.table()}

## Momentum .9: means over the last third

{optimizers.momentum_table()}

## Solver: what a warm start costs and misses

{solver.table()}

## Predictions: MiniBS measured, and the relative error of each model (? where it is not to be trusted, as it says)

{random_matrix.table()}

## Stacking: a product with ten mini-batches

{stacking.table()}
"""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
