"""The benchmarks' own arithmetic: what they count, how they take turns, when they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import comparison, report, variants
from benchmarks.comparison import Compare, Comparison, Row, Subject, check_agreement
from benchmarks.inputs import normal, randomize
from benchmarks.machine import Floor, Machine
from benchmarks.memory import peak_memory, saved_for_backward
from benchmarks.settings import Settings
from benchmarks.timing import MIN_SAMPLE_SECONDS, Turns
from benchmarks.variants import AUTOCAST, BFLOAT16, FLOAT32, Variant
from benchmarks.work import (
    Images,
    Work,
    decoder_flops,
    decoder_work,
    loss_flops,
    loss_work,
    model_flops,
    model_work,
    parameter_count,
    sampling_work,
    text_flops,
    training_work,
)
from deco_fast import ops
from deco_fast.losses import flow_matching_loss, frequency_table
from deco_fast.models.config import DeCoConfig, DeCoT2IConfig
from deco_fast.models.deco import DeCo
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.decoder import PixelDecoder
from deco_fast.models.presets import PRESETS
from deco_fast.sampling.loop import sample

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = DeCoConfig(
    hidden_size=24, depth=2, num_heads=3, patch_size=4, decoder_hidden_size=16, decoder_depth=2
)
XL = PRESETS["deco-xl"].config


def counted(function: object) -> int:
    assert callable(function)
    # The fused attention of the CPU is unknown to torch's counter; the plain one is two products.
    # Nor can it see into a fused op.
    with (
        ops.use_backend("reference"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        function()
    return counter.get_total_flops()


# --- work


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("config", "images"), [(SMALL, Images(3, 8, 20)), (XL, Images(2, 64, 32))])
def test_decoder_flops_are_those_of_the_reference(
    config: DeCoConfig, images: Images, backward: bool
) -> None:
    with torch.device("meta"):
        decoder = PixelDecoder(config)
        x = torch.randn(images.batch, 3, images.height, images.width)
        length = images.tokens(config.patch_size)
        tokens = torch.randn(images.batch, length, config.hidden_size, requires_grad=True)

    def run() -> None:
        velocity = decoder(x, tokens)
        if backward:
            velocity.backward(torch.ones_like(velocity))

    assert counted(run) == decoder_flops(config, images, backward, folded_input=False)


def test_folding_the_input_saves_the_position_features() -> None:
    images = Images(1, 16, 16)
    saved = decoder_flops(SMALL, images, False, folded_input=False) - decoder_flops(
        SMALL, images, False
    )
    assert saved == 16 * 16 * (2 * 64 * 16 + 2 * 16 * 16)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("images", [Images(2, 32, 16), Images(1, 20, 13)])
def test_loss_flops_are_those_of_the_reference(images: Images, backward: bool) -> None:
    prediction = torch.randn(images.batch, 3, images.height, images.width, requires_grad=True)
    target, table = torch.randn_like(prediction), frequency_table()

    def run() -> None:
        total, _, _ = flow_matching_loss(prediction, target, table, 1.0)
        if backward:
            total.backward()

    # Reflected columns are transformed and coloured once: the colour comes before the padding.
    assert counted(run) == loss_flops(images, backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("config", "images"),
    [
        (SMALL, Images(2, 12, 16)),
        (PRESETS["deco-digits"].config, Images(4, 32, 32)),
        (replace(XL, depth=1), Images(1, 256, 256)),
    ],
)
def test_model_flops_are_those_of_the_reference(
    config: DeCoConfig, images: Images, backward: bool
) -> None:
    with torch.device("meta"):
        model = DeCo(config)
        x = torch.randn(images.batch, 3, images.height, images.width)
        t, y = torch.zeros(images.batch), torch.zeros(images.batch, dtype=torch.int64)

    def run() -> None:
        velocity = model(x, t, y)
        if backward:
            velocity.backward(torch.ones_like(velocity))

    assert counted(run) == model_flops(config, images, backward, folded_input=False)


def test_text_flops_are_those_of_the_reference() -> None:
    config = DeCoT2IConfig(24, 2, 3, patch_size=4, decoder_hidden_size=16, text_size=20)
    images = Images(2, 12, 16)
    with torch.device("meta"):
        model = DeCoT2I(config)
        inputs = torch.randn(2, 3, 12, 16), torch.zeros(2), torch.zeros(2, 128, 20)
    expected = model_flops(config, images, backward=False, folded_input=False)
    assert counted(lambda: model(*inputs)) == expected + 2 * text_flops(config)
    drawn = sampling_work(config, images, steps=3, guided_steps=2)
    one = model_flops(config, images, backward=False) + text_flops(config)
    assert drawn.flops == 5 * one


def test_sampling_flops_count_both_halves_of_guided_steps_only() -> None:
    model, images = DeCo(SMALL), Images(2, 8, 8)

    def run() -> None:
        sample(
            model,
            normal(2, 3, 8, 8),
            torch.tensor([0, 1]),
            steps=4,
            guidance_scale=2.0,
            guidance_interval=(0.3, 1.0),
        )

    executed = 6 * model_flops(SMALL, images, backward=False, folded_input=False)
    assert counted(run) == executed
    least = sampling_work(SMALL, images, steps=4, guided_steps=2)
    assert least.flops == 6 * model_flops(SMALL, images, backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_inputs_and_outputs(dtype: torch.dtype) -> None:
    images = Images(2, 16, 8)
    decoder = PixelDecoder(SMALL).to(dtype)
    x = torch.randn(2, 3, 16, 8, dtype=dtype)
    tokens = torch.randn(2, images.tokens(4), 24, dtype=dtype, requires_grad=True)
    velocity = decoder(x, tokens)
    velocity.sum().backward()
    weights = [tokens, *decoder.parameters()]

    def size(tensors: list[Tensor | None]) -> int:
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    forward = size([x, *weights, velocity])
    backward = size([x, *weights, velocity, *(weight.grad for weight in weights)])
    itemsize = dtype.itemsize
    assert decoder_work(SMALL, images, False, itemsize).bytes == forward
    assert decoder_work(SMALL, images, True, itemsize).bytes == forward + backward


def test_bytes_of_whole_tasks() -> None:
    images = Images(4, 256, 256)
    assert loss_work(images, backward=True).bytes == 36 * images.pixels
    assert loss_work(images, backward=False).bytes == 24 * images.pixels
    assert parameter_count(XL) == 682_282_851
    assert model_work(XL, images, 2).bytes == 2 * (682_282_851 + 6 * images.pixels)
    assert training_work(XL, images).bytes == 40 * 682_282_851 + 12 * images.pixels
    drawn = sampling_work(XL, images, steps=10, guided_steps=9, element_bytes=2)
    assert drawn.bytes == 20 * 682_282_851 + 24 * images.pixels


@pytest.mark.parametrize(("work", "floor"), [((6, 1), (2.0, "compute")), ((6, 8), (4.0, "memory"))])
def test_floor_is_the_slower_of_computing_and_moving(
    monkeypatch: pytest.MonkeyPatch, work: tuple[int, int], floor: tuple[float, str]
) -> None:
    machine = Machine(CPU)
    monkeypatch.setattr(machine, "gemm_rate", lambda dtype: 3.0)
    monkeypatch.setattr(machine, "copy_bandwidth", 2.0)
    assert machine.floor(Work(*work), torch.float32) == Floor(*floor)


def test_bf16_is_left_out_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(CPU)
    rates = {torch.float32: 100.0, torch.bfloat16: 3.0}
    monkeypatch.setattr(machine, "gemm_rate", rates.__getitem__)
    assert "3%" in str(machine.no_bf16)
    rates[torch.bfloat16] = 90.0
    del machine.no_bf16  # cached
    assert machine.no_bf16 is None


# --- timing and memory


def test_every_function_has_one_sample_a_round_and_none_is_always_first() -> None:
    order: list[str] = []

    def clock(function: object, calls: int) -> float:
        assert callable(function)
        function()
        return float(len(order))

    turns = Turns({name: partial(order.append, name) for name in "abc"}, clock)
    for _ in range(3):
        turns.round()
    assert order == list("abcbcacab")
    assert turns.samples == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


def test_a_short_function_is_called_often_enough_to_be_measured() -> None:
    calls: list[int] = []

    def clock(function: object, number: int) -> float:
        calls.append(number)
        return MIN_SAMPLE_SECONDS / 10

    turns = Turns({"short": lambda: None}, clock)
    assert turns.calibrate() == pytest.approx(MIN_SAMPLE_SECONDS)
    turns.round()
    assert calls == [1, 10]


def test_memory_kept_for_backward_is_counted_once_and_without_inputs() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> None:
        y = x.exp()  # keeps its result …
        z = y.view(10, 100) * 2  # … nothing …
        (z * y.view(10, 100)).sum().backward()  # … z, and y once more

    assert saved_for_backward(run, held=(x,)) == 2 * x.nbytes
    assert saved_for_backward(lambda: (x * x).sum().backward(), held=(x,)) == 0
    assert saved_for_backward(lambda: (x * x).sum().backward(), held=()) == x.nbytes


def test_peak_memory_is_that_of_the_call_alone() -> None:
    size = 64 * 2**20
    earlier = torch.zeros(2 * size, dtype=torch.uint8)
    del earlier
    peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 0.95 * size < peak < 1.5 * size  # the kernel's counters lag by some pages


# --- comparison


def test_wrong_results_are_refused() -> None:
    expected = {"velocity": torch.ones(4)}
    assert check_agreement("v", {"velocity": torch.ones(4) * 1.001}, expected, 0.01) < 0.002
    for wrong in (torch.ones(4) * 1.1, torch.tensor([1.0, 1.0, 1.0, float("nan")])):
        with pytest.raises(AssertionError, match="in velocity"):
            check_agreement("v", {"velocity": wrong}, expected, 0.01)
    with pytest.raises(AssertionError, match="other results"):
        check_agreement("v", {}, expected, 0.01)


class FakeBenchmark:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}
        self.group = ""

    def pedantic(self, function: object, rounds: int) -> None:
        assert callable(function)
        for _ in range(rounds):
            function()


def run_comparison(
    monkeypatch: pytest.MonkeyPatch,
    fused: float,
    outcomes: list[Comparison],
    benchmark: FakeBenchmark | None = None,
) -> Comparison:
    """Compare ``2·x`` with a "cpp" that multiplies by ``fused``."""
    benchmark = benchmark or FakeBenchmark()
    table = {"pixel_decoder": {"reference": None, "triton": "no GPU", "cpp": None}}
    monkeypatch.setattr(variants.ops, "backends", lambda: table)
    machine = Machine(CPU, quick=True)
    monkeypatch.setattr(machine, "no_compiler", "no compiler here")
    x = torch.ones(8, requires_grad=True)

    def build(variant: Variant) -> Subject:
        factor = fused if variant.backend == "cpp" else 2.0

        def run() -> dict[str, Tensor]:
            y = (x * factor).exp()
            y.sum().backward()
            return {"y": y.detach()}

        return Subject(run, held=(x,))

    Compare(benchmark, machine, 0.0, outcomes)(  # type: ignore[arg-type]
        "doubling",
        "8 values",
        op_names=("pixel_decoder",),
        precisions=(FLOAT32,),
        build=build,
        work=Work(8, 64),
        backward=True,
        compile_fused=False,
    )
    assert benchmark.extra_info == outcomes[0].to_json()
    return outcomes[0]


@pytest.mark.slow
def test_a_comparison_relates_variants_to_baseline_and_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = run_comparison(monkeypatch, 2.0, [])
    eager, compiled, fused = outcome.rows
    assert [row.variant for row in outcome.rows] == [
        "reference, eager, fp32",
        "reference, torch.compile, fp32",
        "cpp, eager, fp32",
    ]
    assert compiled.skipped == "no compiler here"
    assert compiled.median is None
    assert eager.speedup == 1.0
    assert eager.median is not None
    assert fused.median is not None
    assert fused.speedup == pytest.approx(eager.median / fused.median)
    assert fused.floor_fraction == pytest.approx(outcome.floor / fused.median)
    assert fused.saved_for_backward == 8 * 4
    assert fused.error == 0


def test_no_speed_is_claimed_for_a_wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Comparison] = []
    with pytest.raises(AssertionError, match=r"cpp, eager, fp32 is wrong.*in y"):
        run_comparison(monkeypatch, 2.01, outcomes)
    # And those of the others are kept.
    (outcome,) = outcomes
    eager, _, fused = outcome.rows
    assert eager.median is not None and eager.saved_for_backward is not None
    assert fused.median is None and fused.skipped is not None
    assert fused.skipped.startswith("AssertionError: cpp, eager, fp32 is wrong")


@pytest.mark.slow
def test_an_interrupted_comparison_keeps_what_it_has_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted(FakeBenchmark):
        def pedantic(self, function: object, rounds: int) -> None:
            super().pedantic(function, 2)
            raise KeyboardInterrupt

    outcomes: list[Comparison] = []
    with pytest.raises(KeyboardInterrupt):
        run_comparison(monkeypatch, 2.0, outcomes, Interrupted())
    (outcome,) = outcomes
    assert [row.rounds for row in outcome.rows] == [2, 0, 2]
    assert outcome.rows[2].speedup is not None


def test_only_the_eager_reference_is_excused_for_the_fault_of_torch() -> None:
    key = "gradient of blocks.0.norm.bias"
    eager = Variant("reference", False, AUTOCAST)
    assert comparison.is_fault_of_torch(eager, CPU, key)
    assert not comparison.is_fault_of_torch(eager, CPU, "gradient of blocks.0.mlp.0.bias")
    assert not comparison.is_fault_of_torch(eager, CPU, "gradient of blocks.0.q_norm.weight")
    assert not comparison.is_fault_of_torch(eager, torch.device("cuda"), key)
    for other in (
        Variant("reference", True, AUTOCAST),
        Variant("reference", False, FLOAT32),
        Variant("cpp", False, BFLOAT16),
    ):
        assert not comparison.is_fault_of_torch(other, CPU, key)


def test_a_backend_joins_when_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, dict[str, str | None]] = {
        op: {"reference": None, "triton": None, "cpp": None} for op in ("a", "b")
    }
    monkeypatch.setattr(variants.ops, "backends", lambda: table)
    machine = SimpleNamespace(device=CPU, no_compiler=None)

    def rows(compile_fused: bool) -> dict[str, str | None]:
        found = variants.variants(machine, ("a", "b"), (FLOAT32,), compile_fused)  # type: ignore[arg-type]
        return {variant.name: reason for variant, reason in found.items()}

    assert rows(compile_fused=False) == {
        "reference, eager, fp32": None,
        "reference, torch.compile, fp32": None,
        "cpp, eager, fp32": None,
    }
    assert "cpp, torch.compile, fp32" in rows(compile_fused=True)
    machine.no_compiler = "no compiler"
    assert rows(compile_fused=True)["cpp, torch.compile, fp32"] == "no compiler"
    table["b"]["cpp"] = "not built"
    assert rows(compile_fused=False)["cpp, eager, fp32"] == "b: not built"


def test_a_limited_variant_runs_with_fewer_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = pytest.importorskip("deco_fast._C", reason="the C++ extension is not built")
    monkeypatch.delenv("DECO_ISA", raising=False)
    best = extension.instruction_set()
    machine = SimpleNamespace(device=CPU)
    limited = variants.limited_variants(machine, "pixel_decoder", (FLOAT32,), "baseline")  # type: ignore[arg-type]
    if best == "baseline":
        assert not limited
        return
    ((variant, reason),) = limited.items()
    assert reason is None
    assert variant.name == "cpp limited to baseline, eager, fp32"
    assert not variant.is_baseline
    with variant.environment():
        assert extension.instruction_set() == "baseline"
    assert extension.instruction_set() == best
    assert not variants.limited_variants(machine, "pixel_decoder", (FLOAT32,), best)  # type: ignore[arg-type]


def test_all_weights_matter_to_the_results_that_are_compared() -> None:
    model = DeCo(SMALL)
    randomize(model)
    velocity = model(normal(2, 3, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 1]))
    velocity.square().sum().backward()
    assert 0.1 < float(velocity.detach().std()) < 10
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


# --- options and records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "choose cpu or cuda"),
        ({"batch": 0}, "at least 1"),
        ({"seconds": 0.0}, "above 0"),
    ],
)
def test_bad_options_are_told_before_anything_runs(
    options: dict[str, object], message: str
) -> None:
    defaults = {"device": "cpu", "batch": None, "seconds": 10.0, "trial": False}
    config = SimpleNamespace(getoption=(defaults | options).__getitem__)
    with pytest.raises(pytest.UsageError, match=message):
        Settings.from_options(config)  # type: ignore[arg-type]


def test_a_record_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    report.check_path(tmp_path / "figures.json")
    for path, message in (
        (tmp_path / "figures.csv", ".json or .md"),
        (tmp_path / "none" / "figures.md", "no folder"),
    ):
        with pytest.raises(pytest.UsageError, match=message):
            report.check_path(path)


def test_a_test_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(CPU, batch=1, seconds=1.0, trial=True)
    monkeypatch.setattr("benchmarks.settings.available_memory", lambda device: 10 * 2**30)
    settings.require_memory(9 * 2**30)
    with pytest.raises(pytest.skip.Exception, match=r"needs 11\.0 GiB"):
        settings.require_memory(10 * 2**30)


def test_the_table_leaves_out_empty_columns_and_states_why_rows_are_empty() -> None:
    outcome = Comparison("decoder, fp32", "batch 1", 2 * 10**9, 10**6, 0.01, "compute")
    outcome.rows = [
        Row("eager", True, rounds=9, median=0.05, minimum=0.04, maximum=0.06, peak_memory=2**20),
        Row("torch.compile", True, skipped="no compiler"),
        Row("cpp", False, rounds=9, median=0.02, minimum=0.02, maximum=0.03),
    ]
    outcome.fill_ratios()
    lines = report.describe_comparison(outcome).splitlines()
    assert "Least work 2 GFLOP, 1 MB: floor 10 ms (compute)." in lines[2]
    header, _, eager, compiled, fused = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]
    )
    assert "saved MiB" not in header
    assert dict(zip(header, eager, strict=True))["peak MiB"] == "1.0"
    assert dict(zip(header, compiled, strict=True))["remark"] == "skipped: no compiler"
    assert dict(zip(header, fused, strict=True)) | {"remark": ""} == {
        "variant": "cpp",
        "median ms": "20",
        "min – max ms": "20 – 30",
        "rounds": "9",
        "speed": "2.50×",
        "of floor": "50.0%",
        "peak MiB": "",
        "remark": "",
    }


def test_plain_pytest_does_not_collect_benchmarks(request: pytest.FixtureRequest) -> None:
    assert request.config.getini("testpaths") == ["tests"]


@pytest.mark.slow
def test_the_suite_runs_and_records_without_a_compiler(tmp_path: Path) -> None:
    figures, entries = tmp_path / "figures.json", tmp_path / "RECORDS.md"
    entries.write_text("# Records\n")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--trial"]
    options = ["--device=cpu", "--note=a trial", f"--record={figures}", f"--record={entries}"]
    done = subprocess.run(
        [*command, *options, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "CXX": str(tmp_path / "no-such-compiler")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    record = json.loads(figures.read_text(encoding="utf-8"))
    assert record["note"] == "a trial"
    assert record["failed"] == 0
    assert record["machine"]["copy_bytes_per_second"] > 0
    outcomes = {outcome["title"]: outcome["rows"] for outcome in record["comparisons"]}
    for title in (
        "pixel decoder, forward, fp32",
        "pixel decoder, forward + backward, fp32",
        "flow-matching loss, forward + backward, fp32",
        "training step, deco-digits, fp32",
        "sampling, deco-digits, fp32",
    ):
        eager, compiled = outcomes[title][:2]
        assert eager["median"] > 0
        assert eager["floor_fraction"] > 0
        assert "compiler" in compiled["skipped"]
        assert title in done.stdout
    text = entries.read_text(encoding="utf-8")
    assert text.startswith("# Records\n")
    assert "- note: a trial" in text
    assert all(f"### {title}" in text for title in outcomes)
