"""Where drawn images go: pixels, grids, PNG folders, npz files that survive being killed."""

from __future__ import annotations

import errno
import json
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from deco_fast.errors import UserError
from deco_fast.sampling.images import image_grid, save_grid, to_uint8
from deco_fast.sampling.writers import NpzFile, PngFolder, check_writable, free_folder

SETTINGS = {
    "seed": 0,
    "steps": 10,
    "guidance_interval": (0.1, 1.0),
    "checkpoint": "here",
    "deco_fast": "1.0",
}
LABELS = [i % 3 for i in range(10)]


def pictures(count: int = 10, height: int = 4, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def npz_file(path: Path, **settings: Any) -> NpzFile:
    return NpzFile(path, {**SETTINGS, **settings}, LABELS)


def write_npz(path: Path, batches: list[list[int]]) -> bytes:
    file = npz_file(path)
    file.open()
    for batch in batches:
        file.write(batch, pictures()[batch])
    file.finish()
    return path.read_bytes()


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class TestPixels:
    def test_to_uint8_equals_golden(self) -> None:
        golden = tensors("fp2uint8")
        x = golden["x"].reshape(1, 1, 1, -1)
        assert torch.equal(to_uint8(x).flatten(), golden["u8"])

    def test_to_uint8_rounds_halves_up_and_clips(self) -> None:
        levels = torch.tensor([-9.0, 0.0, 0.49, 0.51, 1.49, 127.5, 254.51, 255.0, 300.0])
        images = (levels.double() / 127.5 - 1).reshape(1, 1, 3, 3)
        assert to_uint8(images).flatten().tolist() == [0, 0, 0, 1, 1, 128, 255, 255, 255]

    def test_to_uint8_puts_channels_last(self) -> None:
        images = torch.rand(2, 3, 4, 5) * 2 - 1
        pixels = to_uint8(images)
        assert pixels.shape == (2, 4, 5, 3)
        assert torch.equal(pixels[1, 2, 3], to_uint8(images[1:, :, 2:3, 3:4]).flatten())

    def test_grid_has_every_image_in_its_place(self) -> None:
        images = pictures(5)
        grid = np.asarray(image_grid(images, columns=3))
        assert grid.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
        for i, image in enumerate(images.numpy()):
            top, left = i // 3 * (4 + 2), i % 3 * (6 + 2)
            np.testing.assert_array_equal(grid[top : top + 4, left : left + 6], image)
        assert (grid[4:6] == 255).all()  # between the rows
        assert (grid[6:, 2 * 8 :] == 255).all()  # where a sixth image would be

    def test_grid_of_few_images_is_no_wider_than_they_are(self) -> None:
        assert image_grid(pictures(2)).size == (6 * 2 + 2, 4)

    def test_save_grid_takes_floats_and_pixels_alike(self, tmp_path: Path) -> None:
        floats = torch.rand(3, 3, 4, 6) * 2 - 1
        save_grid(floats, tmp_path / "new" / "floats.png")
        save_grid(to_uint8(floats), tmp_path / "pixels.png")
        grid = np.asarray(image_grid(to_uint8(floats)))
        for name in ("new/floats.png", "pixels.png"):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), grid)


class TestPngFolder:
    def folder(self, path: Path, **settings: Any) -> PngFolder:
        return PngFolder(path, {**SETTINGS, **settings}, LABELS)

    def drawn(self, path: Path) -> PngFolder:
        folder = self.folder(path)
        folder.open()
        folder.write([3, 4, 5, 0, 1, 2], pictures()[[3, 4, 5, 0, 1, 2]])
        return folder

    def test_files_hold_the_pixels_and_tell_index_and_class(self, tmp_path: Path) -> None:
        folder = self.drawn(tmp_path / "a" / "b")
        image = Image.open(folder.path / "000004-class1.png")
        np.testing.assert_array_equal(np.asarray(image), pictures()[4].numpy())
        assert torch.equal(folder.first(6), pictures()[:6])
        assert json.loads((folder.path / "settings.json").read_text())["steps"] == 10
        assert len(list(folder.path.iterdir())) == 7  # no temporary files

    def test_the_same_settings_are_drawn_again(self, tmp_path: Path) -> None:
        self.drawn(tmp_path)
        before = listing(tmp_path)
        self.folder(tmp_path, checkpoint="moved").open()
        assert before.keys() == listing(tmp_path).keys()

    def test_other_settings_are_refused_by_name_and_nothing_is_lost(self, tmp_path: Path) -> None:
        self.drawn(tmp_path)
        before = listing(tmp_path)
        with pytest.raises(UserError, match=r"steps 10 and not 20.*--overwrite"):
            self.folder(tmp_path, steps=20).open()
        assert listing(tmp_path) == before

    def test_overwrite_deletes_our_images_and_no_other_file(self, tmp_path: Path) -> None:
        self.drawn(tmp_path)
        (tmp_path / "holiday.png").write_bytes(b"mine")
        self.folder(tmp_path, steps=20).open(overwrite=True)
        assert {file.name for file in tmp_path.iterdir()} == {"holiday.png", "settings.json"}
        assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 20

    def test_a_grid_of_somebody_else_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "grid.png").write_bytes(b"mine")
        with pytest.raises(UserError, match=r"holds grid\.png without settings\.json"):
            self.folder(tmp_path).open()

    def test_settings_of_somebody_else_are_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "settings.json").write_text("not JSON")
        with pytest.raises(UserError, match=r"settings\.json that is not ours"):
            self.folder(tmp_path).open()
        assert (tmp_path / "settings.json").read_text() == "not JSON"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("not JSON", r"settings\.json that is not ours"),
            ('{"theme": "dark", "steps": 3}', r"settings\.json that is not ours"),
            (None, r"holds grid\.png without settings\.json"),
        ],
    )
    def test_overwrite_is_not_for_files_of_others(
        self, tmp_path: Path, content: str | None, message: str
    ) -> None:
        (tmp_path / "grid.png").write_bytes(b"mine")
        if content is not None:
            (tmp_path / "settings.json").write_text(content)
        before = listing(tmp_path)
        with pytest.raises(UserError, match=message):
            self.folder(tmp_path).open(overwrite=True)
        assert listing(tmp_path) == before
        assert free_folder(tmp_path, SETTINGS, LABELS).path.name == f"{tmp_path.name}-2"

    def test_free_folder_is_the_first_that_is_not_taken(self, tmp_path: Path) -> None:
        base = tmp_path / "samples"
        self.drawn(base)

        def place(**settings: Any) -> Path:
            return free_folder(base, {**SETTINGS, **settings}, LABELS).path

        assert place() == base
        assert place(steps=20) == tmp_path / "samples-2"
        self.folder(tmp_path / "samples-2", steps=20).open()
        assert place(steps=20) == tmp_path / "samples-2"
        assert place(steps=30) == tmp_path / "samples-3"


class TestNpzFile:
    def test_is_what_the_adm_suite_reads(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "a.npz"
        write_npz(path, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
        with np.load(path) as arrays:
            assert arrays["arr_0"].dtype == np.uint8
            assert arrays["arr_1"].dtype == np.int64
            np.testing.assert_array_equal(arrays["arr_0"], pictures().numpy())
            assert arrays["arr_1"].tolist() == LABELS
        # The suite streams the array out of the archive by NumPy's version 1 header.
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            header = np.lib.format.read_array_header_1_0(member)
            assert header == ((10, 4, 6, 3), False, np.uint8)
            # No time of day in the file: the same images are the same bytes tomorrow.
            assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert [file.name for file in path.parent.iterdir()] == ["a.npz"]

    @settings(max_examples=20)  # each writes files
    @given(st.permutations(range(10)), st.lists(st.integers(1, 9), max_size=4))
    def test_same_bytes_whatever_the_batches(
        self, tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: list[int]
    ) -> None:
        bounds = [0, *sorted(set(cuts)), 10]
        batches = [sorted(order[start:end]) for start, end in pairwise(bounds)]
        folder = tmp_path_factory.mktemp("npz")
        whole = write_npz(folder / "whole.npz", [list(range(10))])
        assert write_npz(folder / "parts.npz", batches) == whole

    def test_goes_on_where_it_was(self, tmp_path: Path) -> None:
        killed = npz_file(tmp_path / "a.npz")
        killed.open()
        killed.write([0, 1, 2], pictures()[:3])
        killed.write([6, 7], pictures()[6:8])
        # What a program leaves that is killed while it writes.
        (killed.partial / ".00000003-00000005.npy.tmp-1234").write_bytes(b"half")
        (killed.partial / ".whole.npz.tmp-1234").write_bytes(b"half")

        resumed = npz_file(tmp_path / "a.npz", checkpoint="moved")
        resumed.open()
        assert resumed.pending(range(10)) == [3, 4, 5, 8, 9]
        assert torch.equal(resumed.first(2), pictures()[:2])
        resumed.write([3, 4, 5, 8, 9], pictures()[[3, 4, 5, 8, 9]])
        resumed.finish()
        with np.load(tmp_path / "a.npz") as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], pictures().numpy())
        assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]

    def test_does_not_finish_without_every_image(self, tmp_path: Path) -> None:
        file = npz_file(tmp_path / "a.npz")
        file.open()
        for first, end in ((0, 4), (5, 10)):
            file.write(range(first, end), pictures()[first:end])
        with pytest.raises(UserError, match="does not hold every image once"):
            file.finish()
        assert not file.finished
        assert file.pending(range(10)) == [4]

    @pytest.mark.parametrize("finished", [False, True])
    def test_other_settings_are_refused_by_name(self, tmp_path: Path, finished: bool) -> None:
        file = npz_file(tmp_path / "a.npz")
        file.open()
        file.write(range(10), pictures())
        if finished:
            file.finish()
        before = listing(tmp_path)
        other = npz_file(tmp_path / "a.npz", seed=1)
        with pytest.raises(UserError, match="other settings \\(seed 0 and not 1\\)"):
            other.open()
        assert listing(tmp_path) == before
        other.open(overwrite=True)
        assert not other.finished
        assert other.pending(range(10)) == list(range(10))

    def test_a_file_that_is_overwritten_stays_until_the_new_one_is_whole(
        self, tmp_path: Path
    ) -> None:
        before = write_npz(tmp_path / "a.npz", [list(range(10))])
        other = npz_file(tmp_path / "a.npz", seed=1)
        other.open(overwrite=True)
        other.write(range(9), pictures()[:9])
        assert (tmp_path / "a.npz").read_bytes() == before
        assert npz_file(tmp_path / "a.npz").finished
        # Another process of the same command, and the command typed again.
        assert not npz_file(tmp_path / "a.npz", seed=1).finished
        other.open(overwrite=True)
        other.write([9], pictures()[9:])
        other.finish()
        assert npz_file(tmp_path / "a.npz", seed=1).finished
        assert (tmp_path / "a.npz").read_bytes() != before
        assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]

    def test_overwriting_goes_on_too(self, tmp_path: Path) -> None:
        write_npz(tmp_path / "a.npz", [list(range(10))])
        for pending in (list(range(10)), list(range(4, 10))):
            file = npz_file(tmp_path / "a.npz")
            file.open(overwrite=True)
            assert file.pending(range(10)) == pending
            file.write(range(4), pictures()[:4])

    def test_settings_of_others_in_the_partial_folder_stay(self, tmp_path: Path) -> None:
        write_npz(tmp_path / "a.npz", [list(range(10))])
        (tmp_path / "a.npz.partial").mkdir()
        (tmp_path / "a.npz.partial" / "settings.json").write_text('{"theme": "dark"}')
        before = listing(tmp_path)
        with pytest.raises(UserError, match="holds no settings of ours"):
            npz_file(tmp_path / "a.npz", seed=1).open(overwrite=True)
        assert listing(tmp_path) == before

    def test_the_partial_folder_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "large-disk").mkdir()
        (tmp_path / "a.npz.partial").symlink_to(tmp_path / "large-disk")
        write_npz(tmp_path / "a.npz", [list(range(10))])
        assert npz_file(tmp_path / "a.npz").finished
        assert not list((tmp_path / "large-disk").iterdir())

    @pytest.mark.parametrize("finished", [False, True])
    def test_files_of_others_in_the_partial_folder_stay(
        self, tmp_path: Path, finished: bool
    ) -> None:
        if finished:
            write_npz(tmp_path / "a.npz", [list(range(10))])
        mine = tmp_path / "a.npz.partial" / "thesis.tex"
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        before = listing(tmp_path)
        with pytest.raises(UserError, match=r"thesis\.tex is not ours: delete it"):
            npz_file(tmp_path / "a.npz", seed=1).open(overwrite=True)
        assert listing(tmp_path) == before
        mine.unlink()
        file = npz_file(tmp_path / "a.npz", seed=1)
        file.open(overwrite=True)
        mine.write_text("mine")
        file.write(range(10), pictures())
        file.finish()
        assert file.finished
        assert [file.name for file in mine.parent.iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize("content", [b"mine", None])
    def test_a_file_of_somebody_else_is_not_replaced(
        self, tmp_path: Path, content: bytes | None
    ) -> None:
        path = tmp_path / "a.npz"
        if content is None:
            np.savez(path, pictures().numpy())
        else:
            path.write_bytes(content)
        before = path.read_bytes()
        with pytest.raises(UserError, match="does not say what its images were drawn with"):
            npz_file(path).open()
        assert path.read_bytes() == before

    def test_a_full_disk_loses_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = npz_file(tmp_path / "a.npz")
        file.open()
        file.write(range(5), pictures()[:5])
        before = listing(tmp_path)

        def full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(np, "save", full)
            with pytest.raises(UserError, match="No space left"):
                file.write(range(5, 10), pictures()[5:])
        assert listing(tmp_path) == before
        file.write(range(5, 10), pictures()[5:])
        before = listing(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(np.lib.format, "write_array", full)
            with pytest.raises(UserError, match="No space left"):
                file.finish()
        assert listing(tmp_path) == before
        file.finish()
        with np.load(tmp_path / "a.npz") as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], pictures().numpy())

    def test_memory_holds_one_batch(self, tmp_path: Path) -> None:
        batch = torch.zeros(1, 512, 512, 3, dtype=torch.uint8)
        file = NpzFile(tmp_path / "a.npz", SETTINGS, [0] * 40)
        file.open()
        tracemalloc.start()
        for index in range(40):
            file.write([index], batch)
        file.finish()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5 * batch.numel()


class TestCheckWritable:
    def test_makes_nothing(self, tmp_path: Path) -> None:
        check_writable(tmp_path / "a" / "b", "--out")
        assert not (tmp_path / "a").exists()

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"cannot be written .*: choose another place"):
            check_writable(tmp_path / ("x" * 300), "--out")

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
            with pytest.raises(UserError, match=r"--out .* is a file"):
                check_writable(path, "--out")

    def test_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Root may write everywhere, so the permission itself cannot be taken away here.
        monkeypatch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(tmp_path, "--out")


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n", b"nothing of the kind"])
def test_a_damaged_image_is_named_with_its_remedy(tmp_path: Path, damage: bytes) -> None:
    folder = PngFolder(tmp_path / "folder", SETTINGS, LABELS)
    folder.open()
    folder.write([0, 1], pictures()[:2])
    file = folder._file(1)
    file.write_bytes(damage)
    with pytest.raises(UserError, match=f"{file.name} is damaged: delete it and type the same"):
        folder.first(2)
    npz = npz_file(tmp_path / "samples.npz")
    npz.open()
    npz.write(list(range(10)), pictures())
    (part,) = npz.partial.glob("*.npy")
    part.write_bytes(damage)
    for read in (lambda: npz.first(2), npz.finish):
        with pytest.raises(UserError, match=f"{part.name} is damaged: delete it"):
            read()
