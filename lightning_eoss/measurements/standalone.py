"""A model measured as it is, without a Trainer."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import DatasetSource
from lightning_eoss.curvature.memory import memory_budget
from lightning_eoss.curvature.objective import BatchCache, Objective
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.isolation.isolate import isolated


@contextmanager
def standalone(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    *,
    batch_size: int,
    seed: int = 0,
) -> Iterator[tuple[Objective, Findings]]:
    """The objective of a model as it is, without a Trainer; no trace is left on it.

    Args:
        model: The module.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        dataset: A map-style data set or a sequence of samples.
        collate_fn: As a DataLoader's.
        batch_size: Samples that trial evaluations are made with, at most.
        seed: Of the trial.

    Yields:
        The objective, and what `preflight` found about it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If nothing can be measured.
    """
    if not isinstance(model, nn.Module) or not callable(loss_fn):
        raise TypeError(
            f"model must be a module and loss_fn a function, got a {type(model).__name__} as model and a "
            f"{type(loss_fn).__name__} as loss_fn: loss_fn is called as loss_fn(model, batch)."
        )
    checks.loss_function(loss_fn)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"dataset={dataset!r} has no samples to index: pass a map-style data set or a sequence of samples, for a "
            "DataLoader its .dataset, with collate_fn=loader.collate_fn."
        )
    checks.batch_size_of_data(batch_size, len(dataset))
    device = next(model.parameters()).device if any(True for _ in model.parameters()) else torch.device("cpu")

    def transfer(batch: Any) -> Any:
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

    source = DatasetSource(dataset, collate_fn, transfer)
    with isolated(model, [dataset, collate_fn, loss_fn]) as isolation:
        cache = BatchCache(memory_budget(device))
        objective = Objective(model, lambda batch: loss_fn(model, batch), source, isolation, cache)
        findings = preflight(objective, batch_size, seed=seed)
        for warning in findings.warnings:
            warnings.warn(warning, stacklevel=4)  # where the caller's caller is: contextlib stands between
        yield objective, findings
