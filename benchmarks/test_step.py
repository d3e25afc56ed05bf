"""The decoder and the loss as in a training step, for the memory that they take at their peak."""

from __future__ import annotations

import pytest
import torch

from benchmarks.comparison import Compare, Subject
from benchmarks.inputs import TRIAL_CONFIG, normal, randomize
from benchmarks.settings import Settings
from benchmarks.variants import AUTOCAST, FLOAT32, Precision, Variant
from benchmarks.work import Images, Work, decoder_work, loss_work
from deco_fast.losses import flow_matching_loss, frequency_table
from deco_fast.models.decoder import PixelDecoder
from deco_fast.models.presets import PRESETS

BATCH = 16
BYTES_PER_IMAGE = 330 * 2**20  # of eager in float32


@pytest.mark.parametrize("precision", [FLOAT32, AUTOCAST], ids=["fp32", "bf16"])
def test_step(compare: Compare, settings: Settings, precision: Precision) -> None:
    preset = PRESETS["deco-xl"]
    config = TRIAL_CONFIG if settings.trial else preset.config
    side = 32 if settings.trial else preset.card.height
    images = Images(1 if settings.trial else max(BATCH, settings.batch), side, side)
    settings.require_memory(BYTES_PER_IMAGE * images.batch)
    device = settings.device
    table = frequency_table().to(device)
    x = normal(images.batch, 3, side, side).to(device)
    target = normal(images.batch, 3, side, side, seed=1).to(device)
    length = images.tokens(config.patch_size)

    def build(variant: Variant) -> Subject:
        decoder = PixelDecoder(config)
        randomize(decoder)
        decoder.to(device)
        tokens = normal(images.batch, length, config.hidden_size).to(device).requires_grad_()
        leaves = {"tokens": tokens, **dict(decoder.named_parameters())}

        @variant.compile
        def loss_of(tokens: torch.Tensor) -> torch.Tensor:
            total, _, _ = flow_matching_loss(decoder(x, tokens), target, table, weight=1.0)
            return total

        def run() -> dict[str, torch.Tensor]:
            with variant.autocast(device):
                loss = loss_of(tokens)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
            return {"loss": loss.detach(), **named}

        return Subject(run, held=(x, target, table, *leaves.values()))

    decode = decoder_work(config, images, backward=True)
    lose = loss_work(images, backward=True)
    compare(
        "pixel decoder and loss, forward + backward",
        f"{'trial' if settings.trial else 'DeCo-XL'} shapes, {images}",
        op_names=("pixel_decoder", "flow_matching_loss"),
        precisions=(precision,),
        build=build,
        work=Work(decode.flops + lose.flops, decode.bytes + lose.bytes),
        backward=True,
        compile_fused=False,
    )
