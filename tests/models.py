"""Tiny seeded Mistral checkpoints for the tests: no downloads, the same bytes every time."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import MistralConfig, MistralForCausalLM

from mistral_trt.config import ModelConfig

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=8,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
"""The model of the tests: grouped queries, and a window that 9 tokens cross."""


def write_checkpoint(folder: Path, *, seed: int = 0, dtype: str = "float32", **overrides: object) -> Path:
    """Write a Hugging Face checkpoint with random weights: 2 layers, W = 8, grouped queries.

    The scale is large enough that attention is far from uniform, so a wrong mask or slot shows.
    """
    settings = {**TINY.to_json(), "initializer_range": 0.15, **overrides}
    torch.manual_seed(seed)
    model = MistralForCausalLM(MistralConfig(**settings))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer of 259 tokens: <s>, </s>, <pad>, then one token a byte."""
    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
