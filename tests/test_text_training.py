"""A text model's run: from shards on the disk to a picture of what was asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_qwen3
import torch
import yaml
from image_sets import encoded, write, write_tar
from PIL import Image
from processes import assert_identical, in_processes, saved, weights
from safetensors.torch import load_file

from deco_fast import DeCoT2I, load_checkpoint
from deco_fast.cli.sample import main as sample
from deco_fast.cli.train import main as train
from deco_fast.config import load_config
from deco_fast.data.loader import Batch
from deco_fast.errors import UserError
from deco_fast.training import guard
from deco_fast.training.draws import draw_step
from deco_fast.training.step import StepFigures, TrainingStep

SHADES = {"black": 30, "white": 220}
SIZE = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blip3o")
    for shard in range(2):
        members = []
        for number in range(8):
            caption = list(SHADES)[number % 2]
            members += [
                (f"{shard}-{number}.jpg", encoded(SHADES[caption], "jpg", (40, 36))),
                (f"{shard}-{number}.txt", caption.encode()),
            ]
        write_tar(root / f"{shard:05}.tar", members)
    return root


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    fields = {
        "name": "tiny",
        "model": {
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 4,
            "decoder_hidden_size": 16,
            "decoder_depth": 1,
            "text_depth": 1,
            "text_size": tiny_qwen3.HIDDEN_SIZE,
            "text_length": 16,
        },
        "data": {
            "dataset": "shards",
            "root": str(shards),
            "height": SIZE,
            "width": SIZE,
            "skip_small": True,
            "workers": 0,
        },
        "text": {"encoder": str(tiny_qwen3.folder()), "sample_prompts": list(SHADES)},
        "training": {
            "steps": 6,
            "batch_size": 8,
            "learning_rate": 4e-3,
            "gradient_clipping": 1.0,
            "ema_decay": 0.97,
            "warmup_steps": 3,
            "schedule": "cosine",
            "precision": "fp32",
            "compile": False,
        },
        "sampling": {"solver": "adams", "steps": 4, "guidance_scale": 2.0, "time_shift": 3.0},
        "output": {"sample_count": 4},
    }
    path.write_text(yaml.safe_dump(fields))
    return path


def run(config: Path, folder: Path, *options: str) -> int:
    return train([f"--config={config}", "--device=cpu", f"--out={folder}", *options])


@pytest.mark.slow
def test_from_shards_to_a_picture(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    assert run(config, folder, "--training.steps=300", "--text.prefix_probability=0.2") == 0
    model = load_checkpoint(folder)
    assert isinstance(model, DeCoT2I) and model.card is not None
    assert model.card.text_encoder == str(tiny_qwen3.folder())
    assert (folder / "samples" / "step-00000300.png").is_file()
    # The run says how to draw and what to encode prompts with.
    arguments = ["--checkpoint", str(folder), "--device", "cpu", "--out", "drawn"]
    for caption in SHADES:
        arguments += ["--prompt", caption]
    assert sample(arguments) == 0
    black, white = (
        [np.asarray(Image.open(p)) for p in sorted(Path("drawn").glob(f"*-prompt{number}.png"))]
        for number in range(2)
    )
    assert len(black) == len(white) == 4
    # Their noise differs, and after so short a training it sometimes decides: 77 and 212 were seen.
    assert np.mean(white) - np.mean(black) > 80


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_a_stopped_run_resumes_bit_identically(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    options = (
        "--text.prefix_probability=0.5",
        "--flow.null_probability=0.3",
        "--training.gradient_accumulation=2",
        f"--training.recompute_activations={recompute}",
    )
    assert run(config, tmp_path / "whole", *options) == 0
    original = TrainingStep.__call__

    def stop_at_three(self: TrainingStep, step: int, batch: Batch) -> StepFigures:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, batch)

    monkeypatch.setattr(TrainingStep, "__call__", stop_at_three)
    assert run(config, tmp_path / "stopped", *options) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert run(config, tmp_path / "stopped", *options) == 0
    assert_identical(saved(tmp_path / "whole", 6), saved(tmp_path / "stopped", 6))


@pytest.mark.slow
def test_another_encoder_does_not_go_on_with_a_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, moved = tmp_path / "encoder", tmp_path / "moved"
    tiny_qwen3.save(encoder)
    options = ("--training.steps=2", "--output.checkpoint_every=1")
    assert run(config, tmp_path / "run", *options, f"--text.encoder={encoder}") == 0
    (tmp_path / "run/finished").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    encoder.rename(moved)
    tiny_qwen3.save(encoder, seed=1)
    capsys.readouterr()
    assert run(config, tmp_path / "run", *options, f"--text.encoder={encoder}") == 2
    error = capsys.readouterr().err
    assert f"{encoder} is not the text encoder that" in error and error.count("\n") == 1
    # Wherever it lies: the weights count.
    assert run(config, tmp_path / "run", *options, f"--text.encoder={moved}") == 0


@pytest.mark.slow
def test_a_folder_of_images_and_texts_with_loader_processes(config: Path, tmp_path: Path) -> None:
    for number, (caption, shade) in enumerate(SHADES.items()):
        write(tmp_path / f"own/{number}.png", encoded(shade, size=(50, 34)))
        write(tmp_path / f"own/{number}.txt", caption.encode())
    options = (
        "--data.dataset=folder",
        f"--data.root={tmp_path / 'own'}",
        "--data.crop=bilinear",
        "--training.steps=2",
    )
    assert run(config, tmp_path / "here", *options) == 0
    assert run(config, tmp_path / "there", *options, "--data.workers=1") == 0
    assert_identical(saved(tmp_path / "here", 2), saved(tmp_path / "there", 2))


def train_in_two(arguments: list[str]) -> None:
    assert train(arguments) == 0


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(config: Path, tmp_path: Path, distribution: str) -> None:
    options = ["--training.steps=4", "--text.prefix_probability=0.5"]
    assert run(config, tmp_path / "one", *options, "--training.gradient_accumulation=2") == 0
    arguments = [f"--config={config}", "--device=cpu", f"--out={tmp_path / 'two'}", *options]
    in_processes(2, train_in_two, [*arguments, f"--training.distribution={distribution}"])
    one, two = weights(tmp_path / "one", 4), weights(tmp_path / "two", 4)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-5), name


def test_draws_are_functions_of_seed_step_and_place(config: Path) -> None:
    resolved = load_config(
        str(config), ["--text.prefix_probability=0.5", "--flow.null_probability=0.3"]
    )
    captions = [f"caption {i}" for i in range(8)]
    cpu = torch.device("cpu")
    whole = draw_step(resolved, 5, range(8), captions, cpu)
    parts = [
        draw_step(resolved, 5, places, captions[places.start : places.stop], cpu)
        for places in (range(3), range(3, 8))
    ]
    assert whole.y == [*parts[0].y, *parts[1].y]
    assert isinstance(whole.y, list) and "" in whole.y
    assert any(caption in whole.y for caption in captions)
    assert any(kept.endswith(c) and kept != c for kept in whole.y for c in captions)
    assert draw_step(resolved, 6, range(8), captions, cpu).y != whole.y


def test_a_bad_loss_keeps_the_captions(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingStep.__call__

    def spoil(self: TrainingStep, step: int, batch: Batch) -> StepFigures:
        if step == 1:
            batch = batch._replace(images=batch.images * torch.nan)
        return original(self, step, batch)

    monkeypatch.setattr(TrainingStep, "__call__", spoil)
    assert run(config, tmp_path / "run", "--flow.null_probability=0.5") == 2
    (place,) = (tmp_path / "run" / "failures").iterdir()
    captions = json.loads((place / "captions-0.json").read_text())
    assert len(captions["labels"]) == len(captions["y"]) == 8
    assert set(captions["labels"]) == set(SHADES)
    assert "" in captions["y"]
    assert load_file(place / "batch-0.safetensors").keys() == {"images", "indices", "t", "noise"}
    assert guard is not None


@pytest.mark.parametrize(
    ("name", "steps", "size", "shift", "rate", "batch", "parts"),
    [
        ("t2i_pretrain_256", 200_000, 256, 2.0, 2e-4, 64, 3),
        ("t2i_pretrain_512", 100_000, 512, 4.0, 1e-4, 16, 4),
        ("t2i_sft_512", 40_000, 512, 4.0, 1e-5, 16, 4),
    ],
)
def test_the_published_numbers(
    name: str, steps: int, size: int, shift: float, rate: float, batch: int, parts: int
) -> None:
    config = load_config(name)
    training, sampling = config.training, config.sampling
    assert (config.data.height, config.data.width) == (size, size)
    assert (training.steps, training.learning_rate) == (steps, rate)
    assert training.batch_size == 8 * batch * parts
    assert training.gradient_accumulation == parts
    assert training.gradient_clipping == 1.0
    assert config.flow.time_shift == shift
    assert config.flow.null_probability == 0.1
    assert (config.alignment.layer, config.alignment.weight) == (6, 0.5)
    assert sampling.guidance_scale == 4.0
    if name == "t2i_sft_512":
        assert (config.data.dataset, config.data.crop) == ("folder", "bilinear")
        assert (sampling.solver, sampling.steps, sampling.time_shift) == ("adams", 25, 3.0)
        assert training.betas == (0.9, 0.999)
    else:
        assert (config.data.dataset, config.data.crop) == ("shards", "adm")
        assert config.data.skip_small and config.text.prefix_probability == 0.5
        assert (sampling.solver, sampling.steps, sampling.time_shift) == ("euler", 100, 1.0)
        assert training.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.text_lenght=3"],
            "unknown key 'model.text_lenght'; did you mean 'model.text_length'?",
        ),
        (["--model.text_length=0"], "model: text_length must be at least 1"),
        (["--data.dataset=digits"], "data.dataset digits has no captions"),
        (["--data.crop=centre"], "data.crop: 'centre' is not one of adm, bilinear"),
        (["--text.sample_prompts=[]"], "text.sample_prompts"),
    ],
)
def test_wrong_configurations(config: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(str(config), options)
    assert message in str(caught.value)


def test_text_options_of_a_class_model() -> None:
    with pytest.raises(UserError, match=r"data.skip_small and data.crop are for text models"):
        load_config("deco-digits", ["--data.skip_small=true"])


def test_a_missing_text_encoder_costs_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "run", "--text.encoder=nowhere") == 2
    assert "text encoder nowhere is no folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
