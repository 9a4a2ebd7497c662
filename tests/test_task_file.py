"""Task files: what they say is what is asked, and a damaged one is named with its line."""

import json
from pathlib import Path

import pytest

from mistral_trt.contract import Ring
from mistral_trt.errors import ValidationError
from mistral_trt.validate.tasks.items import Completion, MultipleChoice, Task
from mistral_trt.validate.tasks.long_recall import Recall, recall_items
from mistral_trt.validate.tasks.task_file import (
    read_task,
    read_tasks,
    require_names_apart,
    shipped_tasks,
)

RING = Ring(sliding_window=64, prefill_chunk=16)
CHOICE = {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}
COMPLETION = {"prompt": "one two", "answer": "three", "max_tokens": 4}
RECALL = "items = 3\nseed = 1\nchoices = 4\nlength = 2.25\ndistance = 1.5\n"


def words(text: str) -> int:
    """A tokenizer's count, where a word is a token."""
    return len(text.split())


def read(path: Path, text: str) -> Task:
    path.write_text(text)
    return read_task(path, ring=RING, count_tokens=words)


def test_items_are_read_as_they_stand(tmp_path: Path) -> None:
    task = read(tmp_path / "sums.jsonl", f"{json.dumps(CHOICE)}\n\n{json.dumps(COMPLETION)}\n")
    assert task.name == "sums"
    assert task.items == (MultipleChoice("2 + 2 =", (" 4", " 5"), 0), Completion("one two", "three", 4))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", "expected the keys context, choices, answer .* found none"),
        (json.dumps({**CHOICE, "extra": 1}), "expected the keys .* found answer, choices, context, extra"),
        (json.dumps({**CHOICE, "context": " "}), "context must be a text with more than blanks; found ' '"),
        (json.dumps({**CHOICE, "choices": "ab"}), "choices must be two or more texts"),
        (json.dumps({**CHOICE, "choices": 7}), "choices must be two or more texts"),
        (json.dumps({**CHOICE, "choices": [" 4"]}), "choices must be two or more texts"),
        (json.dumps({**CHOICE, "choices": [" 4", " 4"]}), "no two alike"),
        (json.dumps({**CHOICE, "choices": [" 4", ""]}), "none empty"),
        (json.dumps({**CHOICE, "choices": [" 4", 5]}), "choices must be two or more texts"),
        (json.dumps({**CHOICE, "answer": 2}), "answer must be an index of choices, 0…1; found 2"),
        (json.dumps({**CHOICE, "answer": -1}), "answer must be an index"),
        (json.dumps({**CHOICE, "answer": True}), "answer must be an index"),
        (json.dumps({**CHOICE, "answer": "0"}), "answer must be an index"),
        (json.dumps({**COMPLETION, "prompt": 3}), "prompt must be a text"),
        (json.dumps({**COMPLETION, "answer": ""}), "answer must be a text"),
        (json.dumps({**COMPLETION, "max_tokens": 0}), "max_tokens must be a whole number of at least 1"),
        ("[" * 100_000, ""),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "sums.jsonl"
    with pytest.raises(ValidationError, match=rf"sums\.jsonl, line 3: .*{message}"):
        read(path, f"{json.dumps(CHOICE)}\n\n{line}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("items = 3\nseed = x\n", "line 2"),
        ("items = 3\n", "expected the keys choices, distance, items, length, seed, found items"),
        (RECALL.replace("items = 3", "items = 0"), "items of at least 1"),
        (RECALL.replace("choices = 4", "choices = 1"), "choices of 2…8, found 3 and 1"),
        (RECALL.replace("seed = 1", "seed = 1.5"), "seed must be a whole number, found 1.5"),
        (RECALL.replace("2.25", "true"), "length must be a number, found True"),
        (RECALL.replace("1.5", "2.5"), "distance <= length"),
        (RECALL.replace("1.5", "nan"), "distance <= length"),
    ],
)
def test_a_damaged_recall_file_says_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=rf"far\.toml: .*{message}"):
        read(tmp_path / "far.toml", text)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"holds no items; expected one JSON object a line"):
        read(tmp_path / "none.jsonl", "\n")
    with pytest.raises(ValidationError, match=r"ends in \.jsonl \(items\) or \.toml"):
        read(tmp_path / "sums.json", "{}")
    with pytest.raises(ValidationError, match=r"cannot be read as a UTF-8 task file"):
        read_task(tmp_path / "absent.jsonl", ring=RING, count_tokens=words)
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(ValidationError, match=r"cannot be read as a UTF-8 task file"):
        read_task(tmp_path / "latin.jsonl", ring=RING, count_tokens=words)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "sums.jsonl", tmp_path / "b" / "sums.jsonl"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(CHOICE))
    with pytest.raises(ValidationError, match="two tasks are called 'sums'; rename"):
        require_names_apart(read_tasks(paths, ring=RING, count_tokens=words))


def test_what_comes_along_can_be_read() -> None:
    tasks = {task.name: task for task in read_tasks(shipped_tasks(), ring=RING, count_tokens=words)}
    assert set(tasks) == {
        "general-knowledge", "arithmetic", "copying", "recall-near", "recall-inside", "recall-beyond",
    }  # fmt: skip
    for name in ("general-knowledge", "arithmetic", "copying"):
        assert len(tasks[name].items) == 40
        assert len(set(tasks[name].items)) == 40
    answers = [item.answer for item in tasks["general-knowledge"].items]
    assert all(answers.count(index) >= 4 for index in range(4))  # no place wins by itself


def test_every_sum_that_comes_along_is_right() -> None:
    (path,) = (path for path in shipped_tasks() if path.stem == "arithmetic")
    for item in read_task(path, ring=RING, count_tokens=words).items:
        assert isinstance(item, MultipleChoice)
        for line in f"{item.context}{item.choices[item.answer]}".splitlines():
            first, sign, second, _, result = line.split()
            assert int(first) + (1 if sign == "+" else -1) * int(second) == int(result)


def test_every_copy_that_comes_along_repeats_its_prompt() -> None:
    (path,) = (path for path in shipped_tasks() if path.stem == "copying")
    for item in read_task(path, ring=RING, count_tokens=words).items:
        assert isinstance(item, Completion)
        assert item.answer in item.prompt


# ---------------------------------------------------------------- long recall


@pytest.mark.parametrize(("length", "distance"), [(0.6, 0.45), (2.25, 0.5), (2.25, 1.5), (4, 4)])
def test_recall_is_as_long_and_as_far_as_it_says(length: float, distance: float) -> None:
    window = 200
    recall = Recall(items=5, seed=3, choices=4, length=length, distance=distance)
    for item in recall_items(recall, window=window, count_tokens=words):
        total = words(item.context)
        last = item.context.rindex("The password of")
        after = item.context[item.context.index(".", last) + 1 :]
        assert distance * window <= words(after) <= distance * window + 12
        if distance < length:
            assert length * window <= total <= length * window + 24


def test_recall_gives_the_answer_once_and_other_choices_elsewhere() -> None:
    recall = Recall(items=20, seed=3, choices=4, length=1, distance=0.5)
    items = list(recall_items(recall, window=200, count_tokens=words))
    assert len({item.context for item in items}) == 20
    assert len({item.answer for item in items}) > 1
    for item in items:
        place = item.context.removesuffix(" house is").rsplit(" ", 1)[1]
        assert f"The password of the {place} house is{item.choices[item.answer]}." in item.context
        assert all(item.context.count(f"{word}.") == 1 for word in item.choices)


def test_recall_is_the_same_for_the_same_seed() -> None:
    def made(seed: int) -> list[MultipleChoice]:
        recall = Recall(items=3, seed=seed, choices=3, length=2, distance=1)
        return list(recall_items(recall, window=64, count_tokens=words))

    assert made(5) == made(5) != made(6)
