"""ONNX manifest + GPU → what a build and its engine will need, predicted, and whether that fits.

Nothing here is measured: the factors come from builds on a machine without a GPU, peak memory over weight
bytes, the file-backed pages of the weights not counted. In a quantized graph codes and scales count with the
factor of their precision, everything that stayed float16 with that of float16.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mistral_trt.contract import GraphContract
from mistral_trt.engines.gpu import GpuTarget, load_catalogue
from mistral_trt.errors import BuildError

_BUILD_FACTOR = 1.9  # measured 1.5 to 1.9, for weights stored [out, in] as ours are
_QUANTIZED_FACTORS = {"int8": 1.6, "int8-weight-only": 1.6, "int4": 2.6, "fp8": 1.6}
# Of fp8 it is int8's: chains of 2 to 32 linears of a 7B build with the same peak in either.
_BUILD_BASE_BYTES = 1_000_000_000  # the builder and its libraries, and the graph of 32 layers
_PLAN_BASE_BYTES = 40_000_000  # a plan without weights: 13 to 37 MB for 32 layers
_PLAN_TOLERANCE = 0.05
_DEVICE_BASE_BYTES = 1_000_000_000  # CUDA context, kernels, activations of a 256-token chunk of a 7B
_CGROUP_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Budget:
    """Predicted bytes. `device_bytes` is for max_batch_size rows.

    quantized_bytes: the codes and scales among `weights_bytes`.  quantized_factor: theirs for the build.
    """

    weights_bytes: int
    ring_bytes_per_row: int
    max_batch_size: int
    quantized_bytes: int = 0
    quantized_factor: float = _BUILD_FACTOR

    @property
    def build_memory_bytes(self) -> int:
        plain = self.weights_bytes - self.quantized_bytes
        return int(_BUILD_FACTOR * plain + self.quantized_factor * self.quantized_bytes) + _BUILD_BASE_BYTES

    @property
    def plan_bytes(self) -> int:
        return self.weights_bytes + _PLAN_BASE_BYTES

    @property
    def rings_bytes(self) -> int:
        return self.ring_bytes_per_row * self.max_batch_size

    @property
    def device_bytes(self) -> int:
        return self.weights_bytes + self.rings_bytes + _DEVICE_BASE_BYTES

    def rows_that_fit(self, gpu: GpuTarget) -> int:
        """Rows of the ring that fit beside the weights; 0 or less: not one."""
        return (gpu.memory_bytes - self.weights_bytes - _DEVICE_BASE_BYTES) // self.ring_bytes_per_row

    def to_json(self) -> dict[str, int]:
        """The manifest's `predicted` section."""
        return {
            "weights_bytes": self.weights_bytes,
            "ring_bytes_per_row": self.ring_bytes_per_row,
            "max_batch_size": self.max_batch_size,
            "build_memory_bytes": self.build_memory_bytes,
            "plan_bytes": self.plan_bytes,
            "device_bytes": self.device_bytes,
        }


def predict(contract: GraphContract, weights_bytes: int, *, quantized_bytes: int = 0) -> Budget:
    """What an engine with embedded weights needs.  quantized_bytes: codes and scales among the weights."""
    factor = _QUANTIZED_FACTORS.get(contract.precision, _BUILD_FACTOR)
    rows = contract.max_batch_size
    return Budget(weights_bytes, contract.ring_bytes_per_row, rows, quantized_bytes, factor)


def check_device(budget: Budget, gpu: GpuTarget) -> None:
    """Raise BuildError if weights and rings do not fit the GPU, saying what would."""
    if budget.device_bytes <= gpu.memory_bytes:
        return
    rows = budget.rows_that_fit(gpu)
    if rows >= 1:
        remedy = f"export again with --max-batch-size {rows} or less"
    else:
        targets = sorted(load_catalogue().values(), key=lambda target: target.memory_bytes)
        large = [target.key for target in targets if budget.device_bytes <= target.memory_bytes]
        remedy = f"it would fit {', '.join(large)}" if large else "no GPU of the catalogue is large enough"
    parts = (
        f"{_gb(budget.weights_bytes)} weights, {budget.max_batch_size} rows of "
        f"{_gb(budget.ring_bytes_per_row)}, {_gb(_DEVICE_BASE_BYTES)} for the rest"
    )
    raise BuildError(
        f"predicted: the engine needs {_gb(budget.device_bytes)} of GPU memory ({parts}), and {gpu.name} has "
        f"{_gb(gpu.memory_bytes)}; {remedy}"
    )


def check_host(budget: Budget, out: Path, *, memory_bytes: int, disk_bytes: int) -> None:
    """Raise BuildError if this machine lacks the memory or the disk for the build."""
    if budget.build_memory_bytes > memory_bytes:
        raise BuildError(
            f"predicted: the build needs {_gb(budget.build_memory_bytes)} of memory "
            f"({_build_parts(budget)}), and "
            f"{_gb(memory_bytes)} is available; free some or build on a machine that has that much"
        )
    if budget.plan_bytes > disk_bytes:
        raise BuildError(
            f"predicted: the plan needs {_gb(budget.plan_bytes)} of disk, and {_gb(disk_bytes)} is free for "
            f"{out}; free some or choose another --out"
        )


def check_plan(budget: Budget, plan_bytes: int) -> None:
    """Raise BuildError if a plan's size shows that it does not hold the weights as they were stored.

    A quantized plan may be smaller, because TensorRT merges scales that are equal.
    """
    slack = int(_PLAN_TOLERANCE * budget.weights_bytes) + _PLAN_BASE_BYTES
    expected = f"expected a plan of {_gb(budget.weights_bytes)} and at most {_gb(slack)}"
    if plan_bytes > budget.weights_bytes + slack:
        why = "TensorRT stored weights more than once or in a wider type"
        raise BuildError(f"{expected} more, the size of its weights, found {_gb(plan_bytes)}: {why}")
    if not budget.quantized_bytes and plan_bytes < budget.weights_bytes - slack:
        raise BuildError(
            f"{expected} less, the size of its weights, found {_gb(plan_bytes)}: weights are missing from it"
        )


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory this process may still take: what the machine has left, or its control group if less.

    root: where /proc and /sys are; tests give another.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([machine, *_cgroup_room(root)])


def _cgroup_room(root: Path) -> Iterator[int]:
    """Room in each control group this process is in, its own and those above it, version 2 or 1."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside a container `path` may be the host's; the container's own files are then at the top.
        own = top / path.lstrip("/")
        for group in {top, own, *(parent for parent in own.parents if parent.is_relative_to(top))}:
            yield from _room(group, *names)


def _room(group: Path, limit_name: str, usage_name: str) -> Iterator[int]:
    if not (group / limit_name).is_file():
        return
    limit = (group / limit_name).read_text().strip()
    if limit == "max" or int(limit) > _CGROUP_UNLIMITED:
        return
    used = int((group / usage_name).read_text())
    yield max(0, int(limit) - used + _file_cache_bytes(group / "memory.stat"))


def _file_cache_bytes(stat: Path) -> int:
    """Bytes of the group's use that the kernel gives back when asked."""
    values = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))


def _build_parts(budget: Budget) -> str:
    """1.6 x 6.98 GB quantized + 1.9 x 0.52 GB other weights + 1.00 GB"""
    base = _gb(_BUILD_BASE_BYTES)
    if not budget.quantized_bytes:
        return f"{_BUILD_FACTOR} x {_gb(budget.weights_bytes)} weights + {base}"
    plain = budget.weights_bytes - budget.quantized_bytes
    quantized = f"{budget.quantized_factor} x {_gb(budget.quantized_bytes)} quantized"
    return f"{quantized} + {_BUILD_FACTOR} x {_gb(plain)} other weights + {base}"


def _gb(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB"
