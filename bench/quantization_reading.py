"""A text + a model or an artifact → logits at every position, and how far two of them are apart."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort

from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.validate.metrics import LogitErrors, concatenate, logit_errors, mean, perplexity
from mistral_trt.validate.reference.hugging_face import Reference, run_reference

EXACT = ("session.disable_quant_qdq", "1")
"""ONNX Runtime's own kernels round the activations of int4 and int8-weight-only linears to INT8, which no GPU
does; with weights dequantized as the graph is loaded it computes what the graph says."""

_ROWS_AT_ONCE = 256


def read_with_model(model: Any, texts: Sequence[Sequence[int]]) -> list[Reference]:
    """One teacher-forced forward over each text."""
    return [run_reference(model, ids) for ids in texts]


def model_logits(read: Sequence[Reference]) -> list[Iterator[np.ndarray]]:
    """Logits of each text in pieces, float32 [n, V], made as they are asked for."""

    def pieces(reference: Reference) -> Iterator[np.ndarray]:
        length = len(reference.hidden)
        for start in range(0, length, _ROWS_AT_ONCE):
            yield reference.logits(start, min(length, start + _ROWS_AT_ONCE))

    return [pieces(reference) for reference in read]


@contextmanager
def session_options(configure: Callable[[Any], None]) -> Iterator[None]:
    """While it is open, ONNX Runtime's sessions are made with one more option, the runtime's among them."""
    made = ort.SessionOptions

    def options() -> Any:
        found = made()
        configure(found)
        return found

    with mock.patch.object(ort, "SessionOptions", options):
        yield


def open_exact(artifact: Path) -> RollingCache:
    """The runtime's rolling cache, its linears computed as the graph says."""
    return open_cache(artifact, trust_weights=True, exact=True)


def cache_logits(cache: RollingCache, texts: Sequence[Sequence[int]]) -> list[Iterator[np.ndarray]]:
    """The same of an ONNX folder: its rolling cache's prefill, chunk by chunk, in ONNX Runtime."""

    def pieces(ids: Sequence[int]) -> Iterator[np.ndarray]:
        row, chunk = cache.acquire(), cache.contract.ring.prefill_chunk
        try:
            for start in range(0, len(ids), chunk):
                yield cache.append(row, ids[start : start + chunk], all_logits=True)
        finally:
            cache.release(row)

    return [pieces(ids) for ids in texts]


def compare(
    expected: Sequence[Reference], found: Sequence[Iterable[np.ndarray]], texts: Sequence[Sequence[int]]
) -> LogitErrors:
    """Errors at every position of all texts.  found: pieces of logits [n, V] of each text, in order."""
    parts = []
    for reference, pieces, ids in zip(expected, found, texts, strict=True):
        targets, start = np.array([*ids[1:], -1]), 0
        for piece in pieces:
            positions = np.arange(start, start + len(piece))
            expected_logits, wanted = reference.at(positions), targets[positions]
            parts.append(logit_errors(expected_logits, piece, positions=positions, targets=wanted))
            start += len(piece)
    return concatenate(parts)


def figures(errors: LogitErrors) -> dict[str, float]:
    """What is told of a comparison over text."""
    read = perplexity(errors)
    return {
        "perplexity": read.artifact,
        "perplexity_ratio": read.ratio,
        "kl_mean": mean(errors, "kl"),
        "top1_agreement": mean(errors, "agree"),
    }
