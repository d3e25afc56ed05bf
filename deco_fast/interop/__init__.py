"""Checkpoints of the published implementation: `python -m deco_fast.interop convert IN OUT`.

Only this package knows the published names; the rest of the project sees ours.
"""
