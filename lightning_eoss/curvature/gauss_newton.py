r"""The Gauss-Newton matrix G = J' (d^2 l / dz^2) J of a batch: the Hessian as if its outputs z were linear in theta.

z are the network's outputs, l(z) the batch's loss as a function of them, J = dz/dtheta. What G leaves out of the
Hessian is sum_k (dl/dz_k) d^2 z_k / dtheta^2, which vanishes with the residuals: lambda_max(G_B) is close to
lambda_max(H_B) late in training, and half or twice as large early on. G is positive semidefinite where l is convex in
z; nothing here assumes it.

For cross entropy of logits, and for half the squared error as the likelihood of a Gaussian of unit variance, G is the
Fisher matrix: the mean over the samples of E[g g'] with labels drawn from the model. The empirical Fisher matrix takes
the data's labels instead and is another matrix.

G depends on what is called the outputs: a loss that is linear in them (negative log-likelihood of log-probabilities)
has G = 0. An `OutputsFn` names them, either the user's own or a discovered one (`discovered_outputs`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_eoss.curvature.batches import Part, random_batches
from lightning_eoss.curvature.objective import Objective, flattened, real, scalar, unflattened
from lightning_eoss.curvature.operators import HESSIAN, Curvature, Graph, central_difference, gradient_graph

Criterion = Callable[[Tensor], Tensor]
OutputsFn = Callable[[nn.Module, Any], tuple[Tensor, Criterion]]
Kind = Literal["hessian", "ggn"]

_EXAMPLE = (
    "outputs_fn, a function of (module, batch) that returns the outputs with their graph and the loss as a function of "
    "them, as in `return module(inputs), lambda outputs: F.cross_entropy(outputs, targets)`"
)


# ---- which outputs ---------------------------------------------------------------------------------------------------


def discovered_outputs(loss: Callable[[Any], Tensor]) -> OutputsFn:
    """Finds the outputs that a loss is a function of by watching which loss function it calls, each time anew.

    The loss must equal the result of one call of ``F.cross_entropy``, ``F.mse_loss``,
    ``F.binary_cross_entropy_with_logits`` (so also of their modules in ``nn``), or ``F.nll_loss`` of a ``log_softmax``,
    whose logits are taken. Other calls, for a metric say, do not matter.

    Cost: that of the loss.

    Example:
        >>> model, batch = nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3, 1))
        >>> outputs_fn = discovered_outputs(lambda batch: nn.MSELoss()(model(batch[0]), batch[1]))
        >>> outputs, criterion = outputs_fn(model, batch)
        >>> torch.equal(outputs, model(batch[0])), float(criterion(2 * torch.ones(3, 1)))
        (True, 4.0)
    """

    def outputs_fn(_module: nn.Module, batch: Any) -> tuple[Tensor, Criterion]:
        with _Calls() as noted:
            found = scalar(loss(batch))
        if not found.requires_grad:  # a batch that training skips
            return found, lambda outputs: outputs
        value = float(found.detach())
        losses = (call for call in noted.calls if call.function in _LOSSES and call.result.requires_grad)
        scalars = [call for call in losses if call.result.numel() == 1]
        # NaN equals nothing
        made = [call for call in scalars if float(call.result.detach()) == value or math.isnan(value)]
        if not made:
            raise ValueError(
                f"The loss, {value:.6g}, is not the result of one call of {_NAMES}, so what it is a function of cannot "
                f"be told. Pass {_EXAMPLE}."
            )
        outputs, criterion = made[-1].split()
        if made[-1].function is not F.nll_loss:
            return outputs, criterion
        links = [call for call in noted.calls if call.result is outputs]
        if not links:
            raise ValueError(
                "F.nll_loss is linear in its log-probabilities, so its Gauss-Newton matrix is 0, and these do not come "
                f"directly from log_softmax, whose logits could stand in. Pass {_EXAMPLE}; let the outputs be logits."
            )
        logits, log_softmax = links[0].split()
        return logits, lambda outputs: criterion(log_softmax(outputs))

    return outputs_fn


def check_outputs(objective: Objective, outputs_fn: OutputsFn, part: Part) -> None:
    """Refuses outputs whose criterion is not the loss that training steps on, in value and in gradient.

    Cost: two gradients of the part.
    """
    loss = gradient_graph(objective, part, create_graph=False)
    if not bool(torch.isfinite(loss.loss)):
        return  # nothing can be compared, and nothing will be shown of such batches
    criterion = _linearised(outputs_fn, objective, part, create_graph=False)
    tolerance = min(1e-3, 100 * float(torch.finfo(loss.gradient.dtype).eps) ** 0.5)
    pairs = ((loss.loss, criterion.loss), (loss.gradient, criterion.gradient))
    if not all(float((one - other).norm()) <= tolerance * float(one.norm()) for one, other in pairs):
        raise ValueError(
            f"The loss that training steps on is {float(loss.loss):.6g}, its gradient of norm "
            f"{float(loss.gradient.norm()):.6g}; as a function of the outputs alone it is {float(criterion.loss):.6g}, "
            f"and {float((loss.gradient - criterion.gradient).norm()):.3g} of the gradient is missing. So the "
            "Gauss-Newton matrix would be another loss's. Let outputs_fn repeat what training_step (or loss_fn) does: "
            "reduction, weights, outputs with their graph; a term that bypasses the outputs (a penalty) allows the "
            "Hessian only."
        )


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a torch function."""

    function: Any
    arguments: tuple[Any, dict[str, Any]]
    result: Tensor
    autocast: torch.autocast  # as it was

    def split(self) -> tuple[Tensor, Criterion]:
        """The only argument that depends on parameters, and the result as a function of it."""
        leaves, spec = tree_flatten(self.arguments)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if len(places) != 1:
            raise ValueError(
                f"{len(places)} of the tensors that {self.function.__name__} is given depend on the parameters "
                "(learned targets or weights?), so the loss is no function of one tensor of outputs. Detach what is "
                f"not meant to be learned, or pass {_EXAMPLE}."
            )

        def criterion(outputs: Tensor) -> Tensor:
            args, kwargs = tree_unflatten([*leaves[: places[0]], outputs, *leaves[places[0] + 1 :]], spec)
            with self.autocast:
                result: Tensor = self.function(*args, **kwargs)
            return result

        return leaves[places[0]], criterion


_LOSSES = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits, F.nll_loss)
_NAMES = ", ".join(f"F.{each.__name__}" for each in _LOSSES)
_LINKS = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)


class _Calls(TorchFunctionMode):
    """Notes the calls of loss functions and of log_softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function and notes it."""
        result = func(*args, **(kwargs or {}))
        if func in _LOSSES or func in _LINKS:
            kind = result.device.type
            autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            self.calls.append(_Call(func, (args, kwargs or {}), result, autocast))
        return result


# ---- products --------------------------------------------------------------------------------------------------------


def check_operator(operator: str, outputs_fn: object) -> None:
    """Refuses operators that there are not."""
    if operator not in ("hessian", "ggn"):
        raise ValueError(f"operator={operator!r} is unknown: use 'hessian', or 'ggn' for the Gauss-Newton matrix.")
    if outputs_fn is not None and operator == "hessian":
        raise ValueError("outputs_fn= is for operator='ggn': a Hessian is that of the loss, whatever the outputs.")
    if outputs_fn is not None and not callable(outputs_fn):
        raise TypeError(f"outputs_fn={outputs_fn!r} cannot be called: pass {_EXAMPLE}.")


def curvature_of(operator: Kind, outputs_fn: OutputsFn | None, objective: Objective, batch_size: int) -> Curvature:
    """The matrix that an operator's name stands for; the outputs of `"ggn"` are checked on a batch."""
    check_operator(operator, outputs_fn)
    if operator == "hessian":
        return HESSIAN
    found = outputs_fn or discovered_outputs(objective.loss)
    source = objective.source
    size = min(max(batch_size, 2), source.num_samples) if source.divisible else 1  # where each is a batch
    check_outputs(objective, found, next(random_batches(source, size, seed=0))[0])
    return gauss_newton(found)


def gauss_newton(outputs_fn: OutputsFn) -> Curvature:
    r"""The Gauss-Newton matrix as the curvature of a `Sequential` operator.

    .. math:: G v = J^\top \frac{\partial^2 \ell}{\partial z^2} J v

    by reverse mode alone: J v is the derivative of J'u by u, whose graph is kept. Where a layer cannot be
    differentiated twice, ``Sequential(..., differences=True)`` takes a central difference of the outputs for J v.
    ``weight_norm``, whose Hessian torch gets wrong, has the right G; functions that are ``once_differentiable`` have a
    wrong one, which shows in its asymmetry.

    Cost of a product, in gradients (measured on a CPU; the Hessian's in brackets): 1.1 (1.5) for linear layers, 1.4
    (2.0) for a transformer, and no less than the Hessian's for convolutions: 2.0 to 2.5, 2.2 to 4 with batch norm in
    train mode. By differences 2.3 to 3.5. Building the graph costs what the Hessian's costs.

    Source: Schraudolph, *Fast curvature matrix-vector products for second-order gradient descent*, 2002.
    """
    return Curvature(partial(_linearised, outputs_fn), _product, partial(_difference, outputs_fn))


@dataclass(kw_only=True)
class _Linearised(Graph):
    """The outputs and the criterion, each ready to be differentiated; `Graph.outputs` holds J'u."""

    network: Tensor  # z with its graph
    direction: Tensor  # u, where J'u is the gradient
    leaf: Tensor  # z without its graph
    slope: Tensor  # dl/dz with its graph, which ends at the leaf


def evaluated_outputs(outputs_fn: OutputsFn, objective: Objective, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs with their graph, without it, and the loss as a function of the latter."""
    data = objective.load(part)
    objective.prepare(part)
    found = outputs_fn(objective.module, data)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and callable(found[1])):
        raise TypeError(
            f"outputs_fn returned a {type(found).__name__}, not a tensor of outputs and a function of it, so there is "
            f"no Gauss-Newton matrix. Pass {_EXAMPLE}."
        )
    outputs, criterion = found
    leaf = real(outputs).detach().requires_grad_()
    loss = criterion(torch.view_as_complex(leaf) if outputs.is_complex() else leaf)
    return real(outputs), leaf, objective.scaled(loss)


def _linearised(outputs_fn: OutputsFn, objective: Objective, part: Part, *, create_graph: bool = True) -> Graph:
    """Evaluates one part and its gradient J'u at u = dl/dz, the latter as a function of u where asked for."""
    network, leaf, loss = evaluated_outputs(outputs_fn, objective, part)
    if not network.requires_grad:
        return Graph.constant(objective, loss.detach())
    slope = slope_of(loss, leaf)
    direction = slope.detach().requires_grad_()
    pulled = torch.autograd.grad(
        network, objective.parameters, direction, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    gradient = flattened(pulled, objective.parameters, objective.like.dtype)
    places = [place for place, each in enumerate(pulled) if each is not None and create_graph]
    outputs = [pulled[place] for place in places]
    return _Linearised(
        loss.detach(), gradient, outputs, places, network=network, direction=direction, leaf=leaf, slope=slope
    )


def slope_of(loss: Tensor, leaf: Tensor) -> Tensor:
    """dl/dz with its graph."""
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(loss, leaf, create_graph=True, materialize_grads=True)[0]


def _product(objective: Objective, graph: Graph, vector: Tensor, *, keep: bool) -> Tensor:
    """(P,) G v."""
    if not isinstance(graph, _Linearised) or not graph.outputs:
        return 0 * graph.loss * vector
    pieces = unflattened(vector, objective.parameters)
    along = [pieces[place] for place in graph.places]
    (image,) = torch.autograd.grad(graph.outputs, graph.direction, along, retain_graph=keep)
    return _pulled_back(objective, graph, image, vector, keep=keep)


def _difference(
    outputs_fn: OutputsFn, objective: Objective, part: Part, vector: Tensor, *, length: float = 1.0
) -> Tensor:
    """(P,) G v with a central difference of the outputs for J v."""
    evaluated = partial(evaluated_outputs, outputs_fn, objective, part)
    image = central_difference(objective, lambda: evaluated()[0].detach(), vector, length=length)
    graph = _linearised(outputs_fn, objective, part, create_graph=False)
    return _pulled_back(objective, graph, image, vector, keep=False)


def _pulled_back(objective: Objective, graph: Graph, image: Tensor, vector: Tensor, *, keep: bool) -> Tensor:
    """(P,) J' (d^2 l / dz^2) times the image J v of a vector."""
    if not isinstance(graph, _Linearised) or not graph.slope.requires_grad:
        return 0 * graph.loss * vector  # no parameter matters, or the criterion is affine
    (curved,) = torch.autograd.grad(graph.slope, graph.leaf, image, retain_graph=keep)
    pieces = torch.autograd.grad(graph.network, objective.parameters, curved, retain_graph=keep, allow_unused=True)
    return flattened(pieces, objective.parameters, vector.dtype)
