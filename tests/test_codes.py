"""Codes are ModelOpt's bit for bit, lie as ONNX reads them, and times their scales are the weight again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from mistral_trt.contract import QUANTIZED
from mistral_trt.export.quantization import codes as module
from mistral_trt.export.quantization.codes import (
    as_bytes,
    in_dtype,
    input_scale,
    packed_codes,
    packed_int4,
    weight_codes,
    weight_scale,
)
from mistral_trt.export.quantization.scales import LinearScales, smoothed
from mistral_trt.export.quantization.scheme import Scheme, scheme_for
from tests.models import TINY

mtq = pytest.importorskip("modelopt.torch.quantization")  # quietly: importing it warns of torch's plans
fusion = pytest.importorskip("modelopt.torch.export.quant_utils")

NONE = torch.zeros(())
NEGLIGIBLE = 2.0**-24
"""ModelOpt's own: a group without a larger number is 0."""


def scheme_of(precision: str, block: int | None = None) -> Scheme:
    return scheme_for(precision, TINY, block)


# ---------------------------------------------------------------- packing


def integers(low: int, high: int) -> st.SearchStrategy[Tensor]:
    """Codes [out, in], in even."""
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 6).map(lambda pairs: 2 * pairs))
    return shapes.flatmap(
        lambda shape: st.lists(
            st.lists(st.integers(low, high), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        )
    ).map(lambda rows: torch.tensor(rows, dtype=torch.int8))


def packed_by_hand(codes: Sequence[Sequence[int]]) -> bytes:
    """[out][in] -> an INT4 tensor [in, out], one nibble at a time: https://onnx.ai/onnx/technical/int4.html"""
    nibbles = [codes[o][i] % 16 for i in range(len(codes[0])) for o in range(len(codes))]
    return bytes(low + 16 * high for low, high in zip(nibbles[0::2], nibbles[1::2], strict=True))


def read_by_onnx(data: bytes, dtype: int, shape: tuple[int, int]) -> np.ndarray:
    tensor = TensorProto(data_type=dtype, dims=shape, raw_data=data)
    return numpy_helper.to_array(tensor)


@given(integers(-8, 7))
def test_int4_lies_as_onnx_reads_it(codes: Tensor) -> None:
    data = bytes(as_bytes(packed_int4(codes)))
    rows, columns = codes.shape
    assert len(data) == rows * columns // 2
    assert data == packed_by_hand(codes.tolist())
    found = read_by_onnx(data, TensorProto.INT4, (columns, rows)).astype(np.int8)
    assert np.array_equal(found, codes.numpy().T)


@given(integers(-128, 127))
def test_int8_lies_as_onnx_reads_it(codes: Tensor) -> None:
    data = bytes(as_bytes(packed_codes(codes)))
    assert np.array_equal(read_by_onnx(data, TensorProto.INT8, codes.shape[::-1]), codes.numpy().T)  # type: ignore[arg-type]


def test_every_e4m3_code_lies_as_onnx_reads_it() -> None:
    patterns = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes = patterns.view(torch.float8_e4m3fn)
    found = read_by_onnx(bytes(as_bytes(packed_codes(codes))), TensorProto.FLOAT8E4M3FN, (16, 16))
    assert np.array_equal(found.astype(np.float32), codes.float().numpy().T, equal_nan=True)


def test_two_int4_codes_are_one_byte_with_the_first_one_low() -> None:
    assert packed_int4(torch.tensor([[1], [-2]], dtype=torch.int8)).tolist() == [0xE1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_bytes_are_in_order_whatever_the_strides(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).to(dtype).view(3, 4)
    assert bytes(as_bytes(tensor.T)) == tensor.T.contiguous().numpy().tobytes()
    assert bytes(as_bytes(tensor[0, 1])) == tensor[0, 1].numpy().tobytes()


# ---------------------------------------------------------------- ModelOpt


@dataclass(frozen=True)
class Quantized:
    """A linear's weight, and what ModelOpt made of it.

    own: its pre_quant_scale before it shared one.
    """

    weight: Tensor
    linear: Any
    own: Tensor | None = None

    def scales(self) -> LinearScales:
        amax = self.linear.weight_quantizer.amax
        scale = self.linear.input_quantizer.pre_quant_scale
        rows = 1 if amax.numel() == 1 else len(self.weight)
        return LinearScales(amax.reshape(rows, -1), NONE, NONE, None, scale, self.own)

    def modelopts_codes(self, scheme: Scheme) -> Tensor:
        """Recovered from what its own fake quantization makes of its own weight: float32 [out, in]."""
        amax = self.scales().weight_amax[:, :, None]
        with torch.no_grad():
            fake = self.linear.weight_quantizer(self.linear.weight)
        blocks = fake.view(len(fake), amax.shape[1], -1)
        codes = blocks * scheme.bound / amax
        whole: Tensor = codes.to(torch.float8_e4m3fn) if scheme.precision == "fp8" else codes.round()
        return whole.float().view(fake.shape)


class Linears(nn.Module):
    """Linears that read one input, as q, k and v do; their weights are numbers of a dtype."""

    def __init__(self, widths: Sequence[int], inside: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linears = nn.ModuleList(nn.Linear(inside, width, bias=False) for width in widths)
        with torch.no_grad():
            for linear in self.linears:  # channels of different size, so that smoothing has work to do
                weight: Any = linear.weight
                weight.mul_(torch.rand(inside) * 3 + 0.05)
                weight.copy_(weight.to(dtype))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


def quantized_by_modelopt(
    scheme: Scheme,
    widths: Sequence[int] = (24, 8, 8),
    inside: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Quantized]:
    """Linears quantized alone, and brought to a common pre_quant_scale as ModelOpt does for fused ones."""
    model = Linears(widths, inside, seed, dtype)
    weights = [linear.weight.detach().clone() for linear in model.linears]  # type: ignore[operator]
    inputs = torch.randn(4, 16, inside) * torch.rand(inside).mul(4).exp()
    mtq.quantize(model, scheme.modelopt_config(), lambda linears: linears(inputs))
    modules: list[Any] = list(model.linears)
    own = [linear.input_quantizer.pre_quant_scale for linear in modules]
    if scheme.precision == "int4":
        own = [scale.clone() for scale in own]
        assert not torch.equal(own[0], own[1]), "AWQ chooses for each linear"
        with torch.no_grad():
            fusion.preprocess_linear_fusion(modules)
    return [Quantized(*found) for found in zip(weights, modules, own, strict=True)]


@pytest.fixture(params=[*QUANTIZED, "int4 64", "int4 32"], scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Scheme, list[Quantized]]:
    precision, _, block = request.param.partition(" ")
    scheme = scheme_of(precision, int(block or 128) if precision == "int4" else None)
    return scheme, quantized_by_modelopt(scheme)


def test_codes_are_modelopts_bit_for_bit(case: tuple[Scheme, list[Quantized]]) -> None:
    scheme, linears = case
    for quantized in linears:
        codes = weight_codes(quantized.weight, quantized.scales(), scheme)
        assert codes.dtype == (torch.float8_e4m3fn if scheme.precision == "fp8" else torch.int8)
        assert torch.equal(codes.float(), quantized.modelopts_codes(scheme))


@pytest.mark.parametrize("precision", QUANTIZED)
def test_codes_of_bfloat16_weights_are_modelopts(precision: str) -> None:
    """Few different numbers: many a quotient is a half, and rounds by the last bit of its factor."""
    scheme = scheme_of(precision, 32 if precision == "int4" else None)
    for quantized in quantized_by_modelopt(scheme, (200, 200), dtype=torch.bfloat16):
        codes = weight_codes(quantized.weight, quantized.scales(), scheme)
        assert torch.equal(codes.float(), quantized.modelopts_codes(scheme))


def test_codes_times_scales_are_modelopts_fake_quantized_weight(
    case: tuple[Scheme, list[Quantized]],
) -> None:
    scheme, linears = case
    for quantized in linears:
        scales = quantized.scales()
        codes, scale = weight_codes(quantized.weight, scales, scheme).float(), weight_scale(scales, scheme)
        found = (codes.view(len(codes), scale.shape[1], -1) * scale[:, :, None]).view(codes.shape)
        with torch.no_grad():
            fake = quantized.linear.weight_quantizer(quantized.linear.weight)
        torch.testing.assert_close(found, fake, rtol=1e-6, atol=0)


def test_the_smoothed_weight_is_modelopts_own(case: tuple[Scheme, list[Quantized]]) -> None:
    _, linears = case
    for quantized in linears:
        assert torch.equal(smoothed(quantized.weight, quantized.scales()), quantized.linear.weight)


@pytest.mark.parametrize("rows", [1, 3, 7, 24, 100])
def test_codes_do_not_depend_on_how_many_rows_are_made_at_once(
    case: tuple[Scheme, list[Quantized]], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    scheme, linears = case
    expected = weight_codes(linears[0].weight, linears[0].scales(), scheme)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", rows)
    found = weight_codes(linears[0].weight, linears[0].scales(), scheme)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_largest_code_of_an_input_is_its_largest_number(precision: str) -> None:
    scheme = scheme_of(precision)
    quantizer = quantized_by_modelopt(scheme)[0].linear.input_quantizer
    scale = input_scale(LinearScales(NONE, NONE, NONE, input_amax=quantizer.amax), scheme)
    assert scale.shape == ()
    torch.testing.assert_close(scale * scheme.bound, quantizer.amax.reshape(()), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- without ModelOpt


GROUPS = {"int8": 1, "int8-weight-only": 1, "int4": 2, "fp8": 1}


def own_scales(weight: Tensor, precision: str) -> LinearScales:
    """Largest magnitudes of a weight [out, 64] without smoothing."""
    blocks = weight.abs().view(len(weight), GROUPS[precision], -1).amax(2)
    return LinearScales(blocks.amax().view(1, 1) if precision == "fp8" else blocks, NONE, NONE)


@given(st.sampled_from(QUANTIZED), st.integers(0, 2**32 - 1), st.floats(-12, 12), st.integers(1, 9))
def test_a_weight_comes_back_within_half_a_step(
    precision: str, seed: int, magnitude: float, rows: int
) -> None:
    scheme = scheme_of(precision, 32 if precision == "int4" else None)
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64, generator=random) * 2.0**magnitude
    scales = own_scales(weight, precision)
    codes, scale = weight_codes(weight, scales, scheme).float(), weight_scale(scales, scheme)
    assert codes.abs().max() <= scheme.bound
    found = (codes.view(rows, scale.shape[1], -1) * scale[:, :, None]).view(weight.shape)
    step = scale.repeat_interleave(64 // scale.shape[1], 1).expand_as(weight)
    if precision == "fp8":  # 3 bits of mantissa, and subnormals of 2**-9
        step = torch.maximum(step * 2.0**-9, weight.abs() * 2.0**-3)
    assert ((found - weight).abs() <= step * 0.5001).all()


def test_halves_are_rounded_to_even() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])
    codes = weight_codes(weight, own_scales(weight, "int8"), scheme_of("int8"))
    assert codes[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -126]


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("tiny", [0.0, 1e-9, NEGLIGIBLE])
def test_what_is_negligible_is_zero_and_its_scale_is_positive(precision: str, tiny: float) -> None:
    scheme = scheme_of(precision, 32 if precision == "int4" else None)
    weight = torch.randn(4, 64)
    if precision == "fp8":
        weight[:] = tiny
    weight[1], weight[2, 32:] = tiny, -tiny
    scales = own_scales(weight, precision)
    codes, scale = weight_codes(weight, scales, scheme), weight_scale(scales, scheme)
    assert (scale > 0).all() and torch.isfinite(scale).all()
    if precision == "fp8":  # one scale for all: 1 / 448
        torch.testing.assert_close(scale, torch.full((1, 1), 1 / 448))
        assert not codes.float().any()
        return
    assert not codes[1].any()
    assert scale[1].tolist() == pytest.approx([1 / scheme.bound] * GROUPS[precision])
    if precision == "int4":
        assert codes[2, :32].any() and not codes[2, 32:].any()
        assert scale[2, 0] == scales.weight_amax[2, 0] / 7 and scale[2, 1] == pytest.approx(1 / 7)


def test_a_little_above_negligible_is_quantized() -> None:
    weight = torch.full((1, 64), 1.5 * NEGLIGIBLE)
    scales = own_scales(weight, "int8")
    assert (weight_codes(weight, scales, scheme_of("int8")) == 127).all()
    assert float(weight_scale(scales, scheme_of("int8"))) == pytest.approx(1.5 * NEGLIGIBLE / 127)


@given(st.floats(0, 1e30), st.sampled_from(["float16", "float32"]))
def test_a_scale_stays_positive_in_its_dtype(value: float, dtype: str) -> None:
    scale = in_dtype(torch.tensor(value), dtype)
    assert str(scale.dtype) == f"torch.{dtype}"
    assert scale > 0
    if 1e-3 < value < 6e4:
        assert float(scale) == pytest.approx(value, rel=2.0**-11)


def test_the_scale_of_an_input_that_is_always_zero_is_positive() -> None:
    scales = LinearScales(NONE, NONE, NONE, input_amax=torch.zeros(1, 1))
    for precision in ("int8", "fp8"):
        scale = input_scale(scales, scheme_of(precision))
        assert scale.shape == () and scale > 0
