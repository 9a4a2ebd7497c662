"""Several GPUs for one plan: how they are named, ordered and told apart from what cannot share one."""

from itertools import permutations

import pytest

from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.engines.gpu import find_gpu, load_catalogue
from mistral_trt.engines.targets import TargetSet, group_targets, parse_gpus
from mistral_trt.errors import BuildError, GpuError


def keys(names: str | list[str]) -> list[str]:
    return [target.key for target in parse_gpus(names)]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("a10g", ["a10g"]),
        ("a10g,l4", ["a10g", "l4"]),
        ("l4,a10g", ["l4", "a10g"]),
        (" A10G , L4, ", ["a10g", "l4"]),
        ("a10g l4", ["a10g", "l4"]),
        ("NVIDIA A10G", ["a10g"]),
        ("NVIDIA A10G, rtx 4090", ["a10g", "rtx4090"]),
        (["a10g", "l4"], ["a10g", "l4"]),
        (["a10g,l4", "t4"], ["a10g", "l4", "t4"]),
        ("a10g,NVIDIA A10G,a10g", ["a10g"]),
    ],
)
def test_names_are_separated_by_commas_or_blanks_and_count_once(
    names: str | list[str], found: list[str]
) -> None:
    assert keys(names) == found


@pytest.mark.parametrize("key", load_catalogue())
def test_every_name_of_the_catalogue_is_one_gpu(key: str) -> None:
    target = find_gpu(key)
    assert parse_gpus(target.name) == parse_gpus([key]) == [target]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a10g,nosuch", "unknown GPU 'nosuch'; known are"),
        ("a10g nosuch", "unknown GPU 'nosuch'; known are"),
        ("NVIDIA Nosuch", "unknown GPU 'NVIDIA Nosuch'; known are"),
        ("l4,a100", "GPU 'a100' is ambiguous: say a100-40 or a100-80"),
        ("l4 a100", "GPU 'a100' is ambiguous: say a100-40 or a100-80"),
        (" , ", "expected at least one GPU, found ' , '; run: mistral-trt gpus"),
        ([], "expected at least one GPU, found ''"),
    ],
)
def test_a_name_that_is_no_gpu_is_refused(names: str | list[str], message: str) -> None:
    with pytest.raises(GpuError) as error:
        parse_gpus(names)
    assert str(error.value).startswith(message)


def test_a_set_is_the_same_in_any_order() -> None:
    for order in permutations(["rtx5090", "l4", "a10g", "t4"]):
        found = group_targets(parse_gpus(list(order)), "fp16")
        assert found.name == "t4+a10g+l4+rtx5090"
        assert found.compute_capabilities == ("7.5", "8.6", "8.9", "12.0"), "numbers, not texts, are compared"
        assert found.sms == ("SM75", "SM86", "SM89", "SM120")


def test_boards_of_one_capability_share_it_and_the_smallest_decides() -> None:
    found = group_targets(parse_gpus("l40s,rtx4090,l4,a10g"), "fp16")
    assert found.name == "a10g+l4+l40s+rtx4090"
    assert found.compute_capabilities == ("8.6", "8.9")
    assert found.smallest.memory_gb == 24
    assert group_targets(parse_gpus("a100-80,a100-40"), "fp16").smallest.key == "a100-40"


@pytest.mark.parametrize("key", load_catalogue())
def test_one_gpu_is_a_set_of_itself(key: str) -> None:
    target = find_gpu(key)
    found = group_targets([target], "fp16")
    assert found == TargetSet((target,))
    assert (found.name, found.smallest) == (key, target)
    assert found.compute_capabilities == (target.compute_capability,)


def test_a_gpu_that_rtx_cannot_target_is_built_by_itself() -> None:
    with pytest.raises(GpuError) as error:
        group_targets(parse_gpus("l4,h100,a10g"), "fp16")
    assert str(error.value) == (
        "several GPUs share a plan of TensorRT-RTX, which cannot build for NVIDIA H100 SXM (SM90); "
        "on a machine whose GPU is an NVIDIA H100 SXM, run: pip install 'tensorrt>=11.0' && mistral-trt "
        "build ONNX_DIR --gpu h100 --flavor tensorrt --out DIR; here, run: mistral-trt build ONNX_DIR "
        "--gpu a10g,l4 --flavor tensorrt-rtx --out DIR"
    )


def test_two_gpus_of_full_tensorrt_do_not_share_a_plan_either() -> None:
    with pytest.raises(GpuError) as error:
        group_targets(parse_gpus("h100,h200"), "fp16")
    assert "cannot build for NVIDIA H100 SXM (SM90) and NVIDIA H200 (SM90)" in str(error.value)
    assert str(error.value).count("--flavor tensorrt --out DIR") == 2
    assert "here, run" not in str(error.value)


def test_full_tensorrt_takes_one_gpu() -> None:
    with pytest.raises(GpuError, match="full TensorRT builds for one GPU, .* found a10g, l4; build each on"):
        group_targets(parse_gpus("a10g,l4"), "fp16", "tensorrt")
    assert group_targets(parse_gpus("a10g"), "fp16", "tensorrt").name == "a10g"
    assert group_targets(parse_gpus("a10g,l4"), "fp16", "tensorrt-rtx").name == "a10g+l4"


def test_a_precision_must_run_on_all_of_them() -> None:
    with pytest.raises(GpuError) as error:
        group_targets(parse_gpus("l4,t4,a10g"), "fp8")
    assert str(error.value) == (
        "not every GPU of t4, a10g, l4 runs fp8: NVIDIA T4 (compute capability 7.5), NVIDIA A10G (compute "
        "capability 8.6) cannot; build for --gpu l4 alone, or export with a precision that all of them run: "
        "fp16, int8-weight-only"
    )


def test_where_none_runs_it_only_the_precision_is_left() -> None:
    with pytest.raises(GpuError) as error:
        group_targets(parse_gpus("a10g,a10"), "fp8")
    assert "alone" not in str(error.value)
    assert str(error.value).endswith("fp16, bf16, int8, int8-weight-only, int4")


def test_one_gpu_keeps_its_own_words() -> None:
    with pytest.raises(GpuError, match="NVIDIA A10G .* cannot run fp8, which needs compute capability 8.9"):
        group_targets(parse_gpus("a10g"), "fp8")


@pytest.mark.parametrize(
    ("precision", "message"), [("fp32", "no fused float32 attention"), ("int9", "must be one of")]
)
def test_a_precision_that_no_engine_has_is_not_about_the_gpus(precision: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        group_targets(parse_gpus("a10g,l4"), precision)


def test_what_is_offered_instead_is_accepted() -> None:
    for precision in CACHE_DTYPES:
        try:
            group_targets(parse_gpus("t4,a10g,l4"), precision)
        except (GpuError, BuildError) as error:
            if "all of them run: " in str(error):
                for offered in str(error).rsplit("all of them run: ")[1].split(", "):
                    group_targets(parse_gpus("t4,a10g,l4"), offered)
