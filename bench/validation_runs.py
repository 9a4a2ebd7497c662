"""A seed and a precision → what the default validation measures of that healthy artifact.

Each is a file of its own, written when it is done: a run that was stopped goes on where it was.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from transformers.utils import logging as transformers_logging
from validation_models import Shape, shape_of, write_checkpoint

from mistral_trt.artifact import write_file
from mistral_trt.contract import QUANTIZED, GraphContract
from mistral_trt.export import graph, onnx_folder
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.validate.comparison import prepare, run
from mistral_trt.validate.job import Job
from mistral_trt.validate.report.report import Report

CALIBRATION = QuantizationSettings(samples=4, tokens=64)


@dataclass(frozen=True)
class Runs:
    """What is to be run.  folder: keeps the results, and until it is measured what a seed is made into."""

    folder: Path
    precisions: Sequence[str]

    def result(self, seed: int, precision: str) -> Path:
        return self.folder / "results" / f"{precision}-{seed}.json"

    def missing(self, seed: int) -> list[str]:
        """The precisions that have no result yet."""
        return [precision for precision in self.precisions if not self.result(seed, precision).is_file()]


def run_seeds(runs: Runs, seeds: int, *, processes: int) -> None:
    """All that is missing, each process on one thread."""
    (runs.folder / "results").mkdir(parents=True, exist_ok=True)
    todo = [seed for seed in range(seeds) if runs.missing(seed)]
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=use_one_thread, initargs=(runs.folder,)
    ) as pool:
        list(pool.map(partial(run_seed, runs), todo))


def use_one_thread(folder: Path) -> None:
    """What a process begins with.  Calibrations are kept in `folder`, not in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def run_seed(runs: Runs, seed: int) -> None:
    """A seed's checkpoint in each precision that is missing; what was made of it is gone afterwards."""
    work = runs.folder / f"seed-{seed}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        checkpoint = write_checkpoint(work / "checkpoint", seed)
        for precision in runs.missing(seed):
            started = time.process_time()
            report = validated(checkpoint, work / precision, precision, shape=shape_of(seed))
            seconds = round(time.process_time() - started, 1)
            found = {"seed": seed, "cpu_seconds": seconds, "gates": measured(report)}
            write_file(runs.result(seed, precision), json.dumps(found, indent=1).encode())
            print(f"{precision:<17}seed {seed:<4}{seconds:6.1f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def validated(checkpoint: Path, folder: Path, precision: str, *, shape: Shape) -> Report:
    """Export, and validate at the default budget; no picture is drawn."""
    options: dict[str, Any] = {"quantization": CALIBRATION} if precision in QUANTIZED else {}
    with mock.patch.object(onnx_folder, "build_graph", traced_once):
        onnx_folder.export_checkpoint(
            checkpoint,
            folder,
            precision=precision,
            prefill_chunk=shape.chunk,
            max_batch_size=shape.rows,
            **options,
        )
    return run(*prepare(Job(folder, checkpoint, folder.with_suffix(".report"), threads=1)))


def traced_once(contract: GraphContract) -> ir.Model:
    """`build_graph`, which takes most of a tiny export: one trace for all precisions with float16 rings,
    whose graphs are the same before linears are quantized."""
    shared = "fp16" if contract.precision in QUANTIZED else contract.precision
    return _trace(replace(contract, precision=shared)).clone()


@cache
def _trace(contract: GraphContract) -> ir.Model:
    return graph.build_graph(contract)


def measured(report: Report) -> dict[str, dict[str, Any]]:
    """Gate → what was held against it; gates that were not decided are left out."""
    return {
        result.name: {
            "value": result.measured.value,
            "where": result.measured.where,
            "positions": result.measured.positions,
        }
        for result in report.gates
    }
