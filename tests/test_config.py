"""The run configuration: files, presets, overrides, and what a typing error gets."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", ["deco-xl", "deco-xl-512", "deco-l", "deco-digits"])
def test_a_configuration_and_its_preset_agree(name: str) -> None:
    config, preset = load_config(name), PRESETS[name]
    assert config.model == preset.config
    assert config.card() == preset.card


def test_published_figures_of_the_paper_configurations() -> None:
    xl, xl512, large = (load_config(name) for name in ("deco-xl", "deco-xl-512", "deco-l"))
    for config in (xl, xl512, large):
        assert config.training.learning_rate == 1e-4
        assert config.training.betas == (0.9, 0.999)
        assert config.training.ema_decay == 0.9999
        assert config.training.gradient_clipping is None
        assert config.training.batch_size == 256
        assert config.flow.distribution == "lognorm"
        assert not config.data.random_flip
        assert (config.loss.quality, config.loss.mode, config.loss.gamma) == (85, "inv_gamma", 1)
    assert [c.training.steps for c in (xl, xl512, large)] == [4_000_000, 1_700_000, 200_000]
    assert [c.flow.null_probability for c in (xl, xl512, large)] == [0.2, 0.2, 0.1]


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
        (["--trainin.steps", "8"], "unknown key 'trainin'; did you mean 'training'"),
        (["--training.steps", "many"], "training.steps: .*integer.*'many'"),
        (["--training.steps", "0"], "training.steps: .*greater than or equal to 1"),
        (["--training.steps"], "--training.steps needs a value"),
        (["--training.steps", "--name"], "--training.steps needs a value"),
        (["training.steps", "3"], "overrides look like"),
        (["--name.first", "x"], "'name' is a value"),
        (["--flow.distribution", "lognrom"], "did you mean 'lognorm'"),
        (["--training.betas", "[1]"], "training.betas"),
        (["--model.depth", "0"], "model: depth must be at least 1"),
        (["--model.hidden_size", "100", "--model.num_heads", "3"], "multiple of 4"),
        (["--data.height", "30", "--data.width", "30"], "not divisible by model.patch_size 8"),
        (["--model.num_classes", "9"], "digits has 10 classes"),
        (["--sampling.steps", "0"], "steps must be at least 1"),
        (["--sampling.time_shift", "-1"], "time shift must be positive"),
        (["--training.seed", "-1"], "training.seed"),
        (["--sampling.solver", "hein"], "did you mean 'heun'"),
        (["--sampling.guidance_interval", "[0.9, 0.1]"], "guidance interval"),
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
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(file))


def test_an_unknown_configuration_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'deco-xl'"):
        load_config("decoxl")
    with pytest.raises(UserError, match="no such configuration file"):
        load_config("missing.yaml")


def test_help_lists_every_key() -> None:
    resolved = load_config("deco-digits").model_dump()
    keys = {key for key, _, _ in option_help()}
    for section, value in resolved.items():
        for key in value if isinstance(value, dict) else ():
            assert f"{section}.{key}" in keys
    assert set(resolved) == set(RunConfig.model_fields)
