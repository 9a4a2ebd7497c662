"""`eval` end to end on tiny models, W = 8, C = 4, R = 12: equal sides agree wholly, faults show.

The tokenizer has a token a byte, so every item crosses the window several times.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MistralForCausalLM

from mistral_trt.cli import main
from mistral_trt.errors import (
    ArtifactError,
    BackendError,
    ManifestError,
    MistralTrtError,
    NonFiniteLogitsError,
    ValidationError,
)
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate.reference.hugging_face import load_model, run_reference
from mistral_trt.validate.tasks import evaluation
from mistral_trt.validate.tasks.__main__ import evaluate
from mistral_trt.validate.tasks.agreement import Outcome, agreement
from mistral_trt.validate.tasks.answers import Question, ask, encode_pair, questions
from mistral_trt.validate.tasks.evaluation import Job, evaluate_artifact
from mistral_trt.validate.tasks.items import MultipleChoice, Task
from mistral_trt.validate.tasks.record import EVAL_NAME
from mistral_trt.validate.tasks.sides import ArtifactSide, ReferenceSide, Score, Side, log_softmax
from tests.conftest import Folder
from tests.models import write_checkpoint, write_tokenizer

ITEMS = [
    {"context": "Winter is", "choices": [" cold", " hot", " a"], "answer": 0},
    {"context": "one two three four five six seven", "choices": [" eight", " nine"], "answer": 0},
    {"context": "2 + 2 =", "choices": ["4", "5", "6", "7"], "answer": 0},
    {"prompt": "a b c a b c a b c a b", "answer": "c", "max_tokens": 20},
    {"prompt": "The sea", "answer": "is", "max_tokens": 5},
]
CONTEXT, CONTINUATIONS = tuple(range(3, 33)), ((7,), (9, 4, 6), (9, 4, 6, *range(40, 60)))
"""30 tokens, then up to 23: five times past W = 8."""

Never = Callable[[Sequence[int]], bool]


def never(tokens: Sequence[int]) -> bool:
    return False


@pytest.fixture(scope="module")
def reader(tiny_checkpoint: Folder, onnx_folder: Folder) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, W = 8, and its ONNX folder."""
    text = {"tokenizer": True, "vocab_size": 259}
    return tiny_checkpoint(**text), onnx_folder(max_batch_size=1, **text)


@pytest.fixture(scope="module")
def model(reader: tuple[Path, Path]) -> MistralForCausalLM:
    return load_model(Checkpoint.open(reader[0]), sliding_window=8)


@pytest.fixture
def cache(reader: tuple[Path, Path]) -> RollingCache:
    return open_cache(reader[1], threads=1)


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, ITEMS)))
    return path


def run(reader: tuple[Path, Path], out: Path, *words: object) -> tuple[int, dict[str, Any]]:
    """The command on one thread: its exit status and its record."""
    checkpoint, folder = reader
    arguments = [folder, "--reference", checkpoint, "--out", out, "--threads", 1, *words]
    status = evaluate([str(word) for word in arguments])
    return status, json.loads((out / EVAL_NAME).read_text())


# ---------------------------------------------------------------- sides


def test_a_score_is_the_sum_of_log_softmax(model: MistralForCausalLM, cache: RollingCache) -> None:
    """By a statement of its own: numpy's softmax over the logits of one forward over everything."""
    for side in (ReferenceSide(model), ArtifactSide(cache)):
        for tokens, found in zip(CONTINUATIONS, side.scores(CONTEXT, CONTINUATIONS), strict=True):
            logits = run_reference(model, [*CONTEXT, *tokens]).logits(len(CONTEXT) - 1, 52)[: len(tokens)]
            exponents = np.exp(logits.astype(np.float64))
            chances = exponents[np.arange(len(tokens)), list(tokens)] / exponents.sum(axis=-1)
            assert found.loglikelihood == pytest.approx(np.log(chances).sum(), abs=1e-4)
            assert found.greedy == (logits.argmax(axis=-1).tolist() == list(tokens))


def test_log_softmax_holds_where_exponentials_would_overflow() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, -1000.0]], np.float32)
    np.testing.assert_allclose(log_softmax(logits), [[0, -1000], [-np.log(2)] * 2])


def test_a_greedy_continuation_is_known_as_one(model: MistralForCausalLM, cache: RollingCache) -> None:
    for side in (ReferenceSide(model), ArtifactSide(cache)):
        tokens = side.complete(CONTEXT, 6, ended=never).tokens
        other = (*tokens[:-1], (tokens[-1] + 1) % 259)
        assert [score.greedy for score in side.scores(CONTEXT, [tokens, other, tokens])] == [
            True,
            False,
            True,
        ]


def test_scores_do_not_depend_on_the_other_continuations(cache: RollingCache) -> None:
    """The ring is put back: what one continuation wrote is gone before the next."""
    side = ArtifactSide(cache)
    alone = [side.scores(CONTEXT, [tokens])[0] for tokens in CONTINUATIONS]
    assert side.scores(CONTEXT, CONTINUATIONS) == alone
    assert side.scores(CONTEXT, CONTINUATIONS[::-1]) == alone[::-1]
    assert cache.free_rows == 1


def test_a_ring_that_is_not_put_back_shows(cache: RollingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    side = ArtifactSide(cache)
    expected = side.scores(CONTEXT, CONTINUATIONS)
    monkeypatch.setattr(cache, "restore", lambda row, state: None)
    assert side.scores(CONTEXT, CONTINUATIONS) != expected


def test_the_references_own_cache_changes_no_token(model: MistralForCausalLM) -> None:
    """Past 2W: each token is that of one forward over everything before it, without a cache."""
    found = ReferenceSide(model).complete(CONTEXT, 24, ended=never)
    logits = run_reference(model, [*CONTEXT, *found.tokens]).logits(len(CONTEXT) - 1, len(CONTEXT) + 23)
    ordered = np.sort(logits, axis=-1)
    assert logits.argmax(axis=-1).tolist() == list(found.tokens)
    np.testing.assert_allclose(found.margins, ordered[:, -1] - ordered[:, -2], atol=1e-4)


def test_both_sides_complete_alike(model: MistralForCausalLM, cache: RollingCache) -> None:
    pair = [side.complete(CONTEXT, 24, ended=never) for side in (ReferenceSide(model), ArtifactSide(cache))]
    assert pair[0].tokens == pair[1].tokens
    np.testing.assert_allclose(pair[0].margins, pair[1].margins, atol=1e-4)


def test_a_completion_ends_with_the_token_that_ends_it(cache: RollingCache) -> None:
    side = ArtifactSide(cache)
    whole = side.complete(CONTEXT, 10, ended=never).tokens
    end = whole[3]
    cut = side.complete(CONTEXT, 10, ended=lambda tokens: tokens[-1] == end).tokens
    assert cut == whole[: whole.index(end) + 1]


# ---------------------------------------------------------------- tokens


def in_words(text: str) -> list[int]:
    """A token a word that knows whether a blank came before it, after one that begins every text."""
    known = {"": 0}
    pieces = text.replace(" ", "\0 ").split("\0")
    return [1, *(2 + hash_of(piece, known) for piece in pieces if piece)]


def hash_of(piece: str, known: dict[str, int]) -> int:
    return known.get(piece, sum(ord(letter) * (i + 1) for i, letter in enumerate(piece)))


def test_the_whole_is_encoded_and_split_where_the_context_ends() -> None:
    before, after = encode_pair(in_words, "the capital is", " Paris now")
    assert before == tuple(in_words("the capital is"))
    assert before + after == tuple(in_words("the capital is Paris now"))
    assert len(after) == 2


def test_blanks_that_end_a_context_go_to_the_continuation() -> None:
    assert encode_pair(in_words, "the capital is ", "Paris") == encode_pair(
        in_words, "the capital is", " Paris"
    )


def test_a_choice_without_a_token_of_its_own_is_refused() -> None:
    task = Task("t", (MultipleChoice("the capital", ("s", " city"), 0),))
    with pytest.raises(ValidationError, match="t, item 1: the choice 's' melts into the last token"):
        list(questions(task, in_words, limit=None))


# ---------------------------------------------------------------- the whole


def test_an_exact_artifact_agrees(
    reader: tuple[Path, Path], task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(reader, tmp_path / "out", "--tasks", task_file, "--min-agreement", 1)
    assert status == 0
    assert found["overall"]["same"]["count"] == found["overall"]["same"]["total"] == 5
    assert found["overall"]["loglikelihood_difference"]["max"] < 1e-3
    assert found["overall"]["completions"]["count"] == 2
    assert found["tasks"][0]["name"] == "mixed"
    assert [item["number"] for item in found["items"]] == [1, 2, 3, 4, 5]
    assert min(item["tokens"] for item in found["items"]) >= 8
    assert max(item["tokens"] for item in found["items"]) > 4 * 8
    assert found["format_version"] == 1 and found["files"] == [] and found["skipped"] == []
    assert found["reference"]["sha256"] == read_manifest(reader[1]).sources["checkpoint"]
    assert "--min-agreement 1" in found["run"]["command"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["task", "items", "agree"]
    assert lines[1].split()[:3] == ["mixed", "5", "100.0%"]
    assert lines[-1] == str(tmp_path / "out" / EVAL_NAME)


@pytest.mark.slow
def test_a_bf16_artifact_answers_through_its_float32_twin(
    reader: tuple[Path, Path], task_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bf16"
    export_checkpoint(reader[0], folder, precision="bf16", prefill_chunk=4, max_batch_size=1)
    _, found = run((reader[0], folder), tmp_path / "out", "--tasks", task_file)
    assert "twin" in found["executed"]
    assert 0 < found["overall"]["loglikelihood_difference"]["max"] < 2


def test_a_side_agrees_with_itself_without_any_difference(
    reader: tuple[Path, Path], task_file: Path, model: MistralForCausalLM
) -> None:
    job = Job(reader[1], reader[0], Path("unused"), tasks=[task_file])
    asked = evaluation.prepare(job, read_manifest(reader[1]))
    first, second = (evaluation.answers(ReferenceSide(model), asked, title="") for _ in range(2))
    assert first == second
    found = agreement([Outcome(*one) for one in zip(asked.questions, first, second, strict=True)])
    assert found.same.value == 1
    assert found.loglikelihood_difference == (0, 0)
    assert found.rank_correlation == pytest.approx((1, 1))
    assert found.only_reference == found.only_artifact == 0


def forget_the_ring(patch: pytest.MonkeyPatch) -> None:
    original = OnnxRuntimeBackend.run

    def forget(self: OnnxRuntimeBackend, step: Any) -> Any:
        for ring in self._rings.arrays:
            ring[step.first_row] = 0
        return original(self, step)

    patch.setattr(OnnxRuntimeBackend, "run", forget)


def disturb_the_logits(patch: pytest.MonkeyPatch) -> None:
    """As weights of the head would that were perturbed by as much as they are large."""
    original = OnnxRuntimeBackend.run
    noise = np.random.default_rng(0).normal(0, 4, 259).astype(np.float32)
    patch.setattr(OnnxRuntimeBackend, "run", lambda self, step: original(self, step) + noise)


@pytest.mark.parametrize("fault", [forget_the_ring, disturb_the_logits])
def test_a_fault_lowers_agreement(
    fault: Callable[[pytest.MonkeyPatch], None],
    reader: tuple[Path, Path],
    task_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    status, found = run(reader, tmp_path / "out", "--tasks", task_file, "--min-agreement", 0.9)
    assert status == 1
    assert found["overall"]["same"]["value"] < 0.9
    assert found["overall"]["loglikelihood_difference"]["max"] > 0.5


def test_an_artifact_of_other_weights_agrees_less(
    reader: tuple[Path, Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tokenizer(write_checkpoint(tmp_path / "ck", vocab_size=259, seed=1))
    monkeypatch.setattr(evaluation, "require_same_checkpoint", lambda manifest, source: None)
    status, found = run((other, reader[1]), tmp_path / "out", "--tasks", task_file, "--min-agreement", 0.9)
    assert status == 1
    assert found["overall"]["completions"]["count"] == 0
    assert found["items"][3]["diverged"] is not None


def test_an_artifact_that_fails_in_an_item_is_a_finding(
    reader: tuple[Path, Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxRuntimeBackend.run

    def nan(self: OnnxRuntimeBackend, step: Any) -> Any:
        logits = original(self, step)
        logits[(step.position_ids == 30).any(axis=-1)] = np.nan
        return logits

    monkeypatch.setattr(OnnxRuntimeBackend, "run", nan)
    _, found = run(reader, tmp_path / "out", "--tasks", task_file)
    assert found["overall"]["failures"] == 2  # the items that reach position 30
    assert "NaN" in found["items"][1]["artifact"]["failed"]
    assert not found["items"][1]["same"] and found["items"][0]["same"]


class Broken:
    def __init__(self, error: MistralTrtError) -> None:
        self._error = error

    def scores(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        raise self._error

    def complete(self, prompt: Sequence[int], max_tokens: int, *, ended: Never) -> Any:
        raise self._error


@pytest.mark.parametrize("error", [NonFiniteLogitsError([0], {}), BackendError("the step failed")])
def test_only_a_failing_step_is_an_answer(error: MistralTrtError) -> None:
    question = Question("t", 1, MultipleChoice("a", ("b", "c"), 0), (1,), ((2,), (3,)))
    side: Side = Broken(error)
    assert ask(side, question, decode=str, end_tokens=frozenset()).why == str(error)  # type: ignore[union-attr]
    with pytest.raises(ValidationError, match="the checkpoint"):
        ask(Broken(ValidationError("the checkpoint")), question, decode=str, end_tokens=frozenset())


def test_limit_asks_the_first_items_the_same_each_time(
    reader: tuple[Path, Path], task_file: Path, tmp_path: Path
) -> None:
    whole = run(reader, tmp_path / "a", "--tasks", task_file)[1]
    records = [run(reader, tmp_path / name, "--tasks", task_file, "--limit", 2)[1] for name in "bc"]
    assert records[0]["items"] == records[1]["items"] == whole["items"][:2]


def test_items_that_are_too_long_are_named(
    reader: tuple[Path, Path], task_file: Path, tmp_path: Path
) -> None:
    _, found = run(reader, tmp_path / "out", "--tasks", task_file, "--length", 30)
    assert [item["number"] for item in found["skipped"]] == [2, 4]
    assert found["skipped"][0]["why"] == "it takes 40 tokens, more than --length 30"
    assert found["overall"]["same"]["total"] == 3
    with pytest.raises(ValidationError, match="no item is left to ask; the first was left out because"):
        run(reader, tmp_path / "out", "--tasks", task_file, "--length", 3)


def test_recall_crosses_the_window_twice_and_agrees(reader: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "far.toml"
    path.write_text("items = 2\nseed = 1\nchoices = 3\nlength = 40\ndistance = 20\n")
    _, found = run(reader, tmp_path / "out", "--tasks", path)
    assert all(item["tokens"] > 40 * 8 for item in found["items"])
    assert found["overall"]["same"]["value"] == 1
    assert found["overall"]["loglikelihood_difference"]["max"] < 1e-3


def test_without_a_window_what_is_past_the_context_is_left_out(
    tiny_checkpoint: Folder, onnx_folder: Folder, tmp_path: Path, task_file: Path
) -> None:
    text = {"tokenizer": True, "vocab_size": 259, "sliding_window": None, "num_hidden_layers": 1}
    pair = tiny_checkpoint(**text), onnx_folder(max_batch_size=1, max_context=24, **text)
    _, found = run(pair, tmp_path / "out", "--tasks", task_file)
    assert [item["number"] for item in found["skipped"]] == [2, 4]
    assert "max_context of 24 tokens" in found["skipped"][0]["why"]
    assert found["overall"]["same"]["value"] == 1


# ---------------------------------------------------------------- what stops it


def test_what_cannot_run_is_an_error(
    reader: tuple[Path, Path], task_file: Path, tmp_path: Path, onnx_folder: Folder, tiny_checkpoint: Folder
) -> None:
    checkpoint, folder = reader
    with pytest.raises(ValidationError, match="--limit must be at least 1, found 0"):
        Job(folder, checkpoint, tmp_path / "out", limit=0)
    with pytest.raises(ArtifactError, match="choose another --out"):
        evaluate_artifact(Job(folder, checkpoint, folder))
    with pytest.raises(ValidationError, match="is not the checkpoint this artifact was made from"):
        evaluate_artifact(Job(folder, tiny_checkpoint(), tmp_path / "out"))
    with pytest.raises(ManifestError, match=r"has no tokenizer\.json"):
        evaluate_artifact(Job(onnx_folder(), tiny_checkpoint(), tmp_path / "out", tasks=[task_file]))
    assert not (tmp_path / "out").exists()


def test_a_damaged_task_file_is_status_two_and_leaves_nothing(
    reader: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n")
    checkpoint, folder = reader
    words = [folder, "--reference", checkpoint, "--out", tmp_path / "out", "--tasks", path]
    assert main(["eval", *map(str, words)]) == 2
    assert "bad.jsonl, line 1: expected the keys" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
