"""The teacher-forced schedule: what it covers, and that it keeps the rules it is to test."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.runtime.engine import open_cache
from mistral_trt.validate.scenarios.probes import probes, wraps
from mistral_trt.validate.scenarios.scenario import Call, Name, Scenario, Together, play, scenarios
from tests.conftest import Folder
from tests.test_probes import CONFIG, contract

ONE_ROW: tuple[Name, ...] = ("prefill", "decode", "padded", "stepwise")


def calls(scenario: Scenario) -> list[Call]:
    return [call for call in scenario.calls if isinstance(call, Call)]


def planned(name: Name, shape: GraphContract, length: int, seed: int = 0) -> Scenario:
    (found,) = scenarios(shape, length, names=[name], seed=seed)
    return found


def batched(window: int, chunk: int, rows: int) -> GraphContract:
    return GraphContract(CONFIG, "fp32", Ring(window, chunk), rows, None)


@given(
    window=st.integers(1, 40), chunk=st.integers(1, 20), length=st.integers(2, 200), seed=st.integers(0, 9)
)
def test_every_scenario_covers_every_position_once_in_order(
    window: int, chunk: int, length: int, seed: int
) -> None:
    for scenario in scenarios(contract(window, chunk), length, names=ONE_ROW, seed=seed):
        fed = [position for call in calls(scenario) for position in range(call.start, call.stop)]
        assert fed == list(range(length))
        assert scenario.compared == length


@given(
    window=st.integers(1, 40), chunk=st.integers(1, 20), length=st.integers(2, 200), seed=st.integers(0, 9)
)
def test_no_planned_call_crosses_a_chunk_edge_by_its_padding(
    window: int, chunk: int, length: int, seed: int
) -> None:
    ring = Ring(window, chunk)
    _, decode, padded, stepwise = scenarios(contract(window, chunk), length, names=ONE_ROW, seed=seed)
    for call in calls(padded):
        assert call.stop - call.start <= call.pad_to <= ring.room_in_chunk(call.start)
    assert all(call.stop - call.start == 1 for call in calls(stepwise))
    assert all(call.stop - call.start == 1 for call in calls(decode) if call.kind == "decode")


def test_decode_surrounds_every_probe_and_turn_with_prefill_between() -> None:
    shape = contract(512, 256)
    decode = planned("decode", shape, 2312)
    decoded = {call.start for call in calls(decode) if call.kind == "decode"}
    for position in [*(probe.position for probe in probes(shape, 2312)), *wraps(shape, 2312)]:
        assert {position - 8, position, position + 7} <= decoded
    kinds = [call.kind for call in calls(decode)]
    switches = [a != b for a, b in itertools.pairwise(kinds)]
    assert sum(switches) >= 10
    assert len(decoded) < 200, "on a real model a decoded token costs as much as a chunk of four"
    starts = [call.start % 256 for call in calls(decode) if call.kind == "prefill"]
    assert any(starts), "prefill must also begin off the chunk edges"


def test_padding_is_really_there() -> None:
    padded = calls(planned("padded", contract(8, 4), 60))
    assert any(call.pad_to > call.stop - call.start for call in padded)
    assert len({call.start % 4 for call in padded}) > 1


@given(
    window=st.integers(1, 40), chunk=st.integers(1, 20), length=st.integers(2, 200), rows=st.integers(1, 6)
)
def test_rows_at_different_positions_decode_in_the_same_calls(
    window: int, chunk: int, length: int, rows: int
) -> None:
    scenario = planned("rows", batched(window, chunk, rows), length)
    together = [call for call in scenario.calls if isinstance(call, Together)]
    assert scenario.rows == rows
    assert all(len(call.positions) == rows for call in together)
    next_of = {call.row: call.stop for call in calls(scenario) if call.kind == "context"}
    for call in together:
        assert any(position is not None for position in call.positions)
        for row, position in enumerate(call.positions):
            if position is not None:
                assert position == next_of.get(row, 0), "each row goes on where it was"
                next_of[row] = position + 1
    assert max(next_of.values()) <= length


def test_some_rows_idle_and_all_decode_at_once_past_the_ring() -> None:
    scenario = planned("rows", batched(8, 4, 4), 100)
    together = [call.positions for call in scenario.calls if isinstance(call, Together)]
    assert any(None in positions for positions in together)
    assert any(None not in positions and max(filter(None, positions)) > 4 * 12 for positions in together)
    last = calls(scenario)[-1]
    assert (last.row, last.kind) == (0, "decode")
    assert any(call.start == 0 and call.kind == "prefill" for call in calls(scenario)), "a used row, anew"


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_row_with_a_context_idles_in_a_step_that_covers_it(rows: int) -> None:
    scenario = planned("rows", batched(8, 4, rows), 100)
    first = next(call for call in scenario.calls if isinstance(call, Together))
    assert first.positions[0] is None and first.positions[-1] is not None
    assert any(isinstance(call, Call) and call.kind == "context" and call.row == 0 for call in scenario.calls)


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_give_the_logits_of_one_row(rows: int, onnx_folder: Folder) -> None:
    cache = open_cache(onnx_folder(max_batch_size=rows), threads=1)
    tokens = np.random.default_rng(0).integers(0, cache.contract.config.vocab_size, 60).tolist()
    alone, together = scenarios(cache.contract, 60, names=["prefill", "rows"], seed=0)
    expected = np.concatenate([logits for _, logits in play(cache, alone, tokens=tokens)])
    found = list(play(cache, together, tokens=tokens))
    assert sum(len(positions) for positions, _ in found) == together.compared
    for positions, logits in found:
        assert np.abs(logits - expected[positions]).max() < 1e-4
    assert cache.free_rows == cache.capacity_rows


def test_decoded_stretches_are_joined() -> None:
    one = (Call(0, 1, "decode"), Call(1, 2, "decode"), Call(2, 3, "prefill"), Call(3, 4, "decode"))
    assert Scenario("decode", "", one).decoded() == [(0, 2), (3, 4)]
    several = (Call(0, 7, "context", row=1), Together((0, 7)), Together((None, 8)))
    assert Scenario("rows", "", several, rows=2).decoded() == [(0, 1), (7, 9)]


@pytest.mark.parametrize(("rows", "used"), [(1, {0}), (4, {0, 1, 2, 3}), (9, {0, 3, 5, 8})])
def test_the_last_row_of_an_artifact_is_used(rows: int, used: set[int]) -> None:
    scenario = planned("rows", batched(8, 4, rows), 100)
    together = [call for call in scenario.calls if isinstance(call, Together)]
    assert {row for call in together for row, position in enumerate(call.positions) if position} == used
    contexts = {call.row for call in calls(scenario) if call.kind == "context"}
    assert contexts == (used - {rows - 1} or used), "the last one begins anew"
