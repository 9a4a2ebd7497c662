"""Artifact folder → tokens. Needs numpy, tokenizers, jinja2 and one backend; never torch or onnx."""

from mistral_trt.runtime.engine import Engine, Output, Piece
from mistral_trt.runtime.sampling import SamplingParams

__all__ = ["Engine", "Output", "Piece", "SamplingParams"]
