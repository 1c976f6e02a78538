"""The phenomenon that the package is for, on scikit-learn's digits: progressive sharpening up to the edge."""

import importlib.util
from pathlib import Path

import pytest

from lightning_eoss.display import dashboard as tags

_SPEC = importlib.util.spec_from_file_location(
    "edge_on_digits", Path(__file__).parents[1] / "benchmarks" / "edge_on_digits.py"
)
edge_on_digits = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(edge_on_digits)


@pytest.mark.slow
def test_small_batches_settle_with_the_directional_sharpness_at_the_threshold():
    """b = 16, lr = 1: directional at 1, MiniBS between 1 and 2, FullBS below it (last-third means)."""
    found = edge_on_digits.settled(16, 1.0, 6000)
    print(found)
    assert 0.85 <= found[tags.EDGE_RATIO_DIRECTIONAL] <= 1.15
    assert 1 < found[tags.EDGE_RATIO] < 2
    assert found[tags.EDGE_RATIO_FULL_BS] < found[tags.EDGE_RATIO]


@pytest.mark.slow
def test_full_batches_settle_with_everything_at_the_threshold():
    """b = N, lr = 1: gradient descent, where all three are at 1."""
    found = edge_on_digits.settled(1024, 1.0, 3600)
    print(found)
    assert all(0.9 <= ratio <= 1.15 for ratio in found.values())
