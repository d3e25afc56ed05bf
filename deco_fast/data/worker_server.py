"""Imported by the fork server that loader workers come from, and by nobody else.

It has the server import what every worker needs, once, and outlive a SIGTERM: schedulers and
torchrun send one to all processes of a run, whose main process then wants a last batch. Workers
start with these settings and replace them by their own; one that was starting when the signal came
must live as well. The server ends with the main process.
"""

import signal

import deco_fast.data  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of a closed terminal likewise
# Python restores this one, not its default, in each process that the server forks.
signal.signal(signal.SIGINT, signal.SIG_IGN)
# Before a worker comes to its own settings torch has a SIGTERM end it: until then it has to wait.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
