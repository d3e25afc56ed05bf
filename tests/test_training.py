"""A run of train.py: it learns, stops, goes on exactly, and refuses what it must."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import TINY, assert_identical, saved
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deco_fast.checkpoint import load_checkpoint, load_training_state
from deco_fast.checkpoint import save as checkpoint_save
from deco_fast.checkpoint.lock import alone_in
from deco_fast.cli.train import main
from deco_fast.config import RunConfig, load_config
from deco_fast.data.loader import Batch
from deco_fast.training import state
from deco_fast.training.batches import Batches, open_dataset
from deco_fast.training.distributed import Processes
from deco_fast.training.draws import Draws, draw_step
from deco_fast.training.ema import ExponentialMovingAverage
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.step import StepFigures, TrainingStep, learning_rate

ROOT = Path(__file__).parent.parent


def run(folder: Path, steps: int, *options: str) -> int:
    arguments = [*TINY, f"--training.steps={steps}", "--device=cpu", f"--out={folder}", *options]
    return main(arguments)


def tiny_config(*options: str) -> RunConfig:
    return load_config("deco-digits", [*TINY, "--training.steps=6", *options])


def test_a_run_leaves_everything_it_should(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(folder, 6, "--output.sample_every=3", "--output.checkpoint_every=2") == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
        "step-00000006",
    ]
    assert (folder / "finished").exists()
    assert (folder / "versions.json").exists()
    assert load_config(str(folder / "config.yaml")).training.steps == 6
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [
        "step-00000003.png",
        "step-00000006.png",
    ]
    with Image.open(folder / "samples" / "step-00000006.png") as grid:
        assert min(grid.size) >= 32
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [2, 4, 6]
    model = load_checkpoint(str(folder))
    assert model.card is not None
    assert (model.card.name, model.card.step, model.card.height) == ("deco-digits", 6, 32)
    capsys.readouterr()

    assert run(folder, 6, "--output.sample_every=3", "--output.checkpoint_every=2") == 0
    assert "has finished" in capsys.readouterr().out


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", 5, "--output.checkpoint_every=1", "--output.keep_checkpoints=2")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]


def test_the_loss_falls(tmp_path: Path) -> None:
    run(tmp_path / "run", 60, "--output.log_every=10", "--training.learning_rate=3e-3")
    losses = [
        e.value for e in EventAccumulator(str(tmp_path / "run")).Reload().Scalars("loss/total")
    ]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_resumes_bit_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    option = f"--training.gradient_accumulation={accumulation}"
    run(tmp_path / "whole", 7, option)

    # SIGTERM arrives during step 3.
    original = TrainingStep.__call__

    def stop_at_three(self: TrainingStep, step: int, batch: Batch) -> StepFigures:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, batch)

    monkeypatch.setattr(TrainingStep, "__call__", stop_at_three)
    assert run(tmp_path / "stopped", 7, option) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "finished").exists()
    state = load_training_state(tmp_path / "stopped" / "checkpoints" / "step-00000003")
    assert state["step"] == 3

    assert run(tmp_path / "stopped", 7, option) == 0
    assert_identical(saved(tmp_path / "whole", 7), saved(tmp_path / "stopped", 7))


def test_a_killed_run_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--output.checkpoint_every=2",)
    run(tmp_path / "whole", 5, *options)
    original = TrainingStep.__call__

    def die_at_four(self: TrainingStep, step: int, batch: Batch) -> StepFigures:
        if step == 3:
            raise RuntimeError("power cut")
        return original(self, step, batch)

    monkeypatch.setattr(TrainingStep, "__call__", die_at_four)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "killed", 5, *options)
    monkeypatch.undo()
    capsys.readouterr()
    assert run(tmp_path / "killed", 5, *options) == 0
    assert "at step 2 of 5" in capsys.readouterr().out
    assert_identical(saved(tmp_path / "whole", 5), saved(tmp_path / "killed", 5))
    steps = [
        e.step for e in EventAccumulator(str(tmp_path / "killed")).Reload().Scalars("loss/total")
    ]
    assert steps == sorted(set(steps))


def test_a_full_disk_costs_only_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = tmp_path / "run", ("--output.checkpoint_every=2",)
    original = checkpoint_save.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if (folder / "checkpoints" / "step-00000002").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_save, "save_file", full)
    monkeypatch.setattr(state, "PATIENCE_SECONDS", 0.0)
    assert run(folder, 5, *options) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("error: ") == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert run(folder, 5, *options) == 0
    run(tmp_path / "whole", 5, *options)
    assert_identical(saved(tmp_path / "whole", 5), saved(folder, 5))


def test_a_full_disk_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the checkpoint of the step in memory, while the training goes on."""
    original, attempts = checkpoint_save.save_file, list[Path]()

    def full_at_first(tensors: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        attempts.append(path)
        if len(attempts) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_save, "save_file", full_at_first)
    monkeypatch.setattr(state, "_PAUSE_SECONDS", 0.1)
    options = ("--output.checkpoint_every=2", "--output.keep_checkpoints=9")
    assert run(tmp_path / "run", 5, *options) == 0
    assert caplog.text.count("No space left on device") == 1
    assert "trying again for ten minutes" in caplog.text
    monkeypatch.undo()
    assert run(tmp_path / "whole", 5, *options) == 0
    for step in (2, 4, 5):
        assert_identical(saved(tmp_path / "whole", step), saved(tmp_path / "run", step))


def test_a_run_that_has_to_stop_does_not_wait_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = list[int]()

    def full(*_: object, **__: object) -> None:
        attempts.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_save, "save_file", full)
    assert run(tmp_path / "run", 3) == 2
    assert len(attempts) <= 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["while a checkpoint is written", "after one"])
def test_a_run_folder_that_was_renamed_meanwhile_can_be_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    original_step = TrainingStep.__call__
    folder, options = tmp_path / "run", ("--output.checkpoint_every=2",)
    # Both are called by the thread that writes, at a known place in it.
    owner, name = {
        "while a checkpoint is written": (checkpoint_save, "write_checksums"),
        "after one": (RunFolder, "drop_old_checkpoints"),
    }[moment]
    original = getattr(owner, name)

    def rename(*arguments: Any) -> None:
        if not (tmp_path / "renamed").exists():
            folder.rename(tmp_path / "renamed")
        original(*arguments)

    def stop(self: TrainingStep, step: int, batch: Batch) -> StepFigures:
        if step == 4:
            raise RuntimeError("power cut")
        return original_step(self, step, batch)

    monkeypatch.setattr(owner, name, rename)
    monkeypatch.setattr(TrainingStep, "__call__", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(folder, 5, *options)
    monkeypatch.undo()
    assert (tmp_path / "renamed").is_dir()
    assert run(folder, 5, *options) == 0
    assert run(tmp_path / "whole", 5, *options) == 0
    assert_identical(saved(folder, 5), saved(tmp_path / "whole", 5))


def test_checkpoints_on_a_disk_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(folder, 2) == 0
    (folder / "checkpoints").rename(tmp_path / "disk")
    (folder / "checkpoints").symlink_to(tmp_path / "gone")
    capsys.readouterr()
    assert run(folder, 2) == 2
    assert f"checkpoints is a link to {tmp_path / 'gone'}, which is not there: mount" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_save_first(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    options = ["--training.steps=100000", "--output.checkpoint_every=100000", f"--out={folder}"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *TINY, "--device=cpu", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("events.*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "the same command goes on from there" in out
    assert len(list((folder / "checkpoints").glob("step-*"))) == 1


def test_a_changed_configuration_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(folder, 2)
    before = saved(folder, 2)
    capsys.readouterr()
    assert run(folder, 2, "--training.ema_decay=0.5", "--loss.quality=50") == 2
    error = capsys.readouterr().err
    assert "training.ema_decay was 0.995, is 0.5" in error
    assert "loss.quality was 85, is 50" in error
    assert error.count("\n") == 1
    assert_identical(before, saved(folder, 2))
    assert run(folder, 2, "--output.log_every=1") == 0


@pytest.mark.parametrize("fast", [True, False])
def test_a_processor_that_is_slow_at_bf16_is_named(
    tmp_path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deco_fast.cli.train.has_fast_bfloat16", lambda: fast)
    for precision in ("fp32", "bf16"):
        assert run(tmp_path / precision, 1, f"--training.precision={precision}") == 0
        said = "--training.precision=fp32 trains faster" in capsys.readouterr().out
        assert said == (precision == "bf16" and not fast)


def test_two_commands_do_not_train_in_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    constant = "--training.schedule=constant"
    assert run(folder, 2, constant) == 0
    before = saved(folder, 2)
    with alone_in(folder):
        assert run(folder, 4, constant) == 2
        assert f"error: {folder} is in use by another program" in capsys.readouterr().err
        with alone_in(tmp_path):  # another folder is another matter
            pass
    assert_identical(before, saved(folder, 2))
    assert run(folder, 4, constant) == 0


def test_gradient_accumulation_is_the_same_step() -> None:
    """Two halves of a batch give the gradient of the whole, up to rounding."""
    gradients = []
    for accumulation in (1, 2):
        config = tiny_config(f"--training.gradient_accumulation={accumulation}")
        processes = Processes(0, 1, torch.device("cpu"))
        training = TrainingStep(config, processes)
        torch.nn.init.normal_(training.model.decoder.output.weight)
        kept: dict[str, torch.Tensor] = {}
        training.optimizer.register_step_pre_hook(
            lambda *_, kept=kept, model=training.model: kept.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        )
        training(0, next(Batches(open_dataset(config), config, processes, 0)))
        gradients.append(kept)
    for name, whole in gradients[0].items():
        error = (gradients[1][name] - whole).norm() / whole.norm().clamp(min=1e-12)
        assert error < 1e-4, name


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_is_ordered_without_waiting_for_the_gpu(compiled: bool) -> None:
    """The host can then order the next step while the GPU works at this one."""
    # Bytes, as all images come but the digits.
    config = tiny_config(
        f"--training.compile={str(compiled).lower()}",
        "--data.dataset=photographs",
        "--model.num_classes=2",
    )
    processes = Processes(0, 1, torch.device("cuda", 0))
    training = TrainingStep(config, processes)
    training.prepare()
    batches = Batches(open_dataset(config), config, processes, 0)
    for step in range(3):  # compilation and libraries may wait at first
        training(step, next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        training(3, next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dry_run_prints_the_cost_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run", "--config=c2i_l_256"]) == 0
    out = capsys.readouterr().out
    assert "426,938,019" in out
    # 2 × (the products' weights × the tokens they meet), attention and decoder included.
    assert "FLOPs per image     155.04 G forward, 515.19 G forward and backward" in out
    assert "of them 46.32 G in DINOv2-B; projector 2,886,400 parameters" in out
    assert "GiB" in out
    assert "frequency_weight: 1.0" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_a_compiler_a_compiled_run_says_so(tmp_path: Path) -> None:
    options = ["--training.steps=2", "--training.compile=true", f"--out={tmp_path / 'run'}"]
    result = subprocess.run(
        [sys.executable, "train.py", *TINY, "--device=cpu", *options],
        cwd=ROOT,
        env={
            **os.environ,
            "CXX": str(tmp_path / "no-compiler"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: torch.compile cannot compile here" in result.stderr
    assert "set --training.compile false" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.batch_size=9", "--training.gradient_accumulation=2"], "not a multiple"),
        (["--data.dataset=folder", "--model.num_classes=10"], "data.root is not set"),
        (["--data.dataset=folder", "--data.root=nowhere"], "nowhere"),
        (["--data.root=photos"], "data.root has no effect with data.dataset digits"),
        (["--init-from="], "--init-from: is empty"),
        (["--config="], "--config: is empty"),
        (["--device=cuda:7"], "not available"),
        (["--device=tpu9"], "unknown device"),
        (["--device=mps"], "unknown device 'mps': use auto, cpu or cuda"),
        (["--config=deco-digit"], "did you mean 'deco-digits'"),
        ([f"--out={'x' * 300}"], "x cannot be written (File name too long): choose another place"),
        (["--dry-run", "--max-time=soon"], "--max-time soon is no duration"),
        (["--dry-run", "--device=tpu9"], "unknown device"),
        (
            ["--dry-run", "--init-from=nowhere"],
            "nowhere does not exist: check the path; for an estimate without them --init-from none",
        ),
        (
            ["--dry-run", "--training.batch_size=10", "--training.gradient_accumulation=3"],
            "training.batch_size 10 is not a multiple of 1 processes × 3",
        ),
        (["--dryrun"], "unknown option '--dryrun'; did you mean '--dry-run'"),
        (["--config"], "--config"),
        (["--model.depht=3"], "did you mean 'model.depth'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", 2, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_is_no_run_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("my thesis")
    assert run(tmp_path, 2) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "run", 2) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_average_follows_its_formula() -> None:
    config = tiny_config()
    from deco_fast.models.deco import DeCo

    model = DeCo(config.model)
    ema = ExponentialMovingAverage(model, 0.9)
    name = "patch_embedder.weight"
    start = model.get_parameter(name).detach().clone()
    expected = start.double()
    for _ in range(3):
        with torch.no_grad():
            model.get_parameter(name).add_(1.0)
        ema.update()
        expected = 0.9 * expected + 0.1 * model.get_parameter(name).double()
    assert torch.allclose(ema.model.get_parameter(name).double(), expected, atol=1e-6)
    assert not ema.model.get_parameter(name).requires_grad


def test_learning_rate_warms_up_and_follows_the_schedule() -> None:
    config = load_config(
        "deco-digits",
        ["--training.steps=110", "--training.warmup_steps=10", "--training.learning_rate=1.0"],
    )
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 60) == pytest.approx(0.5)
    assert learning_rate(config, 109) == pytest.approx(0.0, abs=1e-3)
    constant = load_config("c2i_xl_256")
    assert {learning_rate(constant, step) for step in (0, 1000, 3_999_999)} == {1e-4}


def test_the_draws_of_a_sample_depend_on_its_place_alone() -> None:
    config = tiny_config()
    labels = torch.arange(8)
    device = torch.device("cpu")
    whole = draw_step(config, 3, range(8), labels, device)
    parts = [
        draw_step(config, 3, places, labels[places.start : places.stop], device)
        for places in (range(3), range(3, 8))
    ]
    for name in Draws._fields:
        assert torch.equal(
            getattr(whole, name), torch.cat([getattr(part, name) for part in parts])
        ), name
    assert not torch.equal(whole.noise[0], whole.noise[1])
    assert not torch.equal(whole.noise, draw_step(config, 4, range(8), labels, device).noise)
