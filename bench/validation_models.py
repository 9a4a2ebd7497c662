"""A seed → a tiny Mistral checkpoint with a tokenizer, and the shape it is exported in.

Shapes come in turn and weights are random, norms too, so that they matter. Each model has a scale of its own:
the wider its weights, the sharper its attention and the more it makes of every rounding.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import MistralConfig, MistralForCausalLM

VOCAB = 257
"""One token a byte, and <s>."""
GAIN = (0.64, 1.6)
"""Standard deviation of the weights times the root of hidden_size: how much a linear widens what it reads."""
NORM_SPREAD = 0.3


@dataclass(frozen=True)
class Shape:
    """What is traced: the same shape is the same graph, whatever the weights.

    heads: of queries, and of keys and values.  window, chunk: W and C.  rows: max_batch_size.
    """

    layers: int
    heads: tuple[int, int]
    window: int
    chunk: int
    rows: int
    tied: bool = False
    hidden: int = 64
    intermediate: int = 96

    def config(self) -> dict[str, Any]:
        """Fields of config.json."""
        return {
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "head_dim": 64 // self.heads[0],
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "sliding_window": self.window,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
        }


SHAPES = (
    Shape(2, (4, 2), window=8, chunk=4, rows=4),
    Shape(1, (4, 4), window=5, chunk=1, rows=1),
    Shape(3, (4, 1), window=12, chunk=8, rows=2, tied=True),
    Shape(1, (2, 1), window=24, chunk=7, rows=3, intermediate=160),
    Shape(2, (8, 2), window=16, chunk=8, rows=1, tied=True, intermediate=128),
    Shape(1, (8, 8), window=9, chunk=3, rows=4, hidden=96),
    Shape(2, (2, 2), window=24, chunk=2, rows=2, hidden=128, intermediate=256),
    Shape(3, (4, 2), window=7, chunk=5, rows=1),
)


def shape_of(seed: int) -> Shape:
    return SHAPES[seed % len(SHAPES)]


def write_checkpoint(folder: Path, seed: int) -> Path:
    """Hugging Face's files, float32: the same numbers for the same seed."""
    shape, gain = shape_of(seed), random.Random(seed).uniform(*GAIN)
    torch.manual_seed(seed)
    settings = MistralConfig(**shape.config(), initializer_range=gain / math.sqrt(shape.hidden))
    model = MistralForCausalLM(settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_((NORM_SPREAD * torch.randn_like(weight)).exp())
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Bytes, after a <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
