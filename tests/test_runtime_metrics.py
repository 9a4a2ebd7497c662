"""What an engine says of itself: every number against what was done, and quantiles by their definition."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.runtime import Engine, Metrics, Quantiles
from mistral_trt.runtime.metrics import LATEST, Latest, quantiles
from tests.test_scheduler import explodes, greedy, idle, prompt
from tests.token_backend import Gate, TokenBackend, eventually, token_contract, token_engine


@pytest.fixture
def backend() -> TokenBackend:
    return TokenBackend(token_contract(2))


@pytest.fixture
def engine(backend: TokenBackend) -> Iterator[Engine]:
    with token_engine(backend) as engine:
        yield engine


def test_a_new_engine_has_done_nothing(engine: Engine) -> None:
    assert engine.metrics() == Metrics(
        requests_finished=dict.fromkeys(("stop", "length", "context", "cancelled", "error"), 0),
        capacity_rows=2,
    )


def test_what_was_done_is_counted(engine: Engine, backend: TokenBackend) -> None:
    engine.generate([prompt(9), prompt(5, 1)], greedy(7))
    engine.generate([prompt(3)], greedy(4, n=2))
    with pytest.raises(Exception, match="a bug"):
        list(engine.stream(prompt(12), greedy(4, logits_processors=(explodes,))))
    engine.stream(prompt(1), greedy(1_000_000)).close()
    eventually(idle(engine))
    found = engine.metrics()
    assert found.requests_finished == {"length": 4, "cancelled": 1, "error": 1, "stop": 0, "context": 0}
    assert found.generated_tokens >= 7 + 7 + 4 + 4
    single = sum(len(call.tokens[0]) for call in backend.calls if call.kind == "prefill")
    assert found.prompt_tokens in (9 + 5 + 3 + 12, 9 + 5 + 3 + 12 + 1)
    assert single <= found.prompt_tokens
    assert found.steps + found.prefill_chunks == len(backend.calls)
    assert (found.queue_length, found.active_rows, found.capacity_rows) == (0, 0, 2)
    assert found.prefill_seconds > 0 and found.decode_seconds > 0


def test_queue_and_rows_are_those_of_now() -> None:
    backend, gate = TokenBackend(token_contract(2)), Gate()
    backend.before = gate
    with token_engine(backend) as engine:
        streams = [engine.stream(prompt(2, seed), greedy(3)) for seed in range(5)]
        gate.let(2)
        eventually(lambda: engine.metrics().active_rows == 2)
        assert engine.metrics().queue_length == 3
        gate.open()
        for stream in streams:
            list(stream)
        assert engine.metrics().queue_seconds > 0


def test_times_are_of_tokens() -> None:
    """Every call takes 20 ms: so does the first token of one chunk, and each one after it."""
    backend = TokenBackend(token_contract(1))
    wait = threading.Event()
    backend.before = lambda step: wait.wait(0.02)
    with token_engine(backend) as engine:
        engine.generate([prompt(3)], greedy(41))
        found = engine.metrics()
    assert 0.02 <= found.time_to_first_token.p50 < found.decode_seconds / 2
    assert 0.02 <= found.inter_token.p50 < 0.1
    assert found.inter_token.p50 <= found.inter_token.p90 <= found.inter_token.p99 < found.decode_seconds / 2
    assert 0.02 <= found.prefill_seconds < found.decode_seconds / 2
    assert 0.8 <= found.decode_seconds < 5


def test_quantiles_by_hand() -> None:
    assert quantiles([]) == Quantiles()
    assert quantiles([3.0]) == Quantiles(3.0, 3.0, 3.0)
    assert quantiles([4.0, 1.0, 3.0, 2.0]) == Quantiles(2.0, 4.0, 4.0)
    assert quantiles([float(i) for i in range(1, 101)]) == Quantiles(50.0, 90.0, 99.0)


@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=300))
def test_a_quantile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float]) -> None:
    found = quantiles(values)
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert value in values
        assert 100 * sum(v <= value for v in values) >= percent * len(values)
        assert 100 * sum(v < value for v in values) < percent * len(values)


def test_only_the_latest_values_count() -> None:
    latest = Latest()
    for _ in range(LATEST):
        latest.add(9.0)
    for _ in range(LATEST - 1):
        latest.add(1.0)
    assert latest.quantiles() == Quantiles(1.0, 1.0, 1.0)
    assert max(latest._values) == 9.0 and len(latest._values) == LATEST


def test_any_thread_may_ask_at_any_time(engine: Engine) -> None:
    stop = threading.Event()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            while not stop.is_set():
                engine.metrics()
                time.sleep(0.0005)  # or these threads have the interpreter to themselves
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    sessions = [engine.session() for _ in range(5)]
    for session in sessions * 3:
        list(session.stream([1], greedy(5)))
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not errors
