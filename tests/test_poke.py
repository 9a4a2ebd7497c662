"""The poke probe: what it asks, and that its answers are exact on a healthy artifact and wrong on others."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.contract import Ring
from mistral_trt.errors import NonFiniteLogitsError
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.runtime.cache import Logits, RollingCache, RowSnapshot
from mistral_trt.runtime.engine import open_cache
from mistral_trt.validate.scenarios.poke import (
    FLOAT16_KEY_GARBAGE,
    GARBAGE,
    Poke,
    PokeResult,
    Question,
    late_edge,
    layer_pokes,
    poke_probe,
    poked,
    pokes,
    questions,
)
from tests.conftest import Folder
from tests.planted_graph import wider_after_the_first
from tests.planted_runtime import chunks_to_row_0, idle_row_overwritten
from tests.test_probes import contract

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 97, 100)]


def probe(cache: RollingCache, length: int = 100) -> list[PokeResult]:
    return list(poke_probe(cache, questions(cache.contract, length), tokens=TOKENS))


def by_name(ring: Ring, question: Question) -> dict[str, Poke]:
    return {poke.name: poke for poke in pokes(ring, question)}


def test_the_edges_of_the_window_by_hand() -> None:
    """W=8, C=4 (R=12), q=26: 19…25 are visible in slots 7 8 9 10 11 0 1, the call writes slot 2."""
    found = by_name(Ring(8, 4), Question(26, 27))
    oldest = "q-W+1, the oldest in the window"
    assert found[oldest] == Poke(oldest, (7,), True, "values")
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
    assert starts == {1, 4, 8, 12, 24, 25, 26, 27}


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


def test_the_last_step_is_asked_about_every_layer_and_about_the_row_beside(onnx_folder: Folder) -> None:
    results = probe(open_cache(onnx_folder()))
    last = max(result.question.start for result in results)
    by_layer = [result for result in results if result.poke.layer is not None]
    assert [result.poke.layer for result in by_layer if result.question.width == 1] == [0, 1]
    beside = [result for result in results if "idled" in result.poke.name]
    assert len(beside) == 1
    assert all(result.passed for result in (*by_layer, *beside))
    assert {result.question for result in (*by_layer, *beside) if result.question.width == 1} == {
        Question(last, last + 1)
    }


def test_a_layer_is_asked_only_where_something_is_about_to_leave_its_window() -> None:
    assert layer_pokes(contract(8, 4), Question(6, 7)) == []
    assert [poke.slots for poke in layer_pokes(contract(8, 4), Question(7, 8))] == [(0,), (0,)]
    assert layer_pokes(contract(1, 1), Question(7, 8)) == []


def test_a_poke_of_one_layer_leaves_keys_and_other_layers() -> None:
    before = RowSnapshot(9, tuple(np.zeros((2, 6, 4), np.float16) for _ in range(4)))
    after = poked(before, Poke("", (1,), True, "values", layer=1))
    assert [bool(ring.any()) for ring in after.rings] == [False, False, False, True]
    assert np.abs(after.rings[3][:, 1]).min() == GARBAGE


def test_an_idle_row_that_is_overwritten_is_noticed(
    onnx_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_row_overwritten(monkeypatch)
    wrong = [result.poke.name for result in probe(open_cache(onnx_folder())) if not result.passed]
    assert wrong == ["a step of another row, through which the row idled"]


def test_a_chunk_that_lands_in_another_row_is_noticed_without_a_window(
    onnx_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_to_row_0(monkeypatch)
    cache = open_cache(onnx_folder(max_context=8))
    wrong = [result for result in probe(cache, 8) if not result.passed]
    assert ("chunk 4…7", "q-1, the token before") in {(one.question.name, one.poke.name) for one in wrong}


def test_the_window_of_a_chunks_last_token_by_hand() -> None:
    """W=8, C=4 (R=12), tokens 24…27: the last sees 20…27, so 20 (slot 8) and not 19 (slot 7)."""
    inside, outside = layer_pokes(contract(8, 4), Question(24, 28))
    assert (inside.slots, inside.visible, outside.slots, outside.visible) == ((8,), True, (7,), False)
    assert {(poke.layer, poke.of_last) for poke in (inside, outside)} == {(1, True)}
    assert layer_pokes(contract(2, 4), Question(24, 28)) == [], "what it sees was all written by the call"


@pytest.mark.parametrize(
    ("wider", "wrong"), [(1, "just outside"), pytest.param(-1, "the oldest in", marks=pytest.mark.slow)]
)
def test_a_window_that_is_wrong_from_a_chunks_second_token_on_is_noticed(
    tmp_path: Path, tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch, wider: int, wrong: str
) -> None:
    """The chunk's first token and every step see what they should."""
    wider_after_the_first(wider)(monkeypatch)
    export_checkpoint(
        tiny_checkpoint(), tmp_path / "onnx", precision="fp32", prefill_chunk=4, max_batch_size=1
    )
    results = probe(open_cache(tmp_path / "onnx"))
    failed = {result.poke.name for result in results if not result.passed}
    assert failed == {f"{wrong} the last token's window"}
