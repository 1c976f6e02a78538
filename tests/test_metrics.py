"""The metric is a shell: it must give what the formulas give, however the values arrive."""

import math
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_eoss.metrics import MiniBatchSharpness
from lightning_eoss.theory.statistics import control_variate_estimate, mean_estimate, moments

KEYS = ["mean", "lower", "upper", "stderr"]


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    controls = 5 + torch.randn(30, generator=generator)
    return 2 * controls + torch.randn(30, generator=generator), controls


def test_matches_the_formulas_in_any_rounds(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    values, controls = sample
    metric = MiniBatchSharpness(control_mean=5.0)
    for part in (slice(0, 10), slice(10, 13), slice(13, 30)):
        metric.update(values[part], controls[part])
    expected = control_variate_estimate(moments(values, controls), 5.0)
    assert expected.mean != pytest.approx(mean_estimate(moments(values)).mean)
    computed = metric.compute()
    assert list(computed) == KEYS
    assert [value.item() for value in computed.values()] == pytest.approx([getattr(expected, key) for key in KEYS])
    assert metric.estimate().mean == computed["mean"].item()


def test_without_a_known_control_mean_the_plain_mean(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = MiniBatchSharpness()
    metric.update(*sample)
    assert metric.estimate() == mean_estimate(moments(sample[0]))
    metric.control_mean = 5.0
    assert metric.estimate() == control_variate_estimate(moments(*sample), 5.0)


def test_confidence(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = MiniBatchSharpness(confidence=0.5)
    metric.update(sample[0])
    assert metric.estimate() == mean_estimate(moments(sample[0]), confidence=0.5)


def test_what_is_not_finite_is_counted_and_left_out(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    values, controls = sample
    spoilt = values.clone()
    spoilt[3], spoilt[7], spoilt[8] = math.nan, math.inf, -math.inf
    finite = spoilt.isfinite()
    metric = MiniBatchSharpness(control_mean=5.0)
    metric.update(spoilt, controls)
    assert metric.num_dropped == 3
    assert metric.estimate() == control_variate_estimate(moments(values[finite], controls[finite]), 5.0)
    metric.reset()
    assert metric.num_dropped == 0 and metric.moments.tolist() == [0.0] * 6


def test_a_control_that_is_not_finite_costs_the_control_variate_alone(
    sample: tuple[torch.Tensor, torch.Tensor],
) -> None:
    values, controls = sample
    metric = MiniBatchSharpness(control_mean=5.0)
    metric.update(values, torch.where(torch.arange(30) == 4, math.nan, controls))
    assert metric.num_dropped == 0
    assert metric.estimate() == mean_estimate(moments(values))


@pytest.mark.parametrize("controls", [torch.ones(1), torch.ones(3, 2), torch.ones(())])
def test_every_value_needs_its_control(controls: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"controls must be shaped as values, \(3,\)"):
        MiniBatchSharpness().update(torch.ones(3), controls)


def test_one_value_has_no_interval() -> None:
    metric = MiniBatchSharpness()
    metric.update(torch.tensor(2.0))
    computed = metric.compute()
    assert computed.pop("mean") == 2.0
    assert all(value.isnan() for value in computed.values())


def test_only_values_that_are_not_finite_leave_nothing() -> None:
    metric = MiniBatchSharpness()
    metric.update(torch.tensor([math.nan]))
    assert all(value.isnan() for value in metric.compute().values()) and metric.num_dropped == 1


def test_serves_as_any_metric(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The batch's own value from forward, a clone, a pickle, a collection, a step to another precision."""
    values, _ = sample
    metric = MiniBatchSharpness()
    first = metric(values[:10])
    second = metric(values[10:])
    assert first["mean"].item() == pytest.approx(values[:10].double().mean().item())
    assert second["mean"].item() == pytest.approx(values[10:].double().mean().item())
    assert metric.compute()["mean"].item() == pytest.approx(values.double().mean().item())
    assert pickle.loads(pickle.dumps(metric)).estimate() == metric.clone().estimate() == metric.estimate()
    collection = MetricCollection({"sharpness": MiniBatchSharpness()})
    collection.update(values)
    assert "mean" in {name.split("_")[-1] for name in collection.compute()}


def test_sums_of_processes_add(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What torchmetrics does across processes, by a gather that stands for two of them."""
    values, controls = sample
    parts = [(values[:12], controls[:12]), (values[12:], controls[12:])]
    others = [MiniBatchSharpness() for _ in parts]
    for other, part in zip(others, parts, strict=True):
        other.update(*part)

    def gather(state: torch.Tensor, group: object = None) -> list[torch.Tensor]:
        name = "moments" if state.shape == (6,) else "num_dropped"
        return [getattr(other, name) for other in others]

    metric = MiniBatchSharpness(
        control_mean=5.0, dist_sync_fn=gather, distributed_available_fn=lambda: True, sync_on_compute=True
    )
    metric.update(*parts[0])
    expected = control_variate_estimate(moments(values, controls), 5.0)
    assert metric.compute()["upper"].item() == pytest.approx(expected.upper)
    assert metric.estimate().mean != pytest.approx(expected.mean)  # its own share again
