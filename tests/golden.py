"""The golden tensors: what the published implementation computed, see their own README.

They lie beside the repository, in `../shared/golden`, and are no part of it: a test that asks for
them where they are absent is skipped. Nothing here is read before a test asks for it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deco_fast.interop.published import Layout, layout_of
from deco_fast.models.build import build_network
from deco_fast.models.config import (
    DeCoConfig,
    DeCoT2IConfig,
    NetworkConfig,
    PixelDiTConfig,
    PixNerdConfig,
)
from deco_fast.models.network import DeCoNetwork

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"


def golden_path(name: str) -> Path:
    """A golden file; the test that asks is skipped where there is none."""
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"the golden tensors are absent: no ../shared/golden/{name}")
    return path


@cache
def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def tensors(name: str) -> dict[str, Tensor]:
    """The tensors of `<name>.safetensors`; shared between tests, so never changed in place."""
    return dict(_tensors(golden_path(f"{name}.safetensors")))


def metadata(name: str) -> Any:
    """The `meta` entry of `<name>.safetensors`."""
    with safe_open(golden_path(f"{name}.safetensors"), framework="pt") as file:
        return json.loads(file.metadata()["meta"])


@cache
def _document(path: Path) -> Any:
    return json.loads(path.read_text())


def document(name: str) -> Any:
    """The content of `<name>.json`."""
    return _document(golden_path(f"{name}.json"))


def deco_config(published: dict[str, int]) -> NetworkConfig:
    """Our configuration of a published network; `num_blocks` counts both kinds of block (B.5)."""
    if "txt_max_length" in published:
        return DeCoT2IConfig(
            hidden_size=published["hidden_size"],
            depth=published["num_encoder_blocks"],
            num_heads=published["num_groups"],
            patch_size=published["patch_size"],
            decoder_hidden_size=published["decoder_hidden_size"],
            decoder_depth=published["num_decoder_blocks"],
            in_channels=published["in_channels"],
            text_depth=published["num_text_blocks"],
            text_size=published["txt_embed_dim"],
            text_length=published["txt_max_length"],
        )
    common = {
        "hidden_size": published["hidden_size"],
        "num_heads": published["num_groups"],
        "patch_size": published["patch_size"],
        "num_classes": published["num_classes"],
        "in_channels": published["in_channels"],
    }
    if "num_cond_blocks" not in published:
        return PixelDiTConfig(depth=published["num_blocks"], **common)
    common |= {
        "depth": published["num_cond_blocks"],
        "decoder_hidden_size": published["hidden_size_x"],
        "decoder_depth": published["num_blocks"] - published["num_cond_blocks"],
    }
    if "nerf_mlpratio" in published:
        return PixNerdConfig(nerf_mlp_ratio=published["nerf_mlpratio"], **common)
    return DeCoConfig(**common)


DECO = Layout()


def our_name(published: str, layout: Layout = DECO) -> str:
    """Our name of a published tensor, which must exist."""
    name = layout.from_published(published)
    assert name is not None, f"{published} has no counterpart"
    return name


def our_names(name: str) -> dict[str, str]:
    """Our names of the parameters of `<name>.safetensors`, by the published ones."""
    parameters = [key.removeprefix("param.") for key in tensors(name) if key.startswith("param.")]
    layout = layout_of(parameters)
    return {published: our_name(published, layout) for published in parameters}


def load_model(name: str) -> DeCoNetwork:
    """A new network with the parameters of `<name>.safetensors`."""
    model = build_network(deco_config(metadata(name)["config"]))
    stored = tensors(name)
    parameters = {ours: stored[f"param.{published}"] for published, ours in our_names(name).items()}
    model.load_state_dict(parameters, strict=True)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|, in float64."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    # A NaN must not pass as small: max() keeps it, and no NaN is below a tolerance.
    return float((actual - expected).abs().max() / expected.abs().max())


def gradient_norms(model: torch.nn.Module, name: str) -> Tensor:
    """The norm of every parameter's gradient, in the order of the published names, float64.

    Args:
        model: with the parameters of `<name>.safetensors`.
        name: of that file.
    """
    norms = {}
    for ours, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{ours} has no gradient"
        norms[ours] = parameter.grad.double().norm()
    names = our_names(name)
    assert norms.keys() == set(names.values())
    return torch.stack([norms[names[published]] for published in sorted(names)])
