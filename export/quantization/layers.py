"""Checkpoint → Hugging Face's decoder layers, one in memory at a time, and hidden states through them.

The layers are transformers' own, in float32, with the mask of the sliding window: what ModelOpt knows how
to quantize, and what the reference of `validate` is made of.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)

from mistral_trt.export.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from mistral_trt.export.conversion import Weight, pieces, read_float32

TOKENS_AT_ONCE = 4096
"""Tokens of one forward: enough that a weight is used well, and a few hundred megabytes of activations."""


class LayerStream:
    """The decoder of a checkpoint as a stream of layers.

    sliding_window: W, the query's own token included.
    """

    def __init__(self, checkpoint: Checkpoint, *, sliding_window: int) -> None:
        self.checkpoint = checkpoint
        settings: dict[str, Any] = {**checkpoint.config.to_json(), "sliding_window": sliding_window}
        self.sliding_window = sliding_window
        self.config = MistralConfig(**settings)
        self.config._attn_implementation = "sdpa"
        self.rotary = MistralRotaryEmbedding(self.config)

    def embed(self, ids: Tensor) -> Tensor:
        """ids: int64 [n, T].  Returns hidden states, float32 [n, T, hidden_size]."""
        wanted, places = torch.unique(ids, return_inverse=True)
        weight = self.checkpoint.weights[EMBEDDING]
        rows = torch.empty(len(wanted), weight.shape[1])
        end = 0
        for block in _row_blocks(weight):
            inside = (wanted >= end) & (wanted < end + len(block))
            rows[inside] = block[wanted[inside] - end].float()
            end += len(block)
        return rows[places]

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, float32."""
        prefix = f"model.layers.{index}."
        with torch.device("meta"):
            layer = MistralDecoderLayer(self.config, 0)
        names = [name for name, _ in layer.named_parameters()]
        state = {name: read_float32(self.checkpoint.weights[prefix + name]) for name in names}
        layer.load_state_dict(state, assign=True)
        frozen: nn.Module = layer.eval().requires_grad_(False)
        return frozen

    def norm(self) -> nn.Module:
        """The norm after the last layer."""
        norm = MistralRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.data = read_float32(self.checkpoint.weights["model.norm.weight"])
        frozen: nn.Module = norm.eval().requires_grad_(False)
        return frozen

    def lm_head(self) -> nn.Linear:
        """The head, with the embedding's weight where they are tied."""
        weights = self.checkpoint.weights
        weight = read_float32(weights[LM_HEAD if LM_HEAD in weights else EMBEDDING])
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        return head.eval()

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """One layer over hidden states [n, T, hidden_size] that all start at position 0."""
        length = hidden.shape[1]
        position_ids = torch.arange(length)[None]
        with torch.no_grad():
            rotary = self.rotary(hidden, position_ids)
            out = layer(
                hidden,
                attention_mask=window_mask(length, self.sliding_window),
                position_ids=position_ids,
                position_embeddings=rotary,
            )
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def window_mask(length: int, sliding_window: int) -> Tensor:
    """Which keys each query sees: its own and the W - 1 before it.  bool [1, 1, T, T]."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    return ((key <= query) & (key > query - sliding_window))[None, None]


def first_tokens(samples: Tensor, count: int) -> Tensor:
    """The first samples [n, T, …] that have `count` tokens together, or the beginning of the first one."""
    return samples[: max(1, count // samples.shape[1]), :count]


def batches(hidden: Tensor) -> Iterator[Tensor]:
    """Samples [n, T, …] in groups of about TOKENS_AT_ONCE tokens."""
    return iter(torch.split(hidden, max(1, TOKENS_AT_ONCE // hidden.shape[1])))


def _row_blocks(weight: Weight) -> Iterator[Tensor]:
    """A weight's rows in blocks, in order; the pieces of a stored weight may end inside a row."""
    columns = weight.shape[1]
    rest = torch.empty(0)
    for piece in pieces(weight):
        flat = torch.cat([rest.to(piece.dtype), piece.reshape(-1)])
        whole = len(flat) // columns * columns
        yield flat[:whole].view(-1, columns)
        rest = flat[whole:]
