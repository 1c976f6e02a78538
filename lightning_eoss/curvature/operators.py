r"""Products with the Hessians of B batches at once, in coordinates scaled by the optimizer's limits.

Row b of the operator is A_b = D^{-1/2} (H_b + W) D^{-1/2}: H_b the Hessian of the batch's loss, D the stability limits,
W the coupled weight decay. D = 1 and W = 0 give the Hessian itself. The full batch is one more row, made of many parts.
Another `Curvature` may stand for H_b (`gauss_newton`).

Products are reverse-over-reverse: the graph of the gradient is built once and differentiated once a product (1.3 to 1.5
gradients), either batch after batch on the module's own parameters, or for all batches in one stacked pass (`Stacked`).
What torch cannot differentiate twice is served by central differences of gradients.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_eoss.curvature.batches import Batch, Part
from lightning_eoss.curvature.objective import Objective, real
from lightning_eoss.linalg.lanczos import Matvec

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scaling:
    """The coordinates of an operator."""

    limits: Tensor | None = None  # (P,) the diagonal of D; None: 1
    weight_decay: Tensor | None = None  # (P,) the diagonal of W; None: 0

    @cached_property
    def factors(self) -> Tensor | None:
        """(P,) the diagonal of D^{-1/2}; 0 where a limit is infinite (a learning rate of 0)."""
        return None if self.limits is None else self.limits.rsqrt()

    def applied(self, vectors: Tensor) -> Tensor:
        """D^{-1/2} times vectors, (..., P)."""
        factors = self.factors
        return vectors if factors is None else vectors * factors


class Operator(Protocol):
    """Symmetric operators of B batches."""

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(B, P) -> (B, P)``, row by row."""

    def restrict(self, rows: Sequence[int]) -> Matvec:
        """The product for these rows alone."""

    def gradients(self) -> Tensor:
        """(B, P) gradients of the batches' losses in the operator's coordinates, D^{-1/2} g."""

    def losses(self) -> Tensor:
        """(B,) losses of the batches."""


@dataclass
class Graph:
    """The gradient of one part, ready to be differentiated again."""

    loss: Tensor  # scalar, detached
    gradient: Tensor  # (P,) detached, in the Krylov dtype
    outputs: list[Tensor]  # gradients that depend on the parameters
    places: list[int]  # which parameters they belong to
    depends: bool = True  # whether the loss has a graph at all


def krylov_dtype(objective: Objective) -> torch.dtype:
    """The parameters' own precision, float32 at least."""
    widest = torch.float32
    for parameter in objective.parameters:
        widest = torch.promote_types(widest, parameter.dtype.to_real())
    return widest


def krylov_like(objective: Objective) -> Tensor:
    """An empty vector with the dtype and device of Krylov vectors."""
    return torch.empty(0, dtype=krylov_dtype(objective), device=objective.parameters[0].device)


def flattened(tensors: Sequence[Tensor | None], parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One vector of all pieces, zeros where a piece is missing."""
    pieces = [
        torch.zeros_like(real(parameter), dtype=dtype).reshape(-1)
        if tensor is None
        else real((tensor.to_dense() if tensor.is_sparse else tensor).detach()).reshape(-1).to(dtype)
        for tensor, parameter in zip(tensors, parameters, strict=True)
    ]
    return torch.cat(pieces)


def unflattened(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a (..., P) vector in the shapes and dtypes of the parameters.

    A view at an odd offset is none of complex numbers, which a network may ask of its gradients: there, it is a copy.
    """
    shapes = [real(parameter).shape for parameter in parameters]
    pieces = vector.split([shape.numel() for shape in shapes], dim=-1)
    copies = []
    for piece, shape, parameter in zip(pieces, shapes, parameters, strict=True):
        shaped = piece.reshape((*vector.shape[:-1], *shape))
        odd = piece.storage_offset() % 2 != 0 or any(stride % 2 for stride in piece.stride()[:-1])
        own = shaped.to(parameter.dtype.to_real(), memory_format=torch.contiguous_format, copy=odd)
        copies.append(torch.view_as_complex(own) if parameter.is_complex() else own)
    return copies


def gradient_graph(objective: Objective, part: Part, *, create_graph: bool = True) -> Graph:
    """Evaluates one part and its gradient."""
    parameters, dtype = objective.parameters, krylov_dtype(objective)
    loss = objective.evaluate(part)
    if not loss.requires_grad:
        return constant_graph(objective, loss.detach())
    gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    places = [place for place, each in enumerate(gradients) if create_graph and each is not None and each.requires_grad]
    objective.memory.note()
    return Graph(loss.detach(), flattened(gradients, parameters, dtype), [gradients[place] for place in places], places)


def constant_graph(objective: Objective, loss: Tensor) -> Graph:
    """What stands in for the graph of a loss that depends on no parameter."""
    nothing = flattened([None] * len(objective.parameters), objective.parameters, krylov_dtype(objective))
    return Graph(loss, nothing + 0 * loss, [], [], depends=False)  # NaN stays NaN


def hessian_product(objective: Objective, graph: Graph, vector: Tensor, *, keep: bool) -> Tensor:
    """(P,) Hessian of the graph's part times a (P,) vector; zeros where the gradient does not depend on a parameter."""
    parameters = objective.parameters
    if not graph.outputs:
        return 0 * graph.loss * vector
    pieces = unflattened(vector, parameters)
    along = [pieces[place] for place in graph.places]
    products = torch.autograd.grad(graph.outputs, parameters, along, retain_graph=keep, allow_unused=True)
    return flattened(products, parameters, vector.dtype)


def difference_product(objective: Objective, part: Part, vector: Tensor, *, length: float = 1.0) -> Tensor:
    r"""(P,) :math:`(\nabla L(\theta + \epsilon v) - \nabla L(\theta - \epsilon v)) / 2\epsilon`."""

    def gradient() -> Tensor:
        return gradient_graph(objective, part, create_graph=False).gradient

    return central_difference(objective, gradient, vector, length=length)


@contextmanager
def movable(objective: Objective) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """A function that moves the parameters in place, by steps from where they are; in the end they are put back."""
    originals = [parameter.detach().clone() for parameter in objective.parameters]

    def move(steps: Iterable[Tensor]) -> None:
        for parameter, original, step in zip(objective.parameters, originals, steps, strict=True):
            parameter.data.copy_(original + step)

    try:
        yield move
    finally:
        for parameter, original in zip(objective.parameters, originals, strict=True):
            parameter.data.copy_(original)


def central_difference(
    objective: Objective, function: Callable[[], Tensor], vector: Tensor, *, length: float = 1.0
) -> Tensor:
    r""":math:`(f(\theta + \epsilon v) - f(\theta - \epsilon v)) / 2\epsilon` of a function of the parameters.

    The parameters are moved in place and put back from a copy, to the bit. The step balances rounding against the third
    derivative of a smooth loss; `length` is a factor to it.
    """
    epsilon = length * step_length(objective, vector)
    steps = unflattened(vector, objective.parameters)
    values = []
    with movable(objective) as move:
        for signed in (epsilon, -epsilon):
            move(signed * step for step in steps)
            values.append(function())
    return (values[0] - values[1]) / (2 * epsilon)


def step_length(objective: Objective, vector: Tensor) -> float:
    """How much of a vector makes a step that balances the two errors of a central difference."""
    size = math.hypot(*(float(torch.linalg.vector_norm(each.detach())) for each in objective.parameters))
    return float(objective.rounding ** (1 / 3)) * max(1.0, size) / (float(vector.norm()) or 1.0)


@dataclass(frozen=True)
class Curvature:
    """Which matrix of a part's loss an operator multiplies."""

    graph: Callable[..., Graph]  # (objective, part, create_graph=): evaluates the part, ready for products
    product: Callable[..., Tensor]  # (objective, graph, vector, keep=): (P,) of the matrix times a (P,) vector
    # (objective, part, vector, length=): the same, without differentiating the network twice
    difference: Callable[..., Tensor]


HESSIAN = Curvature(gradient_graph, hessian_product, difference_product)


@dataclass
class Sequential:
    """The operator of B batches, one part after another on the module's own parameters, as training evaluates them.

    Graphs are kept as long as `graph_slots` allows, first come, first kept; the others are built anew for every
    product.
    """

    objective: Objective
    batches: Sequence[Batch]
    scaling: Scaling = Scaling()
    graph_slots: int = 32
    differences: bool = False
    reduce: Reduce = lambda total: total
    curvature: Curvature = HESSIAN
    _graphs: dict[tuple[int, int], Graph] = field(default_factory=dict, repr=False)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(B, P) -> (B, P)``, row by row."""
        return self._product(vectors, range(len(self.batches)))

    def restrict(self, rows: Sequence[int]) -> Matvec:
        """The product for these rows alone; the graphs of the others are freed."""
        for key in [key for key in self._graphs if key[0] not in rows]:
            del self._graphs[key]
        return lambda vectors: self._product(vectors, rows)

    def gradients(self) -> Tensor:
        """(B, P) gradients in the operator's coordinates."""
        gradients = [self._sum(row, lambda graph: graph.gradient) for row in range(len(self.batches))]
        return self.scaling.applied(torch.stack(gradients))

    def losses(self) -> Tensor:
        """(B,) losses."""
        return torch.stack([self._sum(row, lambda graph: graph.loss) for row in range(len(self.batches))])

    def _product(self, vectors: Tensor, rows: Sequence[int]) -> Tensor:
        """Products of some rows."""

        def plain_products(plain: Tensor) -> Tensor:
            return torch.stack([self._row(row, vector) for row, vector in zip(rows, plain, strict=True)])

        return scaled_product(vectors, self.scaling, plain_products)

    def _row(self, row: int, vector: Tensor) -> Tensor:
        """Curvature of one batch times a vector."""
        total = torch.zeros_like(vector)
        for index, part in enumerate(self.batches[row]):
            if self.differences:
                product = self.curvature.difference(self.objective, part, vector)
            else:
                graph, kept = self._graph(row, index)
                product = self.curvature.product(self.objective, graph, vector, keep=kept)
            total.add_(product, alpha=part.weight)
        return self.reduce(total)

    def _sum(self, row: int, what: Callable[[Graph], Tensor]) -> Tensor:
        """Weighted sum over the parts of one batch."""
        parts = self.batches[row]
        terms = [part.weight * what(self._graph(row, index)[0]) for index, part in enumerate(parts)]
        return self.reduce(torch.stack(terms).sum(0))

    def _graph(self, row: int, index: int) -> tuple[Graph, bool]:
        """The graph of one part, and whether it is kept."""
        key = (row, index)
        if key not in self._graphs:
            graph = self.curvature.graph(self.objective, self.batches[row][index], create_graph=not self.differences)
            if len(self._graphs) >= self.graph_slots:
                return graph, False
            self._graphs[key] = graph
        return self._graphs[key], True


def scaled_product(vectors: Tensor, scaling: Scaling, hessian: Matvec) -> Tensor:
    """D^{-1/2} (H + W) D^{-1/2} times the rows of `vectors`."""
    plain = scaling.applied(vectors)
    product = hessian(plain)
    return scaling.applied(product if scaling.weight_decay is None else product + scaling.weight_decay * plain)


@dataclass
class Stacked:
    """The operator of B batches of one shape in a single pass: parameters expanded to ``(B, ...)``, `vmap` over them.

    Every product multiplies all rows of the stack; once half of them are done the rest is stacked anew. Which modules
    allow it is found out by trying (`agrees_when_stacked`): random numbers, in-place buffers and data-dependent
    branches do not.
    """

    objective: Objective
    batches: Sequence[Batch]  # of equally many parts, which have the same sizes
    scaling: Scaling = Scaling()
    reduce: Reduce = lambda total: total
    _parameters: list[Tensor] = field(init=False, repr=False)
    _gradients: list[Tensor] = field(init=False, repr=False)
    _losses: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows, own = len(self.batches), self.objective.parameters
        self._parameters = [each.detach().expand(rows, *each.shape).requires_grad_() for each in own]
        losses = torch.vmap(loss_at(self.objective), randomness="different")
        terms = []
        for parts in zip(*self.batches, strict=True):
            batch = _stacked([self.objective.load(part) for part in parts])
            self.objective.prepare(parts[0])
            terms.append(parts[0].weight * losses(self._parameters, batch))
        total = torch.stack(terms).sum(0)
        self._losses = total.detach()
        self._gradients = list(torch.autograd.grad(total.sum(), self._parameters, create_graph=True))
        self.objective.memory.note()

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(B, P) -> (B, P)``, row by row."""
        return scaled_product(vectors, self.scaling, self._hessian)

    def restrict(self, rows: Sequence[int]) -> Matvec:
        """The product for these rows alone."""
        if 2 * len(rows) <= len(self.batches):
            chosen = [self.batches[row] for row in rows]
            return Stacked(self.objective, chosen, self.scaling, self.reduce).matvec
        index = torch.tensor(rows, device=self._losses.device)
        full = len(self.batches)
        return lambda some: self.matvec(some.new_zeros(full, some.shape[1]).index_copy(0, index, some))[index]

    def gradients(self) -> Tensor:
        """(B, P) gradients in the operator's coordinates."""
        gradients = self._flattened(self._gradients, krylov_dtype(self.objective))
        return self.scaling.applied(self.reduce(gradients))

    def losses(self) -> Tensor:
        """(B,) losses."""
        return self.reduce(self._losses)

    def _hessian(self, vectors: Tensor) -> Tensor:
        """Plain Hessian products of all rows."""
        pieces = unflattened(vectors, self.objective.parameters)
        products = torch.autograd.grad(self._gradients, self._parameters, pieces, retain_graph=True)
        return self.reduce(self._flattened(products, vectors.dtype))

    def _flattened(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(B, P) of pieces (B, ...)."""
        return torch.cat([real(piece.detach()).reshape(len(self.batches), -1).to(dtype) for piece in pieces], dim=1)


def agrees_when_stacked(objective: Objective, batches: Sequence[Batch], *, tol: float = 1e-3) -> bool:
    """Whether a stacked product exists for these batches and is the same as batch after batch."""
    if len({tuple(part.size for part in batch) for batch in batches}) != 1:
        return False
    sequential = Sequential(objective, batches)
    directions = sequential.gradients()
    expected = sequential.matvec(directions)
    try:
        stacked = Stacked(objective, batches)
        difference = (stacked.gradients() - directions).norm() / directions.norm()
        difference += (stacked.matvec(directions) - expected).norm() / expected.norm()
    except Exception:  # vmap refuses in many ways, from within user code; the sequential route needs none of it
        return False
    return bool(difference < tol)


def loss_at(objective: Objective) -> Callable[[Sequence[Tensor], Any], Tensor]:
    """The loss of a batch at other parameters, which are given in the order of the objective's.

    A module counts under one of its names, whatever else it is called: `functional_call` would take what the first name
    has put there for what is to be put back under the second. A parameter of several modules is put into each.
    """
    loss_of, places = _LossOf(objective), {id(p): i for i, p in enumerate(objective.parameters)}
    names = [
        (f"{path}.{name}", places[id(parameter)])
        for path, module in loss_of.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in places
    ]

    def loss(parameters: Sequence[Tensor], batch: Any) -> Tensor:
        given = {name: parameters[place] for name, place in names}
        found: Tensor = functional_call(loss_of, given, (batch,), tie_weights=False)
        return found

    return loss


class _LossOf(nn.Module):
    """A loss as a module, so that `functional_call` can put other parameters under it."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self.objective = objective

    def forward(self, batch: Any) -> Tensor:
        """The loss as a scalar."""
        return self.objective.scaled(self.objective.loss(batch))


def _stacked(batches: Sequence[Any]) -> Any:
    """Batches of one structure as one, their tensors stacked along a new first dimension."""
    leaves, specs = zip(*(tree_flatten(batch) for batch in batches), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise ValueError("batches differ in structure")
    columns = list(zip(*leaves, strict=True))
    if not all(isinstance(leaf, Tensor) for column in columns for leaf in column):
        raise ValueError("batches hold more than tensors")
    return tree_unflatten([torch.stack(column) for column in columns], specs[0])
