"""Greedy continuations: what the artifact says by itself, and where the reference parts from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.errors import NonFiniteLogitsError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.runtime.cache import Logits, RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.validate.findings import Divergence, GreedyAgreement
from mistral_trt.validate.reference.hugging_face import Reference, load_model, run_reference
from mistral_trt.validate.trial.greedy import continue_greedily, greedy_agreement, split
from tests.conftest import Folder

PROMPT = [int(t) for t in np.random.default_rng(7).integers(0, 97, 25)]
COUNT = 20


@pytest.fixture(scope="module")
def cache(onnx_folder: Folder) -> RollingCache:
    return open_cache(onnx_folder())


@pytest.fixture(scope="module")
def said(cache: RollingCache) -> list[int]:
    return list(continue_greedily(cache, PROMPT, COUNT))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Folder, said: list[int]) -> Reference:
    model = load_model(Checkpoint.open(tiny_checkpoint()), sliding_window=8)
    return run_reference(model, [*PROMPT, *said])


def test_prompt_and_continuation_by_hand() -> None:
    assert split(2312) == (64, 64)
    assert split(100) == (25, 64)
    assert split(12) == (3, 9)
    assert split(2) == (1, 1)


@given(length=st.integers(2, 5000))
def test_prompt_and_continuation_fit_into_the_length(length: int) -> None:
    prompt, count = split(length)
    assert 1 <= prompt <= 64
    assert 1 <= count <= 64
    assert prompt + count <= length


def test_the_same_model_says_the_same_to_the_end(reference: Reference, said: list[int]) -> None:
    found = greedy_agreement(reference, said, prompt_tokens=25)
    assert found == GreedyAgreement(prompt_tokens=25, generated=COUNT, agreed=COUNT, diverged=None)


def test_the_continuation_is_that_of_the_model_without_a_cache(
    tiny_checkpoint: Folder, said: list[int]
) -> None:
    """Every token by a forward of its own over all before it."""
    model = load_model(Checkpoint.open(tiny_checkpoint()), sliding_window=8)
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(COUNT):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert said == tokens[len(PROMPT) :]


def test_another_head_parts_and_the_place_is_named(reference: Reference, said: list[int]) -> None:
    noise = torch.randn(reference.head.shape, generator=torch.Generator().manual_seed(0))
    other = replace(reference, head=reference.head + 0.02 * noise)
    found = greedy_agreement(other, said, prompt_tokens=25)
    logits = other.logits(24, 24 + COUNT)
    chosen = logits.argmax(axis=-1)
    first = next(i for i in range(COUNT) if chosen[i] != said[i])
    assert found.agreed == first
    assert 0 < first < COUNT
    margin = float(logits[first].max() - logits[first, said[first]])
    assert margin > 0
    assert found.diverged == Divergence(25 + first, said[first], int(chosen[first]), margin)


def test_one_changed_token_is_where_they_part(reference: Reference, said: list[int]) -> None:
    """What follows it is the reference's answer to other tokens and is not looked at."""
    changed = [*said[:17], (said[17] + 1) % 97, *said[18:]]
    found = greedy_agreement(reference, changed, prompt_tokens=25)
    assert found.agreed == 17
    assert found.diverged is not None
    assert found.diverged.position == 25 + 17
    assert found.diverged.artifact_token == changed[17]
    assert found.diverged.reference_token == said[17]


def test_of_an_exact_tie_either_token_will_do() -> None:
    tied = Reference(torch.ones(3, 1), torch.tensor([[0.0], [2.0], [2.0]]))  # logits 0 2 2 everywhere
    for tokens in ([1, 1], [2, 1], [2, 2]):
        assert greedy_agreement(tied, tokens, prompt_tokens=2).agreed == 2
    assert greedy_agreement(tied, [1, 0], prompt_tokens=2) == GreedyAgreement(
        2, 2, 1, Divergence(3, 0, 1, 2.0)
    )


def test_nothing_said_agrees_with_nothing(reference: Reference) -> None:
    assert greedy_agreement(reference, [], prompt_tokens=25) == GreedyAgreement(25, 0, 0, None)


def test_the_row_is_given_back_whatever_happens(cache: RollingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    free, calls = cache.free_rows, []
    assert len(list(continue_greedily(cache, PROMPT, 3))) == 3
    assert cache.free_rows == free
    step = RollingCache.step

    def failing(self: RollingCache, tokens: dict[int, int]) -> dict[int, Logits]:
        calls.append(tokens)
        if len(calls) == 3:
            raise NonFiniteLogitsError([0], {})
        return step(self, tokens)

    monkeypatch.setattr(RollingCache, "step", failing)
    found: list[int] = []
    with pytest.raises(NonFiniteLogitsError):
        found.extend(continue_greedily(cache, PROMPT, 9))
    assert cache.free_rows == free


def test_the_last_token_is_not_fed(cache: RollingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A continuation may end at max_context."""
    fed: list[int] = []
    step = RollingCache.step

    def counted(self: RollingCache, tokens: dict[int, int]) -> dict[int, Logits]:
        fed.extend(tokens.values())
        return step(self, tokens)

    monkeypatch.setattr(RollingCache, "step", counted)
    tokens = list(continue_greedily(cache, PROMPT, 5))
    assert fed == tokens[:4]
