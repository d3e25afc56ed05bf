"""Where the members of a tar file lie, found once and kept on the disk."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deco_fast.checkpoint.atomic import atomic_file

# Counts up when what a kept index says changes its meaning.
FORMAT = 1

_MAX_LABEL_BYTES = 64 * 1024  # a .json may hold more than the label, but no image


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard: members in a row whose names differ after the first dot only.

    Attributes:
        keys: the samples' names, UTF-8 bytes without the part after the dot.
        fields: that part, in lower case, of all members: "jpg", "cls", "seg.png".
        offsets: (samples, fields) int64, where the content begins; -1 where a sample lacks it.
        sizes: (samples, fields) int64, in bytes.
        labels: (samples,) int64: the number in the .cls, else `label` (or `cls`) in the .json;
            -1 where there is none.
        damage: what is wrong with the file, in words; None for a whole one.
    """

    keys: tuple[bytes, ...]
    fields: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: str | None


def read_index(shard: Path, kept: Path) -> ShardIndex:
    """The index in the file `kept`, if it is there and of the shard as it is now; else a new one.

    Raises:
        OSError: the shard cannot be read.
        UserError: the index cannot be written.
    """
    status = os.stat(shard)
    identity = json.dumps([FORMAT, status.st_size, status.st_mtime_ns])
    index = _load(kept, identity)
    if index is None:
        index = scan(shard)
        _save(index, kept, identity)
    return index


def scan(shard: Path) -> ShardIndex:
    """Read the headers of a shard, and the labels.

    What cannot be read is passed over: behind a damaged header the search goes on at the next
    valid one.

    Raises:
        OSError: the file cannot be read at all.
    """
    rows: list[tuple[bytes, int, dict[str, tuple[int, int]]]] = []
    with open(shard, "rb") as file:
        members = _Members(file)
        for key, group in itertools.groupby(members, key=lambda member: member.key):
            for contents in _without_repetition(group):
                rows.append((key, _label(file, contents), contents))
        damage = members.damage
    fields = tuple(sorted({field for _, _, contents in rows for field in contents}))
    column_of = {field: column for column, field in enumerate(fields)}
    offsets = np.full((len(rows), len(fields)), -1, dtype=np.int64)
    sizes = np.zeros_like(offsets)
    for row, (_, _, contents) in enumerate(rows):
        for field, (offset, size) in contents.items():
            column = column_of[field]
            offsets[row, column], sizes[row, column] = offset, size
    labels = np.array([label for _, label, _ in rows], dtype=np.int64)
    return ShardIndex(tuple(key for key, _, _ in rows), fields, offsets, sizes, labels, damage)


@dataclass(frozen=True)
class _Member:
    key: bytes
    field: str
    offset: int
    size: int


class _Members:
    """Iterates over the files in a tar; `damage` says afterwards what was wrong with it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._length = os.fstat(file.fileno()).st_size
        self.damage: str | None = None

    def __iter__(self) -> Iterator[_Member]:
        end = 0  # of the last member's content, in whole blocks
        try:
            # ignore_zeros: go on searching behind a damaged header.
            with tarfile.open(fileobj=self._file, mode="r:", ignore_zeros=True) as archive:
                for info in archive:
                    # It would keep every header until the end.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if info.offset != end:
                        self._check_gap(end, info.offset)
                    content_end = info.offset_data + info.size
                    if info.size < 0:  # some versions of Python would loop for ever
                        self._note(f"gives {info.name} a negative size")
                        return
                    end = -(-content_end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if content_end > self._length:
                        self._note(f"ends in the middle of {info.name}")
                        return
                    if member := _member(info):
                        yield member
        except tarfile.TarError as error:
            self._note(f"ends early after byte {end} ({error})")
            return
        # Two blocks of zeros end an archive: without them its writer did not finish.
        if self._length < end + 2 * tarfile.BLOCKSIZE:
            self._note(f"ends without an end mark at byte {self._length}")
        else:
            self._check_gap(end, self._length)

    def _check_gap(self, start: int, stop: int) -> None:
        """Between archives that were joined there are only zeros."""
        while start < stop:
            block = _read(self._file, start, min(stop - start, 2**20))
            if not block or block.strip(b"\0"):
                self._note(f"has a damaged header near byte {start}")
                return
            start += len(block)

    def _note(self, damage: str) -> None:
        self.damage = self.damage or damage


def _member(info: tarfile.TarInfo) -> _Member | None:
    """None for what is no part of a sample: folders, hidden files, names without an ending."""
    folder, slash, name = info.name.rpartition("/")
    stem, dot, ending = name.partition(".")
    if not info.isreg() or info.issparse() or not (stem and dot and ending):
        return None
    key = os.fsencode(f"{folder}{slash}{stem}")
    return _Member(key, ending.lower(), info.offset_data, info.size)


def _without_repetition(group: Iterator[_Member]) -> Iterator[dict[str, tuple[int, int]]]:
    """Samples of one name: a second .jpg in a row begins another one."""
    contents: dict[str, tuple[int, int]] = {}
    for member in group:
        if member.field in contents:
            yield contents
            contents = {}
        contents[member.field] = (member.offset, member.size)
    yield contents


def _label(file: IO[bytes], contents: dict[str, tuple[int, int]]) -> int:
    """The label of a sample, -1 where there is none that can be read."""
    for field in ("cls", "json"):
        offset, size = contents.get(field, (0, 0))
        if not 0 < size <= _MAX_LABEL_BYTES:
            continue
        text = _read(file, offset, size)
        try:
            if field == "cls":
                return _known(int(text))
            described = json.loads(text)
            label = described.get("label", described.get("cls"))
            if type(label) is int:
                return _known(label)
        except (ValueError, AttributeError, RecursionError):
            continue
    return -1


def _known(label: int) -> int:
    """The label, or -1 for one that cannot be meant."""
    return label if 0 <= label < 2**31 else -1


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    """Part of a file that tarfile is reading, too: it goes back to where it was by itself."""
    file.seek(offset)
    return file.read(size)


def _load(kept: Path, identity: str) -> ShardIndex | None:
    try:
        with safe_open(kept, framework="numpy") as file:
            described = file.metadata() or {}
            if described.get("identity") != identity:
                return None
            keys = file.get_tensor("keys").tobytes()
            fields = json.loads(described["fields"])
            return ShardIndex(
                tuple(keys.split(b"\0")[:-1]),
                tuple(fields),
                file.get_tensor("offsets"),
                file.get_tensor("sizes"),
                file.get_tensor("labels"),
                json.loads(described["damage"]),
            )
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # none there, or damaged: it is made again


def _save(index: ShardIndex, kept: Path, identity: str) -> None:
    arrays = {
        # No name in a tar file can hold a zero byte.
        "keys": np.frombuffer(b"".join(key + b"\0" for key in index.keys), dtype=np.uint8),
        "offsets": index.offsets,
        "sizes": index.sizes,
        "labels": index.labels,
    }
    described = {
        "identity": identity,
        "fields": json.dumps(index.fields),
        "damage": json.dumps(index.damage),
    }
    with atomic_file(kept) as temporary:
        save_file(arrays, temporary, metadata=described)
