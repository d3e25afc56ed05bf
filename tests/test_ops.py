"""The registry's rule, its errors, and that torch.compile sees through the dispatch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from deco_fast import ops
from deco_fast.cli.sample import main as sample
from deco_fast.cli.train import main as train
from deco_fast.errors import UserError, nearest, run_command
from deco_fast.kernels import registry, report
from deco_fast.kernels.pixel_decoder.reference import (
    BlockParameters,
    PixelDecoderParameters,
)
from deco_fast.kernels.sources import fingerprint

PATCH, CHANNELS, HIDDEN = 4, 8, 12


@pytest.fixture
def parameters() -> PixelDecoderParameters:
    block = BlockParameters(
        norm_weight=torch.randn(CHANNELS),
        norm_bias=torch.randn(CHANNELS),
        modulation_weight=torch.randn(3 * CHANNELS, CHANNELS),
        modulation_bias=torch.randn(3 * CHANNELS),
        fc1_weight=torch.randn(CHANNELS, CHANNELS),
        fc1_bias=torch.randn(CHANNELS),
        fc2_weight=torch.randn(CHANNELS, CHANNELS),
        fc2_bias=torch.randn(CHANNELS),
    )
    return PixelDecoderParameters(
        upsample_weight=torch.randn(PATCH**2 * CHANNELS, HIDDEN),
        upsample_bias=torch.randn(PATCH**2 * CHANNELS),
        pixel_embedder_weight=torch.randn(CHANNELS, 3 + 64),
        pixel_embedder_bias=torch.randn(CHANNELS),
        input_proj_weight=torch.randn(CHANNELS, CHANNELS),
        input_proj_bias=torch.randn(CHANNELS),
        blocks=(block,),
        output_weight=torch.randn(3, CHANNELS),
        output_bias=torch.randn(3),
    )


@pytest.fixture(autouse=True)
def _nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever backend the environment forces on the other tests."""
    monkeypatch.setattr(registry, "_forced", None)
    monkeypatch.delenv("DECO_BACKEND", raising=False)
    monkeypatch.delenv("DECO_ISA", raising=False)


def _arguments(op: str, parameters: PixelDecoderParameters) -> tuple[object, ...]:
    image = torch.randn(2, 3, 8, 12)
    tokens = torch.randn(2, 6, HIDDEN)
    return {
        "linear_upsample": (
            tokens,
            parameters.upsample_weight,
            parameters.upsample_bias,
            PATCH,
        ),
        "pixel_decoder": (image, tokens, parameters, PATCH),
        "flow_matching_loss": (image, torch.randn_like(image), torch.rand(3, 8, 8), 0.5),
        "qk_norm_rope": (
            torch.randn(2, 6, 3 * 2 * 4),
            *torch.rand(2, 4),
            torch.rand(6, 2, 2),
            1e-6,
        ),
        "norm_modulate": (tokens, torch.rand(HIDDEN), *torch.rand(2, 2, 1, HIDDEN), 1e-6),
        "swiglu": (tokens, *torch.rand(2, 5, HIDDEN), torch.rand(HIDDEN, 5)),
    }[op]


def _add_implementation(
    monkeypatch: pytest.MonkeyPatch, op: str, backend: str, function: Callable[..., object]
) -> None:
    """Register as a contributor does: one module with a function of the op's name, one entry."""
    module = type(sys)("tests_fake_kernel")
    setattr(module, op, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry._SOURCES, (op, backend), module.__name__)
    for problem in ("triton_problem", "extension_problem"):
        monkeypatch.setattr(registry, problem, lambda: None)
    implementations, absent = registry._load()
    monkeypatch.setattr(registry, "_implementations", implementations)
    monkeypatch.setattr(registry, "_absent", absent)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("linear_upsample", [(12, 16, 8)]),
        ("pixel_decoder", [(2, 3, 8, 12)]),
        ("flow_matching_loss", [(), (), ()]),
        ("qk_norm_rope", [(2, 2, 6, 4)] * 3),
        ("norm_modulate", [(2, 6, HIDDEN)]),
        ("swiglu", [(2, 6, HIDDEN)]),
    ],
)
def test_each_op_is_the_reference(
    op: str, shapes: list[tuple[int, ...]], parameters: PixelDecoderParameters
) -> None:
    arguments = _arguments(op, parameters)
    result = getattr(ops, op)(*arguments)
    expected = registry._implementations[op]["reference"](*arguments)
    torch.testing.assert_close(result, expected)
    results = result if isinstance(result, tuple) else (result,)
    assert [tuple(tensor.shape) for tensor in results] == shapes


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(
    ("op", "position", "shape", "message"),
    [
        # The reference would have broadcast the first ones.
        ("flow_matching_loss", 1, (1, 3, 8, 12), "prediction and target must both be"),
        ("flow_matching_loss", 1, (2, 1, 8, 12), "prediction and target must both be"),
        ("flow_matching_loss", 2, (1, 8, 8), r"table must be \(3, 8, 8\), not \(1, 8, 8\)"),
        ("pixel_decoder", 0, (1, 3, 8, 12), r"takes tokens of \(1, 6, D\).*not \(2, 6, 12\)"),
        ("pixel_decoder", 0, (2, 3, 8, 14), "multiples of the patch size 4, not 8 and 14"),
        ("pixel_decoder", 0, (2, 4, 8, 12), r"x must be \(B, 3, H, W\), not \(2, 4, 8, 12\)"),
        ("pixel_decoder", 1, (2, 6, 9), r"tokens must be \(B, L, 12\), not \(2, 6, 9\)"),
        ("pixel_decoder", 1, (12, 12), r"tokens must be \(B, L, 12\), not \(12, 12\)"),
        ("linear_upsample", 0, (2, 6, 9), r"tokens must be \(B, L, 12\), not \(2, 6, 9\)"),
        ("linear_upsample", 2, (1,), r"must be \(p²·C, D\) and \(p²·C,\) with p = 4, not"),
    ],
)
def test_shapes_that_do_not_fit_are_one_line_on_every_backend(
    op: str,
    position: int,
    shape: tuple[int, ...],
    message: str,
    backend: str | None,
    parameters: PixelDecoderParameters,
) -> None:
    arguments = list(_arguments(op, parameters))
    arguments[position] = torch.randn(shape)
    forced = ops.use_backend(backend) if backend else nullcontext()
    with forced, pytest.raises(UserError, match=message) as refused:
        getattr(ops, op)(*arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("op", registry.OPS)
def test_a_fused_implementation_serves_its_device_alone(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.backend_for(op, "mps") == "reference"
    _add_implementation(monkeypatch, op, "triton", lambda *_: "triton")
    _add_implementation(monkeypatch, op, "cpp", lambda *_: "cpp")
    chosen = {device: registry.backend_for(op, device) for device in ("cpu", "cuda", "mps")}
    assert chosen == {"cpu": "cpp", "cuda": "triton", "mps": "reference"}
    assert registry.implementation(op, torch.zeros(1))() == "cpp"
    assert ops.backends()[op] == {"reference": None, "triton": None, "cpp": None}
    with ops.use_backend("reference"):
        assert registry.backend_for(op, "cuda") == "reference"


def test_use_backend_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    _add_implementation(monkeypatch, "pixel_decoder", "cpp", lambda *_: None)
    with pytest.raises(RuntimeError), ops.use_backend("cpp"):
        with ops.use_backend("reference"):
            assert ops.backend_for("pixel_decoder", "cpu") == "reference"
        assert ops.backend_for("pixel_decoder", "cpu") == "cpp"
        raise RuntimeError
    assert registry._forced is None


def test_blocks_of_use_backend_may_end_in_any_order() -> None:
    first, second = ops.use_backend("reference"), ops.use_backend("triton")
    first.__enter__()
    second.__enter__()  # as another thread would
    first.__exit__(None, None, None)
    assert registry._forced == "triton"
    second.__exit__(None, None, None)
    assert registry._forced is None


def test_a_compiled_function_may_hold_the_block() -> None:
    def backend_of(x: torch.Tensor) -> torch.Tensor:
        with ops.use_backend("reference"):
            forced = registry._forced == "reference"
        return x + (1 if forced and registry._forced is None else 0)

    compiled = torch.compile(backend_of, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(torch.zeros(1)) == 1
    assert registry._forced is None and not registry._blocks


def test_forcing_what_is_absent_names_op_backend_reason_and_remedy(
    monkeypatch: pytest.MonkeyPatch, parameters: PixelDecoderParameters
) -> None:
    monkeypatch.delitem(registry._implementations["linear_upsample"], "triton", raising=False)
    monkeypatch.setitem(registry._absent["linear_upsample"], "triton", "no luck today")
    arguments = _arguments("linear_upsample", parameters)
    with (
        ops.use_backend("triton"),
        pytest.raises(UserError, match=r"'triton' cannot compute linear_upsample: no luck.*force"),
    ):
        ops.linear_upsample(*arguments)


@pytest.mark.parametrize("problem", ["triton_problem", "extension_problem"])
def test_a_missing_dependency_is_the_reason(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = {"triton_problem": "triton", "extension_problem": "cpp"}[problem]
    monkeypatch.setitem(registry._SOURCES, ("pixel_decoder", backend), "no_such_module")
    monkeypatch.setattr(registry, problem, lambda: "it is not installed")
    monkeypatch.setattr(registry, "_extension_is_there", lambda: False)
    implementations, absent = registry._load()
    assert absent["pixel_decoder"][backend] == "it is not installed"
    assert "reference" in implementations["pixel_decoder"]


def test_the_problems_name_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(registry.triton_problem())
    monkeypatch.setitem(sys.modules, "deco_fast._C", None)
    assert "pip install --no-build-isolation" in str(registry.extension_problem())


class TestStaleExtension:
    """An extension that was built from other sources than the checkout's."""

    @pytest.fixture(autouse=True)
    def _other_sources(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pytest.importorskip("deco_fast._C", reason="the C++ extension is not built")
        monkeypatch.setattr(registry, "INTERPRETED", False)
        assert registry.extension_problem() is None
        (tmp_path / "kernel.cpp").write_text("int changed;")
        monkeypatch.setattr(registry, "_SOURCE_FOLDER", tmp_path)

    def test_is_not_used_and_warned_of_once(self) -> None:
        with pytest.warns(UserWarning, match=r"other sources.*pip install.*reference") as caught:
            implementations, absent = registry._load()
        assert len(caught) == 1
        for op in registry.OPS:
            assert "cpp" not in implementations[op]
            assert "built from other sources" in absent[op]["cpp"]

    def test_the_report_names_the_remedy(self, capsys: pytest.CaptureFixture[str]) -> None:
        report.main([])
        (line,) = (
            line for line in capsys.readouterr().out.splitlines() if line.startswith("C++ ext")
        )
        assert "built from other sources" in line
        assert "pip install --no-build-isolation -e ." in line

    def test_without_fingerprint_it_is_older_than_the_check(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from deco_fast import _C

        monkeypatch.delattr(_C, "sources")
        assert "other sources" in str(registry.extension_problem())


def test_the_fingerprint_depends_on_names_and_contents(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) is None  # an installed package has no sources
    (tmp_path / "a.cpp").write_text("1")
    (tmp_path / "notes.txt").write_text("no source")
    first = fingerprint(tmp_path)
    (tmp_path / "a.cpp").write_text("2")
    second = fingerprint(tmp_path)
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    assert len({first, second, fingerprint(tmp_path)}) == 3
    assert first is not None
    assert 0 <= first < 2**64


def test_an_unknown_backend_names_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'cuda'; choose reference, triton, cpp"):
        ops.use_backend("cuda").__enter__()
    monkeypatch.setattr(registry, "_forced", "cuda")  # as DECO_BACKEND=cuda does
    with pytest.raises(UserError, match="DECO_BACKEND: unknown backend 'cuda'"):
        ops.check_backend("pixel_decoder")


@pytest.mark.parametrize("op", registry.OPS)
def test_dispatch_traces_without_a_graph_break(op: str, parameters: PixelDecoderParameters) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    arguments = _arguments(op, parameters)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend=count)
    torch.testing.assert_close(compiled(*arguments), getattr(ops, op)(*arguments))
    compiled(*arguments)
    assert len(graphs) == 1


def test_a_compiled_op_follows_the_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    _add_implementation(monkeypatch, "linear_upsample", "cpp", lambda tokens, *_: tokens + 1)
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_upsample, fullgraph=True, backend="eager")
    tokens, weight, bias = torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1)
    assert compiled(tokens, weight, bias, 1).item() == 1
    with ops.use_backend("reference"):
        assert compiled(tokens, weight, bias, 1).item() == 0
    assert compiled(tokens, weight, bias, 1).item() == 1


@pytest.mark.slow
@pytest.mark.parametrize("op", registry.OPS)
def test_inductor_compiles_the_reference_and_its_gradient(
    op: str, parameters: PixelDecoderParameters
) -> None:
    def value(first: torch.Tensor, *rest: object) -> torch.Tensor:
        result = getattr(ops, op)(first, *rest)
        return (result[0] if isinstance(result, tuple) else result).square().sum()

    first, *rest = _arguments(op, parameters)
    assert isinstance(first, torch.Tensor)
    first.requires_grad_()
    (expected,) = torch.autograd.grad(value(first, *rest), first)
    try:
        (gradient,) = torch.autograd.grad(torch.compile(value, fullgraph=True)(first, *rest), first)
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler")
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def _run_report(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deco_fast.ops"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_report_lists_every_op_and_backend() -> None:
    result = _run_report()
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for op in registry.OPS:
        for backend, reason in ops.backends()[op].items():
            assert any(row.startswith(f"{op} {backend} {reason or 'available'}") for row in rows)
    assert f"torch {torch.__version__}" in rows
    assert "OpenMP threads" in result.stdout


def test_the_environment_variable_forces_a_backend() -> None:
    result = _run_report(DECO_BACKEND="cudnn")
    assert result.returncode == 2
    message = "DECO_BACKEND: unknown backend 'cudnn'; choose reference, triton, cpp"
    assert result.stderr == f"error: {message}\n"


def test_the_report_says_what_the_forced_backend_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(registry._implementations["pixel_decoder"], "triton", raising=False)
    monkeypatch.setitem(registry._absent["pixel_decoder"], "triton", "no luck today")
    for op in ("linear_upsample", "flow_matching_loss"):
        monkeypatch.setitem(registry._implementations[op], "triton", lambda *_: None)
    with ops.use_backend("triton"):
        assert report.main([]) == 2
    output = capsys.readouterr()
    assert "no luck today" in output.out  # the table comes all the same
    assert output.err.startswith("error: backend 'triton' cannot compute pixel_decoder: no luck")
    assert output.err.count("\n") == 1


class TestInstructionSet:
    """What the C++ extension detects, against what the kernel of the operating system says."""

    ORDER = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")

    @pytest.fixture
    def extension(self) -> object:
        return pytest.importorskip("deco_fast._C", reason="the C++ extension is not built")

    @pytest.fixture
    def instruction_set(self, extension: object) -> Callable[[], str]:
        return extension.instruction_set

    @pytest.fixture
    def listed(self) -> str:
        """The best of what the operating system says that the processor has."""
        try:
            with open("/proc/cpuinfo") as file:
                lines = [line.split(":")[1] for line in file if line.startswith("flags")]
        except FileNotFoundError:
            pytest.skip("no /proc/cpuinfo here")
        flags = set(lines[0].split()) if lines else set()
        if not {"avx2", "fma"} <= flags:
            return "baseline"
        if not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            return "avx2"
        if "avx512_bf16" not in flags:
            return "avx512"
        return "amx" if {"amx_tile", "amx_bf16"} <= flags else "avx512_bf16"

    def test_uses_the_fastest_that_the_system_lists(
        self, extension: Any, instruction_set: Callable[[], str], listed: str
    ) -> None:
        """Intel's bfloat16 without a matrix unit is slower than float32."""
        if listed == "avx512_bf16" and not extension.has_fast_bfloat16():
            with open("/proc/cpuinfo") as file:
                assert "GenuineIntel" in file.read()
            assert instruction_set() == "avx512"
        else:
            assert instruction_set() == listed
            # Of processors that are not x86 nothing is known.
            fast = ("avx512_bf16", "amx") if listed != "baseline" else ("baseline",)
            assert extension.has_fast_bfloat16() == (listed in fast)

    def test_deco_isa_names_what_there_is(
        self, instruction_set: Callable[[], str], listed: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for level, name in enumerate(self.ORDER):
            monkeypatch.setenv("DECO_ISA", name)
            if level <= self.ORDER.index(listed):
                assert instruction_set() == name
            else:
                with pytest.raises(ValueError, match=f"this CPU has no {name}; choose baseline"):
                    instruction_set()

    def test_deco_isa_unknown(
        self, instruction_set: Callable[[], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        detected = instruction_set()
        monkeypatch.setenv("DECO_ISA", "sse9")
        with pytest.raises(ValueError, match="unknown instruction set 'sse9'; choose baseline"):
            instruction_set()
        monkeypatch.setenv("DECO_ISA", "")
        assert instruction_set() == detected

    def test_commands_say_so_in_one_line(
        self,
        extension: object,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("DECO_ISA", "sse9")
        for command in (report.main, sample, train):
            assert command([]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: DECO_ISA: unknown instruction set 'sse9'")
            assert error.count("\n") == 1


def test_the_report_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--nonsense"]) == 2
    assert "error: unknown option '--nonsense'" in capsys.readouterr().err


class TestRunCommand:
    @pytest.mark.parametrize(
        ("stop", "status", "stderr"),
        [
            (UserError("no such\n  file; give another"), 2, "error: no such file; give another\n"),
            (KeyboardInterrupt(), 130, "interrupted\n"),
            (SystemExit(0), 0, ""),
            (SystemExit(None), 0, ""),
            (SystemExit(2), 2, ""),
            (SystemExit("that is wrong"), 2, "error: that is wrong\n"),
        ],
    )
    def test_status_and_message(
        self,
        stop: BaseException,
        status: int,
        stderr: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        @run_command
        def main() -> int:
            raise stop

        assert main() == status
        assert capsys.readouterr().err == stderr

    def test_passes_arguments_and_status(self) -> None:
        @run_command
        def main(argv: list[str] | None = None) -> int | None:
            return len(argv) if argv else None

        assert main(["a", "b", "c"]) == 3
        assert main() == 0

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
            MemoryError(),
        ],
        ids=["GPU", "CPU", "Python"],
    )
    def test_too_little_memory_is_one_line(
        self, error: Exception, capsys: pytest.CaptureFixture[str]
    ) -> None:
        @run_command
        def main() -> int:
            raise error

        assert main() == 2
        said = capsys.readouterr().err
        assert said.startswith("error: out of memory (") and said.count("\n") == 1
        assert said.endswith("choose smaller batches or images\n")

    def test_a_fault_of_ours_keeps_its_traceback(self) -> None:
        @run_command
        def main() -> int:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            main()


def test_nearest_names_the_likely_choice_or_all() -> None:
    assert nearest("eulr", ["heun", "euler"]) == "; did you mean 'euler'?"
    assert nearest("zzz", ["heun", "euler"]) == "; choose euler, heun"
