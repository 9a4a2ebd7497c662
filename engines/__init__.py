"""ONNX folder → TensorRT engine folder for a named GPU."""

from mistral_trt.engines.build import build_engine
from mistral_trt.engines.gpu import GpuTarget, find_gpu, load_catalogue

__all__ = ["GpuTarget", "build_engine", "find_gpu", "load_catalogue"]
