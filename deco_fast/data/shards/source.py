"""The images of a set of shards at random access."""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deco_fast.data.folder import IMAGE_SUFFIXES
from deco_fast.data.names import Names
from deco_fast.data.shards.index import ShardIndex, read_index, scan
from deco_fast.data.shards.locate import find_shards
from deco_fast.errors import UserError

_log = logging.getLogger(__name__)

INDEX_FOLDER = ".deco-index"

# The last name of each is one that the published loader knows as well.
_IMAGE_FIELDS = (*(suffix[1:] for suffix in IMAGE_SUFFIXES), "output_image")
_CAPTION_FIELDS = ("txt", "input_prompt")

# Shards are indexed side by side: on a network's disk each header costs a journey.
_INDEXED_AT_ONCE = 8
# Far below the 1,024 files that a process may commonly have open.
_OPEN_SHARDS = 256


class ShardImages:
    """Every labelled image of a set of shards: an `ImageSource`, or a `CaptionSource`.

    A sample is what has one name up to the first dot, in a row: an image (.jpg, .png, …, or
    .output_image) and its label, a number in a .cls, or `label` (or `cls`) in a .json; or its
    caption, a .txt (or .input_prompt), as in BLIP3o's shards. Other fields are passed over. Images
    are ordered by shard and place. Indexing opens no image; a progress bar appears if it
    takes longer than two seconds.

    A shard that is damaged gives the samples that can still be found in it. What is missing is
    named in `lost`, and estimated from what the whole shards hold.

    Args:
        root: as for `find_shards`.
        index_folder: keeps the index of each shard, for the shard's size and time of change;
            None is the folder .deco-index beside the shard. Where it cannot be written, the
            index is made again each time, and a warning says so.
        captions: look for captions and not for labels.

    Attributes:
        shards: the tar files.
        names: "SHARD/KEY.jpg".
        labels: (images,) int64; −1 where there is none, with captions.
        num_classes: the largest label + 1.

    Raises:
        UserError: as `find_shards`; a shard cannot be read; no image has a label.
    """

    def __init__(
        self,
        root: str | Sequence[str],
        index_folder: str | os.PathLike[str] | None = None,
        *,
        captions: bool = False,
    ) -> None:
        self.shards = find_shards(root)
        self.description = root if isinstance(root, str) else ", ".join(root)
        folder = None if index_folder is None else Path(index_folder)
        names: list[bytes] = []
        columns: list[tuple[np.ndarray, ...]] = []
        counts: list[int] = []
        lost: list[str] = []
        damaged: list[int] = []
        lost_in_whole_shards = 0
        unlabelled = 0
        for number, index in enumerate(_indices(self.shards, folder)):
            shard = self.shards[number]
            images = _Images(index, shard.name, captions)
            names += images.names
            columns.append((images.places, images.texts, images.labels))
            counts.append(len(images.names))
            unlabelled += images.unlabelled
            if index.damage is None:
                lost_in_whole_shards += images.lost_images
            else:
                lost.append(f"{shard}: {index.damage}")
                damaged.append(number)
            lost += images.lost
        if not names and unlabelled:
            raise UserError(
                f"no image in {self.description} has a caption: put KEY.txt beside each KEY.jpg"
                if captions
                else f"no image in {self.description} has a label: put KEY.cls with the number of "
                "the class beside each KEY.jpg"
            )
        if not names:
            reason = f" ({lost[0]})" if lost else ""
            raise UserError(
                f"{self.description} has no images{reason}: a shard holds KEY.jpg and "
                + ("KEY.txt" if captions else "KEY.cls")
            )
        self.names = Names(names)
        self._places, self._texts, self.labels = (
            torch.from_numpy(np.concatenate(parts)) for parts in zip(*columns, strict=True)
        )
        self._ends = np.cumsum(counts)
        self._files = _OpenFiles()
        self.num_classes = int(self.labels.max()) + 1
        self.lost = tuple(lost)
        self.lost_images = lost_in_whole_shards + _missing(counts, damaged)

    def read(self, index: int) -> bytes:
        """The file of image `index`, 0 to the number of images - 1.

        Raises:
            OSError: it cannot be read.
        """
        return self._read(index, self._places)

    def caption(self, index: int) -> str:
        """The caption of image `index`, where captions were looked for.

        Raises:
            OSError, UnicodeDecodeError: it cannot be read.
        """
        return self._read(index, self._texts).decode("utf-8-sig")

    def _read(self, index: int, places: Tensor) -> bytes:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        offset, size = places[index].tolist()
        file = self._files.open(self.shards[shard])
        file.seek(offset)
        content = file.read(size)
        if len(content) < size:
            raise OSError(f"{self.shards[shard]} has become shorter since the run began")
        return content


def index_share(
    root: str | Sequence[str],
    index_folder: str | os.PathLike[str] | None,
    rank: int,
    world_size: int,
) -> None:
    """Make this process's share of the indices that `ShardImages` reads, and keep them.

    Args:
        root, index_folder: as for `ShardImages`.
        rank, world_size: this process among those that share the work.

    Raises:
        UserError: as `find_shards`; a shard cannot be read.
    """
    folder = None if index_folder is None else Path(index_folder)
    for _ in _indices(find_shards(root)[rank::world_size], folder):
        pass


class _Images:
    """What an index says of the images alone."""

    def __init__(self, index: ShardIndex, shard: str, captions: bool) -> None:
        column = _first_of(index, _IMAGE_FIELDS)
        text = _first_of(index, _CAPTION_FIELDS)
        has_image = column >= 0
        has_label = text >= 0 if captions else index.labels >= 0
        self.unlabelled = int((has_image & ~has_label).sum())
        usable = np.flatnonzero(has_image & has_label)
        self.places = _places(index, usable, column)
        self.texts = _places(index, usable, text)
        self.labels = index.labels[usable]
        prefix = os.fsencode(shard) + b"/"
        what = "caption" if captions else "label"
        endings = [b"." + os.fsencode(field) for field in index.fields]
        self.names = [prefix + index.keys[row] + endings[column[row]] for row in usable]
        # Names with a dot in them have one key: frame.0.png and frame.1.png are of "frame".
        dotted = [
            place
            for place, field in enumerate(index.fields)
            if "." in field and field.rpartition(".")[2] in _IMAGE_FIELDS
        ]
        within = (index.offsets[:, dotted] >= 0).sum(axis=1)
        self.lost, self.lost_images = [], 0
        for row in np.flatnonzero(~(has_image & has_label)):
            reason = f"no {what if has_image[row] else 'image'}"
            images = 1
            if not has_image[row] and within[row]:
                images = int(within[row])
                field = index.fields[next(i for i in dotted if index.offsets[row, i] >= 0)]
                reason += f", but .{field}: the name of an image has one dot, before its ending"
            self.lost.append(f"{os.fsdecode(prefix + index.keys[row])}: {reason}")
            self.lost_images += images


def _first_of(index: ShardIndex, fields: Sequence[str]) -> np.ndarray:
    """Of each sample the column of the first of these fields that it has; -1 for none."""
    column = np.full(len(index.keys), -1)
    # The last one written is the first of the list, which every sample should have.
    for field in reversed(fields):
        if field in index.fields:
            place = index.fields.index(field)
            column[index.offsets[:, place] >= 0] = place
    return column


def _places(index: ShardIndex, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(offset, size) of a field of these samples, (rows, 2) int64."""
    if not index.fields:
        return np.empty((0, 2), dtype=np.int64)
    chosen = column[rows]
    return np.stack([index.offsets[rows, chosen], index.sizes[rows, chosen]], axis=1)


def _indices(shards: Sequence[Path], folder: Path | None) -> Iterator[ShardIndex]:
    """The index of each shard, one at a time in memory."""

    def index(shard: Path) -> ShardIndex:
        try:
            try:
                return read_index(shard, _kept_at(shard, folder))
            except UserError as error:
                warnings.append(str(error))
                return scan(shard)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be read: {error.strerror}") from error

    warnings: list[str] = []
    pool = ThreadPoolExecutor(_INDEXED_AT_ONCE)
    try:
        bar = tqdm(total=len(shards), desc="indexing", unit="shard", delay=2, leave=False)
        with bar:
            for each in pool.map(index, shards):
                yield each
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt shall not wait for a thousand shards
    if warnings:
        _log.warning("%s; set data.index_folder to keep the index of the shards", warnings[0])


def _kept_at(shard: Path, folder: Path | None) -> Path:
    if folder is None:
        return shard.parent / INDEX_FOLDER / f"{shard.name}.index"
    # Shards of several folders have the same names.
    place = hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:16]
    return folder / f"{shard.stem}-{place}.index"


def _missing(counts: Sequence[int], damaged: Sequence[int]) -> int:
    """How many images the damaged shards have lost, if they once held what the whole ones hold."""
    whole = [count for number, count in enumerate(counts) if number not in set(damaged)]
    usual = statistics.median_high(whole) if whole else 0
    return sum(max(usual - counts[number], 1) for number in damaged)


class _OpenFiles:
    """The shards read last, open; each process opens its own."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def open(self, path: Path) -> BinaryIO:
        """A file that stays open until `_OPEN_SHARDS` others have been asked for."""
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= _OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        self._files[path] = path.open("rb")
        return self._files[path]

    def __getstate__(self) -> dict[str, OrderedDict[Path, BinaryIO]]:
        return {"_files": OrderedDict()}

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()
