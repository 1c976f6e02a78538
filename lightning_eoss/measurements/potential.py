"""The random potential: how much the loss differs at a distance from the present weights, in random directions."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, full_batch
from lightning_eoss.curvature.objective import unflattened
from lightning_eoss.curvature.operators import Sequential, movable
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.measurements.standalone import standalone
from lightning_eoss.theory.random_matrix import gap_exponent
from lightning_eoss.theory.statistics import UNKNOWN, Estimate, mean_estimate, moments

_BEYOND = 2.0  # factor to the Taylor line from which on a difference is not its


@dataclass(frozen=True, eq=False)
class RandomPotential:
    """Loss differences against distance, at one point of training. All in units of the loss."""

    distances: tuple[float, ...]  # z, increasing
    rms: tuple[Estimate, ...]  # root mean square of L(w + z v) - L(w), for each distance
    std: tuple[Estimate, ...]  # standard deviation of the same
    differences: Tensor = field(repr=False)  # (distances, directions) themselves, float64
    loss: float  # L(w)
    taylor_slope: float  # |g| / sqrt(P): what RMS / z and std / z are for small z whatever the potential
    rms_exponent: Estimate  # of z, beyond Taylor's range; NaN for fewer than three distances there
    std_exponent: Estimate  # the same of the standard deviation
    num_parameters: int  # P
    num_samples: int  # of the full batch

    def beyond_taylor(self, values: Sequence[Estimate]) -> int:
        """The first distance from which on the RMS or the standard deviation leaves Taylor's line by a factor of two.

        Args:
            values: `rms` or `std`.

        Returns:
            Its place in `distances`, or their number where there is none.
        """
        lines = [self.taylor_slope * distance for distance in self.distances]
        for place, (value, line) in enumerate(zip(values, lines, strict=True)):
            if not line / _BEYOND <= value.mean <= line * _BEYOND:
                return place
        return len(lines)


def measure_random_potential(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataset: Any,
    *,
    batch_size: int | None = None,
    distances: Sequence[float],
    num_directions: int = 100,
    full_batch_samples: int | None = 8192,
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
) -> RandomPotential:
    r"""Measures how the loss differs at distances from the present weights, along random directions on the sphere.

    .. math:: \mathrm{RMS}(z) = \sqrt{E_v (L(w + z v) - L(w))^2} \approx z \frac{|g|}{\sqrt P} \text{ for small } z

    A random walk gets :math:`(\log t)^{2 / \alpha}` far where this grows like :math:`z^{\alpha / 2}`. Print calls the
    RMS a standard deviation. They differ by the mean, which grows like :math:`z^2 \mathrm{tr} H / 2P`, so both are
    given. For small z any smooth loss is linear, which says nothing about a potential: `taylor_slope` is that line, and
    exponents are fitted (in logarithms, with Student's interval from the scatter about the line) only beyond it.

    Cost: `num_directions` forward passes over the data for each distance. Each distance has directions of its own, so
    its intervals (Student's, of the squares) are independent of the others'.

    Args:
        model: The module, in the mode (train or eval) in which its loss is meant.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        dataset: A map-style data set or a sequence of samples.
        batch_size: Samples of the chunks in which the data are evaluated; None: at most 1,024.
        distances: Distances z from the present weights, increasing.
        num_directions: Random directions for each distance.
        full_batch_samples: The loss is that of a fixed random subset of this size; None: of all samples.
        seed: Fixes all random numbers.
        collate_fn: As a DataLoader's.

    Returns:
        The potential.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        The loss w of one parameter: the only directions are up and down.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> found = measure_random_potential(
        ...     model, lambda model, batch: model(batch).mean(), [torch.ones(1)], distances=[0.5, 2]
        ... )
        >>> [round(each.mean, 4) for each in found.rms], round(found.taylor_slope, 4)
        ([0.5, 2.0], 1.0)

    Source: Hoffer, Hubara and Soudry, appendix B, equation (1) and Figure 1.
    """
    checks.arguments(seed=seed, full_batch_samples=full_batch_samples)
    checks.whole("num_directions", num_directions, 2, "has no scatter and no interval: take 2 at least, or 100.")
    for distance in distances:
        checks.number("distances", distance)
    z = tuple(float(distance) for distance in distances)
    if not z or not all(0 < low < high for low, high in zip((1e-300, *z), (*z, math.inf), strict=True)):
        raise ValueError(f"distances={distances!r} must be positive, finite and increasing: they are drawn against.")
    size = min(1024, len(dataset)) if batch_size is None else batch_size
    with standalone(model, loss_fn, dataset, Plan(size, seed=seed), collate_fn=collate_fn) as solver:
        objective = solver.objective
        chunks = full_batch(objective.source, size, max_samples=full_batch_samples, seed=seed)
        gradient = Sequential(objective, [chunks], graph_slots=0, differences=True).gradients()
        loss, *differences = _losses(solver.drawing(Use.POTENTIAL), chunks, [0.0, *np.repeat(z, num_directions)])
    rows = (torch.tensor(differences, dtype=torch.float64) - loss).reshape(len(z), num_directions)
    found = RandomPotential(
        distances=z,
        rms=tuple(_root(row.square()) for row in rows),
        std=tuple(_root((row - row.mean()).square() * len(row) / (len(row) - 1)) for row in rows),
        differences=rows,
        loss=loss,
        taylor_slope=float(gradient.norm()) / math.sqrt(objective.num_parameters),
        rms_exponent=UNKNOWN,
        std_exponent=UNKNOWN,
        num_parameters=objective.num_parameters,
        num_samples=sum(part.size for part in chunks),
    )
    return replace(found, rms_exponent=_exponent(found, found.rms), std_exponent=_exponent(found, found.std))


def random_potential(*args: Any, **options: Any) -> RandomPotential:
    """The former name of `measure_random_potential`, for one release."""
    message = "random_potential is called measure_random_potential now, and will be gone with the next release."
    warnings.warn(message, FutureWarning, stacklevel=2)
    return measure_random_potential(*args, **options)


def _losses(solver: Solver, chunks: Batch, distances: Sequence[float]) -> list[float]:
    """The loss at each of these distances, each in a direction of its own; the weights are put back, to the bit."""
    objective, losses = solver.objective, list[float]()
    with movable(objective) as move, torch.no_grad():
        for distance in distances:
            drawn = torch.randn(objective.num_parameters, generator=solver.generator, dtype=solver.like.dtype)
            move(unflattened((drawn * (distance / drawn.norm())).to(solver.like.device), objective.parameters))
            losses.append(sum(part.weight * float(objective.evaluate(part)) for part in chunks))
    return losses


def _root(squares: Tensor) -> Estimate:
    """The root of a mean of squares, with the roots of its ends."""
    mean = mean_estimate(moments(squares))
    root = math.sqrt(mean.mean)
    lower, upper = (math.sqrt(max(end, 0.0)) for end in (mean.lower, mean.upper))
    return Estimate(root, mean.stderr / (2 * root) if root else 0.0, lower, upper)


def _exponent(potential: RandomPotential, values: Sequence[Estimate]) -> Estimate:
    """Slope of the logarithms beyond Taylor's range."""
    beyond = slice(potential.beyond_taylor(values), None)
    z, differences = np.array(potential.distances)[beyond], [value.mean for value in values[beyond]]
    if len(z) < 3 or not all(0 < each < math.inf for each in differences):
        return UNKNOWN
    return gap_exponent(z[-1] / z, differences)  # a power law in 1 / batch size, and here in the distance
