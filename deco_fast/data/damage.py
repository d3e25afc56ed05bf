"""Which images could not be read, and when there are too many of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from deco_fast.data.names import Names
from deco_fast.errors import UserError

_log = logging.getLogger(__name__)

# The first damaged images are logged with their reason; all are listed by `names`.
_LOGGED = 10


class DamageRecord:
    """The damaged images of a dataset, each noted once by whichever process met it.

    Args:
        names: of all images that can be drawn.
        max_share: the largest share of the dataset that may be damaged, 0 to 1.
        lost: names of what was found damaged before any image was drawn (a shard, a sample
            without an image), with the reason.
        lost_images: the number of images that are missing because of it.

    Attributes:
        flags: (images,) bool in shared memory: those found damaged so far by this process, its
            loader workers, and whoever merged theirs into it.

    Raises:
        UserError: more than `max_share` are lost already.
    """

    def __init__(
        self,
        names: Names,
        max_share: float,
        lost: Sequence[str] = (),
        lost_images: int = 0,
    ) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share is {max_share}: it must be 0 … 1")
        self._names = names
        self._max_share = max_share
        self._lost = tuple(lost)
        self._lost_images = lost_images
        self.flags = torch.zeros(len(names), dtype=torch.bool).share_memory_()
        self.check()

    def note(self, index: int, reason: Exception) -> None:
        """Image `index` could not be read.

        Raises:
            UserError: too many are damaged now.
        """
        if self.flags[index]:
            return
        self.flags[index] = True
        count = int(self.flags.sum())
        if count <= _LOGGED:
            # Pillow names the object that it read from, which says nothing to anyone.
            text = re.sub(r" <_io\.\w+ object at 0x[0-9a-f]+>", "", str(reason))
            _log.warning("skipped damaged image %s: %s", self._names[index], text)
        if count == _LOGGED:
            _log.warning("further damaged images will only be counted")
        self.check()

    def check(self, found: int | None = None) -> None:
        """See that the share is not above its limit.

        Args:
            found: so many damaged images, all of them flagged; None is all that are flagged.

        Raises:
            UserError: it is.
        """
        damaged = self._lost_images + (int(self.flags.sum()) if found is None else found)
        total = self._lost_images + len(self._names)
        if damaged > self._max_share * total:
            raise UserError(
                f"{damaged:,} of {total:,} images are damaged, more than "
                f"data.max_damaged_share {self._max_share:g} allows; the first is "
                f"{self.names()[0]}: repair them, or raise the limit"
            )

    def names(self) -> list[str]:
        """What is damaged: first what was lost from the beginning, then the images in order."""
        return [*self._lost, *(self._names[index] for index in self.indices())]

    def indices(self) -> list[int]:
        """The images found damaged, in order."""
        return self.flags.nonzero().flatten().tolist()

    def merge(self, flags: Tensor) -> None:
        """Add what others found."""
        self.flags |= flags
