"""Checkpoint weights + scales + placement → the tensors of a quantized graph, made as they are written."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from mistral_trt.export.checkpoint import EMBEDDING, LM_HEAD
from mistral_trt.export.conversion import Census, Weight, read_float32
from mistral_trt.export.quantization.codes import (
    as_bytes,
    in_dtype,
    input_scale,
    packed_codes,
    packed_int4,
    weight_codes,
    weight_scale,
)
from mistral_trt.export.quantization.nodes import scale_dtype, scale_shape
from mistral_trt.export.quantization.placement import Placement
from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import Scheme
from mistral_trt.export.stored_codes import StoredCodes
from mistral_trt.export.weights import MadeTensor

_BYTES = {"float16": 2, "float32": 4}


def quantized_tensors(
    weights: Mapping[str, Weight],
    scales: Mapping[str, LinearScales],
    scheme: Scheme,
    placement: Placement,
    census: Census,
) -> list[MadeTensor]:
    """Codes, scales and folded norms, in the order of the forward pass.

    Raises CheckpointError for a scale that its dtype cannot hold.
    """
    dtype = scale_dtype(scheme)
    made = [_constant(name, value, "float16", census) for name, value in placement.norms.items()]
    for group in placement.groups:
        first = scales[group[0]]
        if group[0] in placement.multiplied and first.pre_quant_scale is not None:
            made.append(_constant(f"{group[0]}.pre_quant_scale", first.pre_quant_scale, dtype, census))
        for name in group:
            if scheme.activations is not None:
                made.append(_constant(f"{name}.input_scale", input_scale(first, scheme), dtype, census))
            weight = weight_of(weights, name)
            read = partial(_weight_codes, weight, scales[name], scheme)
            made.append(_codes(name, weight.shape, scheme, read))
            scale = stored_scale(scales[name], scheme, placement.output_scales.get(name), weight.shape)
            made.append(_constant(f"{name}.weight_scale", scale, dtype, census))
    return made


def stored_tensors(
    weights: Mapping[str, Weight], scheme: Scheme, placement: Placement, census: Census
) -> list[MadeTensor]:
    """Codes and scales as a quantized checkpoint has them, laid out for the graph."""
    made = []
    for name in placement.quantized:
        stored = weight_of(weights, name).codes
        assert stored is not None
        made.append(_codes(name, stored.shape, scheme, partial(_stored_codes, stored)))
        scale = torch.from_numpy(stored.scales()).T.reshape(scale_shape(scheme, stored.shape))
        made.append(_constant(f"{name}.weight_scale", scale, scale_dtype(scheme), census))
    return made


def weight_of(weights: Mapping[str, Weight], linear: str) -> Weight:
    """The checkpoint's weight of a linear; a tied lm_head's is the embedding."""
    name = f"{linear}.weight"
    return weights[EMBEDDING if name == LM_HEAD and name not in weights else name]


def stored_scale(
    scales: LinearScales, scheme: Scheme, output_scale: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """A weight's scale as the graph holds it, float32: [out], [in / block, out] or []."""
    scale = weight_scale(scales, scheme)  # [out, groups]
    if output_scale is not None:
        scale = scale * output_scale[:, None]
    rows, columns = shape
    return scale.T.reshape(scale_shape(scheme, (rows, columns)))


def _codes(name: str, shape: tuple[int, ...], scheme: Scheme, read: Callable[[], Tensor]) -> MadeTensor:
    """A linear's codes.  read: gives them as [out, in], when they are written."""
    rows, columns = shape
    four_bit = scheme.weights == "int4"

    def make() -> Iterator[memoryview]:
        yield as_bytes(packed_int4(read()) if four_bit else packed_codes(read()))

    size = rows * columns // 2 if four_bit else rows * columns
    return MadeTensor(f"{name}.weight", scheme.weights, (columns, rows), size, make)


def _stored_codes(stored: StoredCodes) -> Tensor:
    return torch.from_numpy(stored.codes())


def _weight_codes(weight: Weight, scales: LinearScales, scheme: Scheme) -> Tensor:
    return weight_codes(read_float32(weight), scales, scheme)


def _constant(name: str, value: Tensor, dtype: str, census: Census) -> MadeTensor:
    """A small tensor, counted among the hazards of its dtype."""
    if dtype == census.dtype:
        census.take(name, value.contiguous())
    stored = in_dtype(value, dtype) if name.endswith("scale") else value.to(getattr(torch, dtype))
    return MadeTensor(
        name, dtype, tuple(value.shape), value.numel() * _BYTES[dtype], lambda: iter([as_bytes(stored)])
    )
