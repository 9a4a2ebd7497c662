"""Command line of the engines stage: `mistral-trt build`, `refit` and `gpus`."""

import argparse
import math
import sys
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.engines.build import build_job
from mistral_trt.engines.engine_cache import DEFAULT_LIMIT_BYTES, EngineCache
from mistral_trt.engines.flavor import AUTO, NAMES
from mistral_trt.engines.gpu import load_catalogue
from mistral_trt.engines.planning.dry_run import dry_run
from mistral_trt.engines.planning.settle import check_target, settle
from mistral_trt.engines.planning.wish import WEIGHTS
from mistral_trt.engines.polygraphy_scripts import check_comparable, write_polygraphy
from mistral_trt.engines.refit import refit_engine
from mistral_trt.engines.table import print_table
from mistral_trt.progress import note


def build(argv: list[str]) -> int:
    args = parse_build(argv)
    cache = None if args.no_cache else EngineCache(limit_bytes=int(args.cache_gb * 1e9))
    settings = {"flavor": args.flavor, "weights": args.weights, "max_batch_size": args.max_batch_size}
    settings |= {"cache": cache, "polygraphy": args.polygraphy}
    if args.dry_run:
        dry_run(args.onnx, args.gpu, args.out, as_json=args.json, **settings)
        return 0
    job = settle(args.onnx, args.gpu, args.out, **settings)
    if args.polygraphy:  # refused now rather than after the build
        check_comparable(args.onnx, job.source.contract.precision, weights=job.budget.weights)
    manifest = build_job(job, args.out, cache)
    if args.polygraphy:
        plan = {key: manifest.details[key] for key in ("flavor", "weights")}
        folder = write_polygraphy(args.onnx, args.out, manifest.contract, **plan)
        note(f"{folder}: commands that compare the engine with its ONNX folder")
    print(args.out)
    return 0


def parse_build(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("mistral-trt build", description="ONNX folder → TensorRT engine folder.")
    parser.add_argument("onnx", type=Path, metavar="ONNX_DIR", help="what `mistral-trt export` wrote")
    parser.add_argument(
        "--gpu",
        required=True,
        help="the target, or several for one plan: a10g,l4; see `mistral-trt gpus`",
    )
    parser.add_argument("--out", type=Path, required=True, help="the engine folder to write")
    parser.add_argument("--flavor", choices=NAMES, default=AUTO, help="which TensorRT builds (default: auto)")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=AUTO,
        help="in the plan, or beside it, where `mistral-trt refit` can exchange them "
        "(default: auto, embedded where the build then fits this machine)",
    )
    parser.add_argument("--max-batch-size", type=int, metavar="B", help="rows, instead of the export's")
    parser.add_argument("--dry-run", action="store_true", help="print what is predicted and build nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run")
    parser.add_argument("--no-cache", action="store_true", help="build anew and keep nothing")
    parser.add_argument(
        "--cache-gb",
        type=float,
        default=DEFAULT_LIMIT_BYTES / 1e9,
        metavar="GB",
        help="of plans kept for equal builds",
    )
    parser.add_argument(
        "--polygraphy",
        action="store_true",
        help="write OUT-polygraphy: commands that compare both",
    )
    args = parser.parse_args(argv)
    if args.json and not args.dry_run:
        parser.error("--json is for --dry-run")
    if not 0 <= args.cache_gb * 1e9 < math.inf:
        parser.error("--cache-gb must be a size, 0 or more; to keep nothing, use --no-cache")
    return args


def refit(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "mistral-trt refit",
        description="Engine folder with external weights → another fine-tune's, without a build.",
    )
    parser.add_argument("engine", type=Path, metavar="ENGINE_DIR", help="built with --weights external")
    parser.add_argument(
        "--from",
        type=Path,
        required=True,
        dest="onnx",
        metavar="ONNX_DIR",
        help="the fine-tune's ONNX folder",
    )
    parser.add_argument(
        "--out", type=Path, help="the engine folder to write (default: ENGINE_DIR is replaced)"
    )
    args = parser.parse_args(argv)
    refit_engine(args.engine, args.onnx, args.out)
    print(args.out or args.engine)
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
