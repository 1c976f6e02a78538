"""What a loss allows, found out once before the first measurement, on a few samples.

Whether a batch may be split (and the control variate used), whether torch differentiates the network twice and does it correctly, whether
batches can be stacked, and what memory and time one product takes. Some layers are silently wrong under double differentiation, so
symmetry and one finite difference are checked rather than believed.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_eoss.curvature.objective import Batch, BatchListSource, Objective, Part, num_bytes, random_batches
from lightning_eoss.curvature.operators import (
    Sequential,
    agrees_when_stacked,
    difference_product,
    gradient_graph,
    hessian_product,
    krylov_dtype,
)

Reduction = Literal["mean", "sum", "other"]


def reduction(objective: Objective, *, seed: int = 0) -> Reduction:
    """How the loss of a batch is made of its samples' losses, found by evaluating two batches of unequal size and their union.

    Everything that couples samples or draws random numbers by position (BatchNorm in train mode, class weights, masks, contrastive losses,
    dropout, random crops) shows as `"other"`: there, a batch must not be split, and means over batches are not the full batch's.

    Cost: three gradients of up to five samples.

    Args:
        objective: The loss and its source.
        seed: Seed of the samples.

    Returns:
        `"mean"` where loss(A + B) = (a loss(A) + b loss(B)) / (a + b) for values and gradients, `"sum"` where it is
        loss(A) + loss(B), else `"other"`.
    """
    small, large = 2, 3
    if isinstance(objective.source, BatchListSource) or objective.source.num_samples < small + large:
        return "other"
    (whole,) = next(random_batches(objective.source, small + large, seed=seed))
    first = replace(whole, size=small, indices=whole.indices[:small])
    second = replace(whole, size=large, indices=whole.indices[small:])
    try:
        both, one, two = (_value_and_gradient(objective, part) for part in (whole, first, second))
    except (RuntimeError, ValueError):
        return "other"  # a model that refuses odd batch sizes; a real defect will raise again in the measurement
    tolerance = 100 * math.sqrt(torch.finfo(both.dtype).eps) if both.dtype == torch.float64 else 1e-3

    def agrees(combined: Tensor) -> bool:
        return bool((both - combined).norm() <= tolerance * both.norm())

    if agrees((small * one + large * two) / (small + large)):
        return "mean"
    return "sum" if agrees(one + two) else "other"


def _value_and_gradient(objective: Objective, part: Part) -> Tensor:
    """Loss and gradient as one vector, each scaled by its own norm's share so that both count."""
    loss = objective.evaluate(part)
    gradients = torch.autograd.grad(loss, objective.parameters, allow_unused=True)
    return torch.cat([loss.detach().reshape(1), *(each.detach().reshape(-1) for each in gradients if each is not None)])


@dataclass(frozen=True)
class Findings:
    """What `preflight` found."""

    reduction: Reduction  # how the loss is made of its samples' losses
    differences: bool  # products by finite differences of gradients
    stacked: bool  # batches can be stacked
    graph_bytes: float  # memory of the retained gradient graph of one sample
    seconds: float  # of one product of one batch, its graph not counted
    warnings: tuple[str, ...]  # what a user must know


def preflight(objective: Objective, batch_size: int, *, parts: int = 1, seed: int = 0) -> Findings:
    """Tries the loss on a few samples before anything is measured.

    Cost: some ten gradients and five products of one batch of at most 32 samples (of `batch_size` where the loss is no sample mean).

    Args:
        objective: The loss and its source.
        batch_size: Samples of one loader batch.
        parts: Loader batches of one optimizer step.
        seed: Seed of the samples that are tried.

    Returns:
        The findings.

    Raises:
        ValueError: If the loss is no scalar, or if evaluating it changes the parameters.
    """
    versions = [parameter._version for parameter in objective.parameters]
    originals = [parameter.detach().clone() for parameter in objective.parameters]
    kind = reduction(objective, seed=seed)
    size = min(batch_size, 32) if kind == "mean" else batch_size
    (part,) = next(random_batches(objective.source, size, seed=seed))
    graph = gradient_graph(objective, part)
    if [parameter._version for parameter in objective.parameters] != versions:
        for parameter, original in zip(objective.parameters, originals, strict=True):
            parameter.data.copy_(original)
        raise ValueError(
            "Evaluating the loss changed the parameters in place (an optimizer step or a clamp inside training_step?), so a measurement would change "
            "training. Pass loss_fn=, a function of (module, batch) that returns the loss and changes nothing."
        )
    del originals
    warnings = (
        []
        if kind != "sum"
        else [
            "The loss is a sum over the batch: its sharpness grows with the batch size, and 2/lr compares with the sum that is being stepped."
        ]
    )
    if not bool(torch.isfinite(graph.loss)):
        return Findings(kind, False, False, 0.0, 0.0, (*warnings, "The loss is not finite at the first measurement."))
    complaint = _second_derivative(objective, part)
    differences = complaint is not None and complaint.startswith("Products")
    if complaint:
        warnings.append(complaint)
    started = time.perf_counter()
    Sequential(objective, [(part,)], differences=differences).matvec(graph.gradient[None])
    seconds = (time.perf_counter() - started) * batch_size * parts / size
    stacked = not differences and _worth_stacking(objective) and _stacks(objective, batch_size, parts, seed)
    return Findings(kind, differences, stacked, _graph_bytes(objective, part), seconds, tuple(warnings))


def _stacks(objective: Objective, batch_size: int, parts: int, seed: int) -> bool:
    """Whether two batches can be stacked."""
    batches = random_batches(objective.source, min(batch_size, 32), parts=parts, seed=seed)
    return agrees_when_stacked(objective, [next(batches), next(batches)])


def _worth_stacking(objective: Objective) -> bool:
    """Stacking saves launches, not arithmetic: on the CPU it pays for small networks only (`benchmarks/stacking.py`)."""
    return objective.parameters[0].device.type != "cpu" or objective.num_parameters < 2**17


def _second_derivative(objective: Objective, part: Part) -> str | None:
    """What is wrong with the network's second derivative, if anything. Begins with `Products` where differences must replace it."""
    layers = _layers_by_gradient(objective, part)
    graph = gradient_graph(objective, part)
    generator = torch.Generator().manual_seed(part.seed)
    probe = torch.randn(objective.num_parameters, generator=generator).to(graph.gradient)
    direction = graph.gradient if bool(graph.gradient.norm() > 0) else probe
    direction = direction / direction.norm()
    probe = probe / probe.norm()
    fallback = (
        "Products are finite differences of gradients instead: slower, and accurate to a percent or so in float32."
    )
    try:
        along = hessian_product(objective, graph, direction, keep=True)
        across = hessian_product(objective, graph, probe, keep=False)
    except RuntimeError as error:  # NotImplementedError included
        reason = str(error).splitlines()[0]
        culprits = [name for gradient, name in layers.items() if gradient and gradient in _normalised(reason)]
        where = f"{culprits[0]}: " if culprits else ""
        return f"Products by autograd are impossible ({where}{reason}). {fallback}"
    scale = float(along.norm() + across.norm())
    if abs(float(probe @ along - direction @ across)) > 1e-2 * scale / math.sqrt(len(probe)) + 1e-4 * scale:
        return (
            "Products by autograd are not symmetric: some layer's second derivative is silently wrong (once_differentiable functions and "
            f"weight_norm are known cases). {fallback}"
        )
    difference = difference_product(objective, part, direction)
    if float((along - difference).norm()) > 0.1 * scale:
        return (
            f"The Hessian by autograd and a finite difference of gradients differ by {float((along - difference).norm()) / scale:.0%} of their size. "
            "Detached targets explain it; else a layer's second derivative is wrong, and so is the sharpness."
        )
    return None


def _layers_by_gradient(objective: Objective, part: Part) -> dict[str, str]:
    """Names of the layers by the autograd function that made their output."""
    names: dict[str, str] = {}

    def note(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                names.setdefault(
                    _normalised(output.grad_fn.name().split("Backward")[0]), f"{name} ({type(module).__name__})"
                )

        return module.register_forward_hook(hook)

    handles = [note(name, module) for name, module in objective.module.named_modules() if not any(module.children())]
    try:
        loss = objective.evaluate(part)
    finally:
        for handle in handles:
            handle.remove()
    if loss.grad_fn is not None:
        names.setdefault(_normalised(loss.grad_fn.name().split("Backward")[0]), "the loss")
    return names


def _normalised(name: str) -> str:
    """Names of an operator as autograd spells them in nodes and in messages, made comparable."""
    return name.lower().replace("_", "")


def _graph_bytes(objective: Objective, part: Part) -> float:
    """Memory that the gradient's graph of one sample holds, parameters not counted."""
    known = {parameter.data_ptr() for parameter in objective.parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            storages[tensor.data_ptr()] = num_bytes(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient_graph(objective, part)
    return sum(storages.values()) / part.size
