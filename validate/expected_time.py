"""What is to be run + this machine's speed → about how long a validation will take, said before it begins.

A prediction for people, good to a factor of about two: multiplications at the speed of one large product,
eager attention at a part of it, decode steps at the speed of memory, comparisons in float64.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mistral_trt.contract import GraphContract
from mistral_trt.validate.scenarios.poke import Question, pokes
from mistral_trt.validate.scenarios.scenario import Call, Scenario

_COMPARED_PER_S = 8e7
"""Logits that are compared in a second on one core: some fifteen passes of float64 over each."""
_EAGER_SHARE = 0.4
"""Of the speed of one large product: eager attention writes its scores out and reads them again."""
_STEP_S = 4e-4
"""Of a decode step whatever the model's size: calls, copies, checks."""
_LAYER_S = 0.3
"""Of a layer that is run by itself: cutting, loading and leaving its graph."""


@dataclass(frozen=True)
class Speed:
    """Of this machine.  flops_per_s: multiply-adds counted twice.  bytes_per_s: of reading weights."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Work:
    """Multiplications and memory traffic, in units of the model: weights that are used once for each token.

    tokens: in chunks.  steps: decode steps.  compared: positions whose logits are compared, the reference's
    made anew each time.  layer_runs: layers that are run by themselves.  scored: pairs of a query and a key
    in the reference's eager attention, which keeps every key.
    """

    tokens: int
    steps: int
    compared: int
    layer_runs: int
    scored: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def measure_speed() -> Speed:
    """A large product and a long copy, a fifth of a second."""
    a, b = torch.rand(768, 768), torch.rand(768, 768)
    long = torch.rand(1 << 24)
    a @ b
    product, copy = (min(_seconds(call) for _ in range(3)) for call in (lambda: a @ b, long.sum))
    return Speed(flops_per_s=2 * 768**3 / product, bytes_per_s=4 * len(long) / copy)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def scenario_work(scenario: Scenario) -> Work:
    """One scenario, all of its calls."""
    chunks = [call for call in scenario.calls if isinstance(call, Call) and call.kind != "decode"]
    tokens = sum(max(call.stop - call.start, call.pad_to) for call in chunks)
    steps = len(scenario.calls) - len(chunks)
    return Work(tokens, steps, scenario.compared, 0)


def poke_work(contract: GraphContract, asked: Sequence[Question]) -> Work:
    """Every question with each of its pokes, the last step with every layer, and what is fed between."""
    neighbours = contract.max_batch_size > 1
    times = [(question, 1 + len(pokes(contract.ring, question, neighbours=neighbours))) for question in asked]
    tokens = sum(question.width * count for question, count in times if question.width > 1)
    steps = sum(count for question, count in times if question.width == 1) + contract.config.num_hidden_layers
    fed = max((question.stop for question in asked), default=0)
    return Work(tokens + fed, steps, 0, 0)


def predict_seconds(work: Work, contract: GraphContract, *, weights: int, speed: Speed) -> float:
    """weights: parameters of the model."""
    config = contract.config
    ring = contract.ring.capacity * config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    products = work.tokens * (2 * weights + 4 * ring * heads) / speed.flops_per_s
    traffic = work.steps * (4 * weights / speed.bytes_per_s + _STEP_S)
    attention = 4 * work.scored * heads * config.num_hidden_layers / (_EAGER_SHARE * speed.flops_per_s)
    a_logit = 1 / _COMPARED_PER_S + 2 * config.hidden_size / speed.flops_per_s
    compared = work.compared * config.vocab_size * a_logit
    return products + attention + traffic + compared + work.layer_runs * _LAYER_S


def in_words(seconds: float) -> str:
    """40 -> "less than a minute"; 100 -> "about 2 minutes"; 5000 -> "about 1.4 hours"."""
    if seconds < 60:
        return "less than a minute"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} minute{'s' if round(seconds / 60) > 1 else ''}"
    return f"about {seconds / 3600:.1f} hours"
