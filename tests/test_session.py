"""Sessions: a turn feeds what is new, and says what its history alone would have said, wherever the ring was.

W = 8, C = 4, R = 12, on the backend whose model is arithmetic; text and chats with a tokenizer of bytes.
"""

import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistral_trt.errors import (
    ArtifactError,
    BackendError,
    EngineClosedError,
    GenerationError,
    NonFiniteLogitsError,
    SessionError,
)
from mistral_trt.runtime import Engine, SamplingParams, Session
from mistral_trt.runtime.backend import RingArray
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.rings import ring_file as ring_file_module
from mistral_trt.runtime.rings import ring_folder as ring_folder_module
from mistral_trt.runtime.stream import Stream
from mistral_trt.runtime.text.tokenizer import Tokenizer
from tests.models import write_tokenizer
from tests.test_scheduler import explodes, greedy, idle, prompt, raising
from tests.token_backend import (
    Gate,
    TokenBackend,
    eventually,
    expected,
    token_contract,
    token_engine,
    token_manifest,
    tokens_of,
)


@pytest.fixture
def backend() -> TokenBackend:
    return TokenBackend(token_contract(2))


@pytest.fixture
def engine(backend: TokenBackend) -> Iterator[Engine]:
    with token_engine(backend) as engine:
        yield engine


def turn(session: Session, new: Sequence[int] | None, count: int = 6, **others: Any) -> list[int]:
    return tokens_of(session.stream(new, greedy(count, **others)))


def occupy(engine: Engine, rows: int = 2) -> None:
    """Have other requests run on all rows, so that no idle session keeps one."""
    engine.generate([prompt(3, seed) for seed in range(rows)], greedy(4))


def moving(engine: Engine) -> bool:
    """Whether a ring is being written to a file or read from one."""
    parked = engine._scheduler._store._parked
    return parked._writing is not None or bool(parked._reading)


def ring_of(backend: TokenBackend, row: int) -> list[RingArray]:
    return [ring[row].copy() for ring in backend.rings]


# ---------------------------------------------------------------- a turn


def test_a_turn_feeds_what_is_new_and_says_what_its_history_says(
    engine: Engine, backend: TokenBackend
) -> None:
    session = engine.session()
    history: list[int] = []
    for number, length in enumerate((5, 1, 13, 4, 30, 2)):
        before = engine.metrics().prompt_tokens
        new = prompt(length, number)
        said = turn(session, new, 7)
        assert said == expected(backend.contract, [*history, *new], 7)
        pending = 1 if history else 0  # the last token of a turn is fed by the next
        assert engine.metrics().prompt_tokens - before == length + pending
        history += [*new, *said]
        assert list(session.tokens) == history


def test_that_law_sees_a_token_that_is_fed_twice(
    engine: Engine, backend: TokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    said = turn(session, prompt(5))
    session._history.tokens.append(said[-1])
    assert turn(session, [3]) != expected(backend.contract, [*prompt(5), *said, 3], 6)


def test_a_turn_may_go_on_without_anything_new(engine: Engine, backend: TokenBackend) -> None:
    session = engine.session()
    said = turn(session, prompt(5), 4) + turn(session, None, 5) + turn(session, [], 6)
    assert said == expected(backend.contract, prompt(5), 15)


def test_after_an_end_token_the_history_is_without_it(backend: TokenBackend) -> None:
    said = expected(backend.contract, prompt(5), 30)
    end = said[9]
    said = said[: said.index(end)]
    with token_engine(backend, eos=[end]) as engine:
        session = engine.session()
        assert turn(session, prompt(5), 30) == said
        assert list(session.tokens) == [*prompt(5), *said]
        assert turn(session, [2, 3], 4, ignore_eos=True) == expected(
            backend.contract, [*prompt(5), *said, 2, 3], 4
        )
        with pytest.raises(GenerationError, match="all tokens of this session are fed"):
            empty = engine.session()
            turn(empty, prompt(5), 1, stop_token_ids=(said[0],))
            turn(empty, None)


def test_a_cancelled_turn_leaves_what_it_said(backend: TokenBackend) -> None:
    gate = Gate()
    backend.before = gate
    with token_engine(backend) as engine:
        session = engine.session()
        stream = session.stream(prompt(6), greedy(100))
        gate.let(5)
        found = tokens_of([next(stream) for _ in range(3)])
        stream.cancel()
        gate.open()
        found += tokens_of(stream)
        assert found == expected(backend.contract, prompt(6), len(found))
        assert list(session.tokens) == [*prompt(6), *found]
        assert turn(session, [9]) == expected(backend.contract, [*prompt(6), *found, 9], 6)


def test_a_turn_cancelled_in_its_prompt_is_fed_to_its_end_by_the_next(backend: TokenBackend) -> None:
    gate = Gate()
    backend.before = gate
    with token_engine(backend) as engine:
        session = engine.session()
        stream = session.stream(prompt(20), greedy(100))
        gate.wait()
        stream.cancel()
        gate.open()
        assert [piece.finish_reason for piece in stream] == ["cancelled"]
        assert list(session.tokens) == prompt(20)
        assert engine.metrics().prompt_tokens == 4
        assert turn(session, [9]) == expected(backend.contract, [*prompt(20), 9], 6)
        assert engine.metrics().prompt_tokens == 21


def test_a_turn_cancelled_in_the_queue_leaves_nothing(backend: TokenBackend) -> None:
    gate = Gate()
    backend.before = gate
    with token_engine(backend) as engine:
        running = engine.stream(prompt(3), greedy(20, n=2))
        gate.wait()
        session = engine.session()
        waiting = session.stream(prompt(20), greedy(100))
        waiting.cancel()
        gate.open()
        assert [piece.finish_reason for piece in waiting] == ["cancelled"]
        assert session.tokens == ()
        assert turn(session, [9]) == expected(backend.contract, [9], 6)
        list(running)


def test_a_session_has_one_turn_at_a_time(backend: TokenBackend) -> None:
    gate = Gate()
    backend.before = gate
    with token_engine(backend) as engine:
        session = engine.session()
        first = session.stream(prompt(3), greedy(10))
        gate.wait()
        for call in (lambda: session.stream([1]), session.fork, lambda: session.save("never")):
            with pytest.raises(GenerationError, match="one turn at a time|between two turns"):
                between_two_steps(engine, gate, call)
        gate.open()
        said = tokens_of(first)
        assert turn(session, [1]) == expected(backend.contract, [*prompt(3), *said, 1], 6)


def between_two_steps(engine: Engine, gate: Gate, call: Callable[[], object]) -> None:
    """Make a call while the gate holds a step, and let steps through once the call waits for their end."""
    inbox = engine._scheduler._inbox  # nobody reads it while a step is held
    before = inbox.qsize()
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(call)
        eventually(lambda: answer.done() or inbox.qsize() > before)
        if not answer.done():
            gate.let(2)  # a chunk is followed by a step before anybody is answered
        answer.result(20)


def test_a_turn_after_a_cancelled_one_waits_for_its_end(engine: Engine, backend: TokenBackend) -> None:
    session = engine.session()
    for number in range(20):
        before = list(session.tokens)
        stream = session.stream([number, 3], greedy(1_000_000))
        next(stream)
        stream.close()
        said = turn(session, [5], 3)
        history = list(session.tokens)
        assert history[: len(before) + 2] == [*before, number, 3]
        assert said == expected(backend.contract, history[:-3], 3)


def test_a_processors_error_leaves_the_session_whole(engine: Engine, backend: TokenBackend) -> None:
    session = engine.session()
    with pytest.raises(GenerationError, match="a bug of the caller"):
        turn(session, prompt(10), 30, logits_processors=(explodes,))
    history = list(session.tokens)
    assert history == [*prompt(10), *expected(backend.contract, prompt(10), 2)]
    assert turn(session, [4]) == expected(backend.contract, [*history, 4], 6)


@pytest.mark.parametrize("kind", ["nan", "step"])
def test_a_failed_step_takes_the_ring_and_the_next_turn_says_so(
    engine: Engine, backend: TokenBackend, kind: str
) -> None:
    session = engine.session()
    turn(session, prompt(5))
    if kind == "nan":
        backend.after = lambda step, logits: logits.fill(np.nan)
    else:
        backend.before = raising(RuntimeError("the cable"), lambda step: True)
    with pytest.raises((NonFiniteLogitsError, BackendError)):
        turn(session, [1])
    backend.after = lambda step, logits: None
    for call in (lambda: turn(session, [1]), session.fork, lambda: session.save("never")):
        with pytest.raises(SessionError, match="lost its ring when its last turn failed"):
            call()
    assert engine.metrics().idle_sessions == 0
    anew = engine.session()
    assert turn(anew, session.tokens, 5) == expected(backend.contract, session.tokens, 5)


def test_a_session_ends_at_its_context() -> None:
    backend = TokenBackend(token_contract(2, window=None, max_context=16))
    with token_engine(backend) as engine:
        session = engine.session()
        said = turn(session, prompt(6), 50)
        assert len(said) == 10
        with pytest.raises(GenerationError, match="the prompt has 16 tokens.*max_context of 16"):
            session.stream(None)


# ---------------------------------------------------------------- rows, memory and files


def test_an_idle_session_keeps_its_row_until_another_needs_it(engine: Engine, backend: TokenBackend) -> None:
    session = engine.session()
    first = turn(session, prompt(9))
    held = ring_of(backend, 0)
    engine.generate([prompt(3)], greedy(4))
    assert engine.metrics().session_moves == 0
    second = turn(session, [1])
    assert engine.metrics().session_bytes == 0
    held = ring_of(backend, 0)
    occupy(engine)
    assert engine.metrics().session_moves == 1
    assert engine.metrics().session_bytes == backend.contract.ring_bytes_per_row
    copies = (
        [ring.copy() for ring in session._history.ring.snapshot.rings]
        if session._history.ring.snapshot
        else []
    )
    for kept, ring in zip(copies, held, strict=True):
        visible = [
            s for s in range(12) if s != session._history.ring.position % 12
        ]  # where idle rows are fed
        np.testing.assert_array_equal(kept[:, visible], ring[:, visible])
    third = turn(session, [2, 2])
    assert third == expected(backend.contract, [*prompt(9), *first, 1, *second, 2, 2], 6)
    assert engine.metrics().session_bytes == 0


def test_a_ring_returns_bit_for_bit(engine: Engine, backend: TokenBackend) -> None:
    session = engine.session()
    turn(session, prompt(9))
    occupy(engine)
    assert session._history.ring.snapshot is not None
    kept = [ring.copy() for ring in session._history.ring.snapshot.rings]
    gate = Gate()
    backend.before = gate
    stream = session.stream([1], greedy(3))
    gate.wait()
    row = session._history.ring.row
    assert row is not None
    for before, after in zip(kept, ring_of(backend, row), strict=True):
        np.testing.assert_array_equal(after, before)
    gate.open()
    list(stream)


def test_the_least_recently_used_ring_moves_first(engine: Engine) -> None:
    sessions = [engine.session() for _ in range(2)]
    for session in (*sessions, sessions[0]):
        turn(session, [3], 2)
    engine.generate([prompt(2)], greedy(2))
    assert [session._history.ring.row is None for session in sessions] == [False, True]


def test_many_sessions_share_few_rows(engine: Engine, backend: TokenBackend) -> None:
    """Four rings fit in memory beside the two rows: six sessions, in any order."""
    draw = np.random.default_rng(0)
    sessions = [engine.session() for _ in range(6)]
    histories: list[list[int]] = [[] for _ in sessions]
    for _ in range(60):
        i = int(draw.integers(6))
        new = [int(token) for token in draw.integers(0, 61, draw.integers(1, 9))]
        said = turn(sessions[i], new, 3)
        assert said == expected(backend.contract, [*histories[i], *new], 3)
        histories[i] += [*new, *said]
    assert engine.metrics().session_moves > 20
    assert engine.metrics().idle_sessions == 6


@pytest.mark.parametrize(("rings", "kept"), [(0, 2), (1, 3), (3, 5)])
def test_what_does_not_fit_in_memory_is_dropped_and_says_so(
    backend: TokenBackend, rings: int, kept: int
) -> None:
    size = backend.contract.ring_bytes_per_row
    with token_engine(backend, session_memory_bytes=rings * size + size // 2) as engine:
        sessions = [engine.session() for _ in range(6)]
        for session in sessions:
            turn(session, prompt(4), 2)
        assert engine.metrics().session_bytes == rings * size
        for session in sessions[: 6 - kept]:
            with pytest.raises(SessionError, match="its ring was dropped.*session_memory_bytes"):
                turn(session, [1])
        assert turn(sessions[-1], [1]) == expected(backend.contract, sessions[-1].tokens[:-6], 6)


def test_beyond_memory_rings_go_to_files_and_return(tmp_path: Path) -> None:
    backend = TokenBackend(token_contract(2))
    size = backend.contract.ring_bytes_per_row
    with token_engine(backend, session_memory_bytes=2 * size, session_dir=tmp_path) as engine:
        sessions = [engine.session() for _ in range(6)]
        for number, session in enumerate(sessions):
            turn(session, prompt(4, number), 2)
        eventually(lambda: engine.metrics().session_disk_bytes == 3 * size)
        assert len(list(tmp_path.rglob("*.ring"))) == 3
        for _ in range(3):
            for session in sessions:
                said = turn(session, [1], 3)
                assert said == expected(backend.contract, session.tokens[:-3], 3)
        eventually(lambda: engine.metrics().session_bytes <= size)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_holds_no_other_stream_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a ring is being written or read, others go on, those that run and those behind in the queue."""
    hold, write, read = threading.Event(), ring_file_module.write_ring, ring_file_module.read_ring

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (hold.wait(20), function(*arguments))[1]

    monkeypatch.setattr(ring_folder_module, "write_ring", slow(write))
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        hold.set()
        eventually(lambda: engine.metrics().session_disk_bytes > 0)
        hold.clear()
        monkeypatch.setattr(ring_folder_module, "read_ring", slow(read))
        running = engine.stream(prompt(3), greedy(100_000))
        late = session.stream([1], greedy(3))
        behind = engine.stream(prompt(2), greedy(2))
        for _ in range(200):
            next(running)
        assert tokens_of(behind) == expected(backend.contract, prompt(2), 2)
        assert engine.metrics().queue_length == 1
        hold.set()
        assert tokens_of(late) == expected(backend.contract, session.tokens[:-3], 3)
        running.close()


def test_a_turn_that_is_cancelled_while_its_ring_is_read_can_be_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, read = threading.Event(), ring_file_module.read_ring
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        eventually(lambda: session._history.ring.file is not None)
        monkeypatch.setattr(ring_folder_module, "read_ring", lambda *a: (hold.wait(20), read(*a))[1])
        stream = session.stream([1], greedy(3))
        eventually(lambda: moving(engine))
        stream.cancel()
        assert [piece.finish_reason for piece in stream] == ["cancelled"]
        again = session.stream([2], greedy(3))
        hold.set()
        assert tokens_of(again) == expected(backend.contract, session.tokens[:-3], 3)
        assert 1 not in session.tokens[7:8]
        session.close()
    assert list(tmp_path.iterdir()) == []


def test_a_session_closed_while_its_ring_is_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, read = threading.Event(), ring_file_module.read_ring
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        eventually(lambda: session._history.ring.file is not None)
        monkeypatch.setattr(ring_folder_module, "read_ring", lambda *a: (hold.wait(20), read(*a))[1])
        stream = session.stream([1], greedy(3))
        eventually(lambda: moving(engine))
        session.close()
        assert [piece.finish_reason for piece in stream] == ["cancelled"]
        hold.set()
        occupy(engine)
        eventually(lambda: not moving(engine))
        assert engine.metrics().idle_sessions == 0
        eventually(lambda: list(tmp_path.rglob("*.ring")) == [])  # deleted on a thread of its own


def test_a_ring_that_is_wanted_while_it_is_written_comes_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, write = threading.Event(), ring_file_module.write_ring
    monkeypatch.setattr(ring_folder_module, "write_ring", lambda *a: (hold.wait(20), write(*a))[1])
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        assert turn(session, [1], 3) == expected(backend.contract, session.tokens[:-3], 3)
        hold.set()
        eventually(lambda: not moving(engine))
        eventually(lambda: list(tmp_path.rglob("*.ring")) == [])  # deleted on a thread of its own


@pytest.mark.parametrize("fault", ["full", "altered", "gone"])
def test_a_disk_that_fails_takes_the_ring_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    if fault == "full":
        monkeypatch.setattr(ring_folder_module, "write_ring", full)
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        if fault == "full":
            eventually(lambda: session._history.ring.lost is not None)
        else:
            eventually(lambda: session._history.ring.file is not None)
            (file,) = tmp_path.rglob("*.ring")
            if fault == "altered":
                file.write_bytes(file.read_bytes()[:-1] + b"x")
            else:
                file.unlink()
        words = {"full": "No space left", "altered": "SHA-256 differs", "gone": "cannot be read"}[fault]
        with pytest.raises(SessionError, match=words):
            turn(session, [1])
        occupy(engine)


def test_a_ring_that_cannot_be_read_off_its_row_does_not_block_a_request(
    engine: Engine, backend: TokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    turn(session, prompt(5))
    monkeypatch.setattr(backend, "read_row", lambda row: 1 / 0)
    occupy(engine)
    with pytest.raises(SessionError, match="could not be read from its row.*division"):
        turn(session, [1])


def test_a_ring_that_cannot_be_put_on_a_row_fails_its_turn(
    engine: Engine, backend: TokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    turn(session, prompt(5))
    occupy(engine)
    write = backend.write_row
    with monkeypatch.context() as patch:
        patch.setattr(backend, "write_row", lambda row, rings: 1 / 0 if rings else write(row, rings))
        with pytest.raises(BackendError, match="division"):
            turn(session, [1])
    with pytest.raises(SessionError, match="lost its ring"):
        turn(session, [1])
    occupy(engine)
    assert engine.ready


def test_a_session_dir_that_is_no_folder_is_refused(backend: TokenBackend, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a folder; make it first"):
        token_engine(backend, session_dir=tmp_path / "nowhere")


def test_a_session_that_is_closed_or_forgotten_frees_its_row(engine: Engine) -> None:
    session, other = engine.session(), engine.session()
    turn(session, prompt(5))
    turn(other, prompt(5))
    assert engine.metrics().idle_sessions == 2
    session.close()
    del other
    gc.collect()
    eventually(lambda: engine.metrics().idle_sessions == 0)
    with pytest.raises(SessionError, match="was closed"):
        turn(session, [1])
    with pytest.raises(SessionError, match="was closed"):
        session.fork()
    occupy(engine)
    assert engine.metrics().session_moves == 0


def test_closing_a_session_ends_its_turn(engine: Engine) -> None:
    with engine.session() as session:
        stream = session.stream(prompt(3), greedy(1_000_000))
        next(stream)
    assert list(stream)[-1].finish_reason == "cancelled"
    eventually(idle(engine))
    assert engine.metrics().idle_sessions == 0


def test_a_session_of_a_closed_engine_says_so(backend: TokenBackend) -> None:
    with token_engine(backend) as engine:
        session = engine.session()
        turn(session, [1])
    with pytest.raises(EngineClosedError):
        turn(session, [1])
    session.close()


def test_a_session_keeps_its_engine(backend: TokenBackend) -> None:
    session = token_engine(backend).session()
    gc.collect()
    assert turn(session, [1, 2]) == expected(backend.contract, [1, 2], 6)


def test_a_turn_has_one_text(engine: Engine) -> None:
    with pytest.raises(GenerationError, match=r"found n=2; use fork"):
        engine.session().stream([1], greedy(1, n=2))


# ---------------------------------------------------------------- forks and files


@pytest.mark.parametrize("place", ["row", "row, none free", "memory", "file", "nothing"])
def test_a_fork_goes_on_as_the_session_does_and_apart_from_it(tmp_path: Path, place: str) -> None:
    backend = TokenBackend(token_contract(2))
    memory = 0 if place == "file" else 10**6
    with token_engine(backend, session_memory_bytes=memory, session_dir=tmp_path) as engine:
        session = engine.session()
        if place != "nothing":
            turn(session, prompt(9))
        if place in ("memory", "file"):
            occupy(engine)
            eventually(lambda: place == "memory" or session._history.ring.file is not None)
        stranger = engine.session()
        if place == "row, none free":
            turn(stranger, [5])
        copies = len(backend.copied)
        fork = session.fork()
        assert len(backend.copied) - copies == (place == "row")
        assert fork.tokens == session.tokens
        history = list(session.tokens)
        assert turn(session, [1]) == expected(backend.contract, [*history, 1], 6)
        assert turn(fork, [2]) == expected(backend.contract, [*history, 2], 6)
        assert turn(fork.fork(), [3]) == expected(backend.contract, [*fork.tokens, 3], 6)


@pytest.mark.parametrize("fatal", [False, True])
def test_a_fork_that_fails_leaves_no_row_behind(
    backend: TokenBackend, monkeypatch: pytest.MonkeyPatch, fatal: bool
) -> None:
    def fail(*arguments: Any) -> None:
        raise BackendError("the cable", fatal=fatal)

    with token_engine(backend) as engine:
        session = engine.session()
        turn(session, prompt(5))
        with monkeypatch.context() as patch:
            patch.setattr(backend, "copy_row", fail)
            with pytest.raises(BackendError, match="the cable"):
                session.fork()
        if fatal:
            with pytest.raises(EngineClosedError, match="the cable"):
                eventually(lambda: not engine.ready)
                turn(session, [1])
        else:
            assert engine.metrics().idle_sessions == 1
            occupy(engine)
            assert engine.metrics().session_moves == 1
            assert turn(session, [1]) == expected(backend.contract, session.tokens[:-6], 6)


@pytest.mark.parametrize("place", ["row", "memory", "file", "nothing"])
def test_a_saved_session_goes_on_in_another_engine(tmp_path: Path, place: str) -> None:
    backend = TokenBackend(token_contract(2))
    (tmp_path / "rings").mkdir()
    memory = 0 if place == "file" else 10**6
    options: dict[str, Any] = {"session_memory_bytes": memory, "session_dir": tmp_path / "rings"}
    with token_engine(backend, artifact_sha256="ab", **options) as engine:
        session = engine.session()
        if place != "nothing":
            turn(session, prompt(9))
        if place in ("memory", "file"):
            occupy(engine)
            eventually(lambda: place == "memory" or session._history.ring.file is not None)
        session.save(tmp_path / "saved")
        history = session.tokens
        expected_next = turn(session, [1])
    fresh = TokenBackend(token_contract(2))
    with token_engine(fresh, artifact_sha256="ab") as engine:
        twin = engine.restore_session(tmp_path / "saved")
        assert twin.tokens == history
        before = engine.metrics().prompt_tokens
        assert turn(twin, [1]) == expected_next
        assert engine.metrics().prompt_tokens - before == (1 if place == "nothing" else 2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with token_engine(TokenBackend(token_contract(2)), artifact_sha256="ab") as engine:
        session = engine.session()
        turn(session, prompt(9))
        session.save(tmp_path / "saved")
    return tmp_path / "saved"


def refused(file: Path, words: str, **options: Any) -> None:
    backend = TokenBackend(token_contract(2))
    with token_engine(backend, **{"artifact_sha256": "ab", **options}) as engine:
        with pytest.raises(SessionError, match=words):
            engine.restore_session(file)
        assert engine.metrics().idle_sessions == 0


def test_a_session_of_another_artifact_is_refused(saved: Path) -> None:
    refused(saved, "was saved with another artifact.*load the engine it was saved with", artifact_sha256="cd")


def test_a_session_that_was_cut_short_is_refused_wherever(saved: Path) -> None:
    data = saved.read_bytes()
    for size in (0, 5, 16, 20, 30, 200, len(data) // 2, len(data) - 33, len(data) - 32, len(data) - 1):
        saved.write_bytes(data[:size])
        refused(saved, "is damaged|is not a saved session")
    saved.write_bytes(data + b"x")
    refused(saved, "is damaged")


def test_a_session_that_was_altered_is_refused_wherever(saved: Path) -> None:
    data = saved.read_bytes()
    for place in (0, 17, 20, 25, 60, 150, 400, len(data) - 200, len(data) - 5):
        altered = bytearray(data)
        altered[place] ^= 1
        saved.write_bytes(bytes(altered))
        refused(saved, "is damaged|is not a saved session|another artifact|expected format_version")


def test_what_is_no_session_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")
    (tmp_path / "text").write_text("hello" * 100)
    refused(tmp_path / "text", "is not a saved session")


def test_a_save_that_fails_leaves_the_file_that_was_there(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").write_bytes(b"before")
    session = engine.session()
    turn(session, prompt(5))

    def full(file: Any, header: Any, rings: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ring_file_module, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_session_restored_where_no_row_is_free_waits_in_memory(saved: Path) -> None:
    backend = TokenBackend(token_contract(1))
    with token_engine(backend, artifact_sha256="ab") as engine:
        running = engine.stream(prompt(3), greedy(1_000_000))
        next(running)
        session = engine.restore_session(saved)
        assert engine.metrics().session_bytes == backend.contract.ring_bytes_per_row
        running.close()
        assert turn(session, [1]) == expected(backend.contract, session.tokens[:-6], 6)


# ---------------------------------------------------------------- text and chats


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


Open = Callable[..., Engine]


@pytest.fixture
def opened(tokenizer_folder: Path, tmp_path: Path) -> Iterator[Open]:
    """opened(template=None) -> an engine with text over a new TokenBackend of 259 tokens."""
    engines: list[Engine] = []

    def engine(template: str | None = None, **options: Any) -> Engine:
        folder = tmp_path / f"tokenizer{len(engines)}"
        shutil.copytree(tokenizer_folder, folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        contract = token_contract(2, vocab=259)
        backend = TokenBackend(contract)
        tokenizer = Tokenizer.from_folder(folder)
        engines.append(Engine(backend, token_manifest(contract, eos=[1]), tokenizer, **options))
        return engines[-1]

    yield engine
    for made in engines:
        made.close()


CONTRACT = token_contract(2, vocab=259)


def test_a_text_goes_on_with_one_beginning(opened: Open) -> None:
    engine = opened()
    session = engine.session()
    for text in ("naïve café", " 日本", "🙂"):
        history = list(session.tokens)
        said = tokens_of(session.stream(text, greedy(5, ignore_eos=True)))
        new = engine.tokenizer.encode(text)
        assert said == expected(CONTRACT, [*history, *(new[1:] if history else new)], 5)
    assert session.tokens.count(0) == 1
    assert session.messages is None


def test_after_a_stop_string_the_history_holds_the_tokens_that_spelt_it(opened: Open) -> None:
    engine = opened()
    free = engine.generate(["abc"], greedy(30, ignore_eos=True))[0]
    ascii_pairs = [free.text[i : i + 2] for i in range(4, 20) if free.text[i : i + 2].isascii()]
    stop = ascii_pairs[0]
    session = engine.session()
    pieces = list(session.stream("abc", greedy(30, ignore_eos=True, stop=(stop,))))
    said = tokens_of(pieces)
    assert pieces[-1].finish_reason == "stop"
    assert "".join(piece.text for piece in pieces) == free.text[: free.text.index(stop)]
    assert list(session.tokens) == [*engine.tokenizer.encode("abc"), *said]
    assert tuple(said) == free.tokens[: len(said)]
    history = list(session.tokens)
    more = tokens_of(session.stream(None, greedy(5, ignore_eos=True)))
    assert more == expected(CONTRACT, history, 5)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_chat_feeds_what_is_new_and_equals_the_whole_encoded_at_once(opened: Open) -> None:
    engine = opened()
    session = engine.session("be short")
    assert session.messages == ({"role": "system", "content": "be short"},)
    for content in ("hi", "naïve café 日本", "🙂", "x"):
        before = engine.metrics()
        pieces = list(session.stream(messages=user(content), params=greedy(6, ignore_eos=True)))
        said = tokens_of(pieces)
        history = list(session.tokens)[: -len(said)]
        assert said == expected(CONTRACT, history, 6)
        assert session.messages is not None
        if "\ufffd" not in "".join(str(message["content"]) for message in session.messages):
            assert history == engine.tokenizer.encode_chat(session.messages[:-1])
        assert engine.metrics().session_restarts == 0
        if before.prompt_tokens:
            assert engine.metrics().prompt_tokens - before.prompt_tokens < 60
    assert [message["role"] for message in session.messages][:3] == ["system", "user", "assistant"]
    assert session.tokens.count(0) == 1


COUNTING = (
    "{{ bos_token }}{{ messages | length }}:{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% endfor %}[assistant] "
)


def test_a_template_that_rewrites_the_beginning_starts_over(opened: Open) -> None:
    engine = opened(COUNTING)
    session = engine.session()
    for number, content in enumerate(("hi", "you")):
        said = tokens_of(session.stream(messages=user(content), params=greedy(6, ignore_eos=True)))
        history = list(session.tokens)[: -len(said)]
        assert said == expected(CONTRACT, history, 6)
        assert engine.metrics().session_restarts == number
        assert session.messages is not None
        assert history == engine.tokenizer.encode_chat(session.messages[:-1])


def test_a_chat_can_be_saved_forked_and_restored(opened: Open, tmp_path: Path) -> None:
    engine = opened(artifact_sha256="ab")
    session = engine.session("be short")
    list(session.stream(messages=user("hi"), params=greedy(6, ignore_eos=True)))
    session.save(tmp_path / "chat")
    others = [session.fork(), engine.restore_session(tmp_path / "chat")]
    assert all(other.messages == session.messages for other in others)
    found = [
        tokens_of(chat.stream(messages=user("and"), params=greedy(6, ignore_eos=True)))
        for chat in (session, *others)
    ]
    assert found[0] == found[1] == found[2]
    assert all(other.tokens == session.tokens for other in others)


def test_a_chat_whose_answer_was_cut_goes_on(opened: Open) -> None:
    engine = opened()
    session = engine.session()
    stream = session.stream(messages=user("hi"), params=greedy(1_000_000, ignore_eos=True))
    for _ in range(5):
        next(stream)
    stream.close()
    said = tokens_of(session.stream(messages=user("more"), params=greedy(6, ignore_eos=True)))
    assert said == expected(CONTRACT, list(session.tokens)[:-6], 6)


@pytest.mark.parametrize(
    ("first", "ask", "words"),
    [
        ({"messages": user("a")}, {"prompt": "b"}, "this session is a chat: pass messages"),
        ({"prompt": "a"}, {"messages": user("b")}, "this session is a text: pass a prompt"),
        ({"prompt": "a"}, {"prompt": "b", "messages": user("b")}, "either a prompt or messages"),
        ({"messages": user("a")}, {"messages": "b"}, "messages"),
    ],
)
def test_a_session_is_a_text_or_a_chat(
    opened: Open, first: dict[str, Any], ask: dict[str, Any], words: str
) -> None:
    session = opened().session()
    list(session.stream(**first, params=SamplingParams(max_tokens=2, ignore_eos=True)))
    with pytest.raises(GenerationError, match=words):
        session.stream(**ask)


def test_a_wrong_slot_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring restored one position off says something else."""
    backend = TokenBackend(token_contract(2))
    restore = RollingCache.restore

    def off(self: RollingCache, row: int, snapshot: Any) -> None:
        restore(self, row, snapshot)
        self._next[row] += 1

    with token_engine(backend) as engine:
        session = engine.session()
        turn(session, prompt(9))
        occupy(engine)
        monkeypatch.setattr(RollingCache, "restore", off)
        assert turn(session, [1]) != expected(backend.contract, session.tokens[:-6], 6)


@pytest.mark.parametrize("seconds", [1.5, pytest.param(30.0, marks=pytest.mark.slow)])
def test_many_threads_with_sessions(tmp_path: Path, seconds: float) -> None:
    """Turns, forks, cancellations and closings beside plain requests, with room for two rings and a disk."""
    backend = TokenBackend(token_contract(4))
    size = backend.contract.ring_bytes_per_row
    engine = token_engine(backend, session_memory_bytes=2 * size, session_dir=tmp_path)
    deadline, turns = time.monotonic() + seconds, [0]
    wrong: list[object] = []

    def one_turn(session: Session, draw: np.random.Generator) -> None:
        before = list(session.tokens)
        new = [int(token) for token in draw.integers(0, 61, draw.integers(1, 20))]
        count, leaves = int(draw.integers(1, 12)), int(draw.integers(4))
        stream = session.stream(new, greedy(count))
        if leaves == 0:
            next(stream)
            stream.cancel()
        list(stream)
        asked, history = [*before, *new], list(session.tokens)
        if history != asked + expected(backend.contract, asked, len(history) - len(asked)):
            wrong.append((asked, history))
        turns[0] += 1

    def work(number: int) -> None:
        draw = np.random.default_rng(number)
        session = engine.session()
        while time.monotonic() < deadline:
            if number % 4 == 0:
                engine.generate([prompt(5, number)], greedy(5, n=1 + number % 3))
            else:
                one_turn(session, draw)
            if draw.integers(6) == 0:
                session = session.fork()  # the one before is forgotten
            if draw.integers(10) == 0:
                session.close()
                session = engine.session()

    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    with engine:
        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 60)
        assert not any(thread.is_alive() for thread in threads), "a session hangs"
        assert not failed, failed[:3]
        gc.collect()
        eventually(lambda: engine.metrics().idle_sessions == 0)
        found = engine.metrics()
    assert not wrong, wrong[:2]
    assert turns[0] > 24 and found.session_moves > 0
    assert list(tmp_path.iterdir()) == []


def test_a_turn_made_before_another_has_ended_is_fed_what_the_ring_lacks_then(
    backend: TokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ring holds is looked up when the turn gets its row, not when it was asked."""
    with token_engine(backend) as engine:
        session = engine.session()
        said = turn(session, prompt(5), 4)
        position = session._history.ring.position
        session._history.ring.position = 2  # as read while the turn before is being ended
        job = session._turn([7], greedy(3), None, False, False)
        session._history.ring.position = position
        found = tokens_of(Stream(job, engine._scheduler, engine))
        assert found == expected(backend.contract, [*prompt(5), *said, 7], 3)


def test_a_turn_made_before_its_session_was_closed_is_refused(backend: TokenBackend) -> None:
    with token_engine(backend) as engine:
        session = engine.session()
        turn(session, prompt(5), 4)
        job = session._turn([7], greedy(3), None, False, False)
        session.close()
        stream = Stream(job, engine._scheduler, engine)
        try:
            assert [piece.finish_reason for piece in stream] == ["cancelled"]
        except SessionError as error:  # it was queued after the session had been forgotten
            assert "the session was closed" in str(error)
        eventually(idle(engine))
