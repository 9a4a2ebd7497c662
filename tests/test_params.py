"""Sampling parameters: what is out of range or of another type is refused, and what was taken stays."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling.params import SamplingParams

GOOD: dict[str, list[Any]] = {
    "max_tokens": [1, 10**9],
    "temperature": [0, 0.0, 1, 5e-324, 100.0],
    "top_k": [0, 1, 10**6],
    "top_p": [1, 1.0, 1e-9],
    "min_p": [0, 0.0, 0.05, 1, 1.0],
    "repetition_penalty": [1, 0.01, 1.3, 100],
    "presence_penalty": [-2, 0.5, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "logit_bias": [{}, {0: 1, 5: -100.0, 7: -math.inf, 8: 1e30}],
    "seed": [None, 0, 2**64 - 1],
    "stop": [(), ("a", " \n"), ["é"]],
    "stop_token_ids": [(), (0, 5), [7]],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 20],
    "n": [1, 64],
    "logits_processors": [(), (max,), [min]],
    "json_schema": [None, {}, {"type": "object"}, '{"type": "string"}'],
    "regex": [None, "a+", "é"],
}
NO_INTS = [True, 1.0, "1", None, np.int64(1)]
NO_NUMBERS = [True, "1", None, math.nan, math.inf, -math.inf, np.float32(1), 1j, [1]]
BAD: dict[str, list[Any]] = {
    "max_tokens": [0, -1, *NO_INTS],
    "temperature": [-0.1, -1, *NO_NUMBERS],
    "top_k": [-1, *NO_INTS],
    "top_p": [0, 0.0, -0.5, 1.0001, 2, *NO_NUMBERS],
    "min_p": [-0.01, 1.01, *NO_NUMBERS],
    "repetition_penalty": [0, 0.009, -1, 101, *NO_NUMBERS],
    "presence_penalty": [-2.1, 3, *NO_NUMBERS],
    "frequency_penalty": [-3, 2.01, *NO_NUMBERS],
    "logit_bias": [
        *(None, [(1, 2)], {-1: 1}, {True: 1}, {"5": 1}, {1.0: 1}),
        *({5: value} for value in (None, True, "1", math.nan, math.inf, 1e31)),
    ],
    "seed": [-1, 2**64, True, 1.0, "1"],
    "stop": [None, 5, "", ("",), ("a", ""), (b"a",), {"a"}, ("\ud800",)],
    "stop_token_ids": [None, 5, "5", {5}, (-1,), (True,), (1.0,), ("5",)],
    "ignore_eos": [None, 0, 1, "yes"],
    "logprobs": [-1, True, 1.0, "1"],
    "n": [0, -1, *NO_INTS],
    "logits_processors": [None, max, (5,), (None,)],
    "json_schema": [3, [], True, "3", "[]", "true", "", "{", '{"a": NaN} x', {"a": math.nan}, {"a": {1}}],
    "regex": [3, "", b"a", ("a",), "\ud800"],
}


def test_every_field_has_good_and_bad_values() -> None:
    names = {one.name for one in dataclasses.fields(SamplingParams)}
    assert names == set(GOOD) == set(BAD)


@pytest.mark.parametrize("name", GOOD)
def test_values_in_range_are_taken(name: str) -> None:
    for value in GOOD[name]:
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_values_out_of_range_or_of_another_type_are_refused(name: str, value: object) -> None:
    with pytest.raises(GenerationError, match=rf"^sampling: expected .*{name}.*found") as raised:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_message_says_what_was_expected_and_found() -> None:
    for fields, said in [
        ({"top_p": 1.5}, "0 < top_p <= 1, found 1.5"),
        ({"logit_bias": {5: math.inf}}, "logit_bias[5]: -inf, or a number within ±1e+30, found inf"),
        ({"json_schema": {}, "regex": "a"}, "json_schema or regex, found both"),
        ({"json_schema": "[]"}, "json_schema: a JSON object, found '[]'"),
        ({"logits_processors": (max, 5)}, "logits_processors[1] to be callable, found 5"),
    ]:
        with pytest.raises(GenerationError) as raised:
            SamplingParams(**fields)  # type: ignore[arg-type]
        assert str(raised.value) == f"sampling: expected {said}"


@given(st.floats(), st.floats(), st.floats())
def test_no_float_gets_past_the_ranges(temperature: float, top_p: float, min_p: float) -> None:
    inside = 0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= min_p <= 1
    try:
        SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p)
    except GenerationError:
        assert not inside
    else:
        assert inside


def test_one_stop_string_means_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_what_was_given_may_change_afterwards() -> None:
    bias, schema, ids = {5: 1.0}, {"enum": ["a"]}, [7]
    params = SamplingParams(logit_bias=bias, json_schema=schema, stop_token_ids=ids)  # type: ignore[arg-type]
    before = copy.deepcopy(params)
    bias[5] = 9.0
    schema["enum"].append("b")
    ids.append(8)
    assert params == before
    assert params.json_schema == '{"enum": ["a"]}'


def test_parameters_are_plain_values() -> None:
    params = SamplingParams(logit_bias={5: 1.0}, json_schema={"type": "object"}, stop="x")  # type: ignore[arg-type]
    same = SamplingParams(logit_bias={5: 1.0}, json_schema={"type": "object"}, stop=("x",))
    assert params == same and hash(params) == hash(same)
    assert SamplingParams(**dataclasses.asdict(params)) == params
    assert dataclasses.replace(params, seed=3).seed == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 3  # type: ignore[misc]
    assert params.constrained and SamplingParams(regex="a").constrained and not SamplingParams().constrained
