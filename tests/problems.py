"""Little problems with dense answers: networks, losses, data, and Hessians to compare with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import default_collate

from lightning_eoss.curvature.batches import DatasetSource
from lightning_eoss.curvature.gauss_newton import curvature_of
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import HESSIAN
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.isolation.isolate import isolated

Sample = tuple[Tensor, Tensor]
LossFn = Callable[[nn.Module, Any], Tensor]


def assert_close(actual: Any, expected: Any, *, dtype: torch.dtype | None = None, steps: int = 100) -> None:
    """Equal up to `steps` roundings of the precision in use, relative to the largest number that is expected."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    dtype = dtype or expected.dtype
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    tolerance = steps * torch.finfo(dtype).eps * max(float(expected.double().abs().max()), torch.finfo(dtype).tiny)
    difference = float((actual.double() - expected.double()).abs().max())
    assert difference <= tolerance, f"differs by {difference:.3g}, more than {tolerance:.3g}: {actual} for {expected}"


# ---- losses --------------------------------------------------------------------------------------------------------


def squared_error(model: nn.Module, batch: Sample) -> Tensor:
    """Mean over the samples of half the squared error."""
    inputs, targets = batch
    return (model(inputs) - targets).square().sum(-1).mean() / 2


def cross_entropy(model: nn.Module, batch: Sample) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets.argmax(-1))


def sum_of_errors(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def weighted_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=batch[0].dtype)
    return F.cross_entropy(model(batch[0]), batch[1].argmax(-1), weight=weights)


# ---- networks of 4 x 4 pictures into three outputs -------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))


def batch_norm() -> nn.Module:
    """In eval mode, with running statistics of its own."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(0)
    model[2].running_mean.normal_(generator=generator)
    model[2].running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


class Attention(nn.Module):
    """One head over the rows of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        query, key, value = self.project(pictures.flatten(1, 2)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(query, key, value).mean(1))


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, 3, bias=False)
        self.decoder = nn.Linear(16, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = torch.tanh(self.encoder(pictures.flatten(1)))
        return self.decoder(hidden @ self.encoder.weight)


class Tempered(nn.Module):
    """A parameter without dimensions, as CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.temperature * self.net(pictures)


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))


def batch_norm_training() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


NETS = [mlp, cnn, layer_norm, batch_norm, Attention, Tied, Tempered]


def made(net: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with seeded parameters; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return net().to(dtype)


def pictures(num_samples: int = 22, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Sample]:
    """4 x 4 pictures in three classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, 1, 4, 4, generator=generator, dtype=torch.float64)
    classes = torch.randint(3, (num_samples,), generator=generator)
    return list(zip(inputs.to(dtype), F.one_hot(classes, 3).to(dtype), strict=True))


# ---- networks with data of their own ---------------------------------------------------------------------------------


class Bag(nn.Module):
    """Words in a bag; torch cannot differentiate it twice. `twin` gathers the same words so that it can."""

    def __init__(self, *, twin: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 3, mode="mean")
        self.twin = twin
        self.head = nn.Linear(3, 3)

    def forward(self, words: Tensor) -> Tensor:
        means = F.embedding(words, self.bag.weight).mean(1) if self.twin else self.bag(words)
        return self.head(torch.tanh(means))


def sentences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(6, (12, 4), generator=generator)
    return [(each, F.one_hot(each.sum() % 3, 3).double()) for each in words]


class Quadratic(nn.Module):
    """theta' M theta / 2 for a matrix M a sample: its Hessian is the sample."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(dim, dtype=torch.float64))

    def forward(self, matrices: Tensor) -> Tensor:
        return torch.einsum("p,npq,q->n", self.theta, matrices, self.theta) / 2


def quadratic_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).mean()


def samples_of(matrices: Tensor) -> list[tuple[Tensor]]:
    return [(matrix,) for matrix in matrices]


# ---- dense oracles ---------------------------------------------------------------------------------------------------


def dense_gradient_and_hessian(model: nn.Module, loss_fn: LossFn, batch: Any) -> tuple[Tensor, Tensor]:
    """(P,) and (P, P) of the trainable parameters, by rows."""
    named = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([each.numel() for each in named.values()])
        values = {name: piece.view_as(each) for (name, each), piece in zip(named.items(), pieces, strict=True)}
        return loss_fn(lambda *inputs: functional_call(model, values, inputs), batch)

    flat = torch.cat([each.reshape(-1) for each in named.values()]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat, create_graph=True)
    rows = [torch.autograd.grad(each, flat, retain_graph=True)[0] for each in gradient]
    return gradient.detach(), torch.stack(rows)


def dense_hessians(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    """(N, P, P), one for each sample."""
    return torch.stack(
        [dense_gradient_and_hessian(model, loss_fn, collated(data, [index]))[1] for index in range(len(data))]
    )


def deviations(hessians: Tensor) -> Tensor:
    return hessians - hessians.mean(0)


def top(matrix: Tensor) -> float:
    """The largest eigenvalue of a dense symmetric matrix."""
    return float(torch.linalg.eigvalsh(matrix)[-1])


def collated(data: Sequence[Any], indices: Sequence[int]) -> Any:
    return default_collate([data[index] for index in indices])


@contextmanager
def objective_of(model: nn.Module, loss_fn: LossFn, data: Sequence[Any], **options: Any) -> Iterator[Objective]:
    """An objective within its isolation."""
    with isolated(model, [data]) as isolation:
        yield Objective(model, lambda batch: loss_fn(model, batch), DatasetSource(data), isolation, **options)


@contextmanager
def solver_of(model: nn.Module, loss_fn: Any, data: Any, *, seed: int = 0, **options: Any) -> Iterator[Solver]:
    """All that products need."""
    with objective_of(model, loss_fn, data) as objective:
        curvature = curvature_of(objective=objective, batch_size=4, **options) if options else HESSIAN
        generator = torch.Generator().manual_seed(seed)
        plan = Plan(2, full_batch_samples=None, seed=seed)
        yield Solver(objective, plan, preflight(objective, 2), curvature=curvature, generator=generator)


def random_symmetric(num_rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, P, P) symmetric matrices."""
    matrices = torch.randn(num_rows, dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((matrices + matrices.mT) / 2).to(dtype)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """(P, P) symmetric matrix with these eigenvalues and random eigenvectors."""
    dim = len(values)
    gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(gaussian)[0]
    matrix = (basis * values.double()) @ basis.T
    return (matrix + matrix.T) / 2
