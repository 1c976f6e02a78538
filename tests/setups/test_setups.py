"""The table "what works": every row is tried, and the page says what the rows say."""

from pathlib import Path
from typing import Any

import pytest

from tests.runs import Regressor
from tests.setups.case import Case, check
from tests.setups.models import Network
from tests.setups.page import PAGE, page
from tests.setups.table import TABLE


def row(case: Case) -> Any:
    """A case with its marks."""
    marks = [pytest.mark.slow] if case.slow else []
    if case.broken:
        marks.append(pytest.mark.xfail(reason=case.broken, strict=True))
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [row(case) for cases in TABLE.values() for case in cases])
def test_row(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    """The check itself: another loss has another Hessian."""
    other = Case("another loss", twin=lambda: Network(Regressor().net, lambda net, batch: net(batch[0]).square().sum()))
    with pytest.raises(AssertionError, match=r"sharpness/current_batch is .* off by"):
        check(other, tmp_path)


def test_names_are_unique() -> None:
    names = [case.name for cases in TABLE.values() for case in cases]
    assert len(names) == len(set(names))


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == page(TABLE), "write it anew: python -m tests.setups"
