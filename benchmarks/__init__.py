"""Speed and memory against the machine's own limits: ``pytest benchmarks --benchmark-only``.

One test is one comparison. Its variants (eager and torch.compile on the reference ops, then every
fused backend that this machine has) take turns inside the test, so that a machine that slows down
slows all of them; each is first checked against the float32 reference. How to read and keep the
figures: RECORDS.md.
"""
