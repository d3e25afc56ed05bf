"""The random numbers of a training step, a function of (seed, step, place in the batch) alone.

However many processes and backward passes share a global batch, its samples meet the same times,
noise and dropped labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deco_fast.conditioning.captions import drop_captions, prefix_captions
from deco_fast.conditioning.labels import drop_labels
from deco_fast.config import RunConfig
from deco_fast.flow import sample_timesteps
from deco_fast.models.config import ClassConfig
from deco_fast.transfer import to_device


class Draws(NamedTuple):
    """The random numbers of some samples of a step.

    Attributes:
        y: labels (B,), the null class where dropped; or captions, empty where dropped.
        t: times (B,), float32.
        noise: (B, C, H, W), float32.
    """

    y: Tensor | list[str]
    t: Tensor
    noise: Tensor


def draw_step(
    config: RunConfig,
    step: int,
    places: range,
    labels: Tensor | list[str],
    device: torch.device,
) -> Draws:
    """Draw for the samples at some places of a step's global batch.

    Args:
        config: the run.
        step: 0-based.
        places: of the samples in the global batch.
        labels: of those samples, (B,) int64 on the device, or captions.
        device: where the draws shall be. The noise is made there: another kind of device, other
            noise.
    """
    flow, batch_size = config.flow, config.training.batch_size
    sequence = np.random.SeedSequence(config.training.seed, spawn_key=(step,))
    # A sign bit less: torch takes seeds as signed integers.
    step_seed, *sample_seeds = (sequence.generate_state(batch_size + 1, np.uint64) >> 1).tolist()
    generator = torch.Generator().manual_seed(step_seed)
    u = torch.rand(batch_size, generator=generator)
    t = sample_timesteps(
        batch_size,
        distribution=flow.distribution,
        time_shift=flow.time_shift,
        generator=generator,
    )
    prefixes = torch.rand(2, batch_size, generator=generator)
    own = slice(places.start, places.stop)
    shape = (config.model.in_channels, config.data.height, config.data.width)
    t, u_on_device = to_device(torch.stack((t[own], u[own])), device)
    noise = torch.empty(len(places), *shape, device=device)
    generator = torch.Generator(device)
    for image, seed in zip(noise, sample_seeds[own], strict=True):
        image.normal_(generator=generator.manual_seed(seed))
    y: Tensor | list[str]
    if isinstance(labels, Tensor):
        assert isinstance(config.model, ClassConfig)
        null = config.model.num_classes
        y = drop_labels(labels, null, flow.null_probability, u=u_on_device)
    else:
        captions = prefix_captions(labels, config.text.prefix_probability, *prefixes[:, own])
        y = drop_captions(captions, flow.null_probability, u[own])
    return Draws(y, t, noise)
