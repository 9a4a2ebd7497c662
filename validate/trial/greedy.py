"""A prompt → what the artifact goes on to say, and how long the reference would have said the same.

Teacher forcing asks what a token's error is; here errors may pile up, because each token that was chosen
is fed back. The reference then reads prompt and continuation in one forward.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from mistral_trt.runtime.cache import RollingCache
from mistral_trt.validate.findings import Divergence, GreedyAgreement
from mistral_trt.validate.reference.hugging_face import Reference

_PROMPT_TOKENS = 64
_GENERATED_TOKENS = 64


def split(length: int) -> tuple[int, int]:
    """Tokens of the prompt and of the continuation, at least one each and together at most `length`.

    2312 -> 64, 64; 100 -> 25, 64; 12 -> 3, 9; 2 -> 1, 1
    """
    prompt = max(1, min(_PROMPT_TOKENS, length // 4))
    return prompt, min(_GENERATED_TOKENS, length - prompt)


def continue_greedily(cache: RollingCache, prompt: Sequence[int], count: int) -> Iterator[int]:
    """Yield `count` tokens, each the artifact's first choice; none of them ends the text."""
    row = cache.acquire()
    try:
        logits = cache.append(row, prompt)
        for left in range(count - 1, -1, -1):
            token = int(logits.argmax())
            yield token
            if left:
                logits = cache.step({row: token})[row]
    finally:
        cache.release(row)


def greedy_agreement(
    reference: Reference, generated: Sequence[int], *, prompt_tokens: int
) -> GreedyAgreement:
    """Hold a continuation against the reference's forward over prompt and continuation.

    Where the reference ranks two tokens first exactly alike, either is its choice.
    """
    count = len(generated)
    logits = reference.logits(prompt_tokens - 1, prompt_tokens - 1 + count)  # [count, V]
    margins = logits.max(axis=-1) - logits[np.arange(count), list(generated)]  # [count]
    apart = np.flatnonzero(margins > 0)
    if not len(apart):
        return GreedyAgreement(prompt_tokens, count, count, None)
    first = int(apart[0])
    chosen, token = int(logits[first].argmax()), int(generated[first])
    found = Divergence(prompt_tokens + first, token, chosen, float(margins[first]))
    return GreedyAgreement(prompt_tokens, count, first, found)
