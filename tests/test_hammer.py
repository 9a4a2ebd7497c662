"""Everything at once: sessions, forks, samples, cancels, and a backend and a disk that fail now and then.

Whatever is said is what the request says alone, or its error is one that was planted; nothing hangs, and in
the end no row, ring, file or turn is left. W = 8, C = 4, R = 12, on the backend whose model is arithmetic.
"""

import gc
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from mistral_trt.errors import MistralTrtError, QueueFullError
from mistral_trt.runtime import Engine, SamplingParams, Stream
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.input_processor import InputProcessor
from mistral_trt.runtime.rings import ring_folder as ring_folder_module
from tests.test_ring_store import LiveRings
from tests.test_scheduler import idle, prompt
from tests.test_session import moving
from tests.token_backend import (
    TokenBackend,
    eventually,
    expected_logits,
    token_contract,
    token_engine,
    tokens_of,
)

pytestmark = pytest.mark.alone

ROWS = 6
MEMORY_RINGS = 3
PLANTED = "planted"
EXCUSES = (PLANTED, "non-finite", "NaN", "its ring was dropped", "cannot be read")


def faults(backend: TokenBackend, monkeypatch: pytest.MonkeyPatch, *, every: int) -> None:
    """One of `every` steps fails, and one in ten calls that move a ring, which are far fewer; zeroing a row,
    which must not, never."""
    draw, lock = np.random.default_rng(5), threading.Lock()

    def strikes(every: int) -> bool:
        with lock:
            return int(draw.integers(every)) == 0

    def plant(owner: object, name: str, every: int) -> None:
        function = getattr(owner, name)

        def run(*arguments: Any) -> Any:
            if arguments[-1] is not None and strikes(every):
                raise OSError(f"{PLANTED} in {name}")
            return function(*arguments)

        monkeypatch.setattr(owner, name, run)

    plant(backend, "run", every)
    for name in ("read_row", "write_row", "copy_row"):
        plant(backend, name, 10)
    for name in ("write_ring", "read_ring"):
        plant(ring_folder_module, name, 10)
    backend.after = lambda step, logits: logits.fill(np.nan) if strikes(every) else None


def alone(inputs: InputProcessor, asked: Sequence[int], params: SamplingParams, index: int) -> list[int]:
    """What a request says, from its tokens alone: no ring, no rows, no thread."""
    said: list[int] = []
    sample = inputs.job(inputs.request(asked, params)).samples[index]
    while sample.finished is None:
        piece = sample.accept(expected_logits(inputs.contract, [*asked, *said]))
        if piece is not None and piece.token is not None:
            said.append(piece.token)
    return said


class Client:
    """One thread of the crowd: draws what to do, and judges what it hears."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine, self._draw = engine, np.random.default_rng(number)
        self._session = engine.session()
        self._inputs = InputProcessor(engine.manifest, None)  # what it makes is for one thread
        self.heard: Counter[str] = Counter()
        self.wrong: list[object] = []

    def act(self) -> None:
        what = int(self._draw.integers(10))
        try:
            if what < 3:
                self._plain()
            elif what < 8:
                self._turn()
            elif what == 8:
                self._session = self._session.fork()  # the one before is forgotten
                self.heard["fork"] += 1
            else:
                self._session.close()
                self._session = self._engine.session()
        except QueueFullError:
            self.heard["queue full"] += 1
            time.sleep(0.002)
        except (MistralTrtError, OSError) as error:
            self._excuse(error)

    def _plain(self) -> None:
        asked = prompt(int(self._draw.integers(1, 20)), int(self._draw.integers(100)))
        self._judge(self._engine.stream, asked, asked, n=1 + int(self._draw.integers(3)))

    def _turn(self) -> None:
        session = self._session
        new = [int(token) for token in self._draw.integers(0, 61, self._draw.integers(1, 12))]
        self._judge(session.stream, new, [*session.tokens, *new], n=1)

    def _judge(self, ask: Callable[..., Stream], new: list[int], asked: list[int], *, n: int) -> None:
        params = SamplingParams(
            max_tokens=int(self._draw.integers(1, 14)),
            n=n,
            seed=int(self._draw.integers(4)),
            temperature=float(self._draw.choice([0.0, 0.8, 1.3])),
            top_k=int(self._draw.choice([0, 5])),
            frequency_penalty=float(self._draw.choice([0.0, 0.5])),
        )
        leaves = int(self._draw.integers(params.max_tokens)) if self._draw.integers(4) == 0 else None
        pieces, failure = [], None
        stream = ask(new, params)
        try:
            for piece in stream:
                pieces.append(piece)
                if leaves is not None and len(pieces) > leaves:
                    stream.cancel()
        except MistralTrtError as error:
            failure = error
        for index in range(n):
            said = tokens_of(piece for piece in pieces if piece.index == index)
            ends = [p.finish_reason for p in pieces if p.index == index and p.finish_reason]
            should = alone(self._inputs, asked, params, index)
            if said != should[: len(said)] or (ends == ["length"] and said != should):
                self.wrong.append((asked, params, index, said, should))
            self.heard[ends[0] if ends else "error"] += 1
        if failure is not None:
            self._excuse(failure)

    def _excuse(self, error: Exception) -> None:
        """An error that was planted, or followed from one. The session may be gone: there is a new one."""
        if not any(words in str(error) for words in EXCUSES):
            self.wrong.append(error)
        self.heard[type(error).__name__] += 1
        self.heard.update(re.findall(f"{PLANTED} in [a-z_]+", str(error)))
        self._session = self._engine.session()


def nothing_is_left(engine: Engine) -> None:
    """No row, ring, file, turn or request."""
    gc.collect()
    scheduler = engine._scheduler
    eventually(lambda: idle(engine)() and engine.metrics().idle_sessions == 0 and not moving(engine))
    eventually(lambda: scheduler._cache.free_rows == ROWS)
    assert not scheduler._queue._turns and not scheduler._postponed and not scheduler._batch._jobs
    assert not scheduler._store._on_rows


def has_heard(clients: Sequence[Client], engine: Engine, until: Mapping[str, int]) -> bool:
    """Whether each was heard so often, and rings have moved."""
    moved = engine.metrics().session_moves > 0
    return moved and all(sum(c.heard[what] for c in clients) >= count for what, count in until.items())


def hammer(
    seconds: float,
    threads: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    every: int = 300,
    until: Mapping[str, int] = MappingProxyType({}),
) -> Counter[str]:
    """What the clients heard, after everything was found right.

    until: what is to be heard, and how often; as long as it is not, the crowd goes on after `seconds`, up to
    90 s.
    """
    backend = TokenBackend(token_contract(ROWS))
    live = LiveRings(backend, monkeypatch)
    faults(backend, monkeypatch, every=every)
    size = backend.contract.ring_bytes_per_row
    engine = token_engine(
        backend,
        queue_size=threads // 2,
        session_memory_bytes=MEMORY_RINGS * size,
        session_dir=folder,
        session_disk_bytes=8 * size,
    )
    clients = [Client(engine, number) for number in range(threads)]
    start, over, died = time.monotonic(), threading.Event(), list[BaseException]()

    def work(client: Client) -> None:
        try:
            while not over.is_set():
                client.act()
        except BaseException as error:
            died.append(error)

    with engine:
        workers = [threading.Thread(target=work, args=(client,)) for client in clients]
        for worker in workers:
            worker.start()
        try:
            while (lasted := time.monotonic() - start) < seconds or (
                lasted < 90 and not died and not has_heard(clients, engine, until)
            ):
                found = engine.metrics()
                # Two may change places, and the thread of the files may just have let go of one.
                assert live.count() <= MEMORY_RINGS + 2, "more rings in memory than there is room for"
                assert found.session_disk_bytes <= 8 * size and found.active_rows <= ROWS
                time.sleep(0.01)
        finally:
            over.set()
        for worker in workers:
            worker.join(60)
        assert not any(worker.is_alive() for worker in workers), "a client hangs"
        wrong = [one for client in clients for one in client.wrong]
        heard = sum((client.heard for client in clients), Counter[str]())
        assert not died and not wrong, (died[:2], wrong[:2])
        moves = engine.metrics().session_moves
        del clients, workers
        nothing_is_left(engine)
        eventually(lambda: live.count() == 0 and list(folder.rglob("*.ring")) == [])
        assert engine.ready and backend.threads == {"mistral-trt-scheduler"} and moves > 0
    assert list(folder.iterdir()) == []
    return heard


def test_a_crowd_and_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hammer(2.0, 16, tmp_path, monkeypatch, until={"length": 1})["length"] > 0


@pytest.mark.slow
def test_a_large_crowd_and_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("run", "read_row", "write_row", "copy_row", "write_ring", "read_ring")
    until = dict.fromkeys(("length", "cancelled", "error", "fork"), 10)
    until |= dict.fromkeys(("BackendError", "NonFiniteLogitsError", "SessionError"), 1)
    until |= {f"{PLANTED} in {name}": 1 for name in names}
    heard = hammer(25.0, 64, tmp_path, monkeypatch, until=until)
    assert all(heard[what] >= count for what, count in until.items()), heard


def test_that_crowd_sees_a_ring_that_comes_back_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would it notice? A ring that comes back is one position off."""
    restore = RollingCache.restore

    def off(self: RollingCache, row: int, snapshot: Any) -> None:
        restore(self, row, snapshot)
        self._next[row] += 1

    monkeypatch.setattr(RollingCache, "restore", off)
    with pytest.raises(AssertionError):
        hammer(2.0, 16, tmp_path, monkeypatch)
