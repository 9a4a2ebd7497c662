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
from mistral_trt.export.quantization.settings import Budget, QuantizationSettings
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
    _add_quantization(parser)
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
        quantization=QuantizationSettings(
            calibration=args.calibration,
            samples=args.calibration_samples,
            tokens=args.calibration_tokens,
            keep=tuple(args.keep),
            quality=None if args.quality is None else Budget.parse(args.quality),
            quantize_lm_head=args.quantize_lm_head,
        ),
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


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization", "for int8, int8-weight-only, int4 and fp8")
    group.add_argument(
        "--calibration", type=Path, metavar="PATH", help="text, jsonl or a folder (default: speeches)"
    )
    group.add_argument("--calibration-samples", type=int, metavar="N", help="default: 16")
    group.add_argument("--calibration-tokens", type=int, metavar="N", help="of each sample; default: 512")
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="linears that stay float16, for example '*.down_proj'; may be given several times",
    )
    group.add_argument(
        "--quality",
        metavar="perplexity=RATIO|kl=NATS",
        help="keep the fewest linears in float16 that meet this budget on the calibration text",
    )
    group.add_argument("--quantize-lm-head", action="store_true", help="the output layer too")


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
