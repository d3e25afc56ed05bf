"""The tensors of one network in a file, opened and read one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from deco_fast.checkpoint.format import BESIDE_SCHEME, PROJECTOR_FILE, TRAINING_FILE, Header
from deco_fast.errors import UserError
from deco_fast.models.build import empty_network
from deco_fast.models.card import ModelCard
from deco_fast.models.config import NetworkConfig
from deco_fast.models.network import DeCoNetwork


class MissingWeightsError(UserError):
    """A checkpoint is all right but does not hold the weights that were asked for."""


def tensor_problems(
    model: DeCoNetwork,
    shapes: Mapping[str, tuple[int, ...]],
    called: Callable[[str], str] = str,
    extra: Sequence[str] = (),
) -> str:
    """How tensors differ from those of a network, in words; empty where they are the same.

    Args:
        model: the network.
        shapes: of the tensors, by our names.
        called: what to call one.
        extra: tensors that are unknown in any case.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [called(name) for name in expected if name not in shapes]
    unknown = [*extra, *(called(name) for name in shapes if name not in expected)]
    wrong = [
        f"{called(name)} {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    kinds = ((missing, "missing"), (unknown, "unknown"), (wrong, "of the wrong shape"))
    return ", ".join(f"{len(names)} {what} ({listed(names)})" for names, what in kinds if names)


@dataclass(frozen=True)
class Source:
    """The tensors of one network, opened and not yet read; names are ours.

    Attributes:
        path: the file.
        weights: "model" or "ema".
        config: the architecture.
        card: what the tensors cannot tell; its `assumed` lists what the file did not either.
        shapes: shape of every tensor.
        extra: tensors (names as in the file) that no DeCo has.
        left_out: what else the file holds, which no model is made of, in words.
        is_published: whether it has the published layout.
        tensor: a tensor by name, on the CPU, memory-mapped, of whatever dtype.
        name_in_file: what the file calls a tensor, for messages.
        projector: reads the tensors of REPA's projector, which is no part of the network; empty
            where there is none.
    """

    path: Path
    weights: str
    config: NetworkConfig
    card: ModelCard
    shapes: Mapping[str, tuple[int, ...]]
    extra: tuple[str, ...]
    left_out: tuple[str, ...]
    is_published: bool
    tensor: Callable[[str], Tensor]
    name_in_file: Callable[[str], str]
    projector: Callable[[], dict[str, Tensor]] = dict

    def empty_model(self) -> DeCoNetwork:
        """A network of this architecture on the meta device, which holds no memory.

        Raises:
            UserError: the file's tensors are not the ones that it needs.
        """
        model = empty_network(self.config, self.card)
        if problems := tensor_problems(model, self.shapes, self.name_in_file, self.extra):
            raise UserError(
                f"{self.path} does not have the tensors of a DeCo: {problems}; "
                "name an unchanged checkpoint of DeCo"
            )
        return model

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, as a view of the mapped file.

        Raises:
            UserError: it is damaged, or of integers.
        """
        tensor = self.tensor(name)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self.path} has {tensor.dtype} in {self.name_in_file(name)}: "
                "name a checkpoint with floating-point weights"
            )
        return tensor

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the model, each as a view of the mapped file.

        Raises:
            UserError: they are not those of a DeCo, or damaged.
        """
        return {name: self.read(name) for name in self.empty_model().state_dict()}


def read_header(path: Path) -> Header:
    """The metadata of a safetensors file of ours.

    Raises:
        UserError: it is damaged, or not ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return Header.from_metadata(file.metadata() or {}, path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def open_safetensors(path: Path, weights: str | None) -> Source:
    """Open a safetensors file of ours; `weights` as for `open_source`.

    Raises:
        UserError: it is damaged, not ours, or does not hold these weights.
    """
    header = read_header(path)
    choose_weights(weights, [header.weights], path)
    file = safe_open(path, framework="pt")
    return Source(
        path=path,
        weights=header.weights,
        config=header.config,
        card=_at_its_place(header.card, path),
        shapes={name: tuple(file.get_slice(name).get_shape()) for name in file.keys()},  # noqa: SIM118
        extra=(),
        left_out=_training_files(path, header),
        is_published=False,
        tensor=file.get_tensor,
        name_in_file=str,
        projector=functools.partial(_read_projector, path, header),
    )


def _at_its_place(card: ModelCard, path: Path) -> ModelCard:
    """With the path of a text encoder that lies beside the weights file."""
    if card.text_encoder is None or not card.text_encoder.startswith(BESIDE_SCHEME):
        return card
    name = card.text_encoder.removeprefix(BESIDE_SCHEME)
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(
            f"{path} names a text encoder '{card.text_encoder}' that is not beside it: "
            "do not use this file"
        )
    return replace(card, text_encoder=str(path.parent / name))


def _read_projector(path: Path, header: Header) -> dict[str, Tensor]:
    if PROJECTOR_FILE not in header.files:
        return {}
    file = path.parent / PROJECTOR_FILE
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def _training_files(path: Path, header: Header) -> tuple[str, ...]:
    if TRAINING_FILE not in header.files:
        return ()
    return (f"{path.parent / TRAINING_FILE} (optimizer, step, loader and random state)",)


def choose_weights(weights: str | None, held: list[str], path: Path) -> str:
    """The weights to use out of those that `path` holds; the average if any will do.

    Raises:
        MissingWeightsError: the wanted ones are not among them.
    """
    wanted = weights or ("ema" if "ema" in held else held[0])
    if wanted not in held:
        has = " and ".join(held) or "none"
        raise MissingWeightsError(
            f"{path} holds no '{wanted}' weights (it has: {has}): use --weights {held[0]}"
        )
    return wanted


def unreadable(path: Path, error: Exception) -> UserError:
    """The refusal of a file that fails while it is read."""
    if isinstance(error, OSError):
        return UserError(f"cannot read {path} ({error.strerror or error}): check its permissions")
    return UserError(f"{path} is truncated or damaged ({error}): download or copy it again")


def listed(names: list[str], count: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
