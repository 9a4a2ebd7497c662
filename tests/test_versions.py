"""Which TensorRT a build asks for, and that an older one is refused with the command that gets another."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_trt.contract import CACHE_DTYPES, GraphContract, Ring
from mistral_trt.engines import build as build_module
from mistral_trt.engines.build import build_engine
from mistral_trt.engines.flavor import FULL, RTX
from mistral_trt.engines.versions import FEATURES, Feature, check_version, features_of, oldest_usable
from mistral_trt.errors import BuildError
from mistral_trt.export.onnx_folder import export_checkpoint
from tests.conftest import Folder
from tests.models import TINY

trt = pytest.importorskip("tensorrt_rtx")

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
CONTRACT = GraphContract(TINY, "fp16", Ring(8, 4), 1, None)
PRECISIONS = tuple(CACHE_DTYPES)


def test_the_project_asks_for_the_version_that_has_it_all() -> None:
    asked = [need for need in PROJECT["optional-dependencies"]["engines"] if need.startswith("tensorrt")]
    assert asked == [f"tensorrt-rtx>={oldest_usable(RTX.name)}"]


def test_full_tensorrt_must_be_of_the_kind_the_audit_can_read() -> None:
    assert oldest_usable(FULL.name) == "11.0"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("external", [False, True])
def test_what_is_installed_has_it_all(precision: str, external: bool) -> None:
    features = features_of(replace(CONTRACT, precision=precision), RTX.name, external=external)
    check_version(RTX.name, trt.__version__, features)


def test_what_a_build_asks_for() -> None:
    plain = features_of(CONTRACT, FULL.name)
    assert {"attention", "rings", "rotary", "rms-norm"} <= set(plain)
    assert not {"bf16", "int4", "fp8", "external", "ahead-of-time"} & set(plain)
    assert set(features_of(CONTRACT, RTX.name)) - set(plain) == {"ahead-of-time"}
    assert set(features_of(CONTRACT, FULL.name, external=True)) - set(plain) == {"external"}
    for precision, feature in {
        "int8-weight-only": "int8",
        "int4": "int4",
        "fp8": "fp8",
        "bf16": "bf16",
    }.items():
        asked = features_of(replace(CONTRACT, precision=precision), FULL.name)
        assert set(asked) - set(plain) == {feature}
    asked_of = {name for p in PRECISIONS for name in features_of(replace(CONTRACT, precision=p), RTX.name)}
    assert asked_of | {"external"} == set(FEATURES)


@pytest.mark.parametrize(
    ("flavor", "version", "what"),
    [
        ("tensorrt", "10.13.3.9", "the operator Attention as one fused layer needs tensorrt 10.14 or later"),
        ("tensorrt", "10.16.1.11", "an attention that tells its mask and lengths, .* needs tensorrt 11.0"),
        (
            "tensorrt-rtx",
            "1.4.0.76",
            "an attention that tells its mask and lengths, .* needs tensorrt-rtx 1.5",
        ),
        ("tensorrt-rtx", "1.6.1.120", "the operator RMSNormalization needs tensorrt-rtx 1.7.1 or later"),
    ],
)
def test_an_older_version_is_refused_and_what_it_lacks_is_named(flavor: str, version: str, what: str) -> None:
    command = f"run: pip install '{flavor}>={oldest_usable(flavor)}'"
    with pytest.raises(BuildError, match=rf"{what}.*, found {version}; {re.escape(command)}$"):
        check_version(flavor, version, features_of(CONTRACT, flavor))


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_a_gate_of_its_own(name: str) -> None:
    for flavor, oldest in FEATURES[name].oldest.items():
        check_version(flavor, oldest, (name,))
        check_version(flavor, f"{oldest}.99.post1", (name,))
        with pytest.raises(BuildError, match=rf"needs {flavor} {oldest} or later, found 0.9"):
            check_version(flavor, "0.9", (name,))


def test_versions_are_compared_as_numbers() -> None:
    check_version("tensorrt", "10.15.1", ("int4",))
    with pytest.raises(BuildError, match="bfloat16 needs tensorrt 9.0 or later, found 8.10.1"):
        check_version("tensorrt", "8.10.1", ("bf16",))
    with pytest.raises(
        BuildError, match="expected a version like 1.7.1, found 'nightly'; install TensorRT again"
    ):
        check_version("tensorrt", "nightly", ("bf16",))


def test_what_a_flavor_never_has_is_refused() -> None:
    with pytest.raises(
        BuildError,
        match="^tensorrt does not have: a build for a GPU that is not there; run: pip install 'tensorrt-rtx",
    ):
        check_version("tensorrt", "99", ("ahead-of-time",))


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_has_a_source(name: str) -> None:
    feature = FEATURES[name]
    assert re.search(r"github\.com|docs\.nvidia\.com|bindings|oldest tried", feature.source)
    if feature.oldest["tensorrt-rtx"] == "1.7.1":
        assert "oldest tried" in feature.source


def test_an_old_version_is_refused_before_a_build(
    tiny_checkpoint: Folder, untraced: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_checkpoint(tiny_checkpoint(), tmp_path / "onnx", precision="fp16", prefill_chunk=4)
    younger = Feature("a build for a GPU that is not there", {"tensorrt-rtx": "99.1"}, "oldest tried")
    monkeypatch.setitem(FEATURES, "ahead-of-time", younger)
    monkeypatch.setattr(build_module, "build_plan", lambda *a, **k: pytest.fail("built"))
    with pytest.raises(BuildError, match=r"needs tensorrt-rtx 99.1 or later, found 1\.7.*; run: pip install"):
        build_engine(tmp_path / "onnx", "a10g", tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
