"""What an evaluation found, kept for the next call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.experiments.suite import Evaluation


class KeptValues:
    """The figures of one run, evaluated in one way.

    They lie in NAME.json, or beside the figures of another evaluation of the same run in
    NAME.HASH.json, so that neither takes the other's place.

    Args:
        folder: of all evaluations.
        name: of the run.
        source: what is evaluated and how, as JSON takes it.
    """

    def __init__(self, folder: Path, name: str, source: Mapping[str, Any]) -> None:
        text = json.dumps(source, sort_keys=True)
        self._source = json.loads(text)
        self._plain = folder / f"{name}.json"
        self._hashed = folder / f"{name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def read(self) -> dict[str, float] | None:
        """What was found before of the same weights in the same way; None where nothing was."""
        for path in (self._plain, self._hashed):
            document = _document(path)
            if document is not None and document["source"] == self._source:
                values: dict[str, float] = document["values"]
                return values
        return None

    def write(self, values: Mapping[str, float]) -> None:
        """Keep them.

        Raises:
            UserError: the file cannot be written.
        """
        path = self._plain if _document(self._plain) is None else self._hashed
        with atomic_file(path) as temporary:
            document = {"source": self._source, "values": values}
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def is_evaluated(folder: Path, name: str, evaluation: Evaluation) -> bool:
    """Whether figures of a run are kept that were found in this way, of whatever weights."""
    wanted = json.loads(json.dumps(evaluation.model_dump(mode="json")))
    return any(
        document["source"].get("evaluation") == wanted for document in _documents(folder, name)
    )


def _documents(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    for path in (folder / f"{name}.json", *folder.glob(f"{name}.*.json")):
        document = _document(path)
        if document is not None:
            yield document


def _document(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict):
        return None
    whole = all(isinstance(document.get(key), dict) for key in ("source", "values"))
    return document if whole else None
