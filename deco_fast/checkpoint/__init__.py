"""Checkpoints: ours are written and read here, published ones are read.

Ours is a folder, as a training writes it, or the weights alone in one file::

    step-00001000/model.safetensors      the weights; config and card in its metadata
    step-00001000/ema.safetensors        their moving average, which images are drawn with
    step-00001000/projector.safetensors  REPA's projector, where one is trained
    step-00001000/training.pt            optimizer, step, loader and random state
"""

from deco_fast.checkpoint.atomic import remove_leftovers
from deco_fast.checkpoint.find import newest_checkpoint
from deco_fast.checkpoint.load import (
    load_checkpoint,
    load_training_state,
    load_weights,
    read_card,
    read_config,
)
from deco_fast.checkpoint.save import save_checkpoint, save_weights

__all__ = [
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
