"""What a running Trainer can be asked without disturbing it: its loss, its data, its batch size, its learning rates.

Modules and trainers are recognised by what they can do, not by their class: `lightning.pytorch` and `pytorch_lightning`
are the same code under two names. This and `quiet` are the only places that touch private members of Lightning.
"""

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_eoss import checks
from lightning_eoss.curvature.isolation import isolated
from lightning_eoss.curvature.objective import (
    Batch,
    BatchListSource,
    CombinedSource,
    DatasetSource,
    Part,
    Source,
    derived_seed,
    loading,
    num_samples_of,
    real,
)
from lightning_eoss.curvature.operators import Scaling
from lightning_eoss.theory.stability import NoLimits, StabilityLimits, stability_limits

LossFn = Callable[[Any, Any], Tensor]

_EPOCH = 10_000  # batches of a sampler that are looked at, at most
PASS_NUM_SAMPLES = "Pass num_samples=, the samples of each batch, or a function of a batch that returns them."
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


def only_optimizer(trainer: Any, name: str, otherwise: str) -> Any:
    """The optimizer of a Trainer, at `on_fit_start` or later; raises where there are several, with the way out."""
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"{name} works with one optimizer, and this Trainer has {len(trainer.optimizers)}: {otherwise}"
        )
    return trainer.optimizers[0]


def check_dataloader(dataloader: Any, name: str, *, ready: bool = False) -> None:
    """Raises where data of a monitor's own are not batches, or come only once.

    Args:
        dataloader: What a user gave.
        name: The callback's name, for the message.
        ready: Whether the user says how many samples its batches have.

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
    if isinstance(dataloader, list) and dataloader and not ready and _is_sample(dataloader[0]):
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
    batch_size: int  # of a loader batch, the mean where they differ; 1 where the source counts ready batches
    objects: tuple[Any, ...]  # that loading may change
    sampler: Any = None  # a batch sampler that is not uniform; None: batches are uniform without replacement
    sizes: tuple[int, int] | None = None  # least and most samples of the sampler's own batches, where it decides
    loader: Any = None  # that they were taken from

    def batches_of(self, num_samples: int | None) -> int | None:
        """A number of samples in units of the source: ready batches count as one each."""
        total = self.source.num_samples
        return num_samples and -(-num_samples * total // self.source.size(range(total)))


def is_live(data: TrainingData, trainer: Any) -> bool:
    """Whether training still draws from the loader that the data were taken from: Trainers can reload it."""
    return any(data.loader is loader for loader in trainer.fit_loop._combined_loader.flattened)


def training_data(
    trainer: Any,
    pl_module: nn.Module,
    name: str,
    dataloader: Iterable[Any] | None = None,
    max_samples: int | None = None,
    count: Callable[[Any], int | None] = num_samples_of,
) -> TrainingData:
    """The samples that training can draw, reached past its live iterator.

    Args:
        trainer: The Trainer, its data set up.
        pl_module: Its module, whose transfer hooks are applied.
        name: The callback's name, for messages.
        dataloader: Other data, a DataLoader or an iterable of batches.
        max_samples: Where batches have to be kept, how many samples of them; None: all.
        count: Samples in a ready batch; None where that is not known.

    Returns:
        The data.

    Raises:
        MisconfigurationException: If the data cannot be read a second time.
    """

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # type: ignore[operator]
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    if dataloader is None:
        return _read_again(trainer, pl_module, name, transfer)
    combined = getattr(dataloader, "flattened", [])  # the loaders of a CombinedLoader
    with isolated(pl_module, [each for one in (dataloader, *combined) for each in _reachable(one)]):
        if _indexable(dataloader):
            return _indexed(dataloader, transfer, None)
        its_batches = (batch for batch, _idx, _dataloader_idx in dataloader) if combined else dataloader
        with loading():
            batches = list(_first_samples(its_batches, max_samples, count))
    if not batches:
        raise MisconfigurationException(
            f"{name} got dataloader={dataloader!r}, which has no batches. Pass data to measure on."
        )
    sizes = [_num_samples(batch, count, getattr(dataloader, "iterables", None)) for batch in batches]
    if None in sizes:
        raise MisconfigurationException(
            f"{name} cannot tell how many samples a batch of dataloader= has ({type(batches[0]).__name__}: its tensors "
            f"differ in length, or there are none), and FullBS is a mean over samples. {PASS_NUM_SAMPLES}"
        )
    return TrainingData(BatchListSource(batches, [size or 0 for size in sizes], transfer), 1, ())


def _num_samples(batch: Any, count: Callable[[Any], int | None], iterables: Any) -> int | None:
    """Samples in a ready batch, in one of several loaders those of all of them; None where that is not known."""
    size = count(batch)
    if size is not None or iterables is None:
        return size
    pieces = [count(each) for each in tree_flatten(iterables)[1].flatten_up_to(batch) if each is not None]
    return None if None in pieces else sum(each or 0 for each in pieces)


def _read_again(trainer: Any, pl_module: nn.Module, name: str, transfer: Callable[[Any], Any]) -> TrainingData:
    """The samples of training's own loaders."""
    combined = trainer.fit_loop._combined_loader
    loaders, structure = combined.flattened, tree_flatten(combined.iterables)[1]
    several = len(loaders) > 1
    strange = [each for each in loaders if not _indexable(each) or (several and not _is_uniform(each))]
    if strange or not loaders:
        raise MisconfigurationException(
            f"{name} cannot read {_kind(strange)} a second time without disturbing training. Pass dataloader=, "
            "a loader (or a list) of the batches that training_step gets, on data to measure on."
        )

    def build(batches: list[Any]) -> Any:
        return transfer(tree_unflatten(batches, structure))

    with isolated(pl_module, [each for loader in loaders for each in _reachable(loader)]):
        if not several:
            return _indexed(loaders[0], lambda batch: build([batch]), _reach(trainer, loaders[0]))
        found = [_indexed(each, lambda batch: batch, _reach(trainer, each)) for each in loaders]
    source = CombinedSource(
        [data.source for data in found if isinstance(data.source, DatasetSource)],
        [data.batch_size for data in found],
        [not isinstance(each.sampler, SequentialSampler) for each in loaders],
        combined._mode != "max_size",
        build,
    )
    return TrainingData(source, 1, tuple(each for data in found for each in data.objects), loader=loaders[0])


def _reachable(loader: Any) -> list[Any]:
    """A loader, and what iterating it draws from."""
    return [loader, *(getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler"))]


def check_chosen_batch_size(batch_size: int | None, data: TrainingData) -> None:
    """Raises where batches of a chosen size cannot be drawn.

    Args:
        batch_size: What a user chose; None: training's own.
        data: Where batches come from.

    Raises:
        ValueError: With the way out.
    """
    if batch_size is not None and not data.source.divisible:
        raise ValueError(
            f"batch_size={batch_size} cannot be made of the ready batches of dataloader= or of several loaders: leave "
            "it out, or pass a DataLoader over a map-style data set."
        )


def _first_samples(
    batches: Iterable[Any], num_samples: int | None, count: Callable[[Any], int | None]
) -> Iterator[Any]:
    """Batches until so many samples have come; one at least, where a batch does not tell."""
    seen = 0
    for batch in batches:
        yield batch
        seen += count(batch) or 1
        if num_samples is not None and seen >= num_samples:
            return


def _indexable(loader: Any) -> bool:
    """Whether a loader's samples can be fetched by index."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _kind(loaders: list[Any]) -> str:
    """Names what cannot be read again."""
    if not loaders:
        return "no training loader"
    if isinstance(getattr(loaders[0], "dataset", None), IterableDataset):
        return "an IterableDataset"
    if _indexable(loaders[0]):
        return "one of several training loaders, whose sampler is not uniform,"
    return f"a {type(loaders[0]).__name__} without a batch sampler"


def _is_uniform(loader: Any) -> bool:
    """Whether batches of a fixed size come uniformly and without replacement."""
    sampler = loader.sampler
    known = type(sampler) in (RandomSampler, SequentialSampler, SubsetRandomSampler)
    return type(loader.batch_sampler) is BatchSampler and known and not getattr(sampler, "replacement", False)


def _reach(trainer: Any, loader: Any) -> int | None:
    """Samples from the first on that a sequential pass comes to under limit_train_batches; None: all."""
    if not isinstance(loader.sampler, SequentialSampler) or trainer.num_training_batches == float("inf"):
        return None
    return int(trainer.num_training_batches) * (loader.batch_size or 1)


def _indexed(loader: Any, transfer: Callable[[Any], Any], reach: int | None) -> TrainingData:
    """Samples by index, drawn as the loader's sampler would."""
    dataset, batch_sampler, sampler = loader.dataset, loader.batch_sampler, loader.sampler
    population: Any = None
    uniform, own = _is_uniform(loader), own_batch_sizes(loader)
    if uniform and isinstance(sampler, SubsetRandomSampler):
        population = tuple(int(index) for index in sampler.indices)
    elif uniform and isinstance(sampler, SequentialSampler) and reach is not None and reach < len(dataset):
        population = range(reach)
    batch_size = round(fmean(own)) if own else batch_sampler.batch_size
    collate = loader.collate_fn
    return TrainingData(
        source=DatasetSource(dataset, collate, transfer, population),
        batch_size=min(batch_size, len(population or dataset)),
        objects=(dataset, sampler, batch_sampler, getattr(collate, "__self__", collate)),
        sampler=None if uniform else batch_sampler,
        sizes=(min(own), max(own)) if own else None,
        loader=loader,
    )


def own_batch_sizes(loader: Any) -> list[int]:
    """Sizes of an epoch's batches where a batch sampler of its own makes them, from a copy; nothing where torch's does.

    To be called where generators are isolated. What such a sampler calls its `batch_size` need not be a number of
    samples, nor need its batches have one size (token budgets, buckets).
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None or type(batch_sampler) is BatchSampler:
        return []
    return [len(each) for each in islice(_reseeded(batch_sampler, 0), _EPOCH)]


def sampler_batches(data: TrainingData, *, parts: int, count: int, seed: int) -> Iterator[Batch]:
    """Batches as a weighted or custom sampler draws them, from a copy of it on a generator of our own.

    A sampler may sort its batches, so steps are taken from anywhere in its epochs.

    Args:
        data: Training data with a sampler; to be called where the generators are isolated.
        parts: Loader batches of one optimizer step.
        count: Batches wanted.
        seed: Seed of the generator.

    Returns:
        At most `count` batches. Where batches have one size, a short last one is left out unless all steps have it.
    """
    found, chooser = list[list[tuple[int, ...]]](), random.Random(seed)
    for epoch in range(count):
        drawn = [tuple(each) for each in islice(_reseeded(data.sampler, derived_seed(seed, epoch)), _EPOCH)]
        full = [each for each in drawn if len(each) == data.batch_size or data.sizes]
        drawn = full if len(full) >= parts else drawn
        steps = [drawn[first : first + parts] for first in range(0, len(drawn) - parts + 1, parts)]
        found += chooser.sample(steps, min(len(steps), count - len(found)))
        if not steps or len(found) == count:
            break
    return (
        tuple(
            Part(1 / parts, len(each), each, derived_seed(seed, 2**31 + number * parts + place))
            for place, each in enumerate(step)
        )
        for number, step in enumerate(found)
    )


def _reseeded(sampler: Any, seed: int) -> Any:
    """A copy of a sampler that draws from a torch generator of its own; others are seeded with the isolation."""
    twin = copy.copy(sampler)
    for name, value in getattr(twin, "__dict__", {}).items():
        if isinstance(value, torch.Generator) or (name == "generator" and value is None):
            setattr(twin, name, torch.Generator().manual_seed(seed))
        elif name == "sampler":
            setattr(twin, name, _reseeded(value, seed))
    return twin


def step_parts(trainer: Any) -> int:
    """Loader batches of the step at hand: fewer than the accumulation's where the epoch ends before.

    Known from its last batch on (`steps_now`), before that where the epoch's length is.
    """
    accumulated, ready = int(trainer.accumulate_grad_batches), trainer.fit_loop.epoch_loop.batch_progress.current.ready
    done = max(0, ready - 1) // accumulated * accumulated  # in earlier steps
    return ready - done if steps_now(trainer) else int(min(accumulated, trainer.num_training_batches - done))


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
        torch.cat([(like.new_ones(real(p).shape) * pair[which]).detach().reshape(-1) for p, *pair in pairs])
        for which in (0, 1)
    ]
    return Scaling(diagonals[0], diagonals[1])
