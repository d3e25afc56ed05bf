"""A training step as `train.py` makes it: batch, draws, forward, loss, backward, AdamW, average."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import Compare, Subject
from benchmarks.encoder import random_features
from benchmarks.inputs import randomize
from benchmarks.machine import Machine
from benchmarks.settings import Settings
from benchmarks.test_loader import photograph
from benchmarks.variants import AUTOCAST, FLOAT32, REFERENCE, Precision, Variant, variants
from benchmarks.work import (
    FLOAT32_BYTES,
    Images,
    encoder_flops,
    parameter_count,
    training_work,
)
from deco_fast.alignment.features import Features
from deco_fast.config import RunConfig
from deco_fast.data import DigitsDataset, EpochBatches, FolderImages, ImageDataset, read_batches
from deco_fast.data.loader import Batch
from deco_fast.models.deco import DeCo
from deco_fast.models.presets import PRESETS
from deco_fast.training import parallel
from deco_fast.training.captured import CapturedBackward
from deco_fast.training.distributed import Processes
from deco_fast.training.step import TrainingStep

# Copies of the weights that a comparison holds: weights, average, gradients, two moments, and the
# gradients of the float32 reference and of the variant that is checked against it.
COPIES = 7

# Through a whole network bf16's rounding adds up: 5% in a norm's weight of DeCo-XL.
GRADIENT_TOLERANCE = 0.15

# All variants train the same weights: so small a learning rate does AdamW's whole work and
# leaves them as they are, and gradients compare at any step.
LEARNING_RATE = 1e-30

PHOTOGRAPHS = 8

EXACT = Variant(REFERENCE, compiled=False, precision=FLOAT32)
"""What all others are compared with."""


def run_config(name: str, images: Images) -> RunConfig:
    """A run of a preset on batches of so many images."""
    digits = name == "deco-digits"
    return RunConfig.model_validate(
        {
            "name": name,
            "model": {"preset": name},
            "data": {
                "dataset": "digits" if digits else "folder",
                "height": images.height,
                "width": images.width,
            },
            "training": {
                "steps": 10**6,
                "batch_size": images.batch,
                "learning_rate": LEARNING_RATE,
                "explosion_factor": None,
                "precision": "fp32",
                "compile": False,
            },
        }
    )


def _rows(machine: Machine, precision: Precision) -> dict[Variant, str | None]:
    """All backends; on a GPU what is compiled as a CUDA graph as well, the baseline too."""
    ops = ("pixel_decoder", "flow_matching_loss")
    rows = variants(machine, ops, (precision,), compile_fused=True)
    if machine.device.type == "cuda":
        compiled = {row: missing for row, missing in rows.items() if row.compiled}
        rows |= {replace(row, graphed=True): missing for row, missing in compiled.items()}
    return rows


@contextmanager
def recomputed_activations(model: DeCo) -> Iterator[None]:
    """Blocks that keep their inputs alone for the backward pass, for the time of a step."""
    parallel.recompute_activations(model)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward


@pytest.mark.parametrize("precision", [FLOAT32, AUTOCAST], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "deco-digits",
        pytest.param("deco-l", marks=pytest.mark.paper),
        pytest.param("deco-xl", marks=pytest.mark.paper),
    ],
)
def test_training_step(
    compare: Compare,
    machine: Machine,
    settings: Settings,
    name: str,
    precision: Precision,
    tmp_path: Path,
) -> None:
    model_config, card = PRESETS[name]
    batch_size = settings.batch if name != "deco-digits" else 4 if settings.trial else 64
    images = Images(batch_size, card.height, card.width)
    settings.require_memory(COPIES * FLOAT32_BYTES * parameter_count(model_config))
    device = settings.device
    aligned = name != "deco-digits"
    encoder_work = encoder_flops(images) if aligned else 0

    @cache
    def encoder(compiled: bool) -> Features | None:
        """REPA's, with random weights; compiled for whoever compiles."""
        if not aligned:
            return None
        if not compiled:
            return random_features(device, "bf16" if precision.autocast else "fp32")
        eager = encoder(False)
        assert eager is not None
        return Features(torch.compile(eager.encoder, dynamic=False))  # type: ignore[arg-type]

    @cache
    def dataset() -> DigitsDataset | ImageDataset:
        if name == "deco-digits":
            return DigitsDataset("train", images.height)
        (tmp_path / "class").mkdir()
        for number in range(PHOTOGRAPHS):
            (tmp_path / "class" / f"{number}.jpg").write_bytes(photograph(number))
        return ImageDataset(FolderImages(str(tmp_path)), images.height, images.width)

    def batches() -> Iterator[Batch]:
        """From the first one on, read as `train.py` reads them."""
        order = EpochBatches(len(dataset()), batch_size, seed=0)
        workers = 0 if name == "deco-digits" else max(1, (os.cpu_count() or 1) // 4)
        return read_batches(dataset(), order, workers=workers, prefetch=2, device=device)

    @cache
    def training() -> TrainingStep:
        step = TrainingStep(run_config(name, images), Processes(0, 1, device), encoder(False))
        randomize(step.model)
        return step

    @cache
    def objective(variant: Variant) -> Callable[..., dict[str, Tensor]]:
        """Compiled once for what a graph replays and what the host orders kernel by kernel."""
        step = training()

        def forward(*inputs: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = step.objective(*inputs)
            return found

        return variant.compile(forward, parallel.COMPILE_OPTIONS)

    def build(variant: Variant) -> Subject:
        step, source = training(), batches()
        gradients: dict[str, Tensor] = {}
        waits: list[float] = []
        losses = objective(replace(variant, graphed=False))
        captured = None
        if variant.graphed:
            captured = CapturedBackward(losses, list(step.objective.parameters()), parts=1)

        def keep(*_: object) -> None:
            for key, parameter in step.model.named_parameters():
                if parameter.grad is not None:
                    gradients[f"gradient of {key}"] = parameter.grad

        def run() -> dict[str, Tensor]:
            asked = time.perf_counter()
            batch = next(source)
            waits.append(time.perf_counter() - asked)
            step.network, step.features = losses, encoder(variant.compiled)
            step.captured = captured
            step.objective.bf16 = variant.precision.autocast
            hook = step.optimizer.register_step_pre_hook(keep)
            # What the others are held to must fit beside them.
            lean = aligned and variant == EXACT
            with recomputed_activations(step.model) if lean else nullcontext():
                figures = step(0, batch)
            hook.remove()
            if captured is not None and not captured.is_recorded:
                raise RuntimeError("the step cannot be recorded as a CUDA graph")
            step.ema.wait()  # which is on its way beside the next step
            results = {"loss": figures.values[0], **gradients}
            gradients.clear()
            return results

        return Subject(
            run,
            tuple(step.objective.parameters()),
            lambda: statistics.median(waits),
            captured.graph_bytes if captured is not None else None,
        )

    # Weights, two moments and the average; gradients come and go with the step.
    held = 4 * FLOAT32_BYTES * parameter_count(model_config)
    compare(
        f"training step, {name}",
        f"batch, {'DINOv2-B, ' if aligned else ''}draws, forward, loss, backward, AdamW, moving "
        f"average; weights, moments and average hold {held / 2**30:.1f} GiB besides; {images}",
        op_names=("pixel_decoder", "flow_matching_loss"),
        precisions=(precision,),
        build=build,
        work=training_work(model_config, images, encoder_work),
        backward=True,
        compile_fused=True,
        rows=_rows(machine, precision),
        bfloat16_tolerance=GRADIENT_TOLERANCE,
    )
