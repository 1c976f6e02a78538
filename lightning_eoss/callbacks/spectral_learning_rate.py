"""`SpectralLearningRate`: learning rate and momentum of SGD, read off the Hessian of a batch while a model trains."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD

from lightning_eoss import checks
from lightning_eoss.curvature.batches import Batch, random_batches
from lightning_eoss.curvature.gauss_newton import Kind, OutputsFn, check_operator, curvature_of
from lightning_eoss.curvature.objective import Objective
from lightning_eoss.curvature.preflight import Findings, preflight
from lightning_eoss.curvature.seeds import Use
from lightning_eoss.curvature.solver import Plan, Solver
from lightning_eoss.display import tags
from lightning_eoss.linalg.density import SpectralDensity, spectral_density
from lightning_eoss.theory.scaling import Acceleration, LearnedRates, learned_rates, relative_limits, relative_rates
from lightning_eoss.training.data import TrainingData, sampler_batches
from lightning_eoss.training.monitor import Publisher
from lightning_eoss.training.probe import coordinates_of, only_optimizer, refuse, refuse_frozen
from lightning_eoss.training.rates import is_a, write_rate
from lightning_eoss.training.watch import Watch

_SCHEDULED = "a learning-rate scheduler would overwrite what the spectrum says, and the other way round"
_UNCHANGED = "so learning rate and momentum stay as they are"
_ROUNDING = 100  # times eps and the largest curvature: what is smaller is zero, as in `SpectralDensity`


class SpectralLearningRate(Publisher):
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
        *,
        rule: Acceleration = "nesterov",
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
        checks.arguments(seed=seed, loss_fn=loss_fn)
        check_operator(operator, outputs_fn)
        checks.one_of("rule", rule, get_args(Acceleration), "use 'nesterov', or 'polyak' for the heavy ball.")
        for name, value, least in (("every_n_epochs", every_n_epochs, 1), ("steps", steps, 2)):
            checks.whole(name, value, least, f"must be at least {least}: nothing could be learned from less.")
        if not 0 <= max_momentum < 1:
            raise ValueError(f"max_momentum={max_momentum} is not from 0 to below 1: steps of momentum 1 never settle.")
        words = "must be positive, or None for no limit."
        checks.number("max_learning_rate", max_learning_rate, words, above=0, none=True)
        self.rule, self.every_n_epochs, self.steps = rule, int(every_n_epochs), int(steps)
        self.max_momentum, self.max_learning_rate = max_momentum, max_learning_rate
        self.dry_run, self.seed, self.operator, self.outputs_fn = dry_run, seed, operator, outputs_fn
        self.latest: LearnedRates | None = None  # what was learned last
        self.watch = Watch(type(self).__name__, loss_fn, dataloader, num_samples=num_samples)
        self._findings: Findings | None = None
        self._last_epoch: int | None = None  # in which it was time

    # ---- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be measured, goes before all other callbacks, and forgets an earlier fit."""
        if stage != "fit":
            return
        refuse(trainer, pl_module, type(self).__name__, loss_fn=self.watch.loss_fn)
        self.watch.count_twins(trainer, self)
        if not self.dry_run and any(is_a(each, "StochasticWeightAveraging") for each in trainer.callbacks):
            raise MisconfigurationException(
                f"{type(self).__name__} does not work beside StochasticWeightAveraging, which anneals the learning "
                f"rate by a scheduler of its own: {_SCHEDULED}. Average by lightning.pytorch.callbacks.WeightAveraging."
            )
        # A new list: the Trainer walks through the old one just now.
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]
        self._findings = self._last_epoch = self.watch.data = self.latest = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses optimizers that the rules are not made for, and schedulers."""
        refuse_frozen(pl_module, type(self).__name__)
        _refuse_other_than_sgd(trainer, type(self).__name__)
        if trainer.lr_scheduler_configs and not self.dry_run:
            kinds = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
            raise MisconfigurationException(
                f"{type(self).__name__} does not work beside {kinds}: {_SCHEDULED}. Return the optimizer alone from "
                f"configure_optimizers, or read what would be set with {type(self).__name__}(dry_run=True)."
            )
        self.watch.begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measures and sets the rates before the first step of an epoch, where it is time."""
        epoch = trainer.current_epoch
        if epoch % self.every_n_epochs != 0 or epoch == self._last_epoch:
            return
        self._last_epoch = epoch
        learned = None
        with self.watch.forgiving(first=self._findings is None):
            learned = self.watch.sparing(lambda: self._learn(trainer, pl_module, batch_idx))
        if learned is not None:
            self._set(trainer, learned)

    # ---- what --------------------------------------------------------------------------------------------------------

    def _learn(self, trainer: Any, pl_module: Any, batch_idx: int) -> LearnedRates | None:
        """What the spectrum of a batch says; None where it says nothing."""
        with self.watch.objective(trainer, pl_module, batch_idx) as objective:
            if self._findings is None:
                self._findings = self._first_look(trainer, objective)
            if self._findings is None:
                return None
            density, size = self._density(trainer, objective, self._findings)
        nodes, weights = density.stems()
        learned = learned_rates(
            nodes.numpy(),
            weights.numpy(),
            self.rule,
            batch_size=size,
            tol=_ROUNDING * density.eps,
            max_momentum=self.max_momentum,
            max_learning_rate=self.max_learning_rate,
        )
        if learned is None:
            self.watch.say(
                "the spectrum of a batch has no largest and smallest curvature: its Ritz values are not finite, or "
                f"fewer than two are neither zero nor the bulk, {_UNCHANGED}. More steps= tell more of it."
            )
        return learned

    def _first_look(self, trainer: Any, objective: Objective) -> Findings | None:
        """What there is to know of the loss before it is measured; None where it is not finite."""
        batch_size, parts = self.watch.step_size(trainer, None)
        findings = preflight(objective, batch_size, parts=parts, seed=self.seed)
        if findings.seconds == 0:
            self.watch.say(f"the loss is not finite and has no spectrum, {_UNCHANGED}.")
            return None
        self.watch.say(*findings.warnings)
        return findings

    def _density(self, trainer: Any, objective: Objective, findings: Findings) -> tuple[SpectralDensity, int]:
        """The spectrum of a random batch, as the optimizer's steps see it, and how many samples it has."""
        data = self.watch.data
        assert data is not None
        size, parts = self.watch.step_size(trainer, None)
        plan = Plan(size, parts, seed=self.seed, memory_bytes=objective.cache.limit)
        plan = self.watch.within(plan, findings, objective)
        solver = Solver(
            objective,
            plan,
            findings,
            stream=trainer.global_step,
            coordinates=coordinates_of(relative_limits(trainer.optimizers[0]), objective.parameters, objective.like),
            curvature=curvature_of(self.operator, self.outputs_fn, objective, size),
        ).drawing(Use.RATES)
        objective.isolation.reseed(solver.seed(Use.RATES_ISOLATION))  # samplers may draw from any generator
        batch = _batch(data, plan, solver.seed(Use.RATES_BATCH))
        start = solver.probes(1)
        steps = max(2, min(self.steps, int(plan.memory_bytes / solver.vector_bytes)))
        return spectral_density(solver.operator([batch]).matvec, start, steps=steps), solver.step_samples

    # ---- where -------------------------------------------------------------------------------------------------------

    def _set(self, trainer: Any, learned: LearnedRates) -> None:
        """Sets the rates, says so and logs them."""
        if trainer.lr_scheduler_configs and not self.dry_run:
            self.watch.say(f"a scheduler has come up during training: {_SCHEDULED}, {_UNCHANGED}.")
            return
        groups, self.latest = trainer.optimizers[0].param_groups, learned
        before = f"lr {float(groups[0]['lr']):.3g}, momentum {groups[0]['momentum']:.3g}"
        suggested = [learned.lr * ratio for ratio in relative_rates([group["lr"] for group in groups])]
        if not self.dry_run:
            for group, lr in zip(groups, suggested, strict=True):
                write_rate(group, lr)
                group.update(momentum=learned.momentum, nesterov=self.rule == "nesterov", dampening=0)
        become = "would become" if self.dry_run else "become"
        after = f"lr {suggested[0]:.3g}, momentum {learned.momentum:.3g} ({self.rule})"
        curvature = f"curvature of a batch of {learned.batch_size} from {learned.smallest:.3g} to {learned.largest:.3g}"
        self.watch.tell([f"epoch {trainer.current_epoch}: {before} {become} {after}", curvature])
        values = {
            tags.LEARNING_RATE_APPLIED: float(groups[0]["lr"]),
            tags.LEARNING_RATE_SUGGESTED: suggested[0],
            tags.LEARNING_RATE_MOMENTUM: learned.momentum,
            tags.LEARNING_RATE_LARGEST: learned.largest,
            tags.LEARNING_RATE_SMALLEST: learned.smallest,
        }
        self.watch.publish(trainer, self, values)

    def state_dict(self) -> dict[str, Any]:
        """The history, and the epoch in which it was time last; the rates are the optimizer's."""
        return {"history": self.history, "last_epoch": self._last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved callback stood."""
        self.watch.history = list(state_dict["history"])
        self._last_epoch = state_dict["last_epoch"]


def _refuse_other_than_sgd(trainer: Any, name: str) -> None:
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


def _batch(data: TrainingData, plan: Plan, seed: int) -> Batch:
    """A random batch, drawn as training draws its own."""
    drawn = () if data.sampler is None else sampler_batches(data, parts=plan.parts, count=1, seed=seed)
    return next(iter(drawn), None) or next(random_batches(data.source, plan.batch_size, parts=plan.parts, seed=seed))
