"""Command line → one validation: report path and verdict on stdout, 0 if every gate holds, else 1."""

import argparse
import sys
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.export.lora import parse_lora
from mistral_trt.progress import note, quiet
from mistral_trt.validate.budget import DEFAULT, FULL, QUICK
from mistral_trt.validate.comparison import validate_artifact
from mistral_trt.validate.job import Job
from mistral_trt.validate.report.report import HTML_NAME


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mistral-trt validate",
        description="Compare an artifact with the checkpoint it was made from, position by position.",
        epilog="exit status: 0 every gate holds, 1 a gate failed, 2 the validation could not run",
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="an ONNX folder, or an engine folder and --onnx"
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="CHECKPOINT", help="its checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    budget = parser.add_mutually_exclusive_group()
    for choice, words in ((QUICK, "past one wrap"), (FULL, "past eight turns, every step decoded")):
        budget.add_argument(
            f"--{choice.name}",
            dest="budget",
            action="store_const",
            const=choice,
            default=DEFAULT,
            help=f"{words} (default: past four turns of the ring)",
        )
    parser.add_argument("--streaming", action="store_true", help="both sides one layer at a time: 7B in 8 GB")
    parser.add_argument(
        "--onnx", type=Path, metavar="DIR", help="the ONNX folder that an engine was built from"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to read (default: our own)")
    parser.add_argument("--random-tokens", action="store_true", help="read no text")
    parser.add_argument("--length", type=int, metavar="N", help="positions (default: the budget's)")
    parser.add_argument("--gates", type=Path, metavar="FILE", help="a table that tightens our gates")
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        dest="loras",
        metavar="DIR[:SCALE]",
        help="an adapter it was made with",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but warnings and the result")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random tokens and padding")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime")
    return parser.parse_args(argv)


def validate(argv: list[str]) -> int:
    """Run the command. Raises MistralTrtError if the validation could not run."""
    args = vars(parse(argv))
    if args.pop("quiet"):
        quiet()
    report = validate_artifact(Job(**args | {"loras": tuple(args["loras"])}))
    for remark in report.notes:
        note(remark)
    print(args["out"] / HTML_NAME)
    print(report.verdict)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(run("validate", sys.argv[1:]))
