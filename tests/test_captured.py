"""A step's forward and backward as one CUDA graph: the same training, on GPUs and in its logic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor

from deco_fast.config import RunConfig, TrainingConfig
from deco_fast.data.loader import Batch
from deco_fast.training import captured as captured_module
from deco_fast.training import distributed as distributed_module
from deco_fast.training import step as step_module
from deco_fast.training.captured import CapturedBackward, can_capture
from deco_fast.training.distributed import Processes, join_processes
from deco_fast.training.step import TrainingStep

RECORD = CapturedBackward._record
CPU = Processes(0, 1, torch.device("cpu"))
STEPS = 4


def run_config(**training: Any) -> RunConfig:
    fields = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32"}
    return RunConfig.model_validate(
        {
            "name": "captured",
            "model": {
                "hidden_size": 16,
                "depth": 1,
                "num_heads": 2,
                "patch_size": 4,
                "decoder_hidden_size": 16,
                "num_classes": 10,
            },
            "data": {"dataset": "digits", "height": 8, "width": 8},
            "training": {**fields, "compile": False, **training},
        }
    )


def batch(step: int, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 8, 8, generator=generator).clamp(-1, 1)
    return Batch(images, torch.arange(size) % 10, torch.arange(size))


def trained(config: RunConfig, processes: Processes, capture: bool) -> tuple[list[Tensor], Tensor]:
    """The weights after some steps, and the figures of all."""
    training = TrainingStep(
        config.model_copy(
            update={"training": config.training.model_copy(update={"cuda_graph": capture})}
        ),
        processes,
    )
    training.prepare()
    if capture and training.captured is None:  # where there is no GPU
        training.capture()
    count, size = processes.world_size, config.training.batch_size // processes.world_size
    own = [batch(step * count + processes.rank, size) for step in range(STEPS)]
    figures = [training(step, given).values.clone() for step, given in enumerate(own)]
    return [p.detach().cpu() for p in training.model.parameters()], torch.stack(figures).cpu()


class FakeGraph:
    """What CUDA does, in plain operations: a replay writes where the recording has written."""

    recording: CapturedBackward
    replays = 0

    def replay(self) -> None:
        type(self).replays += 1
        own = self.recording
        held = [p.grad for p in own._parameters]
        own._forget_gradients()
        losses = own._compute(own._inputs)
        for name, value in losses.items():
            own._losses[name].copy_(value.detach())
        for parameter, gradient, before in zip(own._parameters, own._gradients, held, strict=True):
            if gradient is not None:
                assert parameter.grad is not None
                gradient.copy_(parameter.grad)
            parameter.grad = before


class FakeStream:
    device = torch.device("cpu")

    def __init__(self, device: torch.device | None = None) -> None: ...

    def wait_stream(self, other: FakeStream) -> None: ...


@contextmanager
def fake_graph(*_: Any, **__: Any) -> Iterator[None]:
    yield


def put_cuda_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = captured_module.torch.cuda
    for name, fake in {
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": fake_graph,
        "graph": fake_graph,
        "CUDAGraph": FakeGraph,
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(cuda, name, fake)
    original = CapturedBackward._record

    def record(self: CapturedBackward, inputs: Any) -> None:
        original(self, inputs)
        assert isinstance(self._graph, FakeGraph)
        self._graph.recording = self

    monkeypatch.setattr(CapturedBackward, "_record", record)


@pytest.fixture
def _cuda_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    put_cuda_on_the_cpu(monkeypatch)


def train_recorded_and_not(folder: Path) -> None:
    """In one of several processes: a run with DDP, then a recorded one, which is the same."""
    config = run_config(gradient_accumulation=2, gradient_clipping=0.1)
    with join_processes("cpu") as processes, pytest.MonkeyPatch.context() as patch:
        weights, figures = trained(config, processes, False)
        put_cuda_on_the_cpu(patch)
        patch.setattr(step_module, "can_capture", lambda *_: True)
        # As a processor of another kind may draw them, which the main process's values replace.
        prepare = step_module.parallel.prepare_network

        def after_other_draws(objective: Any, *arguments: Any, **options: Any) -> Any:
            for parameter in objective.parameters():
                parameter.data += processes.rank
            return prepare(objective, *arguments, **options)

        patch.setattr(step_module.parallel, "prepare_network", after_other_draws)
        # A few parameters to a bucket.
        patch.setattr(distributed_module, "_BUCKET_BYTES", 4096)
        own_weights, own_figures = trained(config, processes, True)
        assert FakeGraph.replays > 0
        assert torch.equal(own_figures, figures)
        for own, expected in zip(own_weights, weights, strict=True):
            assert torch.equal(own, expected)
        torch.save(own_weights, folder / f"{processes.rank}.pt")


@pytest.mark.slow
def test_recorded_steps_of_two_processes_train_as_ddp(tmp_path: Path) -> None:
    in_processes(2, train_recorded_and_not, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_cuda_on_the_cpu")
class TestLogic:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_a_replayed_step_trains_as_the_plain_one(self, accumulation: int) -> None:
        config = run_config(gradient_accumulation=accumulation, gradient_clipping=0.1)
        FakeGraph.replays = 0
        plain, captured = (trained(config, CPU, capture) for capture in (False, True))
        assert FakeGraph.replays == STEPS * accumulation
        assert torch.equal(captured[1], plain[1])
        for own, expected in zip(captured[0], plain[0], strict=True):
            assert torch.equal(own, expected)

    def test_a_batch_of_another_size_is_computed_without_the_graph(self) -> None:
        config = run_config()
        training = TrainingStep(config, CPU)
        training.capture()
        training(0, batch(0))
        graph = training.captured
        assert graph is not None
        replayed: list[None] = []
        graph._graph.replay = lambda: replayed.append(None)  # type: ignore[method-assign,union-attr]
        inputs = (torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), torch.rand(2))
        losses = graph(*inputs, torch.randn(2, 3, 8, 8), None)
        assert not replayed and losses["total"].isfinite()
        assert all(p.grad is not None for p in training.model.parameters())

    def test_a_step_that_cannot_be_recorded_is_made_without(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        @contextmanager
        def out_of_memory(*_: Any, **__: Any) -> Iterator[None]:
            yield
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

        monkeypatch.setattr(captured_module.torch.cuda, "graph", out_of_memory)
        monkeypatch.setattr(CapturedBackward, "_record", RECORD)
        config = run_config(gradient_accumulation=2)
        plain = trained(config, CPU, False)
        with pytest.warns(UserWarning, match=r"cannot be recorded .*\(CUDA out of memory\.\)"):
            captured = trained(config, CPU, True)
        assert torch.equal(captured[1], plain[1])
        for own, expected in zip(captured[0], plain[0], strict=True):
            assert torch.equal(own, expected)


def test_what_asks_the_host_is_not_recorded() -> None:
    gpu = torch.device("cuda")
    plain = TrainingConfig(steps=1)
    assert can_capture(plain, Processes(0, 1, gpu))
    assert not can_capture(plain, CPU)
    assert can_capture(plain, Processes(0, 2, gpu))
    sharing = TrainingConfig(steps=1, distribution="fsdp")
    assert can_capture(sharing, Processes(0, 1, gpu))
    assert not can_capture(sharing, Processes(0, 2, gpu))
    recomputing = TrainingConfig(steps=1, recompute_activations=True)
    assert not can_capture(recomputing, Processes(0, 1, gpu))


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # in fp32 the decoder is the reference
def test_a_recorded_step_trains_as_the_plain_one(
    accumulation: int, compiled: bool, precision: str
) -> None:
    gpu = Processes(0, 1, torch.device("cuda"))
    config = run_config(gradient_accumulation=accumulation, compile=compiled, precision=precision)
    plain, captured = (trained(config, gpu, capture) for capture in (False, True))
    torch.testing.assert_close(captured[1], plain[1], rtol=1e-5, atol=1e-6)
    for own, expected in zip(captured[0], plain[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_what_waits_for_the_gpu_cannot_be_recorded() -> None:
    """And the GPU goes on as if nothing had been tried."""
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))

    def network(x: Tensor) -> dict[str, Tensor]:
        return {"total": (x * weight).sum() * float(x.sum())}

    captured = CapturedBackward(network, [weight], parts=1)
    x = torch.tensor([1.0, 2.0, 3.0], device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        captured(x)
    assert torch.cuda.current_stream() == stream
    torch.testing.assert_close(weight.grad, 6 * x)
    weight.grad = None
    captured(2 * x)
    torch.testing.assert_close(weight.grad, 24 * x)
    torch.cuda.empty_cache()  # which is an error while something is being recorded
