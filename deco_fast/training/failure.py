"""What is kept of a step that ended a run, to be looked at afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from safetensors.torch import save_file
from torch import Tensor

from deco_fast.checkpoint import save_weights
from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.errors import UserError
from deco_fast.training.figures import MadeStep
from deco_fast.training.run_folder import RunFolder, write_atomically
from deco_fast.training.state import whole_weights
from deco_fast.training.step import TrainingStep

_NAMED_SAMPLES = 8


def stop_after_failure(training: TrainingStep, folder: RunFolder, made: MadeStep) -> NoReturn:
    """Keep the weights that a step began with, its batch and its draws, and end the run.

    Into failures/step-…: model.safetensors, for each process batch-RANK.safetensors (images,
    labels, indices, y, t, noise), figures.json; of a text model the captions, before and after
    prefixes and dropout, in captions-RANK.json. All processes call it together.

    Raises:
        UserError: always; it names the step and its first samples.
    """
    place = folder.failure(made.step)
    kept = f"its batch and the weights before it are in {place}"
    weights = whole_weights(training.model, training)
    try:
        _keep(training, place, made, weights)
    except UserError as error:
        kept = f"nothing of it is kept: {error}"
    training.processes.barrier()
    samples = made.batch.indices.tolist()
    named = ", ".join(map(str, samples[:_NAMED_SAMPLES]))
    more = "" if len(samples) <= _NAMED_SAMPLES else ", …"
    raise UserError(
        f"the loss is {made.values['loss/total']:.6g} at step {made.step} (gradient norm "
        f"{made.values['gradient_norm']:.6g}; samples {named}{more}): {kept}; go on with the same "
        "command and a lower training.learning_rate, or training.gradient_clipping 1.0; the newest "
        f"checkpoint is {folder.newest_checkpoint() or 'none'}: move it away should this come again"
    )


def _keep(
    training: TrainingStep, place: Path, made: MadeStep, weights: Mapping[str, Tensor]
) -> None:
    rank = training.processes.rank
    draws = training.draws(made.step - 1, made.batch)
    values = {**made.batch._asdict(), **draws._asdict()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    with atomic_file(place / f"batch-{rank}.safetensors") as path:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
    if captions := {name: value for name, value in values.items() if name not in tensors}:
        text = json.dumps(captions, indent=1, ensure_ascii=False)
        write_atomically(place / f"captions-{rank}.json", text + "\n")
    if training.processes.is_main:
        config = training.config
        save_weights(
            place / "model.safetensors",
            weights,
            config.card(made.step - 1),
            weights="model",
            config=config.model,
        )
        write_atomically(place / "figures.json", json.dumps(made.values, indent=2) + "\n")
