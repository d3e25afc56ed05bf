"""Images to be evaluated: an npz file as the ADM suite reads it, or a folder; read in batches."""

from __future__ import annotations

import os
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deco_fast.data.folder import IMAGE_SUFFIXES, walk_folders
from deco_fast.data.transforms import IMAGE_FORMATS, centre_crop, to_rgb
from deco_fast.errors import UserError
from deco_fast.evaluation.npz import READ_ERRORS
from deco_fast.sampling.writers import GRID_FILE, SETTINGS_FILE

KEY = "arr_0"
"""The images of an npz file."""


class ImageSet(Protocol):
    """Images of one size, in an order.

    Attributes:
        path: where they lie.
        height, width: in pixels.
    """

    path: Path
    height: int
    width: int

    def __len__(self) -> int: ...

    def batches(self, numbers: range, batch_size: int) -> Iterator[Tensor]:
        """The images of consecutive numbers, uint8 (B, 3, H, W).

        Raises:
            UserError: one cannot be read.
        """
        ...


def open_images(path: str | os.PathLike[str], crop: int | None = None) -> ImageSet:
    """The images of an npz file or a folder.

    Args:
        path: an .npz with uint8 (N, H, W, 3) under "arr_0", as `sample.py --npz` and the ADM suite
            write it, or a folder whose image files, also those in its subfolders, are taken in the
            order of their paths.
        crop: cut a folder's images to a square of so many pixels, as training does.

    Raises:
        UserError: there is nothing there, or not that; or the images differ in size.
    """
    path = Path(path)
    if path.is_dir():
        return FolderOfImages(path, None if crop is None else (crop, crop))
    if not path.exists():
        raise UserError(f"{path} does not exist: name an npz file or a folder of images")
    return NpzImages(path)


class NpzImages:
    """The images of an npz file, read batch by batch: the file may be larger than the memory.

    Raises:
        UserError: it is no npz file, has no such key, or holds something else under it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{KEY}.npy" not in names:
                names = [
                    name[: -len(".npy")] if name.endswith(".npy") else f"{name}, which is no .npy"
                    for name in names
                ]
                raise UserError(
                    f"{path} holds no images under '{KEY}' (it has: {', '.join(names) or 'nothing'}"
                    "): write it by sample.py --npz, or rename the key"
                )
            with archive.open(f"{KEY}.npy") as file:
                version = npy.read_magic(file)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, by_columns, dtype = read(file)
                self._start = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or by_columns:
            raise UserError(
                f"{path} has {dtype} {tuple(shape)} under '{KEY}' instead of uint8 "
                "(images, height, width, 3): write it by sample.py --npz"
            )
        if not all(shape):
            raise UserError(f"{path} holds no images: its '{KEY}' is {tuple(shape)}")
        self._count, self.height, self.width, _ = shape

    def __len__(self) -> int:
        return self._count

    def batches(self, numbers: range, batch_size: int) -> Iterator[Tensor]:
        """See `ImageSet`."""
        size = self.height * self.width * 3
        with (
            _reading(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{KEY}.npy") as file,
        ):
            file.seek(self._start + numbers.start * size)
            for start in range(numbers.start, numbers.stop, batch_size):
                count = min(batch_size, numbers.stop - start)
                content = bytearray(file.read(count * size))
                if len(content) != count * size:
                    raise EOFError("it ends early")
                images = torch.frombuffer(content, dtype=torch.uint8)
                yield images.view(count, self.height, self.width, 3).permute(0, 3, 1, 2)


class FolderOfImages:
    """The image files of a folder.

    The sampling command's overview, grid.png beside settings.json, is not one of its images.

    Args:
        path: the folder; images in subfolders count.
        size: cut the images to this height and width, as training does; None takes them as they
            are.
        files: of the images; None is all that are below the folder.

    Raises:
        UserError: there are none, one is damaged, or they differ in size.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int] | None = None,
        files: Sequence[Path] | None = None,
    ) -> None:
        self.path = path
        self._cut_to = size
        self._files = sorted(_image_files(path)) if files is None else files
        if not self._files:
            raise UserError(
                f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}): name another folder"
            )
        self.height, self.width = size or self._common_size()

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """See `ImageSet`; here they may be any."""
        # Decoding runs outside of Python's lock, and one batch ahead of whoever takes them.
        with ThreadPoolExecutor() as pool:
            pending: deque[list[Future[Tensor]]] = deque()
            for first in range(0, len(numbers), batch_size):
                files = [self._files[number] for number in numbers[first : first + batch_size]]
                pending.append([pool.submit(self._read, file) for file in files])
                if len(pending) > 1:
                    yield torch.stack([image.result() for image in pending.popleft()])
            for last in pending:
                yield torch.stack([image.result() for image in last])

    def _read(self, file: Path) -> Tensor:
        with _decoding(file), Image.open(file, formats=IMAGE_FORMATS) as image:
            pixels = to_rgb(image)
            if self._cut_to is not None:
                pixels = centre_crop(pixels, *self._cut_to)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def _common_size(self) -> tuple[int, int]:
        """Of all images, by their headers: known before the work begins."""
        with ThreadPoolExecutor() as pool:
            sizes = tqdm(
                pool.map(_size, self._files),
                total=len(self._files),
                desc=f"looking at {self.path}",
                unit="image",
                delay=2,
                leave=False,
            )
            first, *others = sizes
        for file, size in zip(self._files[1:], others, strict=True):
            if size != first:
                raise UserError(
                    f"{self.path} has images of mixed sizes: {self._files[0].name} is "
                    f"{first[0]}×{first[1]} and {file.name} is {size[0]}×{size[1]} "
                    "(height×width): give --crop SIZE to cut them alike"
                )
        return first


def _size(file: Path) -> tuple[int, int]:
    with _decoding(file), Image.open(file, formats=IMAGE_FORMATS) as image:
        return image.height, image.width


def _image_files(root: Path) -> Iterator[Path]:
    for folder, files in walk_folders(root):
        for name in files:
            if name == GRID_FILE and SETTINGS_FILE in files:
                continue
            if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".":
                yield Path(folder, name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read as an npz file ({error}): name a folder of images, or what "
            "sample.py --npz has written"
        ) from error


@contextmanager
def _decoding(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file can make Pillow raise almost anything
        raise UserError(f"{file} is no readable image ({error}): remove or replace it") from error
