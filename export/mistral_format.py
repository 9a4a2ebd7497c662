"""Mistral's own checkpoint layout → Hugging Face's config and weight names.

The layout: `params.json`, `consolidated.safetensors` (or several `consolidated*.safetensors`), tokenizer
in `tokenizer.model*` or `tekken.json`. Names and the rotary order of query and key rows are those of
https://github.com/mistralai/mistral-inference (src/mistral_inference/transformer_layers.py, rope.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_trt.errors import CheckpointError, ConfigError
from mistral_trt.export.conversion import Weight
from mistral_trt.export.tensor_files import StoredTensor
from mistral_trt.progress import note

PARAMS = "params.json"
SINGLE = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"

_CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {
    "rope_theta",
    "sliding_window",
    "max_position_embeddings",
    "max_seq_len",
    "tied_embeddings",
    "model_type",
    "max_batch_size",
    "causal",
}
_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(rf"layers\.(0|[1-9]\d*)\.({'|'.join(map(re.escape, _MODULES))})\.weight")
_PART = re.compile(r"consolidated-(\d{5})-of-(\d{5})\.safetensors|consolidated\.(\d\d)\.safetensors")
_DEFAULT_POSITIONS = 32768


def config_from_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params.json` → the `config.json` of the same model.

    Where `rope_theta` is missing, it is 10,000 with a window and 1,000,000 without, as in Mistral's
    reference code for 7B v0.1. Raises ConfigError for a missing key or a model that is not a plain decoder.
    """
    missing = sorted(set(_CONFIG) - set(params))
    if missing:
        raise ConfigError(f"{PARAMS}: {missing[0]!r} is missing")
    if params.get("model_type", "transformer") != "transformer":
        raise ConfigError(f"{PARAMS}: model_type must be 'transformer', found {params['model_type']!r}")
    for key in sorted(set(params) - set(_CONFIG) - _OPTIONAL):
        if params[key] not in (None, False, 0):
            raise ConfigError(
                f"{PARAMS}: {key} = {params[key]!r} is not supported (a plain decoder has no such)"
            )
    if params.get("causal") not in (None, True):
        raise ConfigError(f"{PARAMS}: causal = {params['causal']!r} is not supported")
    window, theta = params.get("sliding_window"), params.get("rope_theta")
    if theta is None:
        theta = 1e6 if window is None else 1e4
        note(f"{PARAMS} has no rope_theta: {theta:g} is used, as Mistral's reference code does")
    positions = params.get("max_position_embeddings") or params.get("max_seq_len")
    return {
        "model_type": "mistral",
        **{name: params[key] for key, name in _CONFIG.items()},
        "rope_theta": theta,
        "sliding_window": window,
        "max_position_embeddings": _DEFAULT_POSITIONS if positions is None else positions,
        "tie_word_embeddings": params.get("tied_embeddings") or False,
    }


def weights_by_hugging_face_name(
    found: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> dict[str, Weight]:
    """Every stored tensor under the name Hugging Face gives it.

    config: from `config_from_params`. Raises CheckpointError for a tensor that a decoder has no place for.
    """
    heads = {"attention.wq": config["num_attention_heads"], "attention.wk": config["num_key_value_heads"]}
    weights = {}
    for name, stored in found.items():
        match = _LAYER.fullmatch(name)
        if match:
            target = f"model.layers.{match[1]}.{_MODULES[match[2]]}.weight"
            weights[target] = Weight(target, stored, heads.get(match[2], 0))
        elif name in _TOP:
            weights[_TOP[name]] = Weight(_TOP[name], stored)
        else:
            raise CheckpointError(
                f"the checkpoint holds {name!r}, for which a decoder in Mistral's own format has no place"
            )
    return weights


def parts(folder: Path) -> list[Path]:
    """The `consolidated*.safetensors` files, all of them.

    Raises CheckpointError where their numbering shows that one is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("consolidated*.safetensors"))
    for path in found:
        match = _PART.fullmatch(path.name)
        if match and match[2]:
            for i in range(1, int(match[2]) + 1):
                expected = f"consolidated-{i:05}-of-{match[2]}.safetensors"
                if not (folder / expected).is_file():
                    raise CheckpointError(f"{folder / expected} is missing; {path.name} says it exists")
    return found
