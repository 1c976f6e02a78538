"""A model measured as it is, without a Trainer."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import DatasetSource
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, curvature_of
from lightning_eoss.curvature.memory import memory_budget
from lightning_eoss.curvature.objective import BatchCache, Objective
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.isolation.isolate import isolated


@contextmanager
def standalone(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataset: Any,
    plan: Plan,
    *,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    operator: Kind = "hessian",
    outputs_fn: OutputsFn | None = None,
) -> Iterator[Solver]:
    """What measurements of a model as it is are made with, in the memory that there is; no trace is left on it."""
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
    checks.batch_size_of_data(plan.batch_size, len(dataset))
    device = next((each.device for each in model.parameters()), torch.device("cpu"))

    def transfer(batch: Any) -> Any:
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

    source = DatasetSource(dataset, collate_fn, transfer)
    with isolated(model, [dataset, collate_fn, loss_fn]) as isolation:
        cache = BatchCache(memory_budget(device))
        objective = Objective(model, lambda batch: loss_fn(model, batch), source, isolation, cache)
        findings = preflight(objective, plan.batch_size, seed=plan.seed)
        for warning in findings.warnings:
            warnings.warn(warning, stacklevel=4)  # where the caller's caller is: contextlib stands between
        curvature = curvature_of(operator, outputs_fn, objective, plan.batch_size)
        yield Solver(objective, replace(plan, memory_bytes=cache.limit), findings, curvature=curvature)
