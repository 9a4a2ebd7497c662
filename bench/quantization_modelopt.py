"""Checkpoint + calibration tokens → the whole model fake-quantized by ModelOpt: what an artifact must equal.

Nothing here goes through the export's own calibration: ModelOpt sees Hugging Face's MistralForCausalLM as a
whole, and the codes are read off what its quantizers give.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.quantization.calibration import SEARCHED_TOKENS
from mistral_trt.export.quantization.layers import batches, first_tokens
from mistral_trt.export.quantization.scheme import KINDS, Scheme, quiet_modelopt
from mistral_trt.validate.reference.hugging_face import load_model

NOISE = 1e-7
_NEGLIGIBLE = 2.0**-24
_FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def float_model(checkpoint: Path, *, sliding_window: int) -> Any:
    """Hugging Face's MistralForCausalLM, float32, sdpa."""
    model: Any = load_model(Checkpoint.open(checkpoint), sliding_window=sliding_window)
    model.set_attn_implementation("sdpa")
    return model.requires_grad_(False)


def whole_model(checkpoint: Path, scheme: Scheme, ids: Tensor, *, sliding_window: int) -> Any:
    """The model after ModelOpt's calibration on ids, int64 [samples, tokens].

    In AWQ, linears that read one input get one pre_quant_scale afterwards, by ModelOpt's own preparation
    for fused linears.
    """
    model = float_model(checkpoint, sliding_window=sliding_window)
    calls = 0

    def forward_loop(model: Any) -> None:  # all tokens once, then AWQ's search on the first of them
        nonlocal calls
        calls += 1
        for batch in batches(ids) if calls == 1 else [first_tokens(ids, SEARCHED_TOKENS)]:
            model.model(input_ids=batch, use_cache=False)

    with quiet_modelopt(), torch.no_grad():
        import modelopt.torch.quantization as mtq

        mtq.quantize(model, scheme.modelopt_config(), forward_loop)
        if "AWQ" in scheme.algorithm:
            fuse(model)
    return model


def fuse(model: Any) -> None:
    """One pre_quant_scale for q, k, v and one for gate, up of each layer."""
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    for layer in model.model.layers:
        for names in _FUSED:
            preprocess_linear_fusion([layer.get_submodule(name) for name in names])


def quantized_linears(model: nn.Module) -> dict[str, Any]:
    """The linears that ModelOpt quantizes, by name."""
    modules: list[tuple[str, Any]] = list(model.named_modules())
    return {
        name: module
        for name, module in modules
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }


def modelopt_codes(linear: Any, scheme: Scheme) -> Tensor:
    """The codes behind a fake-quantized weight: int8 [out, in], E4M3 as its bits.

    Fake-quantized is code times scale, up to float32's last bits; dividing gives the code back.
    """
    with torch.no_grad():
        rounded: Tensor = linear.weight_quantizer(linear.weight).float()
    amax = linear.weight_quantizer.amax.float()
    groups = amax.reshape(1 if amax.numel() == 1 else len(rounded), -1, 1)  # [out or 1, groups, 1]
    step: Tensor = (groups / scheme.bound).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (rounded.view(len(rounded), groups.shape[1], -1) / step).view(rounded.shape)
    if scheme.weights == "float8_e4m3fn":
        return codes.to(torch.float8_e4m3fn).view(torch.int8)
    return codes.round().to(torch.int8)


def modelopt_constants(model: Any, scheme: Scheme) -> dict[str, list[np.ndarray]]:
    """The norms and scales of the graph by its names for them, each as one or two float32 arrays: with a
    pre_quant_scale folded in, and without."""
    linears, found = quantized_linears(model), {}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        scales = {kind: linears[prefix + kind].input_quantizer.pre_quant_scale for kind in KINDS}
        for norm, first in (("input_layernorm", KINDS[0]), ("post_attention_layernorm", KINDS[4])):
            found[f"{prefix}{norm}.weight"] = _folded(layer.get_submodule(norm).weight, scales[first])
        for kind in KINDS:
            linear, name = linears[prefix + kind], prefix + kind
            follows = scales["mlp.down_proj"] if kind == "mlp.up_proj" else None
            found[f"{name}.weight_scale"] = _folded(weight_scale(linear, scheme), follows)
            if scales[kind] is not None:
                found[f"{name}.pre_quant_scale"] = _folded(scales[kind], None)
            if scheme.activations is not None:
                found[f"{name}.input_scale"] = _folded(linear.input_quantizer.amax / scheme.bound, None)
    return found


def weight_scale(linear: Any, scheme: Scheme) -> Tensor:
    """What ModelOpt multiplies a code by, as the graph lays it out: [in / block, out], [out] or []."""
    amax = linear.weight_quantizer.amax.float()
    scale = torch.where(amax <= _NEGLIGIBLE, torch.ones_like(amax), amax) / scheme.bound
    return scale.reshape(-1) if scheme.block_size is None else scale.reshape(len(linear.weight), -1).T


def _folded(value: Tensor, scale: Tensor | None) -> list[np.ndarray]:
    with torch.no_grad():
        both = [value] if scale is None else [value, value * scale.reshape(-1)]
    return [tensor.float().numpy() for tensor in both]


def layer_passes(
    model: Any, ids: Sequence[int], *, fed: Sequence[tuple[Tensor, Tensor]] = ()
) -> list[tuple[Tensor, Tensor]]:
    """What enters and what leaves each layer over one text: float32 [1, S, hidden_size] each.

    fed: passes of an earlier run; each layer is fed what it was fed there.
    """
    passes: list[tuple[Tensor, Tensor]] = []

    def feed(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fed[len(passes)][0], *args[1:]) if fed else args

    def take(_: Any, args: tuple[Tensor, ...], out: Any) -> None:
        passes.append((args[0].clone(), (out[0] if isinstance(out, tuple) else out).clone()))

    handles = [layer.register_forward_pre_hook(feed) for layer in model.model.layers]
    handles += [layer.register_forward_hook(take) for layer in model.model.layers]
    with torch.no_grad():
        model.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return passes


@contextmanager
def noisy(linears: Mapping[str, nn.Module], *, relative: float = NOISE, seed: int = 0) -> Iterator[None]:
    """Multiply every output of these linears by 1 + `relative` times a normal random number."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(_: Any, args: Any, out: Tensor) -> Tensor:
        return out + out * relative * torch.randn(out.shape, generator=generator)

    handles = [linear.register_forward_hook(disturb) for linear in linears.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
