"""Measure models and the images they draw. See `--help`."""

import sys

from deco_fast.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
