"""The command line as it is typed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_eoss import __version__
from lightning_eoss.cli import main
from lightning_eoss.display import tags

ROOT = Path(__file__).parents[1]


def write_run(logdir: Path, ratios: Sequence[float] = (0.8, 0.95, 1.05)) -> None:
    with SummaryWriter(str(logdir)) as writer:
        for step, ratio in enumerate(ratios):
            writer.add_scalar(tags.MINI_BS, 2.5 * ratio, step)
            writer.add_scalar(tags.THRESHOLD, 2.0, step)
            writer.add_scalar(tags.EDGE_RATIO_DIRECTIONAL, ratio, step)
            writer.add_scalar(tags.PHASE, 1, step)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in an environment that lacks a package."""
    script = f"import sys; sys.modules[{module!r}] = None; from lightning_eoss.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_report_tabulates_judges_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "version_0")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "new" / "picture.png")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"MiniBS +2 +2\.62 +2\.62", text)
    assert "At the edge: directional edge ratio = 0.93" in text
    assert is_picture(tmp_path / "new" / "picture.png")


def test_report_draws_predictions_where_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    main(["report", str(tmp_path), "--out", str(tmp_path / "plain.png")])
    assert not (tmp_path / "plain_predictions.png").exists()
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for tag in (tags.PREDICTION_SUBSPACE, *tags.interval(tags.PREDICTION_SUBSPACE)):
            writer.add_scalar(tag, 2.2, 1)
    main(["report", str(tmp_path), "--out", str(tmp_path / "picture.png")])
    assert f"Predictions: {tmp_path / 'picture_predictions.png'}" in capsys.readouterr().out
    assert is_picture(tmp_path / "picture_predictions.png")


def test_report_takes_the_latest_run_or_the_one_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ratio, time in (("old", 0.25, 1e9), ("new", 0.5, 2e9)):
        write_run(tmp_path / name, [ratio])
        for file in (tmp_path / name).iterdir():
            os.utime(file, (time, time))
    for arguments, ratio in (([], "0.50"), (["--run", "old"], "0.25")):
        main(["report", str(tmp_path), "--out", str(tmp_path / "a.png"), *arguments])
        text = capsys.readouterr().out
        assert f"directional edge ratio = {ratio}" in text
        assert "one of 2 (--run picks another: old, new)" in text
    with pytest.raises(SystemExit, match=r"--run odd: not among the runs below .*: old, new"):
        main(["report", str(tmp_path), "--run", "odd"])


def test_report_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"no TensorBoard event file below {tmp_path} has a sharpness"):
        main(["report", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-steps", "0"], "--max-steps: 0 is out of range: at least 1"),
        (["--every-n-train-steps", "0"], "--every-n-train-steps: 0 is out of range: at least 1"),
        (["--batch-size", "5000"], "--batch-size: 5000 is out of range: from 1 to 1024"),
        (["--learning-rate", "-1"], "--learning-rate: -1 is out of range: at least 1e-09"),
        (["--learning-rate", "nan"], "--learning-rate: nan is out of range"),
        (["--seed", "-1"], "--seed: -1 is out of range: from 0 to 4294967295"),
        (["--max-steps", "2.5"], "--max-steps: invalid int value: '2.5'"),
    ],
)
def test_demo_refuses_numbers_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *arguments])
    assert message in capsys.readouterr().err


def test_report_into_a_file_that_cannot_be_a_picture(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"--out .*x\.txt: Format 'txt' is not supported"):
        main(["report", str(tmp_path), "--out", str(tmp_path / "x.txt")])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match=r"--out .*folder\.png: .*Is a directory"):
        main(["report", str(tmp_path), "--out", str(tmp_path / "folder.png")])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-eoss {__version__}\n"


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_demo_without_the_extra_prints_how_to_install_it(module: str) -> None:
    result = run_without(module, "demo")
    assert result.returncode == 1
    assert result.stderr == f'{module} is not installed: pip install "lightning_eoss[examples]"\n'


def test_report_without_matplotlib_still_tabulates(tmp_path: Path) -> None:
    write_run(tmp_path)
    result = run_without("matplotlib", "report", str(tmp_path))
    assert result.returncode == 1
    assert "At the edge" in result.stdout
    assert result.stderr == 'matplotlib is not installed: pip install "lightning_eoss[plot]"\n'


def test_demo_trains_reports_and_says_how_to_look(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_eoss", "demo", "--max-steps", "120", "--every-n-train-steps", "20"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert "directional edge ratio = " in result.stdout
    assert is_picture(tmp_path / "sharpness.png")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("TensorBoard: "))
    program, option, logdir = shlex.split(line.removeprefix("TensorBoard: "))
    assert (Path(program).name, option, logdir) == ("tensorboard", "--logdir", str(tmp_path / "lightning_logs"))
    assert "Custom Scalars" in result.stdout
    assert "Warning" not in result.stderr
    assert "num_workers" not in result.stderr


def test_the_quickstart_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--max-steps", "64"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    main(["report", str(tmp_path), "--out", str(tmp_path / "sharpness.png")])
    assert is_picture(tmp_path / "sharpness.png")
