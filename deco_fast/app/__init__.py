"""The page that draws images in a browser; `deco_fast.cli.app` starts it."""
