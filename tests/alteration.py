"""An ONNX folder's graph and weights, altered where they lie: for faults planted in a copy of an artifact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from mistral_trt.manifest import describe_files, read_manifest
from mistral_trt.validate.weights.graph import nibbles
from tests.graphs import numbers_of


def reseal(folder: Path) -> None:
    """Give the manifest the hashes of the files as they are now, as if they had been made so."""
    manifest = read_manifest(folder, check_files=None)
    replace(manifest, files=describe_files(folder)).write(folder)


def stored(folder: Path, name: str) -> npt.NDArray[Any]:
    """The bytes of an initializer, to be written to: [rows, bytes] where it has rows."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    (tensor,) = [tensor for tensor in graph.initializer if tensor.name == name]
    place = {entry.key: entry.value for entry in tensor.external_data}
    shape = (tensor.dims[0], -1) if tensor.dims and int(place["length"]) % tensor.dims[0] == 0 else (-1,)
    path, length = folder / place["location"], int(place["length"])
    return np.memmap(path, np.uint8, "r+", int(place["offset"]), (length,)).reshape(shape)


def exchange(folder: Path, first: str, second: str) -> None:
    """Exchange what two tensors hold."""
    a, b = stored(folder, first), stored(folder, second)
    kept = a.copy()
    a[:], b[:] = b, kept


def exchange_linears(folder: Path, first: str, second: str) -> None:
    """Codes and scales, or the float weights."""
    exchange(folder, first, second)
    if f"{first}_scale" in numbers_of(folder):
        exchange(folder, f"{first}_scale", f"{second}_scale")


def edit_graph(folder: Path, edit: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in graph.node if node.name == name)
    return found


def reorder_outputs(folder: Path, name: str, rows: npt.NDArray[Any]) -> None:
    """Bring the output channels of a linear into another order, with their scales."""
    data = stored(folder, name)
    whole, scale = numbers_of(folder)[name], f"{name}_scale"
    if scale not in numbers_of(folder):
        data[:] = data[rows]
        return
    if data.shape[1] * 2 == whole.shape[1]:
        codes = nibbles(data.reshape(-1), whole.size).reshape(whole.shape)[:, rows].view(np.uint8) & 15
        data[:] = codes[:, 0::2] | (codes[:, 1::2] << 4)
    else:
        data[:] = data[:, rows]
    if numbers_of(folder)[scale].ndim:
        found = stored(folder, scale)
        per_row = found if numbers_of(folder)[scale].ndim == 1 else found.reshape(len(found), len(rows), -1)
        if per_row.ndim == 3:
            per_row[:] = per_row[:, rows]
        else:
            per_row[:] = per_row[rows]


def write_codes(folder: Path, name: str, codes: npt.NDArray[Any]) -> None:
    data, whole = stored(folder, name), codes.astype(np.int8).view(np.uint8)
    packed = data.shape[1] * 2 == whole.shape[1]
    data[:] = (whole[:, 0::2] & 15) | (whole[:, 1::2] << 4) if packed else whole
