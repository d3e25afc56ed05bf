"""Two processes train as one does, in copies (DDP) and in shards (FSDP2), and take each other over.

Everything here is equal bit for bit: two processes add two halves of a gradient, and so does one
process with two backward passes. One pass over the whole batch sums in another order; that
rounding, 1e-7 at first, the digits preset's young network amplifies a thousandfold from step 35 on
(as it does any other: see test_convergence.py), so there only the first steps can agree.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import TINY, assert_identical, forget_after, in_processes, saved

from deco_fast.checkpoint import load_checkpoint, newest_checkpoint
from deco_fast.cli.train import main
from deco_fast.config import load_config
from deco_fast.errors import UserError
from deco_fast.training.batches import Batches, open_dataset
from deco_fast.training.distributed import Processes, join_processes
from deco_fast.training.step import TrainingStep

ROOT = Path(__file__).parent.parent
STEPS = 50
STEPS_IN_SHARDS = 12
STEPS_BEFORE_ROUNDING_GROWS = 25


def loss_curve(processes: Processes, steps: int, *options: str) -> torch.Tensor:
    """The loss of each of the digits preset's first steps."""
    config = load_config("deco-digits", options)
    training = TrainingStep(config, processes)
    training.prepare()
    batches = Batches(open_dataset(config), config, processes, start_step=0)
    return torch.stack([training(k, next(batches)).by_name["loss/total"] for k in range(steps)])


def save_loss_curves(folder: Path) -> None:
    with join_processes("cpu") as processes:
        for distribution, steps in (("ddp", STEPS), ("fsdp", STEPS_IN_SHARDS)):
            curve = loss_curve(processes, steps, f"--training.distribution={distribution}")
            torch.save(curve, folder / f"{distribution}-{processes.rank}.pt")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each of several processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_follow_the_loss_curve_of_one(tmp_path: Path) -> None:
    in_processes(2, save_loss_curves, tmp_path)
    ddp, other, fsdp = (torch.load(tmp_path / f"{n}.pt") for n in ("ddp-0", "ddp-1", "fsdp-0"))
    alone = Processes(0, 1, torch.device("cpu"))
    two_passes = loss_curve(alone, STEPS, "--training.gradient_accumulation=2")
    one_pass = loss_curve(alone, STEPS_BEFORE_ROUNDING_GROWS)
    assert torch.equal(ddp, other)
    assert torch.equal(ddp, two_passes)
    assert torch.equal(ddp[:STEPS_IN_SHARDS], fsdp)
    assert ((ddp[:STEPS_BEFORE_ROUNDING_GROWS] - one_pass) / one_pass).abs().max() <= 1e-5
    # They did learn meanwhile.
    assert ddp[-1] < 0.85 * ddp[0]


def leave_one_after_the_other(folder: Path) -> None:
    try:
        with join_processes("cpu") as processes:
            processes.barrier()
            if processes.rank == 1:
                raise UserError("a file is damaged")
            processes.barrier()
    except UserError as error:
        (folder / os.environ["RANK"]).write_text(str(error))


@pytest.mark.slow
def test_a_process_whose_neighbour_failed_ends_in_one_line(tmp_path: Path) -> None:
    in_processes(2, leave_one_after_the_other, tmp_path)
    assert (tmp_path / "1").read_text() == "a file is damaged"
    assert (tmp_path / "0").read_text().startswith("another process has ended")


def train(folder: Path, *options: str) -> None:
    arguments = [
        *TINY,
        "--device=cpu",
        "--training.steps=6",
        "--output.checkpoint_every=2",
        f"--out={folder}",
    ]
    assert main([*arguments, *options]) == 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes, by how the model was distributed."""
    runs = {name: tmp_path_factory.mktemp("unbroken") / name for name in ("ddp", "fsdp")}
    for distribution, folder in runs.items():
        in_processes(2, train, folder, f"--training.distribution={distribution}")
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")])
def test_two_then_one_then_two_processes_equal_the_unbroken_run(
    tmp_path: Path, unbroken: dict[str, Path], first: str, last: str
) -> None:
    whole, broken = unbroken[last], tmp_path / "broken"
    shutil.copytree(unbroken[first], broken)
    forget_after(broken, 2)
    train(broken, "--training.gradient_accumulation=2")
    forget_after(broken, 4)
    in_processes(2, train, broken, f"--training.distribution={last}")
    assert_identical(saved(whole, 6), saved(broken, 6))
    assert load_checkpoint(broken).config == load_config("deco-digits", [*TINY]).model


_DIE_ONCE = """
import os, signal, sys
from pathlib import Path
from deco_fast.cli.train import main
from deco_fast.training.step import TrainingStep

dead, original = Path(sys.argv[1]), TrainingStep.__call__

def step(self, number, batch):
    if number == 3 and os.environ["RANK"] == "1" and not dead.exists():
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, number, batch)

TrainingStep.__call__ = step
sys.exit(main(sys.argv[2:]))
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    return subprocess.run(
        [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_torchrun_restarts_a_rank_that_died(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_DIE_ONCE)
    options = [*TINY, "--device=cpu", "--training.steps=5", "--output.checkpoint_every=2"]
    result = torchrun(
        "--max-restarts=1", str(script), str(tmp_path / "dead"), *options, f"--out={tmp_path / 'r'}"
    )
    assert (tmp_path / "dead").exists()
    assert result.returncode == 0, result.stderr
    assert "at step 2 of 5" in result.stdout
    assert result.stdout.count("finished:") == 1
    whole = main([*options, "--training.gradient_accumulation=2", f"--out={tmp_path / 'whole'}"])
    assert whole == 0
    assert_identical(saved(tmp_path / "whole", 5), saved(tmp_path / "r", 5))


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--training.steps=100000", "--output.checkpoint_every=5", f"--out={folder}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    process = subprocess.Popen(
        [*launcher, "train.py", *TINY, "--device=cpu", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(folder.glob("checkpoints/step-*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    line = next(line for line in out.splitlines() if "goes on from there" in line)
    assert line == (
        f"SIGTERM: saved {newest_checkpoint(folder)}; the same command goes on from there"
    )
