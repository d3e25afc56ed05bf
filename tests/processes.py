"""Several gloo processes in a test, and the tiny run that they make."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from deco_fast.checkpoint import load_training_state

TINY = [
    "--model.hidden_size=32",
    "--model.depth=1",
    "--model.num_heads=2",
    "--model.decoder_hidden_size=16",
    "--model.decoder_depth=1",
    "--training.batch_size=8",
    "--training.warmup_steps=2",
    "--sampling.steps=2",
    "--output.sample_count=4",
    "--output.log_every=2",
    "--output.sample_every=100",
    "--output.checkpoint_every=100",
]


# What a process of a run imports takes longer than the run: a server imports it once, and every
# process is a fork of it. A process of Python has one such server, so it is the loader's as well.
multiprocessing.set_forkserver_preload(
    [
        "deco_fast.data.worker_server",
        "deco_fast.cli.train",
        "pytest",
        "torch._dynamo",
        "torch.utils.tensorboard",
    ]
)


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module in so many processes, as torchrun would; all must succeed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    mp.start_processes(
        _call,
        args=(environment, function, arguments),
        nprocs=count,
        # Windows has no fork server.
        start_method="forkserver" if hasattr(os, "fork") else "spawn",
    )


def _call(
    rank: int,
    environment: dict[str, str],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    # The server ignores it, and its environment is that of the first call.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    function(*arguments)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights and their average in a run's checkpoint."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return {
        f"{name}.{key}": tensor
        for name in ("model", "ema")
        for key, tensor in load_file(checkpoint / f"{name}.safetensors").items()
    }


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint, the optimizer's too where one file holds them."""
    tensors = weights(folder, step)
    optimizer = load_training_state(folder / "checkpoints" / f"step-{step:08d}")["optimizer"]
    for parameter, moments in optimizer.get("state", {}).items():
        tensors |= {f"optimizer.{parameter}.{key}": value for key, value in moments.items()}
    return tensors


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def forget_after(folder: Path, step: int) -> None:
    """Leave a run as if it had been killed after so many steps."""
    (folder / "finished").unlink()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
