"""The commands `generate` and `chat`: an option is a parameter, and Ctrl-C ends an answer, not the talk."""

import builtins
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.cli import run
from mistral_trt.runtime import Engine, Piece, SamplingParams, Stream
from mistral_trt.runtime import __main__ as command
from tests.conftest import Folder


@pytest.fixture(scope="module")
def folder(onnx_folder: Folder) -> Path:
    return onnx_folder(tokenizer=True, vocab_size=259, eos_token_id=1)


def test_generate_prints_what_the_engine_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.9, top_k=50, seed=3, ignore_eos=True)
    with Engine.load(folder) as engine:
        (expected,) = engine.generate(["naïve 日本"], params)
    asked = "--max-tokens 20 --temperature 0.9 --top-k 50 --seed 3 --ignore-eos".split()
    assert run("generate", [str(folder), "--prompt", "naïve 日本", *asked]) == 0
    assert capsys.readouterr().out == expected.text + "\n"


def test_several_texts_are_set_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=3, ignore_eos=True, n=3)
    with Engine.load(folder) as engine:
        expected = [output.text for output in engine.generate(["x"], params)]
    asked = "--max-tokens 8 --temperature 0.9 --seed 3 --ignore-eos --n 3".split()
    assert run("generate", [str(folder), "--prompt", "x", *asked]) == 0
    assert capsys.readouterr().out == "\n---\n".join(expected) + "\n"


OPTIONS: dict[str, dict[str, Any]] = {
    "--max-tokens 7": {"max_tokens": 7},
    "--temperature 0.5": {"temperature": 0.5},
    "--top-k 3": {"top_k": 3},
    "--top-p 0.5": {"top_p": 0.5},
    "--min-p 0.1": {"min_p": 0.1},
    "--repetition-penalty 1.5": {"repetition_penalty": 1.5},
    "--presence-penalty 0.5": {"presence_penalty": 0.5},
    "--frequency-penalty 0.5": {"frequency_penalty": 0.5},
    "--logit-bias 7=-inf --logit-bias 8=1.5": {"logit_bias": {7: float("-inf"), 8: 1.5}},
    "--seed 9": {"seed": 9},
    "--stop a --stop bc": {"stop": ("a", "bc")},
    "--stop-token-id 4 --stop-token-id 5": {"stop_token_ids": (4, 5)},
    "--ignore-eos": {"ignore_eos": True},
    "--regex [ab]+": {"regex": "[ab]+"},
    "--n 2": {"n": 2},
}


def asked_for(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> SamplingParams:
    """The parameters that `generate` hands to the engine."""
    seen: list[SamplingParams] = []

    class Seen(Exception):
        pass

    def load(folder: Path, **options: Any) -> Any:
        raise Seen

    params = command._params
    monkeypatch.setattr(command, "_params", lambda *a, **k: seen.append(params(*a, **k)) or seen[-1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(Engine, "load", load)
    with pytest.raises(Seen):
        command.generate(["folder", "--prompt", "x", *arguments])
    return seen[0]


@pytest.mark.parametrize(("option", "changes"), OPTIONS.items(), ids=OPTIONS)
def test_an_option_is_a_parameter(
    option: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked_for(option.split(), monkeypatch) == SamplingParams(**{"max_tokens": 256, **changes})


def test_a_schema_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    found = asked_for(["--json-schema", str(tmp_path / "schema.json")], monkeypatch)
    assert json.loads(str(found.json_schema)) == {"type": "integer"}


def test_every_parameter_has_an_option_or_a_reason() -> None:
    """logprobs are not text, and processors are Python."""
    shown = {name for changes in OPTIONS.values() for name in changes} | {"json_schema"}
    assert {field.name for field in fields(SamplingParams)} - shown == {"logprobs", "logits_processors"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--logit-bias", "7:2"], "expected TOKEN=BIAS such as 17=-inf, found '7:2'"),
        (["--logit-bias", "x=2"], "expected TOKEN=BIAS"),
        (["--temperature", "-1"], "temperature >= 0"),
        (["--json-schema", "/nowhere"], "/nowhere"),
        (["--n", "9"], "n=9 samples need as many rows"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", [str(folder), "--prompt", "x", *arguments]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- chat

Says = Callable[[list[str]], None]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """says(lines) -> the user types these, then Ctrl-D."""

    def typed(lines: list[str]) -> None:
        left: Iterator[str] = iter(lines)

        def ask(prompt: str) -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(builtins, "input", ask)

    return typed


ASKED = "--max-tokens 6 --ignore-eos".split()


def test_a_chat_is_a_session(folder: Path, says: Says, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["hi", "", "  and you? ", "日本"]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    shown = []
    with Engine.load(folder) as engine, engine.session("be short") as session:
        for line in ("hi", "and you?", "日本"):
            turn = [{"role": "user", "content": line}]
            shown.append("".join(piece.text for piece in session.stream(messages=turn, params=params)) + "\n")
    says(lines)
    assert run("chat", [str(folder), "--system", "be short", *ASKED]) == 0
    assert capsys.readouterr().out == "".join(shown)


def test_ctrl_c_ends_an_answer_and_the_talk_goes_on(
    folder: Path, says: Says, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    says(["hi", "more"])
    following, given = Stream.__next__, []

    def interrupted(self: Stream) -> Piece:
        given.append(self)
        if len(given) == 3:
            raise KeyboardInterrupt
        return following(self)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    assert run("chat", [str(folder), "--max-tokens", "5000", "--ignore-eos", "--stop-token-id", "50"]) == 0
    assert len({id(stream) for stream in given}) == 2
    assert capsys.readouterr().out.endswith("\n")


def test_ctrl_c_at_the_prompt_ends_the_talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", ask)
    assert run("chat", [str(folder)]) == 130
    assert "interrupted" in capsys.readouterr().err
