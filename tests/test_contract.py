"""The arithmetic of the ring against a ring that is really written, and the list of the graph's tensors."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.config import ModelConfig
from mistral_trt.contract import (
    POSITION_ACCURATE_LIMIT,
    POSITION_LIMIT,
    GraphContract,
    Ring,
    TensorSpec,
    plan_contract,
)
from mistral_trt.errors import ConfigError
from tests.models import TINY
from tests.rings import Call, calls, full_chunks, simulate

CONFIG = TINY
NO_WINDOW = replace(CONFIG, sliding_window=None)
rings = st.builds(Ring, st.integers(1, 40), st.integers(1, 12))


def contract(**changes: object) -> GraphContract:
    settings = {"precision": "fp16", "ring": Ring(8, 4), "max_batch_size": 4, "max_context": None, **changes}
    return GraphContract(CONFIG, **settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the ring


@given(rings)
def test_capacity_is_the_least_multiple_of_the_chunk_that_holds_window_and_chunk(ring: Ring) -> None:
    needed = ring.sliding_window + ring.prefill_chunk - 1
    assert ring.capacity % ring.prefill_chunk == 0
    assert ring.capacity - ring.prefill_chunk < needed <= ring.capacity


@pytest.mark.parametrize(
    ("window", "chunk", "capacity"),
    [(4096, 256, 4352), (8, 4, 12), (8, 1, 8), (1, 1, 1), (1, 4, 4), (5, 9, 18)],
)
def test_capacity_of_known_rings(window: int, chunk: int, capacity: int) -> None:
    assert Ring(window, chunk).capacity == capacity


def test_the_slots_of_the_docstrings() -> None:
    ring = Ring(8, 4)
    assert [ring.cache_slot(position) for position in (11, 12, 13)] == [11, 0, 1]
    assert [ring.held_position(slot, 13) for slot in (0, 1, 2, 11)] == [12, 13, 2, 11]


@given(st.integers(1, 64))
def test_with_chunks_of_one_it_is_the_rolling_buffer_of_the_paper(window: int) -> None:
    ring = Ring(window, 1)
    assert ring.capacity == window
    assert ring.cache_slot(window) == ring.cache_slot(0)


def check_simulation(ring: Ring, history: list[Call]) -> None:
    """Write positions into real slots, and compare every statement of `Ring` with what the slots hold.

    Padding of an earlier call may lie ahead of `end`, in a slot said to hold a position R before; no query
    attends to it, or the set it attends to would differ.
    """
    for call, slots in simulate(ring, history):
        assert ring.cache_slot(call.start) + call.width <= ring.capacity, "a write crosses the ring's end"
        end = call.start + call.width - 1
        said = [ring.held_position(slot, end) for slot in range(ring.capacity)]
        for held, written in zip(said, slots, strict=True):
            if written is None or written <= end:
                assert (held if held >= 0 else None) == written, "a slot holds another position than is said"
        for query in range(call.start, call.start + call.tokens):
            attended = {slots[slot] for slot, held in enumerate(said) if ring.visible(query, held)}
            wanted = set(range(max(0, query - ring.sliding_window + 1), query + 1))
            assert attended == wanted, "a query does not see exactly its window"


@given(st.data(), rings)
def test_a_ring_that_is_really_written_agrees(data: st.DataObject, ring: Ring) -> None:
    check_simulation(ring, data.draw(calls(ring)))


class TooSmall(Ring):
    @property
    def capacity(self) -> int:
        return self.prefill_chunk * -(-(self.sliding_window + self.prefill_chunk - 2) // self.prefill_chunk)


class OneWider(Ring):
    def visible(self, query: int, held: int) -> bool:
        return 0 <= held <= query and held >= query - self.sliding_window


class OneNarrower(Ring):
    def visible(self, query: int, held: int) -> bool:
        return 0 <= held <= query and held > query - self.sliding_window + 1


class NotCausal(Ring):
    def visible(self, query: int, held: int) -> bool:
        return held > query - self.sliding_window


class SlotOffByOne(Ring):
    def held_position(self, slot: int, end: int) -> int:
        return end - (end - slot - 1) % self.capacity


class ChunkPastTheEdge(Ring):
    def room_in_chunk(self, position: int) -> int:
        return self.prefill_chunk


@pytest.mark.parametrize(
    "wrong", [TooSmall, OneWider, OneNarrower, NotCausal, SlotOffByOne, ChunkPastTheEdge]
)
def test_the_simulation_finds_each_of_these_mistakes(wrong: Callable[[int, int], Ring]) -> None:
    # Window 6 and chunk 4 need 9 slots: one slot less is one chunk less.
    check_simulation(Ring(6, 4), full_chunks(Ring(6, 4)))
    with pytest.raises(AssertionError):
        check_simulation(wrong(6, 4), full_chunks(wrong(6, 4)))


@given(rings, st.integers(0, 10_000))
def test_room_in_chunk_ends_at_a_chunk_edge(ring: Ring, position: int) -> None:
    room = ring.room_in_chunk(position)
    assert 1 <= room <= ring.prefill_chunk
    assert (position + room) % ring.prefill_chunk == 0


@pytest.mark.parametrize("value", [0, -1, 4.0, True, "4", None], ids=repr)
@pytest.mark.parametrize("name", ["sliding_window", "prefill_chunk"])
def test_ring_sizes_are_positive_integers(name: str, value: object) -> None:
    sizes: dict[str, object] = {"sliding_window": 8, "prefill_chunk": 4, name: value}
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, found "):
        Ring(**sizes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the graph's tensors


def test_names_dtypes_and_shapes_of_the_graph() -> None:
    ring = ("B", 2, 12, 16)
    assert contract().inputs() == [
        TensorSpec("input_ids", "int64", ("B", "S")),
        TensorSpec("position_ids", "int64", ("B", "S")),
        TensorSpec("logits_index", "int64", ("B", "N")),
        TensorSpec("past_key_values.0.key", "float16", ring),
        TensorSpec("past_key_values.0.value", "float16", ring),
        TensorSpec("past_key_values.1.key", "float16", ring),
        TensorSpec("past_key_values.1.value", "float16", ring),
    ]
    assert contract().outputs() == [
        TensorSpec("logits", "float32", ("B", "N", 97)),
        TensorSpec("present.0.key", "float16", ring),
        TensorSpec("present.0.value", "float16", ring),
        TensorSpec("present.1.key", "float16", ring),
        TensorSpec("present.1.value", "float16", ring),
    ]


def test_each_present_pairs_with_its_past() -> None:
    for past, present in zip(contract().past(), contract().present(), strict=True):
        assert (past.dtype, past.shape) == (present.dtype, present.shape)
        assert past.name.replace("past_key_values", "present") == present.name


@pytest.mark.parametrize(
    ("precision", "dtype", "item_bytes"),
    [("fp32", "float32", 4), ("fp16", "float16", 2), ("bf16", "bfloat16", 2)],
)
def test_precision_sets_the_rings_and_never_the_logits(precision: str, dtype: str, item_bytes: int) -> None:
    made = contract(precision=precision)
    assert {spec.dtype for spec in made.past()} == {dtype}
    assert made.logits().dtype == "float32"
    elements = sum(2 * 12 * 16 for _ in made.past())
    assert made.ring_bytes_per_row == elements * item_bytes


def test_profiles_cover_decode_and_prefill() -> None:
    assert contract().profiles() == {
        "decode": ({"B": 1, "S": 1, "N": 1}, {"B": 4, "S": 1, "N": 1}, {"B": 4, "S": 1, "N": 1}),
        "prefill": ({"B": 1, "S": 1, "N": 1}, {"B": 1, "S": 4, "N": 1}, {"B": 1, "S": 4, "N": 4}),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"precision": "fp64"},
            "precision must be one of .*'bf16', 'fp16', 'fp32', .*'int8-weight-only'.*, found 'fp64'",
        ),
        ({"max_batch_size": 0}, "max_batch_size must be a positive integer, found 0"),
        ({"max_batch_size": True}, "max_batch_size must be a positive integer, found True"),
        ({"max_batch_size": "4"}, "max_batch_size must be a positive integer, found '4'"),
        ({"max_batch_size": 1.5}, "max_batch_size must be a positive integer, found 1.5"),
        ({"max_context": 0}, "max_context must be a positive integer, found 0"),
        ({"max_context": 9.0}, "max_context must be a positive integer, found 9.0"),
    ],
)
def test_limits_are_checked(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        contract(**changes)


@pytest.mark.parametrize(
    ("max_context", "position", "words"),
    [
        (None, POSITION_ACCURATE_LIMIT - 1, None),
        (
            None,
            POSITION_ACCURATE_LIMIT,
            "past 2**20, where rotary angles lose accuracy; pass allow_long=True",
        ),
        (None, POSITION_LIMIT, "past 2**24, where float32 rotary angles stop counting"),
        (16, 15, None),
        (16, 16, "max_context of 16 tokens; export again with a larger --max-context"),
    ],
)
def test_a_position_past_a_limit_is_told_why(
    max_context: int | None, position: int, words: str | None
) -> None:
    reason = contract(max_context=max_context).check_position(position)
    assert reason is None if words is None else reason is not None and words in reason
    if reason is not None:
        assert f"position {position} is past" in reason


def test_allow_long_moves_the_limit_to_where_float32_stops_counting() -> None:
    assert contract().check_position(POSITION_LIMIT - 1, allow_long=True) is None
    assert contract().check_position(POSITION_LIMIT, allow_long=True) is not None
    assert contract(max_context=8).check_position(8, allow_long=True) is not None


@given(
    st.sampled_from(["fp32", "fp16", "bf16"]), rings, st.integers(1, 64), st.none() | st.integers(1, 10**6)
)
def test_json_and_back_is_the_same_contract(precision: str, ring: Ring, batch: int, end: int | None) -> None:
    made = GraphContract(CONFIG, precision, ring, batch, end)
    assert GraphContract.from_json(json.loads(json.dumps(made.to_json())), CONFIG) == made


def test_a_capacity_that_does_not_follow_is_refused() -> None:
    with pytest.raises(ConfigError, match="ring_capacity must be 12 for W=8, C=4, found 13"):
        GraphContract.from_json({**contract().to_json(), "ring_capacity": 13}, CONFIG)


@pytest.mark.parametrize("extra", [True, False])
def test_a_contract_section_has_exactly_the_fields(extra: bool) -> None:
    data = contract().to_json()
    data = {**data, "extra": 1} if extra else {k: v for k, v in data.items() if k != "max_context"}
    with pytest.raises(ConfigError, match=r"contract: expected the fields \[.*found \["):
        GraphContract.from_json(data, CONFIG)


# ---------------------------------------------------------------- planning an export


@pytest.mark.parametrize(
    ("config", "options", "window", "max_context", "wraps"),
    [
        (CONFIG, {}, 8, None, True),
        (CONFIG, {"sliding_window": 5}, 5, None, True),
        (CONFIG, {"max_context": 100}, 8, 100, True),
        (CONFIG, {"max_context": 9}, 8, 9, True),
        (CONFIG, {"max_context": 8}, 8, 8, False),
        (CONFIG, {"max_context": 3}, 3, 3, False),
        (CONFIG, {"sliding_window": 20, "max_context": 12}, 12, 12, False),
        (NO_WINDOW, {}, 4096, 4096, False),
        (replace(NO_WINDOW, max_position_embeddings=32768), {}, 8192, 8192, False),
        (NO_WINDOW, {"max_context": 300}, 300, 300, False),
        (NO_WINDOW, {"sliding_window": 6}, 6, None, True),
    ],
)
def test_window_and_end_of_an_export(
    config: ModelConfig, options: dict[str, int], window: int, max_context: int | None, wraps: bool
) -> None:
    made = plan_contract(config, precision="fp32", prefill_chunk=4, **options)
    assert (made.ring.sliding_window, made.max_context, made.wraps) == (window, max_context, wraps)
    assert made.config.sliding_window == config.sliding_window, "the config stays the checkpoint's"


@pytest.mark.parametrize("config", [CONFIG, NO_WINDOW])
@pytest.mark.parametrize("name", ["max_context", "sliding_window", "prefill_chunk", "max_batch_size"])
def test_a_bad_option_is_named(config: ModelConfig, name: str) -> None:
    options: dict[str, int] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, found 0"):
        plan_contract(config, precision="fp32", **options)
