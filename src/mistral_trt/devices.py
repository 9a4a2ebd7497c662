"""nvidia-smi → this machine's GPUs and its driver."""

import re
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

_QUERY = [
    "nvidia-smi",
    "--query-gpu=name,memory.total,driver_version,compute_cap",
    "--format=csv,noheader,nounits",
]
_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)")
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Device:
    """One GPU.  name, driver: as nvidia-smi prints them.  memory_bytes: None where it has none of its own."""

    name: str
    memory_bytes: int | None
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class LocalDevices:
    """What this machine has.  cuda: the latest that the driver serves.  problem: why nvidia-smi said nothing.

    Without a driver there is no nvidia-smi, no GPU and no problem.
    """

    devices: tuple[Device, ...] = ()
    cuda: str | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def local_devices() -> LocalDevices:
    """This machine's NVIDIA GPUs; tests put another function in its place."""
    try:
        devices = tuple(_device(line) for line in _ask(_QUERY).splitlines() if line.strip())
        cuda = _CUDA.search(_ask(["nvidia-smi"]))
    except FileNotFoundError:
        return LocalDevices()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return LocalDevices(problem=_why(error))
    return LocalDevices(devices, cuda[1] if cuda else None)


def _device(line: str) -> Device:
    """NVIDIA A10G, 23028, 580.82.07, 8.6"""
    fields = [field.strip() for field in line.rsplit(",", 3)]
    if len(fields) != 4 or not re.fullmatch(r"\d+\.\d", fields[3]):
        raise ValueError(f"expected name, memory, driver and compute capability, found {line.strip()!r}")
    name, memory, driver, compute_capability = fields
    return Device(name, int(memory) * 2**20 if memory.isdigit() else None, driver, compute_capability)


def _ask(command: list[str]) -> str:
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
    )
    return result.stdout


def _why(error: Exception) -> str:
    """One line; where nvidia-smi failed, its own words, which it prints to stdout."""
    if isinstance(error, subprocess.CalledProcessError):
        words = (error.stdout or error.stderr or "").strip().splitlines()
        return words[0] if words else f"nvidia-smi ended with status {error.returncode}"
    return str(error)
