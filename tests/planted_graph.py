"""Faults of the graph: patches of the decoder, or of the ring, while an artifact is exported.

They keep the names of the nodes, by which validation cuts a graph into layers.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_trt.contract import Ring
from mistral_trt.export import decoder

Patch = Callable[[pytest.MonkeyPatch], None]
"""Plants a fault until the test ends."""

Past = list[tuple[Tensor, Tensor]]


def mask(rule: Callable[[Tensor, Tensor, int], Tensor]) -> Patch:
    """Replace the mask.  rule: (held [B, 1, 1, R], query [B, 1, S, 1], W) -> bool [B, 1, S, R]"""

    def visible_slots(position_ids: Tensor, ring: Ring) -> Tensor:
        held = decoder.held_positions(position_ids, ring)[:, None, None, :]
        return rule(held, position_ids[:, None, :, None], ring.sliding_window)

    return lambda patch: patch.setattr(decoder, "visible_slots", visible_slots)


def wider_by(tokens: int) -> Patch:
    return mask(lambda held, query, window: (held >= 0) & (held <= query) & (held > query - window - tokens))


def slot(rule: Callable[[Tensor, Ring], Tensor]) -> Patch:
    """Replace the slot that is written.  rule: (position of the call's first token [B], ring) -> [B]"""
    return lambda patch: patch.setattr(decoder, "write_slot", lambda ids, ring: rule(ids[:, 0], ring))


def ring_capacity(rule: Callable[[Ring], int]) -> Patch:
    return lambda patch: patch.setattr(Ring, "capacity", property(rule))


mask_missing = mask(lambda held, query, window: held - query == held - query)
mask_transposed = mask(lambda held, query, window: (held >= 0) & (held >= query) & (held < query + window))
later_attended = mask(lambda held, query, window: (held >= 0) & (held > query - window))
empty_attended = mask(lambda held, query, window: (held <= query) & (held > query - window))


def wider_after_the_first(tokens: int) -> Patch:
    """Every token of a call but its first sees that many tokens more."""

    def visible_slots(position_ids: Tensor, ring: Ring) -> Tensor:
        held = decoder.held_positions(position_ids, ring)[:, None, None, :]
        query = position_ids[:, None, :, None]
        later = (query > position_ids[:, None, :1, None]).to(torch.int64)
        return (held >= 0) & (held <= query) & (held > query - ring.sliding_window - tokens * later)

    return lambda patch: patch.setattr(decoder, "visible_slots", visible_slots)


slot_one_too_far = slot(lambda start, ring: torch.remainder(start + 1, ring.capacity))
slot_by_window = slot(lambda start, ring: torch.remainder(start, ring.sliding_window))

capacity_of_window = ring_capacity(lambda ring: ring.sliding_window)
capacity_too_small_by_one = ring_capacity(lambda ring: ring.sliding_window + ring.prefill_chunk - 1)


def model(forward: Callable[[decoder.Model, Tensor, Tensor, Past], Any]) -> Patch:
    return lambda patch: patch.setattr(decoder.Model, "forward", forward)


def through_layers(
    self: decoder.Model,
    input_ids: Tensor,
    position_ids: Tensor,
    past: Past,
    *,
    rotated_by: Tensor | None = None,
    last_layer_hides: int = 0,
) -> Any:
    """What `Model.forward` does, but for the positions whose angles are taken, and for how many of the oldest
    tokens the last layer does not see."""
    x, first_slot = self.embed_tokens(input_ids), decoder.write_slot(position_ids, self.ring)
    rotary = self.rotary(position_ids if rotated_by is None else rotated_by)
    mask = decoder.visible_slots(position_ids, self.ring)
    held = decoder.held_positions(position_ids, self.ring)[:, None, None, :]
    oldest = position_ids[:, None, :, None] - self.ring.sliding_window + last_layer_hides
    presents = []
    for layer, rings in zip(self.layers, past, strict=True):
        seen = mask & (held > oldest) if layer is self.layers[-1] and last_layer_hides else mask
        x, present = layer(x, rotary, first_slot, seen, rings)
        presents.append(present)
    return self.norm(x), presents


@model
def narrower_in_last_layer(self: decoder.Model, input_ids: Tensor, position_ids: Tensor, past: Past) -> Any:
    return through_layers(self, input_ids, position_ids, past, last_layer_hides=1)


@model
def angles_of_row_0(self: decoder.Model, input_ids: Tensor, position_ids: Tensor, past: Past) -> Any:
    """Every row is rotated by the positions of the first."""
    of_row_0 = position_ids[:1].expand(position_ids.shape[0], -1)
    return through_layers(self, input_ids, position_ids, past, rotated_by=of_row_0)


def keys_not_rotated(patch: pytest.MonkeyPatch) -> None:
    """They are turned by an angle of zero."""
    rotate = decoder.Attention.rotate

    def leave(self: decoder.Attention, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if x.shape[1] == self.key_heads:
            rotary = (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))
        return rotate(self, x, rotary)

    patch.setattr(decoder.Attention, "rotate", leave)


def interleaved_rotation(patch: pytest.MonkeyPatch) -> None:
    """Neighbouring numbers rotated against each other, in place of the two halves."""

    def rotate(self: decoder.Attention, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return torch.onnx.ops.rotary_embedding(x, rotary[0], rotary[1], interleaved=True)

    patch.setattr(decoder.Attention, "rotate", rotate)


def rope_theta_doubled(patch: pytest.MonkeyPatch) -> None:
    init = decoder.RotaryAngles.__init__

    def doubled(self: decoder.RotaryAngles, size: int, theta: float, dtype: torch.dtype) -> None:
        init(self, size, 2 * theta, dtype)

    patch.setattr(decoder.RotaryAngles, "__init__", doubled)


def positions_in_float16(patch: pytest.MonkeyPatch) -> None:
    """Past 2048 float16 knows even numbers only."""
    forward = decoder.RotaryAngles.forward

    def rounded(self: decoder.RotaryAngles, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return forward(self, position_ids.to(torch.float16))

    patch.setattr(decoder.RotaryAngles, "forward", rounded)


def epsilon_times_100(patch: pytest.MonkeyPatch) -> None:
    init = decoder.RMSNorm.__init__

    def larger(self: decoder.RMSNorm, size: int, eps: float, dtype: torch.dtype) -> None:
        init(self, size, 100 * eps, dtype)

    patch.setattr(decoder.RMSNorm, "__init__", larger)


def attention(change: Callable[..., Any]) -> Patch:
    """Put something between the heads and `Attention`.  change: called with it and its arguments."""
    healthy = torch.onnx.ops.attention

    def changed(*tensors: Tensor, scale: float) -> Any:
        return change(healthy, *tensors, scale=scale)

    return lambda patch: patch.setattr(torch.onnx.ops, "attention", changed)


@attention
def tiled_groups(healthy: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> Any:
    """Query head h reads key head h % K in place of h // (H / K).  q: [B, H, S, D]"""
    heads = k.shape[1]
    groups = q.shape[1] // heads
    by_key = torch.cat([q[:, i::heads] for i in range(heads)], 1)
    out, *rest = healthy(by_key, k, v, mask, scale=scale)
    return torch.cat([out[:, i::groups] for i in range(groups)], 1), *rest


@attention
def scaled_twice(healthy: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> Any:
    return healthy(q, k, v, mask, scale=q.shape[-1] ** -0.5)


def mlp(rule: Callable[[decoder.MLP, Tensor], Tensor]) -> Patch:
    return lambda patch: patch.setattr(decoder.MLP, "forward", rule)


@mlp
def gate_and_up_swapped(self: decoder.MLP, x: Tensor) -> Tensor:
    swapped: Tensor = self.down_proj(torch.nn.functional.silu(self.up_proj(x)) * self.gate_proj(x))
    return swapped


@mlp
def gelu_for_silu(self: decoder.MLP, x: Tensor) -> Tensor:
    """GELU by a sigmoid: x * sigmoid(1.702 x)."""
    gate = self.gate_proj(x)
    out: Tensor = self.down_proj(gate * torch.sigmoid(1.702 * gate) * self.up_proj(x))
    return out


@mlp
def past_float16(self: decoder.MLP, x: Tensor) -> Tensor:
    """Exact in float32: down_proj is 2 ** 15 times as large, and is divided again."""
    product = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
    out: Tensor = self.down_proj(product * 2.0**15) * 2.0**-15
    return out


def mlp_beside_attention(patch: pytest.MonkeyPatch) -> None:
    """The MLP reads what entered the layer, without what attention added."""

    def forward(
        self: decoder.DecoderLayer,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        first_slot: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.self_attn(self.input_layernorm(x), rotary, first_slot, mask, past)
        return x + attended + self.mlp(self.post_attention_layernorm(x)), present

    patch.setattr(decoder.DecoderLayer, "forward", forward)
