"""Text and chat messages ↔ token ids, with the tokenizer and chat template that travel in the artifact."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from mistral_trt.errors import GenerationError, ManifestError
from mistral_trt.runtime.text.chat import ChatTemplate, Message, answer_end
from mistral_trt.runtime.text.control_tokens import ControlTokens, encode
from mistral_trt.runtime.text.text_stream import StreamDecoder, TextStream, TokenBytes

_SPECIAL_TOKENS = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())


class Tokenizer:
    """A `tokenizer.json` and, where the model has one, its chat template. Any thread may use it."""

    def __init__(self, fast: FastTokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        """config: tokenizer_config.json. Raises ValueError for a decoder that streams no text."""
        special = {name: text for name in _SPECIAL_TOKENS if (text := _text(config.get(name))) is not None}
        _add_named(fast, [text for name, text in special.items() if name != "unk_token"])
        self._fast = fast
        self._control = ControlTokens(fast, special.values())
        self._bytes = TokenBytes(fast)
        self._template = None if chat_template is None else ChatTemplate(chat_template, special)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Raises ManifestError if there is no tokenizer or it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ManifestError(
                f"{folder} has no tokenizer.json, so it takes token ids only; "
                "export again from a checkpoint folder that has one to use text"
            )
        try:
            fast = FastTokenizer.from_file(str(path))
            # A tokenizer saved while training carries its cut and its padding; a prompt is neither.
            fast.no_truncation()
            fast.no_padding()
            config_path = folder / "tokenizer_config.json"
            config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
            return cls(fast, config, _find_template(folder, config))
        except Exception as error:  # tokenizers raises plain Exception
            raise ManifestError(f"{folder}: the tokenizer cannot be read: {error}") from error

    @cached_property
    def size(self) -> int:
        """The highest id + 1, added tokens included. A model may have logits for more."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def json(self) -> str:
        """The whole tokenizer as the package `tokenizers` writes it, for libraries that take that."""
        return str(self._fast.to_str())

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a text, with the beginning-of-text token where the model uses one.

        special_tokens: the text of a special token ("</s>") is that token, as in transformers. Otherwise it
        is ordinary text, as in mistral-common: a service's users must not write control tokens.
        Raises GenerationError for what is no text.
        """
        if special_tokens:
            return list(encode(self._fast, text, add_special_tokens=True).ids)
        return self._control.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to answer.

        Its special tokens are those that the chat template writes; none are added, and the text of one in a
        message's content stays text. What a template writes as ordinary text (in Mistral's v1 "[INST]" is no
        token), a message can write too. Raises GenerationError without a template, for messages that are
        none or that the template refuses, and where a special token's text in a message cannot be told apart
        from the template's own.
        """
        return self._control.encode_rendering(self._chat.render_apart(messages)).ids

    def continue_chat(
        self, previous: Sequence[Message], answer: str, messages: Sequence[Message]
    ) -> list[int] | None:
        """Token ids to append where `encode_chat(previous)` and the answer's tokens stand, but not its end.

        They are what the template writes after the answer (most often the end token) and the new messages,
        so that the model is to answer the last of them. None where the whole is to be encoded anew: if the
        longer conversation does not begin with the shorter one and the answer (a template that moves the
        system prompt, or drops thoughts), or if a token would lie across the end of the answer. Blanks at the
        answer's borders may differ, see `chat.answer_end`. Raises GenerationError as `encode_chat` does.
        """
        before = self._chat.render(previous)
        turn = {"role": "assistant", "content": answer}
        whole = self._chat.render_apart([*previous, turn, *messages])
        end = answer_end(before, answer, whole.text)
        if end is None:
            return None
        encoded = self._control.encode_rendering(whole)
        index = encoded.index_at(end)
        return None if index is None else encoded.ids[index:]

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The conversation in the model's own format. Raises GenerationError without a template."""
        return self._chat.render(messages)

    @property
    def _chat(self) -> ChatTemplate:
        if self._template is None:
            raise GenerationError(
                "this model has no chat template; pass a prompt instead of messages, or put a "
                "chat_template.jinja into the checkpoint's folder and export it again"
            )
        return self._template

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; bytes that are no UTF-8 as `text` describes."""
        return self._bytes.decode(ids)

    def decoder(self, prompt: Sequence[int]) -> StreamDecoder:
        """A decoder for tokens that follow `prompt`."""
        return StreamDecoder(self._bytes, prompt)

    def text_stream(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> TextStream:
        """The text of tokens that follow `prompt`, up to the first of the stop strings."""
        return TextStream(self.decoder(prompt), stop)


def _add_named(fast: FastTokenizer, names: Any) -> None:
    """Make special what tokenizer_config.json names, as transformers does, where tokenizer.json does not."""
    added = {entry.content for entry in fast.get_added_tokens_decoder().values()}
    missing = [name for name in names if fast.token_to_id(name) is not None and name not in added]
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in missing])


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if not isinstance(config, Mapping):
        raise TypeError(f"tokenizer_config.json must hold an object, found {type(config).__name__}")
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _text(token: Any) -> str | None:
    """A special token as text; tokenizer_config.json has it plain or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
