"""Command line of the engines stage: `mistral-trt build` and `mistral-trt gpus`."""

import argparse
import sys
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.engines.build import build_engine, check_target
from mistral_trt.engines.flavor import AUTO, NAMES
from mistral_trt.engines.gpu import load_catalogue
from mistral_trt.engines.table import print_table


def build(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt build", description="ONNX folder → TensorRT engine folder.")
    parser.add_argument("onnx", type=Path, metavar="ONNX_DIR", help="what `mistral-trt export` wrote")
    parser.add_argument("--gpu", required=True, help="the target; `mistral-trt gpus` lists them")
    parser.add_argument("--out", type=Path, required=True, help="the engine folder to write")
    parser.add_argument("--flavor", choices=NAMES, default=AUTO, help="which TensorRT builds (default: auto)")
    args = parser.parse_args(argv)
    build_engine(args.onnx, args.gpu, args.out, flavor=args.flavor)
    print(args.out)
    return 0


def gpus(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt gpus", description="The GPUs an engine can be built for.")
    parser.add_argument("--names", action="store_true", help="only the keys, one a line")
    parser.add_argument("--check", metavar="GPU", help="only say whether an engine for GPU can be built here")
    parser.add_argument("--precision", default="fp16", help="with --check")
    parser.add_argument("--flavor", choices=NAMES, default=AUTO, help="with --check")
    args = parser.parse_args(argv)
    if args.check:
        check_target(args.check, args.precision, args.flavor)
    elif args.names:
        print("\n".join(load_catalogue()))
    else:
        print_table(list(load_catalogue().values()))
    return 0


if __name__ == "__main__":
    sys.exit(run("build", sys.argv[1:]))
