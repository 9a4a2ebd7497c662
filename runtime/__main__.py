"""Command line of the runtime: `mistral-trt generate` and `mistral-trt chat`."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.progress import note
from mistral_trt.runtime.engine import Engine, Piece
from mistral_trt.runtime.sampling import SamplingParams


def generate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt generate", description="Continue a prompt, streaming.")
    parser.add_argument("--prompt", required=True)
    args, engine, params = _load(parser, argv)
    _show(engine.stream(args.prompt, params))
    return 0


def chat(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt chat", description="Talk to the model; Ctrl-D ends.")
    parser.add_argument("--system", help="system message")
    args, engine, params = _load(parser, argv)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    while (line := _ask()) is not None:
        if line:
            messages.append({"role": "user", "content": line})
            answer = _show(engine.stream(messages=messages, params=params))
            messages.append({"role": "assistant", "content": answer})
    return 0


def _load(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, Engine, SamplingParams]:
    """What both commands take, and the engine it names."""
    parser.add_argument("artifact", type=Path, help="an ONNX folder")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    return args, Engine.load(args.artifact, threads=args.threads), params


def _show(pieces: Iterable[Piece]) -> str:
    """Print a stream as it comes; return the whole text."""
    shown = []
    for piece in pieces:
        shown.append(piece.text)
        print(piece.text, end="", flush=True)
        if piece.finish_reason == "context":
            note("the text ends here: the artifact's max_context is reached")
    print()
    return "".join(shown)


def _ask() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        print(file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:]))
