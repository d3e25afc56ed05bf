"""Drawing images: the engine against the loop as it was published.

The published loop evaluates both halves at every step, guided or not, and computes every block's
modulation inside the block. The engine skips the unconditional half where guidance does not act:
a gain of the recipe's interval and no speed of the code. So it is timed with guidance at all times
too, but at t = 0, where there is never any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import MIN_ROUNDS, Compare, Subject
from benchmarks.inputs import SMALL_TEXT, normal, randomize
from benchmarks.machine import Machine
from benchmarks.settings import Settings
from benchmarks.variants import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    REFERENCE,
    Precision,
    Variant,
    fastest_backend,
)
from benchmarks.work import FLOAT32_BYTES, Images, parameter_count, sampling_work
from deco_fast.conditioning.qwen3 import EncodeText
from deco_fast.guidance import guide
from deco_fast.models.build import build_network, empty_network
from deco_fast.models.card import SamplingSettings
from deco_fast.models.config import ClassConfig, DeCoT2IConfig, NetworkConfig
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.presets import PRESETS
from deco_fast.sampling.condition_table import Condition
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.schedule import schedule
from deco_fast.solvers import time_grid

SMALL_BATCH = 4
# Of the large models a tenth of a run: every step takes the same time, and what the engine computes
# once for a batch, the modulations, counts ten times.
PAPER_STEPS = 10
PAPER_ROUNDS = 3
# From so many pixels in a batch a GPU has so much to do at each launch that the baseline gains
# nothing from being one graph, which takes a minute to compile, and not one for each block.
BY_BLOCK_PIXELS = 16 * 256**2

_MODELS = {**PRESETS, "small-t2i": SMALL_TEXT}
# The small ones in full, as many steps as their cards say.
_SMALL_STEPS = {name: _MODELS[name].card.sampling.steps for name in ("deco-digits", "small-t2i")}

PROMPT = "a prompt"

ENGINE = "engine"
HIGH = "engine, matmul precision high"


@pytest.mark.parametrize("precisions", [(FLOAT32,), (AUTOCAST, BFLOAT16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "everywhere"),
    [
        ("deco-digits", True),
        ("small-t2i", True),
        pytest.param("deco-xl", True, marks=pytest.mark.paper),
        pytest.param("deco-xl", False, marks=pytest.mark.paper),
        pytest.param("deco-xl-512", False, marks=pytest.mark.paper),
        pytest.param("deco-t2i", True, marks=pytest.mark.paper),
    ],
    ids=[
        *("deco-digits", "small-t2i"),
        *("deco-xl-guided-throughout", "deco-xl-recommended", "deco-xl-512", "deco-t2i"),
    ],
)
def test_sampling(
    compare: Compare,
    machine: Machine,
    settings: Settings,
    name: str,
    everywhere: bool,
    precisions: tuple[Precision, ...],
) -> None:
    config, card = _MODELS[name]
    small = name in _SMALL_STEPS
    steps = 2 if settings.trial else _SMALL_STEPS.get(name, PAPER_STEPS)
    batch = settings.batch if not small else 1 if settings.trial else SMALL_BATCH
    images = Images(batch, card.height, card.width)
    settings.require_memory(4 * FLOAT32_BYTES * parameter_count(config))
    device = settings.device
    noise = normal(batch, 3, card.height, card.width).to(device)
    conditions, condition, uncondition = _conditions(config, batch, device)
    encode_text = None if isinstance(config, ClassConfig) else _encode_text(condition, uncondition)
    # Of the text model's own solver every step costs the same as Euler's.
    recipe = replace(card.sampling, steps=steps, solver="euler")
    if everywhere:
        recipe = replace(recipe, guidance_interval=(0.0, 1.0))
    guided_steps = sum(evaluation.guided for evaluation in schedule(recipe))

    @cache
    def model_in(dtype: torch.dtype) -> DeCoNetwork:
        model = build_network(config, card)
        randomize(model)
        return model.to(device, dtype).requires_grad_(False)

    def build(variant: Variant) -> Subject:
        model = model_in(variant.precision.dtype)
        if variant.is_baseline:
            by_block = variant.compiled and images.pixels >= BY_BLOCK_PIXELS
            compiled: Callable[..., Tensor]
            if by_block:
                compiled = compiled_by_block(model)
            elif variant.graphed:
                compiled = torch.compile(
                    model, fullgraph=True, dynamic=False, mode="reduce-overhead"
                )
            else:
                compiled = variant.compile(model)

            def loop() -> dict[str, Tensor]:
                with variant.autocast(device):
                    drawn = published_loop(compiled, noise, condition, uncondition, recipe)
                return {"images": drawn}

            if variant.graphed:
                # The memory of torch.compile's own graphs is theirs to know.
                return Subject(loop, graph_bytes=lambda: None)
            return Subject(loop)
        with _matmul_precision(variant):
            engine = SamplingEngine(
                model,
                recipe,
                batch_size=batch,
                compile=variant.compiled,
                encode_text=encode_text,
                distinct_conditions=len(set(conditions)),
            )
            engine.warm_up()

        def run() -> dict[str, Tensor]:
            engine._table._held = None  # other classes than last time, so to speak
            with _matmul_precision(variant):
                return {"images": engine(noise, conditions)}

        return Subject(run, graph_bytes=engine.graph_bytes if engine._graphs else None)

    compare(
        f"sampling, {name}",
        f"{steps} Euler steps, guidance {recipe.guidance_scale} in "
        f"{recipe.guidance_interval}, {guided_steps} steps with it, {images}",
        op_names=("pixel_decoder",),
        precisions=precisions,
        build=build,
        work=sampling_work(
            config, images, steps, guided_steps, precisions[0].compute_dtype.itemsize
        ),
        backward=False,
        compile_fused=True,
        rows=_rows(machine, precisions, large=images.pixels >= BY_BLOCK_PIXELS),
        min_rounds=MIN_ROUNDS if small else PAPER_ROUNDS,
    )


def published_loop(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    condition: Tensor,
    uncondition: Tensor,
    settings: SamplingSettings,
) -> Tensor:
    """Euler's method with both halves at every step, as it was published (B.13)."""
    both = torch.cat([uncondition.expand_as(condition), condition])
    x = noise
    times = time_grid(settings.steps, settings.time_shift)
    with torch.no_grad():
        for (t, t_next), evaluation in zip(pairwise(times), schedule(settings), strict=True):
            scale = settings.guidance_scale if evaluation.guided else 1.0
            velocity = model(torch.cat([x, x]), x.new_full((len(both),), t), both)
            x = x + (t_next - t) * guide(*velocity.float().chunk(2), scale)
    return x


def compiled_by_block(model: DeCoNetwork) -> DeCoNetwork:
    """The same weights in a model whose DiT blocks and decoder are compiled."""
    twin = empty_network(model.config, model.card)
    twin.load_state_dict(model.state_dict(), assign=True)
    refining = twin.text_blocks if isinstance(twin, DeCoT2I) else ()
    for part in (*refining, *twin.blocks, twin.decoder):
        part.compile(fullgraph=True, dynamic=False)
    return twin.requires_grad_(False)


def _conditions(
    config: NetworkConfig, batch: int, device: torch.device
) -> tuple[list[Condition], Tensor, Tensor]:
    """The classes in turn, or one prompt for all: for the engine, then as the model takes them, and
    what the unconditional half takes."""
    if isinstance(config, ClassConfig):
        labels = torch.arange(batch, device=device) % config.num_classes
        null = torch.tensor([config.num_classes], device=device)
        return labels.tolist(), labels, null
    assert isinstance(config, DeCoT2IConfig)
    texts = normal(2, config.text_length, config.text_size).to(device)
    return [PROMPT] * batch, texts[:1].expand(batch, -1, -1), texts[1:]


def _encode_text(condition: Tensor, uncondition: Tensor) -> EncodeText:
    """The text encoder is no part of the comparison: both loops call it once."""
    texts = {PROMPT: condition[0], "": uncondition[0]}
    return lambda prompts: torch.stack([texts[prompt] for prompt in prompts])


def _rows(
    machine: Machine, precisions: tuple[Precision, ...], large: bool
) -> dict[Variant, str | None]:
    rows: dict[Variant, str | None] = {}
    backend = fastest_backend(machine, "pixel_decoder")
    for precision in precisions:
        # Eager is slower, the more so under autocast: of large batches it would only take time.
        if not (large and precision.autocast):
            rows[Variant(REFERENCE, False, precision)] = None
        rows[Variant(REFERENCE, True, precision)] = machine.no_compiler
        if machine.device.type == "cuda" and not (large or precision.autocast):
            # The engine is one; a batch that keeps the GPU busy gains nothing from it.
            rows[Variant(REFERENCE, True, precision, graphed=True)] = machine.no_compiler
        if precision.autocast:  # the engine has its weights in the dtype that it computes in
            continue
        if not large:
            rows[Variant(backend, False, precision, ENGINE)] = None
        rows[Variant(backend, True, precision, ENGINE)] = machine.no_compiler
        if precision == FLOAT32:
            rows[Variant(backend, True, precision, HIGH)] = machine.no_compiler
    return rows


@contextmanager
def _matmul_precision(variant: Variant) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if variant.part == HIGH else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
