"""Mistral checkpoints → ONNX with a rolling cache → TensorRT engines → tokens, with the numbers proven."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mistral-trt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
