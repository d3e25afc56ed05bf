"""The run configuration: files, presets, overrides, and what a typing error gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deco_fast.config import RunConfig, load_config, option_help
from deco_fast.errors import UserError
from deco_fast.models.presets import PRESETS
from deco_fast.resources import config_folder


@pytest.mark.parametrize("path", sorted(config_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_resolves(path: Path) -> None:
    config = load_config(path.stem)
    assert config.name == path.stem
    assert config == load_config(str(path))


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("c2i_xl_256", "deco-xl"),
        ("c2i_xl_512", "deco-xl-512"),
        ("c2i_l_256", "deco-l"),
        ("deco-digits", "deco-digits"),
    ],
)
def test_a_configuration_and_its_preset_agree(name: str, preset: str) -> None:
    config, expected = load_config(name), PRESETS[preset]
    assert config.model == expected.config
    assert config.card() == dataclasses.replace(expected.card, name=name)


# Specification B.14 and what it says of all rows; 8 GPUs × images × backward passes.
PUBLISHED = {
    "c2i_l_256": {
        "model.hidden_size": 1024,
        "model.num_heads": 16,
        "model.depth": 22,
        "data.height": 256,
        "data.width": 256,
        "flow.null_probability": 0.1,
        "training.batch_size": 8 * 32 * 1,
        "training.gradient_accumulation": 1,
        "training.steps": 200_000,
        "training.init_from": None,
        "sampling.steps": 50,
        "sampling.guidance_scale": 1.0,
        "sampling.guidance_interval": (0.0, 1.0),
    },
    "c2i_xl_256": {
        "model.hidden_size": 1152,
        "model.num_heads": 16,
        "model.depth": 28,
        "data.height": 256,
        "data.width": 256,
        "flow.null_probability": 0.2,
        "training.batch_size": 8 * 32 * 1,
        "training.gradient_accumulation": 1,
        "training.steps": 4_000_000,
        "training.init_from": None,
        "sampling.steps": 100,
        "sampling.guidance_scale": 3.2,
        "sampling.guidance_interval": (0.1, 1.0),
    },
    "c2i_xl_512": {
        "model.hidden_size": 1152,
        "model.num_heads": 16,
        "model.depth": 28,
        "data.height": 512,
        "data.width": 512,
        "flow.null_probability": 0.2,
        "training.batch_size": 8 * 16 * 2,
        "training.gradient_accumulation": 2,
        # Published: up to 1,700,000, from a run of 320 epochs at 5,000 steps each.
        "training.steps": 1_700_000 - 320 * 5_000,
        "training.init_from": "hf:zehongma/DeCo/imagenet256_epoch320.ckpt",
        "sampling.steps": 100,
        "sampling.guidance_scale": 5.0,
        "sampling.guidance_interval": (0.1, 1.0),
    },
}
PUBLISHED_FOR_ALL = {
    "model.patch_size": 16,
    "model.decoder_depth": 3,
    "model.decoder_hidden_size": 32,
    "model.num_classes": 1000,
    "model.class_embedding_std": 0.02,
    "data.random_flip": False,
    "flow.distribution": "lognorm",
    "flow.time_shift": 1.0,
    "flow.timestep_weight": "constant",
    "loss.frequency_weight": 1.0,
    "loss.quality": 85,
    "loss.mode": "inv_gamma",
    "loss.gamma": 1.0,
    "alignment.enabled": True,
    "alignment.weight": 0.5,
    "alignment.layer": 8,
    "alignment.projector_hidden_size": None,
    "training.learning_rate": 1e-4,
    "training.warmup_steps": 0,
    "training.schedule": "constant",
    "training.betas": (0.9, 0.999),
    "training.weight_decay": 0.0,
    "training.gradient_clipping": None,
    "training.ema_decay": 0.9999,
    "training.precision": "bf16",
    "sampling.solver": "euler",
    "sampling.time_shift": 1.0,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_papers_configuration_has_the_published_numbers(name: str) -> None:
    config = load_config(name, ["--data.root", "imagenet/train"])
    for key, value in (PUBLISHED[name] | PUBLISHED_FOR_ALL).items():
        section, leaf = key.split(".")
        assert getattr(getattr(config, section), leaf) == value, key
    assert config.data.root == "imagenet/train"


def test_resolved_yaml_is_read_back_unchanged(tmp_path: Path) -> None:
    config = load_config("deco-digits", ["--training.learning_rate", "3e-5"])
    file = tmp_path / "again.yaml"
    file.write_text(config.to_yaml())
    assert load_config(str(file)) == config


def test_overrides_take_the_type_of_their_key() -> None:
    config = load_config(
        "deco-digits",
        [
            "--training.learning_rate=1e-4",
            "--training.betas",
            "[0.9, 0.95]",
            "--training.compile",
            "true",
            "--training.gradient_clipping",
            "1.0",
            "--sampling.guidance_interval",
            "[0.1, 1]",
            "--model.hidden_size",
            "256",
            "--name",
            "123",
        ],
    )
    assert config.training.learning_rate == 1e-4
    assert config.training.betas == (0.9, 0.95)
    assert config.training.compile is True
    assert config.training.gradient_clipping == 1.0
    assert config.sampling.guidance_interval == (0.1, 1.0)
    assert config.model.hidden_size == 256
    assert config.model.depth == PRESETS["deco-digits"].config.depth
    assert config.name == "123"
    assert load_config("deco-digits", ["--training.gradient_clipping", "none"]) == load_config(
        "deco-digits"
    )


@pytest.mark.parametrize("network", ["pixel-dit", "pixnerd", "pixddt"])
def test_another_network_takes_what_it_knows_of_a_preset(network: str) -> None:
    model = load_config("deco-digits", ["--model.network", network]).model
    preset = PRESETS["deco-digits"].config
    assert model.kind == network
    for key in ("hidden_size", "depth", "num_heads", "patch_size", "num_classes"):
        assert getattr(model, key) == getattr(preset, key)
    with pytest.raises(UserError, match=r"unknown key 'model\.decoder_depht'"):
        load_config("deco-digits", ["--model.network", network, "--model.decoder_depht", "2"])


def test_a_number_without_a_dot_in_yaml_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: run\nmodel: {preset: deco-digits}\ndata: {dataset: digits, height: 32, width: 32}\n"
        "training: {steps: 10, learning_rate: 1e-4}\n"
    )
    assert load_config(str(file)).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.hiden_size", "8"], "unknown key 'model.hiden_size'; did you mean 'model.hidden"),
        (["--training.checkpoint_interval", "8"], "did you mean 'output.checkpoint_every'"),
        (["--name", "../evil"], "name '../evil' must be that of a folder in runs/: give --out"),
        (["--trainin.steps", "8"], "unknown key 'trainin'; did you mean 'training'"),
        (["--training.steps", "many"], "training.steps: .*integer.*'many'"),
        (["--training.steps", "0"], "training.steps: .*greater than or equal to 1"),
        (["--training.steps"], "--training.steps needs a value"),
        (["--training.steps", "--name"], "--training.steps needs a value"),
        (["training.steps", "3"], "overrides look like"),
        (["--name.first", "x"], "'name' is a value"),
        (["--flow.distribution", "lognrom"], "did you mean 'lognorm'"),
        (["--training.betas", "[1]"], "training.betas"),
        (["--training.betas", "[0.9,"], r"--training.betas \[0.9, is not a list: write"),
        (["--training.betas", "[0.9, 1]"], "training.betas.*less than 1"),
        (["--training.seed", str(2**64)], "training.seed"),
        (["--model.in_channels", "1"], "digits reads RGB: set model.in_channels to 3"),
        (["--data.root", ""], "data.root is empty"),
        (["--model.depth", "0"], "model: depth must be at least 1"),
        (["--model.hidden_size", "100", "--model.num_heads", "3"], "multiple of 4"),
        (["--data.height", "30", "--data.width", "30"], "not divisible by model.patch_size 8"),
        (["--model.num_classes", "9"], "digits has 10 classes"),
        (["--sampling.steps", "0"], "steps must be at least 1"),
        (["--sampling.time_shift", "-1"], "time shift must be positive"),
        (["--training.seed", "-1"], "training.seed"),
        (["--sampling.solver", "hein"], "did you mean 'heun'"),
        (["--sampling.guidance_interval", "[0.9, 0.1]"], "guidance interval"),
        (["--sampling.guidance_rescale", "5"], "guidance_rescale must be 0 … 1"),
        (["--sampling.guidance_scale", "nan"], "guidance_scale must be finite"),
        (["--alignment.enabled", "on", "--alignment.layer", "9"], "alignment.layer 9 .* 4 blocks"),
        (["--model.class_embedding_std", "nan"], "model.class_embedding_std: .*finite.*nan"),
        (["--loss.gamma", "inf"], "loss.gamma: .*finite.*inf"),
        (["--alignment.weight", "0"], "alignment.weight: .*greater than 0"),
        (["--model.preset", "deco-digit"], "unknown preset 'deco-digit'; did you mean"),
    ],
)
def test_a_typing_error_is_named_with_its_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config("deco-digits", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [", "not readable as YAML"),
        ("- a list", "must hold sections"),
        ("", "must hold sections"),
        ("name: x\nmodel: {preset: deco-digits}\n", "'training' is not set"),
        ("name: x\nmodel:\npreset: deco-digits\ntraining: {steps: 2}\n", "unknown key 'preset'"),
        ("name: x\nname: y\n", "the key 'name' is there twice in .*line 1"),
        ("name: x\ntraining: {steps: 2, steps: 3}\n", "the key 'steps' is there twice.*line 2"),
        ("name: x\nmodel: 5\ntraining: {steps: 2}\n", "model: .*dictionary"),
        ("name: x\ntraining: {steps: 2}\n", "'model' is not set: .* give --model.preset NAME"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(file))


def test_yaml_may_merge_what_another_section_has(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: run\nmodel: {preset: deco-digits}\n"
        "data: &size {dataset: digits, height: 32, width: 32}\n"
        "training: {steps: 10}\n"
    )
    before = load_config(str(file))
    file.write_text(
        file.read_text().replace("height: 32, width: 32", "<<: {height: 32, width: 8}, width: 32")
    )
    assert load_config(str(file)) == before


def test_a_section_written_wrong_is_named(tmp_path: Path) -> None:
    """And not the one that is missing for it."""
    text = (config_folder() / "deco-digits.yaml").read_text().replace("training:", "trainin:")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="unknown key 'trainin'; did you mean 'training'"):
        load_config(str(file))


def test_an_unknown_configuration_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'c2i_xl_256'"):
        load_config("c2i-xl-256")
    with pytest.raises(UserError, match="no such configuration file"):
        load_config("missing.yaml")


def test_help_lists_every_key() -> None:
    resolved = load_config("deco-digits").model_dump()
    keys = {key for key, _, _ in option_help()}
    for section, value in resolved.items():
        for key in value if isinstance(value, dict) else ():
            assert f"{section}.{key}" in keys
    assert set(resolved) == set(RunConfig.model_fields)
