"""How learning rates follow the batch size, the edge and the spectrum, in pictures.

Run `python papers/learning_rate.py --out pictures` (five minutes on one core; `--quick` for a coarse look).
Each picture answers to figures in print, and says in a sentence below itself where it agrees and where not:

* Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size": Figures 12 and 21 (SGD), 20 and 22 (Adam),
  17 and 18 (rates learned from the spectrum);
* Andreyev and Beneventano, "Edge of Stochastic Stability": Figures 3 to 5 (changes in mid-training).

The networks are small, the data scikit-learn's digits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, WeightAveraging
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset

from common import FAINT, Loss, Picture, decay, main, network, of_model, quiet_trainer, squared_error
from lightning_eoss import LearningRateRescaler, SharpnessMonitor, SpectralLearningRate, measure_sharpness
from lightning_eoss.demo import DigitsMLP, digits
from lightning_eoss.display import tags
from lightning_eoss.display.figures import BLUE, GREEN, GREY, INK, VERMILLION, blank
from lightning_eoss.theory.random_matrix import BatchSizeCurve, fit_batch_size_curve
from lightning_eoss.theory.scaling import curve_factor, scale_learning_rate


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured."""

    sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)  # batch sizes of the sweeps
    base: int = 32  # that the rules start from
    seeds: int = 3
    epochs: int = 20
    steps: int = 2304  # of runs with a change, at a sixth, a third or half of them
    every: int = 96  # steps between two measurements, one of them at the change
    batches: int = 25  # for each measurement, at most
    learned_epochs: int = 120
    tuning: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)  # initial rates for the schedule


QUICK = Effort((16, 64, 256), 64, 1, 5, 192, 32, 4, 15, (0.3,))


# ---- how far the rules reach: Figures 12 and 21, 20 and 22 -----------------------------------------------------------


LOSSES: dict[str, Loss] = {"cross entropy": F.cross_entropy, "squared error": squared_error}
GRIDS = {  # of learning rates, in powers of two
    ("SGD", "cross entropy"): (-2, 6),
    ("SGD", "squared error"): (-3, 2),
    ("Adam", "cross entropy"): (-7, 1),
    ("Adam", "squared error"): (-8, 1),
}
RULES = {"linear": VERMILLION, "sqrt": GREEN}
STABLE = 0.5  # chosen before anything was seen: a rate is stable if training brings the loss below half of its start


def sweep(optimizer: str, loss: Loss, batch_size: int, rates: np.ndarray, effort: Effort) -> tuple[np.ndarray, Tensor]:
    """Trains a network for each rate and seed, all at once.

    Rates share the weights and the batches of their seed. Adam has torch's defaults: memories .9 and .999, eps 1e-8.

    Returns:
        The last epoch's loss in units of the first batch's, and the last weights: (rates, seeds).
    """
    model, data = network(), digits()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def batch_loss(weights: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        pieces = weights.split([shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return loss(functional_call(model, named, (images,)), targets)

    gradients = vmap(grad_and_value(batch_loss))
    generator = torch.Generator().manual_seed(0)
    models = [network(seed=seed) for seed in range(effort.seeds)]
    starts = torch.stack([parameters_to_vector(each.parameters()).detach() for each in models])
    weights = starts.repeat(len(rates), 1)
    rate = torch.tensor(rates, dtype=weights.dtype).repeat_interleave(effort.seeds)[:, None]
    mean, square, step, first = torch.zeros_like(weights), torch.zeros_like(weights), 0, None
    for _ in range(effort.epochs):
        orders = torch.stack([torch.randperm(len(data), generator=generator) for _ in range(effort.seeds)])
        losses = []
        for chosen in orders.split(batch_size, dim=1):
            gradient, value = gradients(weights, *(tensor[chosen.repeat(len(rates), 1)] for tensor in data.tensors))
            losses.append(value)
            first = value if first is None else first
            step += 1
            if optimizer == "Adam":
                mean = mean.lerp(gradient, 0.1)
                square = square.mul(0.999).addcmul(gradient, gradient, value=0.001)
                gradient = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            weights = weights - rate * gradient
    last = (torch.stack(losses).mean(0) / first).nan_to_num(np.inf)
    return last.view(len(rates), -1).numpy(), weights.view(len(rates), effort.seeds, -1)


def sharpness_curve(weights: Tensor, loss: Loss, effort: Effort) -> BatchSizeCurve:
    """MiniBS over the batch size."""
    model, data = network(), digits()
    vector_to_parameters(weights, model.parameters())
    given = {"rel_error": 0.02, "num_batches": 2 * effort.batches}
    measured = [measure_sharpness(model, of_model(loss), data, batch_size=size, **given) for size in effort.sizes]
    mini = [each.mini_batch for each in measured]
    return fit_batch_size_curve(
        measured[0].full_batch.value,
        effort.sizes,
        [each.mean for each in mini],
        [each.stderr for each in mini],
        dataset_size=len(data),
    )


def along(rates: np.ndarray, losses: np.ndarray, line: np.ndarray) -> np.ndarray:
    """The losses (sizes, seeds) at the rates of a rule: NaN below the grid, infinite above it, where nothing trains."""
    index = np.rint(2 * np.log2(line / rates[0])).astype(int)
    padded = np.concatenate([losses, np.full_like(losses[:, :1], np.inf)], axis=1)
    found = padded[np.arange(len(line)), index.clip(0, len(rates))]
    found[index < 0] = np.nan
    return found


def exponent(sizes: np.ndarray, rates: np.ndarray) -> float:
    """Of the batch size, in a power law for rates."""
    return float(np.polyfit(np.log(sizes), np.log(rates), 1)[0])


def scaling_figure(effort: Effort, optimizer: str) -> tuple[object, str]:
    """The loss after training over batch size and rate, and along either rule; for both losses.

    The rules start from the largest stable rate at the base batch size, a median over seeds.
    """
    sizes, base_at = np.array(effort.sizes), effort.sizes.index(effort.base)
    found = {}
    with blank(10, 8) as figure:
        panels = figure.subplots(2, 2, sharex=True, height_ratios=[1.9, 1])
        for (above, below), (name, loss) in zip(panels.T, LOSSES.items(), strict=True):
            low, high = GRIDS[optimizer, name]
            rates = 2.0 ** np.arange(low, high + 0.1, 0.5)
            runs = [sweep(optimizer, loss, int(size), rates, effort) for size in sizes]
            losses = np.stack([each for each, _ in runs])  # (sizes, rates, seeds)
            stable = np.array([[rates[column < STABLE].max() for column in each.T] for each in losses])
            best = rates[np.median(losses, axis=2).argmin(axis=1)]
            middle = np.median(stable, axis=1)
            base = float(middle[base_at])

            above.set_facecolor("black")  # infinite losses
            shades = {"cmap": "Greys", "norm": "log", "vmin": 1e-4, "vmax": 1, "shading": "nearest"}
            mesh = above.pcolormesh(sizes, rates, np.median(losses, axis=2).T, **shades)
            bounds = [middle - stable.min(axis=1), stable.max(axis=1) - middle]
            dots = {"fmt": "o", "color": BLUE, "capsize": 3, "zorder": 3}
            above.errorbar(sizes, middle, bounds, **dots, label=f"largest stable rate, {effort.seeds} seeds")
            above.plot(sizes, best, "o", color=BLUE, mfc="white", label="rate of the lowest loss")
            for rule, color in RULES.items():
                line = np.array([scale_learning_rate(base, effort.base, size, rule) for size in sizes])
                values = along(rates, losses, line)
                found[name, rule] = np.median(values, axis=1)
                shown = values.clip(max=9)
                above.plot(sizes, line, color=color, label=f"{rule} rule")
                below.plot(sizes, np.median(shown, axis=1), "o-", ms=4.5, color=color)
                below.fill_between(sizes, shown.min(axis=1), shown.max(axis=1), color=color, **FAINT)
            if optimizer == "SGD":
                first = parameters_to_vector(network().parameters()).detach()
                last = runs[base_at][1][np.flatnonzero(rates == best[base_at])[0], 0]
                for style, weights, when in (("--", first, "first"), (":", last, "last")):
                    curve = sharpness_curve(weights, loss, effort)
                    line = [
                        base * curve_factor(curve, old_batch_size=effort.base, new_batch_size=size) for size in sizes
                    ]
                    above.plot(sizes, line, style, color=BLUE, label=f"$1/\\lambda'(B)$, {when} weights")
                    found[name, when] = np.exp(np.abs(np.log(line / middle)).max())
            parts = slice(None, base_at + 1), slice(base_at, None)
            found[name, "stable"] = [exponent(sizes[part], middle[part]) for part in parts]
            found[name, "best"] = exponent(sizes, best)

            below.axhline(STABLE, color=INK, ls="--", lw=1.2)
            above.plot([], [], "--", color=INK, lw=1.2, label="stable below")
            above.set(xscale="log", yscale="log", ylim=(rates[0] / 2**0.25, rates[-1] * 2**0.25), title=name)
            ticks = rates[::4]
            above.set_yticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
            above.grid(False)
            below.set(yscale="log", xlabel="batch size (samples)", ylim=(0.015, 12))
            below.set_xticks(sizes, labels=[str(size) for size in sizes])
            below.set_yticks([0.1, 1, 9], labels=["0.1", "1", "9 or more"])
            for axes in (above, below):
                axes.minorticks_off()
        panels[0, 0].set_ylabel("learning rate")
        panels[1, 0].set_ylabel("last / first loss")
        bar = figure.colorbar(mesh, ax=panels[0].tolist(), extend="both")
        bar.set_label(f"loss after {effort.epochs} epochs / first loss")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("largest"))
        options = {"loc": "outside upper center", "ncols": 4, "fontsize": 9.5}
        figure.legend([handles[i] for i in order], [labels[i] for i in order], **options)
    return figure, sentence_on_scaling(sizes, found, optimizer, effort.base)


def sentence_on_scaling(sizes: np.ndarray, found: dict, optimizer: str, base: int) -> str:
    """What agrees with print, in numbers."""

    def powers(name: str) -> str:
        low, high = found[name, "stable"]
        return f"B^{low:.2f} up to B = {base} and B^{high:.2f} beyond"

    def unstable(name: str, rule: str) -> str:
        where = [str(size) for size, loss in zip(sizes, found[name, rule], strict=True) if loss >= STABLE]
        return f"at B = {', '.join(where)}" if where else "nowhere"

    one, other = LOSSES
    if optimizer == "SGD":
        return (
            "In print the linear rule holds up to a threshold, and the square root does not. Here, with "
            f"{one}, training is unstable {unstable(one, 'linear')} along the linear rule and "
            f"{unstable(one, 'sqrt')} along the square root, and the largest stable rate goes as {powers(one)}. With "
            f"{other}, where λ'(B) is flatter: as {powers(other)}. The curve 1/λ'(B) misses it by factors of up to "
            f"{found[one, 'first']:.1f} ({one}; {found[one, 'last']:.1f} at the last weights) and "
            f"{found[other, 'first']:.1f} ({other}; {found[other, 'last']:.1f})."
        )
    return (
        "In print the square root is consistent, and the linear rule diverges at twice the batch size. Here training "
        f"is unstable {unstable(one, 'sqrt')} along the square root and {unstable(one, 'linear')} along the linear "
        f"rule ({one}); {unstable(other, 'sqrt')} and {unstable(other, 'linear')} ({other}). The largest stable rate "
        f"goes as {powers(one)}; as {powers(other)}. The rate of the lowest loss goes as B^{found[one, 'best']:.2f} "
        f"and B^{found[other, 'best']:.2f}."
    )


# ---- changes in mid-training: the edge paper's Figures 3 to 5 --------------------------------------------------------


class Digits(DigitsMLP):
    """The demonstration's network, its learning rate multiplied by a factor from some step on."""

    def __init__(self, learning_rate: float, factor: float, at: int) -> None:
        super().__init__(learning_rate)
        self.factor, self.at = factor, at

    def configure_optimizers(self) -> dict:
        optimizer = super().configure_optimizers()
        schedule = LambdaLR(optimizer, lambda step: self.factor if step >= self.at else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: LightningModule, data: Dataset, batch_size: int, callbacks: list[Callback], **length: int) -> None:
    quiet_trainer(callbacks=callbacks, **length).fit(module, DataLoader(data, batch_size, shuffle=True))


def watched(
    effort: Effort, *callbacks: Callback, size: int = 16, rate: float = 0.7, factor: float = 1.0, at: int = 0
) -> dict[str, np.ndarray]:
    """Trains under a monitor; its curves."""
    seed_everything(0, verbose=False)
    monitor = SharpnessMonitor(every_n_train_steps=effort.every, num_batches=effort.batches)
    fit(Digits(rate, factor, at), digits(), size, [*callbacks, monitor], max_steps=effort.steps)
    names = monitor.history[0]
    return {name: np.array([entry.get(name, np.nan) for entry in monitor.history]) for name in names}


def change_figure(effort: Effort) -> tuple[object, str]:
    """Sharpness around a change of the learning rate or of the batch size."""
    early, then, late = effort.steps // 6, effort.steps // 3, effort.steps // 2
    larger = GradientAccumulationScheduler({0: 1, then // 64: 4})  # batches of 16 in a step; 64 of them are an epoch
    never = {"slow": watched(effort, rate=0.4), "fast": watched(effort), "large": watched(effort, size=64)}
    cases = {
        "learning rate .7 to .4 (Figure 3)": (early, "slow", watched(effort, factor=4 / 7, at=early)),
        "learning rate .4 to .7 (Figure 4)": (late, "fast", watched(effort, rate=0.4, factor=7 / 4, at=late)),
        "batch size 16 to 64 (Figure 5)": (then, "large", watched(effort, larger)),
        "the same under LearningRateRescaler": (then, "large", watched(effort, larger, LearningRateRescaler())),
    }
    found = {}
    with blank(10, 7.5) as figure:
        panels = figure.subplots(2, 2, sharex=True)
        for axes, (title, (at, name, curves)) in zip(panels.flat, cases.items(), strict=True):
            steps, reference = curves["step"], never[name]
            for tag, color, label in (
                (tags.MINI_BS, BLUE, "MiniBS"),
                (tags.DIRECTIONAL, VERMILLION, "directional"),
                (tags.FULL_BS, GREEN, "FullBS"),
            ):
                axes.plot(steps, curves[tag], color=color, label=label)
                if tag in tags.WITH_INTERVAL:
                    axes.fill_between(steps, *(curves[end] for end in tags.interval(tag)), color=color, **FAINT)
                axes.plot(steps, reference[tag], ":", lw=1.4, color=color)
            axes.plot([], [], ":", lw=1.4, color=GREY, label="the new setting from the start")
            axes.step(steps, curves[tags.THRESHOLD], "--", where="post", color=INK, lw=1.5, label="2 / learning rate")
            axes.axvline(at, color=GREY, lw=1)
            axes.set_title(title, fontsize=10.5)
            axes.set_ylim(0, 1.1 * max(curves[tag].max() for tag in (tags.THRESHOLD, tags.interval(tags.MINI_BS)[1])))
            third, jump = slice(-len(steps) // 3, None), int(np.searchsorted(steps, at))
            for tag in (tags.MINI_BS, tags.FULL_BS):
                found[title, tag, "end"] = curves[tag][third].mean() / reference[tag][third].mean()
                found[title, tag, "jump"] = curves[tag][jump] / curves[tag][jump - 1] - 1
            found[title, "peak"] = curves[tags.MINI_BS][jump:].max() / curves[tags.MINI_BS][jump] - 1
            found[title, "edge"] = curves[tags.EDGE_RATIO][jump]
        for axes in panels[-1]:
            axes.set_xlabel("step")
        for axes in panels[:, 0]:
            axes.set_ylabel("sharpness")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9.5)
    lowered, raised, enlarged, rescaled = cases
    ends = [f"{found[title, tags.MINI_BS, 'end']:.0%}" for title in (lowered, raised, enlarged)]
    jumps = [f"{found[enlarged, tag, 'jump']:+.0%}" for tag in (tags.MINI_BS, tags.FULL_BS)]
    rate = 2 / cases[rescaled][2][tags.THRESHOLD][-1]
    return figure, (
        "In print MiniBS ends where the new setting has it from the start, and FullBS lower after a lowered rate. "
        f"Here, in the last third, MiniBS is at {ends[0]} of that (rate lowered), {ends[1]} (raised) and {ends[2]} "
        f"(batches), and FullBS at {found[lowered, tags.FULL_BS, 'end']:.0%}. In print larger batches change MiniBS "
        f"at once, and FullBS not: here by {jumps[0]} and {jumps[1]}. In print a raised rate makes MiniBS spike: here, "
        f"every {effort.every} steps, it is at most {found[raised, 'peak']:.0%} above what it was. Rescaled to a rate "
        f"of {rate:.2g}, larger batches are at the edge at once: MiniBS at {found[rescaled, 'edge']:.2f} of the "
        f"threshold, not at {found[enlarged, 'edge']:.2f}."
    )


# ---- rates learned from the spectrum: Figures 17 and 18 --------------------------------------------------------------


class Learner(LightningModule):
    """A network under SGD with momentum .9; given a number of epochs, on their schedule."""

    def __init__(self, loss: Loss, rate: float, epochs: int | None, seed: int) -> None:
        super().__init__()
        self.net, self.loss, self.rate, self.epochs = network(seed=seed), loss, rate, epochs

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=0.0005)
        if self.epochs is None:
            return optimizer
        return [optimizer], [LambdaLR(optimizer, lambda epoch: decay(epoch / self.epochs))]


class Curves(Callback):
    """What is drawn, after every epoch and (with averaged weights) at the end."""

    def __init__(self, train: Subset, test: Subset) -> None:
        self.train, self.test, self.rows = train, test, []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Learner) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.rows.append([*self.look(pl_module), group["lr"], group["momentum"]])

    @torch.no_grad()
    def look(self, module: Learner) -> list[float]:
        """Training loss and test error."""
        (images, targets), (others, truth) = self.train[:], self.test[:]
        wrong = module.net(others).argmax(1) != truth.argmax(1)
        return [module.loss(module.net(images), targets).item(), wrong.float().mean().item()]


class AverageLast(WeightAveraging):
    """Averages weights over the last fifth of the epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.first = 4 * epochs // 5

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None and epoch_idx >= self.first


def learned(
    effort: Effort, data: tuple[Subset, Subset], loss: Loss, *, rule: str | None, rate: float = 0.1, seed: int = 0
) -> np.ndarray:
    """Loss, test error, learning rate and momentum, after each epoch and with averaged weights: (epochs + 1, 4)."""
    seed_everything(seed, verbose=False)
    epochs, curves = effort.learned_epochs, Curves(*data)
    module = Learner(loss, rate, None if rule else epochs, seed)
    learning = [SpectralLearningRate(rule=rule, every_n_epochs=epochs // 15)] if rule else []
    fit(module, data[0], 128, [*learning, curves, AverageLast(epochs)], max_epochs=epochs)
    return np.array([*curves.rows, [*curves.look(module), np.nan, np.nan]])


def learned_figure(effort: Effort) -> tuple[object, str]:
    """Loss, test error, learning rate and momentum by epoch: both rules against the schedule, for both losses."""
    images = digits(1797)
    data = Subset(images, range(1024)), Subset(images, range(1024, 1797))
    styles = {
        "tuned": (INK, "tuned schedule"),
        "nesterov": (BLUE, "learned, Nesterov"),
        "polyak": (VERMILLION, "learned, Polyak"),
    }
    found = {}
    with blank(10, 9) as figure:
        panels = figure.subplots(4, 2, sharex=True, height_ratios=[1.4, 1.4, 1, 1])
        for column, (name, loss) in zip(panels.T, LOSSES.items(), strict=True):
            trials = {rate: learned(effort, data, loss, rule=None, rate=rate)[-1] for rate in effort.tuning}
            tuned = min(trials, key=lambda rate: tuple(trials[rate][[1, 0]]))  # by test error, then by loss
            for rule, (color, label) in styles.items():
                given = {"rule": None, "rate": tuned} if rule == "tuned" else {"rule": rule}
                runs = np.stack([learned(effort, data, loss, seed=seed, **given) for seed in range(effort.seeds)])
                found[name, rule] = middle = np.median(runs, axis=0)
                for axes, values, low, high in zip(column, middle.T, runs.min(0).T, runs.max(0).T, strict=True):
                    axes.plot(values[:-1], color=color, lw=1.6, label=label)
                    axes.fill_between(range(len(values) - 1), low[:-1], high[:-1], color=color, **FAINT)
                    axes.plot(1.02 * len(values), values[-1], "o", color=color, ms=5)
            column[0].set_title(f"{name} (tuned: from {tuned:g})", fontsize=10.5)
            column[-1].set_xlabel("epoch (dots: weights averaged over the last fifth)")
        for row, label in zip(panels, ("training loss", "test error", "learning rate", "momentum"), strict=True):
            row[0].set_ylabel(label)
            for axes in row if label != "momentum" else ():
                axes.set_yscale("log")
        for axes in panels[1]:
            axes.set_yticks([0.05, 0.1, 0.2, 0.5], labels=["5 %", "10 %", "20 %", "50 %"])
            axes.minorticks_off()
        figure.align_ylabels()
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)

    def ends(name: str) -> str:
        return ", ".join(
            f"{found[name, rule][-1, 1]:.1%} and {found[name, rule][-1, 0]:.2g} ({rule})" for rule in styles
        )

    one, other = LOSSES
    polyak, nesterov = ("{:.2g} to {:.2g}".format(*found[other, rule][[0, -2], 2]) for rule in ("polyak", "nesterov"))
    highest = max(found[one, rule][:-1, 2].max() for rule in ("polyak", "nesterov"))
    return figure, (
        "In print learned rates compete with the tuned schedule. Here test error and training loss of the averaged "
        f"weights are {ends(other)} with {other}. With {one}, where λ1 vanishes with the loss, learned rates reach "
        f"{highest:.2g} if max_learning_rate does not stop them: {ends(one)}. In print, whose formulas are "
        f"misprinted, Polyak's rate decays and Nesterov's stays high: here, with {other}, they go from {polyak} and "
        f"from {nesterov}."
    )


# ----------------------------------------------------------------------------------------------------------------------


def pictures(effort: Effort) -> Iterator[Picture]:
    yield "figures_12_21_sgd", *scaling_figure(effort, "SGD")
    yield "figures_20_22_adam", *scaling_figure(effort, "Adam")
    yield "edge_figures_3_4_5_changes", *change_figure(effort)
    yield "figures_17_18_learned", *learned_figure(effort)


if __name__ == "__main__":
    main(__doc__, pictures, effort=Effort(), quick=QUICK)
