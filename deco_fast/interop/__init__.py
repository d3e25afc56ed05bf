"""Checkpoints of others, and checkpoints for others: `python -m deco_fast.interop`.

`convert IN OUT` reads and writes the published implementation's: only this package knows its
names, the rest of the project sees ours. `export CHECKPOINT FOLDER` writes a folder to publish.
"""
