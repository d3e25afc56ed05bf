"""Drawing images by the plain loop, with the guidance that the preset recommends."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.comparison import Compare, Subject
from benchmarks.inputs import normal, randomize
from benchmarks.settings import Settings
from benchmarks.variants import AUTOCAST, BFLOAT16, FLOAT32, Precision, Variant
from benchmarks.work import FLOAT32_BYTES, Images, parameter_count, sampling_work
from deco_fast.guidance import guidance_active
from deco_fast.models.deco import DeCo
from deco_fast.models.presets import PRESETS
from deco_fast.sampling.loop import sample
from deco_fast.solvers import time_grid

DIGITS_BATCH = 4
DIGITS_STEPS = 100
# Of the large models a tenth of a run: every step takes the same time.
PAPER_STEPS = 10


@pytest.mark.parametrize("precisions", [(FLOAT32,), (AUTOCAST, BFLOAT16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["deco-digits", pytest.param("deco-xl", marks=pytest.mark.paper)])
def test_sampling(
    compare: Compare,
    settings: Settings,
    name: str,
    precisions: tuple[Precision, ...],
) -> None:
    config, card = PRESETS[name]
    digits = name == "deco-digits"
    steps = 2 if settings.trial else DIGITS_STEPS if digits else PAPER_STEPS
    batch = 1 if settings.trial or not digits else DIGITS_BATCH
    images = Images(batch, card.height, card.width)
    settings.require_memory(2 * FLOAT32_BYTES * parameter_count(config))
    device = settings.device
    noise = normal(batch, 3, card.height, card.width).to(device)
    labels = (torch.arange(batch) % config.num_classes).to(device)
    recipe = card.sampling
    guided_steps = sum(
        guidance_active(t, recipe.guidance_interval, closed_end=True)
        for t in time_grid(steps, recipe.time_shift)[:-1]
    )

    @cache
    def model_in(dtype: torch.dtype) -> DeCo:
        model = DeCo(config)
        randomize(model)
        return model.to(device, dtype)

    def build(variant: Variant) -> Subject:
        model = variant.compile(model_in(variant.precision.dtype))

        def run() -> dict[str, torch.Tensor]:
            with variant.autocast(device):
                drawn = sample(
                    model,
                    noise,
                    labels,
                    steps=steps,
                    guidance_scale=recipe.guidance_scale,
                    guidance_interval=recipe.guidance_interval,
                    time_shift=recipe.time_shift,
                )
            return {"images": drawn}

        return Subject(run)

    compare(
        f"sampling, {name}",
        f"plain loop, {steps} Euler steps, {guided_steps} of them with guidance "
        f"{recipe.guidance_scale}, {images}",
        op_names=("pixel_decoder",),
        precisions=precisions,
        build=build,
        work=sampling_work(
            config, images, steps, guided_steps, precisions[0].compute_dtype.itemsize
        ),
        backward=False,
        compile_fused=True,
    )
