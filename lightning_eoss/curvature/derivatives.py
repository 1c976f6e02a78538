"""Whether products by autograd are the derivative of the gradient that training steps on.

Some layers cannot be differentiated twice; some only seem to be: their products are NaN, or those of another function.
So products are compared with difference quotients of the gradient, and these are trusted as far as they agree among
themselves: truncation, rounding and kinks (of ReLU, say) all differ from one step length to the next, an error of
autograd's does not.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_eoss.curvature.batches import Part
from lightning_eoss.curvature.memory import out_of_memory
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import HESSIAN, Curvature, Graph, step_length

_SMALL = 1e-3  # relative: what differs by less is the same, beside any interval that is shown
_RATIO, _LENGTHS = 8.0, 4  # of a step to the next shorter one, and how many there are at most
_CERTAIN = 4  # times what difference quotients differ by among themselves, an error is one
_DIVERGES = 100  # times a quotient grows while steps shrink by 512, where the gradient jumps: 512 times
_POWERS = 3  # products from a random vector towards the top eigenvector
_FALLBACK = "Products are finite differences of gradients instead: slower, and accurate to a percent or so in float32."

_LOPSIDED = (
    "Products by autograd are not symmetric: some layer's second derivative is silently wrong (once_differentiable "
    f"functions and weight_norm are known cases). {_FALLBACK}"
)
_DETACHED = (
    ", and the differences are not symmetric, as where targets are detached: the sharpness is that of the loss with "
    "such targets held fixed; steps feel how they move, too."
)
_NO_HESSIAN = (
    "The loss has no second derivative at these weights ({}), though it and its gradient are finite: there is no "
    "sharpness while that is so. Keep what stands under a root away from 0, by a small constant."
)


@dataclass(frozen=True)
class Doubt:
    """What is wrong with products by autograd."""

    message: str
    differences: bool = False  # whether differences of gradients are to be taken in their place
    detached: bool = False  # whether they would not be symmetric, so that autograd's stay


def doubt(
    objective: Objective,
    part: Part,
    along: Tensor | None = None,
    *,
    curvature: Curvature = HESSIAN,
    graph: Graph | None = None,
) -> Doubt | None:
    """What is wrong with the products of a part, as far as can be seen along some directions.

    Cost: two products, two of them compared (two gradients each, up to eight where a network has kinks); without
    `along` three products and a comparison more. None also where loss or gradient are not finite: that has nothing to
    do with products.
    """
    graph = graph or curvature.graph(objective, part)
    size = float(graph.gradient.norm())
    if not graph.depends or not math.isfinite(size):
        return None
    look = _Look(objective, part, curvature, graph)
    generator = torch.Generator().manual_seed(part.seed)
    probe = _unit(torch.randn(objective.num_parameters, generator=generator).to(graph.gradient))
    first = probe if along is None and size == 0 else _unit(graph.gradient if along is None else along)
    try:
        pairs = [(vector, look.image(vector)) for vector in (first, probe)]
        if not _finite(image for _, image in pairs):
            return look.singular(first)
        for _ in range(_POWERS if along is None and bool(pairs[1][1].norm() > 0) else 0):
            # Where products are large, what is wrong with them is seen best.
            vector = _unit(pairs[-1][1])
            pairs[2:] = [(vector, look.image(vector))]
    except RuntimeError as error:  # NotImplementedError included
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        words = f"Products by autograd are impossible ({_layer(objective, part, reason)}{reason}). {_FALLBACK}"
        return Doubt(words, differences=True)
    for (v, image), (w, other) in combinations(pairs, 2):
        size = float(image.norm()) + float(other.norm())
        if abs(float(v @ other - w @ image)) > (_SMALL + 10 * objective.rounding) * size:
            return Doubt(_LOPSIDED, differences=True)
    errors = (look.error(vector, image) for vector, image in pairs)
    return next((look.explained(error) for error in errors if error is not None), None)


@dataclass(frozen=True)
class _Error:
    """By how much a product differs from difference quotients that agree with each other."""

    vector: Tensor  # (P,) unit
    rest: Tensor  # (P,) the quotient less the product
    spread: float  # how well the quotient is known
    share: float  # of the rest in the product or the quotient


@dataclass(frozen=True)
class _Look:
    """A part, its products and their difference quotients."""

    objective: Objective
    part: Part
    curvature: Curvature
    graph: Graph

    def image(self, vector: Tensor) -> Tensor:
        """(P,) the product by autograd."""
        return self.curvature.product(self.objective, self.graph, vector, keep=True)

    def quotients(self, vector: Tensor, size: float) -> Iterator[tuple[Tensor, float]]:
        """Difference quotients with ever shorter steps, each with a bound of its rounding error.

        Steps are long enough to show a product of this size, and end where rounding would hide it.
        """
        eps = self.objective.rounding
        noise = 10 * eps * float(self.graph.gradient.norm()) / step_length(self.objective, vector)
        longest = min(16.0, 0.2 / eps ** (1 / 3), noise / (_SMALL * size) if size > 0 else math.inf)
        lengths = [max(1.0, longest) / _RATIO**number for number in range(_LENGTHS)]
        for length in lengths[:2] + [each for each in lengths[2:] if noise / each <= 0.1 * size]:
            yield self.curvature.difference(self.objective, self.part, vector, length=length), noise / length

    def error(self, vector: Tensor, image: Tensor) -> _Error | None:
        """How wrong a product is; None where it is right, or where no two quotients agree."""
        found, before = list[_Error](), torch.full_like(image, math.inf)
        for quotient, noise in self.quotients(vector, float(image.norm())):
            size = max(float(image.norm()), float(quotient.norm()))
            off, spread = (float((quotient - each).norm()) for each in (image, before))
            if off <= _SMALL * size:
                return None
            if spread <= max(_SMALL * size, noise) and off > _CERTAIN * spread + noise:
                found.append(_Error(vector, quotient - image, spread, off / size))
            before = quotient
        return min(found, key=lambda error: error.spread, default=None)

    def explained(self, error: _Error) -> Doubt:
        """Differences stand in where they are symmetric; else the gradient is no loss's, and autograd's products stay.

        The error is a matrix E, and `rest` is Ev: with w along it, w'Ev = |Ev|, and v'Ew is the same if E is symmetric.
        """
        size = float(error.rest.norm())
        vector = error.rest / size
        (one, _), (other, _) = islice(self.quotients(vector, size), 2)
        back = float(error.vector @ (other - self.image(vector)))
        spread = error.spread + abs(float(error.vector @ (one - other)))
        tolerance = _CERTAIN * spread + 2 * _SMALL * size / error.share
        words = f"The Hessian by autograd and a finite difference of gradients differ by {error.share:.0%}"
        if abs(back - size) > tolerance:
            return Doubt(f"{words}{_DETACHED}", detached=True)
        nodes = nodes_of([self.objective.evaluate(self.part)])
        named = {type(node).__name__.removesuffix("Backward") for node in nodes if isinstance(node, BackwardCFunction)}
        suspects = f" It has functions with a backward pass of their own: {', '.join(sorted(named))}." if named else ""
        return Doubt(f"{words}: some layer's second derivative is silently wrong.{suspects} {_FALLBACK}", True)

    def singular(self, vector: Tensor) -> Doubt:
        """What NaN and infinity among products of a finite gradient mean."""
        culprit = self.culprit()
        sizes = [float(quotient.norm()) for quotient, _ in self.quotients(vector, math.inf)]
        if not all(map(math.isfinite, sizes)) or sizes[-1] > _DIVERGES * sizes[0]:
            return Doubt(_NO_HESSIAN.format(culprit))
        words = f"Products by autograd are not finite ({culprit}), though loss and gradient are. {_FALLBACK}"
        return Doubt(words, differences=True)

    def culprit(self) -> str:
        """The function whose derivative makes the first number that is not finite, and the layer that it belongs to."""
        with torch.autograd.set_detect_anomaly(True, check_nan=False):  # notes whose derivative a function is part of
            graph = self.curvature.graph(self.objective, self.part)
        found: list[str] = []

        def watch(node: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
            if not found and _finite(outputs) and not _finite(inputs):
                found.append(node.metadata.get("parent_", node).name())

        for node in nodes_of(graph.outputs):
            node.register_hook(partial(watch, node))
        self.curvature.product(self.objective, graph, torch.ones_like(graph.gradient), keep=False)
        name = found[0] if found else "one of its functions"
        return f"{_layer(self.objective, self.part, name)}{name}"


def nodes_of(tensors: Iterable[Tensor]) -> set[Any]:
    """All functions of the graphs that made some tensors."""
    nodes, new = set[Any](), [tensor.grad_fn for tensor in tensors]
    while new:
        node = new.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            new.extend(each for each, _ in node.next_functions)
    return nodes


def _layer(objective: Objective, part: Part, reason: str) -> str:
    """The layer whose output comes from the function that a message names, if that can be told."""
    names: dict[str, str] = {}

    def note(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            names.setdefault(_normalised(output.grad_fn.name().split("Backward")[0]), name)

    leaves = [(name, module) for name, module in objective.module.named_modules() if not any(module.children())]
    handles = [leaf.register_forward_hook(partial(note, f"{name} ({type(leaf).__name__})")) for name, leaf in leaves]
    try:
        note("the loss", None, None, objective.evaluate(part))
    finally:
        for handle in handles:
            handle.remove()
    found = [gradient for gradient in names if gradient and gradient in _normalised(reason)]
    return f"{names[max(found, key=len)]}: " if found else ""


def _normalised(name: str) -> str:
    """Names of an operator as autograd spells them in nodes and in messages, made comparable."""
    return name.lower().replace("_", "")


def _finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all numbers are finite."""
    return all(bool(torch.isfinite(each).all()) for each in tensors if each is not None)


def _unit(vector: Tensor) -> Tensor:
    """The vector with norm 1."""
    return vector.div(torch.linalg.vector_norm(vector))
