"""The folder of a run: its configuration, versions, checkpoints and whether it has finished."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deco_fast.checkpoint import newest_checkpoint, remove_leftovers
from deco_fast.config import RunConfig, load_config
from deco_fast.errors import UserError

# What may differ between the start of a run and its resumption without changing its weights, or
# by rounding alone: fewer GPUs may need more backward passes, or less memory.
_FREE = (
    "output.",
    "data.root",
    "data.max_damaged_share",
    "data.index_folder",
    "data.workers",
    "data.prefetch",
    "alignment.encoder",
    "alignment.cache",
    "training.gradient_accumulation",
    "training.recompute_activations",
    "training.distribution",
)


class RunFolder:
    """runs/NAME: config.yaml, versions.json, checkpoints/, samples/, TensorBoard's files.

    Raises:
        UserError: the folder cannot be written, or holds a run of another configuration.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    def check(self) -> None:
        """See that the folder is free for this run, or holds it."""
        stored = self.path / "config.yaml"
        if stored.exists():
            self._compare(stored)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run: choose another --out")

    def open(self) -> None:
        """Create the folder, or check that the run in it is this one."""
        self.check()
        stored = self.path / "config.yaml"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(stored, self.config.to_yaml())
            write_atomically(self.path / "versions.json", json.dumps(versions(), indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: the run folder cannot be written ({error.strerror}); "
                "choose another --out"
            ) from error
        remove_leftovers(self.checkpoints)

    def _compare(self, stored: Path) -> None:
        try:
            # Keys that the file does not know yet had their defaults.
            before = _flatten(load_config(str(stored)).model_dump(mode="json"))
        except UserError as error:
            raise UserError(f"{stored} is not readable ({error}): choose another --out") from error
        now = _flatten(self.config.model_dump(mode="json"))
        changed = [
            f"{key} was {before.get(key)}, is {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(_FREE)
        ]
        if changed:
            raise UserError(
                f"{self.path} holds a run of another configuration ({'; '.join(changed)}): "
                "give the old values, or start a new run with --out FOLDER"
            )

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie, a folder each."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def shards(self, step: int) -> Path:
        """Where processes write together what becomes a part of a step's checkpoint."""
        # Deleted as a leftover should they be killed meanwhile.
        return self.checkpoints / f".shards-{step:08d}.tmp-0"

    def written_checkpoints(self) -> list[Path]:
        """All checkpoint folders, damaged ones too, the oldest first."""
        return sorted(self.checkpoints.glob("step-????????"))

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return newest_checkpoint(self.path)

    def list_damaged(self, names: Sequence[str]) -> None:
        """Add to damaged.txt what it does not name yet, a line for each image or shard.

        Raises:
            UserError: it cannot be written.
        """
        path = self.path / "damaged.txt"
        # The name of a file need not be text.
        lines = [name.encode("utf-8", "backslashreplace").decode() for name in names]
        try:
            before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            if not set(lines) <= set(before):
                listed = dict.fromkeys([*before, *lines])
                write_atomically(path, "\n".join(listed) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free some space"
            ) from error

    def drop_old_checkpoints(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints."""
        for folder in self.written_checkpoints()[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)

    def failure(self, step: int) -> Path:
        """Where a step that ended the run is kept to be looked at."""
        return self.path / "failures" / f"step-{step:08d}"

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps."""
        return (self.path / "finished").exists()

    def mark_finished(self) -> None:
        """Note that the run has made all its steps."""
        (self.path / "finished").touch()


def versions() -> dict[str, Any]:
    """What a run's figures depend on besides its configuration."""
    packages = ("deco-fast", "torch", "triton", "flash-attn", "numpy", "scikit-learn", "pillow")
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": found,
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
