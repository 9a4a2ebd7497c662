"""The examples do what they say, run as a reader would; the service refuses, sees who hangs up, and ends."""

import inspect
import json
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, get_args

import pytest

from mistral_trt.runtime import Engine, FinishReason, Metrics, SamplingParams, Session, Stream
from mistral_trt.runtime.sampling.sampler import Sampler
from tests.conftest import Folder

ROOT = Path(__file__).parent.parent
EXAMPLES, REFERENCE = ROOT / "examples", (ROOT / "docs" / "runtime.md").read_text()
LIMIT_S = 60
ENDLESS = {"prompt": "go on", "max_tokens": 500_000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(onnx_folder: Folder) -> Path:
    """A tiny artifact with text and one row: a second request has to wait."""
    return onnx_folder(tokenizer=True, vocab_size=259, eos_token_id=1, max_batch_size=1)


def run(name: str, *arguments: object, stdin: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    ended = subprocess.run(command, input=stdin.encode(), capture_output=True, timeout=LIMIT_S)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout.decode()  # not as text, which would make new lines of carriage returns


# ---------------------------------------------------------------- programs


def test_every_example_is_run_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"}
    text = Path(__file__).read_text()
    assert len(names) >= 4 and all(f'run("{name}"' in text for name in names - {"service.py"})


def test_stream(folder: Path) -> None:
    with Engine.load(folder) as engine:
        params = SamplingParams(max_tokens=64, temperature=0.7, top_p=0.9, seed=1)
        expected = "".join(piece.text for piece in engine.stream("abc", params))
    assert run("stream.py", folder, "abc") == expected + "\n"


def test_batch(folder: Path) -> None:
    prompts = ["abc", "naïve 日本", "x"]
    lines = [json.loads(line) for line in run("batch.py", folder, stdin="\n".join(prompts)).splitlines()]
    with Engine.load(folder) as engine:
        expected = engine.generate(prompts, SamplingParams(max_tokens=64))
    assert [line["prompt"] for line in lines] == prompts
    assert [(line["text"], line["finish_reason"]) for line in lines] == [
        (output.text, output.finish_reason) for output in expected
    ]


def test_a_chat_goes_on_in_another_process(folder: Path, tmp_path: Path) -> None:
    file, turns = tmp_path / "chat.session", ["hello", "and then?", "who are you?"]
    said = run("chat_session.py", folder, file, stdin="\n".join(turns[:2]))
    said += run("chat_session.py", folder, file, stdin=turns[2])
    params = SamplingParams(max_tokens=200, temperature=0.7, top_p=0.9, seed=1)
    with Engine.load(folder) as engine, engine.session() as session:
        for turn in turns:
            messages = [{"role": "user", "content": turn}]
            expected = "".join(piece.text for piece in session.stream(messages=messages, params=params))
            assert said.startswith(expected + "\n")
            said = said.removeprefix(expected + "\n")
    assert said == ""


# ---------------------------------------------------------------- the reference


def test_the_reference_runs_from_top_to_bottom(folder: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", REFERENCE, re.DOTALL)
    assert len(blocks) >= 4
    (tmp_path / "artifact").symlink_to(folder)
    command = [sys.executable, "-W", "error", "-c", "\n".join(blocks)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=LIMIT_S)
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout and not ended.stderr


def test_the_install_lines_name_what_there_is() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = re.findall(
        r"pip install '\.\[([\w,]+)\]'([^#\n]*)", REFERENCE + (EXAMPLES / "service.py").read_text()
    )
    assert len(lines) == 5 and {extra for named, _ in lines for extra in named.split(",")} <= set(extras)
    (version,) = (rest.strip() for _, rest in lines if rest.strip())
    assert f"\n{version.replace('-', '_')}\n" in (ROOT / "requirements.lock").read_text()


def test_the_reference_names_everything_there_is() -> None:
    words = set(re.findall(r"\w+", REFERENCE))
    loading = set(inspect.signature(Engine.load).parameters) - {"folder"}
    for name in loading | {field.name for kind in (SamplingParams, Metrics) for field in fields(kind)}:
        assert f"`{name}`" in REFERENCE, name
    methods = {n for kind in (Engine, Session, Stream) for n in vars(kind) if not n.startswith("_")}
    assert methods - {"load", "manifest", "tokenizer"} <= words
    assert set(get_args(FinishReason)) == set(re.findall(r'^\| `"(\w+)"` \|', REFERENCE, re.MULTILINE))


def test_the_reference_states_the_defaults_and_the_order_of_rules() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", REFERENCE, re.MULTILINE))
    for field in fields(SamplingParams):
        default = {} if field.name == "logit_bias" else field.default
        assert rows[field.name] == str(default), field.name
    order = REFERENCE[REFERENCE.index("For each token the rules") :].split("Log-probabilities")[0]
    named = re.findall(r"`(\w+)`", order)
    documented = re.findall(
        r"(?:logit_bias|\w+_penalty|logits_processors|top_k|top_p|min_p)", Sampler.__doc__ or ""
    )
    assert [name for name in named if name != "temperature"] == list(dict.fromkeys(documented))


# ---------------------------------------------------------------- the service


@dataclass(frozen=True)
class Answer:
    """Of the service.  kind: the content type."""

    status: int
    kind: str
    text: str


@dataclass
class Service:
    """The service in a process of its own."""

    process: "subprocess.Popen[str]"
    port: int

    def ask(self, method: str, path: str, body: object = None) -> "Answer":
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)) as connection:
            text = body if isinstance(body, str) else json.dumps(body)
            connection.request(method, path, None if body is None else text.encode())
            found = connection.getresponse()
            return Answer(found.status, found.headers["Content-Type"] or "", found.read().decode())

    def post(self, path: str, body: object) -> tuple[int, Any]:
        answer = self.ask("POST", path, body)
        return answer.status, json.loads(answer.text)

    def begin(self, body: object) -> socket.socket:
        """A connection on which a request was sent and nothing read; the caller closes it."""
        text = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)
        connection.sendall(head.encode() + text)
        return connection

    def metrics(self) -> dict[str, float]:
        answer = self.ask("GET", "/metrics")
        assert answer.status == 200 and answer.kind.startswith("text/plain")
        lines = (line.rsplit(" ", 1) for line in answer.text.splitlines())
        return {name.removeprefix("mistral_trt_"): float(value) for name, value in lines}

    def wait_until(self, name: str, value: float) -> None:
        deadline = time.monotonic() + LIMIT_S
        while (found := self.metrics()[name]) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, expected {value}"
            time.sleep(0.01)


@contextmanager
def serving(folder: Path, *options: str, cut: bool = False) -> Iterator[Service]:
    """The service until it is left.  cut: a stream is to be cut short, which uvicorn logs as an error."""
    command = [sys.executable, str(EXAMPLES / "service.py"), str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", said[-1] if said else "")):
                said.append(process.stderr.readline())
                assert said[-1], "".join(said)
            yield Service(process, int(found[1]))
        finally:
            process.kill()
        assert cut == ("Traceback" in (rest := process.stderr.read())), rest


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    with serving(folder, "--queue-size", "1") as started:
        yield started


def data(answer: Answer) -> list[Any]:
    """The events of a stream, without the mark at its end."""
    assert answer.status == 200 and answer.kind.startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_a_completion_is_the_engines_text_whole_or_streamed(service: Service, folder: Path) -> None:
    fields = {"max_tokens": 20, "temperature": 0.7, "seed": 3, "logit_bias": {"70": 2.5}, "stop": ["\x00"]}
    with Engine.load(folder) as engine:
        params = SamplingParams(max_tokens=20, temperature=0.7, seed=3, logit_bias={70: 2.5}, stop=("\x00",))
        (output,) = engine.generate(["abc"], params)
    body = {"model": "tiny", "prompt": "abc", **fields}
    status, whole = service.post("/v1/completions", body)
    assert status == 200 and whole["object"] == "text_completion" and whole["model"] == "tiny"
    assert whole["choices"] == [{"index": 0, "text": output.text, "finish_reason": output.finish_reason}]
    events = data(service.ask("POST", "/v1/completions", {**body, "stream": True}))
    parts = [event["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == output.text
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [output.finish_reason]
    assert len({event["id"] for event in events}) == 1 and len(events) > 2


def test_a_chat_is_answered_whole_or_streamed(service: Service, folder: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": 12, "seed": 1, "temperature": None}
    with Engine.load(folder) as engine:
        params = SamplingParams(max_tokens=12, seed=1)
        expected = "".join(piece.text for piece in engine.stream(messages=messages, params=params))
    status, whole = service.post("/v1/chat/completions", body)
    assert status == 200 and whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected}
    events = data(service.ask("POST", "/v1/chat/completions", {**body, "stream": True}))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == expected


REFUSED = {
    "not JSON": ("{", "Expecting"),
    "no prompt": ({"max_tokens": 1}, "the field 'prompt'"),
    "unknown": ({"prompt": "x", "best_of": 2}, "unknown field 'best_of'"),
    "out of range": ({"prompt": "x", "temperature": -1}, "temperature >= 0"),
    "of another type": ({"prompt": "x", "max_tokens": "many"}, "max_tokens >= 1"),
    "no token": ({"prompt": "x", "logit_bias": {"a": 1}}, "invalid literal"),
    "too many rows": ({"prompt": "x", "n": 2}, "n=2 samples"),
    "an empty prompt": ({"prompt": []}, "empty"),
    "a prompt that is none": ({"prompt": 7}, "prompt"),
    "several prompts": ({"prompt": ["a", "b"]}, "prompt"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("body", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused(service: Service, body: Any, words: str, streamed: bool) -> None:
    if streamed and isinstance(body, dict):
        body = {**body, "stream": True}
    status, answer = service.post("/v1/completions", body)
    assert status == 400 and words in answer["error"]["message"], answer


def test_it_is_healthy_and_counts(service: Service) -> None:
    assert service.ask("GET", "/healthz").status == 200
    before = service.metrics()
    assert service.post("/v1/completions", {"prompt": "abc", "max_tokens": 5, "ignore_eos": True})[0] == 200
    after = service.metrics()
    assert after["generated_tokens"] - before["generated_tokens"] == 5
    assert after['requests_finished{reason="length"}'] - before['requests_finished{reason="length"}'] == 1
    assert after["capacity_rows"] == 1 and 'inter_token{quantile="0.99"}' in after


def test_one_request_too_many_gets_a_429_and_who_hangs_up_makes_room(service: Service) -> None:
    cancelled = service.metrics()['requests_finished{reason="cancelled"}']
    running = service.begin(ENDLESS)
    assert running.recv(100).startswith(b"HTTP/1.1 200")
    waiting = service.begin({**ENDLESS, "stream": False})
    service.wait_until("queue_length", 1)
    status, answer = service.post("/v1/completions", ENDLESS)
    assert status == 429 and answer["error"]["type"] == "QueueFullError"
    waiting.close()
    service.wait_until("queue_length", 0)
    assert service.metrics()["active_rows"] == 1, "only the one that waited hung up"
    running.close()
    service.wait_until("active_rows", 0)
    assert service.metrics()['requests_finished{reason="cancelled"}'] - cancelled == 2


def test_sigterm_lets_streams_end_and_then_ends_cleanly(folder: Path) -> None:
    with serving(folder) as service:
        with service.begin({**ENDLESS, "max_tokens": 3000}) as running:
            received = running.recv(100)
            service.process.send_signal(signal.SIGTERM)
            while more := running.recv(1 << 16):
                received += more
        assert b"data: [DONE]" in received
        assert service.process.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_sigterm_cuts_a_stream_that_takes_too_long(folder: Path) -> None:
    with serving(folder, "--grace", "1", cut=True) as service:
        with service.begin(ENDLESS) as running:
            assert running.recv(100)
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(LIMIT_S) == 0


def test_a_folder_that_is_no_artifact_is_an_error_of_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "service.py"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert str(tmp_path) in ended.stderr
