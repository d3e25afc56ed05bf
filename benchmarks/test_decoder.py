"""The pixel decoder at DeCo-XL shapes, upsampling included."""

from __future__ import annotations

import pytest
import torch

from benchmarks.comparison import Compare, Subject
from benchmarks.inputs import TRIAL_CONFIG, normal, randomize
from benchmarks.machine import Machine
from benchmarks.settings import Settings
from benchmarks.variants import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    Precision,
    Variant,
    lean_variants,
    limited_variants,
    variants,
)
from benchmarks.work import Images, decoder_work
from deco_fast.models.decoder import PixelDecoder
from deco_fast.models.presets import PRESETS


@pytest.mark.parametrize("precisions", [(FLOAT32,), (AUTOCAST, BFLOAT16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_decoder(
    compare: Compare,
    settings: Settings,
    machine: Machine,
    precisions: tuple[Precision, ...],
    backward: bool,
) -> None:
    preset = PRESETS["deco-xl"]
    config = TRIAL_CONFIG if settings.trial else preset.config
    side = 32 if settings.trial else preset.card.height
    images = Images(settings.batch, side, side)
    length = images.tokens(config.patch_size)

    # What the C++ kernels are without AVX-512, and without a matrix unit.
    lesser = "avx2" if precisions == (FLOAT32,) else "avx512_bf16"
    rows = {
        **variants(machine, ("pixel_decoder",), precisions, compile_fused=False),
        **limited_variants(machine, "pixel_decoder", precisions, lesser),
        **(lean_variants(machine, "pixel_decoder", precisions) if backward else {}),
    }

    def build(variant: Variant) -> Subject:
        device, dtype = settings.device, variant.precision.dtype
        decoder = PixelDecoder(config)
        randomize(decoder)
        decoder.to(device, dtype)
        x = normal(images.batch, 3, side, side).to(device, dtype)
        tokens = (
            normal(images.batch, length, config.hidden_size)
            .to(device, dtype)
            .requires_grad_(backward)
        )
        gradient = normal(images.batch, 3, side, side, seed=1).to(device, dtype)
        leaves = {"tokens": tokens, **dict(decoder.named_parameters())}
        decode = variant.compile(decoder)

        def forward() -> dict[str, torch.Tensor]:
            with torch.no_grad(), variant.autocast(settings.device):
                return {"velocity": decode(x, tokens)}

        def forward_backward() -> dict[str, torch.Tensor]:
            with variant.autocast(settings.device):
                velocity = decode(x, tokens)
            gradients = torch.autograd.grad(
                velocity, list(leaves.values()), gradient.to(velocity.dtype)
            )
            named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
            return {"velocity": velocity.detach(), **named}

        return Subject(
            run=forward_backward if backward else forward,
            held=(x, tokens, gradient, *decoder.parameters()),
        )

    compare(
        f"pixel decoder, forward{' + backward' if backward else ''}",
        f"{'trial' if settings.trial else 'DeCo-XL'} shapes, {images}",
        op_names=("pixel_decoder",),
        precisions=precisions,
        build=build,
        work=decoder_work(config, images, backward, precisions[0].compute_dtype.itemsize),
        backward=backward,
        compile_fused=False,
        rows=rows,
    )
