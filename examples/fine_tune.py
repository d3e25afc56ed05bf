"""Fine-tune a checkpoint on a folder of your own images, and draw from the result.

    python examples/fine_tune.py photos                 # from the digits model that ships
    python examples/fine_tune.py photos --checkpoint imagenet256_epoch800.ckpt

A class model takes a folder for each class, `photos/cats/1.jpg`; a text model any tree of images
with a caption beside each, `photos/1.jpg` and `photos/1.txt`. It writes a configuration of
`train.py`, trains with it from the checkpoint's weights and draws with `sample.py`: the pictures
are in OUT/samples, the run is in OUT/run. Every key of a configuration is an option as well, such
as `--training.learning_rate 1e-5`. Typed again, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from deco_fast.checkpoint import load_checkpoint, save_checkpoint
from deco_fast.checkpoint.checksums import weights_checksum
from deco_fast.checkpoint.load import open_checkpoint
from deco_fast.checkpoint.source import Source
from deco_fast.cli.parser import CommandParser, whole_number
from deco_fast.cli.sample import main as sample
from deco_fast.cli.train import main as train
from deco_fast.conditioning.qwen3 import QWEN3_1_7B
from deco_fast.data.captions import FolderCaptions
from deco_fast.data.folder import FolderImages
from deco_fast.errors import UserError, nearest, run_command
from deco_fast.models.build import build_network
from deco_fast.models.class_conditional import ClassConditional
from deco_fast.models.config import ClassConfig
from deco_fast.models.network import DeCoNetwork
from deco_fast.resources import pretrained_folder
from deco_fast.sampling.source import SHIPPED, checkpoint_name
from deco_fast.training.distributed import pick_device
from deco_fast.training.run_folder import write_atomically

# Of train.py; keys of the configuration are options as well.
PASSED_ON = ("--repa", "--max-time", "--dry-run", "--name")

PROMPTS = 4
"""So many captions of the folder are drawn."""


@run_command
def main(argv: list[str] | None = None) -> int:
    """Write the configuration, train, draw; the exit status."""
    options, overrides = _parser().parse_known_args(argv)
    _check_options(options, overrides)
    if options.out.resolve().is_relative_to(options.images.resolve()):
        raise UserError(f"--out {options.out} is in {options.images} itself: choose another --out")
    source = open_checkpoint(options.checkpoint, None, options.preset)
    fields = _shared_fields(source, options)
    drawing = []
    if isinstance(source.config, ClassConfig):
        _for_classes(fields, source, options)
    else:
        captions = _some_captions(options.images)
        _for_captions(fields, source, captions)
        for caption in captions:
            drawing += ["--prompt", caption]
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    config, run = options.out / "fine_tune.yaml", options.out / "run"
    words = ["--out", str(run), "--device", options.device, *overrides]
    is_new = _check_replaceable(config, text)
    if "--dry-run" in overrides:
        with TemporaryDirectory() as folder:
            draft = Path(folder, config.name)
            draft.write_text(text, encoding="utf-8")
            return train(["--config", str(draft), *words])
    write_atomically(config, text)
    status = train(["--config", str(config), *words])
    if status == 2 and is_new:  # it describes no run, or one that is to be corrected
        config.unlink(missing_ok=True)
    if status or not (run / "finished").exists():
        return status
    words = ["--checkpoint", str(run), "--out", str(options.out / "samples"), "--overwrite"]
    return sample([*words, "--device", options.device, *drawing])


def _check_options(options: argparse.Namespace, overrides: list[str]) -> None:
    own = [f"--{name.replace('_', '-')}" for name in vars(options) if name != "images"]
    for word in overrides:
        option = word.partition("=")[0]
        if option.startswith("--") and "." not in option and option not in PASSED_ON:
            raise UserError(f"unknown option '{option}'{nearest(option, [*own, *PASSED_ON])}")


def _check_replaceable(config: Path, text: str) -> bool:
    """Whether there is no such file yet; what is there must say the same.

    Raises:
        UserError: it does not.
    """
    try:
        lines = config.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(
            f"{config} cannot be read ({error.strerror}): choose another --out"
        ) from error
    if lines != text.splitlines():
        ours = [line.strip() for line in text.splitlines() if line not in lines]
        without = f" without '{ours[0]}'" if ours else ""
        raise UserError(
            f"{config} is there{without}, of another run or changed by hand: give the options "
            "that it was made with, delete it, or choose another --out"
        )
    return False


def _shared_fields(source: Source, options: argparse.Namespace) -> dict[str, Any]:
    card, steps = source.card, options.steps
    on_gpu = pick_device(options.device).type == "cuda"
    return {
        "name": f"{card.name}-fine-tuned",
        "model": source.config.to_json(),
        "data": {
            "dataset": "folder",
            "root": str(options.images),
            "height": card.height,
            "width": card.width,
            "workers": min(4, os.cpu_count() or 1) if on_gpu else 0,
        },
        "training": {
            "init_from": str(options.checkpoint),
            "steps": steps,
            "batch_size": options.batch_size,
            "warmup_steps": steps // 20,
            "gradient_clipping": 1.0,
            # An average as long as a published training's would still be the old model's.
            "ema_decay": max(0.9, min(0.9999, 1 - 10 / steps)),
            "precision": "bf16" if on_gpu else "fp32",
            "compile": False,
        },
        "sampling": asdict(card.sampling)
        | {"guidance_interval": list(card.sampling.guidance_interval)},
        "output": {
            "log_every": max(1, steps // 50),
            "sample_every": max(1, steps // 4),
            "checkpoint_every": max(1, steps // 4),
            "sample_count": 16,
        },
    }


def _for_classes(fields: dict[str, Any], source: Source, options: argparse.Namespace) -> None:
    """One label for each folder; where the checkpoint knows another number, the labels are new."""
    assert isinstance(source.config, ClassConfig)
    classes = FolderImages(options.images).classes
    for label, name in enumerate(classes):
        print(f"class {label}: {name}")
    fields["training"]["learning_rate"] = 1e-4
    if len(classes) == source.config.num_classes:
        return
    # By what it is made of: of another checkpoint, the run in OUT would not be the one asked for.
    old = load_checkpoint(options.checkpoint, source.weights, preset=options.preset)
    name = f"{checkpoint_name(Path(options.checkpoint))}-{weights_checksum(old)}"
    initial = options.out / f"initial-{name}-{len(classes)}-classes"
    if not initial.exists():
        _with_new_classes(old, len(classes), initial)
    fields["model"]["num_classes"] = len(classes)
    fields["training"]["init_from"] = str(initial)


def _with_new_classes(old: DeCoNetwork, num_classes: int, folder: Path) -> None:
    """The checkpoint with an embedding for other classes; its null class stays."""
    assert isinstance(old, ClassConditional)
    # As far from each other as the old ones have come, or it takes long to tell them apart.
    std = old.class_embedder.weight.std().item()
    config = replace(old.config, num_classes=num_classes, class_embedding_std=std)
    new = build_network(config, old.card)
    assert isinstance(new, ClassConditional) and old.card is not None
    state = {
        name: tensor
        for name, tensor in old.state_dict().items()
        if not name.startswith("class_embedder.")
    }
    new.load_state_dict(state, strict=False)
    with torch.no_grad():
        new.class_embedder.weight[-1] = old.class_embedder.weight[-1]
    save_checkpoint(folder, model=None, ema=new, card=old.card)


def _for_captions(fields: dict[str, Any], source: Source, captions: list[str]) -> None:
    """As in the published fine-tuning, configs/t2i_sft_512.yaml."""
    fields["data"]["crop"] = "bilinear"
    fields["flow"] = {"time_shift": 4.0, "null_probability": 0.1}
    fields["text"] = {
        "encoder": source.card.text_encoder or QWEN3_1_7B,
        "sample_prompts": captions,
    }
    fields["training"]["learning_rate"] = 1e-5


def _some_captions(images: Path) -> list[str]:
    source = FolderCaptions(images)
    captions = (source.caption(index).strip() for index in range(len(source.names)))
    return list(itertools.islice(dict.fromkeys(captions), PROMPTS))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="fine_tune.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, metavar="FOLDER", help="your images")
    parser.add_argument(
        "--checkpoint",
        default=str(pretrained_folder() / SHIPPED),
        metavar="PATH",
        help="what to begin with, as of sample.py (default: the digits model that ships)",
    )
    parser.add_argument("--preset", metavar="NAME", help="image size and sampling, as of sample.py")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fine-tuned"),
        metavar="FOLDER",
        help="(default: fine-tuned)",
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=1000, help="optimizer steps (default: 1000)"
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=16, help="images a step (default: 16)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
