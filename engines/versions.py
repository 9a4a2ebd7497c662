"""What a build asks of TensorRT → whether the installed version has it.

Where NVIDIA says when a feature came, that is the source; else it is the oldest release whose Python
bindings have its names. tensorrt-rtx has been run here in one version only, so that one is asked for.
"""

import re
from dataclasses import dataclass

from mistral_trt.contract import GraphContract
from mistral_trt.errors import BuildError
from mistral_trt.tensorrt_names import FULL, RTX

_PARSER = "github.com/onnx/onnx-tensorrt, docs/Changelog.md"
_BINDINGS = "the names are in the bindings of that release on PyPI and not in those of the one before"
_OLDEST = "the oldest bindings on PyPI that were looked at have the names"


@dataclass(frozen=True)
class Feature:
    """What a graph or a build needs.  oldest: distribution → the first version that has it."""

    what: str
    oldest: dict[str, str]
    source: str


FEATURES = {
    "attention": Feature(
        "the operator Attention as one fused layer", {FULL: "10.14", RTX: "1.4"}, f"{_PARSER}; RTX: {_OLDEST}"
    ),
    "attention-facts": Feature(
        "an attention that tells its mask and lengths, which the audit reads",
        {FULL: "11.0", RTX: "1.5"},
        _BINDINGS,
    ),
    "rings": Feature(
        "TensorScatter as a cache that is written in place",
        {FULL: "10.15", RTX: "1.4"},
        f"{_PARSER}; RTX: {_OLDEST}",
    ),
    "rotary": Feature(
        "the operator RotaryEmbedding", {FULL: "10.15", RTX: "1.4"}, f"{_PARSER}; RTX: {_OLDEST}"
    ),
    "rms-norm": Feature(
        "the operator RMSNormalization", {FULL: "10.15", RTX: "1.7.1"}, f"{_PARSER}; RTX: oldest tried"
    ),
    "strong-types": Feature(
        "a network whose types are those of the ONNX file, and no others",
        {FULL: "9.2", RTX: "1.7.1"},
        "github.com/NVIDIA/TensorRT, release v9.2.0, speaks of it; RTX: oldest tried",
    ),
    "stream": Feature("a plan that is written as it is made", {FULL: "10.13.3", RTX: "1.4"}, _OLDEST),
    "bf16": Feature("bfloat16", {FULL: "9.0", RTX: "1.7.1"}, f"{_PARSER}; RTX: oldest tried"),
    "int8": Feature(
        "INT8 codes kept in the plan, scales in the graph",
        {FULL: "8.0", RTX: "1.7.1"},
        f"{_PARSER}; RTX: oldest tried",
    ),
    "int4": Feature("INT4 weights in blocks", {FULL: "10.0", RTX: "1.7.1"}, f"{_PARSER}; RTX: oldest tried"),
    "fp8": Feature("FP8 codes", {FULL: "9.0", RTX: "1.7.1"}, f"{_PARSER}; RTX: oldest tried"),
    "external": Feature(
        "plans without weights, refitted one weight at a time",
        {FULL: "10.13.3", RTX: "1.7.1"},
        f"{_OLDEST}; RTX: oldest tried",
    ),
    "ahead-of-time": Feature(
        "a build for a GPU that is not there", {RTX: "1.7.1"}, "oldest tried; full TensorRT has none"
    ),
}
"""Feature → the oldest versions that have it, and how that is known."""

_ALWAYS = ("attention", "attention-facts", "rings", "rotary", "rms-norm", "strong-types", "stream")
_OF_PRECISION = {
    "bf16": ("bf16",),
    "int8": ("int8",),
    "int8-weight-only": ("int8",),
    "int4": ("int4",),
    "fp8": ("fp8",),
}


def features_of(contract: GraphContract, flavor: str, *, external: bool = False) -> tuple[str, ...]:
    """Names of the features that a build asks for.  external: the weights stay outside the plan."""
    asked = [*_ALWAYS, *_OF_PRECISION.get(contract.precision, ())]
    return (*asked, *(("external",) if external else ()), *(("ahead-of-time",) if flavor == RTX else ()))


def check_version(flavor: str, version: str, features: tuple[str, ...]) -> None:
    """Raise BuildError naming the first feature that is younger than the installed TensorRT.

    flavor: "tensorrt" or "tensorrt-rtx".  version: its `__version__`.
    """
    for name in features:
        feature = FEATURES[name]
        if flavor not in feature.oldest:
            raise BuildError(f"{flavor} does not have: {feature.what}; run: {install_command(RTX)}")
        if _numbers(version) < _numbers(feature.oldest[flavor]):
            raise BuildError(
                f"{feature.what} needs {flavor} {feature.oldest[flavor]} or later, found {version}; "
                f"run: {install_command(flavor)}"
            )


def install_command(flavor: str) -> str:
    """pip install 'tensorrt>=11.0': what brings a TensorRT that has all a build can ask of it."""
    return f"pip install '{flavor}>={oldest_usable(flavor)}'"


def oldest_usable(flavor: str) -> str:
    """The first version of a distribution that has every feature it can have."""
    return max((f.oldest[flavor] for f in FEATURES.values() if flavor in f.oldest), key=_numbers)


def _numbers(version: str) -> tuple[int, ...]:
    """1.7.1.116 → (1, 7, 1, 116); what follows the numbers does not count: 10.14.1.48.post1."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    if found is None:
        raise BuildError(f"expected a version like 1.7.1, found {version!r}; install TensorRT again")
    return tuple(int(part) for part in found[0].split("."))
