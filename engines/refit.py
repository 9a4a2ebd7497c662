"""Engine folder with external weights + another fine-tune's ONNX folder → an engine folder, without a build.

The plan is the graph compiled, and two fine-tunes of one architecture have one graph: `graph_sha256` says so.
What changes is which files hold the numbers, and everything that is said about the model.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral_trt.artifact import new_artifact, require_apart
from mistral_trt.engines.build import carried_details, place_files
from mistral_trt.engines.network.placeholders import bring_file, refit_weights
from mistral_trt.errors import BuildError, ManifestError
from mistral_trt.manifest import (
    GRAPH_NAME,
    PLAN_NAME,
    Manifest,
    manifest_sha256,
    read_manifest,
    repair_command,
    sha256_file,
)
from mistral_trt.progress import note
from mistral_trt.weight_index import EXTERNAL, INDEX_NAME, RefitWeight, read_weight_index

_NOT_IN_THE_GRAPH = ("sliding_window", "max_position_embeddings")  # W is the contract's
_SHOWN = 3


def refit_engine(engine_dir: Path, onnx_dir: Path, out: Path | None = None) -> Manifest:
    """Write the engine folder of another fine-tune, all or nothing: one's plan, the other's weights.

    out: the folder to write; None replaces `engine_dir`. The engine's max_batch_size stays.
    Raises BuildError naming what differs if the plan is of another graph, ManifestError or ArtifactError.
    """
    target = engine_dir if out is None else out
    require_apart(target, onnx_dir)
    if target.resolve() != engine_dir.resolve():
        require_apart(target, engine_dir)
    engine = read_manifest(engine_dir, "engine", check_files=None)  # its weight files may be gone or altered
    source = read_manifest(onnx_dir, "onnx", check_files=False)
    require_external(engine, engine_dir, onnx_dir)
    weights = refit_weights(onnx_dir / GRAPH_NAME)
    require_unaltered(engine_dir, engine, INDEX_NAME)
    old = read_weight_index(engine_dir, check_files=False)
    require_same_graph(engine, source, old, weights, remedy(engine, onnx_dir))
    repeated = carried_details(source)
    require_unaltered(engine_dir, engine, PLAN_NAME)
    read_manifest(onnx_dir, "onnx")  # every byte, once nothing cheaper can refuse
    with new_artifact(target) as folder:
        bring_file(engine_dir / PLAN_NAME, folder / PLAN_NAME)
        manifest = replace(
            engine,
            files=place_files(onnx_dir, source, folder, weights, engine.files[PLAN_NAME].sha256),
            sources={
                "onnx": manifest_sha256(onnx_dir),
                **source.sources,
                "engine": manifest_sha256(engine_dir),
            },
            contract=replace(source.contract, max_batch_size=engine.contract.max_batch_size),
            details={**_of_the_plan(engine, repeated), **repeated, "weights": EXTERNAL},
        )
        manifest.write(folder)
    note(f"{target}: {repeated['name']}, with the plan of {engine.details.get('name')}")
    return manifest


def require_external(engine: Manifest, engine_dir: Path, onnx_dir: Path) -> None:
    """Raise BuildError unless the engine's weights lie outside its plan."""
    found = engine.details.get("weights")
    if found != EXTERNAL:
        raise BuildError(
            f"{engine_dir}: expected an engine with external weights, found {found} ones, which only a build "
            f"can exchange; run: {remedy(engine, onnx_dir)}"
        )


def require_unaltered(engine_dir: Path, engine: Manifest, name: str) -> None:
    """Raise ManifestError unless a file that is passed on is the one that was built."""
    repair = repair_command(engine_dir, "engine", engine.details)
    if name not in engine.files:
        raise ManifestError(f"{engine_dir}: the manifest does not list {name}; build it again: {repair}")
    if not (engine_dir / name).is_file():
        raise ManifestError(f"{engine_dir / name} is missing; build the engine again: {repair}")
    if sha256_file(engine_dir / name) != engine.files[name].sha256:
        raise ManifestError(
            f"{engine_dir / name} was altered after it was made (its SHA-256 differs from the manifest's); "
            f"build the engine again: {repair}"
        )


def require_same_graph(
    engine: Manifest, source: Manifest, old: Sequence[RefitWeight], new: Sequence[RefitWeight], remedy: str
) -> None:
    """Raise BuildError naming what differs unless a plan of `engine` computes the graph of `source`."""
    same = (
        engine.details.get("graph_sha256") == source.details.get("graph_sha256")
        and engine.contract.precision == source.contract.precision
        and engine.contract.ring == source.contract.ring
        and [_form(weight) for weight in old] == [_form(weight) for weight in new]
    )
    if same:
        return
    found = list(differences(engine, source, old, new))
    what = "; ".join(found) or (
        "configuration, quantization and weights agree, so constants or nodes of the graphs differ "
        f"(exported by mistral-trt {_version(source)}, the engine's built by {_version(engine)})"
    )
    raise BuildError(
        f"expected the graph that the engine was built from, found another one: {what}. "
        f"Build its own: {remedy}"
    )


def differences(
    engine: Manifest, source: Manifest, old: Sequence[RefitWeight], new: Sequence[RefitWeight]
) -> Iterator[str]:
    """What makes two graphs different, as far as manifests tell; the engine's side first."""
    yield from _fields("", {"precision": engine.contract.precision}, {"precision": source.contract.precision})
    ours, theirs = engine.contract.ring, source.contract.ring
    yield from _fields("", vars(ours), vars(theirs))
    yield from _fields("", _config(engine), _config(source))
    first, second = (m.details.get("quantization") or {} for m in (engine, source))
    yield from _fields("scheme.", first.get("scheme") or {}, second.get("scheme") or {}, skip=("precision",))
    for key in ("quantized", "kept"):
        yield from _names(f"linears {key}", first.get(key, ()), second.get(key, ()))
    before, after = (q.get("pre_quant_scales") or {} for q in (first, second))
    yield from _fields("pre_quant_scales.", before, after)
    yield from _names("weights", [_form(w) for w in old], [_form(w) for w in new])


def remedy(engine: Manifest, onnx_dir: Path) -> str:
    """The command that builds an engine of the ONNX folder for the engine's GPUs.

    With external weights, so that the next one can be a refit, unless one plan serves several capabilities.
    """
    gpus = ",".join(engine.details.get("gpus") or ["GPU"])
    shared = len(engine.details.get("compute_capabilities") or ()) > 1
    place = "" if shared else f" --weights {EXTERNAL}"
    return f"mistral-trt build {shlex.quote(str(onnx_dir))} --gpu {shlex.quote(gpus)}{place} --out DIR"


def _of_the_plan(engine: Manifest, repeated: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's details without those that an ONNX folder brings."""
    brought = {*repeated, "quantization"}
    return {key: value for key, value in engine.details.items() if key not in brought}


def _config(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.config.to_json().items() if key not in _NOT_IN_THE_GRAPH}


def _fields(
    prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], skip: Sequence[str] = ()
) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if key not in skip and old.get(key) != new.get(key):
            yield f"{prefix}{key} {old.get(key)} and {new.get(key)}"


def _names(what: str, old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """linears kept: only the engine's a, b; only the ONNX folder's c"""
    sides = (("the engine's", set(old) - set(new)), ("the ONNX folder's", set(new) - set(old)))
    parts = []
    for side, names in sides:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"only {side} {', '.join(sorted(names)[:_SHOWN])}{more}")
    if parts:
        yield f"{what}: {'; '.join(parts)}"


def _form(weight: RefitWeight) -> str:
    """model.norm.weight (float16 [4096])"""
    return f"{weight.name} ({weight.dtype} {list(weight.shape)})"


def _version(manifest: Manifest) -> str:
    return manifest.versions.get("mistral-trt", "of an unknown version")
