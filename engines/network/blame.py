"""What TensorRT says of a node → the same with the module of the model that made it.

A node of our graphs is named after its module (`model.layers.3.self_attn/Attention`), and so are weights and
rings, so the name alone tells where in the model to look.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mistral_trt.errors import BuildError

_NAME = re.compile(
    r"(?<![\w./-])(?:"
    r"model\.layers\.(?P<layer>\d+)(?P<inner>(?:\.\w+)*)(?:/\w+)?"
    r"|(?:past_key_values|present)\.(?P<ring>\d+)\.(?P<half>key|value)"
    r"|(?:model\.)?(?P<outer>embed_tokens|norm|rotary|lm_head)(?:\.\w+)*(?:/\w+|(?<=\.weight))"
    r"|model/\w+(?![\w./-])"
    r")"
)
"""Names of nodes, weights and rings; `model.onnx` and other paths are none of them."""

_PARTS = ("weight", "weight_scale", "bias", "input", "input_scale", "output", "pre_quant_scale")
"""What a name has after that of its module."""


def module_of(text: str) -> str | None:
    """The module of the first node, weight or ring that a text names; None where it names none.

    model.layers.3.self_attn.q_proj/MatMul → layer 3, self_attn.q_proj;  present.3.key → layer 3, key ring
    """
    found = _NAME.search(text)
    return None if found is None else _module(found)


def blame(message: str) -> str:
    """A message that begins with the module it is about; unchanged where it names none, or says so already.

    model.layers.3.self_attn/Attention: has no mask
    → layer 3, self_attn (node 'model.layers.3.self_attn/Attention'): has no mask
    """
    found = _NAME.search(message)
    if found is None or message.startswith(f"{_module(found)} ("):
        return message
    name = found[0]
    kind = "node" if "/" in name else "tensor"
    return f"{_module(found)} ({kind} {name!r}): {message.removeprefix(f'{name}: ')}"


@contextmanager
def blaming() -> Iterator[None]:
    """BuildErrors from inside begin with the module of the node they name."""
    try:
        yield
    except BuildError as error:
        raise BuildError(blame(str(error))) from error


def _module(found: re.Match[str]) -> str:
    if found["ring"] is not None:
        return f"layer {found['ring']}, {found['half']} ring"
    if found["outer"] is not None:
        return found["outer"]
    if found["layer"] is None:
        return "positions and mask"  # nodes that are the model's own, and no layer's
    parts = [part for part in found["inner"].split(".") if part]
    while parts and parts[-1] in _PARTS:
        parts.pop()
    return ", ".join([f"layer {found['layer']}", *([".".join(parts)] if parts else [])])
