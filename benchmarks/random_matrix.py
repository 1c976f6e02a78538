"""MiniBS measured and predicted, on digits: two losses, three points of training, batch sizes 8 to 512.

python -m benchmarks.random_matrix
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eoss.demo import digits
from lightning_eoss.measurements.prediction import SharpnessPrediction, predict_sharpness
from lightning_eoss.measurements.sharpness import measure_sharpness

SIZES = (8, 16, 32, 64, 128, 256, 512)
POINTS = {"init": 0, "epoch 5": 5, "epoch 150": 150}
MODELS = ("wigner", "marchenko_pastur", "subspace")


def squared_error(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(-1).mean() / 2


def cross_entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


LOSSES: dict[str, Callable[[nn.Module, list[Tensor]], Tensor]] = {
    "squared error": squared_error,
    "cross entropy": cross_entropy,
}


@dataclass(frozen=True)
class Row:
    """One batch size at one point of training."""

    loss: str
    point: str
    batch_size: int
    full: float
    measured: float
    stderr: float
    predicted: dict[str, float]  # model to MiniBS
    trusted: dict[str, bool]
    covered: bool  # whether the subspace's interval and the measured one meet

    def error(self, model: str) -> float:
        """Relative."""
        return self.predicted[model] / self.measured - 1


def trained(loss: str, epochs: int, *, seed: int = 0) -> nn.Module:
    """A network of 1,482 parameters after so many epochs of SGD with b = 32."""
    inputs, targets = digits().tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(32):
                optimizer.zero_grad()
                LOSSES[loss](model, [inputs[chosen], targets[chosen]]).backward()
                optimizer.step()
    return model


def rows(loss: str, point: str, sizes: tuple[int, ...] = SIZES, *, num_batches: int = 300) -> Iterator[Row]:
    """Measures and predicts at one point."""
    model, data = trained(loss, POINTS[point]), digits()
    predicted: SharpnessPrediction = predict_sharpness(model, LOSSES[loss], data, batch_sizes=sizes)
    for index, size in enumerate(sizes):
        found = measure_sharpness(
            model, LOSSES[loss], data, batch_size=size, rel_error=0.01, num_batches=num_batches, tol=0.005
        ).mini_batch
        each = {name: getattr(predicted, name)[index] for name in MODELS}
        own = each["subspace"].estimate
        yield Row(
            loss,
            point,
            size,
            predicted.full_batch.value,
            found.mean,
            found.stderr,
            {name: prediction.estimate.mean for name, prediction in each.items()},
            {name: prediction.trusted for name, prediction in each.items()},
            own.lower <= found.upper and found.lower <= own.upper,
        )


def table() -> str:
    """The Markdown table, errors in %, with a question mark where the prediction says itself that it is not trusted."""
    lines = [
        "| loss | at | b | FullBS | MiniBS | Wigner (Theorem 4) | Marchenko-Pastur (Theorem 7) | subspace | interval |",
        "|---" * 9 + "|",
    ]
    found = [row for loss in LOSSES for point in POINTS for row in rows(loss, point)]
    for row in found:
        errors = " | ".join(f"{row.error(name):+.1%}{'' if row.trusted[name] else '?'}" for name in MODELS)
        lines.append(
            f"| {row.loss} | {row.point} | {row.batch_size} | {row.full:.3f} | {row.measured:.3f} +- {row.stderr:.3f} "
            f"| {errors} | {'meets' if row.covered else 'misses'} |"
        )
    large = [row for row in found if row.batch_size >= 32]
    for name in MODELS:
        errors = [abs(row.error(name)) for row in large]
        lines.append(f"\n{name}, b >= 32: median error {median(errors):.1%}, worst {max(errors):.1%}.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
