"""`model.onnx` → its graph, without the weights that lie in other files."""

from pathlib import Path

import onnx

from mistral_trt.errors import ManifestError


def load_graph(path: Path) -> onnx.GraphProto:
    """Raises ManifestError for a file that is no ONNX model."""
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # of protobuf, which is onnx's dependency and not ours
        raise ManifestError(
            f"{path} cannot be read as ONNX ({error}); export the checkpoint again"
        ) from error
