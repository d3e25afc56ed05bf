"""Draw images with DeCo in a browser: `python app.py`. See `--help`."""

import sys

from deco_fast.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
