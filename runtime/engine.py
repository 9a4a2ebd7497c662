"""An artifact folder → an engine that turns prompts into text.

engine = Engine.load("build/demo/onnx-fp16")
for piece in engine.stream("The capital of France is"):
    print(piece.text, end="")
"""

import logging
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from mistral_trt.errors import ArtifactError, GenerationError
from mistral_trt.manifest import Manifest, manifest_sha256
from mistral_trt.runtime.backend import Backend, Progress
from mistral_trt.runtime.batch import Batch, run_batch, run_batch_async
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.history import History
from mistral_trt.runtime.input_processor import InputProcessor
from mistral_trt.runtime.loading import open_artifact, require_used
from mistral_trt.runtime.metrics import Counters, Metrics
from mistral_trt.runtime.request import Job, Output
from mistral_trt.runtime.rings.parked_rings import ParkedRings
from mistral_trt.runtime.rings.ring_folder import RingFolder
from mistral_trt.runtime.rings.ring_store import RingStore
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.scheduling.request_queue import RequestQueue, Work
from mistral_trt.runtime.scheduling.scheduler import Scheduler
from mistral_trt.runtime.session import Session, SessionHost, restored
from mistral_trt.runtime.stream import AsyncStream, Stream
from mistral_trt.runtime.text.chat import Message, checked
from mistral_trt.runtime.text.tokenizer import Tokenizer

log = logging.getLogger("mistral_trt.runtime")

Prompt = str | Sequence[int]

_SESSION_ROWS_IN_MEMORY = 4
_SESSION_ROWS_ON_DISK = 32


class Engine:
    """A loaded artifact. Any thread and any event loop may call it.

    queue_size: most requests that may wait for a row; the next is refused with QueueFullError.
    fixed_batch: always decode over max_batch_size rows, so that logits do not depend on what else runs, down
    to the last bit.  session_memory_bytes: host memory for rings of idle sessions, by default four rows'
    worth.  session_dir: a folder where those beyond it go; without one they are dropped.  session_disk_bytes:
    what they may take there, by default 32 rows' worth; those beyond that are dropped.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        *,
        artifact_sha256: str = "",
        queue_size: int = 256,
        fixed_batch: bool = False,
        session_memory_bytes: int | None = None,
        session_dir: str | Path | None = None,
        session_disk_bytes: int | None = None,
    ) -> None:
        """`Engine.load` makes engines; this takes any backend, which it closes when it is closed itself.

        tokenizer: None takes and gives token ids only.  artifact_sha256: of the manifest, for saved sessions.
        """
        self.manifest = manifest
        self._backend = backend
        cache, counters = RollingCache(backend), Counters()
        row_bytes = cache.contract.ring_bytes_per_row
        memory = _SESSION_ROWS_IN_MEMORY * row_bytes if session_memory_bytes is None else session_memory_bytes
        disk = _SESSION_ROWS_ON_DISK * row_bytes if session_disk_bytes is None else session_disk_bytes
        _require_count("queue_size", queue_size)
        _require_count("session_memory_bytes", memory)
        _require_count("session_disk_bytes", disk)
        if session_dir is None and session_disk_bytes is not None:
            raise GenerationError("session_disk_bytes is a bound of session_dir; pass that too")
        inbox: SimpleQueue[Work | None] = SimpleQueue()
        files = _ring_folder(session_dir, manifest, artifact_sha256, inbox)
        queue = RequestQueue(cache.capacity_rows, queue_size)
        parked = ParkedRings(row_bytes, files, memory_bytes=memory, disk_bytes=disk, wanted=queue.has_turn)
        store = RingStore(cache, counters, parked, wanted=queue.has_turn)
        self._inputs = InputProcessor(manifest, tokenizer)
        self._scheduler = Scheduler(cache, store, counters, queue, inbox, fixed_batch=fixed_batch)
        self._host = (store, artifact_sha256)
        self._batch_width = 2 * cache.capacity_rows
        weakref.finalize(self, self._scheduler.stop).atexit = False  # the scheduler sees to that itself

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        provider: str = "auto",
        trust_weights: bool = False,
        fixed_batch: bool = False,
        queue_size: int = 256,
        session_memory_bytes: int | None = None,
        session_dir: str | Path | None = None,
        session_disk_bytes: int | None = None,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> "Engine":
        """Check the artifact and load it; an engine folder is also warmed up, every decode batch of it.

        threads: CPU threads of ONNX Runtime, None for its own choice.  provider: of ONNX Runtime, "cpu",
        "cuda", or "auto" for CUDA where it has it.  trust_weights: compare sizes only, not hashes; that of an
        engine's plan always is.  cache_dir: where TensorRT-RTX keeps what it compiles.  progress: called with
        what is being done and which share of it is.  The others: see `Engine`.
        Raises ManifestError for an altered folder, EngineMismatchError for one that cannot run here, or for
        an option that what runs it would not use.
        """
        path, started = Path(folder), time.perf_counter()
        kernels = None if cache_dir is None else Path(cache_dir)
        require_used(path, threads=threads, provider=provider, cache_dir=kernels)
        manifest, backend = open_artifact(
            path,
            threads=threads,
            provider=provider,
            trust_weights=trust_weights,
            fixed_batch=fixed_batch,
            cache_dir=kernels,
            progress=progress,
        )
        try:
            backend.warm_up(progress)
            engine = cls(
                backend,
                manifest,
                Tokenizer.from_folder(path) if "tokenizer.json" in manifest.files else None,
                artifact_sha256=manifest_sha256(path),
                queue_size=queue_size,
                fixed_batch=fixed_batch,
                session_memory_bytes=session_memory_bytes,
                session_dir=session_dir,
                session_disk_bytes=session_disk_bytes,
            )
        except BaseException:
            backend.close()
            raise
        log.info("%s loaded in %.1f s", path, time.perf_counter() - started)
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises GenerationError if the artifact has none."""
        return self._inputs.tokenizer

    @property
    def ready(self) -> bool:
        """Whether it serves requests at full speed: warmed up, not closed, and able to run."""
        return self._scheduler.closed is None and self._backend.ready

    def stream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        special_tokens: bool = False,
        allow_long: bool = False,
    ) -> Stream:
        """Produce a text piece by piece, from a prompt (text or token ids) or from chat messages.

        special_tokens: text such as "</s>" in the prompt becomes the token of that name.  allow_long: go past
        position 2**20, where rotary angles lose accuracy.
        Raises GenerationError if the request cannot be served as asked, QueueFullError if too many wait,
        EngineClosedError. What goes wrong later is raised by the stream.
        """
        job = self._job(prompt, params, messages, special_tokens, allow_long)
        return Stream(job, self._scheduler, self)

    def astream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        special_tokens: bool = False,
        allow_long: bool = False,
    ) -> AsyncStream:
        """As `stream`, for `async for`; the first piece raises what `stream` raises."""
        return AsyncStream(
            lambda: self._job(prompt, params, messages, special_tokens, allow_long), self._scheduler, self
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        special_tokens: bool = False,
        allow_long: bool = False,
    ) -> list[Output]:
        """Produce a text for each prompt, n of them with params.n; prompt 0 sample 0, prompt 0 sample 1, …

        Prompts beyond the rows are queued as others end. If one fails, the others are cancelled and its error
        is raised. Raises as `stream`, for any of them before the first is queued.
        """
        return run_batch(self._batch(prompts, params, special_tokens, allow_long))

    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        special_tokens: bool = False,
        allow_long: bool = False,
    ) -> list[Output]:
        """As `generate`, without blocking the event loop."""
        return await run_batch_async(lambda: self._batch(prompts, params, special_tokens, allow_long))

    def session(self, system: str | None = None, *, messages: Sequence[Message] | None = None) -> Session:
        """A conversation that keeps its ring between turns.

        system: a system message to begin a chat with.  messages: any messages to begin one with, before the
        first turn's. With neither, the first turn says whether it is a chat or a text.
        """
        first = [] if system is None else [{"role": "system", "content": system}]
        chat = None if system is None and messages is None else tuple(checked([*first, *(messages or ())]))
        return Session(self._session_host(), History(messages=chat))

    def restore_session(self, file: str | Path) -> Session:
        """A session that `Session.save` wrote, as it was.

        Raises SessionError for a file of another artifact, or one that was altered or cut short.
        """
        return restored(self._session_host(), Path(file))

    def metrics(self) -> Metrics:
        """What the engine did since it was loaded, and does now."""
        return self._scheduler.metrics()

    def close(self) -> None:
        """End what runs as cancelled, and give memory back. Later requests raise EngineClosedError."""
        self._scheduler.close()
        log.info("engine closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _session_host(self) -> SessionHost:
        return SessionHost(self._inputs, self._scheduler, *self._host, owner=self)

    def _job(
        self,
        prompt: Prompt | None,
        params: SamplingParams | None,
        messages: Sequence[Message] | None,
        special_tokens: bool,
        allow_long: bool,
    ) -> Job:
        tokens = self._inputs.tokens(prompt, messages, special_tokens=special_tokens)
        return self._inputs.job(self._inputs.request(tokens, params, allow_long=allow_long))

    def _batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None,
        special_tokens: bool,
        allow_long: bool,
    ) -> Batch:
        if isinstance(prompts, str):
            raise GenerationError("expected a list of prompts, found one text; pass [prompt]")
        inputs = self._inputs
        requests = [
            inputs.request(
                inputs.prompt_tokens(prompt, special_tokens=special_tokens), params, allow_long=allow_long
            )
            for prompt in prompts
        ]
        return Batch(requests, inputs.job, self._scheduler, self._batch_width)


def open_cache(
    folder: Path, *, threads: int | None = None, trust_weights: bool = False, exact: bool = False
) -> RollingCache:
    """The rolling cache alone, for callers that feed tokens and read logits themselves.

    exact: see `OnnxRuntimeBackend`.
    """
    _, backend = open_artifact(
        Path(folder), threads=threads, trust_weights=trust_weights, exact=exact, provider="cpu"
    )
    return RollingCache(backend)


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise GenerationError(f"{name} must be a whole number, found {value!r}")


def _ring_folder(
    session_dir: str | Path | None, manifest: Manifest, sha: str, inbox: "SimpleQueue[Work | None]"
) -> RingFolder | None:
    if session_dir is None:
        return None
    if not Path(session_dir).is_dir():
        raise ArtifactError(f"session_dir: {session_dir} is not a folder; make it first")
    return RingFolder(Path(session_dir), manifest.contract, sha, inbox.put)
