"""How much is validated at each budget."""

import pytest

from mistral_trt.errors import ValidationError
from mistral_trt.validate.budget import DEFAULT, FULL, QUICK, check_length
from tests.test_probes import contract

BIG, SMALL = 135_000_000, 10_000


def test_the_default_length_reaches_past_four_turns() -> None:
    assert DEFAULT.length(contract(512, 256)) == 4 * 768 + 264
    assert DEFAULT.length(contract(4096, 256)) == 4 * 4352 + 264
    assert DEFAULT.length(contract(8, 4)) == 2048 + 12
    assert DEFAULT.length(contract(512, 256, max_context=700)) == 700
    assert DEFAULT.length(contract(300, 16, max_context=300)) == 300


def test_quick_passes_one_turn_and_full_eight() -> None:
    assert QUICK.length(contract(512, 256)) == 768 + 264
    assert FULL.length(contract(512, 256)) == 8 * 768 + 264


@pytest.mark.parametrize("length", [-1, 0, 1, 101])
def test_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ValidationError, match=f"from 2 to 100 for this artifact, found {length}"):
        check_length(length, contract(8, 4, max_context=100))
    assert check_length(100, contract(8, 4, max_context=100)) == 100


def test_every_step_is_decoded_where_that_is_cheap_or_asked_for() -> None:
    usual = ("prefill", "decode", "padded", "rows")
    assert DEFAULT.scenarios(length=2060, weights=SMALL) == (*usual, "stepwise")
    assert DEFAULT.scenarios(length=2060, weights=BIG) == usual
    assert FULL.scenarios(length=2060, weights=BIG)[-1] == "stepwise"
    assert FULL.scenarios(length=2060, weights=SMALL).count("stepwise") == 1
