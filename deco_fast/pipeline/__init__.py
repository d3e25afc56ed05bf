"""DeCo as a pipeline of diffusers, which is optional."""

from __future__ import annotations

import importlib.util

from deco_fast.errors import UserError

if importlib.util.find_spec("diffusers") is None:
    raise UserError("the pipeline needs the package diffusers: pip install 'deco-fast[diffusers]'")

from deco_fast.pipeline.deco_pipeline import DeCoPipeline

__all__ = ["DeCoPipeline"]
