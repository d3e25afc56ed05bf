"""A run that begins with the weights of another: --init-from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deco_fast.checkpoint.checksums import check_undamaged
from deco_fast.checkpoint.format import WEIGHTS
from deco_fast.checkpoint.load import open_checkpoint
from deco_fast.checkpoint.source import MissingWeightsError, Source
from deco_fast.errors import UserError
from deco_fast.models.build import empty_network
from deco_fast.models.config import NetworkConfig
from deco_fast.training.parallel import set_weights
from deco_fast.training.step import TrainingStep


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint that fits the network, opened and not yet read.

    Attributes:
        path: as the user named it.
        model, ema: its weights and their average; the same where it holds one of them.
    """

    path: str
    model: Source
    ema: Source

    def load(self, training: TrainingStep) -> str:
        """Overwrite the weights, their average and REPA's projector; a sentence on that.

        The image size may differ: nothing in DeCo depends on it. A projector of another shape, or
        none, leaves the new one as it is.

        Raises:
            UserError: a tensor is damaged.
        """
        set_weights(training.model, self.model.state_dict())
        set_weights(training.ema.model, self.ema.state_dict())
        found = "weights and average"
        if self.model is self.ema:
            found = f"'{self.ema.weights}' weights, which begin the average as well"
        step = self.ema.card.step
        at = "" if step is None else f" of step {step:,}"
        return f"beginning with {self.path}: {found}{at}{self._load_projector(training)}"

    def _load_projector(self, training: TrainingStep) -> str:
        projector = training.objective.projector
        if projector is None:
            return ""
        tensors = self.ema.projector()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in projector.state_dict().items()}:
            return "; the projector of REPA begins anew"
        set_weights(projector, tensors)
        return ", projector"


def open_initial_weights(path: str | Path, config: NetworkConfig) -> InitialWeights:
    """Open a checkpoint to begin a run with.

    Args:
        path: as for `deco_fast.load_checkpoint`: ours or a published one.
        config: the network of the run.

    Raises:
        UserError: it cannot be read, is damaged, or is of a network with other tensors; the first
            is named.
    """
    sources = {}
    for weights in WEIGHTS:
        try:
            sources[weights] = open_checkpoint(path, weights)
        except MissingWeightsError:
            continue
    model = sources.get("model", sources.get("ema"))
    ema = sources.get("ema", model)
    assert model is not None and ema is not None, "open_checkpoint refuses what holds neither"
    expected = {name: tuple(t.shape) for name, t in empty_network(config).state_dict().items()}
    for source in {id(source): source for source in (model, ema)}.values():
        _compare(source, expected)
        check_undamaged(source.path)
    return InitialWeights(str(path), model, ema)


def _compare(source: Source, expected: dict[str, tuple[int, ...]]) -> None:
    remedy = "name a checkpoint of this network, or set the model's keys to those of the checkpoint"
    for name, shape in expected.items():
        if name not in source.shapes:
            raise UserError(f"--init-from {source.path} has no {name} {shape}: {remedy}")
        if source.shapes[name] != shape:
            raise UserError(
                f"--init-from {source.path} has {source.name_in_file(name)} of shape "
                f"{source.shapes[name]}, and the network needs {shape}: {remedy}"
            )
    surplus = [*source.extra, *(name for name in source.shapes if name not in expected)]
    if surplus:
        raise UserError(
            f"--init-from {source.path} has {surplus[0]}, which the network lacks: {remedy}"
        )
