"""What batch noise does to the largest eigenvalue of the Hessian, in pictures: the theory's, and a network's own.

Run `python papers/random_matrix.py --out pictures` (a minute and a half on one core; `--quick` for a coarse look).
Each picture answers to a figure in print, and says in a sentence below itself where it agrees and where not:

* Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size": Figures 1, 6, 7 and 9;
* Andreyev and Beneventano, "Edge of Stochastic Stability": Figures 9 to 16 (the gap) and 17.

The networks are small, the data scikit-learn's digits; the first is trained by the hyperparameters of their VGG-16.
"""

import statistics
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from common import FAINT, Picture, classes, decay, main, network, of_model, squared_error
from lightning_eoss import (
    SharpnessMeasurement,
    SharpnessPrediction,
    measure_sharpness,
    measure_spectra,
    predict_sharpness,
)
from lightning_eoss.curvature.batches import random_batches
from lightning_eoss.curvature.solver import Plan
from lightning_eoss.demo import digits
from lightning_eoss.display.figures import BLUE, GREEN, GREY, INK, VERMILLION, blank, spectrum_figure
from lightning_eoss.measurements.prediction import prediction
from lightning_eoss.measurements.standalone import standalone
from lightning_eoss.theory.random_matrix import (
    fit_batch_size_curve,
    gap_exponent,
    inverse_effective_batch_size,
    marchenko_pastur_outlier,
    wigner_outlier,
)
from lightning_eoss.theory.statistics import mean_estimate, moments
from tangent_kernel import ntk

LEGEND = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
BATCH_SIZE = 128  # theirs


@dataclass(frozen=True)
class Effort:
    """How much is drawn, trained and measured."""

    samples: int = 1024
    matrix: int = 300  # size of simulated matrices
    draws: int = 12  # of each
    epochs: int = 100
    points: tuple[float, ...] = (0, 0.03, 0.1, 0.25, 0.4, 0.6, 0.8, 1)  # to look at, as shares of training
    batches: int = 30  # for each mean
    gap_sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    gap_batches: int = 150
    kernel_sizes: tuple[int, ...] = (4, 8, 16, 32)
    kernel_batches: int = 20
    kernel_steps: int = 1500
    kernel_points: int = 7


QUICK = Effort(192, 60, 3, 20, (0, 1), 10, (8, 32, 128), 20, (4, 16), 5, 100, 3)


# ---- networks --------------------------------------------------------------------------------------------------------


cross_entropy, half_squared_error = of_model(F.cross_entropy), of_model(squared_error)


def outputs_and_loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return model(batch[0]), lambda outputs: squared_error(outputs, batch[1])


def training(
    model: nn.Module,
    loss: Callable[[nn.Module, list[Tensor]], Tensor],
    data: TensorDataset,
    *,
    batch_size: int,
    steps: int,
    points: tuple[float, ...],
    decayed: bool,
    **options: float,
) -> Iterator[int]:
    """Trains by SGD, in epochs without replacement, and stops at some steps for the model to be looked at.

    With `decayed` the learning rate follows their schedule.
    """
    optimizer, initial = torch.optim.SGD(model.parameters(), **options), options["lr"]
    generator, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.long)
    stops = {round(share * steps) for share in points}
    for step in range(steps + 1):
        if step in stops:
            yield step
        if decayed:
            optimizer.param_groups[0]["lr"] = initial * decay(step / steps)
        if len(order) < batch_size:
            order = torch.randperm(len(data), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        loss(model, [tensor[chosen] for tensor in data.tensors]).backward()
        optimizer.step()


# ---- their Figure 1: simulated matrices ------------------------------------------------------------------------------


def wigner_draw(rng: np.random.Generator, size: int, batch_size: float, *, variance: float) -> np.ndarray:
    """Eigenvalues of one matrix: a full batch with the eigenvalue 1 and zeros, and the noise of the Wigner model."""
    noise = rng.standard_normal((size, size))
    matrix = (noise + noise.T) * np.sqrt(variance / batch_size / (2 * size))
    matrix[0, 0] += 1
    return np.linalg.eigvalsh(matrix)


def wishart_draw(rng: np.random.Generator, size: int, batch_size: float, *, bulk: float) -> np.ndarray:
    """Eigenvalues of one sample covariance, where the population has the eigenvalue 1 and the bulk's level else."""
    rows = rng.standard_normal((int(batch_size), size)) * np.sqrt(bulk)
    rows[:, 0] *= np.sqrt(1 / bulk)
    return np.sort(np.linalg.svd(rows, compute_uv=False) ** 2 / batch_size)


def figure_1(effort: Effort) -> tuple[object, str]:
    """Spectral norm against batch size, with two spectra for each model."""
    rng, size, variance, bulk = np.random.default_rng(0), effort.matrix, 16.0, 0.05
    sizes = 2.0 ** np.arange(1, 12)
    fine = np.geomspace(sizes[0], sizes[-1], 300)
    given = {"num_parameters": size}
    models = {
        "Wigner": (
            lambda b: wigner_draw(rng, size, b, variance=variance),
            lambda b: wigner_outlier(1.0, variance, batch_size=b),
        ),
        "Marchenko-Pastur": (
            lambda b: wishart_draw(rng, size, b, bulk=bulk),
            lambda b: marchenko_pastur_outlier(1.0, bulk, batch_size=b, **given),
        ),
    }
    labels = {"Wigner": "Theorem 4", "Marchenko-Pastur": "Theorem 7, corrected"}
    slopes, errors = {}, {}
    with blank(9, 7) as figure:
        axes = figure.subplot_mosaic([["Wigner"] * 2 + ["Marchenko-Pastur"] * 2, list("abcd")], height_ratios=[1.7, 1])
        for (name, (draw, formula)), panels in zip(models.items(), ("ab", "cd"), strict=True):
            tops = np.array([[draw(b)[-1] for _ in range(effort.draws)] for b in sizes])
            mean, spread = tops.mean(1), tops.std(1, ddof=1)
            slopes[name] = np.min(np.diff(np.log(mean)) / np.diff(np.log(sizes)))
            errors[name] = np.max(np.abs(formula(sizes) / mean - 1))
            axes[name].plot(fine, formula(fine), color=BLUE, label=labels[name])
            if name != "Wigner":
                printed = {"batch_size": sizes, "formula": "paper", **given}
                errors["printed"] = np.max(np.abs(marchenko_pastur_outlier(1.0, bulk, **printed) / mean - 1))
                values = marchenko_pastur_outlier(1.0, bulk, batch_size=fine, formula="paper", **given)
                axes[name].plot(fine, values, "--", color=VERMILLION, label="Theorem 7, as printed")
            axes[name].errorbar(
                sizes,
                mean,
                spread,
                fmt="o",
                ms=4.5,
                color=INK,
                lw=1.2,
                capsize=2.5,
                label=f"simulated, {effort.draws} draws, ±1 sd",
            )
            axes[name].set(
                xscale="log", yscale="log", xlabel="batch size (samples)", title=f"{name} noise", ylim=(0.85, 18)
            )
            axes[name].set_xticks(sizes[::2], labels=[f"{each:.0f}" for each in sizes[::2]])
            axes[name].set_yticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
            axes[name].minorticks_off()
            axes[name].plot([], [], "v", color=VERMILLION, ms=8, label="below: the largest of one matrix")
            axes[name].legend(loc="upper right")
            for panel, b in zip(panels, (32, 512), strict=True):
                values = draw(b)
                axes[panel].hist(values, 40, color=GREY, log=True)
                axes[panel].plot(values[-1], 2, "v", color=VERMILLION, ms=8)
                axes[panel].axvline(float(formula(b)), color=BLUE, lw=1.5, zorder=1)
                axes[panel].set_ylim(0.7, 400)
                axes[panel].set_xlabel("eigenvalue / $\\lambda_1$")
                axes[panel].set_title(f"({panel}) one matrix, B = {b}", fontsize=10)
        axes["Wigner"].set_ylabel("largest eigenvalue / $\\lambda_1$")
        axes["a"].set_ylabel("eigenvalues in a bin")
    steepest = " and ".join(f"B^{slope:.2f} ({name})" for name, slope in slopes.items())
    return figure, (
        f"Theorem 4 is within {errors['Wigner']:.0%} of {size} x {size} matrices and the corrected Theorem 7 within "
        f"{errors['Marchenko-Pastur']:.0%}; as printed it is up to {errors['printed']:.0%} off. The fall and its end "
        f"are as in print, but where print has it 'linear' the simulation falls at most as {steepest}."
    )


# ---- their Figures 6, 7 and 9: along training ------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What was measured and predicted at one step."""

    step: int
    model: nn.Module
    measured: dict[str, SharpnessMeasurement]  # by operator
    predicted: dict[str, SharpnessPrediction]


def along_training(effort: Effort, data: TensorDataset) -> list[Point]:
    """Measures and predicts MiniBS of the Hessian and of the Gauss-Newton matrix along one training."""
    model, points = network(16), []
    batch_size = min(BATCH_SIZE, len(data) // 4)
    steps = effort.epochs * len(data) // batch_size
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005}
    given = {"batch_size": batch_size, "steps": steps, "points": effort.points, "decayed": True, **options}
    for step in training(model, cross_entropy, data, **given):
        ends = step in (0, steps)
        predicted = {
            "hessian": predict_sharpness(
                model, cross_entropy, data, batch_sizes=[batch_size, *(effort.gap_sizes if ends else ())]
            ),
            "ggn": predicted_in_groups(model, data, batch_size),
        }
        measured = {
            operator: measure_sharpness(
                model,
                cross_entropy,
                data,
                batch_size=batch_size,
                rel_error=1e-9,
                num_batches=effort.batches,
                tol=0.01,
                operator=operator,
            )
            for operator in predicted
        }
        points.append(Point(step, deepcopy(model), measured, predicted))
    return points


def predicted_in_groups(model: nn.Module, data: TensorDataset, batch_size: int) -> SharpnessPrediction:
    """What `predict_sharpness` does, of the Gauss-Newton matrix and with 8 samples at once: an eighth of the products.

    Their products are not stacked as those of the Hessian are, so single samples take long.
    """
    with standalone(model, cross_entropy, data, Plan(batch_size), operator="ggn") as solver:
        return prediction(solver, batch_sizes=[batch_size], group_size=8)


def figure_6(effort: Effort, data: TensorDataset, point: Point, operator: str) -> tuple[object, str]:
    """Spectral density of the full batch and of one mini-batch."""
    size = point.measured["hessian"].batch_size
    spectra = measure_spectra(point.model, cross_entropy, data, batch_size=size, operator=operator)
    what = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}[operator]
    figure = spectrum_figure(spectra, title=f"{what}, step {point.step}")
    tops = [float(density.nodes.max()) for density in (spectra.full, spectra.batch)]
    lows = [float(density.nodes.min()) for density in (spectra.full, spectra.batch)]
    given = {"hessian": ("Theorem 4", "wigner"), "ggn": ("Theorem 7", "marchenko_pastur")}
    (theorem, name), own = given[operator], point.predicted[operator]
    moved = getattr(own, name)[0].estimate.mean - own.full_batch.value
    return figure, (
        f"As in print a batch broadens the spectrum, here from [{lows[0]:.2g}, {tops[0]:.2g}] to [{lows[1]:.2g}, "
        f"{tops[1]:.2g}]. Not as in print: the largest eigenvalue moves by {tops[1] - tops[0]:.2g}, where "
        f"{theorem} says {moved:.2g}."
    )


def figure_9(points: list[Point]) -> tuple[object, str]:
    """Full, Batch and Pert against step, for both matrices."""
    steps = [point.step for point in points]
    inside, above = {}, []
    with blank(10, 5) as figure:
        for axes, operator in zip(figure.subplots(1, 2), ("hessian", "ggn"), strict=True):
            measured = [point.measured[operator] for point in points]
            predicted = [point.predicted[operator] for point in points]
            mean = np.array([each.mini_batch.mean for each in measured])
            spread = np.array([statistics.stdev(each.mini_batch.values) for each in measured])
            size, count = measured[0].batch_size, len(measured[0].mini_batch.values)
            axes.plot(steps, mean, color=BLUE, label=f"Batch: {count} batches of {size}, ±1 sd")
            axes.fill_between(steps, mean - spread, mean + spread, color=BLUE, **FAINT)
            axes.plot(steps, [each.full_batch.value for each in predicted], color=GREEN, label="Full")
            if operator == "hessian":
                own = [each.subspace[0].estimate for each in predicted]
                axes.plot(
                    steps,
                    [each.mean for each in own],
                    "s-",
                    ms=4,
                    lw=1.2,
                    color=VERMILLION,
                    label="outlier subspace, 95 %",
                )
                axes.fill_between(
                    steps, [each.lower for each in own], [each.upper for each in own], color=VERMILLION, **FAINT
                )
                pert = [each.wigner[0].estimate.mean for each in predicted]
                inside["subspace"] = np.abs([each.mean for each in own] - mean) <= spread
                axes.plot(steps, pert, "o--", ms=4, lw=1.2, color=INK, label="Pert: Theorem 4")
                axes.set_ylabel("largest eigenvalue (of cross entropy)")
            else:
                pert = [each.marchenko_pastur[0].estimate.mean for each in predicted]
                given = {"batch_size": size, "dataset_size": predicted[0].num_samples, "formula": "paper"}
                printed = [
                    marchenko_pastur_outlier(
                        each.full_batch.value, each.bulk.mean, num_parameters=each.num_parameters, **given
                    )
                    for each in predicted
                ]
                axes.plot(steps, pert, "o--", ms=4, lw=1.2, color=INK, label="Pert: Theorem 7, corrected")
                axes.plot(steps, printed, ":", color=GREY, label="Pert: Theorem 7, as printed")
            above += [each.gap.lower > 0 for each in measured]
            inside[operator] = np.abs(pert - mean) <= spread
            axes.set_title({"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}[operator], pad=42)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.legend(**LEGEND, ncols=2, fontsize=9, columnspacing=1)
    within = {name: f"{int(each.sum())} of {len(each)}" for name, each in inside.items()}
    return figure, (
        f"Print has both theorems within 1 sd of Batch all along. Here Theorem 4 is at {within['hessian']} points, "
        f"Theorem 7 at {within['ggn']}, the outlier subspace at {within['subspace']}. As in print Batch is above "
        f"Full: at {sum(above)} of {len(above)} points beyond doubt."
    )


# ---- the gap against batch size --------------------------------------------------------------------------------------


def gap_figure(effort: Effort, data: TensorDataset, points: list[Point]) -> tuple[object, str]:
    """Measured and predicted gap against u = 1/B - 1/N, at the first and at the last weights."""
    sizes, total = np.array(effort.gap_sizes), len(data)
    u = inverse_effective_batch_size(sizes, total)
    fine = np.geomspace(sizes[0], sizes[-1], 200)
    exponents, explained = [], []
    with blank(10, 5.2) as figure:
        for axes, point in zip(figure.subplots(1, 2), (points[0], points[-1]), strict=True):
            measured = [
                measure_sharpness(
                    point.model,
                    cross_entropy,
                    data,
                    batch_size=int(size),
                    rel_error=0.01,
                    num_batches=effort.gap_batches,
                    tol=0.005,
                )
                for size in sizes
            ]
            prediction = point.predicted["hessian"]
            full = measured[0].full_batch.value
            mini = [each.mini_batch for each in measured]
            gaps = np.array([each.mean - full for each in mini])
            known = gaps > 0
            ends = np.array([[each.mean - each.lower, each.upper - each.mean] for each in mini]).T
            curve = fit_batch_size_curve(
                full, sizes, [each.mean for each in mini], [each.stderr for each in mini], dataset_size=total
            )
            exponent = gap_exponent(sizes[known], gaps[known], dataset_size=total)
            own = [each.estimate for each in prediction.subspace[1:]]
            axes.fill_between(
                u,
                [each.lower - full for each in own],
                [each.upper - full for each in own],
                color=VERMILLION,
                label="outlier subspace, 95 %",
                **FAINT,
            )
            axes.plot(
                inverse_effective_batch_size(fine, total),
                [curve.at(size).mean - full for size in fine],
                color=GREEN,
                label=f"c u / (1 + d u): c = {curve.c:.3g}, d = {curve.d:.3g}",
            )
            theorem = wigner_outlier(full, prediction.variance.mean, batch_size=sizes, dataset_size=total) - full
            axes.plot(u, theorem, "--", color=GREY, label="Theorem 4")
            axes.errorbar(u, gaps, ends, fmt="o", ms=4.5, color=BLUE, lw=1.2, capsize=2.5, label="measured, 95 %")
            axes.text(
                0.04,
                0.95,
                f"gap $\\propto u^{{{exponent.mean:.2f} \\pm {exponent.upper - exponent.mean:.2f}}}$",
                transform=axes.transAxes,
                va="top",
            )
            axes.set(xscale="log", yscale="log", xlabel="u = 1/B - 1/N (1 / samples)")
            axes.set_ylim(0.5 * min(theorem.min(), gaps[known].min()), 3 * gaps.max())
            top = axes.secondary_xaxis("top")
            top.set_xticks(u, labels=[str(size) for size in sizes])
            top.tick_params(which="minor", top=False)
            top.set_xlabel(f"batch size B (samples, of {total:,})")
            axes.set_title(f"step {point.step}: FullBS = {full:.3g}")
            axes.legend(loc="lower right", fontsize=9)
            exponents.append(exponent)
            explained.append(statistics.median(theorem[known] / gaps[known]))
        figure.axes[0].set_ylabel("gap MiniBS - FullBS (eigenvalue)")
    first, last = exponents
    return figure, (
        "Print has gap ~ 1/B at initialisation and at convergence, 1/B^1.1 for the largest batches. Against u, which "
        f"takes that bend away, the exponent is {first.mean:.2f} and {last.mean:.2f}. Theorem 4 gives "
        f"{explained[0]:.0%} and {explained[1]:.0%} of the gap (median)."
    )


# ---- the edge paper's Figure 17 --------------------------------------------------------------------------------------


def figure_17(effort: Effort, data: TensorDataset) -> tuple[object, str]:
    """MiniBS of the Hessian and the top of the mini-batch NTK along training with squared error, to the edge."""
    rate, first, late, off = 0.5, [], [], []
    rows = 1 if len(effort.kernel_sizes) < 3 else 2
    with blank(10, 3.2 + 2.6 * (rows - 1)) as figure:
        panels = figure.subplots(rows, 2, sharex=True, sharey=True)
        for axes, size in zip(panels.flat, effort.kernel_sizes, strict=True):
            model, steps, hessian, kernel = network(32, scale=0.5), [], [], []
            shares = tuple(np.linspace(0, 1, effort.kernel_points))
            given = {"batch_size": size, "steps": effort.kernel_steps, "points": shares, "decayed": False, "lr": rate}
            for step in training(model, half_squared_error, data, **given):
                steps.append(step)
                hessian.append(
                    measure_sharpness(
                        model, half_squared_error, data, batch_size=size, num_batches=effort.batches
                    ).mini_batch
                )
                with standalone(model, half_squared_error, data, Plan(size)) as solver:
                    batches = random_batches(solver.objective.source, size, seed=step)
                    tops = [
                        torch.linalg.eigvalsh(ntk(solver.objective, next(batches), outputs_and_loss))[-1]
                        for _ in range(effort.kernel_batches)
                    ]
                kernel.append(mean_estimate(moments(torch.stack(tops))))
            for values, color, label in (
                (hessian, BLUE, "MiniBS of the Hessian"),
                (kernel, VERMILLION, "top of the mini-batch NTK / b"),
            ):
                style = "-" if color == BLUE else "--"
                axes.plot(steps, [each.mean for each in values], style, color=color, label=f"{label}, 95 %")
                axes.fill_between(
                    steps, [each.lower for each in values], [each.upper for each in values], color=color, **FAINT
                )
            axes.axhline(2 / rate, ls=":", color=INK, lw=1.5, label="2 / learning rate")
            axes.set_title(f"b = {size}", fontsize=10.5)
            axes.set_ylim(bottom=0)
            meets = [
                one.lower <= other.upper and other.lower <= one.upper
                for one, other in zip(kernel, hessian, strict=True)
            ]
            first.append(kernel[0].mean / hessian[0].mean - 1)
            half = slice(len(meets) // 2, None)
            late += meets[half]
            mean_kernel, mean_hessian = (sum(each.mean for each in values[half]) for values in (kernel, hessian))
            off.append(mean_kernel / mean_hessian - 1)
        for axes in panels.flat[-2:]:
            axes.set_xlabel("step")
        figure.supylabel("largest eigenvalue (of half the squared error)", fontsize=10.5)
        figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure, (
        f"Print has the two overlap at the edge: here their intervals meet at {sum(late)} of {len(late)} points of the "
        f"second half, where the kernel's mean is {min(off):+.0%} to {max(off):+.0%} off, by batch size; at the start "
        f"it is {min(first):+.0%} to {max(first):+.0%}. J'J / b, which print names, too, has the kernel's eigenvalues."
    )


# ----------------------------------------------------------------------------------------------------------------------


def pictures(effort: Effort) -> Iterator[Picture]:
    yield "figure_1_simulated", *figure_1(effort)
    data = classes(effort.samples)
    points = along_training(effort, data)
    yield "figure_6_spectrum_start", *figure_6(effort, data, points[0], "hessian")
    yield "figure_6_spectrum_end", *figure_6(effort, data, points[-1], "hessian")
    yield "figure_7_gauss_newton_end", *figure_6(effort, data, points[-1], "ggn")
    yield "figure_9_along_training", *figure_9(points)
    yield "gap_against_batch_size", *gap_figure(effort, data, points)
    yield "figure_17_kernel", *figure_17(effort, digits(effort.samples))


if __name__ == "__main__":
    main(__doc__, pictures, effort=Effort(), quick=QUICK)
