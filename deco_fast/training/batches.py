"""The batches of a run: the dataset of its configuration, read in the order of its seed.

Where a run stands in its data is a function of the step alone (`EpochBatches`), so nothing has to
be carried from worker to worker or fast-forwarded. torchdata's `StatefulDataLoader` would add
nothing: over a sampler of indices its state is the number of batches handed out, it resumes by
drawing and dropping as many, and it is the state of one rank among as many as there were. What a
checkpoint keeps is what must be the same when the run goes on, and is checked then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from deco_fast.config import RunConfig
from deco_fast.data.captions import CaptionedImages, FolderCaptions
from deco_fast.data.digits import DigitsDataset
from deco_fast.data.folder import FolderImages
from deco_fast.data.images import ImageDataset
from deco_fast.data.loader import Batch, read_batches
from deco_fast.data.order import EpochBatches
from deco_fast.data.photographs import PhotographCrops
from deco_fast.data.shards import ShardImages, index_share
from deco_fast.errors import UserError
from deco_fast.models.config import ClassConfig, DeCoT2IConfig
from deco_fast.training.distributed import Processes

TrainingImages = DigitsDataset | PhotographCrops | ImageDataset | CaptionedImages


class Batches:
    """An endless iterator over this process's batches, from any step on.

    Args:
        dataset: from `open_dataset`.
        config: the run.
        processes: this process among those of the run.
        start_step: the 0-based step of the first batch.
        state: of the checkpoint that the run goes on from; it is checked.

    Raises:
        UserError: the data, the seed or the batch size are not those of `state`.
    """

    def __init__(
        self,
        dataset: TrainingImages,
        config: RunConfig,
        processes: Processes,
        start_step: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset, self.config, self.processes = dataset, config, processes
        if state is not None:
            self._take_up(state)
        order = EpochBatches(
            len(dataset),
            config.training.batch_size,
            config.training.seed,
            processes.rank,
            processes.world_size,
            start_step,
        )
        self._batches = read_batches(
            dataset,
            order,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            device=processes.device,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            UserError: the data cannot be used.
        """
        return next(self._batches)

    def state_dict(self, step: int) -> dict[str, Any]:
        """What the checkpoint after `step` steps keeps: in which data the run stands, and where.

        Every process has to call it, as they tell each other what they found damaged: `damaged`
        holds the numbers of these images. The epoch, and how many samples of it have been drawn,
        follow from the step; they are there for people.
        """
        damage, damaged = self.dataset.damage, list[int]()
        if damage is not None:
            # Workers go on to flag images: all processes shall know the same ones.
            found = self.processes.union(damage.flags.clone())
            damage.merge(found)
            damaged = found.nonzero().flatten().tolist()
        epoch, drawn = divmod(step * self.config.training.batch_size, len(self.dataset))
        return {
            **self._identity(),
            "step": step,
            "epoch": epoch,
            "drawn_in_epoch": drawn,
            "damaged": damaged,
        }

    def excess_of_damage(self, state: Mapping[str, Any]) -> UserError | None:
        """Of a `state_dict`: why the data cannot be used, where too much of them is damaged."""
        try:
            if self.dataset.damage is not None:
                self.dataset.damage.check(len(state["damaged"]))
        except UserError as error:
            return error
        return None

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.config.training.seed,
            "batch_size": self.config.training.batch_size,
            "images": len(self.dataset),
            "fingerprint": self.dataset.fingerprint,
        }

    def _take_up(self, state: Mapping[str, Any]) -> None:
        now = self._identity()
        for key, name, remedy in (
            ("seed", "training.seed", "give the old value"),
            ("batch_size", "training.batch_size", "give the old value"),
            ("images", "the number of images in the data", "restore them"),
            ("fingerprint", "the hash of the images' names and labels", "restore them"),
        ):
            # Checkpoints of deco_fast 0.1 hold the seed only.
            before = state.get(key, now[key])
            if before != now[key]:
                raise UserError(
                    f"{name} was {before} when the run stopped and is {now[key]}, so that it "
                    f"cannot go on exactly: {remedy}, or start a new run with --out FOLDER"
                )
        damage = self.dataset.damage
        if damage is not None and state.get("damaged"):
            flags = torch.zeros_like(damage.flags)
            flags[torch.tensor(state["damaged"])] = True
            damage.merge(flags)
            try:
                damage.check()
            except UserError:
                # What ended the run may be repaired; if not, it is found again.
                damage.flags.zero_()


def open_dataset(config: RunConfig, processes: Processes | None = None) -> TrainingImages:
    """The training images of a configuration.

    Args:
        config: the run.
        processes: those of the run, which share the work of indexing shards.

    Raises:
        UserError: there are none where it says, or their classes are not the network's.
    """
    data = config.data
    if data.dataset == "digits":
        return DigitsDataset("train", data.height)
    if data.dataset == "photographs":
        return PhotographCrops(data.height, data.width)
    is_text = isinstance(config.model, DeCoT2IConfig)
    if data.root is None:
        holding = "shards" if data.dataset == "shards" else "images with captions"
        if data.dataset == "folder" and not is_text:
            holding = "class folders"
        raise UserError(f"data.root is not set: give the folder of {holding} by --data.root")
    if data.dataset == "shards" and processes is not None and processes.world_size > 1:
        index_share(data.root, data.index_folder, processes.rank, processes.world_size)
        processes.barrier()
    if is_text:
        return _captioned(config)
    return _labelled(config)


def _captioned(config: RunConfig) -> CaptionedImages:
    data = config.data
    assert data.root is not None
    if data.dataset == "folder":
        assert isinstance(data.root, str)
        source: FolderCaptions | ShardImages = FolderCaptions(data.root)
    else:
        source = ShardImages(data.root, data.index_folder, captions=True)
    return CaptionedImages(
        source,
        data.height,
        data.width,
        data.random_flip,
        data.max_damaged_share,
        crop=data.crop,
        skip_small=data.skip_small,
    )


def _labelled(config: RunConfig) -> ImageDataset:
    data, model = config.data, config.model
    assert data.root is not None and isinstance(model, ClassConfig)
    if data.dataset == "folder":
        assert isinstance(data.root, str)
        source: FolderImages | ShardImages = FolderImages(data.root)
        if source.num_classes != model.num_classes:
            raise UserError(
                f"{data.root} has {source.num_classes} class folders: "
                f"set --model.num_classes {source.num_classes} (it is {model.num_classes})"
            )
    else:
        source = ShardImages(data.root, data.index_folder)
        # Some classes may have no image in these shards, so that fewer are no error.
        if source.num_classes > model.num_classes:
            raise UserError(
                f"{source.description} has the label {source.num_classes - 1}: set "
                f"--model.num_classes {source.num_classes} (it is {model.num_classes})"
            )
    return ImageDataset(source, data.height, data.width, data.random_flip, data.max_damaged_share)
