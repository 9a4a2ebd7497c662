"""This machine → what of the pipeline works here, and for each gap the command that closes it.

It runs with whatever is installed: a stage that cannot be loaded is one more gap.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mistral_trt import __version__
from mistral_trt.artifact import cache_folder, free_disk_bytes
from mistral_trt.cli import load
from mistral_trt.devices import VISIBLE, LocalDevices, local_devices
from mistral_trt.errors import MissingDependencyError
from mistral_trt.packages import DISTRIBUTION, Package, installed_version, release, wanted_packages
from mistral_trt.tensorrt_names import FLAVORS, FULL, RTX

OLDEST_PYTHON = (3, 11)

MAIN_PATH = ("export", "engines", "validate", "onnxruntime")
"""The extras of export, build and validate."""

OTHER_EXTRAS = ("quantize", "demo", "synth")
OPTIONAL = (*FLAVORS, "cuda-bindings")

OLDEST_DRIVERS = {"12": "535", "13": "580"}
"""CUDA that a TensorRT package is made for → driver it needs on Linux (TensorRT's installation guide)."""

_TARGETS = "mistral_trt.engines.outlook"
_CUDA_PACKAGE = re.compile(r"cu(\d+)")


@dataclass(frozen=True)
class Gap:
    """Something that does not work here.  required: export, build or validate needs it."""

    what: str
    command: str
    required: bool


def examine(gpu: str | None = None) -> dict[str, Any]:
    """Everything there is to say, as JSON.  gpu: only this one, whose engine must then be buildable here.

    Raises GpuError for a name that is not in the catalogue.
    """
    local = local_devices()
    packages, gaps = examine_packages(local)
    gaps += python_gaps() + driver_gaps(local)
    memory, targets = None, []
    try:
        stage: Any = load(_TARGETS)
    except MissingDependencyError as error:
        what, _, command = str(error).rpartition("; run: ")
        gaps.append(Gap(f"no engine can be built and no GPU looked up: {what}", command, True))
    else:
        with suppress(OSError):
            memory = stage.available_memory_bytes()
        here = [(device.name, device.compute_capability) for device in local.devices]
        targets = [outlook.to_json() for outlook in stage.look_ahead(here, gpu)]
    gaps += target_gaps(targets, required=gpu is not None)
    return {
        "mistral_trt": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": [{**asdict(package), "state": package.state} for package in packages],
        "optional": {name: installed_version(name) for name in OPTIONAL},
        "local": local.to_json(),
        "memory_bytes": memory,
        "disk_bytes": {str(path): free_disk_bytes(path) for path in (cache_folder(), Path.cwd())},
        "gpus": targets,
        "gaps": [asdict(gap) for gap in gaps],
        "works": not any(gap.required for gap in gaps),
    }


def examine_packages(local: LocalDevices) -> tuple[list[Package], list[Gap]]:
    """What the extras ask for, and a gap for each extra of which something is missing or too old."""
    try:
        packages = wanted_packages([*MAIN_PATH, *OTHER_EXTRAS])
    except metadata.PackageNotFoundError:
        unknown = f"{DISTRIBUTION} itself is not installed, so what it asks for is not known"
        return [], [Gap(unknown, "pip install -e .", True)]
    faults: dict[str, list[Package]] = {}
    for package in packages:
        if package.state != "ok":
            faults.setdefault(package.extra, []).append(package)
    full_builds_here = bool(local.devices) and installed_version(FULL) is not None
    gaps = []
    for extra, missing in faults.items():
        spared = full_builds_here and [package.name for package in missing] == [RTX]
        name = f"'{DISTRIBUTION}[{extra}]'" if extra else DISTRIBUTION
        what = f"{extra or DISTRIBUTION}: {', '.join(map(_fault, missing))}"
        gaps.append(Gap(what, f"pip install --upgrade {name}", extra in ("", *MAIN_PATH) and not spared))
    return packages, gaps


def target_gaps(targets: Sequence[Mapping[str, Any]], *, required: bool) -> list[Gap]:
    """GPUs that nothing builds for here, those with one command together."""
    by_remedy: dict[tuple[str, str], list[str]] = {}
    for row in targets:
        if row["build"] is None:
            by_remedy.setdefault((row["why"], row["command"]), []).append(row["gpu"])
    return [Gap(f"{', '.join(gpus)}: {why}", command, required) for (why, command), gpus in by_remedy.items()]


def python_gaps() -> list[Gap]:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info >= OLDEST_PYTHON:
        return []
    found = ".".join(map(str, sys.version_info[:3]))
    return [Gap(f"expected Python {oldest} or later, found {found}", f"python{oldest} -m venv .venv", True)]


def driver_gaps(local: LocalDevices) -> list[Gap]:
    """What keeps the GPU here from running engines; nothing that export, build or validate need."""
    if local.problem:
        remedy = "sudo modprobe nvidia && nvidia-smi (after an update of the driver: sudo reboot)"
        return [Gap(f"the NVIDIA driver does not answer: {local.problem}", remedy, False)]
    gaps = visibility_gaps(local)
    if not local.devices:
        return gaps
    driver = local.devices[0].driver
    for flavor in FLAVORS:
        with suppress(metadata.PackageNotFoundError):
            made_for = _CUDA_PACKAGE.search(" ".join(metadata.requires(flavor) or []))
            oldest = OLDEST_DRIVERS.get(made_for[1]) if made_for else None
            if made_for and oldest and release(driver) < release(oldest):
                what = f"{flavor} for CUDA {made_for[1]} needs driver {oldest} or later, found {driver}"
                gaps.append(Gap(what, f"sudo apt install nvidia-driver-{oldest}", False))
    if installed_version("cuda-bindings") is None:
        what = "cuda-bindings, which engines are run with, is not installed"
        gaps.append(Gap(what, "pip install cuda-bindings", False))
    return gaps


def visibility_gaps(local: LocalDevices) -> list[Gap]:
    """What keeps a program from the GPU that is meant."""
    gaps = []
    if local.hidden:
        names = ", ".join(device.name for device in local.hidden)
        gaps.append(Gap(f"{VISIBLE} hides {names}", f"unset {VISIBLE}", False))
    if local.uncertain:
        what, _, command = local.uncertain.rpartition("; run: ")
        gaps.append(Gap(what, command, False))
    return gaps


def print_report(report: Mapping[str, Any]) -> None:
    """The same for people, to stdout."""
    for label, text in [*_host_lines(report), *_package_lines(report["packages"])]:
        print(f"{label:<16}{text}")
    if report["gpus"]:
        print()
        stage: Any = load(_TARGETS)
        stage.print_outlooks(report["gpus"])
    for required, title in ((True, "missing"), (False, "not needed for export, build and validate")):
        gaps = [gap for gap in report["gaps"] if gap["required"] == required]
        if gaps:
            print(f"\n{title}:")
        for gap in gaps:
            print(f"  {gap['what']}\n      {gap['command']}")
    print("\nexport, build and validate work here" if report["works"] else "\nnot everything works here")


def doctor(argv: list[str]) -> int:
    description = "What of the pipeline works on this machine, and the command for what does not."
    parser = argparse.ArgumentParser("mistral-trt doctor", description=description)
    parser.add_argument("--gpu", help="only this GPU; its engine must be buildable here")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    args = parser.parse_args(argv)
    report = examine(args.gpu)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0 if report["works"] else 1


def _host_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    local, memory = report["local"], report["memory_bytes"]
    lines = [("mistral-trt", f"{report['mistral_trt']}, Python {report['python']}")]
    for device in local["devices"]:
        size = f"{device['memory_bytes'] / 1e9:.1f} GB, " if device["memory_bytes"] else ""
        words = f"compute capability {device['compute_capability']}, driver {device['driver']}"
        lines.append(("GPU here", f"{device['name']}, {size}{words}"))
    if not local["devices"]:
        lines.append(("GPU here", local["problem"] or "none: engines are built here and run elsewhere"))
    if local["cuda"]:
        lines.append(("CUDA", f"{local['cuda']} is the latest this driver serves"))
    lines += [(name, version or "not installed") for name, version in report["optional"].items()]
    if memory is not None:
        lines.append(("memory", f"{memory / 1e9:.1f} GB available"))
    return lines + [
        ("disk", f"{free / 1e9:.1f} GB free for {path}") for path, free in report["disk_bytes"].items()
    ]


def _package_lines(packages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """One line an extra: what is there, with versions, and what is wrong."""
    lines: dict[str, list[str]] = {}
    for package in packages:
        words = f"{package['name']} {package['installed'] or ''}".strip()
        wrong = "" if package["state"] == "ok" else f" {package['state'].upper()}"
        lines.setdefault(package["extra"] or "runtime", []).append(words + wrong)
    return [(extra, ", ".join(words)) for extra, words in lines.items()]


def _fault(package: Package) -> str:
    if package.installed is None:
        return f"{package.name}{package.needs} is not installed"
    return f"{package.name} must be {package.needs}, found {package.installed}"
