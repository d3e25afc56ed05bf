"""The model card of a published model: README.md with the hub's metadata at its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml
from torch import Tensor

from deco_fast.checkpoint.find import HUB_SCHEME
from deco_fast.checkpoint.format import Header, weights_file
from deco_fast.models.config import ClassConfig, DeCoT2IConfig

_PAPER = "https://arxiv.org/abs/2511.19365"

_KINDS = {
    "deco": "DeCo",
    "deco-t2i": "DeCo",
    "pixel-dit": "A DiT on pixels, a baseline of DeCo",
    "pixnerd": "PixNerd, which DeCo is compared with",
    "pixddt": "PixDDT, which DeCo is compared with",
}

_LICENCE = "# license: its owner's choice, such as mit\n"
"""A comment, for only who trained a model can say it."""

_FOLDER = "FOLDER or OWNER/REPOSITORY"


def model_readme(header: Header, tensors: Mapping[str, Tensor]) -> str:
    """The text of README.md.

    Args:
        header: what the weights file says.
        tensors: of the network.
    """
    config, card = header.config, header.card
    is_text = isinstance(config, DeCoT2IConfig)
    metadata: dict[str, Any] = {"library_name": "deco_fast"}
    if is_text:
        metadata["pipeline_tag"] = "text-to-image"
    metadata["tags"] = ["deco_fast", config.kind, "pixel-diffusion", "flow-matching"]
    if isinstance(config, ClassConfig):
        source, call = f"class labels (0 … {config.num_classes - 1})", "class_labels=[0]"
        extras, option = "diffusers", "--classes 0"
    else:
        source, call = "prompts", '"a lighthouse in a storm"'
        extras, option = "diffusers,t2i", '--prompt "a lighthouse in a storm"'
    header_text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{header_text}{_LICENCE}---",
        f"# {card.name}",
        f"{_KINDS[config.kind]} ([paper]({_PAPER})): it draws images of {card.height}×{card.width} "
        f"pixels from {source}. It works on pixels and has no autoencoder.",
        "## Use",
        f"```bash\npip install 'deco-fast[{extras}]'\n```",
        f"```python\nfrom deco_fast.pipeline import DeCoPipeline\n\n"
        f'pipe = DeCoPipeline.from_pretrained("{_FOLDER}")\n'
        f"image = pipe({call}).images[0]\n```",
        "It is a checkpoint of deco_fast as well, which reads safetensors and runs no code from a "
        "file:",
        f"```bash\ndeco-sample --checkpoint FOLDER --weights {header.weights} {option}\n```",
        "## What it is",
        _table(_facts(header, tensors)),
        "## How it is drawn from, unless told otherwise",
        _table({name: _shown(value) for name, value in asdict(card.sampling).items()}),
    ]
    if card.assumed:
        parts += [
            "## What was assumed",
            "The file that this model comes from did not say:",
            "\n".join(f"- {fact}" for fact in card.assumed),
        ]
    return "\n\n".join(parts) + "\n"


def _facts(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    config, card = header.config, header.card
    count = sum(tensor.numel() for tensor in tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    weights = {"ema": "moving average", "model": "as the optimizer left them"}[header.weights]
    facts = {
        "parameters": f"{count:,} ({', '.join(dtypes)}, {weights_file(header.weights)})",
        "weights": weights if card.step is None else f"{weights}, step {card.step:,}",
        "image size": f"{card.height}×{card.width} pixels",
        "prediction": card.prediction,
    }
    if card.text_encoder is not None:
        name = card.text_encoder.removeprefix(HUB_SCHEME)
        on_hub = card.text_encoder.startswith(HUB_SCHEME)
        facts["text encoder"] = name if on_hub else "Qwen3, in the folder text_encoder"
    return facts | {name: _shown(value) for name, value in config.to_json().items()}


def _shown(value: object) -> str:
    return " … ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
