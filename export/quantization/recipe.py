"""Checkpoint + settings → everything a quantized export needs, in the order of the work."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import onnx_ir as ir
import torch

from mistral_trt.contract import BLOCK_SIZES, GraphContract
from mistral_trt.errors import CalibrationError, ConfigError
from mistral_trt.export.checkpoint import LM_HEAD, Checkpoint
from mistral_trt.export.conversion import Census, Weight, read_float32
from mistral_trt.export.quantization.calibration import SEARCHED_TOKENS, calibrate
from mistral_trt.export.quantization.corpus import DEFAULT_SAMPLES, DEFAULT_TOKENS, Corpus, read_corpus
from mistral_trt.export.quantization.layers import LayerStream
from mistral_trt.export.quantization.nodes import quantize_graph, scale_dtype
from mistral_trt.export.quantization.placement import Placement, input_groups, place, place_stored
from mistral_trt.export.quantization.quality import Point, by_error, choose_kept, share
from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import Scheme, linear_names, scheme_for
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.export.quantization.store import open_store
from mistral_trt.export.quantization.tensors import quantized_tensors, stored_tensors
from mistral_trt.export.weights import MadeTensor
from mistral_trt.manifest import tool_versions
from mistral_trt.progress import note

_RESULT_VERSION = 1
_TOOLS = ("nvidia-modelopt", "torch", "transformers")


@dataclass(frozen=True)
class Quantization:
    """What is quantized, and how.

    scales: what calibration found; empty where the checkpoint itself holds codes and scales.
    details: the manifest's `quantization`.
    """

    scheme: Scheme
    placement: Placement
    scales: Mapping[str, LinearScales]
    details: Mapping[str, Any]

    def tensors(self, weights: Mapping[str, Weight], census: Census) -> list[MadeTensor]:
        """What the graph needs beside the float weights."""
        if not self.scales:
            return stored_tensors(weights, self.scheme, self.placement, census)
        return quantized_tensors(weights, self.scales, self.scheme, self.placement, census)

    def write_nodes(self, model: ir.Model) -> None:
        """Put Q/DQ nodes into the decode graph."""
        quantize_graph(model, self.scheme, self.placement)


def quantize_checkpoint(
    source: Checkpoint,
    contract: GraphContract,
    settings: QuantizationSettings,
    *,
    tokenizer: bytes | None,
    bos_token_id: int | None,
) -> Quantization:
    """Calibrate, choose what stays float16, and place the scales.

    tokenizer: content of `tokenizer.json`.  Raises ConfigError or CalibrationError.
    """
    scheme = scheme_for(contract.precision, source.config)
    names = linear_names(source.config, lm_head=settings.quantize_lm_head)
    kept = matching(settings.keep, names)
    _require_some(kept, names)
    if scheme.block_size not in (None, BLOCK_SIZES[0]):
        note(f"int4: blocks of {scheme.block_size}, because {BLOCK_SIZES[0]} does not divide every width")
    corpus = _read_corpus(source, settings, tokenizer, bos_token_id)
    window = contract.ring.sliding_window
    stream = LayerStream(source, sliding_window=window)
    ids = torch.from_numpy(corpus.ids)
    key = _calibration_key(source, scheme, corpus, window, lm_head=settings.quantize_lm_head)
    with open_store(key) as store:
        scales = calibrate(stream, ids, scheme, store, lm_head=settings.quantize_lm_head)
    points: Sequence[Point] = ()
    if settings.quality is not None:
        kept, points = choose_kept(stream, ids, scales, scheme, always=kept, budget=settings.quality)
    _require_some(kept, names)
    norms = {norm: read_float32(source.weights[norm]) for norm, _ in _groups(source, settings) if norm}
    placement = place(
        scales,
        set(kept),
        norms,
        layers=source.config.num_hidden_layers,
        float16_scales=scale_dtype(scheme) == "float16",
    )
    details = {
        "scheme": scheme.to_json(),
        **_described(source, names, kept, placement),
        "sensitivity": [
            {"name": name, "error": float(f"{float(scales[name].error):.4g}"), "kept": name in set(kept)}
            for name in by_error(scales)
        ],
        "frontier": [point.to_json() for point in points],
        "calibration": {**corpus.to_json(), "sliding_window": window, "algorithm": scheme.algorithm},
    }
    return Quantization(scheme, placement, scales, details)


def _require_some(kept: Sequence[str], names: Sequence[str]) -> None:
    if len(kept) == len(names):
        raise ConfigError(
            f"--keep and --quality leave nothing to quantize: all {len(names)} linears would stay float16; "
            "use --precision fp16, keep less or allow more"
        )


def import_quantized(source: Checkpoint, contract: GraphContract) -> Quantization:
    """What a checkpoint that is stored quantized says itself, nothing added.  Raises ConfigError."""
    stored = source.stored_quantization
    assert stored is not None
    if contract.precision != stored.precision:
        raise ConfigError(
            f"{source.folder} holds {stored.precision} weights ({stored.method}); use --precision "
            f"{stored.precision}, or the float checkpoint for {contract.precision}"
        )
    scheme = scheme_for(contract.precision, source.config, stored.block_size)
    names = linear_names(source.config, lm_head=LM_HEAD in stored.linears)
    kept = [name for name in names if f"{name}.weight" not in stored.linears]
    placement = place_stored(names, kept, layers=source.config.num_hidden_layers)
    note(f"{len(placement.quantized)} linears are taken as they are stored, {len(kept)} are not quantized")
    details = {
        "scheme": scheme.to_json(),
        **_described(source, names, kept, placement),
        "sensitivity": [],
        "frontier": [],
        "calibration": None,
        "imported_from": stored.method,
    }
    return Quantization(scheme, placement, {}, details)


def _described(
    source: Checkpoint, names: Sequence[str], kept: Sequence[str], placement: Placement
) -> dict[str, Any]:
    """Which linears are quantized, in the words of the manifest."""
    return {
        "quantized": [f"{name}.weight" for name in placement.quantized],
        "kept": [f"{name}.weight" for name in names if name in set(kept)],
        "quantized_share": round(share(source.weights, names, kept), 4),
        "pre_quant_scales": placement.to_json(),
    }


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that a pattern matches, in order; `*` stands for anything.

    Raises ConfigError for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"--keep {pattern!r} matches no linear; the names are like {names[0]} and {names[-1]}, and "
                "* stands for anything: --keep '*.down_proj'"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _groups(source: Checkpoint, settings: QuantizationSettings) -> list[tuple[str | None, tuple[str, ...]]]:
    return input_groups(source.config.num_hidden_layers, lm_head=settings.quantize_lm_head)


def _read_corpus(
    source: Checkpoint, settings: QuantizationSettings, tokenizer: bytes | None, bos_token_id: int | None
) -> Corpus:
    if tokenizer is None:
        raise CalibrationError(
            f"{source.folder} has no tokenizer, so calibration text cannot be read; add its tokenizer.json"
        )
    corpus = read_corpus(
        tokenizer,
        settings.calibration,
        samples=DEFAULT_SAMPLES if settings.samples is None else settings.samples,
        tokens=DEFAULT_TOKENS if settings.tokens is None else settings.tokens,
        vocab_size=source.config.vocab_size,
        bos_token_id=bos_token_id,
    )
    samples, tokens = corpus.ids.shape
    note(f"calibration: {samples} samples of {tokens} tokens of {corpus.source}")
    return corpus


def _calibration_key(
    source: Checkpoint, scheme: Scheme, corpus: Corpus, window: int, *, lm_head: bool
) -> str:
    """A name for a calibration, from everything its result depends on."""
    depends_on = {
        "version": _RESULT_VERSION,
        "searched_tokens": SEARCHED_TOKENS,
        "sources": source.sources(),
        "scheme": scheme.to_json(),
        "algorithm": scheme.algorithm,
        "corpus": [corpus.sha256, *corpus.ids.shape],
        "sliding_window": window,
        "lm_head": lm_head,
        "threads": torch.get_num_threads(),
        "tools": tool_versions(*_TOOLS),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
