"""A checkpoint in this runtime and in onnxruntime-genai → whole decode steps, in turn, greedy and top-p.

A step is what a consumer waits for: from one token's text to the next one's. Both use the same number of
threads and stay inside the window, which onnxruntime-genai's cache of this model does not leave.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from peer_environment import peer_environment
from quantization_checks import Check
from runtime_model import WINDOW
from runtime_steps import microseconds

from mistral_trt.runtime import Engine, SamplingParams

PEER = "onnxruntime-genai"
MODES: dict[str, dict[str, float]] = {"greedy": {}, "top-p": {"temperature": 0.8, "top_p": 0.9}}
PROMPT = [0, *range(3, 34)]
TOKENS = WINDOW - len(PROMPT)
WARM_UP = 4
"""Steps at the beginning of a block that do not count."""
PAUSE_S = 0.02
"""Between two blocks: threads that spin in wait for work have stopped by then."""

Block = tuple[list[int], list[float]]
"""Tokens, and the seconds of each step."""


class Worker:
    """onnxruntime-genai in a process of its own, which decodes a block of tokens when it is told to."""

    def __init__(self, python: Path, model: Path, threads: int) -> None:
        command = [str(python), str(Path(__file__).parent / "runtime_genai.py"), str(model), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()

    def block(self, mode: str) -> Block:
        question = {"prompt": PROMPT, "tokens": TOKENS, "search": MODES[mode]}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        tokens, seconds = self._answer()
        return tokens, seconds

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{PEER} ended with status {self._process.wait()}")
        return json.loads(line)


def compare(checkpoint: Path, artifact: Path, scratch: Path, *, blocks: int, threads: int) -> dict[str, Any]:
    """Blocks of steps of the two in turn.  blocks: of each, and of each way to choose a token."""
    seconds: dict[str, dict[str, list[float]]] = {mode: {"ours": [], PEER: []} for mode in MODES}
    tokens: dict[str, list[int]] = {}
    with (
        peer_worker(checkpoint, scratch, threads) as worker,
        Engine.load(artifact, threads=threads) as engine,
    ):
        for mode in list(MODES) * blocks:
            for who in ("ours", PEER):
                found, took = block(engine, mode) if who == "ours" else worker.block(mode)
                seconds[mode][who] += took[WARM_UP:]
                if mode == "greedy":
                    tokens[who] = found
                sleep(PAUSE_S)
        figures: dict[str, Any] = {"version": worker.version, "threads": threads}
    figures["positions"] = [len(PROMPT), WINDOW]
    for mode, of in seconds.items():
        figures[mode] = {who: microseconds(times) for who, times in of.items()}
    differing = sum(a != b for a, b in zip(tokens["ours"], tokens[PEER], strict=True))
    remark = f"{threads} thread(s) each, positions {len(PROMPT)} to {WINDOW}, inside the window"
    return {"figures": figures, "checks": checks(figures, differing), "remarks": [remark]}


def checks(figures: Mapping[str, Any], differing: int) -> list[Check]:
    """Both medians and their ratio, which nobody bounded; the greedy tokens must be the same."""
    found = []
    for mode in MODES:
        ours, theirs = (figures[mode][who]["median_us"] for who in ("ours", PEER))
        found += [
            Check(f"{mode}: whole step, µs", ours),
            Check(f"{mode}: whole step of {PEER} {figures['version']}, µs", theirs),
            Check(f"{mode}: ours / theirs", ours / theirs),
        ]
    return [*found, Check(f"greedy: tokens of {TOKENS} that differ", differing, at_most=0)]


def block(engine: Engine, mode: str) -> Block:
    """As `Worker.block`, of this runtime: the time between two pieces of a stream."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=0, **MODES[mode])
    tokens, times = [], []
    for piece in engine.stream(PROMPT, params):
        if piece.token is not None:
            times.append(perf_counter())
            tokens.append(piece.token)
    return tokens, [after - before for before, after in pairwise(times)]


@contextmanager
def peer_worker(checkpoint: Path, scratch: Path, threads: int) -> Iterator[Worker]:
    """The peer on the same weights: its own exporter in its own environment."""
    python = peer_environment(PEER) / "bin" / "python"
    model, cache = scratch / PEER, scratch / "peer-cache"
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", model, "-c", cache]
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "XDG_CACHE_HOME": str(cache)}
    command += ["-p", "fp32", "-e", "cpu"]
    # In a folder of its own: -m looks for modules in the working folder first.
    built = subprocess.run(command, env=own, cwd=scratch, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"{PEER} could not export the model:\n{built.stderr[-4000:]}")
    worker = Worker(python, model, threads)
    try:
        yield worker
    finally:
        worker.close()
