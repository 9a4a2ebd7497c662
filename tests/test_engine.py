"""The embedded runtime as a service sees it: prompts in, text out, errors that say what to do."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

from mistral_trt.errors import (
    EngineClosedError,
    EngineMismatchError,
    GenerationError,
    ManifestError,
    NonFiniteLogitsError,
    QueueFullError,
)
from mistral_trt.runtime import Engine, SamplingParams
from mistral_trt.runtime.backend import Logits, Step
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.runtime.text.tokenizer import Tokenizer
from tests.conftest import Folder
from tests.models import write_tokenizer
from tests.test_constraint import count_compiled
from tests.token_backend import eventually

PROMPT = "naïve café 日本 🙂"


@pytest.fixture(scope="module")
def folder(onnx_folder: Folder) -> Path:
    """A tiny artifact with text: vocabulary of bytes, W = 8."""
    return onnx_folder(tokenizer=True, vocab_size=259, eos_token_id=1)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder) as engine:
        yield engine


def test_stream_joins_to_generate(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    pieces = list(engine.stream(PROMPT, params))
    (output,) = engine.generate([PROMPT], params)
    assert "".join(piece.text for piece in pieces) == output.text
    assert tuple(p.token for p in pieces if p.token is not None) == output.tokens
    assert pieces[-1].finish_reason == output.finish_reason == "length"
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_a_batch_equals_each_prompt_alone(engine: Engine) -> None:
    prompts = [PROMPT[:n] for n in (1, 3, 9, 14, 6, 2)]
    for params in (
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=0.8, top_k=40, top_p=0.9, seed=4),
    ):
        alone = [engine.generate([prompt], params)[0] for prompt in prompts]
        assert engine.generate(prompts, params) == alone


def test_a_seed_fixes_the_text_and_another_changes_it(engine: Engine) -> None:
    def run(seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)
        return engine.generate(["x"], params)[0].tokens

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_stop_tokens_end_the_text_and_are_not_part_of_it(engine: Engine) -> None:
    free = engine.generate(["abc"], SamplingParams(max_tokens=10, ignore_eos=True))[0]
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    held = engine.generate(["abc"], SamplingParams(max_tokens=10, stop_token_ids=(stop,)))[0]
    assert held.tokens == free.tokens[:first]
    assert held.finish_reason == "stop"


def test_the_models_own_end_token_ends_the_text(engine: Engine) -> None:
    likely = {1: 1e9}
    (output,) = engine.generate(["abc"], SamplingParams(logit_bias=likely))
    assert (output.finish_reason, output.tokens, output.text) == ("stop", (), "")
    ignored = engine.generate(["abc"], SamplingParams(max_tokens=3, ignore_eos=True, logit_bias=likely))[0]
    assert ignored.tokens == (1, 1, 1)


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    free = engine.generate([PROMPT], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    stop = free.text[5:8]
    cut = free.text[: free.text.index(stop)]
    held = SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,))
    (output,) = engine.generate([PROMPT], held)
    assert (output.text, output.finish_reason) == (cut, "stop")
    assert output.tokens == free.tokens[: len(output.tokens)]
    pieces = list(engine.stream(PROMPT, held))
    assert "".join(piece.text for piece in pieces) == cut
    never = SamplingParams(max_tokens=40, ignore_eos=True, stop=(free.text[-1] + "never",))
    assert engine.generate([PROMPT], never)[0].text == free.text


def test_ids_beyond_the_tokenizer_never_come(onnx_folder: Folder) -> None:
    params = SamplingParams(max_tokens=200, temperature=5.0, seed=1, ignore_eos=True)
    folder = onnx_folder(tokenizer=True, vocab_size=300, eos_token_id=1, num_hidden_layers=1)
    with Engine.load(folder) as engine:
        assert max(engine.generate(["abc"], params)[0].tokens) < 259


def test_constrained_text_is_what_it_must_be(engine: Engine) -> None:
    (output,) = engine.generate(["abc"], SamplingParams(regex="[0-9]{3}-[ab]+x", max_tokens=30))
    assert re.fullmatch("[0-9]{3}-[ab]*x?", output.text)
    (output,) = engine.generate(["abc"], SamplingParams(regex="(yes|no)", max_tokens=30))
    assert output.text in ("yes", "no") and output.finish_reason == "stop"
    with pytest.raises(GenerationError, match="llguidance refuses"):
        engine.stream("abc", SamplingParams(regex="("))


def test_a_grammar_is_compiled_once_for_all_samples_and_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = count_compiled(monkeypatch)
    params = SamplingParams(regex="[0-9]{3}-[ab]{2}", temperature=1.0, seed=1, n=3)
    with Engine.load(folder) as engine:
        outputs = engine.generate(["abc", "de", "f"] * 3, params)
    assert len(compiled) == 1
    assert len(outputs) == 27 and all(re.fullmatch("[0-9]{3}-[ab]{2}", output.text) for output in outputs)


def test_an_abandoned_stream_gives_its_row_back(engine: Engine) -> None:
    stream = engine.stream("abc", SamplingParams(max_tokens=5000, ignore_eos=True))
    next(stream)
    assert engine.metrics().active_rows == 1
    stream.close()
    eventually(lambda: engine.metrics().active_rows == 0)


def test_streams_of_one_thread_interleave(engine: Engine) -> None:
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    prompts = ["abc", "de", "fghijk"]
    expected = [output.tokens for output in (engine.generate([p], params)[0] for p in prompts)]
    streams = [engine.stream(prompt, params) for prompt in prompts]
    turns = list(zip(*streams, strict=True))
    found = [
        tuple(piece.token for piece in pieces if piece.token is not None)
        for pieces in zip(*turns, strict=True)
    ]
    assert found == expected


def test_a_request_that_finds_no_row_waits_and_one_too_many_is_refused(folder: Path) -> None:
    params = SamplingParams(max_tokens=2000, ignore_eos=True)
    with Engine.load(folder, queue_size=1) as engine:
        running = [engine.stream("x", params) for _ in range(4)]
        for stream in running:
            next(stream)
        waiting = engine.stream("x", params)
        with pytest.raises(QueueFullError, match="1 request.s. wait for one of 4 row.s. already"):
            engine.stream("x", params)
        running[2].close()
        assert next(waiting).token is not None


def test_threads_wait_for_each_other(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = {prompt: engine.generate([prompt], params)[0] for prompt in "abcdefgh"}
    found = {}

    def work(prompt: str) -> None:
        found[prompt] = engine.generate([prompt], params)[0]

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_nan_ends_the_request_with_an_error_and_the_next_is_clean(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the ring itself, which only zeroing takes away."""
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with Engine.load(folder) as engine:
        expected = engine.generate(["abc"], params)
        run = OnnxRuntimeBackend.run

        def spoilt(self: OnnxRuntimeBackend, step: Step) -> Logits:
            self.write_row(0, [np.full_like(ring, np.nan) for ring in self.read_row(0)])
            return run(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeBackend, "run", spoilt)
            with pytest.raises(NonFiniteLogitsError, match="bf16"):
                list(engine.stream("abc", params))
        assert engine.generate(["abc"], params) == expected


def test_token_ids_are_a_prompt_too(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    assert engine.generate([ids], params) == engine.generate([PROMPT], params)


def test_messages_are_rendered_and_encoded_with_one_bos(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert engine.tokenizer.render_chat(messages) == "<s>[user] hi\n[assistant] "
    assert engine.tokenizer.encode_chat(messages).count(0) == 1
    pieces = list(engine.stream(messages=messages, params=SamplingParams(max_tokens=2, ignore_eos=True)))
    assert pieces[-1].finish_reason == "length"


def test_pieces_are_whole_characters(engine: Engine) -> None:
    decoder = engine.tokenizer.decoder([0])
    pieces = [decoder.push(token) for token in engine.tokenizer.encode(PROMPT)]
    assert "".join(pieces) == PROMPT
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either a prompt or messages"),
        ({"prompt": "a", "messages": []}, "either a prompt or messages"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": [999]}, "token ids must lie in 0…258"),
        ({"prompt": 7}, "a prompt is a text or token ids, found 7"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    engine: Engine, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(GenerationError, match=words):
        list(engine.stream(**arguments))  # type: ignore[arg-type]


def test_a_prompt_past_the_context_is_refused_and_a_text_ends_there(onnx_folder: Folder) -> None:
    unlimited = {"sliding_window": None, "max_context": 16}
    engine = Engine.load(onnx_folder(tokenizer=True, vocab_size=259, num_hidden_layers=1, **unlimited))
    for count in (20, 15):  # one beginning-of-text token, and room for at least one new
        with pytest.raises(GenerationError, match=f"the prompt has {count + 1} tokens.*max_context of 16"):
            engine.stream("x" * count)
    output = engine.generate(["x" * 5], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert output.finish_reason == "context"
    assert 6 + len(output.tokens) == 16


def test_an_altered_folder_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(ManifestError, match="was altered after it was made"):
        Engine.load(copy)
    Engine.load(copy, trust_weights=True)


def test_an_artifact_without_a_tokenizer_takes_ids_only(onnx_folder: Folder) -> None:
    engine = Engine.load(onnx_folder())
    with pytest.raises(GenerationError, match="no tokenizer: pass token ids"):
        engine.stream("text")
    output = engine.generate([[1, 2]], SamplingParams(max_tokens=2, ignore_eos=True))[0]
    assert (len(output.tokens), output.text) == (2, "")
    with pytest.raises(ManifestError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(onnx_folder())


def test_chat_templates_run_in_a_sandbox(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    template = tmp_path / "t" / "chat_template.jinja"
    for text, words in [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
    ]:
        template.write_text(text)
        with pytest.raises(GenerationError, match=words):
            Tokenizer.from_folder(tmp_path / "t").encode_chat([])
    template.unlink()
    with pytest.raises(GenerationError, match="no chat template"):
        Tokenizer.from_folder(tmp_path / "t").encode_chat([])
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError, match="tokenizer cannot be read"):
        Tokenizer.from_folder(tmp_path / "t")


def test_a_tokenizers_stored_cut_and_padding_do_not_touch_a_prompt(tmp_path: Path) -> None:
    """Training code saves them; a prompt that is silently cut to 8 tokens answers another question."""
    folder = write_tokenizer(tmp_path)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.enable_truncation(8)
    fast.enable_padding(length=12)
    fast.save(str(folder / "tokenizer.json"))
    assert len(fast.encode("x" * 30).ids) == 12
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer.encode("x" * 30)) == 31
    assert len(tokenizer.encode("x")) == 2


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "one"),
        ("{% if tools is not none %}{{ tools | tojson }}{% endif %}plain", "plain"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ unk_token }}{{ eos_token }}", "</s>"),
    ],
)
def test_templates_find_what_transformers_gives_them(tmp_path: Path, template: str, text: str) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert Tokenizer.from_folder(folder).render_chat(messages) == text


@pytest.mark.parametrize(
    ("name", "content"),
    [("chat_template.jinja", b"\xff"), ("tokenizer_config.json", b"[1]"), ("tokenizer_config.json", b"{")],
)
def test_broken_text_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ManifestError, match="the tokenizer cannot be read"):
        Tokenizer.from_folder(folder)


def test_bytes_that_are_no_text_are_refused(engine: Engine) -> None:
    with pytest.raises(GenerationError, match="not valid text"):
        engine.stream("\udcff")


def test_no_threads_is_refused(folder: Path) -> None:
    with pytest.raises(EngineMismatchError, match="threads must be at least 1, found 0"):
        Engine.load(folder, threads=0)


def test_a_template_may_live_in_the_tokenizer_config(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    for value in ("{{ bos_token }}hi", [{"name": "default", "template": "{{ bos_token }}hi"}]):
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "chat_template": value})
        )
        assert Tokenizer.from_folder(folder).render_chat([]) == "<s>hi"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_an_engine_in_the_child_of_a_fork_says_so_and_does_not_hang(folder: Path) -> None:
    with Engine.load(folder, threads=1) as engine:
        engine.generate([PROMPT], SamplingParams(max_tokens=2))
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                engine.generate([PROMPT], SamplingParams(max_tokens=2))
            except EngineClosedError as error:
                os._exit(0 if "load it in the child" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert engine.generate([PROMPT], SamplingParams(max_tokens=2))


# ---------------------------------------------------------------- for hours


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.alone
@pytest.mark.slow
def test_memory_stays_flat_over_50_000_tokens(folder: Path) -> None:
    """One long text, then many short ones, two samples each, some left; sessions come and go."""
    long = SamplingParams(max_tokens=25_000, temperature=1.0, seed=1, ignore_eos=True)
    short = SamplingParams(max_tokens=100, temperature=1.0, seed=1, ignore_eos=True, n=2)
    turn = SamplingParams(max_tokens=50, ignore_eos=True)

    def some(engine: Engine, texts: int) -> None:
        for number in range(texts):
            for piece in engine.stream(PROMPT, short):
                if number % 4 == 0 and piece.index == 1:
                    break
            with engine.session() as session:
                list(session.stream("abc", turn))

    with Engine.load(folder, threads=1) as engine:
        some(engine, 20)
        before = resident_bytes()
        for _ in engine.stream(PROMPT, long):
            pass
        some(engine, 120)
        assert engine.metrics().generated_tokens >= 50_000
        assert resident_bytes() - before < 5_000_000


@pytest.mark.alone
@pytest.mark.slow
def test_a_step_takes_as_long_at_40_windows_as_at_2(onnx_folder: Folder) -> None:
    """Medians of steps taken in turn, in one run; a cache that grew would take twenty times as long."""
    cache = open_cache(onnx_folder(prefill_chunk=64, sliding_window=1024, max_batch_size=2), threads=1)
    window = cache.contract.ring.sliding_window
    rows = dict(zip(cache.acquire_rows(2), (2, 40), strict=True))
    for row, windows in rows.items():
        cache.append(row, [7] * windows * window)
    states = {row: cache.snapshot(row) for row in rows}
    seconds: dict[int, list[float]] = {row: [] for row in rows}
    for count in range(600):
        for row in rows:
            if count % 50 == 0:
                cache.restore(row, states[row])
            started = time.perf_counter()
            cache.decode({row: 5}, 2)
            seconds[row].append(time.perf_counter() - started)
    early, late = (float(np.median(values)) for values in seconds.values())
    assert late < 1.05 * early


def test_an_empty_text_and_an_array_are_the_same_prompt_everywhere(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    (output,) = engine.generate([""], params)
    pieces = list(engine.stream("", params))
    assert [piece.token for piece in pieces if piece.token is not None] == list(output.tokens)
    with pytest.raises(GenerationError, match="a prompt is a text or token ids, found"):
        engine.stream(np.array([1.5]).tolist(), params)
