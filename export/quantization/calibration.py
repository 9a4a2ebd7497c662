"""Checkpoint + calibration tokens → the scales of every linear, by ModelOpt, one decoder layer at a time.

The hidden states of the calibration set flow through layer i, ModelOpt quantizes that layer alone, what it
found is written to a file, and the unquantized layer's output goes on to layer i + 1: the same result as
ModelOpt on the whole model, with one layer in memory. A run that was stopped goes on where it stopped.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mistral_trt.errors import CalibrationError
from mistral_trt.export.quantization.layers import LayerStream, batches, first_tokens
from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import KINDS, LM_HEAD_MODULE, Scheme, linear_names, quiet_modelopt
from mistral_trt.export.quantization.store import CalibrationStore
from mistral_trt.progress import note, track

_SHARED_INPUT = (KINDS[0:3], KINDS[4:6])
_NOT_FINITE = (
    "a weight or a hidden state is not finite on the calibration text: the checkpoint is damaged, or the "
    "text is not for this model; try another --calibration"
)

SEARCHED_TOKENS = 1024
"""Tokens that AWQ's search and the errors of the linears are measured on; all others are seen once."""

ForwardLoop = Callable[[nn.Module], None]


def calibrate(
    stream: LayerStream, ids: Tensor, scheme: Scheme, store: CalibrationStore, *, lm_head: bool = False
) -> dict[str, LinearScales]:
    """Scales by module name (`model.layers.0.self_attn.q_proj`), in the order of the forward pass.

    ids: int64 [samples, tokens].  Raises CalibrationError if an activation is not finite.
    """
    layers = stream.config.num_hidden_layers
    parts = layers + lm_head
    found = store.load(parts)
    if found is None:
        _calibrate_parts(stream, ids, scheme, store, parts)
        found = store.load(parts)
    assert found is not None
    store.finish()
    return {name: found[name] for name in linear_names(stream.checkpoint.config, lm_head=lm_head)}


def _calibrate_parts(
    stream: LayerStream, ids: Tensor, scheme: Scheme, store: CalibrationStore, parts: int
) -> None:
    """Every layer that is not finished, then the lm_head if that is a part too."""
    start, hidden = store.load_hidden() or (0, stream.embed(ids))
    if start:
        note(f"calibration goes on at layer {start}")
    with track(f"calibrating {scheme.precision}", parts - start, unit="layers") as advance:
        for part in range(start, parts):
            if part < stream.config.num_hidden_layers:
                scales, hidden = calibrate_layer(stream, stream.layer(part), hidden, scheme)
                prefix = f"model.layers.{part}."
                store.save(part, {prefix + name: found for name, found in scales.items()})
                if part + 1 < parts:
                    store.save_hidden(part + 1, hidden)
            else:
                store.save(part, {LM_HEAD_MODULE: calibrate_head(stream, hidden, scheme)})
            gc.collect()  # ModelOpt's modules refer to each other, and each layer is a gigabyte
            advance(1)


def calibrate_layer(
    stream: LayerStream, layer: nn.Module, hidden: Tensor, scheme: Scheme
) -> tuple[dict[str, LinearScales], Tensor]:
    """Scales of one layer by kind (`self_attn.q_proj`), and the unquantized layer's output.

    hidden: the layer's input, float32 [samples, tokens, hidden_size].
    """
    following: list[Tensor] = []
    some = first_tokens(hidden, SEARCHED_TOKENS)

    def forward_loop(model: nn.Module) -> None:
        # While ModelOpt looks on, the layer computes as if it were not quantized: that is what comes next.
        if following:
            stream.run(model, some)  # AWQ's search, which computes each linear a dozen times
        else:
            following.extend(stream.run(model, batch) for batch in batches(hidden))

    modules = quantize(layer, scheme, forward_loop)
    own = _unify_shared_inputs(modules)
    out = torch.cat(following)
    if not torch.isfinite(out).all():
        raise CalibrationError(_NOT_FINITE)
    measured = _measure(modules, lambda: stream.run(layer, some))
    return {name: _scales(modules[name], own.get(name), *measured[name]) for name in modules}, out


def calibrate_head(stream: LayerStream, hidden: Tensor, scheme: Scheme) -> LinearScales:
    """Scales of the lm_head over the last layer's output."""
    norm, holder = stream.norm(), nn.ModuleDict({"linear": stream.lm_head()})  # a name ModelOpt does not skip
    normed = [norm(batch) for batch in batches(hidden)]

    def forward_loop(model: nn.Module) -> None:
        for batch in normed:
            for rows in batch.flatten(0, 1).split(256):  # [256, V] at a time
                holder["linear"](rows)

    with torch.no_grad():
        modules = quantize(holder, scheme, forward_loop)
        measured = _measure(modules, lambda: holder["linear"](normed[0].flatten(0, 1)[:256]))
    return _scales(modules["linear"], None, *measured["linear"])


def quantize(module: nn.Module, scheme: Scheme, forward_loop: ForwardLoop) -> dict[str, Any]:
    """Let ModelOpt quantize the linears of a module in place.  Returns them by name."""
    with quiet_modelopt():
        import modelopt.torch.quantization as mtq

        try:
            mtq.quantize(module, scheme.modelopt_config(), forward_loop)
        except AssertionError as error:  # how ModelOpt refuses NaN and infinity
            raise CalibrationError(f"{_NOT_FINITE} (ModelOpt: {error})") from error
    return {
        name: linear
        for name, linear in module.named_modules()
        if hasattr(linear, "weight_quantizer") and linear.weight_quantizer.is_enabled
    }


def _unify_shared_inputs(modules: dict[str, Any]) -> dict[str, Tensor]:
    """Give linears that read one input one pre_quant_scale, the mean of theirs, as ModelOpt's own
    preparation for fused linears does.  Returns the scales that were replaced, by name."""
    with quiet_modelopt():
        from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    own: dict[str, Tensor] = {}
    for group in _SHARED_INPUT:
        members = [modules[name] for name in group if name in modules]
        if len(members) < 2 or members[0].input_quantizer.pre_quant_scale is None:
            continue
        before = {name: modules[name].input_quantizer.pre_quant_scale.clone() for name in group}
        if all(torch.equal(scale, before[group[0]]) for scale in before.values()):
            continue  # SmoothQuant's come from the input alone
        with quiet_modelopt(), torch.no_grad():
            preprocess_linear_fusion(members)
        for name, scale in before.items():
            if not torch.equal(scale, modules[name].input_quantizer.pre_quant_scale):
                own[name] = scale
    return own


def _measure(modules: dict[str, Any], forward: Callable[[], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Relative error and largest magnitude of each linear's output, over one unquantized forward."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in modules.items():

        def compare(module: Any, args: tuple[Tensor, ...], exact: Tensor, name: str = name) -> None:
            _enable(module, True)
            quantized = nn.functional.linear(
                module.input_quantizer(args[0]), module.weight_quantizer(module.weight)
            )
            _enable(module, False)
            error = (quantized - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-30)
            found[name] = error, exact.abs().flatten(0, -2).amax(0)

        _enable(module, False)
        handles.append(module.register_forward_hook(compare))
    forward()
    for handle in handles:
        handle.remove()
    return found


def _enable(module: Any, quantized: bool) -> None:
    """Switch a linear between quantized and exact. The pre_quant_scale applies in both."""
    for quantizer in (module.weight_quantizer, module.input_quantizer):
        if quantizer.amax is not None:
            quantizer.enable_quant() if quantized else quantizer.disable_quant()


def _scales(module: Any, own: Tensor | None, error: Tensor, output_amax: Tensor) -> LinearScales:
    amax = module.weight_quantizer.amax.float()
    rows = 1 if amax.numel() == 1 else module.weight.shape[0]
    reads = module.input_quantizer
    scale = reads.pre_quant_scale
    return LinearScales(
        weight_amax=amax.reshape(rows, -1).clone(),
        output_amax=output_amax.clone(),
        error=error.clone(),
        input_amax=reads.amax.float().reshape(()).clone()
        if reads.is_enabled and reads.amax is not None
        else None,
        pre_quant_scale=None if scale is None else scale.float().reshape(-1).clone(),
        own_scale=None if own is None else own.float().reshape(-1).clone(),
    )
