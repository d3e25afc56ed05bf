"""Where a page can be visited."""

from __future__ import annotations

import os
import socket

from deco_fast.errors import UserError


def check_address(host: str, port: int | None) -> None:
    """Raise UserError unless a server can be bound there; without a port, to any."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host} is no address: use 127.0.0.1, or 0.0.0.0 for all of this machine's"
        ) from error
    try:
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        option = f"--host {host}" if port is None else f"--host {host} --port {port}"
        raise UserError(
            f"{option} cannot be had ({os.strerror(error.errno or 0)}): choose another"
        ) from error
