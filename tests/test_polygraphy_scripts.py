"""The folder for Polygraphy: its inputs run in ONNX Runtime, its arguments are those Polygraphy takes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mistral_trt.contract import plan_contract
from mistral_trt.engines.network.parse import profile_ranges
from mistral_trt.engines.polygraphy_scripts import (
    TOLERANCES,
    polygraphy_folder,
    shapes,
    write_polygraphy,
)
from mistral_trt.errors import BuildError, ValidationError
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import open_session
from mistral_trt.validate import polygraphy_inputs
from mistral_trt.validate.polygraphy_inputs import Feed, input_tokens
from tests.models import TINY

Folder = Callable[..., Path]

COMMANDS = ("reference", "decode", "prefill", "layers-decode", "layers-prefill", "inspect", "inspect-engine")
needs_polygraphy = pytest.mark.skipif(find_spec("polygraphy") is None, reason="polygraphy is not installed")


@pytest.fixture(scope="module")
def onnx(onnx_folder: Folder) -> Path:
    return onnx_folder(precision="fp16", max_batch_size=3)


@pytest.fixture
def folder(onnx: Path, tmp_path: Path) -> Path:
    """The scripts beside an engine of no worth, all below one folder."""
    (tmp_path / "run").mkdir()
    copied = shutil.copytree(onnx, tmp_path / "run" / "onnx fp16")
    engine = tmp_path / "run" / "engines" / "a10g"
    engine.mkdir(parents=True)
    (engine / "model.plan").write_bytes(b"plan")
    return write_polygraphy(copied, engine, read_manifest(copied).contract, flavor="tensorrt-rtx")


# --- the inputs ----------------------------------------------------------------------------------------


def run_graph(onnx: Path, feed: Feed) -> dict[str, np.ndarray]:
    session = open_session(onnx / "model.onnx", 1)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("which", ["decode", "prefill"])
def test_a_feed_gives_the_logits_of_the_sequence_it_stands_for(onnx: Path, which: str) -> None:
    manifest = read_manifest(onnx)
    tokens = input_tokens(onnx, manifest).ids
    cache = open_cache(onnx)
    expected = cache.append(cache.acquire(), tokens, all_logits=True)
    feeds = list(getattr(polygraphy_inputs, which)(onnx))
    assert len(feeds) == 2
    for feed in feeds:
        assert list(feed) == [spec.name for spec in manifest.contract.inputs()]
        logits = run_graph(onnx, feed)["logits"]
        positions = np.take_along_axis(feed["position_ids"], feed["logits_index"], axis=1)
        assert positions.min() > 2 * manifest.contract.ring.capacity - 1
        np.testing.assert_allclose(logits, expected[positions], atol=1e-2)


def test_the_feeds_are_the_two_profiles_calls(onnx: Path) -> None:
    contract = read_manifest(onnx).contract
    one, every = polygraphy_inputs.decode(onnx)
    assert (one["input_ids"].shape, every["input_ids"].shape) == ((1, 1), (3, 1))
    assert every["position_ids"].ravel().tolist() == [24, 25, 26]  # R = 12
    whole, half = polygraphy_inputs.prefill(onnx)
    assert (whole["input_ids"].shape, whole["logits_index"].shape) == ((1, 4), (1, 4))
    assert (half["input_ids"].shape, half["logits_index"].tolist()) == ((1, 2), [[1]])
    for feed in (one, every, whole, half):
        for spec in contract.past():
            assert feed[spec.name].shape[1:] == spec.shape[1:] and feed[spec.name].dtype == np.float16
            assert (
                np.abs(feed[spec.name]).min(axis=(0, 1, 3)).size == 12 and feed[spec.name].any(axis=3).all()
            )


def test_the_feeds_are_the_same_every_time(onnx: Path) -> None:
    for which in (polygraphy_inputs.decode, polygraphy_inputs.prefill):
        for first, second in zip(which(onnx), which(onnx), strict=True):
            for name in first:
                np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.slow
def test_a_ring_that_never_turns_is_fed_as_far_as_it_goes(onnx_folder: Folder) -> None:
    folder = onnx_folder(precision="fp16", max_context=8, max_batch_size=2)
    _, every = polygraphy_inputs.decode(folder)
    assert every["position_ids"].max() < 8
    short = onnx_folder(precision="fp16", max_context=4, max_batch_size=8)
    with pytest.raises(ValidationError, match="8 positions are needed .* ends at 4; .* mistral-trt export"):
        list(polygraphy_inputs.decode(short))


# --- the folder ----------------------------------------------------------------------------------------


def test_it_stands_beside_the_engine_and_names_no_absolute_path(folder: Path, tmp_path: Path) -> None:
    assert folder == tmp_path / "run" / "engines" / "a10g-polygraphy"
    assert sorted(path.name for path in folder.iterdir()) == ["README.txt", "inputs.py", "run.sh"]
    for path in folder.iterdir():
        assert str(tmp_path) not in path.read_text() and not re.search("@[A-Z]", path.read_text())
    assert os.access(folder / "run.sh", os.X_OK)
    assert polygraphy_folder(Path("a/b")) == Path.cwd() / "a" / "b-polygraphy"


def test_it_is_written_again_over_itself(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.txt").write_text("keep")
    before = (folder / "run.sh").read_text()
    onnx = tmp_path / "run" / "onnx fp16"
    again = write_polygraphy(onnx, folder.with_name("a10g"), read_manifest(onnx).contract, flavor="tensorrt")
    assert again == folder and (folder / "mine.txt").read_text() == "keep"
    after = (folder / "run.sh").read_text()
    assert after == before.replace("USE_TENSORRT_RTX=1", "USE_TENSORRT_RTX=0") != before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_precision_with_nothing_to_compare_is_refused(tmp_path: Path, precision: str) -> None:
    contract = plan_contract(TINY, precision=precision, prefill_chunk=4)
    with pytest.raises(BuildError, match=f"cannot run {precision} on a CPU; .*mistral-trt export CHECKPOINT"):
        write_polygraphy(tmp_path / "onnx", tmp_path / "engine", contract, flavor="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


def test_a_plan_without_weights_is_refused(tmp_path: Path) -> None:
    contract = plan_contract(TINY, precision="fp16", prefill_chunk=4)
    with pytest.raises(BuildError, match="does not refit one, found weights 'external'.*mistral-trt build"):
        write_polygraphy(tmp_path, tmp_path / "e", contract, flavor="tensorrt-rtx", weights="external")


def test_the_shapes_are_those_of_the_profile() -> None:
    contract = plan_contract(TINY, precision="fp16", prefill_chunk=4, max_batch_size=8)
    words = shlex.split(shapes(contract, "decode"))
    assert words[:2] == ["--trt-min-shapes", "input_ids:[1,1]"]
    assert "past_key_values.1.value:[8,2,12,16]" in words
    assert [word for word in words if word.startswith("--")] == [
        "--trt-min-shapes",
        "--trt-opt-shapes",
        "--trt-max-shapes",
    ]
    assert "logits_index:[1,4]" in shlex.split(shapes(contract, "prefill"))
    # The profile indices that run.sh names.
    assert list(profile_ranges(contract)) == ["decode", "prefill"]


# --- the commands --------------------------------------------------------------------------------------


def issued(folder: Path, command: str) -> list[list[str]]:
    """The argument lists that `run.sh COMMAND` hands to Polygraphy."""
    stand_in = folder.parent / "stand-in"
    log = folder.parent / "log"
    log.unlink(missing_ok=True)
    stand_in.write_text(
        f"#!/bin/bash\nprintf '%s\\0' \"$POLYGRAPHY_USE_TENSORRT_RTX\" \"$@\" '' >> {shlex.quote(str(log))}\n"
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, "POLYGRAPHY": str(stand_in)}
    subprocess.run([folder / "run.sh", command], check=True, env=environment, cwd="/")
    calls = log.read_text().split("\0\0")
    return [call.split("\0") for call in calls if call]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_script_hands_on_files_that_exist(folder: Path, command: str) -> None:
    for rtx, *arguments in issued(folder, command):
        assert rtx == "1"
        model = arguments[1] if arguments[0] == "run" else arguments[2]
        assert (folder / model).is_file()
        for option in ("--data-loader-script",):
            if option in arguments:
                assert arguments[arguments.index(option) + 1] in ("inputs.py:decode", "inputs.py:prefill")


def test_the_reference_is_made_first_where_it_is_missing(folder: Path) -> None:
    first, second = issued(folder, "decode")
    assert first[2].endswith("model.onnx") and second[2].endswith("model.plan")
    (folder / "expected-decode.json").write_text("{}")
    ((_, _, model, *arguments),) = issued(folder, "decode")
    assert model == "../a10g/model.plan"
    assert arguments[arguments.index("--optimization-profile") + 1] == "0"


def test_an_unknown_command_is_told(folder: Path) -> None:
    done = subprocess.run([folder / "run.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"usage: .*run.sh reference\|decode\|prefill", done.stderr)


def polygraphy(*arguments: str, cwd: Path, rtx: str = "1") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": rtx}
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@needs_polygraphy
@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCES)
def test_polygraphy_takes_every_argument(folder: Path, tmp_path: Path, precision: str) -> None:
    """`--gen-script` parses the arguments and writes what would run; an unknown one ends it."""
    contract = plan_contract(TINY, precision=precision, prefill_chunk=4, max_batch_size=3)
    write_polygraphy(
        tmp_path / "run" / "onnx fp16", folder.with_name("a10g"), contract, flavor="tensorrt-rtx"
    )
    seen = set()
    for command in COMMANDS[:5] if precision == "fp16" else ("decode",):
        for rtx, *arguments in issued(folder, command):
            if " ".join(arguments) in seen:
                continue
            seen.add(" ".join(arguments))
            done = polygraphy(*arguments, "--gen-script", "-", cwd=folder, rtx=rtx)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Comparator.run" in done.stdout and "deprecated" not in (done.stdout + done.stderr).lower()
    assert polygraphy("run", "--no-such-option", cwd=folder).returncode != 0


@needs_polygraphy
@pytest.mark.slow
def test_polygraphy_runs_what_needs_no_gpu(folder: Path) -> None:
    shim = folder.parent / "polygraphy"
    shim.write_text(
        f"#!/bin/bash\nexec {shlex.quote(sys.executable)} -W ignore -c "
        "'import sys; from polygraphy.tools import main; sys.exit(main())' \"$@\"\n"
    )
    shim.chmod(0o755)
    environment = {**os.environ, "POLYGRAPHY": str(shim)}
    for command, words in (("reference", "Validat"), ("inspect", "Attention")):
        done = subprocess.run(
            [folder / "run.sh", command], capture_output=True, text=True, env=environment, cwd="/"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert words in done.stdout
    assert (folder / "expected-decode.json").stat().st_size > 1000
    # The same inputs against what was saved: what `decode` does on a GPU with the engine.
    again = [*issued(folder, "reference")[0][1:-2], "--load-outputs", "expected-decode.json"]
    done = polygraphy(
        *again, *shlex.split("--check-error-stat elemwise --atol 0.05 logits:0.5 --rtol 1e-3"), cwd=folder
    )
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
