"""The engine under asyncio: the same pieces, no thread a request, and a cancelled task frees its row."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from mistral_trt.errors import BackendError, EngineClosedError, GenerationError, QueueFullError
from mistral_trt.runtime import AsyncStream, Engine, Piece, SamplingParams
from mistral_trt.runtime.input_processor import InputProcessor
from tests.test_scheduler import explodes, greedy, idle, prompt, raising
from tests.token_backend import (
    Gate,
    TokenBackend,
    eventually,
    expected,
    token_contract,
    token_engine,
    tokens_of,
)


@pytest.fixture
def backend() -> TokenBackend:
    return TokenBackend(token_contract(4))


@pytest.fixture
def engine(backend: TokenBackend) -> Iterator[Engine]:
    with token_engine(backend) as engine:
        yield engine


async def read(stream: AsyncStream) -> list[Piece]:
    return [piece async for piece in stream]


def test_the_pieces_are_those_of_a_stream(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=2, logprobs=1)
    key = lambda piece: (piece.index, piece.token is None)  # noqa: E731
    found = asyncio.run(read(engine.astream(prompt(5), params)))
    assert sorted(found, key=key) == sorted(engine.stream(prompt(5), params), key=key)


def test_many_requests_in_one_loop_take_no_thread_each(engine: Engine, backend: TokenBackend) -> None:
    async def all_of_them() -> list[list[Piece]]:
        return await asyncio.gather(*(read(engine.astream(prompt(4, s), greedy(15))) for s in range(60)))

    before = threading.active_count()
    most = [0]
    backend.before = lambda step: most.append(threading.active_count())
    found = asyncio.run(all_of_them())
    for seed, pieces in enumerate(found):
        assert tokens_of(pieces) == expected(backend.contract, prompt(4, seed), 15)
    pool = 40  # of asyncio.to_thread, whose threads check what was asked
    assert max(most) < before + 1 + pool


def test_agenerate_is_generate(engine: Engine) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=3, n=2)
    prompts = [prompt(1 + seed, seed) for seed in range(30)]
    assert asyncio.run(engine.agenerate(prompts, params)) == engine.generate(prompts, params)


def test_cancelling_a_task_cancels_its_request(engine: Engine, backend: TokenBackend) -> None:
    async def abandon() -> None:
        task = asyncio.create_task(read(engine.astream(prompt(3), greedy(1_000_000))))
        while engine.metrics().active_rows == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(abandon())
    eventually(idle(engine))
    assert engine.metrics().requests_finished["cancelled"] == 1


def test_cancelling_agenerate_cancels_all_of_it(engine: Engine) -> None:
    async def abandon() -> None:
        task = asyncio.create_task(engine.agenerate([prompt(3)] * 9, greedy(1_000_000)))
        while engine.metrics().active_rows < 4:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(abandon())
    eventually(idle(engine))


@pytest.mark.parametrize("how", ["break", "close", "aclose", "with", "cancel", "timeout"])
def test_a_stream_that_is_left_is_cancelled(engine: Engine, how: str) -> None:
    async def leave() -> None:
        stream = engine.astream(prompt(3), greedy(1_000_000))
        if how == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await read(stream)
        elif how == "with":
            async with stream:
                await anext(stream)
        else:
            async for _ in stream:
                break
        if how == "close":
            stream.close()
            assert await read(stream) == []
        elif how == "aclose":
            await stream.aclose()
        elif how == "cancel":
            stream.cancel()
            assert (await read(stream))[-1].finish_reason == "cancelled"
        del stream
        gc.collect()
        while not idle(engine)():
            await asyncio.sleep(0.001)

    asyncio.run(leave())


def test_two_loops_in_two_threads_share_an_engine(engine: Engine, backend: TokenBackend) -> None:
    found: dict[int, list[int]] = {}

    async def some(first: int) -> None:
        for seed in range(first, first + 10):
            found[seed] = tokens_of(await read(engine.astream(prompt(3, seed), greedy(30))))

    threads = [threading.Thread(target=asyncio.run, args=(some(n),)) for n in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {seed: expected(backend.contract, prompt(3, seed), 30) for seed in range(30)}


def test_a_loop_that_is_closed_under_a_stream_frees_its_row(engine: Engine) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.astream(prompt(3), greedy(1_000_000))
    loop.run_until_complete(anext(stream))
    loop.close()
    eventually(idle(engine))
    assert engine.ready


def test_a_loop_that_is_busy_holds_no_other_stream_up(engine: Engine, backend: TokenBackend) -> None:
    async def slow() -> list[int]:
        stream = engine.astream(prompt(3), greedy(20))
        first = await anext(stream)
        time.sleep(0.1)
        return [first.token or 0, *tokens_of(await read(stream))]

    thread_result: list[list[int]] = []
    thread = threading.Thread(target=lambda: thread_result.append(asyncio.run(slow())))
    thread.start()
    assert tokens_of(engine.stream(prompt(4), greedy(50))) == expected(backend.contract, prompt(4), 50)
    thread.join(30)
    assert thread_result == [expected(backend.contract, prompt(3), 20)]


def test_what_cannot_be_served_is_raised_with_the_first_piece(engine: Engine) -> None:
    for stream, words in (
        (engine.astream([]), "at least one token"),
        (engine.astream("text"), "no tokenizer"),
        (engine.astream([1], greedy(1, n=5)), "n=5"),
    ):
        with pytest.raises(GenerationError, match=words):
            asyncio.run(read(stream))


def test_errors_come_out_of_the_loop(engine: Engine, backend: TokenBackend) -> None:
    with pytest.raises(GenerationError, match="a bug of the caller"):
        asyncio.run(read(engine.astream(prompt(10), greedy(30, logits_processors=(explodes,)))))
    backend.before = raising(RuntimeError("lost"), lambda step: True)
    with pytest.raises(BackendError, match="lost"):
        asyncio.run(read(engine.astream(prompt(10), greedy(30))))
    with pytest.raises(GenerationError, match="a bug of the caller"):
        asyncio.run(engine.agenerate([prompt(10)] * 3, greedy(30, logits_processors=(explodes,))))
    eventually(idle(engine))


def test_two_tasks_cannot_share_a_stream(engine: Engine, backend: TokenBackend) -> None:
    async def share() -> list[int]:
        stream = engine.astream(prompt(3), greedy(30))
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        with pytest.raises(GenerationError, match="one task at a time"):
            await anext(stream)
        return tokens_of(await reader)

    assert asyncio.run(share()) == expected(backend.contract, prompt(3), 30)


def test_a_full_queue_and_a_closed_engine_are_told(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated

    async def ask() -> None:
        tasks = [asyncio.create_task(read(engine.astream(prompt(2), greedy(3))))]
        while engine.metrics().active_rows < 1:  # the queue has room again
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(read(engine.astream(prompt(2), greedy(3)))))
        while engine.metrics().queue_length < 1:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFullError):
            await read(engine.astream(prompt(2), greedy(3)))
        gate.open()
        assert [len(await task) for task in tasks] == [4, 4]
        engine.close()
        with pytest.raises(EngineClosedError):
            await read(engine.astream(prompt(2), greedy(3)))

    asyncio.run(ask())


@pytest.fixture
def gated() -> Iterator[tuple[Engine, Gate]]:
    backend, gate = TokenBackend(token_contract(1)), Gate()
    backend.before = gate
    with token_engine(backend, queue_size=1) as engine:
        yield engine, gate
        gate.open()


def test_a_session_can_be_awaited(engine: Engine, backend: TokenBackend) -> None:
    async def talk() -> list[int]:
        session = engine.session()
        first = tokens_of(await read(session.astream(prompt(5), greedy(6))))
        return [*first, *tokens_of(await read(session.astream([7], greedy(6))))]

    found = asyncio.run(talk())
    assert found[:6] == expected(backend.contract, prompt(5), 6)
    assert found[6:] == expected(backend.contract, [*prompt(5), *found[:6], 7], 6)


def test_a_stream_of_an_engine_that_closes_ends(engine: Engine) -> None:
    async def ask() -> list[Piece]:
        task = asyncio.create_task(read(engine.astream(prompt(3), greedy(1_000_000))))
        while engine.metrics().active_rows == 0:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        return await task

    assert asyncio.run(ask())[-1].finish_reason == "cancelled"


def test_a_stream_that_is_cancelled_before_its_first_piece_says_nothing(engine: Engine) -> None:
    async def run() -> list[str | None]:
        stream = engine.astream(prompt(3), greedy(1_000))
        stream.cancel()
        return [piece.finish_reason async for piece in stream]

    reasons = asyncio.run(run())
    assert reasons[-1] == "cancelled" and len(reasons) < 1_000
    eventually(idle(engine))


# ---------------------------------------------------------------- the loop is not held up

ASK: dict[str, Callable[[Engine], Awaitable[object]]] = {
    "agenerate": lambda engine: engine.agenerate([prompt(3)] * 20, greedy(4)),
    "astream": lambda engine: read(engine.astream(prompt(3), greedy(4))),
    "session": lambda engine: read(engine.session().astream(prompt(3), greedy(4))),
}
WORK = ["prompt_tokens", "request", "job"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, work: str) -> tuple[threading.Event, threading.Event]:
    """Checking or making a request waits until the second is set; the first says that it is under way."""
    begun, going, real = threading.Event(), threading.Event(), getattr(InputProcessor, work)

    def slow(*arguments: Any, **named: Any) -> Any:
        begun.set()
        assert going.wait(5), "the loop was held up"
        return real(*arguments, **named)

    monkeypatch.setattr(InputProcessor, work, slow)
    return begun, going


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_the_loop_runs_on_while_a_request_is_made(
    engine: Engine,
    held: tuple[threading.Event, threading.Event],
    ask: Callable[[Engine], Awaitable[object]],
) -> None:
    begun, going = held

    async def run() -> None:
        task = asyncio.ensure_future(ask(engine))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        going.set()
        await task

    asyncio.run(run())
    assert engine.metrics().generated_tokens in (4, 80)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_a_task_that_is_cancelled_while_its_request_is_made_queues_nothing(
    engine: Engine,
    held: tuple[threading.Event, threading.Event],
    ask: Callable[[Engine], Awaitable[object]],
) -> None:
    begun, going = held

    async def run() -> None:
        task = asyncio.ensure_future(ask(engine))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        going.set()

    asyncio.run(run())  # which waits for the threads of its pool
    assert engine.metrics().requests_started == 0 and idle(engine)()
