"""Training data: the datasets, their transforms, and the order in which samples are drawn."""

from deco_fast.data.digits import DigitsDataset
from deco_fast.data.folder import FolderDataset
from deco_fast.data.order import EpochBatches

__all__ = ["DigitsDataset", "EpochBatches", "FolderDataset"]
