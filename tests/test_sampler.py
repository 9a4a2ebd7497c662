"""The sampler against one plain statement of all its rules in order; its draws against their distribution."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling import sampler as module
from mistral_trt.runtime.sampling.candidates import Truncation, Workspace, uniform
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.sampling.sampler import Choice, Sampler, TokenLogprob

SIZE = 50
LOGITS = (np.random.default_rng(3).normal(size=SIZE) * 1.5).astype(np.float32)
INFINITE = -math.inf


class Only:
    """A constraint that lets some tokens through, and is complete after `whole` tokens."""

    def __init__(self, allowed: set[int], vocab_size: int = SIZE, whole: int = 0) -> None:
        self.allowed, self.vocab_size, self.left = allowed, vocab_size, whole
        self.accepted: list[int] = []

    @property
    def complete(self) -> bool:
        return self.left <= 0

    @property
    def finished(self) -> bool:
        return self.complete and not self.allowed

    def mask(self) -> np.ndarray:
        return np.isin(np.arange(self.vocab_size), list(self.allowed))

    def accept(self, token: int) -> None:
        assert token in self.allowed
        self.accepted.append(token)
        self.left -= 1


def made(params: SamplingParams, **changed: Any) -> Sampler:
    given: dict[str, Any] = {
        "prompt": [1, 2, 3],
        "vocab_size": SIZE,
        "tokenizer_size": None,
        "seed": 11,
        "end_tokens": frozenset({2}),
    }
    return Sampler(params, **(given | changed))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum())


# ---------------------------------------------------------------- every rule, in order


def negate_odd(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
    logits[1::2] *= np.where(logits[1::2] > -np.inf, -1, 1)
    return logits


def lift_all(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
    """Depends on how many tokens there were, and tries to bring masked tokens back."""
    lifted: np.ndarray = np.maximum(logits, -3) + np.float32(0.25) * (
        np.arange(len(logits)) % (1 + len(tokens))
    )
    return lifted


def stated(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: list[int],
    text: list[int],
    size: int,
    only: Only | None,
) -> np.ndarray:
    """Probability of each token: the rules of the docstring one after another, sorting everything."""
    vocab_size = len(logits)
    barred = np.arange(vocab_size) >= size
    if only is not None:
        barred |= ~np.isin(np.arange(vocab_size), [*only.allowed] + ([2] if only.complete else []))
    changed = np.where(barred, -np.inf, logits.astype(np.float64))
    for token, bias in params.logit_bias.items():
        changed[token] += bias
    for token in {*prompt, *text}:
        up = changed[token] > 0
        changed[token] *= 1 / params.repetition_penalty if up else params.repetition_penalty
    for token, count in Counter(text).items():
        changed[token] -= params.presence_penalty + count * params.frequency_penalty
    for processor in params.logits_processors:
        changed = processor(prompt + text, changed.astype(np.float32)).astype(np.float64)
    changed[barred] = -np.inf
    order = sorted(range(vocab_size), key=lambda token: (-np.float32(changed[token]), token))
    if params.temperature == 0:
        return np.asarray(np.arange(vocab_size) == order[0], np.float64)
    order = order[: params.top_k or None]
    probabilities = softmax(changed[order] / params.temperature)
    if params.top_p < 1:
        reached = np.cumsum(probabilities)
        order = order[: int((reached < params.top_p).sum()) + 1]
    most = probabilities[0]
    kept = {t: p for t, p in zip(order, probabilities, strict=False) if p >= params.min_p * most}
    found = np.zeros(vocab_size)
    found[list(kept)] = list(kept.values())
    return np.asarray(found / found.sum())


token_ids = st.integers(0, 19)
everything = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 1]) | st.floats(0.2, 3),
    top_k=st.integers(0, 22),
    top_p=st.just(1) | st.floats(0.05, 0.99),
    min_p=st.just(0) | st.floats(0, 0.9),
    repetition_penalty=st.just(1) | st.floats(0.5, 2),
    presence_penalty=st.just(0) | st.floats(-2, 2),
    frequency_penalty=st.just(0) | st.floats(-2, 2),
    logit_bias=st.dictionaries(token_ids, st.just(INFINITE) | st.floats(-5, 5), max_size=4),
    logits_processors=st.lists(st.sampled_from([negate_odd, lift_all]), max_size=2).map(tuple),
)
SHARES = (np.arange(64) + 0.37) / 64


@settings(max_examples=200, deadline=None)
@given(
    everything,
    st.integers(0, 2**32),
    st.lists(token_ids, max_size=6),
    st.integers(0, 3),
    st.none() | st.sets(st.integers(3, 22), min_size=8),
)
def test_all_rules_in_their_order(
    params: SamplingParams, seed: int, prompt: list[int], steps: int, allowed: set[int] | None
) -> None:
    follow(params, seed, prompt, steps, allowed)


def follow(
    params: SamplingParams, seed: int, prompt: list[int], steps: int, allowed: set[int] | None
) -> None:
    """Choose a few tokens in turn; each is the one at the random share of the stated distribution."""
    rng = np.random.default_rng(seed)
    only = None if allowed is None else Only(allowed, 23, whole=2)
    sampler = made(params, prompt=prompt, vocab_size=23, tokenizer_size=20, seed=seed, constraint=only)
    text: list[int] = []
    for position in range(len(prompt), len(prompt) + steps + 1):
        logits = (rng.normal(size=23) * 3).astype(np.float32)
        expected = stated(logits, params, prompt, text, 20, only)
        token = sampler.choose(logits, position).token
        share = uniform(seed, 0, position)
        edges = np.concatenate([[0], np.cumsum(expected)])
        slack = 1e-5  # penalties round to float32
        assert expected[token] > 0
        assert edges[token] - slack <= share <= edges[token + 1] + slack or params.temperature == 0
        text.append(token)
        if token == 2:
            break


FULL = SamplingParams(
    temperature=2,
    top_k=6,
    top_p=0.9,
    min_p=0.15,
    repetition_penalty=1.3,
    presence_penalty=0.6,
    frequency_penalty=0.3,
    logit_bias={5: 4.0, 6: -3.0},
    logits_processors=(negate_odd, lift_all),
)


def leave_out(name: str, value: object, **given: Any) -> Truncation:
    return Truncation(**(given | {name: value}))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("run_processors", lambda processors, tokens, logits: logits),
        ("Penalties.apply", lambda self, logits: None),
        ("Penalties.add", lambda self, token: None),
        ("Sampler._masked_ids", lambda self: None),
        ("Sampler._add", lambda self, token: None),
        ("Truncation.top_k", 0),
        ("Truncation.top_p", 1),
        ("Truncation.min_p", 0.0),
        ("Truncation.temperature", 1.0),
        ("uniform", lambda seed, index, position: uniform(seed, index, position + 1)),
    ],
)
def test_each_rule_that_is_left_out_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: object
) -> None:
    def follow_all() -> None:
        for seed in range(12):
            follow(FULL, seed, [5, 6, 7, 7], 4, set(range(4, 19)))

    follow_all()
    *owners, attribute = name.split(".")
    owner: Any = getattr(module, owners[0]) if owners else module
    if owners == ["Truncation"]:  # a field: every truncation has this value
        owner, attribute = module, "Truncation"
        wrong = partial(leave_out, name.removeprefix("Truncation."), wrong)
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises(AssertionError):
        follow_all()


def test_orders_that_are_easily_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.full(SIZE, -50, np.float32)
    logits[:4] = [0, 0, 0, 2]

    def drawn(params: SamplingParams, prompt: Sequence[int] = ()) -> set[int]:
        tokens = set()
        for share in SHARES:
            monkeypatch.setattr(module, "uniform", lambda *_, share=share: float(share))
            tokens.add(made(params, prompt=list(prompt)).choose(logits, 0).token)
        return tokens

    # bias before repetition: (0 + 3) / 2 is less than 2, 0 / 2 + 3 would not be
    assert drawn(SamplingParams(logit_bias={0: 3.0}, repetition_penalty=2), [0]) == {3}
    # temperature before top_p: at 10 the four are nearly alike and three are needed; at 1 one has 0.71
    assert drawn(SamplingParams(temperature=10, top_p=0.7)) == {0, 1, 3}
    assert drawn(SamplingParams(temperature=1, top_p=0.7)) == {3}
    # top_k before top_p: of two, 3 has 0.88; of all four it has 0.71, so that others are needed
    assert drawn(SamplingParams(temperature=1, top_k=2, top_p=0.85)) == {3}
    assert drawn(SamplingParams(temperature=1, top_p=0.85)) == {0, 1, 3}
    # min_p after temperature
    assert drawn(SamplingParams(temperature=10, min_p=0.5)) == {0, 1, 2, 3}
    assert drawn(SamplingParams(temperature=1, min_p=0.5)) == {3}


def test_temperature_zero_takes_the_largest_after_all_changes_and_the_lowest_id_of_a_tie() -> None:
    logits = np.array([1, 5, 5, 2] + [0] * (SIZE - 4), np.float32)
    assert made(SamplingParams()).choose(logits, 0).token == 1
    assert made(SamplingParams(top_k=1, top_p=0.1, min_p=1)).choose(logits, 0).token == 1
    assert made(SamplingParams(logit_bias={1: -0.5})).choose(logits, 0).token == 2
    assert made(SamplingParams(logit_bias={9: 5.0})).choose(logits, 0).token == 1
    assert made(SamplingParams(logit_bias={0: 4.0, 9: 5.5})).choose(logits, 0).token == 9
    assert made(SamplingParams(repetition_penalty=3), prompt=[1, 2]).choose(logits, 0).token == 3
    assert made(SamplingParams(), constraint=Only({0, 3})).choose(logits, 0).token == 2, "2 ends a whole text"
    assert made(SamplingParams(), constraint=Only({0, 3}, whole=1)).choose(logits, 0).token == 3
    assert made(SamplingParams(temperature=1e-320), seed=5).choose(LOGITS, 0).token == int(LOGITS.argmax())


def test_penalties_count_the_tokens_that_were_chosen() -> None:
    sampler = made(SamplingParams(frequency_penalty=1.0), prompt=[0, 0, 0])
    logits = np.full(SIZE, -50, np.float32)
    logits[:2] = [3.5, 2]
    assert [sampler.choose(logits, p).token for p in range(6)] == [0, 0, 1, 0, 1, 0]


def test_processors_see_prompt_and_text_and_a_copy() -> None:
    seen: list[tuple[list[int], np.ndarray]] = []

    def spoil(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        seen.append((list(tokens), logits.copy()))
        assert logits.dtype == np.float32
        logits[:] = 0
        logits[7 + len(seen)] = 1
        return logits

    params = SamplingParams(logits_processors=(spoil,), logit_bias={4: 1.5})
    sampler, logits = made(params, prompt=[5, 6], tokenizer_size=40), LOGITS.copy()
    assert [sampler.choose(logits, p).token for p in (2, 3)] == [8, 9]
    assert [tokens for tokens, _ in seen] == [[5, 6], [5, 6, 8]]
    expected = np.concatenate([LOGITS[:40], np.full(10, -np.inf)])
    expected[4] += 1.5
    np.testing.assert_allclose(seen[1][1], expected, rtol=1e-6)
    np.testing.assert_array_equal(logits, LOGITS)


def test_what_a_processor_raises_is_passed_on() -> None:
    def fails(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        made(SamplingParams(logits_processors=(fails,))).choose(LOGITS, 0)
    with pytest.raises(GenerationError, match=r"logits_processors\[0\] .*found NoneType"):
        made(SamplingParams(logits_processors=(lambda tokens, logits: None,))).choose(LOGITS, 0)  # type: ignore[arg-type,return-value]


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1),
        SamplingParams(temperature=3, top_k=45, top_p=0.99),
        SamplingParams(temperature=1, frequency_penalty=2, repetition_penalty=1.1),
        SamplingParams(temperature=1, logits_processors=(lift_all,)),
        SamplingParams(temperature=1, logit_bias={3: 2.0}),
    ],
)
def test_ids_beyond_the_tokenizer_never_come(params: SamplingParams) -> None:
    logits = LOGITS.copy()
    logits[40:] = 30
    sampler = made(params, tokenizer_size=40)
    assert max(sampler.choose(logits, p).token for p in range(300)) < 40
    assert made(params).choose(logits, 0).token >= 40, "without the mask they would"


def test_a_constraint_decides_about_text_and_about_the_end() -> None:
    logits = LOGITS.copy()
    logits[2] = 30  # the end token
    only = Only({5, 9, 17}, whole=3)
    sampler = made(SamplingParams(temperature=1, logits_processors=(lift_all,)), constraint=only)
    tokens = [sampler.choose(logits, p).token for p in range(4)]
    assert tokens[3] == 2 and set(tokens[:3]) <= {5, 9, 17}
    assert only.accepted == tokens[:3], "the end is no part of the text"
    unending = made(SamplingParams(temperature=3), constraint=Only({5, 9}), end_tokens=frozenset())
    assert {unending.choose(logits, p).token for p in range(50)} == {5, 9}


def test_an_end_token_that_is_also_text_waits_for_the_end() -> None:
    only = Only({2, 9}, whole=2)
    sampler = made(SamplingParams(logit_bias={2: 30.0}), constraint=only)
    assert [sampler.choose(LOGITS, p).token for p in range(3)] == [9, 9, 2]


def test_finished_is_what_the_constraint_says() -> None:
    assert not made(SamplingParams()).finished
    only = Only({7}, whole=1)
    sampler = made(SamplingParams(), constraint=only)
    assert not sampler.finished
    sampler.choose(LOGITS, 0)
    assert only.complete and not sampler.finished
    only.allowed = set()
    assert sampler.finished


def test_nothing_left_to_choose_from_is_an_error_that_says_so() -> None:
    every = dict.fromkeys(range(SIZE), INFINITE)

    def ban(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        logits[7] = -np.inf
        return logits

    for params, only, by in [
        (SamplingParams(logit_bias=every), None, "logit_bias"),
        (SamplingParams(temperature=1, logit_bias=every), None, "logit_bias"),
        (SamplingParams(), Only(set(), whole=1), "the constraint (json_schema or regex)"),
        (SamplingParams(logit_bias={7: INFINITE}), Only({7}, whole=1), "logit_bias and the constraint "),
        (
            SamplingParams(logit_bias=every, logits_processors=(ban,)),
            None,
            "logit_bias and logits_processors",
        ),
    ]:
        sampler = made(params, constraint=only)
        with pytest.raises(GenerationError) as raised:
            sampler.choose(LOGITS, 0)
        assert str(raised.value).startswith(
            f"sampling: no token is left to choose from: all 50 are masked by {by}"
        )


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1, presence_penalty=1)])
def test_logits_that_are_not_finite_are_refused(wrong: float, params: SamplingParams) -> None:
    logits = LOGITS.copy()
    logits[30] = wrong
    with pytest.raises(GenerationError, match=f"expected finite logits, found {wrong}"):
        made(params).choose(logits, 0)


def test_logits_of_another_shape_or_type_are_refused() -> None:
    wrong: list[Any] = [LOGITS[:49], LOGITS[None], LOGITS.astype(np.float64)]
    for logits in wrong:
        with pytest.raises(GenerationError, match=r"expected logits float32 \[50\], found float(32|64) \["):
            made(SamplingParams()).choose(logits, 0)


def test_parameters_that_name_tokens_which_cannot_come_are_refused() -> None:
    for params, size, said in [
        (SamplingParams(logit_bias={50: 1}), None, "logit_bias: token ids below 50, found 50"),
        (SamplingParams(logit_bias={40: 1}), 40, "logit_bias: token ids below 40, found 40"),
        (SamplingParams(stop_token_ids=(3, 60)), 99, "stop_token_ids: token ids below 50, found 60"),
        (SamplingParams(logprobs=51), None, "logprobs <= 50, the number of tokens, found 51"),
    ]:
        with pytest.raises(GenerationError) as raised:
            made(params, tokenizer_size=size)
        assert str(raised.value) == f"sampling: expected {said}"
    made(SamplingParams(logit_bias={39: 1}, stop_token_ids=(39,), logprobs=40), tokenizer_size=40)


# ---------------------------------------------------------------- log-probabilities


@settings(deadline=None)
@given(
    st.lists(st.floats(-40, 40, width=32) | st.sampled_from([0.0, 1.0]), min_size=6, max_size=30),
    st.integers(0, 6),
    st.integers(0, 3),
)
def test_logprobs_are_the_log_softmax_of_the_returned_logits(
    given: list[float], top: int, masked: int
) -> None:
    logits = np.array(given, np.float32)
    size = len(given) - masked
    top = min(top, size)
    params = SamplingParams(temperature=2, top_k=3, logit_bias={0: -5.0}, logprobs=top)
    choice = made(params, vocab_size=len(given), tokenizer_size=size).choose(logits, 0)
    own = logits[:size].astype(np.float64)
    expected = own - own.max() - math.log(np.exp(own - own.max()).sum())
    assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-9)
    order = sorted(range(size), key=lambda token: (-own[token], token))[:top]
    assert choice.top is not None and [one.token for one in choice.top] == order
    assert [one.logprob for one in choice.top] == pytest.approx([expected[t] for t in order], abs=1e-9)


def test_logprobs_are_given_as_asked() -> None:
    def of(wanted: int | None) -> Choice:
        return made(SamplingParams(logprobs=wanted)).choose(LOGITS, 0)

    best = int(LOGITS.argmax())
    logprob = math.log(softmax(LOGITS)[best])
    assert of(None) == Choice(best, None, None)
    assert of(0).top == () and of(0).logprob == pytest.approx(logprob)
    (only,) = of(1).top or ()
    assert only == TokenLogprob(best, only.logprob) and only.logprob == pytest.approx(logprob)
    full = of(SIZE).top
    assert full is not None and sum(math.exp(one.logprob) for one in full) == pytest.approx(1)


# ---------------------------------------------------------------- random numbers


def run(params: SamplingParams, count: int = 40, **changed: Any) -> list[int]:
    sampler = made(params, **changed)
    return [sampler.choose(LOGITS, p).token for p in range(count)]


def test_a_token_depends_on_seed_index_and_position_alone() -> None:
    params = SamplingParams(temperature=1.3, top_p=0.95)
    tokens = run(params)
    assert run(params) == tokens
    backwards, shared = made(params), Workspace(SIZE)
    assert [backwards.choose(LOGITS, p).token for p in reversed(range(40))] == tokens[::-1]
    two = [made(params, workspace=shared, index=index) for index in (0, 1)]
    together = [[one.choose(LOGITS, p).token for one in two] for p in range(40)]
    assert [pair[0] for pair in together] == tokens, "another sampler on the same workspace changes nothing"
    assert [pair[1] for pair in together] == run(params, index=1) != tokens
    assert run(params, seed=12) != tokens
    assert run(params, prompt=[9], end_tokens=frozenset()) == tokens


RULES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.5, min_p=0.2, logit_bias={3: 2.0}),
]


def z_of(found: np.ndarray, expected: np.ndarray) -> float:
    """Chi-squared of counts as a standard normal (Wilson-Hilferty)."""
    assert found[expected == 0].sum() == 0
    hoped = expected * found.sum()
    common = hoped >= 5
    statistic, freedom = ((found - hoped)[common] ** 2 / hoped[common]).sum(), int(common.sum()) - 1
    return float(((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)))


@pytest.mark.parametrize("params", RULES)
@pytest.mark.parametrize("along", ["position", "index", "seed"])
def test_draws_have_the_stated_distribution(params: SamplingParams, along: str) -> None:
    """Chi-squared over fixed seeds; the bound of 4.75 is passed by chance once in 10^6."""
    found = np.zeros(SIZE)
    sampler = made(params)
    for number in range(4000):
        if along != "position":
            sampler = made(params, **{along: number})
        found[sampler.choose(LOGITS, number if along == "position" else 5).token] += 1
    assert z_of(found, stated(LOGITS, params, [], [], SIZE, None)) < 4.75


def test_the_distribution_check_can_fail() -> None:
    found = np.bincount(run(SamplingParams(temperature=1.0), count=4000), minlength=SIZE)
    assert z_of(found, stated(LOGITS, SamplingParams(temperature=1.0), [], [], SIZE, None)) < 4.75
    assert z_of(found, stated(LOGITS, SamplingParams(temperature=1.15), [], [], SIZE, None)) > 4.75
    with pytest.raises(AssertionError):
        z_of(found, stated(LOGITS, SamplingParams(temperature=1.0, top_k=40), [], [], SIZE, None))


def test_without_need_nothing_of_the_size_of_the_vocabulary_is_kept() -> None:
    sampler = made(SamplingParams())
    sampler.choose(LOGITS, 0)
    assert sampler._room is None
    shared = Workspace(SIZE)
    sampler = made(SamplingParams(temperature=1), workspace=shared)
    sampler.choose(LOGITS, 0)
    assert sampler._room is shared
