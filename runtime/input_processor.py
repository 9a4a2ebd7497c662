"""A prompt or messages, and parameters → a checked request with everything its tokens are chosen by."""

import secrets
from collections.abc import Iterable, Sequence
from itertools import takewhile

from mistral_trt.errors import GenerationError
from mistral_trt.manifest import Manifest
from mistral_trt.runtime.history import Turn
from mistral_trt.runtime.request import Job, Request, Sample
from mistral_trt.runtime.sampling.candidates import Workspace
from mistral_trt.runtime.sampling.constraint import Constraint, GrammarCompiler
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.sampling.sampler import Sampler
from mistral_trt.runtime.text.chat import Message
from mistral_trt.runtime.text.text_stream import TextStream
from mistral_trt.runtime.text.tokenizer import Tokenizer


class InputProcessor:
    """What a request is checked against: the artifact's contract, its end tokens and its tokenizer.

    Any thread may call it; what it makes is then used by the scheduler's thread alone.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer | None) -> None:
        self.contract = manifest.contract
        self._tokenizer = tokenizer
        generation = manifest.details.get("generation", {})
        self._eos_tokens = frozenset(generation.get("eos_token_ids", ()))
        self._workspace = Workspace(self.contract.config.vocab_size)  # the samplers take turns on one thread
        self._grammars: GrammarCompiler | None = None
        if tokenizer is not None:
            self._grammars = GrammarCompiler(
                lambda: tokenizer.json,
                vocab_size=self.contract.config.vocab_size,
                eos_tokens=self._eos_tokens,
            )

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises GenerationError if the artifact has none."""
        if self._tokenizer is None:
            raise GenerationError(
                "this artifact has no tokenizer: pass token ids, or export again from a checkpoint with "
                "tokenizer.json"
            )
        return self._tokenizer

    def tokens(
        self,
        prompt: str | Sequence[int] | None,
        messages: Sequence[Message] | None,
        *,
        special_tokens: bool,
    ) -> list[int]:
        """Token ids of a prompt (text or ids) or of chat messages, one of which must be given."""
        if (prompt is None) == (messages is None):
            raise GenerationError("expected either a prompt or messages")
        if messages is not None:
            if special_tokens:
                raise GenerationError(
                    "special_tokens is for a prompt of text; chat templates write their own"
                )
            return self.tokenizer.encode_chat(messages)
        assert prompt is not None
        return self.prompt_tokens(prompt, special_tokens=special_tokens)

    def prompt_tokens(self, prompt: str | Sequence[int], *, special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, special_tokens=special_tokens)
        if special_tokens:
            raise GenerationError("special_tokens is for a prompt of text, and this one is token ids")
        if not isinstance(prompt, Iterable):
            raise GenerationError(f"a prompt is a text or token ids, found {prompt!r}")
        tokens = list(prompt)
        if wrong := [token for token in tokens if isinstance(token, bool) or not isinstance(token, int)]:
            raise GenerationError(f"a prompt is a text or token ids, found {wrong[0]!r} in it")
        return tokens

    def leading_tokens(self, tokens: Sequence[int]) -> int:
        """How many of a text's tokens are what the tokenizer puts before every text."""
        leading = self.tokenizer.encode("")
        pairs = zip(leading, tokens, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def request(
        self, tokens: Sequence[int], params: SamplingParams | None, *, allow_long: bool = False
    ) -> Request:
        """Check what was asked. Raises GenerationError if it cannot be served as asked."""
        params = params or SamplingParams()
        if params.stop and self._tokenizer is None:
            raise GenerationError(
                "stop strings need a tokenizer, which this artifact has not; use stop_token_ids"
            )
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_tokens)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request = Request(tokens, params, ends, seed, allow_long)
        request.check(self.contract)
        return request

    def job(self, request: Request, turn: Turn | None = None) -> Job:
        """A request ready to be queued. Raises as `request`, for what only the sampler can check."""
        job = Job(request, self.contract, turn)
        params = request.params
        for index in range(params.n):
            sampler = Sampler(
                params,
                prompt=request.prompt,
                vocab_size=self.contract.config.vocab_size,
                tokenizer_size=None if self._tokenizer is None else self._tokenizer.size,
                seed=request.seed,
                index=index,
                end_tokens=request.end_tokens,
                constraint=self._constraint(params),
                workspace=self._workspace,
            )
            job.samples.append(Sample(job, index, sampler, self._text_stream(request)))
        return job

    def _text_stream(self, request: Request) -> TextStream | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.text_stream(request.prompt, request.params.stop)

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if not params.constrained:
            return None
        if self._grammars is None:
            raise GenerationError("json_schema and regex need a tokenizer, which this artifact has not")
        schema = params.json_schema
        return self._grammars.compile(json_schema=None if schema is None else str(schema), regex=params.regex)
