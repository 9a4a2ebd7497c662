"""Mistral checkpoints → ONNX with a rolling cache → TensorRT engines → tokens, with the numbers proven."""

__version__: str

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: what looks it up is slow to import."""
    from importlib.metadata import PackageNotFoundError, version

    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return version("mistral-trt")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
