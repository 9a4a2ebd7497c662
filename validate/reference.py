"""Checkpoint + tokens → the logits the artifact should give: Hugging Face's MistralForCausalLM in float32.

The reference reads the checkpoint and never the artifact; adapters are merged by peft. Attention is eager,
one forward covers the whole sequence, and no cache is involved. What is kept is the last hidden state; logits
are made from it for the positions that are asked for, because all of them together outgrow the model
(T=2,304, V=49,152: 450 MB).
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import MistralConfig, MistralForCausalLM

from mistral_trt.engines.planning.host import available_memory_bytes
from mistral_trt.errors import ValidationError, require
from mistral_trt.export.checkpoint import EMBEDDING, Checkpoint
from mistral_trt.export.conversion import pieces
from mistral_trt.export.lora import Adapter
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
        return self.at(np.arange(start, stop))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Logits at positions int64 [n]: float32 [n, V]."""
        with torch.inference_mode():
            logits: np.ndarray = (self.hidden[torch.from_numpy(positions)] @ self.head.T).numpy()
        return logits


def run_reference(model: MistralForCausalLM, tokens: Sequence[int]) -> Reference:
    """One teacher-forced forward over all tokens; of the model, the result keeps the head alone.

    Raises ValidationError if what it gives is not finite.
    """
    with torch.inference_mode():
        input_ids = torch.tensor([list(tokens)])  # [1, T]
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[0]  # [T, hidden_size]
        head = model.lm_head.weight.detach()  # [V, hidden_size]
    if not torch.isfinite(hidden).all():
        raise ValidationError("the checkpoint itself gives NaN or infinity in float32; it proves nothing")
    return Reference(hidden, head)


def load_model(source: Checkpoint, *, sliding_window: int) -> MistralForCausalLM:
    """The checkpoint in Hugging Face's class: float32, eager, no code and nothing from the network.

    sliding_window: W, the query's own token included, whatever config.json says.
    Raises ValidationError if it does not load whole.
    """
    ours = source.format == "mistral" or source.stored_quantization is not None
    load = _load_through_our_reader if ours else _load_hugging_face
    with quiet_transformers():
        model = load(source, sliding_window)
        return _merge(model, source.adapters) if source.adapters else model


def _load_through_our_reader(source: Checkpoint, sliding_window: int) -> MistralForCausalLM:
    """What transformers does not read by itself: Mistral's own format, and quantized weights, which are
    multiplied by their scales."""
    base = Checkpoint.open(source.folder) if source.adapters else source
    settings = {**base.config.to_json(), "sliding_window": sliding_window}
    model: Any = MistralForCausalLM(MistralConfig(**settings))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, weight in base.weights.items():
            parameters[name].copy_(
                torch.cat([piece.reshape(-1) for piece in pieces(weight)]).view(weight.shape)
            )
    whole: MistralForCausalLM = model.eval()
    return whole


def _load_hugging_face(source: Checkpoint, sliding_window: int) -> MistralForCausalLM:
    checkpoint = source.folder
    config = MistralConfig.from_pretrained(checkpoint, local_files_only=True)
    config.sliding_window = sliding_window
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


def _merge(model: MistralForCausalLM, adapters: Sequence[Adapter]) -> MistralForCausalLM:
    """The model with its adapters merged in, by peft: all loaded first, each onto the model as it was."""
    peft: Any = require("peft", "validate")
    for adapter in adapters:
        if EMBEDDING in adapter.replacements:
            model.resize_token_embeddings(adapter.replacements[EMBEDDING].shape[0], mean_resizing=False)
    scales = {f"adapter{i}": adapter.scale for i, adapter in enumerate(adapters)}
    names = list(scales)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what Adapter.open has already judged
        wrapped = peft.PeftModel.from_pretrained(model, str(adapters[0].folder), adapter_name=names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            wrapped.load_adapter(str(adapter.folder), adapter_name=name)
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for name in set(scales) & set(module.scaling):
                    module.scaling[name] *= scales[name]
        merged: MistralForCausalLM = wrapped.merge_and_unload(adapter_names=names).eval()
    return merged


def require_same_checkpoint(manifest: Manifest, source: Checkpoint) -> None:
    """Raise ValidationError unless the artifact was made from this checkpoint, unaltered since."""
    found = source.sources()
    made_from = manifest.sources.get("checkpoint")
    if made_from != found["checkpoint"]:
        raise ValidationError(
            f"{source.folder} is not the checkpoint this artifact was made from: its hash is "
            f"{found['checkpoint'][:12]}…, the artifact's manifest names {str(made_from)[:12]}…; "
            "pass the right one as --reference, or export again"
        )
    if manifest.sources.get("lora") != found.get("lora"):
        merged = manifest.details.get("lora") or []
        names = ", ".join(f"{entry['name']} at scale {entry['scale']:g}" for entry in merged) or "no adapter"
        raise ValidationError(
            f"this artifact was made with {names}; pass the same, in the same order, as --lora DIR[:SCALE]"
        )


def require_memory(source: Checkpoint, length: int) -> None:
    """Raise ValidationError if the float32 reference over `length` tokens would not fit in memory.

    Eager attention keeps the scores of one layer, [H, T, T], about 2.5 times over.
    """
    weights = 4 * sum(weight.elements for weight in source.weights.values())
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
