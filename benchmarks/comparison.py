"""One comparison: check that its variants agree, let them take turns, hold them to the floor."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.machine import Machine
from benchmarks.memory import peak_memory, saved_for_backward
from benchmarks.timing import Turns
from benchmarks.variants import FLOAT32, REFERENCE, Precision, Variant, variants
from benchmarks.work import Work

# Relative error against the float32 reference above which a variant is wrong and not just rounded.
FLOAT32_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 5e-2

DTYPE_LABEL = {torch.float32: "fp32", torch.bfloat16: "bf16"}

MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Subject:
    """What one variant runs.

    Attributes:
        run: one call of the task; returns its results by name.
        held: weights and inputs, which are in memory anyway.
        waited: the median of the seconds that a call has waited for data (the first one waits for
            the workers to start); None where it needs none.
        graph_bytes: where CUDA graphs run, the memory that stays taken for them and is not seen in
            a call; it gives None where nobody can say.
    """

    run: Callable[[], dict[str, Tensor]]
    held: tuple[Tensor, ...] = ()
    waited: Callable[[], float] | None = None
    graph_bytes: Callable[[], int | None] | None = None


@dataclass
class Row:
    """A variant's figures; times in seconds, memory in bytes."""

    variant: str
    is_baseline: bool
    skipped: str | None = None
    remark: str | None = None
    rounds: int = 0
    median: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    speedup: float | None = None
    floor_fraction: float | None = None
    data_wait_share: float | None = None
    saved_for_backward: int | None = None
    peak_memory: int | None = None
    error: float | None = None


@dataclass
class Comparison:
    """The outcome of one test.

    Attributes:
        title: the task and the precision.
        conditions: shapes and batch.
        flops, bytes: the least work (see work.py).
        floor: seconds that it takes at the machine's measured peaks.
        bound: "compute" or "memory", whichever sets the floor.
        rows: the variants, in the order they were named.
    """

    title: str
    conditions: str
    flops: int
    bytes: int
    floor: float
    bound: str
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain types."""
        return asdict(self)

    def fill_ratios(self) -> None:
        """Relate the medians to the best baseline and to the floor."""
        timed = [row for row in self.rows if row.median is not None]
        baselines = [row.median for row in timed if row.is_baseline and row.median is not None]
        for row in timed:
            assert row.median is not None
            row.floor_fraction = self.floor / row.median
            if baselines:
                row.speedup = min(baselines) / row.median


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ in float64; not a number where a value is not."""
    expected = expected.double()
    difference = torch.linalg.vector_norm(result.double() - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp(min=1e-12))


def check_agreement(
    name: str, results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> float:
    """The largest relative error of a variant's results.

    Raises:
        AssertionError: it is above the tolerance, or a result is missing.
    """
    assert results.keys() == expected.keys(), f"{name} returns other results than the reference"
    errors = {key: relative_error(results[key], expected[key]) for key in expected}
    # Also false for a NaN, which no comparison with > would find.
    wrong = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not wrong, (
        f"{name} is wrong, so its speed means nothing: relative error "
        + ", ".join(f"{error:.1e} in {key}" for key, error in wrong.items())
        + f" (allowed {tolerance:.0e})"
    )
    return max(errors.values())


def is_fault_of_torch(variant: Variant, device: torch.device, result: str) -> bool:
    """Whether torch itself gets this result wrong, which is no reason to stop comparing with it.

    On the CPU the backward of `F.layer_norm` sums the gradients of weight and bias over the rows
    in the input's dtype. In bf16, for the 65,536 pixels of a 256×256 image, they are a quarter
    off and more (torch 2.13). torch.compile, which has its own backward, is right.
    """
    return (
        variant.is_baseline
        and not variant.compiled
        and device.type == "cpu"
        and variant.precision.compute_dtype == torch.bfloat16
        and result.endswith((".norm.weight", ".norm.bias"))
    )


class Compare:
    """The fixture ``compare``: runs a comparison under pytest-benchmark and keeps the outcome."""

    def __init__(
        self,
        benchmark: BenchmarkFixture,
        machine: Machine,
        seconds: float,
        outcomes: list[Comparison],
    ) -> None:
        self._benchmark = benchmark
        self._machine = machine
        self._seconds = seconds
        self._outcomes = outcomes

    def __call__(
        self,
        title: str,
        conditions: str,
        *,
        op_names: Sequence[str],
        precisions: Sequence[Precision],
        build: Callable[[Variant], Subject],
        work: Work,
        backward: bool,
        compile_fused: bool,
        bfloat16_tolerance: float = BFLOAT16_TOLERANCE,
        rows: dict[Variant, str | None] | None = None,
        min_rounds: int = MIN_ROUNDS,
    ) -> Comparison:
        """Compare all variants of one task.

        Args:
            title: the task.
            conditions: shapes and batch, for people.
            op_names: the ops that the task calls.
            precisions: whose variants stand in one table.
            build: makes a variant's subject; the same inputs and weights every time.
            work: the least work of one call.
            backward: whether a call makes gradients, and so keeps tensors for them.
            compile_fused: whether torch.compile has anything to do around a fused op.
            bfloat16_tolerance: relative error up to which a variant in bf16 counts as right.
            rows: other variants than all backends, and why one cannot be timed here.
            min_rounds: of the measurement, whatever its time.

        A variant that fails has its error in its row, and the others are timed before it is raised.

        Raises:
            AssertionError: a variant's results differ from the float32 reference's.
        """
        machine = self._machine
        compute_dtype = precisions[0].compute_dtype
        if compute_dtype == torch.bfloat16 and machine.no_bf16:
            pytest.skip(machine.no_bf16)
        tolerance = bfloat16_tolerance if compute_dtype == torch.bfloat16 else FLOAT32_TOLERANCE
        if rows is None:
            rows = variants(machine, op_names, precisions, compile_fused)
        label = DTYPE_LABEL[compute_dtype]
        prepared, failures = self._prepare(rows, build, tolerance)
        comparison = Comparison(
            f"{title}, {label}",
            conditions,
            work.flops,
            work.bytes,
            *machine.floor(work, compute_dtype),
        )
        skipped = {variant: reason for variant, reason in rows.items() if reason is not None}
        skipped |= {variant: _first_line(error) for variant, error in failures.items()}
        try:
            self._measure(comparison, prepared, backward, min_rounds)
        finally:
            # What there is counts, also where the rest fails or is interrupted.
            comparison.rows += [
                Row(variant.name, variant.is_baseline, reason)
                for variant, reason in skipped.items()
            ]
            order = [variant.name for variant in rows]
            comparison.rows.sort(key=lambda row: order.index(row.variant))
            comparison.fill_ratios()
            self._benchmark.group = comparison.title
            self._benchmark.extra_info.update(comparison.to_json())
            if comparison.rows:
                self._outcomes.append(comparison)
        for error in failures.values():
            raise error
        return comparison

    def _prepare(
        self,
        rows: dict[Variant, str | None],
        build: Callable[[Variant], Subject],
        tolerance: float,
    ) -> tuple[list[_Prepared], dict[Variant, Exception]]:
        """Build, compile and check every variant that can be timed here; and why one cannot."""
        # Each comparison compiles its own graphs: torch.compile stops after a few per function.
        torch.compiler.reset()
        gc.collect()
        runnable = [variant for variant, reason in rows.items() if reason is None]
        reference = Variant(REFERENCE, compiled=False, precision=FLOAT32)
        expected = _runner(reference, build(reference))()

        prepared, failures = list[_Prepared](), dict[Variant, Exception]()
        for variant in runnable:
            try:
                prepared.append(self._prepare_one(variant, build(variant), expected, tolerance))
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold its weights and results
                failures[variant] = error
        return prepared, failures

    def _prepare_one(
        self, variant: Variant, subject: Subject, expected: dict[str, Tensor], tolerance: float
    ) -> _Prepared:
        run = _runner(variant, subject)
        results = run()
        excused = {
            key: relative_error(results.pop(key), value)
            for key, value in expected.items()
            if is_fault_of_torch(variant, self._machine.device, key)
        }
        required = {key: value for key, value in expected.items() if key not in excused}
        error = check_agreement(variant.name, results, required, tolerance)
        remark = None
        if excused and max(excused.values()) > tolerance:
            remark = (
                f"torch's layer_norm: its gradients are {max(excused.values()):.0%} off in bf16"
            )
        return _Prepared(variant, subject, run, error, remark)

    def _measure(
        self, comparison: Comparison, prepared: list[_Prepared], backward: bool, min_rounds: int
    ) -> None:
        """Add a row for every variant."""
        if not prepared:
            return
        machine = self._machine
        turns = Turns(
            {one.variant.name: one.run for one in prepared},
            machine.clock,
            machine.clock.min_sample_seconds,
        )
        fitting = int(self._seconds / turns.calibrate())
        rounds = fitting if self._seconds == 0 else min(max(fitting, min_rounds), MAX_ROUNDS)
        try:
            self._benchmark.pedantic(turns.round, rounds=max(rounds, 1))
        finally:
            timed = [one for one in prepared if turns.samples[one.variant.name]]
            rows = [_timed_row(one, turns.samples[one.variant.name]) for one in timed]
            comparison.rows += rows
        for one, row in zip(timed, rows, strict=True):
            graph_bytes = one.subject.graph_bytes
            if backward and graph_bytes is None:
                row.saved_for_backward = saved_for_backward(one.run, one.subject.held)
            peak, held = peak_memory(one.run, machine.device), graph_bytes() if graph_bytes else 0
            row.peak_memory = None if peak is None or held is None else peak + held


class _Prepared(NamedTuple):
    """A variant that is right, and ready to be timed."""

    variant: Variant
    subject: Subject
    run: Callable[[], dict[str, Tensor]]
    error: float
    remark: str | None


def _timed_row(one: _Prepared, samples: list[float]) -> Row:
    row = Row(one.variant.name, one.variant.is_baseline, remark=one.remark, error=one.error)
    row.rounds = len(samples)
    row.median = statistics.median(samples)
    row.minimum, row.maximum = min(samples), max(samples)
    if one.subject.waited is not None:
        row.data_wait_share = one.subject.waited() / row.median
    return row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _runner(variant: Variant, subject: Subject) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        with variant.environment():
            return subject.run()

    return run
