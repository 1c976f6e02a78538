"""Is it the size of its noise, or where it points to, that keeps SGD below the edge? Descent with three noises.

Run `python papers/noisy_gradient_descent.py --out pictures` (two minutes on one core; `--quick` for a coarse look).
The picture answers to Figure 10 of Andreyev and Beneventano, "Edge of Stochastic Stability", section 5.1, and says in
a sentence below itself where it agrees with print and where not.

A small network on scikit-learn's digits takes steps of SGD, and steps of full-batch gradient descent with Gaussian
noise. That has the covariance of the batch gradient at the very same weights, or its diagonal alone, or its trace
alone, the same in all directions. In a Trainer, `GradientNoiseInjector` does so to any network.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import TensorDataset

from common import Picture, main, network, of_model, squared_error
from lightning_eoss import measure_sharpness
from lightning_eoss.demo import digits
from lightning_eoss.display.figures import BLUE, GREEN, GREY, INK, VERMILLION, blank
from lightning_eoss.theory.gradient_noise import Noise, gradient_with_noise

RATE, BATCH_SIZE = 1.0, 16
RUNS = {  # what a step goes by, and how it is drawn
    "SGD": (INK, "-", f"SGD (b = {BATCH_SIZE})"),
    "full": (BLUE, "-", "GD + full covariance"),
    "diagonal": (GREEN, "-", "GD + its diagonal"),
    "isotropic": (VERMILLION, "-", "GD + isotropic"),
    "GD": (GREY, "--", "GD (no noise)"),
}


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured."""

    samples: int = 512
    steps: int = 1500
    points: int = 20
    batches: int = 40  # for each mean


QUICK = Effort(128, 60, 4, 10)


def sample_gradients(model: nn.Module, data: TensorDataset) -> Iterator[Tensor]:
    """(k, P) blocks, small enough for a processor's cache."""

    def loss(parameters: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return squared_error(functional_call(model, parameters, (image[None],)), target[None])

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for images, targets in zip(*(tensor.split(128) for tensor in data.tensors), strict=True):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, targets)
        yield torch.cat([each.flatten(1) for each in gradients.values()], 1)


def step_gradient(model: nn.Module, data: TensorDataset, kind: str, generator: torch.Generator) -> Tensor:
    """(P,) what a step goes by."""
    if kind in get_args(Noise):
        given = {"noise": kind, "batch_size": BATCH_SIZE, "generator": generator}
        mean, noise = gradient_with_noise(sample_gradients(model, data), len(data), **given)
        return mean + noise
    chosen = torch.randperm(len(data), generator=generator)[: BATCH_SIZE if kind == "SGD" else None]
    images, targets = (tensor[chosen] for tensor in data.tensors)
    loss = squared_error(model(images), targets)
    return parameters_to_vector(torch.autograd.grad(loss, tuple(model.parameters())))


def trained(effort: Effort, data: TensorDataset, kind: str) -> dict[int, tuple[float, ...]]:
    """Trains, and measures the three kinds of sharpness on the way; a run that diverges ends early."""
    model, generator, found = network(scale=0.5), torch.Generator().manual_seed(0), {}
    stops = {round(effort.steps * point / effort.points) for point in range(effort.points + 1)}
    for step in range(effort.steps + 1):
        weights = parameters_to_vector(model.parameters()).detach()
        if not weights.isfinite().all():
            break
        if step in stops:
            given = {"batch_size": BATCH_SIZE, "num_batches": effort.batches}
            seen = measure_sharpness(model, of_model(squared_error), data, **given)
            found[step] = (seen.full_batch.value, seen.directional.mean, seen.mini_batch.mean)
        vector_to_parameters(weights - RATE * step_gradient(model, data, kind, generator), model.parameters())
    return found


def figure_10(effort: Effort) -> tuple[object, str]:
    """The three kinds of sharpness against step, for each kind of step."""
    data, limit, settled = digits(effort.samples), 2 / RATE, {}
    with blank(11, 5.6) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for kind, (color, style, label) in RUNS.items():
            found = trained(effort, data, kind)
            for axes, values in zip(panels, zip(*found.values(), strict=True), strict=True):
                axes.plot(list(found), values, style, color=color, label=label)
            late = [values for step, values in found.items() if step >= effort.steps / 2]
            settled[kind] = [fmean(values) / limit for values in zip(*late, strict=True)] or [math.inf] * 3
        for axes, title in zip(panels, ("FullBS", "directional sharpness", "MiniBS"), strict=True):
            axes.axhline(limit, ls=":", color=INK, lw=1.5, label="2 / learning rate")
            axes.set(xlabel="step", title=title if title == "FullBS" else f"{title}, b = {BATCH_SIZE}")
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("sharpness")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    below = [RUNS[kind][2] for kind, (full, *_) in settled.items() if full < 0.9]
    each = "; ".join(f"{RUNS[kind][2]}: {full:.2f}" for kind, (full, *_) in settled.items())
    (_, *own), (_, *imitated) = settled["SGD"], settled["full"]
    return figure, (
        "Print has FullBS settle well below 2/lr only with SGD and with noise that keeps its directions, the full "
        f"covariance. In the second half, over 2/lr: {each}. Below 0.9: {' and '.join(below) or 'none'}. "
        f"Directional sharpness and MiniBS are at {imitated[0]:.2f} and {imitated[1]:.2f} with the full covariance, at "
        f"{own[0]:.2f} and {own[1]:.2f} with SGD. One network, one seed."
    )


def pictures(effort: Effort) -> Iterator[Picture]:
    yield "figure_10_noisy_gradient_descent", *figure_10(effort)


if __name__ == "__main__":
    main(__doc__, pictures, effort=Effort(), quick=QUICK)
