"""Precision → scheme: block sizes, names, ModelOpt's configuration, and what a budget may say."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from mistral_trt.contract import BLOCK_SIZES, QUANTIZED
from mistral_trt.errors import ConfigError
from mistral_trt.export.checkpoint import expected_shapes
from mistral_trt.export.quantization.scheme import (
    input_widths,
    largest_block,
    linear_names,
    scheme_for,
)
from mistral_trt.export.quantization.settings import Budget, QuantizationSettings
from tests.models import TINY

mtq = pytest.importorskip("modelopt.torch.quantization")  # quietly: importing it warns of torch's plans

WIDE = replace(TINY, hidden_size=256, intermediate_size=384, head_dim=64)


# ---------------------------------------------------------------- blocks


@given(st.sets(st.integers(1, 200).map(lambda count: 32 * count), min_size=1, max_size=4))
def test_the_largest_block_divides_every_width_and_no_larger_one_does(widths: set[int]) -> None:
    block = largest_block(widths)
    assert block in BLOCK_SIZES
    assert not any(width % block for width in widths)
    for larger in [size for size in BLOCK_SIZES if size > block]:
        assert any(width % larger for width in widths)


@pytest.mark.parametrize(
    ("widths", "block"),
    [({4096, 14336}, 128), ({576, 1536}, 64), ({64, 96}, 32), ({128}, 128), ({128, 64, 256}, 64)],
)
def test_the_largest_block_of_known_widths(widths: set[int], block: int) -> None:
    assert largest_block(widths) == block


@pytest.mark.parametrize("widths", [{48}, {4096, 100}, {128, 16}])
def test_widths_without_a_block_are_refused_with_the_way_out(widths: set[int]) -> None:
    words = rf"multiple of 32, found \[.*{max(widths)}\]; use --precision int8-weight-only$"
    with pytest.raises(ConfigError, match=words):
        largest_block(widths)


def test_the_widths_are_those_of_the_linears() -> None:
    """o_proj reads the heads, which need not be as wide as the hidden state."""
    shapes = expected_shapes(WIDE)
    linears = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    assert input_widths(WIDE) == {shape[1] for shape in linears.values()} == {256, 384}
    assert input_widths(replace(WIDE, head_dim=40)) == {256, 160, 384}
    assert scheme_for("int4", replace(WIDE, head_dim=40)).block_size == 32
    with pytest.raises(ConfigError, match=r"found \[80, 256, 384\]"):
        scheme_for("int4", replace(WIDE, head_dim=20))


# ---------------------------------------------------------------- schemes


@pytest.mark.parametrize(
    ("precision", "weights", "activations", "block", "modelopt"),
    [
        ("int8", "int8", "int8", None, "INT8_SMOOTHQUANT_CFG"),
        ("int8-weight-only", "int8", None, None, "INT8_WEIGHT_ONLY_CFG"),
        ("int4", "int4", None, 128, "INT4_AWQ_CFG"),
        ("fp8", "float8_e4m3fn", "float8_e4m3fn", None, "FP8_DEFAULT_CFG"),
    ],
)
def test_each_precision_has_its_scheme(
    precision: str, weights: str, activations: str | None, block: int | None, modelopt: str
) -> None:
    scheme = scheme_for(precision, WIDE)
    assert (scheme.weights, scheme.activations, scheme.block_size) == (weights, activations, block)
    assert scheme.modelopt == modelopt
    assert scheme.to_json() == {
        "precision": precision,
        "weights": weights,
        "activations": activations,
        "block_size": block,
    }


def test_a_given_block_size_is_taken_and_only_by_int4() -> None:
    assert scheme_for("int4", WIDE, 32).block_size == 32
    assert scheme_for("int4", TINY).block_size == 32
    assert scheme_for("int8-weight-only", replace(TINY, intermediate_size=100)).block_size is None


def rule(config: dict[str, Any], quantizer: str) -> dict[str, Any]:
    (found,) = [r["cfg"] for r in config["quant_cfg"] if r["quantizer_name"] == quantizer and r.get("cfg")]
    return dict(found)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_bound_is_the_largest_code_of_modelopts_configuration(precision: str) -> None:
    scheme = scheme_for(precision, WIDE)
    bits = rule(scheme.modelopt_config(), "*weight_quantizer")["num_bits"]
    largest = torch.finfo(torch.float8_e4m3fn).max if bits == (4, 3) else 2 ** (bits - 1) - 1
    assert scheme.bound == largest


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_modelopts_configuration_carries_the_block_size(block: int) -> None:
    before = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config = scheme_for("int4", WIDE, block).modelopt_config()
    assert rule(config, "*weight_quantizer")["block_sizes"] == {-1: block, "type": "static"}
    assert before == mtq.INT4_AWQ_CFG, "ModelOpt's own configuration is not ours to change"
    rule(config, "*weight_quantizer")["block_sizes"][-1] = 128
    assert config == before, "nothing else differs"


@pytest.mark.parametrize("precision", [precision for precision in QUANTIZED if precision != "int4"])
def test_without_blocks_the_quantizers_are_those_of_modelopts_configuration(precision: str) -> None:
    scheme = scheme_for(precision, WIDE)
    before = copy.deepcopy(getattr(mtq, scheme.modelopt))
    config = scheme.modelopt_config()
    assert config is not getattr(mtq, scheme.modelopt)
    if precision == "int8-weight-only":
        assert config["algorithm"] == mtq.INT4_AWQ_CFG["algorithm"] != before["algorithm"]
        assert config["algorithm"] is not mtq.INT4_AWQ_CFG["algorithm"]
        config["algorithm"] = before["algorithm"]
    assert config == before == getattr(mtq, scheme.modelopt), "nothing else differs"


# ---------------------------------------------------------------- names


def test_the_names_are_the_linears_of_transformers_own_model() -> None:
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**TINY.to_json()))
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert linear_names(TINY, lm_head=True) == linears
    assert linear_names(TINY) == linears[:-1]


def test_the_names_follow_the_forward_pass() -> None:
    assert [name.rpartition(".")[2] for name in linear_names(TINY)[7:]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("perplexity=1.03", "perplexity", 1.03),
        ("perplexity=1", "perplexity", 1.0),
        ("kl=0", "kl", 0.0),
        ("kl=1e-3", "kl", 1e-3),
    ],
)
def test_a_budget_is_a_metric_and_a_limit(text: str, metric: str, limit: float) -> None:
    assert Budget.parse(text) == Budget(metric, limit)


@pytest.mark.parametrize("text", ["", "perplexity", "perplexity=", "kl=small", "1.03", "kl=1=2", "kl=1,2"])
def test_a_budget_without_a_number_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=f"for example perplexity=1.03, found '{text}'$"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("perplexity=0.99", "perplexity=0.99"),
        ("perplexity=nan", "perplexity=nan"),
        ("perplexity=inf", "perplexity=inf"),
        ("kl=-0.001", "kl=-0.001"),
        ("kl=nan", "kl=nan"),
        ("accuracy=1.5", "accuracy=1.5"),
        ("=2", "=2"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"--quality must be perplexity=RATIO .*or kl=NATS, found {found}$"):
        Budget.parse(text)


def test_settings_that_say_nothing_are_the_defaults() -> None:
    """`export_checkpoint` tells by this whether something was asked for."""
    assert QuantizationSettings() == QuantizationSettings(keep=(), quality=None)
    assert QuantizationSettings() != QuantizationSettings(keep=("*",))
