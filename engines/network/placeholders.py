"""Parsed network → the same network with its weights left out: the plan is small and serves every fine-tune.

The importer makes of each external initializer one constant, named after it, with its dtype and shape, and
moves no byte. Each is exchanged for an empty constant that a refit fills by the initializer's name; a weight
that cannot be exchanged so is an error, because the plan would keep one model's numbers.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from mistral_trt.artifact import MANIFEST_NAME, link_file, require_space
from mistral_trt.engines.network.graph_file import load_graph
from mistral_trt.engines.network.quantized import Wiring
from mistral_trt.errors import BuildError, ManifestError
from mistral_trt.manifest import PLAN_NAME
from mistral_trt.progress import note, track
from mistral_trt.tensorrt_names import TRT_DTYPES
from mistral_trt.weight_index import INDEX_NAME, RefitWeight, check_places, files_of

EXTERNAL_FLAGS = ("STRIP_PLAN", "REFIT_INDIVIDUAL")
"""Builder flags: leave out the weights that are marked, and those alone."""

_ONNX_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
}
_OWN_FILES = (PLAN_NAME, INDEX_NAME, MANIFEST_NAME)
_PLAN_BASE_BYTES = 10_000_000
_PLAN_LAYER_BYTES = 4_000_000
# Measured: 5 to 10 MB for 2 layers of a 7B, 107 MB for 32 in int8, whose kernels are stored for each linear
# anew. A weight that stayed is 4 MB and more; `require_placeholders` is what finds one.
_COPIED_AT_ONCE = 1 << 24
_LOG = logging.getLogger("mistral_trt")


def refit_weights(path: Path) -> list[RefitWeight]:
    """The initializers of an ONNX file that lie in other files, in the order of the graph.

    Raises ManifestError for one whose bytes are not where it says, BuildError for a dtype that is not ours.
    """
    graph = load_graph(path)
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    try:
        weights = [_refit_weight(tensor) for tensor in external]
        check_places(weights, path.parent)
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}; export the checkpoint again") from error
    taken = sorted(set(files_of(weights)) & set(_OWN_FILES))
    if taken:
        raise ManifestError(f"{path}: {taken[0]} holds weights, and an engine folder has a file of that name")
    return weights


def replace_by_placeholders(trt: Any, network: Any, weights: Sequence[RefitWeight]) -> None:
    """Exchange the constant of each weight for an empty one that is refittable under the weight's name.

    Call it on an audited network: the audits follow the parser's own constants by name.
    Raises BuildError naming the weights that the network does not hold as the graph does.
    """
    wiring = Wiring.of(network)
    constants = {layer.name: layer for layer in wiring.of_type("CONSTANT")}  # TensorRT keeps names distinct
    _require_held(weights, constants)
    for weight in weights:
        _replace(trt, network, wiring, weight, constants[weight.name])
    require_placeholders(network, weights)


def require_placeholders(network: Any, weights: Sequence[RefitWeight]) -> None:
    """Raise BuildError naming the weights that would stay in the plan, or that nothing reads."""
    wiring = Wiring.of(network)
    empty = {layer.name: layer for layer in wiring.of_type("CONSTANT")}
    faults = []
    for weight in weights:
        layer, old = empty.get(placeholder_name(weight)), empty.get(weight.name)
        if layer is None or not network.are_weights_marked_refittable(weight.name):
            faults.append(f"{weight.name} is not refittable")
        elif old is not None and wiring.readers[old.get_output(0).name]:
            faults.append(f"{weight.name} is still read as a constant")
        elif not wiring.readers[layer.get_output(0).name]:
            faults.append(f"{weight.name} is not read")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise BuildError(
            f"expected all {len(weights)} weights outside the plan, found that "
            f"{', '.join(faults[:3])}{more}; build with --weights embedded"
        )


def placeholder_name(weight: RefitWeight) -> str:
    """Name of the empty constant; the parser's own keeps the weight's, and a layer's names its output."""
    return f"{weight.name}.placeholder"


def set_external(trt: Any, config: Any) -> None:
    """Tell the builder to leave the marked weights out of the plan."""
    for name in EXTERNAL_FLAGS:
        config.set_flag(getattr(trt.BuilderFlag, name))


def check_external_plan(plan_bytes: int, layers: int) -> None:
    """Raise BuildError if a plan is so large that weights must have stayed in it.  layers: decoder layers."""
    limit = _PLAN_BASE_BYTES + layers * _PLAN_LAYER_BYTES
    if plan_bytes > limit:
        raise BuildError(
            f"expected a plan without weights, of at most {limit / 1e6:.1f} MB for {layers} layers, found "
            f"{plan_bytes / 1e6:.1f} MB: TensorRT kept weights in it; build with --weights embedded"
        )


def bring_weights(weights: Sequence[RefitWeight], onnx_dir: Path, folder: Path) -> None:
    """Give the engine folder the files that hold its weights: as hard links, or as copies and said aloud."""
    for name in files_of(weights):
        if bring_file(onnx_dir / name, folder / name):
            note(f"{name}: hard-linked to the ONNX folder's, used as it lies")


def bring_file(source: Path, target: Path) -> bool:
    """Link a file into an artifact, or copy it. Returns whether it was linked.

    Raises ArtifactError if the disk has no room for a copy.
    """
    if link_file(source, target):
        return True
    size = source.stat().st_size
    _LOG.warning(
        "%s cannot be hard-linked into %s: copying its %.2f GB", source, target.parent.parent, size / 1e9
    )
    require_space(target.parent, size)
    with (
        track(target.name, size, unit="bytes") as advance,
        source.open("rb") as old,
        target.open("wb") as new,
    ):
        while piece := old.read(_COPIED_AT_ONCE):
            new.write(piece)
            advance(len(piece))
    return False


def _refit_weight(tensor: onnx.TensorProto) -> RefitWeight:
    if tensor.data_type not in _ONNX_DTYPES:
        found = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise BuildError(f"{tensor.name}: a weight of dtype {found} cannot lie outside the plan")
    place = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset, length = int(place.get("offset", "0")), int(place["length"])
        file = place["location"]
    except (KeyError, ValueError) as error:
        raise ManifestError(f"{tensor.name}: expected location, offset and length, found {place}") from error
    return RefitWeight(tensor.name, _ONNX_DTYPES[tensor.data_type], tuple(tensor.dims), file, offset, length)


def _require_held(weights: Sequence[RefitWeight], constants: Mapping[str, Any]) -> None:
    """Each weight is a constant of the network, with the dtype and the shape of the graph's initializer."""
    for weight in weights:
        expected, found = (TRT_DTYPES[weight.dtype], weight.shape), None
        if weight.name in constants:
            tensor = constants[weight.name].get_output(0)
            found = (tensor.dtype.name, tuple(tensor.shape))
        if found != expected:
            raise BuildError(
                f"{weight.name}: expected a constant {expected} in the network, found "
                f"{found or 'none'}, so it cannot be left out of the plan; build with --weights embedded"
            )


def _replace(trt: Any, network: Any, wiring: Wiring, weight: RefitWeight, old: Any) -> None:
    old.__class__ = trt.IConstantLayer  # the bindings hand out the base class
    dtype = getattr(trt.DataType, TRT_DTYPES[weight.dtype])
    layer = network.add_constant(weight.shape, trt.Weights(dtype, 0, weight.count))
    layer.name = placeholder_name(weight)
    # TensorRT takes weights by their address, and gives each empty constant one that no other has.
    named = (
        network.set_weights_name(old.weights, None)  # else the name is taken
        and network.set_weights_name(layer.weights, weight.name)
        and network.mark_weights_refittable(weight.name)
    )
    if not named:
        raise BuildError(
            f"{weight.name}: TensorRT does not let it be refitted; build with --weights embedded"
        )
    for reader, index in wiring.readers[old.get_output(0).name]:
        reader.set_input(index, layer.get_output(0))
