"""Artifact folder → tokens. Needs numpy, tokenizers, jinja2 and one backend; never torch or onnx."""

from mistral_trt.runtime.engine import Engine
from mistral_trt.runtime.metrics import Metrics, Quantiles
from mistral_trt.runtime.request import FinishReason, Output, Piece
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.sampling.sampler import Choice, TokenLogprob
from mistral_trt.runtime.session import Session
from mistral_trt.runtime.stream import AsyncStream, Stream

__all__ = [
    "AsyncStream",
    "Choice",
    "Engine",
    "FinishReason",
    "Metrics",
    "Output",
    "Piece",
    "Quantiles",
    "SamplingParams",
    "Session",
    "Stream",
    "TokenLogprob",
]
