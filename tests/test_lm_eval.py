"""lm-eval's interface, with lm-eval absent or a stand-in of the few names that are used.

The stand-in has the signatures of lm-eval 0.4.13 and none of its code: these tests hold what the adapter does
with a request, not that lm-eval calls it so.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mistral_trt.cli import main
from mistral_trt.errors import GenerationError, MissingDependencyError, ValidationError
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.tasks import evaluation
from mistral_trt.validate.tasks.items import MultipleChoice
from tests.conftest import Folder

ADAPTER, TASKS = (f"mistral_trt.validate.tasks.lm_eval_{name}" for name in ("adapter", "tasks"))


class TemplateLM:
    """What the adapter inherits: the hook of lm-eval's request cache."""

    def __init__(self) -> None:
        self.cache_hook = self
        self.kept: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        self.kept.append((kind, request, result))


@dataclass
class Request:
    args: tuple[Any, ...]
    doc: dict[str, Any] = field(default_factory=dict)
    doc_id: int = 0


def windows(tokens: list[int], prefix: int, size: int, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pieces of at most `size` tokens, each after the token before it."""
    for start in range(0, len(tokens), size):
        piece = tokens[start : start + size]
        before = tokens[start - 1] if start else prefix
        yield [before, *piece[:-1]], piece


def normalized(settings: dict[str, Any]) -> dict[str, Any]:
    return {"do_sample": False, "until": [], "max_gen_toks": 256, **settings}


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    """The stand-in; yields what was registered."""
    registered: dict[str, type] = {}

    def register_model(name: str) -> Callable[[type], type]:
        return lambda found: registered.setdefault(name, found)

    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": None},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": Request},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.models": {},
        "lm_eval.models.utils": {"normalize_gen_kwargs": normalized},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.utils": {
            "get_rolling_token_windows": windows,
            "make_disjoint_window": lambda pair: (pair[0][: len(pair[0]) - len(pair[1]) + 1], pair[1]),
        },
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    yield registered
    for name in (ADAPTER, TASKS):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def reader(tiny_checkpoint: Folder, onnx_folder: Folder) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer of bytes, W = 8, and its ONNX folder."""
    text = {"tokenizer": True, "vocab_size": 259, "num_hidden_layers": 1}
    return tiny_checkpoint(**text), onnx_folder(max_batch_size=1, **text)


@pytest.fixture
def models(lm_eval: dict[str, type], reader: tuple[Path, Path]) -> list[Any]:
    """The adapter over the artifact and over its checkpoint."""
    import_module(ADAPTER)
    checkpoint, folder = reader
    made: Any = lm_eval["mistral-trt"]
    return [
        made(folder=str(folder), threads=1, batch_size=1, device="cuda:0"),
        made(folder=str(folder), reference=str(checkpoint)),
    ]


# ---------------------------------------------------------------- absent


def test_without_lm_eval_its_extra_is_named(
    tmp_path: Path, reader: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = reader
    words = [folder, "--reference", checkpoint, "--out", tmp_path / "out", "--lm-eval", "arc_easy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
        with pytest.raises(MissingDependencyError, match=r"pip install 'mistral-trt\[lm-eval\]'"):
            evaluation.lm_eval_tasks(["arc_easy"], folder=None, limit=None)
        assert main(["eval", *map(str, words)]) == 2
    assert "pip install 'mistral-trt[lm-eval]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the model


def test_log_likelihoods_of_both_sides_are_alike_and_in_order(models: list[Any]) -> None:
    requests = [
        (("a", "b"), list(range(3, 30)), [40]),
        (("a", "c"), list(range(3, 30)), [41, 42]),
        (("d", "e"), [7], [50, 51, 52]),
    ]
    found = [model._loglikelihood_tokens(requests) for model in models]
    assert [total for total, _ in found[0]] == pytest.approx([total for total, _ in found[1]], abs=1e-4)
    alone = [models[0]._loglikelihood_tokens([request])[0] for request in requests]
    assert found[0] == alone
    assert models[0].kept[:2] == [
        ("loglikelihood", ("a", "b"), alone[0]),
        ("loglikelihood", ("a", "c"), alone[1]),
    ]
    with pytest.raises(GenerationError, match="has no token of its own"):
        models[0]._loglikelihood_tokens([(("a", ""), [3], [])])


def test_a_long_text_is_read_in_one_go(models: list[Any]) -> None:
    """Five times past W = 8: what each token is given is all the window shows of what came before it."""
    text = "It was a dark and stormy night at sea."
    tokens = models[0].tok_encode(text)
    (expected,) = models[0]._loglikelihood_tokens([((text, ""), tokens[:1], tokens[1:])])
    for model in models:
        assert model.loglikelihood_rolling([Request((text,))]) == pytest.approx([expected[0]], abs=1e-4)
    assert models[0].loglikelihood_rolling([Request(("",))]) == [0]


def test_without_a_window_a_long_text_is_read_in_pieces(
    lm_eval: dict[str, type], tiny_checkpoint: Folder, onnx_folder: Folder
) -> None:
    text = {"tokenizer": True, "vocab_size": 259, "sliding_window": None, "num_hidden_layers": 1}
    checkpoint, folder = tiny_checkpoint(**text), onnx_folder(max_batch_size=1, max_context=16, **text)
    import_module(ADAPTER)
    made: Any = lm_eval["mistral-trt"]
    models = [made(folder=str(folder)), made(folder=str(folder), reference=str(checkpoint))]
    request = Request(("x" * 40,))
    totals = [model.loglikelihood_rolling([request])[0] for model in models]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)
    for model in models:
        with pytest.raises(GenerationError, match="max_context of 16 tokens"):
            model._loglikelihood_tokens([(("", ""), [3] * 16, [4, 5])])
        with pytest.raises(GenerationError, match="max_context of 16 tokens"):
            model.generate_until([Request(("abc", {"max_gen_toks": 20}))])


def test_completions_end_at_a_stop_string(models: list[Any]) -> None:
    whole = [model.generate_until([Request(("The sea", {"max_gen_toks": 20}))])[0] for model in models]
    assert whole[0] == whole[1]
    stop = next(letter for letter in whole[0][3:] if letter != "�")
    cut = models[0].generate_until([Request(("The sea", {"max_gen_toks": 20, "until": ["", stop]}))])
    assert cut == [whole[0][: whole[0].index(stop)]]
    with pytest.raises(GenerationError, match="answers greedily"):
        models[0].generate_until([Request(("The sea", {"do_sample": True}))])


def test_special_tokens_are_added_once_or_not_at_all(models: list[Any]) -> None:
    model = models[0]
    plain = model.tok_encode("ab", add_special_tokens=False)
    assert len(plain) == 2 and model.prefix_token_id == 0 and model.eot_token_id == 1
    assert model.tok_encode("ab") == model.tok_encode("<s>ab") == [0, *plain]
    assert model.tok_encode("<s>ab", add_special_tokens=True) == [0, 0, *plain]
    assert model.tok_encode("ab</s>", add_special_tokens=False) == [*plain, 1]


def test_chat_messages_are_put_into_the_models_format(models: list[Any]) -> None:
    chat = [{"role": "user", "content": "hello"}]
    text = models[0].apply_chat_template(chat)
    assert text == "<s>[user] hello\n[assistant] "
    assert models[0].tok_encode(text).count(0) == 1
    assert models[0].tokenizer_name == models[1].tokenizer_name
    with pytest.raises(GenerationError, match="cannot be continued"):
        models[0].apply_chat_template(chat, add_generation_prompt=False)


def test_a_model_that_begins_no_text_by_itself_is_given_what_its_manifest_names(
    lm_eval: dict[str, type], reader: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does: the beginning of a text (1 in this manifest), not its end."""
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **more: encode(self, text, **more)[1:])
    import_module(ADAPTER)
    model: Any = lm_eval["mistral-trt"]
    made = model(folder=str(reader[1]))
    made._ends = (2,)
    assert (made.prefix_token_id, made.eot_token_id) == (1, 2)


# ---------------------------------------------------------------- its tasks


class Capitals:
    """A multiple-choice task as lm-eval builds it."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, target: object = 1, contexts: Sequence[str] = ("Italy:", "Italy:")) -> None:
        self.config: dict[str, Any] = {"num_fewshot": None}
        self.instances: list[Request] = []
        self._target, self._contexts = target, contexts

    def get_config(self, key: str) -> Any:
        return self.config[key]

    def set_config(self, key: str, value: Any) -> None:
        self.config[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed

    def build_all_requests(self, limit: int | None) -> None:
        assert self.config["num_fewshot"] == 0 and self.seed == 1234
        for number in range(limit or 3):
            pairs = [*zip(self._contexts, (" Paris", " Rome"), strict=True), ("", " Paris"), ("", " Rome")]
            self.instances += [Request(pair, {"n": number}, number) for pair in pairs]

    def doc_to_choice(self, doc: dict[str, Any]) -> list[str]:
        return ["Paris", "Rome"]

    def doc_to_target(self, doc: dict[str, Any]) -> object:
        return self._target


class Gsm(Capitals):
    OUTPUT_TYPE = "generate_until"


class Manager:
    """Has four tasks, one of each kind that matters."""

    all_tasks = ("capitals", "by-name", "winograd", "gsm")

    def __init__(self, include_path: str | None) -> None:
        self.include_path = include_path

    def load(self, names: list[str]) -> dict[str, dict[str, Capitals]]:
        known = {
            "capitals": Capitals(),
            "by-name": Capitals("Rome"),
            "winograd": Capitals(contexts=("a", "b")),
            "gsm": Gsm(),
        }
        return {"tasks": {name: known[name] for name in names}}


@pytest.mark.usefixtures("lm_eval")
def test_items_of_lm_eval_are_asked_as_it_puts_them() -> None:
    tasks = evaluation.lm_eval_tasks(["capitals", "by-name"], folder=None, limit=2)
    assert [task.name for task in tasks] == ["capitals", "by-name"]
    assert [task.items for task in tasks] == [(MultipleChoice("Italy:", (" Paris", " Rome"), 1),) * 2] * 2
    assert tasks[0].sha256 is None


@pytest.mark.usefixtures("lm_eval")
def test_the_command_compares_both_sides_on_them(reader: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, folder = reader
    words = [folder, "--reference", checkpoint, "--out", tmp_path / "out", "--lm-eval", "capitals,by-name"]
    assert main(["eval", *map(str, words), "--limit", "2", "--threads", "1", "--min-agreement", "1"]) == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [(task["name"], task["sha256"]) for task in found["tasks"]] == [
        ("capitals", None),
        ("by-name", None),
    ]
    assert found["overall"]["same"]["total"] == 4


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "lm-eval has no task 'absent'; `lm-eval ls tasks` lists"),
        ("gsm", "gsm is not a multiple-choice task of lm-eval but generate_until; run it with python -m"),
        ("winograd", "winograd has a context for each choice"),
    ],
)
def test_tasks_of_lm_eval_that_cannot_be_asked_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        evaluation.lm_eval_tasks([name], folder=None, limit=None)
