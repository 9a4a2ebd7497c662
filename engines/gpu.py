"""GPU data files → targets an engine can be built for, by whatever name they are called.

A GPU is a file `gpus/<key>.toml`; adding one is adding a file. Tables here speak of compute
capabilities only, never of a single GPU.
"""

import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path

from mistral_trt.errors import GpuError

CATALOGUE = Path(__file__).parent / "gpus"
SEGMENTS = ("data centre", "GeForce")

_FIGURES = (
    "memory_gb",
    "memory_mib",
    "memory_bandwidth_gb_per_s",
    "fp16_tflops",
    "int8_tops",
    "fp8_tflops",
)

_MEMORY_TOLERANCE = 0.15

FP8_CAPABILITY = "8.9"

RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX's builder accepts (its `ComputeCapability` enum; a test compares them)."""

RTX_LISTED = ("7.5", "8.6", "8.9", "12.0", "12.1")
"""docs.nvidia.com/deeplearning/tensorrt-rtx, support matrix 1.5; its examples are all GeForce boards."""


class RtxSupport(Enum):
    """What TensorRT-RTX is to a GPU."""

    LISTED = "listed by NVIDIA"
    UNLISTED = "builds, not listed"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class GpuTarget:
    """One GPU an engine can be built for. Figures are peaks, dense; gigabytes are decimal.

    memory_gb: the board's nominal size.  memory_mib: the total that nvidia-smi prints.
    aliases: other names, among them what nvidia-smi prints.  sources: figure → where it was read.
    """

    key: str
    name: str
    aliases: tuple[str, ...]
    segment: str
    compute_capability: str
    memory_gb: float
    memory_mib: int
    memory_bandwidth_gb_per_s: float
    fp16_tflops: float
    int8_tops: float
    sources: Mapping[str, str] = field(repr=False)
    fp8_tflops: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+\.\d", self.compute_capability):
            raise GpuError(
                f'{self.key}: compute_capability must look like "8.6", found {self.compute_capability!r}'
            )
        if self.segment not in SEGMENTS:
            raise GpuError(f"{self.key}: segment must be one of {list(SEGMENTS)}, found {self.segment!r}")
        if not isinstance(self.name, str) or not all(isinstance(alias, str) for alias in self.aliases):
            raise GpuError(f"{self.key}: name and aliases must be strings")
        for name in _FIGURES:
            value = getattr(self, name)
            if value is None and name == "fp8_tflops":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise GpuError(f"{self.key}: {name} must be a positive number, found {value!r}")
            if not self.sources.get(name):
                raise GpuError(f"{self.key}: {name} has no entry in [sources]")
        self._check_memory()
        if not self.sources.get("compute_capability"):
            raise GpuError(f"{self.key}: compute_capability has no entry in [sources]")
        if (self.fp8_tflops is not None) != self.runs(FP8_CAPABILITY):
            raise GpuError(
                f"{self.key}: fp8_tflops must be given from compute capability {FP8_CAPABILITY} on, and not "
                f"below; found {self.fp8_tflops!r} with {self.compute_capability}"
            )

    @property
    def sm(self) -> str:
        """TensorRT's name for it: compute capability 8.6 is SM86."""
        return "SM" + self.compute_capability.replace(".", "")

    @property
    def memory_bytes(self) -> int:
        """What the driver says the GPU has."""
        return self.memory_mib << 20

    @property
    def rtx_support(self) -> RtxSupport:
        """What TensorRT-RTX is to this GPU. Data-centre boards build, but no list of NVIDIA's names one."""
        if self.compute_capability not in RTX_TARGETS:
            return RtxSupport.IMPOSSIBLE
        if self.segment == "GeForce" and self.compute_capability in RTX_LISTED:
            return RtxSupport.LISTED
        return RtxSupport.UNLISTED

    def runs(self, lowest: str) -> bool:
        """Whether its compute capability is `lowest` or later."""
        return _number(lowest) <= _number(self.compute_capability)

    def _check_memory(self) -> None:
        """nvidia-smi counts a few percent more or less than the nominal size; a mistaken unit is far off."""
        if not isinstance(self.memory_mib, int):
            raise GpuError(f"{self.key}: memory_mib must be a whole number, found {self.memory_mib!r}")
        if abs(self.memory_bytes / (self.memory_gb * 1e9) - 1) > _MEMORY_TOLERANCE:
            raise GpuError(
                f"{self.key}: memory_mib must be the total that nvidia-smi prints for {self.memory_gb:g} GB, "
                f"found {self.memory_mib} MiB, which is {self.memory_bytes / 1e9:.1f} GB"
            )

    def answers_to(self, name: str) -> bool:
        """Whether `name` is this GPU's key, name or an alias; case does not matter."""
        return _plain(name) in {_plain(known) for known in (self.key, self.name, *self.aliases)}


def load_catalogue(folder: Path = CATALOGUE) -> dict[str, GpuTarget]:
    """Every GPU of the catalogue by key, oldest compute capability and slowest memory first."""
    targets = [read_gpu(path) for path in folder.glob("*.toml")]
    targets.sort(key=lambda t: (_number(t.compute_capability), t.memory_bandwidth_gb_per_s, t.key))
    return {target.key: target for target in targets}


def read_gpu(path: Path) -> GpuTarget:
    """Read one data file. Raises GpuError naming the file and the field that is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise GpuError(f"{path} is not TOML: {error}") from error
    known = {f.name for f in fields(GpuTarget)} - {"key"}
    missing = sorted(known - set(data) - {"fp8_tflops"})
    unknown = sorted(set(data) - known)
    if missing or unknown:
        raise GpuError(f"{path}: missing fields {missing}, unknown fields {unknown}")
    if not isinstance(data["aliases"], list) or not isinstance(data["sources"], dict):
        raise GpuError(f"{path}: aliases must be a list and sources a table")
    return GpuTarget(**{**data, "key": path.stem, "aliases": tuple(data["aliases"])})


def find_gpu(name: str, catalogue: Mapping[str, GpuTarget] | None = None) -> GpuTarget:
    """The GPU of that key, name or alias. Raises GpuError listing the known keys."""
    catalogue = load_catalogue() if catalogue is None else catalogue
    found = _called(name, catalogue)
    if len(found) == 1:
        return found[0]
    if found:
        raise GpuError(f"GPU {name!r} is ambiguous: say {' or '.join(target.key for target in found)}")
    raise GpuError(f"unknown GPU {name!r}; known are {', '.join(sorted(catalogue))}")


def split_names(text: str, catalogue: Mapping[str, GpuTarget] | None = None) -> list[list[GpuTarget]]:
    """The GPUs of a text in sets: a comma joins two into one set, a blank begins another.

    Blanks inside a name are its own: "a10g,NVIDIA L4 t4" → [[a10g, l4], [t4]].
    Raises GpuError as `find_gpu` does.
    """
    catalogue = load_catalogue() if catalogue is None else catalogue
    sets: list[list[GpuTarget]] = []
    for piece in text.split(","):
        words, joined = piece.split(), bool(sets)
        while words:
            name = _first_name(words, catalogue)
            target = find_gpu(name, catalogue)
            if joined:
                sets[-1].append(target)
            else:
                sets.append([target])
            words, joined = words[len(name.split()) :], False
    return sets


def main(arguments: Sequence[str]) -> int:
    """For make, which has no environment yet: names → keys, or why not, to stdout: "a10g,l4 t4"."""
    try:
        sets = split_names(" ".join(arguments)) or [[find_gpu("")]]
    except GpuError as error:
        print(error)
        return 2
    print(*(",".join(target.key for target in targets) for targets in sets))
    return 0


def _called(name: str, catalogue: Mapping[str, GpuTarget]) -> list[GpuTarget]:
    """The GPUs of that name; a key is never another's alias."""
    if _plain(name) in catalogue:
        return [catalogue[_plain(name)]]
    return [target for target in catalogue.values() if target.answers_to(name)]


def _first_name(words: Sequence[str], catalogue: Mapping[str, GpuTarget]) -> str:
    """The longest name that the words begin with; where they begin with none, what is taken for one."""
    for count in range(len(words), 0, -1):
        if _called(" ".join(words[:count]), catalogue):
            return " ".join(words[:count])
    return words[0] if any(_called(word, catalogue) for word in words) else " ".join(words)


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _number(compute_capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in compute_capability.split("."))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
