"""One command writes what is committed under `benchmarks/results`, and all of it."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import reproduce

COMMITTED = sorted(reproduce.RESULTS.glob("*.md"))


def headings(text: str) -> list[str]:
    """All headings, without the date and the versions of the first lines."""
    return re.findall(r"^#.*$", re.sub(r"\d{4}-\d\d-\d\d", "DATE", text), re.MULTILINE)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_what_is_committed_is_what_the_command_writes(path: Path) -> None:
    written = reproduce.report({heading: lambda: "| a table |" for heading in reproduce.SECTIONS})
    assert headings(path.read_text()) == headings(written)
    sections = re.split(r"^## .*$", path.read_text(), flags=re.MULTILINE)[1:]
    assert all("|---|" in section for section in sections)


def test_something_is_committed() -> None:
    assert COMMITTED


def test_no_table_is_forgotten() -> None:
    """Every function of the benchmarks that makes a table has its section."""
    modules = [import_module(f"benchmarks.{path.stem}") for path in Path(reproduce.__file__).parent.glob("*.py")]
    tables = {each for module in modules for name, each in vars(module).items() if re.fullmatch(r"(\w+_)?table", name)}
    assert tables == set(reproduce.SECTIONS.values())
