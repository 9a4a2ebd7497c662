"""The poke probe: what it asks, and that its answers are exact on a healthy artifact and wrong on others."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.contract import Ring
from mistral_trt.errors import NonFiniteLogitsError
from mistral_trt.runtime.cache import Logits, RollingCache, RowSnapshot
from mistral_trt.runtime.engine import open_cache
from mistral_trt.validate.scenarios.poke import (
    FLOAT16_KEY_GARBAGE,
    Poke,
    PokeResult,
    Question,
    late_edge,
    poke_probe,
    poked,
    pokes,
    questions,
)
from tests.conftest import Folder
from tests.test_probes import contract

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 97, 100)]


def probe(cache: RollingCache, length: int = 100) -> list[PokeResult]:
    return list(poke_probe(cache, questions(cache.contract, length), tokens=TOKENS))


def by_name(ring: Ring, question: Question) -> dict[str, Poke]:
    return {poke.name: poke for poke in pokes(ring, question)}


def test_the_edges_of_the_window_by_hand() -> None:
    """W=8, C=4 (R=12), q=26: 19…25 are visible in slots 7 8 9 10 11 0 1, the call writes slot 2."""
    found = by_name(Ring(8, 4), Question(26, 27))
    assert found["q-W+1, the oldest in the window"] == Poke("q-W+1, the oldest in the window", (7,), True)
    assert found["q-W, just outside it"].slots == (6,)
    assert found["q-1, the token before"].slots == (1,)
    assert found["q-R+1, the oldest in the ring"].slots == (3,)
    assert found["every hidden slot"].slots == (2, 3, 4, 5, 6)
    assert "slots never written" not in found
    assert [poke.visible for poke in found.values()].count(True) == 2


def test_a_ring_that_has_not_turned_has_slots_never_written() -> None:
    found = by_name(Ring(8, 4), Question(4, 5))
    assert found["slots never written"].slots == (4, 5, 6, 7, 8, 9, 10, 11)
    assert "q-W, just outside it" not in found


def test_slots_left_by_padding_are_named() -> None:
    found = by_name(Ring(8, 4), Question(25, 26, after_padding=True))
    assert found["slots that padding wrote"].slots == (2, 3)


def test_a_window_of_one_shows_nothing_but_the_token_itself() -> None:
    assert not any(poke.visible for poke in pokes(Ring(1, 1), Question(5, 6)))


@given(window=st.integers(1, 30), chunk=st.integers(1, 12), start=st.integers(1, 200))
def test_expectations_follow_from_the_rings_arithmetic(window: int, chunk: int, start: int) -> None:
    ring = Ring(window, chunk)
    for poke in pokes(ring, Question(start, start + 1), neighbours=True):
        if poke.row == "neighbour":
            continue
        held = [ring.held_position(slot, start - 1) for slot in poke.slots]
        seen = [0 <= position <= start and position > start - window for position in held]
        assert all(seen) if poke.visible else not any(seen)


@given(window=st.integers(1, 30), chunk=st.integers(1, 12), length=st.integers(2, 200))
def test_questions_fit_the_sequence_and_the_chunks(window: int, chunk: int, length: int) -> None:
    shape = contract(window, chunk)
    asked = questions(shape, length)
    assert asked, "two positions are enough to ask something"
    for question in asked:
        assert 0 < question.start < question.stop <= length
        assert question.width <= shape.ring.room_in_chunk(question.start)


def test_questions_come_after_two_turns_where_the_sequence_does() -> None:
    assert late_edge(contract(8, 4), 100) == 24
    assert late_edge(contract(8, 4), 20) == 16
    assert late_edge(contract(8, 4), 3) == 0
    starts = {question.start for question in questions(contract(8, 4), 100)}
    assert starts == {1, 4, 24, 25, 26, 27}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_healthy_artifact_answers_exactly(onnx_folder: Folder, precision: str) -> None:
    results = probe(open_cache(onnx_folder(precision=precision)))
    assert [result for result in results if not result.passed] == []
    assert {result.poke.row for result in results} == {"own", "neighbour"}
    assert {result.question.name for result in results} >= {
        "decode at 24", "chunk 24…27", "chunk 24…25, padded to 4", "decode at 26, after padding",
    }  # fmt: skip


def test_the_probe_leaves_rows_free_and_clean(onnx_folder: Folder) -> None:
    cache = open_cache(onnx_folder())
    before = cache.free_rows
    probe(cache)
    assert cache.free_rows == before


def test_every_alteration_would_be_noticed_if_it_were_visible(onnx_folder: Folder) -> None:
    """The comparison can fail: a hidden poke moved to a visible slot is reported."""
    cache = open_cache(onnx_folder())
    row = cache.acquire()
    cache.append(row, TOKENS[:26])
    before = cache.snapshot(row)
    clean = cache.step({row: 5})[row]
    for how in ("bump", "garbage"):
        cache.restore(row, poked(before, Poke("", (7,), False, how)))
        assert np.any(cache.step({row: 5})[row] != clean)
    cache.release(row)


def test_an_overflow_is_an_answer_not_a_failure(onnx_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that should be hidden may, if it is seen, drive float16 to infinity."""
    cache = open_cache(onnx_folder())
    step = RollingCache.step
    calls = itertools.count()

    def overflow(self: RollingCache, tokens: dict[int, int]) -> dict[int, Logits]:
        if next(calls) == 1:
            raise NonFiniteLogitsError(list(tokens), {})
        return step(self, tokens)

    monkeypatch.setattr(RollingCache, "step", overflow)
    results = list(poke_probe(cache, [Question(1, 2)], tokens=TOKENS))
    assert [result.changed for result in results[:2]] == [97, 0]
    assert cache.free_rows == cache.capacity_rows


def test_alterations_touch_their_slots_in_every_ring_and_nothing_else() -> None:
    for dtype in (np.float32, np.float16):
        before = RowSnapshot(9, (np.zeros((2, 6, 4), dtype), np.zeros((2, 6, 4), dtype)))
        bumped = poked(before, Poke("", (1, 3), False))
        garbage = poked(before, Poke("", (1, 3), False, "garbage"))
        key_size = FLOAT16_KEY_GARBAGE if dtype == np.float16 else 1e4
        for i, size in ((0, key_size), (1, 1e4)):
            assert bumped.rings[i].dtype == dtype
            np.testing.assert_array_equal(np.unique(bumped.rings[i][:, [1, 3]]), [3])
            np.testing.assert_array_equal(np.unique(garbage.rings[i][:, [1, 3]]), [-size, size])
            assert not bumped.rings[i][:, [0, 2, 4, 5]].any()
            assert not garbage.rings[i][:, [0, 2, 4, 5]].any()
        assert not before.rings[0].any(), "the snapshot itself is not altered"


def test_one_changed_bit_counts() -> None:
    hidden = PokeResult(Question(1, 2), Poke("", (0,), False), 1, 97)
    shown = PokeResult(Question(1, 2), Poke("", (0,), True), 0, 97)
    assert not hidden.passed
    assert not shown.passed
