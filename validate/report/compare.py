"""Two reports → what changed between them: `mistral-trt compare`."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mistral_trt.validate.report.figures import figure
from mistral_trt.validate.report.record_reader import GateRecord, Record, read_record
from mistral_trt.validate.verdict.gates import TITLES

_LAYER_FACTOR = 2.0
_MARKS = {"pass": "✓", "fail": "✗", "not decided": "–"}
_ABSENT = "·"


@dataclass(frozen=True)
class GateChange:
    """A gate of either report; a side is None where that report does not have it.

    ratio: the value after over the value before; None where that is no number.
    """

    name: str
    before: GateRecord | None
    after: GateRecord | None
    ratio: float | None

    @property
    def worse(self) -> bool:
        """Whether it fails now and did not fail before."""
        return _fails(self.after) and not _fails(self.before)


@dataclass(frozen=True)
class Changes:
    """What differs.  Pairs are (before, after).

    facts: hashes, versions and settings; None where one report does not have it.  layers: error of a
    layer's update, where it changed by more than a factor of two.
    """

    verdict: tuple[str, str]
    facts: Mapping[str, tuple[str | None, str | None]]
    gates: tuple[GateChange, ...]
    layers: Mapping[int, tuple[float | None, float | None]]
    notes_gone: tuple[str, ...]
    notes_new: tuple[str, ...]

    @property
    def worse(self) -> list[str]:
        """Names of the gates that fail now and did not before."""
        return [gate.name for gate in self.gates if gate.worse]


def compare_records(before: Record, after: Record) -> Changes:
    facts = {name: (before.facts.get(name), after.facts.get(name)) for name in [*before.facts, *after.facts]}
    gates = {name: (before.gates.get(name), after.gates.get(name)) for name in [*before.gates, *after.gates]}
    layers = {
        layer: (before.layers[layer], after.layers[layer]) for layer in before.layers if layer in after.layers
    }
    return Changes(
        verdict=(before.verdict, after.verdict),
        facts={name: pair for name, pair in facts.items() if pair[0] != pair[1]},
        gates=tuple(GateChange(name, *pair, _gate_ratio(*pair)) for name, pair in gates.items()),
        layers={layer: pair for layer, pair in layers.items() if _far_apart(*pair)},
        notes_gone=tuple(note for note in before.notes if note not in after.notes),
        notes_new=tuple(note for note in after.notes if note not in before.notes),
    )


def _fails(gate: GateRecord | None) -> bool:
    return gate is not None and gate.verdict == "fail"


def _gate_ratio(before: GateRecord | None, after: GateRecord | None) -> float | None:
    return None if before is None or after is None else _ratio(before.value, after.value)


def _ratio(before: float | None, after: float | None) -> float | None:
    if not before or after is None or not math.isfinite(after / before):
        return None
    return after / before


def _far_apart(before: float | None, after: float | None) -> bool:
    """0.1 and 0.21 are; so are a number and none, and zero and any other."""
    ratio = _ratio(before, after)
    return before != after if not ratio else not 1 / _LAYER_FACTOR <= ratio <= _LAYER_FACTOR


def describe(changes: Changes) -> Iterator[str]:
    """The comparison in lines for a terminal."""
    yield f"verdict: {_arrow(*changes.verdict)}"
    if changes.facts:
        yield "\nchanged"
        width = max(map(len, changes.facts))
        for name, pair in changes.facts.items():
            yield f"  {name:<{width}}  {_arrow(*(value or _ABSENT for value in pair))}"
    yield "\ngates"
    for gate in changes.gates:
        yield f"  {describe_gate(gate)}"
    if changes.layers:
        yield f"\nlayers whose update's error changed by more than {_LAYER_FACTOR:g} times"
        for layer, (before, after) in changes.layers.items():
            yield f"  layer {layer:<4}{_arrow(_value(before), _value(after))}{_times(_ratio(before, after))}"
    if changes.notes_gone or changes.notes_new:
        yield "\nnotes"
        yield from (f"  - {note}" for note in changes.notes_gone)
        yield from (f"  + {note}" for note in changes.notes_new)
    titles = [TITLES.get(name, name) for name in changes.worse]
    yield f"\nworse: {'; '.join(titles)}" if titles else "\nno gate fails that did not fail before"


def describe_gate(gate: GateChange) -> str:
    """✓ → ✗  Logit error, largest: 0.1 → 0.7 (× 7), at most 0.5"""
    sides = (gate.before, gate.after)
    marks = _arrow(*(_ABSENT if side is None else _MARKS[side.verdict] for side in sides))
    values = _arrow(*(_ABSENT if side is None else _shown(side) for side in sides))
    bounds = [f"{side.bound.replace('_', ' ')} {figure(side.limit)}" for side in sides if side is not None]
    bound = bounds[0] if len(set(bounds)) == 1 else _arrow(*bounds)
    return f"{marks}  {TITLES.get(gate.name, gate.name)}: {values}{_times(gate.ratio)}, {bound}"


def _shown(gate: GateRecord) -> str:
    return gate.where if gate.verdict == "not decided" else _value(gate.value)


def _value(value: float | None) -> str:
    return "not finite" if value is None else figure(value)


def _times(ratio: float | None) -> str:
    return "" if ratio is None or ratio == 1 else f" (× {figure(ratio)})"


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def printable(text: str) -> str:
    """Text without what a terminal would obey: a report may come from anywhere."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mistral-trt compare",
        description="What changed between two validation reports.",
        epilog="exit status: 0 no gate fails that did not fail before, 1 one does, 2 they cannot be compared",
    )
    parser.add_argument("before", type=Path, metavar="REPORT1", help="a report's folder or its report.json")
    parser.add_argument("after", type=Path, metavar="REPORT2", help="the one to hold against it")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser.parse_args(argv)


def compare(argv: list[str]) -> int:
    """Run the command. Raises ValidationError if the reports cannot be compared."""
    args = parse(argv)
    changes = compare_records(read_record(args.before), read_record(args.after))
    if args.json:
        print(json.dumps({**asdict(changes), "worse": changes.worse}, indent=2, allow_nan=False))
    else:
        for line in describe(changes):
            print(printable(line))
    return 1 if changes.worse else 0
