"""Text ↔ token ids, with the tokenizer and chat template that travel in the artifact."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from mistral_trt.errors import GenerationError, ManifestError

Message = Mapping[str, Any]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A `tokenizer.json` and, where the model has one, its chat template."""

    def __init__(self, fast: FastTokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        self._fast = fast
        self._config = config
        self._template = chat_template

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
            config_path = folder / "tokenizer_config.json"
            config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
            template = _find_template(folder, config)
        except Exception as error:  # tokenizers raises plain Exception
            raise ManifestError(f"{folder}: the tokenizer cannot be read: {error}") from error
        # A tokenizer saved while training carries its cut and its padding; a prompt is neither.
        fast.no_truncation()
        fast.no_padding()
        return cls(fast, config, template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the beginning-of-text token where the model uses one."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to answer."""
        return self._encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The conversation in the model's own format. Raises GenerationError without a template."""
        if self._template is None:
            raise GenerationError("this model has no chat template; pass a prompt instead of messages")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        special = {name: _text(self._config.get(name)) for name in _SPECIAL_TOKENS}
        try:
            return environment.from_string(self._template).render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **special
            )
        except Exception as error:  # a template is a program, and raises what programs raise
            raise GenerationError(f"the chat template refused these messages: {error}") from error

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # half a surrogate pair: what Python makes of bytes that are not UTF-8
            raise GenerationError("the prompt is not valid text (UTF-8)") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._fast.decode(list(ids)))

    def decoder(self, prompt: Sequence[int]) -> "StreamDecoder":
        """A decoder for tokens that follow `prompt`."""
        return StreamDecoder(self._fast, prompt)


class StreamDecoder:
    """Token by token → pieces of text that join to the whole; a split character waits for its rest."""

    def __init__(self, fast: FastTokenizer, prompt: Sequence[int]) -> None:
        self._fast = fast
        # A few tokens of context are enough to know whether a space precedes the first new one.
        self._stream = DecodeStream(ids=list(prompt)[-8:], skip_special_tokens=True)

    def push(self, token: int) -> str:
        return self._stream.step(self._fast, token) or ""


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


def _text(token: Any) -> str:
    """A special token as text; tokenizer_config.json has it plain or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
