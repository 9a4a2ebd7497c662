"""The decoder as a torch module: its ring against brute force, its numbers against transformers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm, MistralRotaryEmbedding

from mistral_trt.contract import GraphContract, Ring, plan_contract
from mistral_trt.export import decoder as decoders
from mistral_trt.export.checkpoint import Checkpoint, expected_shapes
from mistral_trt.export.decoder import (
    MLP,
    Attention,
    Decoder,
    RMSNorm,
    RotaryAngles,
    held_positions,
    visible_slots,
    write_slot,
)
from tests.conftest import Folder
from tests.rings import Call, calls, full_chunks, simulate

TOKENS = torch.from_numpy(np.random.default_rng(3).integers(0, 97, (1, 60)))
rings = st.builds(Ring, st.integers(1, 24), st.integers(1, 8))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these matrices of 64 by 64 take, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def positions(starts: list[int], width: int) -> Tensor:
    """position_ids [B, S] of rows that start at `starts`."""
    return torch.tensor(starts)[:, None] + torch.arange(width)


# ---------------------------------------------------------------- the ring


@given(st.data(), rings)
def test_torch_and_integers_say_the_same(data: st.DataObject, ring: Ring) -> None:
    starts = data.draw(st.lists(st.integers(0, 2**24), min_size=1, max_size=3))
    width = data.draw(st.integers(1, min(ring.room_in_chunk(start) for start in starts)))
    position_ids = positions(starts, width)
    held, mask = held_positions(position_ids, ring), visible_slots(position_ids, ring)
    assert (held.shape, mask.shape) == ((len(starts), ring.capacity), (len(starts), 1, width, ring.capacity))
    assert (held.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert write_slot(position_ids, ring).tolist() == [ring.cache_slot(start) for start in starts]
    for row, start in enumerate(starts):
        said = [ring.held_position(slot, start + width - 1) for slot in range(ring.capacity)]
        assert held[row].tolist() == said
        for i in range(width):
            assert mask[row, 0, i].tolist() == [ring.visible(start + i, h) for h in said]


def check_brute_force(ring: Ring, history: list[Call]) -> None:
    """Each query's mask picks, out of slots that were really written, exactly the tokens of its window."""
    for call, slots in simulate(ring, history):
        position_ids = positions([call.start], call.width)
        first = int(decoders.write_slot(position_ids, ring)[0])
        written = slots[first : first + call.width]
        assert written == position_ids[0].tolist(), "the write does not land where its positions belong"
        mask = decoders.visible_slots(position_ids, ring)[0, 0, : call.tokens]
        for query, row in enumerate(mask.tolist(), start=call.start):
            attended = {slots[slot] for slot, visible in enumerate(row) if visible}
            assert attended == set(range(max(0, query - ring.sliding_window + 1), query + 1))


@given(st.data(), rings)
def test_masks_pick_the_window_out_of_a_written_ring(data: st.DataObject, ring: Ring) -> None:
    check_brute_force(ring, data.draw(calls(ring)))


def wider(position_ids: Tensor, ring: Ring) -> Tensor:
    held = held_positions(position_ids, ring)[:, None, None, :]
    query = position_ids[:, None, :, None]
    return (held >= 0) & (held <= query) & (held >= query - ring.sliding_window)


def narrower(position_ids: Tensor, ring: Ring) -> Tensor:
    held = held_positions(position_ids, ring)[:, None, None, :]
    query = position_ids[:, None, :, None]
    return (held >= 0) & (held <= query) & (held > query - ring.sliding_window + 1)


def missing(position_ids: Tensor, ring: Ring) -> Tensor:
    return torch.ones_like(visible_slots(position_ids, ring))


def acausal(position_ids: Tensor, ring: Ring) -> Tensor:
    held = held_positions(position_ids, ring)[:, None, None, :]
    return ((held >= 0) & (held > position_ids[:, None, :, None] - ring.sliding_window)).contiguous()


def next_slot(position_ids: Tensor, ring: Ring) -> Tensor:
    return torch.remainder(position_ids[:, 0] + 1, ring.capacity)


def start_of_slots(position_ids: Tensor, ring: Ring) -> Tensor:
    """As if the ring held W slots, not R."""
    return torch.remainder(position_ids[:, 0], ring.sliding_window)


def held_off_by_one(position_ids: Tensor, ring: Ring) -> Tensor:
    return held_positions(position_ids, ring) + 1


MUTATIONS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "window one wider": ("visible_slots", wider),
    "window one narrower": ("visible_slots", narrower),
    "mask missing": ("visible_slots", missing),
    "mask not causal": ("visible_slots", acausal),
    "slot off by one": ("write_slot", next_slot),
    "slot modulo W": ("write_slot", start_of_slots),
    "held off by one": ("held_positions", held_off_by_one),
}


@pytest.mark.parametrize(("function", "wrong"), MUTATIONS.values(), ids=MUTATIONS)
def test_brute_force_finds_each_mutation(
    monkeypatch: pytest.MonkeyPatch, function: str, wrong: Callable[..., Tensor]
) -> None:
    check_brute_force(Ring(6, 4), full_chunks(Ring(6, 4)))
    monkeypatch.setattr(decoders, function, wrong)
    with pytest.raises(AssertionError):
        check_brute_force(Ring(6, 4), full_chunks(Ring(6, 4)))


# ---------------------------------------------------------------- the whole module, without ONNX


def scatter(ring: Tensor, update: Tensor, first_slot: Tensor) -> Tensor:
    """TensorScatter of ONNX in torch: exists here alone, as the graph has the operator itself."""
    written = ring.clone()
    for row, start in enumerate(first_slot.tolist()):
        written[row, :, start : start + update.shape[2]] = update[row]
    return written


def feed(decoder: Decoder, contract: GraphContract, chunks: list[tuple[int, int]]) -> Tensor:
    """Logits [T, V] of TOKENS fed in chunks (start, width), the rings carried through."""
    rings = [torch.zeros(1, *(int(d) for d in spec.shape[1:])) for spec in contract.past()]
    logits = []
    with torch.inference_mode():
        for start, width in chunks:
            ids = TOKENS[:, start : start + width]
            out, *rings = decoder(ids, positions([start], width), torch.arange(width)[None], *rings)
            logits.append(out[0])
    return torch.cat(logits)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Folder) -> tuple[Decoder, GraphContract, Tensor]:
    """The decoder with a checkpoint's weights, its contract, and transformers' logits for TOKENS."""
    folder = tiny_checkpoint()
    contract = plan_contract(Checkpoint.open(folder).config, precision="fp32", prefill_chunk=4)
    decoder = Decoder(contract).eval()
    decoder.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    reference = MistralForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        return decoder, contract, reference(TOKENS).logits[0]


@pytest.fixture
def torch_scatter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoders, "write_ring", scatter)
    yield


CHUNKS = {
    "token by token": [(p, 1) for p in range(60)],
    "full chunks": [(p, 4) for p in range(0, 60, 4)],
    "uneven": [(0, 3), (3, 1), (4, 2), (6, 2), (8, 4), *((p, 1) for p in range(12, 60))],
}


@pytest.mark.usefixtures("torch_scatter")
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_it_computes_what_transformers_computes_over_seven_windows(
    loaded: tuple[Decoder, GraphContract, Tensor], chunks: list[tuple[int, int]]
) -> None:
    decoder, contract, reference = loaded
    assert contract.ring.capacity == 12
    assert (feed(decoder, contract, chunks) - reference).abs().max() < 1e-5


def unrotated(self: Attention, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    if x.shape[1] == self.key_heads:
        return x
    return torch.onnx.ops.rotary_embedding(x, rotary[0], rotary[1])


@pytest.mark.usefixtures("torch_scatter")
@pytest.mark.parametrize("mutation", [*MUTATIONS, "unrotated keys", "chunk crosses the ring's end"])
def test_that_comparison_finds_each_mutation(
    loaded: tuple[Decoder, GraphContract, Tensor], monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    decoder, contract, reference = loaded
    chunks = CHUNKS["full chunks"]
    if mutation == "unrotated keys":
        monkeypatch.setattr(Attention, "rotate", unrotated)
    elif mutation == "chunk crosses the ring's end":
        chunks = [(0, 3), *((p, 4) for p in range(3, 59, 4)), (59, 1)]
        monkeypatch.setattr(decoders, "write_ring", clamped)
    else:
        monkeypatch.setattr(decoders, *MUTATIONS[mutation])
        if mutation.startswith("slot"):
            monkeypatch.setattr(decoders, "write_ring", clamped)
    assert (feed(decoder, contract, chunks) - reference).abs().max() > 1e-3


def clamped(ring: Tensor, update: Tensor, first_slot: Tensor) -> Tensor:
    """A scatter that, asked to write past the end, writes as much as there is room for."""
    written = ring.clone()
    for row, start in enumerate(first_slot.tolist()):
        room = ring.shape[2] - start
        written[row, :, start : start + update.shape[2]] = update[row, :, :room]
    return written


@pytest.mark.usefixtures("torch_scatter")
def test_logits_index_picks_tokens_and_changes_nothing_else(
    loaded: tuple[Decoder, GraphContract, Tensor],
) -> None:
    decoder, contract, _ = loaded
    rings = [torch.zeros(1, *(int(d) for d in spec.shape[1:])) for spec in contract.past()]
    with torch.inference_mode():
        every = decoder(TOKENS[:, :4], positions([0], 4), torch.arange(4)[None], *rings)
        some = decoder(TOKENS[:, :4], positions([0], 4), torch.tensor([[3, 1]]), *rings)
    assert some[0].shape == (1, 2, 97)
    torch.testing.assert_close(some[0], every[0][:, [3, 1]])
    assert all(torch.equal(a, b) for a, b in zip(some[1:], every[1:], strict=True))


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_parameters_have_the_names_and_shapes_of_the_checkpoint(
    tiny_checkpoint: Folder, tied: bool, precision: str
) -> None:
    config = Checkpoint.open(tiny_checkpoint(num_hidden_layers=1, tie_word_embeddings=tied)).config
    contract = plan_contract(config, precision=precision)
    with torch.device("meta"):
        parameters = dict(Decoder(contract).named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == expected_shapes(config)
    assert {p.dtype for p in parameters.values()} == {getattr(torch, contract.cache_dtype)}


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_angles_equal_those_of_transformers_bit_for_bit(theta: float) -> None:
    position_ids = positions([0, 4093, 2**20], 7)
    config = MistralConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope(theta), num_hidden_layers=1
    )
    expected = MistralRotaryEmbedding(config)(torch.zeros(1), position_ids)
    found = RotaryAngles(16, theta, torch.float32)(position_ids)
    for have, want in zip(found, expected, strict=True):
        assert torch.equal(have, want[..., :8])
    other = RotaryAngles(16, theta * 1.001, torch.float32)(position_ids)
    assert not torch.equal(other[0], found[0])


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


@pytest.mark.parametrize(("position", "error"), [(4096, 1e-3), (32768, 5e-3), (2**20, 0.1)])
def test_the_error_of_float32_angles_is_as_said(position: int, error: float) -> None:
    frequency = 10000.0 ** -(np.arange(0, 128, 2, dtype=np.float64) / 128)
    cos, sin = RotaryAngles(128, 10000.0, torch.float32)(torch.tensor([[position]]))
    exact = position * frequency
    assert np.abs(cos[0, 0].numpy() - np.cos(exact)).max() < error
    assert np.abs(sin[0, 0].numpy() - np.sin(exact)).max() < error


def test_angles_are_rounded_only_after_they_are_computed() -> None:
    position_ids = positions([30_001], 3)
    exact = RotaryAngles(16, 10000.0, torch.float32)(position_ids)
    for dtype in (torch.float16, torch.bfloat16):
        found = RotaryAngles(16, 10000.0, dtype)(position_ids)
        assert all(torch.equal(have, want.to(dtype)) for have, want in zip(found, exact, strict=True))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_the_norm_equals_that_of_transformers(eps: float) -> None:
    x, weight = torch.randn(2, 3, 64), torch.randn(64)
    ours, theirs = RMSNorm(64, eps, torch.float32), MistralRMSNorm(64, eps)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(RMSNorm(64, eps * 1.5, torch.float32).requires_grad_(False)(x), theirs(x))


def test_the_mlp_equals_that_of_transformers(loaded: tuple[Decoder, GraphContract, Tensor]) -> None:
    ours = MLP(loaded[1], torch.float32)
    theirs = MistralMLP(MistralConfig(hidden_size=64, intermediate_size=96))  # type: ignore[no-untyped-call]
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(ours(x), theirs(x))
