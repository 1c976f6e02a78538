"""What arguments may be. A refusal names the argument, its value, and in words of the caller what is wrong."""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from numbers import Integral, Real
from typing import Any

Bound = float | None


def whole(name: str, value: Any, least: int | None = None, words: str = "", *, none: bool = False) -> None:
    """Refuses what counts nothing, and what counts less than the least; None only where that means something."""
    if none and value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a whole number, got {type(value).__name__}.")
    if least is not None and int(value) < least:
        raise ValueError(f"{name}={value} {words}")


def number(
    name: str, value: Any, words: str = "", *, above: Bound = None, below: Bound = None, none: bool = False
) -> None:
    """Refuses what measures nothing, and what does not lie above one number and below another."""
    if none and value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a number, got {type(value).__name__}.")
    if (above is not None and not float(value) > above) or (below is not None and not float(value) < below):
        raise ValueError(f"{name}={value} {words}")


def one_of(name: str, value: Any, choices: Collection[Any], words: str) -> None:
    """Refuses what is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: {words}")


def loss_function(loss_fn: Callable[[Any, Any], Any] | None) -> None:
    """Refuses functions that do not take a module and a batch; None is none, and passes."""
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r} must be a function of (module, batch) that returns the loss.")
    try:
        inspect.signature(loss_fn).bind(None, None)
    except ValueError:  # some functions written in C have no signature
        return
    except TypeError as error:
        raise TypeError(f"loss_fn={loss_fn!r} must take (module, batch) and return the loss: {error}.") from None


def batch_size_of_data(batch_size: int, num_samples: int) -> None:
    """Refuses batch sizes that the data cannot give."""
    whole("batch_size", batch_size)
    if num_samples < 1:
        raise ValueError("dataset is empty, so there is no loss whose sharpness could be measured. Pass training data.")
    if not 1 <= batch_size <= num_samples:
        raise ValueError(
            f"batch_size={batch_size} must lie between 1 and the number of samples, {num_samples}: "
            "mini-batches are drawn without replacement. Choose a smaller batch_size."
        )


def arguments(**given: Any) -> None:
    """Refuses arguments that several functions have in common, by their names; looks at those that are given."""
    for name, value in given.items():
        _ARGUMENTS[name](name, value)


_ARGUMENTS: dict[str, Callable[[str, Any], None]] = {
    "batch_size": partial(whole, least=1, words="must be positive, or None for training's own.", none=True),
    "loss_fn": lambda _, value: loss_function(value),
    "rel_error": partial(
        number, words="must be positive: it is the half-width of MiniBS's interval, relative.", above=0
    ),
    "tol": partial(
        number, words="must be positive, or None for 0.5 rel_error: it is a relative residual.", above=0, none=True
    ),
    "num_batches": partial(whole, least=1, words="must be at least 1: MiniBS is a mean over mini-batches."),
    "seed": partial(whole, least=0, words="must not be negative: it seeds numpy's SeedSequence."),
    "full_batch_samples": partial(
        whole, least=1, words="must be positive, or None to measure FullBS on all samples.", none=True
    ),
    **dict.fromkeys(
        ("steps", "num_probes", "augmented_passes"),
        partial(whole, least=1, words="must be at least 1: nothing would be measured."),
    ),
}
