"""From what a user names to the checkpoint that is meant."""

from __future__ import annotations

import difflib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from deco_fast.checkpoint.atomic import previous_or_self
from deco_fast.checkpoint.checksums import CHECKSUMS_FILE, has_noted_sizes
from deco_fast.checkpoint.format import TRAINING_FILE, WEIGHTS, weights_file
from deco_fast.checkpoint.source import read_header
from deco_fast.errors import UserError
from deco_fast.resources import pretrained_folder

HUB_SCHEME = "hf:"
_STEP_FOLDER = re.compile(r"step-(\d+)|\.step-(\d+)\.previous")  # or `previous_of` it


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint folder of the latest step in a run folder or its `checkpoints` folder.

    Temporary, incomplete and truncated ones are passed over. None if there is no other.
    """
    return next(complete_checkpoints(folder), None)


def complete_checkpoints(folder: str | Path) -> Iterator[Path]:
    """The checkpoint folders that `newest_checkpoint` chooses from, the latest step first."""
    folder = Path(folder)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir():
        return
    found = [
        entry for entry in folder.iterdir() if _STEP_FOLDER.fullmatch(entry.name) and entry.is_dir()
    ]
    yield from filter(is_complete, sorted(found, key=step_order, reverse=True))


def step_order(folder: Path) -> tuple[int, bool]:
    """A checkpoint folder's step; of two of a step the one about to be replaced comes first.

    Raises:
        ValueError: by its name it is none.
    """
    match = _STEP_FOLDER.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not called like a checkpoint")
    return int(match[1] or match[2]), match[2] is None


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint folder are there and none is cut short."""
    weights = [path for name in WEIGHTS if (path := folder / weights_file(name)).exists()]
    try:
        headers = [read_header(path) for path in weights]
    except UserError:
        return False
    listed = {folder / name for header in headers for name in header.files}
    training = folder / TRAINING_FILE
    return (
        bool(headers)
        and all(path.exists() for path in listed)
        and (not training.exists() or zipfile.is_zipfile(training))
        and has_noted_sizes(folder)
    )


def locate(path: str | Path) -> Path:
    """The checkpoint folder or weights file that `path` stands for.

    Args:
        path: a file, a checkpoint folder, a run folder (its newest checkpoint),
            "hf:owner/repository/file", which is downloaded unless it is in the hub's cache, or the
            name of a checkpoint that ships with the package, such as "deco-digits", where nothing
            here is called that.

    Raises:
        UserError: there is nothing there.
    """
    name = os.fspath(path)
    if name.startswith(HUB_SCHEME):
        return _download(name)
    located = previous_or_self(Path(name).expanduser())
    # os.path's: of a name that is too long pathlib's raises.
    if not os.path.exists(located) and is_shipped(name):
        located = pretrained_folder() / name
    if not os.path.exists(located):
        raise UserError(f"{name} does not exist{_suggestion(located)}")
    if located.is_dir() and not os.access(located, os.R_OK | os.X_OK):
        raise UserError(f"{name} may not be read: its permissions are others'")
    if located.is_file() or any((located / weights_file(kind)).exists() for kind in WEIGHTS):
        return located
    newest = newest_checkpoint(located)
    if newest is None:
        raise UserError(
            f"{name} is a folder without a complete checkpoint: "
            "name a checkpoint folder, a run folder or a file"
        )
    return newest


def check_outside(path: Path) -> None:
    """See that a path is not inside of a checkpoint folder, whose files belong together.

    Raises:
        UserError: it is.
    """
    for parent in path.resolve().parents:
        has_weights = any((parent / weights_file(kind)).exists() for kind in WEIGHTS)
        if has_weights and (parent / CHECKSUMS_FILE).is_file():
            raise UserError(f"{path} is in the checkpoint {parent}: choose another place")


def is_shipped(name: str) -> bool:
    """Whether a checkpoint of that name ships with the package."""
    return len(Path(name).parts) == 1 and os.path.isdir(pretrained_folder() / name)


def _suggestion(path: Path) -> str:
    """What may have been meant, at the first part of the path that does not exist."""
    while not path.parent.exists():
        path = path.parent
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        close = []
    return f"; did you mean {path.parent / close[0]}?" if close else ": check the path"


def _download(name: str) -> Path:
    parts = name.removeprefix(HUB_SCHEME).split("/")
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{name} is not of the form {HUB_SCHEME}owner/repository/file")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise UserError(
            f"{name} needs the package huggingface_hub: pip install 'deco-fast[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not in the local cache and the hub cannot be reached: "
            "check the network, or download the file and name it"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: there is no repository {repository}, or it needs a login (hf auth login)"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{name}: {repository} has no file {file}; see https://huggingface.co/{repository}"
        ) from error
    except (OSError, ValueError) as error:  # the hub's HTTP errors are OSErrors
        raise UserError(f"{name} cannot be downloaded ({error}): check the name") from error
