"""TensorRT's own words, each spelled once: its two distributions, their modules, its data types."""

FULL, RTX = "tensorrt", "tensorrt-rtx"
"""The distributions on PyPI; an engine's manifest names one of them as its `flavor`."""

FLAVORS = (FULL, RTX)

MODULES = {FULL: "tensorrt", RTX: "tensorrt_rtx"}
"""Distribution → what is imported of it."""

TRT_DTYPES = {
    "int64": "INT64",
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int4": "INT4",
    "float8_e4m3fn": "FP8",
}
"""Dtype as ONNX and NumPy name it → member of TensorRT's DataType."""
