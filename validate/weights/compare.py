"""Artifact + checkpoint → every stored weight held against the checkpoint's, one tensor in memory at a time.

A float weight must be the cast of the checkpoint's bit for bit. A quantized one, taken back through whatever
scale was folded into its neighbours, must be the checkpoint's to half a step of its own scale; exactly, where
the checkpoint is stored quantized itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mistral_trt.contract import QUANTIZED, GraphContract
from mistral_trt.errors import ManifestError, ValidationError
from mistral_trt.export.checkpoint import EMBEDDING, Checkpoint
from mistral_trt.export.conversion import Weight, read_float32
from mistral_trt.export.quantization.scheme import Scheme, scheme_for
from mistral_trt.manifest import GRAPH_NAME, read_manifest
from mistral_trt.progress import Advance
from mistral_trt.validate.findings import WeightFindings
from mistral_trt.validate.weights.distance import CodeDistance, cast_error, code_distance
from mistral_trt.validate.weights.graph import CODES, WeightGraph
from mistral_trt.validate.weights.linear import UP, Folds, StoredLinear, read_linear, readers_of
from mistral_trt.validate.weights.resemblance import resemblance
from mistral_trt.validate.weights.wiring import (
    Wrong,
    modules_of,
    quantized_names,
    rotary_frequencies,
    wrong_constants,
    wrong_initializers,
    wrong_wiring,
)

_HINTS = 8  # of another checkpoint every tensor is wrong, and the first few tell it


def compare_weights(
    folder: Path, contract: GraphContract, source: Checkpoint, *, advance: Advance
) -> WeightFindings:
    """Hold each weight of an ONNX folder, and the constants of its graph, against the checkpoint's.

    advance: called with 1 for each of `source.weights`.  Raises ManifestError for a folder that is no ONNX
    artifact, CheckpointError for a checkpoint that became shorter.
    """
    manifest = read_manifest(folder, "onnx", check_files=None)
    try:
        graph, layers = WeightGraph(folder), contract.config.num_hidden_layers
    except ManifestError as error:
        return WeightFindings(len(source.weights), {GRAPH_NAME: str(error)}, None)
    quantized = quantized_names(manifest.details.get("quantization"))
    wrong = wrong_wiring(graph, contract, _scheme(contract, source), quantized)
    wrong |= wrong_constants(graph, contract)
    wrong |= wrong_initializers(graph, layers, rotary=rotary_frequencies(graph))
    sides = _Sides(graph, source, contract.cache_dtype, _folds(graph, contract, source))
    names = [f"{module}.weight" for module in modules_of(layers)]
    wrong |= {name: "has no module in the graph" for name in source.weights if name not in names}
    for name in names:
        if name not in wrong:
            wrong |= _said(sides, name, hint=len(wrong) < _HINTS)
        if name in source.weights:
            advance(1)
    wrong |= _wrong_norms(sides.folds, wrong)
    return WeightFindings(len(source.weights), wrong, max(sides.steps, default=None))


@dataclass(frozen=True)
class _Sides:
    """The artifact and the checkpoint.

    dtype: of the weights that are not quantized.  folds: of the norms and up_projs so far.  steps: the
    largest distance of a code, for each linear so far.
    """

    graph: WeightGraph
    source: Checkpoint
    dtype: str
    folds: Folds
    steps: list[float] = field(default_factory=list)

    @property
    def imported(self) -> bool:
        return self.source.stored_quantization is not None

    def weight(self, name: str) -> Weight:
        """The checkpoint's; a tied lm_head's is the embedding."""
        return self.source.weights[name if name in self.source.weights else EMBEDDING]


def _folds(graph: WeightGraph, contract: GraphContract, source: Checkpoint) -> Folds:
    return Folds(graph, precision=contract.precision, imported=source.stored_quantization is not None)


def _scheme(contract: GraphContract, source: Checkpoint) -> Scheme | None:
    if contract.precision not in QUANTIZED:
        return None
    stored = source.stored_quantization
    return scheme_for(contract.precision, contract.config, stored.block_size if stored else None)


def _said(sides: _Sides, name: str, *, hint: bool) -> Wrong:
    """What is wrong with one weight, and whose numbers it holds if they are another's."""
    try:
        said = _error(sides, name)
        other = resemblance(sides.graph, sides.source, sides.folds, name) if said and hint else None
    except ValidationError as error:
        said, other = str(error), None
    return {name: f"{said}; {other}" if other else said} if said else {}


def _error(sides: _Sides, name: str) -> str | None:
    """How one weight differs from the checkpoint's. Raises ValidationError where it cannot be compared."""
    graph, weight, module = sides.graph, sides.weight(name), name.removesuffix(".weight")
    if name not in sides.source.weights and name not in graph.initializers:
        return None  # a tied head: it computes with the embedding, which was compared
    quantized = graph.dtype(name) in CODES
    expected = weight.shape[::-1] if quantized else weight.shape
    if graph.shape(name) != expected:
        raise ValidationError(
            f"has shape {list(graph.shape(name))}; the checkpoint calls for {list(expected)}"
        )
    if quantized:
        return _codes_error(sides, module, read_float32(weight))
    if graph.dtype(name) != sides.dtype:
        raise ValidationError(f"is {graph.dtype(name)}; expected {sides.dtype}")
    said = cast_error(graph.raw(name), weight, sides.dtype)
    if said and module.endswith("norm") and sides.folds.may_be_in(module):
        sides.folds.take_norm(module, read_float32(weight))
        return None
    return said


def _codes_error(sides: _Sides, module: str, weight: Tensor) -> str | None:
    """weight: the checkpoint's, float32 [out, in]."""
    linear = read_linear(sides.graph, module)
    if module.endswith(UP):
        sides.folds.take_up(module, linear, weight)
    reads, gives = sides.folds.of_input(module), sides.folds.of_output(module)
    found = code_distance(linear, weight, reads=reads, gives=gives, exact=sides.imported)
    sides.steps.append(found.steps)
    return _in_words(found, linear, folded=sides.folds.only_for(module))


def _in_words(found: CodeDistance, linear: StoredLinear, *, folded: str | None) -> str | None:
    """folded: the module into which the scale of the input is folded for this linear alone."""
    if found.wrong:
        where = f" (the scale of its input is folded into {folded})" if folded else ""
        return (
            f"{found.wrong:,} of {linear.codes.numel():,} codes are not the checkpoint's weight on the "
            f"grid of their scale{where}; the worst, at output {found.worst[0]}, input {found.worst[1]}, is "
            f"{found.steps:.3g} steps off"
        )
    if found.unused:
        return (
            f"{found.unused:,} of {1 if linear.whole else linear.scale.numel():,} scales are larger than the "
            f"numbers they are for: no code of theirs reaches {linear.bound:g}"
        )
    return None


def _wrong_norms(folds: Folds, wrong: Mapping[str, str]) -> Wrong:
    """A folded norm is checked by the linears that read it: where none of several fits, it is the norm."""
    return {
        f"{norm}.weight": "is the checkpoint's times a scale that fits none of the linears that read it: "
        + ", ".join(reader.rpartition(".")[2] for reader in readers_of(norm))
        for norm in folds.factors
        if _misfits(norm, wrong)
    }


def _misfits(norm: str, wrong: Mapping[str, str]) -> bool:
    readers = readers_of(norm) if norm.endswith("norm") else []
    return len(readers) > 1 and all(f"{reader}.weight" in wrong for reader in readers)
