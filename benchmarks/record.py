"""The record of a machine: tests and benchmarks, one command, in pieces that save as they go.

    python -m benchmarks.record OUT                 on a GPU: everything, about half an hour
    python -m benchmarks.record OUT --minutes 9     what fits; typed again it goes on
    python -m benchmarks.record OUT --device cpu --trial   does the script work?

Each piece is a process of its own that ends within ten minutes or is ended, and leaves a folder
in OUT: its output, its exit status, its figures. A piece that has passed is not run again; a folder
is of one commit and device. At the end, and after every piece, `record.json` and `record.md` hold
all figures there are.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.comparison import Comparison, Row
from benchmarks.machine import commit
from benchmarks.models import ModelTable, describe_models
from benchmarks.profile_step import describe_profile
from benchmarks.report import describe_comparison, describe_machine
from deco_fast.errors import UserError, run_command
from deco_fast.sampling.writers import check_writable

ROOT = Path(__file__).resolve().parents[1]
PIECE_SECONDS = 570
"""After which a piece is ended."""

SECONDS_TO_SAVE = 20
"""That a piece then has to write what it knows."""

FIGURES = "figures.json"
STATUS = "status.json"
LOG = "log.txt"
OF = "of.txt"


@dataclass(frozen=True)
class Piece:
    """One process.

    Attributes:
        name: of its folder.
        command: what it runs, in the repository's root.
        seconds: that it is expected to take on an H200; it is not begun with less time left.
        environment: variables of its own.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


def pieces(device: str, trial: bool, out: Path) -> Iterator[Piece]:
    """All pieces, in the order of their worth: what is wrong first, what is slow next."""
    python = sys.executable
    yield Piece(
        "install",
        (python, "setup.py", "build_ext", "--inplace"),
        120,
        {"DECO_REQUIRE_EXTENSION": "1"},
    )
    yield Piece("backends", (python, "-m", "deco_fast.ops"), 20)
    gpu_tests = (python, "-m", "pytest", "-q", "-rf", "-m", "gpu", "--durations", "10")
    shared = ("--numprocesses", "6", "--dist", "loadscope")
    if device == "cuda":
        kernels = {"DECO_BACKEND": "triton"}
        model = (*gpu_tests, *shared, "tests", "--ignore", "tests/kernels")
        yield Piece("tests-kernels", (*gpu_tests, *shared, "tests/kernels"), 300)
        yield Piece("tests-model", model, 300)
        yield Piece("tests-model-triton", model, 300, kernels)
        if sanitizer := shutil.which("compute-sanitizer"):
            check = (sanitizer, "--tool", "memcheck", "--error-exitcode", "1")
            yield Piece("memcheck", (*check, *gpu_tests, "tests/kernels", "-k", "float32"), 400)

    def benchmark(name: str, test: str, *options: str, seconds: int) -> Piece:
        figures = ("--record", str(out / name / FIGURES))
        base = (python, "-m", "pytest", "-q", "--benchmark-only", "--device", device)
        mode = ("--trial",) if trial else ()
        return Piece(name, (*base, *mode, test, *options, *figures), seconds)

    profile = (python, "-m", "benchmarks.profile_step", str(out / "profile" / FIGURES))
    if trial:
        profile += ("--config", "deco-digits", "--ways", "reference", "fused")
        profile += ("--set", "training.compile=false", "--batch", "2", "--steps", "2")
    yield Piece("profile", (*profile, "--device", device), 400)
    batch = () if trial else ("--batch", "32")
    for precision in ("bf16", "fp32"):
        test = "benchmarks/test_decoder.py"
        yield benchmark(f"decoder-{precision}", test, "-k", precision, *batch, seconds=130)
    yield benchmark("loss", "benchmarks/test_loss.py", *batch, seconds=90)
    for model in ("deco-digits",) if trial else ("deco-l", "deco-xl"):
        yield benchmark(
            f"training-{model}",
            "benchmarks/test_training.py",
            *("-k", f"{model}-bf16", "--paper"),
            *batch,
            seconds=300,
        )
    yield benchmark(
        "models",
        "benchmarks/test_models.py",
        *(("-k", "laptop and bf16") if trial else ("-k", "L-bf16", "--paper")),
        *batch,
        seconds=500,
    )
    if trial:
        yield benchmark(
            "sampling", "benchmarks/test_sampling.py", "-k", "deco-digits and bf16", seconds=60
        )
    else:
        for size, case in ((256, "deco-xl-recommended"), (512, "deco-xl-512")):
            for images in (1, 16, 64):
                yield benchmark(
                    f"sampling-{size}-batch{images}",
                    "benchmarks/test_sampling.py",
                    *("-k", f"{case} and bf16", "--paper", "--batch", str(images)),
                    seconds={1: 240, 16: 100 if size == 256 else 240, 64: 400}[images],
                )
    for start in ("cold", "second"):
        command = (python, "-m", "benchmarks.cold_start", "--device", device)
        if trial:
            command += ("--model", "deco-digits")
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(out / "start-cold" / "inductor")}
        yield Piece(f"start-{start}", (*command, str(out / f"start-{start}" / FIGURES)), 120, cache)


def run_piece(piece: Piece, out: Path, seconds: float) -> int:
    """Run it in its folder's log; its exit status, 124 where it was ended."""
    folder = out / piece.name
    folder.mkdir(parents=True, exist_ok=True)
    # Before what is there already, such as a folder of packages that were carried along.
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }
    started = time.monotonic()
    with (folder / LOG).open("w", encoding="utf-8") as log:
        print(shlex.join(piece.command), file=log, flush=True)
        try:
            status = _run(piece.command, environment | piece.environment, log, seconds)
        except subprocess.TimeoutExpired:
            status = 124
    result = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    (folder / STATUS).write_text(json.dumps(result) + "\n", encoding="utf-8")
    return status


def _run(command: Sequence[str], environment: dict[str, str], log: IO[str], seconds: float) -> int:
    """Its exit status. What it has started ends with it, for that would disturb the next piece.

    Raises:
        subprocess.TimeoutExpired: it took too long, was interrupted, which lets pytest save what it
            has, and killed if it went on.
    """
    # Of a shell's background job, and what it starts would be deaf too.
    deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if deaf:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if deaf:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with process:
        try:
            return process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            _signal_all(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_SAVE)
            raise
        finally:
            _signal_all(process, signal.SIGKILL)


def _signal_all(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the group of a process, which may be left where the process itself has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def passed(piece: Piece, out: Path) -> bool:
    """Whether it has run before, and well."""
    try:
        status: int = json.loads((out / piece.name / STATUS).read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError):
        return False
    return status == 0


def gather(names: Sequence[str], out: Path) -> dict[str, Any]:
    """All that the pieces have left, as one record."""
    record: dict[str, Any] = {
        "pieces": {},
        "comparisons": [],
        "models": [],
        "profiles": {},
        "starts": {},
    }
    for name in names:
        try:
            record["pieces"][name] = json.loads((out / name / STATUS).read_text(encoding="utf-8"))
            figures = json.loads((out / name / FIGURES).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is none, or half of one
            continue
        if "comparisons" in figures:
            for key in ("date", "commit", "machine"):
                record.setdefault(key, figures[key])
            # A piece measures the rates that it needs.
            rates = figures["machine"]["gemm_flops_per_second"]
            record["machine"]["gemm_flops_per_second"].update(rates)
            record["comparisons"] += figures["comparisons"]
            record["models"] += figures.get("models", [])
        elif "profile" in figures:
            record["profiles"][name] = figures["profile"]
        else:
            record["starts"][name] = figures
    return record


def describe(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [f"# Record of {record.get('date', '')[:10]}", ""]
    if "machine" in record:
        versions = ", ".join(f"{k} {v}" for k, v in record["machine"]["versions"].items())
        lines += [
            f"- commit: {record['commit']}",
            f"- machine: {describe_machine(record['machine'])}; {record['machine']['system']}",
            f"- versions: {versions}",
        ]
    for name, start in record["starts"].items():
        lines.append(
            f"- {name}: {start['model']}, first image after {start['first_image_seconds']:.1f} s, "
            f"of which compiling {start['warm_up_seconds']:.1f} s"
        )
    lines += ["", "| piece | status | seconds |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {piece['status']} | {piece['seconds']:.0f} |"
        for name, piece in record["pieces"].items()
    ]
    for fields in record["comparisons"]:
        comparison = Comparison(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})
        lines += ["", describe_comparison(comparison)]
    for name, times in record.get("profiles", {}).items():
        lines += ["", f"### {name} of a training step", "", describe_profile(times)]
    for table in record.get("models", ()):
        lines += ["", describe_models(ModelTable.from_json(table))]
    return "\n".join(lines) + "\n"


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the record")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--trial", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="of all pieces these")
    return parser.parse_args(argv)


def _claim(out: Path, device: str) -> None:
    """See that the folder's figures are of this commit and device, or shall be.

    Raises:
        UserError: they are of others.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    this = f"commit {commit()} on {name}"
    file = out / OF
    if not file.exists():
        file.write_text(f"{this}\n", encoding="utf-8")
    elif (other := file.read_text(encoding="utf-8").strip()) != this:
        raise UserError(f"{out} is the record of {other}, and this is {this}: choose another OUT")


@run_command
def main(argv: list[str] | None = None) -> int:
    """Run what has not passed yet; 1 if a piece fails or is left over.

    Raises:
        UserError: there is no GPU, or no such piece, or OUT cannot be written, or is of another
            commit or device.
    """
    options = _options(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here: --device cpu --trial tries the script out")
    out = options.out.resolve()
    chosen = list(pieces(options.device, options.trial, out))
    names = [piece.name for piece in chosen]
    for name in options.only or ():
        if name not in names:
            raise UserError(f"--only {name}: there is no such piece; choose {', '.join(names)}")
    check_writable(out, "OUT")
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, options.device)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    incomplete = False
    for piece in chosen:
        if options.only and piece.name not in options.only:
            continue
        if passed(piece, out):
            print(f"{piece.name:<24} passed before", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < piece.seconds:
            print(f"{piece.name:<24} left for another time", flush=True)
            incomplete = True
            continue
        status = run_piece(piece, out, min(PIECE_SECONDS, left))
        incomplete |= status != 0
        word = {0: "passed", 124: "ended: too slow"}.get(status, f"failed with {status}")
        print(f"{piece.name:<24} {word}: {out / piece.name / LOG}", flush=True)
        record = gather(names, out)
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (out / "record.md").write_text(describe(record), encoding="utf-8")
    return int(incomplete)


if __name__ == "__main__":
    sys.exit(main())
