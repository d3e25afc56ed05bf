"""--init-from: a run that begins with the weights of another, ours or published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from processes import assert_identical, weights
from safetensors.torch import load_file
from test_training import run
from torch import Tensor

from deco_fast.checkpoint import load_training_state
from deco_fast.cli.train import main
from deco_fast.config import load_config
from deco_fast.interop.convert import convert

# A learning rate of no consequence: after a step, the weights are those that the run began with.
FROZEN = "--training.learning_rate=1e-30"


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, after which weights and average differ."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert run(folder, 3) == 0
    return folder


def begun(folder: Path) -> dict[str, Tensor]:
    """What a run of one frozen step began with."""
    return weights(folder, 1)


def assert_begun_with(folder: Path, expected: dict[str, Tensor]) -> None:
    found = begun(folder)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # The average moves by a rounding error where it meets other weights.
        decay = 0.995 if key.startswith("ema.") else 1
        model = expected[key.replace("ema.", "model.", 1)]
        assert torch.allclose(found[key], torch.lerp(model, tensor, decay), atol=1e-6), key


def test_a_run_begins_with_anothers_weights_and_a_fresh_optimizer(
    tmp_path: Path, first_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "second"
    # Twice the image size, as DeCo-XL goes from 256 to 512 pixels.
    sizes = ("--data.height=64", "--data.width=64")
    assert run(folder, 1, FROZEN, *sizes, f"--init-from={first_run}") == 0
    assert f"beginning with {first_run}: weights and average of step 3" in capsys.readouterr().out
    expected = weights(first_run, 3)
    assert not torch.equal(
        expected["model.patch_embedder.bias"], expected["ema.patch_embedder.bias"]
    )
    assert_begun_with(folder, expected)
    state = load_training_state(folder / "checkpoints" / "step-00000001")
    assert state["step"] == 1
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {1.0}
    stored = load_config(str(folder / "config.yaml"))
    assert stored.training.init_from == str(first_run)


@pytest.mark.parametrize("form", ["checkpoint folder", "published", "one file"])
def test_every_kind_of_checkpoint_serves(tmp_path: Path, first_run: Path, form: str) -> None:
    source = first_run / "checkpoints" / "step-00000003"
    expected = weights(first_run, 3)
    if form == "published":
        convert(source, tmp_path / "published.ckpt")
        source = tmp_path / "published.ckpt"
    elif form == "one file":
        source = source / "ema.safetensors"
        expected |= {
            key.replace("ema.", "model.", 1): tensor
            for key, tensor in expected.items()
            if key.startswith("ema.")
        }
    assert run(tmp_path / "run", 1, FROZEN, f"--init-from={source}") == 0
    assert_begun_with(tmp_path / "run", expected)


def test_a_run_resumes_from_itself_and_not_from_its_beginning(
    tmp_path: Path, first_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first_run, source)
    option = f"--init-from={source}"
    run(tmp_path / "whole", 4, option)
    run(tmp_path / "resumed", 4, option, "--output.checkpoint_every=2")
    # As if it had been killed after step 2; the checkpoint it began with is no longer needed.
    (tmp_path / "resumed" / "finished").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000004")
    shutil.rmtree(source)
    capsys.readouterr()
    assert run(tmp_path / "resumed", 4, option, "--output.checkpoint_every=2") == 0
    out = capsys.readouterr().out
    assert "resuming" in out and "beginning with" not in out
    assert_identical(weights(tmp_path / "whole", 4), weights(tmp_path / "resumed", 4))


def test_a_run_that_began_otherwise_is_not_begun_anew(
    tmp_path: Path, first_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(folder, 2)
    before = weights(folder, 2)
    assert run(folder, 2, f"--init-from={first_run}") == 2
    error = capsys.readouterr().err
    assert f"training.init_from was None, is {first_run}" in error
    assert_identical(before, weights(folder, 2))


def test_the_projector_comes_along_where_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    from deco_fast.alignment.dinov2 import random_dinov2

    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, mlp_ratio=1, image_size=56
    )
    random_dinov2(0, config).save_pretrained(tmp_path)
    repa = (f"--repa={tmp_path / 'model.safetensors'}", "--alignment.layer=1")
    run(tmp_path / "first", 1, *repa)
    convert(tmp_path / "first", tmp_path / "published.ckpt")

    def projector(name: str) -> dict[str, Tensor]:
        return load_file(
            tmp_path / name / "checkpoints" / "step-00000001" / "projector.safetensors"
        )

    option = f"--init-from={tmp_path / 'published.ckpt'}"
    assert run(tmp_path / "second", 1, FROZEN, "--training.seed=1", option, *repa) == 0
    assert "average of step 1, projector" in capsys.readouterr().out
    assert_identical(projector("first"), projector("second"))
    narrow = "--alignment.projector_hidden_size=8"
    assert run(tmp_path / "third", 1, FROZEN, option, *repa, narrow) == 0
    assert "the projector of REPA begins anew" in capsys.readouterr().out
    assert projector("third")["0.weight"].shape == (8, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.hidden_size=64"], "has patch_embedder.weight of shape (32, 192), and the"),
        (["--model.depth=2"], "has no blocks.1.norm1.weight (32,)"),
        (["--model.decoder_depth=2"], "has no decoder.blocks.1.norm.weight (16,)"),
        (["--model.decoder_hidden_size=32"], "decoder.pixel_embedder.weight of shape (16, 67)"),
    ],
)
def test_a_network_with_other_tensors_is_refused_by_name(
    tmp_path: Path,
    first_run: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path / "run", 1, *options, f"--init-from={first_run}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --init-from ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_surplus_block_is_refused_by_name(
    tmp_path: Path, first_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "deep", 1, "--model.depth=2") == 0
    capsys.readouterr()
    assert run(tmp_path / "run", 1, f"--init-from={tmp_path / 'deep'}") == 2
    assert "has blocks.1." in capsys.readouterr().err


def test_a_wrong_name_can_be_corrected(
    tmp_path: Path, first_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", 1, f"--init-from={first_run}s") == 2
    assert f"did you mean {first_run}?" in capsys.readouterr().err
    assert run(tmp_path / "run", 1, f"--init-from={first_run}") == 0


def test_the_run_at_512_pixels_asks_for_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config=c2i_xl_512", f"--out={tmp_path / 'run'}", "--device=cpu"]) == 2
    assert "imagenet256_epoch320.ckpt" in capsys.readouterr().err
