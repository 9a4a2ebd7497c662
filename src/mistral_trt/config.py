"""A Hugging Face `config.json` → the numbers that define a Mistral decoder.

Field names are Hugging Face's, verbatim. A value this package does not compute is an error, never
a default: a decoder that ignores `rope_scaling` gives fluent wrong answers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mistral_trt.errors import ConfigError

_UNSUPPORTED_TRUE = {
    "attention_bias": "biases on the attention projections",
    "mlp_bias": "biases on the MLP projections",
    "use_qk_norm": "normalised queries and keys",
    "is_encoder_decoder": "an encoder",
}
_UNSUPPORTED_SET = {
    "rope_scaling": "scaled rotary embeddings",
    "quantization_config": "a checkpoint that is already quantized",
    "attn_logit_softcapping": "soft-capped attention",
    "final_logit_softcapping": "soft-capped logits",
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "auto_map": "code shipped with the checkpoint",
}
_INERT = frozenset(
    "_name_or_path _attn_implementation architectures attention_dropout bos_token_id chunk_size_feed_forward "
    "dtype eos_token_id id2label initializer_range is_decoder label2id model_type output_attentions "
    "output_hidden_states pad_token_id pretraining_tp problem_type return_dict tie_encoder_decoder "
    "tokenizer_class torch_dtype transformers_version unk_token_id use_cache".split()
)
_READ = frozenset("hidden_act layer_types partial_rotary_factor rope_parameters".split())


@dataclass(frozen=True)
class ModelConfig:
    """The shape and constants of one Mistral decoder (letters: see `contract.py`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    max_position_embeddings: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "tie_word_embeddings":
                if not isinstance(value, bool):
                    raise ConfigError(f"config.json: {field.name} must be true or false, found {value!r}")
            elif field.name in ("rms_norm_eps", "rope_theta"):
                _require_positive_number(field.name, value)
            elif not (field.name == "sliding_window" and value is None):
                _require_positive_integer(field.name, value)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"config.json: head_dim must be even for rotary embeddings, found {self.head_dim}"
            )

    @classmethod
    def from_huggingface(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read `config.json`. Raises ConfigError naming the key that is missing or unsupported."""
        refuse_unsupported(raw)
        heads = _required(raw, "num_attention_heads")
        hidden_size = _required(raw, "hidden_size")
        head_dim = raw.get("head_dim")
        if head_dim is None:
            _require_positive_integer("num_attention_heads", heads)
            _require_positive_integer("hidden_size", hidden_size)
            if hidden_size % heads:
                raise ConfigError(
                    f"config.json: no head_dim, and hidden_size ({hidden_size}) is not a multiple of "
                    f"num_attention_heads ({heads})"
                )
            head_dim = hidden_size // heads
        key_value_heads = _required(raw, "num_key_value_heads")
        return cls(
            vocab_size=_required(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(raw, "intermediate_size"),
            num_hidden_layers=_required(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads if key_value_heads is None else key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=_required(raw, "rms_norm_eps"),
            rope_theta=_rope_theta(raw),
            sliding_window=_required(raw, "sliding_window"),
            max_position_embeddings=_required(raw, "max_position_embeddings"),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_json`. Raises ConfigError on missing or unknown fields."""
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ConfigError(f"model config: expected the fields {sorted(names)}, found {sorted(data)}")
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def queries_per_key(self) -> int:
        """Query heads that share one key/value head (GQA)."""
        return self.num_attention_heads // self.num_key_value_heads


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError for anything in `config.json` that this decoder would compute wrongly."""
    model_type = raw.get("model_type")
    if model_type != "mistral":
        raise ConfigError(f"config.json: model_type must be 'mistral', found {model_type!r}")
    for key, meaning in _UNSUPPORTED_TRUE.items():
        if raw.get(key):
            raise ConfigError(f"config.json: {key} = {raw[key]!r} is not supported ({meaning})")
    for key, meaning in _UNSUPPORTED_SET.items():
        if raw.get(key) is not None:
            raise ConfigError(f"config.json: {key} = {raw[key]!r} is not supported ({meaning})")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act must be 'silu', found {raw['hidden_act']!r}")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"config.json: partial_rotary_factor = {raw['partial_rotary_factor']!r} is not supported "
            "(every dimension is rotated)"
        )
    _refuse_mixed_layers(raw)


def unrecognised_keys(raw: Mapping[str, Any]) -> list[str]:
    """Keys of `config.json` that this package neither reads nor knows to be without effect."""
    known = {field.name for field in fields(ModelConfig)} | _INERT | _READ
    return sorted(set(raw) - known - set(_UNSUPPORTED_SET) - set(_UNSUPPORTED_TRUE))


def _refuse_mixed_layers(raw: Mapping[str, Any]) -> None:
    layer_types = raw.get("layer_types")
    if layer_types is None:
        return
    windowed = raw.get("sliding_window") is not None
    expected = "sliding_attention" if windowed else "full_attention"
    if not isinstance(layer_types, list) or not layer_types or any(kind != expected for kind in layer_types):
        raise ConfigError(
            f"config.json: layer_types must all be {expected!r} here, found {layer_types!r} "
            "(layers with different windows are not supported)"
        )


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """`rope_theta`, from the top level or from transformers 5's `rope_parameters`."""
    parameters = raw.get("rope_parameters")
    if parameters is None:
        return _number("rope_theta", _required(raw, "rope_theta"))
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: rope_parameters must be an object, found {parameters!r}")
    rope_type = parameters.get("rope_type", "default")
    extra = sorted(set(parameters) - {"rope_type", "rope_theta", "partial_rotary_factor"})
    if rope_type != "default" or extra or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"config.json: rope_parameters = {dict(parameters)!r} is not supported "
            "(scaled rotary embeddings); expected rope_type 'default' and rope_theta"
        )
    theta = _number("rope_theta", _required(parameters, "rope_theta"))
    top = raw.get("rope_theta")
    if top is not None and top != theta:
        raise ConfigError(f"config.json: rope_theta is {top!r} at the top and {theta!r} in rope_parameters")
    return theta


def _required(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise ConfigError(f"config.json: {key!r} is missing")
    return raw[key]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: {name} must be a number, found {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"config.json: {name} must be a number, found one past float's range") from error


def _require_positive_number(name: str, value: Any) -> None:
    if not (math.isfinite(_number(name, value)) and value > 0):
        raise ConfigError(f"config.json: {name} must be a positive number, found {value!r}")


def _require_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {name} must be a positive integer, found {value!r}")
