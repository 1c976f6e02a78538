"""Gradients of single samples, where the loss of a batch is the mean over its samples' losses."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_eoss.curvature.batches import Part, split
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import copies, gradient_graph, rows_of

TOLERANCE = 1e-3  # of their mean against the part's own gradient, in units of their root mean square norm


def sample_gradients(objective: Objective, part: Part, at_once: int) -> Iterator[Tensor]:
    r"""Gradients of the losses of a part's single samples, cut from the loaded part: no sample is loaded twice.

    .. math:: g_i = \nabla \ell_i(\theta), \qquad \frac1b \sum_{i=1}^b g_i = \nabla L_B(\theta)

    All of a block at once through `torch.vmap` where the module allows it, else one after another. Whether what is cut
    has the batch's gradient as its mean is found out by trying: whoever adds them up should ask `is_mean` in the end.

    Cost: what b P numbers take to be written: three gradients of the part for convolutions, up to fifty for wide linear
    layers on a CPU; b gradients where they are taken one after another.
    """
    data, size = objective.load(part), part.size
    if not _is_cuttable(data, size):
        for piece in split((part,), 1):  # no telling where one sample ends
            yield _alone(objective, piece)[None]
        return
    for first in range(0, size, at_once):
        some = _cut(data, first, min(first + at_once, size))
        objective.prepare(part)
        try:
            rows = _together(objective, some)
        except Exception:  # vmap refuses in many ways, from within user code; one by one needs none of it
            pieces = (_cut(data, place, place + 1) for place in range(first, min(first + at_once, size)))
            ready = (replace(part, weight=1.0, size=1, indices=(), data=piece) for piece in pieces)
            rows = torch.stack([_alone(objective, piece) for piece in ready])
        yield rows


def vectorises(objective: Objective, part: Part) -> bool:
    """Whether `vmap` takes the samples of a part all at once; else each costs a gradient of its own."""
    data = objective.load(part)
    if not _is_cuttable(data, part.size):
        return False
    objective.prepare(part)
    try:
        _together(objective, _cut(data, 0, 2))
    except Exception:  # as above
        return False
    return True


def is_mean(mean: Tensor, gradient: Tensor, mean_square: Tensor) -> bool:
    """Whether gradients of samples belong to a batch: never where something is not finite."""
    return bool((mean - gradient).norm() <= TOLERANCE * mean_square.sqrt())


def _together(objective: Objective, data: Any) -> Tensor:
    """(b, P) by `vmap` over the samples, each a batch of one with parameters of its own.

    As `Stacked` does it. `torch.func.grad` would spare the copies of the parameters, and hangs for good where a loss
    writes one of its tensors to another's `.data`, as older code does for a teacher that is a moving average.
    """
    parameters, losses = copies(objective, len(tree_leaves(data)[0]))
    total = losses(parameters, tree_map(lambda leaf: leaf.unsqueeze(1), data)).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return rows_of(gradients, objective.like.dtype)


def _alone(objective: Objective, piece: Part) -> Tensor:
    """(P,) the gradient of one sample."""
    return gradient_graph(objective, piece, create_graph=False).gradient


def _is_cuttable(data: Any, size: int) -> bool:
    """Whether samples lie along the first dimension, as far as can be seen."""
    return all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size for leaf in tree_leaves(data))


def _cut(data: Any, first: int, last: int) -> Any:
    """Some samples of a batch of tensors."""
    return tree_map(lambda leaf: leaf[first:last].clone(), data)
