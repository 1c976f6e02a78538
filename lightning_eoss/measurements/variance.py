r"""How much the Hessian varies from sample to sample: the corrected Algorithm 1 of Granziol et al.

Printed, it lacks a division by N, subtracts (v'Hv)^2 in place of |Hv|^2, and so returns a second moment: it is not zero
where all samples have the same Hessian. Its result, put right, is P sigma^2 already.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from lightning_eoss.curvature.batches import Batch, disjoint_batches
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import Solver
from lightning_eoss.theory.statistics import Estimate, mean_estimate, moments


def hessian_variance(
    solver: Solver,
    *,
    batch_size: int = 1,
    num_batches: int = 16,
    num_probes: int = 10,
    direction: Tensor | None = None,
) -> Estimate:
    r"""Estimates the variance of the per-sample Hessian, P sigma^2, from products with batches of any size.

    .. math:: P \sigma^2 = \frac{1}{P} \frac{1}{N-1} \sum_i \lVert H_i - H \rVert_F^2
        = \mathbb{E}_v\, V(v), \qquad V(v) = \frac{1}{N-1} \sum_i \lVert (H_i - H) v \rVert^2, \quad |v| = 1

    For each probe v, uniform on the sphere, fresh batches that share no sample are drawn, and V(v) is B times their
    products' sample variance: they vary more than independent ones, because they avoid each other. Probes with their
    batches are independent replicates, so Student's interval covers both kinds of luck. Unbiased; defined for losses
    that are means over samples. With ``num_batches * batch_size == N`` V(v) of each probe is exact.

    A unit `direction` in place of the random probes gives the *directional variance*, the part of V(v) orthogonal to v.

    Source: Granziol, Zohren and Roberts, Algorithm 1, corrected.
    """
    source = solver.objective.source
    if num_batches < 2 or num_batches * batch_size > source.num_samples:
        raise ValueError(
            f"num_batches={num_batches} of batch_size={batch_size} is not a sample with a variance from "
            f"{source.num_samples} samples: draw at least two batches, and disjoint ones from no more than there are."
        )
    variances = []
    for number in range(num_probes):
        probe = solver.random_starts(1)[0] if direction is None else direction
        drawn = disjoint_batches(source, batch_size, seed=solver.seed(Use.HESSIAN_VARIANCE, number))
        variances.append(batch_size * sample_variance(solver, list(islice(drawn, num_batches)), probe, direction))
    return mean_estimate(moments(torch.stack(variances)))


def sample_variance(solver: Solver, batches: Sequence[Batch], probe: Tensor, direction: Tensor | None) -> Tensor:
    """1 / (K - 1) sum |H_B v - mean|^2, summed up around a first guess of the mean so that nothing cancels."""
    count, shift = len(batches), torch.zeros_like(probe)
    total, squares = torch.zeros_like(probe), probe.new_zeros((), dtype=torch.float64)
    for first in range(0, count, solver.rows_at_once):
        chunk = batches[first : first + solver.rows_at_once]
        images = solver.operator(chunk).matvec(probe.expand(len(chunk), -1))
        if direction is not None:
            images = images - (images @ direction)[:, None] * direction
        if first == 0:
            shift = images.mean(0)
        images = images - shift
        total += images.sum(0)
        squares += images.double().square().sum()
    return ((squares - total.double().square().sum() / count) / (count - 1)).cpu()
