"""Decoder weights → the files of an ONNX folder that hold them, bound to the graph by name.

A weight whose stored bytes are what the graph wants stays where it is: its file is hard-linked into the
folder and the graph refers into it. All others are converted into `model.onnx.data`, as a stream.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from mistral_trt.contract import DTYPE_BYTES
from mistral_trt.errors import ExportError
from mistral_trt.export.conversion import Census, Weight, convert, pieces
from mistral_trt.export.data_file import DataFile
from mistral_trt.progress import track

DATA_NAME = "model.onnx.data"
ALIGNMENT_BYTES = 4096
_LINKED_SHARE = 0.5


@dataclass(frozen=True)
class MadeTensor:
    """A tensor of the graph that is computed, not converted: codes, scales, a norm with a scale folded in.

    make: gives its bytes in order, in pieces, when they are written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    make: Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class PlacedTensor:
    """Where a weight lies in the ONNX folder: bytes [offset, offset + bytes) of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class WeightPlan:
    """Which files an ONNX folder takes from the checkpoint, and which weights are written anew.

    linked: file name in the folder → the checkpoint's file.  placed: every weight, in the graph's order.
    made: those that are computed, by name.
    """

    linked: Mapping[str, Path]
    placed: tuple[PlacedTensor, ...]
    made: Mapping[str, MadeTensor] = field(default_factory=dict)

    @property
    def written(self) -> list[PlacedTensor]:
        """The weights of `model.onnx.data`, in the order they lie there."""
        return [target for target in self.placed if target.file == DATA_NAME]

    @property
    def in_place(self) -> list[PlacedTensor]:
        """The weights that are read from the checkpoint's own bytes."""
        return [target for target in self.placed if target.file != DATA_NAME]

    @property
    def data_bytes(self) -> int:
        """Size of `model.onnx.data`, 0 if there is none."""
        written = self.written
        return written[-1].offset + written[-1].bytes if written else 0


def plan_weights(
    weights: Mapping[str, Weight], dtype: str, *, link: bool = True, made: Sequence[MadeTensor] = ()
) -> WeightPlan:
    """Decide for each weight whether its stored bytes serve; lay the others out on page edges.

    A file is linked if at least half of it serves: what does not is dead weight in the folder.
    made: tensors that are computed; a weight among them by name is not converted as well.
    """
    computed = {tensor.name: tensor for tensor in made}
    weights = {name: weight for name, weight in weights.items() if name not in computed}
    usable = _usable_files(weights.values(), dtype) if link else {}
    placed, offset = [], 0
    for name, weight in weights.items():
        if weight.stored.path in usable and _serves(weight, dtype):
            stored = weight.stored
            target = PlacedTensor(name, dtype, weight.shape, stored.path.name, stored.offset, stored.bytes)
        else:
            size = weight.elements * DTYPE_BYTES[dtype]
            target = PlacedTensor(name, dtype, weight.shape, DATA_NAME, offset, size)
            offset = _next_edge(offset + size)
        placed.append(target)
    for name, tensor in computed.items():
        placed.append(PlacedTensor(name, tensor.dtype, tensor.shape, DATA_NAME, offset, tensor.bytes))
        offset = _next_edge(offset + tensor.bytes)
    return WeightPlan({path.name: path for path in usable}, tuple(placed), computed)


def _next_edge(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def write_weights(
    weights: Mapping[str, Weight],
    plan: WeightPlan,
    path: Path,
    *,
    census: Census,
) -> str:
    """Write `model.onnx.data` and return its SHA-256.

    Raises CheckpointError for a weight that is not finite, or not finite in the target dtype.
    """
    with (
        track("weights", plan.data_bytes, unit="bytes") as advance,
        DataFile(path, advance) as file,
    ):
        end = 0
        for target in plan.written:
            file.write(bytes(target.offset - end))
            end = target.offset + target.bytes
            for piece in _bytes_of(target, weights, plan, census):
                file.write(piece)
    return file.sha256()


def _bytes_of(
    target: PlacedTensor, weights: Mapping[str, Weight], plan: WeightPlan, census: Census
) -> Iterator[memoryview]:
    if target.name in plan.made:
        return plan.made[target.name].make()
    return convert(weights[target.name], target.dtype, census)


def inspect_linked(weights: Mapping[str, Weight], plan: WeightPlan, *, census: Census) -> None:
    """Take the census of the weights that are not converted. Raises as `write_weights` does."""
    if not plan.in_place:
        return
    with track("linked weights looked at", sum(t.bytes for t in plan.in_place), unit="bytes") as advance:
        for target in plan.in_place:
            for piece in pieces(weights[target.name]):
                census.take(target.name, piece)
                advance(piece.nbytes)


def bind_weights(model: ir.Model, placed: Iterable[PlacedTensor]) -> None:
    """Point the graph's initializers at their bytes. Raises ExportError unless they match one to one."""
    waiting = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    targets = {target.name: target for target in placed}
    if waiting != set(targets):
        raise ExportError(f"graph and checkpoint disagree on the weights: {sorted(waiting ^ set(targets))}")
    for target in targets.values():
        value = model.graph.initializers[target.name]
        shape = tuple(value.shape or ())
        if shape != target.shape:
            raise ExportError(f"{target.name}: the graph has shape {shape}, the checkpoint {target.shape}")
        value.const_value = ir.ExternalTensor(
            target.file,
            target.offset,
            target.bytes,
            onnx_dtype(target.dtype),
            shape=ir.Shape(target.shape),
            name=target.name,
        )


def onnx_dtype(dtype: str) -> ir.DataType:
    """ONNX's name of a dtype: float16 -> FLOAT16."""
    names = {"float32": "FLOAT", "float8_e4m3fn": "FLOAT8E4M3FN"}
    return ir.DataType[names.get(dtype, dtype.upper())]


def _serves(weight: Weight, dtype: str) -> bool:
    """Whether the stored bytes are the weight in `dtype`, where a number may begin."""
    stored = weight.stored
    return weight.untouched and stored.dtype == dtype and stored.offset % DTYPE_BYTES[dtype] == 0


def _usable_files(weights: Iterable[Weight], dtype: str) -> dict[Path, int]:
    """Files of which enough serves, with the bytes that do; of two with one name the one that serves more."""
    serving: defaultdict[Path, int] = defaultdict(int)
    for weight in weights:
        if _serves(weight, dtype):
            serving[weight.stored.path] += weight.stored.bytes
    enough = {path: used for path, used in serving.items() if used >= _LINKED_SHARE * path.stat().st_size}
    best: dict[str, Path] = {}
    for path in sorted(enough, key=lambda path: enough[path]):
        best[path.name] = path
    return {best[name]: enough[best[name]] for name in sorted(best)}
