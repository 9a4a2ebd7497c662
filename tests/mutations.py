"""Planted faults → the table of which gate catches each.  `python -m tests.mutations` prints the table.

W = 8, C = 4, R = 12; every fault is validated at the default budget (test_mutations.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tests import planted_files as files
from tests import planted_graph as graph
from tests import planted_runtime as runtime
from tests.planted_files import GATE, OTHER_GATE, K, Q, V

Where = Literal["graph", "weights", "runtime", "quantization"]


@dataclass(frozen=True)
class Mutation:
    """One fault.

    gate: the one that must catch it.  also: others that fail in a default run.  exporting, running: patches
    while the artifact is exported and while it is validated.  altering: alters the files of a copy.
    """

    name: str
    where: Where
    precision: str
    gate: str
    also: tuple[str, ...] = ()
    exporting: graph.Patch | None = None
    running: graph.Patch | None = None
    altering: files.Alteration | None = None
    layers: int = 1


def in_graph(name: str, precision: str, gate: str, plant: graph.Patch, *also: str) -> Mutation:
    return Mutation(name, "graph", precision, gate, also, exporting=plant)


def in_ring(name: str, precision: str, gate: str, plant: graph.Patch, *also: str) -> Mutation:
    """The graph is made by the faulty arithmetic, and the runtime runs by it."""
    return Mutation(name, "graph", precision, gate, also, exporting=plant, running=plant)


def in_weights(name: str, precision: str, gate: str, plant: files.Alteration, *also: str) -> Mutation:
    return Mutation(name, "weights", precision, gate, also, altering=plant)


def in_runtime(name: str, precision: str, gate: str, plant: graph.Patch, *also: str) -> Mutation:
    return Mutation(name, "runtime", precision, gate, also, running=plant)


def in_codes(name: str, precision: str, gate: str, plant: files.Alteration, *also: str) -> Mutation:
    return Mutation(name, "quantization", precision, gate, also, altering=plant)


CALLS, WRONG, HIDDEN, VISIBLE = "calls_failed", "weights_wrong", "hidden_slots_seen", "visible_slots_unseen"
LOGIT, TOP1, ACTIVATION = "logit_error_max", "top1_agreement", "activation_max"
UPDATE, CACHE = "layer_update_error_max", "cache_error_max"
MEANS = ("relative_error_mean", "kl_mean")
FAR = ("kl_max", "cosine_distance_max")
USED_MOST, USED_LEAST = "input_range_used_max", "input_range_used_min"
OWN = ("own_relative_error_mean", "own_kl_mean", "own_top1_agreement")

MUTATIONS = (
    in_graph("window one too wide", "fp32", HIDDEN, graph.wider_by(1), LOGIT, *FAR, TOP1, UPDATE),
    in_graph("window one too wide", "int4", HIDDEN, graph.wider_by(1), *OWN),
    in_graph(
        "window one too narrow", "fp16", VISIBLE, graph.wider_by(-1), LOGIT, *MEANS, *FAR, TOP1, UPDATE, *OWN
    ),
    in_graph(
        "window one too narrow", "int8", VISIBLE, graph.wider_by(-1), "own_kl_mean", "own_top1_agreement"
    ),
    replace(
        in_graph("window one too narrow in the last layer", "int8", VISIBLE, graph.narrower_in_last_layer),
        layers=2,
    ),
    in_graph(
        "window too wide but for a chunk's first token",
        "fp8",
        HIDDEN,
        graph.wider_after_the_first(1),
        "own_kl_mean",
    ),
    in_graph("mask missing", "fp32", HIDDEN, graph.mask_missing, WRONG, LOGIT, *FAR, TOP1, UPDATE),
    in_graph("mask transposed", "fp32", LOGIT, graph.mask_transposed, WRONG, VISIBLE, *FAR, TOP1, UPDATE),
    in_graph("padding and later tokens attended", "fp32", LOGIT, graph.later_attended, *FAR, TOP1, UPDATE),
    in_graph(
        "slots that hold nothing yet attended", "fp32", HIDDEN, graph.empty_attended, LOGIT, *FAR, UPDATE
    ),
    in_graph("slot one too far", "fp32", CALLS, graph.slot_one_too_far, HIDDEN, LOGIT, *FAR),
    in_graph(
        "slot by position % W in a ring of R",
        "fp32",
        CACHE,
        graph.slot_by_window,
        WRONG,
        LOGIT,
        *FAR,
        TOP1,
        UPDATE,
    ),
    in_ring(
        "R = W with chunks (position % W)",
        "fp32",
        VISIBLE,
        graph.capacity_of_window,
        LOGIT,
        *FAR,
        TOP1,
        UPDATE,
    ),
    in_ring("R too small by one", "fp32", CALLS, graph.capacity_too_small_by_one, LOGIT, *FAR),
    in_graph("keys not rotated", "fp32", CACHE, graph.keys_not_rotated, LOGIT, *FAR, TOP1, UPDATE),
    in_graph(
        "rope_theta doubled",
        "fp16",
        "kl_mean",
        graph.rope_theta_doubled,
        WRONG,
        LOGIT,
        "relative_error_mean",
        *FAR,
        UPDATE,
        CACHE,
        "own_relative_error_mean",
        "own_kl_mean",
    ),
    in_graph(
        "neighbours rotated for halves", "fp32", CACHE, graph.interleaved_rotation, LOGIT, *FAR, TOP1, UPDATE
    ),
    in_graph(
        "positions in float16",
        "fp16",
        "kl_max",
        graph.positions_in_float16,
        LOGIT,
        *MEANS,
        "cosine_distance_max",
        CACHE,
        "own_kl_mean",
    ),
    in_graph(
        "angles of row 0 for every row",
        "int8",
        "own_kl_mean",
        graph.angles_of_row_0,
        "own_relative_error_mean",
    ),
    in_graph("query head h reads key head h % K", "fp32", LOGIT, graph.tiled_groups, *FAR, TOP1, UPDATE),
    in_graph("query scaled twice", "fp16", UPDATE, graph.scaled_twice, LOGIT, *MEANS, *FAR, TOP1, *OWN),
    in_graph(
        "epsilon times 100",
        "fp16",
        "kl_mean",
        graph.epsilon_times_100,
        WRONG,
        "relative_error_mean",
        CACHE,
        "own_relative_error_mean",
        "own_kl_mean",
    ),
    in_graph("gate and up swapped", "fp32", UPDATE, graph.gate_and_up_swapped, LOGIT, *FAR, TOP1),
    in_graph("GELU for SiLU", "fp16", UPDATE, graph.gelu_for_silu, *MEANS, *FAR, TOP1, *OWN),
    in_graph("MLP beside attention", "fp32", UPDATE, graph.mlp_beside_attention, LOGIT, *FAR, TOP1),
    in_graph("an activation past float16", "fp16", ACTIVATION, graph.past_float16, WRONG),
    in_weights(
        "one exponent bit flipped",
        "fp16",
        WRONG,
        files.bit_flipped(Q, 11, 6),
        HIDDEN,
        LOGIT,
        *MEANS,
        *FAR,
        TOP1,
        UPDATE,
        *OWN,
    ),
    in_weights("one last bit flipped", "bf16", WRONG, files.bit_flipped(V, 0, 0)),
    in_weights(
        "weights of keys and values swapped",
        "fp16",
        WRONG,
        files.exchanged(K, V),
        LOGIT,
        *MEANS,
        *FAR,
        TOP1,
        UPDATE,
        CACHE,
        *OWN,
    ),
    replace(
        in_weights(
            "one layer's weights of another",
            "fp16",
            WRONG,
            files.exchanged(GATE, OTHER_GATE),
            LOGIT,
            *MEANS,
            *FAR,
            TOP1,
            UPDATE,
            *OWN,
        ),
        layers=2,
    ),
    in_weights(
        "rows in Mistral's rotary order",
        "fp16",
        WRONG,
        files.pairs_of_neighbours,
        LOGIT,
        *MEANS,
        *FAR,
        TOP1,
        UPDATE,
        CACHE,
        *OWN,
    ),
    in_weights(
        "head tied to the embedding",
        "fp16",
        WRONG,
        files.head_of_the_embedding,
        LOGIT,
        *MEANS,
        *FAR,
        TOP1,
        *OWN,
    ),
    in_weights("two tokens' rows of the head exchanged", "int8", WRONG, files.head_rows_exchanged),
    in_weights("wrong tokenizer", "fp16", WRONG, files.wrong_tokenizer),
    in_runtime("cache not carried", "fp32", VISIBLE, runtime.all_forgotten, LOGIT, *FAR, TOP1),
    in_runtime(
        "last values not carried", "fp16", LOGIT, runtime.last_values_forgotten, *MEANS, *FAR, TOP1, *OWN
    ),
    in_runtime("positions count from one", "fp32", LOGIT, runtime.positions_from_one, CALLS, HIDDEN, *FAR),
    in_runtime("positions repeat", "fp32", LOGIT, runtime.positions_repeated, HIDDEN, VISIBLE, *FAR, TOP1),
    in_runtime(
        "last_token_index off by one", "fp16", LOGIT, runtime.earlier_logits, *MEANS, *FAR, TOP1, *OWN
    ),
    in_runtime(
        "padding counted as tokens", "fp32", LOGIT, runtime.padding_counted, CALLS, HIDDEN, VISIBLE, *FAR
    ),
    in_runtime(
        "row kept after eviction",
        "fp32",
        LOGIT,
        runtime.row_kept_after_eviction,
        CALLS,
        HIDDEN,
        VISIBLE,
        *FAR,
    ),
    in_runtime("idle row overwritten", "fp32", LOGIT, runtime.idle_row_overwritten, *FAR),
    in_runtime("idle row overwritten", "int8", HIDDEN, runtime.idle_row_overwritten, "own_kl_mean"),
    in_runtime("rows' logits mixed", "fp8", "own_kl_mean", runtime.rows_mixed, "own_relative_error_mean"),
    in_runtime(
        "tokens of the row before",
        "int4",
        "own_kl_mean",
        runtime.tokens_of_the_row_before,
        "own_relative_error_mean",
    ),
    in_runtime("rows' logits exchanged", "fp32", LOGIT, runtime.rows_exchanged, VISIBLE, *FAR),
    in_runtime("every prefill to row 0", "fp32", LOGIT, runtime.chunks_to_row_0, VISIBLE, *FAR),
    in_runtime("chunk edges ignored", "fp32", CALLS, runtime.chunk_edges_ignored),
    in_runtime("NaN at one position", "fp16", CALLS, runtime.nan_at_50),
    in_codes(
        "a scale times 2",
        "int8",
        WRONG,
        files.scale_times(2, f"{Q}_scale"),
        "own_kl_mean",
        "own_top1_agreement",
    ),
    in_codes("one scale for all channels", "int8-weight-only", WRONG, files.one_scale_for_all),
    in_codes(
        "each scale of the channel after it",
        "int8-weight-only",
        WRONG,
        files.scales_shifted,
        TOP1,
        UPDATE,
        CACHE,
        *OWN,
    ),
    in_codes("each block with the scales of the block before it", "int4", WRONG, files.blocks_shifted, *OWN),
    in_codes("INT4 nibbles swapped", "int4", WRONG, files.nibbles_swapped, TOP1, UPDATE, CACHE, *OWN),
    in_codes("a bit of a code flipped", "fp8", WRONG, files.bit_flipped(GATE, 5, 6)),
    in_codes(
        "input clipped by a step 8 times too small",
        "int8",
        UPDATE,
        files.input_step_times(1 / 8),
        "kl_mean",
        TOP1,
        CACHE,
    ),
    in_codes(
        "input clipped by a step 8 times too small",
        "fp8",
        USED_MOST,
        files.input_step_times(1 / 8),
        TOP1,
        UPDATE,
    ),
    in_codes("an input's step 8 times too large", "int8", USED_LEAST, files.input_step_times(8)),
    in_codes("an input's step 8 times too large", "fp8", USED_LEAST, files.input_step_times(8)),
    in_codes(
        "an input's step of 1e-38", "int8", USED_MOST, files.scale_of(files.DOWN_STEP, 1e-38), "kl_mean", TOP1
    ),
    in_codes(
        "an input's step of 1e-38",
        "fp8",
        USED_MOST,
        files.scale_of(files.DOWN_STEP, 1e-38),
        TOP1,
        *OWN,
    ),
)


def table() -> str:
    """The faults as a Markdown table, in the same order."""
    return "\n".join(_rows())


def _rows() -> Iterator[str]:
    yield "| planted fault | in | precision | caught by | also by |"
    yield "| --- | --- | --- | --- | --- |"
    for fault in MUTATIONS:
        also = ", ".join(f"`{gate}`" for gate in fault.also) or "-"
        yield f"| {fault.name} | {fault.where} | {fault.precision} | `{fault.gate}` | {also} |"


if __name__ == "__main__":
    print(table())
