"""What quantization costs, measured; and which linears stay float16 so that it costs no more than asked."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax
from transformers import MistralForCausalLM

from mistral_trt.contract import QUANTIZED
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.quantization import quality as module
from mistral_trt.export.quantization.calibration import calibrate
from mistral_trt.export.quantization.layers import LayerStream
from mistral_trt.export.quantization.quality import (
    FakeQuantLinear,
    Point,
    by_error,
    by_harm,
    choose_kept,
    dequantized,
    measure,
    rounded_input,
    share,
)
from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import Scheme, linear_names, scheme_for
from mistral_trt.export.quantization.settings import METRICS, Budget
from mistral_trt.export.quantization.store import CalibrationStore
from tests.conftest import Folder
from tests.models import TINY

mtq = pytest.importorskip("modelopt.torch.quantization")  # quietly: importing it warns of torch's plans

W = 8
NAMES = linear_names(TINY, lm_head=True)
FIRST, SECOND = NAMES[:7], NAMES[7:14]
ANYTHING = Budget("kl", 1e9)


@dataclass(frozen=True)
class Calibrated:
    """A tiny model with its head, and its scales."""

    folder: Path
    stream: LayerStream
    ids: Tensor
    scheme: Scheme
    scales: Mapping[str, LinearScales]

    def measure(self, *choices: Collection[str]) -> list[Point]:
        return measure(self.stream, self.ids, self.scales, self.scheme, choices)

    def choose(self, budget: Budget, always: Sequence[str] = ()) -> tuple[list[str], list[Point]]:
        return choose_kept(self.stream, self.ids, self.scales, self.scheme, always=always, budget=budget)


@pytest.fixture(scope="module", params=QUANTIZED)
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def calibrated(
    tiny_checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory, precision: str
) -> Calibrated:
    return calibrate_tiny(tiny_checkpoint, tmp_path_factory, precision)


@pytest.fixture(scope="module")
def int4(tiny_checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return calibrate_tiny(tiny_checkpoint, tmp_path_factory, "int4")


def calibrate_tiny(checkpoint: Folder, paths: pytest.TempPathFactory, precision: str) -> Calibrated:
    folder = checkpoint()
    stream = LayerStream(Checkpoint.open(folder), sliding_window=W)
    ids = torch.randint(0, TINY.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    scheme = scheme_for(precision, TINY)
    store = CalibrationStore(paths.mktemp("store"))
    return Calibrated(folder, stream, ids, scheme, calibrate(stream, ids, scheme, store, lm_head=True))


# ---------------------------------------------------------------- one linear


def test_a_fake_quantized_linear_is_modelopts(precision: str) -> None:
    scheme = scheme_for(precision, TINY)
    torch.manual_seed(3)
    holder = nn.ModuleDict({"x": nn.Linear(64, 48, bias=False)})
    linear: Any = holder["x"]
    weight = linear.weight.detach().clone()
    inputs = torch.randn(5, 12, 64) * torch.rand(64).mul(3).exp()
    mtq.quantize(holder, scheme.modelopt_config(), lambda model: model["x"](inputs))
    linear = holder["x"]
    amax, reads = linear.weight_quantizer.amax, linear.input_quantizer
    scales = LinearScales(
        amax.reshape(1 if amax.numel() == 1 else 48, -1),
        torch.zeros(48),
        torch.zeros(()),
        reads.amax if scheme.activations else None,
        reads.pre_quant_scale,
    )
    fake = FakeQuantLinear(weight, scales, scheme)
    beyond = inputs * 1.3  # more than calibration saw, so that codes are clamped
    with torch.no_grad():
        for x in (inputs, beyond):
            expected, scale = linear(x), linear(x).abs().max()
            torch.testing.assert_close(fake(x) / scale, expected / scale, rtol=0, atol=1e-6)
            assert (nn.functional.linear(x, weight) - expected).abs().max() > 1e-4 * scale, "it does round"
            if scheme.activations:
                smoothed = x if reads.pre_quant_scale is None else x * reads.pre_quant_scale
                rounded = rounded_input(smoothed, scales, scheme)
                torch.testing.assert_close(rounded, reads(x), rtol=1e-6, atol=0)
    fake.quantized = False
    assert torch.equal(fake(inputs), nn.functional.linear(inputs, weight))


# ---------------------------------------------------------------- measuring


def test_a_model_of_which_all_is_kept_costs_nothing(calibrated: Calibrated) -> None:
    (point,) = calibrated.measure(NAMES)
    assert (point.perplexity, point.kl) == (1.0, 0.0)
    assert point.quantized_share == 0
    assert point.kept == tuple(sorted(NAMES))
    (point,) = calibrated.measure([])
    assert point.kl > 0 and point.perplexity != 1.0 and point.quantized_share == 1


@pytest.mark.parametrize(
    "kept",
    [(NAMES[1], NAMES[12]), SECOND, [*FIRST, NAMES[14]]],
    ids=["some", "second layer", "first layer, head"],
)
def test_the_cost_is_that_of_the_whole_model_with_the_others_rounded(
    calibrated: Calibrated, kept: Sequence[str]
) -> None:
    """Against transformers' own model, all positions at once."""
    model = MistralForCausalLM.from_pretrained(calibrated.folder, dtype=torch.float32)
    with torch.no_grad():
        exact = model(calibrated.ids).logits[:, :-1].double()
        for name in NAMES:
            if name not in kept:
                parent, _, child = name.rpartition(".")
                old: Any = model.get_submodule(name)
                fake = FakeQuantLinear(old.weight.data, calibrated.scales[name], calibrated.scheme)
                setattr(model.get_submodule(parent), child, fake)
        found = model(calibrated.ids).logits[:, :-1].double()
    targets = calibrated.ids[:, 1:]
    losses = [cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in (exact, found)]
    divergence = softmax(exact, -1) * (log_softmax(exact, -1) - log_softmax(found, -1))
    # With a choice that quantizes all, and one that quantizes nothing, beside it
    _, point, _ = calibrated.measure([], kept, NAMES)
    assert point.perplexity == pytest.approx(float((losses[1] - losses[0]).exp()), rel=1e-5)
    assert point.kl == pytest.approx(float(divergence.sum(-1).mean()), rel=1e-3, abs=1e-7)


def test_choices_do_not_touch_each_other(int4: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    choices: list[list[str]] = [[], NAMES, NAMES[:3], NAMES[3:]]
    together = int4.measure(*choices)
    assert together == [int4.measure(choice)[0] for choice in choices]
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    for one, other in zip(int4.measure(*choices), together, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-7)


@given(st.sets(st.sampled_from(NAMES)))
def test_the_quantized_share_is_of_the_linears_weights(kept: set[str]) -> None:
    class Sized:
        def __init__(self, elements: int) -> None:
            self.elements = elements

    sizes = {name: 10 + i for i, name in enumerate(NAMES)}
    weights: Any = {f"{name}.weight": Sized(size) for name, size in sizes.items()}
    expected = sum(size for name, size in sizes.items() if name not in kept) / sum(sizes.values())
    assert share(weights, NAMES, kept) == pytest.approx(expected)


def test_a_point_says_what_it_is() -> None:
    point = Point(("a", "b"), 0.123456, 1.0123456, 0.00012345678)
    assert point.to_json() == {
        "kept": 2,
        "quantized_share": 0.1235,
        "perplexity_ratio": 1.01235,
        "kl": 0.0001235,
    }
    assert point.holds(Budget("perplexity", 1.0123456)) and not point.holds(Budget("perplexity", 1.0123))
    assert point.holds(Budget("kl", 0.0002)) and not point.holds(Budget("kl", 0.0001))


def test_a_dequantized_weight_is_near_the_smoothed_one(int4: Calibrated) -> None:
    name = NAMES[0]
    weight: Any = int4.stream.layer(0).get_submodule("self_attn.q_proj").weight
    scales = int4.scales[name]
    assert scales.pre_quant_scale is not None
    found = dequantized(weight.data, scales, int4.scheme) * scales.pre_quant_scale
    assert (found - weight).square().mean().sqrt() < 0.15 * weight.square().mean().sqrt()


# ---------------------------------------------------------------- choosing


def with_errors(errors: Mapping[str, float]) -> dict[str, LinearScales]:
    none = torch.zeros(1, 1)
    return {name: LinearScales(none, none, torch.tensor(error)) for name, error in errors.items()}


def test_the_worst_come_first_and_equals_by_name() -> None:
    assert by_error(with_errors({"a": 0.1, "d": 0.3, "c": 0.3, "b": 0.2})) == ["c", "d", "b", "a"]


@dataclass
class Costs:
    """Stands for `measure`: a choice costs what is left to quantize, and is remembered.

    The perplexity is 1 and a hundredth of that.
    """

    costs: Mapping[str, float]
    asked: list[list[set[str]]]

    def __call__(
        self, stream: Any, ids: Tensor, scales: Any, scheme: Any, choices: Sequence[Collection[str]]
    ) -> list[Point]:
        self.asked.append([set(kept) for kept in choices])
        left = [sum(cost for name, cost in self.costs.items() if name not in kept) for kept in choices]
        return [
            Point(tuple(sorted(kept)), 1.0, 1 + cost / 100, cost)
            for kept, cost in zip(choices, left, strict=True)
        ]


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    limit: float,
    always: Sequence[str] = (),
    metric: str = "kl",
) -> tuple[list[str], list[Point], list[list[set[str]]]]:
    """Choose among linears of which each costs 1; errors rank them l00, l01, …  Also what was measured."""
    names = [f"l{i:02d}" for i in range(count)]
    costs = Costs(dict.fromkeys(names, 1.0), [])
    monkeypatch.setattr(module, "measure", costs)
    scales = with_errors({name: 1 - i / 1000 for i, name in enumerate(names)})
    nothing: Any = None
    stream: Any = SimpleNamespace(sliding_window=4)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    budget = Budget(metric, limit if metric == "kl" else 1 + limit / 100)
    kept, points = choose_kept(stream, ids, scales, nothing, always=always, budget=budget)
    ranking, *passes = costs.asked
    assert all(len(kept) == count - 1 for kept in ranking), "ranked by what each does alone"
    return kept, points, passes


@pytest.mark.parametrize("count", [1, 2, 7, 10, 14])
def test_the_fewest_are_kept_that_meet_the_budget(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for limit in range(count + 1):
        kept, points, passes = chosen(monkeypatch, count, limit)
        assert kept == [f"l{i:02d}" for i in range(count - limit)], (count, limit)
        assert len(passes) <= 2
        sizes = [len(point.kept) for point in points]
        assert sizes == sorted(set(sizes)), "each choice is measured once"


def test_two_passes_come_near_in_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """224 linears as a 7B has: at most a ninth of a gap more than necessary is kept."""
    for limit in (223, 200, 150, 100, 20, 3):
        kept, points, passes = chosen(monkeypatch, 224, limit)
        assert 224 - limit <= len(kept) <= 224 - limit + 11
        assert len(passes) <= 2 and all(len(choices) <= 9 for choices in passes)
        good = [len(point.kept) for point in points if point.holds(Budget("kl", limit))]
        assert len(kept) == min(good, default=224)


def test_what_is_always_kept_is_kept_and_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _, passes = chosen(monkeypatch, 8, 5, always=["l06", "l01"])
    assert kept == ["l06", "l01", "l00"]
    assert all({"l06", "l01"} <= choice for choices in passes for choice in choices)
    kept, _, passes = chosen(monkeypatch, 3, 0, always=["l00", "l01", "l02"])
    assert (kept, passes) == (["l00", "l01", "l02"], [])


def test_linears_are_ranked_by_the_harm_that_each_does_alone(calibrated: Calibrated) -> None:
    harm = {name: calibrated.measure(set(NAMES) - {name})[0].kl for name in NAMES}
    always = NAMES[2:4]
    found = by_harm(calibrated.stream, calibrated.ids, calibrated.scales, calibrated.scheme, always=always)
    assert found == sorted(set(NAMES) - set(always), key=lambda name: -harm[name])


def test_only_in_the_worst_layers_linears_are_measured_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the others harm is shared out by the square of the error."""
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("a", "b")]
    costs = Costs(dict(zip(names, (1.0, 2.0, 9.0, 30.0, 4.0, 6.0), strict=True)), [])
    monkeypatch.setattr(module, "measure", costs)
    monkeypatch.setattr(module, "RANKED_LAYERS", 1)
    scales = with_errors(dict(zip(names, (0.1, 0.1, 0.1, 0.1, 0.3, 0.1), strict=True)))
    nothing: Any = None
    found = by_harm(nothing, torch.zeros(1, 8), scales, nothing, always=[names[0]])
    # 30 and 9 measured alone; 4 + 6 shared out as 9 to 1; layer 0 has one linear left
    assert found == [names[3], names[4], names[2], names[1], names[5]]
    assert costs.asked[1] == [set(names) - {name} for name in names[2:4]]


@pytest.mark.parametrize("metric", METRICS)
def test_a_budget_of_nothing_keeps_everything(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    kept, _, _ = chosen(monkeypatch, 20, 0, metric=metric)
    assert kept == [f"l{i:02d}" for i in range(20)]


def test_a_real_budget_of_nothing_keeps_everything(int4: Calibrated) -> None:
    kept, points = int4.choose(Budget("kl", 0.0))
    assert sorted(kept) == sorted(NAMES)
    assert all(point.kl > 0 for point in points)


def test_a_budget_that_holds_anyway_keeps_nothing(int4: Calibrated) -> None:
    kept, points = int4.choose(ANYTHING)
    assert kept == []
    assert points[0] == int4.measure([])[0]


def test_a_real_budget_is_met_by_a_measured_choice(
    int4: Calibrated, caplog: pytest.LogCaptureFixture
) -> None:
    (nothing_kept,) = int4.measure([])
    budget = Budget("kl", nothing_kept.kl / 2)
    with caplog.at_level(logging.INFO, "mistral_trt"):
        kept, points = int4.choose(budget, always=[NAMES[2]])
    assert kept[0] == NAMES[2] and 1 < len(kept) < len(NAMES)
    ranked = by_harm(int4.stream, int4.ids, int4.scales, int4.scheme, always=[NAMES[2]])
    assert kept[1:] == ranked[: len(kept) - 1]
    (point,) = int4.measure(kept)
    assert point in points and point.holds(budget)
    assert not any(other.holds(budget) for other in points if len(other.kept) < len(kept))
    said = [text for text in caplog.messages if "linears kept" in text]
    assert len(said) == len(points)
    assert f"KL {points[0].kl:.2e}" in said[0]


def test_only_the_first_samples_are_measured_on(int4: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(stream: LayerStream, ids: Tensor, *rest: Any) -> list[Point]:
        seen.append(ids)
        return measure(stream, ids, *rest)

    monkeypatch.setattr(module, "measure", look)
    monkeypatch.setattr(module, "MEASURED_TOKENS", 50)
    monkeypatch.setattr(module, "RANKED_TOKENS", 10)
    int4.choose(ANYTHING)
    layers, linears, *rest = seen
    assert torch.equal(layers, int4.ids[:1, : 2 * W]) and torch.equal(linears, layers), "past the window"
    assert rest and all(torch.equal(ids, int4.ids[:2]) for ids in rest)
