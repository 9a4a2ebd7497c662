"""The doctor on machines that a test makes up: packages, devices and drivers, and what is said of each."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mistral_trt import cli, devices
from mistral_trt import doctor as doctor_module
from mistral_trt.cli import COMMANDS, main
from mistral_trt.devices import Device, LocalDevices, local_devices
from mistral_trt.doctor import examine
from mistral_trt.engines import outlook as targets_module
from mistral_trt.engines.flavor import Flavor
from mistral_trt.engines.gpu import load_catalogue
from mistral_trt.packages import Package, release, wanted_packages

REQUIRES = [
    "numpy>=1.26.4",
    'onnxruntime>=1.26; extra == "onnxruntime"',
    'torch>=2.13; extra == "export"',
    'onnx>=1.23; extra == "export"',
    'tensorrt-rtx>=1.7.1; extra == "engines"',
    'onnx>=1.23; extra == "engines"',
    'rich>=15; extra == "engines"',
    'mistral-trt[export,onnxruntime]; extra == "validate"',
    'transformers>=5.23; extra == "validate"',
    'mistral-trt[export]; extra == "quantize"',
    'nvidia-modelopt>=0.47; extra == "quantize"',
    'gguf>=0.19; extra == "demo"',
    'torch>=2.13; extra == "demo"',
    'pytest>=9.2; extra == "dev"',
]
INSTALLED = {
    "numpy": "2.3.5",
    "onnxruntime": "1.32.0",
    "torch": "2.13.0+cpu",
    "onnx": "1.23.2",
    "tensorrt-rtx": "1.7.1.116",
    "rich": "15.0.0",
    "transformers": "5.23.0",
    "nvidia-modelopt": "0.47.1",
    "gguf": "0.19.0",
}
A10G = Device("NVIDIA A10G", 24_146_608_128, "580.82.07", "8.6", "GPU-8a1f")
H100 = Device("NVIDIA H100 80GB HBM3", 85_520_809_984, "580.82.07", "9.0", "GPU-9b2e")
L4 = Device("NVIDIA L4", 24_152_899_584, "580.82.07", "8.9", "GPU-8a77")


class Machine:
    """What is installed and what is plugged in; a test changes it."""

    def __init__(self) -> None:
        self.installed = dict(INSTALLED)
        self.requires = {"mistral-trt": REQUIRES, "tensorrt-rtx": ["tensorrt_rtx_cu13==1.7.1.116"]}
        self.local = LocalDevices()

    def version(self, name: str) -> str:
        if name not in self.installed:
            raise metadata.PackageNotFoundError(name)
        return self.installed[name]

    def requirements(self, name: str) -> list[str]:
        if name not in self.requires:
            raise metadata.PackageNotFoundError(name)
        return self.requires[name]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(metadata, "version", made.version)
    monkeypatch.setattr(metadata, "requires", made.requirements)
    monkeypatch.setattr(doctor_module, "local_devices", lambda: made.local)
    monkeypatch.setattr(Flavor, "installed", property(lambda self: self.name in made.installed))
    return made


def gaps(report: dict[str, Any], required: bool | None = None) -> dict[str, str]:
    """What is missing → the command."""
    found = [gap for gap in report["gaps"] if required in (None, gap["required"])]
    return {gap["what"]: gap["command"] for gap in found}


def row(report: dict[str, Any], gpu: str) -> dict[str, Any]:
    (found,) = [row for row in report["gpus"] if row["gpu"] == gpu]
    return dict(found)


# --- packages -------------------------------------------------------------------------------------------


def test_each_package_stands_under_the_first_extra_that_asks_for_it() -> None:
    found = wanted_packages(["export", "engines", "validate", "onnxruntime", "quantize"])
    assert {package.name: package.extra for package in found} == {
        "numpy": "",
        "torch": "export",
        "onnx": "export",
        "tensorrt-rtx": "engines",
        "rich": "engines",
        "onnxruntime": "validate",
        "transformers": "validate",
        "nvidia-modelopt": "quantize",
    }
    assert found[0] == Package("numpy", "", ">=1.26.4", "2.3.5")


@pytest.mark.parametrize(
    ("needs", "installed", "state"),
    [
        (">=2.13", None, "missing"),
        ("", None, "missing"),
        ("", "0.1", "ok"),
        (">=2.13", "2.13.0+cpu", "ok"),
        (">=2.13.0", "2.13", "ok"),
        (">=2.13", "2.9.1", "too old"),
        (">=1.7.1", "1.7.0.55", "too old"),
        (">=1.7.1", "1.7.1.116", "ok"),
        (">=2.13,<3", "2.12", "too old"),
    ],
)
def test_a_package_is_held_to_its_lower_bound(needs: str, installed: str | None, state: str) -> None:
    assert Package("x", "export", needs, installed).state == state


def test_a_version_is_compared_by_its_numbers() -> None:
    assert release("2.13.0+cpu") == release("2.13") == (2, 13)
    assert release("10.14.1.48.post1") == (10, 14, 1, 48)
    assert release("0+unknown") == release("nonsense") == ()


@pytest.mark.parametrize("quote", ['"', "'"])
def test_markers_are_read_in_either_quote(machine: Machine, quote: str) -> None:
    machine.requires["mistral-trt"] = [f"numpy>=2 ; extra == {quote}export{quote}"]
    assert [package.name for package in wanted_packages(["export"])] == ["numpy"]


def test_everything_installed_is_no_gap_but_what_nobody_builds_here() -> None:
    report = examine()
    assert report["works"]
    assert gaps(report, required=True) == {}
    assert list(gaps(report)) == [f"{gpu}: needs full TensorRT on the target" for gpu in ("h100", "h200")]


@pytest.mark.parametrize(
    ("package", "extra", "required"),
    [
        ("torch", "export", True),
        ("onnxruntime", "validate", True),
        ("tensorrt-rtx", "engines", True),
        ("transformers", "validate", True),
        ("nvidia-modelopt", "quantize", False),
        ("gguf", "demo", False),
    ],
)
def test_a_missing_package_names_its_extra(
    machine: Machine, package: str, extra: str, required: bool
) -> None:
    del machine.installed[package]
    report = examine()
    (what,) = [what for what in gaps(report, required) if what.startswith(f"{extra}: {package}>=")]
    assert what.endswith("is not installed")
    assert gaps(report)[what] == f"pip install --upgrade 'mistral-trt[{extra}]'"
    assert report["works"] is not required


def test_a_package_that_is_too_old_says_what_was_found(machine: Machine) -> None:
    machine.installed["torch"] = "2.9.1"
    machine.installed["numpy"] = "1.20"
    found = gaps(examine(), required=True)
    assert found["export: torch must be >=2.13, found 2.9.1"] == "pip install --upgrade 'mistral-trt[export]'"
    assert found["mistral-trt: numpy must be >=1.26.4, found 1.20"] == "pip install --upgrade mistral-trt"


def test_a_tree_that_was_never_installed_is_told(machine: Machine) -> None:
    del machine.requires["mistral-trt"]
    report = examine()
    assert not report["works"] and report["packages"] == []
    assert gaps(report, True) == {
        "mistral-trt itself is not installed, so what it asks for is not known": "pip install -e ."
    }


def test_a_stage_that_cannot_be_loaded_is_one_more_gap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(module: str) -> object:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(cli, "import_module", refuse)
    report = examine("a10g")
    (what,) = [what for what in gaps(report, True) if what.startswith("no engine can be built")]
    assert "needs the package 'rich', which is not installed" in what
    assert gaps(report)[what] == "pip install 'mistral-trt[engines]'"
    assert (report["gpus"], report["memory_bytes"], report["works"]) == ([], None, False)
    monkeypatch.undo()
    doctor_module.print_report(report)
    assert "pip install 'mistral-trt[engines]'" in capsys.readouterr().out


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "sys", SimpleNamespace(version_info=(3, 10, 4)))
    assert gaps(examine(), True) == {
        "expected Python 3.11 or later, found 3.10.4": "python3.11 -m venv .venv"
    }


# --- devices --------------------------------------------------------------------------------------------


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LocalDevices]:
    """The devices with this shell script as nvidia-smi."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def answer(script: str) -> LocalDevices:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return local_devices()

    return answer


def query(
    lines: str, header: str = "| NVIDIA-SMI 580.82  Driver Version: 580.82  CUDA Version: 13.0 |"
) -> str:
    return f"""case "$*" in *query-gpu*) printf '{lines}';; *) echo '{header}';; esac"""


def test_without_nvidia_smi_there_is_no_gpu_and_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local_devices() == LocalDevices()


def test_gpus_are_read_from_nvidia_smi(smi: Callable[[str], LocalDevices]) -> None:
    found = smi(
        query("NVIDIA A10G, 23028, 580.82.07, 8.6, GPU-8a1f\\nNVIDIA GB10, [N/A], 580.82.07, 12.1, GPU-0b\\n")
    )
    assert found.devices == (A10G, Device("NVIDIA GB10", None, "580.82.07", "12.1", "GPU-0b"))
    assert (found.cuda, found.problem) == ("13.0", None)


@pytest.mark.parametrize(
    ("header", "cuda"),
    [("CUDA Version: 12.8", "12.8"), ("CUDA UMD Version : 13.1", "13.1"), ("something else", None)],
)
def test_the_drivers_cuda_is_in_the_header(
    smi: Callable[[str], LocalDevices], header: str, cuda: str | None
) -> None:
    assert smi(query("NVIDIA L4, 23034, 570.1, 8.9, GPU-1\\n", header)).cuda == cuda


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not talk to the driver.'; exit 9",
            "has failed because",
        ),
        ("echo 'no permission' >&2; exit 4", "no permission"),
        ("exit 6", "nvidia-smi ended with status 6"),
        (
            query("No devices were found\\n"),
            "expected name, memory, driver, compute capability and UUID, found 'No",
        ),
        (query("NVIDIA L4, 23034, 570.1, [N/A], GPU-1\\n"), "found 'NVIDIA L4, 23034, 570.1, .N/A., GPU-1'"),
    ],
)
def test_a_broken_nvidia_smi_is_a_problem_and_not_a_crash(
    smi: Callable[[str], LocalDevices], script: str, problem: str
) -> None:
    found = smi(script)
    assert found.devices == () and found.problem is not None
    assert re.search(problem, found.problem)


def test_an_nvidia_smi_that_hangs_is_a_problem(
    smi: Callable[[str], LocalDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_TIMEOUT_S", 0.2)
    assert "timed out" in (smi("exec sleep 20").problem or "")


# --- what CUDA sees of them ------------------------------------------------------------------------------

TWIN = replace(A10G, uuid="GPU-8a2f")


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, [A10G, TWIN]),
        ("0,1", [A10G, TWIN]),
        ("1,0", [TWIN, A10G]),
        ("1", [TWIN]),
        (" 1 , 0 ", [TWIN, A10G]),
        ("1gpu", [TWIN]),
        ("", []),
        ("-1", []),
        ("2", []),
        ("1,2,0", [TWIN]),
        ("0,-1,1", [A10G]),
        ("0,0", []),
        ("none", []),
        ("GPU-8a1f", [A10G]),
        ("GPU-8a2", [TWIN]),
        ("GPU-8a2f,GPU-8a1f", [TWIN, A10G]),
        ("GPU-8a", []),
        ("GPU-8a2f,GPU-8a2f", []),
        ("GPU-8a1f,1", [A10G]),
        ("0,GPU-8a2f", [A10G]),
    ],
)
def test_cuda_sees_what_it_is_told_to(visible: str | None, seen: list[Device]) -> None:
    found = devices.visible_devices([A10G, TWIN], visible)
    assert list(found.devices) == seen
    assert set(found.hidden) == {A10G, TWIN} - set(seen)
    assert found.uncertain is None, "of GPUs that are alike it does not matter which is which"


@pytest.mark.parametrize("visible", [None, "0", "1,0", "GPU-8a1f", "GPU-8a77,GPU-8a1f", "", "5"])
@pytest.mark.parametrize("order", [None, "FASTEST_FIRST", "PCI_BUS_ID"])
def test_an_index_among_different_gpus_means_one_only_in_the_order_of_the_bus(
    visible: str | None, order: str | None
) -> None:
    found = devices.visible_devices([A10G, L4], visible, order)
    known = order == "PCI_BUS_ID" or visible in ("", "5") or (visible or "").startswith("GPU-")
    assert (found.uncertain is None) == known
    if not known:
        assert found.devices == (A10G, L4) and "NVIDIA A10G, NVIDIA L4" in (found.uncertain or "")
    elif visible == "1,0":
        assert found.devices == (L4, A10G)


def test_a_slice_stands_for_its_gpu_with_memory_nobody_knows(smi: Callable[[str], LocalDevices]) -> None:
    both = [A10G, L4]
    slices = {"GPU-8a1f": "GPU-8a1f", "MIG-11": "GPU-8a1f", "GPU-8a77": "GPU-8a77", "MIG-22": "GPU-8a77"}
    expected = (replace(L4, memory_bytes=None),)
    for visible in ("MIG-22", "MIG-22,MIG-11", "MIG-GPU-8a77/1/0"):
        found = devices.visible_devices(both, visible, None, slices)
        assert (found.devices, found.hidden, found.uncertain) == (expected, (A10G,), None)
    assert devices.visible_devices(both, "MIG-33", None, slices).devices == ()


def test_the_environment_counts_where_nvidia_smi_is_asked(
    smi: Callable[[str], LocalDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "NVIDIA A10G, 23028, 580.82.07, 8.6, GPU-8a1f\\nNVIDIA L4, 23034, 580.82.07, 8.9, GPU-8a77\\n"
    listed = "GPU 0: NVIDIA A10G (UUID: GPU-8a1f)\\nGPU 1: NVIDIA L4 (UUID: GPU-8a77)\\n"
    listed += "  MIG 1g.5gb Device 0: (UUID: MIG-22)\\n"
    script = f"""case "$*" in *query-gpu*) printf '{lines}';; -L) printf '{listed}';; *) echo;; esac"""
    assert smi(script).uncertain is not None
    for visible, seen in (("GPU-8a77", (L4,)), ("", ()), ("MIG-22", (replace(L4, memory_bytes=None),))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert smi(script).devices == seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert smi(script).devices == (L4,)


def test_what_hides_a_gpu_is_told_with_the_command_that_shows_it(machine: Machine) -> None:
    plugged_in(machine, A10G)
    machine.local = devices.visible_devices([A10G, TWIN], "")
    assert gaps(examine(), False)["CUDA_VISIBLE_DEVICES hides NVIDIA A10G, NVIDIA A10G"] == (
        "unset CUDA_VISIBLE_DEVICES"
    )
    machine.local = devices.visible_devices([A10G, L4], "0")
    found = {what: command for what, command in gaps(examine(), False).items() if "different GPUs" in what}
    assert list(found.values()) == ["export CUDA_DEVICE_ORDER=PCI_BUS_ID"]


# --- drivers --------------------------------------------------------------------------------------------


def plugged_in(machine: Machine, *found: Device) -> None:
    machine.local = LocalDevices(found, "13.0")
    machine.installed["cuda-bindings"] = "13.0.1"


@pytest.mark.parametrize(
    ("package", "driver", "oldest"),
    [
        ("tensorrt_rtx_cu13==1.7.1", "580.65.06", None),
        ("tensorrt_rtx_cu13==1.7.1", "575.57.08", "580"),
        ("tensorrt_rtx_cu12==1.7.1", "575.57.08", None),
        ("tensorrt_rtx_cu12==1.7.1", "525.60.13", "535"),
        ("tensorrt_rtx_cu99==9", "1.0", None),
        ("something", "1.0", None),
    ],
)
def test_an_old_driver_is_told_and_needed_for_nothing_but_running(
    machine: Machine, package: str, driver: str, oldest: str | None
) -> None:
    plugged_in(machine, Device("NVIDIA A10G", 1, driver, "8.6"))
    machine.requires["tensorrt-rtx"] = [package]
    found = {what: command for what, command in gaps(examine(), False).items() if "driver" in what}
    assert list(found.values()) == ([f"sudo apt install nvidia-driver-{oldest}"] if oldest else [])
    assert all(f"needs driver {oldest} or later, found {driver}" in what for what in found)
    assert examine()["works"]


def test_a_gpu_without_cuda_bindings_is_told(machine: Machine) -> None:
    plugged_in(machine, A10G)
    assert not any("cuda-bindings" in what for what in gaps(examine()))
    del machine.installed["cuda-bindings"]
    assert "pip install cuda-bindings" in gaps(examine(), False).values()


def test_a_driver_that_does_not_answer_is_told(machine: Machine) -> None:
    machine.local = LocalDevices(problem="NVIDIA-SMI has failed")
    assert any("does not answer: NVIDIA-SMI has failed" in what for what in gaps(examine(), False))


# --- targets --------------------------------------------------------------------------------------------


def test_without_a_gpu_all_that_rtx_targets_is_built_here() -> None:
    report = examine()
    assert [row["gpu"] for row in report["gpus"]] == list(load_catalogue())
    for found in report["gpus"]:
        built = found["gpu"] not in ("h100", "h200")
        assert found["build"] == ("tensorrt-rtx" if built else None)
        assert found["fits"] is None
        flavor = "" if built else " --flavor tensorrt"
        assert f"mistral-trt build ONNX_DIR --gpu {found['gpu']}{flavor} --out DIR" in found["command"]
    assert row(report, "t4")["precisions"] == ("fp16", "int8-weight-only")
    assert "int8-weight-only" not in row(report, "h100")["precisions"], "full TensorRT gives no word on it"


def test_engines_of_its_capability_fit_the_gpu_here(machine: Machine) -> None:
    plugged_in(machine, A10G)
    fitting = [found["gpu"] for found in examine()["gpus"] if found["fits"] == "NVIDIA A10G"]
    assert fitting == ["a10", "a10g", "rtx3090"]


@pytest.mark.parametrize(
    ("version", "build", "why"),
    [
        ("11.2.1", "tensorrt", "builds with tensorrt here"),
        ("10.3.0", None, "needs tensorrt, 11.0 or later, found 10.3.0"),
        (None, None, "needs tensorrt, which is not installed"),
    ],
)
def test_on_an_h100_full_tensorrt_is_what_counts(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, version: str | None, build: str | None, why: str
) -> None:
    monkeypatch.setattr(targets_module, "oldest_usable", lambda flavor: "11.0")
    plugged_in(machine, H100, H100)
    if version:
        machine.installed["tensorrt"] = version
    found = row(examine("h100"), "h100")
    assert (found["build"], found["why"], found["fits"]) == (build, why, H100.name)
    assert found["command"].startswith("mistral-trt build" if build else "pip install 'tensorrt>=11.0'")
    assert examine("h100")["works"] is (build is not None)


def test_where_full_tensorrt_builds_here_rtx_is_not_required(machine: Machine) -> None:
    plugged_in(machine, A10G)
    machine.installed["tensorrt"] = "99.0"
    del machine.installed["tensorrt-rtx"]
    report = examine()
    assert report["works"]
    assert row(report, "a10g")["build"] == "tensorrt"
    assert row(report, "l4")["why"] == "needs tensorrt-rtx, which is not installed"
    machine.local = LocalDevices()
    assert not examine()["works"]


def test_without_rtx_one_command_stands_for_all_its_targets(machine: Machine) -> None:
    del machine.installed["tensorrt-rtx"]
    (together,) = [what for what in gaps(examine()) if "needs tensorrt-rtx" in what]
    assert together.startswith("t4, a100-40, a100-80, ")


# --- the command ----------------------------------------------------------------------------------------


def test_every_gap_has_a_command(machine: Machine) -> None:
    machine.installed, machine.local = {"torch": "1.0"}, LocalDevices((A10G,), "12.0")
    report = examine()
    assert len(report["gaps"]) >= 6
    for gap in [*report["gaps"], *report["gpus"]]:
        assert re.search(r"\b(pip install|mistral-trt build|sudo|venv)\b", gap["command"]), gap


def test_its_json_is_what_it_says(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    plugged_in(machine, A10G)
    assert main(["doctor", "--json", "--gpu", "NVIDIA A10G"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {
        *("mistral_trt", "python", "packages", "optional", "local", "memory_bytes", "disk_bytes"),
        *("gpus", "gaps", "works"),
    }
    assert [found["gpu"] for found in report["gpus"]] == ["a10g"]
    assert report["local"]["devices"] == [
        {
            "name": "NVIDIA A10G",
            "memory_bytes": A10G.memory_bytes,
            "driver": "580.82.07",
            "compute_capability": "8.6",
            "uuid": "GPU-8a1f",
        }
    ]
    assert report["optional"] == {"tensorrt": None, "tensorrt-rtx": "1.7.1.116", "cuda-bindings": "13.0.1"}
    assert report["packages"][0] == {
        **{"name": "numpy", "extra": "", "needs": ">=1.26.4"},
        **{"installed": "2.3.5", "state": "ok"},
    }
    assert report["memory_bytes"] > 0 and all(free > 0 for free in report["disk_bytes"].values())
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))


def test_people_get_lines_and_the_exit_status(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.installed["torch"] = "2.9"
    plugged_in(machine, A10G)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "" and "\x1b" not in shown.out
    assert re.search(r"^GPU here +NVIDIA A10G, 24.1 GB, compute capability 8.6, driver 580", shown.out, re.M)
    assert re.search(r"^export +torch 2.9 TOO OLD, onnx 1.23.2$", shown.out, re.M)
    row = r"^a10g +8.6  builds with tensorrt-rtx here; fits NVIDIA A10G here; fp16, bf16, "
    assert re.search(row, shown.out, re.M)
    assert "missing:\n  export: torch must be >=2.13, found 2.9\n      pip install" in shown.out
    assert shown.out.endswith("not everything works here\n")


def test_a_gpu_that_cannot_be_built_for_fails_only_when_it_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    assert "export, build and validate work here" in capsys.readouterr().out
    assert main(["doctor", "--gpu", "h100"]) == 1
    assert "missing:\n  h100: needs full TensorRT on the target\n" in capsys.readouterr().out
    assert main(["doctor", "--gpu", "nosuch"]) == 2
    assert "unknown GPU 'nosuch'; known are" in capsys.readouterr().err


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "precisions" in shown and "\x1b[" in shown
    assert re.search(r"l4 .*8\.9 .*builds with tensorrt-rtx here.* fp8", shown)


def test_it_is_a_command() -> None:
    assert COMMANDS["doctor"][:2] == ("mistral_trt.doctor", "doctor")
