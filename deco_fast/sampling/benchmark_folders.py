"""Where images for GenEval and DPG go: the folders that their scorers read.

Like the other writers they keep the settings, refuse to mix images of different settings, and go on
where they were; every file exists whole or not at all. Image i is the (i mod 4)th of prompt
i div 4.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from deco_fast.checkpoint.atomic import atomic_file, is_leftover, remove_temporaries
from deco_fast.errors import UserError
from deco_fast.sampling.prompts import IMAGES_PER_PROMPT, DpgPrompt, GenEvalPrompt
from deco_fast.sampling.writers import (
    SETTINGS_FILE,
    Settings,
    changes,
    read_images,
    read_settings,
    save_png,
    write_settings,
    writing,
)

_NUMBER = "[0-9]{5,}"
"""The name of a prompt's folder."""


class _BenchmarkFolder(ABC):
    """What both have in common."""

    finished = False
    """Images that are there are not drawn again, but what is made of them may be missing."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.path = folder
        self.settings = settings

    @property
    @abstractmethod
    def settings_file(self) -> Path:
        """Where it says what the images are drawn with."""

    @abstractmethod
    def _file(self, index: int) -> Path:
        """Where image `index` goes."""

    def _is_drawn(self, index: int) -> bool:
        return self._file(index).exists()

    def open(self, overwrite: bool = False) -> None:
        """Make the folder; with `overwrite`, delete the images in it.

        Raises:
            UserError: it cannot be written, or holds images of other settings, or, with
                `overwrite` too, files that are not ours; for DPG images of other prompts are, and
                for both what their scorers would take for an image.
        """
        if self.settings_file.exists():
            before = read_settings(self.settings_file)
            differing = changes(before, self.settings) if self._holds_something() else ""
            if differing and not overwrite:
                raise UserError(
                    f"{self.path} holds images of other settings ({differing}): "
                    "choose another --out, or --overwrite them"
                )
            if overwrite:
                self._delete()
        elif self._holds_something():
            raise UserError(f"{self.path} holds files that are not ours: choose another --out")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_settings(self.settings_file, self.settings)

    def _holds_something(self) -> bool:
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    @abstractmethod
    def _delete(self) -> None:
        """Delete the images, and nothing else."""

    def pending(self, indices: Sequence[int]) -> list[int]:
        """Those of the images that are still to be drawn."""
        return [index for index in indices if not self._is_drawn(index)]

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Write uint8 images (B, H, W, 3).

        Raises:
            UserError: the disk is full or the folder is gone.
        """
        with ThreadPoolExecutor() as pool:
            list(pool.map(save_png, map(self._file, indices), images.numpy()))

    @abstractmethod
    def first(self, count: int) -> Tensor:
        """The first images, uint8 (count, H, W, 3), before `finish`."""

    @abstractmethod
    def finish(self, progress: bool = False) -> None:
        """Leave what the scorer reads."""


class GenEvalFolder(_BenchmarkFolder):
    """`00000/metadata.jsonl`, `00000/samples/0000.png` … `0003.png`, and so on for each prompt.

    Args:
        folder: that will hold them, and settings.json, which the scorer passes over.
        settings: what they are drawn with.
        prompts: in GenEval's order.
    """

    def __init__(self, folder: Path, settings: Settings, prompts: Sequence[GenEvalPrompt]) -> None:
        super().__init__(folder, settings)
        self._prompts = prompts

    @property
    def settings_file(self) -> Path:
        return self.path / SETTINGS_FILE

    def _file(self, index: int) -> Path:
        prompt, sample = divmod(index, IMAGES_PER_PROMPT)
        return self.path / f"{prompt:05d}" / "samples" / f"{sample:04d}.png"

    def open(self, overwrite: bool = False) -> None:
        super().open(overwrite)
        for number, prompt in enumerate(self._prompts):
            folder = self.path / f"{number:05d}"
            with writing(folder):
                (folder / "samples").mkdir(parents=True, exist_ok=True)
            line, metadata = f"{prompt.line}\n".encode(), folder / "metadata.jsonl"
            # The same prompts may have other specifications by now.
            if not metadata.exists() or metadata.read_bytes() != line:
                with atomic_file(metadata) as temporary:
                    temporary.write_bytes(line)
            remove_temporaries(folder / "samples")

    def _delete(self) -> None:
        numbered = (folder for folder in self.path.iterdir() if re.fullmatch(_NUMBER, folder.name))
        folders = sorted(folder for folder in numbered if folder.is_dir())
        ours = {f"{sample:04d}.png" for sample in range(IMAGES_PER_PROMPT)}
        for folder in folders:
            for file in sorted(_entries(folder / "samples")):
                # What the scorer would take for one of the samples, once ours are gone.
                if re.match(r"\d+\.png", file.name) and file.name not in ours:
                    raise UserError(
                        f"{file} is no image of ours: delete it, or choose another --out"
                    )
        with writing(self.path):
            for folder in folders:
                samples = folder / "samples"
                remove_temporaries(folder)
                remove_temporaries(samples)
                (folder / "metadata.jsonl").unlink(missing_ok=True)
                for name in ours:
                    (samples / name).unlink(missing_ok=True)
                _remove_if_empty(samples)
                _remove_if_empty(folder)

    def first(self, count: int) -> Tensor:
        return read_images([self._file(index) for index in range(count)])

    def finish(self, progress: bool = False) -> None:
        """Nothing is left to do."""


class DpgFolder(_BenchmarkFolder):
    """`NAME.png` for each prompt: its four images as a grid of 2×2 without gaps.

    The scorer takes every file of the folder for an image. So the settings lie beside it, in
    FOLDER.settings.json, and single images, until four make a grid, in FOLDER.partial.

    Args:
        folder: for the grids alone.
        settings: what the images are drawn with.
        prompts: in the order of their names.
    """

    def __init__(self, folder: Path, settings: Settings, prompts: Sequence[DpgPrompt]) -> None:
        super().__init__(folder, settings)
        self._prompts = prompts
        self.partial = folder.with_name(f"{folder.name}.partial")

    @property
    def settings_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{SETTINGS_FILE}")

    def _grid(self, prompt: int) -> Path:
        return self.path / f"{self._prompts[prompt].name}.png"

    def _file(self, index: int) -> Path:
        prompt, sample = divmod(index, IMAGES_PER_PROMPT)
        return self.partial / f"{self._prompts[prompt].name}-{sample}.png"

    def _is_drawn(self, index: int) -> bool:
        return self._grid(index // IMAGES_PER_PROMPT).exists() or super()._is_drawn(index)

    def open(self, overwrite: bool = False) -> None:
        super().open(overwrite)
        with writing(self.partial):
            self.partial.mkdir(exist_ok=True)
        remove_temporaries(self.partial)
        remove_temporaries(self.path)

    def _holds_something(self) -> bool:
        return super()._holds_something() or self.partial.exists()

    def _delete(self) -> None:
        prompts = range(len(self._prompts))
        grids = {self._grid(prompt) for prompt in prompts}
        images = {self._file(index) for index in range(IMAGES_PER_PROMPT * len(prompts))}
        for folder, ours in ((self.path, grids), (self.partial, images)):
            there = {file for file in _entries(folder) if not is_leftover(file)}
            # Left there, it would be scored with the others.
            if foreign := sorted(there - ours):
                raise UserError(
                    f"{foreign[0]} is no image of these prompts: delete it, or choose another --out"
                )
        with writing(self.path):
            for grid in grids:
                grid.unlink(missing_ok=True)
        self._delete_partial()

    def _delete_partial(self) -> None:
        with writing(self.partial):
            remove_temporaries(self.partial)
            for index in range(IMAGES_PER_PROMPT * len(self._prompts)):
                self._file(index).unlink(missing_ok=True)
            _remove_if_empty(self.partial)

    def first(self, count: int) -> Tensor:
        return torch.stack([self._image(index) for index in range(count)])

    def _image(self, index: int) -> Tensor:
        prompt, sample = divmod(index, IMAGES_PER_PROMPT)
        if not self._grid(prompt).exists():
            return read_images([self._file(index)])[0]
        (grid,) = read_images([self._grid(prompt)])
        row, column = divmod(sample, 2)
        height, width = grid.shape[0] // 2, grid.shape[1] // 2
        return grid[row * height :, column * width :][:height, :width]

    def finish(self, progress: bool = False) -> None:
        """Make the grids.

        Raises:
            UserError: the disk is full; the images stay, and the next call goes on with them.
        """
        prompts = range(len(self._prompts))
        for prompt in tqdm(prompts, f"writing {self.path.name}", disable=not progress):
            if self._grid(prompt).exists():
                continue
            first = prompt * IMAGES_PER_PROMPT
            a, b, c, d = read_images(
                [self._file(first + sample) for sample in range(IMAGES_PER_PROMPT)]
            )
            grid = torch.cat([torch.cat([a, b], dim=1), torch.cat([c, d], dim=1)])
            save_png(self._grid(prompt), grid.numpy())
        self._delete_partial()


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not _entries(folder):
        folder.rmdir()
