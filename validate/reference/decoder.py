"""Hugging Face's Mistral → its decoder layers one after another, each with the keys and values it made.

The layers, their eager attention and the mask of the window are transformers' own; what is ours is the order
in which they are called. Eager attention keeps the scores of every query against every key, [H, T, T], which
outgrows any machine (W = 4096, two wraps: 20 GB a copy). So queries go through a layer in blocks, each over
all the keys so far, which the layer adds to a cache that forgets nothing.

T tokens   q tokens of a block   H query heads   K key/value heads   D head_dim   V vocab_size
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_sliding_window_causal_mask

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.quantization.layers import LayerStream
from mistral_trt.validate.reference.layers import Array, LayerStates

SCORE_BYTES = 1 << 28
"""Of one block's scores, [H, q, T] in float32: the demo model's 2,312 positions are one block."""


class LayerSource(Protocol):
    """Where the parts of a decoder come from; `LayerStream` is one."""

    @property
    def config(self) -> MistralConfig: ...

    @property
    def rotary(self) -> nn.Module: ...

    def embed(self, ids: Tensor) -> Tensor:
        """ids: int64 [1, T].  Returns [1, T, hidden_size]."""

    def layer(self, index: int) -> nn.Module:
        """Called as Hugging Face's decoder layer is; not to be altered."""

    def norm(self) -> nn.Module: ...

    def lm_head(self) -> nn.Linear: ...


class WholeModel:
    """A model in memory as a source of layers."""

    def __init__(self, model: MistralForCausalLM) -> None:
        self.config: MistralConfig = model.config
        self.rotary: nn.Module = model.model.rotary_emb
        self._model: Any = model

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._model.model.embed_tokens(ids)
        return embedded

    def layer(self, index: int) -> nn.Module:
        layer: nn.Module = self._model.model.layers[index]
        return layer

    def norm(self) -> nn.Module:
        norm: nn.Module = self._model.model.norm
        return norm

    def lm_head(self) -> nn.Linear:
        head: nn.Linear = self._model.lm_head
        return head


class HuggingFaceLayers:
    """A `ReferenceLayers`: each layer over all tokens at once, in `dtype`, numbers handed over as float32.

    dtype: of the source's parts.  words: how it computes, in a sentence.
    score_bytes: what one block's scores may take.
    """

    def __init__(
        self,
        source: LayerSource,
        *,
        words: str,
        dtype: torch.dtype = torch.float32,
        score_bytes: int = SCORE_BYTES,
    ) -> None:
        self.words = words
        self._source, self._dtype, self._score_bytes = source, dtype, score_bytes

    @property
    def num_hidden_layers(self) -> int:
        count: int = self._source.config.num_hidden_layers
        return count

    def embed(self, tokens: Sequence[int]) -> Array:
        """What enters layer 0: float32 [T, hidden_size]."""
        with torch.inference_mode():
            return _numbers(self._source.embed(torch.tensor([list(tokens)])))

    def run(self, index: int, hidden: Array) -> LayerStates:
        """Layer `index` over all T tokens.  hidden: float32 [T, hidden_size]."""
        layer, leaving = self._source.layer(index), np.empty_like(hidden)
        seen: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        # One for every index that a layer may know itself by; `DynamicCache(config=…)` would forget keys.
        cache = Cache(layers=[seen] * self.num_hidden_layers)
        heads = self._source.config.num_attention_heads
        size = queries_at_once(heads, len(hidden), score_bytes=self._score_bytes)
        with torch.inference_mode():
            for start in range(0, len(hidden), size):
                block = torch.tensor(hidden[None, start : start + size], dtype=self._dtype)
                leaving[start : start + size] = _numbers(self._run_block(layer, block, cache))
            return LayerStates(leaving, _numbers(seen.keys), _numbers(seen.values))

    def _run_block(self, layer: nn.Module, block: Tensor, cache: Cache) -> Tensor:
        """The tokens that follow those in the cache.  block: [1, q, hidden_size], and the same back."""
        position_ids = torch.arange(block.shape[1])[None] + cache.get_seq_length()
        mask = create_sliding_window_causal_mask(
            config=self._source.config,
            inputs_embeds=block,
            attention_mask=None,
            past_key_values=cache,
        )
        left: Tensor = layer(
            block,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self._source.rotary(block, position_ids),
        )
        return left

    def norm(self, hidden: Array) -> Tensor:
        """What leaves the last layer, float32 [n, hidden_size], normed: [n, hidden_size] in dtype."""
        with torch.inference_mode():
            normed: Tensor = self._source.norm()(torch.tensor(hidden, dtype=self._dtype))
        return normed

    def head(self) -> Tensor:
        """[V, hidden_size] in dtype."""
        return self._source.lm_head().weight.detach()


def whole_layers(model: MistralForCausalLM) -> HuggingFaceLayers:
    """The layers of a model in memory."""
    words = "Hugging Face's MistralForCausalLM in float32, layer after layer, its own attention"
    return HuggingFaceLayers(WholeModel(model), words=words)


def eager_stream(source: Checkpoint, *, sliding_window: int) -> LayerStream:
    """The layers of a checkpoint, read one at a time.  sliding_window: W, the query's own token included."""
    stream = LayerStream(source, sliding_window=sliding_window)
    stream.config._attn_implementation = "eager"
    return stream


def streamed_layers(source: Checkpoint, *, sliding_window: int) -> HuggingFaceLayers:
    """One layer in memory at a time.  sliding_window: W, whatever config.json says."""
    words = (
        "Hugging Face's decoder layers in float32, eager attention, one in memory at a time; their weights "
        "are read by mistral-trt's reader and not by transformers'"
    )
    if source.adapters:
        words += ", which also merges the adapters, not peft"
    return HuggingFaceLayers(eager_stream(source, sliding_window=sliding_window), words=words)


def queries_at_once(heads: int, tokens: int, *, score_bytes: int = SCORE_BYTES) -> int:
    """Queries of a block, so that its scores keep within score_bytes: 1…tokens.

    H=9, T=2312: 2312.  H=32, T=12552: 167.
    """
    return min(tokens, max(1, score_bytes // (4 * heads * tokens)))


def head_logits(hidden: Tensor, head: Tensor) -> Array:
    """Logits as `head` gives them, in its dtype: summed in float32, rounded once, as float32 [n, V].

    hidden: [n, hidden_size] and head: [V, hidden_size], both in that dtype.
    """
    with torch.inference_mode():
        return _numbers((hidden.float() @ head.float().T).to(hidden.dtype)[None])


def _numbers(tensor: Tensor) -> Array:
    """[1, …] in any dtype -> float32 […]"""
    numbers: Array = tensor[0].float().numpy()
    return numbers
