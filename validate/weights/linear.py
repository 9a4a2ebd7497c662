"""A quantized linear of an artifact → its codes and scales, and what ties them to the checkpoint's weight.

    code * scale  =  weight * output_factor / input_factor      up to half a step of the code

A pre_quant_scale that is no Mul of its own is found where it went. In a norm it is the artifact's norm over
the checkpoint's. For down_proj it is up_proj's scales over those that its weights ask for: calibration
gives the largest number of every group the last code.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistral_trt.contract import QUANTIZED
from mistral_trt.errors import ValidationError
from mistral_trt.validate.weights.graph import WeightGraph

BOUNDS = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}
"""Dtype of the codes → the last one; they are symmetric."""

NEGLIGIBLE = 2.0**-24
"""A group without a number above this is stored as zeros, as if its largest were 1."""

HEAD, FINAL_NORM = "lm_head", "model.norm"
UP, DOWN = "mlp.up_proj", "mlp.down_proj"
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_FLOAT16_ROUNDING = 2.0**-11
_SMOOTHED = frozenset(QUANTIZED) - {"fp8"}
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Factor:
    """What a linear's input or output is multiplied by, over the checkpoint's.

    values: float32 [channels]; NaN for an input that is always 0.  roundings: to float16, that are in them.
    """

    values: Tensor
    roundings: int


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear as the artifact has it.

    codes: int8 or float8_e4m3fn [out, in].  bound: the last code.  scale: float32 [out, groups].  roundings:
    to float16, that are in it.  whole: one scale stands for all.  input_scale: None where the input stays as
    it is.
    """

    codes: Tensor = field(repr=False)
    bound: float
    scale: Tensor = field(repr=False)
    roundings: int
    whole: bool
    input_scale: float | None

    def drift(self, *factors: Factor | None) -> float:
        """Share of a code by which roundings to float16 may have moved it, those of the factors included."""
        found = self.roundings + sum(factor.roundings for factor in factors if factor)
        return found * _FLOAT16_ROUNDING


def read_linear(graph: WeightGraph, module: str) -> StoredLinear:
    """A quantized linear in memory.

    Raises ValidationError for scales that are not positive and finite, or that no codes go with.
    """
    found = graph.linear(module)
    if found.scale is None or (dtype := graph.dtype(found.weight)) not in BOUNDS:
        raise ValidationError(f"{found.weight} holds {graph.dtype(found.weight)}, which are no codes")
    codes = graph.numbers(found.weight).T.contiguous()
    scale = _positive(graph.numbers(found.scale).float(), found.scale)
    outputs, inputs = codes.shape
    if (scale.ndim and scale.shape[-1] != outputs) or (scale.ndim == 2 and inputs % len(scale)):
        raise ValidationError(
            f"{found.scale} has shape {list(scale.shape)}, which does not go with codes of "
            f"[{inputs}, {outputs}]"
        )
    return StoredLinear(
        codes,
        BOUNDS[dtype],
        (scale.T if scale.ndim == 2 else scale.reshape(-1, 1).expand(len(codes), 1)).contiguous(),
        _roundings(graph, found.scale),
        scale.ndim == 0,
        None if found.input_scale is None else input_step(graph, found.input_scale),
    )


def input_step(graph: WeightGraph, name: str) -> float:
    """The step in which an input is rounded. Raises ValidationError where it is none."""
    scale = graph.numbers(name)
    if scale.numel() != 1:
        raise ValidationError(f"{name} has shape {list(scale.shape)}; expected one step for the whole input")
    return float(_positive(scale.float(), name))


def norm_of(module: str) -> str | None:
    """The norm whose output a linear reads, None for o_proj and down_proj."""
    if module == HEAD:
        return FINAL_NORM
    layer, kind = module.rsplit(".", 2)[0], ".".join(module.rsplit(".", 2)[1:])
    return next((f"{layer}.{norm}" for norm, kinds in _READERS.items() if kind in kinds), None)


def readers_of(norm: str) -> list[str]:
    """The linears that read a norm's output."""
    layer, _, kind = norm.rpartition(".")
    return [f"{layer}.{reader}" for reader in _READERS[kind]] if norm != FINAL_NORM else [HEAD]


class Folds:
    """What norms and up_projs are multiplied by for the linears that read them, found as they are read."""

    def __init__(self, graph: WeightGraph, *, precision: str, imported: bool) -> None:
        """imported: the checkpoint's own codes were taken, and nothing is folded anywhere."""
        self._graph = graph
        self._smoothed = precision in _SMOOTHED and not imported
        self.factors: dict[str, Factor] = {}

    def may_be_in(self, norm: str) -> bool:
        """Whether all that reads a norm is quantized, and multiplied by nothing else."""
        found = [self._graph.linear(module) for module in readers_of(norm)]
        return self._smoothed and all(linear.scale and not linear.pre_quant_scale for linear in found)

    def take_norm(self, norm: str, weight: Tensor) -> None:
        """weight: the checkpoint's, [hidden_size].

        Raises ValidationError where the artifact's is no positive multiple of it.
        """
        stored, weight = self._graph.numbers(f"{norm}.weight"), weight.float()
        if stored.shape != weight.shape:
            raise ValidationError(
                f"{norm}.weight has shape {list(stored.shape)}; expected {list(weight.shape)}"
            )
        silent = (weight == 0) & (stored == 0)
        ratio = torch.where(silent, 1.0, stored.float() / weight)
        _positive(ratio, f"{norm}.weight over the checkpoint's")
        if not torch.equal(stored, weight.to(stored.dtype)):
            self.factors[norm] = Factor(torch.where(silent, torch.nan, ratio), 1)

    def take_up(self, module: str, linear: StoredLinear, weight: Tensor) -> None:
        """weight: the checkpoint's of up_proj, float32 [out, in]."""
        down = module.replace(UP, DOWN)
        reader = self._graph.linear(down)
        if not self._smoothed or reader.scale is None or reader.pre_quant_scale is not None:
            return
        reads = self.of_input(module)
        largest = group_maxima(weight, linear.scale.shape[1], reads)
        asked = torch.where(largest <= NEGLIGIBLE, 1.0, largest) / linear.bound
        values = (linear.scale / asked).median(dim=1).values
        self.factors[module] = Factor(values, linear.roundings + (reads.roundings if reads else 0))

    def of_input(self, module: str) -> Factor | None:
        """What a linear's input is multiplied by, None for nothing."""
        linear = self._graph.linear(module)
        name = linear.pre_quant_scale
        if name is not None:
            values = _positive(self._graph.numbers(name).float(), name)
            if values.shape != self._graph.shape(linear.weight)[:1]:
                raise ValidationError(f"{name} has shape {list(values.shape)}; expected one number an input")
            return Factor(values, _roundings(self._graph, name))
        return self.factors.get(norm_of(module) or module.replace(DOWN, UP))

    def of_output(self, module: str) -> Factor | None:
        """The same of its output; only up_proj's ever is."""
        return self.factors.get(module)

    def only_for(self, module: str) -> str | None:
        """What was multiplied for this linear alone: up_proj for down_proj, the last norm for lm_head."""
        before = FINAL_NORM if module == HEAD else module.replace(DOWN, UP)
        return before if before != module and before in self.factors else None


def group_maxima(weight: Tensor, groups: int, reads: Factor | None) -> Tensor:
    """Largest magnitude of each group of inputs of weight / reads: float32 [out, groups]."""
    largest = torch.empty(len(weight), groups)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE]
        rows = rows if reads is None else (rows / reads.values).nan_to_num(0.0)
        largest[start : start + len(rows)] = rows.view(len(rows), groups, -1).abs().amax(-1)
    return largest


def _roundings(graph: WeightGraph, name: str) -> int:
    return int(graph.dtype(name) == "float16")


def _positive(values: Tensor, name: str) -> Tensor:
    if not (torch.isfinite(values).all() and (values > 0).all()):
        raise ValidationError(f"{name} holds a number that is not positive and finite, so it is no scale")
    return values
