"""`quality` and `int4`: what quantization costs, as perplexity over speeches that it was not calibrated on.

Everything is teacher-forced with the window of 512 tokens. Artifacts are read through the rolling cache's
prefill in ONNX Runtime, computed as their graphs say; ModelOpt's own model and the float32 one in PyTorch.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quantization_checks import Check
from quantization_modelopt import float_model, whole_model
from quantization_reading import (
    cache_logits,
    compare,
    figures,
    model_logits,
    open_exact,
    read_with_model,
)
from quantization_runs import (
    WINDOW,
    Bench,
    calibration_ids,
    evaluation_ids,
    export,
    quantization_of,
    say,
)
from quantization_variants import grid_distance, noised

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.quantization.scheme import Scheme, scheme_for
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.validate.reference.hugging_face import Reference

TARGETS = ("kl=0.0125", "kl=0.0115", "kl=0.01")
"""Of --quality, on the calibration text: tried in turn until one meets the bound on the evaluation text.

As divergences: over a few thousand tokens a perplexity moves by a percent either way without any harm.
"""
QUALITY_MAX, SHARE_MIN = 1.03, 0.85
WEIGHT_ONLY_MAX, FP8_MAX = 1.01, 1.05
OVER_MODELOPT_MAX = 1.03
NOISE = 0.08
ROUNDING = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"
"""ModelOpt's name of plain rounding to the nearest code."""


class Judge:
    """A float32 model's reading of the evaluation texts, and how far others are from it."""

    def __init__(self, checkpoint: Path, texts: Sequence[Sequence[int]]) -> None:
        self.texts = texts
        say(f"{checkpoint.name}: float32")
        self.expected = self._read(float_model(checkpoint, sliding_window=WINDOW))
        self.perplexity = figures(compare(self.expected, model_logits(self.expected), texts))["perplexity"]

    def of_artifact(
        self, artifact: Path, *, open_with: Callable[[Path], RollingCache] = open_exact
    ) -> dict[str, float]:
        say(f"{artifact.name} through the rolling cache")
        return figures(compare(self.expected, cache_logits(open_with(artifact), self.texts), self.texts))

    def of_modelopt(self, checkpoint: Path, scheme: Scheme, ids: torch.Tensor) -> dict[str, float]:
        """ModelOpt's own fake-quantized whole model."""
        say(f"{checkpoint.name}: ModelOpt's {scheme.algorithm} on the whole model")
        read = self._read(whole_model(checkpoint, scheme, ids, sliding_window=WINDOW))
        gc.collect()
        return figures(compare(self.expected, model_logits(read), self.texts))

    def _read(self, model: Any) -> list[Reference]:
        return read_with_model(model, self.texts)


# ---------------------------------------------------------------- quality


def quality(bench: Bench) -> dict[str, Any]:
    """int8-weight-only, int8, fp8 and int8 under a budget, beside ModelOpt's own SmoothQuant."""
    judge = Judge(bench.model, evaluation_ids(bench))
    found: dict[str, Any] = {"float32": {"perplexity": judge.perplexity}}
    for precision in ("int8-weight-only", "int8", "fp8"):
        artifact = export(bench, f"onnx-{precision}", bench.model, precision)
        found[precision] = judge.of_artifact(artifact)
    weight_only = bench.exported["onnx-int8-weight-only"]
    found["int8-weight-only, ONNX Runtime's default"] = judge.of_artifact(weight_only, open_with=open_cache)
    scheme = scheme_for("int8", Checkpoint.open(bench.model).config)
    found["modelopt int8"] = judge.of_modelopt(bench.model, scheme, calibration_ids(bench))
    found["int8 --quality"] = under_budget(bench, judge)
    return {"figures": found, "checks": quality_checks(found), "remarks": frontier(found)}


def under_budget(bench: Bench, judge: Judge) -> dict[str, Any]:
    """int8 with --quality, the target lowered until the evaluation text keeps its bound too."""
    tried: list[dict[str, Any]] = []
    for target in TARGETS:
        artifact = export(bench, f"onnx-int8-{target}", bench.model, "int8", "--quality", target)
        said = quantization_of(artifact)
        more = {"target": target, "quantized_share": said["quantized_share"], "kept": len(said["kept"])}
        tried.append({**more, **judge.of_artifact(artifact), "frontier": said["frontier"]})
        if tried[-1]["perplexity_ratio"] <= QUALITY_MAX:
            break
    return {**tried[-1], "tried": tried[:-1]}


def quality_checks(found: dict[str, Any]) -> list[Check]:
    """The figures beside their bounds."""
    own = found["modelopt int8"]["perplexity_ratio"]
    budget = found["int8 --quality"]
    bounds = {
        "int8-weight-only": WEIGHT_ONLY_MAX,
        "int8": OVER_MODELOPT_MAX * own,
        "fp8": FP8_MAX,
        "int8 --quality": QUALITY_MAX,
    }
    checks = []
    for name, values in found.items():
        if name == "float32":
            checks.append(Check("float32: perplexity", values["perplexity"]))
            continue
        ratio = values["perplexity_ratio"]
        checks += [
            Check(f"{name}: perplexity over float32's", ratio, at_most=bounds.get(name)),
            Check(f"{name}: mean KL", values["kl_mean"]),
            Check(f"{name}: top-1 agreement", values["top1_agreement"]),
        ]
    share = Check(
        "int8 --quality: linears' bytes that are INT8", budget["quantized_share"], at_least=SHARE_MIN
    )
    return [*checks, share]


def frontier(found: dict[str, Any]) -> list[str]:
    """What each number of kept linears costs, on the evaluation text and on the calibration text."""
    budget = found["int8 --quality"]
    lines = [
        f"--quality {tried['target']}: {tried['kept']} kept in float16, {tried['quantized_share']:.1%} INT8: "
        f"perplexity × {tried['perplexity_ratio']:.4f} on the evaluation text"
        for tried in (*budget["tried"], budget)
    ]
    lines.append("on the calibration text:")
    for point in budget["frontier"]:
        lines.append(
            f"{point['kept']} kept, {point['quantized_share']:.1%} INT8: perplexity × "
            f"{point['perplexity_ratio']:.4f}, KL {point['kl']:.2g}"
        )
    return lines


# ---------------------------------------------------------------- int4


def int4(bench: Bench) -> dict[str, Any]:
    """INT4 on the demo model with noise: without it, its weights lie on a 4-bit grid already."""
    checkpoint = noised(bench.model, bench.scratch / "noised", relative=NOISE)
    texts = evaluation_ids(bench)
    before, judge = Judge(bench.model, texts), Judge(checkpoint, texts)
    scheme = scheme_for("int4", Checkpoint.open(checkpoint).config)
    artifact = export(bench, "onnx-noised-int4", checkpoint, "int4")
    found: dict[str, Any] = {
        "noise": NOISE,
        "block_size": scheme.block_size,
        "grid_distance": {
            "original": grid_distance(bench.model, bench.model),
            "noised": grid_distance(bench.model, checkpoint),
        },
        "original float32": {"perplexity": before.perplexity},
        "float32": {"perplexity": judge.perplexity},
        "int4": judge.of_artifact(artifact),
        "int4, ONNX Runtime's default": judge.of_artifact(artifact, open_with=open_cache),
        "rounding": judge.of_modelopt(checkpoint, replace(scheme, modelopt=ROUNDING), calibration_ids(bench)),
    }
    return {"figures": found, "checks": int4_checks(found), "remarks": [meaning(found)]}


def int4_checks(found: dict[str, Any]) -> list[Check]:
    """Nothing is asked of INT4: the values alone."""
    checks = [
        Check("float32: perplexity of the model", found["original float32"]["perplexity"]),
        Check("float32: perplexity of the noised model", found["float32"]["perplexity"]),
        Check("mean distance from the 4-bit grid, steps", found["grid_distance"]["noised"]),
    ]
    for name, words in (("int4", "int4"), ("rounding", "plain rounding to INT4")):
        checks += [
            Check(f"{words}: perplexity over float32's", found[name]["perplexity_ratio"]),
            Check(f"{words}: mean KL", found[name]["kl_mean"]),
            Check(f"{words}: top-1 agreement", found[name]["top1_agreement"]),
        ]
    return checks


def meaning(found: dict[str, Any]) -> str:
    """What the figures say, and what they do not."""
    distance, block = found["grid_distance"], found["block_size"]
    awq, rounding = (found[name]["perplexity_ratio"] - 1 for name in ("int4", "rounding"))
    before, after = found["original float32"]["perplexity"], found["float32"]["perplexity"]
    return (
        f"noise of {found['noise']:.0%} of each row's root mean square takes the weights from "
        f"{distance['original']:.3f} to {distance['noised']:.3f} steps off the 4-bit grid they were stored "
        f"on (0.25: anywhere), so INT4 has to round them like any others: AWQ in blocks of {block} costs "
        f"{awq:.1%} of perplexity, rounding to the nearest code {rounding:.1%}. The noised model is a worse "
        f"one (perplexity {before:.1f} → {after:.1f}) of 135M parameters: the figure compares methods and "
        "does not foretell what a 7B loses."
    )
