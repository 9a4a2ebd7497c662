"""A backend whose model is arithmetic on tokens, for tests of what runs it.

Its ring holds the tokens themselves, one a slot, and a position's logits are a fixed function of the tokens
that the window shows there. So a token that lands in a wrong row or slot, is fed twice or not at all, or a
ring that is not what it should be, changes what comes out; and `expected` says without any ring what should.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np

from mistral_trt.contract import GraphContract, plan_contract
from mistral_trt.manifest import Manifest
from mistral_trt.runtime import Engine, Piece
from mistral_trt.runtime.backend import Logits, RingArray, Step
from tests.models import TINY

VOCAB = 61
_STATES = 1021


def token_contract(
    rows: int = 4,
    *,
    window: int | None = 8,
    chunk: int = 4,
    vocab: int = VOCAB,
    max_context: int | None = None,
) -> GraphContract:
    """W=8, C=4 (R=12) and 4 rows, of one head of one number."""
    config = replace(
        TINY, vocab_size=vocab, num_hidden_layers=1, num_key_value_heads=1, head_dim=2, sliding_window=window
    )
    return plan_contract(
        config, precision="fp32", prefill_chunk=chunk, max_batch_size=rows, max_context=max_context
    )


def token_manifest(contract: GraphContract, *, eos: Sequence[int] = ()) -> Manifest:
    details = {"generation": {"eos_token_ids": list(eos)}}
    return Manifest("onnx", {}, {}, contract, {}, details)


@dataclass(frozen=True)
class Call:
    """What a call of the graph fed.  tokens: of each row, [B][S]."""

    kind: str
    first_row: int
    tokens: tuple[tuple[int, ...], ...]

    @property
    def batch(self) -> int:
        return len(self.tokens)


class TokenBackend:
    """calls: every call of the graph.  before, after: called around each one, to hold it up or spoil it."""

    def __init__(self, contract: GraphContract) -> None:
        self.contract = contract
        shape = [int(size) for size in contract.past()[0].shape[1:]]
        rows = contract.max_batch_size
        self.rings = [np.zeros((rows, *shape), np.float32) for _ in contract.past()]
        self.calls: list[Call] = []
        self.copied: list[tuple[int, int]] = []
        self.written: list[tuple[int, bool]] = []
        self.before: Callable[[Step], object] = lambda step: None
        self.after: Callable[[Step, Logits], object] = lambda step, logits: None
        self.closed = 0
        self.threads: set[str] = set()
        self._table = logits_table(contract.config.vocab_size)

    @property
    def ready(self) -> bool:
        return not self.closed

    def warm_up(self, progress: Callable[[str, float], None] | None = None) -> None:
        """Nothing to do."""

    def run(self, step: Step) -> Logits:
        self._entered()
        kind = "prefill" if step.input_ids.shape[1] > 1 or step.first_row else "decode"
        self.calls.append(Call(kind, step.first_row, tuple(map(tuple, step.input_ids.tolist()))))
        self.before(step)
        batch, count = step.logits_index.shape
        logits = np.empty((batch, count, self.contract.config.vocab_size), np.float32)
        for b in range(batch):
            row = step.first_row + b
            for token, position in zip(step.input_ids[b], step.position_ids[b], strict=True):
                self.rings[0][row, 0, self.contract.ring.cache_slot(int(position)), 0] = token + 1
            for n, index in enumerate(step.logits_index[b]):
                logits[b, n] = self._table[self._state(row, int(step.position_ids[b, index]), step, b)]
        self.after(step, logits)
        return logits

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        self._entered()
        return tuple(ring[row].copy() for ring in self.rings)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        self._entered()
        self.written.append((row, rings is None))
        for i, ring in enumerate(self.rings):
            ring[row] = 0 if rings is None else rings[i]

    def copy_row(self, source: int, target: int) -> None:
        self._entered()
        self.copied.append((source, target))
        for ring in self.rings:
            ring[target] = ring[source]

    def close(self) -> None:
        self.closed += 1

    def _entered(self) -> None:
        assert not self.closed, "called after it was closed"
        self.threads.add(threading.current_thread().name)

    def _state(self, row: int, query: int, step: Step, b: int) -> int:
        """What the ring shows to a query, hashed in the order of positions."""
        ring, end = self.contract.ring, int(step.position_ids[b, -1])
        held = sorted(
            (position, slot)
            for slot in range(ring.capacity)
            if ring.visible(query, position := ring.held_position(slot, end))
        )
        values = [float(self.rings[0][row, 0, slot, 0]) for _, slot in held]
        if not np.isfinite(values).all():
            return -1
        return window_state([int(value) for value in values], query)


@cache
def logits_table(vocab: int) -> Logits:
    """float32 [states + 1, V]; the last is what a ring with NaN gives."""
    table = np.random.default_rng(3).normal(0, 3, (_STATES + 1, vocab)).astype(np.float32)
    table[-1] = np.nan
    return table


def window_state(values: Sequence[int], query: int) -> int:
    state = query
    for value in values:
        state = (state * 31 + value) % _STATES
    return state


def expected_logits(contract: GraphContract, tokens: Sequence[int]) -> Logits:
    """Logits [V] after `tokens`, from the list alone."""
    window = [token + 1 for token in tokens[-contract.ring.sliding_window :]]
    state = window_state(window, len(tokens) - 1)
    return np.asarray(logits_table(contract.config.vocab_size)[state])


def expected(contract: GraphContract, prompt: Sequence[int], count: int) -> list[int]:
    """The first `count` greedy tokens after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(expected_logits(contract, tokens).argmax()))
    return tokens[len(prompt) :]


class Gate:
    """Holds up every call of a backend until the test lets it through: `backend.before = Gate()`."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._arrived: SimpleQueue[Step] = SimpleQueue()
        self._open = False

    def __call__(self, step: Step) -> None:
        self._arrived.put(step)
        if not self._open:
            assert self._permits.acquire(timeout=20), "the test let nothing through"

    def wait(self) -> Step:
        """Until a call has arrived; it stays held."""
        return self._arrived.get(timeout=20)

    def let(self, calls: int = 1) -> None:
        """Let so many calls through."""
        self._permits.release(calls)

    def open(self) -> None:
        """Hold up nothing any more."""
        self._open = True
        self._permits.release(1000)


def token_engine(backend: TokenBackend, *, eos: Sequence[int] = (), **options: Any) -> Engine:
    """An engine of token ids over this backend."""
    return Engine(backend, token_manifest(backend.contract, eos=eos), None, **options)


def tokens_of(pieces: Iterable[Piece]) -> list[int]:
    return [piece.token for piece in pieces if piece.token is not None]


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)
