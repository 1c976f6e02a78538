"""The base of all monitors: the one that CONTRIBUTING shows is built here as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_eoss.callbacks.spectrum import SpectralDensityMonitor
from lightning_eoss.training.monitor import Monitor, Publisher
from lightning_eoss.training.plan import Prospect
from tests.runs import Regressor, assert_same, fit, loader, monitor, points, samples, seeded, state_of

ROOT = Path(__file__).parents[2]


def shown_in_contributing() -> tuple[Any, str]:
    """The monitor, and its source."""
    _, section = (ROOT / "CONTRIBUTING.md").read_text().split("## To add a monitor")
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {"__name__": "somewhere_else"}
    exec(source, names)
    return names["FullLossMonitor"], source[source.index("class ") :]


def test_a_new_monitor_takes_thirty_lines(tmp_path: Path) -> None:
    kind, source = shown_in_contributing()
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    seeded()
    module = Regressor()
    expected = float(module.loss(samples().tensors).detach())
    watching = kind(every_n_train_steps=3)
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
    kind, _ = shown_in_contributing()
    seeded()
    watching = kind()
    fit(tmp_path, Regressor(), loader(), watching)
    assert watching.overhead == 0.05 and watching.agenda.ledgers["loss"].count == len(watching.history) >= 1


def test_a_callback_that_is_drawn_nowhere_is_no_class() -> None:
    with pytest.raises(TypeError, match=r"Forgetful has no dashboard_categories, so nobody would see"):
        type("Forgetful", (Publisher,), {"__module__": "somewhere_else"})
    with pytest.raises(TypeError, match="Forgetful has no dashboard_categories"):
        type("Forgetful", (Monitor,), {"__module__": "somewhere_else"})


def test_categories_are_a_set_and_quantities_have_names() -> None:
    with pytest.raises(TypeError, match="Forgetful has no dashboard_categories"):
        type("Forgetful", (Monitor,), {"__module__": "somewhere_else", "dashboard_categories": "Weights"})
    with pytest.raises(ValueError, match=r"Mistyped has dashboard_categories=\['Wieghts'\], which no chart is in"):
        type("Mistyped", (Monitor,), {"__module__": "somewhere_else", "dashboard_categories": frozenset({"Wieghts"})})
    kind = type("Nothing", (Monitor,), {"__module__": "somewhere_else", "dashboard_categories": frozenset()})
    for quantities in ((), (5,)):
        with pytest.raises(TypeError, match=r"Nothing measures quantities=.* so it would never be time"):
            kind(*quantities, every_n_train_steps=5)


def test_a_monitor_without_its_three_methods_says_so(tmp_path: Path) -> None:
    half = type("Half", (Monitor,), {"__module__": "somewhere_else", "dashboard_categories": frozenset()})
    with pytest.raises(NotImplementedError, match=r"Half.foresee is missing: return a Prospect"):
        fit(tmp_path, Regressor(), loader(), half("nothing", every_n_train_steps=1))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("costs", [{}, {"lost": 1.0}])
def test_costs_of_no_quantity_are_refused(tmp_path: Path, costs: dict[str, float]) -> None:
    kind, _ = shown_in_contributing()
    kind.foresee = lambda self, look: Prospect(look.solver.plan, costs, [])
    with pytest.raises(ValueError, match=r"foresee expects costs of (nothing|lost), and its quantities"):
        fit(tmp_path, Regressor(), loader(), kind(every_n_train_steps=1))


def test_a_monitor_of_two_quantities_says_what_each_has_cost(tmp_path: Path) -> None:
    kind, _ = shown_in_contributing()
    kind.__init__ = lambda self: Monitor.__init__(self, "loss", "more", every_n_train_steps=1)
    with pytest.raises(NotImplementedError, match=r"measures loss, more, and only it can tell .* override charge"):
        fit(tmp_path, Regressor(), loader(), kind())


class Uneven:
    """A batch sampler that makes batches of its own sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(4)), list(range(4, 12)), list(range(12, 24))])

    def __len__(self) -> int:
        return 3


def test_a_spectrum_has_a_batch_of_the_size_asked_for_whatever_the_sampler(tmp_path: Path) -> None:
    watch = SpectralDensityMonitor(every_n_train_steps=2, steps=5, batch_size=5)
    fit(tmp_path, Regressor(), DataLoader(samples(), batch_sampler=Uneven()), watch)
    assert [entry["step"] for entry in watch.history] == [0, 2, 4] and watch.latest.batch_size == 5


def test_a_spectrum_of_ready_batches_has_no_other_batch_size(tmp_path: Path) -> None:
    watch = SpectralDensityMonitor(every_n_train_steps=2, batch_size=5, dataloader=list(loader()))
    with pytest.raises(ValueError, match=r"batch_size=5 cannot be made of the ready batches of dataloader="):
        fit(tmp_path, Regressor(), loader(), watch)


@pytest.mark.filterwarnings("ignore:SharpnessMonitor:UserWarning")
def test_cautions_come_even_where_the_first_loss_is_not_finite(tmp_path: Path) -> None:
    module = Regressor()
    with torch.no_grad():
        module.net[0].weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="gradient_clip_val=0.5 shortens steps"):
        fit(tmp_path, module, loader(), monitor(), gradient_clip_val=0.5, max_epochs=1)


def test_what_is_due_is_decided_when_all_of_a_step_is_known(tmp_path: Path) -> None:
    """Under a share of the time each loader batch makes more of it due."""
    asked = []

    class Asking(SpectralDensityMonitor):
        def _due_now(self, trainer: Any, begun: float = 0.0) -> frozenset[str]:
            asked.append(trainer.fit_loop.epoch_loop.batch_idx)
            return super()._due_now(trainer, begun)

    fit(tmp_path, Regressor(), loader(), Asking(steps=5), accumulate_grad_batches=3, max_epochs=1)
    assert {index % 3 for index in asked} == {2}
