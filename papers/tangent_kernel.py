"""Jacobians of small batches, and the neural tangent kernel that they make."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_eoss.curvature.batches import Batch
from lightning_eoss.curvature.gauss_newton import OutputsFn, evaluated_outputs, slope_of
from lightning_eoss.curvature.objective import Objective, flattened, real

_ROWS = 64  # of a Jacobian that are computed in one backward pass


def ntk(objective: Objective, batch: Batch, outputs_fn: OutputsFn) -> Tensor:
    r"""The neural tangent kernel over the batch size, :math:`J J^\top / b`, for every pair of m = b d_z outputs.

    Its nonzero eigenvalues are those of :math:`J^\top J / b`. They are G's exactly for half the squared error, summed
    over the outputs and averaged over the samples; :class:`torch.nn.MSELoss` has G = 2 / d_z times this. For cross
    entropy the kernel lacks the softmax's curvature, which is 1/2 at most.

    Cost: about m gradients of the batch (64 rows at a time); holds m x P numbers.

    Source: Andreyev & Beneventano, *Edge of Stochastic Stability*, appendix D.
    """
    rows, _ = jacobian(objective, batch, outputs_fn)
    return rows @ rows.T / sum(part.size for part in batch)


def jacobian(objective: Objective, batch: Batch, outputs_fn: OutputsFn) -> tuple[Tensor, Tensor]:
    """The (m, P) Jacobian of all outputs, and the (m, m) weighted Hessian of the criteria, float64."""
    jacobians, hessians = [], []
    for part in batch:
        network, leaf, loss = evaluated_outputs(outputs_fn, objective, part)
        jacobians.append(_rows(network, objective.parameters))
        hessians.append(part.weight * _rows(slope_of(loss, leaf), [leaf]))
    return torch.cat(jacobians), torch.block_diag(*hessians)


def _rows(values: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """(m, n) Jacobian of m numbers, many rows in one backward pass where all layers allow it."""
    if not values.requires_grad:
        return values.new_zeros(values.numel(), sum(real(each).numel() for each in inputs), dtype=torch.float64)
    basis = torch.eye(values.numel(), dtype=values.dtype, device=values.device).reshape(-1, *values.shape)
    pulled = partial(torch.autograd.grad, values, inputs, retain_graph=True, materialize_grads=True)

    def together(rows: Tensor) -> Tensor:
        pieces = zip(pulled(rows, is_grads_batched=True), inputs, strict=True)
        shaped = [real(piece.expand(len(rows), *each.shape)).reshape(len(rows), -1) for piece, each in pieces]
        return torch.cat(shaped, dim=1).double()

    try:
        return torch.cat([together(rows) for rows in basis.split(_ROWS)])
    except RuntimeError:  # vmap refuses GroupNorm and sparse gradients, among others
        return torch.stack([flattened(pulled(row), inputs, torch.float64) for row in basis])
