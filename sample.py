"""Draw images with DeCo: `python sample.py`. See `--help`."""

import sys

from deco_fast.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
