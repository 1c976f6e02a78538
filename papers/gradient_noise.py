"""How much the gradient of a mini-batch scatters while SGD goes on, and how that depends on the batch size.

Run `python papers/gradient_noise.py --out pictures` (a minute on one core; `--quick` for a coarse look).
Each picture answers to a figure of "The Impact of the Mini-batch Size on the Dynamics of SGD: Variance and Beyond", and
says in a sentence below itself where it agrees with print and where not:

* `figure_2_linear_regression`: Figure 2. The variance is known exactly at every step, without a single run;
* `figure_3_two_layers`: Figure 3. It is known at the first step;
* `figure_4_digits`: Figures 1, 4 and 5, a network that no theorem covers.

As in print the variance at step t is over everything that was drawn from one set of initial weights on, the batches of
all steps before t included. Data are scikit-learn's diabetes and digits, where theirs were admissions and MNIST.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from batch_noise import regression_noise, two_layer_polynomials
from common import FAINT, Picture, main
from lightning_eoss.display.figures import BLUE, GREEN, GREY, INK, VERMILLION, blank
from lightning_eoss.theory.gradient_noise import sampling_factor

COLORS = (VERMILLION, GREEN, BLUE, INK)
SIZES = (4, 16, 64, 256)
TRAINING = 11 * 128  # of the 1,797 digits


@dataclass(frozen=True)
class Effort:
    """How much is drawn and trained."""

    runs: int = 1000  # of SGD, for each batch size
    steps: int = 200
    starts: int = 5  # initial weights of the digits network
    repeats: int = 20  # runs from each
    epochs: int = 30  # with the smaller batches
    looks: int = 2  # epochs between two


QUICK = Effort(200, 60, 3, 4, 4, 2)


def variance(draws: Tensor) -> Tensor:
    """Of (runs, ...) vectors or matrices: the trace of their covariance."""
    return draws.flatten(1).var(0).sum()


def looks(steps: int) -> list[int]:
    """Where points are drawn: evenly on a logarithmic axis that begins at step 0."""
    return sorted({round(t) - 1 for t in np.geomspace(1, steps + 1, 12)})


# ---- their Figure 2: linear regression -------------------------------------------------------------------------------


def sgd_on_regression(
    inputs: Tensor, targets: Tensor, batch_size: int, rates: list[float], runs: int
) -> tuple[Tensor, Tensor]:
    """(T,) variances of the batch's and of the full gradient, over many runs from weights 0 at once."""
    generator, count = torch.Generator().manual_seed(batch_size), len(inputs)
    weights, found = torch.zeros(runs, inputs.shape[1]).double(), []
    for rate in rates:
        residuals = weights @ inputs.T - targets
        chosen = torch.rand(runs, count, generator=generator).topk(batch_size, sorted=False).indices
        batch = torch.zeros_like(residuals).scatter_(1, chosen, residuals.gather(1, chosen)) @ inputs / batch_size
        found.append(torch.stack([variance(batch), variance(residuals @ inputs / count)]))
        weights -= rate * batch
    batch_variance, full_variance = torch.stack(found, 1)
    return batch_variance, full_variance


def figure_2(effort: Effort) -> tuple[object, str]:
    """Variance against step and against batch size: the exact recursion, and runs."""
    inputs, targets = load_diabetes(return_X_y=True, scaled=False)
    inputs = np.column_stack([(inputs - inputs.mean(0)) / inputs.std(0), np.ones(len(inputs))])
    targets = (targets - targets.mean()) / targets.std()
    count, start, rates = len(inputs), np.zeros(inputs.shape[1]), [1 / (20 + 2 * t) for t in range(10 * effort.steps)]
    some = np.geomspace(1, count - 1, 20).round().astype(int)
    grid = sorted({*SIZES, *some.tolist(), *(count - some).tolist()})
    exact = {size: regression_noise(inputs, targets, start, batch_size=size, learning_rates=rates) for size in grid}
    given, known = (torch.from_numpy(inputs), torch.from_numpy(targets)), rates[: effort.steps + 1]
    drawn = {size: sgd_on_regression(*given, size, known, effort.runs) for size in SIZES}
    t, off = np.arange(1, len(rates) + 2), []
    with blank(10, 5) as figure:
        by_step, by_size = figure.subplots(1, 2)
        for color, size in zip(COLORS, SIZES, strict=True):
            both = (exact[size].batch_variance, exact[size].gradient_variance)
            for line, points, style in zip(both, drawn[size], ("o-", "s--"), strict=True):
                shown = [each for each in looks(effort.steps) if line[each] > 0]
                by_step.plot(t[line > 0], line[line > 0], style[1:], color=color, lw=1.5)
                by_step.plot(t[shown], points[shown], style[0], color=color, ms=4)
                off += (points.numpy()[shown] / line[shown] - 1).tolist()
            by_step.plot([], [], color=color, label=f"b = {size}")
        for name, style in (("batch's gradient", "o-"), ("full gradient", "s--")):
            by_step.plot([], [], style, color=GREY, ms=4, lw=1.5, label=name)
        for color, at in zip((INK, BLUE, VERMILLION), (0, 10, effort.steps), strict=True):
            by_size.plot(grid, [exact[size].batch_variance[at] for size in grid], color=color, label=f"t = {at}")
            by_size.plot(SIZES, [drawn[size][0][at] for size in SIZES], "o", color=color, ms=5)
        by_step.set(xscale="log", yscale="log", xlabel="step t + 1", ylabel="variance (squared gradient)")
        by_size.set(xscale="log", yscale="log", xlabel=f"batch size b (samples, of {count})")
        by_step.set_title(f"lines: exact; points: {effort.runs:,} runs", fontsize=10)
        by_size.set_title("of the batch's gradient", fontsize=10)
        by_step.legend(loc="lower left", fontsize=9, ncols=2)
        by_size.legend(loc="lower left", fontsize=9)
    each = [exact[size].batch_variance for size in grid]
    falls = np.diff(each, axis=0) < 0
    falls_too = np.diff([exact[size].gradient_variance[1:] for size in grid], axis=0) < 0
    share = np.array([line / sampling_factor(size, count) for size, line in zip(grid, each, strict=True)])
    later = np.mean(np.diff(each, axis=1) < 0)
    error, bend = np.sqrt(np.mean(np.square(off))), (share.max(0) / share.min(0)).max()
    return figure, (
        "Print has both variances fall with b at every step, and the batch's with t. In the exact recursion they do at "
        f"{falls.mean():.0%} and {falls_too.mean():.0%} of all steps and pairs of neighbours among {len(grid)} batch "
        f"sizes, and at {later:.0%} of steps. Runs are within {error:.1%} (RMS). Print fits a polynomial of degree "
        "6 in 1/b: here the variance is (n - b) / (b (n - 1)) times what differs between batch sizes by a factor of "
        f"{bend:.2f} at most."
    )


# ---- their Figure 3: a two-layer linear network ----------------------------------------------------------------------


def sgd_on_two_layers(
    first: Tensor, second: Tensor, target: Tensor, batch_size: int, rates: list[float], runs: int
) -> Tensor:
    """(2, 2, T) variances of the batch's and the full gradient, of each layer, over runs with fresh samples."""
    generator = torch.Generator().manual_seed(batch_size)
    w1, w2, found = first.repeat(runs, 1, 1), second.repeat(runs, 1, 1), []
    for rate in rates:
        x = torch.randn(runs, batch_size, first.shape[1], generator=generator, dtype=first.dtype)
        error = w2 @ w1 - target
        noisy = error @ (x.mT @ x) / batch_size
        batch, full = ((w2.mT @ each, each @ w1.mT) for each in (noisy, error))
        found.append(torch.tensor([[variance(each) for each in batch], [variance(each) for each in full]]))
        w1, w2 = w1 - rate * batch[0], w2 - rate * batch[1]
    return torch.stack(found, -1)


def figure_3(effort: Effort) -> tuple[object, str]:
    """Variance of both layers' gradients against step and against batch size, with the closed form at the start."""
    rng, sizes = np.random.default_rng(0), (1, 2, *SIZES[:-1])
    wide, hidden, narrow = 8, 16, 8
    first, goal_first = (rng.standard_normal((hidden, wide)) / np.sqrt(wide) for _ in range(2))
    second, goal_second = (rng.standard_normal((narrow, hidden)) / np.sqrt(hidden) for _ in range(2))
    target = goal_second @ goal_first
    rates = [1 / (40 + t) for t in range(effort.steps + 1)]
    polynomials = two_layer_polynomials(first, second, target)
    given = [torch.from_numpy(each) for each in (first, second, target)]
    found = {size: sgd_on_two_layers(*given, size, rates, effort.runs) for size in sizes}
    t, last = np.arange(1, len(rates) + 1), effort.steps
    with blank(12, 5) as figure:
        first_axes, second_axes, by_size = figure.subplots(1, 3)
        for layer, axes in enumerate((first_axes, second_axes)):
            for color, size in zip((GREY, *COLORS), sizes, strict=True):
                batch, full = found[size][:, layer]
                axes.plot(t, batch, color=color, lw=1.5, label=f"b = {size}")
                axes.plot(t[1:], full[1:], "--", color=color, lw=1.2)
            axes.set(xscale="log", yscale="log", xlabel="step t + 1", title=f"gradient for $W_{layer + 1}$")
            for color, at in ((INK, 0), (BLUE, 10), (VERMILLION, last)):
                points = [found[size][0, layer, at] for size in sizes]
                label = f"$W_{layer + 1}$, t = {at}"
                by_size.plot(
                    sizes, points, "os"[layer] + ("" if at == 0 else ":"), color=color, ms=5, lw=1, label=label
                )
            fine = np.geomspace(sizes[0], sizes[-1], 50)
            by_size.plot(fine, polynomials[layer](1 / fine), color=INK, lw=1.2)
        by_size.set(xscale="log", yscale="log", xlabel="batch size b (samples)", title="solid: closed form at t = 0")
        first_axes.set_ylabel(f"variance over {effort.runs:,} runs (squared gradient)")
        for name, style in (("batch", "-"), ("full", "--")):
            first_axes.plot([], [], style, color=GREY, lw=1.5, label=f"{name} gradient")
        first_axes.legend(loc="lower left", fontsize=8)
        by_size.legend(loc="lower left", fontsize=8, ncols=2)
    batches = np.array([found[size][0].numpy() for size in sizes])
    fulls = np.array([found[size][1, :, 1:].numpy() for size in sizes])
    closed = np.array([[polynomial(1 / size) for polynomial in polynomials] for size in sizes])
    error = np.sqrt(np.mean(np.square(batches[..., 0] / closed - 1)))
    bend = (batches[0] / batches[-1] / sizes[-1]).max(-1)
    falls, falls_too = (np.mean(np.diff(each, axis=0) < 0) for each in (batches, fulls))
    return figure, (
        "Print has both variances fall with b at all steps, from b = 1 on. Here that of the batch's gradient does at "
        f"{falls:.0%} of steps and pairs of neighbours, that of the full gradient at {falls_too:.0%}. Not in print: at "
        f"t = 0 runs are within {error:.1%} (RMS) of the closed form, proportional to 1/b. Later, higher powers count: "
        f"from b = 1 to {sizes[-1]} the variance falls up to {bend[0]:.1f} ($W_1$) and {bend[1]:.1f} ($W_2$) times as "
        "far as 1/b."
    )


# ---- their Figures 1, 4 and 5: digits --------------------------------------------------------------------------------


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def sgd_on_digits(effort: Effort, batch_size: int, steps: int, every: int, rate: float = 0.05) -> dict[str, Tensor]:
    """(starts, looks) variances and losses, of many networks that train side by side."""
    images, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    images, held_out, runs = images.float() / 8 - 1, slice(TRAINING, None), effort.starts * effort.repeats
    models = [network(seed) for seed in range(effort.starts) for _ in range(effort.repeats)]
    parameters = {name: each.detach() for name, each in stack_module_state(models)[0].items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], parameters, (x,)), y)

    generator, order, found = torch.Generator().manual_seed(0), torch.empty(runs, 0), []
    for step in range(steps + 1):
        if not order.shape[1]:
            order = torch.rand(runs, TRAINING, generator=generator).argsort(1)
        chosen, order = order[:, :batch_size], order[:, batch_size:]
        gradients = vmap(grad(loss))(parameters, images[chosen], labels[chosen])
        if step % every == 0:
            rows = torch.cat([each.flatten(1) for each in gradients.values()], 1).double()
            losses = [
                vmap(loss, in_dims=(0, None, None))(parameters, images[part], labels[part])
                for part in (slice(TRAINING), held_out)
            ]
            by_start = (effort.starts, effort.repeats)
            spread = torch.stack([variance(each) for each in rows.unflatten(0, by_start)])
            found.append(torch.stack([spread, *(each.unflatten(0, by_start).mean(1) for each in losses)]))
        parameters = {name: each - rate * gradients[name] for name, each in parameters.items()}
    return dict(zip(("variance", "training", "validation"), torch.stack(found, -1), strict=True))


def figure_4(effort: Effort) -> tuple[object, str]:
    """Median and range of the log variance over initial weights, and the losses."""
    per_epoch = TRAINING // 64
    every, steps = per_epoch * effort.looks // 2, per_epoch * effort.epochs
    found = {size: sgd_on_digits(effort, size, steps, every) for size in (64, 128)}
    colors = {64: VERMILLION, 128: BLUE}
    with blank(12, 5) as figure:
        by_step, by_epoch, loss = figure.subplots(1, 3)
        for size, series in found.items():
            step = every * np.arange(series["variance"].shape[1])
            for axes, x in ((by_step, step), (by_epoch, step * size / TRAINING)):
                low, middle, high = series["variance"].quantile(torch.tensor([0, 0.5, 1]).double(), dim=0)
                axes.plot(x, middle, color=colors[size], label=f"b = {size}")
                axes.fill_between(x, low, high, color=colors[size], **FAINT)
            for name, style in (("training", "-"), ("validation", "--")):
                middle = series[name].median(0).values
                loss.plot(step * size / TRAINING, middle, style, color=colors[size], label=f"b = {size}, {name}")
        for axes, x in ((by_step, "step"), (by_epoch, "epoch"), (loss, "epoch")):
            axes.set(xlabel=x, yscale="log")
            axes.legend(loc="upper right" if axes is loss else "lower right", fontsize=9)
        by_step.set_ylabel(f"variance over {effort.repeats} runs (squared gradient)")
        by_step.set_title(f"median and range of {effort.starts} starts", fontsize=10)
        by_epoch.set_title("the same, against epochs as in print", fontsize=10)
        loss.set_title("cross entropy, median of the starts", fontsize=10)
    small, large = found.values()
    texts, half = [], (small["variance"].shape[1] + 1) // 2
    for what, (first, second) in {
        "step": (slice(None), slice(None)),
        "epoch": (slice(None, None, 2), slice(half)),  # an epoch of the smaller batches has twice the steps
    }.items():
        a, b = small["variance"][:, first], large["variance"][:, second]
        apart = a.amin(0) > b.amax(0)
        ratio = (a.median(0).values / b.median(0).values).median()
        drop = large["training"].mean(0)[second] / small["training"].mean(0)[first] - 1
        texts.append(
            f"at the same {what} the ranges are apart at {int(apart.sum())} of {len(apart)} looks (medians differ by "
            f"a factor of {ratio:.2f}), and the training loss at 128 is lower at {int((drop < 0).sum())} (in the end "
            f"{drop[-1]:+.1%})"
        )
    return figure, (
        "Print has even the smallest variance of five starts at b = 64 above the largest at 128, at all epochs, and "
        f"the training loss fall with b. Here, {'; '.join(texts)}, having taken half the steps."
    )


def pictures(effort: Effort) -> Iterator[Picture]:
    yield "figure_2_linear_regression", *figure_2(effort)
    yield "figure_3_two_layers", *figure_3(effort)
    yield "figure_4_digits", *figure_4(effort)


if __name__ == "__main__":
    main(__doc__, pictures, effort=Effort(), quick=QUICK)
