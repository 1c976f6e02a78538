"""What is handed out: the sdist and the wheel, and the package as it stands in a fresh environment."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest

import lightning_eoss

ROOT = Path(__file__).parents[1]
PINS = {name: str(ROOT / "constraints.txt") for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
NO_NETWORK = "NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Failed to connect|Network is unreachable"


def files_of(folder: str) -> set[str]:
    """The files of a folder of the checkout, without what Python leaves there."""
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not {"__pycache__", "lightning_logs"} & set(path.parts)}


def output_of(*command: object, directory: Path) -> str:
    """What a command prints, away from the checkout and under its pins; skips where the network is missing."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | PINS
    done = subprocess.run(
        [str(each) for each in command], cwd=directory, env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode and (missing := re.search(NO_NETWORK, done.stdout + done.stderr)):
        pytest.skip(f"no package registry can be reached ({missing[0]})")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*options: object, python: Path, directory: Path) -> str:
    """Installs or builds with the pip of this environment, so that fresh ones can do without."""
    quick = ("--timeout", 15, "--retries", 1)  # without a network, say so soon
    return output_of(sys.executable, "-m", "pip", "--python", python, *options, *quick, directory=directory)


def fresh_environment(folder: Path) -> Path:
    """A virtual environment with nothing in it; its interpreter."""
    venv.create(folder)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture(scope="module")
def hatchling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the build backend."""
    if importlib.util.find_spec("hatchling"):
        return Path(sys.executable)
    folder = tmp_path_factory.mktemp("backend")
    python = fresh_environment(folder / "environment")
    pip("install", "hatchling", python=python, directory=folder)
    return python


@pytest.fixture(scope="module")
def built(hatchling: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel, made from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    output_of(hatchling, "-m", "hatchling", "build", "--directory", folder, directory=ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata = metadata_of(wheel)
    about = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert names - about == files_of("lightning_eoss")
    assert {"lightning_eoss/py.typed", "lightning_eoss/__init__.pyi"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in about)
    assert (metadata["Name"], metadata["Version"]) == ("lightning_eoss", lightning_eoss.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_sdist_holds_all_that_its_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        members = [PurePosixPath(member.name) for member in sdist.getmembers() if member.isfile()]
    assert {path.parts[0] for path in members} == {f"lightning_eoss-{lightning_eoss.__version__}"}
    names = {PurePosixPath(*path.parts[1:]).as_posix() for path in members}
    for folder in ("lightning_eoss", "tests", "examples", "papers", "benchmarks", "docs"):
        assert {name for name in names if name.startswith(f"{folder}/")} == files_of(folder)
    files = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "Makefile", "constraints.txt"}
    assert files | {"pyproject.toml", "PKG-INFO"} <= names


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    """As an installer does where it finds no wheel: in an environment of its own, with what the sdist says it needs."""
    sdist, wheel = built
    pip("wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, python=Path(sys.executable), directory=tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(tmp_path / wheel.name) as other:
        assert {name: one.read(name) for name in one.namelist()} == {
            name: other.read(name) for name in other.namelist()
        }


@pytest.mark.slow
@pytest.mark.processes
def test_the_wheel_works_in_a_fresh_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "environment")
    pip("install", "--no-deps", "--no-index", built[1], python=python, directory=tmp_path)
    # The heavy packages of this environment, behind the fresh one's own. A path file within them, as that of a
    # checkout that is installed in place, is not read.
    script = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(output_of(python, "-c", script, directory=tmp_path).strip())
    borrowed = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    said = output_of(python.with_name("lightning-eoss"), "--version", directory=tmp_path)
    assert said == f"lightning-eoss {lightning_eoss.__version__}\n"
    script = "import lightning_eoss as it; print(it.__file__, *(name for name in it.__all__ if getattr(it, name)))"
    file, *names = output_of(python, "-c", script, directory=tmp_path).split()
    assert Path(file).parent == site / "lightning_eoss"
    assert names == lightning_eoss.__all__


def test_the_citation_is_of_this_version() -> None:
    """And of this licence."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {lightning_eoss.__version__}\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation
