"""Where pre_quant_scales go: wherever that is, the layer computes what it did before."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mistral_trt.export.quantization.placement import Placement, input_groups, place, place_stored
from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import KINDS, LM_HEAD_MODULE

HIDDEN, HEADS, INNER, VOCAB = 6, 4, 5, 7
LAYER = "model.layers.0."
Q, K, V, OUT, GATE, UP, DOWN = (LAYER + kind for kind in KINDS)
LINEARS = (Q, K, V, OUT, GATE, UP, DOWN)
INPUT_NORM = f"{LAYER}input_layernorm.weight"
OUTPUT_NORM = f"{LAYER}post_attention_layernorm.weight"
NORMS = {name: torch.linspace(0.5, 1.5, HIDDEN) for name in (INPUT_NORM, OUTPUT_NORM, "model.norm.weight")}
WIDTHS = {OUT: HEADS, DOWN: INNER}
ROWS = {Q: HEADS, K: 2, V: 2, OUT: HIDDEN, GATE: INNER, UP: INNER, DOWN: HIDDEN, LM_HEAD_MODULE: VOCAB}


def scales_of(
    *, seed: int = 0, lm_head: bool = False, smooth: bool = True, groups: int = 1
) -> dict[str, LinearScales]:
    """Scales of one layer: those that read one input share a pre_quant_scale."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for _, members in input_groups(1, lm_head=lm_head):
        scale = torch.rand(WIDTHS.get(members[0], HIDDEN), generator=random) * 4 + 0.25
        for name in members:
            amax = torch.rand(ROWS[name], groups, generator=random) + 0.5
            output = torch.rand(ROWS[name], generator=random) * 10
            error = torch.zeros(())
            found[name] = LinearScales(amax, output, error, None, scale if smooth else None)
    return found


def placed(
    scales: Mapping[str, LinearScales],
    kept: Collection[str] = (),
    *,
    norms: Mapping[str, Tensor] = NORMS,
    float16_scales: bool = False,
) -> Placement:
    return place(scales, kept, norms, layers=1, float16_scales=float16_scales)


# ---------------------------------------------------------------- the law


def forward(
    weights: Mapping[str, Tensor], norms: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> Tensor:
    """A layer's linears, one after the other; the two norms and o_proj read given numbers.

    inputs: what a linear's own input is multiplied by, where it is.  Returns all outputs, flat.
    """
    random = torch.Generator().manual_seed(99)
    x, attended = torch.randn(3, HIDDEN, generator=random), torch.randn(3, HEADS, generator=random)

    def linear(name: str, value: Tensor) -> Tensor:
        return (value * inputs.get(name, torch.ones(()))) @ weights[name].T

    first, second = x * norms[INPUT_NORM], x * norms[OUTPUT_NORM]
    up = linear(UP, second)
    inner = torch.nn.functional.silu(linear(GATE, second)) * up
    outputs = [*(linear(name, first) for name in (Q, K, V)), linear(OUT, attended), linear(DOWN, inner)]
    return torch.cat([out.flatten() for out in outputs])


def placed_forward(
    weights: Mapping[str, Tensor], scales: Mapping[str, LinearScales], placement: Placement
) -> Tensor:
    """The layer as the graph holds it, without rounding to codes."""
    smoothed = dict(weights)
    for name in placement.quantized:
        scale = scales[name].pre_quant_scale
        assert scale is not None
        smoothed[name] = weights[name] / scale
        if name in placement.output_scales:
            smoothed[name] = smoothed[name] * placement.output_scales[name][:, None]
    inputs: dict[str, Tensor] = {}
    for group in placement.groups:
        scale = scales[group[0]].pre_quant_scale
        if group[0] in placement.multiplied and scale is not None:
            inputs |= dict.fromkeys(group, scale)
    return forward(smoothed, {**NORMS, **placement.norms}, inputs)


@given(st.sets(st.sampled_from(LINEARS)), st.integers(0, 2**32 - 1), st.booleans())
def test_whatever_is_kept_the_layer_computes_what_it_did(kept: set[str], seed: int, float16: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(ROWS[name], WIDTHS.get(name, HIDDEN), generator=random) for name in LINEARS}
    scales = scales_of(seed=seed)
    placement = placed(scales, kept, float16_scales=float16)
    found, expected = placed_forward(weights, scales, placement), forward(weights, NORMS, {})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@given(st.sets(st.sampled_from([*LINEARS, LM_HEAD_MODULE])))
def test_every_linear_is_quantized_or_kept_and_every_scale_goes_somewhere(kept: set[str]) -> None:
    placement = placed(scales_of(lm_head=True), kept)
    assert placement.quantized == [name for name in (*LINEARS, LM_HEAD_MODULE) if name not in kept]
    assert sum(placement.to_json().values()) == len(placement.groups)
    assert placement.multiplied <= {group[0] for group in placement.groups}


# ---------------------------------------------------------------- norms


def test_a_whole_group_folds_into_its_norm() -> None:
    scales = scales_of(lm_head=True)
    placement = placed(scales)
    assert set(placement.norms) == set(NORMS)
    for norm, first in ((INPUT_NORM, Q), (OUTPUT_NORM, GATE), ("model.norm.weight", LM_HEAD_MODULE)):
        scale = scales[first].pre_quant_scale
        assert scale is not None
        assert torch.equal(placement.norms[norm], NORMS[norm] * scale)
    assert placement.multiplied == {OUT}
    assert placement.to_json() == {"norm": 3, "up_proj": 1, "mul": 1}


@pytest.mark.parametrize("kept", [kept for n in (1, 2) for kept in combinations((Q, K, V), n)])
def test_a_group_of_which_one_is_kept_is_multiplied(kept: tuple[str, ...]) -> None:
    placement = placed(scales_of(), kept)
    quantized = tuple(name for name in (Q, K, V) if name not in kept)
    assert INPUT_NORM not in placement.norms
    assert quantized in placement.groups
    assert quantized[0] in placement.multiplied
    assert OUTPUT_NORM in placement.norms


@pytest.mark.parametrize(("kept", "left"), [(GATE, UP), (UP, GATE)])
def test_half_of_the_mlp_is_multiplied(kept: str, left: str) -> None:
    placement = placed(scales_of(), {kept})
    assert OUTPUT_NORM not in placement.norms
    assert (left,) in placement.groups and left in placement.multiplied


def test_a_group_that_is_kept_whole_needs_nothing() -> None:
    placement = placed(scales_of(), {Q, K, V})
    assert INPUT_NORM not in placement.norms
    assert not placement.multiplied & {Q, K, V}
    assert placement.groups[0] == (OUT,)


def with_scale(name: str, value: float, place: int = 0) -> dict[str, LinearScales]:
    """Scales of which one number of one group's pre_quant_scale is this."""
    scales = scales_of()
    changed = scales[name].pre_quant_scale
    assert changed is not None
    changed = changed.clone()
    changed[place] = value
    for _, members in input_groups(1):
        if name in members:
            scales |= {member: replace(scales[member], pre_quant_scale=changed) for member in members}
    return scales


@pytest.mark.parametrize(
    ("value", "folds"),
    [
        (65504.0, True),
        (65536.0, False),
        (2.0**-14, True),
        (0.99 * 2.0**-14, False),
        (1e-6, False),
        (0.0, True),
        (float("inf"), False),
    ],
)
def test_a_norm_that_float16_cannot_say_stays_a_mul(value: float, folds: bool) -> None:
    norms = {**NORMS, INPUT_NORM: torch.ones(HIDDEN)}
    placement = placed(with_scale(Q, value), norms=norms)
    assert (INPUT_NORM in placement.norms) == folds
    assert (Q in placement.multiplied) != folds
    assert OUTPUT_NORM in placement.norms, "the other group is not concerned"


def test_it_is_the_product_that_must_be_sayable() -> None:
    norms = {**NORMS, INPUT_NORM: torch.full((HIDDEN,), 1e-3)}
    assert INPUT_NORM in placed(with_scale(Q, 1e6), norms=norms).norms
    assert Q in placed(with_scale(Q, 1e-2), norms=norms).multiplied


# ---------------------------------------------------------------- o_proj and down_proj


@given(st.sets(st.sampled_from([name for name in LINEARS if name != OUT])))
def test_o_proj_is_always_multiplied(kept: set[str]) -> None:
    """v_proj cannot absorb it inside a group of query heads, and the ring would hold other numbers."""
    placement = placed(scales_of(), kept)
    assert OUT in placement.multiplied
    assert not set(placement.output_scales) - {UP}


def test_down_projs_scale_goes_into_what_up_proj_gives() -> None:
    scales = scales_of()
    placement = placed(scales)
    assert list(placement.output_scales) == [UP]
    assert placement.output_scales[UP] is scales[DOWN].pre_quant_scale
    assert DOWN not in placement.multiplied


@pytest.mark.parametrize("kept", [{UP}, {UP, GATE}])
def test_down_proj_is_multiplied_where_up_proj_is_kept(kept: set[str]) -> None:
    placement = placed(scales_of(), kept)
    assert not placement.output_scales
    assert DOWN in placement.multiplied


def test_a_kept_gate_does_not_concern_down_proj() -> None:
    assert UP in placed(scales_of(), {GATE}).output_scales


@pytest.mark.parametrize(("largest", "folds"), [(8188.0, True), (8189.0, False), (1e5, False)])
def test_an_output_that_may_overflow_is_not_scaled(largest: float, folds: bool) -> None:
    """65504 / 8: room for eight times the largest output of the calibration text."""
    scales = with_scale(DOWN, 2.0)
    output = torch.ones(INNER)
    output[0] = largest / 2
    scales[UP] = replace(scales[UP], output_amax=output)
    placement = placed(scales)
    assert (UP in placement.output_scales) == folds
    assert (DOWN in placement.multiplied) != folds


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("amax", "float16", "folds"),
    [
        (7 * 2.0**-14, True, True),
        (6.9 * 2.0**-14, True, False),
        (6.9 * 2.0**-14, False, True),
        (0.0, True, True),
    ],
)
def test_a_scale_that_would_be_subnormal_is_not_scaled(
    amax: float, float16: bool, folds: bool, groups: int
) -> None:
    """In float32, as int8 has its scales, there is no such limit."""
    scales = with_scale(DOWN, 1.0)
    weights = torch.ones(INNER, groups)
    weights[0, -1] = amax
    scales[UP] = replace(scales[UP], weight_amax=weights)
    placement = placed(scales, float16_scales=float16)
    assert (UP in placement.output_scales) == folds
    assert (DOWN in placement.multiplied) != folds


# ---------------------------------------------------------------- without pre_quant_scales


@given(st.sets(st.sampled_from(LINEARS)))
def test_without_pre_quant_scales_nothing_is_multiplied(kept: set[str]) -> None:
    placement = placed(scales_of(smooth=False), kept)
    assert placement.to_json() == {"norm": 0, "up_proj": 0, "mul": 0}
    assert placement.quantized == [name for name in LINEARS if name not in kept]


@given(st.sets(st.sampled_from([*LINEARS, LM_HEAD_MODULE])))
def test_a_stored_checkpoint_is_placed_without_scales(kept: set[str]) -> None:
    names = [*LINEARS, LM_HEAD_MODULE]
    placement = place_stored(names, kept, layers=1)
    assert placement.quantized == [name for name in names if name not in kept]
    assert placement.to_json() == {"norm": 0, "up_proj": 0, "mul": 0}
    assert placement.groups == placed(scales_of(lm_head=True, smooth=False), kept).groups


# ---------------------------------------------------------------- groups


def test_groups_are_in_the_order_of_the_forward_pass() -> None:
    groups = input_groups(2, lm_head=True)
    assert [name for _, members in groups for name in members] == [
        *LINEARS,
        *(name.replace(".0.", ".1.") for name in LINEARS),
        LM_HEAD_MODULE,
    ]
    assert [norm for norm, _ in groups[4:8]] == [
        "model.layers.1.input_layernorm.weight",
        None,
        "model.layers.1.post_attention_layernorm.weight",
        None,
    ]
    assert input_groups(2) == groups[:-1]
