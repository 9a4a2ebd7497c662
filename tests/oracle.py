"""Checkpoint + tokens → logits, from the textbook: float64 numpy, full keys, a band for a mask, no ring.

It shares nothing with the artifact or with Hugging Face's code, so neither can share a mistake with it. It
keeps every key and every [H, T, T] score: for tiny models and short sequences.

    T tokens   H query heads   K key/value heads   G = H / K   D head_dim   V vocab_size
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mistral_trt.config import ModelConfig

Weights = Mapping[str, np.ndarray]


def oracle_logits(
    weights: Weights, config: ModelConfig, *, tokens: Sequence[int], sliding_window: int
) -> np.ndarray:  # -> [T, V]
    """Logits at every position, float64 [T, V].  sliding_window: W, the query's own token included."""
    x = weights["model.embed_tokens.weight"][list(tokens)]  # [T, hidden_size]
    mask = band(len(tokens), sliding_window)  # [T, T]
    for i in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{i}.")
        }
        normed = rms_norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(normed, layer, config, mask)  # [T, hidden_size]
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + mlp(normed, layer)  # [T, hidden_size]
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    tied = config.tie_word_embeddings
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]  # [V, hidden_size]
    return np.asarray(x @ head.T)  # [T, hidden_size] @ [hidden_size, V] -> [T, V]


def attention(x: np.ndarray, layer: Weights, config: ModelConfig, mask: np.ndarray) -> np.ndarray:
    """Grouped-query attention (arXiv:2305.13245).  x: [T, hidden_size], mask: [T, T] -> [T, hidden_size]"""
    tokens, size = len(x), config.head_dim
    keys, group = config.num_key_value_heads, config.queries_per_key
    q = (x @ layer["self_attn.q_proj.weight"].T).reshape(tokens, keys * group, size)  # [T, H, D]
    k = (x @ layer["self_attn.k_proj.weight"].T).reshape(tokens, keys, size)  # [T, K, D]
    v = (x @ layer["self_attn.v_proj.weight"].T).reshape(tokens, keys, size)  # [T, K, D]
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)  # [T, H, D], [T, K, D]
    grouped = q.reshape(tokens, keys, group, size)  # [T, K, G, D]
    scores = np.einsum("qkgd,skd->kgqs", grouped, k) / np.sqrt(size)  # [K, G, T, T]
    probabilities = softmax(np.where(mask, scores, -np.inf))  # [K, G, T, T]
    out = np.einsum("kgqs,skd->qkgd", probabilities, v)  # [T, K, G, D]
    return np.asarray(out.reshape(tokens, -1) @ layer["self_attn.o_proj.weight"].T)  # [T, hidden_size]


def band(tokens: int, sliding_window: int) -> np.ndarray:
    """Which keys a query sees: itself and the W - 1 before it.  W=2, T=3: [[1 0 0] [1 1 0] [0 1 1]]"""
    query, key = np.arange(tokens)[:, None], np.arange(tokens)[None, :]  # [T, 1], [1, T]
    return (key <= query) & (key > query - sliding_window)  # [T, T]


def rotate(x: np.ndarray, rope_theta: float) -> np.ndarray:
    """Rotary embedding (arXiv:2104.09864, section 3.2.2).  x: [T, heads, D] -> [T, heads, D]

    Dimension i pairs with i + D/2, as in every Hugging Face checkpoint (the paper pairs 2i with 2i + 1).
    """
    half = x.shape[-1] // 2
    frequency = rope_theta ** (-np.arange(half) / half)  # [D/2]
    angle = np.arange(len(x))[:, None, None] * frequency  # [T, 1, D/2]
    low, high = x[..., :half], x[..., half:]  # [T, heads, D/2] twice
    rotated = (low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle))
    return np.concatenate(rotated, axis=-1)  # [T, heads, D]


def mlp(x: np.ndarray, layer: Weights) -> np.ndarray:
    """SwiGLU (arXiv:2002.05202, equation 6).  x: [T, hidden_size] -> [T, hidden_size]"""
    gate = x @ layer["mlp.gate_proj.weight"].T  # [T, intermediate_size]
    up = x @ layer["mlp.up_proj.weight"].T  # [T, intermediate_size]
    return np.asarray((gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T)  # [T, hidden_size]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm (arXiv:1910.07467, equation 4).  x: [T, hidden_size] -> [T, hidden_size]"""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight)


def softmax(x: np.ndarray) -> np.ndarray:
    """[..., T] -> [..., T], every row sums to 1."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def read_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder's safetensors files, widened to float64."""
    return {
        name: tensor.to(torch.float64).numpy()
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
