"""A JSON schema or a regular expression → which tokens a text may go on with, by llguidance.

A constraint holds for the text's bytes, those of each token as the tokenizer joins them: a text that must be
"yes" begins with the token of "yes", not with that of " yes". Special tokens, the unknown token and end
tokens are no text. When to end is for the sampler to decide, which asks `complete`.
"""

import json
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mistral_trt.errors import GenerationError, require

Mask = npt.NDArray[np.bool_]

_KEPT_GRAMMARS = 32


class Constraint(Protocol):
    """What a sampler asks of a constraint on one text."""

    @property
    def complete(self) -> bool:
        """The text so far is whole: it may end here."""

    @property
    def finished(self) -> bool:
        """It is whole and nothing can follow: it must end here."""

    def mask(self) -> Mask:
        """Tokens that may come next, bool [V], without the end tokens. Valid until the next accept."""

    def accept(self, token: int) -> None:
        """Go on with one of those tokens. Raises GenerationError for another one."""


class GrammarCompiler:
    """A tokenizer → constraints on what is written with it. Any thread may call it.

    It keeps the latest grammars it compiled: samples, prompts and requests that ask for one get copies.
    tokenizer_json: gives the text of the tokenizer.json, when it is first needed.  vocab_size: V of the
    model.  eos_tokens: the model's.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], *, vocab_size: int, eos_tokens: frozenset[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_tokens = eos_tokens
        self._lock = Lock()
        self._opened: tuple[Any, npt.NDArray[np.intp]] | None = None
        self._compiled: dict[tuple[str | None, str | None], GrammarConstraint] = {}  # the oldest first

    def compile(
        self, *, json_schema: str | Mapping[str, Any] | None = None, regex: str | None = None
    ) -> "GrammarConstraint":
        """A constraint for one text, from one of the two; the first call also reads the tokenizer (0.1-1 s).

        json_schema: an object or its JSON text.  A keyword that llguidance does not honour is refused, even
        where the schema asks for leniency; white space is free unless the schema has "x-guidance":
        {"whitespace_flexible": false}.
        regex: in the syntax of Rust's regex crate; the whole text has to match.
        Raises MissingDependencyError without llguidance, GenerationError with llguidance's reason.
        """
        if (json_schema is None) == (regex is None):
            raise GenerationError("expected either json_schema or regex")
        schema = json.dumps(dict(json_schema)) if isinstance(json_schema, Mapping) else json_schema
        with self._lock:
            found = self._compiled.get((schema, regex))
        if found is None:
            found = self._compile(schema, regex)
            with self._lock:
                self._compiled[schema, regex] = found
                if len(self._compiled) > _KEPT_GRAMMARS:
                    del self._compiled[next(iter(self._compiled))]
        return found.copy()

    def _compile(self, json_schema: str | None, regex: str | None) -> "GrammarConstraint":
        library = require("llguidance", "constrained")
        tokenizer, barred = self._open(library)
        make = library.LLMatcher
        try:
            if json_schema is None:
                grammar = make.grammar_from_regex(regex)
            else:
                grammar = make.grammar_from_json_schema(json_schema, overrides={"lenient": False})
            matcher = make(tokenizer, grammar, log_level=0)
            refused = str(matcher.get_error())
        except ValueError as error:
            refused = str(error)
        if refused:
            name = "json_schema" if regex is None else f"regex {regex!r}"
            raise GenerationError(f"sampling: llguidance refuses the {name}: {_reason(refused)}")
        return GrammarConstraint(matcher, self._vocab_size, barred)

    def _open(self, library: Any) -> tuple[Any, npt.NDArray[np.intp]]:
        """llguidance's tokenizer, and the ids that never are text."""
        with self._lock:
            if self._opened is None:
                try:
                    self._opened = self._read(library)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise GenerationError(
                        "this artifact's tokenizer cannot be used with json_schema or regex: "
                        f"{_reason(str(error))}"
                    ) from error
            return self._opened

    def _read(self, library: Any) -> tuple[Any, npt.NDArray[np.intp]]:
        text = self._tokenizer_json()
        highest, special = _ids(json.loads(text))
        barred = special | self._eos_tokens
        tokenizer = library.LLTokenizer(
            text,
            n_vocab=max(self._vocab_size, highest + 1),
            eos_token=sorted(self._eos_tokens or barred),
        )
        return tokenizer, np.array(sorted(token for token in barred if token < self._vocab_size), np.intp)


def _ids(content: Any) -> tuple[int, set[int]]:
    """The highest id of a tokenizer.json, and the ids that its decoder does not write as they are."""
    added = content.get("added_tokens", [])
    vocab = content["model"]["vocab"]  # Unigram has a list of [token, score], the others token: id
    ids = vocab if isinstance(vocab, dict) else {token: place for place, (token, _) in enumerate(vocab)}
    special = {token["id"] for token in added if token["special"]}
    unknown = content["model"].get("unk_token")  # Mistral's is " ⁇ " in a text, and "<unk>" to llguidance
    special |= {ids[unknown]} if unknown in ids else set()
    return max([*ids.values(), *(token["id"] for token in added)]), special


class GrammarConstraint:
    """llguidance's matcher of one text.

    matcher: of a tokenizer with at least vocab_size ids.  barred: ids that never are text.
    """

    complete: bool
    finished: bool

    def __init__(self, matcher: Any, vocab_size: int, barred: npt.NDArray[np.intp]) -> None:
        self._matcher = matcher
        self._barred = barred
        self._vocab_size = vocab_size
        self._look()

    def mask(self) -> Mask:
        return self._mask

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._refuse()
        self._look()

    def copy(self) -> "GrammarConstraint":
        """Another text that has come as far; much quicker than to compile it again."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._barred)

    def _look(self) -> None:
        """Ask for the tokens that may follow: only then is it known whether the text is finished."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            self._refuse()
        self._mask: Mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        self._mask[self._barred] = False
        self.complete = self._matcher.is_accepting()
        self.finished = self.complete and not self._mask.any()

    def _refuse(self) -> None:
        raise GenerationError(f"llguidance cannot go on with this text: {_reason(self._matcher.get_error())}")


def _reason(message: str) -> str:
    """One line of what llguidance says; its dumps of the parser and pictures of the regex are left out."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines()]
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return next((line for line in lines if line), "no reason given")
