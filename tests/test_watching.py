"""What is reported of a run, and the ways to spend less memory on it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deco_fast.cli.train import main
from deco_fast.config import load_config
from deco_fast.training.batches import Batches, open_dataset
from deco_fast.training.distributed import Processes
from deco_fast.training.figures import Window
from deco_fast.training.peaks import device_peak, peak_flops
from deco_fast.training.step import TrainingStep
from deco_fast.training.work import count_work

CPU = Processes(0, 1, torch.device("cpu"))


def run(folder: Path, *options: str) -> int:
    arguments = [*TINY, "--training.steps=4", "--device=cpu", f"--out={folder}"]
    return main([*arguments, *options])


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    figures = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert figures.keys() == {
        "loss/total",
        "loss/flow_matching",
        "loss/frequency",
        "gradient_norm",
        "learning_rate",
        "speed/images_per_second",
        "speed/teraflops_per_second",
        "speed/data_wait_share",
        "memory/peak_gib",
    }
    assert all(len(values) == 2 for values in figures.values())
    # A processor's peak is not in the table: no MFU.
    flops = count_work(load_config("deco-digits", TINY)).training_flops
    for rate, teraflops in zip(
        figures["speed/images_per_second"], figures["speed/teraflops_per_second"], strict=True
    ):
        assert teraflops == pytest.approx(rate * flops / 1e12, rel=1e-5)
    for total, one, other in zip(
        *(figures[f"loss/{name}"] for name in ("total", "flow_matching", "frequency")), strict=True
    ):
        assert total == pytest.approx(one + other, rel=1e-5)
    assert all(0 <= share < 1 for share in figures["speed/data_wait_share"])
    assert [tag for tag in events.Tags()["images"]] == ["samples"]


def test_a_window_is_a_mean_over_its_steps() -> None:
    window = Window()
    for value in (1.0, 3.0):
        window.add({"loss": value})
    assert window.report()["loss"] == 2
    window.add({"loss": 5.0})
    window.waited += 1e9
    report = window.report()
    assert report["loss"] == 5
    assert report["speed/data_wait_share"] > 1
    assert window.waited == 0


def test_peaks_are_dense() -> None:
    assert peak_flops("NVIDIA H200", bf16=True) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", bf16=True) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", bf16=False) == 19.5e12
    assert peak_flops("NVIDIA Nothing", bf16=True) is None
    assert device_peak(torch.device("cpu"), bf16=True) is None


def test_wandb_takes_what_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, object]] = []
    ended: list[int] = []

    def init(**options: object) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(finish=lambda exit_code: ended.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder, steps in (("a/run", 2), ("a/run", 4), ("b/run", 2)):
        more = (f"--training.steps={steps}", "--training.schedule=constant")
        assert run(tmp_path / folder, "--output.wandb_project=deco", *more) == 0
    assert all(o["project"] == "deco" and o["sync_tensorboard"] for o in begun)
    # A run that goes on does so in the same place, and no other run does.
    first, again, other = (str(options["id"]) for options in begun)
    assert first == again != other
    assert first.startswith("run-") and other.startswith("run-")
    assert ended == [0, 0, 0]


def test_wandb_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(tmp_path / "run", "--output.wandb_project=deco") == 2
    assert "pip install 'deco-fast[train]'" in capsys.readouterr().err


def test_recomputed_activations_change_memory_and_nothing_else() -> None:
    gradients, kept = [], []
    for recompute in (False, True):
        config = load_config(
            "deco-digits",
            [*TINY, "--model.depth=4", f"--training.recompute_activations={recompute}"],
        )
        training = TrainingStep(config, CPU)
        torch.nn.init.normal_(training.model.decoder.output.weight)
        batch = next(Batches(open_dataset(config), config, CPU, 0))
        y, t, noise = training.draws(0, batch)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = training.objective(batch.images, y, t, noise)["total"]
        loss.backward()
        gradients.append({n: p.grad for n, p in training.model.named_parameters()})
        kept.append(sum(sizes.values()))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert kept[1] < 0.8 * kept[0]
