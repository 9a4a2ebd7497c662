"""`weights.json`: where each weight of a plan without weights lies, for whoever puts them into the engine.

It stands in the engine folder beside the files it points into, and is read without onnx and TensorRT.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from mistral_trt.errors import ManifestError
from mistral_trt.manifest import is_plain_name, repair_command

EMBEDDED, EXTERNAL = "embedded", "external"
"""Where an engine has its weights: in the plan, or beside it and named in the index."""

INDEX_NAME = "weights.json"
INDEX_VERSION = 1

DTYPE_BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "int8": 8,
    "int4": 4,
    "float8_e4m3fn": 8,
}
"""The dtypes a weight may have; int4 lies two to a byte, the first one low."""


@dataclass(frozen=True)
class RefitWeight:
    """One weight that a plan leaves out: bytes [offset, offset + bytes) of `file` are its numbers.

    name: of the ONNX initializer, and of the weight in TensorRT.  shape: as in the graph, () for one number.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ManifestError(f"a weight must have a name, found {self.name!r}")
        if self.dtype not in DTYPE_BITS:
            raise ManifestError(
                f"{self.name}: dtype must be one of {', '.join(DTYPE_BITS)}, found {self.dtype!r}"
            )
        if not all(_is_count(size) for size in (*self.shape, self.offset, self.bytes)):
            raise ManifestError(
                f"{self.name}: shape, offset and bytes must be whole numbers, none below 0, found "
                f"{self.shape}, {self.offset!r} and {self.bytes!r}"
            )
        if not isinstance(self.file, str) or not is_plain_name(self.file):
            raise ManifestError(f"{self.name}: {self.file!r} is not a plain file name")
        expected = -(-self.count * DTYPE_BITS[self.dtype] // 8)
        if self.bytes != expected or not self.count:
            raise ManifestError(
                f"{self.name}: expected {expected} bytes for {self.dtype} {list(self.shape)}, "
                f"and more than none, found {self.bytes}"
            )

    @property
    def count(self) -> int:
        """How many numbers it has: 1 for shape ()."""
        return prod(self.shape)


def write_weight_index(folder: Path, weights: Sequence[RefitWeight]) -> None:
    """Write `weights.json`, in the order given. Raises ManifestError if two weights have one name."""
    _require_distinct(weights)
    content = {"format_version": INDEX_VERSION, "weights": [asdict(weight) for weight in weights]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def read_weight_index(folder: Path, *, check_files: bool = True) -> list[RefitWeight]:
    """Read `weights.json` and, unless told not to, check it against the files beside it, by their sizes.

    Raises ManifestError with the command that makes the folder again.
    """
    path = folder / INDEX_NAME
    try:
        weights = _parse(json.loads(path.read_text(encoding="utf-8")))
        _require_distinct(weights)
        if check_files:
            check_places(weights, folder)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, ManifestError) as error:
        repair = repair_command(folder, "engine", {"weights": EXTERNAL})
        raise ManifestError(f"{path} cannot be used ({error}); make it again with: {repair}") from error
    return weights


def check_places(weights: Iterable[RefitWeight], folder: Path) -> None:
    """Raise ManifestError unless each weight lies inside a file of `folder`."""
    sizes: dict[str, int] = {}
    for weight in weights:
        if weight.file not in sizes:
            path = folder / weight.file
            if not path.is_file():
                raise ManifestError(f"{weight.name}: expected its numbers in {weight.file}, which is missing")
            sizes[weight.file] = path.stat().st_size
        end = weight.offset + weight.bytes
        if end > sizes[weight.file]:
            raise ManifestError(
                f"{weight.name}: expected bytes {weight.offset} to {end} of {weight.file}, found "
                f"{sizes[weight.file]} bytes there"
            )


def files_of(weights: Iterable[RefitWeight]) -> list[str]:
    """Names of the files that hold the weights, sorted."""
    return sorted({weight.file for weight in weights})


def _parse(data: Any) -> list[RefitWeight]:
    found = data.get("format_version") if isinstance(data, Mapping) else None
    if found != INDEX_VERSION:
        raise ManifestError(f"expected format_version {INDEX_VERSION}, found {found!r}")
    expected = {field.name for field in fields(RefitWeight)}
    weights = []
    for entry in data["weights"]:
        if not isinstance(entry, Mapping) or set(entry) != expected:
            raise ManifestError(f"expected entries with {', '.join(sorted(expected))}, found {entry!r}")
        weights.append(RefitWeight(**{**entry, "shape": tuple(entry["shape"])}))
    return weights


def _require_distinct(weights: Sequence[RefitWeight]) -> None:
    seen: set[str] = set()
    for weight in weights:
        if weight.name in seen:
            raise ManifestError(f"{weight.name} is listed twice")
        seen.add(weight.name)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
