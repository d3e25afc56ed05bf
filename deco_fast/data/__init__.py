"""Training data: the datasets, their transforms, and the order in which samples are drawn."""

from deco_fast.data.captions import CaptionedImages, FolderCaptions
from deco_fast.data.digits import DigitsDataset
from deco_fast.data.folder import FolderImages
from deco_fast.data.images import ImageDataset
from deco_fast.data.loader import Batch, read_batches
from deco_fast.data.order import EpochBatches
from deco_fast.data.photographs import PhotographCrops
from deco_fast.data.shards import ShardImages

__all__ = [
    "Batch",
    "CaptionedImages",
    "DigitsDataset",
    "EpochBatches",
    "FolderCaptions",
    "FolderImages",
    "ImageDataset",
    "PhotographCrops",
    "ShardImages",
    "read_batches",
]
