"""The base of all monitors: the one that CONTRIBUTING shows is built here as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_eoss.training.monitor import Monitor, Publisher
from tests.runs import Regressor, assert_same, fit, loader, points, samples, seeded, state_of

ROOT = Path(__file__).parents[2]


def shown_in_contributing() -> tuple[Any, str]:
    """The monitor, and its source."""
    _, section = (ROOT / "CONTRIBUTING.md").read_text().split("## To add a monitor")
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {"__name__": "somewhere_else"}
    exec(source, names)
    return names["FullLossMonitor"], source[source.index("class ") :]


def test_a_new_monitor_takes_thirty_lines(tmp_path: Path) -> None:
    monitor, source = shown_in_contributing()
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    seeded()
    module = Regressor()
    expected = float(module.loss(samples().tensors).detach())
    watching = monitor(every_n_train_steps=3)
    fit(tmp_path, module, loader(), watching)
    shown = points(tmp_path)["full_batch/loss"]
    assert sorted(shown) == [0, 3, 6, 9]
    assert shown[0] == pytest.approx(expected, rel=1e-6)
    assert watching.latest == watching.history[-1]["full_batch/loss"] == shown[9]


def test_a_new_monitor_changes_nothing(tmp_path: Path) -> None:
    states = []
    for name, callbacks in (("without", []), ("with", [shown_in_contributing()[0](every_n_train_steps=2)])):
        seeded()
        trainer = fit(tmp_path / name, Regressor(), loader(shuffle=True), *callbacks)
        states.append(state_of(trainer))

    assert_same(states[1], states[0])


def test_a_new_monitor_keeps_to_a_share_of_the_time(tmp_path: Path) -> None:
    monitor, _ = shown_in_contributing()
    seeded()
    watching = monitor()
    fit(tmp_path, Regressor(), loader(), watching)
    assert watching.overhead == 0.05 and watching.agenda.ledgers["loss"].count == len(watching.history) >= 1


def test_a_callback_that_is_drawn_nowhere_is_no_class() -> None:
    with pytest.raises(TypeError, match=r"Forgetful has no dashboard_categories, so nobody would see"):
        type("Forgetful", (Publisher,), {"__module__": "somewhere_else"})
    with pytest.raises(TypeError, match="Forgetful has no dashboard_categories"):
        type("Forgetful", (Monitor,), {"__module__": "somewhere_else"})


def test_a_monitor_without_its_three_methods_says_so(tmp_path: Path) -> None:
    half = type("Half", (Monitor,), {"__module__": "somewhere_else", "dashboard_categories": frozenset()})
    with pytest.raises(NotImplementedError, match=r"foresee"):
        fit(tmp_path, Regressor(), loader(), half("nothing", every_n_train_steps=1))
    assert torch.is_grad_enabled()
