"""ONNX folder + GPUs → a build that is settled, or the reason why it will not begin. Start at `settle`.

`budget` is what an engine and its build need, from `sizes` and `build_memory`; `roofline` is how fast it can
be at most; `host` is what this machine has; `wish` holds one against the other and `remedy` finds what would
fit; `dry_run` prints all of it.
"""
