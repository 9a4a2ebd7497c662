"""A checkpoint that is already quantized → integer codes and scales of its linears.

Three formats are read, where they say what the graph can say, so that nothing is quantized a second time:
symmetric weights, INT4 in blocks of 32, 64 or 128 input features or INT8 with one scale per output channel,
floating-point activations, input features in their own order.

GPTQ, https://github.com/AutoGPTQ/AutoGPTQ (auto_gptq/nn_modules/qlinear/qlinear_cuda.py, `pack`) and
https://github.com/ModelCloud/GPTQModel (gptqmodel/utils/model.py, `convert_gptq_v1_to_v2_format_module`).
AWQ, https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py, `from_linear`).
compressed-tensors, https://github.com/vllm-project/compressed-tensors (src/compressed_tensors/:
compressors/pack_quantized, compressors/naive_quantized, quantization/quant_args.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mistral_trt.contract import BLOCK_SIZES
from mistral_trt.errors import CheckpointError
from mistral_trt.export.packing import (
    FLOATS,
    INSTEAD,
    PARTS,
    Layout,
    Parts,
    other_tensors,
    quantized_linears,
    read_array,
    read_codes,
    read_scales,
)
from mistral_trt.export.tensor_files import StoredTensor

_FORMATS: dict[str, Layout] = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "naive-quantized": "plain",
}
"""compressed-tensors' `format` → how the codes lie."""


@dataclass(frozen=True)
class StoredCodes:
    """One linear whose weight is stored quantized: weight = codes * scales.

    name: the weight's Hugging Face name ('model.layers.0.self_attn.q_proj.weight').  shape: (out_features,
    in_features).  bits: 4 or 8.  group_size: input features that share a scale, None for one scale per output
    channel.  packed, scale, layout: the tensors the two are read from, and how the codes lie in theirs.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    packed: StoredTensor = field(repr=False)
    scale: StoredTensor = field(repr=False)
    layout: Layout = field(repr=False)

    def codes(self) -> npt.NDArray[np.int8]:
        """int8 [out, in], in [-8, 7] or [-128, 127]; 0 where the scale is 0, whatever is stored there.

        Raises CheckpointError for a file that became shorter, or a code that does not fit the bits.
        """
        codes = read_codes(self.packed, self.layout, self.bits, self.shape)
        unused = self.scales() == 0
        if unused.any():
            codes.reshape(*unused.shape, -1)[unused] = 0
        return codes

    def scales(self) -> npt.NDArray[np.float32]:
        """float32 [out, groups], finite and not negative; groups = 1 for per-channel.

        Raises CheckpointError for a file that became shorter.
        """
        rows, columns = self.shape
        groups = 1 if self.group_size is None else columns // self.group_size
        return read_scales(self.scale, (rows, groups), self.layout)


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint is quantized, and all of its quantized linears.

    method: 'gptq', 'awq' or 'compressed-tensors'.  precision: 'int4' or 'int8-weight-only'.
    block_size: input features that share a scale, None for one scale per output channel.
    linears: by their weight's name.
    """

    method: str
    precision: str
    block_size: int | None
    linears: Mapping[str, StoredCodes]


@dataclass(frozen=True)
class _Form:
    """What config.json says of every quantized linear.

    stored_zero: the number that the zero point of a symmetric weight is stored as, None where none is.
    reordered: whether a group's input features may be any, so that a g_idx has to say which.
    """

    method: str
    layout: Layout
    bits: int
    group_size: int | None
    stored_zero: int | None
    reordered: bool = False


def read_stored_quantization(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[StoredQuantization, dict[str, StoredTensor]]:
    """The quantized linears of a checkpoint, and its other tensors.

    config: config.json's quantization_config, or the older compression_config.  tensors: every tensor of the
    checkpoint by its stored name.  Returns the quantization and the tensors that are stored as floats (norms,
    embeddings, linears left alone) under their names.
    Headers, scales and zero points are checked here, one linear in memory at a time; codes are read later.
    Raises CheckpointError for a quantization that the graph cannot say, and for a damaged checkpoint.
    """
    inner = config.get("quantization_config")
    form = _form({**config, **inner} if isinstance(inner, Mapping) else config)
    found = quantized_linears(tensors, form.layout)
    if not found or any(parts.module.endswith("embed_tokens") for parts in found):
        what = "embeddings" if found else "no linears"
        _refuse(f"{form.method} is said, and {what} are quantized in its way; expected linears")
    linears = {}
    for parts in found:
        linear = _READERS[form.layout](parts, form)
        linear.scales()
        linears[linear.name] = linear
    floats = other_tensors(tensors, found)
    twice = sorted(set(linears) & set(floats))
    if twice:
        raise CheckpointError(
            f"the checkpoint holds {twice[0]!r} as floats and quantized; expected one of them"
        )
    precision = "int4" if form.bits == 4 else "int8-weight-only"
    return StoredQuantization(form.method, precision, form.group_size, linears), floats


def _form(config: Mapping[str, Any]) -> _Form:
    method = config.get("quant_method")
    if method is None and "config_groups" in config:
        method = "compressed-tensors"
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    forms = {"gptq": _gptq_form, "awq": _awq_form, "compressed-tensors": _compressed_tensors_form}
    form = forms.get(str(method).lower().replace("_", "-"))
    if form is None:
        _refuse(f"quant_method {method!r} is not read (gptq, awq and compressed-tensors are, if symmetric)")
    return form(config)


def _gptq_form(config: Mapping[str, Any]) -> _Form:
    """The format "gptq" stores zero points less 1, "gptq_v2" as they are."""
    formats = _said(config, "format", "checkpoint_format") or ["gptq"]
    if config.get("is_marlin_format"):
        formats = ["marlin"]
    if formats not in (["gptq"], ["gptq_v2"]):
        _refuse(f"GPTQ's checkpoint_format {' and '.join(formats)} is not read (gptq and gptq_v2 are)")
    if config.get("rotation"):
        _refuse(f"rotation {config['rotation']!r} rotates activations too, which the graph does not")
    bits, group = _integer(config, "bits"), _integer(config, "group_size")
    for pattern, changes in _mapping(config, "dynamic").items():
        own = {"bits": bits, "group_size": group, **(changes if isinstance(changes, Mapping) else {})}
        if not pattern.startswith("-") and (own["bits"], own["group_size"]) != (bits, group):
            _refuse(f"different linears are quantized in different ways (dynamic: {pattern!r})")
    group_size = _representable(bits, group)
    zero = (1 << (bits - 1)) - (formats == ["gptq"])
    return _Form("gptq", "gptq", bits, group_size, zero, reordered=bool(config.get("desc_act")))


def _awq_form(config: Mapping[str, Any]) -> _Form:
    versions = _said(config, "version", "format", "checkpoint_format") or ["gemm"]
    if config.get("backend") == "llm-awq":
        versions = ["llm-awq"]
    if versions != ["gemm"]:
        _refuse(f"AWQ's version {' and '.join(versions)} is not read (gemm is)")
    bits = _integer(config, "bits", "w_bit")
    if bits != 4:
        _refuse(f"AWQ in {bits} bits is not read (4 are)")
    group_size = _representable(bits, _integer(config, "group_size", "q_group_size"))
    return _Form("awq", "awq", bits, group_size, 8)


def _compressed_tensors_form(config: Mapping[str, Any]) -> _Form:
    if config.get("kv_cache_scheme") is not None:
        _refuse("kv_cache_scheme quantizes the cache, which the graph keeps in floats")
    sparsity = _mapping(config, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        _refuse(f"sparsity_config: the format {sparsity!r} is not read")
    if _mapping(config, "transform_config").get("config_groups"):
        _refuse("transform_config transforms activations too, which the graph does not")
    groups = _mapping(config, "config_groups")
    if not groups:
        _refuse("config_groups is empty; expected at least one scheme")
    forms = {_scheme_form(name, scheme, config.get("format")) for name, scheme in groups.items()}
    if len({(form.layout, form.bits, form.group_size) for form in forms}) > 1:
        _refuse(f"different linears are quantized in different ways (config_groups: {', '.join(groups)})")
    return max(forms, key=lambda form: form.reordered)


def _scheme_form(name: str, scheme: Any, default_format: Any) -> _Form:
    """One of compressed-tensors' config_groups; what it leaves out is as in quant_args.py."""
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping):
        _refuse(f"config_groups.{name} must describe weights, found {scheme!r}")
    for key in ("input_activations", "output_activations"):
        if scheme.get(key) is not None:
            _refuse(
                f"config_groups.{name} has {key}: the weights could be taken over, but the activations would "
                "silently be quantized in another way, or not at all",
                "int8",
            )
    form, kind = str(scheme.get("format") or default_format), str(weights.get("type", "int")).lower()
    if form not in _FORMATS or kind != "int":
        _refuse(f"the format {form!r} of {kind} weights is not read ({', '.join(_FORMATS)} of int are)")
    if weights.get("symmetric", True) is not True:
        _refuse(f"config_groups.{name} is asymmetric; expected symmetric weights")
    group = -1 if weights.get("group_size") is None else _integer(weights, "group_size")
    strategy = weights.get("strategy") or ("group" if group > 0 else "channel")
    if strategy not in ("group", "channel", "tensor"):
        _refuse(f"config_groups.{name}: strategy {strategy!r} is not read (group, channel and tensor are)")
    bits = _integer(weights, "num_bits")
    group_size = _representable(bits, group if strategy == "group" else -1)
    reordered = weights.get("actorder") in (True, "group", "dynamic")
    return _Form("compressed-tensors", _FORMATS[form], bits, group_size, None, reordered)


def _representable(bits: int, group: int) -> int | None:
    """The group size, None for -1. Raises CheckpointError for what the graph cannot say."""
    if bits == 4 and group in BLOCK_SIZES:
        return group
    if bits == 8 and group == -1:
        return None
    found = f"INT{bits} " + ("with one scale per output channel" if group == -1 else f"in groups of {group}")
    _refuse(
        f"{found} has no form in the graph; TensorRT has INT4 in blocks of 32, 64 or 128 input features, and "
        "INT8 with one scale per output channel",
        "int8-weight-only" if bits == 8 else "int4",
    )


def _said(config: Mapping[str, Any], *keys: str) -> list[str]:
    return sorted({str(config[key]).lower() for key in keys if config.get(key) is not None})


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, Mapping | None):
        _refuse(f"{key} must be an object, found {value!r}")
    return value or {}


def _integer(config: Mapping[str, Any], *keys: str) -> int:
    value = next((config[key] for key in keys if key in config), None)
    if type(value) is not int:
        _refuse(f"{keys[0]} must be a whole number, found {value!r}")
    return value


def _refuse(reason: str, precision: str = "int4") -> NoReturn:
    raise CheckpointError(f"config.json, quantization_config: {reason}; {INSTEAD} --precision {precision}")


def _read_gptq(parts: Parts, form: _Form) -> StoredCodes:
    """qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out]."""
    packed = parts.take("qweight", None, "I32")
    shape = (packed.shape[1], packed.shape[0] * 32 // form.bits)
    return _read_with_zeros(parts, form, shape)


def _read_awq(parts: Parts, form: _Form) -> StoredCodes:
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]."""
    packed = parts.take("qweight", None, "I32")
    return _read_with_zeros(parts, form, (packed.shape[1] * 8, packed.shape[0]))


def _read_with_zeros(parts: Parts, form: _Form, shape: tuple[int, int]) -> StoredCodes:
    groups = parts.groups(shape, form.group_size)
    scale = parts.take("scales", (groups, shape[0]), *FLOATS)
    assert form.stored_zero is not None
    parts.require_symmetric(form.layout, form.bits, (groups, shape[0]), form.stored_zero)
    return _linear(parts, form, shape, scale, "g_idx")


def _read_packed(parts: Parts, form: _Form) -> StoredCodes:
    """weight_packed int32 [out, in * bits / 32], weight_scale [out, groups], weight_shape."""
    rows, columns = read_array(parts.take("weight_shape", (2,), "I64", "I32")).tolist()
    parts.take("weight_packed", (rows, -(-columns * form.bits // 32)), "I32")
    return _read_symmetric(parts, form, (rows, columns))


def _read_plain(parts: Parts, form: _Form) -> StoredCodes:
    """weight int8 [out, in], weight_scale [out, groups]."""
    rows, columns = parts.take("weight", None, "I8").shape
    return _read_symmetric(parts, form, (rows, columns))


def _read_symmetric(parts: Parts, form: _Form, shape: tuple[int, int]) -> StoredCodes:
    """A scale for the whole weight, [] or [1], stands for every channel."""
    groups = parts.groups(shape, form.group_size)
    found = parts.tensors.get("weight_scale")
    expected: tuple[int, ...] = (shape[0], groups)
    if found is not None and found.elements == 1 and form.group_size is None:
        expected = found.shape
    scale = parts.take("weight_scale", expected, *FLOATS)
    parts.require_zero("weight_zero_point", scale.shape, "asymmetric weights have no form in the graph")
    return _linear(parts, form, shape, scale, "weight_g_idx")


def _linear(
    parts: Parts, form: _Form, shape: tuple[int, int], scale: StoredTensor, order: str
) -> StoredCodes:
    parts.require_zero("bias", (shape[0],), "a Mistral decoder's linears have no bias")
    parts.require_order(order, shape[1], form.group_size, reordered=form.reordered)
    packed = parts.tensors[PARTS[form.layout][0]]
    return StoredCodes(
        f"{parts.module}.weight", shape, form.bits, form.group_size, packed, scale, form.layout
    )


_READERS: dict[Layout, Callable[[Parts, _Form], StoredCodes]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "packed": _read_packed,
    "plain": _read_plain,
}
