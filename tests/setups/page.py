"""The page that the table is shown on, made from what the rows promise: the tests hold them to it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.setups.case import Case

PAGE = Path(__file__).parents[2] / "docs" / "set-ups.md"
HEAD = """# Does it work on my set-up?

Each row is a small training that is run twice, with a `SharpnessMonitor` and without; the last measurement is compared
with dense Hessians, made of differences of float64 gradients. What a row says, a test holds: the rows stand in
[tests/setups](../tests/setups), and `python -m tests.setups` writes this page. All run on one CPU; what is refused
on several devices says the [README](../README.md#limits).

- **measured**: *right*; *by differences* (torch cannot differentiate a layer twice: products are differences of
  gradients, and a warning names the layer); *refused* (with a message, before anything is trained).
- **step's batch**, **FullBS**: relative error of the two sharpnesses, at most; the solver was asked for 0.01 %. A dash
  where there is nothing to compare with. MiniBS, directional sharpness and the gap are shown in every row;
  [tests/curvature](../tests/curvature) compares them.
- **training**: *same bits* where weights, buffers, optimizers, schedulers, loops, random states and logged losses are
  those of the run without the monitor.
- **remarks**: what to know, and in quotes what the monitor says.
"""
COLUMNS = "| set-up | measured | step's batch | FullBS | training | remarks |\n|---|---|---|---|---|---|"
WORDS = {"right": "right", "differences": "by differences", "refused": "refused"}


def page(table: Mapping[str, Iterable[Case]]) -> str:
    """The whole page."""
    sections = [f"## {title}\n\n{COLUMNS}\n" + "\n".join(map(row, cases)) + "\n" for title, cases in table.items()]
    return "\n".join([HEAD, summary([case for cases in table.values() for case in cases]), *sections])


def summary(cases: list[Case]) -> str:
    """The whole table in a sentence."""
    counts = Counter("broken" if case.broken else case.measured for case in cases)
    clauses = [
        f"{counts['right']} are measured right",
        f"{counts['differences']} by differences",
        f"{counts['refused']} are refused and say why",
        *([f"{counts['broken']} do not work yet"] if counts["broken"] else []),
    ]
    return f"Of {len(cases)} set-ups {', '.join(clauses)}. None that is measured is trained differently.\n"


def row(case: Case) -> str:
    """A line of a table."""
    if case.broken:
        cells = ["not yet", "–", "–", "–", case.broken.split(": ", 1)[1]]
    else:
        measured = case.measured in ("right", "differences")
        errors = [
            f"{100 * bound:.2g} %" if measured and bound is not None else "–" for bound in (case.current, case.full)
        ]
        cells = [WORDS[case.measured], *errors, "–" if case.measured == "refused" else "same bits", remarks(case)]
    return f"| {case.name} | {' | '.join(cells)} |"


def remarks(case: Case) -> str:
    """What a reader should know, and what the monitor says."""
    said = [f"“{said.rstrip('.')} …”" for said in case.says]
    return "; ".join([*filter(None, [case.note]), *said])
