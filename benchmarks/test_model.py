"""One forward of the paper's models."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.comparison import Compare, Subject
from benchmarks.inputs import normal, randomize
from benchmarks.settings import Settings
from benchmarks.variants import AUTOCAST, BFLOAT16, FLOAT32, Precision, Variant
from benchmarks.work import FLOAT32_BYTES, Images, model_work, parameter_count
from deco_fast.models.deco import DeCo
from deco_fast.models.presets import PRESETS


@pytest.mark.paper
@pytest.mark.parametrize("precisions", [(FLOAT32,), (AUTOCAST, BFLOAT16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["deco-l", "deco-xl"])
def test_model_forward(
    compare: Compare,
    settings: Settings,
    name: str,
    precisions: tuple[Precision, ...],
) -> None:
    config, card = PRESETS[name]
    images = Images(settings.batch, card.height, card.width)
    settings.require_memory(2 * FLOAT32_BYTES * parameter_count(config))
    device = settings.device
    x = normal(images.batch, 3, images.height, images.width).to(device)
    t = torch.linspace(0.1, 0.9, images.batch, device=device)
    labels = (torch.arange(images.batch) % config.num_classes).to(device)

    @cache
    def model_in(dtype: torch.dtype) -> DeCo:
        model = DeCo(config)
        randomize(model)
        return model.to(device, dtype)

    def build(variant: Variant) -> Subject:
        model = variant.compile(model_in(variant.precision.dtype))

        def run() -> dict[str, torch.Tensor]:
            with torch.no_grad(), variant.autocast(device):
                return {"velocity": model(x, t, labels)}

        return Subject(run)

    compare(
        f"forward, {name}",
        str(images),
        op_names=("pixel_decoder",),
        precisions=precisions,
        build=build,
        work=model_work(config, images, precisions[0].compute_dtype.itemsize),
        backward=False,
        compile_fused=True,
    )
