"""`SpectralLearningRate`: learning rate and momentum of SGD, read off the Hessian of a batch while a model trains."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, random_batches
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, check_operator, curvature_of
from lightning_eoss.curvature.objective import Objective, real
from lightning_eoss.curvature.operators import Scaling, krylov_like
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.curvature.seeds import derived_seed
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.display import page, tags
from lightning_eoss.isolation.isolate import Isolation
from lightning_eoss.linalg.density import SpectralDensity, random_probes, spectral_density
from lightning_eoss.theory.scaling import curvature_range, nesterov, polyak
from lightning_eoss.training.data import sampler_batches
from lightning_eoss.training.probe import only_optimizer, refuse, refuse_frozen
from lightning_eoss.training.rates import is_a
from lightning_eoss.training.watch import Watch

Rule = Literal["nesterov", "polyak"]

_SCHEDULED = "a learning-rate scheduler would overwrite what the spectrum says, and the other way round"
_UNCHANGED = "so learning rate and momentum stay as they are"
_ROUNDING = 100  # times eps and the largest curvature: what is smaller is zero, as in `SpectralDensity`


@dataclass(frozen=True)
class LearnedRates:
    """What one look at the spectrum says."""

    lr: float  # of the parameter group with the largest one
    momentum: float
    largest: float  # curvature that they go by, coupled weight decay included
    smallest: float
    batch_size: int  # samples of the batch that was measured


class SpectralLearningRate(Callback):
    r"""Learns learning rate and momentum of SGD from the spectrum of the batch Hessian, while a model trains.

    This is an intervention: it changes training. At the start of every n-th epoch, the first one included, it takes a
    random batch of training's size (accumulation included), runs a few Lanczos steps on its Hessian H from a random
    vector, and sets for all epochs until the next time

    .. math:: \alpha = \frac{1}{\lambda_1}, \quad
        \rho = \frac{\sqrt{\lambda_1} - \sqrt{\lambda_P}}{\sqrt{\lambda_1} + \sqrt{\lambda_P}} \quad\text{(nesterov)},
        \qquad \alpha = \left(\frac{2}{\sqrt{\lambda_1} + \sqrt{\lambda_P}}\right)^2, \quad
        \rho = \left(\frac{\sqrt{\lambda_1} - \sqrt{\lambda_P}}{\sqrt{\lambda_1} + \sqrt{\lambda_P}}\right)^2
        \quad\text{(polyak)}

    with the largest and the smallest curvature of the positive-definite approximation
    :math:`|R^{1/2} (H + W) R^{1/2}|` (eigenvalues by their size). W is the optimizer's coupled weight decay. R holds
    the rates of the parameter groups relative to the largest one: groups keep the ratios that they come with, the
    largest gets :math:`\alpha`, and none exceeds it. Neither zeros nor the Ritz value that holds more than half of the
    spectral mass, the bulk next to them, are the smallest curvature. Where nothing is left to go by, or the loss is not
    finite, nothing is changed.

    Each group's `lr`, `momentum`, `nesterov` and `dampening` (0) are written, nothing else: momentum buffers stay.
    Checkpoints hold them with the optimizer, so a resumed run goes on with the same rates. The callback puts itself
    before all others, so that LearningRateMonitor (`logging_interval="step"`) and the monitors of this package see the
    rates of the step that comes.

    **Where it fails.** The rates are those of a quadratic, the one of a single batch. Polyak's are next to the edge of
    stability for that batch, and beyond it for those that are sharper. Nesterov's have a third to spare, which is too
    little for small batches. And where a network fits its data to the end (cross entropy), curvature vanishes and the
    rate grows without limit. On the digits, under half the squared error, both rules trained faster than a rate of .05
    with momentum .9 when batches held all samples, and Nesterov's when they held 128. With batches of 16, and under
    cross entropy, both diverged sooner or later. Set `max_learning_rate` there.

    The paper averages weights near the end, as all methods must that do not decay the rate: put Lightning's
    `WeightAveraging` beside it. `StochasticWeightAveraging` is refused, because it brings a scheduler of its own.

    Cost: `steps` products of a batch each time, a product being about 1.4 gradients.

    Args:
        rule: ``"nesterov"`` (Nesterov's momentum) or ``"polyak"`` (heavy ball).
        every_n_epochs: Set both at the start of every n-th epoch.
        steps: Lanczos steps.
        max_momentum: Upper limit of the momentum, below 1. Polyak's learning rate goes with it.
        max_learning_rate: Upper limit of the learning rate; None: none.
        dry_run: Log what would be set, and change nothing.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar`` in place of `training_step`, where that cannot be evaluated
            twice.
        dataloader: Data to measure on, in place of training's: a DataLoader or an iterable of batches.
        num_samples: Samples of a ready batch of ``dataloader``, a number or a function of a batch; None: what the batch
            says (``batch_size``, ``num_graphs``), or the length that all its tensors have.
        seed: Fixes all random numbers of the callback.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix in its place, which is the other usual
            positive-definite approximation.
        outputs_fn: ``outputs_fn(pl_module, batch) -> (outputs, criterion)`` for ``"ggn"``, see `SharpnessMonitor`.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When fit begins, if the optimizer is not one plain SGD, if there is a learning-rate
            scheduler (`dry_run` allows it), or if the training cannot be measured.

    Example:
        Weights averaged over the last 20 of 200 epochs:

        >>> from lightning.pytorch.callbacks import WeightAveraging
        >>> class AverageLast(WeightAveraging):
        ...     def should_update(self, step_idx=None, epoch_idx=None):
        ...         return epoch_idx is not None and epoch_idx >= 180
        >>> callbacks = [SpectralLearningRate(), AverageLast()]  # Trainer(max_epochs=200, callbacks=callbacks)
        >>> callbacks[0].every_n_epochs, callbacks[0].steps
        (20, 20)

    Source: Granziol, Zohren and Roberts, section 10.2, equations (24) and (25) corrected.
    """

    dashboard_categories = frozenset({tags.LEARNED_RATES})  # what it shows on the dashboard

    def __init__(
        self,
        rule: Rule = "nesterov",
        every_n_epochs: int = 20,
        steps: int = 20,
        max_momentum: float = 0.99,
        max_learning_rate: float | None = None,
        dry_run: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | Callable[[Any], int] | None = None,
        seed: int = 0,
        operator: Kind = "hessian",
        outputs_fn: OutputsFn | None = None,
    ) -> None:
        checks.settings(seed=seed, loss_fn=loss_fn)
        check_operator(operator, outputs_fn)
        checks.one_of("rule", rule, get_args(Rule), "use 'nesterov', or 'polyak' for the heavy ball.")
        for name, value, least in (("every_n_epochs", every_n_epochs, 1), ("steps", steps, 2)):
            checks.whole(name, value, least, f"must be at least {least}: nothing could be learned from less.")
        if not 0 <= max_momentum < 1:
            raise ValueError(f"max_momentum={max_momentum} is not from 0 to below 1: steps of momentum 1 never settle.")
        if max_learning_rate is not None and not max_learning_rate > 0:
            raise ValueError(f"max_learning_rate={max_learning_rate} must be positive, or None for no limit.")
        self.rule = rule
        self.every_n_epochs = int(every_n_epochs)
        self.steps = int(steps)
        self.max_momentum = max_momentum
        self.max_learning_rate = max_learning_rate
        self.dry_run = dry_run
        self.seed = seed
        self.operator = operator
        self.outputs_fn = outputs_fn
        self.last: LearnedRates | None = None  # what was learned last
        self._watch = Watch(type(self).__name__, loss_fn, dataloader, num_samples=num_samples, page=page.write_page)
        self._findings: Findings | None = None
        self._last_epoch: int | None = None  # in which it was time

    @property
    def history(self) -> list[dict[str, float]]:
        """The scalars of every change, oldest first, each with its `step`; thinned above 10,000."""
        return self._watch.history

    # ---- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be measured, goes before all other callbacks, and forgets an earlier fit."""
        if stage != "fit":
            return
        refuse(trainer, pl_module, type(self).__name__, loss_fn=self._watch.loss_fn)
        self._watch.count_twins(trainer, self)
        if not self.dry_run and any(is_a(each, "StochasticWeightAveraging") for each in trainer.callbacks):
            raise MisconfigurationException(
                f"{type(self).__name__} does not work beside StochasticWeightAveraging, which anneals the learning "
                f"rate by a scheduler of its own: {_SCHEDULED}. Average by lightning.pytorch.callbacks.WeightAveraging."
            )
        # A new list: the Trainer walks through the old one just now.
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]
        self._findings = self._last_epoch = self._watch.data = self.last = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses optimizers that the rules are not made for, and schedulers."""
        refuse_frozen(pl_module, type(self).__name__)
        _refuse_optimizer(trainer, type(self).__name__)
        if trainer.lr_scheduler_configs and not self.dry_run:
            kinds = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
            raise MisconfigurationException(
                f"{type(self).__name__} does not work beside {kinds}: {_SCHEDULED}. Return the optimizer alone from "
                f"configure_optimizers, or read what would be set with {type(self).__name__}(dry_run=True)."
            )
        self._watch.begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measures and sets the rates before the first step of an epoch, where it is time."""
        epoch = trainer.current_epoch
        if epoch % self.every_n_epochs != 0 or epoch == self._last_epoch:
            return
        self._last_epoch = epoch
        learned = None
        with self._watch.forgiving(first=self._findings is None):
            learned = self._watch.sparing(lambda: self._learn(trainer, pl_module, batch_idx))
        if learned is not None:
            self._apply(trainer, learned)

    # ---- what --------------------------------------------------------------------------------------------------------

    def _learn(self, trainer: Any, pl_module: Any, batch_idx: int) -> LearnedRates | None:
        """What the spectrum of a batch says; None where it says nothing."""
        with self._watch.objective(trainer, pl_module, batch_idx) as (objective, isolation):
            density, size = self._density(trainer, objective, isolation)
        if density is None:
            return None
        nodes, weights = density.stems()
        largest, smallest = curvature_range(nodes.numpy(), weights.numpy(), tol=_ROUNDING * density.eps)
        if math.isnan(largest):
            self._watch.say(
                "the spectrum of a batch has no largest and smallest curvature: its Ritz values are not finite, or "
                f"fewer than two are neither zero nor the bulk, {_UNCHANGED}. More steps= tell more of it."
            )
            return None
        rule = nesterov if self.rule == "nesterov" else polyak
        lr, momentum = rule(largest, smallest, max_momentum=self.max_momentum)
        if self.max_learning_rate is not None:
            lr = min(lr, self.max_learning_rate)
        return LearnedRates(lr, momentum, largest, smallest, size)

    def _density(self, trainer: Any, objective: Objective, isolation: Isolation) -> tuple[SpectralDensity | None, int]:
        """The spectrum of a random batch, as the optimizer's steps see it, and how many samples it has."""
        data, stream = self._watch.data, trainer.global_step
        assert data is not None
        _, parts = self._watch.step_size(trainer, None)
        if self._findings is None:
            findings = preflight(objective, data.batch_size, parts=parts, seed=self.seed)
            if findings.seconds == 0:
                self._watch.say(f"the loss is not finite and has no spectrum, {_UNCHANGED}.")
                return None, 0
            for warning in findings.warnings:
                self._watch.say(warning)
            self._findings = findings
        plan = Plan(data.batch_size, parts, seed=self.seed, memory_bytes=objective.cache.limit)
        plan = self._watch.within(plan, self._findings, objective)
        isolation.reseed(derived_seed(self.seed, 11, stream))  # samplers may draw from any generator
        batch = self._batch(plan, derived_seed(self.seed, 12, stream))
        solver = Solver(
            objective,
            plan,
            self._findings,
            torch.Generator().manual_seed(derived_seed(self.seed, 13, stream)),
            scaling=_coordinates(trainer.optimizers[0], objective),
            curvature=curvature_of(self.operator, self.outputs_fn, objective, data.batch_size),
        )
        start = random_probes(1, objective.num_parameters, solver.generator, like=solver.like)
        steps = max(2, min(self.steps, int(plan.memory_bytes / solver.vector_bytes)))
        return spectral_density(solver.operator([batch]).matvec, start, steps=steps), solver.step_samples

    def _batch(self, plan: Plan, seed: int) -> Batch:
        """A random batch, drawn as training draws its own."""
        data = self._watch.data
        assert data is not None
        drawn = () if data.sampler is None else sampler_batches(data, parts=plan.parts, count=1, seed=seed)
        uniform = random_batches(data.source, plan.batch_size, parts=plan.parts, seed=seed)
        return next(iter(drawn), None) or next(uniform)

    # ---- where -------------------------------------------------------------------------------------------------------

    def _apply(self, trainer: Any, learned: LearnedRates) -> None:
        """Sets the rates, says so and logs them."""
        if trainer.lr_scheduler_configs and not self.dry_run:
            self._watch.say(f"a scheduler has come up during training: {_SCHEDULED}, {_UNCHANGED}.")
            return
        groups, self.last = trainer.optimizers[0].param_groups, learned
        before = f"lr {float(groups[0]['lr']):.3g}, momentum {groups[0]['momentum']:.3g}"
        suggested = [learned.lr * ratio for ratio in _ratios(groups)]
        if not self.dry_run:
            for group, lr in zip(groups, suggested, strict=True):
                _write(group, lr, learned.momentum, is_nesterov=self.rule == "nesterov")
        self._watch.tell(
            [
                f"epoch {trainer.current_epoch}: {before} {'would become' if self.dry_run else 'become'} "
                f"lr {suggested[0]:.3g}, momentum {learned.momentum:.3g} ({self.rule})",
                f"curvature of a batch of {learned.batch_size} from {learned.smallest:.3g} to {learned.largest:.3g}",
            ]
        )
        self._watch.publish(
            trainer,
            self,
            {
                tags.LEARNING_RATE_APPLIED: float(groups[0]["lr"]),
                tags.LEARNING_RATE_SUGGESTED: suggested[0],
                tags.LEARNING_RATE_MOMENTUM: learned.momentum,
                tags.LEARNING_RATE_LARGEST: learned.largest,
                tags.LEARNING_RATE_SMALLEST: learned.smallest,
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """The history, and the epoch in which it was time last; the rates are the optimizer's."""
        return {"history": self.history, "last_epoch": self._last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved callback stood."""
        self._watch.history = list(state_dict["history"])
        self._last_epoch = state_dict["last_epoch"]


def _refuse_optimizer(trainer: Any, name: str) -> None:
    """Raises where the rules are not made for the steps."""
    otherwise = "which of them the curvature of the loss belongs to is not known. Leave one."
    optimizer = only_optimizer(trainer, name, otherwise)
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(SGD.step):
        raise MisconfigurationException(
            f"{name} does not work with {type(optimizer).__name__}: the heavy ball and Nesterov's gradient are steps "
            "of torch.optim.SGD, and the rates that are best for them are best for no other. Use torch.optim.SGD, or "
            "leave the callback out."
        )
    if any(group["maximize"] for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"{name} does not work with maximize=True: uphill, negative curvature decides, and the rules know of "
            "positive curvature alone. Minimize the negative loss."
        )


def _ratios(groups: list[dict[str, Any]]) -> list[float]:
    """The groups' learning rates relative to the largest one; 1 where all are 0."""
    rates = [float(group["lr"]) for group in groups]
    largest = max(rates)
    return [rate / largest if largest > 0 else 1.0 for rate in rates]


def _coordinates(optimizer: Optimizer, objective: Objective) -> Scaling:
    """Coordinates in which all groups have the rate of the largest, and coupled weight decay is curvature."""
    groups, like = optimizer.param_groups, krylov_like(objective)
    entries = [
        (id(parameter), math.inf if ratio == 0 else 1 / ratio, float(group["weight_decay"]))
        for group, ratio in zip(groups, _ratios(groups), strict=True)
        for parameter in group["params"]
    ]
    known = {key: (limit, decay) for key, *(limit, decay) in entries}
    sizes = [(real(parameter).numel(), *known[id(parameter)]) for parameter in objective.parameters]
    limits = torch.cat([like.new_full((size,), limit) for size, limit, _ in sizes])
    return Scaling(limits, torch.cat([like.new_full((size,), decay) for size, _, decay in sizes]))


def _write(group: dict[str, Any], lr: float, momentum: float, *, is_nesterov: bool) -> None:
    """Into a parameter group; a learning rate that is a tensor stays the same tensor, as compiled steps want it."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].fill_(lr)
    else:
        group["lr"] = lr
    group.update(momentum=momentum, nesterov=is_nesterov, dampening=0)
