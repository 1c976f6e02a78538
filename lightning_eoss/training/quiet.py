"""Running a LightningModule's own code while nobody listens: no logs, no prints, and nothing left behind."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from lightning_eoss.isolation.isolate import Isolation, isolated

_SPEAKERS = ("log", "log_dict", "print")


@contextlib.contextmanager
def quiet(trainer: Any, pl_module: nn.Module, objects: Iterable[Any]) -> Iterator[Isolation]:
    """`isolation.isolate.isolated` for a module in a Trainer.

    On top of it, `self.log`, `self.log_dict` and `self.print` do nothing (of every LightningModule inside), and loggers
    swallow what they are told: neither values nor results nor synchronisation come from a measurement.
    """
    with contextlib.ExitStack() as stack:
        for module in pl_module.modules():
            if all(hasattr(type(module), name) for name in _SPEAKERS):  # a `log` alone may well be a logarithm
                for name in _SPEAKERS:
                    _shadow(stack, module, name)
        loggers = trainer.loggers
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield stack.enter_context(isolated(pl_module, [*objects, *_state_of(trainer)]))


def _state_of(trainer: Any) -> list[Any]:
    """What a training step can reach through its Trainer; loops, strategies and loggers are left alone."""
    return [
        getattr(trainer, "datamodule", None),
        trainer.optimizers,
        trainer.lr_scheduler_configs,
        vars(trainer),  # `should_stop`, and the callbacks
        vars(trainer._logger_connector),  # the metrics that callbacks see
        getattr(trainer, "_results", None),
    ]


def _shadow(stack: contextlib.ExitStack, module: nn.Module, name: str) -> None:
    """Hides a method behind an instance attribute that does nothing."""
    attributes = module.__dict__
    if name in attributes:
        stack.callback(attributes.__setitem__, name, attributes[name])
    else:
        stack.callback(attributes.pop, name, None)
    attributes[name] = lambda *_args, **_kwargs: None
