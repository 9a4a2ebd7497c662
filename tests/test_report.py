"""`report.json` and `report.html`: complete, whole, self-contained, safe and the same every time."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mistral_trt.contract import Ring
from mistral_trt.validate.findings import ActivationRange, Choice, LayerErrors, LayerFindings, WeightFindings
from mistral_trt.validate.metrics import concatenate
from mistral_trt.validate.report import page as validate_page
from mistral_trt.validate.report.drawing import COLOURS
from mistral_trt.validate.report.figures import figure, number
from mistral_trt.validate.report.folder import write_report
from mistral_trt.validate.report.page import plots, render_html
from mistral_trt.validate.report.plots import Axis, error_plot, sensitivity_plot
from mistral_trt.validate.report.record import to_json
from mistral_trt.validate.report.report import HTML_NAME, JSON_NAME, JUNIT_NAME, Report
from mistral_trt.validate.scenarios.greedy import GreedyAgreement
from mistral_trt.validate.scenarios.poke import Poke, PokeResult, Question
from mistral_trt.validate.verdict.gates import Measured, judge, measure, read_gates
from mistral_trt.validate.verdict.quality import measure_quality
from mistral_trt.validate.verdict.scenario_results import ScenarioResult
from tests.reports import (
    CONTRACT,
    GREEDY,
    LENGTH,
    NOTHING_MEASURED,
    QUANTIZATION,
    SENSITIVITY,
    WORST_CASES,
    errors,
    full_report,
    layer_findings,
    own_precision,
    report,
    text_report,
)

WRONG_LAYERS = layer_findings(wrong=7)
WRONG_WEIGHTS = WeightFindings(363, {"model.layers.7.mlp.up_proj.weight": "it is transposed"}, 0.75)


def words(found: Report) -> str:
    """The page's text on one line, with a blank for every tag."""
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", render_html(found), flags=re.DOTALL)
    return " ".join(html.unescape(page).split())


def everything(results: Sequence[ScenarioResult]) -> dict[str, Measured | None]:
    """What is measured of scenarios, the parts not run."""
    return {**measure(results, ()), **NOTHING_MEASURED}


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(report())


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all of a page's time is spent on drawing."""
    monkeypatch.setattr(validate_page, "plots", lambda _: {})


class _Elements(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_record_holds_everything_and_no_nan() -> None:
    found = json.loads(json.dumps(to_json(report()), allow_nan=False))
    assert found["format_version"] == 3
    assert found["files"] == [HTML_NAME, JUNIT_NAME]
    assert found["verdict"] == "pass"
    assert found["artifact"]["manifest_sha256"] == "a" * 64
    assert found["reference"]["sha256"] == "b" * 64
    assert len(found["tokens"]["sha256"]) == 64
    gate = next(gate for gate in found["gates"] if gate["name"] == "logit_error_max")
    assert gate["at_most"] == 0.5
    assert gate["passed"] is True
    assert gate["value"] == pytest.approx(9.9e-6, rel=0.1)
    for scenario in found["scenarios"]:
        assert {len(values) for values in scenario["per_position"].values()} == {LENGTH}
        assert scenario["summary"]["positions"] == LENGTH
        assert set(scenario["per_position"]["nll"]) == {None}, "random tokens cannot be predicted"
    assert found["pokes"] == [
        {
            "call": "decode at 26", "poke": "q-W", "slots": 1, "expected": "unchanged",
            "changed_logits": 0, "of": 97, "passed": True,
        }
    ]  # fmt: skip


def test_a_number_that_is_not_finite_becomes_null() -> None:
    broken = replace(errors(LENGTH, 1e-5), kl=np.full(LENGTH, np.nan))
    results = tuple(replace(result, errors=broken) for result in report().scenarios)
    gates = judge(read_gates("fp16"), everything(results))
    found = report(scenarios=results, gates=gates)
    data = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert data["verdict"] == "fail"
    assert data["scenarios"][0]["per_position"]["kl"][0] is None
    assert "none" in render_html(found)


def test_the_verdict_is_one_line_that_names_what_failed() -> None:
    good, bad = report(), report(1.0)
    assert good.verdict.startswith(
        "PASS tiny fp16: 8 gates hold over 240 positions, 8 not decided; Logit error, largest: "
    )
    assert bad.verdict.startswith("FAIL tiny fp16: 5 of 8 gates failed: Logit error, largest: 1 ")
    assert "(at most 0.5), " in bad.verdict
    assert "\n" not in good.verdict + bad.verdict


def test_the_page_says_its_verdict_first(page: str) -> None:
    text = " ".join(_Elements(page).text.split())
    assert text.index("Passed") < text.index("What ran") < text.index("What was compared with what")
    assert text.index("What was compared with what") < text.index("Gates") < text.index("Scenarios")
    failed = " ".join(_Elements(render_html(report(1.0))).text.split())
    assert failed.index("Failed") < failed.index("allowed at most 0.5") < failed.index("What ran")
    assert "Passed" not in failed


def test_quality_is_recorded_with_its_text() -> None:
    found = json.loads(json.dumps(to_json(text_report()), allow_nan=False))
    quality = found["quality"]
    assert quality["scenario"] == "prefill"
    assert quality["tokens"] == "text: own.txt, 3 times over"
    assert quality["positions"] == LENGTH
    assert quality["perplexity"] == {"reference": 20, "artifact": 25, "ratio": 1.25, "positions": LENGTH - 1}
    assert quality["kl_mean"] == found["scenarios"][0]["summary"]["kl_mean"]
    assert quality["top1_agreement"] == found["scenarios"][0]["summary"]["top1_agreement"] < 1
    assert quality["greedy"] == {
        "prompt_tokens": 15, "generated": 45, "agreed": 41,
        "diverged": {
            "position": 56, "artifact_token": 17, "reference_token": 4, "reference_margin": 0.03125,
        },
    }  # fmt: skip
    assert found["quantization"] is None
    assert found["scenarios"][0]["summary"]["perplexity_ratio"] == 1.25
    assert found["scenarios"][0]["per_position"]["nll"][-2:] == [3.219, None]


def test_quality_is_of_whole_chunks_wherever_they_stand() -> None:
    read = text_report().scenarios
    assert measure_quality(read[::-1], GREEDY) == measure_quality(read, GREEDY)
    assert np.isnan(measure_quality(read[1:], GREEDY).perplexity.ratio)


@pytest.mark.usefixtures("without_pictures")
def test_of_random_tokens_no_perplexity_is_recorded_or_shown() -> None:
    assert to_json(report())["quality"]["perplexity"] is None
    text = words(report())
    assert "The tokens are random, there is no text to predict, so no perplexity is given." in text
    assert "over the reference's" not in text
    assert "Greedy agreement 41 of 45 tokens" in text


@pytest.mark.usefixtures("without_pictures")
def test_the_page_shows_quality_and_its_text() -> None:
    text = words(text_report())
    section = text[text.index("Quality How") : text.index("At the probes")]
    assert "Read: text: own.txt, 3 times over, 60 tokens in whole chunks; 59 of them are scored" in section
    assert "random" not in section
    assert "Perplexity 25 the reference's 20 over the reference's 1.25" in section
    assert "Greedy agreement 41 of 45 tokens" in section
    assert (
        "At position 56 it chose token 17; the reference has token 4 ahead by 0.0312 in the logit" in section
    )
    assert "Quantization" not in text
    assert "calibrated" not in text


@pytest.mark.usefixtures("without_pictures")
def test_a_continuation_that_never_parts_or_never_began_is_told() -> None:
    whole = replace(text_report().quality, greedy=GreedyAgreement(15, 45, 45, None))
    assert "would have said, all 45 tokens long." in words(report(quality=whole))
    none = replace(whole, greedy=GreedyAgreement(15, 0, 0, None))
    assert "the artifact said nothing." in words(report(quality=none))


@pytest.mark.usefixtures("without_pictures")
def test_the_page_and_the_record_show_what_was_quantized() -> None:
    found = text_report(QUANTIZATION)
    assert to_json(found)["quantization"] == QUANTIZATION
    page = words(found)
    text = page[page.index("Quantization What") : page.index("At the probes")]
    assert "Weights in int8, activations in int8: 11 weights, which are 93 % of the linears' bytes." in text
    assert "2 were kept in float16" in text
    assert "The 10 worst:" in text
    table = text[: text.index("The 10 worst:")]
    assert table.index("model.layers.3.mlp.down_proj 0.4 kept in float16") < table.index(
        "layers.2.mlp.down_proj 0.3"
    )
    assert table.count("model.layers.") == 10
    assert "lm_head" not in table, "the least of thirteen errors"
    assert "keeps as close to its checkpoint as int8 is asked to" in page


@pytest.mark.usefixtures("without_pictures")
def test_weights_alone_in_blocks_are_told() -> None:
    scheme = {"precision": "int4", "weights": "int4", "activations": None, "block_size": 128}
    text = words(text_report({**QUANTIZATION, "scheme": scheme}))
    assert "Weights in int4, activations in float16, a scale for every 128 inputs: 11 weights" in text


@pytest.mark.usefixtures("without_pictures")
def test_what_was_calibrated_on_is_named() -> None:
    other = (
        "This is not the text that the scales were calibrated on (Old speeches, 16 samples of 512 tokens)."
    )
    assert other in words(text_report(QUANTIZATION))
    calibration = {"source": "text: own.txt", "sha256": "c" * 64, "samples": 16, "tokens": 512}
    same = words(text_report({**QUANTIZATION, "calibration": calibration}))
    assert "calibrated on a text of the same name (text: own.txt, 16 samples" in same
    assert "This is not the text" not in same
    imported = text_report({**QUANTIZATION, "calibration": None, "sensitivity": []})
    assert "quantized elsewhere: what it was calibrated on is not recorded" in words(imported)
    assert "worst:" not in words(imported)


def test_the_first_numbers_are_those_of_the_gates_there_are() -> None:
    found = text_report(QUANTIZATION)
    names = {"fp16": ["logit_error_max", "kl_max"], "int8": ["kl_mean"]}
    for precision, shown in names.items():
        gates = judge(read_gates(precision), everything(found.scenarios))
        assert [gate.name for gate in replace(found, gates=gates).headlines] == shown
    enough = [replace(gate, min_positions=1) for gate in read_gates("int8")]
    gates = judge(enough, everything(found.scenarios))
    assert [gate.name for gate in replace(found, gates=gates).headlines] == [
        "perplexity_ratio", "kl_mean", "top1_agreement",
    ]  # fmt: skip
    assert "Perplexity, over the reference's: 1.25 (at most 1.3)" in replace(found, gates=gates).verdict


def test_the_linears_are_drawn_by_kind_in_the_order_of_the_forward_pass() -> None:
    picture = sensitivity_plot(SENSITIVITY, name="s")
    kinds = ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]
    places = [picture.index(f">{kind}<") for kind in kinds]
    assert places == sorted(places)
    bars = re.findall(r'clip-path="[^"]*" style="fill: (var\(--\w+\))', picture)
    assert bars.count("var(--data)") == 11
    assert bars.count("var(--mark)") == 2, "those that were kept"
    assert "#0102" not in picture


def test_the_page_is_well_formed_and_ids_are_unique() -> None:
    page = render_html(full_report(layers=WRONG_LAYERS, weights=WRONG_WEIGHTS))
    elements = _Elements(page)
    assert elements.open == []
    ids = [value for _, name, value in elements.attributes if name == "id"]
    assert len(ids) > 50
    assert len(ids) == len(set(ids))
    used = [value for _, name, value in elements.attributes if name == "xlink:href"]
    assert used
    assert {value.removeprefix("#") for value in used} <= set(ids)


def test_the_page_loads_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"[a-z]+://[^\"' ]+", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)


def test_the_page_serves_light_dark_print_and_phone(page: str) -> None:
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 36rem", "width=device-width"):
        assert query in page
    for variable in COLOURS.values():
        name = variable.removeprefix("var(").removesuffix(")")
        assert page.count(f"{name}: ") == 3, "each colour is set for light, dark and print"


def test_what_comes_from_outside_is_escaped() -> None:
    hostile = "<script>alert(1)</script>"
    found = report()
    page = render_html(
        replace(
            found,
            artifact={**found.artifact, "name": hostile, "folder": hostile, "versions": {hostile: hostile}},
            run={**found.run, "command": hostile},
            notes=(hostile,),
            undecided=(replace(found.undecided[0], why=hostile),),
            weights=WeightFindings(1, {hostile: hostile}, None),
            layers=LayerFindings(hostile, (), ()),
            own_precision=replace(own_precision(found.scenarios), words=hostile),
            worst_cases=(
                replace(
                    WORST_CASES[0],
                    scenario=hostile,
                    context=hostile,
                    expected=Choice(1, hostile, 0.5),
                    found=Choice(2, hostile, 0.5),
                ),
            ),
            tokens=replace(found.tokens, source=hostile, is_text=True),
            quantization={
                **QUANTIZATION,
                "sensitivity": [{"name": hostile, "error": 1.0, "kept": False}],
                "calibration": {"source": hostile, "samples": 1, "tokens": 2},
            },
        )
    )
    assert hostile not in page
    assert page.count("&lt;script&gt;") >= 19


def test_the_same_numbers_give_the_same_bytes(page: str) -> None:
    assert render_html(report()) == page


def test_pictures_are_xml_without_colours_or_fonts_of_their_own() -> None:
    pictures = plots(full_report(layers=WRONG_LAYERS))
    assert set(pictures) == {"error", "kl", "agreement", "sensitivity", "depth", "slots", "ranges"}
    for name, picture in pictures.items():
        ElementTree.fromstring(picture)
        assert picture.startswith("<svg viewBox=")
        assert not re.search(r"#[0-9a-fA-F]{6}\b", picture), f"{name} has a colour that no theme can change"
        assert "font-family" not in picture
        assert "<style" not in picture


def test_pictures_mark_turns_probes_and_the_gate() -> None:
    found = report()
    axis = Axis(CONTRACT, LENGTH, found.probes)
    assert axis.turns()[:4] == [(8, "W"), (12, "R"), (16, "2W"), (24, "3W = 2R")]
    marked = error_plot(found.scenarios, "max_abs", axis=axis, limit=0.5, name="a")
    plain = error_plot(found.scenarios, "max_abs", axis=axis, limit=None, name="a")
    assert ">3W = 2R<" in marked
    assert "var(--bad)" in marked
    assert "var(--bad)" not in plain
    assert marked.count("stroke: var(--mark)") >= len(found.scenarios)


def test_of_very_many_turns_only_the_first_are_marked() -> None:
    assert len(Axis(CONTRACT, 2060, ()).turns()) == 5
    assert Axis(replace(CONTRACT, ring=Ring(60, 4), max_context=60), 60, ()).turns() == []


def test_a_scenario_that_broke_is_still_drawn_and_told() -> None:
    first, *others = report().scenarios
    results = (
        replace(first, errors=errors(7, 1e-5), failure="RuntimeError: no <room>"),
        replace(others[0], errors=concatenate([]), failure="RuntimeError: at once"),
    )
    gates = judge(read_gates("fp16"), everything(results))
    page = render_html(report(scenarios=results, gates=gates))
    text = " ".join(_Elements(page).text.split())
    assert "prefill stopped at position 7. RuntimeError: no <room>" in text
    assert "decode stopped at position 0. RuntimeError: at once" in text
    assert "not reached" in text
    nothing = render_html(report(scenarios=(results[1],), gates=gates))
    assert "<svg" not in nothing


def test_a_wrong_poke_is_shown_open() -> None:
    wrong = PokeResult(Question(26, 27), Poke("q-W", (6,), False), 97, 97)
    page = render_html(report(pokes=(wrong,)))
    assert "<details open>" in page
    assert "97 of 97 logits changed" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (2312, "2,312"), (0.106008, "0.106"), (0.99784, "0.9978"), (4.6581, "4.658"),
        (5e-4, "5 × 10⁻⁴"), (1e-7, "10⁻⁷"), (1.53e-4, "1.5 × 10⁻⁴"),
        (99951.7, "99,952"), (2e8 / 3, "6.7 × 10⁷"), (1e300, "10³⁰⁰"),
        (float("nan"), "none"), (float("inf"), "infinity"),
    ],
)  # fmt: skip
def test_figures_are_readable(value: float, text: str) -> None:
    assert figure(value) == text


def test_numbers_keep_four_digits() -> None:
    assert number(0.123456) == 0.1235
    assert number(2.0) == 2
    assert number(float("inf")) is None


def test_all_three_files_are_written(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    assert json.loads((tmp_path / JSON_NAME).read_text())["verdict"] == "pass"
    assert (tmp_path / HTML_NAME).read_text().startswith("<!doctype html>")
    assert (tmp_path / JUNIT_NAME).read_bytes().startswith(b"<?xml")
    assert {path.name for path in tmp_path.iterdir()} == {HTML_NAME, JSON_NAME, JUNIT_NAME}


def test_the_first_wrong_layer_is_named_wherever_the_verdict_is() -> None:
    found = full_report(layers=WRONG_LAYERS)
    assert {gate.name for gate in found.failed} == {"layer_update_error_max"}
    assert found.verdict.endswith("layer 7 (position 11); first wrong layer: 7")
    assert to_json(found)["layers"]["first_wrong"]["layer"] == 7
    healthy = full_report()
    assert healthy.passed
    assert healthy.offender is None
    assert to_json(healthy)["layers"]["first_wrong"] is None
    assert "first wrong layer" not in healthy.verdict


def test_a_layer_that_only_stands_out_fails_nothing_and_is_shown() -> None:
    found = full_report(layers=layer_findings(wrong=3, offset=0.01))
    assert found.passed
    assert found.offender is not None
    assert (found.offender.layer, found.offender.limit) == (3, None)
    assert "stand out" not in found.verdict


@pytest.mark.usefixtures("without_pictures")
def test_the_page_shows_every_part() -> None:
    text = words(full_report(layers=WRONG_LAYERS, weights=WRONG_WEIGHTS))
    assert "Where to look: first wrong layer: 7." in text
    assert "The reference ran in float16 on the CPU. Side Against" in text
    assert "own precision reference 60" in text
    assert "artifact own precision 60" in text
    assert "artifact reference 60" in text
    assert "Position 50, decode, KL 0.02 … and the great white whale, number 0, came" in text
    assert "Reference: up 41.0 % · Artifact: token 4 40.0 %" in text
    assert "363 compared, 1 wrong." in text
    assert "model.layers.7.mlp.up_proj.weight it is transposed" in text
    assert "0.75 steps of its scale away" in text
    assert "Layer 7 is the first above its gate: its update is off by 0.0864" in text
    assert "Not decided: takes 1,000 positions, found 60" in text


@pytest.mark.usefixtures("without_pictures")
def test_a_part_that_was_not_run_is_not_shown_as_one_that_found_nothing() -> None:
    text = words(report())
    for heading in ("Stored weights Every", "Layer by layer", "Worst cases", "told apart"):
        assert heading not in text
    assert "Weights or tokenizer that are not the checkpoint's" in text
    assert text.count("Not decided: not run") == 7
    assert "all 8 gates hold over 240 compared positions; 8 more could not be decided." in text


def test_the_record_holds_every_part() -> None:
    found = json.loads(json.dumps(to_json(full_report(layers=WRONG_LAYERS)), allow_nan=False))
    assert found["weights"] == {"compared": 363, "wrong": {}, "worst_steps": 0.5}
    layers = WRONG_LAYERS.layers
    recorded = found["layers"]["layers"][7]
    assert recorded["index"] == 7
    assert recorded["update"] == {
        "mean": number(np.mean(layers[7].update)),
        "max": number(np.max(layers[7].update)),
        "position": int(np.argmax(layers[7].update)),
    }
    assert recorded["keys"]["position"] == layers[7].positions[np.argmax(layers[7].keys)]
    assert len(found["layers"]["ranges"]) == len(WRONG_LAYERS.ranges)
    sides = [(pair["side"], pair["against"]) for pair in found["own_precision"]["pairs"]]
    assert sides == [("own precision", "reference"), ("artifact", "own precision"), ("artifact", "reference")]
    assert found["own_precision"]["pairs"][0]["perplexity"]["side"] == 25
    assert len(found["worst_cases"]) == 10
    assert found["worst_cases"][0]["expected"] == {"token": 17, "text": " up", "probability": 0.41}
    plain = to_json(report())
    for part in ("weights", "layers", "own_precision", "worst_cases"):
        assert plain[part] is None


def test_what_is_not_finite_is_drawn_and_recorded() -> None:
    """NaN and infinity in every array of a layer."""
    first, second, *others = layer_findings().layers
    nothing = np.full(12, np.nan)
    broken = LayerErrors(1, np.full(60, np.inf), np.full(60, np.nan), second.positions, nothing, nothing)
    ranges = (ActivationRange("residual", 1, np.inf, 1.0), ActivationRange("x", 1, np.nan, 0.0))
    found = full_report(layers=LayerFindings("", (first, broken, *others), ranges))
    assert found.offender is not None
    assert found.offender.layer == 1
    data = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert data["layers"]["layers"][1]["update"] == {"mean": None, "max": None, "position": 0}
    assert data["layers"]["ranges"][0]["largest"] is None
    assert ">infinity, layer 1<" in plots(found)["ranges"]


def test_the_offender_is_marked_in_the_picture() -> None:
    def circles(found: Report) -> int:
        return plots(found)["depth"].count(">layer 7<")

    assert circles(full_report(layers=WRONG_LAYERS)) == 1
    assert circles(full_report()) == 0
