"""A checkpoint + a number of tokens → the memory that its reference takes, and a refusal without it."""

from dataclasses import dataclass

from mistral_trt.engines.planning.host import available_memory_bytes
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.validate.reference.decoder import queries_at_once


@dataclass(frozen=True)
class MemoryNeeded:
    """Predicted peak of the references over one sequence, the one in the artifact's own precision included.

    work_bytes: what grows with the sequence.
    """

    weights_bytes: int
    work_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.work_bytes


def predict_memory(source: Checkpoint, length: int, *, streaming: bool) -> MemoryNeeded:
    """Of the model whole in memory, or streaming: of one layer at a time, and the head.

    One layer counts 2.5 times: read, copied and rounded.  Eager attention keeps 2.5 times its block's scores.
    """
    config = source.config
    elements = {name: weight.elements for name, weight in source.weights.items()}
    layer = sum(count for name, count in elements.items() if name.startswith("model.layers.0."))
    head = config.vocab_size * config.hidden_size
    resident = head + 2.5 * layer if streaming else sum(elements.values()) + 1.5 * layer
    queries = queries_at_once(config.num_attention_heads, length)
    # Keys and values: repeated for the query heads, in the cache, copied twice.
    heads = config.num_attention_heads + 3 * config.num_key_value_heads
    per_token = 2 * heads * config.head_dim + 4 * config.hidden_size
    per_query = 2.5 * config.num_attention_heads * length + 3 * config.intermediate_size
    return MemoryNeeded(int(4 * resident), int(4 * (length * per_token + queries * per_query)))


def require_memory(source: Checkpoint, length: int, *, streaming: bool = False) -> None:
    """Raise ValidationError if the reference over `length` tokens would not fit in memory."""
    needed, present = predict_memory(source, length, streaming=streaming), available_memory_bytes()
    if needed.total_bytes > present:
        fits_in_layers = (
            not streaming and predict_memory(source, length, streaming=True).total_bytes < present
        )
        remedy = "--streaming, which holds one layer at a time" if fits_in_layers else "a smaller --length"
        if needed.weights_bytes > 0.9 * present and not fits_in_layers:
            remedy = "a machine with more memory"
        raise ValidationError(
            f"the float32 reference of {source.folder} needs {needed.weights_bytes / 1e9:.1f} GB for weights "
            f"and {needed.work_bytes / 1e9:.1f} GB for {length} tokens (predicted), "
            f"{present / 1e9:.1f} GB is available; use {remedy}"
        )
