"""How far training goes from where it began, and the potential that it walks in.

Run `python papers/random_walk.py --out pictures` (two minutes on one core; `--quick` for a coarse look).
Each picture answers to figures of Hoffer, Hubara and Soudry, "Train longer, generalize better", and says in a sentence
below itself where it agrees with print and where not:

* `distance`: Figures 2 and 4, the distance from initialisation for several batch sizes, at one learning rate and at
  rates that follow the square root of the batch size;
* `potential`: appendix B, Figure 1, loss differences against distance.

The network is a small one, the data scikit-learn's digits; theirs were ResNets on CIFAR-10.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from common import FAINT, Picture, classes, main, of_model, quiet_trainer
from lightning_eoss.callbacks.weights import WeightDistanceMonitor
from lightning_eoss.display import tags
from lightning_eoss.display.figures import BLUE, GREEN, GREY, INK, VERMILLION, blank
from lightning_eoss.measurements.potential import RandomPotential, measure_random_potential
from lightning_eoss.theory.random_walk import SINCE, DistanceLaws

COLORS = (BLUE, GREEN, VERMILLION, INK)
BASE, RATE = 64, 0.1  # batch size and learning rate that the others follow


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured."""

    steps: int = 3000
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)
    points: int = 20  # looks in a decade
    directions: int = 100
    distances: int = 22


QUICK = Effort(300, (16, 256), 20, 12, 9)

cross_entropy = of_model(F.cross_entropy)


def network(*, norm: bool = True) -> nn.Module:
    """With BatchNorm and Glorot and Bengio's initial weights, as theirs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(64, 64), *([nn.BatchNorm1d(64)] if norm else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


class Digits(LightningModule):
    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.net = network()
        self.learning_rate = learning_rate

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return cross_entropy(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@dataclass(frozen=True)
class Walk:
    """What was seen of one training."""

    steps: list[int]
    distances: list[float]
    laws: DistanceLaws
    angle: float  # median, from step 30 on


def walk(effort: Effort, data: TensorDataset, batch_size: int, learning_rate: float) -> Walk:
    monitor = WeightDistanceMonitor(points_per_decade=effort.points)
    # All steps in one long epoch, and batches by a list of indices: large batches would spend their time on epochs.
    order = RandomSampler(data, num_samples=(effort.steps + 1) * batch_size, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(data, batch_size=None, sampler=BatchSampler(order, batch_size, drop_last=False))
    quiet_trainer(max_steps=effort.steps + 1, callbacks=[monitor]).fit(Digits(learning_rate), loader)
    seen = monitor.history
    angles = [each[tags.WEIGHTS_ANGLE] for each in seen if each["step"] >= SINCE]
    steps = [int(each["step"]) for each in seen]
    return Walk(steps, [each[tags.WEIGHTS_DISTANCE] for each in seen], monitor.latest, float(np.median(angles)))


def distance_figure(effort: Effort, data: TensorDataset) -> tuple[object, str, float]:
    """Distance against step, for each batch size, with both laws."""
    titles = {"one": f"one learning rate, {RATE}", "root": f"learning rate {RATE} $\\sqrt{{b / {BASE}}}$"}
    walks: dict[str, list[Walk]] = {"one": [], "root": []}
    with blank(10, 5.2) as figure:
        for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
            for color, size in zip(COLORS, effort.batch_sizes, strict=False):
                rate = RATE * (math.sqrt(size / BASE) if kind == "root" else 1)
                found = walk(effort, data, size, rate)
                walks[kind].append(found)
                t, laws = np.array([each for each in found.steps if each >= SINCE]), found.laws
                label = f"b = {size}: $R^2$ {laws.log_r2:.3f}, power {laws.power_r2:.3f}"
                axes.plot(found.steps, found.distances, "o", ms=3.5, mew=0, color=color, label=label)
                axes.plot(t, laws.intercept + laws.slope * np.log(t), color=color, lw=1.5)
                axes.plot(t, laws.factor * t**laws.exponent, ":", color=color, lw=1.5)
            axes.set(xscale="log", xlabel="step t", title=title)
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left", fontsize=9, handletextpad=0.2)
        figure.axes[0].set_ylabel("distance $|w_t - w_0|$")
        handles = [figure.axes[0].plot([], [], style, color=GREY, lw=1.5)[0] for style in ("-", ":")]
        names = [f"a + c log t, fitted from step {SINCE} on", "power law, fitted to the same"]
        figure.legend(handles, names, loc="outside upper center", ncols=2)
    both = [each for these in walks.values() for each in these]
    better = sum(each.laws.log_r2 > each.laws.power_r2 for each in both)
    ends = {kind: [each.distances[-1] for each in these] for kind, these in walks.items()}
    one, root = (max(each) / min(each) for each in (ends["one"], ends["root"]))
    exponents, angles = [each.laws.exponent for each in both], [each.angle for each in both]
    logs, powers = ([getattr(each.laws, name) for each in both] for name in ("log_r2", "power_r2"))
    sentence = (
        f"Print has log t whatever the batch size. Here log t explains {min(logs):.1%} to {max(logs):.1%} of the "
        f"variance, a power law (t^{min(exponents):.2f} to t^{max(exponents):.2f}) {min(powers):.1%} to "
        f"{max(powers):.1%}, and log t is better in {better} of {len(both)}. Print has the square-root rule bring the "
        f"curves together: here the last distances differ by a factor of {root:.2f} with it and of {one:.2f} without. "
        f"From look to look the path turns by {min(angles):.0f} to {max(angles):.0f} degrees (median): 90 is random."
    )
    return figure, sentence, max(each.distances[-1] for each in both)


def potential_figure(effort: Effort, data: TensorDataset, farthest: float) -> tuple[object, str]:
    """RMS and standard deviation of the loss differences at initialisation, to five times as far as training went."""
    distances = [*np.geomspace(0.05, farthest, effort.distances - 5), *np.geomspace(farthest, 5 * farthest, 6)[1:]]
    titles = {True: "with BatchNorm, as in print", False: "without"}
    ratios, texts = {}, {}
    with blank(10, 5.6) as figure:
        for axes, (norm, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
            found: RandomPotential = measure_random_potential(
                network(norm=norm), cross_entropy, data, distances=distances, num_directions=effort.directions
            )
            z, line = np.array(found.distances), found.taylor_slope * np.array(found.distances)
            texts[norm] = []
            series = (("RMS", found.rms, found.rms_exponent, BLUE), ("std", found.std, found.std_exponent, VERMILLION))
            for name, values, exponent, color in series:
                mean, first = np.array([each.mean for each in values]), found.beyond_taylor(values)
                ends = [[each.lower for each in values], [each.upper for each in values]]
                axes.plot(z, mean, "o", ms=4, mew=0, color=color, label=f"{name} of the loss difference, 95 %")
                axes.fill_between(z, *ends, color=color, **FAINT)
                ratios[norm, name] = float(np.interp(farthest, z, mean / line))
                if math.isfinite(exponent.mean):
                    shape = z[first:] ** exponent.mean
                    text = f"$z^{{{exponent.mean:.2f} \\pm {exponent.upper - exponent.mean:.2f}}}$"
                    scale = np.exp(np.mean(np.log(mean[first:] / shape)))
                    axes.plot(z[first:], scale * shape, color=color, lw=1.5, label=f"{name} beyond: {text}")
                    texts[norm].append(f"{name} z^{exponent.mean:.1f}")
            axes.plot(z, line, "--", color=INK, lw=1.5, label="Taylor: $z\\,|g| / \\sqrt{P}$")
            axes.axvline(farthest, color=GREY, lw=1.2, ls=":", label=f"as far as training went, {farthest:.3g}")
            axes.set(xscale="log", yscale="log", xlabel="distance z from the initial weights", title=title)
            axes.legend(loc="upper left", fontsize=9)
        figure.axes[0].set_ylabel("loss difference (cross entropy)")
    beyond = {norm: " and ".join(each) or "no power beyond it to fit" for norm, each in texts.items()}
    return figure, (
        "Print has the RMS (there called std) linear in z as far as training goes, hence alpha = 2. Here, that far "
        f"out, it is {ratios[True, 'RMS']:.2f} of Taylor's line with BatchNorm (std {ratios[True, 'std']:.2f}) and "
        f"{ratios[False, 'RMS']:.1f} without (std {ratios[False, 'std']:.1f}). Near the line linearity is that of any "
        f"smooth loss, and tells no alpha; farther out: {beyond[True]} with BatchNorm, {beyond[False]} without."
    )


def pictures(effort: Effort) -> Iterator[Picture]:
    data = classes(1797)
    figure, sentence, farthest = distance_figure(effort, data)
    yield "distance", figure, sentence
    yield "potential", *potential_figure(effort, data, farthest)


if __name__ == "__main__":
    main(__doc__, pictures, effort=Effort(), quick=QUICK)
