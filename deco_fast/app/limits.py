"""What one visitor may ask for, so that the others get their turn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request, and of the queue.

    Attributes:
        images: at once.
        pixels: of all images together; by default 16 images of 512×512.
        steps: of the solver.
        characters: of a prompt; the text encoder reads its beginning.
        seconds: after which a request is given up.
        waiting: requests that may wait while another is drawn.
    """

    images: int = 64
    pixels: int = 2**22
    steps: int = 1000
    characters: int = 100_000
    seconds: float = 600
    waiting: int = 16
