"""What a sequence says does not depend on what else the engine does.

Random scenarios of requests that join, leave, are cancelled, share a prompt (n > 1), take turns in sessions
and fork: each text's tokens, greedy or seeded, are those of the same request running alone. The scheduler is
held at every call of the graph and the scenario says what happens there, so that it runs the same way every
time. Float32, W = 8, C = 4, R = 12: prompts of one token to three windows.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mistral_trt.manifest import read_manifest
from mistral_trt.runtime import Engine, SamplingParams, Session, Stream
from mistral_trt.runtime.backend import Backend, Logits, RingArray, Step
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.history import Turn
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.runtime.sampling import sampler as sampler_module
from tests.conftest import Folder
from tests.simulated.folder import machine, write_engine_folder
from tests.token_backend import eventually, tokens_of

ROWS, WINDOW, VOCAB = 8, 8, 97
KINDS = [
    ("onnxruntime", False),
    ("onnxruntime", True),
    ("tensorrt-rtx", False),
    ("tensorrt-rtx", True),
    ("tensorrt", False),
    ("tensorrt", True),
]


class Held:
    """A backend that calls the test before each call of the graph."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.contract = backend.contract
        self.before: Callable[[], None] = _nothing

    def run(self, step: Step) -> Logits:
        self.before()
        return self._backend.run(step)

    @property
    def ready(self) -> bool:
        return self._backend.ready

    def warm_up(self, progress: Callable[[str, float], None] | None = None) -> None:
        self._backend.warm_up(progress)

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        return self._backend.read_row(row)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        self._backend.write_row(row, rings)

    def copy_row(self, source: int, target: int) -> None:
        self._backend.copy_row(source, target)

    def close(self) -> None:
        self._backend.close()


def _nothing() -> None:
    """Between two scenarios."""


@dataclass(frozen=True)
class Stage:
    """The engine under test, the backend that it is held by, and one that runs each request alone."""

    engine: Engine
    held: Held
    alone: Engine


@pytest.fixture(scope="module")
def stages(onnx_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stage]]:
    """stages(kind, fixed_batch) -> engines over ONNX Runtime, or TensorRT on a simulated GPU."""
    onnx = onnx_folder(max_batch_size=ROWS, num_hidden_layers=1)
    manifest = read_manifest(onnx, check_files=False)
    made: dict[tuple[str, bool], Stage] = {}

    def backend(kind: str) -> Backend:
        if kind == "onnxruntime":
            return OnnxRuntimeBackend(onnx / "model.onnx", manifest.contract, threads=1)
        out: Path = tmp_path_factory.mktemp("engine") / "engine"
        opened = machine(kind).open(write_engine_folder(onnx, out, flavor=kind))
        opened.warm_up()
        return opened

    def stage(kind: str, fixed_batch: bool) -> Stage:
        if (kind, fixed_batch) not in made:
            held = Held(backend(kind))
            options: dict[str, Any] = {"fixed_batch": fixed_batch, "session_memory_bytes": 10**9}
            made[kind, fixed_batch] = Stage(
                Engine(held, manifest, None, **options),
                held,
                Engine(backend(kind), manifest, None, fixed_batch=fixed_batch),
            )
        return made[kind, fixed_batch]

    yield stage
    for opened in made.values():
        opened.engine.close()
        opened.alone.close()


# ---------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Part:
    """One text: new tokens, how it is continued, and after how many tokens it is cancelled."""

    new: tuple[int, ...]
    params: SamplingParams
    cancel_after: int | None


@dataclass(frozen=True)
class Actor:
    """One client.  at: the call of the graph at which it joins.

    parts: one for a plain request, one a turn for a session.  fork_after: turns after which a fork of the
    session takes the rest of the turns too, with `fork_token` before each.
    """

    at: int
    session: bool
    parts: tuple[Part, ...]
    fork_after: int | None
    fork_token: int


@st.composite
def parts(draw: st.DrawFn, session: bool) -> Part:
    length = draw(st.integers(1, 3 * WINDOW))
    new = np.random.default_rng(draw(st.integers(0, 10**6))).integers(0, VOCAB, length)
    rules: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"temperature": 1.0},
                {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
                {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.2},
                {"frequency_penalty": 0.7, "presence_penalty": 0.3},
            ]
        )
    )
    count = draw(st.integers(1, 24))
    params = SamplingParams(
        max_tokens=count,
        seed=draw(st.integers(0, 3)),
        n=1 if session else draw(st.sampled_from([1, 1, 1, 2, 3, 8])),
        **rules,
    )
    cancel = draw(st.none() | st.none() | st.integers(0, count))
    return Part(tuple(int(token) for token in new), params, cancel)


@st.composite
def actors(draw: st.DrawFn) -> Actor:
    session = draw(st.booleans())
    taken = draw(st.lists(parts(session), min_size=1, max_size=4 if session else 1))
    fork = draw(st.none() | st.integers(0, len(taken) - 1)) if session else None
    return Actor(draw(st.integers(0, 60)), session, tuple(taken), fork, draw(st.integers(0, VOCAB - 1)))


SCENARIOS = st.lists(actors(), min_size=1, max_size=10)


@dataclass
class Said:
    """What came of a part: the tokens before it, and those of each sample with how it ended."""

    part: Part
    prompt: list[int]
    tokens: list[list[int]]
    reasons: list[str]


@dataclass
class Playing:
    """An actor on the stage."""

    actor: Actor
    session: Session | None = None
    turn: int = 0
    stream: Stream | None = None
    prompt: list[int] = field(default_factory=list)
    forking: threading.Thread | None = None
    forked: list[Session] = field(default_factory=list)

    @property
    def part(self) -> Part:
        return self.actor.parts[self.turn]

    @property
    def done(self) -> bool:
        return self.turn == len(self.actor.parts) and self.stream is None and self.forking is None


def play(stage: Stage, scenario: list[Actor]) -> list[Said]:
    """Run a scenario. The clients act at each call of the graph, on the scheduler's thread, and here while it
    sleeps."""
    engine = stage.engine
    said: list[Said] = []
    playing = [Playing(actor) for actor in scenario]
    turn = threading.Lock()
    calls = 0

    def at_a_call() -> None:
        nonlocal calls
        with turn:
            for one in list(playing):
                act(engine, one, playing, said, calls)
            calls += 1

    stage.held.before = at_a_call
    deadline = time.monotonic() + 120
    try:
        while not all(one.done for one in playing):
            assert time.monotonic() < deadline, "it hangs"
            time.sleep(0.0005)
            with turn:
                if all(one.stream is None or one.stream._job.done.is_set() for one in playing):
                    for one in list(playing):
                        act(engine, one, playing, said, 10**9)
    finally:
        stage.held.before = _nothing
        for one in playing:
            for leaving in (one.stream, one.session):
                if leaving is not None:
                    leaving.close()
        eventually(lambda: engine.metrics().active_rows == 0 and engine.metrics().idle_sessions == 0)
    return said


def act(engine: Engine, one: Playing, playing: list[Playing], said: list[Said], calls: int) -> None:
    """Do what a client can do now without waiting."""
    if one.forking is not None:
        if one.forked:
            one.forking = None
            playing.append(fork_of(one))
        return
    if one.stream is not None:
        job, cancel = one.stream._job, one.part.cancel_after
        if not job.done.is_set():
            if cancel is not None and job.samples[0].produced >= cancel:
                one.stream.cancel()
            return
        said.append(heard(one))
        one.stream, one.turn = None, one.turn + 1
        if one.actor.fork_after == one.turn - 1 and one.session is not None:
            begin_fork(engine, one)
            return
    if not one.done and calls >= one.actor.at:
        begin(engine, one)


def begin(engine: Engine, one: Playing) -> None:
    new = list(one.part.new)
    if one.actor.session:
        one.session = one.session or engine.session()
        one.prompt = [*one.session.tokens, *new]
        one.stream = one.session.stream(new, one.part.params)
    else:
        one.prompt = new
        one.stream = engine.stream(new, one.part.params)


def begin_fork(engine: Engine, one: Playing) -> None:
    """Ask for it: the scheduler answers between two calls, which it is not while it is held."""
    session = one.session
    assert session is not None
    one.forking = threading.Thread(target=lambda: one.forked.append(session.fork()))
    one.forking.start()
    eventually(lambda: bool(one.forked) or not engine._scheduler._inbox.empty())


def fork_of(one: Playing) -> Playing:
    actor, rest = one.actor, one.actor.parts[one.turn :]
    theirs = tuple(Part((actor.fork_token, *part.new), part.params, part.cancel_after) for part in rest)
    return Playing(Actor(0, True, theirs, None, 0), one.forked.pop())


def heard(one: Playing) -> Said:
    assert one.stream is not None
    pieces = list(one.stream)
    samples = range(one.part.params.n)
    tokens = [tokens_of(piece for piece in pieces if piece.index == i) for i in samples]
    reasons = [p.finish_reason for i in samples for p in pieces if p.index == i and p.finish_reason]
    return Said(one.part, one.prompt, tokens, list(reasons))


def check(stage: Stage, said: list[Said]) -> None:
    """Each text against the same request alone, from its first token on."""
    for one in said:
        outputs = stage.alone.generate([one.prompt], one.part.params)
        for output, tokens, reason in zip(outputs, one.tokens, one.reasons, strict=True):
            if reason == "cancelled":
                assert list(output.tokens[: len(tokens)]) == tokens
            else:
                assert (list(output.tokens), output.finish_reason) == (tokens, reason)


def law(stage: Stage, examples: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
    """Play so many scenarios and check each."""
    forks = joins = 0

    @settings(
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        deadline=None,
        report_multiple_bugs=False,
        phases=phases,
        database=None,
    )
    @given(scenario=SCENARIOS)
    def holds(scenario: list[Actor]) -> None:
        nonlocal forks, joins
        said = play(stage, scenario)
        asked = sum(len(actor.parts) for actor in scenario)
        forks, joins = forks + len(said) - asked, joins + len(scenario)
        assert len(said) >= asked
        check(stage, said)

    holds()
    assert joins > examples and forks > examples // 10


@pytest.mark.parametrize(("kind", "fixed_batch"), KINDS)
def test_what_a_sequence_says_is_its_own(stages: Callable[..., Stage], kind: str, fixed_batch: bool) -> None:
    law(stages(kind, fixed_batch), 30 if kind == "onnxruntime" else 5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fixed_batch"), KINDS)
def test_what_a_sequence_says_is_its_own_in_200_scenarios(
    stages: Callable[..., Stage], kind: str, fixed_batch: bool
) -> None:
    law(stages(kind, fixed_batch), 200)


# ---------------------------------------------------------------- the law can fail


def idle_rows_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that idles inside the batch is fed at position 0 instead of its own next one."""
    decode = RollingCache.decode

    def wrong(self: RollingCache, tokens: dict[int, int], batch: int | None = None) -> dict[int, Logits]:
        kept = self._next.copy()
        idle = [row for row in range(self.capacity_rows) if row not in tokens]
        self._next[idle] = 0
        try:
            return decode(self, tokens, batch)
        finally:
            self._next[idle] = kept[idle]

    monkeypatch.setattr(RollingCache, "decode", wrong)


def copies_without_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: RollingCache, source: int, target: int) -> None:
        self._settle(target, self.position(source), False)

    monkeypatch.setattr(RollingCache, "copy", wrong)


def random_numbers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn one after another, as from a generator that all requests share."""
    shared = np.random.default_rng(0)
    monkeypatch.setattr(sampler_module, "uniform", lambda seed, index, position: shared.random())


def turns_that_skip_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a turn is taken for fed."""
    to_feed = Turn.to_feed

    def wrong(self: Turn, prompt: Sequence[int]) -> Sequence[int]:
        fed = to_feed(self, prompt)
        return fed[min(self.ring.position, 1, len(fed) - 1) :]

    monkeypatch.setattr(Turn, "to_feed", wrong)


FAULTS = [idle_rows_at_zero, copies_without_a_ring, random_numbers_in_order, turns_that_skip_a_token]


@pytest.mark.parametrize("fault", FAULTS)
def test_that_law_sees_a_planted_fault(
    stages: Callable[..., Stage],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    stage = stages("onnxruntime", False)
    fault(monkeypatch)
    with pytest.raises(Exception, match="assert|all tokens of this session are fed"):
        law(stage, 20, phases=(Phase.generate,))
