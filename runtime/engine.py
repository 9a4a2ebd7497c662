"""An artifact folder → an engine that turns prompts into text.

engine = Engine.load("build/demo/onnx-fp16")
for piece in engine.stream("The capital of France is"):
    print(piece.text, end="")
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_trt.errors import EngineMismatchError, GenerationError, NonFiniteLogitsError, require
from mistral_trt.manifest import GRAPH_NAME, Manifest, read_manifest
from mistral_trt.runtime import device
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine_folder import check_engine_folder
from mistral_trt.runtime.generate import FinishReason, Request, run_requests
from mistral_trt.runtime.sampling import SamplingParams
from mistral_trt.runtime.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Piece:
    """A bit of streamed text; the last of a stream has a finish_reason and no token."""

    text: str
    token: int | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Output:
    """A finished text. `tokens` leaves out the prompt and the token that ended the text."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason


class Engine:
    """A loaded artifact. Any thread may call it; a request waits up to row_timeout_s for free rows."""

    def __init__(
        self,
        cache: RollingCache,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        row_timeout_s: float = 60.0,
    ) -> None:
        self.cache = cache
        self.manifest = manifest
        self._tokenizer = tokenizer
        self._row_timeout_s = row_timeout_s

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        trust_weights: bool = False,
        row_timeout_s: float = 60.0,
    ) -> "Engine":
        """Check the artifact and load it.

        threads: CPU threads, None for the backend's own choice.  trust_weights: compare sizes only, not
        hashes; that of an engine's plan always is.  row_timeout_s: how long a request waits while all rows
        are in use.
        Raises ManifestError for an altered folder, EngineMismatchError for one that cannot run here.
        """
        path = Path(folder)
        manifest = read_manifest(path, check_files=not trust_weights)
        cache = _open_backend(path, manifest, threads, trusted=trust_weights)
        has_text = "tokenizer.json" in manifest.files
        tokenizer = Tokenizer.from_folder(path) if has_text else None
        return cls(cache, manifest, tokenizer, row_timeout_s)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises GenerationError if the artifact has none."""
        if self._tokenizer is None:
            raise GenerationError(
                "this artifact has no tokenizer: pass token ids, or export again from a checkpoint with "
                "tokenizer.json"
            )
        return self._tokenizer

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        allow_long: bool = False,
    ) -> Generator[Piece]:
        """Produce a text piece by piece, from a prompt (text or token ids) or from chat messages.

        Raises GenerationError before the first piece if the request cannot be served, and
        NonFiniteLogitsError if the model produces NaN or infinity.
        """
        request = self._request(prompt, messages, params or SamplingParams(), allow_long)
        return self._stream(request, allow_long)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        *,
        allow_long: bool = False,
    ) -> list[Output]:
        """Produce a text for each prompt, max_batch_size of them at a time."""
        settings = params or SamplingParams()
        requests = [self._request(prompt, None, settings, allow_long) for prompt in prompts]
        rows = self.cache.capacity_rows
        for start in range(0, len(requests), rows):
            for _ in self._run(requests[start : start + rows], allow_long):
                pass
        return [self._output(request) for request in requests]

    def _stream(self, request: Request, allow_long: bool) -> Generator[Piece]:
        decoder = self._tokenizer.decoder(request.prompt) if self._tokenizer else None
        for _, token in self._run([request], allow_long):
            if token is not None:
                yield Piece(decoder.push(token) if decoder else "", token)
        if request.finish_reason == "error":
            raise NonFiniteLogitsError([request.row], {})
        yield Piece("", None, request.finish_reason)

    def _run(self, requests: Sequence[Request], allow_long: bool) -> Iterator[tuple[int, int | None]]:
        return run_requests(self.cache, requests, timeout_s=self._row_timeout_s, allow_long=allow_long)

    def _request(
        self,
        prompt: str | Sequence[int] | None,
        messages: Sequence[Message] | None,
        params: SamplingParams,
        allow_long: bool,
    ) -> Request:
        if (prompt is None) == (messages is None):
            raise GenerationError("expected either a prompt or messages")
        if messages is not None:
            tokens: Sequence[int] = self.tokenizer.encode_chat(messages)
        else:
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt or ())
        generation = self.manifest.details.get("generation", {})
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= set(generation.get("eos_token_ids", ()))
        request = Request(tokens, params, frozenset(ends))
        if reason := self.manifest.contract.check_position(len(tokens), allow_long=allow_long):
            raise GenerationError(f"the prompt has {len(tokens)} tokens, the first new one: {reason}")
        return request

    def _output(self, request: Request) -> Output:
        if request.finish_reason is None:
            raise GenerationError("the request did not run to its end")
        text = ""
        if self._tokenizer is not None:
            decoder = self._tokenizer.decoder(request.prompt)
            text = "".join(decoder.push(token) for token in request.tokens)
        return Output(text, tuple(request.tokens), request.finish_reason)


def open_cache(
    folder: Path, *, threads: int | None = None, trust_weights: bool = False, exact: bool = False
) -> RollingCache:
    """The rolling cache alone, for callers that feed tokens and read logits themselves.

    exact: see `OnnxRuntimeBackend`.
    """
    manifest = read_manifest(folder, check_files=not trust_weights)
    return _open_backend(folder, manifest, threads, exact=exact, trusted=trust_weights)


def _open_backend(
    folder: Path, manifest: Manifest, threads: int | None, *, exact: bool = False, trusted: bool = False
) -> RollingCache:
    if manifest.stage == "engine":
        check_engine_folder(folder, manifest, device.local_device, plan_hashed=not trusted)
        raise EngineMismatchError(
            f"{folder} is whole and fits this machine, but this version builds and checks TensorRT engines "
            "and does not execute them: the TensorRT backend is not in it; run the ONNX folder it was built "
            "from: mistral-trt generate ONNX_DIR --prompt TEXT"
        )
    module = require("mistral_trt.runtime.onnxruntime_backend", "onnxruntime")
    backend = module.OnnxRuntimeBackend(folder / GRAPH_NAME, manifest.contract, threads=threads, exact=exact)
    return RollingCache(backend)
