"""A seed → a Mistral checkpoint of one narrow layer with a vocabulary of 32,000, and its ONNX folder.

The graph takes a fraction of a millisecond, so what surrounds it shows.
"""

import itertools
import json
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLI = (sys.executable, "-m", "mistral_trt.cli")
VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32_000, 64, 4, 2, 16, 128
WINDOW, CHUNK, ROWS = 128, 64, 8
SPECIAL = ("<s>", "</s>", "<pad>")
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": WINDOW,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
_STD = 0.15
"""Of every weight: wide enough that the next token depends on those before it."""


def make_checkpoint(folder: Path) -> Path:
    """config.json, model.safetensors, tokenizer.json, tokenizer_config.json: the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else (_STD * rng.standard_normal(shape, dtype=np.float32))
        for name, shape in shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    special = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    return folder


def export(checkpoint: Path, out: Path) -> Path:
    """The ONNX folder in fp32, by the command line in a process of its own: this one stays without torch."""
    options = ["--precision", "fp32", "--prefill-chunk", str(CHUNK), "--max-batch-size", str(ROWS)]
    command = [*CLI, "export", "--quiet", str(checkpoint), "--out", str(out), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of each weight and its shape."""
    attention, keys, layer = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, "model.layers.0"
    return {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.self_attn.q_proj.weight": (attention, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": (keys, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": (keys, HIDDEN),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, attention),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }


def tokenizer() -> dict[str, object]:
    """A byte-level BPE of 32,000 tokens without merges: bytes, then made-up words after a blank."""
    words = ("Ġ" + "".join(letters) for n in (2, 3, 4) for letters in itertools.product(_LETTERS, repeat=n))
    tokens = [*SPECIAL, *_byte_alphabet(), *itertools.islice(words, VOCAB - len(SPECIAL) - 256)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True, **_ADDED} for i, token in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
    }


_LETTERS = string.ascii_lowercase
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _byte_alphabet() -> list[str]:
    """What byte-level BPE writes for each byte: its character where one can see it, else one past 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(code) for code in seen] + [chr(256 + i) for i in range(len(unseen))]
