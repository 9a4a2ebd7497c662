"""The teacher-forced schedule: what it covers, and that it keeps the rules it is to test."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.errors import ValidationError
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.probes import (
    TEXT,
    Call,
    Scenario,
    check_length,
    default_length,
    probes,
    random_tokens,
    scenarios,
    text_tokens,
    wraps,
)
from tests.models import TINY, write_tokenizer

CONFIG = TINY


def contract(window: int, chunk: int, max_context: int | None = None) -> GraphContract:
    return GraphContract(CONFIG, "fp32", Ring(window, chunk), 1, max_context)


def names(window: int, chunk: int, length: int, max_context: int | None = None) -> dict[str, int]:
    return {probe.name: probe.position for probe in probes(contract(window, chunk, max_context), length)}


def test_probes_sit_where_rings_break() -> None:
    assert names(512, 256, 2312) == {
        "C-1": 255, "C": 256, "C+1": 257, "W-1": 511, "W": 512, "W+1": 513,
        "R-1": 767, "R": 768, "R+1": 769, "2W": 1024, "2R = 3W": 1536,
    }  # fmt: skip
    assert names(8, 4, 20)["2W"] == 16
    assert "2R = 3W" not in names(8, 4, 20)


def test_a_ring_that_never_wraps_is_probed_at_chunk_edges_and_its_end() -> None:
    assert names(40, 4, 40, max_context=40) == {"C-1": 3, "C": 4, "C+1": 5, "end": 39}
    assert wraps(contract(40, 4, max_context=40), 40) == []


def test_the_default_length_reaches_past_two_turns() -> None:
    assert default_length(contract(512, 256)) == 2312
    assert default_length(contract(4096, 256)) == 3 * 4096 + 264
    assert default_length(contract(8, 4)) == 2048 + 12
    assert default_length(contract(512, 256, max_context=700)) == 700
    assert default_length(contract(300, 16, max_context=300)) == 300


@pytest.mark.parametrize("length", [-1, 0, 1, 101])
def test_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ValidationError, match=f"from 2 to 100 for this artifact, found {length}"):
        check_length(length, contract(8, 4, max_context=100))
    assert check_length(100, contract(8, 4, max_context=100)) == 100


@given(
    window=st.integers(1, 40), chunk=st.integers(1, 20), length=st.integers(2, 200), seed=st.integers(0, 9)
)
def test_every_scenario_covers_every_position_once_in_order(
    window: int, chunk: int, length: int, seed: int
) -> None:
    planned = scenarios(contract(window, chunk), length, weights=1, seed=seed)
    assert [scenario.name for scenario in planned] == ["prefill", "decode", "padded", "stepwise"]
    for scenario in planned:
        fed = [position for call in scenario.calls for position in range(call.start, call.stop)]
        assert fed == list(range(length))


@given(
    window=st.integers(1, 40), chunk=st.integers(1, 20), length=st.integers(2, 200), seed=st.integers(0, 9)
)
def test_no_planned_call_crosses_a_chunk_edge_by_its_padding(
    window: int, chunk: int, length: int, seed: int
) -> None:
    ring = Ring(window, chunk)
    _, decode, padded, stepwise = scenarios(contract(window, chunk), length, weights=1, seed=seed)
    for call in padded.calls:
        assert call.stop - call.start <= call.pad_to <= ring.room_in_chunk(call.start)
    assert all(call.stop - call.start == 1 for call in stepwise.calls)
    assert all(call.stop - call.start == 1 for call in decode.calls if call.kind == "decode")


def test_decode_surrounds_every_probe_and_turn_with_prefill_between() -> None:
    shape = contract(512, 256)
    decode = scenarios(shape, 2312, weights=10**9, seed=0)[1]
    decoded = {call.start for call in decode.calls if call.kind == "decode"}
    for position in [*(probe.position for probe in probes(shape, 2312)), *wraps(shape, 2312)]:
        assert {position - 8, position, position + 7} <= decoded
    switches = [a.kind != b.kind for a, b in zip(decode.calls, decode.calls[1:], strict=False)]
    assert sum(switches) >= 10
    assert len(decoded) < 200, "on a real model a decoded token costs as much as a chunk of four"
    starts = [call.start % 256 for call in decode.calls if call.kind == "prefill"]
    assert any(starts), "prefill must also begin off the chunk edges"


def test_padding_is_really_there() -> None:
    padded = scenarios(contract(8, 4), 60, weights=1, seed=0)[2]
    assert any(call.pad_to > call.stop - call.start for call in padded.calls)
    assert len({call.start % 4 for call in padded.calls}) > 1


def test_stepwise_is_for_what_is_cheap() -> None:
    planned = scenarios(contract(8, 4), 2060, weights=135_000_000, seed=0)
    assert [scenario.name for scenario in planned] == ["prefill", "decode", "padded"]


def test_decoded_stretches_are_joined() -> None:
    kinds = ["decode", "decode", "prefill", "decode"]
    calls = tuple(Call(i, i + 1, kind) for i, kind in enumerate(kinds))  # type: ignore[arg-type]
    assert Scenario("", "", calls).decoded() == [(0, 2), (3, 4)]


def test_random_tokens_follow_their_seed() -> None:
    first, again = (random_tokens(length=50, vocab_size=97, seed=5) for _ in range(2))
    assert first == again
    assert first.ids != random_tokens(length=50, vocab_size=97, seed=6).ids
    assert max(first.ids) < 97
    assert "seed 5" in first.source


def test_text_is_repeated_to_the_length(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    text = tmp_path / "short.txt"
    text.write_text("abc")
    tokens = text_tokens(tokenizer, text, length=10, vocab_size=259)
    once = tokenizer.encode("abc")
    assert tokens.ids == tuple((once * 3)[:10])
    assert tokens.source == "text: short.txt, 3 times over"
    own = text_tokens(tokenizer, TEXT, length=16_000, vocab_size=259)
    assert own.source == "text: Moby-Dick, chapters 1 and 2"
    assert len(set(own.ids)) > 50
    assert tokens.is_text


def test_what_should_be_predicted_is_the_next_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    text = tmp_path / "short.txt"
    text.write_text("abc")
    read = text_tokens(tokenizer, text, length=6, vocab_size=259)
    assert read.targets.tolist() == [*read.ids[1:], -1]
    random = random_tokens(length=6, vocab_size=97, seed=0)
    assert random.targets.tolist() == [-1] * 6, "no model can predict random tokens"


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    missing, binary, text = tmp_path / "none.txt", tmp_path / "binary", tmp_path / "a.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    text.write_text("abc")
    for path in (missing, binary):
        with pytest.raises(ValidationError, match="cannot be read as UTF-8 text"):
            text_tokens(tokenizer, path, length=4, vocab_size=259)
    with pytest.raises(ValidationError, match="another model's"):
        text_tokens(tokenizer, text, length=4, vocab_size=50)


def test_the_token_hash_is_of_the_ids() -> None:
    tokens = random_tokens(length=9, vocab_size=97, seed=0)
    changed = random_tokens(length=9, vocab_size=97, seed=1)
    assert np.asarray(tokens.ids, "<i8").nbytes == 72
    assert tokens.sha256 != changed.sha256
