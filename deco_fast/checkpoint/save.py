"""Writing checkpoints: whole or not at all, and without anything that a reader would execute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deco_fast.checkpoint.atomic import atomic_file, atomic_folder
from deco_fast.checkpoint.checksums import CHECKSUMS_FILE, write_checksums
from deco_fast.checkpoint.format import (
    FOLDER_FILES,
    OPTIMIZER_FOLDER,
    PROJECTOR_FILE,
    TRAINING_FILE,
    WEIGHTS,
    Header,
    weights_file,
)
from deco_fast.checkpoint.source import tensor_problems
from deco_fast.models.build import empty_network
from deco_fast.models.card import ModelCard
from deco_fast.models.config import NetworkConfig
from deco_fast.models.network import DeCoNetwork, check_bare

Network = DeCoNetwork | Mapping[str, Tensor]


def save_checkpoint(
    folder: str | Path,
    *,
    model: Network | None,
    ema: Network | None = None,
    card: ModelCard,
    training: Mapping[str, Any] | None = None,
    projector: Mapping[str, Tensor] | None = None,
    config: NetworkConfig | None = None,
    optimizer_folder: Path | None = None,
) -> Path:
    """Write a checkpoint folder: model.safetensors, ema.safetensors, training.pt, checksums.

    A checkpoint that is already there is replaced only once the new one is on the disk.

    Args:
        folder: for a training `…/checkpoints/step-00001000`, which `newest_checkpoint` finds.
        model: the network, or its state dict; None to save the average alone.
        ema: the exponential moving average of the weights, as a network or a state dict.
        card: what the tensors cannot tell.
        training: optimizer, step, loader and random state: dicts, lists, tuples, strings,
            numbers and tensors, nothing else.
        projector: tensors of REPA's projector, for a file of their own: projector.safetensors.
        config: the network's shape, where `model` and `ema` are state dicts.
        optimizer_folder: the optimizer's state as several processes wrote it, on the same disk;
            it is moved into the checkpoint.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written (a full disk, no permission), or holds files that
            are not a checkpoint's. Older checkpoints, and one in this place, are untouched.
        ValueError: there is nothing to save, no config, `training` holds another type, or the
            tensors or the card are not what could be read again.
    """
    networks = {"model": model, "ema": ema}
    names = [name for name in WEIGHTS if networks[name] is not None]
    if not names:
        raise ValueError("a checkpoint needs the weights of model or ema")
    files = [weights_file(name) for name in names]
    if projector:
        files.append(PROJECTOR_FILE)
    if training is not None:
        _check_plain(training, "training")
        files.append(TRAINING_FILE)
    if optimizer_folder is not None:
        files.append(OPTIMIZER_FOLDER)
    files.append(CHECKSUMS_FILE)
    checked = {
        name: _checked(network, config, card)
        for name, network in networks.items()
        if network is not None
    }
    folder = Path(folder)
    with atomic_folder(folder, owned=FOLDER_FILES) as temporary:
        for name, (tensors, of_network) in checked.items():
            header = Header(name, of_network, card, tuple(files))
            _write_tensors(temporary / weights_file(name), tensors, header.to_metadata())
        if projector:
            _write_tensors(temporary / PROJECTOR_FILE, projector, {})
        if training is not None:
            write_torch(temporary / TRAINING_FILE, training)
        if optimizer_folder is not None:
            # It stays until all is on the disk: whoever tries again needs it.
            shutil.copytree(optimizer_folder, temporary / OPTIMIZER_FOLDER, copy_function=_link)
        write_checksums(temporary)
    if optimizer_folder is not None:
        shutil.rmtree(optimizer_folder, ignore_errors=True)
    return folder


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # not on every disk
        shutil.copyfile(source, destination)


def save_weights(
    path: str | Path,
    model: Network,
    card: ModelCard,
    dtype: torch.dtype | None = None,
    *,
    weights: str = "ema",
    config: NetworkConfig | None = None,
) -> Path:
    """Write one network as a single safetensors file, all that sampling needs.

    Args:
        path: the file; whatever is there is replaced.
        model: the network, or its state dict with `config`.
        card: what the tensors cannot tell.
        dtype: convert to it (torch.float16 halves the file); None keeps what they have.
        weights: which weights these are, "ema" or "model".
        config: the network's shape, where `model` is a state dict.

    Returns:
        The path.

    Raises:
        UserError: the file cannot be written; one that was there is still there.
        ValueError: a weight is too large for `dtype`, `weights` is neither, no config, or the
            tensors or the card are not what could be read again.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be 'ema' or 'model', not '{weights}'")
    path = Path(path)
    tensors, config = _checked(model, config, card)
    header = Header(weights, config, card)
    with atomic_file(path) as temporary:
        _write_tensors(temporary, tensors, header.to_metadata(), dtype)
    return path


def write_torch(path: Path, content: Any) -> None:
    """`torch.save` that tells a full disk: its archive writer hides the system's error.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _checked(
    network: Network, config: NetworkConfig | None, card: ModelCard
) -> tuple[Mapping[str, Tensor], NetworkConfig]:
    """The tensors and their configuration; ValueError for what could not be read again."""
    if isinstance(network, Mapping):
        if config is None:
            raise ValueError("a state dict does not tell its configuration: pass config")
        tensors = network
    else:
        check_bare(network)
        config, tensors = network.config, network.state_dict()
    ModelCard.from_json(card.to_json())
    if sharded := [name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")]:
        raise ValueError(
            f"{sharded[0]} is sharded: gather the state dict, by get_model_state_dict with "
            "full_state_dict=True"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if problems := tensor_problems(empty_network(config, card), shapes):
        raise ValueError(f"these are not the tensors of the configuration: {problems}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has {tensor.dtype}: weights are floating-point numbers")
    return tensors, config


def _write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    converted: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        converted[name] = tensor.detach().to(dtype=dtype or tensor.dtype).contiguous()
        # safetensors refuses tied weights, which it cannot tell from a mistake; read again, they
        # are two.
        if (place := converted[name].data_ptr()) in places:
            converted[name] = converted[name].clone()
        places.add(place)
        if dtype is not None and not converted[name].isfinite().all() and tensor.isfinite().all():
            raise ValueError(f"{name} has values beyond the range of {dtype}: choose another dtype")
    # safetensors makes files that only their owner can read; keep what the umask says.
    path.touch()
    mode = path.stat().st_mode
    save_file(converted, path, metadata=metadata)
    path.chmod(mode)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what `torch.load(weights_only=True)` would refuse to read back."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (type(None), bool, int, float, str, bytes, Tensor):
        raise ValueError(
            f"{where} is a {type(value).__name__}: convert it to plain types and tensors first"
        )
