"""Drawing a request: what is to be seen on the way, and the files at the end."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from deco_fast import __version__
from deco_fast.app.command import as_typed, sample_command
from deco_fast.app.pictures import GridPicture, is_frame, save_animation
from deco_fast.app.request import DrawRequest
from deco_fast.app.served import ServedModel
from deco_fast.errors import UserError, is_out_of_memory
from deco_fast.sampling.images import to_uint8
from deco_fast.sampling.run import check_finite, draw_states, finite_images
from deco_fast.sampling.text_encoder import cut_prompts
from deco_fast.sampling.writers import VERSION_KEY, PngFolder

ANIMATION_FILE = "trajectory.webp"


class Progress(NamedTuple):
    """A moment of a run.

    Attributes:
        done: evaluations of all batches, up to `total`.
        preview: all images as they would be if the flow went straight on from here.
    """

    done: int
    total: int
    preview: Image.Image


class Drawn(NamedTuple):
    """A finished run; the files are in the folder that `draw_request` was given.

    Attributes:
        images: a PNG file each.
        animation: the way from noise to images, an animated WebP file.
        archive: a zip file of the images, the animation and settings.json.
        command: draws the images again, bit for bit.
        notes: sentences on what was left out.
        preview: all images as one picture.
    """

    images: list[Path]
    animation: Path
    archive: Path
    command: str
    notes: list[str]
    preview: Image.Image


def draw_request(
    served: ServedModel,
    request: DrawRequest,
    folder: Path,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Progress | Drawn]:
    """Draw with the page's model, and write the files.

    Args:
        served: the model.
        request: what was checked.
        folder: an empty one.
        is_stopped: asked after each evaluation.

    Yields:
        `Progress` at moments that depend on the number of evaluations alone; `Drawn` at the end,
        unless it is stopped, or another request begins.

    Raises:
        UserError: an image is not finite, there is no memory for so many images, they take longer
            than the limit, or the disk is full.
    """
    try:
        yield from served.in_turn(_draw(served, request, folder, is_stopped))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if served.device.type == "cuda":
            torch.cuda.empty_cache()
        raise UserError(
            f"there is no memory for {request.height}×{request.width}: draw fewer or smaller images"
        ) from error


def _draw(
    served: ServedModel, request: DrawRequest, folder: Path, is_stopped: Callable[[], bool]
) -> Iterator[Progress | Drawn]:
    engine = served.engine(request)
    shape = request.num, request.height, request.width
    preview, noisy = GridPicture(*shape), [GridPicture(*shape)]
    batches = -(-request.num // engine.batch_size)
    total = batches * engine.evaluations
    images: list[Tensor] = []
    done = 0
    states = draw_states(
        engine,
        request.job.conditions,
        range(request.num),
        seed=request.seed,
        uncondition=None if served.encoder is None else request.negative_prompt,
    )
    frame = 0
    deadline = time.monotonic() + served.limits.seconds
    for indices, state in states:
        if is_stopped() or served.is_closed:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"given up after {served.limits.seconds:g} s, the limit of this page: "
                "draw fewer or smaller images, or in fewer steps"
            )
        is_last = state.evaluation == engine.evaluations
        if state.evaluation == 0:
            frame = 0
        if is_last:
            check_finite(finite_images(state.x).cpu(), indices, engine.model.dtype)
            images.append(to_uint8(state.x).cpu())
            done += engine.evaluations
        if is_frame(state.evaluation, engine.evaluations):
            if frame == len(noisy):
                noisy.append(GridPicture(*shape))
            noisy[frame].set(indices, state.x)
            frame += 1
            preview.set(indices, state.clean_estimate())
            yield Progress(done + (0 if is_last else state.evaluation), total, preview.picture())
    trajectory = [grid.picture() for grid in noisy]
    yield _write(served, request, folder, torch.cat(images), trajectory)


def _write(
    served: ServedModel,
    request: DrawRequest,
    folder: Path,
    images: Tensor,
    trajectory: list[Image.Image],
) -> Drawn:
    """Files of images, uint8 (N, H, W, 3), and of what led to them."""
    command = as_typed(sample_command(served, request))
    # The name is the checkpoint's, and may be no name of a file.
    model = re.sub(r"[^\w.-]+", "_", served.card.name)
    name = f"{model}-{request.settings.solver}{request.settings.steps}"
    kind = "class" if request.job.prompts is None else "prompt"
    settings = {
        "command": command,
        "checkpoint": served.origin.checkpoint,
        "seed": request.seed,
        "height": request.height,
        "width": request.width,
        "prompts": request.job.prompts,
        "negative_prompt": request.negative_prompt,
        VERSION_KEY: __version__,
        **asdict(request.settings),
    }
    output = PngFolder(folder / "images", settings, request.job.labels, kind)
    output.open()
    output.write(range(request.num), images)
    save_animation(trajectory, output.path / ANIMATION_FILE)
    archive = shutil.make_archive(
        str(folder / f"{name}-seed{request.seed}"), "zip", root_dir=output.path
    )
    return Drawn(
        images=sorted(output.path.glob("*.png")),
        animation=output.path / ANIMATION_FILE,
        archive=Path(archive),
        command=command,
        notes=[] if served.encoder is None else _notes(served, request),
        preview=trajectory[-1],
    )


def _notes(served: ServedModel, request: DrawRequest) -> list[str]:
    assert served.encoder is not None and request.job.prompts is not None
    return cut_prompts(served.encoder, [*request.job.prompts, request.negative_prompt])
