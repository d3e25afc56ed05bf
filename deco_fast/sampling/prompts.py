"""Prompts from files: one a line, GenEval's, DPG's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from deco_fast.errors import UserError

IMAGES_PER_PROMPT = 4
"""That GenEval and DPG ask for."""


class GenEvalPrompt(NamedTuple):
    """A line of GenEval's evaluation_metadata.jsonl, as it stands, and the prompt in it."""

    prompt: str
    line: str


class DpgPrompt(NamedTuple):
    """A file of DPG's prompts/: its name without .txt, and its content."""

    prompt: str
    name: str


def read_prompts(path: Path) -> list[str]:
    """A prompt from each line that is not empty.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    prompts = [line.strip() for line in _lines(path) if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one on each line")
    return prompts


def read_geneval(path: Path) -> list[GenEvalPrompt]:
    """GenEval's prompts, in their order.

    Raises:
        UserError: the file cannot be read, or is not GenEval's evaluation_metadata.jsonl.
    """
    prompts = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt = fields["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}, is no JSON object with a prompt: "
                "name GenEval's evaluation_metadata.jsonl"
            ) from error
        if not isinstance(prompt, str):
            raise UserError(f"{path}, line {number}: its prompt is no text: repair the line")
        prompts.append(GenEvalPrompt(prompt, line.strip()))
    if not prompts:
        raise UserError(f"{path} is empty: name GenEval's evaluation_metadata.jsonl")
    return prompts


def read_dpg(folder: Path) -> list[DpgPrompt]:
    """DPG's prompts, by name: the order of a folder's listing is another on each machine.

    Raises:
        UserError: there is no such folder, it holds no .txt files, or one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name DPG's folder prompts/ with its .txt files")
    files = sorted(file for file in folder.glob("*.txt") if file.is_file())
    if not files:
        raise UserError(f"{folder} has no .txt files: name DPG's folder prompts/")
    return [DpgPrompt(_read(file).strip(), file.stem) for file in files]


def shorten(prompt: str, length: int = 60) -> str:
    """The beginning of a prompt, for people."""
    return prompt if len(prompt) <= length else f"{prompt[: length - 1]}…"


def _lines(path: Path) -> list[str]:
    # str.splitlines ends a line at a form feed, U+2028 and others too, which a prompt may hold.
    return _read(path).split("\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): "
            "save it as UTF-8"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another file") from error
