"""Predicted memory and disk, and the refusals made of them."""

from pathlib import Path

import pytest

from mistral_trt.artifact import free_disk_bytes
from mistral_trt.config import ModelConfig
from mistral_trt.contract import plan_contract
from mistral_trt.engines.budget import (
    Budget,
    available_memory_bytes,
    check_device,
    check_host,
    check_plan,
    predict,
)
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.errors import BuildError

GB = 1_000_000_000

MISTRAL_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)


def budget_7b(max_batch_size: int = 1) -> Budget:
    contract = plan_contract(MISTRAL_7B, precision="fp16", max_batch_size=max_batch_size)
    return predict(contract, 14_483_000_000)


def test_the_prediction_of_a_7b() -> None:
    budget = budget_7b(max_batch_size=4)
    assert budget.ring_bytes_per_row == 2 * 32 * 8 * 4352 * 128 * 2
    assert budget.rings_bytes == 4 * budget.ring_bytes_per_row
    assert budget.device_bytes == 14_483_000_000 + budget.rings_bytes + GB
    assert budget.build_memory_bytes == int(1.9 * 14_483_000_000) + GB
    assert set(budget.to_json()) == {
        "weights_bytes",
        "ring_bytes_per_row",
        "max_batch_size",
        "build_memory_bytes",
        "plan_bytes",
        "device_bytes",
    }


def test_a_7b_fits_an_a10g_with_as_many_rows_as_are_said_to_fit() -> None:
    gpu = find_gpu("a10g")
    rows = budget_7b().rows_that_fit(gpu)
    check_device(budget_7b(rows), gpu)
    message = (
        rf"predicted: the engine needs .* GB of GPU memory \(14.48 GB weights, {rows + 1} rows of 0.57 GB"
    )
    with pytest.raises(BuildError, match=message) as error:
        check_device(budget_7b(rows + 1), gpu)
    assert str(error.value).endswith(
        f"and NVIDIA A10G has 24.00 GB; export again with --max-batch-size {rows} or less"
    )


def test_weights_too_large_for_a_gpu_name_those_that_are_not() -> None:
    budget = Budget(weights_bytes=45 * GB, ring_bytes_per_row=GB, max_batch_size=1)
    with pytest.raises(BuildError, match=r"it would fit l40s, a100-80, h100, h200$"):
        check_device(budget, find_gpu("a10g"))


def test_weights_too_large_for_every_gpu() -> None:
    budget = Budget(weights_bytes=400 * GB, ring_bytes_per_row=GB, max_batch_size=1)
    with pytest.raises(BuildError, match="no GPU of the catalogue is large enough"):
        check_device(budget, find_gpu("a10g"))


def test_too_little_memory_for_the_build() -> None:
    budget = budget_7b()
    check_host(budget, Path("out"), memory_bytes=budget.build_memory_bytes, disk_bytes=budget.plan_bytes)
    message = (
        r"predicted: the build needs 28.52 GB of memory \(1.9 x 14.48 GB weights \+ 1.00 GB\), and "
        "24.00 GB is available; free some or build on a machine that has that much"
    )
    with pytest.raises(BuildError, match=message):
        check_host(budget, Path("out"), memory_bytes=24 * GB, disk_bytes=100 * GB)


@pytest.mark.parametrize(
    ("precision", "factor"), [("int8", 1.6), ("int8-weight-only", 1.6), ("int4", 2.6), ("fp8", 1.6)]
)
def test_what_is_quantized_and_what_is_not_count_with_their_own_factors(
    precision: str, factor: float
) -> None:
    contract = plan_contract(MISTRAL_7B, precision=precision)
    budget = predict(contract, 4_500_000_000, quantized_bytes=4_000_000_000)
    assert budget.build_memory_bytes == int(factor * 4_000_000_000 + 1.9 * 500_000_000) + GB
    assert budget.plan_bytes == 4_540_000_000
    assert budget.to_json()["weights_bytes"] == 4_500_000_000
    message = rf"\({factor} x 4.00 GB quantized \+ 1.9 x 0.50 GB other weights \+ 1.00 GB\), and 3.00 GB"
    with pytest.raises(BuildError, match=message):
        check_host(budget, Path("out"), memory_bytes=3 * GB, disk_bytes=100 * GB)


def test_a_7b_in_int4_fits_a_t4_class_device_and_its_prediction_is_bytes() -> None:
    contract = plan_contract(MISTRAL_7B, precision="int4", max_batch_size=4)
    budget = predict(contract, 4_130_000_000, quantized_bytes=3_600_000_000)
    check_device(budget, find_gpu("t4"))
    assert all(isinstance(amount, int) for amount in budget.to_json().values())


@pytest.mark.parametrize(
    ("precision", "plan_bytes", "found"),
    [
        ("fp16", 1_089_000_000, None),
        ("fp16", 1_091_000_000, "and at most 0.09 GB more, the size of its weights, found 1.09 GB: TensorRT"),
        ("fp16", 911_000_000, None),
        (
            "fp16",
            909_000_000,
            "and at most 0.09 GB less, the size of its weights, found 0.91 GB: weights are",
        ),
        ("int4", 1_089_000_000, None),
        ("int4", 1_091_000_000, "expected a plan of 1.00 GB and at most 0.09 GB more, .*: TensorRT stored"),
        ("int8", 1_089_000_000, None),
        ("int8", 1_091_000_000, "expected a plan of 1.00 GB and at most 0.09 GB more, .*: TensorRT stored"),
        ("int4", 909_000_000, None),  # equal scales are stored once
    ],
)
def test_a_plan_that_does_not_hold_each_weight_once_is_refused(
    precision: str, plan_bytes: int, found: str | None
) -> None:
    contract = plan_contract(MISTRAL_7B, precision=precision)
    budget = predict(contract, GB, quantized_bytes=GB // 2 if precision != "fp16" else 0)
    if found is None:
        check_plan(budget, plan_bytes)
        return
    with pytest.raises(BuildError, match=found):
        check_plan(budget, plan_bytes)


def test_too_little_disk_for_the_plan() -> None:
    message = (
        "predicted: the plan needs 14.52 GB of disk, and 3.00 GB is free for out; free some or choose another"
    )
    with pytest.raises(BuildError, match=message):
        check_host(budget_7b(), Path("out"), memory_bytes=100 * GB, disk_bytes=3 * GB)


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a" / "b") > 0


def fake_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        ({"proc/self/cgroup": "0::/\n"}, 1_024_000),
        # a container sees its own group at the top, whatever the path says
        (
            {
                "proc/self/cgroup": "0::/host/path\n",
                "sys/fs/cgroup/memory.max": "500000\n",
                "sys/fs/cgroup/memory.current": "300000\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 5000\nactive_file 20000\n",
            },
            225_000,
        ),
        # the tightest group on the way up counts
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/memory.max": "400000\n",
                "sys/fs/cgroup/user/memory.current": "300000\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
                "sys/fs/cgroup/user/job/memory.current": "300000\n",
            },
            100_000,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/job\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "1\n",
                f"{V1}/job/memory.limit_in_bytes": "50000\n",
                f"{V1}/job/memory.usage_in_bytes": "60000\n",
            },
            0,
        ),
    ],
)
def test_available_memory_is_the_machines_or_the_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert available_memory_bytes(fake_root(tmp_path, files)) == expected


def test_available_memory_of_this_machine() -> None:
    assert available_memory_bytes() > 0
