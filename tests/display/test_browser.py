"""The dashboard as a person meets it: TensorBoard in a real browser, every chart with its curves."""

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_eoss.display import tags
from lightning_eoss.display.figures import Curve
from lightning_eoss.display.page import layout

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH"),
    pytest.mark.timeout(180),
]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1500"),
]

# TensorBoard's cards live in nested shadow roots, which `--dump-dom` leaves out. A curve is drawn twice, once with its
# markers and once as the end of its band or as its smoothed self; a band is an area. An empty chart has neither.
FUNCTIONS = """
const all = (root, selector) => [...root.querySelectorAll('*')].flatMap(element => [
  ...(element.matches(selector) ? [element] : []),
  ...(element.shadowRoot ? all(element.shadowRoot, selector) : []),
]);
const read = card => ({
  title: all(card, 'tf-card-heading')[0].displayName,
  series: all(card, '.match-list-entry').map(entry => entry.innerText.trim().split(/\\s+/)[1]),
  points: all(card, 'path.line').map(path => path.getAttribute('d').split('L').length),
  bands: all(card, 'path.area').length,
  errors: all(card, '.error-content').map(error => error.innerText),
});
"""
OPEN_CLOSED = (
    FUNCTIONS
    + """
all(document, 'tf-category-paginated-view').filter(category => !category.opened)
  .forEach(category => category.shadowRoot.querySelector('button').click());
"""
)
READ_CHARTS = (
    FUNCTIONS
    + """
all(document, 'tf-custom-scalar-margin-chart-card, tf-custom-scalar-multi-line-chart-card')
  .map(card => read(card.shadowRoot));
"""
)


class Page:
    """A page in headless Chromium, driven through the pipe of its DevTools protocol."""

    def __init__(self, to_browser: int, from_browser: int, url: str) -> None:
        self._write, self._read, self._id, self._buffer = to_browser, from_browser, 0, b""
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url=url)["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        self._id += 1
        os.write(
            self._write,
            json.dumps({"id": self._id, "method": method, "params": params} | self._session).encode() + b"\0",
        )
        while True:
            while b"\0" not in self._buffer:
                assert select.select([self._read], [], [], 60)[0], f"Chromium did not answer {method} within 60 s"
                chunk = os.read(self._read, 1 << 20)
                assert chunk, f"Chromium ended before it answered {method}"
                self._buffer += chunk
            message, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(message)
            if answer.get("id") == self._id:  # the rest are events
                assert "error" not in answer, answer
                return dict(answer["result"])

    def evaluate(self, script: str) -> Any:
        """The value of the last JavaScript expression in the page; its constants stay inside."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, replMode=True)["result"].get(
            "value"
        )

    def charts(self, until: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """The charts by title as soon as they satisfy, or as they are at the end for an assertion to complain of."""
        end = time.monotonic() + seconds
        while not until(charts := {chart["title"]: chart for chart in self.evaluate(READ_CHARTS)}):
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        return charts

    def screenshot(self, path: Path) -> None:
        """Saves what is seen."""
        path.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def process(*command: str, **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """A child that ends with the block."""
    child = subprocess.Popen(command, text=True, **kwargs)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@pytest.fixture
def open_dashboard(tmp_path: Path) -> Iterator[Callable[[], Page]]:
    """Opens TensorBoard on the runs of a test, in a browser with a profile of its own."""
    with contextlib.ExitStack() as stack:

        def open_dashboard() -> Page:
            log = tmp_path / "tensorboard.log"
            stream = stack.enter_context(log.open("w"))
            where = ("--logdir", str(tmp_path / "runs"), "--host", "127.0.0.1", "--port", "0")
            stack.enter_context(process(sys.executable, "-m", "tensorboard.main", *where, stdout=stream, stderr=stream))
            end = time.monotonic() + 60
            while not (url := re.search(r"http://127\S+", log.read_text())) and time.monotonic() < end:
                time.sleep(0.2)
            assert url, log.read_text()

            (commands_out, commands_in), (answers_out, answers_in) = os.pipe(), os.pipe()
            # Chromium takes commands from descriptor 3 and answers on 4; the shell puts the pipes there.
            redirect = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'
            browser = (str(CHROMIUM), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={tmp_path / 'profile'}")
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            inherited = (commands_out, answers_in)
            stack.enter_context(process("bash", "-c", redirect, "bash", *browser, pass_fds=inherited, **silent))
            for descriptor in inherited:
                os.close(descriptor)
            for descriptor in (commands_in, answers_out):
                stack.callback(os.close, descriptor)
            return Page(commands_in, answers_out, f"{url.group()}#custom_scalars")

        yield open_dashboard


def test_every_chart_shows_its_curves(
    open_dashboard: Callable[[], Page], write_run: Callable[..., None], curves: Mapping[str, Curve], tmp_path: Path
) -> None:
    write_run(tmp_path / "runs" / "digits", categories=tags.CATEGORIES)
    page = open_dashboard()
    categories = layout(tags.CATEGORIES).category
    charts = [chart for category in categories for chart in category.chart]
    opened = sum(len(category.chart) for category in categories if not category.closed)
    shown = page.charts(lambda shown: len(shown) == opened and all(chart["points"] for chart in shown.values()))
    assert len(shown) == opened

    page.evaluate(OPEN_CLOSED)
    shown = page.charts(lambda shown: len(shown) == len(charts) and all(chart["points"] for chart in shown.values()))
    assert shown.keys() == {chart.title for chart in charts}
    for chart in charts:
        expected = [series.value for series in chart.margin.series] or [tag[:-1] for tag in chart.multiline.tag]
        seen = shown[chart.title]
        assert not seen["errors"]
        assert sorted(seen["series"]) == sorted(expected)
        written = sorted(2 * [len(curves[tag][0]) for tag in expected])
        for points, limit in zip(sorted(seen["points"]), written, strict=True):
            assert 0.8 * limit <= points <= limit  # outliers of the scale are left out
        assert seen["bands"] == len(chart.margin.series)
    page.screenshot(tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").stat().st_size > 50_000


def test_a_chart_without_data_is_seen_to_be_empty(
    open_dashboard: Callable[[], Page], write_run: Callable[..., None], tmp_path: Path
) -> None:
    """An optimizer without a known limit leaves one chart empty. Were that not seen, the test above would be void."""
    ratios = [tag for tag in tags.DESCRIPTIONS if tag.startswith(tags.EDGE)]
    write_run(tmp_path / "runs" / "digits", without=[*ratios, *tags.interval(tags.EDGE_RATIO)])
    drawn = open_dashboard().charts(lambda shown: sum(bool(chart["points"]) for chart in shown.values()) == 3)
    empty = {title: chart for title, chart in drawn.items() if not chart["points"]}
    assert list(empty) == [layout().category[0].chart[0].title]
    assert not any(chart["series"] or chart["bands"] for chart in empty.values())
