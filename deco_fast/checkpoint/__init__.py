"""Checkpoints: ours are written and read here, published ones are read.

Ours is a folder, as a training writes it, or the weights alone in one file::

    step-00001000/model.safetensors      the weights; config and card in its metadata
    step-00001000/ema.safetensors        their moving average, which images are drawn with
    step-00001000/projector.safetensors  REPA's projector, where one is trained
    step-00001000/training.pt            optimizer, step, loader and random state
    step-00001000/optimizer/             the optimizer's state, where processes share it (FSDP2)
    step-00001000/checksums.json         of all of these
"""

from deco_fast.checkpoint.atomic import remove_leftovers
from deco_fast.checkpoint.checksums import damaged_file
from deco_fast.checkpoint.find import complete_checkpoints, newest_checkpoint
from deco_fast.checkpoint.load import (
    load_checkpoint,
    load_training_state,
    load_weights,
    read_card,
    read_config,
)
from deco_fast.checkpoint.save import save_checkpoint, save_weights

__all__ = [
    "complete_checkpoints",
    "damaged_file",
    "load_checkpoint",
    "load_training_state",
    "load_weights",
    "newest_checkpoint",
    "read_card",
    "read_config",
    "remove_leftovers",
    "save_checkpoint",
    "save_weights",
]
