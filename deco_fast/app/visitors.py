"""Which visitors wait for images, and which of them have had enough."""

from __future__ import annotations

import itertools


class Visitors:
    """What each visitor wants, by the name of the session: the newest request, or nothing.

    gradio can cancel a request by itself; but its page then drops what is clicked before that has
    come through, and says nothing. Here a request that is no longer wanted runs on to its next
    evaluation, beside the one that has taken its place; so each has a number of its own.
    """

    def __init__(self) -> None:
        self._wanted: dict[str, int] = {}
        self._numbers = itertools.count(1)

    def begin(self, visitor: str) -> int:
        """A request is made, which may wait for others; its number.

        It takes the place of what the visitor asked for before.
        """
        self._wanted[visitor] = number = next(self._numbers)
        return number

    def stop(self, visitor: str) -> None:
        """The visitor's request is no longer wanted, if there is one."""
        self._wanted.pop(visitor, None)

    def is_stopped(self, visitor: str, number: int) -> bool:
        """Whether a request is no longer wanted."""
        return self._wanted.get(visitor) != number

    def is_replaced(self, visitor: str, number: int) -> bool:
        """Whether the visitor has asked for something else instead."""
        return self.is_stopped(visitor, number) and visitor in self._wanted

    def end(self, visitor: str, number: int) -> None:
        """A request is done with."""
        if self._wanted.get(visitor) == number:
            del self._wanted[visitor]
