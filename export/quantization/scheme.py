"""`--precision` → what is quantized, to which numbers, and ModelOpt's configuration that calibrates it."""

import copy
import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from mistral_trt.config import ModelConfig
from mistral_trt.contract import BLOCK_SIZES
from mistral_trt.errors import ConfigError

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linears of a decoder layer, in the order of the forward pass."""

LM_HEAD_MODULE = "lm_head"


@dataclass(frozen=True)
class Scheme:
    """How a precision quantizes a linear.

    weights: ONNX dtype of the codes.  bound: the largest code.  activations: the same for the input, None
    where it stays float16.  block_size: input features that share a weight scale; None: one scale for each
    output channel, or one for the whole weight in fp8.  modelopt: name of ModelOpt's configuration.
    awq: whether AWQ searches a pre_quant_scale, whatever that configuration says.
    """

    precision: str
    weights: str
    bound: float
    activations: str | None
    block_size: int | None
    modelopt: str
    awq: bool = False

    @property
    def algorithm(self) -> str:
        """How ModelOpt calibrates, in a word or two."""
        return f"{self.modelopt} with AWQ" if self.awq else self.modelopt

    def modelopt_config(self) -> dict[str, Any]:
        """A copy of ModelOpt's own configuration, with our block size and AWQ where it is asked for."""
        with quiet_modelopt():
            import modelopt.torch.quantization as mtq

        config: dict[str, Any] = copy.deepcopy(getattr(mtq, self.modelopt))
        for rule in config["quant_cfg"]:
            blocks = (rule.get("cfg") or {}).get("block_sizes")
            if blocks and -1 in blocks:
                blocks[-1] = self.block_size
        if self.awq:
            config["algorithm"] = copy.deepcopy(mtq.INT4_AWQ_CFG["algorithm"])
        return config

    def to_json(self) -> dict[str, Any]:
        """The manifest's `quantization.scheme`."""
        return {
            "precision": self.precision,
            "weights": self.weights,
            "activations": self.activations,
            "block_size": self.block_size,
        }


@contextmanager
def quiet_modelopt() -> Iterator[None]:
    """ModelOpt prints its steps to stdout, which belongs to results, and warns of untried versions."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


_SCHEMES = {
    "int8": Scheme("int8", "int8", 127.0, "int8", None, "INT8_SMOOTHQUANT_CFG"),
    "int8-weight-only": Scheme(
        "int8-weight-only", "int8", 127.0, None, None, "INT8_WEIGHT_ONLY_CFG", awq=True
    ),
    "fp8": Scheme("fp8", "float8_e4m3fn", 448.0, "float8_e4m3fn", None, "FP8_DEFAULT_CFG"),
}


def scheme_for(precision: str, config: ModelConfig, block_size: int | None = None) -> Scheme:
    """The scheme of a quantized precision for a model.

    block_size: of INT4, None for the largest that divides every linear's input.  Raises ConfigError.
    """
    if precision != "int4":
        return _SCHEMES[precision]
    block = block_size or largest_block(input_widths(config))
    return Scheme("int4", "int4", 7.0, None, block, "INT4_AWQ_CFG")


def input_widths(config: ModelConfig) -> set[int]:
    """in_features of the linears."""
    return {config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size}


def largest_block(widths: Iterable[int]) -> int:
    """576, 1536 -> 64.  Raises ConfigError if no block size divides them all."""
    for block in BLOCK_SIZES:
        if all(width % block == 0 for width in widths):
            return block
    raise ConfigError(
        f"int4 needs every linear's input to be a multiple of {BLOCK_SIZES[-1]}, found {sorted(widths)}; "
        "use --precision int8-weight-only"
    )


def linear_names(config: ModelConfig, *, lm_head: bool = False) -> list[str]:
    """Module names of everything that can be quantized: `model.layers.0.self_attn.q_proj`, …"""
    names = [f"model.layers.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in KINDS]
    return [*names, LM_HEAD_MODULE] if lm_head else names
