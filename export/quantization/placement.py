"""Scales + what is kept in float16 → where each scale goes in the graph.

A pre_quant_scale multiplies a linear's input. It disappears where it can: into the norm before (q, k, v share
one, as gate and up do; and lm_head), and down_proj's into the output scale of up_proj. What cannot be folded
stays one Mul: o_proj's (inside a group of query heads v_proj cannot absorb it, and it would change what the
ring holds), that of a group of which a linear is kept, and a fold that float16 cannot say.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import KINDS, LM_HEAD_MODULE

_FLOAT16_MAX, _FLOAT16_NORMAL = 65504.0, 2.0**-14
_HEADROOM = 8.0  # over the largest output seen in calibration

_Q, _K, _V, _O, _GATE, _UP, _DOWN = KINDS


@dataclass(frozen=True)
class Placement:
    """Everything the graph and its weights need to know beside the scales.

    groups: quantized linears by the input they share.  multiplied: groups, by their first linear, whose
    pre_quant_scale is a Mul.  norms: norm weight → its folded value, float32 [hidden_size].
    output_scales: linear → what its output channels are multiplied by besides, float32 [out].
    """

    groups: tuple[tuple[str, ...], ...]
    multiplied: frozenset[str]
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    output_scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def quantized(self) -> list[str]:
        """The quantized linears, in the order of the forward pass."""
        return [name for group in self.groups for name in group]

    def to_json(self) -> dict[str, int]:
        """How many pre_quant_scales went where."""
        return {
            "norm": len(self.norms),
            "up_proj": len(self.output_scales),
            "mul": len(self.multiplied),
        }


def input_groups(layers: int, *, lm_head: bool = False) -> list[tuple[str | None, tuple[str, ...]]]:
    """Linears that read one tensor, with the norm weight that makes it, None where no norm does."""
    groups: list[tuple[str | None, tuple[str, ...]]] = []
    for i in range(layers):
        layer = f"model.layers.{i}."
        groups += [
            (f"{layer}input_layernorm.weight", (layer + _Q, layer + _K, layer + _V)),
            (None, (layer + _O,)),
            (f"{layer}post_attention_layernorm.weight", (layer + _GATE, layer + _UP)),
            (None, (layer + _DOWN,)),
        ]
    return [*groups, ("model.norm.weight", (LM_HEAD_MODULE,))] if lm_head else groups


def place(
    scales: Mapping[str, LinearScales],
    kept: Collection[str],
    norms: Mapping[str, Tensor],
    *,
    layers: int,
    float16_scales: bool,
) -> Placement:
    """Decide where each pre_quant_scale goes.

    scales: of every linear that could be quantized.  kept: those that stay float16.  norms: norm weight →
    its value, float32 [hidden_size].  float16_scales: whether weight scales are stored in float16.
    """
    groups, multiplied = [], set()
    folded: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for norm, members in input_groups(layers, lm_head=LM_HEAD_MODULE in scales):
        quantized = tuple(name for name in members if name not in kept)
        if not quantized:
            continue
        groups.append(quantized)
        first = quantized[0]
        scale = scales[first].pre_quant_scale
        if scale is None:
            continue
        before = first.replace(_DOWN, _UP) if first.endswith(_DOWN) else None
        if norm is not None and quantized == members and _sayable(norms[norm] * scale):
            folded[norm] = norms[norm] * scale
        elif before and before not in kept and _foldable(scales[before], scale, float16_scales):
            outputs[before] = scale
        else:
            multiplied.add(first)
    return Placement(tuple(groups), frozenset(multiplied), folded, outputs)


def place_stored(names: Collection[str], kept: Collection[str], *, layers: int) -> Placement:
    """The placement of a checkpoint that is stored quantized: no input is multiplied by anything."""
    groups = [
        tuple(name for name in members if name not in kept)
        for _, members in input_groups(layers, lm_head=LM_HEAD_MODULE in names)
    ]
    return Placement(tuple(group for group in groups if group), frozenset())


def _sayable(values: Tensor) -> bool:
    """Whether float16 holds the values without overflow and with all their bits."""
    magnitudes = values.abs()
    exact = (magnitudes == 0) | (magnitudes >= _FLOAT16_NORMAL)
    return bool((exact & (magnitudes <= _FLOAT16_MAX)).all())


def _foldable(before: LinearScales, scale: Tensor, float16_scales: bool) -> bool:
    """Whether a linear may give its output times `scale`: neither that nor its own scale leaves float16."""
    outputs_fit = bool((before.output_amax * scale * _HEADROOM <= _FLOAT16_MAX).all())
    return outputs_fit and (not float16_scales or _sayable(before.weight_amax / 7.0 * scale[:, None]))
