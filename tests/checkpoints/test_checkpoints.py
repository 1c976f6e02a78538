"""Checkpoints that older versions have made: a run goes on from them as it would have gone on under the old version."""

import json
from pathlib import Path

import pytest

from tests.checkpoints.make import HERE, LAST, NAME, run

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


def test_a_run_goes_on_from_an_old_checkpoint(tmp_path: Path) -> None:
    expected = json.loads((HERE / f"{NAME}.json").read_text())
    actual = run(tmp_path, LAST, ckpt_path=str(HERE / f"{NAME}.ckpt"))
    assert [len(history) for history in actual] == [len(history) for history in expected]
    for history, was in zip(actual, expected, strict=True):
        for entry, old in zip(history, was, strict=True):
            assert entry == pytest.approx(old, rel=1e-4, abs=1e-6)
