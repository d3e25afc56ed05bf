"""Measure models and the images they draw. See `--help`."""

from deco_fast.errors import run_script

if __name__ == "__main__":
    run_script("deco_fast.cli.evaluate")
