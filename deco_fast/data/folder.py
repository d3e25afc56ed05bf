"""Images in class folders, laid out as ImageNet is: `root/<class>/<image>`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from deco_fast.data.names import Names
from deco_fast.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class FolderImages:
    """Every image below `root/<class>/`: an `ImageSource`.

    Classes are numbered in the order of their folders' names, as for the published checkpoints;
    images are ordered by path. Names that begin with a dot are ignored. Listing a tree opens no
    image; a progress bar appears if it takes longer than two seconds.

    Args:
        root: the folder with the class folders.

    Attributes:
        classes: the names of the class folders; the label of `classes[k]` is k.
        names: the paths of the images relative to `root`.
        labels: (images,) int64.

    Raises:
        UserError: if `root` is missing or unreadable, has no class folders, or a class folder
            has no images.
    """

    lost: tuple[str, ...] = ()
    lost_images = 0

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self.description = str(root)
        self.classes = _class_names(self.root)
        paths: list[bytes] = []
        counts = []
        bar = tqdm(self.classes, desc=f"listing {self.root}", unit="class", delay=2, leave=False)
        for name in bar:
            of_class = sorted(path for path, _ in walk_images(self.root, name))
            if not of_class:
                raise UserError(
                    f"class folder {self.root / name} has no images: remove it, or put images "
                    f"({', '.join(IMAGE_SUFFIXES)}) into it"
                )
            paths += of_class
            counts.append(len(of_class))
        self.names = Names(paths)
        self.labels = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))

    @property
    def num_classes(self) -> int:
        """The number of class folders."""
        return len(self.classes)

    def read(self, index: int) -> bytes:
        """The file of image `index`.

        Raises:
            OSError: it cannot be read.
        """
        return self.path(index).read_bytes()

    def path(self, index: int) -> Path:
        """Where image `index` lies, 0 to the number of images - 1."""
        return self.root / self.names[index]


def _class_names(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    except FileNotFoundError:
        raise UserError(f"image folder {root} does not exist: check the path") from None
    except NotADirectoryError:
        raise UserError(f"{root} is no folder: give the folder with the class folders") from None
    except OSError as error:
        raise UserError(f"image folder {root} cannot be read: {error.strerror}") from None
    if not names:
        raise UserError(
            f"image folder {root} has no class folders: put the images of each class into a "
            f"folder of its own, {root / 'CLASS' / 'IMAGE.jpg'}"
        )
    return sorted(names)


def walk_images(root: Path, subfolder: str = "", beside: str = "") -> Iterator[tuple[bytes, bool]]:
    """Paths of images relative to `root`, as bytes, in no particular order.

    Args:
        root: the folder that paths are relative to.
        subfolder: search below it alone.
        beside: an ending, such as ".txt".

    Yields:
        (path, whether a file with the same stem and the other ending lies beside it).

    Raises:
        UserError: a folder cannot be read.
    """

    for folder, files in walk_folders(root / subfolder):
        relative = os.path.relpath(folder, root)
        present = set(files)
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".":
                path = os.path.normpath(os.path.join(relative, name))
                yield os.fsencode(path), os.path.splitext(name)[0] + beside in present


def walk_folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `root`, itself included, with the names of its files, in no order.

    Links to folders are followed, but not back into a folder that they lie in. Folders whose names
    begin with a dot are left out.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"image folder {error.filename} cannot be read: {error.strerror}")

    above = {os.fspath(root): frozenset(map(_identity, root.absolute().parents))}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        identity, outer = _identity(folder), above.pop(folder)
        if identity in outer:
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        above |= {os.path.join(folder, name): outer | {identity} for name in subfolders}
        yield folder, files


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
