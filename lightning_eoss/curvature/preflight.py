"""What a loss allows, found out once before the first measurement, on a few samples.

Whether a batch may be split (and the control variate used), whether torch differentiates the network twice and does it
correctly (`derivatives`), whether batches can be stacked, and what memory and time one product takes.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_eoss.curvature.batches import Part, num_bytes, random_batches
from lightning_eoss.curvature.derivatives import Doubt, doubt, nodes_of
from lightning_eoss.curvature.memory import out_of_memory
from lightning_eoss.curvature.objective import Objective, flattened, real
from lightning_eoss.curvature.operators import Graph, Sequential, agrees_when_stacked, gradient_graph

Reduction = Literal["mean", "sum", "other"]

FEW = 32  # samples that a trial takes
_NOT_FINITE = "The loss is not finite at the first measurement."
_SUM = (
    "The loss is a sum over the batch: its sharpness grows with the batch size, FullBS is that of a sum over as many "
    "samples as a batch has, and 2/lr compares with the sum that is being stepped."
)
_HIDDEN = (
    "torch.autograd.grad does not find the gradient that loss.backward() finds, so the sharpness would be wrong: "
    "activation checkpointing with use_reentrant=True hides parameters from it, as does any function whose own "
    "backward pass calls backward(). Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
)


def reduction(objective: Objective, *, seed: int = 0, most: int = FEW) -> Reduction:
    """How the loss of a batch is made of its samples' losses, found by evaluating two batches and their union.

    Everything that couples samples or draws random numbers by position (BatchNorm in train mode, class weights, masks,
    contrastive losses, dropout, random crops) shows as `"other"`: there, a batch must not be split, and means over
    batches are not the full batch's.

    `"mean"` is where loss(A + B) = (a loss(A) + b loss(B)) / (a + b) for values and gradients, `"sum"` where it is
    loss(A) + loss(B). Cost: three gradients of up to 32 samples.
    """
    num_samples = min(most, objective.source.num_samples)
    if not objective.source.divisible or num_samples < 3:
        return "other"
    (union,) = next(random_batches(objective.source, num_samples, seed=seed))
    cut = num_samples // 3  # unequal halves tell a mean of means from a mean
    halves = (replace(union, size=len(each), indices=each) for each in (union.indices[:cut], union.indices[cut:]))
    try:
        both, one, two = (gradient_graph(objective, part, create_graph=False) for part in (union, *halves))
    except (RuntimeError, ValueError) as error:
        if not out_of_memory(error):
            return "other"  # a model that refuses odd batch sizes; a real defect will raise again in the measurement
        if num_samples < 6:
            raise
        both = None
    if both is None:
        return reduction(objective, seed=seed, most=num_samples // 2)
    tolerance = min(1e-3, 100 * math.sqrt(torch.finfo(both.loss.dtype).eps))

    def combines(of_one: float, of_two: float) -> bool:
        """Whether the union's loss and gradient are this combination of the parts'."""
        triples = ((both.loss, one.loss, two.loss), (both.gradient, one.gradient, two.gradient))
        differences = (total - of_one * first - of_two * second for total, first, second in triples)
        sizes = (max(total.norm(), second.norm()) for total, _, second in triples)
        return all(bool(each.norm() <= tolerance * size) for each, size in zip(differences, sizes, strict=True))

    if combines(cut / num_samples, 1 - cut / num_samples):
        return "mean"
    return "sum" if combines(1.0, 1.0) else "other"


@dataclass(frozen=True)
class Findings:
    """What `preflight` found."""

    reduction: Reduction  # how the loss is made of its samples' losses
    differences: bool  # products by finite differences of gradients
    stacked: bool  # batches can be stacked
    graph_bytes: float  # memory of the retained gradient graph of one sample
    seconds: float  # of one product of one batch, its graph not counted
    warnings: tuple[str, ...]  # what a user must know
    loading: float = 0.0  # seconds to load one sample
    sample_bytes: float = 0.0  # memory of one loaded sample
    detached: bool = False  # the gradient depends on parameters in ways that its graph does not hold

    def after(self, doubt: Doubt) -> "Findings":
        """What is known once there is a doubt."""
        differences = self.differences or doubt.differences
        return replace(self, differences=differences, stacked=self.stacked and not differences, detached=doubt.detached)


def preflight(objective: Objective, batch_size: int, *, parts: int = 1, seed: int = 0) -> Findings:
    """Tries the loss on a few samples before anything is measured.

    Cost: some ten gradients and five products of one batch of at most 32 samples (of `batch_size` where the loss is no
    sample mean).
    """
    kind = reduction(objective, seed=seed)
    size = min(batch_size, FEW) if kind == "mean" else batch_size
    (part,) = next(random_batches(objective.source, size, seed=seed))
    graph = _complete_graph(objective, part)
    if not bool(torch.isfinite(graph.loss)):
        return Findings(kind, False, False, 0.0, 0.0, (_NOT_FINITE,))
    if not graph.depends:
        raise ValueError(
            "The loss does not depend on any parameter with requires_grad=True (torch.no_grad, .detach() or .item() "
            "inside loss_fn?), so its sharpness would be 0 everywhere. Return the loss with its graph."
        )
    found = doubt(objective, part, graph=graph)
    differences = found is not None and found.differences
    warnings = (_SUM,) if kind == "sum" else ()
    stacked = not differences and _stacks(objective, size, parts, seed)
    cache = objective.cache
    return Findings(
        reduction=kind,
        differences=differences,
        stacked=stacked,
        graph_bytes=_graph_bytes(objective, part),
        seconds=float(_seconds(objective, part, graph.gradient, differences) * batch_size * parts / size),
        warnings=(*warnings, found.message) if found else warnings,
        detached=found is not None and found.detached,
        loading=cache.seconds / max(cache.loaded, 1),
        sample_bytes=cache.read / max(cache.loaded, 1),
    )


def _complete_graph(objective: Objective, part: Part) -> Graph:
    """The gradient of one part, once it is known to be the one that `backward` finds."""
    try:
        graph = gradient_graph(objective, part)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(_HIDDEN) from error
    loss = objective.evaluate(part)
    nodes = nodes_of([loss])
    if not any(isinstance(node, BackwardCFunction) for node in nodes):
        return graph  # only functions that are written in Python call `backward` themselves
    leaves = {*objective.module.parameters(), *(node.variable for node in nodes if hasattr(node, "variable"))}
    gradients = [leaf.grad for leaf in leaves]
    hooks = [{} if leaf._post_accumulate_grad_hooks is None else leaf._post_accumulate_grad_hooks for leaf in leaves]
    kept = [dict(each) for each in hooks]
    try:
        for leaf, its_hooks in zip(leaves, hooks, strict=True):
            leaf.grad = None
            its_hooks.clear()  # they may step an optimizer
        loss.backward()
        found = flattened([each.grad for each in objective.parameters], objective.parameters, graph.gradient.dtype)
    finally:
        for leaf, gradient, its_hooks, noted in zip(leaves, gradients, hooks, kept, strict=True):
            leaf.grad = gradient
            its_hooks.update(noted)
    sizes = [real(each).numel() for each in objective.parameters]
    noise = 10 * objective.rounding * float(found.norm())
    pairs = zip(found.split(sizes), graph.gradient.split(sizes), strict=True)
    if any(float((true - seen).norm()) > 0.1 * float(true.norm()) + noise for true, seen in pairs):
        raise ValueError(_HIDDEN)
    return graph


def _seconds(objective: Objective, part: Part, vector: Tensor, differences: bool) -> float:
    """Time of one product, its graph not counted: the least of four, as the first pay for what never comes again."""
    operator = Sequential(objective, [(part,)], differences=differences)
    operator.losses()
    times = []
    for _ in range(4):
        started = time.perf_counter()
        float(operator.matvec(vector[None]).norm())  # the number waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


def _stacks(objective: Objective, batch_size: int, parts: int, seed: int) -> bool:
    """Whether two batches can be stacked, and it pays."""
    # Stacking saves launches, not arithmetic: on the CPU it pays for small networks only (benchmarks/stacking.py).
    pays = objective.parameters[0].device.type != "cpu" or objective.num_parameters < 2**17
    if not pays or objective.source.num_samples < batch_size * parts:
        return False
    batches = random_batches(objective.source, batch_size, parts=parts, seed=seed)
    return agrees_when_stacked(objective, [next(batches), next(batches)])


def _graph_bytes(objective: Objective, part: Part) -> float:
    """Memory that the gradient's graph of one sample holds, parameters not counted."""
    known = {parameter.data_ptr() for parameter in objective.parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and tensor.data_ptr() not in known:  # sparse ones have no pointer
            storages[tensor.data_ptr()] = num_bytes(tensor)
        return tensor.detach()  # an output that its own function holds by a hook is a cycle that no collector sees

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient_graph(objective, part)
    return sum(storages.values()) / part.size
