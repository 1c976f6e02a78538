"""`SpectralDensityMonitor`: the whole spectrum of a running training's Hessian, and of one of its batches."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, check_operator, curvature_of
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.preflight import preflight
from lightning_eoss.curvature.solver import Plan
from lightning_eoss.display import page, tags
from lightning_eoss.display.figures import write_spectrum
from lightning_eoss.display.scalars import spectrum_scalars
from lightning_eoss.measurements.spectrum import Spectra, check_spectrum, spectra
from lightning_eoss.training.monitor import Monitor
from lightning_eoss.training.plan import VARIANCE_SAMPLES, full_samples, pass_seconds
from lightning_eoss.training.watch import now


class SpectralDensityMonitor(Monitor):
    r"""Shows, while a model trains, the spectral density of the full batch's Hessian and that of one batch's.

    Not one bit of training is changed. Scalars (`spectrum/...`: rank, share of zeros, negative mass, trace, the largest
    and smallest eigenvalues of both) go to every logger; TensorBoard also gets a figure, where matplotlib is installed.

    Cost: `num_probes` times `steps` passes over the data each time, a product being about 1.4 gradients.

    Args:
        every_n_train_steps: Measure before every n-th optimizer step.
        overhead: Measure as often as this share of the wall time allows, shared by all monitors of the Trainer that go
            by one. At most one of the two; neither means 0.05.
        max_seconds: Upper limit of one measurement: the full batch is cut to a subset that fits, once and said.
        steps: Nodes of each probe's quadrature.
        num_probes: Random probes; one gives no intervals.
        augmented_passes: How often each sample is loaded anew: more than once for the Hessian of the augmented data.
        batch_size: Samples of the batch; None: training's.
        full_batch_samples: The full batch is a fixed random subset of this size; None: all samples.
        mode: ``"as_trained"``, or ``"eval"`` for layers (BatchNorm, dropout) in the mode in which they are used later.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar`` in place of `training_step`, where that cannot be evaluated
            twice.
        dataloader: Data to measure on, in place of training's: a DataLoader or an iterable of batches.
        num_samples: Samples of a ready batch of ``dataloader``, a number or a function of a batch; None: what the batch
            says (``batch_size``, ``num_graphs``), or the length that all its tensors have.
        seed: Fixes all random numbers of the monitor.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix in its place.
        outputs_fn: ``outputs_fn(pl_module, batch) -> (outputs, criterion)`` for ``"ggn"``, see `SharpnessMonitor`.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At `setup`, if the training cannot be monitored.

    Example:
        >>> SpectralDensityMonitor(every_n_train_steps=500).steps
        60

    Source: Granziol, Zohren and Roberts, sections 7 and 12, appendices D and E.
    """

    dashboard_categories = frozenset({tags.SPECTRUM_SHAPE})  # what it shows on the dashboard

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        overhead: float | None = None,
        max_seconds: float = 60.0,
        steps: int = 60,
        num_probes: int = 4,
        augmented_passes: int = 1,
        batch_size: int | None = None,
        full_batch_samples: int | None = 8192,
        mode: Literal["as_trained", "eval"] = "as_trained",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | Callable[[Any], int] | None = None,
        seed: int = 0,
        operator: Kind = "hessian",
        outputs_fn: OutputsFn | None = None,
    ) -> None:
        given = (every_n_train_steps, overhead, max_seconds, batch_size, full_batch_samples, loss_fn, dataloader, seed)
        super().__init__(("density",), *given, num_samples=num_samples, page=page.write_page)
        check_spectrum(steps, num_probes, augmented_passes)
        check_operator(operator, outputs_fn)
        checks.one_of("mode", mode, ("as_trained", "eval"), "use 'as_trained' or 'eval'.")
        self.steps = steps
        self.num_probes = num_probes
        self.augmented_passes = augmented_passes
        self.mode = mode
        self.operator = operator
        self.outputs_fn = outputs_fn
        self.last: Spectra | None = None  # what was measured last

    def _measure(self, trainer: Any, pl_module: Any, batch_idx: int, arrived: float) -> None:
        """Measures and shows it."""
        with self._watch.objective(trainer, pl_module, batch_idx, evaluating=self.mode == "eval") as (objective, _):
            if self._plan is None:
                self._prepare(trainer, objective)
                if self._plan is None or not self._due_now(trainer, now(pl_module) - arrived):
                    return
            assert self._findings is not None and self._watch.data is not None
            size, parts = self._watch.step_size(trainer, self.batch_size)
            plan = self._watch.within(replace(self._plan, batch_size=size, parts=parts), self._findings, objective)
            self.last = spectra(
                objective,
                plan,
                self._findings,
                steps=self.steps,
                num_probes=self.num_probes,
                augmented_passes=self.augmented_passes,
                stream=trainer.global_step,
                curvature=curvature_of(self.operator, self.outputs_fn, objective, size),
            )
        self._agenda.charge("density", self.last.seconds)
        self._shown = True
        self._watch.publish(trainer, self, spectrum_scalars(self.last), partial(write_spectrum, spectra=self.last))

    def _prepare(self, trainer: Any, objective: Objective) -> None:
        """Finds out what the loss allows and what a measurement costs, and says so."""
        data = self._watch.data
        assert data is not None
        size, parts = self._watch.step_size(trainer, self.batch_size)
        checks.batch_size_of_data(size, data.source.num_samples)
        findings = preflight(objective, size, parts=parts, seed=self.seed)
        for warning in findings.warnings:
            self._watch.say(warning)
        if findings.seconds == 0:  # a loss that is not finite lets nothing be found out
            return
        full_batch_samples = data.batches_of(self.full_batch_samples)
        plan = Plan(
            size, parts, full_batch_samples=full_batch_samples, seed=self.seed, memory_bytes=objective.cache.limit
        )
        full, passes = full_samples(plan, data.source.num_samples), self.steps * self.num_probes
        dear = pass_seconds(plan, findings, full * self.augmented_passes, passes)
        others = (size * parts + VARIANCE_SAMPLES) * findings.loading
        kept = max(size * parts, round(full * min(1.0, max(0.0, self.max_seconds - others) / dear)))
        seconds, passes = dear * kept / full + others, passes * self.augmented_passes
        self._findings = findings
        self._plan = replace(plan, full_batch_samples=kept)
        self._agenda.expect({"density": seconds})
        what = f"spectral densities of {kept:,} of {data.source.num_samples:,} samples and of a batch of {size * parts}"
        notes = [what, f"{passes} passes, about {seconds:.2g} s"]
        if data.sampler is not None:
            notes.append("the sampler is not uniform, the batch is")
        self._watch.announce(notes)
