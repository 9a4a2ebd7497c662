"""Checkpoints that are already quantized: their numbers to the last bit, and every refusal.

The packers below are written from the descriptions of the formats, one code at a time, and share nothing
with the reader.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mistral_trt.errors import CheckpointError
from mistral_trt.export.stored_codes import (
    StoredCodes,
    StoredQuantization,
    read_stored_quantization,
)
from mistral_trt.export.tensor_files import StoredTensor, read_header

OUT, IN = 16, 256
MODULE = "model.layers.0.self_attn.q_proj"
FLOATS = {
    "model.embed_tokens.weight": torch.ones(8, 4, dtype=torch.bfloat16),
    "model.norm.weight": torch.ones(4),
    "model.layers.0.mlp.up_proj.weight": torch.ones(4, 4, dtype=torch.float16),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Made:
    """A quantized checkpoint of one linear, and what must be read from it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    codes: np.ndarray
    scales: np.ndarray
    bits: int
    group: int | None

    def __getitem__(self, part: str) -> Tensor:
        return self.tensors[f"{MODULE}.{part}"]

    def __setitem__(self, part: str, tensor: Tensor) -> None:
        self.tensors[f"{MODULE}.{part}"] = tensor

    def drop(self, part: str) -> None:
        del self.tensors[f"{MODULE}.{part}"]

    def write(self, folder: Path) -> dict[str, StoredTensor]:
        path = folder / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path)
        return read_header(path)

    def read(self, folder: Path) -> tuple[StoredQuantization, dict[str, StoredTensor]]:
        return read_stored_quantization(self.config, self.write(folder))

    def linear(self, folder: Path) -> StoredCodes:
        return self.read(folder)[0].linears[f"{MODULE}.weight"]


def word(fields: list[int], bits: int) -> int:
    """Fields of one int32, the first in its lowest bits."""
    total: int = sum(value << (bits * i) for i, value in enumerate(fields))
    return total - 2**32 if total >= 2**31 else total


def field(word: Tensor, place: int, bits: int) -> int:
    return (int(word) >> (bits * place)) % (1 << bits)


def numbers(seed: int, bits: int, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [OUT, IN] over the whole range, scales float16 [OUT, groups]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (OUT, IN), dtype=np.int8)
    scales = rng.uniform(1e-3, 1.0, (OUT, 1 if group is None else IN // group)).astype(np.float16)
    return codes, scales


def made(config: dict[str, Any], parts: dict[str, Tensor], bits: int, group: int | None, seed: int) -> Made:
    codes, scales = numbers(seed, bits, group)
    tensors = {**FLOATS, **{f"{MODULE}.{part}": tensor for part, tensor in parts.items()}}
    return Made(config, tensors, codes, scales.astype(np.float32), bits, group)


def gptq(bits: int = 4, group: int | None = 128, form: str | None = "gptq", seed: int = 0) -> Made:
    codes, scales = numbers(seed, bits, group)
    per, middle = 32 // bits, 2 ** (bits - 1)
    stored_zero = middle if form == "gptq_v2" else middle - 1
    qweight = [
        [word([int(codes[o, i + k]) + middle for k in range(per)], bits) for o in range(OUT)]
        for i in range(0, IN, per)
    ]
    parts = {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.full(
            (scales.shape[1], OUT // per), word([stored_zero] * per, bits), dtype=torch.int32
        ),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.tensor([i // (group or IN) for i in range(IN)], dtype=torch.int32),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": False, "sym": True}
    if form is not None:
        config["checkpoint_format"] = form
    return made(config, parts, bits, group, seed)


def awq(group: int | None = 128, seed: int = 0) -> Made:
    codes, scales = numbers(seed, 4, group)
    qweight = [
        [word([int(codes[o + AWQ_ORDER[k], i]) + 8 for k in range(8)], 4) for o in range(0, OUT, 8)]
        for i in range(IN)
    ]
    parts = {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.full((scales.shape[1], OUT // 8), word([8] * 8, 4), dtype=torch.int32),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group or -1,
        "zero_point": True,
        "version": "gemm",
    }
    return made(config, parts, 4, group, seed)


def scheme(bits: int, group: int | None, form: str) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "actorder": None,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def packed(bits: int = 4, group: int | None = 128, seed: int = 0) -> Made:
    codes, scales = numbers(seed, bits, group)
    per, middle = 32 // bits, 2 ** (bits - 1)
    weight = [
        [word([int(codes[o, i + k]) + middle for k in range(per)], bits) for i in range(0, IN, per)]
        for o in range(OUT)
    ]
    parts = {
        "weight_packed": torch.tensor(weight, dtype=torch.int32),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([OUT, IN]),
    }
    return made(scheme(bits, group, "pack-quantized"), parts, bits, group, seed)


def plain(bits: int = 8, group: int | None = None, form: str = "int-quantized", seed: int = 0) -> Made:
    codes, scales = numbers(seed, bits, group)
    parts = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scales)}
    return made(scheme(bits, group, form), parts, bits, group, seed)


MAKERS: dict[str, Callable[[int], Made]] = {
    **{f"gptq {form} {group}": lambda seed, f=form, g=group: gptq(4, g, f, seed)  # type: ignore[misc]
       for form in ("gptq", "gptq_v2", None) for group in (32, 64, 128)},
    "gptq gptq 8 bits": lambda seed: gptq(8, None, "gptq", seed),
    "gptq gptq_v2 8 bits": lambda seed: gptq(8, None, "gptq_v2", seed),
    **{f"awq {group}": lambda seed, g=group: awq(g, seed) for group in (32, 64, 128)},  # type: ignore[misc]
    **{f"packed {group}": lambda seed, g=group: packed(4, g, seed)  # type: ignore[misc]
       for group in (32, 64, 128)},
    "packed 8 bits": lambda seed: packed(8, None, seed),
    "int-quantized": lambda seed: plain(seed=seed),
    "naive-quantized": lambda seed: plain(form="naive-quantized", seed=seed),
    "int-quantized 4 bits": lambda seed: plain(4, 64, seed=seed),
}  # fmt: skip
METHODS = {"gptq": "gptq", "awq": "awq"}


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_codes_and_scales_are_what_was_packed(tmp_path: Path, name: str, seed: int) -> None:
    checkpoint = MAKERS[name](seed)
    quantization, floats = checkpoint.read(tmp_path)
    assert quantization.method == METHODS.get(name.split()[0], "compressed-tensors")
    assert quantization.precision == {4: "int4", 8: "int8-weight-only"}[checkpoint.bits]
    assert quantization.block_size == checkpoint.group
    (linear,) = quantization.linears.values()
    assert (linear.name, linear.shape) == (f"{MODULE}.weight", (OUT, IN))
    assert (linear.bits, linear.group_size) == (checkpoint.bits, checkpoint.group)
    codes, scales = linear.codes(), linear.scales()
    assert (str(codes.dtype), str(scales.dtype)) == ("int8", "float32")
    assert np.array_equal(codes, checkpoint.codes)
    assert np.array_equal(scales, checkpoint.scales)
    assert set(floats) == set(FLOATS)


def dequantized_gptq(made: Made, zero_offset: int) -> np.ndarray:
    """weight[o, i] = (q - z) * s, as AutoGPTQ's forward pass has it; the group by g_idx."""
    weight, per = np.zeros((OUT, IN), np.float32), 32 // made.bits
    for o in range(OUT):
        for i in range(IN):
            group = int(made["g_idx"][i])
            zero = field(made["qzeros"][group, o // per], o % per, made.bits) + zero_offset
            code = field(made["qweight"][i // per, o], i % per, made.bits)
            weight[o, i] = np.float32(code - zero) * np.float32(made["scales"][group, o])
    return weight


def dequantized_awq(made: Made) -> np.ndarray:
    """As AutoAWQ's dequantize_gemm: column c of eight lies in nibble (0 4 1 5 2 6 3 7)[c]."""
    weight, nibble = np.zeros((OUT, IN), np.float32), (0, 4, 1, 5, 2, 6, 3, 7)
    for o in range(OUT):
        for i in range(IN):
            group = i // int(made.config["group_size"])
            zero = field(made["qzeros"][group, o // 8], nibble[o % 8], 4)
            code = field(made["qweight"][i, o // 8], nibble[o % 8], 4)
            weight[o, i] = np.float32(code - zero) * np.float32(made["scales"][group, o])
    return weight


def dequantized_packed(made: Made) -> np.ndarray:
    weight, per, group = np.zeros((OUT, IN), np.float32), 32 // made.bits, made.group or IN
    for o in range(OUT):
        for i in range(IN):
            code = field(made["weight_packed"][o, i // per], i % per, made.bits) - 2 ** (made.bits - 1)
            weight[o, i] = np.float32(code) * np.float32(made["weight_scale"][o, i // group])
    return weight


LAWS: dict[str, Callable[[Made], np.ndarray]] = {
    "gptq gptq 64": lambda made: dequantized_gptq(made, 1),
    "gptq gptq_v2 64": lambda made: dequantized_gptq(made, 0),
    "gptq gptq 8 bits": lambda made: dequantized_gptq(made, 1),
    "awq 32": dequantized_awq,
    "packed 128": dequantized_packed,
    "packed 8 bits": dequantized_packed,
}


@pytest.mark.parametrize(("name", "dequantized"), LAWS.items(), ids=LAWS)
def test_codes_times_scales_are_the_weight(
    tmp_path: Path, name: str, dequantized: Callable[[Made], np.ndarray]
) -> None:
    checkpoint = MAKERS[name](3)
    linear = checkpoint.linear(tmp_path)
    scales = np.repeat(linear.scales(), linear.group_size or IN, axis=1)
    assert np.array_equal(linear.codes().astype(np.float32) * scales, dequantized(checkpoint))


def test_the_formats_words_are_as_they_are_documented() -> None:
    """One word of each by hand, so that a packer that errs with the reader is seen."""
    assert int(gptq()["qzeros"][0, 0]) == 0x77777777
    assert word(list(range(8)), 4) == 0x76543210
    assert word(list(AWQ_ORDER), 4) == 0x75316420
    assert word([1, 2, 3, 4], 8) == 0x04030201
    assert word([0, 0, 0, 255], 8) == -(1 << 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_every_float_dtype_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = packed()
    checkpoint["weight_scale"] = checkpoint["weight_scale"].to(dtype)
    expected = checkpoint["weight_scale"].float().numpy()
    assert np.array_equal(checkpoint.linear(tmp_path).scales(), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["packed 8 bits", "int-quantized"])
def test_one_scale_for_the_whole_weight_stands_for_every_channel(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    checkpoint = MAKERS[name](0)
    checkpoint["weight_scale"] = torch.full(shape, 0.25)
    checkpoint.config["config_groups"]["group_0"]["weights"] |= {"strategy": "tensor"}
    linear = checkpoint.linear(tmp_path)
    assert np.array_equal(linear.scales(), np.full((OUT, 1), 0.25, np.float32))
    assert np.array_equal(linear.codes(), checkpoint.codes)


def test_codes_without_a_scale_are_zero(tmp_path: Path) -> None:
    """A scale that underflowed: what stands in its codes says nothing, the weight is 0."""
    checkpoint = gptq(4, 64)
    checkpoint["scales"][1, 3] = 0
    linear = checkpoint.linear(tmp_path)
    checkpoint.codes[3, 64:128] = 0
    assert linear.scales()[3, 1] == 0
    assert np.array_equal(linear.codes(), checkpoint.codes)


def test_a_packed_row_may_end_within_a_word(tmp_path: Path) -> None:
    checkpoint = packed(8, None)
    checkpoint["weight_shape"] = torch.tensor([OUT, IN - 3], dtype=torch.int32)
    assert np.array_equal(checkpoint.linear(tmp_path).codes(), checkpoint.codes[:, : IN - 3])


def zero_bias(made: Made) -> None:
    made["bias"] = torch.zeros(OUT, dtype=torch.float16)


def act_order_that_is_none(made: Made) -> None:
    made.config["desc_act"] = True


def without_g_idx(made: Made) -> None:
    made.drop("g_idx")


def unused_g_idx(made: Made) -> None:
    made["weight_g_idx"] = torch.full((IN,), -1, dtype=torch.int32)


def trivial_g_idx(made: Made) -> None:
    made["weight_g_idx"] = torch.arange(IN, dtype=torch.int32) // 128
    weights(made)["actorder"] = "group"


def zero_points_of_zero(made: Made) -> None:
    made["weight_zero_point"] = torch.zeros(made["weight_scale"].shape, dtype=torch.int8)


def left_to_defaults(made: Made) -> None:
    """As quant_args.py fills them in: symmetric, integers, the strategy by the group size."""
    group = weights(made)["group_size"]
    made.config["config_groups"]["group_0"]["weights"] = {"num_bits": 4, "group_size": group}


def nested(made: Made) -> None:
    inner = {key: made.config.pop(key) for key in ("config_groups", "format")}
    made.config |= {"quantization_config": inner, "sparsity_config": {"format": "dense"}}


def two_alike(made: Made) -> None:
    groups = made.config["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*down_proj"], "format": "pack-quantized"}


def weights(made: Made) -> dict[str, Any]:
    found: dict[str, Any] = made.config["config_groups"]["group_0"]["weights"]
    return found


def with_config(**changes: Any) -> Callable[[Made], None]:
    """Keys of the config set, or with None taken out."""

    def change(made: Made) -> None:
        made.config.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del made.config[key]

    return change


def with_weights(**changes: Any) -> Callable[[Made], None]:
    return lambda made: weights(made).update(changes)


def with_group(**changes: Any) -> Callable[[Made], None]:
    return lambda made: made.config["config_groups"]["group_0"].update(changes)


def with_part(part: str, tensor: Tensor) -> Callable[[Made], None]:
    return lambda made: made.__setitem__(part, tensor)


def without_part(part: str) -> Callable[[Made], None]:
    return lambda made: made.drop(part)


HARMLESS: dict[str, tuple[Callable[[], Made], Callable[[Made], None]]] = {
    "a bias of zeros": (gptq, zero_bias),
    "desc_act with the order kept": (gptq, act_order_that_is_none),
    "no g_idx": (gptq, without_g_idx),
    "format instead of checkpoint_format": (gptq, with_config(format="GPTQ", checkpoint_format=None)),
    "dynamic that leaves linears alone": (gptq, with_config(dynamic={"-:.*up_proj": {}})),
    "dynamic that says the same": (gptq, with_config(dynamic={"+:.*q_proj": {"bits": 4}})),
    "AWQ's older names": (
        awq,
        with_config(w_bit=4, q_group_size=128, bits=None, group_size=None, version="GEMM"),
    ),
    "AWQ without a version": (awq, with_config(version=None)),
    "a g_idx never set": (packed, unused_g_idx),
    "a g_idx in order": (packed, trivial_g_idx),
    "actorder of the weights only": (packed, with_weights(actorder="weight")),
    "zero points of zero": (packed, zero_points_of_zero),
    "defaults": (packed, left_to_defaults),
    "nested, as before": (packed, nested),
    "no quant_method": (packed, with_config(quant_method=None)),
    "two groups alike": (packed, two_alike),
    "an empty transform": (packed, with_config(transform_config={"config_groups": {}})),
}


@pytest.mark.parametrize(("maker", "change"), HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing_is_taken(
    tmp_path: Path, maker: Callable[[], Made], change: Callable[[Made], None]
) -> None:
    checkpoint = maker()
    change(checkpoint)
    quantization, floats = checkpoint.read(tmp_path)
    (linear,) = quantization.linears.values()
    assert np.array_equal(linear.codes(), checkpoint.codes)
    assert np.array_equal(linear.scales(), checkpoint.scales)
    assert set(floats) == set(FLOATS)


def second_linear(other: Callable[[], Made]) -> Callable[[Made], None]:
    """A linear from another checkpoint beside the first."""

    def change(made: Made) -> None:
        for name, tensor in other().tensors.items():
            if name.startswith(MODULE):
                made.tensors[name.replace("q_proj", "k_proj")] = tensor

    return change


def one_zero_point_off(made: Made) -> None:
    made["qzeros"][-1, -1] ^= 1 << 28


def zero_points_of(value: int) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        made["qzeros"].fill_(word([value] * 8, 4))

    return change


def act_order(made: Made) -> None:
    made["g_idx"] = made["g_idx"][torch.randperm(IN, generator=torch.Generator().manual_seed(0))]
    made.config["desc_act"] = True


def act_order_without_g_idx(made: Made) -> None:
    made.config["desc_act"] = True
    made.drop("g_idx")


def all_in_floats(made: Made) -> None:
    made.tensors = dict(FLOATS)


def ragged(made: Made) -> None:
    made["qweight"] = made["qweight"][:-1]


def renamed_to_embedding(made: Made) -> None:
    for name in [name for name in made.tensors if name.startswith(MODULE)]:
        made.tensors[name.replace(MODULE, "model.embed_tokens")] = made.tensors.pop(name)


def both_ways(made: Made) -> None:
    made["weight"] = torch.ones(OUT, IN)


def another_group(**weights: Any) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        groups = made.config["config_groups"]
        groups["group_1"] = {"targets": ["x"], "weights": {**groups["group_0"]["weights"], **weights}}

    return change


def scale_of(value: float) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        made["weight_scale"][2, 0] = value

    return change


INT4 = "use the original float checkpoint with --precision int4$"
INT8 = "use the original float checkpoint with --precision int8$"
WEIGHT_ONLY = "use the original float checkpoint with --precision int8-weight-only$"
DYNAMIC8 = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
NOT_READ = r"quant_method '{}' is not read \(gptq, awq and compressed-tensors are, if symmetric\); " + INT4

REFUSED: dict[str, tuple[Callable[[], Made], Callable[[Made], None], str]] = {
    **{
        method: (gptq, with_config(quant_method=method), NOT_READ.format(method))
        for method in ("bitsandbytes", "fp8", "hqq", "quanto", "mxfp4", "auto-round", "modelopt")
    },
    "no method": (gptq, with_config(quant_method=None), "quant_method None is not read"),
    "unnamed bitsandbytes": (
        gptq,
        with_config(quant_method=None, load_in_4bit=True),
        "quant_method 'bitsandbytes' is not read",
    ),
    "gptq marlin": (gptq, with_config(checkpoint_format="marlin"), "format marlin is not read .*" + INT4),
    "gptq old marlin": (gptq, with_config(is_marlin_format=True), "checkpoint_format marlin is not read"),
    "gptq planar": (gptq, with_config(format="gptq_p"), "checkpoint_format gptq and gptq_p is not read"),
    "gptq rotation": (gptq, with_config(rotation="hadamard"), "rotation 'hadamard' rotates activations too"),
    "gptq 2 bits": (gptq, with_config(bits=2), "INT2 in groups of 128 has no form in the graph.*" + INT4),
    "gptq 3 bits": (gptq, with_config(bits=3), "INT3 in groups of 128 has no form in the graph"),
    "gptq 4 bits per channel": (
        lambda: gptq(4, None),
        with_config(),
        "INT4 with one scale per output channel has no form in the graph; TensorRT has INT4 in blocks of 32, "
        "64 or 128 input features, and INT8 with one scale per output channel; " + INT4,
    ),
    "gptq groups of 16": (gptq, with_config(group_size=16), "INT4 in groups of 16 has no form"),
    "gptq 8 bits in groups": (
        lambda: gptq(8, 128),
        with_config(),
        "INT8 in groups of 128 has no form in the graph; .* INT8 with one scale per output channel; "
        + WEIGHT_ONLY,
    ),
    "gptq without bits": (gptq, with_config(bits=None), "bits must be a whole number, found None"),
    "gptq bits of text": (gptq, with_config(bits="4"), "bits must be a whole number, found '4'"),
    "gptq dynamic": (
        gptq,
        with_config(dynamic={"+:.*down_proj": {"bits": 8, "group_size": 32}}),
        r"different linears are quantized in different ways \(dynamic: '\+:.\*down_proj'\); " + INT4,
    ),
    "gptq dynamic of text": (gptq, with_config(dynamic="x"), "dynamic must be an object, found 'x'"),
    "gptq one zero point": (
        gptq,
        one_zero_point_off,
        r"q_proj.qzeros' has the zero point 7; expected 8 throughout, asymmetric weights have no form in the "
        "graph; " + INT4,
    ),
    "gptq asymmetric": (gptq, zero_points_of(3), "has the zero point 4; expected 8 throughout"),
    "gptq zero points of v2": (
        gptq,
        zero_points_of(8),
        r"has the zero point 9; .* \(if sym is true, the file may well be in gptq_v2: then say so in "
        r"checkpoint_format, format\); " + INT4,
    ),
    "gptq_v2 zero points of v1": (
        lambda: gptq(form="gptq_v2"),
        zero_points_of(7),
        r"has the zero point 7; .* may well be in gptq: then say so",
    ),
    "gptq act-order": (
        gptq,
        act_order,
        r"q_proj.g_idx' reorders the input features \(act-order, desc_act\), which would need a gather of "
        "the activations in every linear; expected feature i in group i // group_size; " + INT4,
    ),
    "gptq act-order without g_idx": (
        lambda: gptq(4, 32),
        act_order_without_g_idx,
        r"lacks 'model.*q_proj.g_idx'; expected it, as config.json says that the input features were "
        r"reordered \(act-order\); " + INT4,
    ),
    "gptq bias": (
        gptq,
        with_part("bias", torch.ones(OUT)),
        r"q_proj.bias' is not zero throughout: a Mistral decoder's linears have no bias; " + INT4,
    ),
    "gptq without scales": (
        gptq,
        without_part("scales"),
        r"the checkpoint lacks 'model.layers.0.self_attn.q_proj.scales'; expected one in every quantized "
        "linear: download it again",
    ),
    "gptq without zeros": (gptq, without_part("qzeros"), "lacks 'model.*q_proj.qzeros'"),
    "gptq groups other than said": (
        gptq,
        with_config(group_size=64),
        r"q_proj.scales' is float16 \[2, 16\]; expected float32 or float16 or bfloat16 \[4, 16\], as "
        r"config.json and the other tensors call for \(all linears have to be quantized alike\); " + INT4,
    ),
    "gptq a second linear in other groups": (
        gptq,
        second_linear(lambda: gptq(4, 32)),
        r"k_proj.scales' is float16 \[8, 16\]; expected .* \[2, 16\]",
    ),
    "gptq a second linear in 8 bits": (
        gptq,
        second_linear(lambda: gptq(8, None)),
        r"k_proj.scales' is float16 \[1, 16\]; expected .* \[4, 16\]",
    ),
    "gptq packed in 16 bits": (
        gptq,
        with_part("qweight", torch.zeros(64, OUT, dtype=torch.int16)),
        r"q_proj.qweight' is I16 \[64, 16\]; expected I32 of two axes",
    ),
    "gptq of one axis": (
        gptq,
        with_part("qweight", torch.zeros(64, dtype=torch.int32)),
        r"q_proj.qweight' is I32 \[64\]; expected I32 of two axes",
    ),
    "gptq last group not whole": (
        gptq,
        ragged,
        "q_proj.qweight' has 248 input features; expected a multiple of 128; " + INT4,
    ),
    "gptq nothing quantized": (
        gptq,
        all_in_floats,
        "gptq is said, and no linears are quantized in its way; expected linears",
    ),
    "gptq embedding": (gptq, renamed_to_embedding, "gptq is said, and embeddings are quantized in its way"),
    "gptq both ways": (gptq, both_ways, "holds 'model.*q_proj.weight' as floats and quantized; expected one"),
    "gptq said, compressed-tensors stored as well": (
        gptq,
        second_linear(packed),
        r"k_proj.weight_\w+' \(I\d\d\) belongs to no linear that is quantized as config.json says; " + INT4,
    ),
    "an odd integer": (
        gptq,
        lambda made: made.tensors.update({"model.norm.weight": torch.ones(4, dtype=torch.int64)}),
        r"'model.norm.weight' \(I64\) belongs to no linear",
    ),
    "a scale of nothing": (
        gptq,
        lambda made: made.tensors.update({"model.layers.0.mlp.up_proj.scales": torch.ones(1, 4)}),
        r"'model.layers.0.mlp.up_proj.scales' \(float32\) belongs to no linear",
    ),
    "awq asymmetric": (
        awq,
        zero_points_of(5),
        "q_proj.qzeros' has the zero point 5; expected 8 throughout, asymmetric weights have no form in the "
        "graph; " + INT4,
    ),
    "awq one zero point": (awq, one_zero_point_off, "has the zero point 9; expected 8 throughout"),
    "awq gemv": (awq, with_config(version="gemv"), r"AWQ's version gemv is not read \(gemm is\); " + INT4),
    "awq gemv_fast": (awq, with_config(version="GEMV_FAST"), "AWQ's version gemv_fast is not read"),
    "awq llm-awq": (awq, with_config(backend="llm-awq"), "AWQ's version llm-awq is not read"),
    "awq 8 bits": (awq, with_config(bits=8), r"AWQ in 8 bits is not read \(4 are\); " + INT4),
    "awq per channel": (lambda: awq(None), with_config(), "INT4 with one scale per output channel has no"),
    "awq scales of another shape": (
        awq,
        with_part("scales", torch.ones(2, OUT + 8)),
        r"scales' is float32 \[2, 24\]; expected .* \[2, 16\]",
    ),
    "activations": (
        packed,
        with_group(input_activations=DYNAMIC8),
        "config_groups.group_0 has input_activations: the weights could be taken over, but the activations "
        "would silently be quantized in another way, or not at all; " + INT8,
    ),
    "W8A8": (plain, with_group(input_activations=DYNAMIC8), "has input_activations.*" + INT8),
    "outputs": (packed, with_group(output_activations=DYNAMIC8), "has output_activations.*" + INT8),
    "a quantized cache": (
        packed,
        with_config(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme quantizes the cache, which the graph keeps in floats; " + INT4,
    ),
    "sparsity": (
        packed,
        with_config(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config: the format 'sparse-24-bitmask' is not read; " + INT4,
    ),
    "sparsity of text": (packed, with_config(sparsity_config="2:4"), "sparsity_config must be an object"),
    "transforms": (
        packed,
        with_config(transform_config={"config_groups": {"R1": {}}}),
        "transform_config transforms activations too",
    ),
    **{
        form: (packed, with_config(format=form), rf"the format '{form}' of int weights is not read \(pack-")
        for form in ("float-quantized", "nvfp4-pack-quantized", "marlin-24", "mixed-precision", "dense")
    },
    "fp8 weights": (
        plain,
        with_weights(type="float"),
        r"the format 'int-quantized' of float weights is not read \(pack-quantized, int-quantized, "
        r"naive-quantized of int are\); " + INT4,
    ),
    "asymmetric": (
        packed,
        with_weights(symmetric=False),
        "config_groups.group_0 is asymmetric; expected symmetric weights; " + INT4,
    ),
    "a zero point": (
        packed,
        with_part("weight_zero_point", torch.ones(OUT, 2, dtype=torch.int8)),
        "weight_zero_point' is not zero throughout: asymmetric weights have no form in the graph; " + INT4,
    ),
    "a packed zero point": (
        packed,
        with_part("weight_zero_point", torch.zeros(2, 2, dtype=torch.int32)),
        r"weight_zero_point' is I32 \[2, 2\]; expected .* \[16, 2\]",
    ),
    "blocks": (
        packed,
        with_weights(strategy="block"),
        "config_groups.group_0: strategy 'block' is not read .*" + INT4,
    ),
    "8 bits in groups": (lambda: packed(8, 128), with_config(), "INT8 in groups of 128 .*" + WEIGHT_ONLY),
    "4 bits per channel": (lambda: packed(4, None), with_config(), "INT4 with one scale per output channel"),
    "4 bits per tensor": (packed, with_weights(strategy="tensor", group_size=None), "INT4 with one scale"),
    "two ways": (
        packed,
        another_group(group_size=64),
        r"different linears are quantized in different ways \(config_groups: group_0, group_1\); " + INT4,
    ),
    "two formats": (
        lambda: plain(4, 64),
        lambda made: made.config["config_groups"].update(
            g={**made.config["config_groups"]["group_0"], "format": "pack-quantized"}
        ),
        "different linears are quantized in different ways",
    ),
    "a preset": (
        packed,
        lambda made: made.config["config_groups"].update(group_0=["Linear"]),
        r"config_groups.group_0 must describe weights, found \['Linear'\]",
    ),
    "no groups": (packed, with_config(config_groups={}), "config_groups is empty; expected at least one"),
    "groups of text": (packed, with_config(config_groups="x"), "config_groups must be an object, found 'x'"),
    "reordered by weight_g_idx": (
        packed,
        with_part("weight_g_idx", torch.arange(IN, dtype=torch.int32) % 2),
        "weight_g_idx' reorders the input features",
    ),
    "actorder without weight_g_idx": (
        packed,
        with_weights(actorder="group"),
        "lacks 'model.*q_proj.weight_g_idx'; expected it, as config.json says .* reordered",
    ),
    "a shape that is another's": (
        packed,
        with_part("weight_shape", torch.tensor([OUT, 2 * IN])),
        r"weight_packed' is I32 \[16, 32\]; expected I32 \[16, 64\]",
    ),
    "no shape": (packed, without_part("weight_shape"), "lacks 'model.*q_proj.weight_shape'"),
    "a scale too few": (
        packed,
        with_part("weight_scale", torch.ones(OUT, 1)),
        r"weight_scale' is float32 \[16, 1\]; expected .* \[16, 2\]",
    ),
    "scales of float64": (
        packed,
        with_part("weight_scale", torch.ones(OUT, 2, dtype=torch.float64)),
        r"weight_scale' is F64 \[16, 2\]; expected float32 or float16 or bfloat16",
    ),
    "NaN": (packed, scale_of(float("nan")), "weight_scale' holds NaN, infinity or a negative number; expec"),
    "infinity": (packed, scale_of(float("inf")), "holds NaN, infinity or a negative number"),
    "a negative scale": (packed, scale_of(-0.5), "holds NaN, infinity or a negative number"),
}  # fmt: skip


@pytest.mark.parametrize(("maker", "change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_said_is_refused(
    tmp_path: Path, maker: Callable[[], Made], change: Callable[[Made], None], words: str
) -> None:
    checkpoint = maker()
    change(checkpoint)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_codes_beyond_their_bits_are_refused(tmp_path: Path) -> None:
    checkpoint = plain(4, 64)
    checkpoint["weight"][5, 7] = 8
    linear = checkpoint.linear(tmp_path)
    with pytest.raises(CheckpointError, match="holds codes from -8 to 8; expected -8 to 7, as .* INT4"):
        linear.codes()


@pytest.mark.parametrize("name", ["gptq gptq 128", "awq 128", "packed 128", "int-quantized"])
def test_a_file_that_became_shorter_is_refused(tmp_path: Path, name: str) -> None:
    linear = MAKERS[name](0).linear(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: linear.packed.offset + 5])
    with pytest.raises(CheckpointError, match="became shorter while it was read: '.*weight.*' is cut off"):
        linear.codes()


def test_linears_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A second linear in the same file keeps its own numbers."""
    checkpoint, other = packed(seed=1), packed(seed=2)
    second_linear(lambda: other)(checkpoint)
    quantization, _ = checkpoint.read(tmp_path)
    assert len(quantization.linears) == 2
    for key, expected in (("q_proj", checkpoint), ("k_proj", other)):
        linear = quantization.linears[f"model.layers.0.self_attn.{key}.weight"]
        assert np.array_equal(linear.codes(), expected.codes)
        assert np.array_equal(linear.scales(), expected.scales)
