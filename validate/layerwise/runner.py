"""An ONNX folder + recordings → what its layers compute of them, one layer in memory at a time.

Layer i runs every step of a recording before layer i + 1 is loaded, so a model runs in the memory of one
layer, the hidden states of one recording and one layer's rings.

B rows   S tokens of a step   N of them with logits   V vocab_size   K key/value heads   R slots   D head_dim
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mistral_trt.contract import QUANTIZED, GraphContract
from mistral_trt.runtime.backend import Logits, Step
from mistral_trt.validate.layerwise.loaded import LoadedSegment
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.segments import (
    Segment,
    cut_embedding,
    cut_head,
    cut_layer,
    read_graph,
)
from mistral_trt.validate.layerwise.steps import Array, Hidden, Recording, ZeroedRow


@dataclass(frozen=True)
class LayerRun:
    """What one layer made of a recording.

    hidden: for each step float32 [B, S, hidden_size].  keys, values: the rings after the last step, in their
    own dtype (bfloat16 widened to float32), [rows, K, R, D].
    """

    hidden: Hidden
    keys: Array
    values: Array


class SegmentedArtifact:
    """An ONNX folder, of which the part that was run last is in memory; `close` lets go of that too.

    threads: of ONNX Runtime, None for its own choice.  Where a `ranges` is given, every activation is added
    to it. Hidden states are float32, unrounded where ONNX Runtime would hand them on so (see segments).
    Raises GraphError if the graph cannot be read, cut or loaded.
    """

    def __init__(self, folder: Path, contract: GraphContract, *, threads: int | None = None) -> None:
        self.contract = contract
        self._folder, self._threads = folder, threads
        self._graph = read_graph(folder, contract)
        self._loaded: tuple[str, LoadedSegment] | None = None

    @property
    def num_hidden_layers(self) -> int:
        return self.contract.config.num_hidden_layers

    @property
    def words(self) -> str:
        """How the layers are run, for the report."""
        words = "the artifact's own nodes in ONNX Runtime on the CPU, one layer at a time"
        if self.contract.precision == "bf16":
            words += ", widened to float32 (a CPU has no bfloat16 kernels), so no activation is rounded"
        if self.contract.precision in QUANTIZED:
            words += ", quantized weights dequantized as the graph says"
        return words

    def embed(self, recording: Recording) -> Hidden:
        """What enters layer 0, for each step [B, S, hidden_size]."""
        segment = self._load("embedding", False, partial(cut_embedding, self._graph))
        found = []
        for step in recording.steps:
            found.append(self._new_hidden(step))
            segment.run([step.input_ids], [found[-1]])
        return found

    def run(
        self, index: int, recording: Recording, hidden: Hidden, *, ranges: RangeLog | None = None
    ) -> LayerRun:
        """Every step through layer `index`, its rings zeroed before the first.

        hidden: what enters it, for each step [B, S, hidden_size], which is left as it is.
        """
        watch = ranges is not None
        cut = partial(cut_layer, self._graph, index, watch=watch)
        segment = self._load(f"layer {index}", watch, cut)
        rings = self._new_rings(recording.rows)
        entering, found = iter(hidden), []
        for event in recording.events:
            if isinstance(event, ZeroedRow):
                rings[:, event.row : event.row + 1] = 0
                continue
            found.append(self._new_hidden(event))
            own = rings[:, event.first_row : event.first_row + len(event.input_ids)]
            inputs = [next(entering), event.position_ids, *own]
            if ranges is None:
                segment.run(inputs, [found[-1], *own])
            else:
                _run_watched(segment, inputs, [found[-1], *own], layer=index, ranges=ranges)
        return LayerRun(found, *rings)

    def logits(self, recording: Recording, hidden: Hidden) -> Iterator[Logits]:
        """What leaves the last layer through norm and head: for each step float32 [B, N, V], of the tokens
        whose logits the step asks for."""
        segment = self._load("head", False, partial(cut_head, self._graph))
        for step, state in zip(recording.steps, hidden, strict=True):
            found = np.empty((*step.logits_index.shape, self.contract.config.vocab_size), np.float32)
            segment.run([state, step.logits_index], [found])
            yield found

    def close(self) -> None:
        """Give memory back; the next call loads anew."""
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, part: str, watch: bool, cut: Callable[[], Segment]) -> LoadedSegment:
        """The session of a part; that of another part is gone before it is opened."""
        if self._loaded is None or self._loaded[0] != part or (watch and not self._loaded[1].segment.watched):
            self.close()
            self._loaded = part, LoadedSegment(cut(), self._folder, threads=self._threads)
        return self._loaded[1]

    def _new_hidden(self, step: Step) -> Array:
        return np.empty((*step.input_ids.shape, self.contract.config.hidden_size), np.float32)

    def _new_rings(self, rows: int) -> Array:
        """Keys and values, zero: [2, rows, K, R, D]."""
        config = self.contract.config
        shape = (2, rows, config.num_key_value_heads, self.contract.ring.capacity, config.head_dim)
        bfloat16 = self.contract.precision == "bf16"
        return np.zeros(shape, np.float32 if bfloat16 else self.contract.cache_dtype)


def _run_watched(
    segment: LoadedSegment, inputs: list[Array], outputs: list[Array], *, layer: int, ranges: RangeLog
) -> None:
    """Run a step; add its activations to `ranges`."""
    bound = dict(zip(segment.segment.outputs, outputs, strict=True))
    watched = segment.segment.watched
    more = dict.fromkeys(name for names in watched.values() for name in names if name not in bound)
    found = {**bound, **segment.run(inputs, outputs, list(more))}
    for activation, names in watched.items():
        for name in names:
            ranges.add(activation, layer, found[name])
