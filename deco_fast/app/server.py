"""The page on a port of this machine."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from deco_fast.app.page import build_page, page_css
from deco_fast.app.served import ServedModel
from deco_fast.errors import UserError


def serve(
    served: ServedModel, host: str, port: int | None, on_ready: Callable[[str], None]
) -> None:
    """Show the page until an interrupt.

    One request is drawn at a time, in the order in which they came.

    Args:
        served: the model, and the limits of requests and queue.
        host: the address to bind to, as `check_address` passes it.
        port: None: 7860, or the next one that is free.
        on_ready: called with the page's address when it can be visited.

    Raises:
        UserError: no port is free.
    """
    page = build_page(served)
    page.queue(max_size=served.limits.waiting, default_concurrency_limit=1)
    # The default's fonts would come from another server.
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=theme,
            css=page_css(served),
            footer_links=[],
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size="1mb",
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError("no port from 7860 on is free: choose one by --port") from error
    on_ready(address)
    try:
        page.block_thread()
    finally:
        served.close()
