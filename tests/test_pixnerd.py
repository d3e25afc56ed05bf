"""PixNerd against the golden tensors (specification B.6), and drawing from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden import deco_config, metadata, relative_error, tensors
from torch import Tensor

from deco_fast import SamplingEngine, sample
from deco_fast.checkpoint import load_checkpoint, save_checkpoint
from deco_fast.errors import UserError
from deco_fast.interop.convert import convert
from deco_fast.interop.published import from_published
from deco_fast.models.build import build_network
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import PixNerdConfig
from deco_fast.models.pixnerd import PixNerd

GOLDEN = "model_c2i_pixnerd_p16"
TOLERANCE = 1e-5


def our_name(published: str, depth: int) -> str:
    """Our name of a published tensor: there, NerfBlocks follow the DiT's in one list."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(param_generator1\.0|norm)\.(\w+)", published):
        index, layer, leaf = match.groups()
        return f"decoder.blocks.{int(index) - depth}.{layer.partition('1')[0]}.{leaf}"
    if published.startswith("final_layer."):
        layer, leaf = published.split(".")[1:]
        return f"decoder.{'output' if layer == 'linear' else layer}.{leaf}"
    name = from_published(published)
    assert name is not None, f"{published} has no counterpart"
    return name


def golden_model() -> tuple[PixNerd, dict[str, str]]:
    """The network with the golden parameters, and our names by the published ones."""
    published = metadata(GOLDEN)["config"]
    config = PixNerdConfig(
        **deco_config(published).to_json(), nerf_mlp_ratio=published["nerf_mlpratio"]
    )
    model = build_network(config)
    assert isinstance(model, PixNerd)
    parameters = {
        key.removeprefix("param."): value
        for key, value in tensors(GOLDEN).items()
        if key.startswith("param.")
    }
    names = {name: our_name(name, config.depth) for name in parameters}
    model.load_state_dict({names[name]: value for name, value in parameters.items()})
    return model, names


@pytest.mark.parametrize("case", ["sq", "wide"])
def test_forward_and_every_gradient_equal_golden(case: str) -> None:
    golden, (model, names) = tensors(GOLDEN), golden_model()
    x, t, y, g = (golden[f"{case}.in.{key}"] for key in "xtyg")
    x = x.clone().requires_grad_()
    tokens = model.encode(x, t, y)
    assert relative_error(tokens, golden[f"{case}.out.s"]) < TOLERANCE
    velocity = model.decode(x, tokens)
    assert relative_error(velocity, golden[f"{case}.out.v"]) < TOLERANCE
    (velocity * g).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, golden[f"{case}.grad.x"]) < TOLERANCE
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name] = parameter.grad.double()
    norms = torch.stack([gradients[names[name]].norm() for name in sorted(names)])
    assert relative_error(norms, golden[f"{case}.grad.norms"]) < TOLERANCE
    strides = metadata(GOLDEN)["grad_row_stride"]
    for name, stride in strides.items() if case == "sq" else ():
        stored = golden[f"sq.grad.param.{name}"]
        assert relative_error(gradients[names[name]][::stride], stored) < TOLERANCE, name


def test_parameters_are_as_many_as_published() -> None:
    with torch.device("meta"):
        model = PixNerd(PixNerdConfig(hidden_size=1024, depth=22, num_heads=16))
    assert sum(p.numel() for p in model.parameters()) == 452_113_795


def test_begins_at_zero_velocity() -> None:
    config = PixNerdConfig(
        hidden_size=16, depth=1, num_heads=2, patch_size=4, decoder_hidden_size=8, num_classes=3
    )
    velocity = PixNerd(config)(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3]))
    assert velocity.shape == (2, 3, 8, 8) and not velocity.any()


def test_engine_draws_what_the_plain_loop_draws() -> None:
    config = PixNerdConfig(
        hidden_size=16, depth=2, num_heads=2, patch_size=4, decoder_hidden_size=8, num_classes=3
    )
    model, generator = PixNerd(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    noise = torch.randn(2, 3, 8, 12, generator=generator)
    settings = SamplingSettings(steps=10, guidance_scale=2.0)
    engine = SamplingEngine(model, settings, height=8, width=12, batch_size=2)
    expected = sample(model, noise, torch.tensor([0, 2]), steps=10, guidance_scale=2.0)
    assert relative_error(engine(noise, [0, 2]), expected) < TOLERANCE


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the golden model."""
    card = ModelCard(name="pixnerd", height=64, width=64)
    return save_checkpoint(tmp_path / "pixnerd", model=None, ema=golden_model()[0], card=card)


def test_a_saved_checkpoint_opens_as_pixnerd(saved: Path) -> None:
    model, _ = golden_model()
    loaded = load_checkpoint(saved)
    assert isinstance(loaded, PixNerd) and loaded.config == model.config
    golden = tensors(GOLDEN)
    x, t, y = (golden[f"sq.in.{key}"] for key in "xty")
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_another_layout_or_preset_is_refused_in_one_line(saved: Path) -> None:
    with pytest.raises(UserError, match="a PixNerd model, and only DeCo is written") as caught:
        convert(saved, saved.parent / "pixnerd.ckpt")
    assert "\n" not in str(caught.value) and not (saved.parent / "pixnerd.ckpt").exists()
    with pytest.raises(UserError, match=r"nerf_mlp_ratio 2 and not None"):
        load_checkpoint(saved, preset="deco-l")
