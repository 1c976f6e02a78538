"""`python -m lightning_eoss` is the command line."""

import sys

from lightning_eoss.cli import main

if __name__ == "__main__":
    sys.exit(main())
