"""Config + ring geometry → the Mistral decoder as one torch module, for prefill and decode alike.

The module is only ever traced, on the meta device: it holds the shapes and names of the weights, not
their values. Parameter names are the checkpoint's, so weights are bound by name afterwards. Custom ONNX
operators stand where torch has no equivalent: `RotaryEmbedding`, `TensorScatter`, `Attention`.

A step writes the new keys and values into the ring first and attends over the whole ring after, with a
mask that says which slot holds a position the query may see (`contract.Ring` says the same in integers).
"""

import torch
from torch import Tensor, nn

from mistral_trt.contract import GraphContract, Ring

ONNX_OPSET = 24


def held_positions(position_ids: Tensor, ring: Ring) -> Tensor:
    """Position that each slot holds after this call's tokens are written; negative: never written.

    position_ids: int64 [B, S], consecutive in a row.  Returns int64 [B, R].
    """
    slots = torch.arange(ring.capacity, device=position_ids.device)
    end = position_ids[:, -1:]
    return end - torch.remainder(end - slots, ring.capacity)


def visible_slots(position_ids: Tensor, ring: Ring) -> Tensor:
    """Which slots each query attends to: its own position and the W - 1 before it.

    position_ids: int64 [B, S].  Returns bool [B, 1, S, R].
    """
    held = held_positions(position_ids, ring)[:, None, None, :]
    query = position_ids[:, None, :, None]
    return (held >= 0) & (held <= query) & (held > query - ring.sliding_window)


def write_slot(position_ids: Tensor, ring: Ring) -> Tensor:
    """First slot this call writes in each row.  position_ids: int64 [B, S].  Returns int64 [B]."""
    return torch.remainder(position_ids[:, 0], ring.capacity)


def write_ring(ring: Tensor, update: Tensor, first_slot: Tensor) -> Tensor:
    """Ring with S consecutive slots overwritten; TensorRT and ONNX Runtime do it in place.

    ring: [B, K, R, D].  update: [B, K, S, D].  first_slot: int64 [B], first_slot + S <= R.
    """
    written: Tensor = torch.onnx.ops.symbolic(
        "TensorScatter",
        [ring, update, first_slot],
        {"axis": 2, "mode": "linear"},
        dtype=ring.dtype,
        shape=ring.shape,
        version=ONNX_OPSET,
    )
    return written


class RotaryAngles(nn.Module):
    """Absolute positions → cosines and sines (RoFormer, arXiv:2104.09864), computed in float32."""

    def __init__(self, head_dim: int, rope_theta: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim, self.rope_theta, self.dtype = head_dim, rope_theta, dtype

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: int64 [B, S].  Returns cos and sin, [B, S, D/2] each."""
        pairs = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32)
        inverse_frequency = 1.0 / self.rope_theta ** (pairs / self.head_dim)
        angles = position_ids[:, :, None].to(torch.float32) * inverse_frequency
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, accumulated in float32."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, hidden_size], and the same back."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the ring."""

    def __init__(self, contract: GraphContract, dtype: torch.dtype) -> None:
        super().__init__()
        config = contract.config
        self.query_heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = linear(config.hidden_size, self.query_heads * self.head_dim, dtype)
        self.k_proj = linear(config.hidden_size, self.key_heads * self.head_dim, dtype)
        self.v_proj = linear(config.hidden_size, self.key_heads * self.head_dim, dtype)
        self.o_proj = linear(self.query_heads * self.head_dim, config.hidden_size, dtype)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        first_slot: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: [B, S, hidden_size], mask: bool [B, 1, S, R], past: [B, K, R, D] twice.

        Returns the attended x and the ring's keys and values after the write.
        """
        query = self.rotate(self.heads(self.q_proj(x), self.query_heads), rotary)
        key = self.rotate(self.heads(self.k_proj(x), self.key_heads), rotary)
        value = self.heads(self.v_proj(x), self.key_heads)
        keys = write_ring(past[0], key, first_slot)
        values = write_ring(past[1], value, first_slot)
        # Scaled here, and scale=1.0 there: left to the operator, TensorRT also scales the whole ring.
        query = query * self.head_dim**-0.5
        out, _, _, _ = torch.onnx.ops.attention(query, keys, values, mask, scale=1.0)
        batch, new_tokens = x.shape[0], x.shape[1]
        out = out.transpose(1, 2).reshape(batch, new_tokens, self.query_heads * self.head_dim)
        return self.o_proj(out), (keys, values)

    def heads(self, x: Tensor, count: int) -> Tensor:
        """[B, S, count * D] -> [B, count, S, D]"""
        return x.reshape(x.shape[0], x.shape[1], count, self.head_dim).transpose(1, 2)

    def rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[B, heads, S, D] -> the same, the two halves of D rotated against each other."""
        return torch.onnx.ops.rotary_embedding(x, rotary[0], rotary[1])


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, contract: GraphContract, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner = contract.config.hidden_size, contract.config.intermediate_size
        self.gate_proj = linear(hidden, inner, dtype)
        self.up_proj = linear(hidden, inner, dtype)
        self.down_proj = linear(inner, hidden, dtype)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(inner)
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, contract: GraphContract, dtype: torch.dtype) -> None:
        super().__init__()
        config = contract.config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(contract, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(contract, dtype)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        first_slot: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.self_attn(self.input_layernorm(x), rotary, first_slot, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Model(nn.Module):
    """Token ids → normalised hidden states; named as in the checkpoint (`model.…`)."""

    def __init__(self, contract: GraphContract, dtype: torch.dtype) -> None:
        super().__init__()
        config = contract.config
        self.ring = contract.ring
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(contract, dtype) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = RotaryAngles(config.head_dim, config.rope_theta, dtype)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self.embed_tokens(input_ids)
        rotary = self.rotary(position_ids)
        mask = visible_slots(position_ids, self.ring)
        first_slot = write_slot(position_ids, self.ring)
        presents = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, present = layer(x, rotary, first_slot, mask, layer_past)
            presents.append(present)
        return self.norm(x), presents


class Decoder(nn.Module):
    """The whole graph: inputs and outputs in the order of `GraphContract`."""

    def __init__(self, contract: GraphContract) -> None:
        super().__init__()
        config = contract.config
        dtype: torch.dtype = getattr(torch, contract.cache_dtype)
        self.model = Model(contract, dtype)
        self.lm_head = linear(config.hidden_size, config.vocab_size, dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor, *rings: Tensor
    ) -> tuple[Tensor, ...]:
        """input_ids, position_ids: int64 [B, S].  logits_index: int64 [B, N].  rings: [B, K, R, D] each.

        Returns logits float32 [B, N, V], then the rings.
        """
        past = list(zip(rings[0::2], rings[1::2], strict=True))
        hidden, presents = self.model(input_ids, position_ids, past)
        index = logits_index[:, :, None].expand(-1, -1, hidden.shape[-1])
        logits = self.lm_head(torch.gather(hidden, 1, index)).to(torch.float32)
        return logits, *(tensor for present in presents for tensor in present)


def linear(in_features: int, out_features: int, dtype: torch.dtype) -> nn.Linear:
    """A projection without bias; the weight is [out_features, in_features], as in the checkpoint."""
    return nn.Linear(in_features, out_features, bias=False, dtype=dtype)
