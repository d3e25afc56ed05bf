"""`python app.py` and `deco-app`: draw images in a browser."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deco_fast import ops
from deco_fast.app.address import check_address
from deco_fast.app.limits import Limits
from deco_fast.app.served import Origin, ServedModel
from deco_fast.checkpoint import load_checkpoint
from deco_fast.checkpoint.find import HUB_SCHEME, is_shipped, locate
from deco_fast.checkpoint.format import WEIGHTS
from deco_fast.checkpoint.load import check_architecture, open_checkpoint
from deco_fast.cli.installed import command_name
from deco_fast.cli.parser import CommandParser, checked, not_empty, one_of, whole_number
from deco_fast.cli.sample_options import DTYPES, MATMUL_PRECISIONS
from deco_fast.config import load_config
from deco_fast.errors import UserError, run_command
from deco_fast.models.attention import activate_flash_attention
from deco_fast.models.card import ModelCard
from deco_fast.models.config import NetworkConfig
from deco_fast.models.fp8 import fp8_problem
from deco_fast.models.presets import PRESETS, preset
from deco_fast.sampling.job import check_size
from deco_fast.sampling.source import shipped_checkpoint
from deco_fast.sampling.text_encoder import open_text_encoder, text_encoder_path
from deco_fast.training.distributed import pick_device


@run_command
def main(argv: list[str] | None = None) -> int:
    """Parse, open the model, serve the page until an interrupt; the exit status."""
    options = _parser().parse_args(argv)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the page needs the package gradio: pip install 'deco-fast[app]'"
        ) from error
    ops.check_backend("pixel_decoder")
    check_address(options.host, options.port)
    served = _open(options)
    # Imported here, so that --help and what is wrong with the options do not wait for gradio.
    from deco_fast.app.server import serve

    # gradio's own folder is one for all users of the machine, and is left behind.
    with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="deco-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        serve(served, options.host, options.port, lambda address: _say("page", address))
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM, with which a service manager ends a program, is an interrupt."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(title: str, text: str) -> None:
    print(f"{title:<11} {text}", flush=True)


def _open(options: argparse.Namespace) -> ServedModel:
    """The model that the options name.

    Raises:
        UserError: there is no such checkpoint, device or text encoder, or it is of another
            architecture than the configuration.
    """
    device = pick_device(options.device)
    if options.dtype == "fp8" and (problem := fp8_problem(device)):
        raise UserError(f"--dtype fp8: {problem}")
    checkpoint = locate(options.checkpoint or shipped_checkpoint())
    config, card = _config_and_card(checkpoint, options)
    check_size(config, card.height, card.width)
    torch.set_float32_matmul_precision(options.matmul_precision)
    activate_flash_attention(device)
    model = load_checkpoint(
        checkpoint, options.weights, device, DTYPES[options.dtype], options.preset
    )
    encoder = open_text_encoder(model, text_encoder_path(options.text_encoder, card), device)
    shipped = "" if options.checkpoint else " (ships with the package)"
    _say("checkpoint", f"{checkpoint}, {options.weights} weights{shipped}")
    for assumption in card.assumed:
        _say("assumed", assumption)
    _say("computing", f"{options.dtype} on {device}")
    origin = Origin(
        _name(checkpoint, options.checkpoint),
        options.weights,
        options.dtype,
        options.matmul_precision,
        options.preset,
    )
    limits = Limits(
        images=options.max_images,
        pixels=options.max_pixels,
        seconds=options.max_seconds,
        waiting=options.max_waiting,
    )
    return ServedModel(model, card, origin, encoder, limits)


def _config_and_card(
    checkpoint: Path, options: argparse.Namespace
) -> tuple[NetworkConfig, ModelCard]:
    """Image size and settings: the configuration's or preset's, else the checkpoint's."""
    opened = open_checkpoint(checkpoint)
    config = opened.config
    if options.config:
        run = load_config(options.config)
        remedy = "name the --checkpoint that was trained with it"
        check_architecture(checkpoint, config, run.model, f"--config {options.config}", remedy)
        return config, run.card()
    if options.preset:
        named = preset(options.preset)
        # Of a published file the preset knows more of the architecture than the file.
        if not opened.card.assumed:
            remedy = "name another preset, or leave it out"
            what = f"--preset {options.preset}"
            check_architecture(checkpoint, config, named.config, what, remedy)
        opened = open_checkpoint(checkpoint, preset=options.preset)
    return opened.config, opened.card


def _name(checkpoint: Path, named: str | None) -> str:
    """What gives these weights later too, when a run has gone on."""
    if not named:
        return _short(checkpoint)
    shipped = is_shipped(named) and not Path(named).exists()
    return named if shipped or named.startswith(HUB_SCHEME) else str(checkpoint)


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _parser() -> CommandParser:
    defaults = Limits()
    parser = CommandParser(
        prog=command_name("app"),
        description="Draw images in a browser, on a page that this machine serves.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        type=not_empty,
        metavar="PATH",
        help="as for sample.py (default: the digits model that ships with the package)",
    )
    source = model.add_mutually_exclusive_group()
    source.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="image size and settings of a training configuration (default: the checkpoint's own)",
    )
    source.add_argument(
        "--preset",
        type=checked(preset),
        metavar="NAME",
        help=f"image size and settings of {', '.join(PRESETS)}",
    )
    model.add_argument(
        "--weights",
        type=one_of(WEIGHTS),
        default="ema",
        help="ema (the moving average) or model (default: %(default)s)",
    )
    model.add_argument(
        "--text-encoder", metavar="PATH", help="a folder with Qwen3, or hf:owner/repository"
    )
    page = parser.add_argument_group("page")
    page.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="0.0.0.0 opens the page to the network (default: %(default)s, this machine alone)",
    )
    page.add_argument(
        "--port", type=whole_number(1, 65535), help="(default: 7860, or the next one that is free)"
    )
    for option, default, text in (
        ("images", defaults.images, "in one request"),
        ("pixels", defaults.pixels, "of all images of one request"),
        ("seconds", defaults.seconds, "that a request may take"),
        ("waiting", defaults.waiting, "requests in the queue; one is drawn at a time"),
    ):
        page.add_argument(
            f"--max-{option}",
            type=whole_number(1),
            default=default,
            metavar="NUMBER",
            help=f"{text} (default: %(default)s)",
        )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", help="auto, cpu or cuda (default: %(default)s)"
    )
    machine.add_argument(
        "--dtype",
        type=one_of(tuple(DTYPES)),
        default="fp32",
        help="of the model: fp32, bf16, fp16 or fp8 (default: %(default)s)",
    )
    machine.add_argument(
        "--matmul-precision",
        type=one_of(MATMUL_PRECISIONS),
        default="highest",
        help="of products in fp32 (default: %(default)s)",
    )
    return parser
