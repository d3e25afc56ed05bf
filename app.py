"""Draw images with DeCo in a browser: `python app.py`. See `--help`."""

from deco_fast.errors import run_script

if __name__ == "__main__":
    run_script("deco_fast.cli.app")
