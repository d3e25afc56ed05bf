"""Reading batches: the same order however many processes and workers, exact resumption, damage."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_sets import noise, write, write_tar
from processes import TINY, assert_identical, weights

from deco_fast.checkpoint import load_training_state
from deco_fast.cli.train import main
from deco_fast.config import RunConfig, load_config
from deco_fast.data import (
    Batch,
    DigitsDataset,
    EpochBatches,
    FolderImages,
    ImageDataset,
    ShardImages,
    read_batches,
)
from deco_fast.data.transforms import normalise
from deco_fast.errors import UserError
from deco_fast.training.batches import Batches, open_dataset
from deco_fast.training.distributed import Processes

ROOT = Path(__file__).parent.parent
IMAGES, SHARD = 23, 5
DAMAGED = (4, 5, 17)


@pytest.fixture(params=["folder", "shards"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Twenty-three images of three classes, three of them damaged."""
    path = tmp_path / request.param
    samples = [noise(number) for number in range(IMAGES)]
    for number in DAMAGED:
        samples[number] = samples[number][:60]
    if request.param == "folder":
        for number, content in enumerate(samples):
            write(path / f"class{number // 8}/{number:03}.png", content)
    else:
        for first in range(0, IMAGES, SHARD):
            members = []
            for number in range(first, min(first + SHARD, IMAGES)):
                members += [(f"{number:03}.png", samples[number])]
                members += [(f"{number:03}.cls", b"%d" % (number // 8))]
            write_tar(path / f"{first:02}.tar", members)
    return path


def open_images(root: Path) -> ImageDataset:
    source = FolderImages(root) if root.name == "folder" else ShardImages(str(root))
    return ImageDataset(source, 16, 16, random_flip=True, max_damaged_share=0.2)


def batches(
    dataset: ImageDataset | DigitsDataset,
    count: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    workers: int = 0,
) -> list[Batch]:
    order = EpochBatches(len(dataset), 6, 1, rank, world_size, start_step)
    return list(itertools.islice(read_batches(dataset, order, workers=workers), count))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


# --- order ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_workers(root: Path, workers: int) -> None:
    alone, shared = open_images(root), open_images(root)
    # Two epochs and more: 46 samples with their mirror images, six a step.
    expected = batches(alone, 17)
    assert_same(batches(shared, 17, workers=workers), expected)
    assert shared.damage.indices() == alone.damage.indices() == list(DAMAGED)
    order = EpochBatches(2 * IMAGES, 6, 1)
    assert [batch.indices.tolist() for batch in expected] == [
        order.global_batch(step) for step in range(17)
    ]


def test_batches_do_not_depend_on_the_processes(root: Path) -> None:
    whole = batches(open_images(root), 9)
    ranks = [batches(open_images(root), 9, rank=rank, world_size=2) for rank in range(2)]
    together = [
        Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True)))
        for shares in zip(*ranks, strict=True)
    ]
    assert_same(together, whole)


@pytest.mark.parametrize("start_step", [1, 7, 8])
def test_batches_from_the_middle_are_those_of_the_whole(root: Path, start_step: int) -> None:
    # Another dataset object, which knows of no damage yet, as in a new process.
    whole = batches(open_images(root), 10)
    rest = batches(open_images(root), 10 - start_step, start_step=start_step)
    assert_same(rest, whole[start_step:])


def test_pixels_arrive_normalised(root: Path) -> None:
    dataset = open_images(root)
    (batch,) = batches(dataset, 1)
    assert batch.images.dtype == torch.float32 and batch.images.shape == (6, 3, 16, 16)
    pixels = torch.stack([dataset[index][0] for index in batch.indices.tolist()])
    assert torch.equal(batch.images, normalise(pixels))


def test_a_worker_gets_a_handle_and_no_copy_of_the_names(root: Path) -> None:
    dataset = open_images(root)
    tensors = [*dataset.source.names.tensors(), dataset.source.labels]
    assert not any(tensor.is_shared() for tensor in tensors)
    batches(dataset, 1, workers=1)
    assert all(tensor.is_shared() for tensor in tensors)


def test_floating_point_images_stay_as_they_are() -> None:
    dataset = DigitsDataset("train", size=8)
    for batch in batches(dataset, 2) + batches(dataset, 2, workers=1):
        assert torch.equal(batch.images, dataset.images[batch.indices])
        assert torch.equal(batch.labels, dataset.labels[batch.indices])


def test_an_error_in_a_worker_is_one_line(root: Path) -> None:
    dataset = open_images(root)
    dataset.damage._max_share = 0.1
    with pytest.raises(UserError, match=r"^3 of 23 images are damaged") as caught:
        batches(dataset, 20, workers=2)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("root", ["shards"], indirect=True)
def test_a_worker_that_dies_ends_the_run(root: Path) -> None:
    dataset = open_images(root)
    stream = read_batches(dataset, EpochBatches(len(dataset), 6, 1), workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a loader process has died .* lower data\.workers"):
        for _ in range(10):
            next(stream)
    assert not multiprocessing.active_children()


def run_main(root: Path, body: str) -> subprocess.CompletedProcess[str]:
    """A main process of its own that has started two workers and says which."""
    script = f"""
import os, signal
from multiprocessing import active_children
from deco_fast.data import EpochBatches, ImageDataset, ShardImages, read_batches
if __name__ == "__main__":
    dataset = ImageDataset(ShardImages({str(root)!r}), 16, 16, max_damaged_share=0.2)
    stream = read_batches(dataset, EpochBatches(len(dataset), 6, 1), workers=2)
    next(stream)
    print(*(child.pid for child in active_children()), flush=True)
    {body}
"""
    file = root / "main.py"
    file.write_text(script)
    return subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def wait_for_the_end_of(workers: str) -> None:
    numbers = [int(number) for number in workers.split()]
    assert len(numbers) == 2
    deadline = time.monotonic() + 60
    while any(map(is_running, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, numbers))


@pytest.mark.slow
@pytest.mark.parametrize("root", ["shards"], indirect=True)
def test_workers_end_with_a_killed_main_process(root: Path) -> None:
    process = run_main(root, "os.kill(os.getpid(), signal.SIGKILL)")
    assert process.returncode == -signal.SIGKILL, process.stderr
    wait_for_the_end_of(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("root", ["shards"], indirect=True)
def test_workers_live_through_a_signal_to_all_processes(root: Path) -> None:
    """As a scheduler or torchrun sends it: the main process decides when to stop."""
    signals = "for number in (signal.SIGTERM, signal.SIGINT):"
    process = run_main(
        root,
        f"""{signals}
        signal.signal(number, signal.SIG_IGN)
        os.killpg(0, number)
    for _ in range(20):
        next(stream)""",
    )
    assert process.returncode == 0, process.stderr
    wait_for_the_end_of(process.stdout)


@pytest.mark.slow
def test_a_sigterm_waits_for_a_worker_that_is_starting(tmp_path: Path) -> None:
    """Torch has one end the worker, from its first moment on until our settings are there."""
    file = tmp_path / "main.py"
    file.write_text("""
import os, signal
from deco_fast.data.loader import _context
def start():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(7)
if __name__ == "__main__":
    process = _context().Process(target=start)
    process.start()
    process.join()
    print(process.exitcode)
""")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.stdout.strip() == "7", run.stderr


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended; nobody may have asked for its status yet.
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# --- state ----------------------------------------------------------------------------------

ALONE = Processes(0, 1, torch.device("cpu"))


def run_config(root: Path, *options: str) -> RunConfig:
    return load_config("deco-digits", [*TINY, *data_options(root), "--training.steps=9", *options])


def data_options(root: Path) -> list[str]:
    return [
        f"--data.dataset={root.name}",
        f"--data.root={root}",
        "--model.num_classes=3",
        "--data.random_flip=true",
        "--data.max_damaged_share=0.2",
    ]


def test_state_says_where_the_run_stands(root: Path) -> None:
    config = run_config(root)
    dataset = open_dataset(config, ALONE)
    stream = Batches(dataset, config, ALONE, 0)
    for _ in range(7):
        next(stream)
    state = stream.state_dict(7)
    assert isinstance(dataset, ImageDataset)
    assert (state["step"], state["epoch"], state["drawn_in_epoch"]) == (7, 1, 7 * 8 - 2 * IMAGES)
    assert (state["seed"], state["batch_size"], state["images"]) == (0, 8, 2 * IMAGES)
    assert state["damaged"] == dataset.damage.indices() == list(DAMAGED)

    again = open_dataset(config, ALONE)
    Batches(again, config, ALONE, 7, state)
    assert again.damage is not None and again.damage.indices() == list(DAMAGED)
    # Checkpoints of deco_fast 0.1 hold no more than this.
    Batches(open_dataset(config, ALONE), config, ALONE, 7, {"step": 7, "seed": 0})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 3}, "training.seed was 3 when the run stopped and is 0"),
        ({"batch_size": 4}, "training.batch_size was 4"),
        ({"images": 40}, "number of images in the data was 40"),
        ({"fingerprint": "another"}, "hash of the images"),
    ],
)
def test_a_state_of_something_else_is_refused(
    root: Path, changed: dict[str, int | str], message: str
) -> None:
    config = run_config(root)
    dataset = open_dataset(config)
    state = Batches(dataset, config, ALONE, 0).state_dict(2)
    with pytest.raises(UserError, match=message) as caught:
        Batches(dataset, config, ALONE, 2, {**state, **changed})
    assert "--out FOLDER" in str(caught.value) and "\n" not in str(caught.value)


# --- train.py -------------------------------------------------------------------------------


def train(root: Path, out: Path, steps: int, *options: str) -> int:
    return main(
        [
            *TINY,
            *data_options(root),
            f"--training.steps={steps}",
            "--device=cpu",
            f"--out={out}",
            *options,
        ]
    )


def test_a_run_resumes_in_the_middle_of_an_epoch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(root, tmp_path / "whole", 8) == 0
    original = Batches.__next__

    def stop_at_three(self: Batches) -> Batch:
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        taken.append(1)
        return original(self)

    taken: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", stop_at_three)
        status = train(root, tmp_path / "stopped", 8, "--data.workers=2")
    assert status == 128 + signal.SIGTERM
    state = load_training_state(tmp_path / "stopped/checkpoints/step-00000003")["loader"]
    assert (state["epoch"], state["drawn_in_epoch"]) == (0, 24)
    assert train(root, tmp_path / "stopped", 8, "--data.workers=1") == 0
    assert_identical(weights(tmp_path / "whole", 8), weights(tmp_path / "stopped", 8))
    listed = [(tmp_path / name / "damaged.txt").read_text() for name in ("whole", "stopped")]
    assert listed[0] == listed[1] and listed[0].count("\n") == len(DAMAGED)


def test_a_resumed_run_refuses_other_data(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(root, out, 2) == 0
    (out / "finished").unlink()
    if root.name == "folder":
        write(root / "class0/new.png", noise(50))
    else:
        write_tar(root / "new.tar", [("new.png", noise(50)), ("new.cls", b"0")])
    capsys.readouterr()
    assert train(root, out, 2) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the number of images in the data was 46 when the run stopped")
    assert "is 48" in error


def test_too_much_damage_stops_a_run_and_names_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data.max_damaged_share=0.1", "--data.workers=1")
    assert train(root, tmp_path / "run", 40, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: 3 of 23 images are damaged, .* 0\.1 .*004\.png: repair", error)
    assert (tmp_path / "run/damaged.txt").read_text().count("\n") == len(DAMAGED)


def test_damage_that_ended_a_run_may_be_repaired(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is found again where it was not."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = ("--data.max_damaged_share=0.1", "--data.workers=0")
    checkpoints = out / "checkpoints"
    for _ in range(2):
        assert train(root, out, 9, *options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: 3 of 23 images are damaged")
        checkpoint = max(checkpoints.iterdir())
        assert f"; saved {checkpoint}, from which the same command goes on" in error
    assert train(root, out, 9, "--data.max_damaged_share=0.2", "--data.workers=0") == 0
    assert train(root, whole, 9, "--data.max_damaged_share=0.2", "--data.workers=0") == 0
    assert_identical(weights(out, 9), weights(whole, 9))


@pytest.mark.parametrize("root", ["shards"], indirect=True)
def test_a_damaged_shard_costs_a_run_its_images_only(root: Path, tmp_path: Path) -> None:
    os.truncate(root / "10.tar", 2000)
    assert train(root, tmp_path / "run", 3, "--data.max_damaged_share=0.5") == 0
    first = (tmp_path / "run/damaged.txt").read_text().splitlines()[0]
    assert first.startswith(f"{root / '10.tar'}: ends in the middle of 010.png")


@pytest.mark.parametrize("root", ["shards"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.dataset=shards"], "data.root is not set: give the folder of shards"),
        (["--data.dataset=shards", "--data.root=nowhere"], "nowhere"),
        (["--data.dataset=folder", "--data.root=[a, b]"], "one data.root"),
        (["--data.dataset=shards", "--data.root={root}", "--model.num_classes=2"], "the label 2"),
        (["--data.max_damaged_share=2"], "max_damaged_share"),
    ],
)
def test_bad_data_options_are_one_line(
    root: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [option.replace("{root}", str(root)) for option in options]
    arguments = [*TINY, "--training.steps=2", "--device=cpu", f"--out={tmp_path / 'run'}"]
    assert main([*arguments, "--model.num_classes=10", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.slow
@pytest.mark.parametrize("root", ["shards"], indirect=True)
def test_two_processes_see_the_same_data_and_damage(root: Path, tmp_path: Path) -> None:
    assert train(root, tmp_path / "one", 6) == 0
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "train.py", *TINY),
            *(*data_options(root), "--training.steps=6", "--data.workers=1"),
            *("--device=cpu", f"--out={tmp_path / 'two'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    states = [
        load_training_state(tmp_path / name / "checkpoints/step-00000006")["loader"]
        for name in ("one", "two")
    ]
    assert (tmp_path / "two/damaged.txt").read_text().count("\n") == len(DAMAGED)
    # Each process read half of the samples; together they know of all damage.
    assert states[0] == states[1] and states[0]["damaged"] == list(DAMAGED)
