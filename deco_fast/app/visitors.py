"""Which visitors wait for images, and which of them have had enough."""

from __future__ import annotations


class Visitors:
    """One request at a time of each visitor, by the name of the session.

    gradio can cancel a request by itself; but its page then drops what is clicked before that has
    come through, and says nothing.
    """

    def __init__(self) -> None:
        self._stopped: dict[str, bool] = {}

    def begin(self, visitor: str) -> None:
        """A request is made; it may wait for others."""
        self._stopped[visitor] = False

    def stop(self, visitor: str) -> None:
        """The visitor's request is no longer wanted, if there is one."""
        if visitor in self._stopped:
            self._stopped[visitor] = True

    def is_stopped(self, visitor: str) -> bool:
        """Whether that is so."""
        return self._stopped.get(visitor, False)

    def end(self, visitor: str) -> None:
        """The request is done with."""
        self._stopped.pop(visitor, None)
