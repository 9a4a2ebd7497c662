"""Scales + a budget → the fewest linears that have to stay float16, and the frontier that shows it.

Everything is measured on the calibration text, teacher-forced: the model with fake-quantized linears (a
weight and an input rounded to their codes and back, float32 otherwise) against the model as it is. Several
choices of kept linears are measured in one pass over the layers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mistral_trt.export.conversion import Weight
from mistral_trt.export.quantization.codes import input_scale, weight_codes, weight_scale
from mistral_trt.export.quantization.layers import LayerStream, first_tokens
from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import LM_HEAD_MODULE, Scheme
from mistral_trt.export.quantization.settings import Budget
from mistral_trt.export.quantization.tensors import weight_of
from mistral_trt.progress import note, track

MEASURED_TOKENS = 2048
"""Tokens that a choice of kept linears is measured on."""

RANKED_TOKENS = 512
RANKED_LAYERS = 8
"""Tokens on which harm is measured, and layers whose linears are measured one by one.

More of them, up to two windows, where the samples are long enough to cross the window: activations are others
once the first token has left it, and so is the harm.
"""

_AT_ONCE = 8
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Point:
    """One choice.  perplexity: over that of the model as it is.  quantized_share: of the linears' bytes."""

    kept: tuple[str, ...]
    quantized_share: float
    perplexity: float
    kl: float

    def holds(self, budget: Budget) -> bool:
        return (self.perplexity if budget.metric == "perplexity" else self.kl) <= budget.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "kept": len(self.kept),
            "quantized_share": round(self.quantized_share, 4),
            "perplexity_ratio": round(self.perplexity, 5),
            "kl": float(f"{self.kl:.4g}"),
        }


class FakeQuantLinear(nn.Module):
    """A linear whose weight and input are rounded to their codes and back while `quantized` is set."""

    def __init__(self, weight: Tensor, scales: LinearScales, scheme: Scheme) -> None:
        super().__init__()
        self.weight, self.scales, self.scheme = weight, scales, scheme
        self.rounded = dequantized(weight, scales, scheme)
        self.quantized = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return nn.functional.linear(x, self.weight)
        if self.scales.pre_quant_scale is not None:
            x = x * self.scales.pre_quant_scale
        if self.scheme.activations is not None:
            x = rounded_input(x, self.scales, self.scheme)
        return nn.functional.linear(x, self.rounded)


def dequantized(weight: Tensor, scales: LinearScales, scheme: Scheme) -> Tensor:
    """A weight rounded to its codes and back, still divided by the pre_quant_scale: float32 [out, in]."""
    codes = weight_codes(weight, scales, scheme).float()
    scale = weight_scale(scales, scheme)  # [out, groups]
    return (codes.view(len(codes), scale.shape[1], -1) * scale[:, :, None]).view(codes.shape)


def rounded_input(x: Tensor, scales: LinearScales, scheme: Scheme) -> Tensor:
    """An input rounded to its codes and back, float32."""
    scale = input_scale(scales, scheme)
    if scheme.activations == "float8_e4m3fn":
        return (x / scale).clamp(-scheme.bound, scheme.bound).to(torch.float8_e4m3fn).float() * scale
    return (x / scale).round().clamp(-scheme.bound - 1, scheme.bound) * scale


def measure(
    stream: LayerStream,
    ids: Tensor,
    scales: Mapping[str, LinearScales],
    scheme: Scheme,
    choices: Sequence[Collection[str]],
) -> list[Point]:
    """What each choice of kept linears costs.

    ids: int64 [n, T].  choices: module names that stay as they are; all others of `scales` are quantized.
    """
    hidden = [stream.embed(ids)] * (1 + len(choices))
    layers = stream.config.num_hidden_layers
    with track(f"measuring {len(choices)} choices", layers, unit="layers") as advance, torch.no_grad():
        for i in range(layers):
            layer = stream.layer(i)
            linears = _wrap(layer, f"model.layers.{i}.", scales, scheme)
            before = hidden[0]
            for k, kept in enumerate([None, *choices]):
                for name, linear in linears.items():
                    linear.quantized = kept is not None and name not in kept
                untouched = hidden[k] is before and not any(one.quantized for one in linears.values())
                hidden[k] = hidden[0] if k and untouched else stream.run(layer, hidden[k])
            advance(1)
        return _compare(stream, ids, hidden, scales, scheme, choices)


def choose_kept(
    stream: LayerStream,
    ids: Tensor,
    scales: Mapping[str, LinearScales],
    scheme: Scheme,
    *,
    always: Collection[str],
    budget: Budget,
) -> tuple[list[str], list[Point]]:
    """The fewest linears, most harmful first, that must stay float16, and all points measured.

    always: linears that are kept whatever they cost.  Two passes: one over the whole range, one between the
    last choice that is not good enough and the first that is.
    """
    across = max(RANKED_TOKENS, min(2 * stream.sliding_window, ids.shape[1]))
    ranked = by_harm(stream, first_tokens(ids, across), scales, scheme, always=always)
    ids = first_tokens(ids, MEASURED_TOKENS)
    points: dict[int, Point] = {}
    low, high = -1, len(ranked)
    for counts in (_spread(0, high), None):
        asked = counts if counts is not None else _between(low, high)
        if asked:
            kept = [{*always, *ranked[:count]} for count in asked]
            points |= dict(zip(asked, measure(stream, ids, scales, scheme, kept), strict=True))
        good = [count for count in sorted(points) if points[count].holds(budget)]
        high = good[0] if good else len(ranked)
        low = max((count for count in points if count < high), default=-1)
    for count in sorted(points):
        point = points[count]
        note(
            f"{count} linears kept: {point.quantized_share:.1%} of the linears' bytes quantized, "
            f"perplexity x {point.perplexity:.4f}, KL {point.kl:.2e}"
        )
    return [*always, *ranked[:high]], [points[count] for count in sorted(points)]


def by_error(scales: Mapping[str, LinearScales]) -> list[str]:
    """Module names, largest output error first."""
    return sorted(scales, key=lambda name: (-float(scales[name].error), name))


def by_harm(
    stream: LayerStream,
    ids: Tensor,
    scales: Mapping[str, LinearScales],
    scheme: Scheme,
    *,
    always: Collection[str],
) -> list[str]:
    """Module names without those of `always`, most harmful first.

    The same output error does a thousand times more harm in one place than in another, so harm is measured:
    the divergence when one layer alone is quantized, then, in the layers that do most, when one linear alone
    is. Inside the other layers, harm is shared out by the square of the output error.
    """
    names = [name for name in scales if name not in always]
    layers = {_layer_of(name): [n for n in names if _layer_of(n) == _layer_of(name)] for name in names}
    by_layer = _harm(stream, ids, scales, scheme, layers)
    several = [layer for layer in layers if len(layers[layer]) > 1]
    worst = sorted(several, key=lambda layer: -by_layer[layer])[:RANKED_LAYERS]
    alone = {name: [name] for layer in worst for name in layers[layer]}
    harm = _harm(stream, ids, scales, scheme, alone) if alone else {}
    for layer in set(layers) - set(worst):
        squares = {name: float(scales[name].error) ** 2 for name in layers[layer]}
        total = sum(squares.values()) or 1.0
        harm |= {name: by_layer[layer] * square / total for name, square in squares.items()}
    return sorted(names, key=lambda name: (-harm[name], name))


def _harm(
    stream: LayerStream,
    ids: Tensor,
    scales: Mapping[str, LinearScales],
    scheme: Scheme,
    sets: Mapping[str, Collection[str]],
) -> dict[str, float]:
    """Divergence when the linears of one set are quantized and no others, for each set."""
    choices = [set(scales) - set(quantized) for quantized in sets.values()]
    points = measure(stream, ids, scales, scheme, choices)
    return {name: point.kl for name, point in zip(sets, points, strict=True)}


def _layer_of(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.3; lm_head -> lm_head"""
    return ".".join(name.split(".")[:3])


def _spread(low: int, high: int) -> list[int]:
    """Counts over the whole range, closer together where few are kept.  0, 28 -> 0 1 2 4 8 16."""
    counts = [0, *(1 << power for power in range(high.bit_length()))]
    return [count for count in counts if low <= count < high]


def _between(low: int, high: int) -> list[int]:
    """Up to _AT_ONCE counts strictly between two."""
    inner = high - low - 1
    asked = min(inner, _AT_ONCE)
    return sorted({low + round((i + 1) * (inner + 1) / (asked + 1)) for i in range(asked)} - {low, high})


def _wrap(
    layer: nn.Module, prefix: str, scales: Mapping[str, LinearScales], scheme: Scheme
) -> dict[str, FakeQuantLinear]:
    found = {}
    for name, module in list(layer.named_modules()):
        if prefix + name in scales and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            wrapped = FakeQuantLinear(module.weight.data, scales[prefix + name], scheme)
            setattr(layer.get_submodule(parent), child, wrapped)
            found[prefix + name] = wrapped
    return found


def _compare(
    stream: LayerStream,
    ids: Tensor,
    hidden: Sequence[Tensor],
    scales: Mapping[str, LinearScales],
    scheme: Scheme,
    choices: Sequence[Collection[str]],
) -> list[Point]:
    """Points from the last layer's outputs: hidden[0] is the model as it is."""
    norm, head = stream.norm(), stream.lm_head()
    quantized_head = (
        FakeQuantLinear(head.weight.data, scales[LM_HEAD_MODULE], scheme)
        if LM_HEAD_MODULE in scales
        else head
    )
    targets = ids[:, 1:].flatten()
    sums = torch.zeros(1 + len(choices), 2, dtype=torch.float64)  # negative log-likelihood, KL
    normed = [norm(h[:, :-1]).flatten(0, 1) for h in hidden]
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        exact = log_softmax(head(normed[0][rows]), -1)
        for k, kept in enumerate([None, *choices]):
            whole = kept is None or LM_HEAD_MODULE in kept
            logs = log_softmax((head if whole else quantized_head)(normed[k][rows]), -1)
            sums[k, 0] += cross_entropy(logs, targets[rows], reduction="sum").double()
            sums[k, 1] += kl_div(logs, exact, log_target=True, reduction="sum").double()
    means = sums / len(targets)
    ratios = (means[:, 0] - means[0, 0]).exp()
    shares = [share(stream.checkpoint.weights, scales, kept) for kept in choices]
    return [
        Point(tuple(sorted(kept)), shares[k], float(ratios[k + 1]), float(means[k + 1, 1]))
        for k, kept in enumerate(choices)
    ]


def share(weights: Mapping[str, Weight], names: Collection[str], kept: Collection[str]) -> float:
    """Share of the linears' weights that are quantized.  names: of all linears."""
    sizes = {name: weight_of(weights, name).elements for name in names}
    return 1 - sum(sizes[name] for name in kept) / sum(sizes.values())
