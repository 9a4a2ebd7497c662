"""The one list of what goes into and comes out of the decode graph, and the arithmetic of its ring.

Export builds the graph from this module, engines make optimization profiles from it, the runtime
binds by it and validate checks against it. No tensor name is typed anywhere else.

Dimension letters, here and in every docstring:

    B  rows (sequences) of a call          R  ring capacity, slots per row
    S  new tokens per row                  H  query heads
    N  tokens per row that get logits      K  key/value heads
    W  sliding_window                      D  head_dim
    C  prefill_chunk                       L  layers,  V  vocab_size

The rolling buffer. Position p lives in slot p % R, where R is the smallest multiple of C that holds
W + C - 1 positions. A chunk is written first and attended after; no slot that a query of the chunk may
still see is overwritten, because the chunk's first query sees W - 1 positions before it and the chunk
is C long. C = 1 gives R = W, the rolling buffer of the Mistral 7B paper (arXiv:2310.06825, section 2).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mistral_trt.config import ModelConfig
from mistral_trt.errors import ConfigError

CACHE_DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float16",
    "int8-weight-only": "float16",
    "int4": "float16",
    "fp8": "float16",
}
"""Precision → dtype of the rings, the residual stream and every weight that is not quantized."""

QUANTIZED = ("int8", "int8-weight-only", "int4", "fp8")
"""The precisions whose linears have quantized weights; int8 and fp8 quantize activations too."""

BLOCK_SIZES = (128, 64, 32)
"""Input features that may share a scale in INT4, as TensorRT has kernels for; the largest is tried first."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}

POSITION_ACCURATE_LIMIT = 2**20
"""Rotary angles are float32: 0.03 rad of error at a million tokens. Past here only on request."""

POSITION_LIMIT = 2**24
"""float32 no longer counts every integer past here."""


def require_positive(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, found {value!r}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph. `shape` holds dimension letters and fixed sizes."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class Ring:
    """The geometry of the rolling buffer: W and C in, R and every slot out."""

    sliding_window: int
    prefill_chunk: int

    def __post_init__(self) -> None:
        for name in ("sliding_window", "prefill_chunk"):
            require_positive(name, getattr(self, name))

    @property
    def capacity(self) -> int:
        """R. W=4096, C=256 -> 4352; W=8, C=4 -> 12; C=1 -> W."""
        chunks = -(-(self.sliding_window + self.prefill_chunk - 1) // self.prefill_chunk)
        return self.prefill_chunk * chunks

    def cache_slot(self, position: int) -> int:
        """Slot that holds `position`. W=8, C=4 (R=12): positions 11 12 13 -> slots 11 0 1."""
        return position % self.capacity

    def held_position(self, slot: int, end: int) -> int:
        """Position that `slot` holds once positions up to `end` are written; negative: never written.

        R=12, end=13: slots 0 1 2 11 -> positions 12 13 2 11.
        """
        return end - (end - slot) % self.capacity

    def visible(self, query: int, held: int) -> bool:
        """Whether the token at position `query` attends to the key at position `held`."""
        return 0 <= held <= query and held > query - self.sliding_window

    def room_in_chunk(self, position: int) -> int:
        """Tokens from `position` to the next chunk edge: the most one call may write from there."""
        return self.prefill_chunk - position % self.prefill_chunk


@dataclass(frozen=True)
class GraphContract:
    """The decode graph of one model: its tensors, dtypes, shapes and limits.

    max_context: positions a sequence may reach, None where only float32's rotary angles limit it.
    """

    config: ModelConfig
    precision: str
    ring: Ring
    max_batch_size: int
    max_context: int | None

    def __post_init__(self) -> None:
        if self.precision not in CACHE_DTYPES:
            raise ConfigError(f"precision must be one of {sorted(CACHE_DTYPES)}, found {self.precision!r}")
        require_positive("max_batch_size", self.max_batch_size)
        if self.max_context is not None:
            require_positive("max_context", self.max_context)

    @property
    def cache_dtype(self) -> str:
        return CACHE_DTYPES[self.precision]

    @property
    def wraps(self) -> bool:
        """Whether a sequence may outgrow the window; otherwise the ring is a plain cache."""
        return self.max_context is None or self.max_context > self.ring.sliding_window

    @property
    def ring_bytes_per_row(self) -> int:
        """Bytes of keys and values one sequence keeps, all layers together."""
        config = self.config
        slots = self.ring.capacity * config.num_key_value_heads * config.head_dim
        return 2 * config.num_hidden_layers * slots * DTYPE_BYTES[self.cache_dtype]

    def step_inputs(self) -> list[TensorSpec]:
        """The inputs a step feeds anew, before the rings."""
        return [
            TensorSpec("input_ids", "int64", ("B", "S")),
            TensorSpec("position_ids", "int64", ("B", "S")),
            TensorSpec("logits_index", "int64", ("B", "N")),
        ]

    def past(self) -> list[TensorSpec]:
        """Ring inputs, key and value of layer 0, then layer 1, …"""
        return [self._ring(f"past_key_values.{i}.{kind}") for i, kind in self._ring_order()]

    def present(self) -> list[TensorSpec]:
        """Ring outputs, in the order of `past()`; each shares its memory with its past."""
        return [self._ring(f"present.{i}.{kind}") for i, kind in self._ring_order()]

    def logits(self) -> TensorSpec:
        return TensorSpec("logits", "float32", ("B", "N", self.config.vocab_size))

    def inputs(self) -> list[TensorSpec]:
        return self.step_inputs() + self.past()

    def outputs(self) -> list[TensorSpec]:
        return [self.logits(), *self.present()]

    def decode_shape(self, batch: int) -> dict[str, int]:
        """B, S, N of a decode step over `batch` rows."""
        return {"B": batch, "S": 1, "N": 1}

    def profiles(self) -> dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]]:
        """Optimization profiles: name → (min, opt, max) of the dimension letters B, S, N."""
        chunk, batch = self.ring.prefill_chunk, self.max_batch_size
        decode = (self.decode_shape(1), self.decode_shape(batch), self.decode_shape(batch))
        prefill = (
            {"B": 1, "S": 1, "N": 1},
            {"B": 1, "S": chunk, "N": 1},
            {"B": 1, "S": chunk, "N": chunk},
        )
        return {"decode": decode, "prefill": prefill}

    def check_position(self, position: int, *, allow_long: bool = False) -> str | None:
        """Why no token may stand at `position`, or None if one may."""
        if self.max_context is not None and position >= self.max_context:
            return (
                f"position {position} is past this artifact's max_context of {self.max_context} tokens; "
                "export again with a larger --max-context"
            )
        if position >= POSITION_LIMIT:
            return f"position {position} is past 2**24, where float32 rotary angles stop counting"
        if position >= POSITION_ACCURATE_LIMIT and not allow_long:
            return (
                f"position {position} is past 2**20, where rotary angles lose accuracy; pass allow_long=True"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """The manifest's `contract` section (the config has a section of its own)."""
        return {
            "precision": self.precision,
            **asdict(self.ring),
            "ring_capacity": self.ring.capacity,
            "max_batch_size": self.max_batch_size,
            "max_context": self.max_context,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], config: ModelConfig) -> "GraphContract":
        """The inverse of `to_json`. Raises ConfigError on missing fields or an R that does not follow."""
        expected = {f.name for f in fields(Ring)} | {
            "precision", "ring_capacity", "max_batch_size", "max_context"
        }  # fmt: skip
        if set(data) != expected:
            raise ConfigError(f"contract: expected the fields {sorted(expected)}, found {sorted(data)}")
        ring = Ring(data["sliding_window"], data["prefill_chunk"])
        if ring.capacity != data["ring_capacity"]:
            raise ConfigError(
                f"contract: ring_capacity must be {ring.capacity} for W={ring.sliding_window}, "
                f"C={ring.prefill_chunk}, found {data['ring_capacity']}"
            )
        return cls(config, data["precision"], ring, data["max_batch_size"], data["max_context"])

    def _ring_order(self) -> list[tuple[int, str]]:
        return [(i, kind) for i in range(self.config.num_hidden_layers) for kind in ("key", "value")]

    def _ring(self, name: str) -> TensorSpec:
        config = self.config
        shape = ("B", config.num_key_value_heads, self.ring.capacity, config.head_dim)
        return TensorSpec(name, self.cache_dtype, shape)


def plan_contract(
    config: ModelConfig,
    *,
    precision: str,
    sliding_window: int | None = None,
    prefill_chunk: int = 256,
    max_batch_size: int = 4,
    max_context: int | None = None,
) -> GraphContract:
    """Settle W and the limits of an export.

    sliding_window: overrides the checkpoint's window.  max_context: positions a sequence may reach.
    Without a window the ring holds max_context positions (default min(8192, max_position_embeddings)) and
    never wraps; with one, a max_context below it shortens the ring.
    """
    if max_context is not None:
        require_positive("max_context", max_context)
    window = config.sliding_window if sliding_window is None else sliding_window
    if window is None:
        limit = min(8192, config.max_position_embeddings) if max_context is None else max_context
        return GraphContract(config, precision, Ring(limit, prefill_chunk), max_batch_size, limit)
    reach = window if max_context is None else min(window, max_context)
    return GraphContract(config, precision, Ring(reach, prefill_chunk), max_batch_size, max_context)
