"""Command line of the export stage: `mistral-trt export` and `mistral-trt identify`."""

import argparse
import sys
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.onnx_folder import export_checkpoint


def export(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt export", description="Checkpoint → ONNX folder.")
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face checkpoint folder (safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="the ONNX folder to write")
    parser.add_argument("--precision", choices=sorted(CACHE_DTYPES), default="fp16")
    parser.add_argument("--sliding-window", type=int, metavar="W", help="override the checkpoint's window")
    parser.add_argument("--prefill-chunk", type=int, metavar="C", default=256)
    parser.add_argument("--max-batch-size", type=int, metavar="B", default=4)
    parser.add_argument("--max-context", type=int, metavar="T", help="most tokens a sequence may reach")
    args = parser.parse_args(argv)
    export_checkpoint(
        args.checkpoint,
        args.out,
        precision=args.precision,
        sliding_window=args.sliding_window,
        prefill_chunk=args.prefill_chunk,
        max_batch_size=args.max_batch_size,
        max_context=args.max_context,
    )
    print(args.out)
    return 0


def identify(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "mistral-trt identify", description="Print <name>-<first 8 of the hash> of a checkpoint."
    )
    parser.add_argument("checkpoint", type=Path)
    checkpoint = Checkpoint.open(parser.parse_args(argv).checkpoint)
    print(f"{checkpoint.name}-{checkpoint.sha256()[:8]}")
    return 0


if __name__ == "__main__":
    sys.exit(run("export", sys.argv[1:]))
