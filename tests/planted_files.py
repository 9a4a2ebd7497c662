"""Faults in an artifact's files: weights, codes, scales, constants and tokenizer of a copied ONNX folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from mistral_trt.export.quantization.scheme import KINDS
from tests.alteration import edit_graph, exchange_linears, node, reorder_outputs, stored, write_codes
from tests.graphs import numbers_of

Alteration = Callable[[Path], None]
"""Plants a fault in the files of a folder."""

LAYER = "model.layers.0."
Q, K, V = (f"{LAYER}self_attn.{kind}_proj.weight" for kind in "qkv")
GATE, UP = (f"{LAYER}mlp.{kind}_proj.weight" for kind in ("gate", "up"))
OTHER_GATE = "model.layers.1.mlp.gate_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def exchanged(first: str, second: str) -> Alteration:
    return lambda folder: exchange_linears(folder, first, second)


def bit_flipped(name: str, byte: int, bit: int) -> Alteration:
    """byte: of the tensor.  bit: of that byte."""

    def flip(folder: Path) -> None:
        stored(folder, name).reshape(-1)[byte] ^= 1 << bit

    return flip


def pairs_of_neighbours(folder: Path) -> None:
    """Mistral's own order of q_proj's and k_proj's rows, which a graph that rotates halves cannot use."""
    for name, heads in ((Q, 4), (K, 2)):
        rows = np.arange(heads * 16).reshape(heads, 2, 8).transpose(0, 2, 1).reshape(-1)
        reorder_outputs(folder, name, rows)


def head_of_the_embedding(folder: Path) -> None:
    """The graph reads the embedding where it should read lm_head, as if they were tied."""

    def rewire(graph: onnx.GraphProto) -> None:
        node(graph, "lm_head/Transpose").input[0] = EMBEDDING

    edit_graph(folder, rewire)


def wrong_tokenizer(folder: Path) -> None:
    """The tokens of e and t exchanged."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(data), encoding="utf-8")


def scale_numbers(folder: Path, name: str) -> npt.NDArray[Any]:
    """The scales of a linear, or one beside it, to be written to."""
    dtype = np.float32 if numbers_of(folder)[name].nbytes == stored(folder, name).size else np.float16
    return stored(folder, name).reshape(-1).view(dtype)


def scale_times(factor: float, *names: str) -> Alteration:
    def multiply(folder: Path) -> None:
        for name in names:
            numbers = scale_numbers(folder, name)
            numbers *= numbers.dtype.type(factor)

    return multiply


def one_scale_for_all(folder: Path) -> None:
    """v_proj's codes taken anew with the largest of its scales, which then stands for all of them."""
    scale = scale_numbers(folder, f"{V}_scale")
    weight = numbers_of(folder)[V] * scale.astype(np.float32)  # [in, out] * [out]
    scale[:] = scale.max()
    write_codes(folder, V, np.rint(weight / float(scale[0])))


def nibbles_swapped(folder: Path) -> None:
    """In every linear of the layer."""
    for kind in KINDS:
        codes = stored(folder, f"{LAYER}{kind}.weight")
        codes[:] = (codes >> 4) | (codes << 4)


def scales_shifted(folder: Path) -> None:
    """Each channel of v_proj has the scale of the channel after it."""
    scale = scale_numbers(folder, f"{V}_scale")
    scale[:] = np.roll(scale, -1)


def blocks_shifted(folder: Path) -> None:
    """Each block of v_proj's inputs has the scales of the block before it."""
    scales = stored(folder, f"{V}_scale")  # [blocks, bytes of the outputs' scales]
    scales[:] = np.roll(scales, 1, axis=0)


def head_rows_exchanged(folder: Path) -> None:
    """Those of two neighbouring tokens."""
    rows = stored(folder, HEAD)
    rows[[100, 101]] = rows[[101, 100]]


def input_clipped(folder: Path) -> None:
    """The step in which q, k and v_proj round their input is an eighth, so its largest numbers are cut."""
    scale_times(1 / 8, *(f"{LAYER}self_attn.{kind}_proj.input_scale" for kind in "qkv"))(folder)
