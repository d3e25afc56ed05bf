"""Whether a text is one."""

from __future__ import annotations

from deco_fast.errors import UserError


def check_unicode(text: str, name: str) -> None:
    """See that a text can be encoded: no tokenizer takes half of a surrogate pair.

    A byte of a command line that is not UTF-8 is one, and an escape of JSON may be.

    Args:
        text: as it was given.
        name: of it, for the message.

    Raises:
        UserError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        shown = ascii(text[max(0, start - 20) : start + 20])
        raise UserError(
            f"{name} is not Unicode: character {start + 1}, in {shown}, is "
            f"U+{ord(text[start]):04X}: write it in UTF-8"
        ) from None
