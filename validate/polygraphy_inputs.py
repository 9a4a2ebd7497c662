"""ONNX folder → inputs for Polygraphy: calls past the ring's turns, with rings that ONNX Runtime filled.

The tokens are those of `mistral-trt validate`: the text that comes along where there is a tokenizer, else
seeded random ones. Polygraphy calls a graph once and carries nothing, so each feed brings its rings.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mistral_trt.errors import ValidationError
from mistral_trt.manifest import Manifest, read_manifest
from mistral_trt.runtime.cache import RollingCache, RowSnapshot
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.budget import DEFAULT
from mistral_trt.validate.scenarios.poke import late_edge
from mistral_trt.validate.scenarios.tokens import TEXT, Tokens, random_tokens, text_tokens

Feed = dict[str, np.ndarray]


def decode(folder: Path) -> Iterator[Feed]:
    """Decode steps past two turns of the ring: of one row, then of max_batch_size rows at once.

    The rows stand one position apart, so each writes another slot.
    """
    cache, tokens, edge = _opened(folder)
    rows = cache.contract.max_batch_size
    states = list(_states(cache, tokens, range(edge, edge + rows)))
    for taken in [states[:1]] if rows == 1 else [states[:1], states]:
        positions = [[state.position] for state in taken]
        yield _feed(cache, [[tokens.ids[p]] for (p,) in positions], positions, [[0]] * len(taken), taken)


def prefill(folder: Path) -> Iterator[Feed]:
    """Chunks past two turns of the ring: a whole one, all logits; half of one, the last token's."""
    cache, tokens, edge = _opened(folder)
    (state,) = _states(cache, tokens, [edge])
    chunk = min(cache.contract.ring.prefill_chunk, len(tokens.ids) - edge)
    half = max(1, chunk // 2)
    for size, index in ((chunk, list(range(chunk))), (half, [half - 1])):
        positions = list(range(edge, edge + size))
        yield _feed(cache, [list(tokens.ids[edge : edge + size])], [positions], [index], [state])


def input_tokens(folder: Path, manifest: Manifest) -> Tokens:
    """The tokens `mistral-trt validate` takes without further options."""
    contract = manifest.contract
    length, vocab_size = DEFAULT.length(contract), contract.config.vocab_size
    if "tokenizer.json" in manifest.files:
        return text_tokens(Tokenizer.from_folder(folder), TEXT, length=length, vocab_size=vocab_size)
    return random_tokens(length=length, vocab_size=vocab_size, seed=0)


def _opened(folder: Path) -> tuple[RollingCache, Tokens, int]:
    """The graph in ONNX Runtime, its tokens, and the position of the calls."""
    manifest = read_manifest(folder, "onnx", check_files=False)
    contract = manifest.contract
    tokens = input_tokens(folder, manifest)
    edge = late_edge(contract, len(tokens.ids))
    last = edge + contract.max_batch_size
    if last > len(tokens.ids):
        raise ValidationError(
            f"{folder}: {last} positions are needed and its context ends at {len(tokens.ids)}; export with a "
            "larger one: mistral-trt export CHECKPOINT --max-context TOKENS --out ONNX_DIR"
        )
    return open_cache(folder, trust_weights=True, exact=True), tokens, edge


def _states(cache: RollingCache, tokens: Tokens, positions: range | list[int]) -> Iterator[RowSnapshot]:
    """What a row holds before each of these positions, which follow one another."""
    row = cache.acquire()
    for position in positions:
        if ahead := tokens.ids[cache.position(row) : position]:
            cache.append(row, ahead)
        yield cache.snapshot(row)
    cache.release(row)


def _feed(
    cache: RollingCache,
    ids: list[list[int]],
    positions: list[list[int]],
    index: list[list[int]],
    states: list[RowSnapshot],
) -> Feed:
    """One call.  ids, positions: [B, S].  index: [B, N].  states: of the B rows."""
    contract = cache.contract
    steps = zip(contract.step_inputs(), (ids, positions, index), strict=True)
    feed = {spec.name: np.asarray(values, np.int64) for spec, values in steps}
    rings = zip(contract.past(), *(state.rings for state in states), strict=True)
    return {**feed, **{spec.name: np.stack(rows) for spec, *rows in rings}}
