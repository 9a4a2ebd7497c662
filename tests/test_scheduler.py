"""The scheduler's laws, on a backend that is arithmetic: who gets which row when, and what an error touches.

W = 8, C = 4, R = 12. `TokenBackend` records its calls, and a `Gate` holds them up, so that what happens
between two calls is the test's to say.
"""

import asyncio
import gc
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistral_trt.errors import (
    BackendError,
    EngineClosedError,
    GenerationError,
    NonFiniteLogitsError,
    QueueFullError,
)
from mistral_trt.runtime import Engine, SamplingParams, Stream
from mistral_trt.runtime.backend import Logits, Step
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.input_processor import InputProcessor
from mistral_trt.runtime.request import Sample
from mistral_trt.runtime.rings.parked_rings import ParkedRings
from mistral_trt.runtime.rings.ring_store import RingStore
from mistral_trt.runtime.scheduling.continuous_batch import ContinuousBatch
from tests.token_backend import (
    Call,
    Gate,
    TokenBackend,
    eventually,
    expected,
    token_contract,
    token_engine,
    tokens_of,
)

NAME = "mistral-trt-scheduler"


def greedy(count: int, **others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **others)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 61, length)]


@pytest.fixture
def backend() -> TokenBackend:
    return TokenBackend(token_contract(4))


@pytest.fixture
def engine(backend: TokenBackend) -> Iterator[Engine]:
    with token_engine(backend) as engine:
        yield engine


@pytest.fixture
def gate(backend: TokenBackend) -> Iterator[Gate]:
    gate = Gate()
    backend.before = gate
    yield gate
    gate.open()


def idle(engine: Engine) -> Callable[[], bool]:
    return lambda: engine.metrics().active_rows == 0 and engine.metrics().queue_length == 0


# ---------------------------------------------------------------- one thread, and what it computes


def test_a_stream_is_what_the_model_says(engine: Engine, backend: TokenBackend) -> None:
    for length in (1, 3, 4, 5, 8, 11, 12, 13, 40):
        pieces = list(engine.stream(prompt(length), greedy(30)))
        assert tokens_of(pieces) == expected(backend.contract, prompt(length), 30)
        assert [p.finish_reason for p in pieces] == [None] * 30 + ["length"]


def test_that_law_sees_a_token_in_the_wrong_slot(engine: Engine, backend: TokenBackend) -> None:
    def shifted(step: Step) -> None:
        step.position_ids[:] += step.position_ids == 9

    backend.before = shifted
    assert tokens_of(engine.stream(prompt(5), greedy(30))) != expected(backend.contract, prompt(5), 30)


def test_one_thread_runs_the_backend_and_starts_at_the_first_request(backend: TokenBackend) -> None:
    before = threading.active_count()
    engine = token_engine(backend)
    assert threading.active_count() == before
    engine.generate([prompt(3), prompt(9)], greedy(5))
    assert threading.active_count() == before + 1
    workers = [threading.Thread(target=lambda: engine.generate([prompt(2)], greedy(5))) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert backend.threads == {NAME}
    engine.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("part", [RollingCache, ContinuousBatch, RingStore, ParkedRings, Sample])
def test_what_is_the_schedulers_threads_own_is_touched_by_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: type
) -> None:
    """Every method runs on it, but what the rules name: to look at metrics, and to make things."""
    elsewhere = {"__init__", "usage", "_held", "_filed", "capacity_rows"}
    threads: dict[str, set[str]] = {}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            threads.setdefault(name, set()).add(threading.current_thread().name)
            return method(*arguments, **named)

        return run

    for name, method in list(vars(part).items()):
        if inspect.isfunction(method) and name not in elsewhere:
            monkeypatch.setattr(part, name, watched(name, method))
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        sessions = [engine.session() for _ in range(4)]
        for session in sessions * 2:
            list(session.stream([1, 2], greedy(3)))
            engine.metrics()
        sessions[0].fork()
        sessions[1].save(tmp_path / "saved")
        engine.restore_session(tmp_path / "saved").close()
        engine.stream(prompt(3), greedy(100)).close()
        engine.generate([prompt(3)] * 3, greedy(3, n=2))
    assert len(threads) >= 3 and set().union(*threads.values()) == {NAME}


@pytest.mark.alone
def test_an_idle_engine_sleeps(engine: Engine) -> None:
    engine.generate([prompt(3)], greedy(5))
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


# ---------------------------------------------------------------- rows and batches


def test_sequences_take_the_lowest_free_row(engine: Engine, backend: TokenBackend, gate: Gate) -> None:
    streams = [engine.stream(prompt(2, seed), greedy(20)) for seed in range(3)]
    gate.let(9)
    for stream in streams:
        next(stream)
    streams[1].close()
    gate.let(2)
    eventually(lambda: engine.metrics().active_rows == 2)
    backend.calls.clear()
    late = engine.stream(prompt(6), greedy(2))
    gate.open()
    list(late)
    assert {call.first_row for call in backend.calls if call.kind == "prefill"} == {1}


@pytest.mark.parametrize(("rows", "batches"), [(8, [1, 2, 4, 4, 8, 8, 8, 8]), (3, [1, 2, 3])])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_batch_is_the_smallest_that_covers_the_highest_row(
    rows: int, batches: list[int], fixed: bool
) -> None:
    backend = TokenBackend(token_contract(rows))
    with token_engine(backend, fixed_batch=fixed) as engine:
        for count, batch in enumerate(batches, 1):
            backend.calls.clear()
            backend.before = gate = Gate()
            streams = [engine.stream(prompt(2, seed), greedy(40)) for seed in range(count)]
            gate.open()  # all of them are there before the first has ended
            assert [len(tokens_of(stream)) for stream in streams] == [40] * count
            used = {call.batch for call in backend.calls if call.kind == "decode"}
            assert max(used) == (rows if fixed else batch)
            assert used == {rows} if fixed else used <= set(batches)


def test_samples_share_one_prefill_and_part_then(engine: Engine, backend: TokenBackend) -> None:
    params = SamplingParams(max_tokens=12, n=3, temperature=1.5, seed=5)
    outputs = engine.generate([prompt(10)], params)
    assert [output.index for output in outputs] == [0, 1, 2]
    assert len({output.tokens for output in outputs}) == 3
    assert sum(len(call.tokens[0]) for call in backend.calls if call.kind == "prefill") == 10
    assert backend.copied == [(0, 1), (0, 2)]
    single = SamplingParams(max_tokens=12, temperature=1.5, seed=5)
    assert engine.generate([prompt(10)], single)[0].tokens == outputs[0].tokens
    same = engine.generate([prompt(10)], greedy(12, n=4))
    assert {output.tokens for output in same} == {tuple(expected(backend.contract, prompt(10), 12))}


def test_outputs_come_in_the_order_of_prompts_and_samples(engine: Engine) -> None:
    params = SamplingParams(max_tokens=6, n=2, temperature=1.0, seed=1)
    prompts = [prompt(3, seed) for seed in range(5)]
    outputs = engine.generate(prompts, params)
    assert [output.index for output in outputs] == [0, 1] * 5
    assert outputs == [output for p in prompts for output in engine.generate([p], params)]


# ---------------------------------------------------------------- the order of things


def chunks_between_steps(calls: Sequence[Call]) -> int:
    """The most prefill calls that lie between two decode calls."""
    most = run = 0
    for call in calls:
        run = run + 1 if call.kind == "prefill" else 0
        most = max(most, run)
    return most


def interleaved(engine: Engine, backend: TokenBackend, gate: Gate) -> list[Call]:
    """The calls while one stream runs and three long prompts arrive."""
    running = engine.stream(prompt(1), greedy(200))
    gate.wait()
    others = [engine.stream(prompt(40, seed), greedy(5)) for seed in (1, 2, 3)]
    gate.open()
    for stream in others:
        list(stream)
    calls = list(backend.calls)
    running.close()
    return calls


def test_a_running_stream_waits_for_one_chunk_and_one_step_at_most(
    engine: Engine, backend: TokenBackend, gate: Gate
) -> None:
    calls = interleaved(engine, backend, gate)
    assert sum(call.kind == "prefill" for call in calls) == 30
    assert chunks_between_steps(calls) == 1


def test_that_bound_sees_a_scheduler_that_prefills_without_pause(
    engine: Engine, backend: TokenBackend, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ContinuousBatch.prefill

    def all_of_it(self: ContinuousBatch) -> None:
        while self._prefilling:
            once(self)

    monkeypatch.setattr(ContinuousBatch, "prefill", all_of_it)
    assert chunks_between_steps(interleaved(engine, backend, gate)) >= 10


def test_chunks_go_to_the_oldest_and_run_back_to_back_when_nothing_decodes(
    engine: Engine, backend: TokenBackend, gate: Gate
) -> None:
    first = engine.stream(prompt(12), greedy(1))
    gate.wait()
    second = engine.stream(prompt(12, 1), greedy(1))
    gate.open()
    list(first), list(second)
    assert [(call.kind, call.first_row) for call in backend.calls] == [("prefill", 0)] * 3 + [
        ("prefill", 1)
    ] * 2 + [("prefill", 1)] * (len(backend.calls) - 5)
    assert len(backend.calls) == 6


def test_chunks_end_at_chunk_edges(engine: Engine, backend: TokenBackend) -> None:
    list(engine.stream(prompt(11), greedy(1)))
    assert [len(call.tokens[0]) for call in backend.calls] == [4, 4, 3]


def test_nobody_overtakes(gate: Gate) -> None:
    """One row is free, the first in the queue needs two: the one behind it waits although it would fit."""
    backend = TokenBackend(token_contract(2))
    backend.before = gate
    order: list[str] = []

    def seen(name: str) -> Callable[[Sequence[int], Logits], Logits]:
        def processor(tokens: Sequence[int], logits: Logits) -> Logits:
            order.append(name)
            return logits

        return processor

    with token_engine(backend) as engine:
        running = engine.stream(prompt(2), greedy(8))
        gate.wait()
        both = engine.stream(prompt(2, 1), greedy(3, n=2, logits_processors=(seen("both"),)))
        single = engine.stream(prompt(2, 2), greedy(3, logits_processors=(seen("single"),)))
        gate.let(4)
        eventually(lambda: len(backend.calls) >= 4)
        assert engine.metrics().active_rows == 1 and engine.metrics().queue_length == 2
        gate.open()
        list(single), list(both), list(running)
    assert order == ["both"] * 6 + ["single"] * 3


def test_a_slow_consumer_holds_nobody_up(engine: Engine, backend: TokenBackend) -> None:
    unread = engine.stream(prompt(2), greedy(50))
    fast = tokens_of(engine.stream(prompt(3), greedy(50)))
    assert fast == expected(backend.contract, prompt(3), 50)
    assert tokens_of(unread) == expected(backend.contract, prompt(2), 50)


# ---------------------------------------------------------------- cancelling


def test_a_cancelled_request_frees_its_row_at_the_next_step(
    engine: Engine, backend: TokenBackend, gate: Gate
) -> None:
    streams = [engine.stream(prompt(1, seed), greedy(50)) for seed in range(2)]
    gate.let(6)
    for stream in streams:
        next(stream)
    another = threading.Thread(target=streams[0].cancel)
    another.start()
    another.join(20)
    gate.let(1)
    eventually(lambda: engine.metrics().active_rows == 1)
    gate.open()
    pieces = list(streams[0])
    assert pieces[-1].finish_reason == "cancelled" and pieces[-1].token is None
    assert tokens_of(pieces) == expected(backend.contract, prompt(1), 50)[1 : len(pieces)]
    assert len(tokens_of(streams[1])) == 49


@pytest.mark.parametrize("how", ["close", "drop", "with", "cancel"])
def test_a_stream_that_is_left_is_cancelled(engine: Engine, how: str) -> None:
    def leave() -> None:
        stream = engine.stream(prompt(2), greedy(100_000))
        next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        elif how == "with":
            with stream:
                next(stream)
        elif how == "cancel":
            stream.cancel()

    leave()
    eventually(idle(engine))
    assert engine.metrics().requests_finished["cancelled"] == 1


def test_what_waits_or_is_being_prefilled_can_be_cancelled(
    engine: Engine, backend: TokenBackend, gate: Gate
) -> None:
    long = engine.stream(prompt(40), greedy(5))
    gate.wait()
    waiting = [engine.stream(prompt(2, seed), greedy(5, n=4)) for seed in range(3)]
    waiting[1].cancel()
    long.cancel()
    gate.open()
    assert [piece.finish_reason for piece in long] == ["cancelled"]
    assert [(p.finish_reason, p.index) for p in waiting[1]] == [("cancelled", i) for i in range(4)]
    for stream, seed in ((waiting[0], 0), (waiting[2], 2)):
        found = [piece.token for piece in stream if piece.index == 3 and piece.token is not None]
        assert found == expected(backend.contract, prompt(2, seed), 5)
    assert sum(call.kind == "prefill" and call.first_row == 0 for call in backend.calls) < 10
    eventually(idle(engine))


def test_an_async_stream_that_is_closed_while_its_request_is_made_is_cancelled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, make = threading.Event(), threading.Event(), InputProcessor.job

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go.wait(10)
        return make(*arguments)

    monkeypatch.setattr(InputProcessor, "job", slow)

    async def leave() -> None:
        stream = engine.astream(prompt(3), greedy(1_000_000))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(begun.wait, 10)
        stream.close()
        go.set()
        await asyncio.wait([task], timeout=10)
        assert task.done() and [piece async for piece in stream] == []

    asyncio.run(leave())
    eventually(idle(engine))
    assert engine.metrics().requests_finished["cancelled"] == 1


def test_an_ended_request_is_not_cancelled_any_more(engine: Engine) -> None:
    stream = engine.stream(prompt(2), greedy(3))
    pieces = list(stream)
    stream.cancel()
    stream.close()
    assert pieces[-1].finish_reason == "length"
    engine.generate([prompt(2)], greedy(3))
    assert engine.metrics().requests_finished["cancelled"] == 0


# ---------------------------------------------------------------- a full queue


@pytest.mark.parametrize("queue_size", [0, 1, 3])
def test_a_full_queue_says_how_many_wait(gate: Gate, queue_size: int) -> None:
    backend = TokenBackend(token_contract(1))
    backend.before = gate
    with token_engine(backend, queue_size=queue_size) as engine:
        streams = [engine.stream(prompt(2), greedy(3)) for _ in range(1 + queue_size)]
        with pytest.raises(
            QueueFullError, match=rf"{queue_size} request\(s\) wait .* queue_size={queue_size}"
        ):
            engine.stream(prompt(2), greedy(3))
        gate.open()
        for stream in streams:
            list(stream)
        eventually(idle(engine))
        assert len(tokens_of(engine.stream(prompt(2), greedy(3)))) == 3


def test_a_request_that_finds_its_rows_free_does_not_wait(backend: TokenBackend, gate: Gate) -> None:
    with token_engine(backend, queue_size=0) as engine:
        streams = [engine.stream(prompt(2), greedy(3))]
        gate.wait()  # it has its row alone
        streams += [engine.stream(prompt(2), greedy(3)) for _ in range(3)]
        with pytest.raises(QueueFullError, match="0 request"):
            engine.stream(prompt(2), greedy(3))
        streams[2].cancel()
        gate.let(2)  # the first stream's chunk and its step; then the others are looked at
        eventually(lambda: engine.metrics().active_rows == 3)
        streams.append(engine.stream(prompt(2), greedy(3)))
        gate.open()
        assert [len(tokens_of(stream)) for stream in streams] == [3, 3, 0, 3, 3]


def test_a_cancelled_request_leaves_its_place_in_the_queue(gate: Gate) -> None:
    backend = TokenBackend(token_contract(1))
    backend.before = gate
    with token_engine(backend, queue_size=1) as engine:
        running = engine.stream(prompt(2), greedy(30))
        waiting = engine.stream(prompt(2), greedy(3))
        waiting.close()
        gate.let(2)
        eventually(lambda: engine.metrics().queue_length == 0)
        late = engine.stream(prompt(2), greedy(3))
        gate.open()
        assert (len(tokens_of(running)), len(tokens_of(late))) == (30, 3)


@pytest.mark.parametrize("queue_size", [0, 1, 256])
def test_a_long_list_of_prompts_is_fed_as_there_is_room(queue_size: int) -> None:
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, queue_size=queue_size) as engine:
        prompts = [prompt(1 + seed % 13, seed) for seed in range(40)]
        outputs = engine.generate(prompts, greedy(7))
        for output, asked in zip(outputs, prompts, strict=True):
            assert list(output.tokens) == expected(backend.contract, asked, 7)
        assert engine.generate([], greedy(7)) == []


def test_a_list_that_finds_the_queue_full_of_others_is_refused(gate: Gate) -> None:
    backend = TokenBackend(token_contract(1))
    backend.before = gate
    with token_engine(backend, queue_size=1) as engine:
        others = [engine.stream(prompt(2), greedy(3)) for _ in range(2)]
        with pytest.raises(QueueFullError):
            engine.generate([prompt(2)], greedy(3))
        gate.open()
        assert all(len(list(stream)) == 4 for stream in others)


# ---------------------------------------------------------------- errors


def fail_on(message: str, *, fatal: bool | None = None) -> Exception:
    return RuntimeError(message) if fatal is None else BackendError(message, fatal=fatal)


def raising(error: Exception, when: Callable[[Step], bool]) -> Callable[[Step], None]:
    """A fault that strikes once."""
    struck: list[bool] = []

    def before(step: Step) -> None:
        if not struck and when(step):
            struck.append(True)
            raise error

    return before


def explodes(tokens: Sequence[int], logits: Logits) -> Logits:
    if len(tokens) == 12:
        raise KeyError("a bug of the caller")
    return logits


def test_a_processors_error_fails_its_request_alone(engine: Engine, backend: TokenBackend) -> None:
    healthy = engine.stream(prompt(10), greedy(40))
    doomed = engine.stream(prompt(10), greedy(40, logits_processors=(explodes,), n=2))
    found = []
    with pytest.raises(GenerationError, match="choosing a token failed: KeyError.*a bug") as caught:
        for piece in doomed:
            found.append(piece.token)
    assert isinstance(caught.value.__cause__, KeyError)
    assert set(found) == set(expected(backend.contract, prompt(10), 2))
    assert list(doomed) == []
    assert tokens_of(healthy) == expected(backend.contract, prompt(10), 40)
    eventually(idle(engine))
    assert engine.metrics().requests_finished["error"] == 2
    assert engine.ready


@pytest.mark.parametrize("fatal", [False, None])
def test_a_failed_step_fails_the_sequences_in_it_and_no_other(
    backend: TokenBackend, gate: Gate, fatal: bool | None
) -> None:
    with token_engine(backend) as engine:
        decoding = [engine.stream(prompt(2, seed), greedy(40)) for seed in range(2)]
        gate.wait()
        prefilling = engine.stream(prompt(40), greedy(5))
        waiting = [engine.stream(prompt(3, seed), greedy(5, n=4)) for seed in range(2)]
        fault = raising(fail_on("lost", fatal=fatal), lambda step: len(step.input_ids) == 2)
        backend.before = fault
        gate.open()
        for stream in decoding:
            with pytest.raises(BackendError, match="a step of this request failed: .*lost") as caught:
                list(stream)
            assert not caught.value.fatal and caught.value.__cause__ is not None
        assert tokens_of(prefilling) == expected(backend.contract, prompt(40), 5)
        for seed, stream in enumerate(waiting):
            found = [piece.token for piece in stream if piece.index == 3 and piece.token is not None]
            assert found == expected(backend.contract, prompt(3, seed), 5)
        assert {row for row, zeroed in backend.written if zeroed} >= {0, 1}
        eventually(idle(engine))


def test_a_failed_chunk_fails_its_request(engine: Engine, backend: TokenBackend, gate: Gate) -> None:
    healthy = engine.stream(prompt(3), greedy(60))
    gate.wait()
    doomed = engine.stream(prompt(40), greedy(5))
    backend.before = raising(RuntimeError("lost"), lambda step: step.first_row == 1)
    gate.open()
    with pytest.raises(BackendError, match="RuntimeError: lost"):
        list(doomed)
    assert tokens_of(healthy) == expected(backend.contract, prompt(3), 60)
    assert backend.written == [(1, True)]


def spoil(row: int, when: Callable[[Step], bool]) -> Callable[[Step, Logits], None]:
    def after(step: Step, logits: Logits) -> None:
        if when(step) and row - step.first_row in range(len(logits)):
            logits[row - step.first_row] = np.nan

    return after


def test_nan_ends_its_sequence_alone_and_its_row_is_zeroed(
    engine: Engine, backend: TokenBackend, gate: Gate
) -> None:
    streams = [engine.stream(prompt(2, seed), greedy(30)) for seed in range(3)]
    gate.let(9)
    for stream in streams:
        next(stream)
    backend.after = spoil(1, lambda step: True)
    gate.open()
    with pytest.raises(NonFiniteLogitsError, match="row.s. 1; the request is ended") as caught:
        list(streams[1])
    assert caught.value.rows == [1]
    backend.after = lambda step, logits: None
    for seed in (0, 2):
        assert tokens_of(streams[seed]) == expected(backend.contract, prompt(2, seed), 30)[1:]
    assert (1, True) in backend.written
    again = [engine.stream(prompt(2, seed), greedy(30)) for seed in range(3)]
    assert [tokens_of(s) for s in again] == [expected(backend.contract, prompt(2, s), 30) for s in range(3)]


def test_nan_in_two_rows_of_one_request_ends_it_once(
    engine: Engine, backend: TokenBackend, gate: Gate
) -> None:
    stream = engine.stream(prompt(2), greedy(30, n=3))
    gate.let(2)
    next(stream)
    backend.after = lambda step, logits: logits.fill(np.nan)
    gate.open()
    with pytest.raises(NonFiniteLogitsError, match="row.s. 0;"):
        list(stream)
    left = [stream._items.get() for _ in range(stream._items.qsize())]
    assert left == [None, None]  # the end, and the end for another thread that may be reading
    backend.after = lambda step, logits: None
    eventually(idle(engine))
    assert engine.metrics().requests_finished["error"] == 3
    assert engine.generate([prompt(2)], greedy(3))


def test_nan_in_a_prompt_ends_its_request(engine: Engine, backend: TokenBackend) -> None:
    backend.after = spoil(0, lambda step: step.position_ids[0, 0] == 4)
    with pytest.raises(NonFiniteLogitsError):
        list(engine.stream(prompt(11), greedy(3)))
    assert len(backend.calls) == 2
    eventually(idle(engine))


def dead(engine: Engine, words: str) -> None:
    """It says why, to everyone, and its thread is gone."""
    with pytest.raises(EngineClosedError, match=words):
        engine.stream(prompt(2), greedy(3))
    with pytest.raises(EngineClosedError, match=words):
        engine.session().fork()
    assert not engine.ready
    eventually(lambda: not any(thread.name == NAME for thread in threading.enumerate()))


@pytest.mark.parametrize("where", ["decode", "prefill", "zeroing", "copy", "bug"])
def test_a_dead_engine_fails_everything_and_says_why(
    backend: TokenBackend,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    engine = token_engine(backend)
    streams = [engine.stream(prompt(2, seed), greedy(40, n=1 + (seed == 2))) for seed in range(9)]
    gate.wait()
    error = BackendError("the device is lost", fatal=True)
    if where == "decode":
        backend.before = raising(error, lambda step: step.input_ids.shape == (2, 1))
    elif where == "prefill":
        backend.before = raising(error, lambda step: step.first_row == 1)
    elif where == "zeroing":
        backend.before = raising(RuntimeError("lost"), lambda step: step.first_row == 1)
        monkeypatch.setattr(backend, "write_row", lambda *_: (_ for _ in ()).throw(error))
    elif where == "copy":
        monkeypatch.setattr(backend, "copy_row", lambda *_: (_ for _ in ()).throw(error))
    else:
        monkeypatch.setattr(ContinuousBatch, "_count", lambda *_: 1 / 0)
    gate.open()
    words = "division by zero" if where == "bug" else "the device is lost"
    for stream in streams:
        with pytest.raises(EngineClosedError, match=f"cannot run any more.*{words}") as caught:
            list(stream)
        assert caught.value.__cause__ is not None
    dead(engine, words)
    found = engine.metrics()
    assert (found.active_rows, found.queue_length) == (0, 0)
    assert found.requests_finished["error"] == 10
    assert "cannot run any more" in caplog.text
    assert backend.closed
    engine.close()


def test_a_copy_that_fails_fails_its_request(
    engine: Engine, backend: TokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "copy_row", lambda *_: 1 / 0)
        with pytest.raises(BackendError, match="ZeroDivisionError"):
            list(engine.stream(prompt(2), greedy(3, n=2)))
    assert len(engine.generate([prompt(2)], greedy(3, n=4))) == 4


def test_one_failed_prompt_cancels_the_rest(engine: Engine) -> None:
    prompts = [prompt(10 if seed == 1 else 30, seed) for seed in range(12)]
    with pytest.raises(GenerationError, match="a bug of the caller"):
        engine.generate(prompts, greedy(100_000, logits_processors=(explodes,)))
    eventually(idle(engine))
    assert engine.metrics().requests_finished["error"] == 1


def test_a_consumer_that_takes_nothing_is_cancelled(engine: Engine) -> None:
    stream = engine.stream(prompt(2), greedy(100_000))

    def refuse(item: object) -> None:
        raise RuntimeError("Event loop is closed")

    stream._job.deliver = refuse
    eventually(idle(engine))


WAITS: dict[str, Callable[[Engine], object]] = {
    "fork": lambda engine: engine.session().fork(),
    "stream": lambda engine: list(engine.stream([1], greedy(3))),
    "generate": lambda engine: engine.generate([[1]], greedy(3)),
}


@pytest.mark.parametrize("ask", WAITS.values(), ids=WAITS)
def test_a_processor_cannot_wait_for_its_own_engine(engine: Engine, ask: Callable[[Engine], object]) -> None:
    def asks(tokens: Sequence[int], logits: Logits) -> Logits:
        ask(engine)
        return logits

    with pytest.raises(GenerationError, match="cannot wait for the engine that runs it"):
        list(engine.stream(prompt(2), greedy(3, logits_processors=(asks,))))
    eventually(idle(engine))


# ---------------------------------------------------------------- closing


def test_closing_ends_everything_as_cancelled(backend: TokenBackend, gate: Gate) -> None:
    engine = token_engine(backend)
    streams = [engine.stream(prompt(9, seed), greedy(40, n=2)) for seed in range(5)]
    gate.let(5)
    closer = threading.Thread(target=engine.close)
    closer.start()
    eventually(lambda: engine._scheduler.closed is not None)
    gate.open()
    for stream in streams:
        assert [p.finish_reason for p in stream if p.finish_reason] == ["cancelled"] * 2
    closer.join(10)
    assert not closer.is_alive()
    assert backend.closed == 1
    with pytest.raises(EngineClosedError, match="the engine was closed; load it again"):
        engine.stream(prompt(2))
    engine.close()
    found = engine.metrics()
    assert found.requests_finished["cancelled"] == 10
    assert (found.active_rows, found.queue_length) == (0, 0)


def test_an_engine_that_was_never_used_closes_too(backend: TokenBackend) -> None:
    with token_engine(backend) as engine:
        pass
    assert backend.closed
    with pytest.raises(EngineClosedError):
        engine.generate([prompt(2)])


def test_an_engine_that_is_forgotten_ends_its_thread(backend: TokenBackend) -> None:
    engine = token_engine(backend)
    engine.generate([prompt(3)], greedy(3))
    thread = next(thread for thread in threading.enumerate() if thread.name == NAME)
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive() and backend.closed


def test_a_forgotten_engine_without_a_thread_gives_its_memory_back(backend: TokenBackend) -> None:
    engine = token_engine(backend)
    del engine
    gc.collect()
    assert backend.closed


def test_a_stream_keeps_its_engine(backend: TokenBackend) -> None:
    def opened() -> Stream:
        return token_engine(backend).stream(prompt(3), greedy(300))

    assert tokens_of(opened()) == expected(backend.contract, prompt(3), 300)
    gc.collect()
    eventually(lambda: bool(backend.closed))


def test_closing_from_a_processor_does_not_hang(backend: TokenBackend) -> None:
    engine = token_engine(backend)

    def closes(tokens: Sequence[int], logits: Logits) -> Logits:
        engine.close()
        return logits

    pieces = list(engine.stream(prompt(2), greedy(30, logits_processors=(closes,))))
    assert pieces[-1].finish_reason == "cancelled"


def test_two_consumers_of_one_stream_both_end(engine: Engine) -> None:
    stream = engine.stream(prompt(2), greedy(200))
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(tokens_of(stream))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sum(map(len, found)) == 200


# ---------------------------------------------------------------- what is refused before it waits

REFUSED: dict[str, tuple[Callable[[Engine], object], str]] = {
    "an empty prompt": (lambda e: e.stream([]), "at least one token"),
    "neither": (lambda e: e.stream(), "either a prompt or messages"),
    "both": (lambda e: e.stream([1], messages=[]), "either a prompt or messages"),
    "text": (lambda e: e.stream("abc"), "no tokenizer"),
    "messages": (lambda e: e.stream(messages=[{"role": "user", "content": "x"}]), "no tokenizer"),
    "a token beyond V": (lambda e: e.stream([61]), "must lie in 0…60, found 61"),
    "a token below 0": (lambda e: e.stream([3, -1]), "must lie in 0…60, found -1"),
    "no token": (lambda e: e.stream([1, 2.5]), "2.5"),  # type: ignore[list-item]
    "true": (lambda e: e.stream([1, True]), "True"),
    "special tokens in ids": (lambda e: e.stream([1], special_tokens=True), "token ids"),
    "too many samples": (lambda e: e.stream([1], greedy(1, n=5)), "n=5 samples.*has 4"),
    "a stop string": (lambda e: e.stream([1], greedy(1, stop=("a",))), "stop strings need a tokenizer"),
    "a constraint": (lambda e: e.stream([1], greedy(1, regex="a")), "need a tokenizer"),
    "a bias beyond V": (lambda e: e.stream([1], greedy(1, logit_bias={61: 1.0})), "below 61, found 61"),
    "one text": (lambda e: e.generate("abc"), r"found one text; pass \[prompt\]"),
    "the second of two": (lambda e: e.generate([[1], []]), "at least one token"),
}


@pytest.mark.parametrize(("ask", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_before_it_waits(
    backend: TokenBackend, ask: Callable[[Engine], object], words: str
) -> None:
    with token_engine(backend) as engine:
        with pytest.raises(GenerationError, match=words):
            ask(engine)
        assert not backend.calls
        assert not any(thread.name == NAME for thread in threading.enumerate())


@pytest.mark.parametrize("option", ["queue_size", "session_memory_bytes", "session_disk_bytes"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "4"])
def test_options_that_are_no_counts_are_refused(backend: TokenBackend, option: str, value: object) -> None:
    with pytest.raises(GenerationError, match=f"{option} must be a whole number"):
        token_engine(backend, **{option: value})  # type: ignore[arg-type]


# ---------------------------------------------------------------- where a text ends


def test_an_end_token_ends_a_text_and_is_not_part_of_it(backend: TokenBackend) -> None:
    said = expected(backend.contract, prompt(5), 30)
    eos = said[6]
    first = said.index(eos)
    with token_engine(backend, eos=[eos]) as engine:
        (output,) = engine.generate([prompt(5)], greedy(30))
        assert (list(output.tokens), output.finish_reason) == (said[:first], "stop")
        (output,) = engine.generate([prompt(5)], greedy(30, ignore_eos=True))
        assert (list(output.tokens), output.finish_reason) == (said, "length")
        other = next(token for token in said if token != eos)
        (output,) = engine.generate([prompt(5)], greedy(30, ignore_eos=True, stop_token_ids=(other,)))
        assert (list(output.tokens), output.finish_reason) == (said[: said.index(other)], "stop")


def test_a_model_without_a_window_ends_at_its_context() -> None:
    contract = token_contract(2, window=None, max_context=16)
    with token_engine(TokenBackend(contract)) as engine:
        (output,) = engine.generate([prompt(6)], greedy(50))
        assert (list(output.tokens), output.finish_reason) == (expected(contract, prompt(6), 10), "context")
        (output,) = engine.generate([prompt(15)], greedy(50))
        assert (len(output.tokens), output.finish_reason) == (1, "context")
        with pytest.raises(GenerationError, match="the prompt has 16 tokens.*max_context of 16"):
            engine.stream(prompt(16))


def test_a_prompt_longer_than_the_window_works_where_there_is_one(
    engine: Engine, backend: TokenBackend
) -> None:
    assert tokens_of(engine.stream(prompt(1000), greedy(5))) == expected(backend.contract, prompt(1000), 5)


def test_positions_beyond_a_million_end_a_text_unless_asked_for(
    engine: Engine, backend: TokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in (("POSITION_ACCURATE_LIMIT", 20), ("POSITION_LIMIT", 30)):
        monkeypatch.setattr(f"mistral_trt.contract.{name}", limit)
        monkeypatch.setattr(f"mistral_trt.runtime.request.{name}", limit)
    for allow_long, count in ((False, 10), (True, 20)):
        pieces = list(engine.stream(prompt(10), greedy(50), allow_long=allow_long))
        assert (len(tokens_of(pieces)), pieces[-1].finish_reason) == (count, "context")
    with pytest.raises(GenerationError, match="pass allow_long=True"):
        engine.stream(prompt(20))
    with pytest.raises(GenerationError, match=r"2\*\*24"):
        engine.stream(prompt(30), allow_long=True)


def test_logprobs_are_delivered_with_their_tokens(engine: Engine) -> None:
    pieces = list(engine.stream(prompt(3), greedy(4, logprobs=2)))
    (output,) = engine.generate([prompt(3)], greedy(4, logprobs=2))
    assert output.logprobs is not None and len(output.logprobs) == 4
    for piece, choice in zip(pieces, output.logprobs, strict=False):
        assert (piece.token, piece.logprob, piece.top_logprobs) == (choice.token, choice.logprob, choice.top)
        assert piece.top_logprobs is not None and piece.top_logprobs[0].token == piece.token
    assert pieces[-1].logprob is None
    assert engine.generate([prompt(3)], greedy(4))[0].logprobs is None


# ---------------------------------------------------------------- under load


def hammer(seconds: float, threads: int = 64) -> None:
    """Threads that ask, read and leave at random: whatever is read is right, and nothing stays behind."""
    backend = TokenBackend(token_contract(8))
    engine = token_engine(backend, queue_size=20)
    wrong: list[object] = []
    answers = {seed: expected(backend.contract, prompt(1 + seed * 3, seed), 24) for seed in range(8)}
    deadline = time.monotonic() + seconds
    counts = [0] * threads

    def work(number: int) -> None:
        draw = np.random.default_rng(number)
        while time.monotonic() < deadline:
            seed, count, leaves = int(draw.integers(8)), int(draw.integers(1, 25)), int(draw.integers(4))
            try:
                stream = engine.stream(prompt(1 + seed * 3, seed), greedy(count, n=1 + int(leaves == 3)))
            except QueueFullError:
                time.sleep(0.001)
                continue
            counts[number] += 1
            found: list[int] = []
            for piece in stream:
                if piece.token is not None and piece.index == 0:
                    found.append(piece.token)
                if leaves == 0 and len(found) >= count // 2:
                    (stream.close if number % 2 else stream.cancel)()
            if found != answers[seed][: len(found)] or (leaves and len(found) != count):
                wrong.append((seed, count, leaves, found))

    with engine:
        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(seconds + 60)
        assert not any(worker.is_alive() for worker in workers), "a consumer hangs"
        eventually(idle(engine))
        finished = engine.metrics().requests_finished
        started = sum(finished.values())
    assert not wrong, wrong[:3]
    assert finished["cancelled"] > 0 and finished["length"] > 0 and finished["error"] == 0
    assert started >= sum(counts) > threads / 4
    assert engine.metrics().active_rows == 0


def test_many_threads_at_once() -> None:
    hammer(2.0)


@pytest.mark.slow
def test_many_threads_for_a_minute() -> None:
    hammer(60.0)


def test_hammering_sees_rows_that_are_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would the load test notice? A ring that is copied to the wrong row is enough."""
    copy = TokenBackend.copy_row

    def wrong(self: TokenBackend, source: int, target: int) -> None:
        copy(self, source, target)
        self.rings[0][(target + 1) % 8] = self.rings[0][source]

    monkeypatch.setattr(TokenBackend, "copy_row", wrong)
    with pytest.raises(AssertionError):
        hammer(1.0, threads=16)


def test_the_log_has_nothing_of_a_quiet_run(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        engine.generate([prompt(3)], greedy(3))
    assert not caplog.records


def test_a_row_changes_hands_without_a_copy(engine: Engine, backend: TokenBackend) -> None:
    engine.generate([prompt(9, seed) for seed in range(20)], greedy(20))
    assert backend.written == [] and backend.copied == []
