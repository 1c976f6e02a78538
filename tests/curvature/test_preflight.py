"""What is found out about a loss before it is measured."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_eoss.curvature.batches import BatchListSource, full_batch
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import Sequential
from lightning_eoss.curvature.preflight import Findings, preflight, reduction
from lightning_eoss.curvature.solver import Plan
from lightning_eoss.isolation.isolate import isolated
from lightning_eoss.training.plan import described
from tests.problems import (
    Attention,
    Bag,
    LossFn,
    Tempered,
    Tied,
    assert_close,
    batch_norm,
    batch_norm_training,
    cnn,
    collated,
    cross_entropy,
    dense_gradient_and_hessian,
    dropout,
    layer_norm,
    made,
    mlp,
    objective_of,
    pictures,
    sentences,
    squared_error,
    sum_of_errors,
    weighted_cross_entropy,
)

torch.set_num_threads(1)

F64, F32 = torch.float64, torch.float32


def findings_of(net: Callable[[], nn.Module], loss_fn: LossFn, data: Any, dtype: torch.dtype = F64) -> Findings:
    with objective_of(made(net, dtype=dtype), loss_fn, data) as objective:
        return preflight(objective, 8)


def pairwise(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0])
    return (outputs @ outputs.T).square().mean()


# ---- reduction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    ("net", "loss_fn", "expected"),
    [
        (mlp, squared_error, "mean"),
        (cnn, cross_entropy, "mean"),
        (layer_norm, squared_error, "mean"),
        (batch_norm, cross_entropy, "mean"),
        (mlp, sum_of_errors, "sum"),
        (batch_norm_training, squared_error, "other"),
        (dropout, squared_error, "other"),
        (mlp, weighted_cross_entropy, "other"),
        (mlp, pairwise, "other"),
    ],
)
def test_reduction(net: Any, loss_fn: LossFn, expected: str, dtype: torch.dtype) -> None:
    with objective_of(made(net, dtype=dtype), loss_fn, pictures(dtype=dtype)) as objective:
        assert reduction(objective, seed=1) == expected


def test_a_constant_added_to_a_sum_is_neither() -> None:
    """The gradients alone are those of a sum; a value that is not shows that the loss is something else."""
    with objective_of(made(mlp), lambda model, batch: sum_of_errors(model, batch) + 100, pictures()) as objective:
        assert reduction(objective) == "other"


def test_a_mean_whose_gradient_is_small_against_its_value_is_still_told_from_a_sum() -> None:
    def offset(model: nn.Module, batch: Any) -> Tensor:
        return squared_error(model, batch) + 1e6

    def coupled(model: nn.Module, batch: Any) -> Tensor:
        return 1e-6 * pairwise(model, batch) + 1e6

    with objective_of(made(mlp), offset, pictures()) as objective:
        assert reduction(objective) == "mean"
    with objective_of(made(mlp), coupled, pictures()) as objective:
        assert reduction(objective) == "other"


def test_few_samples_and_ready_batches_tell_nothing() -> None:
    with objective_of(made(mlp), squared_error, pictures(2)) as objective:
        assert reduction(objective) == "other"
    with objective_of(made(mlp), squared_error, pictures(3)) as objective:
        assert reduction(objective) == "mean"
    model, batches = made(mlp), [collated(pictures(), range(4))] * 4
    with isolated(model) as isolation:
        source = BatchListSource(batches, [4] * 4)
        assert reduction(Objective(model, lambda batch: squared_error(model, batch), source, isolation)) == "other"


def test_a_sum_is_warned_about() -> None:
    (warning,) = findings_of(mlp, sum_of_errors, pictures()).warnings
    assert "sum over the batch: its sharpness grows with the batch size" in warning


@pytest.mark.parametrize(
    ("net", "loss_fn"), [(mlp, weighted_cross_entropy), (mlp, pairwise), (batch_norm_training, squared_error)]
)
def test_what_full_means_where_the_loss_is_no_mean_is_said(net: Any, loss_fn: LossFn) -> None:
    findings = findings_of(net, loss_fn, pictures())
    assert findings.warnings == ()
    *_, note = described(Plan(8), findings, 22, 100, 1.0, "every step")
    assert "so FullBS is the top of the mean Hessian over chunks of 8" in note
    assert len(described(Plan(8), findings_of(mlp, squared_error, pictures()), 22, 100, 1.0, "every step")) == 2


def test_of_ready_batches_nothing_is_said() -> None:
    model, batches = made(mlp), [collated(pictures(), range(4))] * 4
    with isolated(model) as isolation:
        source = BatchListSource(batches, [4] * 4)
        objective = Objective(model, lambda batch: squared_error(model, batch), source, isolation)
        assert preflight(objective, 1).warnings == ()


# ---- gradients that only `backward` finds ----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Activation checkpointing, from the first layer on or after it."""

    def __init__(self, first: bool, reentrant: bool) -> None:
        super().__init__()
        self.first, self.reentrant = first, reentrant
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(4, 3)
        self.inner = nn.Sequential(nn.Linear(16, 4), nn.Tanh())

    def forward(self, pictures: Tensor) -> Tensor:
        inputs = pictures.flatten(1)
        inputs = inputs.clone().requires_grad_() if self.first else self.embed(inputs)
        return self.head(checkpoint(self.inner, inputs, use_reentrant=self.reentrant))


@pytest.mark.parametrize("first", [True, False])
def test_reentrant_checkpoints_are_refused(first: bool) -> None:
    """After the first layer `autograd.grad` raises; from the first layer on it misses parameters without a word."""
    assert findings_of(lambda: Checkpointed(first, False), squared_error, pictures()).warnings == ()
    with pytest.raises(ValueError, match=r"autograd.grad does not find the gradient.*Pass use_reentrant=False"):
        findings_of(lambda: Checkpointed(first, True), squared_error, pictures())


def test_backward_is_tried_without_a_trace() -> None:
    """Neither `.grad`, nor what happens when one is accumulated, also of tensors that are no parameters."""
    outside, called = torch.ones((), dtype=F64, requires_grad=True), []
    outside.grad = torch.tensor(7.0, dtype=F64)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return outside * squared_error(model, batch)

    model = made(Fused)
    model.first.weight.grad = gradient = torch.ones_like(model.first.weight)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    with objective_of(model, loss_fn, pictures()) as objective:
        preflight(objective, 8)
    assert not called
    assert model.first.weight.grad is gradient and bool((gradient == 1).all()) and model.second.weight.grad is None
    assert float(outside.grad) == 7
    squared_error(model, collated(pictures(), range(4))).backward()
    assert len(called) == 4


# ---- second derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("loss_fn", [squared_error, cross_entropy])
@pytest.mark.parametrize("net", [mlp, cnn, layer_norm, batch_norm, Attention, Tied, Tempered])
def test_sound_networks_raise_no_complaint(net: Any, loss_fn: LossFn, dtype: torch.dtype) -> None:
    findings = findings_of(net, loss_fn, pictures(dtype=dtype), dtype)
    assert findings.warnings == () and not findings.differences
    assert findings.stacked
    assert findings.graph_bytes > 0 and findings.seconds > 0


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_network_with_kinks_raises_no_complaint(seed: int) -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3)
        )

    with objective_of(made(net, seed, F32), squared_error, pictures(64, dtype=F32)) as objective:
        assert preflight(objective, 32, seed=seed).warnings == ()


class Recorded(torch.autograd.Function):
    """A square whose backward pass autograd must not look into, as in many fused kernels."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 2 * inputs * gradient


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 4), nn.Linear(4, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.second(Recorded.apply(self.first(pictures.flatten(1))))


class Plain(Fused):
    def forward(self, pictures: Tensor) -> Tensor:
        return self.second(self.first(pictures.flatten(1)).square())


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("seed", range(4))
def test_silently_wrong_second_derivatives_are_replaced_by_differences(seed: int, dtype: torch.dtype) -> None:
    data, model = pictures(dtype=dtype), made(Fused, seed, dtype)
    with objective_of(model, squared_error, data) as objective:
        findings = preflight(objective, 8, seed=seed)
        assert findings.differences and not findings.stacked
        (warning,) = findings.warnings
        assert "not symmetric: some layer's second derivative is silently wrong" in warning
        operator = Sequential(objective, [full_batch(objective.source, 8)], differences=True)
        direction = operator.gradients()
        found = operator.matvec(direction)[0]
    twin, vector = made(Plain, seed), direction[0].double()
    _, hessian = dense_gradient_and_hessian(twin, squared_error, collated(pictures(), range(22)))
    expected = hessian @ vector
    assert float((found.double() - expected).norm() / expected.norm()) <= 10 * torch.finfo(dtype).eps ** (2 / 3)


def test_the_layer_that_cannot_be_differentiated_twice_is_named() -> None:
    findings = findings_of(Bag, squared_error, sentences())
    (warning,) = findings.warnings
    assert findings.differences
    assert warning.startswith("Products by autograd are impossible (bag (EmbeddingBag): the derivative for")
    assert "finite differences of gradients instead" in warning


def test_the_loss_that_cannot_be_differentiated_twice_is_named() -> None:
    def margin(model: nn.Module, batch: Any) -> Tensor:
        return F.multi_margin_loss(model(batch[0]), batch[1].argmax(-1))

    findings = findings_of(mlp, margin, pictures())
    assert findings.differences
    assert "impossible (the loss: " in findings.warnings[0] and "multi_margin_loss_backward" in findings.warnings[0]


def test_ctc_falls_back_to_differences() -> None:
    def ctc(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])[None].expand(4, -1, -1).log_softmax(-1)
        lengths = torch.full((len(batch[0]),), 4), torch.full((len(batch[0]),), 1)
        return F.ctc_loss(logits, batch[1].argmax(-1)[:, None].clamp(min=1), *lengths)

    findings = findings_of(mlp, ctc, pictures())
    assert findings.differences and "_ctc_loss_backward" in findings.warnings[0]


def test_a_detached_target_is_reported() -> None:
    """Differences see through a target that autograd takes for a constant."""

    def bootstrapped(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        return (outputs - 3 * outputs.detach().flip(0) - 1).square().mean()

    findings = findings_of(mlp, bootstrapped, pictures())
    assert any("finite difference of gradients differ by" in warning for warning in findings.warnings) or any(
        "not symmetric" in warning for warning in findings.warnings
    )


def test_an_affine_loss_raises_no_complaint() -> None:
    def mean_output(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].flatten(1)).mean()

    findings = findings_of(lambda: nn.Linear(16, 3), mean_output, pictures(dtype=F32), F32)
    assert findings.warnings == () and not findings.differences


def test_a_loss_that_is_not_finite() -> None:
    findings = findings_of(mlp, lambda model, batch: squared_error(model, batch) * torch.nan, pictures())
    assert findings.warnings == ("The loss is not finite at the first measurement.",)
    assert not findings.differences and not findings.stacked


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_data", [False, True])
def test_a_loss_that_changes_the_parameters_is_refused(through_data: bool) -> None:
    def stepping(model: nn.Module, batch: Any) -> Tensor:
        loss = squared_error(model, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                (parameter.data if through_data else parameter).add_(0.1)
        return loss

    model = made(mlp)
    originals = [parameter.detach().clone() for parameter in model.parameters()]
    with (
        pytest.raises(ValueError, match=r"Evaluating the loss changed trainable parameters in place.*Pass loss_fn="),
        objective_of(model, stepping, pictures()) as objective,
    ):
        preflight(objective, 8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), originals, strict=True))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda loss: loss.expand(3), r"must be a scalar tensor, got a tensor of shape \(3,\).*Reduce it"),
        (lambda loss: float(loss.detach()), r"must be a scalar tensor, got float"),
        (lambda loss: None, r"must be a scalar tensor, got NoneType"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        findings_of(mlp, lambda model, batch: value(squared_error(model, batch)), pictures())


def test_a_loss_of_shape_one_counts_as_a_scalar() -> None:
    findings = findings_of(mlp, lambda model, batch: squared_error(model, batch).reshape(1, 1), pictures())
    assert findings.reduction == "mean"
    assert_close(float(findings.seconds > 0), 1.0)


def test_nothing_to_train() -> None:
    model = made(mlp).requires_grad_(False)
    with pytest.raises(ValueError, match=r"Sequential has no parameter with requires_grad=True.*Unfreeze"):
        findings_of(lambda: model, squared_error, pictures())


def test_a_slow_first_product_is_not_taken_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first products of a process wait for threads and caches; a plan cut for their sake would stay cut."""
    waits, product = iter([0.5, 0.5, 0.0]), Sequential.matvec

    def waiting(self: Sequential, vectors: torch.Tensor) -> torch.Tensor:
        time.sleep(next(waits, 0.0))
        return product(self, vectors)

    monkeypatch.setattr(Sequential, "matvec", waiting)
    with objective_of(made(mlp), squared_error, pictures()) as objective:
        assert preflight(objective, 4).seconds < 0.25
