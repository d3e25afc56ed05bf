"""The fingerprint of the C++ sources, by which a build that differs from them is noticed.

setup.py compiles it into the extension, `deco_fast.kernels.registry` compares.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> int | None:
    """64 bits that depend on the name and the contents of every source file in `folder`.

    None where there is no such file: an installed package comes without its sources.
    """
    sources = sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h"))
    if not sources:
        return None
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return int.from_bytes(digest.digest()[:8], "big")
