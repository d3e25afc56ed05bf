"""A training iteration: noise, forward, loss, backward, AdamW."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.comparison import Compare, Subject
from benchmarks.inputs import normal, randomize
from benchmarks.settings import Settings
from benchmarks.variants import AUTOCAST, FLOAT32, Precision, Variant
from benchmarks.work import FLOAT32_BYTES, Images, parameter_count, training_work
from deco_fast import flow
from deco_fast.losses import flow_matching_loss, frequency_table
from deco_fast.models.deco import DeCo
from deco_fast.models.presets import PRESETS

# Copies of the weights that a comparison holds: weights, gradients, two moments, and the
# gradients of the float32 reference and of the variant that is checked against it.
COPIES = 6

# Through a whole network bf16's rounding adds up: 5% in a norm's weight of DeCo-XL.
GRADIENT_TOLERANCE = 0.15


@pytest.mark.parametrize("precision", [FLOAT32, AUTOCAST], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "deco-digits",
        pytest.param("deco-l", marks=pytest.mark.paper),
        pytest.param("deco-xl", marks=pytest.mark.paper),
    ],
)
def test_training_iteration(
    compare: Compare,
    settings: Settings,
    name: str,
    precision: Precision,
) -> None:
    config, card = PRESETS[name]
    batch = settings.batch if name != "deco-digits" else 4 if settings.trial else 64
    images = Images(batch, card.height, card.width)
    settings.require_memory(COPIES * FLOAT32_BYTES * parameter_count(config))
    device = settings.device
    data = normal(batch, 3, card.height, card.width).to(device)
    labels = (torch.arange(batch) % config.num_classes).to(device)
    table = frequency_table().to(device)

    @cache
    def model_and_optimizer() -> tuple[DeCo, torch.optim.Optimizer]:
        model = DeCo(config)
        randomize(model)
        model.to(device)
        # All variants train the same weights; a learning rate of zero does AdamW's whole work
        # and leaves them as they are, so that gradients compare at any iteration.
        return model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def build(variant: Variant) -> Subject:
        model, optimizer = model_and_optimizer()
        generator = torch.Generator(device)

        @variant.compile
        def loss_at(noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            prediction = model(flow.interpolate(data, noise, t), t, labels)
            total, _, _ = flow_matching_loss(
                prediction, flow.velocity(data, noise), table, weight=1.0
            )
            return total

        def run() -> dict[str, torch.Tensor]:
            generator.manual_seed(0)
            t = flow.sample_timesteps(batch, generator=generator, device=device)
            noise = torch.randn(data.shape, generator=generator, device=device)
            with variant.autocast(device):
                loss = loss_at(noise, t)
            loss.backward()
            optimizer.step()
            gradients = {
                f"gradient of {key}": parameter.grad
                for key, parameter in model.named_parameters()
                if parameter.grad is not None
            }
            optimizer.zero_grad(set_to_none=True)
            return {"loss": loss.detach(), **gradients}

        return Subject(run, held=(data, labels, table, *model.parameters()))

    compare(
        f"training iteration, {name}",
        f"forward, loss, backward, AdamW, {images}",
        op_names=("pixel_decoder", "flow_matching_loss"),
        precisions=(precision,),
        build=build,
        work=training_work(config, images),
        backward=True,
        compile_fused=True,
        bfloat16_tolerance=GRADIENT_TOLERANCE,
    )
