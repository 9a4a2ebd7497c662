"""Text ↔ token ids, with the tokenizer and chat template that travel in the artifact."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from mistral_trt.errors import GenerationError, ManifestError

Message = Mapping[str, Any]


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
        except Exception as error:  # tokenizers raises plain Exception
            raise ManifestError(f"{folder}: the tokenizer cannot be read: {error}") from error
        return cls(fast, config, _find_template(folder, config))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the beginning-of-text token where the model uses one."""
        return list(self._fast.encode(text).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to answer."""
        return list(self._fast.encode(self.render_chat(messages), add_special_tokens=False).ids)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The conversation in the model's own format. Raises GenerationError without a template."""
        if self._template is None:
            raise GenerationError("this model has no chat template; pass a prompt instead of messages")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self._template).render(
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=_text(self._config.get("bos_token")),
                eos_token=_text(self._config.get("eos_token")),
            )
        except jinja2.TemplateError as error:
            raise GenerationError(f"the chat template refused these messages: {error}") from error

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
