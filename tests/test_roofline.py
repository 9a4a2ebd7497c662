"""Ceilings of tokens/s against figures worked out by hand."""

from dataclasses import replace

import pytest

from mistral_trt.contract import plan_contract
from mistral_trt.engines.gpu import find_gpu, load_catalogue
from mistral_trt.engines.planning.budget import Budget, predict
from mistral_trt.engines.planning.roofline import (
    ceilings,
    decode_ceiling,
    prompt_seconds,
    read_bytes,
    token_seconds,
)
from mistral_trt.engines.planning.sizes import quantized_linear_bytes
from tests.test_budget import FLOAT_BYTES, MISTRAL_7B

LINEARS = 13_958_643_712  # bytes of a 7B's linears in float16


def budget_7b(precision: str = "fp16", rows: int = 1, chunk: int = 1, tied: bool = False) -> Budget:
    """chunk = 1 gives R = W = 4096: the paper's ring, 0.54 GB a row."""
    config = replace(MISTRAL_7B, tie_word_embeddings=tied)
    contract = plan_contract(config, precision=precision, prefill_chunk=chunk, max_batch_size=rows)
    if precision in ("fp16", "bf16"):
        return predict(contract, FLOAT_BYTES)
    quantized = quantized_linear_bytes(config, "int8" if precision == "fp8" else precision)
    return predict(contract, FLOAT_BYTES - LINEARS + quantized, quantized_bytes=quantized)


@pytest.mark.parametrize(
    ("precision", "read", "tokens"), [("fp16", 14.22, 41), ("int8", 7.24, 77), ("int4", 3.86, 136)]
)
def test_decode_of_a_7b_on_an_a10g(precision: str, read: float, tokens: int) -> None:
    budget = budget_7b(precision)
    assert budget.ring_bytes_per_row == 536_870_912
    assert read_bytes(budget, 0) / 1e9 == pytest.approx(read, abs=0.01)
    found = ceilings(budget, find_gpu("a10g"))
    assert round(found.decode_tokens_per_s) == tokens
    assert found.decode_all_rows_tokens_per_s == found.decode_tokens_per_s


def test_rows_share_the_weights_and_not_the_rings() -> None:
    one, eight = (ceilings(budget_7b(rows=rows), find_gpu("a10g")) for rows in (1, 8))
    assert one.decode_tokens_per_s == eight.decode_tokens_per_s
    expected = 8 * 600e9 / (read_bytes(budget_7b(), 0) + 8 * 536_870_912)
    assert eight.decode_all_rows_tokens_per_s == pytest.approx(expected)
    assert one.decode_tokens_per_s < eight.decode_all_rows_tokens_per_s < 8 * one.decode_tokens_per_s


def test_a_tied_embedding_is_read_as_the_output_layer() -> None:
    assert read_bytes(budget_7b(tied=True), 1) - read_bytes(budget_7b(), 1) == 32000 * 4096 * 2


def test_prefill_is_bound_by_the_matrix_units_when_chunks_are_long() -> None:
    gpu, long, short = find_gpu("a10g"), budget_7b(chunk=256), budget_7b(chunk=8)
    operations = LINEARS + 4 * 32 * 32 * 128 * 4096
    assert token_seconds(long, gpu) == pytest.approx(operations / 70e12)
    assert ceilings(long, gpu).prefill_tokens_per_s == pytest.approx(70e12 / operations)
    assert ceilings(short, gpu).prefill_tokens_per_s == pytest.approx(8 * 600e9 / read_bytes(short, 1))


def test_a_prompt_takes_as_long_as_its_chunks() -> None:
    gpu, budget = find_gpu("a10g"), budget_7b(chunk=256)
    keys = sum(range(1, 257))
    attention = 4 * 32 * 32 * 128 * keys
    assert prompt_seconds(budget, gpu, 256) == pytest.approx((256 * LINEARS + attention) / 70e12)
    reading = read_bytes(budget, 1) / 600e9
    assert prompt_seconds(budget, gpu, 1) == pytest.approx(reading), "one token is bound by the weights"
    assert prompt_seconds(budget, gpu, 257) == pytest.approx(prompt_seconds(budget, gpu, 256) + reading)


def test_no_prompt_is_faster_than_its_tokens_at_the_ceiling_once_the_window_is_full() -> None:
    gpu, budget = find_gpu("a10g"), budget_7b(chunk=256)
    seconds = prompt_seconds(budget, gpu, 8192) - prompt_seconds(budget, gpu, 4096)
    assert 4096 / seconds == pytest.approx(ceilings(budget, gpu).prefill_tokens_per_s)
    assert prompt_seconds(budget, gpu, 4096) < seconds, "its first tokens have less to attend to"


def test_decode_ceilings_are_those_of_the_manifest() -> None:
    budget, gpu = budget_7b(rows=8), find_gpu("a10g")
    found = ceilings(budget, gpu)
    assert decode_ceiling(budget, gpu, 1) == found.decode_tokens_per_s
    assert decode_ceiling(budget, gpu, 8) == found.decode_all_rows_tokens_per_s
    assert found.decode_tokens_per_s < decode_ceiling(budget, gpu, 4) < found.decode_all_rows_tokens_per_s


@pytest.mark.parametrize(
    ("precision", "peak"),
    [("bf16", 121), ("int4", 121), ("int8-weight-only", 121), ("int8", 242), ("fp8", 242)],
)
def test_the_peak_is_that_of_what_multiplies(precision: str, peak: float) -> None:
    attention = 4 * 32 * 32 * 128 * 4096 / 121e12
    found = token_seconds(budget_7b(precision), find_gpu("l4"))
    assert found == pytest.approx(LINEARS / (peak * 1e12) + attention)


def test_no_ceiling_is_passed_by_another() -> None:
    for gpu in load_catalogue().values():
        for rows in (1, 4, 64, 1024):
            found = ceilings(budget_7b(rows=rows, chunk=256), gpu)
            assert (
                found.decode_tokens_per_s
                <= found.decode_all_rows_tokens_per_s
                <= 1 / token_seconds(budget_7b(), gpu)
            )
            assert found.to_json() == {
                "decode_tokens_per_s": round(found.decode_tokens_per_s, 1),
                "decode_all_rows_tokens_per_s": round(found.decode_all_rows_tokens_per_s, 1),
                "prefill_tokens_per_s": round(found.prefill_tokens_per_s, 1),
            }
