"""Options, fixtures and the summary of the benchmarks."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import report
from benchmarks.comparison import Compare, Comparison
from benchmarks.machine import Machine, commit
from benchmarks.models import ModelTable, describe_models
from benchmarks.settings import Settings

RECORD_FORMAT = 1


@dataclass
class Session:
    """What the tests of a session share."""

    settings: Settings
    machine: Machine
    outcomes: list[Comparison]
    model_tables: list[ModelTable]


_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deco_fast")
    group.addoption("--paper", action="store_true", help="also the paper's models, DeCo-L and -XL")
    group.addoption("--batch", type=int, help="batch of the tests at DeCo-XL shapes")
    group.addoption("--device", help="cpu or cuda (default: a GPU where there is one)")
    group.addoption(
        "--seconds", type=float, default=5.0, help="for the rounds of one comparison (default 5)"
    )
    group.addoption(
        "--record",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the figures to FILE.json, or append an entry to FILE.md; may be repeated",
    )
    group.addoption("--note", default="", help="a remark for the record")
    group.addoption("--trial", action="store_true", help="tiny shapes: does the suite work?")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "paper: the paper's models; only with --paper")
    # pytest-benchmark's own table would show one row per comparison, the time of a whole round.
    config.option.benchmark_quiet = True
    # Told now and not after ten minutes of measuring.
    for path in config.getoption("record"):
        report.check_path(path)
    settings = Settings.from_options(config)
    machine = Machine(settings.device, quick=settings.trial)
    config.stash[_SESSION] = Session(settings, machine, [], [])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("paper"):
        for item in items:
            if "paper" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a large model: add --paper"))


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    """The command line's settings."""
    return request.config.stash[_SESSION].settings


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Machine:
    """The device that everything runs on, and what it can do."""
    return request.config.stash[_SESSION].machine


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> list[Comparison]:
    """The session's comparisons, for a test that makes its own."""
    return request.config.stash[_SESSION].outcomes


@pytest.fixture
def model_tables(request: pytest.FixtureRequest) -> list[ModelTable]:
    """The session's tables of whole models."""
    return request.config.stash[_SESSION].model_tables


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Compare:
    """Runs a comparison and keeps its outcome for the summary."""
    session = request.config.stash[_SESSION]
    return Compare(benchmark, session.machine, session.settings.seconds, session.outcomes)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = config.stash[_SESSION]
    if not session.outcomes and not session.model_tables:
        return
    machine = session.machine.to_json()
    terminalreporter.section("speed and memory")
    terminalreporter.line(report.describe_machine(machine))
    for comparison in session.outcomes:
        terminalreporter.line("")
        terminalreporter.line(report.describe_comparison(comparison))
    for table in session.model_tables:
        terminalreporter.line("")
        terminalreporter.line(describe_models(table))
    record = {
        "format": RECORD_FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "note": config.getoption("note"),
        "failed": len(terminalreporter.getreports("failed")),
        "machine": machine,
        "models": [table.to_json() for table in session.model_tables],
    }
    terminalreporter.line("")
    for path in config.getoption("record"):
        report.save(path, record, session.outcomes)
        terminalreporter.line(f"recorded in {path}")
