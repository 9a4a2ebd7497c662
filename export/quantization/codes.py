"""Weight + its scales → integer (or E4M3) codes, laid out and packed as the ONNX file holds them."""

import numpy as np
import torch
from torch import Tensor

from mistral_trt.export.quantization.scales import LinearScales, smoothed
from mistral_trt.export.quantization.scheme import Scheme

_ROWS_AT_ONCE = 1 << 9
_NEGLIGIBLE = 1.0 / (1 << 24)
_SMALLEST = {"float16": 2.0**-24, "float32": 2.0**-126}


def weight_codes(weight: Tensor, scales: LinearScales, scheme: Scheme) -> Tensor:
    """Codes of a weight: float32 [out, in] -> int8 or float8_e4m3fn [out, in].

    Rounded to nearest even as ModelOpt rounds, https://github.com/NVIDIA/TensorRT-Model-Optimizer
    (modelopt/torch/quantization/tensor_quant.py): round(x * (bound / amax)); a group without a number
    above 2**-24 is 0.
    """
    dtype = torch.float8_e4m3fn if scheme.weights == "float8_e4m3fn" else torch.int8
    codes = torch.empty(weight.shape, dtype=dtype)
    groups = scales.weight_amax.shape[1]
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = smoothed(weight[start : start + _ROWS_AT_ONCE], scales)
        amax = scales.weight_amax if len(scales.weight_amax) == 1 else scales.weight_amax[start:]
        blocks = rows.view(len(rows), groups, -1)
        codes[start : start + len(rows)] = _codes(blocks, amax[: len(rows), :, None], scheme).view(rows.shape)
    return codes


def _codes(blocks: Tensor, amax: Tensor, scheme: Scheme) -> Tensor:
    if scheme.weights == "float8_e4m3fn":
        usable = torch.where(amax <= _NEGLIGIBLE, torch.ones_like(amax), amax)
        scaled = (blocks * (scheme.bound / usable)).clamp_(-scheme.bound, scheme.bound)
        return scaled.to(torch.float8_e4m3fn)
    # Tensor over tensor: torch computes a number over a tensor as its reciprocal times the number.
    steps = torch.tensor(scheme.bound) / amax
    factor = torch.where(amax <= _NEGLIGIBLE, torch.zeros_like(amax), steps)
    return (blocks * factor).round_().clamp_(-scheme.bound - 1, scheme.bound).to(torch.int8)


def weight_scale(scales: LinearScales, scheme: Scheme) -> Tensor:
    """What a code is multiplied by: float32 [out, groups], positive; 1 / bound where all codes are 0."""
    amax = torch.where(
        scales.weight_amax <= _NEGLIGIBLE, torch.ones_like(scales.weight_amax), scales.weight_amax
    )
    return amax / scheme.bound


def input_scale(scales: LinearScales, scheme: Scheme) -> Tensor:
    """What a code of the input is multiplied by: float32 []."""
    assert scales.input_amax is not None
    return scales.input_amax.clamp(min=_NEGLIGIBLE).reshape(()) / scheme.bound


def in_dtype(scale: Tensor, dtype: str) -> Tensor:
    """A positive scale in the graph's dtype, positive still."""
    return scale.clamp(min=_SMALLEST[dtype]).to(getattr(torch, dtype))


def packed_codes(codes: Tensor) -> Tensor:
    """Codes [out, in] as the file holds an ONNX tensor [in, out] of one byte a code: uint8, flat."""
    return codes.view(torch.uint8).T.contiguous().view(-1)


def packed_int4(codes: Tensor) -> Tensor:
    """Codes [out, in] as the file holds an ONNX INT4 tensor [in, out]: two a byte, the first one low.

    uint8, flat.  Source: https://onnx.ai/onnx/technical/int4.html
    codes 1 -2 (out = 2, in = 1) -> byte 0xE1
    """
    nibbles = codes.T.contiguous().view(-1).view(torch.uint8) & 0x0F
    return nibbles[0::2] | (nibbles[1::2] << 4)


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in order."""
    flat: np.ndarray = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return flat.data
