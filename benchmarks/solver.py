"""What warm starts cost and how far the values are off: products per mini-batch, passes over the data, bias.

The network is the baseline of the Edge of Stochastic Stability (3072-512-512-10, P = 1.84 M) with its loss, on 2048
synthetic samples, after 300 steps of SGD. Measured from scratch there, then 20 and 200 steps later from what was found.

    python -m benchmarks.solver
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eoss.curvature.batches import DatasetSource, full_batch, random_batches
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.operators import Sequential
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.curvature.seeds import Use, derived_seed
from lightning_eoss.curvature.solver import COLD, Plan, Solver
from lightning_eoss.isolation.isolate import isolated
from lightning_eoss.linalg.lanczos import lanczos
from lightning_eoss.measurements.sharpness import sharpness

BATCH, SAMPLES = 32, 2048


@dataclass(frozen=True)
class Setting:
    """Synthetic data: normal inputs around a common mean, as pixels have one, and labels from a linear teacher."""

    name: str
    mean: float
    scale: float
    learning_rate: float


PIXELS = Setting("inputs with a mean", mean=0.25, scale=0.75, learning_rate=0.015)
CENTRED = Setting("centred inputs, near-degenerate outliers", mean=0.0, scale=1.0, learning_rate=0.05)


@dataclass(frozen=True)
class Row:
    """One warm measurement against its reference."""

    setting: str
    steps: int  # after the measurement that it starts from
    full: float  # FullBS
    full_error: float  # relative
    passes: int
    mini: float  # MiniBS over the batches that were drawn
    mini_error: float  # relative, against a residual of 0.1 % on the same batches
    worst: float  # the same of one batch
    products: float  # median per mini-batch
    audit: float


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (model(inputs) - targets).square().sum(-1).mean() / 2


def measured(setting: Setting, moments: tuple[int, ...] = (20, 200), *, batches: int = 16) -> Iterator[Row]:
    """Trains, measures from scratch, and again at each of the moments, every time from that first measurement."""
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(SAMPLES, 3072, generator=generator) + setting.mean) * setting.scale
    teacher = torch.randn(3072, 10, generator=generator)
    targets = F.one_hot(((inputs - inputs.mean()) @ teacher).argmax(1), 10).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), setting.learning_rate)

    def train(steps: int) -> None:
        for _ in range(steps):
            chosen = torch.randint(SAMPLES, (BATCH,), generator=generator)
            optimizer.zero_grad()
            loss_of(model, inputs[chosen], targets[chosen]).backward()
            optimizer.step()

    train(300)
    source = DatasetSource(torch.utils.data.TensorDataset(inputs, targets))
    plan = Plan(BATCH, num_batches=batches, rel_error=0.05, full_batch_samples=None)
    warm, done = COLD, 0
    for stream, moment in enumerate((0, *moments)):
        train(moment - done)
        done = moment
        with isolated(model) as isolation:
            objective = Objective(model, lambda batch: loss_of(model, *batch), source, isolation)
            findings = preflight(objective, BATCH)
            if moment == 0:
                _, warm = sharpness(Solver(objective, plan, findings, stream=stream), mini=False)
                continue
            found, now = sharpness(Solver(objective, plan, findings, stream=stream), warm)
            assert now.top is not None
            true, full = reference(objective, plan, now.top, len(found.plain.values), stream)
        errors = torch.tensor(found.plain.values).double() / true - 1
        yield Row(
            setting.name,
            moment,
            full,
            found.full_batch.value / full - 1,
            found.full_passes,
            float(true.mean()),
            found.plain.mean / float(true.mean()) - 1,
            float(errors.min()),
            found.products_per_batch,
            found.audit,
        )


def reference(objective: Objective, plan: Plan, top: Tensor, count: int, stream: int) -> tuple[Tensor, float]:
    """lambda_max of the batches that `sharpness` drew, and FullBS, to residuals of 0.1 %."""
    stream_of = random_batches(objective.source, BATCH, seed=derived_seed(plan.seed, Use.MINI_BATCHES, stream))
    drawn = list(islice(stream_of, count))
    noise = torch.randn(1, len(top), generator=torch.Generator().manual_seed(7)).to(top)
    start = top + 0.3 * noise / noise.norm()
    operator = Sequential(objective, drawn)
    mini = lanczos(operator.matvec, start.expand(count, -1), tol=1e-3, min_steps=5, restrict=operator.restrict)
    full = lanczos(Sequential(objective, [full_batch(objective.source, 256)]).matvec, start, tol=1e-3, min_steps=5)
    assert bool(mini.converged.all()) and bool(full.converged.all())
    return mini.values[:, 0], float(full.values[0, 0])


def table() -> str:
    """The Markdown table."""
    lines = [
        "| data | steps | FullBS | its error | passes | MiniBS | its error | worst batch | products | audit |",
        "|---" * 10 + "|",
    ]
    for setting in (PIXELS, CENTRED):
        for row in measured(setting):
            lines.append(
                f"| {row.setting} | {row.steps} | {row.full:.2f} | {row.full_error:+.2%} | {row.passes} "
                f"| {row.mini:.2f} | {row.mini_error:+.2%} | {row.worst:+.2%} | {row.products:g} | {row.audit:+.2%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
