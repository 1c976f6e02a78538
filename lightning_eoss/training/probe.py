"""What a running Trainer can be asked without disturbing it: its loss, its data, its batch size, its learning rates.

Modules and trainers are recognised by what they can do, not by their class: `lightning.pytorch` and `pytorch_lightning`
are the same code under two names. This and `quiet` are the only places that touch private members of Lightning.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_eoss.curvature.isolation import isolated
from lightning_eoss.curvature.measure import check_loss_fn
from lightning_eoss.curvature.objective import (
    Batch,
    BatchListSource,
    DatasetSource,
    Part,
    Source,
    derived_seed,
    num_samples_of,
)
from lightning_eoss.curvature.operators import Scaling
from lightning_eoss.theory.stability import NoLimits, StabilityLimits, stability_limits

LossFn = Callable[[Any, Any], Tensor]

_ELSEWHERE = (
    "Measure a checkpoint with lightning_eoss.measure_sharpness(model, loss_fn, dataset, batch_size=...) instead."
)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refuse(trainer: Any, pl_module: nn.Module, name: str, *, loss_fn: LossFn | None) -> None:
    """Raises at `setup` where a monitor cannot work.

    Args:
        trainer: The Trainer.
        pl_module: The module that it is about to train.
        name: The callback's name, for the message.
        loss_fn: The user's own loss, where there is one.

    Raises:
        MisconfigurationException: With what is wrong and the way out.
        TypeError: If the loss does not take a module and a batch.
    """
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
        check_loss_fn(loss_fn)
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
    """Raises at `on_fit_start` where nothing is trained; before, a module need not have made its parameters.

    Args:
        pl_module: The module about to be trained.
        name: The callback's name, for the message.

    Raises:
        MisconfigurationException: With the way out.
    """
    if not any(parameter.requires_grad for parameter in pl_module.parameters()):
        raise MisconfigurationException(
            f"{name} found no parameter with requires_grad=True in {type(pl_module).__name__}, "
            "so the loss has no Hessian. Unfreeze what is trained."
        )


def check_dataloader(dataloader: Any, name: str) -> None:
    """Raises where data of a monitor's own are not batches, or come only once.

    Args:
        dataloader: What a user gave.
        name: The callback's name, for the message.

    Raises:
        TypeError: With the way out.
    """
    once = isinstance(dataloader, Iterator) and not hasattr(dataloader, "flattened")  # as CombinedLoaders have
    indexed = hasattr(dataloader, "__getitem__") and not isinstance(dataloader, list)
    if not isinstance(dataloader, Iterable) or isinstance(dataloader, Dataset) or once or indexed:
        raise TypeError(
            f"{name}: dataloader= must be a DataLoader, a list of the batches that training_step gets, or an iterable "
            f"that yields them anew each time, not {type(dataloader).__name__}. Of a data set, pass "
            "DataLoader(dataset, batch_size=...)."
        )
    if isinstance(dataloader, list) and dataloader and _is_sample(dataloader[0]):
        raise TypeError(
            f"{name}: the first entry of dataloader= is a sample, not a batch: what it consists of differs in length. "
            "Pass DataLoader(samples, batch_size=...), or, if these are batches, DataLoader(batches, batch_size=None)."
        )


def _is_sample(entry: Any) -> bool:
    """Whether tensors and numbers side by side have not all one length, as those of a batch have."""
    fields = entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, (list, tuple)) else ()
    lengths = {
        len(each) if isinstance(each, Tensor) and each.ndim else 0
        for each in fields
        if isinstance(each, (Tensor, int, float))
    }
    return len(lengths) > 1 or lengths == {0}


def cautions(trainer: Any, pl_module: nn.Module) -> list[str]:
    """Why 2/lr may not be where this training becomes unstable, or not what is seen.

    Args:
        trainer: The Trainer.
        pl_module: Its module.

    Returns:
        One sentence for each reason.
    """
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
    trainer: Any, pl_module: nn.Module, *, loss_fn: LossFn | None, batch_idx: int, as_trained: bool
) -> Callable[[Any], Any]:
    """The loss that training steps on, as a function of a transferred batch; without the division by the accumulation.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        loss_fn: Replaces `training_step`.
        batch_idx: What `training_step` is told where it asks.
        as_trained: Under the precision plugin's autocast; else in the parameters' own precision.

    Returns:
        A function of a batch.
    """
    step = _training_step(pl_module)
    wants_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)  # the rule that Lightning goes by
    device = next(pl_module.parameters()).device.type

    def loss(batch: Any) -> Any:
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


# ---- its data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """A second way to the samples that training draws from."""

    source: Source
    batch_size: int  # of a loader batch; 1 where the source counts ready batches
    objects: tuple[Any, ...]  # that loading may change
    sampler: Any = None  # a batch sampler that is not uniform; None: batches are uniform without replacement
    loader: Any = None  # that they were taken from


def is_live(data: TrainingData, trainer: Any) -> bool:
    """Whether training still draws from the loader that the data were taken from: Trainers can reload it."""
    return any(data.loader is loader for loader in trainer.fit_loop._combined_loader.flattened)


def training_data(
    trainer: Any,
    pl_module: nn.Module,
    name: str,
    dataloader: Iterable[Any] | None = None,
    max_samples: int | None = None,
) -> TrainingData:
    """The samples that training can draw, reached past its live iterator.

    Args:
        trainer: The Trainer, its data set up.
        pl_module: Its module, whose transfer hooks are applied.
        name: The callback's name, for messages.
        dataloader: Other data, a DataLoader or an iterable of batches.
        max_samples: Where batches have to be kept, how many samples of them; None: all.

    Returns:
        The data.

    Raises:
        MisconfigurationException: If the data cannot be read a second time.
    """

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # type: ignore[operator]
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    loader, reach = dataloader, None
    if loader is None:
        loaders = trainer.fit_loop._combined_loader.flattened
        loader = loaders[0]
        if len(loaders) != 1 or not _indexable(loader):
            what = f"{len(loaders)} training loaders" if len(loaders) != 1 else _kind(loader)
            raise MisconfigurationException(
                f"{name} cannot read {what} a second time without disturbing training. Pass dataloader=, "
                "a loader (or a list) of the batches that training_step gets, on data to measure on."
            )
        reach = _reach(trainer, loader)
    drawn_from = [getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler")]
    combined = getattr(loader, "flattened", [])  # the loaders of a CombinedLoader
    with isolated(pl_module, [loader, *drawn_from, *combined]):  # iterating a loader or a sampler draws from generators
        if _indexable(loader):
            return _indexed(loader, transfer, reach)
        its_batches = (batch for batch, _idx, _dataloader_idx in loader) if combined else loader
        batches = list(_first_samples(its_batches, max_samples))
    if not batches:
        raise MisconfigurationException(
            f"{name} got dataloader={dataloader!r}, which has no batches. Pass data to measure on."
        )
    return TrainingData(BatchListSource(batches, [num_samples_of(batch) for batch in batches], transfer), 1, ())


def check_chosen_batch_size(batch_size: int | None, data: TrainingData) -> None:
    """Raises where batches of a chosen size cannot be drawn.

    Args:
        batch_size: What a user chose; None: training's own.
        data: Where batches come from.

    Raises:
        ValueError: With the way out.
    """
    if batch_size is not None and isinstance(data.source, BatchListSource):
        raise ValueError(
            f"batch_size={batch_size} cannot be made of the ready batches of dataloader=: leave it out, "
            "or pass a DataLoader over a map-style data set."
        )


def _first_samples(batches: Iterable[Any], count: int | None) -> Iterator[Any]:
    """Batches until so many samples have come."""
    seen = 0
    for batch in batches:
        yield batch
        seen += num_samples_of(batch)
        if count is not None and seen >= count:
            return


def _indexable(loader: Any) -> bool:
    """Whether a loader's samples can be fetched by index."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _kind(loader: Any) -> str:
    """Names what cannot be indexed."""
    dataset = getattr(loader, "dataset", None)
    return (
        "an IterableDataset"
        if isinstance(dataset, IterableDataset)
        else f"a {type(loader).__name__} without a batch sampler"
    )


def _reach(trainer: Any, loader: Any) -> int | None:
    """Samples from the first on that a sequential pass comes to under limit_train_batches; None: all."""
    if not isinstance(loader.sampler, SequentialSampler) or trainer.num_training_batches == float("inf"):
        return None
    return int(trainer.num_training_batches) * (loader.batch_size or 1)


def _indexed(loader: Any, transfer: Callable[[Any], Any], reach: int | None) -> TrainingData:
    """Samples by index, drawn as the loader's sampler would."""
    dataset, batch_sampler, sampler = loader.dataset, loader.batch_sampler, loader.sampler
    population: Any = None
    plain = type(batch_sampler) is BatchSampler and not (isinstance(sampler, RandomSampler) and sampler.replacement)
    if plain and type(sampler) is SubsetRandomSampler:
        population = tuple(int(index) for index in sampler.indices)
    elif plain and type(sampler) is SequentialSampler and reach is not None and reach < len(dataset):
        population = range(reach)
    uniform = plain and type(sampler) in (RandomSampler, SequentialSampler, SubsetRandomSampler)
    batch_size = getattr(batch_sampler, "batch_size", None) or len(next(iter(_reseeded(batch_sampler, 0))))
    collate = loader.collate_fn
    return TrainingData(
        source=DatasetSource(dataset, collate, transfer, population),
        batch_size=min(batch_size, len(population or dataset)),
        objects=(dataset, sampler, batch_sampler, getattr(collate, "__self__", collate)),
        sampler=None if uniform else batch_sampler,
        loader=loader,
    )


def sampler_batches(data: TrainingData, *, parts: int, count: int, seed: int) -> Iterator[Batch]:
    """Batches as a weighted or custom sampler draws them, from a copy of it on a generator of our own.

    Args:
        data: Training data with a sampler; to be called where the generators are isolated.
        parts: Loader batches of one optimizer step.
        count: Batches wanted.
        seed: Seed of the generator.

    Returns:
        At most `count` batches; a short last loader batch is left out.
    """
    wanted, found = count * parts, list[tuple[int, ...]]()
    for epoch in range(wanted):
        drawn = [tuple(each) for each in islice(_reseeded(data.sampler, derived_seed(seed, epoch)), wanted)]
        found += [each for each in drawn if len(each) == data.batch_size]
        if not drawn or len(found) >= wanted:
            break
    pieces = [Part(1 / parts, len(each), each, derived_seed(seed, 2**31 + index)) for index, each in enumerate(found)]
    return (tuple(pieces[first : first + parts]) for first in range(0, min(len(pieces), wanted) - parts + 1, parts))


def _reseeded(sampler: Any, seed: int) -> Any:
    """A copy of a sampler that draws from a torch generator of its own; others are seeded with the isolation."""
    twin = copy.copy(sampler)
    for name, value in getattr(twin, "__dict__", {}).items():
        if isinstance(value, torch.Generator) or (name == "generator" and value is None):
            setattr(twin, name, torch.Generator().manual_seed(seed))
        elif name == "sampler":
            setattr(twin, name, _reseeded(value, seed))
    return twin


def effective_parts(trainer: Any) -> int:
    """Loader batches of one optimizer step."""
    return int(trainer.accumulate_grad_batches)


def steps_now(trainer: Any) -> bool:
    """Whether the batch at hand is the one after which the optimizer steps."""
    return not trainer.fit_loop._should_accumulate()


def logging_step(trainer: Any) -> int:
    """The x at which Lightning logs the loss of the batch at hand."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


# ---- its learning rates ----------------------------------------------------------------------------------------------


def applied_limits(trainer: Any) -> StabilityLimits | NoLimits:
    """The optimizer's stability limits with the learning rates of the step that comes next.

    Args:
        trainer: The Trainer, in `on_train_batch_start` or later.

    Returns:
        The limits, or why there are none.
    """
    if len(trainer.optimizers) != 1:
        return NoLimits(f"there are {len(trainer.optimizers)} optimizers")
    return stability_limits(trainer.optimizers[0])


def limits_to_come(trainer: Any) -> bool:
    """Whether the optimizer has no limits before its first step, and will have some after it."""
    limits = applied_limits(trainer)
    return isinstance(limits, NoLimits) and limits.passing


def scaling_of(limits: StabilityLimits, parameters: list[nn.Parameter], like: Tensor) -> Scaling | None:
    """The coordinates in which the top eigenvalue is the edge ratio; None where plain ones will do.

    Args:
        limits: The optimizer's limits.
        parameters: What the Hessian is taken of. Those that the optimizer does not own never move: their limit is
            infinite.
        like: Gives dtype and device.

    Returns:
        The coordinates, or None.
    """
    owned = {id(p): pair for p, *pair in zip(limits.parameters, limits.limits, limits.weight_decay, strict=True)}
    if limits.scalar is not None and all(id(parameter) in owned for parameter in parameters):
        return None
    pairs = [(parameter, *owned.get(id(parameter), (float("inf"), 0.0))) for parameter in parameters]
    diagonals = [
        torch.cat([(torch.ones_like(p, dtype=like.dtype) * pair[which]).detach().reshape(-1) for p, *pair in pairs])
        for which in (0, 1)
    ]
    return Scaling(diagonals[0], diagonals[1])
