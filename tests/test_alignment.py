"""REPA in a training: the published step, and a run that learns, stops and goes on with it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden import gradient_norms, load_model, metadata, our_names, relative_error, tensors
from processes import TINY, assert_identical, in_processes, weights
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import run
from torch import Tensor

from deco_fast.alignment import Projector, alignment_loss
from deco_fast.alignment.features import Features
from deco_fast.checkpoint import load_checkpoint, load_training_state
from deco_fast.config import RunConfig, load_config
from deco_fast.data.loader import Batch
from deco_fast.flow import shift_time
from deco_fast.models.config import NetworkConfig, PixelDiTConfig
from deco_fast.training import step as step_module
from deco_fast.training.batches import open_dataset
from deco_fast.training.distributed import Processes
from deco_fast.training.draws import Draws
from deco_fast.training.step import TrainingStep
from deco_fast.training.targets import open_features

SINGLE = Processes(0, 1, torch.device("cpu"))


class StubEncoder:
    """Says what it was given: the golden features."""

    def __init__(self, features: Tensor) -> None:
        self.features, self.feature_size = features, features.shape[-1]

    def __call__(self, images: Tensor) -> Tensor:
        assert len(images) == len(self.features)
        return self.features


def stub(features: Tensor) -> Features:
    return Features(StubEncoder(features))  # type: ignore[arg-type]


# --- goldens --------------------------------------------------------------------------------


def golden_config(golden: dict[str, Tensor], meta: dict[str, Any]) -> RunConfig:
    """Our configuration of a published trainer."""
    options = meta["kwargs"]
    model: NetworkConfig = load_model(meta["model_file"]).config
    if meta["trainer"].endswith("JiT"):
        assert isinstance(model, PixelDiTConfig)
        model = replace(model, prediction="image")
    # Of the published trainers DeCo's alone has a frequency loss.
    frequency_weight = 1.0 if "fm_loss_freq" in meta["loss"] else 0.0
    batch_size, _, height, width = golden["in.x"].shape
    return RunConfig.model_validate(
        {
            "name": "golden",
            "model": model,
            "data": {"height": height, "width": width},
            "flow": {
                "time_shift": options.get("timeshift", 1.0),
                "timestep_weight": options.get("loss_weight_fn", "constant"),
            },
            "loss": {
                "frequency_weight": options.get("freq_loss_weight", frequency_weight),
                "quality": options.get("freq_quality", 85),
                "mode": options.get("freq_mode", "inv_gamma"),
                "gamma": options.get("freq_gamma", 1.0),
            },
            "alignment": {
                "enabled": True,
                "weight": options.get("feat_loss_weight", 0.5),
                "layer": meta["align_layer"],
                "projector_hidden_size": len(golden["param.proj.0.0.weight"]),
            },
            "training": {
                "steps": 1,
                "batch_size": batch_size,
                "precision": "fp32",
                "compile": False,
            },
        }
    )


@pytest.mark.parametrize(
    ("name", "stored_gradients"),
    [
        ("deco_c2i_lognorm", 6),
        ("deco_c2i_uniform_shift2_q75_truncfeat", 6),
        ("deco_c2i_nonsquare_maxsnr", 6),
        ("deco_t2i_lognorm_shift4", 4),
        ("repa_baseline", 3),
        ("jit_baseline", 3),
    ],
)
def test_a_training_step_equals_golden(
    name: str, stored_gradients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"trainer_{name}"
    golden, meta = tensors(file), metadata(file)
    config = golden_config(golden, meta)
    training = TrainingStep(config, SINGLE, stub(golden["in.encoder_features"]))
    training.model.load_state_dict(load_model(meta["model_file"]).state_dict())
    projector = training.objective.projector
    assert projector is not None
    projector.load_state_dict(
        {
            key.removeprefix("param.proj.0."): value
            for key, value in golden.items()
            if key.startswith("param.proj.0.")
        }
    )
    raw = golden["in.t_raw"].sigmoid() if meta["lognorm_t"] else golden["in.t_raw"]
    t = shift_time(raw, config.flow.time_shift)
    assert relative_error(t, golden["t"]) <= 1e-6
    draws = Draws(golden["in.y"], t, golden["in.noise"])
    monkeypatch.setattr(step_module, "draw_step", lambda *_: draws)
    gradients: dict[str, Tensor] = {}
    norms: list[Tensor] = []

    def note(*_: object) -> None:
        for key, parameter in training.objective.named_parameters():
            assert parameter.grad is not None, key
            gradients[key] = parameter.grad.clone()
        norms.append(gradient_norms(training.model, meta["model_file"]))

    training.optimizer.register_step_pre_hook(note)
    training.prepare()
    figures = training(0, Batch(golden["in.x"], golden["in.y"], torch.arange(len(t))))
    losses = figures.by_name

    for ours, published in {
        "total": "loss",
        "flow_matching": "fm_loss",
        "frequency": "fm_loss_freq",
        "alignment": "cos_loss",
    }.items():
        if published == "fm_loss_freq" and not config.loss.frequency_weight:
            continue
        assert relative_error(losses[f"loss/{ours}"], golden[f"loss.{published}"]) <= 2e-6, ours
    names = our_names(meta["model_file"])
    stored = [key for key in golden if key.startswith("grad.denoiser.")]
    assert len(stored) == stored_gradients
    for key in stored:
        published = key.removeprefix("grad.denoiser.")
        gradient = gradients[f"model.{names[published]}"]
        gradient = gradient[:: meta["grad_row_stride"][published]]
        assert relative_error(gradient, golden[key]) <= 1e-5, published
    for leaf in projector.state_dict():
        error = relative_error(gradients[f"projector.{leaf}"], golden[f"grad.proj.0.{leaf}"])
        assert error <= 1e-5, leaf
    # The norms are of all that has a gradient in the published trainer: the denoiser.
    assert ((norms[0] - golden["grad.norms"]).abs() / golden["grad.norms"]).max() <= 1e-5


# --- the loss -------------------------------------------------------------------------------


def test_the_loss_is_one_minus_the_mean_cosine() -> None:
    draws = torch.Generator().manual_seed(0)
    projected, features = torch.randn(2, 3, 5, 7, generator=draws)
    a, b = projected.double().numpy(), features.double().numpy()
    cosines = (a * b).sum(-1) / ((a**2).sum(-1) * (b**2).sum(-1)) ** 0.5
    expected = float(1 - cosines.mean())
    assert float(alignment_loss(projected, features)) == pytest.approx(expected, rel=1e-6)
    # Only the first tokens count where the encoder has fewer.
    assert float(alignment_loss(projected, features[:, :2])) == pytest.approx(
        float(1 - cosines[:, :2].mean()), rel=1e-6
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert alignment_loss(projected, features).dtype == torch.float32
        half = alignment_loss(projected.bfloat16(), features)
    assert half == alignment_loss(projected.bfloat16().float(), features)


@pytest.mark.parametrize("shape", [(2, 6, 7), (3, 5, 7), (2, 5, 8)])
def test_features_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        alignment_loss(torch.zeros(2, 5, 7), torch.zeros(shape))


def test_the_published_sizes_of_the_projector() -> None:
    for width, millions in ((1152, 3.54), (1024, 2.89)):
        with torch.device("meta"):
            projector = Projector(width, width, 768)
        count = sum(parameter.numel() for parameter in projector.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.006)


# --- a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a small random DINOv2."""
    transformers = pytest.importorskip("transformers")
    from deco_fast.alignment.dinov2 import random_dinov2

    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, mlp_ratio=1, image_size=56
    )
    folder = tmp_path_factory.mktemp("dinov2")
    random_dinov2(0, config).save_pretrained(folder)
    return str(folder / "model.safetensors")


def aligned(dinov2: str, *options: str) -> list[str]:
    shape = ("--alignment.layer=1", "--alignment.projector_hidden_size=24")
    return [f"--repa={dinov2}", *shape, *options]


def projector_of(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "projector.safetensors")


def test_a_run_trains_the_projector_and_keeps_it_apart(tmp_path: Path, dinov2: str) -> None:
    folder = tmp_path / "run"
    options = aligned(dinov2, "--output.checkpoint_every=30", "--training.learning_rate=3e-3")
    assert run(folder, 60, *options) == 0
    losses = [e.value for e in EventAccumulator(str(folder)).Reload().Scalars("loss/alignment")]
    assert losses[-1] < 0.5 * losses[0]
    before, after = projector_of(folder, 30), projector_of(folder, 60)
    assert before["0.weight"].shape == (24, 32) and before["4.weight"].shape == (64, 24)
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert not any("projector" in key for key in weights(folder, 60))
    load_checkpoint(folder)


def test_without_repa_there_is_no_projector(tmp_path: Path, dinov2: str) -> None:
    assert run(tmp_path / "run", 2, *aligned(dinov2, "--repa=off")) == 0
    names = [path.name for path in (tmp_path / "run").rglob("*.safetensors")]
    assert sorted(names) == ["ema.safetensors", "model.safetensors"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_resumes_bit_identically(
    tmp_path: Path, dinov2: str, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    options = aligned(dinov2, f"--training.gradient_accumulation={accumulation}")
    run(tmp_path / "whole", 5, *options)
    original = TrainingStep.__call__

    def die_at_three(self: TrainingStep, step: int, batch: Batch) -> dict[str, Tensor]:
        if step == 3:
            raise RuntimeError("power cut")
        return original(self, step, batch)

    monkeypatch.setattr(TrainingStep, "__call__", die_at_three)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "stopped", 5, *options, "--output.checkpoint_every=2")
    monkeypatch.undo()
    assert run(tmp_path / "stopped", 5, *options, "--output.checkpoint_every=2") == 0
    assert_identical(weights(tmp_path / "whole", 5), weights(tmp_path / "stopped", 5))
    assert_identical(projector_of(tmp_path / "whole", 5), projector_of(tmp_path / "stopped", 5))
    moments = [
        load_training_state(tmp_path / name / "checkpoints" / "step-00000005")["optimizer"]["state"]
        for name in ("whole", "stopped")
    ]
    # The projector's six tensors have moments as well.
    assert len(moments[0]) == len(weights(tmp_path / "whole", 5)) // 2 + 6
    for index, state in moments[0].items():
        for key, value in state.items():
            assert torch.equal(value, moments[1][index][key]), key


@pytest.mark.slow
def test_features_are_kept_on_the_disk(
    tmp_path: Path,
    dinov2: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deco_fast.alignment.dinov2 import DINOv2

    asked: list[int] = []
    forward = DINOv2.forward

    def counted(self: DINOv2, images: Tensor) -> Tensor:
        asked.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(DINOv2, "forward", counted)
    options = aligned(dinov2, f"--alignment.cache={tmp_path / 'cache'}")
    # 16 tokens of 64 channels for each of the 1,437 digits.
    assert run(tmp_path / "first", 5, *options) == 0
    assert "0.00274 GiB when full, 0% filled" in capsys.readouterr().out
    assert sum(asked) == 5 * 8
    asked.clear()
    assert run(tmp_path / "second", 6, *options) == 0
    assert "3% filled" in capsys.readouterr().out
    assert sum(asked) == 8  # of the sixth step
    run(tmp_path / "third", 5, *options)
    assert_identical(weights(tmp_path / "first", 5), weights(tmp_path / "third", 5))
    (file,) = (tmp_path / "cache").glob("*/features")
    assert file.stat().st_size == 1437 * 16 * 64 * 2

    asked.clear()
    file.write_bytes(b"\x01" * file.stat().st_size)
    assert run(tmp_path / "fourth", 5, *options) == 0
    assert sum(asked) == 5 * 8 and "is damaged" in caplog.text
    assert_identical(weights(tmp_path / "first", 5), weights(tmp_path / "fourth", 5))
    # Another image size, another cache.
    run(tmp_path / "larger", 1, *options, "--data.height=40", "--data.width=40")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert run(tmp_path / "fifth", 1, *options, "--alignment.cache_gib=0.001") == 2
    assert "more than alignment.cache_gib 0.001: raise it" in capsys.readouterr().err


def test_other_pixels_of_the_same_files_have_another_cache(
    tmp_path: Path, dinov2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text model's images the crop, and which of them are passed over, can be chosen."""
    options = {"enabled": "true", "layer": "1", "encoder": dinov2, "cache": str(tmp_path)}
    words = [f"--alignment.{key}={value}" for key, value in options.items()]
    config = load_config("deco-digits", words)
    dataset = open_dataset(config)
    places = set()
    for changes in ({}, {"crop": "bilinear"}, {"skip_small": True}, {"random_flip": True}):
        data = config.data.model_copy(update=changes)
        features = open_features(
            config.model_copy(update={"data": data}), dataset, torch.device("cpu")
        )
        assert features.cache is not None
        places.add(features.cache.path)
    assert len(places) == 4


def test_another_encoder_does_not_go_on_with_a_run(
    tmp_path: Path, dinov2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(dinov2)
    # Wherever it lies: the weights count.
    save_file(weights, tmp_path / "moved.safetensors")
    weights["layernorm.bias"] += 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    folder, options = tmp_path / "run", ("--output.checkpoint_every=1",)
    run(folder, 3, *aligned(dinov2), *options)
    (folder / "finished").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    capsys.readouterr()
    assert run(folder, 3, *aligned(str(tmp_path / "other.safetensors")), *options) == 2
    error = capsys.readouterr().err
    assert "other.safetensors is not the DINOv2" in error and "by --repa FILE" in error
    assert run(folder, 3, *aligned(str(tmp_path / "moved.safetensors")), *options) == 0


def test_a_run_of_before_there_was_repa_goes_on(tmp_path: Path) -> None:
    folder, options = tmp_path / "run", ("--output.checkpoint_every=1",)
    run(folder, 2, *options)
    (folder / "finished").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    del stored["alignment"]
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    assert run(folder, 2, *options, "--repa=on", "--alignment.layer=1") == 2
    assert run(folder, 2, *options) == 0


def test_clipping_counts_the_projector(dinov2: str) -> None:
    options = [f"--alignment.encoder={dinov2}", "--training.gradient_clipping=1e-3"]
    config = load_config(
        "deco-digits",
        [*TINY, *options, "--alignment.enabled=true", "--alignment.layer=1"],
    )
    training = TrainingStep(config, SINGLE, stub(torch.randn(8, 16, 64)))
    norm: list[Tensor] = []

    def note(*_: object) -> None:
        gradients = [p.grad for p in training.objective.parameters() if p.grad is not None]
        norm.append(torch.stack([g.norm() for g in gradients]).norm())

    training.optimizer.register_step_pre_hook(note)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    training(0, Batch(images, torch.zeros(8, dtype=torch.int64), torch.arange(8)))
    assert float(norm[0]) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.gpu
def test_a_compiled_run_on_a_gpu(tmp_path: Path, dinov2: str) -> None:
    folder = tmp_path / "run"
    compiled = ("--training.compile=true", "--training.precision=bf16")
    cached = f"--alignment.cache={tmp_path / 'cache'}"
    options = aligned(dinov2, *compiled, cached, "--device=cuda", "--training.learning_rate=3e-3")
    assert run(folder, 60, *options) == 0
    losses = [e.value for e in EventAccumulator(str(folder)).Reload().Scalars("loss/alignment")]
    assert losses[-1] < 0.5 * losses[0]


def train(folder: Path, options: list[str]) -> None:
    assert run(folder, 4, *options) == 0


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes_follow_one(tmp_path: Path, dinov2: str, distribution: str) -> None:
    """Two processes make two steps, one makes two more: as one alone."""
    options = aligned(dinov2, f"--training.distribution={distribution}")
    run(tmp_path / "one", 4, *options)
    folder = tmp_path / "two"
    in_processes(2, train, folder, [*options, "--output.checkpoint_every=2"])
    one, two = projector_of(tmp_path / "one", 4), projector_of(folder, 4)
    for key, tensor in one.items():
        assert relative_error(two[key], tensor) < 1e-4, key

    # As if both had been killed after step 2.
    (folder / "finished").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert run(folder, 4, *options, "--output.checkpoint_every=2") == 0
    for key, tensor in one.items():
        assert relative_error(projector_of(folder, 4)[key], tensor) < 1e-4, key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repa=on", "--alignment.layer=1"], "REPA needs DINOv2: hf:facebook/dinov2-base"),
        (["--repa=nowhere.pth", "--alignment.layer=1"], "nowhere.pth does not exist"),
        (["--repa=on"], "alignment.layer 8 does not exist: the DiT has 1 blocks"),
    ],
)
def test_what_repa_lacks_is_one_line_and_status_2(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    assert run(tmp_path / "run", 2, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    # The remedy helps.
    assert run(tmp_path / "run", 2, *options, "--repa=off") == 0


def test_without_transformers_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("deco_fast.alignment.dinov2", "deco_fast.alignment.weights"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(tmp_path / "run", 2, "--repa=on", "--alignment.layer=1") == 2
    assert "pip install 'deco-fast[repa]'" in capsys.readouterr().err
