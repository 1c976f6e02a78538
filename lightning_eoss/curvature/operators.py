r"""Products with the Hessians of B batches at once, in coordinates scaled by the optimizer's limits.

Row b of the operator is A_b = D^{-1/2} (H_b + W) D^{-1/2}: H_b the Hessian of the batch's loss, D the stability limits,
W the coupled weight decay. D = 1 and W = 0 give the Hessian itself. The full batch is one more row, made of many parts.
Another `Curvature` may stand for H_b (`gauss_newton`).

Products are reverse-over-reverse: the graph of the gradient is built once and differentiated once a product (1.3 to 1.5
gradients), either batch after batch on the module's own parameters, or for all batches in one stacked pass (`Stacked`).
What torch cannot differentiate twice is served by central differences of gradients.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from lightning_eoss.curvature.batches import Batch, Part
from lightning_eoss.curvature.objective import Objective, flattened, real, unflattened
from lightning_eoss.curvature.workers import ALONE, Workers
from lightning_eoss.linalg.lanczos import Matvec


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of an operator."""

    limits: Tensor | None = None  # (P,) the diagonal of D; None: 1
    weight_decay: Tensor | None = None  # (P,) the diagonal of W; None: 0

    @staticmethod
    def of(parameters: Sequence[Tensor], pairs: Mapping[int, Sequence[Any]], like: Tensor) -> "Coordinates":
        """From pairs (limit, weight decay) by the parameters' ids, numbers or tensors; what has none never moves."""
        found = [(like.new_ones(real(each).shape), *pairs.get(id(each), (math.inf, 0.0))) for each in parameters]
        columns = ([(ones * pair[which]).detach().reshape(-1) for ones, *pair in found] for which in (0, 1))
        return Coordinates(*map(torch.cat, columns))

    @cached_property
    def factors(self) -> Tensor | None:
        """(P,) the diagonal of D^{-1/2}; 0 where a limit is infinite (a learning rate of 0)."""
        return None if self.limits is None else self.limits.rsqrt()

    def applied(self, vectors: Tensor) -> Tensor:
        """D^{-1/2} times vectors, (..., P)."""
        factors = self.factors
        return vectors if factors is None else vectors * factors

    def product(self, vectors: Tensor, hessian: Matvec) -> Tensor:
        """D^{-1/2} (H + W) D^{-1/2} times the rows of `vectors`."""
        plain = self.applied(vectors)
        image = hessian(plain)
        return self.applied(image if self.weight_decay is None else image + self.weight_decay * plain)


PLAIN = Coordinates()


@dataclass
class Graph:
    """The gradient of one part, ready to be differentiated again."""

    loss: Tensor  # scalar, detached
    gradient: Tensor  # (P,) detached, in the Krylov dtype
    outputs: list[Tensor]  # gradients that depend on the parameters
    places: list[int]  # which parameters they belong to
    depends: bool = True  # whether the loss has a graph at all

    @staticmethod
    def constant(objective: Objective, loss: Tensor) -> "Graph":
        """What stands in for the graph of a loss that depends on no parameter."""
        nothing = objective.like.new_zeros(objective.num_parameters)
        return Graph(loss, nothing + 0 * loss, [], [], depends=False)  # NaN stays NaN


def gradient_graph(objective: Objective, part: Part, *, create_graph: bool = True) -> Graph:
    """Evaluates one part and its gradient."""
    parameters, loss = objective.parameters, objective.evaluate(part)
    if not loss.requires_grad:
        return Graph.constant(objective, loss.detach())
    gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    places = [place for place, each in enumerate(gradients) if create_graph and each is not None and each.requires_grad]
    objective.memory.note()
    gradient = flattened(gradients, parameters, objective.like.dtype)
    return Graph(loss.detach(), gradient, [gradients[place] for place in places], places)


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
    function = partial(gradient_graph, objective, part, create_graph=False)
    return central_difference(objective, lambda: function().gradient, vector, length=length)


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
    coordinates: Coordinates = PLAIN
    graph_slots: int = 32
    differences: bool = False
    workers: Workers = ALONE
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
        return self.coordinates.applied(torch.stack(gradients))

    def losses(self) -> Tensor:
        """(B,) losses."""
        return torch.stack([self._sum(row, lambda graph: graph.loss) for row in range(len(self.batches))])

    def _product(self, vectors: Tensor, rows: Sequence[int]) -> Tensor:
        """Products of some rows."""

        def products(plain: Tensor) -> Tensor:
            return torch.stack([self._row(row, vector) for row, vector in zip(rows, plain, strict=True)])

        return self.coordinates.product(vectors, products)

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
        return self.workers.sum(total)

    def _sum(self, row: int, what: Callable[[Graph], Tensor]) -> Tensor:
        """Weighted sum over the parts of one batch."""
        terms = [part.weight * what(self._graph(row, index)[0]) for index, part in enumerate(self.batches[row])]
        return self.workers.sum(torch.stack(terms).sum(0))

    def _graph(self, row: int, index: int) -> tuple[Graph, bool]:
        """The graph of one part, and whether it is kept."""
        key = (row, index)
        if key not in self._graphs:
            graph = self.curvature.graph(self.objective, self.batches[row][index], create_graph=not self.differences)
            if len(self._graphs) >= self.graph_slots:
                return graph, False
            self._graphs[key] = graph
        return self._graphs[key], True


@dataclass
class Stacked:
    """The operator of B batches of one shape in a single pass: parameters expanded to ``(B, ...)``, `vmap` over them.

    Every product multiplies all rows of the stack; once half of them are done the rest is stacked anew. Which modules
    allow it is found out by trying (`agrees_when_stacked`): random numbers, in-place buffers and data-dependent
    branches do not.
    """

    objective: Objective
    batches: Sequence[Batch]  # of equally many parts, which have the same sizes
    coordinates: Coordinates = PLAIN
    workers: Workers = ALONE
    _parameters: list[Tensor] = field(init=False, repr=False)
    _gradients: list[Tensor] = field(init=False, repr=False)
    _losses: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._parameters, losses = copies(self.objective, len(self.batches))
        terms = []
        for parts in zip(*self.batches, strict=True):
            data = _stacked([self.objective.load(part) for part in parts])
            self.objective.prepare(parts[0])
            terms.append(parts[0].weight * losses(self._parameters, data))
        total = torch.stack(terms).sum(0)
        self._losses = total.detach()
        self._gradients = list(torch.autograd.grad(total.sum(), self._parameters, create_graph=True))
        self.objective.memory.note()

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(B, P) -> (B, P)``, row by row."""
        return self.coordinates.product(vectors, self._hessian)

    def restrict(self, rows: Sequence[int]) -> Matvec:
        """The product for these rows alone."""
        if 2 * len(rows) <= len(self.batches):
            chosen = [self.batches[row] for row in rows]
            return Stacked(self.objective, chosen, self.coordinates, self.workers).matvec
        index = torch.tensor(rows, device=self._losses.device)
        full = len(self.batches)
        return lambda some: self.matvec(some.new_zeros(full, some.shape[1]).index_copy(0, index, some))[index]

    def gradients(self) -> Tensor:
        """(B, P) gradients in the operator's coordinates."""
        return self.coordinates.applied(self.workers.sum(rows_of(self._gradients, self.objective.like.dtype)))

    def losses(self) -> Tensor:
        """(B,) losses."""
        return self.workers.sum(self._losses)

    def _hessian(self, vectors: Tensor) -> Tensor:
        """Plain Hessian products of all rows."""
        pieces = unflattened(vectors, self.objective.parameters)
        products = torch.autograd.grad(self._gradients, self._parameters, pieces, retain_graph=True)
        return self.workers.sum(rows_of(products, vectors.dtype))


Operator = Sequential | Stacked  # symmetric operators of B batches


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


def copies(objective: Objective, count: int) -> tuple[list[Tensor], Callable[[Sequence[Tensor], Any], Tensor]]:
    """The parameters expanded to (count, ...), and the losses of as many stacked batches, each at its own copy.

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

    def loss(parameters: Sequence[Tensor], data: Any) -> Tensor:
        given = {name: parameters[place] for name, place in names}
        found: Tensor = functional_call(loss_of, given, (data,), tie_weights=False)
        return found

    expanded = [each.detach().expand(count, *each.shape).requires_grad_() for each in objective.parameters]
    return expanded, torch.vmap(loss, randomness="different")


def rows_of(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(B, P) of pieces (B, ...)."""
    return torch.cat([real(piece.detach()).reshape(len(piece), -1).to(dtype) for piece in pieces], dim=1)


class _LossOf(nn.Module):
    """A loss as a module, so that `functional_call` can put other parameters under it."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self.objective = objective

    def forward(self, data: Any) -> Tensor:
        """The loss as a scalar."""
        return self.objective.scaled(self.objective.loss(data))


def _stacked(data: Sequence[Any]) -> Any:
    """The samples of several batches of one structure, their tensors stacked along a new first dimension."""
    first, *others = data
    return tree_map(lambda *leaves: torch.stack(leaves), first, *others)
