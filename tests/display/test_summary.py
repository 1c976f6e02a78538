"""What was logged is read back as it was, and told in a few lines."""

from collections.abc import Callable
from os import utime
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_eoss.display import tags
from lightning_eoss.display.figures import Curve
from lightning_eoss.display.summary import read_curves, summary_table, verdict

Curves = dict[str, Curve]


def test_curves_come_back_as_they_were_logged(
    tmp_path: Path, curves: Curves, write_run: Callable[[Path], None]
) -> None:
    write_run(tmp_path / "logs" / "version_0")
    (run,) = read_curves(tmp_path).items()
    assert run[0] == "logs/version_0"
    assert run[1].keys() == curves.keys()
    for tag, (steps, values) in curves.items():
        assert run[1][tag] == (steps, pytest.approx(values, rel=1e-6))  # event files hold float32


def test_runs_are_found_at_any_depth_the_latest_last_and_others_left_out(
    tmp_path: Path, write_run: Callable[[Path], None]
) -> None:
    for name, time in (("a", 2e9), ("deeper/b", 1e9)):
        write_run(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            utime(file, (time, time))
    with SummaryWriter(str(tmp_path / "not_ours")) as writer:
        writer.add_scalar("train_loss", 1.0, 0)
    assert list(read_curves(tmp_path)) == ["deeper/b", "a"]
    assert list(read_curves(tmp_path / "a")) == ["."]


def test_more_points_than_tensorboard_shows_are_all_read(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(11_000):
            writer.add_scalar(tags.CURRENT_BATCH, step, step)
    assert read_curves(tmp_path)["."][tags.CURRENT_BATCH][0] == list(range(11_000))


def test_the_table_has_first_largest_last_interval_and_ratio() -> None:
    curves: Curves = {tags.MINI_BS: ([0, 1, 2], [1.0, 3.0, 2.5]), tags.EDGE_RATIO: ([0, 1, 2], [0.5, 1.5, 1.25])}
    lower, upper = tags.interval(tags.MINI_BS)
    curves |= {lower: ([0, 1, 2], [0.0, 0.0, 2.25]), upper: ([0, 1, 2], [0.0, 0.0, 2.75])}
    curves[tags.THRESHOLD] = ([0], [20_000.0])
    head, mini_bs, threshold = summary_table(curves).splitlines()
    assert head.split() == ["first", "max", "last", "95", "%", "interval", "edge", "ratio"]
    assert mini_bs.split() == ["MiniBS", "1", "3", "2.5", "[2.25,", "2.75]", "1.25"]
    assert threshold.split() == ["threshold", "20,000", "20,000", "20,000"]


def test_the_table_lines_up(curves: Curves) -> None:
    head, *rows = summary_table(curves).splitlines()
    assert len(rows) == 6
    end = head.index("last") + len("last")
    assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows)


@pytest.mark.parametrize(
    ("phase", "words"), [(0, "Sharpening"), (1, "At the edge"), (2, "Beyond the edge"), (3, "Catapult")]
)
def test_the_verdict_is_the_logged_phase_with_the_mean_of_the_last_five(phase: int, words: str) -> None:
    ratios = [9.0, 1.0, 1.1, 1.2, 1.3, 1.4]
    curves: Curves = {
        tags.EDGE_RATIO_DIRECTIONAL: (list(range(6)), ratios),
        tags.PHASE: ([3, 5], [0.0, float(phase)]),
    }
    # Student: 1.2 +- 2.776445 * .158114 / sqrt(5)
    expected = f"{words}: directional edge ratio = 1.20 [1.00, 1.40] over the last 5 measurements"
    assert verdict(curves) == expected


def test_the_verdict_falls_back_on_what_there_is() -> None:
    ratio: Curves = {tags.EDGE_RATIO_FULL_BS: ([0, 1], [0.5, 0.625])}
    assert verdict(ratio) == "Too early for a verdict: FullBS edge ratio = 0.62 at measurement 2"
    assert verdict({tags.MINI_BS: ([0], [1.0])}) == "No verdict: no edge ratio was logged"
