"""A measured value + the bound it was asked to keep → whether it does, and a table of all of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One value beside its bound. at_most and at_least are both None where nothing was asked."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """NaN holds no bound."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    @property
    def asked(self) -> str:
        """≤ 0.05; empty where nothing was asked."""
        if self.at_most is not None:
            return f"≤ {number(self.at_most)}"
        return "" if self.at_least is None else f"≥ {number(self.at_least)}"

    def to_json(self) -> dict[str, Any]:
        verdict = self.holds if self.asked else None
        return {"what": self.what, "value": self.value, "asked": self.asked, "holds": verdict}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every check of every part as Markdown, and what the parts say in words below."""
    lines = ["| part | what | value | asked | holds |", "| --- | --- | --- | --- | --- |"]
    for name, part in results.items():
        for check in part["checks"]:
            verdict = {True: "yes", False: "**no**", None: ""}[check["holds"]]
            cells = (name, check["what"], number(check["value"]), check["asked"], verdict)
            lines.append(f"| {' | '.join(cells)} |")
    said = [f"{name}: {line}" for name, part in results.items() for line in part["remarks"]]
    return "\n".join([*lines, "", *said] if said else lines)


def failed(parts: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any bound is not kept."""
    return any(check["holds"] is False for part in parts for check in part["checks"])


def number(value: float) -> str:
    """Four digits: 0 -> 0, 1.03 -> 1.03, 0.0000123456 -> 1.235e-05, 123456 -> 123,456."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
