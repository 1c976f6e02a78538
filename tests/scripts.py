"""Scripts of the checkout, run as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: Path, *options: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """What it prints in a directory, once it has ended well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    return done
