"""`equality`: the graph computes what ModelOpt meant.

The whole model, quantized by ModelOpt on the tokens that the export was calibrated on, beside the artifact:
the codes, each layer's update when both are fed the same, and the distributions when both run freely. Under
noise of 1e-7 activation codes flip and the flips cascade, so figures stand beside their floor: ModelOpt's
model against itself with such noise on every linear's output.
"""

import gc
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from quantization_activations import Activation, activations, coded_error
from quantization_checks import Check
from quantization_layers import (
    Candidates,
    artifact_codes,
    constants_off,
    float32_twin,
    read_layer,
    relative_rms,
    update_error,
)
from quantization_modelopt import (
    NOISE,
    layer_passes,
    modelopt_codes,
    modelopt_constants,
    noisy,
    quantized_linears,
    whole_model,
)
from quantization_reading import (
    cache_logits,
    compare,
    figures,
    model_logits,
    open_exact,
    read_with_model,
)
from quantization_runs import WINDOW, Bench, calibration_ids, evaluation_ids, export, quantization_of, say
from torch import Tensor

from mistral_trt.contract import QUANTIZED
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.quantization.scheme import KINDS, scheme_for
from mistral_trt.runtime.engine import open_cache

CHUNK = 256
FREE_TOKENS = 1024
FLOORS = 3.0
FREE_KL_MAX = 5e-5
LAYER_MAX, TWIN_MAX = 5e-2, 4e-3
TIES_MAX = 1e-4
"""Of activation codes; a step that is off by 1 % rounds a tenth of them otherwise."""
MUTATION = 1.01
MUTATION_MIN = TWIN_MAX
DIRECT = KINDS[2:]
"""Linears whose output reaches the layer's update by multiplication; q and k act through the softmax."""


def equality(bench: Bench) -> dict[str, Any]:
    """Each of the precisions asked for in turn, beside the earlier figures of the others."""
    ids, text = calibration_ids(bench), evaluation_ids(bench)[0]
    found: dict[str, Any] = {name: bench.earlier[name] for name in QUANTIZED if name in bench.earlier}
    for precision in bench.precisions:
        found[precision] = {"settings": bench.settings(), **_equality_of(bench, precision, ids, text)}
        gc.collect()  # ModelOpt's modules refer to each other
    found = {precision: found[precision] for precision in QUANTIZED if precision in found}
    checks = [check for precision in found for check in checks_of(precision, found[precision])]
    return {"figures": found, "checks": checks, "remarks": []}


def _equality_of(bench: Bench, precision: str, ids: Tensor, text: list[int]) -> dict[str, Any]:
    artifact = export(bench, f"onnx-{precision}", bench.model, precision)
    require_same_ids(artifact, ids)
    scheme = scheme_for(precision, Checkpoint.open(bench.model).config)
    say(f"{precision}: ModelOpt calibrates the whole model")
    model = whole_model(bench.model, scheme, ids, sliding_window=WINDOW)
    linears = quantized_linears(model)
    codes = {name: modelopt_codes(linear, scheme) for name, linear in linears.items()}
    say(f"{precision}: layer by layer, then free-running")
    passes, constants = layer_passes(model, text[:CHUNK]), modelopt_constants(model, scheme)
    with noisy(linears):
        disturbed = layer_passes(model, text[:CHUNK], fed=passes)
    given = activations(model, text[:CHUNK]) if scheme.activations is not None else {}
    return {
        **compare_codes(artifact, codes),
        **compare_layers(artifact, passes, constants),
        **compare_coded(artifact, passes, constants, given),
        "layer_floor": max(map(layer_floor, passes, disturbed)),
        "scale_off_by_1_percent": mutate(artifact, passes, constants, given),
        **compare_free(artifact, model, linears, text[:FREE_TOKENS]),
    }


def checks_of(precision: str, found: dict[str, Any]) -> list[Check]:
    """The figures of one precision beside their bounds."""
    free = FLOORS * found["kl_floor"] if precision in ("int8", "fp8") else FREE_KL_MAX
    mutated = min(found["scale_off_by_1_percent"][kind] for kind in DIRECT)
    return [
        Check(f"{precision}: codes that differ of {found['codes']:,}", found["codes_different"], at_most=0),
        Check(
            f"{precision}: norms and scales of {found['constants']:,} that are no rounding of ModelOpt's",
            len(found["constants_off"]),
            at_most=0,
        ),
        Check(
            f"{precision}: error of a layer's update, worst layer", found["layer_error"], at_most=LAYER_MAX
        ),
        *_twin_checks(precision, found),
        Check(f"{precision}: its floor, ModelOpt's layer under noise of {NOISE:g}", found["layer_floor"]),
        Check(f"{precision}: the twin's with a scale off by 1 %", mutated, at_least=MUTATION_MIN),
        Check(f"{precision}: free-running KL, {found['positions']:,} positions", found["kl"], at_most=free),
        Check(f"{precision}: its floor", found["kl_floor"]),
        Check(f"{precision}: the KL as ONNX Runtime computes by default", found["kl_onnxruntime"]),
    ]


def _twin_checks(precision: str, found: dict[str, Any]) -> list[Check]:
    """A twin whose activations have codes of its own shows ties (quantization_activations): they are counted,
    and the bound is asked of it both with ModelOpt's codes and without."""
    own = f"{precision}: the same in its float32 twin"
    if "coded_error" not in found:
        return [Check(own, found["twin_error"], at_most=TWIN_MAX)]
    share = found["activation_codes_different"] / found["activation_codes"]
    return [
        Check(f"{own}, given ModelOpt's activation codes", found["coded_error"], at_most=TWIN_MAX),
        Check(f"{precision}: share of those codes that it would round otherwise", share, at_most=TIES_MAX),
        Check(f"{own}, with these codes of its own", found["twin_error"], at_most=TWIN_MAX),
    ]


def require_same_ids(artifact: Path, ids: Tensor) -> None:
    """End the bench unless an artifact was calibrated on exactly these tokens."""
    sha256 = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    if quantization_of(artifact)["calibration"]["sha256"] != sha256:
        sys.exit(
            f"{artifact} was calibrated on other tokens than ModelOpt here; its config names another BOS"
        )


def compare_codes(artifact: Path, codes: dict[str, Tensor]) -> dict[str, Any]:
    """How many codes of the artifact are not ModelOpt's."""
    ours = artifact_codes(artifact, list(codes))
    different = {name: int((ours[name] != codes[name].numpy()).sum()) for name in codes}
    return {
        "linears": len(codes),
        "codes": sum(found.numel() for found in codes.values()),
        "codes_different": sum(different.values()),
        "linears_different": sum(count > 0 for count in different.values()),
    }


def compare_layers(
    artifact: Path, passes: list[tuple[Tensor, Tensor]], constants: Candidates
) -> dict[str, Any]:
    """Errors of each layer's update, fed what ModelOpt's was fed: of the artifact's and of its twin's."""
    errors, twins, off = [], [], []
    for index, (entered, left) in enumerate(passes):
        layer = read_layer(artifact, index)
        errors.append(update_error(layer, entered, left))
        twins.append(update_error(float32_twin(layer, constants), entered, left))
        off += constants_off(layer, constants)
    return {
        "constants": len(constants),
        "constants_off": off,
        "layer_error": max(errors),
        "layer_error_at": errors.index(max(errors)),
        "layer_errors": [float(f"{error:.3g}") for error in errors],
        "twin_error": max(twins),
        "twin_error_at": twins.index(max(twins)),
        "twin_errors": [float(f"{error:.3g}") for error in twins],
    }


def compare_coded(
    artifact: Path,
    passes: list[tuple[Tensor, Tensor]],
    constants: Candidates,
    given: dict[str, Activation],
) -> dict[str, Any]:
    """Errors of each layer's twin given ModelOpt's activation codes; nothing where activations have none."""
    if not given:
        return {}
    twins = [float32_twin(read_layer(artifact, index), constants) for index in range(len(passes))]
    found = [coded_error(twin, passed, given) for twin, passed in zip(twins, passes, strict=True)]
    return {
        "coded_error": max(error.worst for error in found),
        "coded_errors": [float(f"{error.worst:.3g}") for error in found],
        "activation_codes": sum(error.codes for error in found),
        "activation_codes_different": sum(error.flips for error in found),
    }


def layer_floor(clean: tuple[Tensor, Tensor], disturbed: tuple[Tensor, Tensor]) -> float:
    """Error of a layer's update under noise; both were fed the same."""
    entered, left = clean
    return relative_rms((disturbed[1] - entered).numpy(), (left - entered).numpy())


def mutate(
    artifact: Path,
    passes: list[tuple[Tensor, Tensor]],
    constants: Candidates,
    given: dict[str, Activation],
) -> dict[str, float]:
    """Error of the middle layer's twin when the weight scale of one linear is off by 1 %, by linear.

    It is given ModelOpt's activation codes, as the twin that has to keep the bound is.
    """
    index = len(passes) // 2
    layer = read_layer(artifact, index)
    errors = {}
    for kind in KINDS:
        scaled = {f"model.layers.{index}.{kind}.weight_scale": MUTATION}
        twin = float32_twin(layer, constants, scaled=scaled)
        if given:
            errors[kind] = coded_error(twin, passes[index], given).worst
        else:
            errors[kind] = update_error(twin, *passes[index])
    return errors


def compare_free(artifact: Path, model: Any, linears: dict[str, Any], text: list[int]) -> dict[str, Any]:
    """Mean KL of the artifact from ModelOpt's model over a text, and of that model from itself with noise.

    kl_onnxruntime: as ONNX Runtime computes by default (see EXACT).
    """
    with torch.no_grad():
        expected = read_with_model(model, [text])
        with noisy(linears):
            disturbed = read_with_model(model, [text])
    free = figures(compare(expected, cache_logits(open_exact(artifact), [text]), [text]))
    default = figures(compare(expected, cache_logits(open_cache(artifact), [text]), [text]))
    floor = figures(compare(expected, model_logits(disturbed), [text]))
    return {
        "positions": len(text),
        "kl": free["kl_mean"],
        "kl_onnxruntime": default["kl_mean"],
        "kl_floor": floor["kl_mean"],
        "top1_agreement": free["top1_agreement"],
    }
