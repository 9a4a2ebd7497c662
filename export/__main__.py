"""Command line of the export stage: `mistral-trt export` and `mistral-trt identify`."""

import argparse
import hashlib
import sys
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.lora import Adapter, parse_lora
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.progress import quiet


def export(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt export", description="Checkpoint → ONNX folder.")
    parser.add_argument("checkpoint", type=Path, help="a folder in Hugging Face's or Mistral's own format")
    parser.add_argument("--out", type=Path, required=True, help="the ONNX folder to write")
    parser.add_argument("--precision", choices=sorted(CACHE_DTYPES), default="fp16")
    parser.add_argument("--sliding-window", type=int, metavar="W", help="override the checkpoint's window")
    parser.add_argument("--prefill-chunk", type=int, metavar="C", default=256)
    parser.add_argument("--max-batch-size", type=int, metavar="B", default=4)
    parser.add_argument("--max-context", type=int, metavar="T", help="most tokens a sequence may reach")
    _add_lora(parser)
    parser.add_argument(
        "--link",
        action=argparse.BooleanOptionalAction,
        help="hard-link files of the checkpoint that serve as they are (default: except in fp32)",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but warnings and the result")
    args = parser.parse_args(argv)
    if args.quiet:
        quiet()
    export_checkpoint(
        args.checkpoint,
        args.out,
        precision=args.precision,
        sliding_window=args.sliding_window,
        prefill_chunk=args.prefill_chunk,
        max_batch_size=args.max_batch_size,
        max_context=args.max_context,
        loras=args.lora,
        link=args.link,
    )
    print(args.out)
    return 0


def identify(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "mistral-trt identify", description="Print <name>-<first 8 of the hash> of a checkpoint."
    )
    parser.add_argument("checkpoint", type=Path)
    _add_lora(parser)
    args = parser.parse_args(argv)
    adapters = [Adapter.open(folder, scale) for folder, scale in args.lora]
    checkpoint = Checkpoint.open(args.checkpoint, adapters)
    sources = checkpoint.sources()
    sha256 = (
        hashlib.sha256("".join(sources.values()).encode()).hexdigest() if adapters else sources["checkpoint"]
    )
    print(f"{checkpoint.name}-{sha256[:8]}")
    return 0


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="DIR[:SCALE]",
        help="a PEFT adapter folder to merge; may be given several times",
    )


if __name__ == "__main__":
    sys.exit(run("export", sys.argv[1:]))
