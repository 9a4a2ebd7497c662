"""Made-up reports for the tests: 60 positions of a tiny model, with or without every part."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.validate.findings import (
    ActivationRange,
    Choice,
    LayerErrors,
    LayerFindings,
    WeightFindings,
    WorstCase,
)
from mistral_trt.validate.metrics import LogitErrors
from mistral_trt.validate.report.report import Report
from mistral_trt.validate.scenarios.greedy import Divergence, GreedyAgreement
from mistral_trt.validate.scenarios.poke import Poke, PokeResult, Question
from mistral_trt.validate.scenarios.probes import probes
from mistral_trt.validate.scenarios.scenario import scenarios
from mistral_trt.validate.scenarios.tokens import random_tokens
from mistral_trt.validate.verdict.gates import judge, measure, read_gates, undecided
from mistral_trt.validate.verdict.parts import measure_parts
from mistral_trt.validate.verdict.quality import measure_quality, reading
from mistral_trt.validate.verdict.scenario_results import OwnPrecision, ScenarioResult
from tests.models import TINY

LENGTH = 60
CONTRACT = GraphContract(TINY, "fp16", Ring(8, 4), 1, None)
NOTHING_MEASURED = measure_parts(layers=None, own=None, weights=None, ring=CONTRACT.ring)
GREEDY = GreedyAgreement(15, 45, 41, Divergence(56, 17, 4, 0.03125))
SENSITIVITY = [
    {"name": f"model.layers.{i}.{kind}", "error": (i + 1) * size, "kept": i == 3 and kind == "mlp.down_proj"}
    for i in range(4)
    for kind, size in (("self_attn.q_proj", 0.01), ("mlp.down_proj", 0.1), ("mlp.up_proj", 0.02))
] + [{"name": "lm_head", "error": 0.005, "kept": True}]
QUANTIZATION: dict[str, object] = {
    "scheme": {"precision": "int8", "weights": "int8", "activations": "int8", "block_size": None},
    "quantized": [f"w{i}" for i in range(11)],
    "kept": ["w11", "w12"],
    "quantized_share": 0.93,
    "sensitivity": SENSITIVITY,
    "calibration": {"source": "Old speeches", "sha256": "c" * 64, "samples": 16, "tokens": 512},
}


def errors(size: int, scale: float) -> LogitErrors:
    """Errors over random tokens: nothing is scored."""
    draw = np.random.default_rng(size)
    columns = {
        name: scale * draw.random(size) for name in ("max_abs", "mean_abs", "relative", "cosine", "kl")
    }
    nothing = np.full(size, np.nan)
    agree, scored = draw.random(size) > 0.1, np.zeros(size, bool)
    position = np.arange(size)
    rank = np.where(agree, 0, 7)
    return LogitErrors(
        position, **columns, agree=agree, rank=rank, nll_reference=nothing, nll=nothing, scored=scored
    )


def text_report(quantization: dict[str, object] | None = None, *, scale: float = 1e-5) -> Report:
    """The report of a text: mean log-likelihood log 20 by the reference, log 25 by the artifact."""
    plain = report(scale)
    scored = np.arange(LENGTH) < LENGTH - 1
    read = [
        replace(
            result,
            errors=replace(
                result.errors,
                nll_reference=np.where(scored, np.log(20.0), np.nan),
                nll=np.where(scored, np.log(25.0), np.nan),
                scored=scored,
            ),
        )
        for result in plain.scenarios
    ]
    return replace(
        plain,
        scenarios=tuple(read),
        tokens=replace(plain.tokens, source="text: own.txt, 3 times over", is_text=True),
        quality=measure_quality(read, GREEDY),
        quantization=quantization,
        contract=CONTRACT if quantization is None else replace(CONTRACT, precision="int8"),
    )


def report(scale: float = 1e-5, **changes: object) -> Report:
    """A report of 60 positions; a scale past the limits fails it."""
    plans = scenarios(CONTRACT, LENGTH, names=["prefill", "decode", "padded", "stepwise"], seed=0)
    results = tuple(ScenarioResult(plan, errors(LENGTH, scale), None) for plan in plans)
    pokes = (PokeResult(Question(26, 27), Poke("q-W", (6,), False), 0, 97),)
    gates = read_gates("fp16")
    measured = {**measure(results, pokes), **NOTHING_MEASURED}
    made = Report(
        contract=CONTRACT,
        artifact={
            "name": "tiny", "folder": "onnx", "manifest_sha256": "a" * 64, "graph_sha256": None,
            "versions": {"onnx": "1"}, "engine": None, **CONTRACT.to_json(),
        },
        reference={"folder": "checkpoint", "sha256": "b" * 64, "implementation": "Hugging Face"},
        executed="The ONNX graph ran. No TensorRT engine was executed.",
        tokens=random_tokens(length=LENGTH, vocab_size=97, seed=0),
        probes=tuple(probes(CONTRACT, LENGTH)),
        scenarios=results,
        pokes=pokes,
        gates=judge(gates, measured),
        undecided=undecided(gates, measured),
        weights=None,
        layers=None,
        own_precision=None,
        worst_cases=None,
        quality=measure_quality(results, GREEDY),
        quantization=None,
        notes=(),
        run={
            "command": "mistral-trt validate onnx", "seed": 0, "started": "2026-01-01T00:00:00+00:00",
            "seconds": 1.5, "versions": {"torch": "2"},
            "budget": "default", "streaming": False, "predicted_seconds": 2,
            "machine": {"processor": "P", "cores": 2, "memory_gb": 8.0, "system": "Linux"},
        },
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def layer_findings(count: int = 12, *, offset: float = 1.0, wrong: int | None = None) -> LayerFindings:
    """Layers that are off by a thousandth times `offset`; the wrong one and all after it by far more."""
    ring, draw = CONTRACT.ring, np.random.default_rng(count)
    positions = np.arange(LENGTH - ring.capacity, LENGTH)
    layers = []
    for index in range(count):
        grown = 80.0 if wrong is not None and index >= wrong else 1.0
        update = offset * (80.0 if index == wrong else 1.0) * draw.lognormal(-7, 0.4, LENGTH)
        hidden = offset * grown * (1 + index) * draw.lognormal(-7.5, 0.5, LENGTH)
        keys, values = offset * draw.lognormal(-7.4, 0.3, (2, ring.capacity))
        layers.append(LayerErrors(index, hidden, update, positions, keys, values))
    classes = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "residual")
    ranges = [
        ActivationRange(name, index, 3.0 * (1 + size) ** 3 + index, 0.002 * size)
        for size, name in enumerate(classes)
        for index in range(count)
    ]
    ranges.append(ActivationRange("logits", None, 31.5, 0.0))
    return LayerFindings(
        "The reference's layers were fed to the graph one by one.", tuple(layers), tuple(ranges)
    )


def own_precision(results: Sequence[ScenarioResult], scale: float = 0.5) -> OwnPrecision:
    """The reference in float16, half as far from both as the artifact is from float32."""
    closer = tuple(
        replace(
            result,
            errors=replace(
                result.errors, relative=scale * result.errors.relative, kl=scale * result.errors.kl
            ),
        )
        for result in results
    )
    return OwnPrecision("The reference ran in float16 on the CPU.", closer, reading(closer))


ENGINE: dict[str, object] = {
    "folder": "engines/a10g-fp16",
    "manifest_sha256": "d" * 64,
    "gpus": ["a10g", "l4"],
    "flavor": "tensorrt-rtx",
    "tensorrt": "1.7.1",
    "weights": "embedded",
    "audit": [
        {"check": "ring writes", "found": "24, each from its past to its present"},
        {"check": "attentions", "found": "12, each fused, over the ring with the mask of its window"},
    ],
    "executed_on": "NVIDIA A10G",
    "polygraphy": [
        {"name": "decode", "passed": True, "words": "PASSED | All outputs matched"},
        {"name": "prefill", "passed": False, "words": f"FAILED | logits\n[E] {'past_key_values' * 12}"},
        {"name": "layers-decode", "passed": None, "words": "polygraphy: command not found"},
    ],
}
WEIGHTS = WeightFindings(compared=363, wrong={}, worst_steps=0.5)
WORST_CASES = tuple(
    WorstCase(
        "decode", 50 - place, 0.02 / (1 + place), f"and the great white whale, number {place}, came",
        Choice(17 + place, " up", 0.41), Choice(4, " down" if place else "", 0.3999),
    )
    for place in range(10)
)  # fmt: skip


def full_report(
    *,
    weights: WeightFindings = WEIGHTS,
    layers: LayerFindings | None = None,
    scale: float = 1e-5,
) -> Report:
    """The report of a text whose every part was run."""
    plain = text_report(QUANTIZATION, scale=scale)
    found = layer_findings() if layers is None else layers
    own = own_precision(plain.scenarios)
    gates = read_gates("fp16")
    measured = {
        **measure(plain.scenarios, plain.pokes),
        **measure_parts(layers=found, own=own, weights=weights, ring=CONTRACT.ring),
    }
    return replace(
        plain,
        artifact={**plain.artifact, "engine": ENGINE},
        gates=judge(gates, measured),
        undecided=undecided(gates, measured),
        weights=weights,
        layers=found,
        own_precision=own,
        worst_cases=WORST_CASES,
    )
