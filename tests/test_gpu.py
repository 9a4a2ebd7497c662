"""The GPU catalogue, what each GPU can run, and which TensorRT builds for it."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.engines import flavor as flavors
from mistral_trt.engines.__main__ import gpus
from mistral_trt.engines.flavor import (
    FULL,
    RTX,
    Flavor,
    builders_here,
    choose_flavor,
    likely_flavor,
    local_gpus,
)
from mistral_trt.engines.gpu import (
    RTX_TARGETS,
    GpuTarget,
    RtxSupport,
    find_gpu,
    load_catalogue,
    read_gpu,
)
from mistral_trt.engines.planning.settle import check_target
from mistral_trt.engines.precision import check_precision
from mistral_trt.engines.table import gpu_table
from mistral_trt.engines.versions import install_command
from mistral_trt.errors import BuildError, GpuError, MissingDependencyError

KEYS = "a10 a100-40 a100-80 a10g h100 h200 l4 l40s rtx3090 rtx4090 rtx5090 t4".split()

GOOD = """
name = "NVIDIA Test"
aliases = ["Tesla Test"]
segment = "data centre"
compute_capability = "8.6"
memory_gb = 24
memory_mib = 23028
memory_bandwidth_gb_per_s = 600
fp16_tflops = 70
int8_tops = 140

[sources]
compute_capability = "s"
memory_gb = "s"
memory_mib = "s"
memory_bandwidth_gb_per_s = "s"
fp16_tflops = "s"
int8_tops = "s"
"""


def gpu_file(folder: Path, text: str = GOOD, key: str = "test") -> Path:
    path = folder / f"{key}.toml"
    path.write_text(text)
    return path


def test_the_catalogue_holds_the_gpus_of_the_readme() -> None:
    assert sorted(load_catalogue()) == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_a_gpu_answers_to_key_name_and_aliases_in_any_case(key: str) -> None:
    target = load_catalogue()[key]
    unambiguous = [alias for alias in target.aliases if alias != "a100"]
    for name in (key, key.upper(), target.name, f" {target.name.lower()} ", *unambiguous):
        assert find_gpu(name) == target


def test_figures_are_those_of_the_datasheets() -> None:
    a10g = find_gpu("a10g")
    assert (a10g.name, a10g.compute_capability, a10g.sm) == ("NVIDIA A10G", "8.6", "SM86")
    assert (a10g.memory_gb, a10g.memory_bandwidth_gb_per_s) == (24, 600)
    assert (a10g.fp16_tflops, a10g.int8_tops, a10g.fp8_tflops) == (70, 140, None)
    assert a10g.memory_mib == 23028


def test_memory_is_what_the_driver_says() -> None:
    for gpu in load_catalogue().values():
        assert gpu.memory_bytes == gpu.memory_mib * 2**20
        assert gpu.memory_gb < gpu.memory_bytes / 1e9 < 1.08 * gpu.memory_gb, gpu.key


def test_fp8_has_a_figure_exactly_where_the_hardware_has_it() -> None:
    for gpu in load_catalogue().values():
        assert (gpu.fp8_tflops is not None) == (float(gpu.compute_capability) >= 8.9), gpu.key


def test_an_unknown_gpu_lists_the_known_ones_in_one_line() -> None:
    with pytest.raises(GpuError) as error:
        find_gpu("nosuch")
    assert str(error.value) == f"unknown GPU 'nosuch'; known are {', '.join(KEYS)}"


def test_an_ambiguous_name_asks_which() -> None:
    with pytest.raises(GpuError, match="GPU 'A100' is ambiguous: say a100-40 or a100-80"):
        find_gpu("A100")


def test_adding_a_gpu_is_adding_a_file(tmp_path: Path) -> None:
    gpu_file(tmp_path)
    catalogue = load_catalogue(tmp_path)
    assert find_gpu("tesla test", catalogue).key == "test"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "NVIDIA Test"', "name = ", "is not TOML"),
        ("fp16_tflops = 70\n", "", r"missing fields \['fp16_tflops'\]"),
        ("int8_tops = 140\n", "int8_tops = 140\nint4_tops = 280\n", r"unknown fields \['int4_tops'\]"),
        ('aliases = ["Tesla Test"]', 'aliases = "Tesla Test"', "aliases must be a list"),
        ('aliases = ["Tesla Test"]', "aliases = [4090]", "name and aliases must be strings"),
        ('"8.6"', '"86"', "compute_capability must look like \"8.6\", found '86'"),
        ('"data centre"', '"desktop"', "segment must be one of"),
        ("memory_gb = 24", "memory_gb = 0", "memory_gb must be a positive number, found 0"),
        ("memory_gb = 24", "memory_gb = true", "memory_gb must be a positive number, found True"),
        ("memory_mib = 23028\n", "", r"missing fields \['memory_mib'\]"),
        ("memory_mib = 23028", "memory_mib = -1", "memory_mib must be a positive number, found -1"),
        ("memory_mib = 23028", "memory_mib = 23028.5", "memory_mib must be a whole number, found 23028.5"),
        (
            "memory_mib = 23028",
            "memory_mib = 24",
            "memory_mib must be the total that nvidia-smi prints for 24 GB, found 24 MiB, which is 0.0 GB",
        ),
        ('memory_mib = "s"\n', "", r"memory_mib has no entry in \[sources\]"),
        ("int8_tops = 140", 'int8_tops = "140"', "int8_tops must be a positive number, found '140'"),
        ('int8_tops = "s"\n', "", r"int8_tops has no entry in \[sources\]"),
        ('compute_capability = "s"\n', "", r"compute_capability has no entry in \[sources\]"),
        ('"8.6"', '"8.9"', r"fp8_tflops must be given from .* 8.9 on, and not below; found None with 8.9"),
        (
            "int8_tops = 140\n\n[sources]",
            'int8_tops = 140\nfp8_tflops = 140\n\n[sources]\nfp8_tflops = "s"',
            r"fp8_tflops must be given from .* 8.9 on, and not below; found 140 with 8.6",
        ),
    ],
)
def test_a_wrong_data_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(GpuError, match=message):
        read_gpu(gpu_file(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize(
    ("key", "support"),
    [
        ("rtx3090", RtxSupport.LISTED),
        ("rtx5090", RtxSupport.LISTED),
        ("a10g", RtxSupport.UNLISTED),  # a data-centre board
        ("a100-80", RtxSupport.UNLISTED),  # SM80 is in no list at all
        ("h100", RtxSupport.IMPOSSIBLE),
        ("h200", RtxSupport.IMPOSSIBLE),
    ],
)
def test_what_tensorrt_rtx_is_to_a_gpu(key: str, support: RtxSupport) -> None:
    assert find_gpu(key).rtx_support is support


def test_the_targets_of_tensorrt_rtx_are_those_of_the_installed_builder() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    names = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert names == {"SM" + target.replace(".", "") for target in RTX_TARGETS}


LOWEST = {"fp16": 7.5, "bf16": 8.0, "int8": 8.0, "int8-weight-only": 7.5, "int4": 8.0, "fp8": 8.9}


@pytest.mark.parametrize("precision", LOWEST)
def test_precisions_run_from_their_first_capability_on(precision: str) -> None:
    for gpu in load_catalogue().values():
        if precision == "int8-weight-only" and gpu.rtx_support is RtxSupport.IMPOSSIBLE:
            with pytest.raises(GpuError, match="for INT4 alone"):
                check_precision([gpu], precision)
        elif float(gpu.compute_capability) >= LOWEST[precision]:
            check_precision([gpu], precision)
        else:
            with pytest.raises(GpuError, match=f"cannot run {precision}, which needs compute capability"):
                check_precision([gpu], precision)


def test_every_precision_but_fp32_has_a_first_capability() -> None:
    assert set(LOWEST) == set(CACHE_DTYPES) - {"fp32"}


@pytest.mark.parametrize(
    ("gpu", "precision", "message"),
    [
        (
            "t4",
            "bf16",
            "NVIDIA T4 (compute capability 7.5) cannot run bf16, which needs compute capability 8.0 or later "
            "(bfloat16 arithmetic); export with --precision fp16 or int8-weight-only",
        ),
        (
            "t4",
            "int8",
            "NVIDIA T4 (compute capability 7.5) cannot run int8, which needs compute capability 8.0 or later "
            "(TensorRT's INT8 linears between float32); export with --precision fp16 or int8-weight-only",
        ),
        (
            "t4",
            "int4",
            "NVIDIA T4 (compute capability 7.5) cannot run int4, which needs compute capability 8.0 or later "
            "(TensorRT's INT4 kernels); export with --precision fp16 or int8-weight-only",
        ),
        (
            "a10g",
            "fp8",
            "NVIDIA A10G (compute capability 8.6) cannot run fp8, which needs compute capability 8.9 or "
            "later (FP8 tensor cores); export with --precision fp16, bf16, int8, int8-weight-only or int4",
        ),
    ],
)
def test_a_precision_the_hardware_lacks_is_refused(gpu: str, precision: str, message: str) -> None:
    with pytest.raises(GpuError) as error:
        check_precision([find_gpu(gpu)], precision)
    assert str(error.value) == message


def test_the_command_checks_a_precision(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpus(["--check", "l4", "--precision", "fp8", "--flavor", "tensorrt-rtx"]) == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(GpuError, match="NVIDIA A10G .* cannot run fp8"):
        gpus(["--check", "a10g", "--precision", "fp8"])


def test_fp32_is_refused_with_the_reason() -> None:
    with pytest.raises(BuildError, match=r"cannot be built in fp32: TensorRT has no fused float32 attention"):
        check_precision([find_gpu("a10g")], "fp32")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> "type[Machine]":
    """A machine whose installed packages and GPUs a test sets."""
    Machine.installed, Machine.gpus = {RTX.name}, []
    monkeypatch.setattr(Flavor, "installed", property(lambda self: self.name in Machine.installed))
    monkeypatch.setattr(flavors, "local_gpus", lambda: list(Machine.gpus))
    return Machine


class Machine:
    installed: set[str]
    gpus: list[str]


def test_auto_takes_rtx_without_full_tensorrt(machine: type[Machine]) -> None:
    machine.gpus = ["NVIDIA A10G"]
    assert choose_flavor(find_gpu("a10g")) == RTX


def test_auto_takes_full_tensorrt_on_the_target(machine: type[Machine]) -> None:
    machine.installed, machine.gpus = {RTX.name, FULL.name}, ["NVIDIA H100 80GB HBM3"] * 8
    assert choose_flavor(find_gpu("h100")) == FULL


@pytest.mark.parametrize("here", [[], ["NVIDIA L4"], ["NVIDIA A10G", "NVIDIA L4"]])
def test_auto_takes_rtx_where_full_tensorrt_is_not_on_the_target(
    machine: type[Machine], here: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    machine.installed, machine.gpus = {RTX.name, FULL.name}, here
    caplog.set_level("INFO", "mistral_trt")
    assert choose_flavor(find_gpu("a10g")) == RTX
    assert "full TensorRT builds only on the target itself, and this machine has" in caplog.text


@pytest.mark.parametrize("wanted", ["auto", "tensorrt-rtx"])
def test_h100_without_full_tensorrt_is_told_what_to_do(machine: type[Machine], wanted: str) -> None:
    with pytest.raises(GpuError) as error:
        choose_flavor(find_gpu("h100"), wanted)
    assert str(error.value) == (
        "TensorRT-RTX cannot build for NVIDIA H100 SXM (SM90); on a machine whose GPU is an NVIDIA H100 SXM, "
        "run: pip install 'tensorrt>=11.0' && mistral-trt build ONNX_DIR --gpu h100 --flavor tensorrt "
        "--out DIR"
    )


def test_h100_with_full_tensorrt_elsewhere_is_refused(machine: type[Machine]) -> None:
    machine.installed = {RTX.name, FULL.name}
    with pytest.raises(GpuError, match="and this machine has no NVIDIA GPU; on a machine whose GPU is"):
        choose_flavor(find_gpu("h100"))


def test_full_tensorrt_asked_for_elsewhere_offers_rtx(machine: type[Machine]) -> None:
    machine.installed, machine.gpus = {RTX.name, FULL.name}, ["NVIDIA L4"]
    with pytest.raises(
        GpuError, match="this machine has NVIDIA L4; build here with --flavor tensorrt-rtx, or"
    ):
        choose_flavor(find_gpu("a10g"), "tensorrt")


def test_full_tensorrt_asked_for_and_not_installed(machine: type[Machine]) -> None:
    message = "full TensorRT is not installed; run, .* GPU: pip install 'tensorrt>=11.0'$"
    with pytest.raises(MissingDependencyError, match=message):
        choose_flavor(find_gpu("a10g"), "tensorrt")


def test_full_tensorrt_gives_no_word_on_int8_weight_only(machine: type[Machine]) -> None:
    machine.installed, machine.gpus = {RTX.name, FULL.name}, ["NVIDIA A10G"]
    for flavor in ("auto", "tensorrt"):
        with pytest.raises(GpuError) as error:
            check_target("a10g", "int8-weight-only", flavor)
        assert str(error.value) == (
            "full TensorRT documents weight-only quantization for INT4 alone, so nothing says that it keeps "
            "int8-weight-only in INT8; export with --precision int8, or build with --flavor tensorrt-rtx"
        )
    assert check_target("a10g", "int8-weight-only", "tensorrt-rtx")[1] == RTX
    assert check_target("a10g", "int4", "tensorrt")[1] == FULL
    assert check_target("a10g", "int8")[1] == FULL


@pytest.mark.parametrize("flavor", ["auto", "tensorrt", "tensorrt-rtx"])
def test_a_gpu_of_full_tensorrt_alone_is_told_at_once(machine: type[Machine], flavor: str) -> None:
    """Here nothing is installed that builds for an H100: what to install would not help."""
    with pytest.raises(GpuError, match="for INT4 alone, .*; export with --precision int8$"):
        check_target("h100", "int8-weight-only", flavor)


def test_auto_builds_int8_weight_only_where_rtx_is_what_there_is(machine: type[Machine]) -> None:
    assert check_target("a10g", "int8-weight-only")[1] == RTX


@pytest.mark.parametrize("wanted", ["auto", "tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("installed", [{RTX.name}, {FULL.name}, {RTX.name, FULL.name}])
@pytest.mark.parametrize("here", [[], ["NVIDIA A10G"], ["NVIDIA H200"] * 2, ["NVIDIA A10G", "NVIDIA L4"]])
def test_who_builds_here_is_who_is_chosen(
    machine: type[Machine], wanted: str, installed: set[str], here: list[str]
) -> None:
    machine.installed, machine.gpus = installed, here
    gpus = load_catalogue().values()
    builders = builders_here(gpus, wanted)
    for gpu in gpus:
        try:
            chosen = choose_flavor(gpu, wanted)
        except (GpuError, MissingDependencyError):
            assert gpu.key not in builders
            continue
        assert likely_flavor(gpu, wanted) == chosen
        assert builders.get(gpu.key) == (chosen if chosen.installed else None)


def test_a_flavor_that_does_not_exist(machine: type[Machine]) -> None:
    with pytest.raises(GpuError, match="flavor must be one of auto, tensorrt, tensorrt-rtx, found 'trt'"):
        choose_flavor(find_gpu("a10g"), "trt")


@pytest.mark.parametrize("flavor", [FULL, RTX])
def test_a_flavor_that_is_missing_says_what_brings_it(flavor: Flavor) -> None:
    message = f"this needs {flavor.name}, which is not installed; run: {install_command(flavor.name)}"
    with pytest.raises(MissingDependencyError, match=f"^{re.escape(message)}$"):
        replace(flavor, module="nosuch_tensorrt").load()


def test_local_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_gpus() == []
    tool = tmp_path / "nvidia-smi"
    lines = ("NVIDIA A10G, 23028, 580, 8.6, GPU-1", "NVIDIA L4, 23034, 580, 8.9, GPU-2")
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    assert local_gpus() == ["NVIDIA A10G", "NVIDIA L4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2")
    assert local_gpus() == ["NVIDIA L4"], "full TensorRT builds for the GPU that CUDA sees"
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert local_gpus() == []


def test_names_are_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpus(["--names"]) == 0
    assert sorted(capsys.readouterr().out.split("\n")) == ["", *KEYS]


def test_the_table_is_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpus([]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    for gpu in load_catalogue().values():
        row = next(line for line in out.splitlines() if line.split()[:1] == [gpu.key])
        for part in cells(gpu):
            assert part in row
        assert not gpu.aliases or f"  {gpu.key}: {', '.join(gpu.aliases)}\n" in out


def cells(gpu: GpuTarget) -> list[str]:
    figures = (gpu.memory_gb, gpu.memory_bandwidth_gb_per_s, gpu.fp16_tflops, gpu.int8_tops)
    return [gpu.key, gpu.name, gpu.sm[2:], *(f"{figure:g}" for figure in figures), gpu.rtx_support.value]


def test_the_table_cuts_no_figure_on_a_narrow_terminal() -> None:
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=True, no_color=True).print(
        gpu_table(list(load_catalogue().values()))
    )
    assert "…" not in file.getvalue()


@pytest.mark.parametrize("precision", ["nonsense", "int9", ""])
def test_a_precision_that_does_not_exist_lists_those_that_do(precision: str) -> None:
    with pytest.raises(BuildError, match="one of fp16, bf16, int8, int8-weight-only, int4, fp8, fp32, found"):
        check_precision([find_gpu("a10g")], precision)
