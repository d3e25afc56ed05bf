"""The command that draws a request's images again, bit for bit."""

from __future__ import annotations

import shlex

from deco_fast.app.request import DrawRequest
from deco_fast.app.served import ServedModel
from deco_fast.cli.installed import command_words


def sample_command(served: ServedModel, request: DrawRequest) -> list[str]:
    """The words of `python sample.py …`, or of `deco-sample …` for an installed `deco-app`.

    Images of one batch size on one machine are the same bits; so the batch size is among them.
    """
    settings, origin = request.settings, served.origin
    low, high = settings.guidance_interval
    words = [*command_words("sample"), f"--checkpoint={origin.checkpoint}"]
    if origin.preset:
        words.append(f"--preset={origin.preset}")
    words += [f"--weights={origin.weights}", f"--num={request.num}", f"--seed={request.seed}"]
    if request.job.prompts is None:
        words += ["--classes", *map(str, request.job.labels)]
    else:
        assert served.encoder is not None
        words += [f"--prompt={prompt}" for prompt in request.job.prompts]
        words.append(f"--negative-prompt={request.negative_prompt}")
        words.append(f"--text-encoder={served.encoder.path}")
    words += [
        f"--height={request.height}",
        f"--width={request.width}",
        f"--solver={settings.solver}",
        f"--order={settings.order}",
        f"--steps={settings.steps}",
        f"--guidance-scale={settings.guidance_scale}",
        *("--guidance-interval", f"{low}", f"{high}"),
        f"--guidance-rescale={settings.guidance_rescale}",
        f"--time-shift={settings.time_shift}",
        f"--batch-size={served.batch_size(request)}",
        f"--device={served.device.type}",
        f"--dtype={origin.dtype}",
        f"--matmul-precision={origin.matmul_precision}",
    ]
    return words


def as_typed(words: list[str]) -> str:
    """Words as a line for a shell."""
    return shlex.join(words)
