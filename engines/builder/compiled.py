"""TensorRT's verbose report of a compiled plan → the few facts worth keeping in a manifest.

It is the only look into a plan that needs no GPU. Its wording is no interface, so nothing here decides
whether a build is good, and what is not found is left out.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mistral_trt.contract import QUANTIZED, GraphContract

_KERNEL = re.compile(
    r"^Name: (?P<name>.+?), LayerType: \w+, "
    r"Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName",
    re.MULTILINE,
)
_CODES = re.compile(r"Datatype: (Int8|Int4|FP8)\b")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_TENSOR = re.compile(r"\{ Name: (.+?)(?: \[profile \d+\])?, Dimensions")
_ACTIVATION = re.compile(r"^Total Activation Memory: (\d+) bytes")


def compiled_summary(verbose: Sequence[str], contract: GraphContract) -> dict[str, Any]:
    """Facts by profile name: kernels, attention_kernels (fused), ring_copies, activation_bytes.

    ring_copies counts kernels that move a whole ring from past to present: 0 is what should be. So does
    weights_dequantized, in a quantized precision, those that only turn a weight's codes into numbers.
    """
    profiles = list(contract.profiles())
    kernels, attention, copies, spread = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    moves = {(a.name, b.name) for a, b in zip(contract.past(), contract.present(), strict=True)}
    for kernel in _KERNEL.finditer("\n".join(m for m in verbose if m.startswith("Layers:\n"))):
        suffix = _PROFILE.search(kernel["name"])
        if suffix is None or int(suffix[1]) >= len(profiles):
            continue
        profile = profiles[int(suffix[1])]
        kernels[profile] += 1
        attention[profile] += "_mha_" in kernel["name"]
        copies[profile] += _only(kernel["inputs"], kernel["outputs"]) in moves
        spread[profile] += bool(_CODES.search(kernel["constants"]) and not _TENSOR.search(kernel["inputs"]))
    if not kernels:
        return {}
    quantized = {"weights_dequantized": spread} if contract.precision in QUANTIZED else {}
    sizes = [int(found[1]) for found in map(_ACTIVATION.match, verbose) if found]
    return {
        "kernels": {name: kernels[name] for name in profiles},
        "attention_kernels": {name: attention[name] for name in profiles},
        "ring_copies": {name: copies[name] for name in profiles},
        **{fact: {name: counter[name] for name in profiles} for fact, counter in quantized.items()},
        "activation_bytes": dict(zip(profiles, sizes, strict=False)),
    }


def _only(inputs: str, outputs: str) -> tuple[str, str] | None:
    """The one input and the one output of a kernel, None if it has more."""
    sources, results = _TENSOR.findall(inputs), _TENSOR.findall(outputs)
    return (sources[0], results[0]) if len(sources) == len(results) == 1 else None
