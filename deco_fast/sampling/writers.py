"""Where drawn images go: PNG files in a folder, or one npz file for the ADM evaluation suite.

Both keep the settings that the images were drawn with beside them, and refuse to mix images of
different settings. Every file exists whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deco_fast.checkpoint.atomic import atomic_file, is_leftover, remove_temporaries
from deco_fast.errors import UserError

Settings = Mapping[str, Any]
"""What images were drawn with, as JSON takes it."""

SETTINGS_FILE = "settings.json"
GRID_FILE = "grid.png"
VERSION_KEY = "deco_fast"
"""The setting by which a settings.json is known as ours: the version that drew the images."""
GRID_FOLDER_KEY = "grid_folder"
"""The setting that says where the grid of an NpzFile goes; None for beside it."""

_WHOLE = "whole.npz"
_PARTS = rf"(\d{{8}})-(\d{{8}})\.npy|{re.escape(_WHOLE)}|{re.escape(SETTINGS_FILE)}"
"""What FILE.partial holds, of an NpzFile."""

# The same images may come from elsewhere, by other means, and go elsewhere.
_FREE = frozenset({"checkpoint", "text_encoder", "device", GRID_FOLDER_KEY})


class PngFolder:
    """Images as PNG files, `000012-class3.png` and so on, beside settings.json.

    Args:
        folder: that will hold them.
        settings: what they are drawn with.
        labels: the class of each image, or the number of its prompt.
        kind: of the labels, "class" or "prompt".
    """

    def __init__(
        self, folder: Path, settings: Settings, labels: Sequence[int], kind: str = "class"
    ) -> None:
        self.path = folder
        self.settings = settings
        self.labels = labels
        self.kind = kind

    @property
    def finished(self) -> bool:
        """Whether all images are there, and their grid."""
        return (self.path / GRID_FILE).exists() and not self.pending(range(len(self.labels)))

    def open(self, overwrite: bool = False) -> None:
        """Make the folder; with `overwrite`, delete the images that it holds.

        Raises:
            UserError: it cannot be written, holds images of other settings, or, with `overwrite`
                too, files that are not ours but have the names of ours.
        """
        if foreign := self._foreign():
            raise UserError(f"{self.path} {foreign}: choose another --out")
        difference = self.difference()
        if difference and not overwrite:
            raise UserError(f"{self.path} {difference}: choose another --out, or --overwrite them")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for file in self._images():
                    file.unlink()
            remove_temporaries(self.path)
        write_settings(self.path / SETTINGS_FILE, self.settings)

    def difference(self) -> str:
        """What in the folder is in the way, as the end of a sentence; empty if nothing is."""
        if foreign := self._foreign():
            return foreign
        if not (self.path / SETTINGS_FILE).exists():
            return ""
        difference = changes(read_settings(self.path / SETTINGS_FILE), self.settings)
        return f"holds images of other settings ({difference})" if difference else ""

    def _foreign(self) -> str:
        """What has a name of ours and is not ours, as `difference` says it."""
        if not self.path.is_dir():
            return ""
        if (self.path / SETTINGS_FILE).exists():
            try:
                read_settings(self.path / SETTINGS_FILE)
            except UserError:
                return f"holds a {SETTINGS_FILE} that is not ours"
            return ""
        foreign = [file.name for file in self._images()]
        return f"holds {min(foreign)} without {SETTINGS_FILE}" if foreign else ""

    def pending(self, indices: Sequence[int]) -> list[int]:
        """Those of the images that are still to be drawn."""
        return [index for index in indices if not self._file(index).exists()]

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Write uint8 images (B, H, W, 3).

        Raises:
            UserError: the disk is full or the folder is gone.
        """

        # PNG's compression takes longer than a GPU takes to draw; it runs outside of Python's lock.
        with ThreadPoolExecutor() as pool:
            list(pool.map(save_png, map(self._file, indices), images.numpy()))

    def first(self, count: int) -> Tensor:
        """The first images, uint8 (count, H, W, 3)."""
        files = [self._file(index) for index in range(count)]
        return read_images(files)

    def finish(self, progress: bool = False) -> None:
        """Nothing is left to do: every file is whole."""

    def _file(self, index: int) -> Path:
        return self.path / f"{index:06d}-{self.kind}{self.labels[index]}.png"

    def _images(self) -> Iterator[Path]:
        for file in self.path.iterdir():
            if file.name == GRID_FILE or re.fullmatch(r"\d{6,}-(class|prompt)\d+\.png", file.name):
                yield file


def read_images(files: Sequence[Path]) -> Tensor:
    """Images of one size, uint8 (N, H, W, 3).

    Raises:
        UserError: one is damaged.
    """
    images = []
    for file in files:
        try:
            images.append(np.asarray(Image.open(file)))
        except (OSError, SyntaxError) as error:  # Pillow's for a broken PNG
            raise _damaged(file) from error
    return torch.from_numpy(np.stack(images))


def _load_batch(file: Path) -> Any:
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged: delete it and type the same command again")


def free_folder(
    base: Path, settings: Settings, labels: Sequence[int], kind: str = "class"
) -> PngFolder:
    """`base`, or `base-2` and so on where images of other settings are in the way."""
    folder = PngFolder(base, settings, labels, kind)
    number = 2
    while folder.difference():
        folder = PngFolder(base.with_name(f"{base.name}-{number}"), settings, labels, kind)
        number += 1
    return folder


class NpzFile:
    """Images as the ADM evaluation suite reads them: arr_0 uint8 (N, H, W, 3), arr_1 the labels.

    While they are drawn each batch is a file in `FILE.partial`, whose name says which images it
    holds. Batches survive whatever ends the program, and a run goes on from them; memory holds
    one at a time. At the end they become FILE, which also has settings.json inside; a FILE that is
    to be overwritten stays until then.

    Args:
        path: FILE.
        settings: what the images are drawn with.
        labels: the class of each image, or the number of its prompt.
    """

    def __init__(self, path: Path, settings: Settings, labels: Sequence[int]) -> None:
        self.path = path.resolve() if path.is_symlink() else path
        self.settings = settings
        self.labels = labels
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self._stored = self.partial / SETTINGS_FILE

    @property
    def finished(self) -> bool:
        """Whether FILE is there, and is not being drawn again."""
        if not self.path.exists():
            return False
        with suppress(UserError):  # none that we would go on with
            return not self._stored.exists() or bool(
                changes(read_settings(self._stored), self.settings)
            )
        return True

    @property
    def settings_before(self) -> Settings | None:
        """What images that are there, or begun, are drawn with; None where there are none.

        Raises:
            UserError: they do not say it.
        """
        for file in (self._stored, self.path):
            if file.exists():
                return read_settings(file)
        return None

    def open(self, overwrite: bool = False) -> None:
        """Make FILE.partial, unless it is there or FILE is; `overwrite` drops batches in the way.

        Raises:
            UserError: it cannot be written, or there are images of other settings, or, with
                `overwrite` too, files in FILE.partial that are not ours.
        """
        if overwrite:
            # Before anything is deleted.
            if foreign := self._foreign():
                raise UserError(f"{foreign[0]} is not ours: delete it, or choose another --npz")
        elif self.path.exists():
            self._refuse_other(read_settings(self.path), self.path)
            if self.finished:
                return
        if self.partial.is_dir() and any(self.partial.iterdir()):
            if not overwrite:
                self._refuse_other(read_settings(self._stored), self.partial)
            elif not self._stored.exists() or changes(read_settings(self._stored), self.settings):
                # The folder itself stays: it is locked.
                self._empty_partial()
        write_settings(self._stored, self.settings)

    def _refuse_other(self, before: Settings, place: Path) -> None:
        if difference := changes(before, self.settings):
            raise UserError(
                f"{place} holds images of other settings ({difference}): "
                "choose another --npz, or --overwrite it"
            )

    def pending(self, indices: Sequence[int]) -> list[int]:
        """Those of the images that are still to be drawn."""
        drawn = {index for first, last, _ in self._parts() for index in range(first, last + 1)}
        return [index for index in indices if index not in drawn]

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Write uint8 images (B, H, W, 3), their indices ascending.

        Raises:
            UserError: the disk is full or the folder is gone.
        """
        start = 0
        for end in range(1, len(indices) + 1):
            if end == len(indices) or indices[end] != indices[end - 1] + 1:
                name = f"{indices[start]:08d}-{indices[end - 1]:08d}.npy"
                with (
                    atomic_file(self.partial / name) as temporary,
                    temporary.open("wb") as file,
                ):
                    np.save(file, images[start:end].numpy())
                start = end

    def first(self, count: int) -> Tensor:
        """The first images, uint8 (count, H, W, 3), before `finish`."""
        parts = []
        for first, _, file in self._parts():
            if first >= count:
                break
            parts.append(_load_batch(file)[: count - first])
        return torch.from_numpy(np.concatenate(parts))

    def finish(self, progress: bool = False) -> None:
        """Make FILE of the batches.

        Raises:
            UserError: the disk is full; the batches stay, and the next call goes on with them.
        """
        parts = list(self._parts())
        following = [0, *(last + 1 for _, last, _ in parts)]
        if [*(first for first, *_ in parts), len(self.labels)] != following:
            raise UserError(
                f"{self.partial} does not hold every image once: type the same command again, "
                "or --overwrite it"
            )
        # Within the partial folder, which is deleted whole: a killed program leaves nothing behind.
        remove_temporaries(self.partial)
        whole = self.partial / _WHOLE
        with atomic_file(whole) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with _member(archive, "arr_0.npy") as member:
                shape = (len(self.labels), *_load_batch(parts[0][2]).shape[1:])
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
                for *_, file in tqdm(parts, f"writing {self.path.name}", disable=not progress):
                    member.write(_load_batch(file).tobytes())
            with _member(archive, "arr_1.npy") as member:
                np.lib.format.write_array(member, np.asarray(self.labels, dtype=np.int64))
            with _member(archive, SETTINGS_FILE) as member:
                member.write(json.dumps(self.settings).encode())
        with writing(self.path):
            whole.replace(self.path)
        # The images are safe, whatever becomes of the folder; it stays where there is more in it.
        with suppress(UserError, OSError):
            self._empty_partial()
            self.partial.rmdir()

    def _foreign(self) -> list[Path]:
        """What is in FILE.partial and has no name of ours."""
        if not self.partial.is_dir():
            return []
        return sorted(
            file
            for file in self.partial.iterdir()
            if file.is_dir() or not (re.fullmatch(_PARTS, file.name) or is_leftover(file))
        )

    def _empty_partial(self) -> None:
        """Delete what is ours in FILE.partial."""
        foreign = self._foreign()
        with writing(self.partial):
            # First: with it FILE is being drawn again.
            self._stored.unlink(missing_ok=True)
            for file in self.partial.iterdir():
                if file not in foreign:
                    file.unlink()

    def _parts(self) -> Iterator[tuple[int, int, Path]]:
        """(first, last, file) of the batches, ascending."""
        for file in sorted(self.partial.glob("*.npy")):
            match = re.fullmatch(r"(\d{8})-(\d{8})\.npy", file.name)
            if match:
                yield int(match[1]), int(match[2]), file


def check_writable(path: Path, option: str) -> None:
    """Raise UserError unless a folder can be made at `path`, or is there; makes nothing."""
    existing = path
    with writing(path):  # its name may be too long to ask
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{option} {path}: {existing} is a file: choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {existing} cannot be written: choose another folder")


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an image, uint8 (H, W, 3).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with atomic_file(path) as temporary:
        Image.fromarray(image).save(temporary, format="png")


@contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    # A ZipInfo of its own has a fixed date: the same images give the same file.
    with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
        yield member


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a system's error inside into one that names the place."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): choose another place"
        ) from error


def write_settings(file: Path, settings: Settings) -> None:
    """Keep what images are drawn with as JSON."""
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(path: Path) -> Settings:
    """Settings from a JSON file or from inside an npz file.

    Raises:
        UserError: it cannot be read, or was not written by `write_settings`: other programs have
            a settings.json too.
    """
    is_json = path.name.endswith(SETTINGS_FILE)
    remedy = "choose another place" + ("" if is_json else ", or --overwrite")
    try:
        if is_json:
            settings = json.loads(path.read_text(encoding="utf-8"))
        else:
            with zipfile.ZipFile(path) as archive:
                settings = json.loads(archive.read(SETTINGS_FILE))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not say what its images were drawn with: {remedy}") from error
    # Where there is nothing in it, nothing is lost with it.
    if not isinstance(settings, dict) or (settings and VERSION_KEY not in settings):
        raise UserError(f"{path} holds no settings of ours: {remedy}")
    return settings


def changes(before: Settings, now: Settings, free: Collection[str] = _FREE) -> str:
    """The settings that differ, with both values; empty if none does."""
    current = json.loads(json.dumps(now))
    return ", ".join(
        f"{key} {reprlib.repr(before.get(key))} and not {reprlib.repr(current.get(key))}"
        for key in sorted(before.keys() | current.keys())
        if key not in free and before.get(key) != current.get(key)
    )
