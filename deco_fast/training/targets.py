"""The targets of REPA in a run: its encoder, and its cache where there shall be one."""

from __future__ import annotations

import torch

from deco_fast.alignment import load_encoder
from deco_fast.alignment.cache import FeatureCache
from deco_fast.alignment.features import Features
from deco_fast.config import RunConfig
from deco_fast.data.loader import LabelledImages


def open_features(config: RunConfig, dataset: LabelledImages, device: torch.device) -> Features:
    """Open the encoder of a run with REPA, and its cache.

    Args:
        config: the run.
        dataset: its images; the cache is of them, by their fingerprint, size, crop and mirroring.
        device: where the encoder shall be.

    Raises:
        UserError: the encoder's weights or the cache cannot be used.
    """
    alignment, data = config.alignment, config.data
    patch_size = config.model.patch_size
    encoder = load_encoder(alignment.encoder, patch_size, config.training.precision)
    cache = None
    if alignment.cache is not None:
        tokens = (data.height // patch_size) * (data.width // patch_size)
        identity = {
            "encoder": encoder.fingerprint,
            "dataset": dataset.fingerprint,
            "height": data.height,
            "width": data.width,
            "crop": data.crop,
            "skip_small": data.skip_small,
            "random_flip": data.random_flip,
        }
        limit = round(alignment.cache_gib * 2**30)
        shape = (tokens, encoder.feature_size)
        cache = FeatureCache(alignment.cache, identity, len(dataset), shape, limit)
    damage = dataset.damage
    return Features(encoder.to(device), cache, None if damage is None else damage.flags)
