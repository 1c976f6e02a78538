"""The command line: `lightning-eoss demo` shows the edge of stability, `lightning-eoss report` draws any run."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_eoss import __version__
from lightning_eoss.display import tags
from lightning_eoss.display.figures import prediction_figure, sharpness_figure
from lightning_eoss.display.summary import read_curves, summary_table, verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code, 0.

    Raises:
        SystemExit: With code 1 and a message where an extra is not installed or there is nothing to report, with code 2
            where the arguments are wrong.

    Example:
        >>> main(["report", "no/such/directory"])
        Traceback (most recent call last):
        SystemExit: no TensorBoard event file below no/such/directory has a sharpness
    """
    parser = argparse.ArgumentParser(prog="lightning-eoss", description="Live sharpness at the edge of stability.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{demo,report}")

    demo = commands.add_parser("demo", help="train a small network on digits, up to the edge of stability")
    for option, kind, default, words in (
        ("--max-steps", _ranged(int, 1), 4000, "steps to train"),
        ("--batch-size", _ranged(int, 1, 1024), 16, "up to 1024, which is all the data"),
        ("--learning-rate", _ranged(float, 1e-9), 1.0, "the threshold is 2/lr"),
        ("--every-n-train-steps", _ranged(int, 1), 100, "steps between measurements"),
        ("--seed", _ranged(int, 0, 2**32 - 1), 0, "of weights and batches"),
        ("--out", Path, Path(), "directory for lightning_logs and sharpness.png"),
    ):
        demo.add_argument(option, type=kind, default=default, help=f"{words} (%(default)s)")
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="tabulate and draw a run from its TensorBoard files")
    report.add_argument("logdir", type=Path, help="directory of event files, searched recursively")
    report.add_argument("--run", dest="name", help="which run below it; by default the one written to last")
    report.add_argument("--out", type=Path, default=Path("sharpness.png"), help="picture to write (%(default)s)")
    report.set_defaults(run=_report)

    options = vars(parser.parse_args(argv))
    options.pop("run")(**options)
    return 0


def _ranged(kind: type[int] | type[float], least: float, most: float = sys.maxsize) -> Callable[[str], float]:
    """A type of arguments: numbers that make sense."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            limit = f"at least {least}" if most == sys.maxsize else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limit}")
        return value

    parsed.__name__ = kind.__name__  # argparse speaks of an "invalid int value"
    return parsed


def _demo(out: Path, **options: Any) -> None:
    """Trains, reports, and says how to look at it in TensorBoard."""
    _require("sklearn", "matplotlib", extra="examples")  # before the training, not after it
    from lightning_eoss.demo import train

    run = train(out, **options)
    print()
    _report(run, None, out / "sharpness.png")
    # An environment that was never activated, as that of `make demo`, is not on the PATH.
    program = "tensorboard" if shutil.which("tensorboard") else str(Path(sys.executable).with_name("tensorboard"))
    print(f"TensorBoard: {shlex.join([program, '--logdir', str(run.parent)])}")
    print("             and there the *Custom Scalars* tab: http://localhost:6006/#custom_scalars")


def _report(logdir: Path, name: str | None, out: Path) -> None:
    """Prints the table and the verdict of one run, and draws it."""
    runs = read_curves(logdir)
    if not runs:
        raise SystemExit(f"no TensorBoard event file below {logdir} has a sharpness")
    *_, latest = runs
    name = name or latest
    if name not in runs:
        raise SystemExit(f"--run {name}: not among the runs below {logdir}: {', '.join(runs)}")
    if len(runs) > 1:
        print(f"run {name}, one of {len(runs)} (--run picks another: {', '.join(runs)})\n")
    print(summary_table(runs[name]))
    print(f"\n{verdict(runs[name])}\n")
    _require("matplotlib", extra="plot")
    pictures = {"Picture": (out, sharpness_figure)}
    if tags.PREDICTION_SUBSPACE in runs[name]:
        pictures["Predictions"] = (out.with_name(f"{out.stem}_predictions{out.suffix}"), prediction_figure)
    for title, (path, figure) in pictures.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure(runs[name]).savefig(path)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--out {path}: {error}") from None
        print(f"{title + ':':<13}{path}")


def _require(*modules: str, extra: str) -> None:
    """Ends with the line that installs an extra where a module of it is missing."""
    for module in modules:
        try:
            import_module(module)
        except ImportError:
            raise SystemExit(f'{module} is not installed: pip install "lightning_eoss[{extra}]"') from None
