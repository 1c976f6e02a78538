"""The table of tags is whole: each is drawn or said not to be, the README knows all of them, others can add theirs."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lightning_eoss.display import page, tags
from lightning_eoss.display.scalars import finite
from lightning_eoss.theory.statistics import Estimate

README = (Path(__file__).parents[2] / "README.md").read_text()
BESIDE = {tags.SPECTRUM, tags.NOISE_CURVE, tags.LAMBDA_MAX, tags.PRECONDITIONER, tags.GUIDE}  # no scalars


def charts() -> dict[str, tags.Chart]:
    return {title: chart for category in tags.CATEGORIES.values() for title, chart in category.items()}


def test_every_tag_is_drawn_or_said_to_be_drawn_nowhere() -> None:
    """A new tag that is in no chart belongs into one, or into `UNDRAWN`."""
    drawn = {tag for chart in charts().values() for tag in chart.tags}
    assert drawn.isdisjoint(tags.UNDRAWN)
    assert drawn | tags.UNDRAWN == tags.DESCRIPTIONS.keys()


def test_every_name_for_a_tag_is_a_row_of_the_table() -> None:
    names = {value for name, value in vars(tags).items() if name.isupper() and isinstance(value, str) and "/" in value}
    assert names - BESIDE == tags.DESCRIPTIONS.keys()
    assert tags.DESCRIPTIONS.keys() >= tags.WITH_INTERVAL
    assert tags.RATIOS.keys() | set(tags.RATIOS.values()) <= tags.DESCRIPTIONS.keys()


def test_intervals_are_shown_where_a_chart_can() -> None:
    """A tag with an interval stands on a chart of bands, unless curves of other sizes would drown them there."""
    lines = {tag for chart in charts().values() if isinstance(chart, tags.Lines) for tag in chart.tags}
    assert {tag for tag in lines if tag in tags.WITH_INTERVAL} == {
        tags.SPECTRUM_TRACE,
        tags.SPECTRUM_RANK,
        tags.NOISE_SCALE,
        tags.NOISE_CURVATURE_SCALE,
        tags.PREDICTION_CRITICAL_BATCH_SIZE,
    }


def test_the_readme_has_a_row_for_every_tag_and_none_for_others() -> None:
    """A row names tags, or with `...` all that begin or end so."""
    tables = re.findall(r"^\| tag \|.*\n\|.*\n((?:\|.*\n)+)", README, flags=re.MULTILINE)
    names = [
        name for table in tables for row in table.splitlines() for name in re.findall(r"`(.+?)`", row.split("|")[1])
    ]
    ends = {end for tag in tags.WITH_INTERVAL for end in (*tags.interval(tag), tags.trusted(tag))}
    covered: set[str] = set()
    for name in names:
        pattern = re.escape(name.removesuffix("/LAYER")).replace(r"\.\.\.", ".+")
        found = {tag for tag in (tags.DESCRIPTIONS.keys() | ends) if re.fullmatch(pattern, tag)}
        assert found, f"{name} is no tag"
        covered |= found
    assert tags.DESCRIPTIONS.keys() - covered == set()


def test_an_estimate_has_the_ends_that_the_table_says() -> None:
    estimate = Estimate(2.0, 0.5, 1.0, 3.0)
    lower, upper = tags.interval(tags.MINI_BS)
    assert finite({tags.MINI_BS: estimate}) == {tags.MINI_BS: 2.0, lower: 1.0, upper: 3.0}
    assert finite({tags.FULL_BS: estimate}) == {tags.FULL_BS: 2.0}
    endless = Estimate(2.0, float("nan"), float("-inf"), float("inf"))
    assert finite({tags.MINI_BS: endless, tags.GAP: float("nan"), tags.THRESHOLD: None}) == {tags.MINI_BS: 2.0}


# ---- tags of others --------------------------------------------------------------------------------------------------


class Card:
    """Takes texts."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts[tag] = text


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of the test's own."""
    for name in ("CATEGORIES", "DESCRIPTIONS", "WITH_INTERVAL"):
        monkeypatch.setattr(tags, name, deepcopy(getattr(tags, name)))


@pytest.mark.usefixtures("table")
def test_a_declared_tag_is_on_the_page_and_on_a_card() -> None:
    given: dict[str, Any] = {"category": "Outputs", "title": "Entropy", "reading": "it falls", "smoothed": False}
    for _ in range(2):  # as in a notebook's cell
        entropy = tags.declare("outputs/entropy", "mean entropy", interval=True, **given)
        most = tags.declare("outputs/most", "the largest", **given)
    (category,) = page.layout({"Outputs"}).category
    (chart,) = category.chart
    series = [(each.value, each.lower, each.upper) for each in chart.margin.series]
    assert series == [(entropy, *tags.interval(entropy)), (most, most, most)]
    page.write_page(card := Card(), tags.SHARPNESS | {"Outputs"}, {"Outputs"}, ["a note"])
    (text,) = card.texts.values()
    assert [*card.texts] == ["outputs/guide"]
    for part in ("- a note", "- *Entropy*: it falls.", "- `outputs/entropy`: mean entropy.", "`outputs/most`"):
        assert part in text
    assert "sharpness/" not in text
    assert finite({entropy: Estimate(1.0, 0.1, 0.8, 1.2)}).keys() == {entropy, *tags.interval(entropy)}


@pytest.mark.usefixtures("table")
def test_a_tag_can_join_a_chart_that_is_there() -> None:
    before = page.layout()
    tags.declare("cost/energy", "joules", category=tags.COST, title="Energy", reading="what the machine draws")
    *others, energy = page.layout().category[-1].chart
    assert (energy.title, list(energy.multiline.tag)) == ("Energy", ["cost/energy$"])
    assert others == list(before.category[-1].chart)
