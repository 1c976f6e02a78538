"""The phenomenon that the package is for, on scikit-learn's digits: progressive sharpening up to the edge."""

import re
from pathlib import Path

import pytest

from benchmarks import edge_on_digits
from lightning_eoss.display import tags

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.md"))


def committed(batch_size: int, learning_rate: float) -> list[float]:
    """The row of seed 0 in the newest committed table."""
    row = re.search(rf"^\| {batch_size} \| {learning_rate} \| 0 \|(.*)\|$", RESULTS[-1].read_text(), flags=re.MULTILINE)
    assert row is not None
    return [float(cell) for cell in row[1].split("|")]


@pytest.mark.slow
def test_small_batches_settle_with_the_directional_sharpness_at_the_threshold():
    """b = 16, lr = 1: directional at 1, MiniBS between 1 and 2, FullBS below it (last-third means)."""
    found = edge_on_digits.settled(16, 1.0, 6000)
    assert [found[tag] for tag in edge_on_digits.RATIOS] == pytest.approx(committed(16, 1.0), abs=0.1)
    assert 0.85 <= found[tags.EDGE_RATIO_DIRECTIONAL] <= 1.15
    assert 1 < found[tags.EDGE_RATIO] < 2
    assert found[tags.EDGE_RATIO_FULL_BS] < found[tags.EDGE_RATIO]


@pytest.mark.slow
def test_full_batches_settle_with_everything_at_the_threshold():
    """b = N, lr = 1: gradient descent, where all three are at 1."""
    found = edge_on_digits.settled(1024, 1.0, 3600)
    assert [found[tag] for tag in edge_on_digits.RATIOS] == pytest.approx(committed(1024, 1.0), abs=0.05)
    assert all(0.9 <= ratio <= 1.15 for ratio in found.values())
