"""Faults in an artifact's files: weights, codes, scales, constants and tokenizer of a copied ONNX folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from mistral_trt.export.quantization.scheme import KINDS
from tests.alteration import edit_graph, exchange_linears, node, reorder_outputs, stored, write_codes
from tests.graphs import numbers_of

Alteration = Callable[[Path], None]
"""Plants a fault in the files of a folder."""

LAYER = "model.layers.0."
Q, K, V = (f"{LAYER}self_attn.{kind}_proj.weight" for kind in "qkv")
GATE, UP = (f"{LAYER}mlp.{kind}_proj.weight" for kind in ("gate", "up"))
DOWN_STEP = f"{LAYER}mlp.down_proj.input_scale"
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


def input_step_times(factor: float) -> Alteration:
    """The step in which q, k and v_proj round their input; of an eighth its largest numbers are cut."""
    return scale_times(factor, *(f"{LAYER}self_attn.{kind}_proj.input_scale" for kind in "qkv"))


def zero_points_of_one(folder: Path) -> None:
    """Every zero point of weights and inputs."""

    def shift(graph: onnx.GraphProto) -> None:
        zeros = {node.input[2] for node in graph.node if node.op_type.endswith("Linear") and node.input[2:]}
        for tensor in graph.initializer:
            if tensor.name in zeros:
                tensor.raw_data = bytes([1] * len(tensor.raw_data))

    edit_graph(folder, shift)


def scale_of(name: str, value: float) -> Alteration:
    """The first of a linear's scales, or an input's step, is `value`."""

    def write(folder: Path) -> None:
        scale_numbers(folder, name)[0] = value

    return write


def scale_typed(name: str, dtype: int) -> Alteration:
    """The graph says that the numbers of a scale are of another dtype."""

    def declare(graph: onnx.GraphProto) -> None:
        next(tensor for tensor in graph.initializer if tensor.name == name).data_type = dtype

    return lambda folder: edit_graph(folder, declare)


def nodes_left_out(*names: str) -> Alteration:
    """What read a node's output reads its first input."""

    def leave_out(graph: onnx.GraphProto) -> None:
        for name in names:
            found = node(graph, name)
            for reader in graph.node:
                for i, value in enumerate(reader.input):
                    if value == found.output[0]:
                        reader.input[i] = found.input[0]
            graph.node.remove(found)

    return lambda folder: edit_graph(folder, leave_out)


def attribute_of(name: str, key: str, value: int) -> Alteration:
    def write(graph: onnx.GraphProto) -> None:
        found = node(graph, name)
        kept = [attribute for attribute in found.attribute if attribute.name != key]
        del found.attribute[:]
        found.attribute.extend([*kept, onnx.helper.make_attribute(key, value)])

    return lambda folder: edit_graph(folder, write)


def input_renamed(graph: onnx.GraphProto) -> None:
    for value in graph.input:
        value.name = value.name.replace("position_ids", "positions")
    for found in graph.node:
        found.input[:] = [name.replace("position_ids", "positions") for name in found.input]


def output_left_out(graph: onnx.GraphProto) -> None:
    del graph.output[-1]


def unknown_operator(graph: onnx.GraphProto) -> None:
    node(graph, f"{LAYER}mlp/Mul_1").op_type = "Unheard"


def nameless(graph: onnx.GraphProto) -> None:
    """Validation finds the modules by the names of their nodes."""
    for found in graph.node:
        found.name = ""


def impossible_shape(graph: onnx.GraphProto) -> None:
    """A Reshape that loads and can never run."""
    shape = node(graph, f"{LAYER}self_attn/Reshape").input[1]
    tensor = next(tensor for tensor in graph.initializer if tensor.name == shape)
    numbers = numpy_helper.to_array(tensor).copy()
    numbers[-1] = 7
    tensor.CopyFrom(numpy_helper.from_array(numbers, shape))


def weights_elsewhere(graph: onnx.GraphProto) -> None:
    """v_proj lies in a file that is not there."""
    tensor = next(tensor for tensor in graph.initializer if tensor.name == V)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "gone.bin"


def no_onnx(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"not a graph")


def unreadable_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def blocks_shifted(folder: Path) -> None:
    """Each block of v_proj's inputs has the scales of the block before it."""
    scales = stored(folder, f"{V}_scale")  # [blocks, bytes of the outputs' scales]
    scales[:] = np.roll(scales, 1, axis=0)


def head_rows_exchanged(folder: Path) -> None:
    """Those of two neighbouring tokens."""
    rows = stored(folder, HEAD)
    rows[[100, 101]] = rows[[101, 100]]
