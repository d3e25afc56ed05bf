"""What happens to long runs: kills, time limits, damaged checkpoints, a loss that is no number."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import TINY, assert_identical, forget_after, in_processes, saved
from safetensors.torch import load_file

from deco_fast.checkpoint import load_checkpoint
from deco_fast.cli.train import main
from deco_fast.config import load_config
from deco_fast.data.digits import DigitsDataset
from deco_fast.data.order import EpochBatches
from deco_fast.errors import UserError
from deco_fast.training import distributed, trainer
from deco_fast.training.distributed import Processes
from deco_fast.training.guard import LossGuard
from deco_fast.training.interrupt import Interrupt, catch_interrupt
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.time_limit import TimeLimit, parse_duration

ROOT = Path(__file__).parent.parent


def run(folder: Path, steps: int, *options: str) -> int:
    arguments = [*TINY, f"--training.steps={steps}", "--device=cpu", f"--out={folder}"]
    return main([*arguments, *options])


# Killed at any moment


def start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    options = [f"--training.steps={steps}", "--output.checkpoint_every=3", "--device=cpu"]
    return subprocess.Popen(
        [sys.executable, "train.py", *TINY, *options, f"--out={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_at_random(folder: Path, steps: int, moments: random.Random) -> str:
    """Start the run and kill it: while it starts, between two steps, or inside a checkpoint."""
    process = start(folder, steps)
    checkpoints = folder / "checkpoints"
    before = len(list(checkpoints.glob("step-*"))) if checkpoints.exists() else 0
    moment = moments.choice(("start", "step", "checkpoint", "checkpoint"))
    # Of the checkpoints that it will write.
    wanted = moments.randrange(4)
    while process.poll() is None:
        if moment == "start":
            time.sleep(moments.uniform(0, 5))
            break
        if moment == "checkpoint" and list(checkpoints.glob(".step-*.tmp-*")):
            if wanted <= 0:
                time.sleep(moments.uniform(0, 0.02))
                break
            wanted -= 1
            while process.poll() is None and list(checkpoints.glob(".step-*.tmp-*")):
                time.sleep(0.0005)
        if moment == "step" and len(list(checkpoints.glob("step-*"))) > min(before, 2):
            time.sleep(moments.uniform(0, 0.5))
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return moment


def kill_and_restart(folder: Path, steps: int, kills: int, moments: random.Random) -> list[str]:
    """Kill a run so many times, then let the same command end it."""
    killed = [kill_at_random(folder, steps, moments) for _ in range(kills)]
    assert start(folder, steps).wait(timeout=300) == 0
    assert not list((folder / "checkpoints").glob(".*"))
    return killed


def run_unbroken(folder: Path, steps: int) -> None:
    assert run(folder, steps, "--output.checkpoint_every=3") == 0


@pytest.mark.slow
def test_a_run_that_was_killed_thrice_ends_with_the_same_weights(tmp_path: Path) -> None:
    in_processes(1, run_unbroken, tmp_path / "whole", 30)
    kill_and_restart(tmp_path / "killed", 30, 3, random.Random(0))
    assert_identical(saved(tmp_path / "whole", 30), saved(tmp_path / "killed", 30))


@pytest.mark.soak
def test_thirty_runs_that_were_killed_end_with_the_same_weights(tmp_path: Path) -> None:
    assert start(tmp_path / "whole", 60).wait(timeout=300) == 0
    expected = saved(tmp_path / "whole", 60)
    moments = random.Random(1)
    killed = []
    for number in range(30):
        killed += kill_and_restart(tmp_path / f"{number}", 60, moments.randint(1, 2), moments)
        assert_identical(expected, saved(tmp_path / f"{number}", 60))
    assert killed.count("checkpoint") >= 10


# Damaged checkpoints


@pytest.mark.parametrize(
    ("name", "damage", "line"),
    [
        ("training.pt", "truncate", "step-00000004 is cut short or incomplete"),
        ("ema.safetensors", "truncate", "step-00000004 is cut short or incomplete"),
        ("model.safetensors", "flip", "model.safetensors is damaged"),
        ("checksums.json", "truncate", "step-00000004 is cut short or incomplete"),
    ],
)
def test_a_damaged_newest_checkpoint_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str, line: str
) -> None:
    folder, every = tmp_path / "run", "--output.checkpoint_every=2"
    assert run(folder, 5, every) == 0
    whole = saved(folder, 5)
    forget_after(folder, 4)
    newest = folder / "checkpoints" / "step-00000004"
    content = (newest / name).read_bytes()
    if damage == "truncate":
        (newest / name).write_bytes(content[: len(content) // 2])
    else:
        (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert run(folder, 5, every) == 0
    out = capsys.readouterr().out
    assert f"{line}: going on from the one before (now step-00000004.damaged)" in out
    assert (folder / "checkpoints" / "step-00000004.damaged" / name).exists()
    assert "at step 2 of 5" in out
    assert_identical(whole, saved(folder, 5))


def test_a_damaged_checkpoint_never_displaces_a_later_whole_one(tmp_path: Path) -> None:
    """A run that went on at an earlier step keeps what it writes, not what it passed over."""
    folder, keep = tmp_path / "run", "--output.keep_checkpoints=1"
    constant = "--training.schedule=constant"
    run(folder, 2, constant)
    # Its files are whole in number and length, and not in their bytes.
    damaged = shutil.copytree(
        folder / "checkpoints" / "step-00000002", folder / "checkpoints" / "step-00000006"
    )
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run(folder, 10, keep, constant, "--max-time=0s") == 0
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006.damaged",
    ]
    assert run(folder, 10, keep, constant) == 0
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000006.damaged",
        "step-00000010",
    ]


@pytest.mark.parametrize(
    ("error", "said_of_it"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2.00 GiB\nand so on"), "Tried to allocate 2.00"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: …"), "DefaultCPUAllocator: can"),
        (MemoryError("Unable to allocate 1.28 GiB"), "Unable to allocate 1.28 GiB"),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_a_grid_that_cannot_be_drawn_costs_nothing_but_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    said_of_it: str,
) -> None:
    def draw(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "draw", draw)
    options = ["--output.sample_every=2", "--output.checkpoint_every=2"]
    assert run(tmp_path / "run", 4, *options) == 0
    captured = capsys.readouterr()
    said = captured.out + captured.err  # where the bar is, its lines are
    assert f"no samples of step 2: {said_of_it}" in said
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2


def test_a_run_stops_in_the_middle_of_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = trainer.draw

    def draw(*arguments: Any, check: Callable[[], None], **options: Any) -> Any:
        def signalled() -> None:
            if not evaluations:
                os.kill(os.getpid(), signal.SIGTERM)
            evaluations.append(1)
            check()

        return original(*arguments, check=signalled, **options)

    evaluations = list[int]()
    monkeypatch.setattr(trainer, "draw", draw)
    folder = tmp_path / "run"
    assert run(folder, 9, "--output.sample_every=2", "--sampling.steps=50") == 143
    captured = capsys.readouterr()
    assert "no samples of step 2: the run has to stop" in captured.out + captured.err
    assert len(evaluations) == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracebacks = list[threading.ExceptHookArgs]()
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    assert run(tmp_path / "run", 4) == 0
    assert not tracebacks
    assert threading.excepthook == tracebacks.append
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert said.count("TensorBoard's log cannot be written (No space left on device)") == 1


def test_a_start_that_failed_does_not_stand_in_the_way_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        assert run(folder, 2) == 2
    assert "(No space left on device): free some space" in capsys.readouterr().err
    # As a kill at that moment leaves it.
    folder.mkdir()
    (folder / ".config.yaml.tmp-0123abcd").write_text("output:")
    assert run(folder, 2) == 0
    assert not list(folder.glob(".*"))


def test_without_a_whole_checkpoint_a_run_does_not_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(folder, 2)
    forget_after(folder, 2)
    (folder / "checkpoints" / "step-00000002" / "training.pt").write_bytes(b"")
    capsys.readouterr()
    assert run(folder, 2) == 2
    error = capsys.readouterr().err
    assert "no checkpoint in" in error and "delete" in error
    assert error.count("\n") == 1


# Time limits


def test_a_time_limit_saves_and_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole", 3)
    assert run(tmp_path / "run", 3, "--max-time=0s") == 0
    out = capsys.readouterr().out
    assert "time limit: saved" in out
    assert "the same command goes on from there" in out
    assert not (tmp_path / "run" / "finished").exists()
    assert run(tmp_path / "run", 3, "--max-time=3h30m") == 0
    assert "at step 1 of 3" in capsys.readouterr().out
    assert_identical(saved(tmp_path / "whole", 3), saved(tmp_path / "run", 3))


def test_durations() -> None:
    assert parse_duration("3h30m") == 3.5 * 3600
    assert parse_duration("1d2s") == 86402
    for wrong in ("", "3", "3h30", "-5m", "1.5h"):
        with pytest.raises(UserError, match="no duration"):
            parse_duration(wrong)


def test_a_time_limit_leaves_time_for_the_checkpoint() -> None:
    assert not TimeLimit(None, 1e9).is_near
    in_100_seconds = time.monotonic() + 100
    assert TimeLimit(in_100_seconds, save_seconds=60).is_near
    limit = TimeLimit(in_100_seconds, save_seconds=1)
    assert not limit.is_near
    limit.saved(60)
    assert limit.is_near


# Signals, and the end of one process among several


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """As a command in the foreground does; one that a shell put into the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_a_second_sigterm_does_not_end_a_run_that_is_saving() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with catch_interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM and interrupt.exit_status == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_closed_terminal_stops_a_run_like_sigterm() -> None:
    """nohup has the signal ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with catch_interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.signal == signal.SIGHUP and interrupt.exit_status == 129
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catch_interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_checkpoint_just_written_is_never_deleted(tmp_path: Path) -> None:
    """Nor has a run finished whose checkpoints are gone: the same command makes it again."""
    folder = tmp_path / "run"
    assert run(folder, 2) == 0
    (checkpoint,) = (folder / "checkpoints").iterdir()
    (checkpoint / "model.safetensors").write_bytes(b"")
    opened = RunFolder(folder, load_config("deco-digits", [*TINY, "--training.steps=2"]))
    opened.drop_old_checkpoints(keep=1, step=2)
    assert checkpoint.exists()
    shutil.rmtree(checkpoint)
    assert not opened.finished
    assert run(folder, 2) == 0
    assert checkpoint.exists()


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_a_second_ctrl_c_is_not_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), catch_interrupt(tell=True) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        assert "Ctrl-C again stops at once, without it" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_a_run_whose_log_nobody_reads_any_more_saves(tmp_path: Path) -> None:
    """`train.py 2>&1 | tee log` and Ctrl-C: tee ends first."""
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", "--training.steps=100000", *TINY, f"--out={folder}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    said = b""
    while b"loss=" not in said:  # the first step is made
        said += (piece := process.stdout.read1())
        assert piece, said
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert len(list((folder / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize(
    ("own", "others", "up", "stops", "status"),
    [
        (None, -1, False, False, 0),
        (None, -1, True, True, 0),
        (None, 0, False, True, 0),
        (signal.SIGTERM, -1, False, True, 143),
        (None, int(signal.SIGTERM), False, True, 143),
        (None, int(signal.SIGTERM), True, True, 143),
    ],
)
def test_processes_agree_on_why_they_stop(
    own: signal.Signals | None, others: int, up: bool, stops: bool, status: int
) -> None:
    class Two(Processes):
        def greatest(self, value: int) -> int:
            return max(value, others)

    interrupt = Interrupt()
    interrupt.signal = own
    assert interrupt.agree(Two(0, 2, torch.device("cpu")), up) is stops
    assert interrupt.exit_status == status


def test_an_error_among_gpus_ends_the_process_without_waiting_for_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To leave NCCL's group is to wait for processes that may wait for this one."""

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    left: list[bool] = []
    monkeypatch.setattr(distributed, "pick_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "_fresh_store", lambda: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with distributed.join_processes("cuda") as processes:
        assert processes.rank == 1
    assert left == [True]
    with pytest.raises(Ended) as ended, distributed.join_processes("cuda"):
        raise UserError("a disk is full: free some space")
    assert ended.value.args == (2,) and left == [True]
    assert capsys.readouterr().err == "error: a disk is full: free some space\n"
    with pytest.raises(Ended) as ended, distributed.join_processes("cuda"):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
    assert ended.value.args == (2,) and left == [True]
    assert capsys.readouterr().err.startswith("error: out of memory (Tried to allocate 2 GiB)")


# Data that cannot be read any more


def run_out_of_data(folder: Path, failing_rank: int) -> None:
    """A process cannot read what is in its fourth batch; the other one does not know."""
    original = DigitsDataset.__getitem__
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = load_config("deco-digits", TINY)
    order = EpochBatches(len(DigitsDataset()), 8, config.training.seed, rank, size, 3)
    lost = next(iter(order))[0]

    def read(self: DigitsDataset, index: int) -> tuple[torch.Tensor, int]:
        if rank == failing_rank and index == lost:
            raise UserError("the disk is gone: mount it")
        return original(self, index)

    DigitsDataset.__getitem__ = read  # type: ignore[method-assign]
    with open(folder.with_name(f"said-{rank}"), "w") as said:
        sys.stdout = sys.stderr = said
        assert run(folder, 6) == 2
    # Nobody leaves before the first process has written it.
    assert (folder / "checkpoints" / "step-00000003").exists()
    DigitsDataset.__getitem__ = original  # type: ignore[method-assign]
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


@pytest.mark.parametrize(("processes", "failing"), [(1, 0), (2, 0), (2, 1)])
def test_data_that_cannot_be_read_any_more_costs_no_step(
    tmp_path: Path, processes: int, failing: int
) -> None:
    folder = tmp_path / "run"
    in_processes(processes, run_out_of_data, folder, failing)
    checkpoint = folder / "checkpoints" / "step-00000003"
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(processes)]
    for rank, text in enumerate(said):
        reason = "the disk is gone: mount it"
        if rank != failing:
            reason = "another process can read no more of its data"
        assert f"error: {reason}; saved {checkpoint}, from which the same command goes on\n" in text
    in_processes(processes, run_unbroken, folder, 6)
    in_processes(processes, run_unbroken, tmp_path / "whole", 6)
    assert_identical(saved(folder, 6), saved(tmp_path / "whole", 6))


# A loss that is no number, or explodes


def test_a_loss_that_is_not_a_number_is_kept_to_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, every = tmp_path / "run", "--output.checkpoint_every=1"
    config = load_config("deco-digits", TINY)
    third = EpochBatches(len(DigitsDataset()), 8, config.training.seed).global_batch(2)
    original = DigitsDataset.__getitem__

    def spoiled(self: DigitsDataset, index: int) -> tuple[torch.Tensor, int]:
        image, label = original(self, index)
        return (image * float("nan") if index == third[5] else image), label

    monkeypatch.setattr(DigitsDataset, "__getitem__", spoiled)
    assert run(folder, 6, every) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step 3" in error
    assert ", ".join(map(str, third)) in error
    assert "a lower training.learning_rate" in error
    assert error.count("error: ") == 1
    kept = folder / "failures" / "step-00000003"
    batch = load_file(kept / "batch-0.safetensors")
    assert batch["indices"].tolist() == third
    assert batch["images"].isnan().flatten(1).any(dim=1).tolist() == [i == 5 for i in range(8)]
    assert batch["noise"].shape == batch["images"].shape
    assert batch["t"].shape == batch["y"].shape == batch["labels"].shape == (8,)
    assert json.loads((kept / "figures.json").read_text())["tripped"] == 1
    # The weights before the step, and nothing after it.
    weights = load_checkpoint(kept / "model.safetensors", weights="model").state_dict()
    before = saved(folder, 2)
    assert all(torch.equal(tensor, before[f"model.{name}"]) for name, tensor in weights.items())
    assert not (folder / "checkpoints" / "step-00000003").exists()


def test_an_exploding_learning_rate_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", 20, "--training.learning_rate=1e30") == 2
    assert "the loss is" in capsys.readouterr().err


def test_a_run_goes_on_after_an_explosion_with_what_the_message_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, every = tmp_path / "run", "--output.checkpoint_every=2"
    check = LossGuard.check

    def explode(self: LossGuard, loss: torch.Tensor, norm: torch.Tensor) -> None:
        check(self, loss * float("inf") if self._steps == 4 else loss, norm)

    with monkeypatch.context() as patched:
        patched.setattr(LossGuard, "check", explode)
        assert run(folder, 8, every) == 2
    error = capsys.readouterr().err
    assert "at step 5" in error and "go on with the same command and a lower" in error
    cautious = ["--training.learning_rate=1e-5", "--training.gradient_clipping=1.0"]
    assert run(folder, 8, every, *cautious) == 0
    out = capsys.readouterr().out
    assert "at step 4 of 8" in out
    assert "from here on training.learning_rate was 0.002, is 1e-05" in out
    assert "from here on training.gradient_clipping was None, is 1.0" in out
    assert run(folder, 8, every, *cautious, "--training.ema_decay=0.5") == 2
    assert "another configuration (training.ema_decay was" in capsys.readouterr().err


def test_a_finished_run_can_be_given_more_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = "--training.schedule=constant"
    assert run(tmp_path / "whole", 6, constant) == 0
    assert run(tmp_path / "run", 3, constant) == 0
    capsys.readouterr()
    assert run(tmp_path / "run", 6, constant, "--max-time=0s") == 0
    assert not (tmp_path / "run" / "finished").exists()
    assert "from here on training.steps was 3, is 6" in capsys.readouterr().out
    assert run(tmp_path / "run", 6, constant) == 0
    assert_identical(saved(tmp_path / "whole", 6), saved(tmp_path / "run", 6))
    capsys.readouterr()
    assert run(tmp_path / "run", 6, constant) == 0
    assert "has finished all 6 steps" in capsys.readouterr().out
    # Where the learning rate falls towards the end, it would not have been the same run.
    assert run(tmp_path / "cosine", 3, "--training.schedule=cosine") == 0
    assert run(tmp_path / "cosine", 6, "--training.schedule=cosine") == 2
    assert "training.steps was 3, is 6" in capsys.readouterr().err


def test_the_guard_stops_updates_on_the_device() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = LossGuard(optimizer, factor=10, device=torch.device("cpu"))

    def step(loss: float, norm: float = 1.0) -> None:
        weight.grad = torch.ones(3)
        guard.check(torch.tensor(loss), torch.tensor(norm))
        optimizer.step()

    # Too early to call a loss large.
    for loss in (1.0, 50.0, *[1.0] * 100):
        step(loss)
    assert not guard.tripped
    before = weight.detach().clone()
    step(9.0)
    assert not guard.tripped and not torch.equal(weight, before)
    before = weight.detach().clone()
    step(30.0)
    assert guard.tripped and torch.equal(weight, before)
    step(1.0)
    assert guard.tripped and torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 103


def test_a_run_that_goes_on_knows_what_a_usual_loss_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards: list[LossGuard] = []
    check = LossGuard.check

    def noted(self: LossGuard, loss: torch.Tensor, norm: torch.Tensor) -> None:
        guards.append(self)
        check(self, loss, norm)

    monkeypatch.setattr(LossGuard, "check", noted)
    folder = tmp_path / "run"
    assert run(folder, 6, "--output.checkpoint_every=3") == 0
    (folder / "finished").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert run(folder, 6, "--output.checkpoint_every=3") == 0
    whole, resumed = guards[0].state_dict(), guards[-1].state_dict()
    assert len(guards) == 6 + 3 and guards[0] is not guards[-1]
    assert whole["steps"] == resumed["steps"] == 6
    assert torch.equal(whole["mean"], resumed["mean"])


@pytest.mark.parametrize(("loss", "norm"), [(float("inf"), 1.0), (1.0, float("nan"))])
def test_the_guard_looks_for_numbers_from_the_first_step_on(loss: float, norm: float) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], fused=True)
    guard = LossGuard(optimizer, factor=None, device=torch.device("cpu"))
    guard.check(torch.tensor(loss), torch.tensor(norm))
    assert guard.tripped
