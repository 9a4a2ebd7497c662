"""Command line of the runtime: `mistral-trt generate` and `mistral-trt chat`."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.errors import GenerationError
from mistral_trt.progress import note
from mistral_trt.runtime.engine import Engine
from mistral_trt.runtime.request import Piece
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.stream import Stream


def generate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt generate", description="Continue a prompt, streaming.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--special-tokens", action="store_true", help='"</s>" in the prompt is the token')
    parser.add_argument("--allow-long", action="store_true", help="go past position 2**20")
    parser.add_argument("--n", type=int, default=1, help="how many texts; they are shown when all have ended")
    args = _arguments(parser, argv)
    asked = {"special_tokens": args.special_tokens, "allow_long": args.allow_long}
    params = _params(args, n=args.n)
    with _load(args) as engine:
        if args.n == 1:
            _show(engine.stream(args.prompt, params, **asked))
        else:
            print("\n---\n".join(output.text for output in engine.generate([args.prompt], params, **asked)))
    return 0


def chat(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "mistral-trt chat",
        description="Talk to the model. Ctrl-C ends an answer, Ctrl-D the conversation.",
    )
    parser.add_argument("--system", help="system message")
    args = _arguments(parser, argv)
    params = _params(args)
    with _load(args) as engine, engine.session(args.system) as session:
        while (line := _ask()) is not None:
            if line:
                turn = [{"role": "user", "content": line}]
                _show_until_interrupted(session.stream(messages=turn, params=params))
    return 0


def _arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """What both commands take."""
    parser.add_argument("artifact", type=Path, help="an ONNX folder or an engine folder")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--presence-penalty", type=float, default=0.0)
    parser.add_argument("--frequency-penalty", type=float, default=0.0)
    parser.add_argument("--logit-bias", action="append", default=[], metavar="TOKEN=BIAS", help="repeatable")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--stop-token-id", action="append", default=[], type=int, help="repeatable")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--json-schema", type=Path, metavar="FILE", help="the text is JSON that it admits")
    parser.add_argument("--regex", help="the whole text matches it")
    parser.add_argument("--threads", type=int, help="CPU threads of ONNX Runtime")
    parser.add_argument("--provider", default="auto", choices=["auto", "cpu", "cuda"], help="of ONNX Runtime")
    parser.add_argument("--trust-weights", action="store_true", help="do not compare the weights' hashes")
    parser.add_argument("--cache-dir", type=Path, help="where TensorRT-RTX keeps what it compiles")
    return parser.parse_args(argv)


def _params(args: argparse.Namespace, n: int = 1) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=dict(map(_bias, args.logit_bias)),
        seed=args.seed,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_id),
        ignore_eos=args.ignore_eos,
        n=n,
        json_schema=None if args.json_schema is None else args.json_schema.read_text("utf-8"),
        regex=args.regex,
    )


def _bias(text: str) -> tuple[int, float]:
    """ "17=-inf" -> (17, -inf)"""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise GenerationError(f"--logit-bias: expected TOKEN=BIAS such as 17=-inf, found {text!r}") from error


def _load(args: argparse.Namespace) -> Engine:
    return Engine.load(
        args.artifact,
        threads=args.threads,
        provider=args.provider,
        trust_weights=args.trust_weights,
        cache_dir=args.cache_dir,
        progress=_progress(),
    )


def _progress() -> Callable[[str, float], None]:
    """Says what is being done when that changes."""
    said: list[str] = []

    def progress(what: str, share: float) -> None:
        if said[-1:] != [what]:
            said.append(what)
            note(what)

    return progress


def _show_until_interrupted(stream: Stream) -> None:
    """Show an answer; Ctrl-C ends it, and the conversation goes on."""
    try:
        _show(stream)
    except KeyboardInterrupt:
        stream.close()
        print()


def _show(pieces: Iterable[Piece]) -> None:
    """Print a stream as it comes."""
    for piece in pieces:
        print(piece.text, end="", flush=True)
        if piece.finish_reason == "context":
            note("the text ends here: the last position of this artifact is reached")
    print()


def _ask() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        print(file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:]))
