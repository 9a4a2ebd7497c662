"""Prompts + sampling parameters → pieces of text, over the rows of a rolling cache."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mistral_trt.errors import GenerationError, NonFiniteLogitsError
from mistral_trt.runtime.cache import Logits, RollingCache
from mistral_trt.runtime.sampling import SamplingParams, sample

FinishReason = Literal["stop", "length", "context", "error"]
"""stop: an end token.  length: max_tokens.  context: max_context was reached.  error: NaN or infinity."""


@dataclass
class Request:
    """One text being produced: what was asked, the row it runs on, and what came so far."""

    prompt: Sequence[int]
    params: SamplingParams
    end_tokens: frozenset[int]
    seed: int = field(default_factory=lambda: secrets.randbits(64))
    row: int = -1
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        if self.params.seed is not None:
            self.seed = self.params.seed
        if not self.prompt:
            raise GenerationError("expected a prompt of at least one token, found an empty one")


def run_requests(
    cache: RollingCache, requests: Sequence[Request], *, timeout_s: float, allow_long: bool = False
) -> Iterator[tuple[int, int | None]]:
    """Decode all requests together, each on a row of its own, waiting up to timeout_s for the rows.

    Yields (index of the request, token), and (index, None) when a request has ended; its finish_reason
    is then set. Rows are released when their request ends, and all of them if the caller stops early.
    """
    rows = cache.acquire_rows(len(requests), timeout_s=timeout_s)
    live = {row: index for index, row in enumerate(rows)}  # row -> index of its request
    try:
        for row, request in zip(rows, requests, strict=True):
            request.row = row
            try:
                logits = cache.append(request.row, request.prompt, allow_long=allow_long)
            except NonFiniteLogitsError:
                request.finish_reason = "error"
                yield from _end(cache, live, request.row)
            else:
                yield from _accept(cache, live, requests, {request.row: logits})
        while live:
            last = {row: requests[index].tokens[-1] for row, index in live.items()}
            try:
                produced = cache.step(last, allow_long=allow_long)
            except NonFiniteLogitsError as error:
                produced = dict(error.healthy)
                for row in error.rows:
                    requests[live[row]].finish_reason = "error"
                    yield from _end(cache, live, row)
            yield from _accept(cache, live, requests, produced)
    finally:
        for row in live:
            cache.release(row)


def _accept(
    cache: RollingCache, live: dict[int, int], requests: Sequence[Request], produced: dict[int, Logits]
) -> Iterator[tuple[int, int | None]]:
    """Sample each row's next token and end the requests that are done."""
    for row, logits in produced.items():
        request = requests[live[row]]
        position = cache.position(row)
        token = sample(logits, request.params, request.seed, position)
        if token in request.end_tokens:
            request.finish_reason = "stop"
        else:
            request.tokens.append(token)
            yield live[row], token
            request.finish_reason = _limit(cache, request, position)
        if request.finish_reason is not None:
            yield from _end(cache, live, row)


def _limit(cache: RollingCache, request: Request, position: int) -> FinishReason | None:
    if len(request.tokens) >= request.params.max_tokens:
        return "length"
    limit = cache.contract.max_context
    return "context" if limit is not None and position + 1 >= limit else None


def _end(cache: RollingCache, live: dict[int, int], row: int) -> Iterator[tuple[int, None]]:
    index = live.pop(row)
    cache.release(row)
    yield index, None
