"""`config.json`: what is read, what is refused, and that nothing else ever comes out."""

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import MistralConfig

from mistral_trt.config import ModelConfig, refuse_unsupported, unrecognised_keys
from mistral_trt.errors import ConfigError

MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
REQUIRED = sorted(set(MISTRAL_7B) - {"model_type", "tie_word_embeddings"})
POSITIVE_INTEGERS = sorted(set(REQUIRED) - {"rms_norm_eps", "rope_theta"} | {"head_dim"})

sizes = st.integers(1, 2**20)
configs = st.builds(
    ModelConfig,
    vocab_size=sizes,
    hidden_size=sizes,
    intermediate_size=sizes,
    num_hidden_layers=sizes,
    num_attention_heads=st.sampled_from([4, 8, 32]),
    num_key_value_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.integers(1, 512).map(lambda n: 2 * n),
    rms_norm_eps=st.floats(1e-12, 1),
    rope_theta=st.floats(1, 1e9),
    sliding_window=st.none() | sizes,
    max_position_embeddings=sizes,
    tie_word_embeddings=st.booleans(),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KNOWN_KEYS = [
    *MISTRAL_7B, "head_dim", "rope_parameters", "layer_types", "hidden_act", "partial_rotary_factor",
    "rope_scaling", "attention_bias", "quantization_config",
]  # fmt: skip


def read(**changes: object) -> ModelConfig:
    return ModelConfig.from_huggingface({**MISTRAL_7B, **changes})


@given(configs)
def test_json_and_back_is_the_same_config(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@given(st.dictionaries(st.sampled_from(KNOWN_KEYS), json_values, max_size=4))
@example({"rope_theta": 10**400})
@example({"rms_norm_eps": 10**400})
@example({"layer_types": [["sliding_attention"]]})
@example({"rope_parameters": {"rope_theta": float("nan")}})
def test_any_json_value_gives_a_config_or_a_config_error(changes: dict[str, Any]) -> None:
    try:
        config = read(**changes)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert ModelConfig.from_json(config.to_json()) == config


def test_every_field_is_read_under_its_own_name() -> None:
    numbers = {
        "vocab_size": 11, "hidden_size": 12, "intermediate_size": 13, "num_hidden_layers": 14,
        "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 18, "rms_norm_eps": 0.25,
        "rope_theta": 7.5, "sliding_window": 21, "max_position_embeddings": 22, "tie_word_embeddings": True,
    }  # fmt: skip
    assert set(numbers) == {field.name for field in fields(ModelConfig)}
    assert read(**numbers).to_json() == numbers


def test_what_transformers_writes_is_read_and_known() -> None:
    raw = MistralConfig().to_dict()
    assert ModelConfig.from_huggingface(raw).num_key_value_heads == 8
    assert unrecognised_keys(raw) == []


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    raw = {name: value for name, value in MISTRAL_7B.items() if name != key}
    with pytest.raises(ConfigError, match=f"config.json: '{key}' is missing"):
        ModelConfig.from_huggingface(raw)


@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, [4], {}], ids=repr)
@pytest.mark.parametrize("key", POSITIVE_INTEGERS)
def test_sizes_are_positive_integers(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be a positive integer, found "):
        read(**{key: value})


@pytest.mark.parametrize("value", [0, -1e-5, float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_constants_are_positive_and_finite(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be a positive number, found {value}"):
        read(**{key: value})


@pytest.mark.parametrize("value", ["1e-5", None, True, [1]], ids=repr)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_constants_are_numbers(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be a number, found "):
        read(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_constant_no_float_can_hold_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be a number, found one past float's range"):
        read(**{key: 10**400})


def test_tie_word_embeddings_is_a_boolean_and_false_when_absent() -> None:
    raw = {key: value for key, value in MISTRAL_7B.items() if key != "tie_word_embeddings"}
    assert ModelConfig.from_huggingface(raw).tie_word_embeddings is False
    with pytest.raises(ConfigError, match="tie_word_embeddings must be true or false, found 1"):
        read(tie_word_embeddings=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type must be 'mistral', found 'llama'"),
        ({"model_type": None}, "model_type must be 'mistral', found None"),
        ({"model_type": "mixtral"}, "model_type must be 'mistral', found 'mixtral'"),
        ({"attention_bias": True}, "attention_bias = True is not supported (biases on the attention"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported (biases on the MLP projections)"),
        ({"use_qk_norm": True}, "use_qk_norm = True is not supported (normalised queries and keys)"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported (an encoder)"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "'factor': 4} is not supported (scaled rotary"),
        ({"quantization_config": {"bits": 4}}, "(a checkpoint that is already quantized)"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported (soft-capped att"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported (soft-"),
        ({"num_local_experts": 8}, "num_local_experts = 8 is not supported (mixture of experts)"),
        ({"num_experts": 8}, "num_experts = 8 is not supported (mixture of experts)"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "is not supported (code shipped with the checkpoint)"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', found 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "0.5 is not supported (every dimension is rotated)"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "must all be 'sliding_attention' here"),
        ({"layer_types": ["full_attention"]}, "found ['full_attention'] (layers with different windows"),
        ({"layer_types": ["sliding_attention"], "sliding_window": None}, "must all be 'full_attention' here"),
        ({"layer_types": []}, "layer_types must all be"),
        ({"layer_types": "sliding_attention"}, "layer_types must all be"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object, found 'default'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "expected rope_type 'default' and"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "'factor': 2.0} is not supported (scaled"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5} is not supported"),
        ({"rope_parameters": {"rope_type": "default"}}, "'rope_theta' is missing"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a number, found '1e4'"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "10000.0 at the top and 1000000.0 in rope_parameters"),
        ({"num_key_value_heads": 5}, "(32) must be a multiple of num_key_value_heads (5)"),
        ({"head_dim": 127}, "head_dim must be even for rotary embeddings, found 127"),
        ({"hidden_size": 4097}, "no head_dim, and hidden_size (4097) is not a multiple of"),
    ],
)  # fmt: skip
def test_what_this_decoder_would_compute_wrongly_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": False},
        {"rope_scaling": None},
        {"hidden_act": "silu"},
        {"partial_rotary_factor": 1.0},
        {"layer_types": ["sliding_attention"] * 32},
        {"layer_types": None},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ],
)
def test_a_supported_value_changes_nothing(changes: dict[str, Any]) -> None:
    refuse_unsupported({**MISTRAL_7B, **changes})
    assert read(**changes) == read()


def test_rope_theta_from_the_top_or_from_rope_parameters() -> None:
    nested = {key: value for key, value in MISTRAL_7B.items() if key != "rope_theta"}
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert ModelConfig.from_huggingface(nested) == read(rope_theta=1e6) != read()
    assert read(rope_theta=1e6, rope_parameters={"rope_theta": 1_000_000}) == read(rope_theta=1e6)


def test_head_dim_is_derived_only_where_it_is_absent() -> None:
    assert read().head_dim == read(head_dim=None).head_dim == 128
    assert read(head_dim=64).head_dim == 64


def test_key_value_heads_of_null_mean_one_per_query_head() -> None:
    assert read(num_key_value_heads=None).num_key_value_heads == 32
    assert (read().queries_per_key, read(num_key_value_heads=None).queries_per_key) == (4, 1)


def test_a_window_of_null_is_no_window() -> None:
    assert read(sliding_window=None).sliding_window is None


def test_unrecognised_keys_are_listed_and_known_ones_are_not() -> None:
    raw = {**MISTRAL_7B, "torch_dtype": "bfloat16", "mystery": 1, "another": 2, "rope_scaling": None}
    assert unrecognised_keys(raw) == ["another", "mystery"]


@pytest.mark.parametrize("change", [{"extra": 1}, {"head_dim": None}])
def test_a_manifest_config_has_exactly_the_fields(change: dict[str, Any]) -> None:
    data = read().to_json()
    data = data | change if "extra" in change else {k: v for k, v in data.items() if k not in change}
    with pytest.raises(ConfigError, match=r"model config: expected the fields \[.*found"):
        ModelConfig.from_json(data)
