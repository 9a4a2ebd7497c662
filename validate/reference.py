"""Checkpoint + tokens → the logits the artifact should give: Hugging Face's MistralForCausalLM in float32.

The reference reads the checkpoint and never the artifact. Attention is eager, one forward covers the whole
sequence, and no cache is involved. What is kept is the last hidden state; logits are made from it for the
positions that are asked for, because all of them together outgrow the model (T=2,304, V=49,152: 450 MB).
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import MistralConfig, MistralForCausalLM

from mistral_trt.engines.budget import available_memory_bytes
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import Manifest


@dataclass(frozen=True)
class Reference:
    """What the checkpoint computes for one sequence.

    hidden: float32 [T, hidden_size], after the final norm.  head: float32 [V, hidden_size].
    """

    hidden: torch.Tensor
    head: torch.Tensor

    def logits(self, start: int, stop: int) -> np.ndarray:
        """Logits at positions start…stop-1: float32 [stop - start, V]."""
        with torch.inference_mode():
            logits: np.ndarray = (self.hidden[start:stop] @ self.head.T).numpy()
        return logits


def run_reference(checkpoint: Path, tokens: Sequence[int], *, sliding_window: int) -> Reference:
    """One teacher-forced forward over all tokens.

    sliding_window: W, the query's own token included, whatever config.json says.
    Raises ValidationError if the checkpoint does not load whole or needs more memory than there is.
    """
    model = load_model(checkpoint, sliding_window=sliding_window)
    with torch.inference_mode():
        input_ids = torch.tensor([list(tokens)])  # [1, T]
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[0]  # [T, hidden_size]
        head = model.lm_head.weight.detach()  # [V, hidden_size]
    if not torch.isfinite(hidden).all():
        raise ValidationError(f"{checkpoint}: the reference itself gives NaN or infinity; it proves nothing")
    return Reference(hidden, head)


def load_model(checkpoint: Path, *, sliding_window: int) -> MistralForCausalLM:
    """The checkpoint in Hugging Face's class: float32, eager, no code and nothing from the network."""
    config = MistralConfig.from_pretrained(checkpoint, local_files_only=True)
    config.sliding_window = sliding_window
    with quiet_transformers():
        result: Any = MistralForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    model: MistralForCausalLM = result[0]
    loaded: dict[str, Any] = result[1]
    absent = sorted({*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])})
    if absent:
        raise ValidationError(f"{checkpoint}: the reference did not load {absent[0]} from its files")
    return model  # from_pretrained leaves it in evaluation mode


def require_same_checkpoint(manifest: Manifest, source: Checkpoint) -> None:
    """Raise ValidationError unless the artifact was made from this checkpoint, unaltered since."""
    made_from = manifest.sources.get("checkpoint")
    found = source.sha256()
    if made_from != found:
        raise ValidationError(
            f"{source.folder} is not the checkpoint this artifact was made from: its hash is {found[:12]}…, "
            f"the artifact's manifest names {str(made_from)[:12]}…; pass the right one as --reference, or "
            "export again"
        )


def require_memory(source: Checkpoint, length: int) -> None:
    """Raise ValidationError if the float32 reference over `length` tokens would not fit in memory.

    Eager attention keeps the scores of one layer, [H, T, T], about 2.5 times over.
    """
    weights = 4 * sum(tensor.elements for tensor in source.tensors.values())
    scores = int(2.5 * 4 * source.config.num_attention_heads * length**2)
    present = available_memory_bytes()
    if weights + scores > present:
        remedy = "a smaller --length" if weights < 0.9 * present else "a machine with more memory"
        raise ValidationError(
            f"the float32 reference of {source.folder} needs {weights / 1e9:.1f} GB for weights and "
            f"{scores / 1e9:.1f} GB for attention over {length} tokens (predicted), {present / 1e9:.1f} GB "
            f"is available; use {remedy}"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no remarks from transformers while it loads; ours say what happens."""
    chatter: Any = transformers.utils.logging
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.ERROR)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()
