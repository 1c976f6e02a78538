"""`GradientNoiseMonitor`: how much the gradient of a mini-batch scatters while a model trains, and by which law."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.solver import COLD
from lightning_eoss.display import tags
from lightning_eoss.display.figures import write_noise
from lightning_eoss.display.scalars import noise_scalars
from lightning_eoss.measurements.gradient_noise import GradientNoise, gradient_noise
from lightning_eoss.training.monitor import Look, Monitor
from lightning_eoss.training.plan import Prospect, cut_full, full_samples, pass_seconds
from lightning_eoss.training.watch import Picture

_PASSES = 60  # over the full batch, products or what takes as long, of one measurement
_NO_SAMPLES = (
    "the loss of a batch was not found to be a mean over its samples (BatchNorm in train mode, dropout, class weights, "
    "fewer than three samples), so single samples have no gradients: the variance of the batch gradient is measured "
    "and not predicted, and there are no noise scales."
)


class GradientNoiseMonitor(Monitor):
    r"""Shows, while a model trains, the variance of the mini-batch gradient, the law that it follows, and its scale.

    Not one bit of training is changed. Scalars (`gradient_noise/...`) go to every logger: tr C, the variance of a
    single sample's gradient; the variance at training's batch size, as it follows from tr C and as it is measured over
    random batches; the noise scales tr C / |g|^2 and tr HC / g'Hg; |g|^2; the cosine between g and the Hessian's
    top eigenvector. TensorBoard also gets the variance against the batch size as a figure, where matplotlib is
    installed. Of a loss that is no mean over samples, single samples have no gradients: the variance is measured and
    not predicted, and there are no scales.

    Cost: 30 to 60 passes over the full batch, and `num_batches` gradients of a batch at each of up to five batch sizes.
    Beside a `SharpnessMonitor` that measures at the same step, the full batch is loaded once for both.

    Args:
        every_n_train_steps: Measure before every n-th optimizer step.
        overhead: Measure as often as this share of the wall time allows, shared by all monitors of the Trainer that go
            by one. At most one of the two; neither means 0.05.
        max_seconds: Upper limit of one measurement: the full batch is cut to a subset that fits, and so is the number
            of batches, once and said.
        num_batches: Random batches that the variance is measured over.
        batch_size: Their samples; None: those of a step of training.
        full_batch_samples: The full batch is a fixed random subset of this size; None: all samples.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar`` in place of `training_step`, where that cannot be evaluated
            twice.
        dataloader: Data to measure on, in place of training's: a DataLoader or an iterable of batches. Ready batches
            have no single samples: of them the measured variance, |g|^2 and the cosine are shown.
        num_samples: Samples of a ready batch of ``dataloader``, a number or a function of a batch; None: what the batch
            says (``batch_size``, ``num_graphs``), or the length that all its tensors have.
        seed: Fixes all random numbers of the monitor.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At `setup`, if the training cannot be monitored.

    Example:
        >>> GradientNoiseMonitor(every_n_train_steps=500).num_batches
        32

    Source: "The Impact of the Mini-batch Size on the Dynamics of SGD: Variance and Beyond", Lemma 1; McCandlish,
    Kaplan, Amodei et al., "An empirical model of large-batch training", 2018.
    """

    dashboard_categories = frozenset({tags.GRADIENT_NOISE})  # what it shows on the dashboard

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        overhead: float | None = None,
        max_seconds: float = 60.0,
        num_batches: int = 32,
        batch_size: int | None = None,
        full_batch_samples: int | None = 8192,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | Callable[[Any], int] | None = None,
        seed: int = 0,
    ) -> None:
        checks.whole("num_batches", num_batches, 2, "must be at least 2: one batch has no variance.")
        super().__init__(
            "noise",
            every_n_train_steps=every_n_train_steps,
            overhead=overhead,
            max_seconds=max_seconds,
            batch_size=batch_size,
            full_batch_samples=full_batch_samples,
            loss_fn=loss_fn,
            dataloader=dataloader,
            num_samples=num_samples,
            seed=seed,
        )
        self.num_batches = num_batches

    def foresee(self, look: Look) -> Prospect:
        """The full batch and the batches, in three parts and one of the time."""
        plan, findings, total = look.solver.plan, look.solver.findings, look.data.source.num_samples
        # At four other batch sizes there are as many samples to load, or once more those of the full batch.
        batch_seconds = findings.seconds + 3 * plan.step_size * findings.loading
        count = max(2, min(self.num_batches, round(self.max_seconds / 4 / batch_seconds)))
        full = full_samples(plan, total)
        dear = pass_seconds(plan, findings, full, _PASSES) + 2 * full * findings.loading
        plan, seconds = cut_full(replace(plan, num_batches=count), total, dear, 0.75 * self.max_seconds)
        seconds += count * batch_seconds
        what = f"gradient noise of {plan.full_batch_samples:,} of {total:,} samples and of {count} batches"
        notes = [f"{what} of {plan.step_size}", f"about {seconds:.2g} s"]
        if look.data.sampler is not None:
            notes.append("the sampler is not uniform, the batches are")
        return Prospect(plan, {"noise": seconds}, notes, [] if findings.reduction == "mean" else [_NO_SAMPLES])

    def measure(self, look: Look) -> GradientNoise:
        """The noise at these weights; the top eigenvector is followed from the last one."""
        warm = COLD if self.latest is None else self.latest.warm
        return gradient_noise(look.solver, warm, num_batches=look.solver.plan.num_batches)

    def show(self, trainer: Any, result: GradientNoise) -> tuple[dict[str, float], list[Picture]]:
        """Scalars, and the variance against the batch size."""
        return noise_scalars(result), [partial(write_noise, noise=result)]
