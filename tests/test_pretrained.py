"""The checkpoint that ships with the package."""

from __future__ import annotations

import json

import pytest
import torch

from deco_fast.checkpoint import load_checkpoint
from deco_fast.config import load_config
from deco_fast.evaluation.digits import DigitsEvaluator
from deco_fast.models.presets import PRESETS
from deco_fast.resources import pretrained_folder
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.run import draw, labels_for

FOLDER = pretrained_folder() / "deco-digits"


def test_it_is_small_and_says_where_it_comes_from() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5e6
    record = json.loads((FOLDER / "record.json").read_text())
    assert "train.py" in record["trained_by"]
    assert record["evaluation"]["report"]["accuracy"] >= 0.97
    steps = (FOLDER / "losses.csv").read_text().splitlines()
    model = load_checkpoint(FOLDER)
    assert model.card is not None
    assert model.card.step == int(steps[-1].split(",")[0]) == 4000


def test_its_configuration_is_the_digits_preset_but_for_the_steps() -> None:
    trained = load_config(str(FOLDER / "config.yaml"))
    assert trained == load_config("deco-digits", [f"--training.steps={trained.training.steps}"])
    model = load_checkpoint(FOLDER)
    assert model.config == PRESETS["deco-digits"].config
    assert model.card == trained.card(trained.training.steps)


@pytest.mark.slow
def test_it_draws_the_digits_that_were_asked_for() -> None:
    """A hundred images here; `evaluate.py digits` draws the thousand of the record."""
    model = load_checkpoint(FOLDER)
    labels = labels_for(100, 10)
    images = torch.cat([images for _, images in draw(SamplingEngine(model), labels, seed=1)])
    report = DigitsEvaluator().evaluate(images, torch.tensor(labels))
    assert report.accuracy >= 0.97
    assert report.exact_copies == 0
