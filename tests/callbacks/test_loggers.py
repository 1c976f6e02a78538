"""What callbacks write: each draws its page, and a logger that fails costs its own points and nothing else."""

import errno
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from lightning_eoss.display import tags
from lightning_eoss.display.page import layout
from tests.runs import (
    OURS,
    PUBLIC_CALLBACKS,
    Regressor,
    assert_same,
    cells,
    fit,
    loader,
    public_callback,
    seeded,
    state_of,
)

EPOCHS = {"WeightDistanceMonitor": 11}  # as its laws ask for


def asked_by_us() -> bool:
    """Whether the caller's caller is the package, not Lightning, which has needs of its own."""
    return str(sys._getframe(2).f_globals["__name__"]).startswith("lightning_eoss.")


def charts_of(page: layout_pb2.Layout) -> dict[str, set[str]]:
    """Titles of the charts, and the tags that each draws."""
    return {
        chart.title: {series.value for series in chart.margin.series}
        | {regex.removesuffix("$").replace("\\", "") for regex in chart.multiline.tag}
        for category in page.category
        for chart in category.chart
    }


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC_CALLBACKS)
@pytest.mark.filterwarnings("ignore")  # what is said of this training is tested elsewhere
def test_each_callback_draws_the_page_of_what_it_logs(name: str, tmp_path: Path) -> None:
    """Alone in a Trainer: all that it logs and that has a chart is on its page, and explained on a card."""
    seeded()
    board = TensorBoardLogger(tmp_path, name="board")
    fit(tmp_path, Regressor(), loader(), public_callback(name), logger=board, max_epochs=EPOCHS.get(name, 2))
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0})
    events.Reload()
    logged = {tag for tag in events.Tags()["scalars"] if tag.startswith(OURS)}
    pages, cards = [], ""
    for tag in events.Tags()["tensors"]:
        texts = [event.tensor_proto.string_val[0] for event in events.Tensors(tag)]
        if tag == metadata.CONFIG_SUMMARY_TAG:
            pages = [layout_pb2.Layout.FromString(text) for text in texts]
        if tag.endswith("/guide/text_summary"):
            (card,) = texts
            cards += card.decode()

    if name == "GradientNoiseInjector":  # an experiment, which shows nothing
        assert not logged and not pages and not cards
        return
    (page,) = pages
    drawn = charts_of(page)
    assert drawn and all(shown & logged for shown in drawn.values())
    everywhere = set().union(*charts_of(layout(tags.CATEGORIES)).values())
    assert logged & everywhere <= set().union(*drawn.values())
    for part in (*drawn, *(f"`{tag}`" for tag in logged & tags.DESCRIPTIONS.keys())):
        assert part in cards


# ---- loggers that fail -----------------------------------------------------------------------------------------------


class Failing(Logger):
    """Fails wherever a callback of ours writes, and takes what Lightning itself logs."""

    name, version = "failing", 0

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(tag.startswith(OURS) for tag in metrics):
            raise self.error

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class FullDisk(Failing):
    """No point can be written."""

    def __init__(self) -> None:
        super().__init__(ValueError("a number is not supported"))  # what TensorBoardLogger makes of any error
        self.error.__cause__ = OSError(errno.ENOSPC, "No space left on device")


class Unreachable(Failing):
    """Not even an experiment can be had; the points themselves it takes."""

    def __init__(self) -> None:
        super().__init__(ConnectionError("nobody answers"))
        self.steps: list[int | None] = []

    @property
    def experiment(self) -> Any:
        if asked_by_us():
            raise self.error

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(tag.startswith(OURS) for tag in metrics):
            self.steps.append(step)


class NoPictures(TensorBoardLogger):
    """Its experiment takes scalars and nothing else."""

    @property
    def experiment(self) -> Any:
        experiment = super().experiment
        for method in ("add_text", "add_histogram", "add_figure"):
            setattr(experiment, method, self._refuse)
        return experiment

    @staticmethod
    def _refuse(*_: Any, **__: Any) -> None:
        raise ValueError("pictures are not for me")


@pytest.mark.parametrize("name", [name for name in PUBLIC_CALLBACKS if name != "GradientNoiseInjector"])
@pytest.mark.filterwarnings("ignore")
def test_a_logger_that_fails_costs_its_own_points_and_no_more(name: str, tmp_path: Path) -> None:
    runs = {}
    for where in ("well", "failing"):
        seeded()
        root = tmp_path / where
        csv, unreachable = CSVLogger(root, name="logs", version=0), Unreachable()
        bad = [FullDisk(), unreachable, NoPictures(root, name="board")] if where == "failing" else []
        callback = public_callback(name)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer = fit(root, Regressor(), loader(), callback, logger=[*bad, csv])
        runs[where] = callback, state_of(trainer), [cells(root), cells(root, ours=True)], said

    (_, state, rows, _), (callback, same_state, same_rows, said) = runs["well"], runs["failing"]
    assert_same(same_state, state)
    assert same_rows[0] == rows[0]  # training's
    assert [row.keys() for row in same_rows[1]] == [row.keys() for row in rows[1]]  # ours, some of them seconds
    assert unreachable.steps == [point["step"] for point in callback.history]
    texts = [str(warning.message) for warning in said if f"{name}: " in str(warning.message)]
    for logger, error in (
        ("FullDisk", "OSError: [Errno 28] No space left on device"),
        ("Unreachable", "ConnectionError: nobody answers"),
        ("NoPictures", "ValueError: pictures are not for me"),
    ):
        message = f"{name}: {logger} failed, and what it was given is not there; training goes on, and other loggers"
        assert [text for text in texts if text.startswith(message)] == [f"{message} get theirs. {error}"]


@pytest.mark.filterwarnings("ignore")
def test_a_logger_that_recovers_gets_its_page(tmp_path: Path) -> None:
    """An experiment that could not be had at first."""

    class Late(TensorBoardLogger):
        calls = 0

        @property
        def experiment(self) -> Any:
            self.calls += (ours := asked_by_us())
            if ours and self.calls == 1:
                raise ConnectionError("nobody answers yet")
            return super().experiment

    seeded()
    board = Late(tmp_path, name="board")
    fit(tmp_path, Regressor(), loader(), public_callback("SharpnessMonitor"), logger=board)
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0})
    events.Reload()
    assert board.calls > 1
    (page,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    assert charts_of(layout_pb2.Layout.FromString(page.tensor_proto.string_val[0]))


@pytest.mark.filterwarnings("ignore")
def test_pictures_that_fail_leave_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("no pictures today")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_histogram", refused)
    monkeypatch.setattr("lightning_eoss.display.page.write_histogram", refused)
    board = TensorBoardLogger(tmp_path, name="board")
    fit(tmp_path, Regressor(), loader(), public_callback("SharpnessMonitor"), logger=board)
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0})
    events.Reload()
    assert events.Tensors(metadata.CONFIG_SUMMARY_TAG) and tags.MINI_BS in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore")
def test_what_one_logger_does_to_its_points_the_next_does_not_see(tmp_path: Path) -> None:
    class Greedy(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            super().log_metrics(dict(metrics), step)
            metrics.clear()

    loggers = [Greedy(tmp_path / "greedy"), CSVLogger(tmp_path, name="logs", version=0)]
    fit(tmp_path, Regressor(), loader(), public_callback("SharpnessMonitor"), logger=loggers)
    assert any(tags.MINI_BS in row for row in cells(tmp_path, ours=True))


def test_an_interrupt_while_writing_is_none_of_ours(tmp_path: Path) -> None:
    class Pressed(Failing):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(tag.startswith(OURS) for tag in metrics):
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, Regressor(), loader(), public_callback("WeightDistanceMonitor"), logger=Pressed(OSError()))
