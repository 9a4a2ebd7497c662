"""An artifact folder → an HTTP service in OpenAI's format: completions and chats, whole or streamed.

python examples/service.py build/demo/onnx-fp16 --port 8000      # pip install '.[onnxruntime,service]'
"""

import argparse
import asyncio
import json
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from mistral_trt.errors import EngineClosedError, GenerationError, MistralTrtError, QueueFullError
from mistral_trt.runtime import Engine, Metrics, Piece, SamplingParams

FIELDS = {field.name for field in fields(SamplingParams)} - {"logprobs", "logits_processors"}
"""Of a request, beside model, stream, and prompt or messages: what SamplingParams has under that name."""
STATUS = {QueueFullError: 429, EngineClosedError: 503, GenerationError: 400, ValueError: 400}


def application(engine: Engine) -> Starlette:
    routes = [
        Route("/v1/completions", partial(answer, engine, "prompt"), methods=["POST"]),
        Route("/v1/chat/completions", partial(answer, engine, "messages"), methods=["POST"]),
        Route("/healthz", lambda _: Response(status_code=200 if engine.ready else 503)),
        Route("/metrics", lambda _: PlainTextResponse(prometheus(engine.metrics()))),
    ]
    return Starlette(routes=routes)


async def answer(engine: Engine, source: str, request: Request) -> Response:
    """Serve one request. It waits for the first piece, so that a refusal still has a status of its own."""
    try:
        body = await request.json()
        pieces = engine.astream(params=read(body, source), **{source: body[source]})
        kind = "text_completion" if source == "prompt" else "chat.completion"
        model, now = body.get("model"), int(time.time())
        head = {"id": uuid.uuid4().hex, "object": kind, "created": now, "model": model}
        if not body.get("stream"):
            return JSONResponse(await while_connected(request, whole(head, pieces)))
        first = await while_connected(request, anext(pieces))
        return StreamingResponse(events(head, first, pieces), media_type="text/event-stream")
    except ClientDisconnect:
        return Response(status_code=499)
    except (MistralTrtError, ValueError) as error:
        status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
        return JSONResponse(problem(error), status)


def read(body: Any, source: str) -> SamplingParams:
    """The parameters of a request. Raises ValueError for fields that are unknown or missing."""
    if not isinstance(body, dict) or not isinstance(body.get(source), str | list):
        raise ValueError(f"expected a JSON object with the field {source!r}: a text or a list")
    if unknown := set(body) - FIELDS - {source, "model", "stream"}:
        raise ValueError(f"unknown field {min(unknown)!r}; known: {', '.join(sorted(FIELDS))}")
    chosen = {name: body[name] for name in FIELDS & set(body) if body[name] is not None}
    if isinstance(bias := chosen.get("logit_bias"), dict):  # a name in JSON is always a text
        chosen["logit_bias"] = {int(token): value for token, value in bias.items()}
    return SamplingParams(**chosen)


async def whole(head: dict[str, Any], pieces: AsyncIterator[Piece]) -> dict[str, Any]:
    """The answer at once."""
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    async for piece in pieces:
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        reasons[piece.index] = piece.finish_reason
    return {**head, "choices": [choice(head, i, texts[i], reasons[i], "message") for i in sorted(texts)]}


async def events(head: dict[str, Any], first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """The answer as server-sent events; what goes wrong on the way is the last of them."""
    kind = head["object"].replace("chat.completion", "chat.completion.chunk")
    piece: Piece | None = first
    try:
        while piece is not None:
            if piece.text or piece.finish_reason:
                part = choice(head, piece.index, piece.text, piece.finish_reason, "delta")
                yield f"data: {json.dumps({**head, 'object': kind, 'choices': [part]})}\n\n"
            piece = await anext(rest, None)
        yield "data: [DONE]\n\n"
    except MistralTrtError as error:
        yield f"data: {json.dumps(problem(error))}\n\n"


def choice(head: dict[str, Any], index: int, text: str, reason: str | None, name: str) -> dict[str, Any]:
    """One of n texts, or a part of it.  name: what a chat's text is in: message or delta."""
    role = {"role": "assistant"} if name == "message" else {}
    content = {"text": text} if head["object"] == "text_completion" else {name: {**role, "content": text}}
    return {"index": index, **content, "finish_reason": "length" if reason == "context" else reason}


async def while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work gives. It is cancelled when the client goes; then ClientDisconnect is raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def problem(error: Exception) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": type(error).__name__}}


def prometheus(metrics: Metrics) -> str:
    """In Prometheus' text format, a line a number: mistral_trt_steps 12"""
    lines = []
    for name, value in asdict(metrics).items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            label = f'{{quantile="0.{key[1:]}"}}' if key.startswith("p") else f'{{reason="{key}"}}'
            lines.append(f"mistral_trt_{name}{label if key else ''} {number}\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", help="an ONNX or engine folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--queue-size", type=int, default=256, help="requests that wait; one more gets a 429")
    parser.add_argument("--grace", type=int, default=30, help="seconds that streams may go on after SIGTERM")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn ends its streams, then lets this run
    try:
        engine = Engine.load(args.folder, queue_size=args.queue_size)
    except MistralTrtError as error:
        sys.exit(str(error))
    with engine:
        uvicorn.run(application(engine), host=args.host, port=args.port, timeout_graceful_shutdown=args.grace)


if __name__ == "__main__":
    main()
