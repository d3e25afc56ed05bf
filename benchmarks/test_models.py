"""Every model of the paper's Table 1 that works on pixels: a training iteration, an image drawn.

All are ours as a user runs them: compiled, the fused ops where there are any, the engine. They take
turns, so that what disturbs the machine disturbs all of them. This says what a model costs beside
another, and nothing of what our kernels gain: that is in the other files.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Collection
from dataclasses import asdict, replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.comparison import MAX_ROUNDS, MIN_ROUNDS
from benchmarks.encoder import random_features
from benchmarks.inputs import normal, randomize
from benchmarks.machine import Machine
from benchmarks.memory import available_memory, peak_memory
from benchmarks.models import MODELS, STEPS, Model, ModelFigures, ModelTable
from benchmarks.settings import Settings
from benchmarks.timing import Turns
from benchmarks.work import FLOAT32_BYTES, Images, encoder_flops, parameter_count, training_work
from deco_fast.config import RunConfig
from deco_fast.data.loader import Batch
from deco_fast.models.build import build_network
from deco_fast.models.config import ClassConfig
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.training.distributed import Processes
from deco_fast.training.step import TrainingStep

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Weights, gradients, two moments, the average; and the engine's in half as many bytes, twice.
COPIES = 6
LARGE_ROUNDS = 3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", ["laptop", pytest.param("L", marks=pytest.mark.paper)])
def test_models(
    benchmark: BenchmarkFixture,
    machine: Machine,
    settings: Settings,
    model_tables: list[ModelTable],
    size: str,
    precision: str,
) -> None:
    small = size == "laptop"
    batch = settings.batch if not small else 2 if settings.trial else 32
    if precision == "bf16" and machine.no_bf16:
        pytest.skip(machine.no_bf16)
    runs = {model.name: model.run(small, batch, precision) for model in MODELS}
    held = {name: COPIES * FLOAT32_BYTES * parameter_count(run.model) for name, run in runs.items()}
    together = 1.1 * sum(held.values()) < available_memory(settings.device)
    if not together:
        settings.require_memory(max(held.values()))
    # A GPU is quiet enough, and what one model has shown is not lost with the next.
    together &= settings.device.type != "cuda"
    groups = [MODELS] if together else [(model,) for model in MODELS]
    images = Images(batch, runs["DeCo"].data.height, runs["DeCo"].data.width)
    table = ModelTable(
        f"models of Table 1, size {size}, {precision}",
        f"Training {images}; drawing one image in {STEPS} Euler steps without guidance; "
        f"{'in turns' if together else 'one model after the other'}; in brackets the spread"
        + ("" if small else ", and the paper's figures (32 images a GPU; an A800)"),
        [],
    )
    least = 1 if settings.trial else MIN_ROUNDS if small else LARGE_ROUNDS

    def measure() -> None:
        for group in groups:
            subjects = [_Subject(runs[one.name], settings, machine, precision) for one in group]
            _take_turns(subjects, settings.seconds / len(groups), least, machine)
            for model, subject in zip(group, subjects, strict=True):
                table.rows.append(subject.figures(model, small))
            if table not in model_tables:
                model_tables.append(table)
            del subject, subjects  # before the next ones are made
            torch.compiler.reset()
            gc.collect()

    benchmark.pedantic(measure, rounds=1)
    benchmark.group = table.title
    benchmark.extra_info.update(table.to_json())
    assert all(row.iteration > 0 and row.image > 0 for row in table.rows)


def _take_turns(
    subjects: Collection[_Subject], seconds: float, least: int, machine: Machine
) -> None:
    """Let all train, then all draw, and so on; each keeps its samples."""
    tasks = {
        task: Turns(
            {str(i): getattr(subject, task) for i, subject in enumerate(subjects)},
            machine.clock,
            machine.clock.min_sample_seconds,
        )
        for task in ("iterate", "draw")
    }
    per_round = sum(turns.calibrate() for turns in tasks.values())
    for _ in range(min(max(int(seconds / per_round), least), MAX_ROUNDS)):
        for turns in tasks.values():
            turns.round()
    for i, subject in enumerate(subjects):
        subject.samples = {task: turns.samples[str(i)] for task, turns in tasks.items()}


class _Subject:
    """One model, ready to be trained and to draw."""

    def __init__(
        self, config: RunConfig, settings: Settings, machine: Machine, precision: str
    ) -> None:
        device = settings.device
        data, training = config.data, config.training
        assert isinstance(config.model, ClassConfig)
        self.config, self.device = config, device
        images = Images(training.batch_size, data.height, data.width)
        features, encoder_work = None, 0
        if config.alignment.enabled:
            features = random_features(device, training.precision)
            encoder_work = encoder_flops(images)
        work = training_work(config.model, images, encoder_work)
        self.floor = machine.floor(work, PRECISIONS[precision]).seconds
        self.samples: dict[str, list[float]] = {}
        compiled = training.model_copy(update={"compile": not settings.trial})
        config = config.model_copy(update={"training": compiled})
        self._training = TrainingStep(config, Processes(0, 1, device), features)
        randomize(self._training.model)
        self._training.prepare()
        shape = (training.batch_size, 3, data.height, data.width)
        self._batch = Batch(
            normal(*shape).clamp(-1, 1).to(device),
            (torch.arange(training.batch_size) % config.model.num_classes).to(device),
            torch.arange(training.batch_size),
        )
        network = build_network(config.model, config.card())
        randomize(network)
        network.to(device, PRECISIONS[precision]).requires_grad_(False)
        self._engine = SamplingEngine(
            network,
            replace(config.sampling, solver="euler", steps=STEPS, guidance_scale=1.0),
            batch_size=1,
            compile=not settings.trial,
        )
        self._engine.warm_up()
        self._noise = normal(1, *self._engine.image_shape).to(device)
        self.iterate()

    def figures(self, model: Model, small: bool) -> ModelFigures:
        """What the turns have measured, and the memory."""
        iterations, images = self.samples["iterate"], self.samples["draw"]
        return ModelFigures(
            model.name,
            parameter_count(self.config.model),
            statistics.median(iterations),
            (min(iterations), max(iterations)),
            self.floor,
            self.training_memory(),
            statistics.median(images),
            (min(images), max(images)),
            self.inference_memory(),
            None if small else asdict(model.published),
        )

    def iterate(self) -> Tensor:
        """A training step."""
        return self._training(0, self._batch).values

    def draw(self) -> Tensor:
        """One image."""
        return self._engine(self._noise, [0])

    def training_memory(self) -> int | None:
        """What training holds, and what a step takes besides."""
        parameters = sum(p.numel() for p in self._training.objective.parameters())
        captured = self._training.captured
        recorded = 0 if captured is None else captured.graph_bytes()
        return self._plus_peak(4 * FLOAT32_BYTES * parameters + recorded, self.iterate)

    def inference_memory(self) -> int | None:
        """What the engine holds, and what a drawing takes besides."""
        held = {
            storage.data_ptr(): storage.nbytes()
            for part in (self._engine.model, self._engine._blocks)
            for tensor in (*part.parameters(), *part.buffers())
            for storage in (tensor.untyped_storage(),)
        }
        return self._plus_peak(sum(held.values()) + self._engine.graph_bytes(), self.draw)

    def _plus_peak(self, held: int, function: Callable[[], object]) -> int | None:
        peak = peak_memory(function, self.device)
        return None if peak is None else held + peak
