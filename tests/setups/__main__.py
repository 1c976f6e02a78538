"""Writes docs/set-ups.md anew."""

from tests.setups.page import PAGE, page
from tests.setups.table import TABLE

if __name__ == "__main__":
    PAGE.write_text(page(TABLE))
