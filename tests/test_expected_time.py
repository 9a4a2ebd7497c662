"""The prediction of a validation's time: what it counts, and that more work takes longer."""

import pytest

from mistral_trt.validate.budget import DEFAULT, FULL, QUICK
from mistral_trt.validate.expected_time import (
    Speed,
    Work,
    in_words,
    measure_speed,
    poke_work,
    predict_seconds,
    scenario_work,
)
from mistral_trt.validate.scenarios.poke import questions
from mistral_trt.validate.scenarios.scenario import Call, Scenario, Together, scenarios
from tests.test_probes import contract

SPEED = Speed(flops_per_s=1e11, bytes_per_s=1e10)


def test_padding_and_context_are_computed_too() -> None:
    calls = (Call(0, 4, "context"), Call(4, 6, "padded", 8), Call(6, 7, "decode"), Together((7, 3)))
    assert scenario_work(Scenario("rows", "", calls, rows=2)) == Work(12, 2, 5, 0)


def test_every_budget_takes_longer_than_the_one_below() -> None:
    shape = contract(512, 256)
    seconds = []
    for budget in (QUICK, DEFAULT, FULL):
        length = budget.length(shape)
        planned = scenarios(shape, length, names=budget.names, seed=0)
        work = sum((scenario_work(plan) for plan in planned), poke_work(shape, questions(shape, length)))
        seconds.append(predict_seconds(work, shape, weights=10**8, speed=SPEED))
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[2] / 3


def test_a_step_reads_every_weight_and_a_chunk_multiplies_by_it() -> None:
    shape = contract(8, 4)
    steps = predict_seconds(Work(0, 10, 0, 0), shape, weights=10**9, speed=SPEED)
    chunk = predict_seconds(Work(1000, 0, 0, 0), shape, weights=10**9, speed=SPEED)
    assert steps == pytest.approx(10 * 4e9 / 1e10, rel=0.01)
    assert chunk == pytest.approx(1000 * 2e9 / 1e11, rel=0.01)


def test_eager_attention_grows_with_the_square_of_the_length() -> None:
    """And is slower than one large product: four tenths of its speed."""
    shape = contract(8, 4)
    config = shape.config
    score = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    found = predict_seconds(Work(0, 0, 0, 0, scored=1000**2), shape, weights=10**9, speed=SPEED)
    assert found == pytest.approx(1000**2 * score / (0.4 * 1e11))


def test_a_comparison_makes_the_references_logits_again() -> None:
    shape = contract(8, 4)
    logits = 1000 * shape.config.vocab_size
    found = predict_seconds(Work(0, 0, 1000, 0), shape, weights=10**9, speed=SPEED)
    assert found == pytest.approx(logits / 8e7 + logits * 2 * shape.config.hidden_size / 1e11)


def test_the_speed_is_one_a_computer_may_have() -> None:
    speed = measure_speed()
    assert 1e8 < speed.flops_per_s < 1e15
    assert 1e8 < speed.bytes_per_s < 1e13


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "less than a minute"), (61, "about 1 minute"), (100, "about 2 minutes"), (5400, "about 1.5 hours")],
)
def test_a_person_is_told_roughly(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
