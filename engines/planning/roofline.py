"""Budget + GPU → ceilings of tokens/s, predicted: no engine is faster, and how near it comes is not said.

The roofline model (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785): a step takes at least
as long as its bytes take at the memory's full bandwidth, and at least as long as its operations take at the
matrix units' peak. gpt-fast, for one, reaches 69 % of an A100's bandwidth in bfloat16 and 52 % in int8.
"""

from dataclasses import asdict, dataclass

from mistral_trt.engines.gpu import GpuTarget
from mistral_trt.engines.planning.budget import Budget
from mistral_trt.engines.planning.sizes import embedding_bytes, linear_elements


@dataclass(frozen=True)
class Ceilings:
    """Tokens/s of one row and of max_batch_size rows together, rings full, and of a prompt's full chunks."""

    decode_tokens_per_s: float
    decode_all_rows_tokens_per_s: float
    prefill_tokens_per_s: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 1) for name, value in asdict(self).items()}


def ceilings(budget: Budget, gpu: GpuTarget) -> Ceilings:
    """What the GPU's bandwidth and its peaks allow."""
    rows, chunk = budget.max_batch_size, budget.contract.ring.prefill_chunk
    return Ceilings(
        decode_ceiling(budget, gpu, 1),
        decode_ceiling(budget, gpu, rows),
        _ceiling(budget, gpu, tokens=chunk, rows=1),
    )


def read_bytes(budget: Budget, rows: int) -> int:
    """Bytes that a step reads: every weight and the rings of its rows.

    Of the embedding table it reads a row for each token, which counts as nothing, unless the table is the
    output layer's weight too. A ring is read whole, whether it is full or not.
    """
    tied = budget.contract.config.tie_word_embeddings
    weights = budget.weights_bytes - (0 if tied else embedding_bytes(budget.contract))
    return weights + rows * budget.ring_bytes_per_row


def token_seconds(budget: Budget, gpu: GpuTarget) -> float:
    """Seconds of the matrix units for one token that sees a full window, the output layer left out.

    2 operations for each weight of the linears, at the peak of the precision they are multiplied in, and
    4 * L * H * D * W for attention (queries with keys, then with values), always in float16.
    """
    return _operation_seconds(budget, gpu, 1, budget.contract.ring.sliding_window)


def decode_ceiling(budget: Budget, gpu: GpuTarget, rows: int) -> float:
    """Tokens/s of so many rows together, rings read whole."""
    return _ceiling(budget, gpu, tokens=rows, rows=rows)


def prompt_seconds(budget: Budget, gpu: GpuTarget, tokens: int) -> float:
    """Least seconds until a prompt of so many tokens has its first: chunk after chunk, one row at a time.

    Each chunk reads the weights and the row's ring; each token attends to the window that it has.
    """
    ring = budget.contract.ring
    bytes_read = read_bytes(budget, 1) / (1e9 * gpu.memory_bandwidth_gb_per_s)
    seconds = 0.0
    for start in range(0, tokens, ring.prefill_chunk):
        end = min(start + ring.prefill_chunk, tokens)
        keys = sum(min(position + 1, ring.sliding_window) for position in range(start, end))
        seconds += max(bytes_read, _operation_seconds(budget, gpu, end - start, keys))
    return seconds


def _operation_seconds(budget: Budget, gpu: GpuTarget, tokens: int, keys: int) -> float:
    """Seconds of the matrix units.  keys: that these tokens attend to, counted for each token."""
    config = budget.contract.config
    queries = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * queries * keys / (1e12 * gpu.fp16_tflops)
    linears = 2 * linear_elements(config) * tokens
    return linears / (1e12 * _matrix_tops(gpu, budget.contract.precision)) + attention


def _ceiling(budget: Budget, gpu: GpuTarget, *, tokens: int, rows: int) -> float:
    bandwidth = 1e9 * gpu.memory_bandwidth_gb_per_s
    return min(tokens * bandwidth / read_bytes(budget, rows), 1 / token_seconds(budget, gpu))


def _matrix_tops(gpu: GpuTarget, precision: str) -> float:
    """The peak of what multiplies: codes that are turned into float16 first are multiplied as float16."""
    if precision == "int8":
        return gpu.int8_tops
    if precision == "fp8" and gpu.fp8_tflops is not None:
        return gpu.fp8_tflops
    return gpu.fp16_tflops
