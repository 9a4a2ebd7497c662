"""What is gated of layers, own precision and weights, and which layer is named as the first wrong one."""

from dataclasses import replace
from math import inf, isnan, nan

import numpy as np
import pytest

from mistral_trt.contract import Ring
from mistral_trt.validate.findings import ActivationRange, LayerErrors, LayerFindings, WeightFindings
from mistral_trt.validate.verdict.gates import Measured, judge, read_gates
from mistral_trt.validate.verdict.parts import Offender, first_offender, measure_parts, place_of
from tests.reports import errors, own_precision, report

RING = Ring(8, 4)
POSITIONS = np.arange(8, 20)


def findings(*updates: float) -> LayerFindings:
    """A layer for each update's error, the same at 20 positions; a thousandth of it everywhere else."""
    layers = [
        LayerErrors(
            i, np.full(20, e), np.full(20, e), POSITIONS, np.full(12, e / 1000), np.full(12, e / 1000)
        )
        for i, e in enumerate(updates)
    ]
    ranges = (ActivationRange("residual", 0, 7.0, 0.0), ActivationRange("logits", None, 30.0, 0.0))
    return LayerFindings("", tuple(layers), ranges)


def measured(layers: LayerFindings) -> dict[str, Measured | None]:
    return measure_parts(layers=layers, own=None, weights=None, ring=RING)


def test_parts_that_were_not_run_measure_nothing() -> None:
    found = measure_parts(layers=None, own=None, weights=None, ring=RING)
    assert set(found.values()) == {None}
    gated = {gate.metric for precision in ("fp16", "int8") for gate in read_gates(precision)}
    assert set(found) <= gated


def test_the_worst_update_is_the_mean_of_its_layer_with_its_worst_position() -> None:
    layers = findings(1e-3, 2e-3, 1e-3)
    layers.layers[1].update[13] = 0.022  # mean 0.003
    layers.layers[0].update[4] = 0.023  # a single position of a better layer
    found = measured(layers)["layer_update_error_max"]
    assert found is not None
    assert (found.where, found.positions) == ("layer 1 (position 13)", 20)
    assert found.value == pytest.approx(3e-3)


@pytest.mark.parametrize(("what", "index"), [("keys", 0), ("values", 2)])
def test_a_wrong_cache_is_placed_by_layer_slot_and_position(what: str, index: int) -> None:
    """Slot 1 of a ring of 12 holds position 13."""
    layers = findings(1e-3, 1e-3, 1e-3)
    getattr(layers.layers[index], what)[5] = 1.2
    found = measured(layers)["cache_error_max"]
    assert found is not None
    assert found.where == f"layer {index} {what} (slot 1, position 13)"
    assert found.value == pytest.approx(0.1, rel=0.01)
    gates = {
        gate.name: gate
        for gate in judge([g for g in read_gates("fp16") if "cache" in g.metric], {"cache_error_max": found})
    }
    assert not gates["cache_error_max"].passed


def test_the_largest_activation_is_placed_and_nan_is_the_largest() -> None:
    layers = findings(1e-3)
    assert measured(layers)["activation_max"] == Measured(30.0, "logits", 20)
    for largest in (inf, nan):
        broken = replace(layers, ranges=(*layers.ranges, ActivationRange("mlp.down_proj", 3, largest, 0.0)))
        found = measured(broken)["activation_max"]
        assert found is not None
        assert found.where == "layer 3 mlp.down_proj"
        (gate,) = [gate for gate in read_gates("fp16") if gate.metric == "activation_max"]
        assert not gate.holds(found.value)


def test_half_of_float16_is_the_most_that_passes() -> None:
    (gate,) = [gate for gate in read_gates("fp16") if gate.metric == "activation_max"]
    assert gate.holds(32752.0)
    assert not gate.holds(32768.0)


def test_nan_hides_behind_no_larger_error() -> None:
    found = measured(findings(1e-3, nan, 9.0))
    assert found["layer_update_error_max"] is not None
    assert isnan(found["layer_update_error_max"].value)
    assert found["layer_update_error_max"].where == "layer 1 (position 0)"


def test_nothing_that_ran_but_gave_nothing_passes() -> None:
    empty = LayerFindings("", (), ())
    gates = [
        gate for gate in read_gates("fp16") if gate.metric in ("layer_update_error_max", "activation_max")
    ]
    assert not any(result.passed for result in judge(gates, measured(empty)))


def test_wrong_weights_are_counted_and_the_first_is_named() -> None:
    def weights(*wrong: str) -> Measured | None:
        found = WeightFindings(9, dict.fromkeys(wrong, "differs"), None)
        return measure_parts(layers=None, own=None, weights=found, ring=RING)["weights_wrong"]

    assert weights() == Measured(0, "", 9)
    assert weights("b", "a") == Measured(2, "a and 1 more", 9)
    assert weights("b") == Measured(1, "b", 9)


def test_the_own_precision_is_measured_on_the_artifact_in_every_scenario() -> None:
    """The worst scenario counts: here the second, in which the artifact is three times as far off."""
    first, second, *_ = report().scenarios
    second = replace(second, errors=errors(60, 3e-5))
    own = replace(own_precision([first, second], 0.25), reference=errors(60, 9.0))
    found = measure_parts(layers=None, own=own, weights=None, ring=RING)
    read = second.errors
    expected = {"own_kl_mean": 0.25 * read.kl, "own_relative_error_mean": 0.25 * read.relative}
    for name, values in (expected | {"own_top1_agreement": read.agree}).items():
        value = found[name]
        assert value is not None
        assert (value.positions, value.where) == (60, "decode" if name in expected else "prefill")
        assert value.value == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ("updates", "limit", "layer", "above"),
    [
        ((1.0, 1.0, 1.0), 2.0, None, False),
        ((1.0, 4.9, 1.0), None, None, False),
        ((1.0, 1.0, 9.0, 9.0), 2.0, 2, True),
        ((1.0, 1.0, 1.0, 9.0, 1.0), None, 3, False),
        ((1.0, 1.0, 1.0, 9.0, 1.0), 20.0, 3, False),
        ((1.0, 6.0, 1.0, 9.0, 1.0), 8.0, 3, True),
        ((3.0, 3.0), 2.0, 0, True),
        ((1.0, nan, 1.0), 2.0, 1, True),
        ((1.0, inf, 1.0), None, 1, False),
        ((nan, nan), None, 0, False),
        ((), 2.0, None, False),
    ],
)  # fmt: skip
def test_the_first_offender(
    updates: tuple[float, ...], limit: float | None, layer: int | None, above: bool
) -> None:
    """Above the gate, or far above the median where none is; a layer above its gate goes before a jump."""
    found = first_offender(findings(*updates), limit)
    assert (None if found is None else found.layer) == layer
    assert (found is not None and found.limit is not None) == above


def test_an_offender_says_which_kind_it_is() -> None:
    assert Offender(7, 1.0, 0.1, 0.5).words == "first wrong layer: 7"
    assert Offender(7, 1.0, 0.1, None).words == "first layer to stand out: 7"


def test_a_slot_is_named_with_its_position() -> None:
    assert place_of(13, RING) == "slot 1, position 13"
