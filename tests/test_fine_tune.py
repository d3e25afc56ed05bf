"""examples/fine_tune.py: from a folder of one's own images to a picture."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_qwen3
import torch
import yaml
from PIL import Image

from deco_fast import DeCoT2I, DeCoT2IConfig, load_checkpoint
from deco_fast.checkpoint import read_config, save_checkpoint
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.class_conditional import ClassConditional
from deco_fast.resources import pretrained_folder

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "fine_tune.py"
SHADES = {"black": 20, "white": 235}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fine_tune", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def images(captioned: bool = False) -> Path:
    """Eight of each shade: in a folder for each, or with captions."""
    for name, shade in SHADES.items():
        folder = Path("photos") if captioned else Path("photos", name)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(8):
            Image.new("RGB", (40, 36), (shade,) * 3).save(folder / f"{name}{number}.png")
            if captioned:
                (folder / f"{name}{number}.txt").write_text(name)
    return Path("photos")


def brightness(pattern: str) -> float:
    drawn = sorted(Path("fine-tuned", "samples").glob(pattern))
    assert drawn
    return float(np.mean([np.asarray(Image.open(path)) for path in drawn]))


def test_nothing_is_written_among_the_images(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = images()
    before = sorted(photos.rglob("*"))
    for out in ("photos", "photos/black/tuned"):
        assert example.main([str(photos), "--out", out]) == 2
        assert f"--out {out} is in photos itself: choose another --out" in capsys.readouterr().err
    assert sorted(photos.rglob("*")) == before


@pytest.mark.slow
def test_the_shipped_model_on_classes_of_its_own(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(images()), "--steps", "60", "--batch-size", "8", "--device", "cpu"]
    words += ["--training.learning_rate", "1e-3", "--sampling.steps", "10"]
    assert example.main(words) == 0
    said = capsys.readouterr().out
    assert "class 0: black\nclass 1: white" in said and "beginning with" in said
    assert Path("fine-tuned", "samples", "grid.png").is_file()
    # The digits are bright on black: 0 and 1 alike have a mean of about 60.
    assert brightness("*-class0.png") < 70 and brightness("*-class1.png") > 120
    model = load_checkpoint(Path("fine-tuned", "run"))
    assert isinstance(model, ClassConditional) and model.config.num_classes == 2
    # It began with the shipped weights, its null class with theirs.
    shipped = load_checkpoint(pretrained_folder() / "deco-digits")
    (made,) = Path("fine-tuned").glob("initial-deco-digits-*-2-classes")
    initial = load_checkpoint(made)
    for name, tensor in shipped.state_dict().items():
        if name == "class_embedder.weight":
            tensor = tensor[-1:]
        assert torch.equal(initial.state_dict()[name][-len(tensor) :], tensor), name
    # Neither a run that is not asked for nor one that has not finished is drawn from.
    grid = Path("fine-tuned/samples/grid.png")
    grid.write_bytes(b"as it was")
    assert example.main([*words, "--dry-run"]) == 0
    assert grid.read_bytes() == b"as it was"
    # Typed again it has nothing to train.
    assert example.main(words) == 0
    assert "has finished all 60 steps" in capsys.readouterr().out
    # From another checkpoint it would be another run, and says so.
    shutil.copytree(pretrained_folder() / "deco-digits", "other")
    assert example.main([*words, "--checkpoint", "other"]) == 2
    assert "fine_tune.yaml is there without 'init_from: fine-tuned/initial-other" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_text_model_on_captions(example: ModuleType) -> None:
    config = DeCoT2IConfig(
        hidden_size=32,
        depth=1,
        num_heads=2,
        patch_size=4,
        decoder_hidden_size=16,
        decoder_depth=1,
        text_depth=1,
        text_size=tiny_qwen3.HIDDEN_SIZE,
        text_length=16,
    )
    card = ModelCard(
        name="tiny",
        height=32,
        width=32,
        sampling=SamplingSettings(solver="adams", steps=4, guidance_scale=2.0, time_shift=3.0),
        text_encoder=str(tiny_qwen3.folder()),
    )
    save_checkpoint("tiny", model=None, ema=DeCoT2I(config, card), card=card)
    words = [str(images(captioned=True)), "--checkpoint", "tiny", "--steps", "120"]
    words += ["--batch-size", "8", "--device", "cpu", "--training.learning_rate", "4e-3"]
    assert example.main(words) == 0
    written = yaml.safe_load(Path("fine-tuned", "fine_tune.yaml").read_text())
    assert written["text"]["sample_prompts"] == ["black", "white"]
    assert brightness("*-prompt1.png") - brightness("*-prompt0.png") > 60
    assert read_config(Path("fine-tuned", "run")) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "image folder missing does not exist"),
        (["photos", "--checkpoint", "nothing"], "nothing does not exist"),
        (["photos", "--steps", "0"], "must be at least 1"),
        (["photos", "--step", "3"], "unknown option '--step'; did you mean '--steps'"),
        (["photos", "--dryrun"], "unknown option '--dryrun'; did you mean '--dry-run'"),
        (["photos", "--training.lerning_rate", "3"], "learning_rate"),
    ],
)
def test_refusals(
    example: ModuleType,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    images()
    assert example.main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("fine-tuned", "run").exists()
    assert not Path("fine-tuned", "fine_tune.yaml").exists()


def test_the_configuration_is_of_the_run(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(images()), "--device", "cpu"]
    config = Path("fine-tuned", "fine_tune.yaml")
    assert example.main([*words, "--dry-run"]) == 0
    assert not config.exists()
    trained: list[list[str]] = []

    def train(arguments: list[str]) -> int:
        trained.append(arguments)
        return 0

    monkeypatch.setattr(example, "train", train)
    assert example.main(words) == 0 and example.main(words) == 0
    before = config.read_bytes()
    assert trained[0][:2] == ["--config", str(config)] and len(trained) == 2
    for more in (["--batch-size", "8"], ["--batch-size", "8", "--dry-run"]):
        assert example.main([*words, *more]) == 2
        assert f"{config} is there without 'batch_size: 8'" in capsys.readouterr().err
    assert config.read_bytes() == before and len(trained) == 2
    config.write_text("of mine")
    assert example.main(words) == 2
    assert config.read_text() == "of mine"
