"""The page itself: what is on it, and what its buttons do."""

from __future__ import annotations

import html
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import gradio as gr

from deco_fast.app.drawing import Drawn, draw_request
from deco_fast.app.request import DrawRequest, check_request
from deco_fast.app.served import ServedModel
from deco_fast.app.visitors import Visitors
from deco_fast.errors import UserError
from deco_fast.models.config import ClassConfig
from deco_fast.solvers import MAX_ORDER, SOLVERS

# Files that the page has shown are deleted after an hour; looked for every five minutes. A request
# leaves some megabytes, and there may be one every few seconds.
_DELETE_CACHE = (300, 3600)
# Interpolated, images of a few pixels would be a blur.
_PIXELATED = "#images img, #preview img, #trajectory img { image-rendering: pixelated; }"
_PIXELATED_BELOW = 128
_GALLERY = """
#images .caption-label { max-width: 100%; font-size: 0.7rem; }
#images .grid-wrap { min-height: 0 !important; }
"""


def build_page(served: ServedModel) -> gr.Blocks:
    """The page for a model; `serve` puts it on a port."""
    card = served.card
    is_class_model = isinstance(served.model.config, ClassConfig)
    with gr.Blocks(
        title=f"DeCo: {card.name}", analytics_enabled=False, delete_cache=_DELETE_CACHE
    ) as page:
        gr.Markdown(f"# DeCo\n`{card.name}`, {card.height}×{card.width} pixels, {served.device}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs = _class_inputs(served) if is_class_model else _text_inputs()
                inputs |= _image_inputs(served)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=3, min_width=320):
                outputs = _outputs()

            # In the page, though not to be seen: a browser sends back what it has there.
            ticket = gr.Number(0, precision=0, visible="hidden", elem_id="ticket")

        _connect(served, inputs, ticket, outputs, generate, stop)
    return page


def _connect(
    served: ServedModel,
    inputs: dict[str, gr.components.Component],
    ticket: gr.Number,
    outputs: dict[str, gr.components.Component],
    generate: gr.Button,
    stop: gr.Button,
) -> None:
    """What the buttons do."""
    visitors = Visitors()

    def checked(values: Sequence[Any]) -> DrawRequest:
        fields = dict(zip(inputs, values, strict=True))
        return check_request(fields, served.model.config, served.card.sampling, served.limits)

    # gradio hands the session over by the annotation.
    def begin(session: gr.Request, *values: Any) -> tuple[str, int]:
        with _messages():
            checked(values)
        return "waiting for its turn", visitors.begin(str(session.session_hash))

    def draw(session: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        visitor, number = str(session.session_hash), values[-1]
        try:
            with _messages():
                request = checked(values[:-1])
                moments = _draw(
                    served, request, outputs, lambda: visitors.is_stopped(visitor, number)
                )
                for moment in moments:
                    # What is shown is the newer request's.
                    if visitors.is_replaced(visitor, number):
                        return
                    yield moment
        finally:
            visitors.end(visitor, number)

    def draw_for_program(*values: Any) -> Iterator[dict[Any, Any]]:
        with _messages():
            yield from _draw(served, checked(values), outputs, lambda: False)

    # gradio reads a program's names for the values here; without it they are param_0, param_1, …
    named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in inputs]
    draw_for_program.__signature__ = Signature(named)  # type: ignore[attr-defined]

    def end(session: gr.Request) -> None:
        visitors.stop(str(session.session_hash))

    given, status = list(inputs.values()), outputs["status"]
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "draw"}
    # What is wrong is said at once; a place in the queue is for what can be drawn.
    generate.click(
        begin,
        given,
        [status, ticket],
        show_progress="hidden",
        # Through the queue all the same: messages of what is not are not shown.
        concurrency_limit=None,
        api_visibility="private",
    ).success(
        draw,
        [*given, ticket],
        list(outputs.values()),
        show_progress="minimal",
        show_progress_on=status,
        **one_at_a_time,
        api_visibility="private",
        # Otherwise the page would drop a request while one that was stopped comes to its end.
        trigger_mode="multiple",
    )
    gr.Button(visible=False).click(
        draw_for_program, given, list(outputs.values()), api_name="generate", **one_at_a_time
    )
    stop.click(end, None, None, queue=False, show_progress="hidden", api_visibility="private")


@contextmanager
def _messages() -> Iterator[None]:
    """Show what is wrong inside the `with` block on the page."""
    try:
        yield
    except UserError as error:
        message = html.escape(" ".join(str(error).split()))
        raise gr.Error(message, print_exception=False) from error


def page_css(served: ServedModel) -> str:
    """The page's own style."""
    is_small = max(served.card.height, served.card.width) < _PIXELATED_BELOW
    return _GALLERY + _PIXELATED if is_small else _GALLERY


def _class_inputs(served: ServedModel) -> dict[str, gr.components.Component]:
    config = served.model.config
    assert isinstance(config, ClassConfig)
    return {
        "classes": gr.Dropdown(
            [(str(label), label) for label in range(config.num_classes)],
            value=[],
            multiselect=True,
            label="Classes",
            info=f"0 … {config.num_classes - 1}, in turn; none chosen: all",
            elem_id="classes",
        )
    }


def _text_inputs() -> dict[str, gr.components.Component]:
    return {
        "prompt": gr.Textbox(
            label="Prompt", info="empty: whatever the model likes", lines=3, elem_id="prompt"
        ),
        "negative_prompt": gr.Textbox(
            label="Negative prompt", info="what guidance leads away from", elem_id="negative_prompt"
        ),
    }


def _image_inputs(served: ServedModel) -> dict[str, gr.components.Component]:
    card, limits, settings = served.card, served.limits, served.card.sampling
    with gr.Row():
        fitting = max(1, limits.pixels // (card.height * card.width))
        num = gr.Number(
            min(4, limits.images, fitting),
            label="Number of images",
            info=f"up to {limits.images}",
            elem_id="num",
        )
        # As text: a browser's numbers are exact up to 2⁵³ only.
        seed = gr.Textbox("0", label="Seed", info="0 … 2⁶⁴ − 1", max_lines=1, elem_id="seed")
    another = gr.Button("Another seed", size="sm", elem_id="another")
    another.click(
        lambda: str(secrets.randbelow(2**32)), None, seed, queue=False, api_visibility="private"
    )
    with gr.Row():
        height = gr.Number(card.height, label="Height", info="pixels", elem_id="height")
        width = gr.Number(card.width, label="Width", info="pixels", elem_id="width")
    with gr.Row():
        steps = gr.Number(
            settings.steps, label="Steps", info=f"1 … {limits.steps}", elem_id="steps"
        )
        guidance = gr.Number(
            settings.guidance_scale,
            label="Guidance",
            info="1 is none",
            step=0.1,
            elem_id="guidance",
        )
    with gr.Accordion("Solver", open=False):
        solver = gr.Dropdown(list(SOLVERS), value=settings.solver, label="Solver", elem_id="solver")
        order = gr.Number(
            settings.order, label="Order", info=f"of adams, 1 … {MAX_ORDER}", elem_id="order"
        )
        time_shift = gr.Number(
            settings.time_shift,
            label="Time shift",
            info="above 1: more steps near the noise",
            step=0.1,
            elem_id="time_shift",
        )
    return {
        "num": num,
        "seed": seed,
        "height": height,
        "width": width,
        "steps": steps,
        "guidance": guidance,
        "solver": solver,
        "order": order,
        "time_shift": time_shift,
    }


def _outputs() -> dict[str, gr.components.Component]:
    status = gr.HTML("", elem_id="status")
    with gr.Row():
        preview = gr.Image(
            label="As they are denoised",
            # Many, mostly of noise, which png does not make smaller.
            format="jpeg",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="preview",
        )
        trajectory = gr.Image(
            label="From noise to image",
            type="filepath",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="trajectory",
        )
    return {
        "status": status,
        "preview": preview,
        "trajectory": trajectory,
        "images": gr.Gallery(
            label="Images",
            format="png",
            columns=4,
            height="auto",
            interactive=False,
            buttons=["download", "download_all", "fullscreen"],
            elem_id="images",
        ),
        "download": gr.DownloadButton(
            "Download all (PNG, animation, settings)", interactive=False, elem_id="download"
        ),
        "command": gr.Textbox(
            label="The same images again, bit for bit",
            buttons=["copy"],
            interactive=False,
            lines=2,
            elem_id="command",
        ),
    }


def _draw(
    served: ServedModel,
    request: DrawRequest,
    outputs: dict[str, gr.components.Component],
    is_stopped: Callable[[], bool],
) -> Iterator[dict[Any, Any]]:
    if is_stopped():
        yield {outputs["status"]: "stopped"}
        return
    yield {
        outputs["status"]: "preparing",
        outputs["trajectory"]: None,
        outputs["images"]: [],
        outputs["download"]: gr.DownloadButton(interactive=False),
        outputs["command"]: "",
    }
    # gradio has copied the files when it asks for what comes after the last of them.
    with tempfile.TemporaryDirectory(prefix="deco-app-") as folder:
        for moment in draw_request(served, request, Path(folder), is_stopped):
            if not isinstance(moment, Drawn):
                bar = f'<progress max="{moment.total}" value="{moment.done}"></progress>'
                yield {
                    outputs["status"]: f"{bar} evaluation {moment.done} of {moment.total}",
                    outputs["preview"]: moment.preview,
                }
                continue
            size = f"{request.height}×{request.width}"
            lines = [f"drawn: {request.num} of {size}, seed {request.seed}", *moment.notes]
            yield {
                outputs["status"]: "<br>".join(map(html.escape, lines)),
                outputs["preview"]: moment.preview,
                outputs["trajectory"]: str(moment.animation),
                outputs["images"]: [
                    (str(path), caption)
                    for path, caption in zip(moment.images, request.captions, strict=True)
                ],
                outputs["download"]: gr.DownloadButton(value=str(moment.archive), interactive=True),
                outputs["command"]: moment.command,
            }
            return
    yield {outputs["status"]: "stopped"}
