"""The laws of the rolling cache, on ONNX Runtime, with a ring that turns many times.

W = 8, C = 4, R = 12: a hundred tokens pass the window twelve times and the ring's end eight times.
"""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_trt.errors import BackendError, EngineMismatchError, GenerationError, NonFiniteLogitsError
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime import onnxruntime_backend
from mistral_trt.runtime.cache import Logits, RollingCache, RowSnapshot, Step, check_edge
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import (
    DeviceRings,
    OnnxRuntimeBackend,
    choose_provider,
    open_session,
)

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 97, 100)]
PRECISIONS = ("fp32", "fp16")
OnnxFolder = Callable[..., Path]


@pytest.fixture(scope="module", params=PRECISIONS)
def cache(request: pytest.FixtureRequest, onnx_folder: OnnxFolder) -> RollingCache:
    return open_cache(onnx_folder(precision=request.param, prefill_chunk=4))


@pytest.fixture(scope="module")
def exact(onnx_folder: OnnxFolder) -> RollingCache:
    return open_cache(onnx_folder(precision="fp32", prefill_chunk=4))


def run_alone(cache: RollingCache, tokens: list[int]) -> Logits:
    """Logits [T, V] of a sequence decoded token by token on a row of its own."""
    row = cache.acquire()
    try:
        return np.stack([cache.step({row: token})[row] for token in tokens])
    finally:
        cache.release(row)


def hidden_slots(cache: RollingCache, end: int) -> list[int]:
    """Slots that the query at position `end` must not see, its own write included."""
    ring = cache.contract.ring
    return [s for s in range(ring.capacity) if not ring.visible(end, ring.held_position(s, end))]


def poke(snapshot: RowSnapshot, slots: list[int], change: Callable[[np.ndarray], np.ndarray]) -> RowSnapshot:
    rings = tuple(ring.copy() for ring in snapshot.rings)
    for ring in rings:
        ring[:, slots] = change(ring[:, slots])
    return RowSnapshot(snapshot.position, rings)


@settings(max_examples=25, deadline=None)
@given(splits=st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_prefill_in_any_split_equals_decode(exact: RollingCache, splits: list[int]) -> None:
    expected = run_alone(exact, TOKENS)
    row = exact.acquire()
    pieces, start = [], 0
    for size in [*splits, len(TOKENS)]:
        if start < len(TOKENS):
            pieces.append(exact.append(row, TOKENS[start : start + size], all_logits=True))
            start += size
    exact.release(row)
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=2e-5)


def test_a_window_off_by_one_would_break_that_law(exact: RollingCache, onnx_folder: OnnxFolder) -> None:
    wider = open_cache(onnx_folder(precision="fp32", prefill_chunk=4, sliding_window=9))
    assert np.abs(run_alone(wider, TOKENS) - run_alone(exact, TOKENS)).max() > 1e-2


def test_last_logits_are_the_last_of_all(cache: RollingCache) -> None:
    row = cache.acquire()
    last = cache.append(row, TOKENS[:30])
    cache.release(row)
    row = cache.acquire()
    every = cache.append(row, TOKENS[:30], all_logits=True)
    cache.release(row)
    assert every.shape == (30, 97)
    np.testing.assert_array_equal(last, every[-1])


@pytest.mark.parametrize("length", [1, 5, 8, 11, 12, 13, 24, 37, 99])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_garbage_in_hidden_slots_changes_nothing(
    cache: RollingCache, length: int, sign: float
) -> None:
    row = cache.acquire()
    cache.append(row, TOKENS[:length])
    before = cache.snapshot(row)
    expected = cache.step({row: TOKENS[length]})[row]
    garbage = poke(before, hidden_slots(cache, length), lambda x: np.full_like(x, sign * 1e4))
    cache.restore(row, garbage)
    found = cache.step({row: TOKENS[length]})[row]
    cache.release(row)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("back", range(1, 12))
def test_poke_probe_shows_exactly_the_window(cache: RollingCache, back: int) -> None:
    """Adding 3.0 to the key and value `back` positions ago is seen if and only if back < W."""
    query = 40
    ring = cache.contract.ring
    row = cache.acquire()
    cache.append(row, TOKENS[:query])
    before = cache.snapshot(row)
    expected = cache.step({row: TOKENS[query]})[row]
    cache.restore(row, poke(before, [ring.cache_slot(query - back)], lambda x: x + 3.0))
    found = cache.step({row: TOKENS[query]})[row]
    cache.release(row)
    assert np.array_equal(found, expected) == (back >= ring.sliding_window)


@pytest.mark.parametrize("real", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 4, 8, 20, 48])
def test_padding_never_shows(cache: RollingCache, real: int, start: int) -> None:
    rest = TOKENS[start + real : start + real + 20]

    def run(pad_token: int | None) -> Logits:
        row = cache.acquire()
        if start:
            cache.append(row, TOKENS[:start])
        chunk = TOKENS[start : start + real]
        if pad_token is None:
            first = cache.append(row, chunk, all_logits=True)
        else:
            first = cache.append_padded(row, chunk, 4, pad_token=pad_token, all_logits=True)
        later = [cache.step({row: token})[row] for token in rest]
        cache.release(row)
        return np.concatenate([first, later])

    np.testing.assert_array_equal(run(pad_token=0), run(pad_token=50))
    tolerance = 2e-5 if cache.contract.precision == "fp32" else 3e-2
    np.testing.assert_allclose(run(pad_token=50), run(pad_token=None), atol=tolerance)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_poisoned_row_fails_alone_and_is_clean_for_its_next_sequence(
    cache: RollingCache, value: float
) -> None:
    expected = run_alone(cache, TOKENS[:20])
    healthy, sick = cache.acquire(), cache.acquire()
    for row in (healthy, sick):
        cache.append(row, TOKENS[:9])
    cache.restore(sick, poke(cache.snapshot(sick), [5], lambda x: np.full_like(x, value)))
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinity in row") as failure:
        cache.step({healthy: TOKENS[9], sick: TOKENS[9]})
    assert failure.value.rows == [sick]
    np.testing.assert_allclose(failure.value.healthy[healthy], expected[9], atol=3e-2)
    with pytest.raises(GenerationError, match="release it"):
        cache.step({sick: 1})
    cache.release(sick)
    assert cache.acquire() == sick
    found = np.stack([cache.step({sick: token})[sick] for token in TOKENS[:20]])
    cache.release(sick)
    cache.release(healthy)
    np.testing.assert_allclose(found, expected, atol=3e-2)


def test_nan_of_an_idle_row_does_not_outlive_its_sequence(exact: RollingCache) -> None:
    """An idle row is fed a token of its own; what that leaves behind must go with the sequence."""
    idle, busy = exact.acquire(), exact.acquire()
    exact.append(idle, TOKENS[:9])
    exact.restore(idle, poke(exact.snapshot(idle), [3], lambda x: np.full_like(x, np.nan)))
    exact.step({busy: 1})  # covers the idle row too
    exact.release(idle)
    assert exact.acquire() == idle
    assert all(np.isfinite(ring).all() for ring in exact.snapshot(idle).rings)
    exact.release(idle)
    exact.release(busy)


def test_a_poisoned_row_left_unzeroed_would_stay_sick(exact: RollingCache) -> None:
    """Why `release` zeroes: a mask hides numbers, not NaN."""
    row = exact.acquire()
    sick = poke(exact.snapshot(row), list(range(12)), lambda x: np.full_like(x, np.nan))
    exact.restore(row, RowSnapshot(0, sick.rings))
    with pytest.raises(NonFiniteLogitsError):
        exact.step({row: 1})
    exact.release(row)


def test_rows_do_not_see_each_other(exact: RollingCache) -> None:
    """Rows at different positions, some idle for a while, equal themselves alone."""
    sequences = {row: TOKENS[row * 7 : row * 7 + 60] for row in range(3)}
    alone = {row: run_alone(exact, tokens) for row, tokens in sequences.items()}
    rows = [exact.acquire() for _ in sequences]
    found: dict[int, list[Logits]] = {row: [] for row in rows}
    for row in rows:
        found[row].extend(exact.append(row, sequences[row][: 5 * row + 1], all_logits=True))
    for turn in range(1000):
        live = {r: sequences[r][exact.position(r)] for r in rows if exact.position(r) < 60}
        busy = {r: token for r, token in live.items() if (turn + r) % 3 or len(live) == 1}
        if not live:
            break
        for row, logits in exact.step(busy or live).items():
            found[row].append(logits)
    for row in rows:
        exact.release(row)
        np.testing.assert_allclose(np.stack(found[row]), alone[row], atol=2e-5)


def test_a_step_writes_its_own_slot_in_place_and_nothing_else(cache: RollingCache) -> None:
    ring = cache.contract.ring
    row = cache.acquire()
    cache.append(row, TOKENS[:30])
    before = cache.snapshot(row)
    cache.step({row: TOKENS[30]})
    after = cache.snapshot(row)
    cache.release(row)
    others = [s for s in range(ring.capacity) if s != ring.cache_slot(30)]
    for old, new in zip(before.rings, after.rings, strict=True):
        np.testing.assert_array_equal(new[:, others], old[:, others])
        assert not np.array_equal(new[:, ring.cache_slot(30)], old[:, ring.cache_slot(30)])


def test_a_snapshot_continues_bit_for_bit_in_any_row(exact: RollingCache) -> None:
    first = exact.acquire()
    exact.append(first, TOKENS[:33])
    snapshot = exact.snapshot(first)
    expected = exact.append(first, TOKENS[33:60], all_logits=True)
    second = exact.acquire()
    exact.restore(second, snapshot)
    np.testing.assert_array_equal(exact.append(second, TOKENS[33:60], all_logits=True), expected)
    exact.release(first)
    exact.release(second)


@pytest.mark.parametrize(("row", "batch"), [(0, 1), (1, 2), (2, 4), (3, 4)])
def test_batch_is_the_smallest_power_of_two_that_covers(exact: RollingCache, row: int, batch: int) -> None:
    assert exact.batch_for(row) == batch


def test_batch_never_exceeds_the_artifact(onnx_folder: OnnxFolder) -> None:
    odd = open_cache(onnx_folder(precision="fp32", prefill_chunk=4, max_batch_size=3))
    assert [odd.batch_for(row) for row in range(3)] == [1, 2, 3]
    rows = [odd.acquire() for _ in range(3)]
    logits = odd.step(dict.fromkeys(rows, 5))
    np.testing.assert_allclose(logits[2], logits[0], atol=2e-5)


def test_lowest_free_row_comes_first_and_rows_run_out(exact: RollingCache) -> None:
    assert [exact.acquire() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(GenerationError, match="1 row.s. wanted, 0 of 4 free"):
        exact.acquire()
    exact.release(1)
    assert exact.free_rows == 1
    assert exact.acquire() == 1
    for row in range(4):
        exact.release(row)


@pytest.mark.parametrize(("position", "count"), [(5, 4), (11, 2), (3, 2), (0, 5)])
def test_a_call_across_a_chunk_edge_is_refused(exact: RollingCache, position: int, count: int) -> None:
    with pytest.raises(GenerationError, match="crosses the chunk edge"):
        check_edge(exact.contract, position, count)
    check_edge(exact.contract, position, count - 1)


def test_padding_across_a_chunk_edge_is_refused(exact: RollingCache) -> None:
    row = exact.acquire()
    exact.append(row, TOKENS[:2])
    with pytest.raises(GenerationError, match="so 2 fit"):
        exact.append_padded(row, [1], 3)
    exact.release(row)


@pytest.mark.parametrize("tokens", [[], [97], [-1], [3, 1000]])
def test_tokens_outside_the_vocabulary_are_refused(exact: RollingCache, tokens: list[int]) -> None:
    row = exact.acquire()
    with pytest.raises(GenerationError, match="token"):
        exact.append(row, tokens)
    assert exact.position(row) == 0
    exact.release(row)


def test_a_row_without_a_sequence_is_refused(exact: RollingCache) -> None:
    for call in (exact.position, exact.release, exact.snapshot, lambda r: exact.append(r, [1])):
        with pytest.raises(GenerationError, match="row 3 has no sequence"):
            call(3)


def test_a_model_without_a_window_ends_at_max_context(onnx_folder: OnnxFolder) -> None:
    cache = open_cache(onnx_folder(precision="fp32", prefill_chunk=4, sliding_window=None, max_context=16))
    assert not cache.contract.wraps
    row = cache.acquire()
    with pytest.raises(GenerationError, match="max_context of 16 tokens"):
        cache.append(row, TOKENS[:17])
    cache.append(row, TOKENS[:16])
    with pytest.raises(GenerationError, match="larger --max-context"):
        cache.step({row: 1})


def test_positions_beyond_float32_angles_are_refused(exact: RollingCache) -> None:
    row = exact.acquire()
    state = exact.snapshot(row)
    exact.restore(row, RowSnapshot(2**20, state.rings))
    with pytest.raises(GenerationError, match="pass allow_long=True"):
        exact.step({row: 1})
    exact.step({row: 1}, allow_long=True)
    exact.restore(row, RowSnapshot(2**24, state.rings))
    with pytest.raises(GenerationError, match=r"2\*\*24"):
        exact.step({row: 1}, allow_long=True)
    exact.release(row)


def test_bf16_cannot_run_on_a_cpu_and_says_what_to_do(onnx_folder: OnnxFolder) -> None:
    with pytest.raises(EngineMismatchError, match="--precision fp16 or fp32"):
        open_cache(onnx_folder(precision="bf16", prefill_chunk=4))


def test_a_graph_of_another_contract_is_refused(onnx_folder: OnnxFolder, tmp_path: Path) -> None:
    small = onnx_folder(precision="fp32", prefill_chunk=4)
    contract = read_manifest(small, "onnx").contract
    large = replace(contract, config=replace(contract.config, num_hidden_layers=3))
    with pytest.raises(EngineMismatchError, match="export the checkpoint again"):
        OnnxRuntimeBackend(small / "model.onnx", large)
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(EngineMismatchError, match="cannot load"):
        OnnxRuntimeBackend(broken, large)


# ---------------------------------------------------------------- copies, and steps that fail


def test_a_copied_row_goes_on_bit_for_bit_and_apart(exact: RollingCache) -> None:
    source, target = exact.acquire_rows(2)
    exact.append(source, TOKENS[:33])
    exact.copy(source, target)
    assert exact.position(target) == 33
    expected = exact.append(source, TOKENS[33:60], all_logits=True)
    np.testing.assert_array_equal(exact.append(target, TOKENS[33:60], all_logits=True), expected)
    exact.append(source, TOKENS[60:70])
    assert exact.position(target) == 60
    exact.release(source)
    exact.release(target)


def test_a_copy_takes_along_what_its_next_token_must_overwrite(exact: RollingCache) -> None:
    """NaN in the slot of the next position is hidden; a row that holds it is zeroed before reuse."""
    busy, idle, twin = exact.acquire_rows(3)
    exact.append(idle, TOKENS[:9])
    exact.restore(idle, poke(exact.snapshot(idle), [3], lambda x: np.full_like(x, np.nan)))
    exact.step({twin: 1, busy: 1})
    exact.copy(idle, twin)
    kept = exact.snapshot(idle)
    assert kept.tainted
    exact.release(idle)
    exact.release(twin)
    (again,) = exact.acquire_rows(1)
    exact.restore(again, kept)
    exact.release(again)
    exact.release(busy)
    for row in exact.acquire_rows(3):
        assert all(np.isfinite(ring).all() for ring in exact.snapshot(row).rings)
    for row in range(3):
        exact.release(row)


class Failing:
    """A backend that fails once, after it has spoilt what the step was to write."""

    def __init__(self, cache: RollingCache) -> None:
        self._backend = cache._backend
        self.contract = cache.contract
        self.fails = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, step: Step) -> Logits:
        logits = self._backend.run(step)
        if not self.fails:
            return logits
        self.fails = False
        for b, position in enumerate(step.position_ids[:, 0]):
            rings = self._backend.read_row(step.first_row + b)
            for ring in rings:
                ring[:, self.contract.ring.cache_slot(int(position))] = np.nan
            self._backend.write_row(step.first_row + b, rings)
        raise RuntimeError("lost")


def test_a_failed_step_spoils_the_rows_it_fed_and_no_other(exact: RollingCache) -> None:
    failing = Failing(exact)
    cache = RollingCache(failing)
    fed, idle = cache.acquire_rows(2)
    failing.fails = False
    for row in (fed, idle):
        cache.append(row, TOKENS[:9])
    state = cache.snapshot(idle)
    expected = cache.append(idle, TOKENS[9:20])
    cache.restore(idle, state)
    failing.fails = True
    with pytest.raises(RuntimeError, match="lost"):
        cache.decode({fed: 1}, 2)
    with pytest.raises(GenerationError, match="produced NaN or infinity, or its step failed; release it"):
        cache.step({fed: 1})
    np.testing.assert_array_equal(cache.append(idle, TOKENS[9:20]), expected)
    cache.release(fed)
    cache.release(idle)
    for row in cache.acquire_rows(2):
        assert all(np.isfinite(ring).all() for ring in cache.snapshot(row).rings)
        cache.release(row)


def test_a_row_that_cannot_be_zeroed_ends_everything(exact: RollingCache) -> None:
    failing = Failing(exact)
    cache = RollingCache(failing)
    row = cache.acquire()
    with pytest.raises(RuntimeError):
        cache.step({row: 1})
    failing.write_row = lambda *_: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="row 0 could not be zeroed: division") as caught:
        cache.release(row)
    assert caught.value.fatal
    del failing.write_row
    cache.release(row)


def test_logits_are_the_callers_own(exact: RollingCache) -> None:
    row = exact.acquire()
    first = exact.append(row, TOKENS[:1])
    kept = first.copy()
    second = exact.step({row: TOKENS[1]})[row]
    kept_second = second.copy()
    exact.step({row: TOKENS[2]})
    exact.release(row)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(second, kept_second)


# ---------------------------------------------------------------- ONNX Runtime


@pytest.mark.slow
def test_a_decode_step_allocates_nothing_of_a_rings_size(onnx_folder: OnnxFolder) -> None:
    """Python and numpy: what a step takes at its peak is far less than one ring of one row."""
    cache = open_cache(onnx_folder(precision="fp32", prefill_chunk=256, sliding_window=4096))
    row = cache.acquire()
    cache.append(row, TOKENS[:2])
    cache.step({row: 1})
    ring_bytes = cache.contract.ring_bytes_per_row // (2 * cache.contract.config.num_hidden_layers)
    tracemalloc.start()
    for token in TOKENS[:20]:
        cache.step({row: token})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ring_bytes > 500_000 and peak < 20_000


def test_rings_in_onnxruntimes_own_memory_give_the_same(onnx_folder: OnnxFolder) -> None:
    """What CUDA would hold on the device, held on the CPU: the same calls, the same bits."""
    folder = onnx_folder(precision="fp32", prefill_chunk=4)
    host, device = open_cache(folder), open_cache(folder)
    backend = device._backend
    assert isinstance(backend, OnnxRuntimeBackend)
    backend._rings = DeviceRings(device.contract, "cpu")
    for cache in (host, device):
        cache.acquire_rows(3)
    found = []
    for cache in (host, device):
        logits = [cache.append(1, TOKENS[:30], all_logits=True)]
        cache.copy(1, 2)
        state = cache.snapshot(1)
        logits.append(cache.step({1: 5, 2: 6})[2][None])
        cache.restore(0, state)
        logits.append(cache.append(0, TOKENS[30:50], all_logits=True))
        backend_rows = [ring for row in range(3) for ring in cache._backend.read_row(row)]
        found.append((np.concatenate(logits), backend_rows))
        cache._backend.write_row(0, None)
        assert not any(ring.any() for ring in cache._backend.read_row(0))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_provider_that_is_not_there_is_refused(
    onnx_folder: OnnxFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = onnx_folder(precision="fp32", prefill_chunk=4)
    contract = read_manifest(folder).contract
    for provider, words in (
        ("cuda", "has no CUDAExecutionProvider .*pip install onnxruntime-gpu"),
        ("rocm", 'must be "auto", "cpu" or "cuda"'),
    ):
        with pytest.raises(EngineMismatchError, match=words):
            OnnxRuntimeBackend(folder / "model.onnx", contract, provider=provider)
    assert choose_provider("auto") == "cpu"
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert choose_provider("auto") == "cuda"


def test_a_provider_that_cannot_start_is_refused(
    onnx_folder: OnnxFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime then goes on without it and only logs so."""
    monkeypatch.setitem(onnxruntime_backend.PROVIDERS, "cuda", ["CUDAExecutionProvider"])
    made = ort.InferenceSession

    def without(path: str, options: Any, providers: list[str]) -> Any:
        return made(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", without)
    path = onnx_folder(precision="fp32", prefill_chunk=4) / "model.onnx"
    with pytest.raises(EngineMismatchError, match='cannot start it here.*or pass provider="cpu"'):
        open_session(path, None, provider="cuda")


def test_a_failure_of_onnxruntime_is_a_backends(onnx_folder: OnnxFolder) -> None:
    cache = open_cache(onnx_folder(precision="fp32", prefill_chunk=4))
    backend = cache._backend
    wrong = np.full((1, 2), 10**6)
    with pytest.raises(BackendError, match="ONNX Runtime failed in a step") as caught:
        backend.run(Step(wrong, np.array([[0, 1]]), np.array([[0]]), 0))
    assert not caught.value.fatal
    assert backend.ready
    cache.close()
    cache.close()
    assert not backend.ready
    with pytest.raises(BackendError, match="was closed") as caught:
        backend.run(Step(wrong, wrong, wrong, 0))
    assert caught.value.fatal
