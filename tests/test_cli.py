"""The command line: exit status, what goes to stdout and to stderr, and one line for every error."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_trt import __version__, cli
from mistral_trt.cli import COMMANDS, load, log_to_stderr, main
from mistral_trt.errors import ConfigError, MissingDependencyError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import manifest_sha256, read_manifest
from tests.checkpoints import altered
from tests.conftest import Folder

Command = Callable[[list[str]], int]


@pytest.fixture
def source(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(num_hidden_layers=1)


@pytest.fixture
def as_inspect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Command], None]:
    """Put a function in the place of `mistral-trt inspect`."""

    def place(function: Command) -> None:
        monkeypatch.setattr("mistral_trt.inspect.inspect", function)

    return place


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


# ---------------------------------------------------------------- which command


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["-h"]) == 0
    shown = capsys.readouterr().out
    for name, (_, _, purpose) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", shown, re.MULTILINE)


def test_no_command_shows_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: mistral-trt COMMAND" in capsys.readouterr().out


def test_an_unknown_command_shows_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprt"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mistral-trt: 'exprt' is not a command\n")
    assert "  export " in shown.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mistral-trt {__version__}\n"


def test_arguments_come_from_the_process_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mistral-trt", "--version"])
    assert main() == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_describes_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mistral-trt {command}")


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"gpus", "doctor"}))
def test_a_command_without_its_arguments_is_a_usage_error(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command])
    assert stopped.value.code == 2
    assert "required" in capsys.readouterr().err


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize("status", [0, 1])
def test_a_commands_status_is_the_exit_status(as_inspect: Callable[[Command], None], status: int) -> None:
    as_inspect(lambda _: status)
    assert main(["inspect"]) == status


def test_an_error_of_ours_is_one_line_and_status_two(
    as_inspect: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise ConfigError("expected this, found that; run: the repair")

    as_inspect(fail)
    assert main(["inspect"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (
        "",
        "mistral-trt inspect: expected this, found that; run: the repair\n",
    )


def test_an_error_that_is_not_ours_is_not_hidden(as_inspect: Callable[[Command], None]) -> None:
    def fail(_: list[str]) -> int:
        raise ZeroDivisionError

    as_inspect(fail)
    with pytest.raises(ZeroDivisionError):
        main(["inspect"])


def test_an_interrupt_says_so(
    as_inspect: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: list[str]) -> int:
        raise KeyboardInterrupt

    as_inspect(stop)
    assert main(["inspect"]) == 130
    assert "mistral-trt inspect: interrupted; nothing was left half-written" in capsys.readouterr().err


INSPECT = "import sys; from mistral_trt.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"


@pytest.mark.usefixtures("untraced")
def test_a_reader_that_stops_reading_ends_it_quietly(source: Path, tmp_path: Path) -> None:
    main(["export", str(source), "--out", str(tmp_path / "out")])
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(write, "wb") as closed:
        ended = subprocess.run(
            [sys.executable, "-c", INSPECT, str(tmp_path / "out")],
            stdin=subprocess.DEVNULL,
            stdout=closed,
            stderr=subprocess.PIPE,
            env=environment,
        )
    assert (ended.returncode, ended.stderr) == (141, b"")


# ---------------------------------------------------------------- what is not installed


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("mistral_trt.export.__main__", "export"),
        ("mistral_trt.export.demo_model", "demo"),
        ("mistral_trt.engines.__main__", "engines"),
        ("mistral_trt.validate.__main__", "validate"),
        ("mistral_trt.runtime.__main__", "onnxruntime"),
        ("mistral_trt.inspect", "all"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    def absent(_: str) -> object:
        raise ModuleNotFoundError("No module named 'torch.x'", name="torch.x")

    monkeypatch.setattr(cli, "import_module", absent)
    with pytest.raises(MissingDependencyError) as caught:
        load(module)
    assert str(caught.value) == (
        "this command needs the package 'torch.x', which is not installed; "
        f"run: pip install 'mistral-trt[{extra}]'"
    )


def test_a_missing_module_of_our_own_is_a_bug_and_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="mistral_trt.nothing"):
        load("mistral_trt.nothing")


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from mistral_trt.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("onnx_ir", ["export", "x", "--out", "y"], "export"),
        ("rich", ["gpus"], "engines"),
        ("numpy", ["generate", "x", "--prompt", "y"], "onnxruntime"),
        ("transformers", ["demo-model", "--out", "{tmp}"], "demo"),
    ],
)
def test_a_process_without_a_package_says_which_extra_brings_it(
    tmp_path: Path, package: str, arguments: list[str], extra: str
) -> None:
    ended = python(WITHOUT, package, *(a.format(tmp=tmp_path / "demo") for a in arguments))
    assert ended.returncode == 2
    assert re.fullmatch(
        rf"mistral-trt {arguments[0]}: .*{package}.*; run: pip install 'mistral-trt\[{extra}\]'\n",
        ended.stderr,
    )


# ---------------------------------------------------------------- export, identify, inspect


@pytest.mark.usefixtures("untraced")
def test_export_prints_the_folder_and_logs_to_stderr(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = [
        "--precision",
        "bf16",
        "--sliding-window",
        "6",
        "--prefill-chunk",
        "2",
        "--max-batch-size",
        "3",
    ]
    assert main(["export", str(source), "--out", str(out), *options, "--max-context", "50"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert "window of 6 tokens (overridden), chunks of 2; bf16: ring of 8 slots" in shown.err
    contract = read_manifest(out, "onnx").contract
    assert (contract.precision, contract.max_batch_size, contract.max_context) == ("bf16", 3, 50)
    assert (contract.ring.sliding_window, contract.ring.prefill_chunk) == (6, 2)


@pytest.mark.usefixtures("untraced")
def test_export_defaults(source: Path, tmp_path: Path) -> None:
    assert main(["export", str(source), "--out", str(tmp_path / "out")]) == 0
    contract = read_manifest(tmp_path / "out", "onnx").contract
    assert (contract.precision, contract.max_batch_size, contract.max_context) == ("fp16", 4, None)
    assert (contract.ring.sliding_window, contract.ring.prefill_chunk) == (8, 256)


@pytest.mark.parametrize(
    ("checkpoint", "options", "words"),
    [
        ("org/Model-7B", [], "hf download org/Model-7B --local-dir models/Model-7B"),
        ("nowhere", [], "nowhere does not exist; expected a checkpoint folder"),
        ("{source}/model.safetensors", [], "is a file; expected a checkpoint folder"),
        ("{tmp}/other", [], "model_type must be 'mistral', found 'qwen2'"),
        ("{source}", ["--prefill-chunk", "0"], "prefill_chunk must be a positive integer, found 0"),
        ("{source}", ["--max-batch-size", "-1"], "max_batch_size must be a positive integer, found -1"),
        ("{source}", ["--sliding-window", "0"], "sliding_window must be a positive integer, found 0"),
        ("{source}", ["--max-context", "0"], "max_context must be a positive integer, found 0"),
        ("{source}", ["--out", "{source}"], "holds the input"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_line(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    checkpoint: str,
    options: list[str],
    words: str,
) -> None:
    altered(source, tmp_path / "other", config={"model_type": "qwen2"})
    arguments = [checkpoint, "--out", "{tmp}/out", *options]
    status = main(["export", *(a.format(source=source, tmp=tmp_path) for a in arguments)])
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    errors = [line for line in shown.err.splitlines() if line not in caplog.messages]
    assert len(errors) == 1 and errors[0].startswith("mistral-trt export: ")
    assert words in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_precision_that_is_not_known_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "x", "--out", "y", "--precision", "fp64"])
    assert stopped.value.code == 2
    assert re.search("invalid choice: 'fp64'.*bf16.*fp16.*fp32", capsys.readouterr().err)


def test_identify_prints_name_and_hash(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identify", str(source)]) == 0
    assert capsys.readouterr().out == f"tiny-{Checkpoint.open(source).sources()['checkpoint'][:8]}\n"


@pytest.mark.usefixtures("untraced")
def test_inspect_shows_the_manifest(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["export", str(source), "--out", str(out), "--prefill-chunk", "4"])
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^stage +onnx, fp16$", shown, re.MULTILINE)
    assert re.search(r"^model +1 layers, hidden 64, heads 4/2 of 16, vocabulary 97$", shown, re.MULTILINE)
    assert re.search(r"^ring +W=8 C=4 R=12; no end$", shown, re.MULTILINE)
    assert main(["inspect", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data.pop("manifest_sha256") == manifest_sha256(out)
    assert data == read_manifest(out).to_json()


def test_inspect_refuses_what_is_no_artifact(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source)]) == 2
    assert re.fullmatch("mistral-trt inspect: .*looks like a checkpoint.*\n", capsys.readouterr().err)


# ---------------------------------------------------------------- the log


def test_the_log_is_plain_lines_on_stderr_however_often_it_is_set_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_to_stderr()
    log_to_stderr()
    logging.getLogger("mistral_trt").info("one line")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "one line\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "command"),
    [("export", "export"), ("engines", "build"), ("validate", "validate"), ("runtime", "generate")],
)
def test_a_stage_runs_as_a_module(stage: str, command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", f"mistral_trt.{stage}", "--help"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"usage: mistral-trt {command}")


def test_the_operating_systems_refusals_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 300)
    assert main(["identify", str(long)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mistral-trt identify: ") and "File name too long" in line
