"""A suite: what is trained, from which seeds, and how it is evaluated. One YAML file each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deco_fast.config import RunConfig, load_config
from deco_fast.errors import UserError, nearest
from deco_fast.evaluation.extractors import EXTRACTORS
from deco_fast.evaluation.metrics import METRICS
from deco_fast.models.card import SamplingSettings
from deco_fast.resources import config_folder

DATASET = "dataset"
"""As a reference: the images that the runs are trained on."""

REAL_IMAGES = "real images"
"""The name of the row with as many real images as were drawn, themselves among the reference."""

# What has to be equal for a comparison on equal terms, besides the seed.
_EQUAL = (
    "training.steps",
    "training.batch_size",
    "training.ema_decay",
    "training.init_from",
    "data.dataset",
    "data.root",
    "data.height",
    "data.width",
    "data.random_flip",
    "data.crop",
    "data.skip_small",
    *(f"sampling.{field.name}" for field in dataclasses.fields(SamplingSettings)),
)

Overrides = Mapping[str, Any]
"""Keys of the configuration, "section.key", and their values."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Part):
    """One line of the table.

    Attributes:
        name: for people.
        config: a configuration of its own; None is the suite's.
        overrides: after the suite's.
        paper: what the paper reports for it, by metric.
    """

    name: str
    config: str | None = None
    overrides: dict[str, Any] = {}
    paper: dict[str, float] = {}


class Evaluation(_Part):
    """How every run is evaluated.

    Attributes:
        features: an extractor's name.
        weights: its file; None is its own download.
        metrics: of `METRICS`, besides the spectral error; None is all that the features allow.
        num: images drawn with the averaged weights, as the configuration's `sampling` says.
        seed: of their noise.
        reference: DATASET, or an npz file or a folder of images.
        spectrum_images: real images for the spectrum of the DiT's output; 0 leaves it out.
        batch_size: images at a time for extractor and sampling.
    """

    features: str = "inception"
    weights: Annotated[str, Field(min_length=1)] | None = None
    metrics: tuple[str, ...] | None = None
    num: Annotated[int, Field(ge=1)] = 50_000
    seed: Annotated[int, Field(ge=0)] = 0
    reference: Annotated[str, Field(min_length=1)] = DATASET
    spectrum_images: Annotated[int, Field(ge=0)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 64


class Suite(_Part):
    """Rows × seeds.

    Attributes:
        name: of the suite, and of its folder.
        description: what it is to show, and its limits.
        config: that the rows begin from, a name in configs/ or a file.
        overrides: for all rows.
        rows: in the table's order.
        seeds: every row is trained from each of them.
        evaluation: the same for all.
    """

    name: str
    description: str
    config: str
    overrides: dict[str, Any] = {}
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    evaluation: Evaluation = Evaluation()


class PlannedRun(NamedTuple):
    """One training of a suite.

    Attributes:
        row: which it belongs to.
        seed: of the training.
        name: of its folder.
        config: resolved.
    """

    row: Row
    seed: int
    name: str
    config: RunConfig


def suite_names() -> list[str]:
    """The suites that ship with the package."""
    return sorted(file.stem for file in (config_folder() / "suites").glob("*.yaml"))


def load_suite(
    name_or_file: str,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    evaluation: Overrides | None = None,
) -> Suite:
    """Read a suite.

    Args:
        name_or_file: a name in configs/suites/ or a YAML file.
        rows: of them, the rows of these names alone.
        seeds: instead of its own.
        evaluation: values in place of its own.

    Raises:
        UserError: there is no such suite or row, or the file is wrong.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = config_folder() / "suites" / f"{name_or_file}.yaml"
        if not path.is_file():
            raise UserError(f"unknown suite '{name_or_file}'{nearest(name_or_file, suite_names())}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise UserError(f"{path}: must hold the keys of a suite, such as 'rows:'")
        if evaluation:
            fields["evaluation"] = {**(fields.get("evaluation") or {}), **evaluation}
        if seeds is not None:
            fields["seeds"] = list(seeds)
        suite = Suite.model_validate(fields)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such suite file") from error
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    _check(suite, path)
    if rows is None:
        return suite
    names = [row.name for row in suite.rows]
    for name in rows:
        if name not in names:
            raise UserError(f"--rows: suite {suite.name} has no '{name}'{nearest(name, names)}")
    return suite.model_copy(update={"rows": tuple(r for r in suite.rows if r.name in rows)})


def plan(suite: Suite, overrides: Overrides | None = None) -> list[PlannedRun]:
    """The trainings of a suite: all rows from the first seed, then from the next.

    Args:
        suite: what to train.
        overrides: for all rows, after their own.

    Raises:
        UserError: a configuration cannot be resolved, or the rows are not on equal terms.
    """
    runs = []
    for seed in suite.seeds:
        for row in suite.rows:
            name = run_name(row, seed)
            values = {
                **suite.overrides,
                **row.overrides,
                **(overrides or {}),
                "training.seed": seed,
                "name": name,
            }
            words = [word for key, value in values.items() for word in _words(key, value)]
            try:
                config = load_config(row.config or suite.config, words)
            except UserError as error:
                raise UserError(f"row '{row.name}' of suite {suite.name}: {error}") from error
            runs.append(PlannedRun(row, seed, name, config))
    _check_equal(suite, runs)
    return runs


def run_name(row: Row, seed: int | str) -> str:
    """Of the folder of a row's run; with an empty seed how those of all its runs begin."""
    return f"{slug(row.name)}-seed{seed}"


def slug(name: str) -> str:
    """A row's name as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _words(key: str, value: Any) -> Iterator[str]:
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    yield f"--{key}={value if isinstance(value, str) else text}"


def _check(suite: Suite, path: Path) -> None:
    chosen = suite.evaluation
    if chosen.features not in EXTRACTORS:
        raise UserError(
            f"{path}: evaluation.features: unknown '{chosen.features}'"
            f"{nearest(chosen.features, EXTRACTORS)}"
        )
    for name in chosen.metrics or ():
        if name not in METRICS:
            raise UserError(f"{path}: evaluation.metrics: unknown '{name}'{nearest(name, METRICS)}")
    if suite.name in ("", ".", "..") or set("/\\") & set(suite.name):
        raise UserError(f"{path}: name: '{suite.name}' is no name for a folder: rename the suite")
    for seed in suite.seeds:
        if suite.seeds.count(seed) > 1:
            raise UserError(f"suite {suite.name}: seed {seed} is given twice: give each once")
    slugs = [slug(row.name) for row in suite.rows]
    for row in suite.rows:
        if not slug(row.name):
            raise UserError(
                f"{path}: row '{row.name}' has no letters or digits for a file name: rename it"
            )
        if slug(row.name) == slug(REAL_IMAGES):
            raise UserError(
                f"{path}: row '{row.name}' is called as that of the real images: rename it"
            )
    for name in slugs:
        if slugs.count(name) > 1:
            raise UserError(f"{path}: two rows are called '{name}' in file names: rename one")


def _check_equal(suite: Suite, runs: Sequence[PlannedRun]) -> None:
    for key in _EQUAL:
        values = {run.row.name: _value(run.config, key) for run in runs}
        if len({repr(value) for value in values.values()}) > 1:
            listed = "; ".join(f"{name}: {value}" for name, value in values.items())
            raise UserError(
                f"suite {suite.name} does not compare on equal terms, {key} differs ({listed}): "
                "give the rows one value"
            )


def _value(config: RunConfig, key: str) -> Any:
    section, leaf = key.split(".")
    return getattr(getattr(config, section), leaf)


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key '{place}'"
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}"
