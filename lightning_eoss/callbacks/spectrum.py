"""`SpectralDensityMonitor`: the whole spectrum of a running training's Hessian, and of one of its batches."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn
from lightning_eoss.display import tags
from lightning_eoss.display.figures import write_spectrum
from lightning_eoss.display.scalars import spectrum_scalars
from lightning_eoss.measurements.spectrum import Spectra, spectra
from lightning_eoss.training.monitor import Look, Monitor
from lightning_eoss.training.plan import VARIANCE_SAMPLES, Prospect, cut_full, full_samples, pass_seconds
from lightning_eoss.training.watch import Picture


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
    follows_sampler = False

    def __init__(
        self,
        *,
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
        checks.arguments(steps=steps, num_probes=num_probes, augmented_passes=augmented_passes)
        checks.one_of("mode", mode, ("as_trained", "eval"), "use 'as_trained' or 'eval'.")
        super().__init__(
            "density",
            every_n_train_steps=every_n_train_steps,
            overhead=overhead,
            max_seconds=max_seconds,
            batch_size=batch_size,
            full_batch_samples=full_batch_samples,
            loss_fn=loss_fn,
            dataloader=dataloader,
            num_samples=num_samples,
            seed=seed,
            operator=operator,
            outputs_fn=outputs_fn,
            evaluating=mode == "eval",
        )
        self.steps, self.num_probes, self.augmented_passes, self.mode = steps, num_probes, augmented_passes, mode

    def foresee(self, look: Look) -> Prospect:
        """As many samples of the full batch as there is time for."""
        plan, findings, total = look.solver.plan, look.solver.findings, look.data.source.num_samples
        passes = self.steps * self.num_probes
        dear = pass_seconds(plan, findings, full_samples(plan, total) * self.augmented_passes, passes)
        others = (plan.step_size + VARIANCE_SAMPLES) * findings.loading
        plan, seconds = cut_full(plan, total, dear, self.max_seconds - others)
        seconds += others
        what = f"spectral densities of {plan.full_batch_samples:,} of {total:,} samples and of a batch of"
        passes *= self.augmented_passes
        notes = [f"{what} {plan.step_size}", f"{passes} passes, about {seconds:.2g} s"]
        if look.data.sampler is not None:
            notes.append("the sampler is not uniform, the batch is")
        return Prospect(plan, {"density": seconds}, notes)

    def measure(self, look: Look) -> Spectra:
        """Both densities at these weights."""
        given = {"steps": self.steps, "num_probes": self.num_probes, "augmented_passes": self.augmented_passes}
        return spectra(look.solver, **given)

    def show(self, trainer: Any, result: Spectra) -> tuple[dict[str, float], list[Picture]]:
        """Scalars, and both densities as stems."""
        return spectrum_scalars(result), [partial(write_spectrum, spectra=result)]
