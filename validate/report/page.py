"""A report → `report.html`, one file that loads nothing from anywhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mistral_trt.validate.findings import LayerErrors, LayerFindings
from mistral_trt.validate.report.figures import figure
from mistral_trt.validate.report.layer_plots import depth_plot, ranges_plot, slots_plot
from mistral_trt.validate.report.plots import Axis, agreement_plot, error_plot, sensitivity_plot
from mistral_trt.validate.report.record import summary
from mistral_trt.validate.report.report import Report
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.verdict.parts import worst_cache
from mistral_trt.validate.verdict.quality import Pair, calibration_remark, three_way
from mistral_trt.validate.verdict.scenario_results import ScenarioResult

_WORST_LINEARS = 10


def render_html(report: Report) -> str:
    """The page. Everything that came from outside is escaped; the pictures are ours."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure}
    return environment.get_template("report.html").render(
        report=report,
        plots=plots(report),
        summary=summary,
        calls=calls(report),
        pairs=pairs(report),
        calibration=calibration_remark(report.quantization, report.tokens),
        worst_linears=sensitivity(report)[:_WORST_LINEARS],
    )


def sensitivity(report: Report) -> list[Mapping[str, Any]]:
    """Name, error and whether it was kept of each linear that was calibrated, worst first."""
    found = [] if report.quantization is None else report.quantization["sensitivity"]
    return sorted(found, key=lambda entry: -entry["error"])


def calls(report: Report) -> list[tuple[str, list[PokeResult]]]:
    """Pokes, gathered by the call they were put to."""
    gathered: dict[str, list[PokeResult]] = {}
    for result in report.pokes:
        gathered.setdefault(result.question.name, []).append(result)
    return list(gathered.items())


def pairs(report: Report) -> tuple[Pair, ...]:
    """The three-way comparison; nothing where the reference was not computed in the own precision."""
    own = report.own_precision
    return () if own is None else three_way(report.scenarios, own)


def plots(report: Report) -> dict[str, Markup]:
    """The pictures of the page, by name, without those that there is nothing to draw for."""
    found = sensitivity(report)
    pictures = {"sensitivity": sensitivity_plot(found, name="sensitivity")} if found else {}
    shown = [result for result in report.scenarios if len(result.errors)]
    if shown:
        pictures |= position_plots(report, shown)
    if report.layers is not None:
        pictures |= layer_plots(report, report.layers)
    return {name: Markup(picture) for name, picture in pictures.items()}


def position_plots(report: Report, shown: Sequence[ScenarioResult]) -> dict[str, str]:
    axis = Axis(report.contract, len(report.tokens.ids), report.probes)
    error, kl = report.limit("logit_error_max"), report.limit("kl_max")
    return {
        "error": error_plot(shown, "max_abs", axis=axis, limit=error, name="error"),
        "kl": error_plot(shown, "kl", axis=axis, limit=kl, name="kl"),
        "agreement": agreement_plot(shown, axis=axis, name="agreement"),
    }


def layer_plots(report: Report, layers: LayerFindings) -> dict[str, str]:
    pictures = {}
    cache_limit = report.limit("cache_error_max")
    if reached := [layer for layer in layers.layers if _complete(layer)]:
        pictures["depth"] = depth_plot(
            reached,
            update_limit=report.limit("layer_update_error_max"),
            cache_limit=cache_limit,
            offender=report.offender,
            name="depth",
        )
        worst, ring = worst_cache(reached), report.contract.ring
        pictures["slots"] = slots_plot(worst, ring=ring, limit=cache_limit, name="slots")
    if layers.ranges:
        pictures["ranges"] = ranges_plot(layers.ranges, name="ranges")
    return pictures


def _complete(layer: LayerErrors) -> bool:
    return min(len(layer.hidden), len(layer.update), len(layer.keys), len(layer.values)) > 0
