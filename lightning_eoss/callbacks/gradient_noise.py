"""`GradientNoiseMonitor`: how much the gradient of a mini-batch scatters while a model trains, and by which law."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.curvature.seeds import derived_seed
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.display import page, tags
from lightning_eoss.display.figures import write_noise
from lightning_eoss.display.scalars import noise_scalars
from lightning_eoss.measurements.gradient_noise import GradientNoise, gradient_noise
from lightning_eoss.training.data import check_chosen_batch_size
from lightning_eoss.training.monitor import Monitor
from lightning_eoss.training.plan import full_samples, pass_seconds
from lightning_eoss.training.watch import now

_PASSES = 60  # over the full batch, products or what takes as long, of one measurement


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
        given = (every_n_train_steps, overhead, max_seconds, batch_size, full_batch_samples, loss_fn, dataloader, seed)
        super().__init__(("noise",), *given, num_samples=num_samples, page=page.write_page)
        self.num_batches = num_batches
        self.last: GradientNoise | None = None  # what was measured last

    def _measure(self, trainer: Any, pl_module: Any, batch_idx: int, arrived: float) -> None:
        """Measures and shows it."""
        stream = trainer.global_step
        with self._watch.objective(trainer, pl_module, batch_idx) as (objective, _):
            if self._plan is None:
                self._prepare(trainer, objective)
                if self._plan is None or not self._due_now(trainer, now(pl_module) - arrived):
                    return
            assert self._findings is not None
            size, parts = self._watch.step_size(trainer, self.batch_size)
            plan = self._watch.within(replace(self._plan, batch_size=size, parts=parts), self._findings, objective)
            generator = torch.Generator().manual_seed(derived_seed(self.seed, 15, stream))
            self.last = gradient_noise(
                Solver(objective, plan, self._findings, generator),
                None if self.last is None else self.last.warm,
                num_batches=plan.num_batches,
                stream=stream,
            )
        self._agenda.charge("noise", self.last.seconds)
        self._shown = True
        self._watch.publish(trainer, self, noise_scalars(self.last), partial(write_noise, noise=self.last))

    def _prepare(self, trainer: Any, objective: Objective) -> None:
        """Finds out what the loss allows and what a measurement costs, and says so."""
        data = self._watch.data
        assert data is not None
        check_chosen_batch_size(self.batch_size, data)
        size, parts = self._watch.step_size(trainer, self.batch_size)
        checks.batch_size_of_data(size, data.source.num_samples)
        findings = preflight(objective, size, parts=parts, seed=self.seed)
        for warning in findings.warnings:
            self._watch.say(warning)
        if findings.seconds == 0:  # a loss that is not finite lets nothing be found out
            return
        if findings.reduction != "mean":
            self._watch.say(
                "the loss of a batch was not found to be a mean over its samples (BatchNorm in train mode, dropout, "
                "class weights, fewer than three samples), so single samples have no gradients: the variance of the "
                "batch gradient is measured and not predicted, and there are no noise scales."
            )
        full_batch_samples = data.batches_of(self.full_batch_samples)
        plan = Plan(
            size, parts, full_batch_samples=full_batch_samples, seed=self.seed, memory_bytes=objective.cache.limit
        )
        # At four other batch sizes there are as many samples to load, or once more those of the full batch.
        batch_seconds = findings.seconds + 3 * size * parts * findings.loading
        count = max(2, min(self.num_batches, round(self.max_seconds / 4 / batch_seconds)))
        full = full_samples(plan, data.source.num_samples)
        dear = pass_seconds(plan, findings, full, _PASSES) + 2 * full * findings.loading
        kept = max(size * parts, round(full * min(1.0, 0.75 * self.max_seconds / dear)))
        self._findings = findings
        self._plan = replace(plan, num_batches=count, full_batch_samples=kept)
        seconds = dear * kept / full + count * batch_seconds
        self._agenda.expect({"noise": seconds})
        what = f"gradient noise of {kept:,} of {data.source.num_samples:,} samples and of {count} batches"
        notes = [f"{what} of {size * parts}", f"about {seconds:.2g} s"]
        if data.sampler is not None:
            notes.append("the sampler is not uniform, the batches are")
        self._watch.announce(notes)
