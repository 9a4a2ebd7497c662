"""One decoder layer of an ONNX folder → a small artifact of its own, between the folder's embedding and head.

It keeps the contract with one layer, so a rolling cache runs it as it runs the whole: a layer of a 7B at its
full width, in a few seconds and a gigabyte of disk.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from mistral_trt.contract import GraphContract
from mistral_trt.errors import ValidationError
from mistral_trt.manifest import GRAPH_NAME
from mistral_trt.validate.layerwise.segments import cut_out_layer, read_graph
from mistral_trt.validate.linked_weights import map_weights


@contextmanager
def layer_slice(folder: Path, contract: GraphContract, index: int) -> Iterator[tuple[Path, GraphContract]]:
    """Yield the slice's model file and its contract, for `OnnxRuntimeBackend`; they are gone afterwards.

    Of the weights it holds a copy: ONNX Runtime opens none that lie outside the model's folder. A bfloat16
    artifact's is widened to float32. Raises ValidationError if the disk is full.
    """
    if not 0 <= index < contract.config.num_hidden_layers:
        last = contract.config.num_hidden_layers - 1
        raise ValidationError(f"expected a decoder layer from 0 to {last}, found {index}")
    model = map_weights(cut_out_layer(read_graph(folder, contract), index))
    with tempfile.TemporaryDirectory(prefix="mistral-trt-slice-") as place:
        path = Path(place) / GRAPH_NAME
        try:
            ir.save(model, path, external_data=f"{GRAPH_NAME}.data")
        except OSError as error:
            raise ValidationError(
                f"layer {index} of {folder} cannot be written to {place}: {error.strerror or error}; "
                "set TMPDIR to a disk with room for its weights, the embedding's and the head's"
            ) from error
        yield path, _of_one_layer(contract)


def _of_one_layer(contract: GraphContract) -> GraphContract:
    precision = "fp32" if contract.precision == "bf16" else contract.precision
    return replace(contract, precision=precision, config=replace(contract.config, num_hidden_layers=1))
