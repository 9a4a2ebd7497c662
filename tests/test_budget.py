"""Predicted memory and disk, and the refusals made of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.config import ModelConfig
from mistral_trt.contract import CACHE_DTYPES, GraphContract, plan_contract
from mistral_trt.engines.flavor import AUTO, FULL, RTX
from mistral_trt.engines.gpu import GpuTarget, RtxSupport, find_gpu, load_catalogue
from mistral_trt.engines.planning.budget import (
    RESERVE_BYTES,
    Budget,
    check_plan,
    predict,
    usable_bytes,
)
from mistral_trt.engines.planning.build_memory import BUILD_MEMORY, build_memory
from mistral_trt.engines.planning.host import Host
from mistral_trt.engines.planning.settle import settle_weights
from mistral_trt.engines.planning.sizes import (
    activation_bytes,
    linear_elements,
    logits_bytes,
    quantized_linear_bytes,
)
from mistral_trt.engines.planning.wish import Wish
from mistral_trt.engines.targets import TargetSet
from mistral_trt.errors import BuildError
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

GB = 1_000_000_000
FLOAT_BYTES = 14_483_464_192  # of a 7B in float16

MISTRAL_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)


WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "sliding_window": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def contract_7b(precision: str = "fp16", rows: int = 1, layers: int = 32) -> GraphContract:
    config = replace(MISTRAL_7B, num_hidden_layers=layers)
    return plan_contract(config, precision=precision, max_batch_size=rows)


def budget_7b(max_batch_size: int = 1, weights: str = EMBEDDED) -> Budget:
    return predict(contract_7b(rows=max_batch_size), FLOAT_BYTES, weights=weights)


# ---------------------------------------------------------------- the GPU


def test_the_prediction_of_a_7b() -> None:
    budget = budget_7b(max_batch_size=4)
    assert budget.ring_bytes_per_row == 2 * 32 * 8 * 4352 * 128 * 2
    assert budget.rings_bytes == 4 * budget.ring_bytes_per_row
    assert budget.logits_bytes == 256 * 32000 * 4
    assert 90e6 < budget.activation_bytes < 110e6
    parts = (FLOAT_BYTES, budget.rings_bytes, budget.activation_bytes, budget.logits_bytes)
    assert budget.engine_bytes == sum(parts)
    assert budget.device_bytes == budget.engine_bytes + RESERVE_BYTES
    assert set(budget.to_json()) == {
        "weights_bytes",
        "ring_bytes_per_row",
        "max_batch_size",
        "activation_bytes",
        "logits_bytes",
        "reserve_bytes",
        "device_bytes",
        "build_memory_bytes",
        "plan_bytes",
    }
    assert all(isinstance(amount, int) for amount in budget.to_json().values())


def test_logits_are_of_a_chunk_or_of_more_rows_than_that() -> None:
    assert logits_bytes(contract_7b(rows=8)) == 4 * 32000 * 256
    assert logits_bytes(contract_7b(rows=300)) == 4 * 32000 * 300


@pytest.mark.parametrize(
    ("changes", "settings", "measured"),
    [
        ({}, {}, 10_291_712 + 15_472_640),
        ({"intermediate_size": 7168}, {}, 10_320_384 + 20_977_664),
        ({"hidden_size": 2048}, {}, 10_349_056 + 17_258_496),
        ({"num_attention_heads": 16}, {}, 10_291_712 + 17_569_792),
        ({"vocab_size": 32768}, {}, 10_291_712 + 15_472_640),
        ({"sliding_window": 4096}, {}, 10_304_000 + 23_009_280),
        ({"num_hidden_layers": 4}, {}, 10_291_712 + 15_472_640),
        ({}, {"prefill_chunk": 512}, 10_292_736 + 23_015_424),
        ({}, {"max_batch_size": 32}, 10_650_624 + 15_472_640),
        ({}, {"max_batch_size": 128}, 11_881_472 + 15_472_640),
        (WIDE, {"max_batch_size": 8}, 8_341_504 + 77_987_840),
        (WIDE, {"max_batch_size": 8, "prefill_chunk": 512}, 8_343_552 + 89_128_960),
        ({**WIDE, "sliding_window": 1024}, {"max_batch_size": 8}, 8_323_072 + 26_083_328),
        ({}, {"precision": "int8"}, 10_289_664 + 19_798_016),
        ({}, {"precision": "int4"}, 24_640_000 + 15_996_928),
        ({}, {"precision": "int8-weight-only"}, 24_637_952 + 15_996_928),
    ],
)
def test_activations_are_not_less_than_the_builder_reported(
    changes: dict[str, int], settings: dict[str, object], measured: int
) -> None:
    """`compiled.activation_bytes`, decode and prefill, of SM86 builds with tensorrt-rtx 1.7.1."""
    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 2, "sliding_window": 1024, "vocab_size": 4096, "num_hidden_layers": 2}
    config = replace(MISTRAL_7B, **{**shape, **changes})  # type: ignore[arg-type]
    contract = plan_contract(config, **{"precision": "fp16", **settings})  # type: ignore[arg-type]
    above = 1.35 if contract.ring.prefill_chunk == 256 else 2
    assert measured <= activation_bytes(contract) <= above * measured


def test_activations_of_one_layer_of_a_7b() -> None:
    assert 90_869_760 <= activation_bytes(contract_7b(rows=8)) <= 1.15 * 90_869_760


def test_the_linears_of_a_7b_in_each_precision() -> None:
    assert 2 * linear_elements(MISTRAL_7B) == 13_958_643_712
    assert quantized_linear_bytes(MISTRAL_7B, "int8") / 13_958_643_712 == pytest.approx(0.5, abs=0.001)
    assert quantized_linear_bytes(MISTRAL_7B, "int8-weight-only") < quantized_linear_bytes(MISTRAL_7B, "int8")
    assert quantized_linear_bytes(MISTRAL_7B, "int4") / 13_958_643_712 == pytest.approx(0.258, abs=0.001)


AMPLE = Host(memory_bytes=10**13, disk_bytes=10**13)


def settle(budget: Budget, gpu: str, host: Host = AMPLE, weights: str = AUTO) -> Budget:
    target = find_gpu(gpu)
    flavor = FULL if target.rtx_support is RtxSupport.IMPOSSIBLE else RTX
    wish = Wish(TargetSet((target,)), AUTO, flavor, weights, replace(budget, weights=EMBEDDED))
    return settle_weights(wish, host, Path("out"))


def refusal(budget: Budget, gpu: str, host: Host = AMPLE, weights: str = AUTO) -> str:
    with pytest.raises(BuildError) as error:
        settle(budget, gpu, host, weights)
    return str(error.value)


def test_too_many_rows_name_the_largest_batch_and_the_precision_that_holds_them_all() -> None:
    assert refusal(budget_7b(16), "a10g") == (
        "predicted: 16 rows of ring need 9.1 GB beside 14.5 GB of weights and 0.1 GB of activations and "
        "logits; a10g has 22.5 GB usable; use --max-batch-size 13, or export with --precision int8"
    )


def test_rows_that_only_fewer_rows_can_mend() -> None:
    assert refusal(budget_7b(64), "a10g").endswith("has 22.5 GB usable; use --max-batch-size 13")


def test_weights_that_do_not_fit_name_the_precision_that_does() -> None:
    message = refusal(budget_7b(1), "t4")
    assert message.startswith("predicted: 1 row of ring needs 0.6 GB beside 14.5 GB of weights")
    assert message.endswith("t4 has 14.5 GB usable; export with --precision int8-weight-only")
    large = predict(contract_7b("int8"), 26 * GB, quantized_bytes=25 * GB)
    assert refusal(large, "a10g").endswith("export with --precision int4")


def test_weights_and_rows_that_need_both() -> None:
    message = refusal(budget_7b(64), "t4")
    assert message.endswith("export with --precision int8-weight-only and use --max-batch-size 11")


def test_weights_too_large_for_a_gpu_name_those_that_are_not() -> None:
    budget = predict(contract_7b("int4"), 40 * GB, quantized_bytes=GB)
    assert refusal(budget, "a10g").endswith(
        "usable; build for --gpu a100-40, l40s or a100-80, or on a machine whose GPU is an NVIDIA H100 SXM "
        "or NVIDIA H200, build for that one with --flavor tensorrt"
    )
    assert refusal(replace(budget, weights_bytes=100 * GB), "a10g").endswith(
        "usable; on a machine whose GPU is an NVIDIA H200, build for that one with --flavor tensorrt"
    )


def test_weights_too_large_for_every_gpu() -> None:
    budget = predict(contract_7b("int4"), 400 * GB, quantized_bytes=GB)
    assert refusal(budget, "a10g").endswith("no GPU of the catalogue is large enough")


gpus = st.sampled_from(list(load_catalogue().values()))


@given(
    gpus, st.integers(0, 200 * GB), st.sampled_from(["fp16", "int8", "int4"]), st.sampled_from([1, 64, 256])
)
def test_rows_that_fit_is_the_largest_batch_that_is_accepted(
    gpu: GpuTarget, weights: int, precision: str, chunk: int
) -> None:
    contract = plan_contract(MISTRAL_7B, precision=precision, prefill_chunk=chunk)
    budget = predict(contract, weights)
    rows = budget.rows_that_fit(gpu)
    if rows:
        settle(budget.with_rows(rows), gpu.key)
    with pytest.raises(BuildError):
        settle(budget.with_rows(rows + 1), gpu.key)


@given(gpus, st.integers(1, 4000))
def test_an_engine_is_refused_where_it_is_larger_than_what_is_usable(gpu: GpuTarget, rows: int) -> None:
    budget = budget_7b(rows)
    if budget.engine_bytes > usable_bytes(gpu):
        assert refusal(budget, gpu.key).startswith(f"predicted: {rows} row")
    else:
        assert settle(budget, gpu.key) == budget


# ---------------------------------------------------------------- this machine

layers = st.integers(1, 64)


@given(layers, layers, st.sampled_from([*CACHE_DTYPES]), st.sampled_from([EMBEDDED, EXTERNAL]))
def test_more_layers_need_no_less(a: int, b: int, precision: str, weights: str) -> None:
    low, high = (
        predict(contract_7b(precision, layers=count), count * 400_000_000, weights=weights)
        for count in sorted((a, b))
    )
    for name in ("build_memory_bytes", "plan_bytes", "device_bytes", "rings_bytes"):
        assert getattr(low, name) <= getattr(high, name)


@given(st.integers(0, 60 * GB), st.integers(0, 60 * GB), st.sampled_from([*CACHE_DTYPES]), st.floats(0, 1))
def test_more_weights_need_no_less(a: int, b: int, precision: str, share: float) -> None:
    low, high = (
        predict(contract_7b(precision), amount, quantized_bytes=int(share * amount))
        for amount in sorted((a, b))
    )
    assert low.build_memory_bytes <= high.build_memory_bytes
    assert low.device_bytes <= high.device_bytes


@given(st.integers(0, 60 * GB), layers, st.sampled_from([*CACHE_DTYPES]), st.floats(0, 1))
def test_weights_inside_the_plan_need_no_less_memory_than_outside(
    amount: int, count: int, precision: str, share: float
) -> None:
    contract = contract_7b(precision, layers=count)
    inside, outside = (
        predict(contract, amount, quantized_bytes=int(share * amount), weights=weights)
        for weights in (EMBEDDED, EXTERNAL)
    )
    assert inside.build_memory_bytes >= outside.build_memory_bytes
    assert inside.device_bytes == outside.device_bytes


def test_every_precision_has_its_line() -> None:
    for precision in CACHE_DTYPES:
        inside, outside = (build_memory(precision, weights) for weights in (EMBEDDED, EXTERNAL))
        assert outside.factor == outside.quantized_factor == 0 < inside.factor
    assert build_memory("bf16", EMBEDDED) is BUILD_MEMORY["fp16", EMBEDDED]
    assert build_memory("fp8", EXTERNAL) is BUILD_MEMORY["int8", EXTERNAL]


def test_what_the_memory_of_a_build_is_made_of() -> None:
    inside, outside = (build_memory("fp16", weights) for weights in (EMBEDDED, EXTERNAL))
    expected = inside.base_bytes + inside.factor * FLOAT_BYTES
    assert budget_7b().build_memory_bytes == pytest.approx(expected, abs=1)
    alone = outside.base_bytes + 32 * outside.layer_bytes
    assert budget_7b(weights=EXTERNAL).build_memory_bytes == alone
    small = predict(contract_7b("fp16"), GB // 10, quantized_bytes=0)
    assert small.build_memory_bytes == alone, "no less than the same graph takes without its weights"


def gb(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB"


def test_too_little_memory_for_the_build_names_external_weights() -> None:
    budget, constants = budget_7b(), build_memory("fp16", EMBEDDED)
    settle(budget, "a10g", Host(budget.build_memory_bytes, budget.plan_bytes), EMBEDDED)
    assert refusal(budget, "a10g", Host(20 * GB, 100 * GB), EMBEDDED) == (
        f"predicted: the build needs {gb(budget.build_memory_bytes)} of memory ({constants.factor:g} x "
        f"14.48 GB weights - {gb(-constants.base_bytes)}), and 20.00 GB is available; use "
        f"--weights external, which needs {gb(budget_7b(weights=EXTERNAL).build_memory_bytes)} of memory, or "
        "export with --precision int8"
    )


@pytest.mark.parametrize("weights", [EMBEDDED, EXTERNAL])
def test_too_little_memory_for_any_build(weights: str) -> None:
    message = "and 0.10 GB is available; free some or build on a machine that has that much"
    said = refusal(budget_7b(), "a10g", Host(GB // 10, 100 * GB), weights)
    assert said.endswith(message)
    assert ("for 32 layers without their weights" in said) == (weights == EXTERNAL)


@pytest.mark.parametrize("precision", ["int8", "int8-weight-only", "int4", "fp8"])
def test_what_is_quantized_and_what_is_not_count_with_their_own_factors(precision: str) -> None:
    budget = predict(contract_7b(precision), 4_500_000_000, quantized_bytes=4_000_000_000)
    constants = build_memory(precision, EMBEDDED)
    weights = constants.quantized_factor * 4e9 + constants.factor * 0.5e9
    assert budget.build_memory_bytes == pytest.approx(constants.base_bytes + weights, abs=1)
    sign = "-" if constants.base_bytes < 0 else r"\+"
    assert budget.plan_bytes == 4_540_000_000
    message = (
        rf"\({constants.quantized_factor:g} x 4.00 GB quantized \+ {constants.factor:g} x 0.50 GB other "
        rf"weights {sign} {gb(abs(constants.base_bytes))}\), and 0.30 GB"
    )
    assert re.search(message, refusal(budget, "l4", Host(3 * GB // 10, 100 * GB), EMBEDDED))


def test_a_7b_in_int4_fits_a_t4_class_device() -> None:
    budget = predict(contract_7b("int4", rows=4), 4_130_000_000, quantized_bytes=3_600_000_000)
    settle(budget, "t4")


def test_the_disk_of_an_engine_with_its_weights_outside() -> None:
    budget = budget_7b(weights=EXTERNAL)
    assert budget.plan_bytes == 107_400_000
    assert budget.disk_bytes() == budget.plan_bytes
    assert budget.disk_bytes(linked=False) == budget.plan_bytes + FLOAT_BYTES
    assert budget_7b().disk_bytes(linked=False) == budget_7b().plan_bytes


def test_too_little_disk_for_the_plan() -> None:
    outside = gb(budget_7b(weights=EXTERNAL).build_memory_bytes)
    assert refusal(budget_7b(), "a10g", Host(100 * GB, 3 * GB), EMBEDDED) == (
        "predicted: the plan needs 14.52 GB of disk, and 3.00 GB is free; free some or choose another --out "
        f"than out, or use --weights external, which needs {outside} of memory"
    )
    assert refusal(budget_7b(), "a10g", Host(100 * GB, GB // 20), EMBEDDED).endswith("another --out than out")


def test_too_little_disk_for_weights_that_have_to_be_copied() -> None:
    budget, host = budget_7b(weights=EXTERNAL), Host(100 * GB, 3 * GB)
    assert settle(budget, "a10g", host, EXTERNAL) == budget
    message = "predicted: the plan and its weights need 14.59 GB of disk, and 3.00 GB is free; free some"
    assert refusal(budget, "a10g", replace(host, linked=False), EXTERNAL).startswith(message)


# ---------------------------------------------------------------- the plan that was built


@pytest.mark.parametrize(
    ("precision", "plan_bytes", "found"),
    [
        ("fp16", 1_089_000_000, None),
        ("fp16", 1_091_000_000, "and at most 0.09 GB more, the size of its weights, found 1.09 GB: TensorRT"),
        ("fp16", 911_000_000, None),
        (
            "fp16",
            909_000_000,
            "and at most 0.09 GB less, the size of its weights, found 0.91 GB: weights are",
        ),
        ("int4", 1_089_000_000, None),
        ("int4", 1_091_000_000, "expected a plan of 1.00 GB and at most 0.09 GB more, .*: TensorRT stored"),
        ("int8", 1_089_000_000, None),
        ("int8", 1_091_000_000, "expected a plan of 1.00 GB and at most 0.09 GB more, .*: TensorRT stored"),
        ("int4", 909_000_000, None),  # equal scales are stored once
    ],
)
def test_a_plan_that_does_not_hold_each_weight_once_is_refused(
    precision: str, plan_bytes: int, found: str | None
) -> None:
    budget = predict(contract_7b(precision), GB, quantized_bytes=GB // 2 if precision != "fp16" else 0)
    if found is None:
        check_plan(budget, plan_bytes)
        return
    with pytest.raises(BuildError, match=found):
        check_plan(budget, plan_bytes)
