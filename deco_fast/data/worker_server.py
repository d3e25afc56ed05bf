"""Imported by the fork server that loader workers come from, and by nobody else.

It has the server import what every worker needs, once, and outlive a SIGTERM: schedulers and
torchrun send one to all processes of a run, whose main process then wants a last batch. The server
ends with the main process.
"""

import signal

import deco_fast.data  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
