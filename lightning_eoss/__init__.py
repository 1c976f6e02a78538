"""Live sharpness monitoring: where a training run stands against the edge of stability, with error bars."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# The table of public names is `__init__.pyi`, which type checkers read, too. Each is imported on first use, so that the
# parts that know no Lightning do not import it.
_TABLE = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_HOME = {line.names[0].name: line.module for line in _TABLE if isinstance(line, ast.ImportFrom)}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Finds a public name in its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(str(_HOME[name])), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
