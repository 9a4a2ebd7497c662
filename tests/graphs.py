"""ONNX graphs made by hand for the tests, and the weights of an exported one."""

import zlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from safetensors.torch import load_file

from mistral_trt.contract import GraphContract
from mistral_trt.export.checkpoint import expected_shapes
from mistral_trt.manifest import read_manifest

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precision → torch's dtype of the weights."""


def bare_graph(contract: GraphContract) -> ir.Model:
    """A graph that holds the weights of a contract and no node."""
    dtype = ir.DataType[{"float32": "FLOAT"}.get(contract.cache_dtype, contract.cache_dtype.upper())]
    weights = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        for name, shape in expected_shapes(contract.config).items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=weights, opset_imports={"": 24}, name="bare")
    return ir.Model(graph, ir_version=10)


def write_graph(model: ir.Model, folder: Path) -> None:
    """Write a graph whose weights have no values yet, for `read_graph`."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None and value.shape is not None
            nowhere = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=name)
            value.const_value = nowhere
    folder.mkdir()
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())


def read_graph(folder: Path) -> ir.Model:
    """The graph that `write_graph` was given."""
    model = ir.from_proto(onnx.load(folder / "model.onnx", load_external_data=False))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an ONNX folder by the graph's own references, as raw 16- or 32-bit integers.

    Read by hand: `onnx.load` opens no file that has a second name, as linked weights do.
    """
    names, found = set(read_manifest(folder, "onnx").details["weights"]), {}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    for initializer in graph.initializer:
        if initializer.name in names:
            place = {entry.key: entry.value for entry in initializer.external_data}
            length, offset = int(place["length"]), int(place["offset"])
            integers = np.int32 if initializer.data_type == onnx.TensorProto.FLOAT else np.int16
            with (folder / place["location"]).open("rb") as file:
                file.seek(offset)
                array = np.frombuffer(file.read(length), integers).reshape(tuple(initializer.dims))
            found[initializer.name] = torch.from_numpy(array.copy())
    return found


def check_weights(folder: Path, checkpoint: Path, precision: str) -> None:
    """Every weight of the folder is torch's conversion of the checkpoint's, bit for bit."""
    found, original = weights_of(folder), load_file(checkpoint / "model.safetensors")
    assert set(found) == set(original)
    for name, tensor in original.items():
        converted = tensor.to(DTYPES[precision])
        bits = converted.view(torch.int32 if converted.dtype == torch.float32 else torch.int16)
        assert torch.equal(found[name], bits), name


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill_weights(model: ir.Model) -> None:
    """Give every initializer without a value random numbers that depend on its name; scales are small."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.dtype is not None and value.shape is not None
        random, shape = np.random.default_rng(zlib.crc32(name.encode())), value.shape.numpy()
        if value.dtype in (ir.DataType.INT8, ir.DataType.INT4):
            numbers: np.ndarray = random.integers(-7, 8, shape)
        elif "scale" in name:
            numbers = random.uniform(1e-3, 2e-3, shape)
        else:
            numbers = random.normal(size=shape)
        array = np.asarray(numbers).astype(value.dtype.numpy())
        value.const_value = ir.tensor(array, dtype=value.dtype, name=name)


def initializers_of(folder: Path) -> dict[str, onnx.TensorProto]:
    """The initializers of an ONNX folder with their bytes, those in other files included."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    for initializer in graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in initializer.external_data}
            with (folder / place["location"]).open("rb") as file:
                file.seek(int(place["offset"]))
                initializer.raw_data = file.read(int(place["length"]))
            initializer.data_location = onnx.TensorProto.DEFAULT
            del initializer.external_data[:]
    return {initializer.name: initializer for initializer in graph.initializer}


def numbers_of(folder: Path) -> dict[str, np.ndarray]:
    """The same as arrays that onnx makes of them; codes and floats alike in float32."""
    return {
        name: onnx.numpy_helper.to_array(tensor).astype(np.float32)
        for name, tensor in initializers_of(folder).items()
    }
