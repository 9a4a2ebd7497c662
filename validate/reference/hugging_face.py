"""Checkpoint + tokens → the logits the artifact should give: Hugging Face's MistralForCausalLM in float32.

The reference reads the checkpoint and never the artifact; adapters are merged by peft. Attention is eager,
over every key of the sequence, and nothing of it is a ring. What is kept is the last hidden state; logits are
made from it for the positions that are asked for, because all of them together outgrow the model
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

from mistral_trt.errors import ValidationError, require
from mistral_trt.export.checkpoint import EMBEDDING, Checkpoint
from mistral_trt.export.conversion import pieces
from mistral_trt.export.lora import Adapter
from mistral_trt.manifest import Manifest
from mistral_trt.progress import Advance
from mistral_trt.validate.reference.decoder import (
    HuggingFaceLayers,
    head_logits,
    whole_layers,
)


@dataclass(frozen=True)
class Reference:
    """What the checkpoint computes for one sequence.

    hidden: [T, hidden_size], after the final norm.  head: [V, hidden_size].  Both in the dtype of the
    reference, which is float32 unless it computes in an artifact's own precision.
    """

    hidden: torch.Tensor
    head: torch.Tensor

    def logits(self, start: int, stop: int) -> np.ndarray:
        """Logits at positions start…stop-1: float32 [stop - start, V]."""
        return head_logits(self.hidden[start:stop], self.head)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Logits at positions int64 [n]: float32 [n, V]."""
        return head_logits(self.hidden[torch.from_numpy(positions)], self.head)


def run_reference(model: MistralForCausalLM, tokens: Sequence[int]) -> Reference:
    """Teacher-forced over all tokens; of the model, the result keeps the head alone.

    Raises ValidationError if what it gives is not finite.
    """
    return run_layers(whole_layers(model), tokens)


def run_layers(
    layers: HuggingFaceLayers, tokens: Sequence[int], *, advance: Advance = lambda layers: None
) -> Reference:
    """Every layer over all tokens, in any precision.  advance: called after each layer.

    Raises ValidationError if what it gives is not finite.
    """
    hidden = layers.embed(tokens)
    for index in range(layers.num_hidden_layers):
        hidden = layers.run(index, hidden).hidden
        advance(1)
    normed = layers.norm(hidden)
    if not torch.isfinite(normed).all():
        dtype = str(normed.dtype).removeprefix("torch.")
        raise ValidationError(f"the checkpoint itself gives NaN or infinity in {dtype}; it proves nothing")
    return Reference(normed, layers.head())


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
        if not merged:
            raise ValidationError("this artifact was made with no adapter; leave --lora out")
        names = ", ".join(f"{entry['name']} at scale {entry['scale']:g}" for entry in merged)
        raise ValidationError(
            f"this artifact was made with {names}; pass the same, in the same order, as --lora DIR[:SCALE]"
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
