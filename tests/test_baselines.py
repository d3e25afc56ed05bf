"""The models that DeCo is compared with: golden tensors, sizes, drawing, checkpoints (B.6)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden import gradient_norms, load_model, metadata, our_names, relative_error, tensors

from deco_fast import SamplingEngine, sample
from deco_fast.checkpoint import load_checkpoint, save_checkpoint
from deco_fast.cli.sample import main as draw
from deco_fast.cli.train import main as train
from deco_fast.config import RunConfig
from deco_fast.errors import UserError
from deco_fast.interop.convert import convert
from deco_fast.models.build import build_network
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import (
    ClassConfig,
    DeCoConfig,
    NetworkConfig,
    PixDDTConfig,
    PixelDiTConfig,
    PixNerdConfig,
    config_from_json,
)
from deco_fast.models.dit import DiTBlock
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.pix_ddt import PixDDT
from deco_fast.models.pixel_dit import PixelDiT
from deco_fast.training.estimate import estimate

TOLERANCE = 1e-5
PIXNERD, BASELINE = "model_c2i_pixnerd_p16", "model_c2i_baseline_p16"

SMALL = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "num_classes": 3}
NETWORKS: dict[str, ClassConfig] = {
    "pixel DiT": PixelDiTConfig(**SMALL),
    "JiT": PixelDiTConfig(**SMALL, prediction="image"),
    "PixNerd": PixNerdConfig(**SMALL, decoder_hidden_size=8),
    "PixDDT": PixDDTConfig(**SMALL, decoder_depth=2),
    "UNet-style": DeCoConfig(**SMALL, decoder_hidden_size=8, decoder_conditioning="concat"),
    "patches of 2": DeCoConfig(**SMALL, decoder_hidden_size=16, decoder_patch_size=2),
    "patches of 4": DeCoConfig(**SMALL, decoder_hidden_size=8, decoder_patch_size=4),
}


@pytest.fixture(params=NETWORKS, ids=lambda name: name.replace(" ", "-"))
def config(request: pytest.FixtureRequest) -> ClassConfig:
    """Each of the networks, small."""
    return NETWORKS[request.param]


def random_model(config: NetworkConfig) -> DeCoNetwork:
    """A network none of whose parameters is zero."""
    model, generator = build_network(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", [PIXNERD, BASELINE])
@pytest.mark.parametrize("case", ["sq", "wide"])
def test_forward_and_every_gradient_equal_golden(name: str, case: str) -> None:
    golden, model = tensors(name), load_model(name)
    x, t, y, g = (golden[f"{case}.in.{key}"] for key in "xtyg")
    x = x.clone().requires_grad_()
    tokens, blocks = model.encode(x, t, y, return_layers=(1, 2, 3))
    for i, block in enumerate(blocks):
        assert relative_error(block, golden[f"{case}.inter.blocks.{i}"]) < TOLERANCE, i
    if f"{case}.out.s" in golden:
        assert relative_error(tokens, golden[f"{case}.out.s"]) < TOLERANCE
    velocity = model.decode(x, tokens)
    assert relative_error(velocity, golden[f"{case}.out.v"]) < TOLERANCE
    assert torch.equal(velocity, model(x, t, y))
    (velocity * g).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, golden[f"{case}.grad.x"]) < TOLERANCE
    norms, expected = gradient_norms(model, name), golden[f"{case}.grad.norms"]
    assert ((norms - expected).abs() / expected).max() < TOLERANCE
    names, strides = our_names(name), metadata(name)["grad_row_stride"]
    for published, stride in strides.items() if case == "sq" else ():
        gradient = model.get_parameter(names[published]).grad
        assert gradient is not None
        stored = golden[f"sq.grad.param.{published}"]
        assert relative_error(gradient[::stride], stored) < TOLERANCE, published


def test_a_clean_image_becomes_the_velocity_that_leads_there() -> None:
    """JiT (B.7): with the same weights the prediction is an image, and 1 − t is at least 0.05."""
    golden, model = tensors(BASELINE), load_model(BASELINE)
    x, t, y = (golden[f"sq.in.{key}"] for key in "xty")
    jit = PixelDiT(replace(model.config, prediction="image"))
    jit.load_state_dict(model.state_dict())
    with torch.no_grad():
        for time in (t, torch.tensor([0.96, 1.0])):
            image = model(x, time, y).double()
            rest = (1 - time.double()).clamp(min=0.05).view(-1, 1, 1, 1)
            assert relative_error(jit(x, time, y), (image - x.double()) / rest) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (PixelDiTConfig(hidden_size=1024, depth=24, num_heads=16), 459_171_584),
        (PixelDiTConfig(hidden_size=1152, depth=28, num_heads=16), 676_360_128),
        (PixNerdConfig(hidden_size=1024, depth=22, num_heads=16), 452_113_795),
        # Ours, where the paper says 434 million.
        (PixDDTConfig(hidden_size=1024, depth=20, num_heads=16), 441_077_376),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_parameters_are_as_many_as_published(config: NetworkConfig, parameters: int) -> None:
    with torch.device("meta"):
        model = build_network(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_begins_at_zero(config: ClassConfig) -> None:
    model = build_network(config)
    x, t, y = torch.randn(2, 3, 8, 12), torch.rand(2), torch.tensor([0, 3])
    prediction = model.decode(x, model.encode(x, t, y))
    assert prediction.shape == x.shape and not prediction.any()


def test_every_parameter_has_a_gradient(config: ClassConfig) -> None:
    model = random_model(config)
    model(torch.randn(2, 3, 8, 12), torch.rand(2), torch.tensor([0, 3])).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_engine_draws_what_the_plain_loop_draws(config: ClassConfig) -> None:
    model = random_model(config)
    noise = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    settings = SamplingSettings(steps=10, guidance_scale=2.0, guidance_interval=(0.1, 1.0))
    engine = SamplingEngine(model, settings, height=8, width=12, batch_size=2)
    expected = sample(
        model,
        noise,
        torch.tensor([0, 2]),
        steps=10,
        guidance_scale=2.0,
        guidance_interval=(0.1, 1.0),
    )
    assert relative_error(engine(noise, [0, 2]), expected) < TOLERANCE


def test_a_saved_checkpoint_opens_as_what_it_was(config: ClassConfig, tmp_path: Path) -> None:
    model = random_model(config)
    card = ModelCard(name="baseline", height=8, width=8)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "saved", model=None, ema=model, card=card))
    assert type(loaded) is type(model) and loaded.config == config
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_a_layout_or_preset_that_does_not_fit_is_refused_in_one_line(
    config: ClassConfig, tmp_path: Path
) -> None:
    card = ModelCard(name="baseline", height=8, width=8)
    saved = save_checkpoint(tmp_path / "saved", model=None, ema=random_model(config), card=card)
    if not isinstance(config, PixelDiTConfig | PixNerdConfig):
        with pytest.raises(UserError, match="nothing is published") as caught:
            convert(saved, tmp_path / "converted.ckpt")
        assert "\n" not in str(caught.value) and not (tmp_path / "converted.ckpt").exists()
    with pytest.raises(UserError) as caught:
        load_checkpoint(saved, preset="deco-l")
    assert "\n" not in str(caught.value)


def test_a_configuration_says_which_network_it_is_of(config: ClassConfig) -> None:
    assert config_from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"unknown network 'pixnert'.*pixnerd"):
        config_from_json({**config.to_json(), "network": "pixnert"})


@pytest.mark.parametrize(
    ("name", "field"),
    [("JiT", "prediction"), ("UNet-style", "decoder_conditioning"), ("PixDDT", "network")],
)
def test_a_choice_that_does_not_exist_is_refused(name: str, field: str) -> None:
    """As of a checkpoint's header, which no schema has seen."""
    config = NETWORKS[name]
    with pytest.raises(ValueError, match=f"{field} must be .*, not 'noise'"):
        type(config).from_json({**config.to_json(), field: "noise"})


def test_deco_is_what_a_configuration_without_a_network_means() -> None:
    fields = DeCoConfig(**SMALL).to_json()
    del fields["network"]
    assert config_from_json(fields) == DeCoConfig(**SMALL)


def test_a_run_of_it_is_read_written_and_estimated(config: ClassConfig) -> None:
    run = RunConfig.model_validate(
        {
            "name": "baseline",
            "model": config.to_json(),
            "data": {"height": 8, "width": 12},
            "training": {"steps": 1, "precision": "fp32"},
        }
    )
    assert run.model == config
    prediction = "image" if config == NETWORKS["JiT"] else "velocity"
    assert run.card().prediction == prediction
    found = estimate(run).work
    assert found.parameters == sum(p.numel() for p in build_network(config).parameters())
    assert 0 < found.forward_flops < found.training_flops


@pytest.mark.parametrize(
    "variant",
    [{"decoder_patch_size": 3}, {"decoder_patch_size": 2, "decoder_conditioning": "concat"}],
)
def test_a_decoder_that_cannot_be_is_refused(variant: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="decoder_patch_size"):
        DeCoConfig(**SMALL, **variant)


def test_a_decoder_of_larger_patches_moves_whole_patches() -> None:
    """What happens in one of its patches, no other patch of the velocity sees."""
    model = random_model(NETWORKS["patches of 2"])
    x, t, y = torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([1])
    tokens = model.encode(x, t, y)
    other = x.clone()
    other[..., 2, 5] += 1
    changed = (model.decode(other, tokens) - model.decode(x, tokens))[0].abs().sum(0) > 0
    assert changed[2:4, 4:6].all() and changed.sum() == 4


class TestPixDDT:
    """Our reading of it: what modulates the decoder's blocks is each token's own condition."""

    def test_a_block_takes_a_condition_for_each_token(self) -> None:
        block = DiTBlock(NETWORKS["PixDDT"])
        x, condition = torch.randn(2, 2, 6, 16).unbind()
        rotary = random_model(NETWORKS["PixDDT"]).rotary_table(2, 3)
        # What another token's condition is, this token's modulation does not see: only attention
        # mixes tokens, so with a gate of zero there a token depends on its own condition alone.
        torch.nn.init.zeros_(block.modulation.weight[2 * 16 : 3 * 16])
        torch.nn.init.zeros_(block.modulation.bias[2 * 16 : 3 * 16])
        other = condition.clone()
        other[:, 0] += 1
        changed = block(x, other, rotary) - block(x, condition, rotary)
        assert changed[:, 0].any() and not changed[:, 1:].any()

    def test_the_decoder_sees_the_image_and_not_the_encoder_alone(self) -> None:
        model = random_model(NETWORKS["PixDDT"])
        assert isinstance(model, PixDDT)
        x = torch.randn(1, 3, 8, 8)
        tokens = model.encode(x, torch.rand(1), torch.tensor([1]))
        assert not torch.equal(model.decode(x, tokens), model.decode(x + 1, tokens))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--model.network=pixnert",
            r"model\.network: there is no 'pixnert'; did you mean 'pixnerd'",
        ),
        ("--model.prediction=noise", r"model\.prediction: 'noise' is not one of velocity, image"),
        ("--model.prediktion=image", r"unknown key 'model\.prediktion'; did you mean 'model\.pred"),
        # DeCo has this one, and a key is not the nearest to itself.
        (
            "--model.decoder_depth=3",
            r"unknown key 'model\.decoder_depth'(?!.*'model\.decoder_depth')",
        ),
    ],
)
def test_a_wrong_key_or_value_of_a_network_is_named(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["--config", "jit_l_256", "--dry-run", override]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


@pytest.mark.slow
def test_trains_goes_on_and_draws(config: ClassConfig, tmp_path: Path) -> None:
    """By the commands, as a user does: two steps, two more, then pictures of it."""
    fields = {
        "name": "baseline",
        "model": replace(config, num_classes=10).to_json(),
        "data": {"dataset": "digits", "height": 8, "width": 8, "workers": 0},
        "loss": {"frequency_weight": 0},
        "training": {"steps": 4, "batch_size": 4, "precision": "bf16", "compile": False},
        "sampling": {"steps": 2, "guidance_scale": 2.0},
        "output": {"checkpoint_every": 2, "sample_every": 4, "sample_count": 10},
    }
    file = tmp_path / "baseline.yaml"
    file.write_text(yaml.safe_dump(fields))
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    options = ["--config", str(file), "--out", str(run)]
    assert train([*options, "--max-time", "0s"]) == 0 and not (run / "finished").exists()
    assert train(options) == 0 and (run / "finished").exists()
    assert (run / "samples" / "step-00000004.png").exists()
    loaded = load_checkpoint(run)
    assert type(loaded) is type(build_network(config))
    drawing = ["--checkpoint", str(run), "--num", "3", "--out", str(pictures)]
    assert draw(drawing) == 0 and len(list(pictures.glob("**/*.png"))) == 4
