"""A training's state on the disk: written beside the training, taken up on any number of processes.

The weights are gathered, so that a checkpoint can be sampled from; the optimizer's state, where
the processes share it, is written and read by all of them (torch.distributed.checkpoint).
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from deco_fast.checkpoint import (
    complete_checkpoints,
    damaged_file,
    load_training_state,
    save_checkpoint,
)
from deco_fast.checkpoint.atomic import DiskFullError, FolderGoneError
from deco_fast.checkpoint.find import step_order
from deco_fast.checkpoint.format import OPTIMIZER_FOLDER
from deco_fast.checkpoint.load import open_checkpoint
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.errors import UserError
from deco_fast.training.parallel import set_weights
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.step import TrainingStep

_log = logging.getLogger(__name__)

# How long a full disk is waited for, and between two attempts.
PATIENCE_SECONDS = 600.0
_PAUSE_SECONDS = 20.0


class CheckpointWriter:
    """Writes checkpoints while the training goes on, one at a time.

    Where the disk is full, it is tried again for ten minutes; where somebody renames the run's
    folder in the middle, once, in a new one.

    Args:
        training: what to save.
        folder: the run's.
        hurry: whether there is no time for that.

    Attributes:
        slowest: seconds that a checkpoint took from `save` until it was whole, at most.
    """

    def __init__(
        self, training: TrainingStep, folder: RunFolder, hurry: Callable[[], bool]
    ) -> None:
        self.training, self.folder, self._hurry = training, folder, hurry
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # Of its own, as its messages would mix with those of the training in between.
        self._group = dist.new_group(backend="gloo") if training.is_sharded else None
        self._copies: dict[str, Tensor] = {}
        self._shards: Future[Any] | None = None
        self._written: Future[None] | None = None
        self.slowest = 0.0

    def save(self, step: int, loader: dict[str, Any]) -> None:
        """Begin to write the checkpoint after `step` steps; all processes call it together.

        Args:
            step: steps made.
            loader: the state of the batches, from `Batches.state_dict`.

        Raises:
            UserError: the one before it could not be written.
        """
        self.wait()
        began = time.monotonic()
        training = self.training
        training.ema.wait()
        weights = {
            "model": whole_weights(training.model, training),
            "ema": whole_weights(training.ema.model, training),
        }
        projector = training.objective.projector
        if projector is not None:
            weights["projector"] = whole_weights(projector, training)
        optimizer = get_optimizer_state_dict(training.objective, training.optimizer)
        shards = None
        if training.is_sharded:
            shards = self.folder.shards(step)
            self._shards = self._begin_shards(shards, _by_name(optimizer))
            optimizer = {}
        if not training.processes.is_main:
            return
        weights = self._copy("weights", weights)
        optimizer = self._copy("optimizer", optimizer)
        guard = self._copy("guard", training.guard.state_dict())
        if training.device.type == "cuda":
            torch.cuda.synchronize(training.device)
        state = {
            "step": step,
            "optimizer": optimizer,
            "loader": loader,
            "random": {"torch": torch.get_rng_state()},
            "guard": guard,
            "world_size": training.processes.world_size,
            "encoder": _encoder(training),
            "text_encoder": _text_encoder(training),
        }
        self._written = self._thread.submit(self._write, step, weights, state, shards, began)

    def check(self) -> None:
        """Do nothing, unless a checkpoint could not be written.

        Raises:
            UserError: why not.
        """
        if self._written is not None and self._written.done():
            self._written.result()

    def wait(self) -> None:
        """Wait until what was begun is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        if self._shards is not None:
            _result(self._shards)
            self._shards = None
        if self._written is not None:
            self._written.result()
            self._written = None

    def close(self) -> None:
        """Let a checkpoint that was begun become whole; whether it does is not told."""
        self._closed = True
        self._thread.shutdown(wait=True)

    def _write(
        self,
        step: int,
        weights: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        shards: Path | None,
        began: float,
    ) -> None:
        if self._shards is not None:
            # Of this process; it ends when all of them have written theirs.
            _result(self._shards)
        config = self.training.config
        end, told, renamed = time.monotonic() + PATIENCE_SECONDS, False, False
        while True:
            if told:  # the wait is not what a checkpoint takes
                began = time.monotonic()
            try:
                save_checkpoint(
                    self.folder.checkpoint(step),
                    **weights,
                    card=config.card(step),
                    config=config.model,
                    training=state,
                    optimizer_folder=shards,
                )
                self.folder.restore_identity()
                break
            except FolderGoneError:
                if renamed:
                    raise
                renamed = True
            except DiskFullError as error:
                if time.monotonic() > end or self._has_to_hurry:
                    raise
                if not told:
                    _log.warning("%s; trying again for ten minutes", error)
                    told = True
                self._pause()
        self.folder.drop_old_checkpoints(config.output.keep_checkpoints, step)
        self.slowest = max(self.slowest, time.monotonic() - began)

    @property
    def _has_to_hurry(self) -> bool:
        return self._closed or self._hurry()

    def _pause(self) -> None:
        end = time.monotonic() + _PAUSE_SECONDS
        while time.monotonic() < end and not self._has_to_hurry:
            time.sleep(0.1)

    def _begin_shards(self, folder: Path, tensors: dict[str, Tensor]) -> Future[Any]:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        begun = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(begun, Future)
        return begun

    def _copy(self, name: str, value: Any) -> Any:
        """Tensors on the CPU that the training does not change; their memory serves again."""
        if isinstance(value, dict):
            return {key: self._copy(f"{name}.{key}", item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        if name not in self._copies:
            # Pinned memory receives from a GPU at full speed.
            self._copies[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self._copies[name].copy_(value.detach(), non_blocking=True)


def _result(shards: Future[Any]) -> None:
    """Wait until all processes have written their shards.

    Raises:
        UserError: one of them cannot.
    """
    try:
        shards.result()
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        raise UserError(
            f"process {rank} cannot write its part of a checkpoint ({failure[0]}): free some space "
            "or choose another disk; what was saved before is still valid"
        ) from error


def whole_weights(model: nn.Module, training: TrainingStep) -> dict[str, Tensor]:
    """The weights of a network by name, in the main process; in others nothing if sharded.

    All processes call it together.
    """
    if training.is_sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered: dict[str, Any] = get_model_state_dict(model, options=options)
        return gathered
    return dict(model.state_dict())


def resume(training: TrainingStep, checkpoint: Path) -> dict[str, Any]:
    """Take up a checkpoint, whatever number of processes wrote it.

    Returns:
        Its "step" and "loader".

    Raises:
        UserError: it cannot be read, or it was trained with another encoder.
    """
    set_weights(training.model, open_checkpoint(checkpoint, "model").state_dict())
    set_weights(training.ema.model, open_checkpoint(checkpoint, "ema").state_dict())
    state = load_training_state(checkpoint)
    if training.objective.projector is not None:
        if state["encoder"] != _encoder(training):
            raise UserError(
                f"{training.config.alignment.encoder} is not the DINOv2 that {checkpoint} was "
                "trained with: give that one by --repa FILE"
            )
        set_weights(training.objective.projector, open_checkpoint(checkpoint).projector())
    text_encoder = _text_encoder(training)
    # Not noted in checkpoints of before 2026-11-28.
    if text_encoder is not None and state.get("text_encoder", text_encoder) != text_encoder:
        raise UserError(
            f"{training.config.text.encoder} is not the text encoder that {checkpoint} was trained "
            "with: give that one by --text.encoder FOLDER"
        )
    optimizer = get_optimizer_state_dict(training.objective, training.optimizer)
    shards = checkpoint / OPTIMIZER_FOLDER
    if shards.is_dir():
        with warnings.catch_warnings():
            # That it is not distributed, where one process reads what several wrote.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(
                _by_name(optimizer),
                storage_reader=dcp.HuggingFaceStorageReader(str(shards)),
                no_dist=training.processes.world_size == 1,
            )
        options = None
    else:
        optimizer = state["optimizer"]
        options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(training.objective, training.optimizer, optimizer, options=options)
    torch.set_rng_state(state["random"]["torch"])
    if "guard" in state:  # not before 2026-11-28
        training.guard.load_state_dict(state["guard"])
    return state


def _encoder(training: TrainingStep) -> str | None:
    """Which weights REPA's encoder has, where the run has one."""
    return None if training.features is None else training.features.encoder.fingerprint


def _text_encoder(training: TrainingStep) -> str | None:
    """Which weights the text encoder has, where the run has one."""
    encoder = training.encode_text
    return encoder.fingerprint if isinstance(encoder, Qwen3TextEncoder) else None


def choose_checkpoint(training: TrainingStep, folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is what was written, and a line on each newer one.

    The newer ones are set aside, as `step-….damaged`.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    chosen: Path | None = None
    lines: list[str] = []
    if training.processes.is_main:
        chosen, found = _newest_undamaged(folder)
        for path, line in sorted(found.items()):
            aside = f" (now {folder.set_aside(path).name})" if chosen is not None else ""
            lines.append(f"{line}: going on from the one before{aside}")
    chosen, lines = training.processes.from_main((chosen, lines))
    if lines and chosen is None:
        reason = lines[0].partition(": going on")[0]
        raise UserError(
            f"no checkpoint in {folder.checkpoints} is whole ({reason}): restore one from a "
            f"backup, or delete {folder.checkpoints} to begin anew"
        )
    return chosen, lines


def _newest_undamaged(folder: RunFolder) -> tuple[Path | None, dict[Path, str]]:
    complete = list(complete_checkpoints(folder.path))
    lines = {
        path: f"{path} is cut short or incomplete"
        for path in folder.written_checkpoints()
        if path not in complete
    }
    chosen = None
    for path in complete:
        damaged = damaged_file(path)
        if damaged is None:
            chosen = path
            break
        lines[path] = f"{path / damaged} is damaged"
    newer = {
        path: line
        for path, line in lines.items()
        if chosen is None or step_order(path) > step_order(chosen)
    }
    return chosen, newer


def _by_name(optimizer: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state dict, under one name each."""
    return {
        f"{parameter}.{key}": value
        for parameter, entries in optimizer["state"].items()
        for key, value in entries.items()
    }
