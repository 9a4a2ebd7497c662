"""Network + targets → a plan in a file. Start at `plan`.

`callbacks` are TensorRT's logger, progress monitor and writer; `compiled` reads its report; `api` lists every
name of TensorRT that this package uses.
"""
