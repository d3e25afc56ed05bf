"""Files and folders that exist whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from deco_fast.errors import UserError


def previous_of(folder: Path) -> Path:
    """The name that a valid folder carries for the instant in which another takes its place."""
    return folder.with_name(f".{folder.name}.previous")


_WRITE_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk with its own class


class DiskFullError(UserError):
    """A file cannot be written for want of space, which somebody may make."""


class FolderGoneError(UserError):
    """The folder that was being written to is not there any more: renamed, moved or deleted."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write the yielded temporary file; on leaving it becomes `path`, or what `path` links to.

    Raises:
        UserError: it cannot be written; what was at `path` is still there.
    """
    path = _named(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except _WRITE_ERRORS as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(folder: Path, owned: Collection[str]) -> Iterator[Path]:
    """Fill the yielded temporary folder; on leaving it becomes `folder`.

    A folder that is already there, or that it links to, is replaced. No system call swaps two
    folders everywhere, so for an instant the old one is called `previous_of(folder)`:
    `previous_or_self` finds it there.

    Args:
        folder: where the files shall be.
        owned: the names that the folder may hold; one with anything else in it is not replaced.

    Raises:
        UserError: it cannot be written, or `folder` holds something else; what was there is
            still there.
    """
    folder = _named(folder)
    temporary = _temporary(folder)
    try:
        _refuse_foreign_files(folder, owned)
        # It would be deleted as what a killed program left.
        _refuse_foreign_files(previous_of(folder), owned)
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder.parent, folder.name)
        temporary.mkdir()
        yield temporary
        for entry in temporary.rglob("*"):
            (_flush_folder if entry.is_dir() else _flush)(entry)
        _flush_folder(temporary)
        _swap(temporary, folder)
    except _WRITE_ERRORS as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def previous_or_self(folder: Path) -> Path:
    """`folder`, or the one that it was about to replace when the program was killed."""
    if not folder.name:  # of "." and "/"
        return folder
    previous = previous_of(folder)
    return previous if not os.path.exists(folder) and os.path.exists(previous) else folder


def remove_leftovers(parent: Path) -> None:
    """Delete what killed programs left in a folder of checkpoints that nobody else writes to."""
    remove_temporaries(parent)
    for previous in parent.glob(".*.previous"):
        if previous.with_name(previous.name[1:].removesuffix(".previous")).exists():
            shutil.rmtree(previous, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether this is being written, or was when its program died."""
    return fnmatch(path.name, ".*.tmp-*")


def _named(path: Path) -> Path:
    """Where a file or folder really is to be."""
    path = path.resolve() if path.is_symlink() else path
    if path.name in ("", ".."):
        raise UserError(f"{path} cannot be replaced: name something in it")
    return path


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def remove_temporaries(parent: Path, name: str = "*") -> None:
    """Delete what killed programs left half-written in a folder that nobody else is writing to."""
    for leftover in parent.glob(f".{name}.tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _refuse_foreign_files(folder: Path, owned: Collection[str]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder to save in")
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in owned)
    if foreign:
        raise UserError(
            f"{folder} holds files that are not a checkpoint's ({foreign[0]}), "
            "so it is not replaced: choose another folder"
        )


def _swap(temporary: Path, folder: Path) -> None:
    previous = previous_of(folder)
    if folder.exists():
        # An older leftover; the folder itself is whole.
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
    try:
        os.rename(temporary, folder)
    except OSError:
        if previous.exists():
            os.rename(previous, folder)
        raise
    _flush_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(file: Path) -> None:
    """Have the file's bytes on the disk before a name points at them."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle for a folder's entries
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        if error.filename and not Path(error.filename).name.startswith("."):
            reason += f": {error.filename}"
    kind: type[UserError] = UserError
    remedy = "choose a folder that can be written"
    if any(sign in reason.lower() for sign in ("no space left", "quota")):
        kind = DiskFullError
    elif isinstance(error, FileNotFoundError) or "(os error 2)" in reason:
        kind = FolderGoneError
    # A file that is too large for its disk stays so; "… requested and … written" is NumPy's.
    if kind is DiskFullError or "too large" in reason or "requested and" in reason:
        remedy = "free some space or choose another disk"
    return kind(f"cannot write {path} ({reason}): {remedy}; what was saved before is still valid")
