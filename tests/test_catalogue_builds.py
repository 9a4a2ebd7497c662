"""Every compute capability of the catalogue in every precision: it builds, or is refused before a build.

What is expected stands here, in words of its own, and is not asked of the tables it checks. A new GPU file
with a new compute capability adds cases; nothing here names a GPU.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.contract import CACHE_DTYPES, QUANTIZED
from mistral_trt.engines import build as build_module
from mistral_trt.engines.build import build_engine
from mistral_trt.engines.gpu import load_catalogue
from mistral_trt.errors import BuildError, GpuError
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.manifest import read_manifest
from tests.models import write_checkpoint, write_tokenizer

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("modelopt.torch.quantization")  # quietly: importing it warns of torch's plans

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_trace")]

FIRST = {"fp16": 7.5, "bf16": 8.0, "int8": 8.0, "int8-weight-only": 7.5, "int4": 8.0, "fp8": 8.9}
"""Precision → the first compute capability that runs it."""

FULL_ONLY = ("9.0", "10.0", "10.3")
"""What TensorRT-RTX has no target for."""

GPUS = {gpu.compute_capability: gpu.key for gpu in load_catalogue().values()}
"""One GPU of each compute capability stands for all: a build is told nothing else of it."""

CASES = [(capability, precision) for capability in GPUS for precision in CACHE_DTYPES]


def refusal(capability: str, precision: str) -> tuple[type[Exception], str] | None:
    """The error that a build must end with before it begins, and its words; None where it builds."""
    if precision == "fp32":
        return BuildError, "cannot be built in fp32: TensorRT has no fused float32 attention"
    if float(capability) < FIRST[precision]:
        return GpuError, f"cannot run {precision}, which needs compute capability {FIRST[precision]} or later"
    if capability not in FULL_ONLY:
        return None
    if precision == "int8-weight-only":
        return GpuError, "full TensorRT documents weight-only quantization for INT4 alone"
    return (
        GpuError,
        r"TensorRT-RTX cannot build for .*; on a machine whose GPU is an .* --flavor tensorrt --out",
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision → ONNX folder of a model of one layer, calibrated on a few tokens where it is quantized."""
    root = tmp_path_factory.mktemp("catalogue")
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    checkpoint = write_tokenizer(
        write_checkpoint(root / "checkpoint", hidden_size=576, num_hidden_layers=1, vocab_size=259, **heads)
    )
    wishes = QuantizationSettings(samples=2, tokens=16)

    def folder(precision: str) -> Path:
        path = root / precision
        if not path.exists() and precision == "fp32":  # never built, so a manifest that says so will do
            manifest = read_manifest(shutil.copytree(folder("fp16"), path))
            replace(manifest, contract=replace(manifest.contract, precision=precision)).write(path)
        elif not path.exists():
            options: dict[str, Any] = {"prefill_chunk": 4, "max_batch_size": 2}
            if precision in QUANTIZED:
                options["quantization"] = wishes
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
                export_checkpoint(checkpoint, path, precision=precision, **options)
        return path

    return folder


@pytest.mark.parametrize(("capability", "precision"), CASES, ids=[f"SM{c}-{p}" for c, p in CASES])
def test_it_builds_or_says_why_not(
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    precision: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected, out = refusal(capability, precision), tmp_path / "engine"
    if expected:
        monkeypatch.setattr(build_module, "build_plan", lambda *_, **__: pytest.fail("it began to build"))
        with pytest.raises(expected[0], match=expected[1]):
            build_engine(folders(precision), GPUS[capability], out, flavor="tensorrt-rtx")
        assert not out.exists()
        return
    built = build_engine(folders(precision), GPUS[capability], out, flavor="tensorrt-rtx")
    manifest = read_manifest(out, "engine")
    assert manifest == built
    assert manifest.details["compute_capabilities"] == [capability]
    assert (manifest.details["gpus"], manifest.details["flavor"]) == ([GPUS[capability]], "tensorrt-rtx")
    assert manifest.contract.precision == precision
    assert manifest.details["compiled"]["attention_kernels"] == {"decode": 1, "prefill": 1}
    shutil.rmtree(out)


def test_the_catalogue_has_cases_of_every_kind() -> None:
    kinds = [refusal(capability, precision) for capability, precision in CASES]
    assert len(CASES) == len(GPUS) * len(CACHE_DTYPES) > 30
    assert sum(kind is None for kind in kinds) >= 20
    assert {kind[1].split()[0] for kind in kinds if kind} == {"cannot", "full", "TensorRT-RTX"}
