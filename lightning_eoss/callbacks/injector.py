"""`GradientNoiseInjector`: gradient descent on all samples, with noise of a chosen kind. It changes training."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Part, full_batch
from lightning_eoss.curvature.memory import out_of_memory
from lightning_eoss.curvature.objective import Objective, unflattened, while_loading
from lightning_eoss.curvature.operators import gradient_graph
from lightning_eoss.curvature.per_sample import is_mean, sample_gradients
from lightning_eoss.curvature.seeds import Use, derived_seed
from lightning_eoss.theory.gradient_noise import Noise, gradient_with_noise
from lightning_eoss.training.probe import only_optimizer, refuse, refuse_frozen, trains_nothing, usual_parts
from lightning_eoss.training.watch import Watch

_ENTRIES = 2**26  # of gradients of samples that are held at once


class GradientNoiseInjector(Callback):
    r"""Replaces each step's gradient by that of all samples plus noise like that of a mini-batch.

    **This changes training.** It is an experiment, not a monitor: which part of the noise of SGD makes it go where it
    goes? Only the gradient is replaced, and nothing is left of the batch's own:

    - ``"full"``: Gaussian with the covariance of a batch's gradient. It keeps the directions of the noise.
    - ``"diagonal"``: Gaussian with the diagonal of that covariance.
    - ``"isotropic"``: the same variance in all directions, with the same trace.
    - ``"multiplicative"``: each sample's gradient is multiplied by a number from :math:`\mathcal{N}(1, n / b - 1)`.
    - ``"none"``: gradient descent on all samples.

    The covariance is that of the n samples at the weights of the step, exactly, for b of them drawn without
    replacement (see :func:`~lightning_eoss.theory.gradient_noise.gradient_with_noise`); noise of different steps is
    independent. It is a function of the seed and the number of the step alone. So it draws from no generator that
    training uses, and a run that goes on from a checkpoint takes the same steps.

    What happens around it:

    - Training's own forward and backward pass still runs on its own batch: what it logs, its BatchNorm statistics and
      the random numbers that it draws are what they were. Take a small `batch_size` in the loader to keep that cheap.
    - The gradient is replaced just before the optimizer's step, once for all accumulated batches, after mixed precision
      has unscaled it and before it is clipped: clipping acts on the noise, too. It is taken in the parameters' own
      precision, and hooks of tensors and parameters do not act on it.
    - The module is in the mode in which it trains. Dropout and augmentation are drawn anew at each step. With noise,
      each sample is a batch of its own; where their mean is not the batch's gradient, that is said, and a module that
      takes no batch of one is refused.

    Cost: a gradient of all samples at each step, two or three with noise. Held at once are 64 million numbers of
    gradients at most, and the batches of the step, up to 1 GiB.

    Args:
        noise: Which noise.
        batch_size: Samples b of the batch whose noise is imitated; None: as many as training's own step has.
        full_batch_samples: The samples are a fixed random subset of this size; None: all.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar`` in place of `training_step`.
        dataloader: Data in place of training's: a DataLoader or an iterable of batches.
        num_samples: Samples of a ready batch of ``dataloader``, a number or a function of a batch; None: what the batch
            says (``batch_size``, ``num_graphs``), or the length that all its tensors have.
        seed: Fixes all random numbers.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.
        MisconfigurationException: At `setup` or `on_fit_start`, if the gradient cannot be replaced.

    Example:
        >>> GradientNoiseInjector(noise="isotropic", batch_size=16).noise
        'isotropic'

    Source: Andreyev and Beneventano, section 5.1; Hoffer, Hubara and Soudry, appendix, Figure 3.
    """

    def __init__(
        self,
        *,
        noise: Literal["full", "diagonal", "isotropic", "multiplicative", "none"] = "full",
        batch_size: int | None = None,
        full_batch_samples: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | Callable[[Any], int] | None = None,
        seed: int = 0,
    ) -> None:
        kinds = get_args(Noise)
        checks.one_of("noise", noise, (*kinds, "none"), f"choose one of {', '.join(kinds)} or none.")
        checks.arguments(batch_size=batch_size, loss_fn=loss_fn, seed=seed, full_batch_samples=full_batch_samples)
        self.noise = noise
        self.batch_size = batch_size
        self.full_batch_samples = full_batch_samples
        self.seed = seed
        self.watch = Watch(type(self).__name__, loss_fn, dataloader, full_batch_samples, num_samples)
        self._began = False
        self._batch_idx = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be evaluated a second time, and forgets an earlier fit's data."""
        if stage == "fit":
            refuse(trainer, pl_module, type(self).__name__, loss_fn=self.watch.loss_fn)
            self.watch.data, self._began = None, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses optimizers whose gradient is not what they step on."""
        name = type(self).__name__
        refuse_frozen(pl_module, name)
        optimizer = only_optimizer(trainer, name, "each would step on the gradient of the same loss. Train with one.")
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and any(group.get("fused") for group in optimizer.param_groups):
            raise MisconfigurationException(
                f"{name} does not support fused=True under precision='16-mixed': the optimizer unscales gradients "
                "itself, and would shrink the one it is given. Use precision='bf16-mixed', or leave out fused."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remembers what `training_step` is told."""
        self._batch_idx = batch_idx

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Replaces the gradient. An optimizer that asks again in the same step (LBFGS) gets the same noise."""
        if trains_nothing(trainer):  # SWA ends with a step on no gradient at all
            return
        with (
            self.watch.forgiving(first=True, vital=True),  # a step on another gradient would go unnoticed
            self.watch.objective(trainer, pl_module, self._batch_idx) as objective,
        ):
            gradient = self._gradient(trainer, objective)
        pieces = unflattened(gradient, objective.parameters)
        for parameter, piece in zip(objective.parameters, pieces, strict=True):
            if parameter.grad is not None or bool(piece.any()):  # what no sample uses takes no step, as ever
                parameter.grad = piece

    def _gradient(self, trainer: Any, objective: Objective) -> Tensor:
        """(P,) what the step goes by."""
        data, step = self.watch.data, trainer.global_step
        assert data is not None
        chunks = full_batch(data.source, data.batch_size, max_samples=self.full_batch_samples, seed=self.seed)
        seeds = (derived_seed(self.seed, Use.INJECTED_CHUNKS, step, number) for number in range(len(chunks)))
        parts = [replace(each, seed=seed) for each, seed in zip(chunks, seeds, strict=True)]
        count = sum(part.size for part in parts)
        size = self.batch_size or min(count, data.source.size(range(data.batch_size)) * usual_parts(trainer))
        at_once = max(1, _ENTRIES // objective.num_parameters)
        if not self._began:
            self._began = True
            self._begin(objective, parts[0], count, size, at_once)
        if self.noise == "none":
            terms = (part.weight * gradient_graph(objective, part, create_graph=False).gradient for part in parts)
            return sum(terms, torch.zeros(()))
        gradients = (rows for part in parts for rows in sample_gradients(objective, part, at_once))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, Use.INJECTED_NOISE, step))
        mean, noise = gradient_with_noise(gradients, count, noise=self.noise, batch_size=size, generator=generator)
        return mean + noise

    def _begin(self, objective: Objective, part: Part, count: int, size: int, at_once: int) -> None:
        """Says what is going to be done, and whether samples have gradients of their own."""
        what = f"this changes training: each step goes by the gradient of {count:,} samples"
        if self.noise == "none":
            self.watch.announce([f"{what}, without noise"])
            return
        self.watch.announce([f"{what}, with {self.noise} noise as of {size}"])
        needs = f"{type(self).__name__}(noise={self.noise!r}) needs the gradient of each single sample"
        mean, square, seen = torch.zeros(()), torch.zeros(()), 0
        try:
            for rows in sample_gradients(objective, part, at_once):
                mean, square = mean + rows.sum(0) / part.size, square + rows.square().sum() / part.size
                seen += len(rows)
        except Exception as error:
            if out_of_memory(error) or while_loading(error):
                raise
            raise MisconfigurationException(
                f"{needs}, and a batch of one has no loss here (BatchNorm in train mode takes none): {error} "
                "Use noise='none', or pass loss_fn=, a loss that each sample has alone."
            ) from error
        if seen != part.size:
            raise MisconfigurationException(
                f"{needs}, and those of a ready batch cannot be told apart: not all that it holds are tensors of its "
                "length. Pass dataloader= as a DataLoader over a map-style data set."
            )
        if not is_mean(mean, gradient_graph(objective, part, create_graph=False).gradient, square):
            self.watch.say(
                "the gradients of single samples do not average to that of their batch (BatchNorm in train mode, a "
                "loss that is no mean over samples), so steps go by their mean, not by the batch's gradient. "
                "Use noise='none', or pass loss_fn=, the mean over samples of a loss that each has alone."
            )
