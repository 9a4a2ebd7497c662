"""Command line → one evaluation: a table on stdout, 0 if the sides agree as often as asked, else 1."""

import argparse
import shlex
import sys
from pathlib import Path

from mistral_trt.cli import run
from mistral_trt.export.lora import parse_lora
from mistral_trt.progress import note, quiet
from mistral_trt.validate.tasks.evaluation import Job, evaluate_artifact
from mistral_trt.validate.tasks.record import EVAL_NAME, Evaluation, failures, table


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mistral-trt eval",
        description="Ask an artifact and its checkpoint the same; report how often they agree.",
        epilog="exit status: 0 done, 1 they agree less often than --min-agreement, 2 it could not run",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="an ONNX folder, or an engine on its GPU")
    parser.add_argument("--reference", type=Path, required=True, metavar="CHECKPOINT", help="its checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"where {EVAL_NAME} goes")
    parser.add_argument(
        "--tasks", type=Path, nargs="+", default=[], metavar="FILE", help="task files (default: our own)"
    )
    parser.add_argument(
        "--lm-eval", type=names, default=[], metavar="TASK[,TASK]", help="multiple-choice tasks of lm-eval"
    )
    parser.add_argument("--lm-eval-path", type=Path, metavar="DIR", help="more task definitions for lm-eval")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    parser.add_argument("--length", type=int, metavar="N", help="leave out items of more than N tokens")
    parser.add_argument("--min-agreement", type=share, metavar="X", help="share of all items, as 0.98")
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="DIR[:SCALE]",
        help="an adapter it was made with",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime")
    parser.add_argument("--quiet", action="store_true", help="say nothing but warnings and the result")
    return parser.parse_args(argv)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share, 0…1, found {text}")
    return value


def evaluate(argv: list[str]) -> int:
    """Run the command. Raises MistralTrtError if the evaluation could not run."""
    args = parse(argv)
    if args.quiet:
        quiet()
    job = Job(
        args.folder,
        args.reference,
        args.out,
        tasks=args.tasks,
        lm_eval=args.lm_eval,
        lm_eval_path=args.lm_eval_path,
        limit=args.limit,
        length=args.length,
        threads=args.threads,
        loras=args.lora,
        command=shlex.join(["mistral-trt", "eval", *argv]),
    )
    evaluation = evaluate_artifact(job)
    show(evaluation)
    print(args.out / EVAL_NAME)
    agreed = args.min_agreement is None or evaluation.overall.same.value >= args.min_agreement
    return 0 if agreed else 1


def show(evaluation: Evaluation) -> None:
    for line in failures(evaluation.outcomes):
        note(line)
    for item in evaluation.skipped:
        note(f"{item.task}, item {item.number} was left out: {item.why}")
    print("\n".join(table(evaluation)))


if __name__ == "__main__":
    sys.exit(run("eval", sys.argv[1:]))
