"""Inputs of linears, as they are rounded → how much of the range of its step each of them uses."""

import torch
from torch import Tensor

from mistral_trt.validate.findings import InputRange


class InputLog:
    """What was added, by linear."""

    def __init__(self) -> None:
        self._used: dict[str, list[Tensor]] = {}

    def add(self, module: str, used: Tensor) -> None:
        """used: float64 [positions], of each the share of the range that it needs."""
        self._used.setdefault(module, []).append(used)

    def found(self) -> tuple[InputRange, ...]:
        """In the order in which they were first added."""
        return tuple(_range(module, torch.cat(parts)) for module, parts in self._used.items())


def range_used(x: Tensor, held: float) -> Tensor:
    """Of each position its largest |x| over what the step holds: x [..., in] -> float64 [positions].

    held: the last code times the step.
    """
    return x.abs().amax(-1).flatten().double() / held  # in float32 a very small step would give infinity


def _range(module: str, used: Tensor) -> InputRange:
    return InputRange(_in_words(module), float(used.max()), float(used.median()))


def _in_words(module: str) -> str:
    """model.layers.3.mlp.down_proj -> layer 3 mlp.down_proj; lm_head -> lm_head"""
    _, in_layer, rest = module.partition("model.layers.")
    return "layer " + rest.replace(".", " ", 1) if in_layer else module
