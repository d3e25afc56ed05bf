"""What a run of the sampling command draws: of which condition each image is, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deco_fast.conditioning.unicode import check_unicode
from deco_fast.errors import UserError
from deco_fast.models.config import ClassConfig, DeCoT2IConfig, NetworkConfig
from deco_fast.sampling.benchmark_folders import DpgFolder, GenEvalFolder
from deco_fast.sampling.condition_table import Condition
from deco_fast.sampling.prompts import (
    IMAGES_PER_PROMPT,
    DpgPrompt,
    GenEvalPrompt,
    read_dpg,
    read_geneval,
    read_prompts,
)
from deco_fast.sampling.run import labels_for
from deco_fast.sampling.writers import NpzFile, PngFolder, Settings, free_folder

Output = PngFolder | NpzFile | GenEvalFolder | DpgFolder

_CLASS_IMAGES = 40
_IMAGES_OF_A_PROMPT = 4


@dataclass(frozen=True)
class Job:
    """The images of a run.

    Attributes:
        labels: of each image its class, or the number of its prompt.
        prompts: the distinct prompts that labels number; None for a class model.
        geneval, dpg: the prompts of a benchmark, where the images are for one.
    """

    labels: list[int]
    prompts: list[str] | None = None
    geneval: list[GenEvalPrompt] = field(default_factory=list)
    dpg: list[DpgPrompt] = field(default_factory=list)

    @property
    def conditions(self) -> Sequence[Condition]:
        """The class or the prompt of each image."""
        if self.prompts is None:
            return self.labels
        return [self.prompts[label] for label in self.labels]

    @property
    def distinct(self) -> int:
        """How many classes or prompts there are."""
        return len(set(self.conditions))

    @property
    def benchmark(self) -> str:
        """The name of the benchmark that the images are for; empty for none."""
        return "geneval" if self.geneval else "dpg" if self.dpg else ""

    def output(self, base: Path, settings: Settings, *, is_free: bool, npz: Path | None) -> Output:
        """The place for the images.

        Args:
            base: the folder.
            settings: what they are drawn with.
            is_free: whether another number after the folder's name will do.
            npz: a file instead.
        """
        if npz is not None:
            return NpzFile(npz, settings, self.labels)
        if self.geneval:
            return GenEvalFolder(base, settings, self.geneval)
        if self.dpg:
            return DpgFolder(base, settings, self.dpg)
        kind = "class" if self.prompts is None else "prompt"
        if is_free:
            return free_folder(base, settings, self.labels, kind)
        return PngFolder(base, settings, self.labels, kind)


def make_job(config: NetworkConfig, options: Mapping[str, Any]) -> Job:
    """What the command's options ask a model for.

    Args:
        config: the model's.
        options: num, classes, prompt, prompts_file, geneval, dpg, negative_prompt, text_encoder,
            npz; None or empty where not given.

    Raises:
        UserError: a file cannot be read, an option is not for this kind of model, or a prompt is
            not valid Unicode.
    """
    text_options = [n for n in ("prompt", "prompts_file", "geneval", "dpg") if options[n]]
    if isinstance(config, ClassConfig):
        others = [n for n in ("negative_prompt", "text_encoder") if options[n]]
        if given_options := text_options + others:
            given = given_options[0].replace("_", "-")
            raise UserError(
                f"--{given}: this checkpoint draws classes; name a text model by --checkpoint"
            )
        num = options["num"] or _CLASS_IMAGES
        return Job(labels_for(num, config.num_classes, options["classes"]))
    if options["classes"]:
        raise UserError("--classes: this checkpoint draws from text; give --prompt")
    if not text_options:
        raise UserError('this checkpoint draws from text: give --prompt "TEXT" or --prompts-file')
    check_unicode(options["negative_prompt"] or "", "--negative-prompt")
    job = _text_job(options)
    option = text_options[0].replace("_", "-")
    for number, prompt in enumerate(job.prompts or (), start=1):
        check_unicode(prompt, f"--{option}: prompt {number}")
    return job


def _text_job(options: Mapping[str, Any]) -> Job:
    if options["geneval"] or options["dpg"]:
        return _benchmark(options)
    if options["prompts_file"]:
        prompts, each = read_prompts(options["prompts_file"]), 1
    else:
        prompts, each = options["prompt"], _IMAGES_OF_A_PROMPT
    num = options["num"] or each * len(prompts)
    return Job([i % len(prompts) for i in range(num)], prompts)


def _benchmark(options: Mapping[str, Any]) -> Job:
    for name in ("num", "npz"):
        if options[name]:
            raise UserError(
                f"--{name}: a benchmark has {IMAGES_PER_PROMPT} images for each prompt, in folders "
                "of its own; leave it out"
            )
    geneval = read_geneval(options["geneval"]) if options["geneval"] else []
    dpg = read_dpg(options["dpg"]) if options["dpg"] else []
    prompts = [prompt.prompt for prompt in geneval or dpg]
    labels = [i // IMAGES_PER_PROMPT for i in range(IMAGES_PER_PROMPT * len(prompts))]
    return Job(labels, prompts, geneval, dpg)


def check_size(
    config: NetworkConfig,
    height: int,
    width: int,
    *,
    square: bool = False,
    names: tuple[str, str] = ("--height", "--width"),
) -> None:
    """See that a model can draw images of a size in pixels, and files hold them.

    Class models draw any multiple of the patch size, text models multiples of two patches, from 8
    to 64 of these: 128 … 1024 pixels with patches of 16.

    Args:
        config: the model's.
        height, width: in pixels.
        square: whether only squares will do.
        names: of height and width, for the message.

    Raises:
        UserError: it cannot; the nearest size is named.
    """
    is_text = isinstance(config, DeCoT2IConfig)
    step = config.patch_size * (2 if is_text else 1)
    low, high = (8 * config.patch_size, 64 * config.patch_size) if is_text else (step, None)
    for option, size in zip(names, (height, width), strict=True):
        nearest = max(low, round(size / step) * step)
        nearest = nearest if high is None else min(nearest, high)
        if size != nearest:
            what = f"divisible by the patch size {step}"
            if is_text:
                what = f"one of {low} … {high}, divisible by {step}"
            raise UserError(f"{option} {size} is not {what}: use {nearest}")
    if square and height != width:
        raise UserError(
            f"--dpg: its scorer cuts squares out of the grids, not {height}×{width}: "
            f"use --height {height} --width {height}"
        )
    if config.in_channels != 3:
        raise UserError(
            f"the checkpoint draws images of {config.in_channels} channels, and image files here "
            "have 3: use deco_fast.sample"
        )
