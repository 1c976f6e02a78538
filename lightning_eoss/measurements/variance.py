r"""How much the Hessian varies from sample to sample: the corrected Algorithm 1 of Granziol et al.

Printed, it lacks a division by N, subtracts (v'Hv)^2 in place of |Hv|^2, and so returns a second moment: it is not zero
where all samples have the same Hessian. Its result, put right, is P sigma^2 already.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from lightning_eoss.curvature.batches import Batch, disjoint_batches, random_batches
from lightning_eoss.curvature.seeds import derived_seed
from lightning_eoss.curvature.solver import Solver
from lightning_eoss.theory.statistics import Estimate, mean_estimate, moments

Sampling = Literal["disjoint", "independent"]


def hessian_variance(
    solver: Solver,
    *,
    batch_size: int = 1,
    num_batches: int = 16,
    num_probes: int = 10,
    sampling: Sampling = "disjoint",
    direction: Tensor | None = None,
    stream: int = 0,
) -> Estimate:
    r"""Estimates the variance of the per-sample Hessian, P sigma^2, from products with batches of any size.

    .. math:: P \sigma^2 = \frac{1}{P} \frac{1}{N-1} \sum_i \lVert H_i - H \rVert_F^2
        = \mathbb{E}_v\, V(v), \qquad V(v) = \frac{1}{N-1} \sum_i \lVert (H_i - H) v \rVert^2, \quad |v| = 1

    For each probe v, uniform on the sphere, fresh batches are drawn, and V(v) is their products' sample variance times
    a factor that depends on how they were drawn (:func:`sample_hessian_factor`). Probes with their batches are
    independent replicates, so the interval covers both kinds of luck. Unbiased; defined for losses that are means over
    samples.

    Cost: `num_probes` times `num_batches` products with a batch of `batch_size`. The default takes single samples; with
    ``num_batches * batch_size == N`` V(v) of each probe is exact.

    Args:
        solver: Objective and operator (Hessian or Gauss-Newton, in its coordinates).
        batch_size: Samples of a batch.
        num_batches: Batches a probe, two at least.
        num_probes: Probes.
        sampling: ``"disjoint"``: batches of one epoch; ``"independent"``: each drawn from all samples.
        direction: (P,) unit vector in place of the random probes. Then the result is the *directional variance*
            :math:`\sum_{k \ge 2} c_k^2`, the part of V(v) orthogonal to v.
        stream: Number of this measurement; with the plan's seed it fixes all random numbers.

    Returns:
        P sigma^2 in squared units of the eigenvalues, with Student's interval over the probes.

    Raises:
        ValueError: If fewer than two batches can be drawn.

    Source: Granziol, Zohren and Roberts, Algorithm 1, corrected.
    """
    source = solver.objective.source
    if num_batches < 2 or (sampling == "disjoint" and num_batches * batch_size > source.num_samples):
        raise ValueError(
            f"num_batches={num_batches} of batch_size={batch_size} is not a sample with a variance from "
            f"{source.num_samples} samples: draw at least two batches, and disjoint ones from no more than there are."
        )
    factor = sample_hessian_factor(batch_size, source.num_samples, sampling)
    variances = []
    for number in range(num_probes):
        probe = solver.random_starts(1)[0] if direction is None else direction
        batches = _batches(solver, batch_size, sampling, derived_seed(solver.plan.seed, 6, stream, number))
        variances.append(factor * _sample_variance(solver, list(islice(batches, num_batches)), probe, direction))
    return mean_estimate(moments(torch.stack(variances)))


def sample_hessian_factor(batch_size: int, dataset_size: int, sampling: Sampling) -> float:
    """What the variance between batches is multiplied by to give that between samples.

    Args:
        batch_size: Samples B of a batch.
        dataset_size: Samples N.
        sampling: How the batches were drawn.

    Returns:
        1 / (1/B - 1/N) for independent batches. Disjoint ones vary more, because they avoid each other: B.

    Example:
        >>> sample_hessian_factor(8, 40, "independent"), sample_hessian_factor(8, 40, "disjoint")
        (10.0, 8.0)
    """
    return float(batch_size) if sampling == "disjoint" else 1 / (1 / batch_size - 1 / dataset_size)


def _batches(solver: Solver, batch_size: int, sampling: Sampling, seed: int) -> Iterator[Batch]:
    """Batches drawn as asked."""
    draw = disjoint_batches if sampling == "disjoint" else random_batches
    return draw(solver.objective.source, batch_size, seed=seed)


def _sample_variance(solver: Solver, batches: Sequence[Batch], probe: Tensor, direction: Tensor | None) -> Tensor:
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
