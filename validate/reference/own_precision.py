"""A reference → the same reference with its numbers rounded as the artifact's are.

It shows what rounding alone does, so that rounding is not blamed on the graph. Parameters and activations
are cast as Hugging Face does for a model loaded in that dtype; norms, softmax and rotary angles are float32
inside. Products are summed in float32 and rounded once, as a GPU does: PyTorch's own float16 products take
3 to 30 times longer on a CPU, and not every CPU has bfloat16 ones.

Not every runtime rounds every activation, hence `Rounding`.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import MistralConfig

from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.validate.reference.decoder import SCORE_BYTES, HuggingFaceLayers, LayerSource

Alter = Callable[[nn.Module, int], nn.Module]
"""A decoder layer and its index → the layer with its linears replaced (fake quantization)."""

AlterHead = Callable[[nn.Linear, nn.Module], nn.Module]
"""The lm_head and the norm before it → the same lm_head, or what rounds as the artifact's does: it has
`entering`, what its `weight` is multiplied with, of what the norm gives."""

Rounding = Literal["all", "attention", "parameters"]
"""Which numbers are rounded, parameters always.

all: every activation, as Hugging Face's eager model does.  attention: what goes into the attention, its
queries, keys, values and what it gives; the rest is float32, as in ONNX Runtime on a CPU, which computes
linears, norms after the first and the MLP of a float16 graph in float32.  parameters: no activation, as in
the float32 twin of a bf16 artifact.
"""

_WORDS: dict[Rounding, str] = {
    "all": "parameters and activations in {dtype}, norms and softmax float32 inside",
    "attention": "parameters and the attention's input, queries, keys, values and output in {dtype}, all "
    "else in float32, as ONNX Runtime computes on a CPU",
    "parameters": "parameters rounded to {dtype} and activations in float32",
}
_PRODUCTS = (F.linear, torch.matmul, F.scaled_dot_product_attention)
_HALF = (torch.float16, torch.bfloat16)
Module = TypeVar("Module", bound=nn.Module)


def own_precision_layers(
    source: LayerSource,
    *,
    precision: str,
    rounding: Rounding,
    alter: Alter | None = None,
    alter_head: AlterHead | None = None,
    score_bytes: int = SCORE_BYTES,
) -> HuggingFaceLayers:
    """The layers of a float32 source in the precision of an artifact.

    alter: what the precision does to the linears beyond the dtype. It is given a copy of the layer in float32
    and may alter it; what it puts in is not cast, and gives back its input's dtype.  alter_head: the same for
    the lm_head.
    Raises ValueError for fp32, whose own precision is the reference itself.
    """
    if precision == "fp32":
        raise ValueError("expected a precision below fp32: the own precision of fp32 is the reference itself")
    rounded = _Rounded(source, getattr(torch, CACHE_DTYPES[precision]), rounding, alter, alter_head)
    quantized = f", linears quantized as {precision} has them" if alter else ""
    words = "Hugging Face's decoder layers: " + _WORDS[rounding].format(dtype=CACHE_DTYPES[precision])
    return HuggingFaceLayers(
        rounded, words=words + quantized, dtype=rounded.activations, score_bytes=score_bytes
    )


class _Rounded:
    """A source of layers whose parameters are rounded to `base`."""

    def __init__(
        self,
        source: LayerSource,
        base: torch.dtype,
        rounding: Rounding,
        alter: Alter | None,
        alter_head: AlterHead | None,
    ) -> None:
        self.activations = base if rounding == "all" else torch.float32
        self.rotary = source.rotary
        self.config: MistralConfig = copy.deepcopy(source.config)
        if rounding == "attention":
            self.config._attn_implementation = "sdpa"  # one product, whose scores are not rounded
        self._source, self._base, self._rounding, self._alter = source, base, rounding, alter
        self._alter_head = alter_head

    def embed(self, ids: Tensor) -> Tensor:
        return self._source.embed(ids).to(self._base).to(self.activations)

    def layer(self, index: int) -> nn.Module:
        layer: Any = copy.deepcopy(self._source.layer(index))
        layer.self_attn.config = self.config
        own = set(layer.modules())
        layer = layer if self._alter is None else self._alter(layer, index)
        for name, module in layer.named_modules():
            if module in own and not list(module.children()):
                module.to(self._base).to(self._computes_in(name))
        if self._rounding == "attention":
            layer.self_attn.o_proj = _Widened(layer.self_attn.o_proj)
            layer.self_attn.register_forward_pre_hook(self._narrow, with_kwargs=True)
        return _SummedInFloat32(layer)

    def _computes_in(self, name: str) -> torch.dtype:
        """The dtype of a layer's submodule, its parameters once rounded."""
        narrow = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return self._base if self._rounding == "attention" and name in narrow else self.activations

    def norm(self) -> nn.Module:
        """What it gives is multiplied with the weight of `lm_head`."""
        norm = self._cast(self._source.norm())
        return norm if self._altered_head is None else nn.Sequential(norm, _Entering(self._altered_head))

    def lm_head(self) -> Any:
        return self._cast(self._source.lm_head()) if self._altered_head is None else self._altered_head

    @cached_property
    def _altered_head(self) -> nn.Module | None:
        """None where the artifact's is not quantized."""
        if self._alter_head is None:
            return None
        head = self._source.lm_head()
        altered = self._alter_head(head, self._source.norm())
        return None if altered is head else altered

    def _cast(self, module: Module) -> Module:
        """A copy: the source's own module is the float32 reference's too."""
        return copy.deepcopy(module).to(self._base).to(self.activations)

    def _narrow(
        self, attention: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the attention is called with, in the base dtype."""
        hidden = options["hidden_states"].to(self._base)
        rotary = tuple(angles.to(self._base) for angles in options["position_embeddings"])
        return args, {**options, "hidden_states": hidden, "position_embeddings": rotary}


class _Entering(nn.Module):
    """What a head is given, as its weight is multiplied with it."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self._enter = head.entering

    def forward(self, x: Tensor) -> Any:
        return self._enter(x)


class _Widened(nn.Module):
    """A linear that is given float32."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Any:
        return self.linear(x.float())


class _SummedInFloat32(nn.Module):
    """A layer whose half-precision products are summed in float32 and rounded once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **options: Any) -> Any:
        with WideProducts():
            return self.layer(*args, **options)


class WideProducts(TorchFunctionMode):
    """While it is entered, products of float16 or bfloat16 are computed in float32 and rounded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS or args[0].dtype not in _HALF:
            return func(*args, **(kwargs or {}))
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **named).to(args[0].dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
