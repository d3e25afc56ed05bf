"""What all tests share: no network, no clocks, fixed seeds, and skips that say why."""

from __future__ import annotations

import os
import tempfile

# Set in the workers of pytest-xdist only. They share the cores: threads of two workers that wait
# for each other on one core take several times as long. And a pytest that a test starts is no
# worker.
if workers := os.environ.pop("PYTEST_XDIST_WORKER_COUNT", None):
    del os.environ["PYTEST_XDIST_WORKER"]
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

# A test that needed a download would pass or fail with the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The commands would keep what they compile in the user's cache folder.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "deco_fast_tests_inductor")
)

import hypothesis
import pytest
import torch

# A loaded machine is slow, and that is no failure.
hypothesis.settings.register_profile(
    "deco_fast",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("deco_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
