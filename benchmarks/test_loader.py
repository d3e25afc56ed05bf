"""Reading training images: JPEG files to batches, per core, beside what a GPU takes."""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.comparison import Comparison, Row
from benchmarks.settings import Settings
from benchmarks.timing import Turns
from benchmarks.work import Images, training_work
from deco_fast.data import EpochBatches, FolderImages, ImageDataset, ShardImages, read_batches
from deco_fast.data.shards.pack import pack
from deco_fast.models.presets import PRESETS

# The paper's DeCo-L trains 32 images of 256×256 in 0.24 s on one GPU (Table 1).
PUBLISHED_IMAGES_PER_SECOND = 32 / 0.24

BATCH, PREFETCH = 16, 2


def photograph(seed: int) -> bytes:
    """A JPEG of the size (500×375 or upright, 100 kB) and the smoothness of ImageNet's."""
    generator = np.random.default_rng(seed)
    width, height = (500, 375) if seed % 3 else (375, 500)
    pixels = np.zeros((height, width, 3))
    # Natural images have about the same variance in every octave.
    for cell in (4, 8, 16, 32, 64, 128):
        coarse = generator.normal(size=(3, height // cell + 2, width // cell + 2))
        planes = [Image.fromarray(plane.astype(np.float32)) for plane in coarse]
        fine = [plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes]
        pixels += cell**0.7 * np.stack([np.asarray(plane) for plane in fine], axis=-1)
    grain = generator.normal(size=(height, width, 1)) * 14
    pixels = (pixels - pixels.mean()) * (50 / pixels.std()) + 120 + grain
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "jpeg", quality=92)
    return content.getvalue()


class PlainFolder(Dataset[tuple[Tensor, int]]):
    """What one writes first: PIL, the crop, a float tensor."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.size = size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        size = self.size
        image = Image.open(self.paths[index]).convert("RGB")
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        array = np.array(image)[top : top + size, left : left + size]
        return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1, 0


class Stream:
    """`count` batches at a time that one worker process reads, and the CPU time it has taken."""

    def __init__(self, batches: Callable[[], Iterator[Tensor]], count: int) -> None:
        self._count = count
        before = set(multiprocessing.active_children())
        self._batches = batches()
        self.first = next(self._batches)
        (worker,) = set(multiprocessing.active_children()) - before
        self._status = Path(f"/proc/{worker.pid}/stat")

    def __call__(self) -> None:
        """Have the worker read so many batches as are taken, no more and no fewer."""
        for _ in range(self._count):
            next(self._batches)
        self.settle()

    def settle(self) -> None:
        """Wait until the worker has read ahead as far as it may."""
        asleep = 0
        while asleep < 10:  # once may be a wait for the disk
            time.sleep(0.01)
            asleep = asleep + 1 if self._fields()[0] == "S" else 0

    def cpu_seconds(self) -> float:
        """User and system time of the worker."""
        user, system = self._fields()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _fields(self) -> list[str]:
        # From the third on (man 5 proc): the second is a name, which may hold anything.
        return self._status.read_text().rsplit(")", 1)[1].split()


def cpu_clock(stream: Callable[[], object], calls: int) -> float:
    """CPU seconds of one call: unlike time they do not tell what else the machine does."""
    assert isinstance(stream, Stream)
    stream.settle()
    start = stream.cpu_seconds()
    for _ in range(calls):
        stream()
    return (stream.cpu_seconds() - start) / calls


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU times from /proc")
@pytest.mark.parametrize("size", [256, 512])
def test_loader(
    size: int,
    settings: Settings,
    outcomes: list[Comparison],
    benchmark: BenchmarkFixture,
    tmp_path: Path,
) -> None:
    count = 2 * BATCH if settings.trial else 8 * BATCH
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    (folder / "class").mkdir(parents=True)
    contents = [photograph(seed) for seed in range(count)]
    for number, content in enumerate(contents):
        (folder / "class" / f"{number:04}.jpg").write_bytes(content)
    pack(folder, shards, images_per_shard=count // 4)
    paths = sorted((folder / "class").iterdir())
    order = EpochBatches(count, BATCH, seed=0)

    def plain() -> Iterator[Tensor]:
        dataset = PlainFolder(paths, size)
        loader = DataLoader(dataset, batch_sampler=order, num_workers=1, prefetch_factor=PREFETCH)
        return (images for images, _ in loader)

    def ours(source: FolderImages | ShardImages) -> Iterator[Tensor]:
        dataset = ImageDataset(source, size, size)
        batches = read_batches(dataset, order, workers=1, prefetch=PREFETCH)
        return (batch.images for batch in batches)

    timed = 1 if settings.trial else 8
    streams = {
        "plain DataLoader, folder": Stream(plain, timed),
        "deco_fast, folder": Stream(lambda: ours(FolderImages(folder)), timed),
        "deco_fast, shards": Stream(lambda: ours(ShardImages(str(shards))), timed),
    }
    expected = streams["plain DataLoader, folder"].first
    assert torch.equal(streams["deco_fast, folder"].first, expected), "the pixels differ"

    turns = Turns(streams, cpu_clock)
    rounds = max(int(settings.seconds / turns.calibrate()), 1)
    benchmark.pedantic(turns.round, rounds=rounds)

    # A floor of this library: what Pillow takes to decode the same files out of memory.
    images_timed = timed * BATCH
    decoding = min(_seconds_to_decode(contents) for _ in range(3)) / count * images_timed
    in_pixels = 3 * size * size
    gpu_rate = PUBLISHED_IMAGES_PER_SECOND * _work_per_image(256) / _work_per_image(size)
    comparison = Comparison(
        f"loader, {size}×{size}",
        f"{images_timed} JPEG files of {sum(map(len, contents)) / count / 1e3:.0f} kB in the page "
        f"cache, cropped, batches of {BATCH}, CPU time of one worker; a GPU that trains DeCo-L at "
        f"the published 0.24 s for 32 images of 256×256 takes {gpu_rate:.0f} images/s",
        0,
        images_timed * (sum(map(len, contents)) // count + in_pixels),
        decoding,
        "decoding alone, one core",
    )
    for name, samples in turns.samples.items():
        median = statistics.median(samples)
        rate = images_timed / median
        comparison.rows.append(
            Row(
                name,
                is_baseline=name.startswith("plain"),
                remark=f"{rate:.0f} images/s per core, {gpu_rate / rate:.2f} cores for the GPU",
                rounds=len(samples),
                median=median,
                minimum=min(samples),
                maximum=max(samples),
            )
        )
    comparison.fill_ratios()
    benchmark.group = comparison.title
    benchmark.extra_info.update(comparison.to_json())
    outcomes.append(comparison)


def _seconds_to_decode(contents: list[bytes]) -> float:
    start = time.process_time()
    for content in contents:
        Image.open(io.BytesIO(content)).load()
    return time.process_time() - start


def _work_per_image(size: int) -> int:
    return training_work(PRESETS["deco-l"].config, Images(1, size, size)).flops
