"""Each limit is the place where the real optimizer's steps begin to diverge on a quadratic."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, optim
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_eoss.theory.optimizers import ADAPTIVE
from lightning_eoss.theory.stability import (
    NoLimits,
    StabilityLimits,
    edge_ratio,
    eps_share,
    register_stability_limits,
    stability_limits,
)

TINY = 1e-9  # weights too small to move a preconditioner
ONE = torch.ones(1, 1, dtype=torch.float64)
HESSIAN = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
SETTLED = {"step": 1e5, "mu_product": 0.0}  # no bias is left to correct
Options = dict[str, Any]


def parameters(size: int) -> list[Tensor]:
    """Scalar parameters, which sum up to a start with a component along every direction that the tests use."""
    return [torch.full((1,), TINY * (1 + i), dtype=torch.float64, requires_grad=True) for i in range(size)]


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: Optimizer, hessian: Tensor) -> Optimizer:
    """The optimizer after a step on ``w' hessian w / 2``."""
    weights = weights_of(optimizer)
    gradient = hessian @ torch.cat(weights).detach()
    for weight, entries in zip(weights, gradient.split([w.numel() for w in weights]), strict=True):
        weight.grad = entries.clone()
    optimizer.step()
    return optimizer


def preset(optimizer: Optimizer, **state: Any) -> Optimizer:
    """The optimizer with these values in its state, as far as it has such entries."""
    weights = weights_of(optimizer)
    start = torch.cat(weights).detach()
    step(optimizer, torch.zeros(len(start), len(start), dtype=start.dtype))  # makes the state; decays the weights
    with torch.no_grad():
        for weight, entries in zip(weights, start.split([w.numel() for w in weights]), strict=True):
            weight.copy_(entries)
            for name in optimizer.state[weight].keys() & state.keys():
                optimizer.state[weight][name].copy_(torch.as_tensor(state[name]))
    return optimizer


def diverges(optimizer: Optimizer, hessian: Tensor, steps: int = 300) -> bool:
    """Whether the optimizer moves away from the minimum of ``w' hessian w / 2``."""
    start = norm = torch.cat(weights_of(optimizer)).norm()
    for _ in range(steps):
        if not 1e-3 * start < norm < 1e3 * start:
            break
        norm = torch.cat(weights_of(step(optimizer, hessian))).norm()
    return not norm < start  # nan counts


def boundary(make: Callable[[], Optimizer], hessian: Tensor) -> float:
    """The factor of ``hessian`` at which the steps begin to diverge, to .2 %, by bisection."""
    low, high = 1e-2, 1e4
    while high / low > 1.004:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(make(), middle * hessian) else (middle, high)
    return math.sqrt(low * high)


def moving(optimizer: Optimizer) -> list[Tensor]:
    """What a step maps linearly while the preconditioner rests: the weights and their momenta."""
    weights = weights_of(optimizer)
    states = [optimizer.state[weight] for weight in weights]
    momenta = [state.get(name) for name in ("exp_avg", "momentum_buffer") for state in states]
    return weights + [momentum for momentum in momenta if momentum is not None]


def modes(optimizer: Optimizer, hessian: Tensor) -> Tensor:
    """The eigenvalues of the linear map that the optimizer's next step is, taken from every unit vector."""
    sizes = [cells.numel() for cells in moving(optimizer)]
    columns = []
    for unit in TINY * torch.eye(sum(sizes), dtype=torch.float64):
        stepped = copy.deepcopy(optimizer)
        with torch.no_grad():
            for cells, entries in zip(moving(stepped), unit.split(sizes), strict=True):
                cells.copy_(entries)
        columns.append(torch.cat(moving(step(stepped, hessian))).detach() / TINY)
    return torch.linalg.eigvals(torch.stack(columns, dim=1))


def limits_of(optimizer: Optimizer) -> StabilityLimits:
    limits = stability_limits(optimizer)
    assert isinstance(limits, StabilityLimits)
    return limits


def diagonals(limits: StabilityLimits) -> tuple[Tensor, Tensor]:
    """D and W, entry by entry."""
    d, w = (
        torch.cat([torch.ones_like(p) * entry for p, entry in zip(limits.parameters, entries, strict=True)]).detach()
        for entries in (limits.limits, limits.weight_decay)
    )
    return d, w


def scaled_edge_ratio(limits: StabilityLimits, hessian: Tensor) -> float:
    """The edge ratio by its definition, from dense matrices."""
    d, w = diagonals(limits)
    return float(torch.linalg.eigvalsh((hessian + w.diag()) / (d[:, None] * d).sqrt())[-1])


# ---- where the steps diverge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({}, 20.0),
        ({"weight_decay": 0.3}, 19.7),
        ({"momentum": 0.9}, 38.0),
        ({"momentum": 0.9, "dampening": 0.9}, 380.0),
        ({"momentum": 0.5, "dampening": 0.2}, 37.5),
        ({"momentum": 0.9, "weight_decay": 0.3}, 37.7),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 0.28),
        ({"momentum": 0.5, "nesterov": True}, 15.0),
        ({"momentum": 0.5, "nesterov": True, "weight_decay": 0.3}, 14.7),
        ({"dampening": 0.5}, 20.0),  # torch ignores the dampening of no momentum
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, 20.0),
    ],
    ids=str,
)
def test_threshold_is_where_sgd_begins_to_diverge(options: Options, threshold: float) -> None:
    def make() -> SGD:
        return SGD(parameters(1), **{"lr": 0.1, **options})

    limits = limits_of(make())
    assert limits.threshold == pytest.approx(threshold)
    assert edge_ratio(threshold, limits) == pytest.approx(1.0)
    assert boundary(make, ONE) == pytest.approx(threshold, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "options", "threshold"),
    [
        (Adam, {}, 380.0),
        (Adam, {"eps": 2.0}, 760.0),
        (Adam, {"betas": (0.95, 0.999)}, 780.0),
        (Adam, {"betas": (0.0, 0.999)}, 20.0),
        (Adam, {"betas": (0.5, 0.999), "weight_decay": 3.0}, 57.0),
        (Adam, {"amsgrad": True}, 380.0),
        (Adam, {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.5), torch.tensor(0.999))}, 60.0),
        (AdamW, {"weight_decay": 0.0}, 380.0),
        (AdamW, {"weight_decay": 0.5}, 370.5),
        (AdamW, {"weight_decay": 5.0}, 285.0),
        (AdamW, {"weight_decay": 15.0}, 95.0),
        (optim.NAdam, {}, 3.8 / 0.028),
        (optim.NAdam, {"betas": (0.5, 0.999), "weight_decay": 3.0}, 27.0),
        (optim.NAdam, {"weight_decay": 5.0, "decoupled_weight_decay": True}, 0.75 * 3.8 / 0.028),
        (optim.RAdam, {}, 380.0),
        (optim.RAdam, {"betas": (0.5, 0.999), "weight_decay": 3.0}, 57.0),
        (optim.RAdam, {"weight_decay": 5.0, "decoupled_weight_decay": True}, 285.0),
        (optim.Adamax, {}, 380.0),
        (optim.Adamax, {"betas": (0.5, 0.999), "weight_decay": 3.0}, 57.0),
        (optim.RMSprop, {}, 20.0),
        (optim.RMSprop, {"momentum": 0.9}, 38.0),
        (optim.RMSprop, {"momentum": 0.5, "weight_decay": 3.0}, 27.0),
        (optim.RMSprop, {"centered": True, "eps": 2.0}, 40.0),
        (optim.Adagrad, {"eps": 2.0, "weight_decay": 3.0}, 37.0),
        (optim.Adadelta, {"weight_decay": 3.0}, 17.0),
        (optim.ASGD, {"lambd": 2.0, "alpha": 0.0, "weight_decay": 1.0}, 17.0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_limit_is_where_a_frozen_optimizer_begins_to_diverge(
    kind: type[Optimizer], options: Options, threshold: float
) -> None:
    def make() -> Optimizer:
        dominating = {} if kind is optim.ASGD else {"eps": 1.0}  # eps is all of P
        return preset(kind(parameters(1), **{"lr": 0.1, **dominating, **options}), **SETTLED)

    limit, decay = diagonals(limits_of(make()))
    assert float(limit - decay) == pytest.approx(threshold, rel=1e-6)
    assert boundary(make, ONE) == pytest.approx(threshold, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (SGD, {"lr": 0.1}, {"lr": 0.02}),
        (SGD, {"lr": 0.1}, {"lr": 0.4, "weight_decay": 3.0}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
        (SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.4, "momentum": 0.3, "dampening": 0.5}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.2, "momentum": 0.5, "weight_decay": 1.0}),
        (Adam, {"betas": (0.9, 0.99), "eps": 0.5}, {"lr": 0.4, "betas": (0.3, 0.99), "weight_decay": 3.0}),
        (AdamW, {"lr": 0.2, "weight_decay": 8.0}, {"weight_decay": 0.0}),
        (optim.NAdam, {"weight_decay": 9.0, "decoupled_weight_decay": True}, {"lr": 0.3, "betas": (0.5, 0.99)}),
        (optim.RMSprop, {"momentum": 0.9}, {"momentum": 0.2, "eps": 3.0, "weight_decay": 1.0}),
    ],
    ids=["rates", "decays", "nesterov", "momenta", "mixture", "adam", "adamw", "nadam", "rmsprop"],
)
def test_groups_that_differ_diverge_at_edge_ratio_one(kind: type[Optimizer], first: Options, second: Options) -> None:
    shared = {"lr": 0.1} if kind is SGD else {"lr": 0.1, "eps": 1.0}

    def make() -> Optimizer:
        one, other = parameters(2)
        groups = [{"params": [one], **first}, {"params": [other], **second}]
        return preset(kind(groups, **shared), **SETTLED)

    limits = limits_of(make())
    assert limits.threshold is None
    assert scaled_edge_ratio(limits, boundary(make, HESSIAN) * HESSIAN) == pytest.approx(1.0, rel=0.01)
    with pytest.raises(ValueError, match=r"limits\.threshold=None: the limits differ between parameters"):
        edge_ratio(1.0, limits)


# ---- one step from any state -----------------------------------------------------------------------------------------

V = [4e-4, 0.09]  # second moments of two entries, before the step
BETAS = {"betas": (0.5, 0.99)}


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize(
    ("kind", "options", "state"),
    [
        (Adam, BETAS, {"step": 0.0, "exp_avg_sq": V}),
        (Adam, BETAS, {"step": 2.0, "exp_avg_sq": V}),
        (Adam, {"betas": (0.9, 1 - 1e-7), "weight_decay": 0.1}, {"step": 1e6, "exp_avg_sq": V}),
        (Adam, {**BETAS, "amsgrad": True}, {"step": 2.0, "exp_avg_sq": V, "max_exp_avg_sq": [0.01, 0.16]}),
        (AdamW, {**BETAS, "weight_decay": 8.0}, {"step": 2.0, "exp_avg_sq": V}),
        (AdamW, {**BETAS, "weight_decay": 8.0, "amsgrad": True}, {"step": 2.0, "max_exp_avg_sq": [0.01, 0.16]}),
        (optim.NAdam, {**BETAS, "momentum_decay": 3.0}, {"step": 4.0, "mu_product": 0.3, "exp_avg_sq": V}),
        (
            optim.NAdam,
            {**BETAS, "weight_decay": 8.0, "decoupled_weight_decay": True},
            {"step": 4.0, "mu_product": 0.3, "exp_avg_sq": V},
        ),
        (optim.RAdam, BETAS, {"step": 4.0, "exp_avg_sq": V}),  # not rectified yet
        (optim.RAdam, BETAS, {"step": 5.0, "exp_avg_sq": V}),
        (
            optim.RAdam,
            {**BETAS, "weight_decay": 8.0, "decoupled_weight_decay": True},
            {"step": 50.0, "exp_avg_sq": V},
        ),
        (optim.Adamax, BETAS, {"step": 2.0, "exp_inf": [0.02, 0.3]}),
        (optim.Adamax, {**BETAS, "weight_decay": 0.1}, {"step": 2.0, "exp_inf": [0.0, 0.3]}),
        (optim.RMSprop, {"alpha": 0.9}, {"square_avg": V}),
        (optim.RMSprop, {"alpha": 0.9, "momentum": 0.7, "weight_decay": 0.1}, {"square_avg": V}),
        (optim.RMSprop, {"alpha": 0.9, "centered": True}, {"square_avg": V, "grad_avg": [0.01, -0.2]}),
        (optim.Adagrad, {"lr_decay": 0.2}, {"step": 9.0, "sum": V}),
        (optim.Adadelta, {"rho": 1.0}, {"square_avg": V, "acc_delta": [0.04, 0.01]}),
        (optim.ASGD, {"lambd": 0.5}, {"step": 1e9, "eta": 0.1 / (1 + 0.05 * 1e9) ** 0.75}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_limit_is_where_a_step_from_any_state_turns_a_mode_around(
    kind: type[Optimizer], options: Options, state: dict[str, Any], foreach: bool
) -> None:
    eps = {} if kind is optim.ASGD else {"eps": 0.01}
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = preset(kind([weight], **{"lr": 0.1, **eps, **options, "foreach": foreach}), **state)
    limits = limits_of(step(copy.deepcopy(optimizer), 0 * HESSIAN))  # with the coefficients of the step that comes
    d, w = diagonals(limits)
    hessian = HESSIAN * (d[:, None] * d).sqrt() / torch.linalg.eigvalsh(HESSIAN)[-1] - w.diag()
    assert scaled_edge_ratio(limits, hessian) == pytest.approx(1.0)
    at_the_edge = modes(optimizer, hessian)
    assert float(at_the_edge.abs().max()) == pytest.approx(1.0, abs=1e-6)
    assert float((at_the_edge + 1).abs().min()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "shared", "groups"),
    [
        (SGD, {}, [{"momentum": 0.99, "nesterov": True}, {"lr": 0.3, "momentum": 0.1, "dampening": 0.5}, {"lr": 0.7}]),
        (AdamW, {}, [{"weight_decay": 19.0}, {"lr": 0.4, "betas": (0.1, 0.9)}, {"betas": (0.99, 0.9)}]),
        (
            optim.NAdam,
            {"decoupled_weight_decay": True},
            [{"weight_decay": 19.0, "betas": (0.99, 0.9)}, {"lr": 0.4, "betas": (0.1, 0.9)}, {"weight_decay": 5.0}],
        ),
    ],
    ids=["sgd", "adamw", "nadam"],
)
def test_no_complex_mode_diverges_before_the_edge_however_groups_differ(
    kind: type[Optimizer], shared: Options, groups: list[Options]
) -> None:
    members = [{"params": [p], **group} for p, group in zip(parameters(3), groups, strict=True)]
    optimizer = preset(kind(members, lr=0.1, **shared), step=3.0, mu_product=0.3, exp_avg_sq=0.01)
    limits = limits_of(step(copy.deepcopy(optimizer), torch.zeros(3, 3, dtype=torch.float64)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        root = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        hessian = root @ root.T / scaled_edge_ratio(limits, root @ root.T)
        assert float(modes(optimizer, 0.99 * hessian).abs().max()) < 1
        assert float(modes(optimizer, hessian).abs().max()) == pytest.approx(1.0, abs=1e-6)


# ---- what is read off an optimizer -----------------------------------------------------------------------------------


def test_entries_follow_the_groups_and_leave_frozen_parameters_out() -> None:
    one, frozen, other = parameters(3)
    frozen.requires_grad_(False)
    limits = limits_of(SGD([{"params": [other, frozen]}, {"params": [one], "lr": 0.5, "weight_decay": 0.1}], lr=0.1))
    assert [id(p) for p in limits.parameters] == [id(other), id(one)]
    assert limits.limits == (20.0, 4.0)
    assert limits.weight_decay == (0.0, 0.1)
    assert limits.preconditioners == ()


def test_parameters_that_do_not_move_have_infinite_limits() -> None:
    one, other = parameters(2)
    resting = limits_of(SGD([one, other], lr=0.0, maximize=True))
    assert resting.limits == (math.inf, math.inf)
    assert edge_ratio(5.0, resting) == 0.0
    mixed = limits_of(SGD([{"params": [one], "lr": 0.0}, {"params": [other]}], lr=0.1))
    assert mixed.limits == (math.inf, 20.0)
    assert mixed.threshold is None
    assert limits_of(SGD([one], lr=0.1, momentum=0.9, dampening=1.0)).limits == (math.inf,)


@pytest.mark.parametrize(
    "kind", [Adam, optim.Adagrad], ids=lambda kind: kind.__name__
)  # Adagrad's state is never empty
def test_an_adaptive_optimizer_has_limits_from_its_first_step_on(kind: type[Optimizer]) -> None:
    used, unused = parameters(2)
    optimizer = kind([used, unused], lr=0.1, eps=1.0)
    assert stability_limits(optimizer) == NoLimits(
        f"{kind.__name__} has no second moments before its first step", passing=True
    )
    assert not optimizer.state.get(used, {}).get("step")
    used.grad = torch.zeros_like(used)
    optimizer.step()
    first, second = limits_of(optimizer).limits
    assert isinstance(first, Tensor) and first.shape == used.shape
    assert second == math.inf
    assert [p.shape for p in limits_of(optimizer).preconditioners] == [used.shape]
    optimizer.param_groups[0]["lr"] = 0.0
    assert limits_of(optimizer).limits == (math.inf, math.inf)


def test_a_limit_for_each_entry_is_no_scalar() -> None:
    adam = preset(Adam(parameters(1)))
    assert limits_of(adam).scalar is None
    assert limits_of(adam).threshold is None
    plain = preset(optim.RAdam(parameters(2), lr=0.1, betas=(0.5, 0.999)))  # not rectified after its first step
    assert limits_of(plain).threshold == pytest.approx(30.0)
    assert limits_of(plain).preconditioners == ()


def test_state_of_half_precision_is_read_in_single() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    adam = Adam([weight], lr=0.5, betas=(0.5, 0.75), eps=1e-3)
    weight.grad = torch.tensor([0.0, 1.0, 3.0], dtype=torch.bfloat16)
    adam.step()
    (limit,) = limits_of(adam).limits
    assert isinstance(limit, Tensor) and limit.dtype == torch.float32
    torch.testing.assert_close(limit, torch.tensor([0.006, 6.006, 18.006]))


def test_adamw_decouples_its_decay_in_torch_versions_that_do_not_say_so() -> None:
    adamw = preset(AdamW(parameters(1), lr=0.1, weight_decay=5.0, eps=1.0), **SETTLED)
    del adamw.param_groups[0]["decoupled_weight_decay"]
    assert float(limits_of(adamw).limits[0]) == pytest.approx(285.0)
    assert limits_of(adamw).weight_decay == (0.0,)


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"momentum": 0.9}, 2.0),
        ({"momentum": 0.9, "dampening": 0.5}, 4.0),
        ({"momentum": 0.9, "nesterov": True}, 2.0),
        ({"momentum": 0.9, "weight_decay": 0.3}, 1.7),
        ({"momentum": 0.9, "lr": 0.0}, math.inf),
        ({}, None),
    ],
    ids=str,
)
def test_threshold_of_small_batches(options: Options, threshold: float | None) -> None:
    limits = limits_of(SGD(parameters(2), **{"lr": 0.1, **options}))
    assert limits.threshold_small_batch == (None if threshold is None else pytest.approx(threshold))


def test_only_scalar_limits_of_momentum_have_a_threshold_of_small_batches() -> None:
    one, other = parameters(2)
    same_limit = [{"params": [one], "lr": 0.15, "momentum": 0.5}, {"params": [other], "lr": 0.1}]
    assert limits_of(SGD(same_limit)).threshold == pytest.approx(20.0)
    assert limits_of(SGD(same_limit)).threshold_small_batch is None
    decays = [{"params": [one], "weight_decay": 0.1}, {"params": [other]}]
    assert limits_of(SGD(decays, lr=0.1, momentum=0.9)).threshold_small_batch is None
    assert limits_of(preset(optim.RMSprop([one], momentum=0.9))).threshold_small_batch is None


UNBIASED = 1 - 0.99**3


@pytest.mark.parametrize(
    ("kind", "options", "state", "preconditioner"),
    [
        (Adam, BETAS, {"exp_avg_sq": [0.0081 * UNBIASED, 0.0121 * UNBIASED]}, [0.19, 0.21]),
        (optim.NAdam, BETAS, {"exp_avg_sq": [0.0081 * UNBIASED, 0.0121 * UNBIASED]}, [0.19, 0.21]),
        (
            optim.RAdam,
            BETAS,
            {"step": 20.0, "exp_avg_sq": [0.0081, 0.0121]},
            [each / math.sqrt(1 - 0.99**20) for each in (0.19, 0.21)],
        ),
        (optim.Adamax, BETAS, {"exp_inf": [0.19, 0.21]}, [0.19, 0.21]),
        (optim.RMSprop, {}, {"square_avg": [0.0081, 0.0121]}, [0.19, 0.21]),
        (optim.Adagrad, {}, {"sum": [0.0081, 0.0121]}, [0.19, 0.21]),
        (optim.Adadelta, {}, {"square_avg": [0.09, 0.11], "acc_delta": 0.9}, [0.19**0.5, 0.21**0.5]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_eps_rules_where_it_exceeds_the_gradients_part(
    kind: type[Optimizer], options: Options, state: dict[str, Any], preconditioner: list[float]
) -> None:
    weight = torch.zeros(2, requires_grad=True)
    limits = limits_of(preset(kind([weight], **options, eps=0.1), **{"step": 3.0, **state}))
    torch.testing.assert_close(limits.preconditioners[0], torch.tensor(preconditioner))
    assert eps_share(limits) == 0.5


def test_without_a_preconditioner_eps_has_no_share() -> None:
    assert math.isnan(eps_share(limits_of(SGD(parameters(1), lr=0.1))))


@pytest.mark.parametrize("kind", [SGD, optim.ASGD, *ADAPTIVE])
def test_a_complex_parameter_has_the_limits_of_its_real_coordinates(kind: Any) -> None:
    """It steps as they do, and so it has their limits."""
    start = torch.complex(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    whole, halves = start.clone().requires_grad_(), torch.view_as_real(start).clone().requires_grad_()
    optimizers = [kind([each], lr=0.1, weight_decay=0.01) for each in (whole, halves)]
    for step in range(3):
        halves.grad = torch.tensor([[0.1, -0.3], [2.0, 0.05]]) * (step + 1)
        whole.grad = torch.view_as_complex(halves.grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), halves.detach())
    found, expected = (limits_of(optimizer) for optimizer in optimizers)
    torch.testing.assert_close(found.limits[0], expected.limits[0])
    assert found.weight_decay == expected.weight_decay


class _OwnStep(SGD):
    def step(self, closure: Any = None) -> None:
        """Not the step of SGD."""


class _OwnName(SGD):
    pass


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (SGD(parameters(1), lr=0.1, maximize=True), "maximize=True"),
        (SGD(parameters(1), lr=0.1, momentum=1.0), "momentum=1.0"),
        (SGD(parameters(1), lr=0.1, momentum=0.9, dampening=1.5), "dampening=1.5"),
        (Adam(parameters(1), maximize=True), "maximize=True"),
        (optim.RMSprop(parameters(1), momentum=1.0), "momentum=1.0"),
        (AdamW(parameters(1), lr=0.1, weight_decay=20.0), "decoupled weight_decay=20.0"),
        (optim.LBFGS(parameters(1)), "LBFGS steps along"),
        (optim.Rprop(parameters(1)), "Rprop steps by the signs"),
        (optim.SparseAdam(parameters(1)), "SparseAdam moves no entries but"),
        (optim.Adafactor(parameters(1)), "Adafactor caps"),
        (_OwnStep(parameters(1), lr=0.1), "_OwnStep"),
        (_OwnStep(parameters(1), lr=0.1), "are not known; lightning_eoss.theory.stability.register_stability_limits"),
    ],
    ids=lambda value: getattr(type(value), "__name__", None),
)
def test_an_optimizer_without_limits_says_why(optimizer: Optimizer, reason: str) -> None:
    limits = stability_limits(optimizer)
    assert isinstance(limits, NoLimits)
    assert reason in limits.reason
    assert not limits.passing


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch has no Muon yet")
def test_muon_is_refused() -> None:
    limits = stability_limits(optim.Muon([torch.ones(2, 2, requires_grad=True)]))
    assert isinstance(limits, NoLimits)
    assert "Muon orthogonalises" in limits.reason


def test_a_rule_is_taught_for_the_step_that_a_class_has() -> None:
    class Mine(SGD):
        def step(self, closure: Any = None) -> None: ...

    class Heir(Mine):
        pass

    heir = Heir(parameters(1), lr=0.1)
    register_stability_limits(Mine, lambda optimizer: NoLimits(f"it is {type(optimizer).__name__}"))
    assert stability_limits(heir) == NoLimits("it is Heir")
    assert limits_of(SGD(parameters(1), lr=0.1)).threshold == 20.0


def test_a_subclass_that_keeps_the_step_and_a_scheduled_optimizer_keep_their_limits() -> None:
    optimizer = _OwnName(parameters(1), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)  # replaces the step of the instance
    assert limits_of(optimizer).threshold == 40.0
