"""Holds the architecture: who may import whom, who may touch what Lightning keeps private, and the size of files."""

import ast
import io
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_eoss"
FILES = sorted(PACKAGE.rglob("*.py"))

NUMERIC = {"torch", "numpy", "scipy"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
DRAWING = {"tensorboard", "matplotlib"}
BOTTOM = {"linalg", "theory"}
CORE = {"isolation", "curvature", "measurements"}
OUTER = {"training", "display", "metrics"}

# Layer: (the layers it may import apart from itself, the libraries it may import apart from Python's own)
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "checks": (set(), set()),
    "linalg": (set(), NUMERIC),
    "theory": (set(), NUMERIC),
    "isolation": (set(), NUMERIC),
    "curvature": (BOTTOM | {"isolation"}, NUMERIC),
    "measurements": (BOTTOM | {"isolation", "curvature"}, NUMERIC),
    "display": (BOTTOM | CORE, NUMERIC | DRAWING),
    "training": (BOTTOM | CORE | {"display"}, NUMERIC | LIGHTNING),  # a monitor has a page, always
    "metrics": (BOTTOM | CORE, NUMERIC | LIGHTNING),
    "callbacks": (BOTTOM | CORE | OUTER, NUMERIC | LIGHTNING),
    "demo": (BOTTOM | CORE | OUTER | {"callbacks", "__init__"}, NUMERIC | LIGHTNING | {"sklearn"}),
    "cli": (BOTTOM | CORE | OUTER | {"callbacks", "demo", "__init__"}, NUMERIC | LIGHTNING),
    "__init__": (set(), set()),
    "__main__": ({"cli"}, set()),
}
# Lines of code, at most, without docstrings and comments.
MOST_LINES = {
    "checks": 67,
    "linalg": 354,
    "theory": 990,
    "isolation": 400,
    "curvature": 1304,
    "measurements": 1031,
    "display": 662,
    "training": 1352,
    "metrics": 31,
    "callbacks": 1016,
    "demo": 59,
    "cli": 82,
    "__init__": 14,
    "__main__": 4,
}
FOR_EVERYONE = {"lightning_eoss.theory.statistics", "lightning_eoss.checks"}
NAMED_TUPLE = {"_asdict", "_fields", "_replace"}  # public, in spite of their names

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def layer_of(module: str) -> str:
    """The second part of a module's name; the package itself is the layer ``__init__``."""
    return [*module.split("."), "__init__"][1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(path: Path) -> Iterator[str]:
    """The modules that a file imports, be it in a function or for type checking."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            origin = ".".join([*base, *filter(None, [node.module])])
            yield from (origin if is_member(origin, alias.name) else f"{origin}.{alias.name}" for alias in node.names)


def is_member(origin: str, name: str) -> bool:
    """Whether ``name`` in ``from origin import name`` is no module of ours."""
    target = PACKAGE.parent.joinpath(*origin.split("."), name)
    return not (target.is_dir() or target.with_suffix(".py").is_file())


def private_members(path: Path) -> Iterator[str]:
    """Private members that a file takes, by attribute or by name, from anything but its own classes and torch."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "torch") | ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(str(name)), *_]):
                pass
            case _:
                continue
        if name.startswith("_") and not name.endswith("__") and name not in NAMED_TUPLE:
            yield f"line {node.lineno}: {name}"


def lines_of_code(source: str) -> int:
    """The number of lines that hold code, not counting docstrings, comments and blank lines."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.AST(body=[ast.Expr(value=ast.Constant(str())) as docstring, *_]):
                lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


@every_file
def test_imports_go_down(path: Path) -> None:
    layer = layer_of(module_name(path))
    ours, theirs = LAYERS[layer]
    for module in imported_modules(path):
        library = module.split(".")[0]
        if library == PACKAGE.name:
            allowed = layer_of(module) in ours | {layer} or module in FOR_EVERYONE
        else:
            allowed = library in theirs or library in sys.stdlib_module_names
        assert allowed, f"{layer} may not import {module}"


@every_file
def test_only_training_touches_private_members(path: Path) -> None:
    layer = layer_of(module_name(path))
    if layer != "training" and LAYERS[layer][1] & LIGHTNING:  # the others hold no Trainer
        assert not list(private_members(path))


def test_the_lower_layers_import_without_frameworks() -> None:
    modules = [module_name(p) for p in FILES if layer_of(module_name(p)) in {"__init__", *BOTTOM, *CORE}]
    heavy = LIGHTNING | DRAWING | {"sklearn"}
    script = f"import sys, {', '.join(modules)}; print(*sorted({heavy!r} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@every_file
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert lines_of_code(source) <= 350
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    texts = {each.name: textwrap.dedent(ast.get_source_segment(source, each, padded=True) or "") for each in functions}
    assert [name for name, text in texts.items() if lines_of_code(text) > 60] == []


def test_the_package_stays_small() -> None:
    """Layer by layer, so that what grows is seen where it grows. Only a new feature may raise a number."""
    found = dict.fromkeys(MOST_LINES, 0)
    for path in FILES:
        found[layer_of(module_name(path))] += lines_of_code(path.read_text())
    assert {layer: lines for layer, lines in found.items() if lines > MOST_LINES[layer]} == {}


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "trainer._results\nself._mine\nself.trainer._theirs\ngetattr(trainer, '_loop', 1)\nt.__class__\nx._asdict()\n"
    )
    assert list(private_members(bad)) == ["line 1: _results", "line 3: _theirs", "line 4: _loop"]
    assert lines_of_code('"""Doc."""\n\n# note\ndef f():\n    """Doc\n    more."""\n    return (1,\n        2)\n') == 3


def test_no_test_imports_another() -> None:
    """What several need is in a module of its own, so that a test can be moved, run and read alone."""
    for path in Path(__file__).parent.rglob("test_*.py"):
        names = [part for module in imported_modules(path) for part in module.split(".")]
        assert not [name for name in names if name.startswith("test_")], path
