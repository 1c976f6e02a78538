"""Trainings with habits that measuring could disturb, each from its seeds: what they leave behind must not change."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.habits.data import HABITS_OF_DATA
from tests.habits.modules import HABITS_OF_MODULES
from tests.runs import cells, fit, seeded, state_of

CASES = [*HABITS_OF_MODULES, *HABITS_OF_DATA]


def run(case: Any, root: Path, *callbacks: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Fits a case from its seeds; the Trainer, and what is left behind."""
    seeded()
    module, data, defaults = case()
    others = defaults.pop("callbacks", [])
    trainer = fit(root, module, data, *others, *callbacks, **{**defaults, **options})
    return trainer, {**state_of(trainer), "data": traces(data)}


@cache
def unwatched(case: Any) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What a case leaves behind without us, and the cells of its log: one run for all that compare with it."""
    with tempfile.TemporaryDirectory() as folder:
        _, state = run(case, Path(folder))
        return state, cells(Path(folder))


def traces(data: Any) -> list[Any]:
    """What data sets, samplers and datamodules keep to themselves."""
    found = []
    for each in (data, *(getattr(data, name, None) for name in ("dataset", "sampler", "batch_sampler"))):
        held = dict(getattr(each, "__dict__", {}))
        generator = held.get("generator")
        if isinstance(generator, torch.Generator):
            found.append(generator.get_state())
        elif generator is not None:
            found.append(generator.bit_generator.state)
        found += [held.get(name) for name in ("fetched", "epochs", "seen")]
    return found
