"""Chat messages + a model's chat template → the text to encode, and where the contents stand in it.

A message is a mapping with a role and a content: text, or a list of {"type": "text", "text": …} parts. What
else it holds (a name, tool calls) is passed on to the template. Templates find what `transformers` gives
them; they are code from a checkpoint, and run in `sandbox.Sandbox`.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mistral_trt.errors import GenerationError

if TYPE_CHECKING:
    from mistral_trt.runtime.text.sandbox import Sandbox

Message = Mapping[str, Any]

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Rendering:
    """A conversation in the model's own format.

    text: what is to be encoded.  outline: the same conversation with a placeholder for each content.
    contents: what the placeholders stand for.  others: all other text in the messages, such as their roles.
    """

    text: str
    outline: str
    contents: tuple[str, ...]
    others: tuple[str, ...]
    placeholder: re.Pattern[str]

    @cached_property
    def told_apart(self) -> bool:
        """Whether the template writes contents as they are, so that `outline` shows where they stand."""
        return self.fill(self.outline) == self.text

    def fill(self, outline: str) -> str:
        """A part of the outline with the contents in their places."""
        return self.placeholder.sub(lambda match: self.contents[int(match[1])], outline)


class ChatTemplate:
    """A model's chat template, compiled when it is first needed. Any thread may render it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: by their names in templates, such as bos_token."""
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._sandbox: Sandbox | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation, ready for the model's answer.

        Raises GenerationError for messages that are none, and where the template refuses them or is stopped.
        """
        return self._run(checked(messages), datetime.now())

    def render_apart(self, messages: Sequence[Message]) -> Rendering:
        """The same, and what is the template's in it and what the messages'."""
        known, now = checked(messages), datetime.now()
        text = self._run(known, now)
        nonce = secrets.token_hex(4)
        while nonce in text:
            nonce = secrets.token_hex(4)
        contents: list[str] = []
        outline = self._run([_emptied(message, nonce, contents) for message in known], now)
        others = tuple(text for message in known for text in _texts(_mapped(message, lambda _: "")))
        return Rendering(text, outline, tuple(contents), others, re.compile(f"q{nonce}q([0-9]+)q"))

    def _run(self, messages: list[dict[str, Any]], now: datetime) -> str:
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
        }
        from mistral_trt.runtime.text.sandbox import Sandbox  # here: only chats need jinja2
        from mistral_trt.runtime.text.template_meter import LimitError

        try:
            if self._sandbox is None:
                self._sandbox = Sandbox(self._source)
            return self._sandbox.render(variables, characters=sum(map(len, _texts(messages))), now=now)
        except LimitError as error:
            raise GenerationError(f"the chat template was stopped: {error}") from error
        except Exception as error:  # a template is a program, and raises what programs raise
            reason = str(error) or type(error).__name__
            if len(reason) > _LONGEST_REASON:
                reason = f"{reason[:_LONGEST_REASON]}…"
            raise GenerationError(f"the chat template refused these messages: {reason}") from error


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dicts, lists and texts, which are all that a template gets to see.

    Fields that are None are left out, as in transformers. Raises GenerationError for what is no message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise GenerationError(f"messages: expected a list of mappings, found {type(messages).__name__}")
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _checked_message(place: str, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise GenerationError(f"{place}: expected a mapping with role and content, found {message!r:.80}")
    try:
        known: dict[str, Any] = _plain({name: part for name, part in message.items() if part is not None})
    except (TypeError, RecursionError) as error:
        raise GenerationError(f"{place}: expected only what JSON can hold, found {error}") from error
    role, content = known.get("role"), known.get("content")
    if not isinstance(role, str):
        raise GenerationError(f"{place}: expected a role as text, found {role!r:.80}")
    if not isinstance(content, str) and not (isinstance(content, list) and all(map(_is_text, content))):
        raise GenerationError(
            f'{place}: expected content as text or as a list of {{"type": "text", "text": …}}, '
            f"found {content!r:.80}"
        )
    return known


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _plain(value: Any) -> Any:
    """A copy in Python's own types: others may have methods that a template must not reach."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {str.__str__(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    raise TypeError(f"{type(value).__name__}: {value!r:.80}")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a message or a list of them, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _mapped(message: dict[str, Any], function: Callable[[str], str]) -> dict[str, Any]:
    """The message with `function` of its content's text, or of each part's."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": function(content)}
    return {**message, "content": [{**part, "text": function(part["text"])} for part in content]}


def _emptied(message: dict[str, Any], nonce: str, contents: list[str]) -> dict[str, Any]:
    """The message with placeholders for its contents, which are appended to `contents`.

    Blanks around a content stay: a template may strip them, or ask whether there is anything else.
    """

    def emptied(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        contents.append(core)
        before, _, after = text.partition(core)
        return f"{before}q{nonce}q{len(contents) - 1}q{after}"

    return _mapped(message, emptied)


def answer_end(before: str, answer: str, whole: str) -> int | None:
    """Where in `whole` the answer to the conversation `before` ends, if `whole` continues `before` with it.

    Blanks (spaces, line ends) at the answer's borders may differ: a template may strip them, or put some of
    its own there. Of those that end the answer, those that `whole` has as well count as the answer's.

    before "[INST] hi [/INST]", answer "you\\n", whole "[INST] hi [/INST] you</s>[INST] …": at "</s>".
    """
    if not whole.startswith(before):
        return None
    core, start = answer.strip(), len(before)
    if core:
        rest = whole[start:]
        start += len(rest) - len(rest.lstrip())
        if not whole.startswith(core, start):
            return None
    end = start + len(core)
    trailing = answer[len(answer.rstrip()) :]
    return end + len(trailing) if whole.startswith(trailing, end) else end
