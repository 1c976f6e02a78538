"""What a running Trainer can be asked without disturbing it: its loss, its data, its batch size, its learning rates.

Modules and trainers are recognised by what they can do, not by their class: `lightning.pytorch` and `pytorch_lightning`
are the same code under two names. This, `data` and `quiet` touch private members of Lightning, and nothing else does.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_eoss import checks
from lightning_eoss.curvature.operators import Coordinates
from lightning_eoss.theory.stability import NoLimits, StabilityLimits, stability_limits

LossFn = Callable[[Any, Any], Tensor]

_ELSEWHERE = (
    "Measure a checkpoint with lightning_eoss.measure_sharpness(model, loss_fn, dataset, batch_size=...) instead."
)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refuse(trainer: Any, pl_module: nn.Module, name: str, *, loss_fn: LossFn | None) -> None:
    """Raises at `setup` where a monitor cannot work."""
    strategy = type(trainer.strategy).__name__
    if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel", "XLA")):
        raise MisconfigurationException(
            f"{name} does not support strategy={strategy}: parameters are sharded, "
            f"so no process can differentiate the loss twice. {_ELSEWHERE}"
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"{name} does not support more than one process yet (world_size={trainer.world_size}): "
            "each would measure its own share of the data. "
            f"Train with devices=1, or: {_ELSEWHERE}"
        )
    if loss_fn is not None:
        checks.loss_function(loss_fn)
        return
    hint = "Pass loss_fn=, a function of (pl_module, batch) that returns the loss to be stepped on and changes nothing."
    if not getattr(pl_module, "automatic_optimization", True):
        raise MisconfigurationException(
            f"{name} cannot evaluate a module with automatic_optimization=False: its training_step would step "
            f"the optimizer. {hint} The Hessian is taken of all trainable parameters, and with several optimizers "
            "(as a GAN has) there is no threshold."
        )
    if not sees_batches(pl_module):
        raise MisconfigurationException(
            f"{name} cannot evaluate training_step(dataloader_iter): it would take batches away from training. {hint}"
        )


def refuse_frozen(pl_module: nn.Module, name: str) -> None:
    """Raises at `on_fit_start` where nothing is trained; before, a module need not have made its parameters."""
    if not any(parameter.requires_grad for parameter in pl_module.parameters()):
        raise MisconfigurationException(
            f"{name} found no parameter with requires_grad=True in {type(pl_module).__name__}, "
            "so the loss has no Hessian. Unfreeze what is trained."
        )


def only_optimizer(trainer: Any, name: str, otherwise: str) -> Any:
    """The optimizer of a Trainer, at `on_fit_start` or later; raises where there are several, with the way out."""
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"{name} works with one optimizer, and this Trainer has {len(trainer.optimizers)}: {otherwise}"
        )
    return trainer.optimizers[0]


def cautions(trainer: Any, pl_module: nn.Module) -> list[str]:
    """Why 2/lr may not be where this training becomes unstable, or not what is seen."""
    found = []
    if trainer.gradient_clip_val:
        found.append(f"gradient_clip_val={trainer.gradient_clip_val} shortens steps")
    for hook in ("optimizer_step", "configure_gradient_clipping"):
        if _overridden(pl_module, hook):
            found.append(f"{hook} is overridden")
    for optimizer in trainer.optimizers:
        if (
            "SAM" in type(optimizer).__name__
            or hasattr(optimizer, "first_step")
            or hasattr(optimizer, "base_optimizer")
        ):
            found.append(f"{type(optimizer).__name__} steps on a gradient from elsewhere")
    sentences = [f"{reason}, so the stability limit of plain steps need not be this run's." for reason in found]
    if _overridden(pl_module, "on_train_batch_start"):
        sentences.append(
            "the module's on_train_batch_start runs after the monitor's: what it sets for the step that comes (a "
            "learning rate, a factor of the loss) is seen one step late. Set it in on_train_batch_end."
        )
    return sentences


def _overridden(pl_module: nn.Module, hook: str) -> bool:
    """Whether a module has a hook of its own."""
    return not getattr(type(pl_module), hook).__module__.startswith(("lightning.", "pytorch_lightning."))


# ---- its loss --------------------------------------------------------------------------------------------------------


def training_loss(
    trainer: Any, pl_module: nn.Module, *, loss_fn: LossFn | None, batch_idx: int, as_trained: bool, evaluating: bool
) -> Callable[[Any], Any]:
    """The loss that training steps on, of a transferred batch, without the division by the accumulation."""
    step = _training_step(pl_module)
    wants_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)  # the rule that Lightning goes by
    device = next(pl_module.parameters()).device.type

    def loss(batch: Any) -> Any:
        if evaluating:  # each time anew: the isolation puts training's modes back
            pl_module.eval()
        with contextlib.ExitStack() as stack:
            stack.enter_context(trainer.precision_plugin.train_step_context())
            if not as_trained:  # of the plugin's context only the autocast goes, a default dtype stays
                stack.enter_context(torch.autocast(device, enabled=False))
            if loss_fn is not None:
                return loss_fn(pl_module, batch)
            output = step(batch, batch_idx) if wants_index else step(batch)
            if output is None:  # training skips this batch; without a loss it has no sharpness
                return torch.tensor(torch.nan, device=next(pl_module.parameters()).device)
            return output.get("loss") if isinstance(output, Mapping) else output

    return loss


def sees_batches(pl_module: nn.Module) -> bool:
    """Whether hooks see the batch that comes; a training_step with a `dataloader_iter` fetches it only later."""
    return "dataloader_iter" not in inspect.signature(_training_step(pl_module)).parameters


def _training_step(pl_module: nn.Module) -> Callable[..., Any]:
    """The module's own training_step, not the compiled one."""
    context: Any = getattr(pl_module, "_compiler_ctx", None) or {}
    step: Any = context.get("original_training_step") or pl_module.training_step
    return step  # type: ignore[no-any-return]


# ---- its steps ------------------------------------------------------------------------------------------------------


def batches_begun(trainer: Any) -> int:
    """Loader batches of the epoch so far, that at hand among them."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def step_parts(trainer: Any, since: int = 0) -> int:
    """Loader batches of the step at hand: fewer than the accumulation's where the epoch ends before.

    Known from its last batch on (`steps_now`), before that where the epoch's length is. Of what an earlier fit has done
    of the step, its first `since` batches of the epoch, no gradient is left.
    """
    accumulated, ready = int(trainer.accumulate_grad_batches), batches_begun(trainer)
    done = max(0, ready - 1) // accumulated * accumulated  # in earlier steps
    end = ready if steps_now(trainer) else int(min(done + accumulated, trainer.num_training_batches))
    return end - max(done, since)


def usual_parts(trainer: Any) -> int:
    """Loader batches of a step that is not the last of an epoch, unless all are."""
    return int(min(trainer.accumulate_grad_batches, trainer.num_training_batches))


def steps_now(trainer: Any) -> bool:
    """Whether the batch at hand is the one after which the optimizer steps, on a gradient of this window."""
    return not (trainer.fit_loop._should_accumulate() or trains_nothing(trainer))


def trains_nothing(trainer: Any) -> bool:
    """Whether no backward pass runs, as in the epoch that SWA updates BatchNorm in."""
    return bool(trainer.fit_loop._skip_backward)


def logging_step(trainer: Any) -> int:
    """The x at which Lightning logs the loss of the batch at hand."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


# ---- its learning rates ----------------------------------------------------------------------------------------------


def applied_limits(trainer: Any) -> StabilityLimits | NoLimits:
    """The optimizer's stability limits with the learning rates of the step that comes next."""
    if len(trainer.optimizers) != 1:
        return NoLimits(f"there are {len(trainer.optimizers)} optimizers")
    return stability_limits(trainer.optimizers[0])


def limits_to_come(trainer: Any) -> bool:
    """Whether the optimizer has no limits before its first step, and will have some after it."""
    limits = applied_limits(trainer)
    return isinstance(limits, NoLimits) and limits.passing


def coordinates_of(limits: StabilityLimits, parameters: list[nn.Parameter], like: Tensor) -> Coordinates:
    """The coordinates in which the top eigenvalue is the edge ratio."""
    owned = {id(p): pair for p, *pair in zip(limits.parameters, limits.limits, limits.weight_decay, strict=True)}
    return Coordinates.of(parameters, owned, like)
