"""What is too dear or too special for the package, to compare it with: all eigenvalues, gradients, covariances."""

from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_eoss.curvature.batches import Batch, Part, random_batches, split
from lightning_eoss.curvature.gauss_newton import OutputsFn
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import gradient_graph
from lightning_eoss.curvature.per_sample import is_mean, sample_gradients
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import Solver
from lightning_eoss.measurements.variance import sample_variance
from lightning_eoss.theory.gradient_noise import Noise
from lightning_eoss.theory.statistics import Estimate, mean_estimate, moments
from papers.batch_noise import batch_gradient_covariance
from papers.tangent_kernel import jacobian


def gauss_newton_eigenvalues(objective: Objective, batch: Batch, outputs_fn: OutputsFn) -> Tensor:
    r"""All nonzero eigenvalues of a small batch's G from an m x m matrix, m = b d_z the number of its outputs.

    .. math:: \operatorname{spec}(J^\top M J) \setminus 0 = \operatorname{spec}(K^{1/2} M K^{1/2}) \setminus 0, \qquad
        K = J J^\top, \quad M = \partial^2 \ell / \partial z^2

    The square root is K's, which is always positive semidefinite, so M need not be: exact for any loss.

    Cost: about m gradients of the batch for J (64 rows at a time), then m^2 P and m^3 operations in float64; holds J,
    m x P numbers. For the top alone, an operator with `gauss_newton` is cheaper unless the batch is tiny.

    Args:
        objective: The loss and its source.
        batch: One batch, its parts weighted.
        outputs_fn: The outputs and the loss as a function of them.

    Returns:
        (m,) in descending order, float64. If m < P the other P - m eigenvalues of G are 0; if m > P zeros are added.

    Example:
        Linear regression, x = 1 and x = 3: G = H = (1 + 9) / 2.

        >>> from torch import nn
        >>> from torch.nn import functional as F
        >>> from lightning_eoss.isolation.isolate import isolated
        >>> from lightning_eoss.curvature.batches import DatasetSource
        >>> model = nn.Linear(1, 1, bias=False)
        >>> loss = lambda batch: F.mse_loss(model(batch[0]), batch[1]) / 2
        >>> outputs_fn = lambda module, batch: (module(batch[0]), lambda z: F.mse_loss(z, batch[1]) / 2)
        >>> data = [(torch.tensor([x]), torch.tensor([0.0])) for x in (1.0, 3.0)]
        >>> with isolated(model) as isolation:
        ...     objective = Objective(model, loss, DatasetSource(data), isolation)
        ...     values = gauss_newton_eigenvalues(objective, (Part(1.0, 2, (0, 1)),), outputs_fn)
        >>> round(float(values[0]), 6), round(float(values[1]), 6)
        (5.0, 0.0)
    """
    rows, middle = jacobian(objective, batch, outputs_fn)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    root = vectors * values.clamp(min=0).sqrt()
    found: Tensor = torch.linalg.eigvalsh(root.T @ middle @ root)
    return found.flip(0)


def empirical_fisher_eigenvalues(objective: Objective, batch: Batch) -> Tensor:
    r"""All nonzero eigenvalues of :math:`\frac{1}{n} \sum_i g_i g_i^\top`, g_i the gradients of the n samples' losses.

    They are those of the n x n matrix of the gradients' products. Not the Fisher matrix: labels are the data's. Defined
    where the loss of a batch is a mean or a sum over its samples (`preflight.reduction`).

    Cost: n gradients of one sample each; holds n x P numbers.

    Args:
        objective: The loss and its source.
        batch: One batch, whose parts are split into samples; weights as a mean has them.

    Returns:
        (n,) in descending order, float64.

    Raises:
        ValueError: If a part cannot be split because its samples are loaded already.
    """
    samples = split(batch, 1)
    if any(part.size != 1 for part in samples):
        raise ValueError(
            "batch has parts that were loaded as a whole, so the gradients of their samples are not to be had. Draw "
            "the batch from a source with indices."
        )
    graphs = [gradient_graph(objective, part, create_graph=False) for part in samples]
    pairs = zip(graphs, samples, strict=True)
    gradients = torch.stack([graph.gradient.double() * part.weight**0.5 for graph, part in pairs])
    values: Tensor = torch.linalg.eigvalsh(gradients @ gradients.T)
    return values.flip(0)


def per_sample_gradients(objective: Objective, part: Part) -> Tensor:
    r"""Gradients of the losses of a part's single samples.

    .. math:: g_i = \nabla \ell_i(\theta), \qquad \frac1b \sum_{i=1}^b g_i = \nabla L_B(\theta)

    All at once through `torch.vmap` where the module allows it, else one after another. Which is found out by trying:
    what was cut from the batch must have the batch's gradient as its mean.

    Cost: what b P numbers take to be written: three gradients of the part for convolutions, up to fifty for wide linear
    layers on a CPU. And one gradient to compare with; b more where they are taken one after another.

    Args:
        objective: The loss, a mean over samples (`Findings.reduction == "mean"`); of others no sample has a loss.
        part: The samples. All their gradients must fit the memory: `sample_gradients` takes a few at a time.

    Returns:
        (b, P), in the Krylov dtype, in the order of the samples.
    """
    rows = torch.cat(list(sample_gradients(objective, part, part.size)))
    if is_mean(rows.mean(0), gradient_graph(objective, part, create_graph=False).gradient, rows.square().sum(1).mean()):
        return rows
    pieces = split((part,), 1)
    return torch.stack([gradient_graph(objective, piece, create_graph=False).gradient for piece in pieces])


def injected_covariance(noise: Noise, batch_size: int, rows: Tensor) -> NDArray[np.float64]:
    """What covariance the injected noise must have for these gradients of samples."""
    if noise == "multiplicative":
        return batch_gradient_covariance(rows.numpy(), batch_size, sampling="bernoulli")
    full = batch_gradient_covariance(rows.numpy(), batch_size)
    diagonal = np.diag(full.diagonal())
    return {"full": full, "diagonal": diagonal, "isotropic": np.eye(len(full)) * full.trace() / len(full)}[noise]


def independent_hessian_variance(
    solver: Solver, *, batch_size: int, num_batches: int, num_probes: int = 10, direction: Tensor | None = None
) -> Estimate:
    """What `hessian_variance` estimates, from batches that are each drawn from all samples."""
    source, variances = solver.objective.source, []
    factor = sample_hessian_factor(batch_size, source.num_samples, "independent")
    for number in range(num_probes):
        probe = solver.random_starts(1)[0] if direction is None else direction
        drawn = random_batches(source, batch_size, seed=solver.seed(Use.HESSIAN_VARIANCE, number))
        variances.append(factor * sample_variance(solver, list(islice(drawn, num_batches)), probe, direction))
    return mean_estimate(moments(torch.stack(variances)))


def sample_hessian_factor(batch_size: int, dataset_size: int, sampling: Literal["disjoint", "independent"]) -> float:
    """What the variance between batches is multiplied by to give that between samples.

    1 / (1/B - 1/N) for independent batches. Disjoint ones vary more, because they avoid each other: B.

    Example:
        >>> sample_hessian_factor(8, 40, "independent"), sample_hessian_factor(8, 40, "disjoint")
        (10.0, 8.0)
    """
    return float(batch_size) if sampling == "disjoint" else 1 / (1 / batch_size - 1 / dataset_size)
