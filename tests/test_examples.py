"""Every example runs, shortened, as the script that it is."""

import re

import pytest

from tests.scripts import ROOT, run

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
LOOP = "without_a_trainer"


@pytest.mark.processes
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {LOOP}))
def test_example_runs(name, tmp_path):
    """Runs it in an empty directory; the transformer to where its batches grow, after two epochs of 16 steps."""
    steps, said = {"transformer": ("34", "step 32, the learning rate goes from 0.003 to")}.get(name, ("20", ""))
    assert said in run(EXAMPLES[name], "--max-steps", steps, directory=tmp_path).stderr
    assert any(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.processes
def test_the_loop_prints_its_table(tmp_path):
    """A row with numbers that fit together: the interval holds MiniBS, which lies above FullBS."""
    printed = run(EXAMPLES[LOOP], "--max-steps", "20", directory=tmp_path).stdout
    _, row = printed.splitlines()
    step, loss, full, mini, lower, upper, ratio = map(float, re.findall(r"[\d.]+", row))
    assert step == 0
    assert loss > 0
    assert lower <= mini <= upper
    assert full < mini
    assert 0 < 2 * ratio < upper  # the threshold is 2


@pytest.mark.parametrize("path", EXAMPLES.values(), ids=EXAMPLES)
def test_examples_can_be_copied(path):
    """They are short, and say how they are run."""
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"Run `python examples/{path.name}`" in text.replace("\n", " ")
