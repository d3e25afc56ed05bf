"""The flow-matching loss at the paper's image size, forward and backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.comparison import Compare, Subject
from benchmarks.inputs import normal
from benchmarks.settings import Settings
from benchmarks.variants import BFLOAT16, FLOAT32, Precision, Variant
from benchmarks.work import Images, loss_work
from deco_fast.losses import flow_matching_loss, frequency_table


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=["fp32", "bf16"])
def test_loss(compare: Compare, settings: Settings, precision: Precision) -> None:
    side = 32 if settings.trial else 256
    images = Images(settings.batch, side, side)
    table = frequency_table().to(settings.device)
    target = normal(images.batch, 3, side, side).to(settings.device)

    def build(variant: Variant) -> Subject:
        prediction = normal(images.batch, 3, side, side, seed=1)
        prediction = prediction.to(settings.device, variant.precision.dtype).requires_grad_()
        loss = variant.compile(flow_matching_loss)

        def run() -> dict[str, torch.Tensor]:
            total, flow_matching, frequency = loss(prediction, target, table, 1.0)
            (gradient,) = torch.autograd.grad(total, prediction)
            return {
                "total": total.detach(),
                "flow-matching term": flow_matching,
                "frequency term": frequency,
                "gradient": gradient,
            }

        return Subject(run, held=(prediction, target, table))

    compare(
        "flow-matching loss, forward + backward",
        f"prediction in {precision.label}, target in fp32, {images}",
        op_names=("flow_matching_loss",),
        precisions=(precision,),
        build=build,
        work=loss_work(images, backward=True, prediction_bytes=precision.dtype.itemsize),
        backward=True,
        compile_fused=False,
    )
