"""A training's state on the disk: written into a checkpoint, and taken up from one."""

from __future__ import annotations

from typing import Any

import torch

from deco_fast.checkpoint import load_training_state, load_weights, save_checkpoint
from deco_fast.checkpoint.load import open_checkpoint
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.step import TrainingStep


def save(training: TrainingStep, folder: RunFolder, step: int, loader: dict[str, Any]) -> None:
    """Write the checkpoint after `step` steps, and drop the oldest ones.

    Args:
        training: what to save.
        folder: the run's.
        step: steps made.
        loader: the state of the batches, from `Batches.state_dict`.

    Raises:
        UserError: it cannot be written.
    """
    if training.processes.is_main:
        projector = training.objective.projector
        save_checkpoint(
            folder.checkpoint(step),
            model=training.model,
            ema=training.ema.model,
            card=training.config.card(step),
            projector=None if projector is None else projector.state_dict(),
            training={
                "step": step,
                "optimizer": training.optimizer.state_dict(),
                "loader": loader,
                "random": {"torch": torch.get_rng_state()},
                "world_size": training.processes.world_size,
            },
        )
        folder.drop_old_checkpoints(training.config.output.keep_checkpoints)
    training.processes.barrier()


def resume(training: TrainingStep, folder: RunFolder) -> dict[str, Any] | None:
    """Take up the newest checkpoint of a run.

    Returns:
        Its "step" and "loader"; None where there is no checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    checkpoint = folder.newest_checkpoint()
    if checkpoint is None:
        return None
    load_weights(checkpoint / "model.safetensors", training.model)
    load_weights(checkpoint / "ema.safetensors", training.ema.model)
    if training.objective.projector is not None:
        training.objective.projector.load_state_dict(open_checkpoint(checkpoint).projector())
    state = load_training_state(checkpoint)
    training.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["torch"])
    return state
