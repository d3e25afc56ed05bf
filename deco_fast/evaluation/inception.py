"""The Inception network of the ADM suite: that of 2015, in torch-fidelity's translation.

torch-fidelity converted the weights of the TensorFlow graph that the suite runs, and follows its
resizing and its average pooling, which torchvision's own Inception does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
import sys
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deco_fast.errors import UserError
from deco_fast.evaluation.extractors import Features, float32_convolutions
from deco_fast.evaluation.fingerprint import fingerprint_of

# sFID takes the first channels of the 1×1 branch of the 17×17 block "mixed_6".
_SPATIAL_CHANNELS = 7

_PACKAGE = "torch_fidelity"
_MODULE = f"{_PACKAGE}.feature_extractor_inceptionv3"


class InceptionExtractor:
    """2,048 pooled features, 17·17·7 spatial ones and 1,008 logits without bias.

    Args:
        weights: torch-fidelity's file of the converted weights; None downloads it, or takes it
            from torch's hub folder.
        device: where it computes.

    Raises:
        UserError: torch-fidelity is not installed, or the weights cannot be had or are others.
    """

    name = "inception"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        module = _import()
        tensors = _read(Path(weights)) if weights is not None else _download(module)
        # The library unpickles a file with whatever is in it: it gets one with tensors alone.
        checked = io.BytesIO()
        torch.save(tensors, checked)
        checked.seek(0)
        try:
            self._network: Any = module.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=checked
            )
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"--weights {weights} are not of the Inception network: give {_file(module)}"
            ) from error
        self._network.to(device)
        self._spatial: Tensor | None = None
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights."""
        return fingerprint_of(self._network.state_dict())

    @torch.no_grad()
    @float32_convolutions()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W)."""
        pooled, logits = self._network(images)
        assert self._spatial is not None
        # Channels last, as saved statistics of the suite have them.
        spatial = self._spatial[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        self._spatial = None
        return Features(pooled, spatial, logits)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._spatial = output


def _import() -> ModuleType:
    if importlib.util.find_spec(_PACKAGE) is None:
        raise UserError(
            "the Inception network needs the package torch-fidelity: "
            "pip install 'deco-fast[metrics]', or choose other --features"
        )
    try:
        return importlib.import_module(_MODULE)
    except (ImportError, RuntimeError):
        return _import_alone()


def _import_alone() -> ModuleType:
    """The one module, where the package around it does not load.

    Its other parts need torchvision, of which no build loads beside a torch without CUDA.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    package = ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(_MODULE)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torch-fidelity does not load ({error}): pip install --upgrade torch-fidelity"
        ) from error
    finally:
        # Whoever else imports the package shall meet the whole of it.
        for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
            del sys.modules[name]


def _file(module: ModuleType) -> str:
    return str(module.URL_INCEPTION_V3)


def _download(module: ModuleType) -> Any:
    try:
        return torch.hub.load_state_dict_from_url(
            _file(module), map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the Inception weights cannot be downloaded ({error}): get {_file(module)} and give "
            "it by --weights FILE"
        ) from error


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {file} does not exist: check the path") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"--weights {file} is damaged, or holds more than tensors: download it again"
        ) from error
