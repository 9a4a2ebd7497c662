"""Tiny seeded Mistral checkpoints for the tests: no downloads, the same bytes every time."""

from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM


def write_checkpoint(folder: Path, *, seed: int = 0, dtype: str = "float32", **overrides: object) -> Path:
    """Write a Hugging Face checkpoint with random weights: 2 layers, W = 8, grouped queries.

    The scale is large enough that attention is far from uniform, so a wrong mask or slot shows.
    """
    settings: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        **overrides,
    }
    torch.manual_seed(seed)
    model = MistralForCausalLM(MistralConfig(**settings))  # type: ignore[arg-type]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
