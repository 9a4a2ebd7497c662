"""Rings of idle sessions: bounds that hold, a disk that nobody who runs waits for, and what goes wrong.

W = 8, C = 4, R = 12, on the backend whose model is arithmetic.
"""

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.errors import BackendError, GenerationError, SessionError
from mistral_trt.runtime import Engine, Session
from mistral_trt.runtime.backend import RingArray
from mistral_trt.runtime.rings import ring_folder as ring_folder_module
from mistral_trt.runtime.rings.parked_rings import ParkedRings
from mistral_trt.runtime.rings.ring_file import read_ring
from tests.test_scheduler import NAME, greedy, idle, prompt
from tests.test_session import moving, occupy, turn
from tests.token_backend import TokenBackend, eventually, expected, token_contract, token_engine, tokens_of

SIZE = token_contract().ring_bytes_per_row


@pytest.fixture
def backend() -> TokenBackend:
    return TokenBackend(token_contract(2))


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What only the garbage collector would free stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class LiveRings:
    """Rings in host memory that anyone still refers to, whatever is counted."""

    def __init__(self, backend: TokenBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rings: list[weakref.ref[RingArray]] = []
        read_row = backend.read_row

        def from_row(row: int) -> tuple[RingArray, ...]:
            rings = read_row(row)
            self._rings.append(weakref.ref(rings[0]))
            return rings

        def from_file(*arguments: Any) -> Any:
            found = read_ring(*arguments)
            if found.state is not None:
                self._rings.append(weakref.ref(found.state.rings[0]))
            return found

        monkeypatch.setattr(backend, "read_row", from_row)
        monkeypatch.setattr(ring_folder_module, "read_ring", from_file)

    def count(self) -> int:
        self._rings = [ring for ring in self._rings if ring() is not None]
        return len(self._rings)


class Disk:
    """Holds every write or read up until it is let go, and knows the threads that used it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.threads, self.late = threading.Event(), set[str](), 0
        for name in ("write_ring", "read_ring", "_unlink"):
            monkeypatch.setattr(ring_folder_module, name, self._held(getattr(ring_folder_module, name)))

    def _held(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def held(*arguments: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            self.late += not self.go.wait(20)
            return function(*arguments)

        return held


@contextmanager
def held_up(engine: Engine) -> Iterator[None]:
    """What is asked for inside finds the scheduler's thread busy, so that it sees all of it at once."""
    go = threading.Event()
    engine._scheduler._inbox.put(lambda: go.wait(20))
    engine._scheduler._start()
    try:
        yield
    finally:
        go.set()


def goes_on(session: Session, backend: TokenBackend, *new: int) -> None:
    """A turn says what its history says."""
    before = [*session.tokens, *new]
    assert turn(session, new, 3) == expected(backend.contract, before, 3)


# ---------------------------------------------------------------- nobody who runs waits for a disk


def test_a_second_ring_to_be_written_holds_no_running_stream_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two idle sessions' rows are wanted while the disk takes nothing: who wants them waits in the queue."""
    backend = TokenBackend(token_contract(3))
    live, disk = LiveRings(backend, monkeypatch), Disk(monkeypatch)
    with token_engine(backend, session_memory_bytes=SIZE, session_dir=tmp_path) as engine:
        sessions = [engine.session() for _ in range(2)]
        running = engine.stream(prompt(3), greedy(1_000_000))
        for number, session in enumerate(sessions):
            turn(session, prompt(5, number), 2)
        both, behind = engine.stream(prompt(4), greedy(3, n=2)), engine.stream(prompt(2), greedy(3))
        for _ in range(300):
            next(running)
            assert engine.metrics().session_bytes <= SIZE and live.count() <= 1
        assert engine.metrics().queue_length == 2
        disk.go.set()
        assert len(tokens_of(both)) == 6
        assert tokens_of(behind) == expected(backend.contract, prompt(2), 3)
        running.close()
        for session in sessions:
            goes_on(session, backend, 1)
        del session, sessions
        eventually(lambda: engine.metrics().idle_sessions == 0 and not moving(engine))
        assert live.count() == 0
    assert disk.late == 0 and disk.threads and NAME not in disk.threads


def test_a_turn_whose_ring_is_read_keeps_its_place_and_others_go_on(
    backend: TokenBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    disk.go.set()
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        eventually(lambda: engine.metrics().session_disk_bytes == SIZE)
        disk.go.clear()
        before = list(session.tokens)
        late = session.stream([1], greedy(3))
        for seed in range(5):
            assert tokens_of(engine.stream(prompt(4, seed), greedy(3))) == expected(
                backend.contract, prompt(4, seed), 3
            )
        assert engine.metrics().queue_length == 1
        with held_up(engine):
            disk.go.set()
            behind = [engine.stream(prompt(2), greedy(50_000)) for _ in range(2)]
            eventually(lambda: engine._scheduler._inbox.qsize() >= 3)  # two requests, and the ring
        assert tokens_of(late) == expected(backend.contract, [*before, 1], 3)
        for stream in behind:
            stream.close()
    assert NAME not in disk.threads


def test_a_turn_goes_on_from_memory_while_its_ring_is_written(
    backend: TokenBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, disk = LiveRings(backend, monkeypatch), Disk(monkeypatch)
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        goes_on(session, backend, 1)
        assert moving(engine) and engine.metrics().session_bytes == SIZE and live.count() == 1
        disk.go.set()
        eventually(lambda: not moving(engine))
        assert engine.metrics().session_bytes == 0
        eventually(lambda: list(tmp_path.rglob("*.ring")) == [])


def test_a_fork_waits_for_room_and_no_stream_for_the_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TokenBackend(token_contract(3))
    live, disk = LiveRings(backend, monkeypatch), Disk(monkeypatch)
    with token_engine(backend, session_memory_bytes=SIZE, session_dir=tmp_path) as engine:
        parked, session = engine.session(), engine.session()
        turn(parked, prompt(4), 2)
        occupy(engine, 3)
        turn(session, prompt(5), 2)
        running = [engine.stream(prompt(3, seed), greedy(1_000_000)) for seed in range(2)]
        next(running[1])
        forks: list[Session] = []
        forking = threading.Thread(target=lambda: forks.append(session.fork()))
        forking.start()
        for _ in range(200):
            next(running[0])
        assert forking.is_alive() and live.count() <= 1
        disk.go.set()
        forking.join(20)
        for stream in running:
            stream.close()
        goes_on(session, backend, 7)
        goes_on(forks[0], backend, 8)
        goes_on(parked, backend, 9)


def test_an_engine_that_is_closed_refuses_a_fork_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TokenBackend(token_contract(1))
    disk = Disk(monkeypatch)
    engine = token_engine(backend, session_memory_bytes=0, session_dir=tmp_path)
    first, second = engine.session(), engine.session()
    turn(first, prompt(4), 2)
    turn(second, prompt(5), 2)  # the first is being written now
    errors: list[str] = []

    def fork() -> None:
        try:
            second.fork()
        except Exception as error:
            errors.append(str(error))

    forking = threading.Thread(target=fork)
    forking.start()
    eventually(lambda: bool(engine._scheduler._postponed))
    closing = threading.Thread(target=engine.close)
    closing.start()
    forking.join(10)
    assert errors == ["the engine was closed; load it again"]
    disk.go.set()
    closing.join(10)
    assert not closing.is_alive() and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the bounds


def crowd(engine: Engine, count: int) -> list[Session]:
    """Sessions with one turn each, the first of them used least recently."""
    sessions = [engine.session() for _ in range(count)]
    for number, session in enumerate(sessions):
        turn(session, prompt(4, number), 2)
    return sessions


@pytest.mark.parametrize("queued", [False, True])
def test_without_a_disk_memory_holds_no_more_whoever_is_queued(
    monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    """One row, room for one ring: a request drops the ring on the row, not the one that is waited for."""
    backend = TokenBackend(token_contract(1))
    live = LiveRings(backend, monkeypatch)
    with token_engine(backend, session_memory_bytes=SIZE) as engine:
        first, second = crowd(engine, 2)
        asked = [*first.tokens, 1]
        with held_up(engine):
            plain = engine.stream(prompt(3), greedy(3))
            streams = [first.stream([1], greedy(3))] + ([second.stream([1], greedy(3))] if queued else [])
        assert tokens_of(plain) == expected(backend.contract, prompt(3), 3)
        assert tokens_of(streams[0]) == expected(backend.contract, asked, 3)
        with pytest.raises(SessionError, match="its ring was dropped.*more session_memory_bytes or with"):
            list(streams[1] if queued else second.stream([1], greedy(3)))
        assert live.count() <= 1
        eventually(idle(engine))


def test_with_a_disk_nobody_who_is_queued_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TokenBackend(token_contract(1))
    live = LiveRings(backend, monkeypatch)
    with token_engine(backend, session_memory_bytes=SIZE, session_dir=tmp_path) as engine:
        sessions = crowd(engine, 5)
        for _ in range(3):
            asked = [[*session.tokens, 1] for session in sessions]
            with held_up(engine):
                plain = engine.stream(prompt(3), greedy(3))
                streams = [session.stream([1], greedy(3)) for session in sessions]
                others = [engine.stream(prompt(3, seed), greedy(3)) for seed in range(3)]
            assert tokens_of(plain) == expected(backend.contract, prompt(3), 3)
            for stream, history in zip(streams, asked, strict=True):
                assert engine.metrics().session_bytes <= 2 * SIZE  # two change places
                assert tokens_of(stream) == expected(backend.contract, history, 3)
            assert [len(tokens_of(other)) for other in others] == [3, 3, 3]
        eventually(lambda: not moving(engine))
        assert live.count() <= 1 and engine.metrics().session_bytes <= SIZE


@pytest.mark.parametrize(("bound", "kept"), [(0, 1), (1, 2), (3, 4)])
def test_files_hold_no_more_than_their_bound_and_what_is_dropped_says_so(
    tmp_path: Path, bound: int, kept: int
) -> None:
    """One row; memory is on the way to a file."""
    backend = TokenBackend(token_contract(1))
    options: dict[str, Any] = {"session_dir": tmp_path, "session_disk_bytes": bound * SIZE + SIZE // 2}
    with token_engine(backend, session_memory_bytes=0, **options) as engine:
        sessions = crowd(engine, 6)
        eventually(lambda: not moving(engine))
        assert len(list(tmp_path.rglob("*.ring"))) == bound
        assert engine.metrics().session_disk_bytes == bound * SIZE
        for session in sessions[: 6 - kept]:
            with pytest.raises(SessionError, match="its ring was dropped.*more session_disk_bytes"):
                turn(session, [1])
        goes_on(sessions[-1], backend, 1)


def test_files_have_a_bound_where_none_is_given(tmp_path: Path) -> None:
    backend = TokenBackend(token_contract(1))
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        sessions = crowd(engine, 35)
        eventually(lambda: not moving(engine))
        assert engine.metrics().session_disk_bytes == 32 * SIZE
        assert [session._history.ring.lost is not None for session in sessions[:3]] == [True, True, False]


def test_a_bound_of_files_without_a_folder_is_refused(backend: TokenBackend) -> None:
    with pytest.raises(GenerationError, match="session_disk_bytes is a bound of session_dir; pass that too"):
        token_engine(backend, session_disk_bytes=10**6)


def test_these_bounds_see_rings_that_are_not_counted(
    backend: TokenBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would they notice? Rings that are being written are left out of the count."""

    def wrong(self: ParkedRings, leaving: object = None) -> int:
        return sum(ring.snapshot is not self._writing for ring in self._in_memory)

    monkeypatch.setattr(ParkedRings, "_held", wrong)
    live, disk = LiveRings(backend, monkeypatch), Disk(monkeypatch)
    with token_engine(backend, session_memory_bytes=SIZE, session_dir=tmp_path) as engine:
        sessions = crowd(engine, 2)
        list(engine.stream(prompt(4), greedy(3, n=2)))
        assert live.count() == len(sessions)
        disk.go.set()


# ---------------------------------------------------------------- forks share what nobody writes to


def test_a_fork_of_a_parked_ring_takes_no_room(
    backend: TokenBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveRings(backend, monkeypatch)
    with token_engine(backend, session_memory_bytes=2 * SIZE, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        forks = [session.fork() for _ in range(4)]
        assert live.count() == 1 and engine.metrics().session_bytes == SIZE
        assert engine.metrics().idle_sessions == 5
        crowd(engine, 6)
        for number, fork in enumerate(forks):
            goes_on(fork, backend, number)
        goes_on(session, backend, 9)


def test_sessions_that_share_a_file_come_and_go_apart(backend: TokenBackend, tmp_path: Path) -> None:
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        eventually(lambda: engine.metrics().session_disk_bytes == SIZE)
        first, second = session.fork(), session.fork()
        assert len(list(tmp_path.rglob("*.ring"))) == 1 and engine.metrics().session_disk_bytes == SIZE
        session.close()
        goes_on(first, backend, 1)
        occupy(engine)
        goes_on(second, backend, 2)
        for one in (first, second):
            one.close()
        eventually(lambda: engine.metrics().idle_sessions == 0 and not moving(engine))
        eventually(lambda: list(tmp_path.rglob("*.ring")) == [])


def test_a_turn_of_a_session_that_is_gone_takes_no_row_from_another() -> None:
    backend = TokenBackend(token_contract(1))
    with token_engine(backend, session_memory_bytes=0) as engine:
        gone, session = crowd(engine, 2)
        with pytest.raises(SessionError, match="its ring was dropped"):
            turn(gone, [1])
        goes_on(session, backend, 1)


def test_a_fork_that_will_find_no_room_is_refused() -> None:
    backend = TokenBackend(token_contract(1))
    with token_engine(backend, session_memory_bytes=0) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        with pytest.raises(
            SessionError, match="no row is free.*more session_memory_bytes or with session_dir"
        ):
            session.fork()
        goes_on(session, backend, 1)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("method", ["fork", "restore"])
def test_a_copy_that_fails_leaves_no_row_and_no_session_behind(
    backend: TokenBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with token_engine(backend) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        session.save(tmp_path / "saved")
        write = backend.write_row
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(backend, "copy_row", lambda *_: 1 / 0)
                patch.setattr(
                    backend, "write_row", lambda row, rings: write(row, rings) if rings is None else 1 / 0
                )
                with pytest.raises(ZeroDivisionError):
                    session.fork() if method == "fork" else engine.restore_session(tmp_path / "saved")
            assert engine.metrics().idle_sessions == 1
            assert engine._scheduler._cache.free_rows == 1
        goes_on(session, backend, 1)
        occupy(engine)


def test_a_file_that_cannot_be_deleted_is_logged_and_holds_nobody_up(
    backend: TokenBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unlink, threads = Path.unlink, set[str]()

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".ring":
            threads.add(threading.current_thread().name)
            raise OSError(16, "Device or resource busy")
        unlink(self, missing_ok=missing_ok)

    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        eventually(lambda: engine.metrics().session_disk_bytes == SIZE)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(Path, "unlink", refused)
            goes_on(session, backend, 1)
            eventually(lambda: "could not be deleted: [Errno 16]" in caplog.text)
        assert engine.ready and engine.metrics().session_disk_bytes == 0
        assert threads and NAME not in threads
    assert list(tmp_path.iterdir()) == []


def test_a_turn_that_fails_on_the_way_to_its_row_leaves_the_row_free(
    backend: TokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with token_engine(backend) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        write = backend.write_row
        with monkeypatch.context() as patch:
            patch.setattr(
                backend, "write_row", lambda row, rings: write(row, rings) if rings is None else 1 / 0
            )
            with pytest.raises(BackendError, match="division"):
                turn(session, [1])
        eventually(idle(engine))
        assert engine._scheduler._cache.free_rows == 2


# ---------------------------------------------------------------- an error keeps nothing


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("name", ["write_ring", "read_ring"])
def test_a_disk_that_fails_keeps_no_ring_in_memory(
    backend: TokenBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    live = LiveRings(backend, monkeypatch)
    works = getattr(ring_folder_module, name)

    def fails_late(*arguments: Any) -> None:
        found = works(*arguments)
        raise OSError(5, f"Input/output error after {type(found).__name__}")

    monkeypatch.setattr(ring_folder_module, name, fails_late)
    with token_engine(backend, session_memory_bytes=0, session_dir=tmp_path) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        eventually(lambda: session._history.ring.row is None and not moving(engine))
        with pytest.raises(SessionError, match="Input/output error"):
            turn(session, [1])
        eventually(lambda: live.count() == 0)


@pytest.mark.usefixtures("uncollected")
def test_an_error_that_is_kept_keeps_no_ring(backend: TokenBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    live, write = LiveRings(backend, monkeypatch), backend.write_row

    def fails(row: int, rings: Any) -> None:
        write(row, rings)
        if rings is not None:
            try:
                raise OSError("the device is busy")
            except OSError as error:
                raise BackendError("no ring was written") from error

    with token_engine(backend) as engine:
        session = engine.session()
        turn(session, prompt(5), 2)
        occupy(engine)
        assert live.count() == 1
        monkeypatch.setattr(backend, "write_row", fails)
        with pytest.raises(BackendError, match="no ring was written") as kept:
            turn(session, [1])
        eventually(lambda: live.count() == 0)
        assert kept.value.__cause__ is not None and kept.value.__cause__.__traceback__ is not None


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("method", ["stream", "astream", "generate", "fork"])
def test_an_error_that_is_dropped_keeps_no_session(
    backend: TokenBackend, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It had the caller's frames, and the session was one of their variables."""

    def explodes(tokens: Any, logits: Any) -> Any:
        raise ValueError("as planned")

    params = greedy(3, logits_processors=(explodes,))

    def fails() -> None:
        session = engine.session()
        turn(session, prompt(5), 2)
        assert engine.metrics().idle_sessions == 1
        if method == "stream":
            list(session.stream([1], params))
        elif method == "generate":
            engine.generate([prompt(2)], params)
        elif method == "fork":
            session.fork()

    async def fails_in_a_loop() -> None:
        session = engine.session()
        async for _ in session.astream([1], params):
            pass

    async def loop() -> None:
        with suppress(GenerationError):
            await fails_in_a_loop()
        eventually(lambda: engine.metrics().idle_sessions == 0)

    monkeypatch.setattr(backend, "copy_row", lambda *_: 1 / 0)
    with token_engine(backend) as engine:
        if method == "astream":
            asyncio.run(loop())
        with suppress(GenerationError, ZeroDivisionError):
            fails()
        eventually(lambda: engine.metrics().idle_sessions == 0)
