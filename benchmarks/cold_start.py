"""Seconds from a process's first line of work to its first image, with torch.compile.

    python -m benchmarks.cold_start figures.json

The weights are random and made on the device: reading a checkpoint is no part of it, nor is
importing torch. Run twice with one TORCHINDUCTOR_CACHE_DIR, it shows what the cache of compiled
code saves.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.inputs import normal
from deco_fast.models.deco import DeCo
from deco_fast.models.presets import PRESETS
from deco_fast.sampling.engine import SamplingEngine


def main() -> None:
    """Draw one image and write how long it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", choices=tuple(PRESETS), default="deco-xl")
    options = parser.parse_args()
    started = time.perf_counter()
    config, card = PRESETS[options.model]
    with torch.device(options.device):
        model = DeCo(config, card).to(torch.bfloat16).requires_grad_(False)
    engine = SamplingEngine(model, batch_size=1, compile=True)
    before = time.perf_counter()
    engine.warm_up()
    warm = time.perf_counter()
    engine(normal(1, *engine.image_shape), [0]).cpu()
    options.figures.write_text(
        json.dumps(
            {
                "model": options.model,
                "device": options.device,
                "first_image_seconds": time.perf_counter() - started,
                "warm_up_seconds": warm - before,
            }
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
