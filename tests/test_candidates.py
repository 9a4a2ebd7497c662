"""What may be drawn, against statements of the rules that sort everything; the draw, against its law."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mistral_trt.runtime.sampling import candidates
from mistral_trt.runtime.sampling.candidates import Candidates, Truncation, Workspace, largest, uniform

Rules = tuple[float, int, float, float]
"""temperature, top_k, top_p, min_p."""


def stated(logits: np.ndarray, rules: Rules) -> dict[int, float]:
    """The rules as they stand: sort everything, sum one by one, in float64. Token → probability."""
    temperature, top_k, top_p, min_p = rules
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: top_k or None]
    with np.errstate(over="ignore"):
        powers = (logits[order].astype(np.float64) - float(logits[order[0]])) / temperature
    weights = [math.exp(power) for power in powers]
    sums = np.cumsum(weights)
    if top_p < 1:
        order = order[: 1 + sum(bool(reached < top_p * sums[-1]) for reached in sums)]
    kept = [(t, w) for t, w in zip(order, weights, strict=False) if w >= min_p * weights[0] and w > 0]
    total = math.fsum(weight for _, weight in kept)
    return {token: weight / total for token, weight in kept}


def found(logits: np.ndarray, rules: Rules, room: Workspace | None = None) -> dict[int, float]:
    """The same from the module."""
    temperature, top_k, top_p, min_p = rules
    truncation = Truncation(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = truncation.candidates(logits, room or Workspace(len(logits)))
    ids = np.arange(len(logits)) if kept.ids is None else kept.ids
    assert len(ids) == len(kept.weights) and bool((np.diff(ids) > 0).all())
    probabilities = kept.weights / kept.weights.sum()
    return {int(t): float(p) for t, p in zip(ids, probabilities, strict=True) if p > 0}


def check(logits: np.ndarray, rules: Rules, room: Workspace | None = None) -> None:
    before = logits.copy()
    expected, got = stated(logits, rules), found(logits, rules, room)
    assert set(got) == set(expected)
    for token, probability in expected.items():
        assert got[token] == pytest.approx(probability, rel=1e-9, abs=1e-300)
    np.testing.assert_array_equal(logits, before)


logit = st.floats(-30, 30, width=32) | st.sampled_from([-math.inf, 0.0, 0.5, 1.0, 2.0])
small = st.tuples(st.floats(-30, 30, width=32), st.lists(logit, max_size=40)).map(
    lambda pair: np.array([pair[0], *pair[1]], np.float32)  # at least one is finite
)
rules = st.tuples(
    st.floats(0.05, 5) | st.sampled_from([1, 5e-324, 1e-30, 1e300]),
    st.integers(0, 45),
    st.floats(0.001, 0.999) | st.sampled_from([1, 0.1, 0.3, 0.5, 0.7, 0.9, 1e-12, 1 - 2**-53]),
    st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0, 1),
)


@settings(max_examples=300, deadline=None)
@given(small, rules)
@example(np.zeros(10, np.float32), (1, 0, 0.3, 0))
@example(np.zeros(10, np.float32), (1, 0, 0.7, 1))
@example(np.array([1, 2, 2, 2, 0], np.float32), (1, 2, 1, 0))
@example(np.array([-3e38, 3e38, 0], np.float32), (1e300, 0, 0.5, 0))
def test_the_set_and_its_probabilities_are_those_of_the_rules(logits: np.ndarray, rule: Rules) -> None:
    check(logits, rule)


def made(kind: str, size: int, seed: int) -> np.ndarray:
    """Logits of a kind, float32 [size]."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=size) * {"flat": 0.02, "even": 1.0, "usual": 3.0, "sharp": 8.0}.get(kind, 1.0)
    if kind == "ties":
        logits = np.round(logits * 2) / 2
    if kind == "equal":
        logits[:] = 4
    if kind == "masked":
        logits[rng.random(size) < 0.3] = -np.inf
    if kind == "one ahead":
        logits[rng.integers(size)] = 9
    if kind == "far apart":
        logits = np.where(rng.random(size) < 0.3, -3e38, logits * 1e-6)
    return logits.astype(np.float32)


KINDS = ["flat", "even", "usual", "sharp", "ties", "equal", "masked", "one ahead", "far apart"]


@pytest.mark.parametrize("kind", KINDS)
def test_so_they_are_over_a_vocabulary(kind: str) -> None:
    room = Workspace(3000)
    for seed, size in enumerate([3000, 2999, 1025]):
        logits = made(kind, size, seed)
        rng = np.random.default_rng(seed)
        for top_p in (0.05, 0.5, 0.9, 0.99, rng.random(), 1):
            top_k, min_p = int(rng.choice([0, 0, 40, 2000])), float(rng.choice([0, 0, 0.01, 0.3]))
            check(logits, (float(rng.choice([0.3, 0.8, 1, 3])), top_k, top_p, min_p), room)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fallback_gives_the_same_set(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_SLACK", 2.0)  # nothing is ever certain
    for size in (50, 3000):
        check(made(kind, size, 5), (0.8, 0, 0.9, 0))
        check(made(kind, size, 6), (0.8, 30, 0.6, 0.02))


def test_the_fallback_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one of 200 ordinary cases; only sums that meet top_p to ten digits need it."""
    calls: list[float] = []
    by_sorting = candidates.top_p_by_sorting

    def counted(logits: np.ndarray, weights: np.ndarray, top_p: float) -> object:
        calls.append(top_p)
        return by_sorting(logits, weights, top_p)

    monkeypatch.setattr(candidates, "top_p_by_sorting", counted)
    rng = np.random.default_rng(1)
    for seed in range(200):
        found(made("even", 2000, seed), (1, 0, float(rng.uniform(0.01, 0.99)), 0))
    assert len(calls) <= 1
    found(np.zeros(2000, np.float32), (1, 0, 0.5, 0))
    assert calls[-1] == 0.5


@pytest.mark.parametrize("share", [0.0, 0.9, 1.1])
def test_a_border_in_the_wrong_place_is_noticed(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """The sums around the border are checked against the target; if they miss it, everything is sorted."""
    border = candidates._border

    def moved(*given: object) -> object:
        ids, above = border(*given)  # type: ignore[arg-type]
        return ids, above * share

    monkeypatch.setattr(candidates, "_border", moved)
    check(made("even", 3000, 2), (1, 0, 0.9, 0))


def wrong_ties(logits: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.lexsort((-np.arange(len(logits)), -logits))[:count])


def one_more(*given: object) -> object:
    kept = PREFIX(*given)  # type: ignore[arg-type]
    assert kept is not None
    kept[int(np.argmin(kept))] = True
    return kept


def any_bins(logits: np.ndarray, *given: object, **more: object) -> np.ndarray:
    return np.arange(len(logits)) * 7919 % 1024


PREFIX = candidates._prefix


@pytest.mark.parametrize(
    ("name", "wrong", "kind", "rule"),
    [
        ("largest", wrong_ties, "ties", (1, 40, 1, 0)),
        ("_prefix", one_more, "usual", (1, 0, 0.9, 0)),
        ("_bins", any_bins, "even", (1, 0, 0.9, 0)),
        ("top_p_by_sorting", lambda logits, weights, top_p: np.arange(3), "equal", (1, 0, 0.5, 0)),
    ],
)
def test_a_wrong_rule_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., object], kind: str, rule: Rules
) -> None:
    logits = made(kind, 3000, 2)
    check(logits, rule)
    monkeypatch.setattr(candidates, name, wrong)
    with pytest.raises(AssertionError):
        check(logits, rule)


def test_a_slightly_different_parameter_would_be_seen() -> None:
    logits = made("even", 3000, 2)
    rule, expected = (0.8, 0, 0.9, 0.0), stated(made("even", 3000, 2), (0.8, 0, 0.9, 0.0))
    assert set(found(logits, rule)) == set(expected)
    for other in [(0.801, 0, 0.9, 0.0), (0.8, 0, 0.9005, 0.0), (0.8, 500, 0.9, 0.0), (0.8, 0, 0.9, 0.2)]:
        assert set(found(logits, other)) != set(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 5, 64, 93, 94, 2000, 3000])
def test_the_largest_are_the_first_of_all_sorted(kind: str, count: int) -> None:
    logits = made(kind, 3000, count)
    order = sorted(range(3000), key=lambda token: (-logits[token], token))
    assert list(largest(logits, count)) == sorted(order[:count])


# ---------------------------------------------------------------- the draw

LAST = 1 - 2**-53
"""The largest number that a generator of [0, 1) gives."""


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1.0, 1e-3, 1e-12]) | st.floats(0, 1), min_size=1, max_size=700),
    st.floats(0, LAST) | st.sampled_from([0.0, LAST]),
)
def test_a_draw_is_the_inverse_of_the_sums(weights: list[float], share: float) -> None:
    if not any(weights):
        weights[0] = 1.0
    found = Candidates(None, np.array(weights)).draw(share)
    assert weights[found] > 0
    below, total = math.fsum(weights[:found]), math.fsum(weights)
    slack = 1e-12 * total
    assert below - slack <= share * total <= below + weights[found] + slack


def test_the_ids_of_candidates_are_what_is_drawn() -> None:
    kept = Candidates(np.array([3, 8, 900]), np.array([0.5, 0.0, 0.5]))
    assert [kept.draw(share) for share in (0.0, 0.49, 0.5, LAST)] == [3, 3, 900, 900]


def test_rounding_never_draws_what_has_no_weight() -> None:
    rng = np.random.default_rng(0)
    for size in (255, 256, 257, 3001):
        weights = rng.random(size) * (rng.random(size) < 0.5)
        weights[-1] = weights[0] = 0
        kept = Candidates(None, weights)
        edges = np.cumsum(weights) / weights.sum()
        shares = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 1), [0, LAST]])
        assert all(weights[kept.draw(float(min(share, LAST)))] > 0 for share in shares)


def test_a_random_number_depends_on_seed_index_and_position_alone() -> None:
    assert uniform(5, 0, 9) == uniform(5, 0, 9)
    numbers = {uniform(s, i, p) for s in (0, 5, 2**64 - 1) for i in range(4) for p in range(100)}
    assert len(numbers) == 1200
    assert 0 <= uniform(2**64 - 1, 63, 2**40) < 1


@pytest.mark.parametrize("along", ["seed", "index", "position"])
def test_random_numbers_are_even_along_each_of_them(along: str) -> None:
    """Kolmogorov-Smirnov over 4,000 numbers; right ones pass the bound but once in 10^6 (2 exp(-2 n d²))."""
    count, numbers = 4000, []
    for number in range(count):
        given = {"seed": 7, "index": 1, "position": 3} | {along: number}
        numbers.append(uniform(given["seed"], given["index"], given["position"]))
    bound = math.sqrt(math.log(2e6) / (2 * count))

    def distance(values: list[float]) -> float:
        ranked = np.sort(values)
        return float(np.abs(ranked - (np.arange(count) + 0.5) / count).max())

    assert distance(numbers) < bound
    assert distance([number**1.3 for number in numbers]) > bound
    pairs = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]  # neighbours are independent: normal, ±1/sqrt(n)
    assert abs(pairs) < 4.9 / math.sqrt(count)
