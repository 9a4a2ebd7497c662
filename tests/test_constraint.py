"""Constrained texts: whatever the logits, what is generated satisfies the schema or the expression."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llguidance
import mistral_common
import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from mistral_trt.errors import GenerationError, MissingDependencyError
from mistral_trt.export.tokenizer_files import read_text_files
from mistral_trt.runtime.sampling.constraint import GrammarCompiler, GrammarConstraint
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.sampling.sampler import Sampler
from tests.models import write_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
STYLES = ["sentencepiece", "bytes"]


class Writer:
    """A tokenizer, its compiler, and a way to write with it from random logits."""

    def __init__(self, text: str, eos: int, vocab_size: int) -> None:
        self.fast = FastTokenizer.from_str(text)
        self.eos, self.vocab_size = eos, vocab_size
        self.size = self.fast.get_vocab_size()
        self.compiler = GrammarCompiler(lambda: text, vocab_size=vocab_size, eos_tokens=frozenset({eos}))

    def sampler(self, params: SamplingParams, constraint: GrammarConstraint, seed: int = 0) -> Sampler:
        return Sampler(
            params,
            prompt=[],
            vocab_size=self.vocab_size,
            tokenizer_size=self.size,
            seed=seed,
            end_tokens=frozenset() if params.ignore_eos else frozenset({self.eos}),
            constraint=constraint,
        )

    def write(
        self, params: SamplingParams, seed: int, lift: dict[int, float] | None = None
    ) -> tuple[str, str]:
        """A text of random logits, some of them lifted, and why it ended."""
        rng = np.random.default_rng(seed)
        constraint = self.compiler.compile(json_schema=params.json_schema, regex=params.regex)
        sampler = self.sampler(params, constraint, seed)
        tokens: list[int] = []
        for position in range(400):
            if sampler.finished:
                assert constraint.complete
                return self.fast.decode(tokens, skip_special_tokens=True), "finished"
            logits = rng.normal(size=self.vocab_size).astype(np.float32) * 2
            for token, more in (lift or {}).items():
                logits[token] += more
            complete = constraint.complete
            token = sampler.choose(logits, position).token
            if token == self.eos and not params.ignore_eos:
                assert complete, "an end token before the text is whole"
                return self.fast.decode(tokens, skip_special_tokens=True), "end token"
            tokens.append(token)
        return self.fast.decode(tokens, skip_special_tokens=True), "length"


def sentencepiece_text() -> str:
    """Mistral's first tokenizer: 32,000 pieces, ▁ for spaces, bytes for what has no piece."""
    with TemporaryDirectory() as name:
        shutil.copy(DATA / "tokenizer.model.v1", Path(name) / "tokenizer.model")
        return read_text_files([Path(name)], vocab_size=32000).files["tokenizer.json"].decode()


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Writer]:
    folder = write_tokenizer(tmp_path_factory.mktemp("bytes"))
    return {
        "sentencepiece": Writer(sentencepiece_text(), eos=2, vocab_size=32000),
        "bytes": Writer((folder / "tokenizer.json").read_text(), eos=1, vocab_size=300),
    }


# ---------------------------------------------------------------- what is written satisfies what was asked

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", "漢"]}, "maxItems": 3},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
    **COMPACT,
}


def is_person(found: Any) -> bool:
    return (
        {"name", "age", "ok"} <= set(found) <= {"name", "age", "ok", "tags"}
        and isinstance(found["name"], str)
        and len(found["name"]) <= 6
        and type(found["age"]) is int
        and 0 <= found["age"] <= 150
        and found["ok"] in (True, False, None)
        and set(found.get("tags", ())) <= {"a", "é", "漢"}
        and len(found.get("tags", ())) <= 3
    )


SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (PERSON, is_person),
    ({"enum": ["yes", "no", 7, None]}, lambda found: found in ("yes", "no", 7, None)),
    ({"type": "string", "pattern": "^[a-c]{2,4}$"}, lambda found: bool(re.fullmatch("[a-c]{2,4}", found))),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4, **COMPACT},
        lambda found: 2 <= len(found) <= 4 and all(type(one) is bool for one in found),
    ),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_every_text_is_json_that_the_schema_admits(
    writers: dict[str, Writer], style: str, number: int
) -> None:
    schema, admits = SCHEMAS[number]
    params = SamplingParams(temperature=1, json_schema=schema)
    texts = [writers[style].write(params, seed) for seed in range(12)]
    for text, ended in texts:
        assert ended in ("finished", "end token")
        assert admits(json.loads(text)), text
    assert len({text for text, _ in texts}) > 1


REGEXES = [
    "[a-z]{3,5}-[0-9]{2}(é|漢字|🙂)",
    "(yes|no|maybe)",
    " ?[^x]{0,9}",
    r"\d{1,4}(\.\d+)?",
    "(a+b)*c{2,}",
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("regex", REGEXES)
def test_every_text_matches_the_whole_expression(writers: dict[str, Writer], style: str, regex: str) -> None:
    writer = writers[style]
    params = SamplingParams(temperature=1, regex=regex)
    for seed in range(12):
        text, ended = writer.write(params, seed, lift={writer.eos: 6.0})
        assert ended in ("finished", "end token")
        assert re.fullmatch(regex, text), text


def test_the_checks_can_fail(writers: dict[str, Writer]) -> None:
    """Without the constraint's mask the same texts satisfy nothing."""
    writer = writers["bytes"]
    free = SamplingParams(temperature=1)
    rng = np.random.default_rng(0)
    sampler = Sampler(
        free, prompt=[], vocab_size=300, tokenizer_size=259, seed=0, end_tokens=frozenset({writer.eos})
    )
    tokens = [sampler.choose(rng.normal(size=300).astype(np.float32), p).token for p in range(20)]
    text = writer.fast.decode(tokens)
    with pytest.raises(ValueError):
        json.loads(text)
    assert not any(re.fullmatch(regex, text) for regex in REGEXES)
    assert not is_person({"name": "x", "age": 151, "ok": None}) and not is_person({"age": 1})


# ---------------------------------------------------------------- which tokens, and when it ends


@pytest.mark.parametrize("style", STYLES)
def test_an_end_token_comes_only_when_the_text_is_whole_and_then_it_may(
    writers: dict[str, Writer], style: str
) -> None:
    writer = writers[style]
    eager = {writer.eos: 60.0}
    params = SamplingParams(temperature=1, regex="(ab)+")
    text, ended = writer.write(params, 1, lift=eager)
    assert ended == "end token" and re.fullmatch("(ab){1,4}", text), "at the first chance"
    endless = SamplingParams(temperature=1, regex="(ab)+", ignore_eos=True)
    text, ended = writer.write(endless, 1, lift=eager)
    assert ended == "length" and re.fullmatch("(ab)+a?", text)


@pytest.mark.parametrize("style", STYLES)
def test_it_is_finished_when_nothing_can_follow(writers: dict[str, Writer], style: str) -> None:
    writer = writers[style]
    constraint = writer.compiler.compile(regex="ab|cde?")
    for text, complete, finished in [("c", False, False), ("d", True, False), ("e", True, True)]:
        token = writer.fast.get_vocab()[text]
        assert constraint.mask()[token]
        constraint.accept(token)
        assert (constraint.complete, constraint.finished) == (complete, finished)
    assert not constraint.mask().any()
    empty = writer.compiler.compile(regex="()")
    assert empty.complete and empty.finished


def test_the_mask_is_exactly_what_the_expression_lets_follow(writers: dict[str, Writer]) -> None:
    """With one token a byte it can be said by hand; ids beyond the tokenizer are not text."""
    writer = writers["bytes"]
    ids = writer.fast.get_vocab()
    constraint = writer.compiler.compile(regex="a[bc]é?")
    follows = ["a", "bc", "Ã", "©"]  # é as GPT-2's letters for its two bytes
    for letters in follows:
        mask = constraint.mask()
        assert mask.dtype == np.bool_ and mask.shape == (300,)
        assert set(np.flatnonzero(mask)) == {ids[letter] for letter in letters}
        constraint.accept(ids[letters[0]])
    assert constraint.finished


@pytest.mark.parametrize("style", STYLES)
def test_special_and_unknown_tokens_are_never_text(writers: dict[str, Writer], style: str) -> None:
    writer = writers[style]
    constraint = writer.compiler.compile(regex="(?s).*")
    special = [0, 1, 2]  # <unk> <s> </s>, or <s> </s> <pad>
    assert not constraint.mask()[special].any()
    assert constraint.mask().sum() > 100 and constraint.complete
    string = writer.compiler.compile(json_schema='{"type": "string"}')
    string.accept(writer.fast.get_vocab()['"'])
    assert not string.mask()[special].any()


def test_a_vocabulary_larger_or_smaller_than_the_tokenizer(writers: dict[str, Writer]) -> None:
    text = writers["bytes"].fast.to_str()
    for vocab_size in (100, 259, 260, 1000):
        compiler = GrammarCompiler(lambda: text, vocab_size=vocab_size, eos_tokens=frozenset({1}))
        mask = compiler.compile(regex="(?s).*").mask()
        assert mask.shape == (vocab_size,) and not mask[259:].any() and mask[3:90].all()


def test_a_copy_goes_its_own_way(writers: dict[str, Writer]) -> None:
    writer = writers["bytes"]
    ids = writer.fast.get_vocab()
    one = writer.compiler.compile(regex="a(b|c)")
    one.accept(ids["a"])
    other = one.copy()
    one.accept(ids["b"])
    assert one.finished and not other.complete
    assert set(np.flatnonzero(other.mask())) == {ids["b"], ids["c"]}


def test_tokens_that_are_not_allowed_are_refused(writers: dict[str, Writer]) -> None:
    writer = writers["bytes"]
    constraint = writer.compiler.compile(regex="ab")
    with pytest.raises(GenerationError) as raised:
        constraint.accept(writer.fast.get_vocab()["x"])
    assert str(raised.value).startswith("llguidance cannot go on with this text: ")
    assert "\n" not in str(raised.value) and "grammar" in str(raised.value)


def test_a_text_that_grew_too_complex_is_ended_with_the_reason() -> None:
    class TooComplex:
        """What llguidance's matcher is after a limit was reached."""

        def compute_bitmask(self) -> bytes:
            return bytes(4)

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "lexer too complex\n<state>\nmany lines</state>"

    with pytest.raises(GenerationError) as raised:
        GrammarConstraint(TooComplex(), 32, np.array([], np.intp))
    assert str(raised.value) == "llguidance cannot go on with this text: lexer too complex"


def test_the_tokenizer_is_read_once_and_only_when_needed(writers: dict[str, Writer]) -> None:
    reads: list[int] = []

    def text() -> str:
        reads.append(1)
        return str(writers["bytes"].fast.to_str())

    compiler = GrammarCompiler(text, vocab_size=300, eos_tokens=frozenset({1}))
    assert reads == []
    for _ in range(3):
        compiler.compile(regex="a")
    assert reads == [1]


def count_compiled(patch: pytest.MonkeyPatch) -> list[str]:
    """Every grammar that llguidance compiles from now on."""
    compiled: list[str] = []
    real = llguidance.LLMatcher

    class Counting:
        grammar_from_regex = staticmethod(real.grammar_from_regex)
        grammar_from_json_schema = staticmethod(real.grammar_from_json_schema)

        def __new__(cls, tokenizer: Any, grammar: str, **options: Any) -> Any:
            compiled.append(grammar)
            return real(tokenizer, grammar, **options)

    patch.setattr(llguidance, "LLMatcher", Counting)
    return compiled


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_compiled(monkeypatch)


def test_a_grammar_is_compiled_once_and_each_text_gets_its_own(
    writers: dict[str, Writer], built: list[str]
) -> None:
    text = writers["bytes"].fast.to_str()
    ids = writers["bytes"].fast.get_vocab()
    compiler = GrammarCompiler(lambda: text, vocab_size=300, eos_tokens=frozenset({1}))
    one, other = compiler.compile(regex="a(b|c)"), compiler.compile(regex="a(b|c)")
    one.accept(ids["a"])
    assert set(np.flatnonzero(other.mask())) == {ids["a"]}
    assert set(np.flatnonzero(compiler.compile(regex="a(b|c)").mask())) == {ids["a"]}
    assert len(built) == 1
    schema = {"enum": ["a(b|c)"]}
    for asked in (schema, json.dumps(schema)):
        assert set(np.flatnonzero(compiler.compile(json_schema=asked).mask())) == {ids['"']}
    assert len(built) == 2


def test_it_keeps_the_latest_grammars_and_no_more(writers: dict[str, Writer], built: list[str]) -> None:
    text = writers["bytes"].fast.to_str()
    compiler = GrammarCompiler(lambda: text, vocab_size=300, eos_tokens=frozenset({1}))
    for count in range(100):
        compiler.compile(regex=f"a{{{count + 1}}}")
    compiler.compile(regex="a{100}")
    assert len(built) == 100
    compiler.compile(regex="a{1}")
    assert len(built) == 101


def test_one_that_is_refused_is_refused_again(writers: dict[str, Writer]) -> None:
    for _ in range(2):
        with pytest.raises(GenerationError, match="unclosed group"):
            writers["bytes"].compiler.compile(regex="(")


def test_threads_may_ask_for_one_grammar_together(writers: dict[str, Writer]) -> None:
    text = writers["bytes"].fast.to_str()
    ids = writers["bytes"].fast.get_vocab()
    compiler = GrammarCompiler(lambda: text, vocab_size=300, eos_tokens=frozenset({1}))

    def ask(number: int) -> bool:
        found = compiler.compile(regex=f"a{{{number % 3 + 1}}}")
        for _ in range(number % 3 + 1):
            found.accept(ids["a"])
        return found.finished

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_a_model_without_an_end_token_can_be_constrained(writers: dict[str, Writer]) -> None:
    text = writers["bytes"].fast.to_str()
    compiler = GrammarCompiler(lambda: text, vocab_size=300, eos_tokens=frozenset())
    mask = compiler.compile(regex="(?s).*").mask()
    assert mask[3:90].all() and not mask[:3].any()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": "foo"}', "Invalid type: foo"),
        ('{"not": {"type": "string"}}', 'Unimplemented keys: ["not"]'),
        ('{"not": {}, "x-guidance": {"lenient": true}}', 'Unimplemented keys: ["not"]'),
        ('{"type": "string", "format": "weird"}', "Unknown format: weird"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
        (
            '{"type": "integer", "minimum": 5, "maximum": 3}',
            "Unsatisfiable schema: minimum (5) is greater than",
        ),
        ('{"$ref": "http://x/y"}', "Resource 'http://x/y' is not present"),
        ("{", "EOF while parsing"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused(
    writers: dict[str, Writer], schema: str, reason: str
) -> None:
    with pytest.raises(GenerationError) as raised:
        writers["bytes"].compiler.compile(json_schema=schema)
    assert str(raised.value).startswith(f"sampling: llguidance refuses the json_schema: {reason}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        ("(", "unclosed group"),
        ("a(?=b)", "look-around, including look-ahead and look-behind, is not supported"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\b", "lookarounds not supported yet"),
    ],
)
def test_an_expression_that_cannot_be_honoured_is_refused(
    writers: dict[str, Writer], regex: str, reason: str
) -> None:
    with pytest.raises(GenerationError) as raised:
        writers["bytes"].compiler.compile(regex=regex)
    message = str(raised.value)
    assert message.startswith(f"sampling: llguidance refuses the regex {regex!r}: ") and reason in message
    assert "\n" not in message


def test_one_of_the_two_is_needed(writers: dict[str, Writer]) -> None:
    for json_schema, regex in ((None, None), ("{}", "a")):
        with pytest.raises(GenerationError, match="expected either json_schema or regex"):
            writers["bytes"].compiler.compile(json_schema=json_schema, regex=regex)


def test_a_tokenizer_that_llguidance_does_not_know_is_refused() -> None:
    words = FastTokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    for text in (words.to_str(), "{}", "not JSON"):
        compiler = GrammarCompiler(partial(str, text), vocab_size=2, eos_tokens=frozenset({1}))
        with pytest.raises(GenerationError) as raised:
            compiler.compile(regex="a")
        assert str(raised.value).startswith(
            "this artifact's tokenizer cannot be used with json_schema or regex: "
        )


def test_without_llguidance_the_extra_is_named(
    writers: dict[str, Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError) as raised:
        writers["bytes"].compiler.compile(regex="a")
    assert str(raised.value) == (
        "this needs the package 'llguidance', which is not installed; "
        "run: pip install 'mistral-trt[constrained]'"
    )
