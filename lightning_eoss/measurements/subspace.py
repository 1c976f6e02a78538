"""The outliers of the full batch, and what small groups of samples do to them: what predictions are made of."""

from itertools import islice

import torch
from torch import Tensor

from lightning_eoss.curvature.batches import disjoint_batches
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import Solver
from lightning_eoss.linalg.density import spectral_density
from lightning_eoss.linalg.lanczos import Matvec
from lightning_eoss.theory.outlier_subspace import OutlierSubspace

TAIL_STEPS = 4  # products with the full batch that tell where in the spectrum the leakage goes


def outlier_subspace(
    solver: Solver,
    full: Matvec,
    values: Tensor,
    vectors: Tensor,
    *,
    group_size: int = 1,
    num_groups: int | None = None,
) -> OutlierSubspace:
    r"""Compresses the operators of disjoint groups of samples to the span of the full batch's top eigenvectors V.

    Keeps :math:`V^\top H_j V` of each group j, its leakage :math:`C_j^\top C_j` with
    :math:`C_j = (1 - V V^\top)(H_j - \bar H) V`, and the curvature of H_j along a random vector of the span of C_j.

    Cost: k + 1 products with each group (k + 1 passes over the data if they are all of it), and `TAIL_STEPS` passes
    with the full batch. Memory: k + 6 vectors for each group at work.
    """
    source, k = solver.objective.source, len(vectors)
    count = source.num_samples // group_size
    count = count if num_groups is None else min(num_groups, count)
    groups = disjoint_batches(source, group_size, seed=solver.seed(Use.SUBSPACE))
    fit = int(solver.plan.memory_bytes / ((k + 6) * solver.vector_bytes))
    at_once = max(1, min(solver.rows_at_once, fit))
    kept: list[tuple[Tensor, ...]] = []  # compressions, leakages, quotients of some groups
    total, signed = torch.zeros_like(vectors), torch.zeros_like(vectors[0])
    for first in range(0, count, at_once):
        rows = min(at_once, count - first)
        operator = solver.operator(list(islice(groups, rows)))
        images = torch.stack([operator.matvec(vector.expand(rows, -1)) for vector in vectors], dim=1)
        inside = images @ vectors.T
        outside = images - inside @ vectors  # (rows, k, P)
        total += outside.sum(0)
        # A sum with random signs stands for all its terms: its expected square has no cross terms, at no product.
        signs = torch.randint(0, 2, (rows, k), generator=solver.generator).to(outside) * 2 - 1
        leak = torch.einsum("nk,nkp->np", signs, outside)
        signed += leak.sum(0)
        size = torch.linalg.vecdot(leak, leak)
        quotients = torch.linalg.vecdot(leak, operator.matvec(leak)) / torch.where(size > 0, size, 1.0)
        kept.append(((inside + inside.mT) / 2, outside @ outside.mT, quotients))
    compressions, leakages, quotients = (torch.cat(each).cpu().double() for each in zip(*kept, strict=True))
    nodes, weights = _tail(full, signed, vectors)
    mean = (total / count).cpu().double()
    return OutlierSubspace(
        eigenvalues=values.cpu().double().numpy(),
        compressions=compressions.numpy(),
        leakages=(leakages - mean @ mean.T).numpy(),
        quotients=quotients.numpy(),
        tail_nodes=nodes.numpy(),
        tail_weights=weights.numpy(),
        group_size=group_size,
        dataset_size=source.num_samples,
    )


def beyond(vectors: Tensor, some: Tensor) -> Tensor:
    """(B, P) what some vectors hold outside the span of (k, P) orthonormal ones."""
    return some - (some @ vectors.T) @ vectors


def _tail(full: Matvec, leak: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the spectrum outside the outliers the leakage lies, as quadrature nodes and weights."""
    norm = torch.linalg.vector_norm(leak)
    if not float(norm) > 0:
        return torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    steps = min(TAIL_STEPS, len(leak))
    density = spectral_density(lambda some: beyond(vectors, full(some)), (leak / norm)[None], steps=steps)
    return density.nodes[0], density.weights[0]
