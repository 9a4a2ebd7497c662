"""ONNX folder + engine → a folder beside it with Polygraphy commands that compare the two, ready to run.

The folder is no artifact and no part of one: it names both by relative path and can be deleted. Nothing in
it has run on a GPU here; what needs none (inputs, ONNX Runtime's side, every argument) is tested.
"""

import os
import shlex
from pathlib import Path

from mistral_trt.artifact import write_file
from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.engines.network.parse import profile_ranges
from mistral_trt.errors import BuildError
from mistral_trt.manifest import GRAPH_NAME, PLAN_NAME
from mistral_trt.tensorrt_names import RTX
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

TOLERANCES = {
    "fp16": ("elemwise", 0.5, 0.05),
    "int8-weight-only": ("elemwise", 5.0, 0.5),
    "int4": ("mean", 0.5, 0.05),
    "int8": ("mean", 0.5, 0.05),
    "fp8": ("mean", 0.5, 0.05),
}
"""Precision → Polygraphy's error statistic, largest error of logits and of rings (rtol is 1e-3).

Those of fp16 and int8-weight-only are the gates of `mistral-trt validate` on a logit. Where activations are
quantized a code that falls the other way moves single numbers far, so the mean is held and not the largest.
"""

_RTOL = 1e-3
_TEMPLATE = Path(__file__).with_name("polygraphy_run.txt")
_README = Path(__file__).with_name("polygraphy_readme.txt")
_INPUTS = '''"""Inputs for Polygraphy, `inputs.py:decode` and `:prefill`: calls past the ring's turns."""

from pathlib import Path

from mistral_trt.validate import polygraphy_inputs

ONNX_DIR = (Path(__file__).parent / {onnx!r}).resolve()


def decode():
    yield from polygraphy_inputs.decode(ONNX_DIR)


def prefill():
    yield from polygraphy_inputs.prefill(ONNX_DIR)
'''


def polygraphy_folder(out: Path) -> Path:
    """build/a10g-fp16 -> build/a10g-fp16-polygraphy."""
    return out.absolute().with_name(f"{out.absolute().name}-polygraphy")


def write_polygraphy(
    onnx_dir: Path, out: Path, contract: GraphContract, *, flavor: str, weights: str = EMBEDDED
) -> Path:
    """Write `inputs.py`, `run.sh` and `README.txt` beside the engine folder `out`; return where.

    flavor, weights: the engine's, as in its manifest.  Files of these names that are there are replaced.
    Raises BuildError as `check_comparable` does.
    """
    check_comparable(onnx_dir, contract.precision, weights=weights)
    folder = polygraphy_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    onnx, engine = (os.path.relpath(path.resolve(), folder.resolve()) for path in (onnx_dir, out))
    texts = {
        "inputs.py": _INPUTS.format(onnx=onnx),
        "run.sh": script(onnx, engine, contract, flavor=flavor),
        "README.txt": _README.read_text(encoding="utf-8").replace("@PRECISION@", contract.precision),
    }
    for name, text in texts.items():
        write_file(folder / name, text.encode())
    (folder / "run.sh").chmod(0o755)
    return folder


def check_comparable(onnx_dir: Path, precision: str, *, weights: str = EMBEDDED) -> None:
    """Raise BuildError for an engine that Polygraphy cannot load or has nothing to compare with.

    weights: "embedded" or "external".
    """
    if weights == EXTERNAL:
        raise BuildError(
            f"Polygraphy loads a plan with its weights and does not refit one, found weights {weights!r}; "
            f"leave --polygraphy out, or build with: mistral-trt build {shlex.quote(str(onnx_dir))} "
            "--gpu GPU --weights embedded --polygraphy --out DIR"
        )
    if precision not in TOLERANCES:
        raise BuildError(
            f"Polygraphy compares with ONNX Runtime, which cannot run {precision} on a CPU; "
            f"expected one of {', '.join(TOLERANCES)}: leave --polygraphy out, or export again with: "
            f"mistral-trt export CHECKPOINT --precision fp16 --out {shlex.quote(str(onnx_dir))}"
        )


def script(onnx: str, engine: str, contract: GraphContract, *, flavor: str) -> str:
    """The text of `run.sh`.  onnx, engine: paths relative to its folder."""
    statistic, logits, rings = TOLERANCES[contract.precision]
    # Basic optimizations leave Q/DQ nodes as they stand: no kernels that round what the graph does not.
    level = "ORT_ENABLE_ALL" if contract.precision == "fp16" else "ORT_ENABLE_BASIC"
    words = {
        "ONNX": shlex.quote(f"{onnx}/{GRAPH_NAME}"),
        "PLAN": shlex.quote(f"{engine}/{PLAN_NAME}"),
        "RTX": "1" if flavor == RTX else "0",
        "LEVEL": level,
        "TOLERANCES": f"--check-error-stat {statistic} --atol {rings} logits:{logits} --rtol {_RTOL}",
        "DECODE_SHAPES": shapes(contract, "decode"),
        "PREFILL_SHAPES": shapes(contract, "prefill"),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, value in words.items():
        text = text.replace(f"@{name}@", value)
    return text


def shapes(contract: GraphContract, profile: str) -> str:
    """`--trt-min-shapes … --trt-opt-shapes … --trt-max-shapes …` of one optimization profile."""
    ranges = profile_ranges(contract)[profile]
    words = []
    for which, sizes in zip(("min", "opt", "max"), ranges, strict=True):
        words += [f"--trt-{which}-shapes", *(_shape(spec, sizes) for spec in contract.inputs())]
    return " ".join(words)


def _shape(spec: TensorSpec, sizes: dict[str, int]) -> str:
    """past_key_values.0.key:[1,8,4352,128], quoted for a shell."""
    numbers = ",".join(str(sizes[dim] if isinstance(dim, str) else dim) for dim in spec.shape)
    return shlex.quote(f"{spec.name}:[{numbers}]")
