"""nvidia-smi + what CUDA is told to see → this machine's GPUs, in CUDA's order, and its driver.

CUDA_VISIBLE_DEVICES names GPUs by index or by UUID, in the order that a program then counts them. Indices are
those of nvidia-smi only where CUDA_DEVICE_ORDER is PCI_BUS_ID: without it CUDA puts the GPU that it takes for
the fastest first and says nothing of the others (CUDA C++ Programming Guide, environment variables). That
matters where the GPUs differ, and nothing but CUDA knows it: then `uncertain` says so.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

VISIBLE, ORDER, BY_BUS = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"

_QUERY = [
    "nvidia-smi",
    "--query-gpu=name,memory.total,driver_version,compute_cap,uuid",
    "--format=csv,noheader,nounits",
]
_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)")
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Device:
    """One GPU.  name, driver, uuid: as nvidia-smi prints them.  memory_bytes: None where it has none of its
    own, or where that is not known.
    """

    name: str
    memory_bytes: int | None
    driver: str
    compute_capability: str
    uuid: str = ""


@dataclass(frozen=True)
class LocalDevices:
    """What CUDA sees on this machine, the one that programs use first.

    cuda: the latest that the driver serves.  problem: why nvidia-smi said nothing.  hidden: what
    CUDA_VISIBLE_DEVICES leaves out.  uncertain: why it is not known which GPU CUDA takes first, and what
    settles it; `devices` then are all of the machine's, in nvidia-smi's order.
    Without a driver there is no nvidia-smi, no GPU and no problem.
    """

    devices: tuple[Device, ...] = ()
    cuda: str | None = None
    problem: str | None = None
    hidden: tuple[Device, ...] = ()
    uncertain: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def local_devices(environment: Mapping[str, str] = os.environ) -> LocalDevices:
    """This machine's NVIDIA GPUs; tests put another function in its place.  environment: where CUDA looks."""
    visible = environment.get(VISIBLE)
    try:
        devices = tuple(_device(line) for line in _ask(_QUERY).splitlines() if line.strip())
        slices = _read_slices() if (visible or "").strip().startswith("MIG-") else {}
        cuda = _CUDA.search(_ask(["nvidia-smi"]))
    except FileNotFoundError:
        return LocalDevices()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return LocalDevices(problem=_why(error))
    found = visible_devices(devices, visible, environment.get(ORDER), slices)
    return replace(found, cuda=cuda[1] if cuda else None)


def visible_devices(
    devices: Sequence[Device],
    visible: str | None,
    order: str | None = None,
    slices: Mapping[str, str] | None = None,
) -> LocalDevices:
    """What CUDA makes of the machine's GPUs.

    devices: in nvidia-smi's order.  visible, order: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, None where
    they are not set.  slices: see `_read_slices`.
    """
    seen = list(devices) if visible is None else _chosen(devices, visible, slices or {})
    by_index = visible is None or not visible.strip().startswith(("GPU-", "MIG-"))
    alike = len({(device.name, device.memory_bytes, device.compute_capability) for device in devices}) <= 1
    if seen and by_index and not alike and order != BY_BUS:
        return LocalDevices(tuple(devices), uncertain=_uncertain(devices, visible))
    shown = {device.uuid for device in seen}
    hidden = tuple(device for device in devices if device.uuid not in shown)
    return LocalDevices(tuple(seen), hidden=hidden)


def _chosen(devices: Sequence[Device], visible: str, slices: Mapping[str, str]) -> list[Device]:
    """The GPUs of "0,1" or "GPU-1f…,GPU-2e…": the first that is none ends the list, and one that comes twice
    empties it (https://github.com/pytorch/pytorch/blob/main/torch/cuda/__init__.py, _parse_visible_devices).
    """
    names = [name.strip() for name in visible.split(",")]
    if names[0].startswith("MIG-"):
        return _slice(devices, slices, names[0])
    find = _by_uuid if names[0].startswith("GPU-") else _by_index
    chosen: list[Device] = []
    for name in names:
        device = find(devices, name)
        if device is None:
            break
        if device in chosen:
            return []
        chosen.append(device)
    return chosen


def _by_index(devices: Sequence[Device], name: str) -> Device | None:
    """CUDA reads the number that a name begins with: "1gpu" is GPU 1."""
    number = re.match(r"\+?(\d+)", name)
    return devices[int(number[1])] if number and int(number[1]) < len(devices) else None


def _by_uuid(devices: Sequence[Device], name: str) -> Device | None:
    """The beginning of a UUID will do, if it is the beginning of one only."""
    found = [device for device in devices if name.startswith("GPU-") and device.uuid.startswith(name)]
    return found[0] if len(found) == 1 else None


def _slice(devices: Sequence[Device], slices: Mapping[str, str], name: str) -> list[Device]:
    """The GPU of a slice, the only one that CUDA then sees; how much of its memory it has is not known."""
    device = _by_uuid(devices, slices.get(name, name.removeprefix("MIG-").partition("/")[0]))
    return [replace(device, memory_bytes=None)] if device else []


def _read_slices() -> dict[str, str]:
    """UUID of each slice (MIG) → UUID of its GPU, as `nvidia-smi -L` lists them below it."""
    found, gpu = {}, ""
    for uuid in re.findall(r"UUID: ([^)]+)\)", _ask(["nvidia-smi", "-L"])):
        gpu = uuid if uuid.startswith("GPU-") else gpu
        found[uuid] = gpu
    return found


def _uncertain(devices: Sequence[Device], visible: str | None) -> str:
    names = ", ".join(device.name for device in devices)
    what = "which one CUDA takes first" if visible is None else f"which {VISIBLE}={visible} means"
    return (
        f"this machine has different GPUs ({names}), and {what} is not known unless {ORDER} is {BY_BUS}; "
        f"run: export {ORDER}={BY_BUS}"
    )


def _device(line: str) -> Device:
    """NVIDIA A10G, 23028, 580.82.07, 8.6, GPU-8a1f…"""
    fields = [field.strip() for field in line.rsplit(",", 4)]
    if len(fields) != 5 or not re.fullmatch(r"\d+\.\d", fields[3]):
        raise ValueError(
            f"expected name, memory, driver, compute capability and UUID, found {line.strip()!r}"
        )
    name, memory, driver, compute_capability, uuid = fields
    memory_bytes = int(memory) * 2**20 if memory.isdigit() else None
    return Device(name, memory_bytes, driver, compute_capability, uuid)


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
