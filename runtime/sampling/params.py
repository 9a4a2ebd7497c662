"""What a caller asks of a text → checked, unchanging sampling parameters."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mistral_trt.errors import GenerationError

LogitsProcessor = Callable[[Sequence[int], npt.NDArray[np.float32]], npt.NDArray[np.floating[Any]]]
"""(tokens so far: prompt and generated, read-only; logits: float32 [V], a copy that may be written to) → the
logits to use, floating point [V]; -inf bans a token.  It is called again for every token."""

_LARGEST_BIAS = 1e30


@dataclass(frozen=True)
class SamplingParams:
    """How a text's tokens are chosen, and when it ends. The rules apply in the order that `Sampler` states.

    max_tokens: most tokens to produce.
    temperature: 0 takes the most likely token; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: of those, keep the fewest most likely whose probabilities sum to p or more; 1 keeps all.
    min_p: of those, keep tokens at least min_p times as likely as the most likely; 0 keeps all.
    repetition_penalty: divides the logits, or multiplies the negative ones, of tokens in prompt or text.
    presence_penalty: is subtracted from the logit of each token of the text (not of the prompt).
    frequency_penalty: is subtracted for each time the token is in the text (not in the prompt).
    logit_bias: is added to the logits of these tokens; -inf bans one.
    seed: None draws one for the request.
    stop: strings that end the text, which is cut before them; one string may stand for a tuple of one.
    stop_token_ids: tokens that end the text, beside the model's own; they are not part of it.
    ignore_eos: do not end at the model's own end tokens.
    logprobs: None gives none, 0 the chosen token's, k also those of the k most likely tokens.
    n: how many texts to produce for each prompt.
    logits_processors: see `LogitsProcessor`; they run one after another.
    json_schema: the text is to be JSON that this schema admits; an object or its JSON text, kept as text.
    regex: the whole text is to match this expression.

    Lists are taken for tuples. json_schema and regex need the extra `constrained`, and exclude one another.
    Raises GenerationError for a value of another type or out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    logits_processors: tuple[LogitsProcessor, ...] = ()
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_rules()
        self._check_penalties()
        self._check_ends()
        for position, processor in enumerate(self.logits_processors):
            _require(callable(processor), f"logits_processors[{position}] to be callable", processor)
        self._check_constraint()

    @property
    def constrained(self) -> bool:
        """Whether json_schema or regex is given."""
        return self.json_schema is not None or self.regex is not None

    def _check_lengths(self) -> None:
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens >= 1", self.max_tokens)
        _require(_is_int(self.n) and self.n >= 1, "n >= 1", self.n)
        wanted = self.logprobs
        _require(wanted is None or (_is_int(wanted) and wanted >= 0), "logprobs None or >= 0", wanted)

    def _check_rules(self) -> None:
        heat = self.temperature
        _require(_is_number(heat) and heat >= 0, "temperature >= 0", heat)
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k >= 0", self.top_k)
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "0 < top_p <= 1", self.top_p)
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "0 <= min_p <= 1", self.min_p)
        seeded = self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**64)
        _require(seeded, "seed None or 0 <= seed < 2**64", self.seed)

    def _check_penalties(self) -> None:
        factor = self.repetition_penalty
        _require(_is_number(factor) and 0.01 <= factor <= 100, "0.01 <= repetition_penalty <= 100", factor)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and -2 <= value <= 2, f"-2 <= {name} <= 2", value)
        _require(isinstance(self.logit_bias, Mapping), "logit_bias: a mapping of token ids", self.logit_bias)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            _require(_is_int(token) and token >= 0, "logit_bias: token ids >= 0", token)
            usable = bias == -math.inf or (_is_number(bias) and abs(bias) <= _LARGEST_BIAS)
            _require(usable, f"logit_bias[{token}]: -inf, or a number within ±{_LARGEST_BIAS:g}", bias)

    def _check_ends(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "logits_processors"):
            found = getattr(self, name)
            _require(isinstance(found, tuple | list), f"{name}: a tuple", found)
            object.__setattr__(self, name, tuple(found))
        for text in self.stop:
            _require(isinstance(text, str) and text != "" and _is_utf8(text), "stop: texts, not empty", text)
        for token in self.stop_token_ids:
            _require(_is_int(token) and token >= 0, "stop_token_ids: token ids >= 0", token)
        _require(isinstance(self.ignore_eos, bool), "ignore_eos: True or False", self.ignore_eos)

    def _check_constraint(self) -> None:
        if self.json_schema is not None and self.regex is not None:
            raise GenerationError("sampling: expected json_schema or regex, found both")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        usable = self.regex is None or (isinstance(self.regex, str) and self.regex and _is_utf8(self.regex))
        _require(bool(usable), "regex: a text, not empty", self.regex)


def _schema_text(schema: object) -> str:
    """A JSON schema as JSON text.  Raises GenerationError if it is not an object of JSON."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(found, Mapping):
            text = json.dumps(dict(found), allow_nan=False)
            return text
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"sampling: expected json_schema: a JSON object, found: {error}") from error
    raise GenerationError(f"sampling: expected json_schema: a JSON object, found {schema!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """A finite int or float that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < math.inf and (isinstance(value, float) or abs(value) <= sys.float_info.max)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: no text that is given out can hold it
        return False
    return True


def _require(holds: bool, rule: str, found: object) -> None:
    if not holds:
        raise GenerationError(f"sampling: expected {rule}, found {found!r}")
