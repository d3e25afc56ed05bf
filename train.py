"""Train DeCo: `torchrun train.py`. See `--help`."""

import sys

from deco_fast.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
