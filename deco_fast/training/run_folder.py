"""The folder of a run: its configuration, versions, checkpoints and whether it has finished."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deco_fast.checkpoint import complete_checkpoints, newest_checkpoint, remove_leftovers
from deco_fast.checkpoint.atomic import atomic_file, is_leftover, remove_temporaries
from deco_fast.checkpoint.find import step_order
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
    "text.encoder",
    "alignment.cache",
    "training.cuda_graph",
    "training.gradient_accumulation",
    "training.recompute_activations",
    "training.distribution",
)

# What a person may change of a run that goes on: the remedies for a loss that exploded, and its end
# where the learning rate does not depend on it.
_ADJUSTABLE = (
    "training.learning_rate",
    "training.gradient_clipping",
    "training.explosion_factor",
)


class RunFolder:
    """runs/NAME: config.yaml, versions.json, checkpoints/, samples/, TensorBoard's files.

    Raises:
        UserError: the folder cannot be written, or holds a run of another configuration.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    def check(self, *, exactly: bool = False) -> list[str]:
        """See that the folder is free for this run, or holds it.

        Args:
            exactly: refuse also what a person may adjust while a run stands still.

        Returns:
            What was adjusted, a line each.
        """
        if self.checkpoints.is_symlink() and not self.checkpoints.exists():
            raise UserError(
                f"{self.checkpoints} is a link to {self.checkpoints.readlink()}, which is not "
                "there: mount or make it"
            )
        stored = self.path / "config.yaml"
        if stored.exists():
            return self._compare(stored, exactly)
        if self.path.is_dir() and not all(map(is_leftover, self.path.iterdir())):
            raise UserError(f"{self.path} is not empty and holds no run: choose another --out")
        return []

    def open(self) -> list[str]:
        """Create the folder, or check that the run in it is this one; returns as `check`."""
        adjusted = self.check()
        self._write_identity()
        remove_temporaries(self.path)
        remove_leftovers(self.checkpoints)
        if not self.finished:  # any more
            (self.path / "finished").unlink(missing_ok=True)
        return adjusted

    def restore_identity(self) -> None:
        """Make the folder known as this run's, where somebody renamed or deleted it meanwhile and a
        checkpoint has made it anew.

        Raises:
            UserError: it cannot be written.
        """
        if not (self.path / "config.yaml").exists():
            self._write_identity()

    def _write_identity(self) -> None:
        write_atomically(self.path / "config.yaml", self.config.to_yaml())
        write_atomically(self.path / "versions.json", json.dumps(versions(), indent=2) + "\n")

    def _compare(self, stored: Path, exactly: bool) -> list[str]:
        try:
            # Keys that the file does not know yet had their defaults.
            before = _flatten(load_config(str(stored)).model_dump(mode="json"))
        except UserError as error:
            raise UserError(f"{stored} is not readable ({error}): choose another --out") from error
        now = _flatten(self.config.model_dump(mode="json"))
        changed = {
            key: f"{key} was {before.get(key)}, is {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(_FREE)
        }
        adjustable: tuple[str, ...] = () if exactly else _ADJUSTABLE
        if not exactly and self.config.training.schedule == "constant":
            adjustable += ("training.steps",)
        if refused := [line for key, line in changed.items() if key not in adjustable]:
            raise UserError(
                f"{self.path} holds a run of another configuration ({'; '.join(refused)}): "
                "give the old values, or start a new run with --out FOLDER"
            )
        return list(changed.values())

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
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not set(lines) <= set(before):
            listed = dict.fromkeys([*before, *lines])
            write_atomically(path, "\n".join(listed) + "\n")

    def drop_old_checkpoints(self, keep: int, step: int) -> None:
        """Delete all but the newest `keep` complete checkpoints up to a step.

        That of the step itself stays whatever it is. A later one stays: it is damaged and could not
        be set aside.
        """
        complete = [path for path in complete_checkpoints(self.path) if step_order(path)[0] <= step]
        for folder in self.written_checkpoints():
            if step_order(folder)[0] < step and folder not in complete[:keep]:
                shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint, so that it is not one of those that are kept.

        Returns:
            Where it is.
        """
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            return checkpoint.rename(aside)
        except OSError:
            return checkpoint

    def failure(self, step: int) -> Path:
        """Where a step that ended the run is kept to be looked at."""
        return self.path / "failures" / f"step-{step:08d}"

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps, and has what came of them."""
        if not (self.path / "finished").exists():
            return False
        newest = self.newest_checkpoint()
        steps = self.config.training.steps
        # It may have had fewer steps to make when it was finished.
        return newest is not None and step_order(newest)[0] >= steps

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
    """Write a small text file so that a reader sees the old one or the new one, whole.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
