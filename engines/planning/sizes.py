"""Contract → bytes and elements that follow from its shapes alone.

Letters as in `contract.py`; I is intermediate_size, E hidden_size.
"""

from mistral_trt.config import ModelConfig
from mistral_trt.contract import DTYPE_BYTES, GraphContract

_INT4_BLOCK = 128
_SCALE_BYTES = {"int4": 2, "int8": 4, "int8-weight-only": 2}

_ACTIVATION_BASE_BYTES = 8_192_000  # of each profile, in every model
_WORKSPACE_BYTES = 2 << 20  # of each profile, in many
_STEP_BYTES = 24  # three int64 of a token: id, position, logits_index


def linear_elements(config: ModelConfig) -> int:
    """Weights of the decoder layers' linears, those that a quantized precision quantizes. 7B: 6.98e9."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    inner = 3 * config.intermediate_size
    return config.num_hidden_layers * config.hidden_size * (2 * queries + 2 * keys + inner)


def quantized_linear_bytes(config: ModelConfig, precision: str) -> int:
    """Codes and scales of those linears in int8, int8-weight-only or int4 (blocks of 128 input features)."""
    elements, scale = linear_elements(config), _SCALE_BYTES[precision]
    if precision == "int4":
        return elements // 2 + elements // _INT4_BLOCK * scale
    outputs = 2 * config.hidden_size + 2 * config.intermediate_size
    outputs += (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return elements + config.num_hidden_layers * outputs * scale


def embedding_bytes(contract: GraphContract) -> int:
    """The embedding table, of which a step reads a row for each token."""
    return contract.config.vocab_size * contract.config.hidden_size * DTYPE_BYTES[contract.cache_dtype]


def logits_bytes(contract: GraphContract) -> int:
    """The larger of the two profiles' logits: float32 [B, 1, V] and [1, C, V]."""
    return 4 * contract.config.vocab_size * max(contract.max_batch_size, contract.ring.prefill_chunk)


def activation_bytes(contract: GraphContract) -> int:
    """Activations of both profiles, each with memory of its own.

    A token holds most in the MLP (gate, up and their product) or in attention, whose kernels split a long
    ring and keep partial results: about what its scores, float16 [H, R], would take. Beside either lie the
    residual twice, the mask and the rotary angles. Layers share the memory: their number does not count.
    An envelope of what TensorRT-RTX 1.7.1 reports of builds of 1 and 2 layers: up to a third above it at
    C = 256, up to twice at C = 512, never below.
    """
    config = contract.config
    slots, hidden, inner = contract.ring.capacity, config.hidden_size, config.intermediate_size
    number = 4 if contract.precision in ("fp32", "int8") else 2  # int8's linears stand between float32
    widest = max(3 * number * inner, 2 * config.num_attention_heads * slots)
    token = widest + 4 * hidden + 2 * slots + 2 * config.head_dim + _STEP_BYTES
    tokens = contract.max_batch_size + contract.ring.prefill_chunk
    # With weight-only quantization the decode profile turns gate and up into numbers before it multiplies.
    spread = 2 * 2 * inner * hidden if contract.precision in ("int4", "int8-weight-only") else 0
    return 2 * (_ACTIVATION_BASE_BYTES + _WORKSPACE_BYTES) + tokens * token + spread
