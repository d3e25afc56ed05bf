"""The features on disk: what is read is what was written, or it is not read."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deco_fast.alignment.cache import FeatureCache
from deco_fast.alignment.features import Features
from deco_fast.errors import UserError

COUNT, SHAPE = 6, (4, 8)
SIZE = COUNT * 4 * 8 * 2


def cache_in(folder: Path, limit: int = 2**20, **identity: object) -> FeatureCache:
    return FeatureCache(folder, identity, COUNT, SHAPE, limit)


def features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    cache, written = cache_in(tmp_path), features(3)
    assert cache.size == SIZE
    assert cache.read(5) is None and cache.filled == 0
    cache.write([5, 0, 2], written)
    for again in (cache, cache_in(tmp_path)):
        assert again.filled == 3
        for index, expected in zip([5, 0, 2], written, strict=True):
            assert torch.equal(again.read(index), expected.half())
        assert again.read(1) is None
    assert not cache.damaged


def test_features_of_zeros_are_there(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.write([1], torch.zeros(1, *SHAPE))
    assert torch.equal(cache.read(1), torch.zeros(SHAPE, dtype=torch.float16))


def test_another_identity_is_another_cache(tmp_path: Path) -> None:
    cache_in(tmp_path, encoder="a").write([0], features(1))
    assert cache_in(tmp_path, encoder="b").read(0) is None
    assert cache_in(tmp_path, encoder="a").read(0) is not None


def test_a_damaged_entry_is_noticed_and_can_be_written_anew(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.write(range(3), features(3))
    with (cache.path / "features").open("r+b") as file:
        file.seek(SIZE // COUNT + 7)
        file.write(b"\xff")
    assert cache.read(1) is None
    assert cache.damaged == {1}
    assert torch.equal(cache.read(2), features(3)[2].half())
    cache.write([1], features(3)[1:2])
    assert torch.equal(cache.read(1), features(3)[1].half())


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    cache_in(tmp_path).write(range(COUNT), features(COUNT))
    with (cache_in(tmp_path).path / "features").open("r+b") as file:
        file.truncate(SIZE // 2)
    cache = cache_in(tmp_path)
    assert [cache.read(index) is not None for index in range(COUNT)] == [True] * 3 + [False] * 3
    # Cut short while it is open.
    os.truncate(cache.path / "features", SIZE // COUNT // 2)
    assert cache.read(0) is None and 0 in cache.damaged
    os.truncate(cache.path / "checksums", 0)
    assert cache.read(1) is None and 1 not in cache.damaged
    assert cache.damaged == {0, 3, 4, 5}


def test_a_write_that_broke_off_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk in the middle of an entry: nothing is marked, and training goes on."""
    cache = cache_in(tmp_path)
    cache.write([0], features(1))
    pwrite, written = os.pwrite, []

    def full(file: int, data: bytes, offset: int) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(offset)
        return pwrite(file, data[:20], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        cache.write([3, 4], features(2))
        cache.write([3, 4], features(2))
    assert caplog.text.count("No space left on device") == 1
    monkeypatch.undo()
    assert cache.read(3) is None and cache.read(0) is not None
    assert not cache.damaged


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from test_feature_cache import *;"
        "part = int(sys.argv[2]);"
        "cache = cache_in(Path(sys.argv[1]));"
        "[cache.write([i], features(COUNT)[i:i + 1]) for i in range(part, COUNT, 2)]"
    )
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path}
    workers = [subprocess.Popen([*command, part], env=environment) for part in ("0", "1")]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    cache = cache_in(tmp_path)
    for index, expected in enumerate(features(COUNT)):
        assert torch.equal(cache.read(index), expected.half())


def test_a_cache_beyond_its_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"more than alignment\.cache_gib .*: raise it"):
        cache_in(tmp_path, limit=SIZE - 1)
    assert not list(tmp_path.iterdir())
    disk = type("usage", (), {"free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    with pytest.raises(UserError, match=r"where .* GiB are free"):
        cache_in(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        cache_in(tmp_path / "file")


class CountingEncoder:
    """Features that follow from the image alone, and how many images were asked for."""

    feature_size = SHAPE[1]

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        means = images.mean(dim=(1, 2, 3))[:, None, None]
        return means * torch.arange(1.0, 33.0).view(1, *SHAPE)


def test_features_are_the_same_with_and_without_their_cache(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    cached = Features(encoder, cache_in(tmp_path))  # type: ignore[arg-type]
    images = torch.rand(COUNT, 3, 8, 8) * 2 - 1
    indices = torch.tensor([3, 1, 5, 0, 2, 4])
    computed = Features(encoder)(images, indices)  # type: ignore[arg-type]
    encoder.images = 0

    first = cached(images[:4], indices[:4])
    cached.flush()
    assert encoder.images == 4 and cached.cache is not None and cached.cache.filled == 4
    # Some are there and some are not, then all are.
    mixed = cached(images[2:], indices[2:])
    cached.flush()
    assert encoder.images == 8
    again = cached(images, indices)
    assert encoder.images == 8
    assert torch.equal(again[:4], first) and torch.equal(again[2:], mixed)
    assert again.dtype == torch.float32
    assert torch.equal(again, computed.half().float())
    assert "100% filled" in cached.describe()


def test_an_image_that_stands_in_for_a_damaged_one_is_not_kept(tmp_path: Path) -> None:
    """Nor are the features read that the damaged one had: they are not those of these pixels."""
    damaged = torch.zeros(COUNT // 2, dtype=torch.bool).share_memory_()
    images, stand_in = torch.rand(2, 1, 3, 8, 8)
    last = COUNT - 1  # the mirror image of the last one
    encoder: Any = CountingEncoder()
    expected = Features(encoder, cache_in(tmp_path))(images, torch.tensor([last]))
    cached = Features(encoder, cache_in(tmp_path / "other"), damaged)
    damaged[-1] = True
    other = cached(stand_in, torch.tensor([last]))
    assert not torch.equal(other, expected)
    assert cached.cache is not None and cached.cache.filled == 0
    damaged[-1] = False
    assert torch.equal(cached(images, torch.tensor([last])), expected)
    cached.flush()
    assert cached.cache.filled == 1
    damaged[-1] = True
    assert torch.equal(cached(stand_in, torch.tensor([last])), other)


def test_a_damaged_cache_is_computed_anew(tmp_path: Path) -> None:
    encoder, images = CountingEncoder(), torch.rand(COUNT, 3, 8, 8)
    indices = torch.arange(COUNT)
    cached = Features(encoder, cache_in(tmp_path))  # type: ignore[arg-type]
    expected = cached(images, indices)
    cached.flush()
    assert cached.cache is not None
    file = cached.cache.path / "features"
    file.write_bytes(b"\x01" * file.stat().st_size)
    assert torch.equal(cached(images, indices), expected)
    cached.flush()
    assert len(cached.cache.damaged) == COUNT and encoder.images == 2 * COUNT
    assert torch.equal(cached(images, indices), expected)
    assert encoder.images == 2 * COUNT
