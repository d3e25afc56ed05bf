"""DeCo, frequency-decoupled pixel diffusion, made fast.

The names below are the library's face; they are imported at first use, so that
`import deco_fast` costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deco_fast import ops
    from deco_fast.checkpoint import load_checkpoint
    from deco_fast.losses import flow_matching_loss, frequency_table
    from deco_fast.models.config import DeCoConfig, DeCoT2IConfig
    from deco_fast.models.deco import DeCo
    from deco_fast.models.deco_t2i import DeCoT2I
    from deco_fast.sampling.engine import SamplingEngine
    from deco_fast.sampling.loop import sample

__version__ = "0.1.0"

__all__ = [
    "DeCo",
    "DeCoConfig",
    "DeCoT2I",
    "DeCoT2IConfig",
    "SamplingEngine",
    "__version__",
    "flow_matching_loss",
    "frequency_table",
    "load_checkpoint",
    "ops",
    "sample",
]

_HOME = {
    "DeCo": "deco_fast.models.deco",
    "DeCoConfig": "deco_fast.models.config",
    "DeCoT2I": "deco_fast.models.deco_t2i",
    "DeCoT2IConfig": "deco_fast.models.config",
    "SamplingEngine": "deco_fast.sampling.engine",
    "flow_matching_loss": "deco_fast.losses",
    "frequency_table": "deco_fast.losses",
    "load_checkpoint": "deco_fast.checkpoint",
    "sample": "deco_fast.sampling.loop",
}


def _link_kernels() -> None:
    """In a checkout, give the folder `kernels` beside this package its name.

    It is `deco_fast.kernels`; a wheel holds it there. A package at the top level named
    `kernels` would answer to Hugging Face's package of that name, which transformers imports.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent / "kernels"
    if (package / "kernels").is_dir() or not checkout.is_dir():
        return
    name = f"{__name__}.kernels"
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(checkout)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    globals()["kernels"] = module


_link_kernels()


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("deco_fast.ops")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
