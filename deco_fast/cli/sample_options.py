"""The options of the sampling command."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from deco_fast.checkpoint.format import WEIGHTS
from deco_fast.cli.installed import command_name, script_path
from deco_fast.cli.parser import (
    CommandParser,
    checked,
    not_empty,
    number,
    one_of,
    to_path,
    whole_number,
)
from deco_fast.models.presets import PRESETS, preset
from deco_fast.sampling.recipes import RECIPES, check_recipe
from deco_fast.solvers import MAX_ORDER, check_solver

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # The dtype of everything but the DiT's products.
    "fp8": torch.bfloat16,
}
MATMUL_PRECISIONS = ("highest", "high")


def sample_parser() -> CommandParser:
    """The parser; a value that is wrong by itself is refused by it."""
    script = script_path("sample")
    parser = CommandParser(
        prog=command_name("sample"),
        description="Draw images: a grid and single PNG files, or an npz file for the ADM\n"
        "evaluation suite. Image i begins from the same noise whatever the batch size or\n"
        "the number of processes. To share the work between 8 GPUs:\n\n"
        f"  torchrun --nproc-per-node 8 -- {script} --num 50000 --npz samples.npz\n\n"
        "(without the -- torchrun takes --num for its own --numa-binding)",
        epilog="recipes of the paper (with its guidance: 3.2 in (0.1, 1], 5.0 from 512×512):\n"
        + "\n".join(f"  {name:<11} {recipe.description}" for name, recipe in RECIPES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_image_options(parser.add_argument_group("images"))
    _add_text_options(parser.add_argument_group("text", "for text models, which draw from prompts"))
    _add_settings_options(
        parser.add_argument_group(
            "settings", "what is not given comes from the recipe, the preset or the checkpoint"
        )
    )
    _add_output_options(parser.add_argument_group("output"))
    _add_machine_options(parser.add_argument_group("machine"))
    return parser


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint",
        type=not_empty,
        metavar="PATH",
        help="a run folder, a checkpoint folder, a .safetensors or published .ckpt file, or "
        "hf:owner/repository/file (default: the newest run that has finished, else the "
        "checkpoint that ships with the package)",
    )
    group.add_argument(
        "--runs",
        type=to_path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where runs are looked for (default: %(default)s)",
    )
    group.add_argument(
        "--weights",
        type=one_of(WEIGHTS),
        default="ema",
        help="ema (the moving average) or model (default: %(default)s)",
    )
    group.add_argument(
        "--preset",
        type=checked(preset),
        metavar="NAME",
        help=f"image size and settings of {', '.join(PRESETS)} (default: the checkpoint's own)",
    )


def _add_image_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num",
        type=whole_number(1),
        help="images (default: 40); of text models 4 for each --prompt, 1 for each line of a file",
    )
    group.add_argument(
        "--classes",
        type=whole_number(0),
        nargs="+",
        metavar="CLASS",
        help="image i is of the (i mod how many)th of them (default: all classes in turn)",
    )
    group.add_argument(
        "--seed", type=whole_number(0, 2**64 - 1), default=0, help="(default: %(default)s)"
    )
    for side in ("height", "width"):
        group.add_argument(
            f"--{side}",
            type=whole_number(1),
            metavar="PIXELS",
            help="divisible by the patch size; of DeCo-T2I 128 … 1024, divisible by 32 (default: "
            "the checkpoint's)",
        )


def _add_text_options(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help='what to draw; given again for more, and image i is of the (i mod how many)th; "" is '
        "unconditional",
    )
    source.add_argument(
        "--prompts-file", type=to_path, metavar="FILE", help="a prompt on each line, in UTF-8"
    )
    source.add_argument(
        "--geneval",
        type=to_path,
        metavar="FILE",
        help="four images for each line of GenEval's evaluation_metadata.jsonl, in the folders "
        "that its scorer reads; typed again, the command goes on",
    )
    source.add_argument(
        "--dpg",
        type=to_path,
        metavar="FOLDER",
        help="a grid of 2×2 images for each file of DPG's prompts/, in the folder that its scorer "
        "reads; typed again, the command goes on",
    )
    group.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="what guidance leads away from (default: nothing)",
    )
    group.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="a folder with Qwen3, or hf:owner/repository (default: the checkpoint's, which of the "
        "published one is hf:Qwen/Qwen3-1.7B)",
    )


def _add_settings_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe", type=checked(check_recipe), metavar="NAME", help=", ".join(RECIPES)
    )
    group.add_argument("--steps", type=whole_number(1), help="solver steps")
    group.add_argument(
        "--solver", type=checked(check_solver), help="euler, heun, heun-pec or adams"
    )
    group.add_argument(
        "--order", type=whole_number(1, MAX_ORDER), help=f"of adams, 1 … {MAX_ORDER}"
    )
    group.add_argument("--guidance-scale", type=number(), metavar="SCALE", help="1 is no guidance")
    group.add_argument(
        "--guidance-interval",
        type=number(),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guidance acts at times in (LOW, HIGH], from 0 (noise) to 1 (image)",
    )
    group.add_argument(
        "--guidance-rescale",
        type=number(0, 1),
        metavar="FACTOR",
        help="0 … 1, against too strong contrast",
    )
    group.add_argument(
        "--time-shift",
        type=number(0, open_low=True),
        metavar="SHIFT",
        help="above 1: more steps near the noise",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=to_path,
        metavar="FOLDER",
        help="for the PNG files and the grid "
        "(default: samples/CHECKPOINT-SOLVERSTEPS-seedSEED, numbered if that is taken)",
    )
    group.add_argument(
        "--npz",
        type=to_path,
        metavar="FILE",
        help="write one npz file instead of PNG files; typed again after it was killed, the "
        "command goes on where it was",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="draw anew what is there already, and replace images of other settings",
    )


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size",
        type=whole_number(1),
        help="images computed at once (default: as many as make 64 of 32×32 pixels on a CPU, as "
        "many as fit, up to 256 of 256×256, on a GPU)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    group.add_argument(
        "--dtype",
        type=one_of(tuple(DTYPES)),
        default="fp32",
        help="of the model: fp32, bf16, fp16, or fp8 for the DiT's products on a GPU that has "
        "them, which needs torchao (default: %(default)s)",
    )
    group.add_argument(
        "--matmul-precision",
        type=one_of(MATMUL_PRECISIONS),
        default="highest",
        help="of products in fp32: high lets a GPU use TF32 and a CPU with a matrix unit "
        "three bfloat16 products (default: %(default)s)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the model, with CUDA graphs on a GPU; the second time it starts faster",
    )
